"""Commands in running containers: the kubelet's side of `kubectl exec`.

The protocol is the API's `v4.channel.k8s.io` and `v5.channel.k8s.io` over WebSocket: binary messages whose first byte
is a channel. Sources: k8s.io/apimachinery pkg/util/remotecommand, k8s.io/kubelet pkg/cri/streaming/remotecommand.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import termios
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson
from aiohttp import WSMsgType, web

from sandbox.node.zygote import Spawn, StartError, ZygoteClient

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
_CHUNK = 32_768  # bytes of output in one message
_LAST_WORDS = 1.0  # seconds for output after the process's end: what it left running may hold its pipes open


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for."""

    command: tuple[str, ...]
    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool

    @staticmethod
    def parse(query: Mapping[str, str], command: Sequence[str]) -> Wanted:
        def flag(name: str) -> bool:
            return query.get(name, "").lower() in ("1", "true")

        return Wanted(tuple(command), flag("input"), flag("output"), flag("error"), flag("tty"))


class Target(Protocol):
    """A container in which commands can run."""

    async def entry(self, argv: Sequence[str]) -> Spawn | None:
        """The process to make for `argv`, in the container's namespaces; None: the container does not run."""
        ...


async def serve(request: web.Request, target: Target, zygote: ZygoteClient) -> web.StreamResponse:
    """Run one command and relay its streams until it ends or the client goes away."""
    wanted = Wanted.parse(request.query, request.query.getall("command", []))
    if not wanted.command:
        return web.Response(status=400, text="you must specify at least 1 command for the container")
    order = await target.entry(wanted.command)
    if order is None:
        name = request.match_info["container"]
        return web.Response(status=400, text=f'container not found ("{name}")')
    socket = web.WebSocketResponse(protocols=PROTOCOLS, max_msg_size=0)
    if not socket.can_prepare(request):
        return web.Response(status=400, text="exec is a WebSocket upgrade here (v5.channel.k8s.io, v4.channel.k8s.io)")
    with contextlib.suppress(ConnectionError):  # the client has gone
        await socket.prepare(request)
        status = await _run(socket, order, wanted, zygote)
        await socket.send_bytes(bytes([ERROR]) + orjson.dumps(status))
        await socket.close()
    return socket


@dataclass(slots=True)
class _Ends:
    """Our ends of the process's streams; -1: there is none."""

    stdin: int
    stdout: int
    stderr: int


@contextlib.asynccontextmanager
async def _started(order: Spawn, wanted: Wanted, zygote: ZygoteClient) -> AsyncIterator[_Ends]:
    """The process, made, with its streams. Raises `StartError`."""
    theirs: list[int] = []
    ours: list[int] = []
    try:
        if wanted.tty:
            main, side = os.openpty()
            ours.append(main)
            theirs.append(side)
            stdin, out, err, ends = side, side, side, _Ends(main if wanted.stdin else -1, main, -1)
        else:
            pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
            (stdin, to), (from_out, out), (from_err, err) = pipes
            ours += [to, from_out, from_err]
            theirs += [stdin, out, err]
            ends = _Ends(to if wanted.stdin else -1, from_out, from_err)
            if not wanted.stdin:
                os.close(ours.pop(0))
        await zygote.spawn(order, out, err, stdin=stdin)
        while theirs:
            os.close(theirs.pop())
        yield ends
    finally:
        for fd in (*theirs, *ours):
            with contextlib.suppress(OSError):  # closed when its stream ended
                os.close(fd)


async def _run(
    socket: web.WebSocketResponse, order: Spawn, wanted: Wanted, zygote: ZygoteClient
) -> Mapping[str, object]:
    """Until the command is over: the Status to answer with."""
    try:
        async with _started(order, wanted, zygote) as ends:
            shown = [(STDOUT, ends.stdout, wanted.stdout), (STDERR, ends.stderr, wanted.stderr)]
            output = [asyncio.create_task(_relay(socket, *one)) for one in shown if one[1] >= 0]
            listener = asyncio.create_task(_listen(socket, ends, wanted))
            over = asyncio.create_task(zygote.exited(order.id))
            try:
                await asyncio.wait({over, listener}, return_when=asyncio.FIRST_COMPLETED)
                if not over.done():  # the client has gone
                    zygote.kill(order.id, signal.SIGKILL, group=True)
                code = await over
                if output:
                    await asyncio.wait(output, timeout=_LAST_WORDS)
            finally:
                for task in (*output, listener, over):
                    task.cancel()
                await asyncio.gather(*output, listener, over, return_exceptions=True)
                zygote.forget(order.id)
    except StartError as failed:
        return _not_started(str(failed), wanted.command[0])
    return _outcome(code if code >= 0 else 128 - code)


async def _relay(socket: web.WebSocketResponse, channel: int, fd: int, wanted: bool) -> None:
    async for chunk in _read(fd):
        if wanted:
            with contextlib.suppress(ConnectionError):
                await socket.send_bytes(bytes([channel]) + chunk)


async def _read(fd: int) -> AsyncIterator[bytes]:
    """What can be read, until its end."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    os.set_blocking(fd, False)
    loop.add_reader(fd, readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            try:
                chunk = os.read(fd, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:  # a terminal whose other side is closed: EIO
                return
            if not chunk:
                return
            yield chunk
            readable.set()
    finally:
        loop.remove_reader(fd)


async def _listen(socket: web.WebSocketResponse, ends: _Ends, wanted: Wanted) -> None:
    """What the client says, until it goes."""
    async for message in socket:
        if message.type != WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], message.data[1:]
        if channel == STDIN and ends.stdin >= 0 and data:
            await _write(ends.stdin, data)
        elif channel == CLOSE and data[:1] == bytes([STDIN]) and ends.stdin >= 0:
            if wanted.tty:
                await _write(ends.stdin, b"\x04")  # a terminal's end of input
            else:
                os.close(ends.stdin)
                ends.stdin = -1
        elif channel == RESIZE and wanted.tty:
            _resize(ends.stdout, data)


async def _write(fd: int, data: bytes) -> None:
    loop, writable = asyncio.get_running_loop(), asyncio.Event()
    os.set_blocking(fd, False)
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            loop.add_writer(fd, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(fd)
            writable.clear()
        except OSError:
            return  # nobody reads any more; how the process ended is told at its end


def _resize(fd: int, data: bytes) -> None:
    with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, OSError, struct.error):
        size = orjson.loads(data)
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", int(size["Height"]), int(size["Width"]), 0, 0))


def _outcome(code: int) -> Mapping[str, object]:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with exit code {code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _not_started(why: str, command: str) -> Mapping[str, object]:
    if "no such file" in why:
        place = "no such file or directory" if "/" in command else "executable file not found in $PATH"
        why = f'exec: "{command}": {place}'
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "InternalError",
        "code": 500,
        "message": f"Internal error occurred: error executing command in container: {why}: unknown",
    }
