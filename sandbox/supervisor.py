"""The supervisor: the one process of the sandbox in the host's network, and the parent of everything else.

It opens the sockets on 127.0.0.1, forks the fabric's zygote (in namespaces of its own), has the services and machines
made there, deploys the stack, reports to whoever started it, and then stays to keep all of it alive or to end it.
When it dies, by whatever signal, the kernel kills the zygote and with it every process of the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import setproctitle
import uvloop

from sandbox import addons, binaries, deploy, prometheus
from sandbox.apiserver import Identity, TlsFiles, make_tls
from sandbox.chaos import controller, webhooks
from sandbox.client import ApiError, HttpApi
from sandbox.controlplane import ADMIN, serve
from sandbox.kubeconfig import CONTEXT, write_kubeconfig
from sandbox.machines import MOST_PER_ZONE, Machines, machine_name
from sandbox.node import cgroups, linux, mounts, network
from sandbox.node.cgroups import Group
from sandbox.node.zygote import Spawn, StartError, Zygote, ZygoteClient, freeze, pair
from sandbox.options import Clocks, Options
from sandbox.up import Running, SandboxError, clear, last_words, load

log = logging.getLogger(__name__)

NAMESPACE, MODEL = "llm", "my-llama32"
_STARTED_SECONDS = 20.0  # for the control plane to answer
_REAL_STARTED_SECONDS = 60.0  # and for a real one, which takes 4 to 9 s on an idle machine
# Loaded before the first fork, so that no process of the sandbox imports anything.
_PRELOAD = (
    "sandbox.controllers",
    "sandbox.node.machine",
    "sandbox.chaos.daemon",
    "sandbox.chaos.shaper",
    "sandbox.chaos.stress",
    "sandbox.images.engine",
    "sandbox.images.gateway",
    "sandbox.images.npd",
    "sandbox.images.dcgm",
)


class Reports:
    """The pipe to whoever waits in `up`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, report: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: see `watch`
            os.write(self._fd, orjson.dumps(report) + b"\n")

    def say(self, line: str) -> None:
        self.send({"say": line})

    def watch(self, gone: asyncio.Event) -> None:
        """Set `gone` when the reader goes away."""
        asyncio.get_running_loop().add_reader(self._fd, gone.set)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)


@dataclass(slots=True)
class Sockets:
    """The only doors between the host and the fabric."""

    api: socket.socket
    prometheus: socket.socket | None = None
    target: socket.socket | None = None

    @staticmethod
    def open(options: Options) -> Sockets:
        """Raises `SandboxError` when a port is taken."""
        if options.bare:
            return Sockets(_listen(options.api_port, "API server"))
        return Sockets(
            _listen(options.api_port, "API server"),
            _listen(options.prometheus_port, "Prometheus"),
            _listen(options.target_port, "load balancer"),
        )


def _listen(port: int, whose: str) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    except OSError as refused:
        raise SandboxError(
            f"port {port} on 127.0.0.1, meant for the {whose}, cannot be had: {os.strerror(refused.errno or 0)}"
        ) from refused


def _url(sock: socket.socket | None, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{sock.getsockname()[1]}" if sock else ""


# — the fabric —


def _fork_fabric() -> tuple[int, ZygoteClient]:
    """The fabric's first process: (pid of its launcher, the way to order from it)."""
    ours, theirs = pair()
    launcher = os.fork()
    if launcher:
        theirs.close()
        return launcher, ZygoteClient(ours)
    code = 1
    try:
        ours.close()
        code = _launch(theirs)
    except OSError as refused:
        print(f"the fabric cannot be made: {refused}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _launch(sock: socket.socket) -> int:
    """Between supervisor and zygote, so that the zygote can be PID 1 of namespaces that the supervisor is not in."""
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        linux.unshare(linux.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    linux.die_with_parent()  # after the change of credentials, which would undo it
    setproctitle.setproctitle("gameday: launcher")
    linux.unshare(linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
    init = os.fork()
    if init == 0:
        code = 1
        try:
            linux.die_with_parent()
            setproctitle.setproctitle("gameday: fabric")
            mounts.private_tree()
            mounts.proc()
            network.build_fabric()
            Zygote(sock).run()
        except OSError as refused:
            print(f"the fabric cannot be made: {refused}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    sock.close()
    os.waitpid(init, 0)
    return 1


# — the control plane's process —


def control_plane(argv: list[str]) -> int:
    """`argv[0]`: JSON with tls, tokens, clocks, zones; the kept descriptors: the API's socket, the ready pipe."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = orjson.loads(argv[0])
    sock_fd, ready_fd = (int(fd) for fd in os.environ["GAMEDAY_FDS"].split(","))
    inside = socket.create_server((network.GATEWAY, network.API_PORT), backlog=1024)
    tls = TlsFiles(*(Path(config["tls"][name]) for name in ("ca", "cert", "key")))
    tokens = {token: Identity(user, tuple(groups)) for token, (user, groups) in config["tokens"].items()}

    def ready() -> None:
        os.write(ready_fd, b"1")
        os.close(ready_fd)

    uvloop.run(
        serve(
            [socket.socket(fileno=sock_fd), inside],
            tls=tls,
            tokens=tokens,
            clocks=Clocks(**config["clocks"]),
            zones=config["zones"],
            metrics=not config["bare"],
            webhooks=None if config["bare"] else webhooks.admit,
            prometheus="" if config["bare"] else f"http://127.0.0.1:{prometheus.PORT}",
            ready=ready,
        )
    )
    return 1


# — the supervisor's own life —


class _Stopped(Exception):
    """Somebody wants the sandbox to end."""


@dataclass(slots=True)
class Supervisor:
    options: Options
    reports: Reports
    sockets: Sockets
    tls: TlsFiles
    zygote: ZygoteClient
    admin: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    node_tokens: dict[str, str] = field(default_factory=dict)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.monotonic)
    failure: BaseException | None = None  # why it stops, when nobody asked for it
    not_enforced: str = ""  # what this machine does not let us enforce
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def state(self) -> Path:
        return self.options.state_dir

    @property
    def api_url(self) -> str:
        return _url(self.sockets.api, "https")

    async def run(self) -> None:
        """Start everything, report, then stay until asked to stop. Raises `SandboxError`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop.set)
        self.reports.watch(self.stop)
        self.zygote.start()
        self._background(self._until_parent_ends())
        await self._or_stop(self._start())
        running = self._running()
        self._publish(running)
        self.reports.send({"ready": asdict(running)})
        self.reports.close()
        await self.stop.wait()
        if self.failure:
            raise self.failure

    async def _or_stop(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`; a stop, or the end of an essential process, breaks it off."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            raise self.failure or _Stopped
        task.result()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s", error)
            self.failure = self.failure or error
            self.stop.set()

    async def _until_parent_ends(self) -> None:
        if self.options.parent is None:
            return
        try:
            handle = os.pidfd_open(self.options.parent)
        except ProcessLookupError:
            self.stop.set()
            return
        asyncio.get_running_loop().add_reader(handle, self.stop.set)

    async def _start(self) -> None:
        if not self.options.bare:
            await self._start_prometheus()
        await self._start_control_plane()
        async with HttpApi(self.api_url, self.admin, self.tls.ca_pem, user_agent="gameday-supervisor") as api:
            if self.options.bare:
                return
            await controller.install_crds(api)
            await deploy.cluster_services(api)
            await self._spawn_addons()
            group = self._control_group()
            self._missing_users()
            machines = Machines(self.zygote, self.options, self.state, self.tls, self.node_tokens, group)
            names = await machines.boot_all()
        self._background(self._provide(machines))
        async with HttpApi(self.api_url, self.admin, self.tls.ca_pem, user_agent="gameday-supervisor") as api:
            self.say(f"{len(names)} machines boot")
            await deploy.nodes_ready(api, names)
            if self.options.stack != "none":
                self.say(f"deploying the {self.options.stack} stack")
                await deploy.stack(api, self.options.stack)
                patience = 30 + 3 * self.options.clocks.model_load
                await deploy.ready(api, self.options.stack, patience, self.state)
                self.say("the stack is ready")
                await deploy.scraped(api, _url(self.sockets.prometheus), 20 + 2 * self.options.clocks.scrape_interval)

    def _missing_users(self) -> None:
        if os.geteuid() != 0:
            users = "runAsUser, runAsGroup and fsGroup of pods: this sandbox runs as an ordinary user"
            self.not_enforced = "; ".join(filter(None, (self.not_enforced, users)))
            self.say(f"not enforced: {users}")

    def _control_group(self) -> Group | None:
        try:
            return cgroups.create(self.state)
        except cgroups.Unavailable as why:
            self.not_enforced = f"CPU and memory limits of pods: {why}"
            self.say(f"not enforced: {self.not_enforced}")
            return None

    def say(self, line: str) -> None:
        self.reports.say(f"{time.monotonic() - self.began:4.1f} s  {line}")

    async def _provide(self, machines: Machines) -> None:
        async with HttpApi(self.api_url, self.admin, self.tls.ca_pem, user_agent="gameday-machines") as api:
            await machines.run(api)

    async def _essential(self, name: str) -> None:
        code = await self.zygote.exited(name)
        ended = f"ended by signal {-code}" if code < 0 else f"exited with code {code}"
        raise SandboxError(f"the sandbox's {name} {ended}: {last_words(self._log(name))}")

    def _log(self, name: str) -> Path:
        return self.state / "logs" / f"{name.replace(' ', '-')}.log"

    async def _spawn(self, order: Spawn, keep: Sequence[int] = ()) -> None:
        fd = os.open(self._log(order.id), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            await self.zygote.spawn(order, fd, fd, keep=keep)
        except StartError as failed:
            raise SandboxError(f"the sandbox's {order.id} cannot be started: {failed}") from failed
        finally:
            os.close(fd)
        self._background(self._essential(order.id))

    async def _start_prometheus(self) -> None:
        try:
            binary = prometheus.find_binary(self.options)
        except prometheus.Missing as missing:
            raise SandboxError(str(missing)) from missing
        directory = self.state / "prometheus"
        command = prometheus.prepare(binary, directory, self.options.clocks, _url(self.sockets.prometheus))
        await self._spawn(Spawn("prometheus", "prometheus", argv=command.argv, env=command.env, cwd=str(directory)))

    async def _start_control_plane(self) -> None:
        tokens = {self.admin: ADMIN}
        for zone in self.options.zones:
            for number in range(1, MOST_PER_ZONE + 1):
                name = machine_name(zone, number)
                token = self.node_tokens[name] = secrets.token_urlsafe(24)
                # masters: the sandbox has no node authorizer that would let a kubelet read its pods' secrets
                tokens[token] = Identity(f"system:node:{name}", ("system:nodes", "system:masters"))
        if self.options.control_plane is None:
            await self._start_own_plane(tokens)
        else:
            await self._start_binaries(self.options.control_plane, tokens)
        write_kubeconfig(self.state / "kubeconfig", self.api_url, self.tls.ca, self.admin, NAMESPACE)
        token_file = self.state / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.admin + "\n")
        self.say(f"API server at {self.api_url}")

    async def _start_own_plane(self, tokens: dict[str, Identity]) -> None:
        config = {
            "tls": {name: str(getattr(self.tls, name)) for name in ("ca", "cert", "key")},
            "tokens": {token: (who.user, who.groups) for token, who in tokens.items()},
            "clocks": asdict(self.options.clocks),
            "zones": self.options.zones,
            "bare": self.options.bare,
        }
        read, write = os.pipe()
        order = Spawn(
            "control plane",
            "control plane",
            argv=(orjson.dumps(config).decode(),),
            call="sandbox.supervisor:control_plane",
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )
        try:
            await self._spawn(order, keep=[self.sockets.api.fileno(), write])
        finally:
            os.close(write)
        try:
            async with asyncio.timeout(_STARTED_SECONDS):
                if await _byte(read) != b"1":
                    await self.zygote.exited(order.id)
                    raise SandboxError(f"the control plane did not start: {last_words(self._log(order.id))}")
        except TimeoutError as late:
            raise SandboxError(f"the control plane did not answer within {_STARTED_SECONDS:.0f} s") from late
        finally:
            os.close(read)

    async def _start_binaries(self, directory: str, tokens: dict[str, Identity]) -> None:
        """The real control plane. A process of it that ends breaks this off: see `_essential`."""
        try:
            found = binaries.find(directory)
        except binaries.Missing as missing:
            raise SandboxError(str(missing)) from missing
        env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.state / "plane")}
        await self._spawn(Spawn("api relay", "api relay", call="sandbox.binaries:relay", env=env),
                          keep=[self.sockets.api.fileno()])  # fmt: skip
        etcd, apiserver, *others = binaries.prepare(found, self.state / "plane", self.tls, tokens, self.options.clocks)
        for command in (etcd, apiserver):
            await self._spawn(Spawn(command.name, command.name, argv=command.argv, env=env))
        await self._answers(f"{self.api_url}/readyz", _REAL_STARTED_SECONDS)
        for command in others:
            await self._spawn(Spawn(command.name, command.name, argv=command.argv, env=env))

    async def _answers(self, url: str, within: float) -> None:
        """Wait until the API server says that it is ready."""
        context = ssl.create_default_context(cadata=self.tls.ca_pem)
        headers = {"Authorization": f"Bearer {self.admin}"}
        said = "it did not answer"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3), headers=headers) as session:
            deadline = time.monotonic() + within
            while time.monotonic() < deadline:
                try:
                    async with session.get(url, ssl=context) as answer:
                        if answer.status == 200:
                            return
                        said = f"it answered {answer.status}"
                except (aiohttp.ClientError, OSError, TimeoutError) as early:
                    said = str(early) or said
                await asyncio.sleep(0.1)
        raise SandboxError(f"the kube-apiserver was not ready within {within:.0f} s: {said}")

    async def _spawn_addons(self) -> None:
        assert self.sockets.target and self.sockets.prometheus, "not bare"
        order = Spawn(
            "addons",
            "addons",
            argv=(addons.Config(self.admin, self.tls.ca_pem, self.options.clocks).dump(),),
            call="sandbox.addons:main",
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )
        await self._spawn(order, keep=[self.sockets.target.fileno(), self.sockets.prometheus.fileno()])

    def _running(self) -> Running:
        pid = os.getpid()
        return Running(
            pid=pid,
            state_dir=str(self.state),
            kubeconfig=str(self.state / "kubeconfig"),
            context=CONTEXT,
            api_url=self.api_url,
            prometheus_url=_url(self.sockets.prometheus),
            target_url=_url(self.sockets.target),
            namespace=NAMESPACE,
            selector=f"app={MODEL}",
            model=MODEL,
            gateway_selector="app=gateway",
            clocks=self.options.clocks.name,
            stack=self.options.stack,
            expendable=self.options.stack in ("fragile", "careless"),
            zone_latency_ms=self.options.zone_latency_ms,
            not_enforced=self.not_enforced,
            started=time.time(),
            start_ticks=linux.start_ticks(pid) or 0,
        )

    def _publish(self, running: Running) -> None:
        fresh = self.state / "sandbox.json.new"
        fresh.write_bytes(orjson.dumps(running, option=orjson.OPT_INDENT_2))
        fresh.replace(self.state / "sandbox.json")


async def _byte(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
        return os.read(fd, 1)
    finally:
        loop.remove_reader(fd)


def _lock(state: Path) -> int:
    """Raises `SandboxError` when another sandbox has this state directory."""
    fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as held:
        raise SandboxError(f"another sandbox is starting or ending in {state}: wait for it") from held
    return fd


def _preload() -> None:
    for name in _PRELOAD:
        importlib.import_module(name)


def _live(options: Options, reports: Reports) -> None:
    state = options.state_dir
    _lock(state)
    pid = os.getpid()
    note = {"pid": pid, "start_ticks": linux.start_ticks(pid)}
    (state / "supervisor.json").write_bytes(orjson.dumps(note))
    sockets = Sockets.open(options)
    tls = make_tls(state)
    _preload()
    freeze()
    linux.adopt_orphans()
    launcher, zygote = _fork_fabric()
    try:
        uvloop.run(_supervise(options, reports, sockets, tls, zygote))
    finally:
        os.kill(launcher, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)  # the launcher, then the fabric's first process: after it nothing is left


async def _supervise(options: Options, reports: Reports, sockets: Sockets, tls: TlsFiles, zygote: ZygoteClient) -> None:
    with contextlib.suppress(_Stopped):
        await Supervisor(options, reports, sockets, tls, zygote).run()


def main() -> int:
    """`argv[1]`: the descriptor to report on; stdin: the options."""
    report_fd = int(sys.argv[1])
    options = load(sys.stdin.buffer.read())
    if os.fork():
        os._exit(0)  # whoever started us need not wait for us, nor be our parent
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    setproctitle.setproctitle("gameday: supervisor")
    reports = Reports(report_fd)
    try:
        _live(options, reports)
    except SandboxError as error:
        log.error("%s", error)
        reports.send({"error": str(error)})
        return 1  # the logs stay for whoever wants to know more, until the next up or down
    except (OSError, ApiError, aiohttp.ClientError) as error:
        log.exception("the sandbox failed")
        reports.send({"error": f"the sandbox failed: {error}"})
        return 1
    clear(options.state_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
