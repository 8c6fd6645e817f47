"""The connection between a leader and a worker on another machine: length-prefixed JSON, bounded, one thread each.

Who may give a worker its orders knows the worker's token; neither side ever sends it: each proves that it knows it,
over two nonces. Without TLS the rest travels in the clear: use it on a network that you trust.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from gameday.errors import LoadError

VERSION = 1
MAX_FRAME = 4 << 20
MAX_HELLO = 4096
"""Bytes of a frame before the other side has proved itself."""
SEND_WITHIN = 10.0
"""Seconds that the other side may take to read what we send."""
HELLO_WITHIN = 5.0

_LENGTH = struct.Struct(">I")


class Gone(Exception):
    """The connection ended, or cannot be used any more; the message says how."""


class Wire:
    """Frames over a socket. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buf = bytearray()
        self.limit = MAX_HELLO

    def send(self, message: Mapping[str, object]) -> None:
        data = orjson.dumps(message)
        if len(data) > MAX_FRAME:
            raise Gone(f"a message of {len(data)} bytes is too long")
        try:
            self._sock.settimeout(SEND_WITHIN)
            self._sock.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as e:
            raise Gone(f"cannot be written to: {_words(e)}") from e

    def receive(self, wait: float) -> list[tuple[float, dict[str, Any]]]:
        """The messages that come within `wait` seconds, each with the instant at which it came; maybe none."""
        try:
            self._sock.settimeout(wait)
            data = self._sock.recv(1 << 18)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return []
        except OSError as e:
            raise Gone(f"cannot be read from: {_words(e)}") from e
        now = time.monotonic()
        if not data:
            raise Gone("closed the connection")
        self._buf += data
        messages: list[tuple[float, dict[str, Any]]] = []
        while (message := self._frame()) is not None:
            messages.append((now, message))
        return messages

    def _frame(self) -> dict[str, Any] | None:
        if len(self._buf) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buf)
        if length > self.limit:
            raise Gone("does not speak our language")
        end = _LENGTH.size + length
        if len(self._buf) < end:
            return None
        try:
            message = orjson.loads(self._buf[_LENGTH.size : end])
        except orjson.JSONDecodeError as e:
            raise Gone("does not speak our language") from e
        if not isinstance(message, dict):
            raise Gone("does not speak our language")
        del self._buf[:end]
        return message

    def one(self, within: float) -> dict[str, Any]:
        """The next message; for the handshake, where each side waits for the other."""
        until = time.monotonic() + within
        while (left := until - time.monotonic()) > 0:
            messages = self.receive(left)
            if len(messages) == 1:
                return messages[0][1]
            if messages:
                raise Gone("speaks out of turn")
        raise Gone(f"said nothing for {within:g} s")

    def close(self) -> None:
        self._sock.close()


def _words(e: OSError) -> str:
    return e.strerror or str(e) or type(e).__name__


def _proof(token: str, who: str, first: str, second: str) -> str:
    return hmac.new(token.encode(), f"gameday {VERSION} {who} {first} {second}".encode(), "sha256").hexdigest()


def greet(wire: Wire, token: str) -> None:
    """The worker's side of the handshake. Raises Gone for whoever does not know the token."""
    mine = secrets.token_hex(16)
    wire.send({"gameday": VERSION, "nonce": mine})
    answer = wire.one(HELLO_WITHIN)
    theirs = str(answer.get("nonce", ""))
    if not hmac.compare_digest(str(answer.get("proof", "")).encode(), _proof(token, "leader", mine, theirs).encode()):
        wire.send({"error": "refuses our token"})
        raise Gone("does not know the token")
    wire.send({"proof": _proof(token, "worker", theirs, mine)})
    wire.limit = MAX_FRAME


def call(address: str, token: str, ca_file: Path | None) -> Wire:
    """The leader's side: connect and shake hands. Raises LoadError with one sentence."""
    host, port = split(address)
    sock: socket.socket | None = None
    try:
        sock = socket.create_connection((host, port), timeout=HELLO_WITHIN)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if ca_file is not None:
            sock = ssl.create_default_context(cafile=ca_file).wrap_socket(sock, server_hostname=host)
        wire = Wire(sock)
        _introduce(wire, token)
    except (OSError, Gone) as e:
        if sock is not None:
            sock.close()
        why = str(e) if isinstance(e, Gone) else f"cannot be reached: {_words(e)}"
        raise LoadError(f"the load worker at {address} {why}") from e
    return wire


def _introduce(wire: Wire, token: str) -> None:
    hello = wire.one(2 * HELLO_WITHIN)  # a stranger may be at its door just now
    if "error" in hello:
        raise Gone(str(hello["error"]))
    if hello.get("gameday") != VERSION:
        raise Gone(f"is not a load worker of this version ({hello.get('gameday')!r}, not {VERSION})")
    theirs, mine = str(hello.get("nonce", "")), secrets.token_hex(16)
    wire.send({"nonce": mine, "proof": _proof(token, "leader", theirs, mine)})
    answer = wire.one(HELLO_WITHIN)
    if "error" in answer:
        raise Gone(str(answer["error"]))
    if not hmac.compare_digest(str(answer.get("proof", "")).encode(), _proof(token, "worker", mine, theirs).encode()):
        raise Gone("does not know the token")
    wire.limit = MAX_FRAME


def split(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises LoadError for anything else."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise LoadError(f"{address!r} is not an address like 10.0.0.7:7001")
    return host, int(port)


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: Path) -> str:
    """Raises LoadError when the file does not hold one token of at least 16 characters."""
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise LoadError(f"the token file {file} cannot be read: {e}") from e
    if len(token) < 16 or any(c.isspace() for c in token):
        raise LoadError(f"the token file {file} must hold one token of at least 16 characters")
    return token
