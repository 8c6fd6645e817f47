"""A TCP proxy before an API server that can be severed and joined again."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml


@dataclass(slots=True)
class Line:
    """`cut()` ends every connection and refuses new ones, until `join()`."""

    host: str
    port: int
    kubeconfig: Path
    _server: socket.socket
    _down: threading.Event = field(default_factory=threading.Event)
    _held: list[socket.socket] = field(default_factory=list)
    refused: int = 0  # connections that were tried while it was cut

    def cut(self) -> None:
        self._down.set()
        self._drop()

    def join(self) -> None:
        self._down.clear()

    def _drop(self) -> None:
        for sock in self._held:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self._held.append(client)
            if self._down.is_set():
                self.refused += 1
                client.shutdown(socket.SHUT_RDWR)
                continue
            there = socket.create_connection((self.host, self.port))
            self._held.append(there)
            for pair in ((client, there), (there, client)):
                threading.Thread(target=_pump, args=pair, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the accept
        self._server.close()
        self._drop()
        for sock in self._held:
            sock.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def line(kubeconfig: Path, directory: Path) -> Iterator[Line]:
    """A proxy to the API server of `kubeconfig`, and a kubeconfig that goes through it."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    there = urlsplit(cluster["server"])
    assert there.hostname and there.port
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    cluster["server"] = f"https://127.0.0.1:{server.getsockname()[1]}"
    path = directory / "kubeconfig-by-proxy"
    path.write_text(yaml.safe_dump(config))
    made = Line(there.hostname, there.port, path, server)
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.close()
        thread.join(timeout=10)
