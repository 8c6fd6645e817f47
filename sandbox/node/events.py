"""Events as kubelets write them: repeated ones are counted up, a chatty object is throttled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import dataclass, field

import aiohttp

from sandbox.client import EVENTS, Api, ApiError, Obj
from sandbox.node.status import now

log = logging.getLogger(__name__)

# client-go's spam filter: 25 events of one object, then one every 5 minutes (facts/kubelet.md §0).
_BURST = 25
_REFILL_SECONDS = 300.0


@dataclass(slots=True)
class _Bucket:
    tokens: float = _BURST
    at: float = field(default_factory=time.monotonic)

    def take(self) -> bool:
        moment = time.monotonic()
        self.tokens = min(_BURST, self.tokens + (moment - self.at) / _REFILL_SECONDS)
        self.at = moment
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Recorder:
    """Writes events in the background. `record` never blocks and never fails its caller."""

    def __init__(self, api: Api, node: str) -> None:
        self._api, self._node = api, node
        self._queue: asyncio.Queue[tuple[Obj, str, str, str, str | None]] = asyncio.Queue()
        self._known: dict[tuple[str, ...], Obj] = {}
        self._buckets: dict[str, _Bucket] = {}

    def record(self, about: Obj, type_: str, reason: str, message: str, container: str | None = None) -> None:
        self._queue.put_nowait((about, type_, reason, message, container))

    def forget(self, uid: str) -> None:
        self._buckets.pop(uid, None)
        for key in [key for key in self._known if key[0] == uid]:
            del self._known[key]

    async def run(self) -> None:
        while True:
            about, type_, reason, message, container = await self._queue.get()
            if not self._buckets.setdefault(about["metadata"]["uid"], _Bucket()).take():
                continue
            try:
                await self._write(about, type_, reason, message, container)
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.debug("event %s not written: %s", reason, lost)

    async def _write(self, about: Obj, type_: str, reason: str, message: str, container: str | None) -> None:
        meta = about["metadata"]
        key = (meta["uid"], type_, reason, message, container or "")
        namespace = meta.get("namespace", "default")
        if known := self._known.get(key):
            change = {"count": known["count"] + 1, "lastTimestamp": now()}
            with contextlib.suppress(ApiError):
                self._known[key] = await self._api.patch(EVENTS, known["metadata"]["name"], change, namespace)
                return
        involved: Obj = {"kind": about["kind"], "namespace": meta.get("namespace"), "name": meta["name"]}
        involved |= {"uid": meta["uid"], "apiVersion": about["apiVersion"]}
        if about["kind"] == "Pod":
            involved["resourceVersion"] = meta.get("resourceVersion")
        if container:
            involved["fieldPath"] = f"spec.containers{{{container}}}"
        event: Obj = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{meta['name']}.{secrets.token_hex(8)}", "namespace": namespace},
            "involvedObject": {k: v for k, v in involved.items() if v},
            "type": type_,
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self._node},
            "reportingComponent": "kubelet",
            "reportingInstance": self._node,
            "count": 1,
            "firstTimestamp": now(),
            "lastTimestamp": now(),
        }
        self._known[key] = await self._api.create(EVENTS, event, namespace)
