"""A server that fails in every way a service can fail a stream, and remembers when it did.

Plain threads and sockets: nothing in it is shared with the client that it tests.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable

GAP = 0.02
"""Seconds between its tokens."""
DRIP = 0.2
"""Seconds between tokens of the drip: below the stall limit, so that only the total deadline ends it."""


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text: str | None, finish: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Failing:
    """Accepts on `port` of 127.0.0.1 and treats every request by `way`. `at` is when it last did its worst."""

    def __init__(self, way: Callable[[Failing, socket.socket], None]) -> None:
        self.at: float | None = None
        self._way = way
        self._done = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                conn, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        with conn, contextlib.suppress(OSError):  # the client may leave first: that is what is tested
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while read_request(conn):
                self._way(self, conn)

    def pause(self, seconds: float) -> None:
        self._done.wait(seconds)

    def mark(self) -> None:
        self.at = time.monotonic()

    def close(self) -> None:
        self._done.set()
        self._listener.close()


def read_request(conn: socket.socket) -> bool:
    """Take one whole request; False at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = conn.recv(65536)
        if not more:
            return False
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        more = conn.recv(65536)
        if not more:
            return False
        body += more
    return True


def speak(server: Failing, conn: socket.socket, tokens: int = 3, gap: float = GAP) -> None:
    conn.sendall(HEAD)
    for _ in range(tokens):
        server.pause(gap)
        conn.sendall(chunk(event("word ")))
    server.pause(gap)


def reset(conn: socket.socket) -> None:
    """Close with RST."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def good(server: Failing, conn: socket.socket) -> None:
    speak(server, conn)
    conn.sendall(chunk(event(None, "stop")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    server.mark()


def silent(server: Failing, conn: socket.socket) -> None:
    server.pause(30)
    conn.close()


def headers_only(server: Failing, conn: socket.socket) -> None:
    conn.sendall(HEAD)
    server.pause(30)
    conn.close()


def early_reset(server: Failing, conn: socket.socket) -> None:
    server.pause(0.1)
    reset(conn)
    server.mark()


def early_close(server: Failing, conn: socket.socket) -> None:
    server.pause(0.1)
    conn.close()
    server.mark()


def mid_reset(server: Failing, conn: socket.socket) -> None:
    speak(server, conn)
    reset(conn)
    server.mark()


def mid_close(server: Failing, conn: socket.socket) -> None:
    speak(server, conn)
    conn.close()
    server.mark()


def half_chunk(server: Failing, conn: socket.socket) -> None:
    speak(server, conn)
    conn.sendall(chunk(event("word "))[:25])
    conn.close()
    server.mark()


def stall(server: Failing, conn: socket.socket) -> None:
    speak(server, conn)
    server.mark()  # the last token was one gap before
    server.pause(30)
    conn.close()


def no_done(server: Failing, conn: socket.socket) -> None:
    speak(server, conn)
    conn.sendall(b"0\r\n\r\n")
    server.mark()


def sse_error(server: Failing, conn: socket.socket) -> None:
    speak(server, conn)
    conn.sendall(chunk(b'data: {"error":{"message":"CUDA error: device lost","code":500}}\n\n') + b"0\r\n\r\n")
    server.mark()


def drip(server: Failing, conn: socket.socket) -> None:
    speak(server, conn, tokens=100, gap=DRIP)


def _status(line: str) -> Callable[[Failing, socket.socket], None]:
    def way(server: Failing, conn: socket.socket) -> None:
        body = b'{"error":{"message":"not now"}}'
        conn.sendall(f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        server.mark()

    return way


too_many = _status("429 Too Many Requests")
unavailable = _status("503 Service Unavailable")


def not_http(server: Failing, conn: socket.socket) -> None:
    conn.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    server.mark()
    server.pause(30)
    conn.close()


def once(server: Failing, conn: socket.socket) -> None:
    """A good answer, then the connection is reset while the next request waits for one."""
    if server.at is None:
        good(server, conn)
    else:
        server.pause(0.05)
        reset(conn)
        server.mark()


class Full:
    """A port whose connections never come to be: its queue is full, further SYNs are dropped as in a black hole."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._fill: list[socket.socket] = []
        for _ in range(4):
            conn = socket.socket()
            conn.setblocking(False)
            conn.connect_ex(("127.0.0.1", self.port))
            self._fill.append(conn)

    def close(self) -> None:
        for conn in self._fill:
            conn.close()
        self._listener.close()


class Nobody:
    """A port where nobody listens."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._bound = socket.socket()  # bound and not listening: refused, and nobody else can take it
        self._bound.bind(("127.0.0.1", 0))
        self.port: int = self._bound.getsockname()[1]

    def close(self) -> None:
        self._bound.close()
