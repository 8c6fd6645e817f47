"""Says of objects that the API keeps, but that nothing in the sandbox acts upon, that it is so: an Event for each."""

from __future__ import annotations

import asyncio
import logging
import secrets

import aiohttp

from sandbox.chaos.records import now
from sandbox.client import EVENTS, Api, ApiError, EventType, Informer, Kind, Obj

log = logging.getLogger(__name__)

NETWORKPOLICIES = Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
_WHY = "The sandbox has no network policies: traffic flows as if this object were not there"


async def run(api: Api) -> None:
    """Until cancelled."""
    new: asyncio.Queue[Obj] = asyncio.Queue()

    def note(kind: EventType, obj: Obj, _: Obj | None) -> None:
        if kind == "ADDED":
            new.put_nowait(obj)

    async with Informer(api, NETWORKPOLICIES, on_event=note).running():
        while True:
            event = _event(await new.get())
            try:
                await api.create(EVENTS, event, event["metadata"]["namespace"])
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.warning("event not written: %s", lost)


def _event(about: Obj) -> Obj:
    meta, moment = about["metadata"], now()
    involved = {"apiVersion": about["apiVersion"], "kind": about["kind"], "uid": meta["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta['name']}.{secrets.token_hex(8)}", "namespace": meta["namespace"]},
        "involvedObject": involved | {"name": meta["name"], "namespace": meta["namespace"]},
        "type": "Warning",
        "reason": "NotEnforced",
        "message": _WHY,
        "source": {"component": "gameday-sandbox"},
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }
