"""A real server that fails at known times: the truth for `calibration.py`.

    python benchmarks/planted_server.py SCHEDULE.json TRUTH.jsonl

It answers OpenAI-like streams at once. SCHEDULE is a list of outages {begin, end, mode, bad}, instants of
CLOCK_MONOTONIC; `bad` of its six backends fail meanwhile (a connection belongs to one backend, as behind a balancer
of connections). TRUTH gets one line per outage: `begin` and `end` are [earliest, latest], for the truth, too, is known
only as well as this process kept time. Modes: `dark` (no listener, connections reset; all backends), `hang` (no
answer), `error` (503), `slow` (the first token comes late). The first line of stdout is the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BACKENDS = 6
SLOW = 0.4  # seconds until the first token in mode `slow`; clients take more than half of it for bad
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
BODY = TOKEN + END
GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
ERROR = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 4\r\n\r\ndark"
NICE = -20  # where we may: a server that waits for a CPU would blur its own truth
LOOKS = 3  # turns of a millisecond within which what has arrived is surely served
NEAR = 0.05  # seconds before an edge in which the loop turns every millisecond


@dataclass
class Server:
    """One listener; `mode` and `bad` are what is wrong just now."""

    mode: str = ""
    bad: frozenset[int] = frozenset()
    port: int = 0
    connections: int = 0
    open: set[asyncio.Transport] = field(default_factory=set)
    server: asyncio.Server | None = None

    async def listen(self) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        self.server = await asyncio.get_running_loop().create_server(lambda: Connection(self), sock=sock, backlog=1024)

    async def go_dark(self) -> None:
        assert self.server is not None
        self.server.close()
        for transport in list(self.open):
            sock = transport.get_extra_info("socket")
            if not transport.is_closing() and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()


class Connection(asyncio.Protocol):
    """Requests are answered in the very turn of the loop in which they arrive, so that the edges are sharp."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._backend = server.connections % BACKENDS
        server.connections += 1
        self._buf = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.open.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.open.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buf += data
        while (at := self._buf.find(b"\r\n\r\n")) >= 0:
            lines = self._buf[:at].lower().split(b"\r\n")
            length = next(int(one.split(b":")[1]) for one in lines if one.startswith(b"content-length"))
            if len(self._buf) < at + 4 + length:
                return
            self._buf = self._buf[at + 4 + length :]
            self._answer(self._backend in self._server.bad, self._server.mode)

    def _answer(self, bad: bool, mode: str) -> None:
        if bad and mode == "slow":
            asyncio.get_running_loop().call_later(SLOW, self._write, GOOD)
        elif not (bad and mode == "hang"):
            self._write(ERROR if bad and mode == "error" else GOOD)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


async def at(instant: float, act: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """Act at `instant`; the result says when it truly took effect, as the earliest and the latest instant.

    What had arrived a few looks earlier was served before the act (a new connection takes the loop three turns to
    accept and read, a look two), what was sent after the act was served after it.
    """
    await asyncio.sleep(max(0.0, instant - NEAR - time.monotonic()))
    looks = deque([time.monotonic()], maxlen=LOOKS)
    while looks[-1] < instant:
        await asyncio.sleep(0.001)
        looks.append(time.monotonic())
    await act()
    return looks[0], time.monotonic()


async def follow(schedule: list[dict[str, Any]], truth: Path) -> None:
    server = Server()
    await server.listen()
    print(server.port, flush=True)
    with truth.open("w") as file:
        for outage in schedule:

            async def begin(outage: dict[str, Any] = outage) -> None:
                server.mode, server.bad = outage["mode"], frozenset(range(outage["bad"]))
                if server.mode == "dark":
                    await server.go_dark()

            async def end() -> None:
                if server.mode == "dark":
                    await server.listen()
                server.mode, server.bad = "", frozenset()

            began = await at(outage["begin"], begin)
            ended = await at(outage["end"], end)
            file.write(json.dumps({**outage, "begin": began, "end": ended}) + "\n")
            file.flush()
    await asyncio.sleep(3600)


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # in a session of its own, the session's group counts as well
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        Path("/proc/self/autogroup").write_text(str(NICE))
    asyncio.run(follow(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
