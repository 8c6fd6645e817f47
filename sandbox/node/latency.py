"""Distance between zones: what a machine sends to machines and pods of other zones takes a while."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable

from sandbox.chaos.shaping import CannotShape, Launch, Shaping
from sandbox.chaos.traffic import Netem, Rule
from sandbox.client import NODES, Api, Informer, Obj
from sandbox.node.network import UPLINK

log = logging.getLogger(__name__)

_ZONE = "topology.kubernetes.io/zone"
_RETRY_SECONDS = 1.0


def rules(nodes: Iterable[Obj], zone: str, seconds: float) -> list[Rule]:
    """What goes to the machines of other zones, and to their pods, is late by so much."""
    networks = []
    for node in nodes:
        if (node["metadata"].get("labels") or {}).get(_ZONE) == zone:
            continue
        networks += [(cidr, 0) for cidr in (node["spec"].get("podCIDRs") or [])]
        addresses = (node.get("status") or {}).get("addresses") or []
        networks += [(f"{entry['address']}/32", 0) for entry in addresses if entry["type"] == "InternalIP"]
    return [Rule(Netem(delay=seconds), tuple(sorted(networks)))] if networks else []


async def run(api: Api, zone: str, seconds: float, launch: Launch) -> None:
    """Keep it so in this machine, whatever machines come and go, until cancelled."""
    changed = asyncio.Event()
    nodes = Informer(api, NODES, on_event=lambda *_: changed.set())
    shaping = Shaping(launch, changed.set)
    netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        async with nodes.running():
            while True:
                changed.clear()
                try:
                    await shaping.realise(netns, rules(nodes.objects.values(), zone, seconds), UPLINK)
                except CannotShape as failed:
                    log.error("no latency between zones: %s", failed)
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                await changed.wait()
    finally:
        await shaping.end()
        os.close(netns)
