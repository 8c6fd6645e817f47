"""The chaos daemon of one node: realises the PodNetworkChaos of the node's pods, and says so in their status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from sandbox.chaos import nft, rules, traffic
from sandbox.chaos.shaping import CannotShape, Launch, Shaping
from sandbox.client import PODNETWORKCHAOS, PODS, Api, ApiError, EventType, Informer, Obj

log = logging.getLogger(__name__)

RETRY_FIRST, RETRY_MAX = 0.2, 2.0  # seconds, doubling

Key = tuple[str, str]  # namespace, name


class _Failed(Exception):
    """Not realised; the text becomes `failedMessage`."""


async def run(api: Api, node_name: str, netns_of: Callable[[str], int | None], launch: Launch) -> None:
    """Serve the pods of `node_name` until cancelled.

    `netns_of(pod_uid)` gives an open descriptor of the pod's network namespace (which stays the caller's), or None
    when the pod has none; `launch` starts a traffic shaper in one. Waits for the definitions of Chaos Mesh to be there.
    """
    await Daemon(api, node_name, netns_of, launch).run()


class Daemon:
    def __init__(self, api: Api, node_name: str, netns_of: Callable[[str], int | None], launch: Launch) -> None:
        self._api, self._netns_of, self._launch = api, netns_of, launch
        on_event = self._on_event
        self._pods = Informer(api, PODS, fields=f"spec.nodeName={node_name}", on_event=on_event)
        self._chaos = Informer(api, PODNETWORKCHAOS, on_event=on_event)
        self._dirty: dict[Key, asyncio.Event] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._pods.run())
            tasks.create_task(self._chaos.run())

    def _on_event(self, type: EventType, new: Obj, old: Obj | None) -> None:
        key = new["metadata"]["namespace"], new["metadata"]["name"]
        if key in self._dirty:
            self._dirty[key].set()
        elif key in self._pods.objects and key in self._chaos.objects and self._tasks:
            self._dirty[key] = asyncio.Event()
            self._tasks.create_task(self._serve(key))

    async def _serve(self, key: Key) -> None:
        """Keep one pod's rules as its PodNetworkChaos says, until either is gone."""
        shaping = Shaping(self._launch, self._dirty[key].set)
        try:
            await self._keep(key, self._dirty[key], shaping)
        finally:
            await shaping.end()

    async def _keep(self, key: Key, changed: asyncio.Event, shaping: Shaping) -> None:
        applied: tuple[str, str, int] | None = None  # pod, PodNetworkChaos and generation that are realised
        delay = RETRY_FIRST
        while True:
            changed.clear()
            pod, chaos = self._pods.objects.get(key), self._chaos.objects.get(key)
            if pod is None or chaos is None:
                del self._dirty[key]
                return
            wanted = pod["metadata"]["uid"], chaos["metadata"]["uid"], chaos["metadata"]["generation"]
            ok = (wanted == applied and shaping.sound) or await self._realise(pod, chaos, shaping)
            applied, delay = (wanted, RETRY_FIRST) if ok else (None, min(delay * 2, RETRY_MAX))
            try:
                async with asyncio.timeout(None if ok else delay):
                    await changed.wait()
            except TimeoutError:
                continue

    async def _realise(self, pod: Obj, chaos: Obj, shaping: Shaping) -> bool:
        failure = ""
        try:
            await self._apply(pod, chaos, shaping)
        except _Failed as failed:
            failure = str(failed)
        status = {"observedGeneration": chaos["metadata"]["generation"], "failedMessage": failure}
        try:
            if chaos.get("status") != status:
                meta = chaos["metadata"]
                patch = {"metadata": {"uid": meta["uid"]}, "status": status}
                await self._api.patch(PODNETWORKCHAOS, meta["name"], patch, meta["namespace"], sub="status")
        except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as lost:
            log.debug("status of PodNetworkChaos %s not written: %s", chaos["metadata"]["name"], lost)
            return False
        return not failure

    async def _apply(self, pod: Obj, chaos: Obj, shaping: Shaping) -> None:
        meta = pod["metadata"]
        where = f"{meta['namespace']}/{meta['name']}"
        if pod["spec"].get("hostNetwork"):
            raise _Failed(f"It's dangerous to inject network chaos on a pod({where}) with `hostNetwork`")
        owners = [owner["uid"] for owner in chaos["metadata"].get("ownerReferences") or ()]
        if owners and meta["uid"] not in owners:
            raise _Failed(f"pod {where} is not the pod that this PodNetworkChaos was made for")
        netns = self._netns_of(meta["uid"])
        if netns is None:
            raise _Failed(f"pod {where} has no network namespace on this node")
        try:
            spec = chaos.get("spec") or {}
            controlled = traffic.rules(spec)
            if strange := controlled.keys() - {rules.DEVICE}:
                raise _Failed(f"pods have {rules.DEVICE} only, not {', '.join(sorted(strange))}")
            await nft.apply(netns, rules.script(spec))
            await shaping.realise(netns, controlled.get(rules.DEVICE, []))
        except (rules.Unsupported, traffic.Unsupported, nft.NftFailed, CannotShape) as failed:
            raise _Failed(str(failed)) from failed
