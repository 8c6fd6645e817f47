"""TCP relays out of the fabric: the load balancer in front of a Service, and the way to Prometheus.

A relay is layer 4: it copies bytes and half-closes; what a server breaks is broken for its client. New
connections go round robin over the backends; one that cannot be reached within `CONNECT_SECONDS` is
skipped for the next. Without any backend a connection is accepted and closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable, Sequence
from typing import cast

from sandbox.client import ENDPOINTSLICES, Api, EventType, Informer, Obj

log = logging.getLogger(__name__)

Address = tuple[str, int]
CONNECT_SECONDS = 0.5
_HIGH_WATER = 256 * 1024  # bytes buffered towards a slow reader before the other side is paused


class _Pipe(asyncio.Protocol):
    """One side of a relayed connection."""

    def __init__(self, opened: Callable[[_Pipe], None] | None = None) -> None:
        self._opened = opened
        self._other: _Pipe | None = None
        self._early: list[bytes] = []
        self.ended = False  # its peer has said all
        self.transport: asyncio.Transport | None = None
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_HIGH_WATER)
        if self._opened:
            self._opened(self)

    def join(self, other: _Pipe) -> None:
        """What comes in here goes out there; what came before goes first."""
        self._other = other
        assert other.transport is not None
        for chunk in self._early:
            other.transport.write(chunk)
        self._early.clear()
        if self.ended:
            self._end_other(other)
        if self.gone:
            other.close()

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            self._early.append(data)
        elif self._other.transport is not None:
            self._other.transport.write(data)

    def eof_received(self) -> bool:
        self.ended = True
        if self._other is not None:
            self._end_other(self._other)
        return True  # the other direction may go on

    def _end_other(self, other: _Pipe) -> None:
        if other.ended:  # both have said all: nothing is left to relay
            other.close()
            self.close()
        else:
            other.end()

    def end(self) -> None:
        if self.transport and not self.transport.is_closing() and self.transport.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                self.transport.write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True
        if self._other:
            if error:
                self._other.abort()
            else:
                self._other.close()

    def close(self) -> None:
        if self.transport:
            self.transport.close()

    def abort(self) -> None:
        if self.transport:
            self.transport.abort()

    def pause_writing(self) -> None:
        if self._other and self._other.transport:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other and self._other.transport and not self._other.transport.is_closing():
            self._other.transport.resume_reading()


class Relay:
    """Relays a listening socket to whatever `backends` names at the time of each new connection."""

    def __init__(self, backends: Callable[[], Sequence[Address]], source: str = "") -> None:
        """`source`: the address that backends see; "": the one by which they are reached."""
        self._backends, self._source = backends, source
        self._turn = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, sock: socket.socket) -> None:
        """Until cancelled."""
        server = await asyncio.get_running_loop().create_server(lambda: _Pipe(self._accepted), sock=sock, backlog=1024)
        async with server:
            await server.serve_forever()

    def _accepted(self, client: _Pipe) -> None:
        task = asyncio.create_task(self._connect(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial(self, backend: Address) -> _Pipe:
        loop = asyncio.get_running_loop()
        if not self._source:
            return (await loop.create_connection(_Pipe, *backend))[1]
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # The port is chosen by connect(): backends may share it, or the relay would run out of ports.
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((self._source, 0))
            await loop.sock_connect(sock, backend)
        except BaseException:
            sock.close()
            raise
        return (await loop.create_connection(_Pipe, sock=sock))[1]

    async def _connect(self, client: _Pipe) -> None:
        backends = self._backends()
        first = next(self._turn)
        for step in range(len(backends)):
            host, port = backends[(first + step) % len(backends)]
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    upstream = await self._dial((host, port))
            except (OSError, TimeoutError) as unreachable:
                log.debug("backend %s:%d: %s", host, port, unreachable)
                continue
            upstream.join(client)
            client.join(upstream)
            return
        client.abort()


class Endpoints:
    """The ready endpoints of one Service port, from its EndpointSlices."""

    def __init__(self, api: Api, namespace: str, service: str) -> None:
        self._slices = Informer(
            api, ENDPOINTSLICES, namespace, labels=f"kubernetes.io/service-name={service}", on_event=self._changed
        )
        self.ready: list[Address] = []

    async def run(self) -> None:
        await self._slices.run()

    def _changed(self, _: EventType, __: Obj, ___: Obj | None) -> None:
        self.ready = sorted(address for slice_ in self._slices.objects.values() for address in ready_addresses(slice_))


def ready_addresses(slice_: Obj) -> list[Address]:
    """The addresses of a slice that may get new connections, on its first port."""
    ports = [port["port"] for port in slice_.get("ports") or [] if port.get("port")]
    if not ports:
        return []
    return [
        (endpoint["addresses"][0], ports[0])
        for endpoint in slice_.get("endpoints") or []
        if (endpoint.get("conditions") or {}).get("ready") in (True, None)
    ]
