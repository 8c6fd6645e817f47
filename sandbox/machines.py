"""The machine provider: as many machines per zone as ordered. Deleting a Node ends its machine; a new one boots.

A machine crashes when `b` or `c` is written to its /proc/sysrq-trigger (a FIFO that hostPath mounts reach): after
`b` it resets and boots again under its name, after `c` it stays down, as one whose kernel does not reboot on panic.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.apiserver import TlsFiles
from sandbox.client import NODES, Api, EventType, Informer, Obj
from sandbox.node import kernel_log
from sandbox.node.agent import Machine
from sandbox.node.cgroups import Group
from sandbox.node.volumes import Place
from sandbox.node.zygote import Spawn, StartError, ZygoteClient
from sandbox.options import Options

log = logging.getLogger(__name__)

_DEAF_SECONDS = 0.5  # less than a machine takes to boot
MOST_PER_ZONE = 60  # machine names for which identities are made in advance


def machine_name(zone: str, number: int) -> str:
    return f"node-{zone}-{number}"


@dataclass(slots=True)
class Machines:
    """Boots and terminates machines through the fabric's zygote."""

    zygote: ZygoteClient
    options: Options
    state: Path
    tls: TlsFiles
    tokens: dict[str, str]  # machine name → token
    group: Group | None  # the sandbox's control group
    _live: dict[str, Machine] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)  # the last number given out, by zone
    _index: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _rebooting: set[str] = field(default_factory=set)
    _triggers: dict[str, int] = field(default_factory=dict)  # machine name → its sysrq FIFO, open

    async def boot_all(self) -> list[str]:
        """The first machines, in the order of their zones: their names. Raises `StartError`."""
        orders = [self._next(zone) for _ in range(self.options.nodes_per_zone) for zone in self.options.zones]
        await asyncio.gather(*(self._boot(machine) for machine in orders))
        return [machine.name for machine in orders]

    def _next(self, zone: str) -> Machine:
        number = self._numbers.get(zone, 0) + 1
        self._numbers[zone] = number
        self._index += 1
        name = machine_name(zone, number)
        root = str(self.state / "nodes" / name)
        token = self.tokens.get(name, "")
        gpus = self.options.gpus_per_node
        group = self.group.child(name) if self.group else None
        # A real API server speaks to kubelets in TLS only; our own need not pay for that.
        serving = () if self.options.control_plane is None else (str(self.tls.cert), str(self.tls.key))
        clocks, latency = self.options.clocks, self.options.zone_latency_ms / 1000
        return Machine(name, self._index, zone, gpus, root, token, self.tls.ca_pem, clocks, group, serving, latency)

    async def _boot(self, machine: Machine) -> None:
        place = Place(Path(machine.root))
        kernel_log.make(place)
        if machine.group:
            machine.group.make()
        log_file = os.open(self.state / "logs" / f"{machine.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            order = Spawn(
                id=machine.name,
                title=f"node {machine.name}",
                call="sandbox.node.machine:main",
                argv=(machine.dump(), machine.name),
                env={"PATH": os.environ.get("PATH", os.defpath)},
                isolated=True,
                hostname=machine.name,
            )
            await self.zygote.spawn(order, log_file, log_file)
        finally:
            os.close(log_file)
        self._live[machine.name] = machine
        self._listen(machine, place)
        self._start(self._watch_crash(machine))

    async def _watch_crash(self, machine: Machine) -> None:
        code = await self.zygote.exited(machine.name)
        if machine.name not in self._rebooting:
            if machine.name in self._live:
                log.warning("machine %s is down (%d); it stays so until its Node is deleted", machine.name, code)
            return
        await asyncio.sleep(self.options.clocks.machine_reboot)
        self._rebooting.discard(machine.name)
        if self._live.get(machine.name) is not machine:  # its Node was deleted meanwhile
            return
        self.zygote.forget(machine.name)
        try:
            await self._boot(machine)
            log.info("machine %s is up again", machine.name)
        except StartError as failed:
            log.error("machine %s does not boot again: %s", machine.name, failed)

    def _listen(self, machine: Machine, place: Place) -> None:
        if machine.name in self._triggers:
            return
        # Read and write: the FIFO must neither end when a writer leaves nor block the next one.
        fd = self._triggers[machine.name] = os.open(place.sysrq, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(fd, self._triggered, machine, fd)

    def _triggered(self, machine: Machine, fd: int) -> None:
        try:
            key = os.read(fd, 4096)[:1]
        except BlockingIOError:
            return
        if key not in (b"b", b"c") or not self.zygote.running(machine.name):
            return
        log.warning("machine %s crashes (sysrq %s)", machine.name, key.decode())
        if key == b"b":
            self._rebooting.add(machine.name)
        self._crash(machine)

    def _crash(self, machine: Machine) -> None:
        """Kernel, kubelet and pods end at the same instant, without a word on the network."""
        self.zygote.kill(machine.name, signal.SIGPWR)
        # A machine that does not even hear that has been stopped, or has not begun: it ends all the same.
        asyncio.get_running_loop().call_later(_DEAF_SECONDS, self.zygote.kill, machine.name, signal.SIGKILL)

    async def run(self, api: Api) -> None:
        """Follow the Node objects until cancelled."""
        await Informer(api, NODES, on_event=self._on_node).run()

    def _on_node(self, kind: EventType, node: Obj, _: Obj | None) -> None:
        machine = self._live.get(node["metadata"]["name"])
        if kind == "DELETED" and machine:
            self._start(self._replace(machine))

    async def _replace(self, machine: Machine) -> None:
        del self._live[machine.name]
        self._rebooting.discard(machine.name)
        if (fd := self._triggers.pop(machine.name, None)) is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._crash(machine)
        await self.zygote.exited(machine.name)
        self.zygote.forget(machine.name)
        if machine.group:
            machine.group.remove()
        log.info("machine %s terminated", machine.name)
        await asyncio.sleep(self.options.clocks.machine_boot)
        await asyncio.to_thread(shutil.rmtree, machine.root, ignore_errors=True)
        successor = self._next(machine.zone)
        if not successor.token:
            log.error("zone %s had %d machines already; no more", machine.zone, MOST_PER_ZONE)
            return
        try:
            await self._boot(successor)
            log.info("machine %s replaces %s", successor.name, machine.name)
        except StartError as failed:
            log.error("machine %s does not boot: %s", successor.name, failed)

    def _start(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
