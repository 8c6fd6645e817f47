"""A control plane, the chaos controller and pods in real network namespaces, for the tests of chaos."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from apiserver_world import cluster
from nodes_world import api_of

from sandbox.apiserver.core import Webhooks
from sandbox.chaos import controller, daemon
from sandbox.client import EVENTS, NETWORKCHAOS, PODCHAOS, PODS, ApiError, HttpApi, Kind, Obj
from sandbox.node import linux
from sandbox.up import Running

NS = "default"
WITHIN = 10.0  # seconds; every wait's bound
ADDRESSES = {"a": "10.9.0.2", "b": "10.9.0.3", "c": "10.9.0.4"}
EVERY = {"ab", "ac", "ba", "bc", "ca", "cb"}  # who may reach whom


@dataclass(slots=True)
class World:
    api: HttpApi
    controller: asyncio.Task[None]

    async def until(self, what: str, probe: Callable[[], Awaitable[Any]]) -> Any:
        """The first truthy answer of `probe`; fails naming `what` after `WITHIN` seconds."""
        seen: Any = None
        try:
            async with asyncio.timeout(WITHIN):
                while not (seen := await probe()):
                    if self.controller.done():
                        self.controller.result()
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not within {WITHIN} s: {what}") from None
        return seen

    async def pod(self, name: str, *, ip: str = "", phase: str = "Running", node: str = "n1", **spec: Any) -> Obj:
        """A pod with containers "main" and "side" and an init container, as a kubelet would have it running."""
        body: Obj = {
            "nodeName": node,
            "containers": [{"name": "main", "image": "app:1"}, {"name": "side", "image": "side:1"}],
            "initContainers": [{"name": "prepare", "image": "init:1"}],
            **spec,
        }
        await self.api.create(PODS, {"metadata": {"name": name, "labels": {"app": name}}, "spec": body}, NS)
        running = [
            {
                "name": entry["name"],
                "image": entry["image"],
                "imageID": "",
                "ready": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
            }
            for entry in body["containers"]
        ]
        status: Obj = {"phase": phase, "containerStatuses": running}
        if ip:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        return await self.api.patch(PODS, name, {"status": status}, NS, sub="status")

    async def chaos(self, kind: Kind, name: str, spec: Obj) -> Obj:
        return await self.api.create(kind, manifest(kind, name, spec), NS)

    async def pod_chaos(self, name: str, action: str, *apps: str, **more: Any) -> Obj:
        return await self.chaos(PODCHAOS, name, {"action": action, "mode": "all", "selector": chosen(*apps), **more})

    async def partition(self, name: str, source: str, target: str | None, direction: str, **more: Any) -> Obj:
        spec: Obj = {"action": "partition", "mode": "all", "selector": chosen(source), "direction": direction}
        if target:
            spec["target"] = {"mode": "all", "selector": chosen(target)}
        return await self.chaos(NETWORKCHAOS, name, {**spec, **more})

    async def injected(self, kind: Kind, name: str) -> Obj:
        return await self.until(f"{name} all injected", lambda: self._with(kind, name, "Run", "AllInjected"))

    async def recovered(self, kind: Kind, name: str) -> Obj:
        return await self.until(f"{name} all recovered", lambda: self._with(kind, name, "Stop", "AllRecovered"))

    async def _with(self, kind: Kind, name: str, desired: str, condition: str) -> Obj | None:
        obj = await self.api.get(kind, name, NS)
        met = condition_of(obj, condition) == "True" and desired_phase(obj) == desired
        return obj if met else None

    async def noted(self, kind: Kind, name: str, text: str) -> Obj:
        """The object, once some record's event holds `text`."""

        async def probe() -> Obj | None:
            obj = await self.api.get(kind, name, NS)
            events = [event for record in records(obj) for event in record.get("events", ())]
            return obj if any(text in event.get("message", "") for event in events) else None

        return await self.until(f"{name} notes {text!r}", probe)

    async def told(self, name: str, text: str) -> Obj:
        """The Event about `name` that holds `text`."""

        async def probe() -> Obj | None:
            events, _ = await self.api.list(EVENTS, NS, fields=f"involvedObject.name={name}")
            return next((event for event in events if text in event["message"]), None)

        return await self.until(f"an Event about {name} with {text!r}", probe)

    async def delete(self, kind: Kind, name: str) -> None:
        await self.api.delete(kind, name, NS)
        await self.gone(kind, name)

    async def gone(self, kind: Kind, name: str) -> None:
        async def probe() -> bool:
            try:
                await self.api.get(kind, name, NS)
            except ApiError as error:
                return error.not_found
            return False

        await self.until(f"{name} is gone", probe)

    async def restart_controller(self) -> None:
        self.controller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.controller
        self.controller = asyncio.create_task(controller.run(self.api))


def manifest(kind: Kind, name: str, spec: Obj) -> Obj:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {"name": name, "namespace": NS},
        "spec": spec,
    }


def chosen(*apps: str) -> Obj:
    wanted = {"key": "app", "operator": "In", "values": list(apps)}
    return {"namespaces": [NS], "expressionSelectors": [wanted], "podPhaseSelectors": ["Running"]}


def condition_of(obj: Obj, kind: str) -> str | None:
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((entry["status"] for entry in conditions if entry["type"] == kind), None)


def desired_phase(obj: Obj) -> str | None:
    phase: str | None = ((obj.get("status") or {}).get("experiment") or {}).get("desiredPhase")
    return phase


def records(obj: Obj) -> list[Obj]:
    return ((obj.get("status") or {}).get("experiment") or {}).get("containerRecords") or []


@contextlib.asynccontextmanager
async def world(directory: Path, webhooks: Webhooks | None = None) -> AsyncIterator[World]:
    async with cluster(directory, webhooks) as one:
        await controller.install_crds(one.api)
        made = World(one.api, asyncio.create_task(controller.run(one.api)))
        try:
            yield made
        finally:
            made.controller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await made.controller


def play(test: Callable[[World], Awaitable[None]]) -> None:
    """Run `test` in a world of its own."""

    async def main() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with world(Path(directory)) as one:
                await test(one)

    asyncio.run(main())


@dataclass(slots=True)
class Net:
    """Network namespaces on one bridge inside a namespace of their own; nothing is left on the host."""

    fds: dict[str, int] = field(default_factory=dict)
    uids: dict[str, int] = field(default_factory=dict)  # pod uid → descriptor, what a node agent knows

    def run(self, name: str, *command: str) -> str:
        def enter() -> None:
            linux.setns(self.fds[name], linux.CLONE_NEWNET)

        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def socket(self, name: str, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
        """A socket in the namespace."""
        made: list[socket.socket] = []

        def work() -> None:
            linux.setns(self.fds[name], linux.CLONE_NEWNET)
            made.append(socket.socket(socket.AF_INET, kind))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        made[0].settimeout(0.3)
        return made[0]

    def udp(self, source: str, target: str, address: str) -> bool:
        """Does a datagram get from `source` to `target`?"""
        with self.socket(source) as sender, self.socket(target) as receiver:
            receiver.bind((address, 0))
            try:
                sender.sendto(b"ping", receiver.getsockname())  # a drop in the output hook is EPERM for UDP
                return receiver.recv(16) == b"ping"
            except (PermissionError, TimeoutError):
                return False

    def table(self, name: str) -> str:
        return self.run(name, "nft", "list", "ruleset")


def _new_namespace() -> int:
    made: list[int] = []

    def work() -> None:
        linux.unshare(linux.CLONE_NEWNET)
        made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


@contextlib.contextmanager
def net(**addresses: str) -> Iterator[Net]:
    """One namespace per name, with `eth0` and its address, all on one bridge. Skips without root."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    made = Net()
    try:
        made.fds["bridge"] = _new_namespace()
        made.run("bridge", "ip", "link", "add", "br0", "type", "bridge")
        made.run("bridge", "ip", "link", "set", "br0", "up")
        for name, address in addresses.items():
            fd = made.fds[name] = _new_namespace()
            made.run("bridge", "ip", "link", "add", f"v-{name}", "type", "veth", "peer", "name", f"p-{name}")
            made.run("bridge", "ip", "link", "set", f"v-{name}", "master", "br0", "up")
            _move(made, f"p-{name}", fd)
            made.run(name, "ip", "link", "set", f"p-{name}", "name", "eth0")
            made.run(name, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
            made.run(name, "ip", "link", "set", "eth0", "up")
        _await_all(made, addresses)
        yield made
    finally:
        for fd in made.fds.values():
            os.close(fd)


def _await_all(made: Net, addresses: Mapping[str, str]) -> None:
    """Until everybody reaches everybody: an address that is not resolved at once is asked for again only after 1 s."""
    pairs = [(one, other) for one in addresses for other in addresses if one != other]
    end = time.monotonic() + WITHIN
    while left := [pair for pair in pairs if not made.udp(*pair, addresses[pair[1]])]:
        assert time.monotonic() < end, f"{left} do not reach each other"
        pairs = left


def _move(made: Net, link: str, fd: int) -> None:
    holder = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: linux.setns(fd, linux.CLONE_NEWNET))  # noqa: PLW1509
    try:
        made.run("bridge", "ip", "link", "set", link, "netns", str(holder.pid))
    finally:
        holder.kill()
        holder.wait()


async def launch(netns: int, argv: Sequence[str], out: int) -> asyncio.subprocess.Process:
    """A traffic shaper in a network namespace, as a node agent starts one."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sandbox.chaos.shaper", *argv,
        stdout=out, preexec_fn=lambda: linux.setns(netns, linux.CLONE_NEWNET),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def node(one: World, made: Net, name: str = "n1") -> AsyncIterator[None]:
    """The chaos daemon of a node."""
    task = asyncio.create_task(daemon.run(one.api, name, made.uids.get, launch))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def placed(one: World, **addresses: str) -> AsyncIterator[Net]:
    """Pods of these names and addresses, each in a network namespace of its own."""
    with net(**addresses) as made:
        for name, address in addresses.items():
            pod = await one.pod(name, ip=address)
            made.uids[pod["metadata"]["uid"]] = made.fds[name]
        yield made


def with_pods(test: Callable[[World, Net], Awaitable[None]]) -> None:
    """Pods a, b and c on node n1, whose chaos daemon runs."""

    async def main(one: World) -> None:
        async with placed(one, **ADDRESSES) as made, node(one, made):
            await test(one, made)

    play(main)


def on(running: Running, test: Any) -> None:
    """Run `test` in the world of a sandbox, whose controller is its own."""

    async def main() -> None:
        async with api_of(running) as api:
            forever = asyncio.create_task(asyncio.Event().wait())
            try:
                await test(World(api, forever))  # type: ignore[arg-type]
            finally:
                forever.cancel()

    asyncio.run(main())
