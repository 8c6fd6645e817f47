"""The engine's core: the process that computes, beside the one that speaks HTTP, as vLLM has them.

The API process orders one step after the other; the core takes the time that a GPU would and says when it is done.
So a core that is stopped, or stuck in its GPU, leaves an engine that answers /health and generates nothing
(https://github.com/vllm-project/vllm/issues/39863), and one that dies ends the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time

import setproctitle

from sandbox.node import linux

TITLE = "VLLM::EngineCore"  # vLLM's own name for it
_STEP = struct.Struct("d")  # when the step is done, seconds of the monotonic clock


class CoreDied(Exception):
    """The core process is gone; vLLM calls it EngineDeadError."""


def start() -> socket.socket:
    """Fork the core, before there are threads or a loop; the returned socket is the way to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        code = 1
        try:
            ours.close()
            linux.die_with_parent()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the API process says when it ends
            setproctitle.setproctitle(TITLE)
            code = _compute(theirs)
        finally:
            os._exit(code)
    theirs.close()
    return ours


def _compute(sock: socket.socket) -> int:
    while order := sock.recv(_STEP.size):
        time.sleep(max(0.0, _STEP.unpack(order)[0] - time.monotonic()))
        with contextlib.suppress(BrokenPipeError):
            sock.send(order)
    return 0


class Core:
    """The API process's side of it, in its loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    async def until(self, due: float) -> None:
        """Have one step computed, to be done at `due` (monotonic seconds). Raises `CoreDied`."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._sock, _STEP.pack(due))
            answer = await loop.sock_recv(self._sock, _STEP.size)
        except OSError as lost:
            raise CoreDied(str(lost)) from lost
        if not answer:
            raise CoreDied("the core process is gone")
