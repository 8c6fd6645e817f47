"""What kube-proxy does: a machine translates cluster IPs of Services to the addresses of their endpoints, by nftables.

Connections are translated once, when they begin; established ones are not moved. A pod therefore sees the cluster IP
as its peer, and its own NetworkChaos rules meet that address (facts/chaos-mesh.md), while its endpoint sees the pod's.
Sources: Kubernetes pkg/proxy/nftables/proxier.go. Node ports are not served.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sandbox.chaos import nft
from sandbox.client import ENDPOINTSLICES, SERVICES, Api, EventType, Informer, Obj

log = logging.getLogger(__name__)

TABLE = "ip gameday_services"
_REMOVE = f"add table {TABLE}\ndelete table {TABLE}\n"
_SETTLE_SECONDS = 0.01  # changes come in bursts; the last one counts
_RETRY_SECONDS = 0.5

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a Service."""

    address: str
    protocol: str  # tcp, udp
    port: int
    endpoints: tuple[Address, ...]
    sticky: bool = False  # sessionAffinity: ClientIP


def ports(services: Iterable[Obj], slices: Iterable[Obj]) -> list[Port]:
    """Every port that has a cluster IP, with the endpoints that get new connections."""
    by_service: dict[tuple[str, str], list[Obj]] = {}
    for slice_ in slices:
        meta = slice_["metadata"]
        service = (meta.get("labels") or {}).get("kubernetes.io/service-name", "")
        by_service.setdefault((meta["namespace"], service), []).append(slice_)
    found = []
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        address = spec.get("clusterIP") or "None"
        if address == "None":
            continue
        own = by_service.get((meta["namespace"], meta["name"]), [])
        for port in spec.get("ports") or []:
            endpoints = addresses(own, port.get("name") or "")
            sticky = spec.get("sessionAffinity") == "ClientIP"
            protocol = (port.get("protocol") or "TCP").lower()
            found.append(Port(address, protocol, int(port["port"]), tuple(endpoints), sticky))
    return sorted(found, key=lambda port: (port.address, port.protocol, port.port))


def addresses(slices: Sequence[Obj], port_name: str) -> list[Address]:
    """Ready endpoints of a named port; when there is none, those that still serve while they terminate."""
    ready: set[Address] = set()
    serving: set[Address] = set()
    for slice_ in slices:
        numbers = [int(p["port"]) for p in slice_.get("ports") or [] if (p.get("name") or "") == port_name]
        for endpoint, number in itertools.product(slice_.get("endpoints") or [], numbers[:1]):
            conditions = endpoint.get("conditions") or {}
            if conditions.get("ready") in (True, None):
                ready.add((endpoint["addresses"][0], number))
            elif conditions.get("serving") and conditions.get("terminating"):
                serving.add((endpoint["addresses"][0], number))
    return sorted(ready or serving)


def script(found: Sequence[Port]) -> str:
    """nft commands that make the machine's table exactly what `found` says, in one transaction."""
    chains: list[str] = []
    verdicts: list[str] = []
    refused: list[str] = []
    hairpins: set[str] = set()
    for number, port in enumerate(found):
        key = f"{port.address} . {port.protocol} . {port.port}"
        if not port.endpoints:
            refused.append(key)
            continue
        for place, (address, target) in enumerate(port.endpoints):
            chains.append(
                f"  chain s{number}e{place} {{\n    meta l4proto {port.protocol} dnat to {address}:{target}\n  }}\n"
            )
            hairpins.add(f"{address} . {address}")
        many = len(port.endpoints)
        chosen = f"jhash ip saddr mod {many}" if port.sticky else f"numgen random mod {many}"
        jumps = ", ".join(f"{place} : goto s{number}e{place}" for place in range(many))
        choice = f"{chosen} vmap {{ {jumps} }}" if many > 1 else f"goto s{number}e0"
        chains.append(f"  chain s{number} {{\n    {choice}\n  }}\n")
        verdicts.append(f"{key} : goto s{number}")
    look = "ip daddr . meta l4proto . th dport"
    translate = f"    {look} vmap {{ {', '.join(verdicts)} }}\n" if verdicts else ""
    refuse = f"    {look} {{ {', '.join(refused)} }} reject\n" if refused else ""
    hairpin = (
        f"    ct status dnat ip saddr . ip daddr {{ {', '.join(sorted(hairpins))} }} masquerade\n" if hairpins else ""
    )
    hooks = "".join(
        f"  chain {name} {{\n    type {kind} hook {hook} priority {priority}; policy accept;\n{rules}  }}\n"
        for name, kind, hook, priority, rules in (
            ("prerouting", "nat", "prerouting", -100, translate),
            ("output", "nat", "output", -100, translate),
            ("postrouting", "nat", "postrouting", 100, hairpin),
            ("forward", "filter", "forward", 0, refuse),
            ("local", "filter", "output", 0, refuse),
        )
    )
    return f"{_REMOVE}table {TABLE} {{\n{''.join(chains)}{hooks}}}\n"


class Proxy:
    """Keeps this machine's translation as the API says. Runs in the machine's network namespace."""

    def __init__(self, api: Api) -> None:
        self._changed = asyncio.Event()
        self.services = Informer(api, SERVICES, on_event=self._on_event)
        self._slices = Informer(api, ENDPOINTSLICES, on_event=self._on_event)
        self._applied: list[Port] | None = None
        self.synced = asyncio.Event()  # set once the first translation is in force

    def _on_event(self, kind: EventType, new: Obj, old: Obj | None) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with self.services.running(), self._slices.running():
            netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                while True:
                    self._changed.clear()
                    if not await self._apply(netns):
                        await asyncio.sleep(_RETRY_SECONDS)
                        continue
                    self.synced.set()
                    await self._changed.wait()
                    await asyncio.sleep(_SETTLE_SECONDS)
            finally:
                os.close(netns)

    async def _apply(self, netns: int) -> bool:
        wanted = ports(self.services.objects.values(), self._slices.objects.values())
        if wanted == self._applied:
            return True
        try:
            await nft.apply(netns, script(wanted))
        except nft.NftFailed as failed:
            log.error("Services cannot be translated: %s", failed)
            return False
        self._applied = wanted
        return True


def variables(services: Iterable[Obj], namespace: str) -> dict[str, str]:
    """The environment that tells a container of a namespace's Services, and of the API server."""
    found: dict[str, str] = {}
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        master = (meta["namespace"], meta["name"]) == ("default", "kubernetes")
        address = spec.get("clusterIP") or "None"
        if address == "None" or not spec.get("ports") or not (master or meta["namespace"] == namespace):
            continue
        found |= _links(meta["name"].upper().replace("-", "_"), address, spec["ports"])
    return found


def _links(name: str, address: str, service_ports: Sequence[Obj]) -> dict[str, str]:
    first = service_ports[0]
    found = {f"{name}_SERVICE_HOST": address, f"{name}_SERVICE_PORT": str(first["port"])}
    for port in service_ports:
        if port.get("name"):
            found[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
    for port in service_ports:
        protocol = port.get("protocol") or "TCP"
        url = f"{protocol.lower()}://{address}:{port['port']}"
        prefix = f"{name}_PORT_{port['port']}_{protocol}"
        if port is first:
            found[f"{name}_PORT"] = url
        found |= {prefix: url, f"{prefix}_PROTO": protocol.lower(), f"{prefix}_PORT": str(port["port"])}
        found[f"{prefix}_ADDR"] = address
    return found
