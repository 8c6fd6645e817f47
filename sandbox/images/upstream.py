"""The gateway's HTTP/1.1 client: one raw connection per exchange, kept alive, every failure told apart.

A library client hides what matters here: whether a connection was reused, whether a byte had arrived before it
broke, and whether a body came to its proper end. Bodies are handed on as they arrive, without a queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Literal, cast

Cause = Literal[
    "refused", "connect_timeout", "reset", "closed", "first_byte_timeout", "stall", "protocol", "given_up", "ejected"
]
HEAD_LIMIT = 64 << 10


class Broken(Exception):
    """An exchange failed. `started`: the answer had begun; `reused`: on a connection that had served before."""

    def __init__(self, cause: Cause, *, started: bool = False, reused: bool = False) -> None:
        super().__init__(cause)
        self.cause, self.started, self.reused = cause, started, reused

    @property
    def stale(self) -> bool:
        """The server closed an idle connection just when it was used again: nobody's failure."""
        return self.reused and not self.started and self.cause in ("reset", "closed")


class Exchange:
    """One request and its answer.

    `first` is done when the answer's first body byte (or its end) is there; `done` at its proper end. Both raise
    Broken. Until `forward` is called the body is kept.
    """

    def __init__(self, reused: bool) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.length: int | None = None  # of the body, where the answer says so
        self.touched = loop.time()
        self.reused = reused
        self._kept: list[bytes] = []
        self._sink: Callable[[bytes], None] | None = None

    def forward(self, sink: Callable[[bytes], None]) -> None:
        """Hand the body to `sink`, what has arrived already at once."""
        self._sink = sink
        kept, self._kept = b"".join(self._kept), []
        if kept:
            sink(kept)

    def body(self, data: bytes) -> None:
        if self._sink:
            self._sink(data)
        else:
            self._kept.append(data)
        if not self.first.done():
            self.first.set_result(None)

    def end(self, broken: Broken | None) -> None:
        for future in (self.first, self.done):
            if future.done():
                continue
            if broken is None:
                future.set_result(None)
            else:
                future.set_exception(broken)
                future.exception()  # often only one of the two is awaited


class Connection(asyncio.Protocol):
    """A client connection that carries one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._buffer = b""
        self._mode: Literal["head", "length", "chunked", "close"] = "head"
        self._left = 0  # bytes of the body, or of the current chunk with its CRLF
        self._keep = False
        self._served = 0
        self.idle_since = 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and self._exchange is None

    def send(self, request: bytes) -> Exchange:
        assert self._transport is not None and self._exchange is None
        self._exchange = Exchange(reused=self._served > 0)
        self._mode, self._buffer = "head", b""
        self._transport.write(request)
        return self._exchange

    def break_off(self, cause: Cause) -> None:
        """Give the exchange up and close the connection at once."""
        self._fail(cause)

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # an idle connection has nothing to say
            self.close()
            return
        exchange.touched = asyncio.get_running_loop().time()
        try:
            if self._mode == "head":
                self._buffer += data
                data = self._head(exchange)
                if self._mode == "head":
                    return
            self._body(exchange, data)
        except ValueError:
            self._fail("protocol")

    def eof_received(self) -> None:
        if self._exchange and self._mode == "close":
            self._finish(self._exchange)
        else:
            self._fail("closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if exc is None and self._exchange and self._mode == "close":
            self._finish(self._exchange)
        else:
            self._fail("closed" if exc is None else "reset")

    def _head(self, exchange: Exchange) -> bytes:
        """Parse the head; returns the bytes after it. Stays in mode "head" while it is incomplete."""
        while (at := self._buffer.find(b"\r\n\r\n")) >= 0:
            lines = self._buffer[:at].decode("latin-1").split("\r\n")
            rest = self._buffer = self._buffer[at + 4 :]
            version, status, *_ = lines[0].split(" ")
            exchange.status = int(status)
            if 100 <= exchange.status < 200:
                continue
            if version not in ("HTTP/1.1", "HTTP/1.0"):
                raise ValueError(version)
            headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
            self._frame(exchange, headers, {name.lower(): value.lower() for name, value in headers}, version)
            return rest
        if len(self._buffer) > HEAD_LIMIT:
            raise ValueError("endless head")
        return b""

    def _frame(
        self, exchange: Exchange, headers: list[tuple[str, str]], by_name: Mapping[str, str], version: str
    ) -> None:
        exchange.headers = headers
        connection = by_name.get("connection", "")
        self._keep = "close" not in connection if version == "HTTP/1.1" else "keep-alive" in connection
        if exchange.status in (204, 304):
            self._mode, self._left, exchange.length = "length", 0, 0
        elif "chunked" in by_name.get("transfer-encoding", ""):
            self._mode, self._buffer, self._left = "chunked", b"", 0
        elif "content-length" in by_name:
            self._mode, self._left = "length", int(by_name["content-length"])
            exchange.length = self._left
        else:
            self._mode, self._keep = "close", False

    def _body(self, exchange: Exchange, data: bytes) -> None:
        if self._mode == "chunked":
            self._chunks(exchange, data)
            return
        if self._mode == "close":
            if data:
                exchange.body(data)
            return
        if len(data) > self._left:
            raise ValueError("more than was announced")
        self._left -= len(data)
        if data:
            exchange.body(data)
        if not self._left:
            self._finish(exchange)

    def _chunks(self, exchange: Exchange, data: bytes) -> None:
        data, self._buffer = self._buffer + data if self._buffer else data, b""
        at, pieces, ended = 0, [], False
        while at < len(data):
            if self._left:  # inside a chunk; its CRLF counts as two bytes of it
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                pieces.append(piece if self._left >= 2 else piece[: len(piece) - (2 - self._left)])
                continue
            line = data.find(b"\r\n", at)
            if line < 0:
                self._buffer = data[at:]
                break
            size = int(data[at:line].split(b";")[0], 16)
            if not size:
                ended = data.startswith(b"0\r\n\r\n", at) or data.find(b"\r\n\r\n", line) >= 0
                self._buffer = b"" if ended else data[at:]
                break
            at, self._left = line + 2, size + 2
        if whole := b"".join(pieces):
            exchange.body(whole)
        if len(self._buffer) > HEAD_LIMIT:
            raise ValueError("endless chunk head")
        if ended:
            self._finish(exchange)

    def _finish(self, exchange: Exchange) -> None:
        self._exchange, self._served = None, self._served + 1
        self.idle_since = asyncio.get_running_loop().time()
        if not self._keep:
            self.close()
        exchange.end(None)

    def _fail(self, cause: Cause) -> None:
        exchange, self._exchange = self._exchange, None
        if self._transport:
            self._transport.abort()
        if exchange:
            exchange.end(Broken(cause, started=exchange.first.done(), reused=exchange.reused))


class Pool:
    """The connections to one server."""

    def __init__(self, host: str, port: int, *, connect_timeout: float, idle_seconds: float) -> None:
        self._host, self._port = host, port
        self._connect_timeout, self._idle_seconds = connect_timeout, idle_seconds
        self._idle: list[Connection] = []

    async def take(self, *, fresh: bool = False) -> Connection:
        """A connection that is ready to send on. Raises Broken (refused, connect_timeout)."""
        now = asyncio.get_running_loop().time()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < self._idle_seconds:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        except TimeoutError:
            raise Broken("connect_timeout") from None
        except OSError as refused:
            raise Broken("refused") from refused
        return connection

    def give_back(self, connection: Connection) -> None:
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Drop the idle connections; running exchanges go on."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
