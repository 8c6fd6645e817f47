"""A real server that fails at known times: the truth for `calibration.py`.

    python benchmarks/planted_server.py SCHEDULE.json TRUTH.jsonl

It answers OpenAI-like streams at once. SCHEDULE is a list of outages {begin, end, mode, bad}, instants of
CLOCK_MONOTONIC; `bad` of its six backends fail meanwhile (a connection belongs to one backend, as behind a balancer
of connections). TRUTH gets one line per outage with the instants at which it truly began and ended.
Modes: `dark` (no listener, connections reset; all backends), `hang` (no answer), `error` (503), `slow` (the first
token comes late). The first line of stdout is the port.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import time
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


@dataclass
class Server:
    """One listener; `mode` and `bad` are what is wrong just now."""

    mode: str = ""
    bad: frozenset[int] = frozenset()
    port: int = 0
    connections: int = 0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)
    server: asyncio.Server | None = None

    async def listen(self) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        self.server = await asyncio.start_server(self.serve, sock=sock, backlog=1024)

    def go_dark(self) -> None:
        assert self.server is not None
        self.server.close()
        for writer in list(self.writers):
            sock = writer.get_extra_info("socket")
            if not writer.transport.is_closing() and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = self.connections % BACKENDS
        self.connections += 1
        self.writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                await reader.readexactly(length)
                await self.answer(writer, backend in self.bad)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def answer(self, writer: asyncio.StreamWriter, bad: bool) -> None:
        if bad and self.mode == "hang":
            await asyncio.sleep(3600)
        if bad and self.mode == "slow":
            await asyncio.sleep(SLOW)
        writer.write(ERROR if bad and self.mode == "error" else GOOD)
        await writer.drain()


async def follow(schedule: list[dict[str, Any]], truth: Path) -> None:
    server = Server()
    await server.listen()
    print(server.port, flush=True)
    with truth.open("w") as file:
        for outage in schedule:
            await asyncio.sleep(max(0.0, outage["begin"] - time.monotonic()))
            began = time.monotonic()
            server.mode, server.bad = outage["mode"], frozenset(range(outage["bad"]))
            if server.mode == "dark":
                server.go_dark()
            await asyncio.sleep(max(0.0, outage["end"] - time.monotonic()))
            if server.mode == "dark":
                await server.listen()
            server.mode, server.bad = "", frozenset()
            file.write(json.dumps({**outage, "begin": began, "end": time.monotonic()}) + "\n")
            file.flush()
    await asyncio.sleep(3600)


async def watch(lags: Path) -> None:
    """Write down when this process itself was late: then the truth of the moment is not what was planted."""
    with lags.open("w") as file:
        while True:
            due = time.monotonic() + 0.02
            await asyncio.sleep(0.02)
            if time.monotonic() - due > 0.05:
                file.write(json.dumps([due, time.monotonic()]) + "\n")
                file.flush()


async def main(schedule: list[dict[str, Any]], truth: Path) -> None:
    await asyncio.gather(follow(schedule, truth), watch(truth.with_name("lags.jsonl")))


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
