"""A zygote: a small single-threaded process with every module loaded, that forks others on request.

The supervisor's zygote makes the sandbox's services and machines; each machine is itself a zygote that
makes its kubelet and its containers. It is PID 1 of its process namespace: when it dies, by whatever
signal, the kernel kills everything in it at the same instant.

Requests and reports are JSON messages on a seqpacket socket; file descriptors travel with them.
`Zygote` is the process's own loop, `ZygoteClient` the asyncio side of whoever orders.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import importlib
import os
import random
import select
import signal
import socket
import sys
import termios
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import orjson
import setproctitle

from sandbox.node import cgroups, linux, mounts, security
from sandbox.node.mounts import Mount
from sandbox.node.security import Security

_MESSAGE = 200_000  # bytes; below the default of net.core.wmem_default
_START_SECONDS = 5.0  # a process is its own long before; one that is not is ended


@dataclass(frozen=True, slots=True)
class Spawn:
    """A process to make. `call` is "module:function" (argv → exit code), run without exec; else `argv` is exec'd.

    `isolated`: process, mount, IPC and UTS namespaces of its own; with `mounts` (a container) also its own
    /run and /tmp. The descriptors sent along are, in order, stdout, stderr, stdin (when `stdin`), the network
    namespace (when `netns`), and those the process keeps, whose numbers it finds in the environment as GAMEDAY_FDS.
    """

    id: str
    title: str
    argv: tuple[str, ...] = ()
    call: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    stdin: bool = False  # a descriptor for it comes along; else it is empty
    tty: bool = False  # stdin is a terminal, to be the process's own
    netns: bool = False
    isolated: bool = False
    host_pids: bool = False  # isolated, but sees (and signals) every process of the machine
    hostname: str = ""
    mounts: tuple[Mount, ...] | None = None
    join: str | None = None  # run inside the namespaces of this other spawned process
    cgroups: tuple[str, ...] = ()  # directories of the control groups to enter
    oom_score_adj: int | None = None
    security: Security | None = None  # None: as whoever forks it


class StartError(Exception):
    """The process could not be made: what the kernel said."""


class Zygote:
    """The loop of the process that forks. It ends when the other side of `sock` is closed."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._children: dict[int, str] = {}
        self._pids: dict[str, int] = {}
        self._groups: set[int] = set()  # leaders whose children no process namespace ends with them

    def run(self) -> None:
        wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(wake_r, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == wake_r:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_r, 4096)
                elif not self._serve():
                    return
            self._reap()

    def _serve(self) -> bool:
        raw, fds, _, _ = socket.recv_fds(self._sock, _MESSAGE, 16, socket.MSG_CMSG_CLOEXEC)
        if not raw:
            return False
        request = orjson.loads(raw)
        if request["op"] == "kill":
            pid = self._pids.get(request["id"])
            if pid is not None:
                (os.killpg if request["group"] else os.kill)(pid, request["signal"])
        elif request["op"] == "spawn":
            self._spawn(request["spawn"], fds)
        for fd in fds:
            os.close(fd)
        return True

    def _spawn(self, order: dict[str, Any], fds: Sequence[int]) -> None:
        spaces: dict[int, int] = {}
        pidns: int | None = None
        if order["join"]:
            joined = self._pids.get(order["join"])
            if joined is None:
                self._tell({"op": "failed", "id": order["id"], "error": "the container is not running"})
                return
            spaces = linux.namespaces(joined)
            pidns = spaces[linux.CLONE_NEWPID]
        ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
        pid = linux.fork(pidns, new_pidns=order["isolated"] and not order["host_pids"])
        if pid == 0:
            os.close(ready_r)
            _become(order, fds, ready_w, spaces)
        os.close(ready_w)
        for fd in spaces.values():
            os.close(fd)
        failure = _told(ready_r)
        if failure is None:  # nobody else of this machine shall wait for it
            os.kill(pid, signal.SIGKILL)
            failure = f"it did not start within {_START_SECONDS:g} s".encode()
        os.close(ready_r)
        if failure:
            os.waitpid(pid, 0)
            self._tell({"op": "failed", "id": order["id"], "error": failure.decode(errors="replace")})
            return
        self._children[pid] = order["id"]
        self._pids[order["id"]] = pid
        if order["host_pids"]:
            self._groups.add(pid)
        self._tell({"op": "spawned", "id": order["id"], "pid": pid})

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            name = self._children.pop(pid, None)
            if pid in self._groups:
                self._groups.discard(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            if name is not None:  # else an orphan of some child: PID 1 reaps it
                del self._pids[name]
                self._tell({"op": "exited", "id": name, "code": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.send(orjson.dumps(message))


def _told(ready: int) -> bytes | None:
    """Why a process did not start, b"" when it did; None: it says nothing for too long."""
    failure, end = b"", time.monotonic() + _START_SECONDS
    while select.select([ready], [], [], max(0.0, end - time.monotonic()))[0]:
        if not (chunk := os.read(ready, 4096)):
            return failure
        failure += chunk
    return None


def _become(order: dict[str, Any], fds: Sequence[int], ready: int, spaces: Mapping[int, int]) -> NoReturn:
    """In the fork: turn into the ordered process, and never run on into the parent's code."""
    code = 1
    try:
        code = _live(order, fds, ready, spaces)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except KeyboardInterrupt:
        code = 128 + int(signal.SIGINT)
    except BaseException:  # noqa: BLE001 – whatever it is, this process ends here
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _live(order: dict[str, Any], fds: Sequence[int], ready: int, spaces: Mapping[int, int]) -> int:
    try:
        target = _prepare(order, fds, ready, spaces)
        if target is None:
            _exec(order["argv"])
    except (OSError, ImportError, AttributeError) as failed:
        os.write(ready, str(failed).encode()[:4000])
        return 128
    os.close(ready)
    setproctitle.setproctitle(f"gameday: {order['title']}")
    return target(list(order["argv"])) or 0


def _prepare(
    order: dict[str, Any], fds: Sequence[int], ready: int, spaces: Mapping[int, int]
) -> Callable[[list[str]], int | None] | None:
    os.setsid()
    _reset_signals(exec=order["call"] is None)
    random.seed()
    cgroups.enter(order["cgroups"])
    may = Security.load(order["security"]) if order["security"] else None
    if order["oom_score_adj"] is not None:
        linux.oom_score_adj(order["oom_score_adj"])
    rest = list(fds)
    out, err = rest.pop(0), rest.pop(0)
    source = rest.pop(0) if order["stdin"] else os.open(os.devnull, os.O_RDONLY)
    if order["netns"]:
        linux.setns(rest.pop(0), linux.CLONE_NEWNET)
    os.environ.clear()
    os.environ.update(order["env"])
    if rest:
        os.environ["GAMEDAY_FDS"] = ",".join(map(str, rest))
    target = _resolve(order["call"]) if order["call"] else None
    if order["isolated"]:
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC)
        linux.sethostname(order["hostname"])
        mounts.private_tree()
        if order["mounts"] is None:
            mounts.proc()
        else:
            mounts.apply([Mount(**item) for item in order["mounts"]], may)
    _join(spaces)
    os.chdir(order["cwd"])
    for fd, number in ((source, 0), (out, 1), (err, 2)):
        os.dup2(fd, number)
    if order["tty"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for fd in rest:
        os.set_inheritable(fd, True)
    _close_others(keep=[*rest, ready])
    if may:
        security.apply(may)
    return target


def _join(spaces: Mapping[int, int]) -> None:
    for kind, fd in spaces.items():
        if kind == linux.ROOT:
            os.fchdir(fd)
            os.chroot(".")
        elif kind != linux.CLONE_NEWPID:  # entered by the fork
            linux.setns(fd, kind)


def _reset_signals(*, exec: bool) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGPWR):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL if exec else signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _resolve(call: str) -> Callable[[list[str]], int | None]:
    module, _, name = call.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _close_others(keep: Sequence[int]) -> None:
    """Leave nothing of the zygote's open: no socket of the sandbox may leak into a container."""
    wanted = {0, 1, 2, *keep}
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if (fd := int(entry)) not in wanted:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(fd)


def _exec(argv: Sequence[str]) -> NoReturn:
    try:
        os.execvpe(argv[0], list(argv), os.environ)  # noqa: S606
    except OSError as failed:
        why = os.strerror(failed.errno or errno.ENOEXEC).lower()
        raise OSError(failed.errno, f'exec: "{argv[0]}": stat {argv[0]}: {why}') from failed


class ZygoteClient:
    """Orders processes from a zygote. Lives in one asyncio loop; `start()` it there."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._starting: dict[str, asyncio.Future[int]] = {}
        self._exits: dict[str, asyncio.Future[int]] = {}
        self.pids: dict[str, int] = {}  # of the live processes, in the zygote's namespace
        self.lost = asyncio.Event()

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._read)

    async def spawn(
        self,
        order: Spawn,
        out: int,
        err: int,
        netns: int | None = None,
        keep: Sequence[int] = (),
        stdin: int | None = None,
    ) -> int:
        """Make the process; its pid in the zygote's namespace. Raises `StartError`. The fds stay ours to close."""
        loop = asyncio.get_running_loop()
        message = orjson.dumps({"op": "spawn", "spawn": asdict(order)})
        fds = [out, err, *(fd for fd in (stdin, netns) if fd is not None), *keep]
        started: asyncio.Future[int] = loop.create_future()
        self._starting[order.id] = started
        self._exits[order.id] = loop.create_future()
        try:
            socket.send_fds(self._sock, [message], fds)
        except OSError as lost:
            del self._starting[order.id], self._exits[order.id]
            raise StartError(f"the machine's first process is gone: {lost.strerror}") from lost
        return await started

    async def exited(self, name: str) -> int:
        """Wait for the end of a spawned process: its exit code, or minus the signal."""
        return await asyncio.shield(self._exits[name])

    def running(self, name: str) -> bool:
        exit_ = self._exits.get(name)
        return exit_ is not None and not exit_.done()

    def forget(self, name: str) -> None:
        self._exits.pop(name, None)

    def kill(self, name: str, sig: int, *, group: bool = False) -> None:
        """Send a signal, to all that it has started when `group`; a process that is gone already is fine."""
        with contextlib.suppress(OSError):
            self._sock.send(orjson.dumps({"op": "kill", "id": name, "signal": int(sig), "group": group}))

    def _read(self) -> None:
        try:
            raw = self._sock.recv(_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if not raw:
            self._gone()
            return
        report = orjson.loads(raw)
        name = report["id"]
        if report["op"] == "exited":
            self.pids.pop(name, None)
            _settle(self._exits.get(name), report["code"])
        elif report["op"] == "spawned":
            self.pids[name] = report["pid"]
            _settle(self._starting.pop(name, None), report["pid"])
        else:
            self._exits.pop(name, None)
            starting = self._starting.pop(name, None)
            if starting and not starting.done():
                starting.set_exception(StartError(report["error"]))

    def _gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        for future in self._starting.values():
            if not future.done():
                future.set_exception(StartError("the machine's first process is gone"))
        for future in self._exits.values():
            _settle(future, -int(signal.SIGKILL))
        self.lost.set()


def _settle(future: asyncio.Future[int] | None, value: int) -> None:
    if future and not future.done():
        future.set_result(value)


def freeze() -> None:
    """Before forking: keep the collector from touching (and so copying) what is shared."""
    gc.collect()
    gc.freeze()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
