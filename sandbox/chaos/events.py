"""Kubernetes Events about experiments, in the words of Chaos Mesh."""

from __future__ import annotations

import asyncio
import logging
import secrets

import aiohttp

from sandbox.chaos.records import now
from sandbox.client import EVENTS, Api, ApiError, Obj

log = logging.getLogger(__name__)

REMEMBERED = 1000  # events that a repetition may still be counted on


class Recorder:
    """Writes Events in the background, in order; a repeated one is counted, not written again."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._queue: asyncio.Queue[Obj] = asyncio.Queue()
        self._seen: dict[tuple[str, str, str], tuple[str, int]] = {}  # (uid, reason, message) → (name, count)

    def normal(self, about: Obj, reason: str, message: str) -> None:
        self._queue.put_nowait(_event(about, "Normal", reason, message))

    def updated(self, about: Obj, part: str) -> None:
        self.normal(about, "Updated", f"Successfully update {part} of resource")

    def failed(self, about: Obj, activity: str, why: str) -> None:
        self._queue.put_nowait(_event(about, "Warning", "Failed", f"Failed to {activity}: {why}"))

    async def run(self) -> None:
        while True:
            event = await self._queue.get()
            try:
                await self._write(event)
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.debug("event not written: %s", lost)  # an Event is a courtesy, as in Kubernetes

    async def _write(self, event: Obj) -> None:
        namespace = event["metadata"]["namespace"]
        key = event["involvedObject"]["uid"], event["reason"], event["message"]
        if known := self._seen.get(key):
            name, count = known
            self._seen[key] = name, count + 1
            change = {"count": count + 1, "lastTimestamp": event["lastTimestamp"]}
            await self._api.patch(EVENTS, name, change, namespace)
            return
        await self._api.create(EVENTS, event, namespace)
        self._seen[key] = event["metadata"]["name"], 1
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]


def _event(about: Obj, kind: str, reason: str, message: str) -> Obj:
    meta, time = about["metadata"], now()
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta['name']}.{secrets.token_hex(8)}", "namespace": meta["namespace"]},
        "involvedObject": {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
        },
        "type": kind,
        "reason": reason,
        "message": message,
        "source": {"component": "chaos-controller-manager"},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
