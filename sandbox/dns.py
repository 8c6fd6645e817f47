"""Cluster DNS: Services and their endpoints under `cluster.local`, as CoreDNS' kubernetes plugin answers.

Answers A, SRV and CNAME (ExternalName) records; other types of a name that exists are empty. No other name exists:
there is no way out of the sandbox.
Source: kubernetes/dns docs/specification.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import dnslib
from dnslib import QTYPE, RCODE, RR

from sandbox.client import ENDPOINTSLICES, SERVICES, Api, Informer, Obj

log = logging.getLogger(__name__)

ZONE = "cluster.local"
TTL = 30  # seconds; the default Corefile's


@dataclass(frozen=True, slots=True)
class Endpoint:
    address: str
    name: str  # its hostname, or its address with dashes


@dataclass(slots=True)
class Name:
    """What is known of one name."""

    addresses: list[str] = field(default_factory=list)
    services: list[tuple[int, str]] = field(default_factory=list)  # SRV: port, target
    alias: str = ""


def names(services: Iterable[Obj], slices: Iterable[Obj]) -> dict[str, Name]:
    """Every name of the zone, in lower case, without the last dot."""
    by_service: dict[tuple[str, str], list[Obj]] = {}
    for slice_ in slices:
        meta = slice_["metadata"]
        label = (meta.get("labels") or {}).get("kubernetes.io/service-name", "")
        by_service.setdefault((meta["namespace"], label), []).append(slice_)
    found: dict[str, Name] = {}
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        own = f"{meta['name']}.{meta['namespace']}.svc.{ZONE}"
        if spec.get("type") == "ExternalName":
            found[own] = Name(alias=spec["externalName"])
        elif spec.get("clusterIP") not in (None, "", "None"):
            found[own] = Name([spec["clusterIP"]])
            for port in spec.get("ports") or []:
                _srv(found, own, port, own)
        else:
            _headless(found, own, by_service.get((meta["namespace"], meta["name"]), []), spec)
    for name in list(found):  # parents exist, though they hold nothing
        parts = name.split(".")
        for cut in range(1, len(parts) - 2):
            found.setdefault(".".join(parts[cut:]), Name())
    found.setdefault(ZONE, Name())
    return found


def _headless(found: dict[str, Name], own: str, slices: Sequence[Obj], spec: Obj) -> None:
    entry = found.setdefault(own, Name())
    everyone = bool(spec.get("publishNotReadyAddresses"))
    for slice_ in slices:
        for one in slice_.get("endpoints") or []:
            if not everyone and (one.get("conditions") or {}).get("ready") not in (True, None):
                continue
            endpoint = Endpoint(one["addresses"][0], one.get("hostname") or one["addresses"][0].replace(".", "-"))
            entry.addresses.append(endpoint.address)
            target = f"{endpoint.name}.{own}"
            found.setdefault(target, Name()).addresses.append(endpoint.address)
            for port in slice_.get("ports") or []:
                _srv(found, own, port, target)


def _srv(found: dict[str, Name], own: str, port: Obj, target: str) -> None:
    if port.get("name") and port.get("port"):
        name = f"_{port['name']}._{(port.get('protocol') or 'TCP').lower()}.{own}"
        found.setdefault(name, Name()).services.append((int(port["port"]), target))


def answer(request: dnslib.DNSRecord, known: dict[str, Name]) -> dnslib.DNSRecord:
    """The reply to one query."""
    reply = request.reply(ra=1, aa=1)
    wanted, kind = str(request.q.qname).rstrip(".").lower(), request.q.qtype
    name = known.get(wanted)
    if name is None:
        reply.header.rcode = RCODE.NXDOMAIN
    elif name.alias:
        reply.add_answer(RR(request.q.qname, QTYPE.CNAME, ttl=TTL, rdata=dnslib.CNAME(name.alias)))
    elif kind in (QTYPE.A, QTYPE.ANY):
        for address in name.addresses:
            reply.add_answer(RR(request.q.qname, QTYPE.A, ttl=TTL, rdata=dnslib.A(address)))
    elif kind == QTYPE.SRV:
        for port, target in name.services:
            rdata = dnslib.SRV(0, 100 // len(name.services), port, target)
            reply.add_answer(RR(request.q.qname, QTYPE.SRV, ttl=TTL, rdata=rdata))
            for address in known[target].addresses:
                reply.add_ar(RR(target, QTYPE.A, ttl=TTL, rdata=dnslib.A(address)))
    if not reply.rr:
        soa = dnslib.SOA(f"ns.dns.{ZONE}", f"hostmaster.{ZONE}", (1, 7200, 1800, 86400, TTL))
        reply.add_auth(RR(ZONE, QTYPE.SOA, ttl=TTL, rdata=soa))
    return reply


class Server(asyncio.DatagramProtocol):
    """Answers on UDP and TCP."""

    def __init__(self, api: Api) -> None:
        self._services = Informer(api, SERVICES, on_event=self._changed)
        self._slices = Informer(api, ENDPOINTSLICES, on_event=self._changed)
        self._known: dict[str, Name] | None = None
        self._transport: asyncio.DatagramTransport | None = None

    def _changed(self, *_: object) -> None:
        self._known = None

    async def serve(self, host: str, port: int) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        async with self._services.running(), self._slices.running():
            transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(host, port))
            try:
                async with await asyncio.start_server(self._stream, host, port) as server:
                    await server.serve_forever()
            finally:
                transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        assert self._transport is not None
        self._respond(data, lambda packed: self._transport.sendto(packed, addr))  # type: ignore[union-attr]

    def _respond(self, data: bytes, send: Callable[[bytes], object], most: int = 512) -> None:
        try:
            request = dnslib.DNSRecord.parse(data)
        except dnslib.DNSError as malformed:
            log.debug("malformed query: %s", malformed)
            return
        if self._known is None:
            self._known = names(self._services.objects.values(), self._slices.objects.values())
        reply = answer(request, self._known)
        packed = reply.pack()
        send(packed if len(packed) <= most else reply.truncate().pack())

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while size := await reader.readexactly(2):
                data = await reader.readexactly(int.from_bytes(size, "big"))
                self._respond(data, lambda packed: writer.write(len(packed).to_bytes(2, "big") + packed), most=65535)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
