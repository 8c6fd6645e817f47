"""Node auto repair as EKS has it: a node whose accelerator has been broken for long enough is replaced.

AcceleratedHardwareReady=False for `clocks.repair_wait` → cordon, drain (evictions, so that disruption budgets are
honoured, up to a deadline after which the rest is deleted), delete the Node object; whoever provides machines then
replaces the machine. Nothing is started while more than a fifth of all nodes, and more than one, are unhealthy.
Once begun a repair goes on to its end. Every step is an Event on the Node. Other conditions are not acted on here.
Source: facts/gpu-and-dr.md (EKS node auto repair: 10 minutes; suspended above 20 %).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import aiohttp

from sandbox.client import EVENTS, NODES, PODS, Api, ApiError, Obj
from sandbox.options import Clocks

log = logging.getLogger(__name__)

CONDITION = "AcceleratedHardwareReady"
COMPONENT = "node-auto-repair"
SUSPENDED_ABOVE = 0.2  # of all nodes
DRAIN_FACTOR = 1.5  # deadline of the drain ÷ repair_wait: 15 minutes with the real clocks, as a managed node group has
_EVENT_NUMBERS = itertools.count(time.time_ns())


def broken_since(node: Obj) -> float | None:
    """When the accelerator of this node was reported broken, epoch seconds; None while it is not."""
    entry = _condition(node, CONDITION)
    if entry.get("status") != "False":
        return None
    at = entry.get("lastTransitionTime") or node["metadata"]["creationTimestamp"]
    return datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()


def healthy(node: Obj) -> bool:
    return _condition(node, "Ready").get("status") == "True" and broken_since(node) is None


def suspended(nodes: Sequence[Obj]) -> bool:
    """So many nodes are unhealthy that the fault is likely not theirs."""
    count = sum(not healthy(node) for node in nodes)
    return count > max(1, math.floor(SUSPENDED_ABOVE * len(nodes)))


def to_drain(pods: Sequence[Obj]) -> list[Obj]:
    """The pods that a drain moves: no daemons, no mirrors of the machine's own files, nothing that has ended."""
    return [
        pod
        for pod in pods
        if not any(owner.get("kind") == "DaemonSet" for owner in pod["metadata"].get("ownerReferences") or [])
        and "kubernetes.io/config.mirror" not in (pod["metadata"].get("annotations") or {})
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
    ]


async def run(api: Api, clocks: Clocks, now: Callable[[], float] = time.time) -> None:
    """Watch and repair until cancelled. `now` is epoch seconds, the clock of the conditions' timestamps."""
    repair = Repair(api, clocks, now)
    async with asyncio.TaskGroup() as work:
        while True:
            try:
                for node in await repair.due():
                    work.create_task(repair.replace(node))
            except (ApiError, aiohttp.ClientError, OSError) as lost:
                log.warning("node auto repair cannot see the nodes: %s", lost)
            await asyncio.sleep(clocks.repair_poll)


@dataclass(slots=True)
class Repair:
    api: Api
    clocks: Clocks
    now: Callable[[], float] = time.time
    _underway: set[str] = field(default_factory=set)  # uids of nodes, also of those replaced since
    _noted: set[str] = field(default_factory=set)  # uids of nodes told that repair is suspended

    async def due(self) -> list[Obj]:
        """The nodes whose repair begins now."""
        nodes, _ = await self.api.list(NODES)
        waiting = [node for node in nodes if self._overdue(node) and node["metadata"]["uid"] not in self._underway]
        if not suspended(nodes):
            self._noted.clear()
            self._underway.update(node["metadata"]["uid"] for node in waiting)
            return waiting
        for node in waiting:
            if node["metadata"]["uid"] not in self._noted:
                self._noted.add(node["metadata"]["uid"])
                sick = sum(not healthy(other) for other in nodes)
                await self._event(
                    node, "Warning", "NodeRepairSuspended", f"{sick} of {len(nodes)} nodes are unhealthy: not repairing"
                )
        return []

    async def replace(self, node: Obj) -> None:
        """Repair one node; tries on while the API server fails, ends when the Node object is gone."""
        meta = node["metadata"]
        while True:
            try:
                await self._steps(node)
                return
            except ApiError as refused:
                if refused.not_found:
                    return  # someone else has removed the node
                log.warning("repair of %s: %s; trying again", meta["name"], refused)
            except (aiohttp.ClientError, OSError) as lost:
                log.warning("repair of %s: %s; trying again", meta["name"], lost)
            await asyncio.sleep(self.clocks.repair_poll)

    async def _steps(self, node: Obj) -> None:
        name, uid = node["metadata"]["name"], node["metadata"]["uid"]
        reason = _condition(node, CONDITION).get("reason", CONDITION)
        await self._event(
            node, "Warning", "NodeRepairStarted", f"{reason} for {self.clocks.repair_wait:g} s: replacing"
        )
        await self.api.patch(NODES, name, {"spec": {"unschedulable": True}})
        await self._event(node, "Normal", "NodeRepairCordoned", "no new pods")
        forced = await self._drain(name)
        done = f"{forced} pods had to be deleted" if forced else "all pods evicted"
        await self._event(node, "Normal", "NodeRepairDrained", done)
        await self._event(node, "Normal", "NodeRepairDeleting", "deleting the node: its machine will be replaced")
        await self.api.delete(NODES, name, uid=uid)

    async def _drain(self, name: str) -> int:
        """Move the pods away; returns how many had to be deleted because no eviction was granted in time."""
        poll, allowed = self.clocks.repair_poll, self.clocks.repair_wait * DRAIN_FACTOR
        began = asyncio.get_running_loop().time()
        forced: set[str] = set()
        while left := to_drain((await self.api.list(PODS, fields=f"spec.nodeName={name}"))[0]):
            late = asyncio.get_running_loop().time() - began - allowed
            if late > allowed:
                break  # even deleted pods do not go (a dead kubelet): the machine's end is theirs
            for pod in left:
                if pod["metadata"].get("deletionTimestamp"):
                    continue
                if late < 0:
                    await self._evict(pod)
                else:
                    forced.add(pod["metadata"]["uid"])
                    await self._delete(pod)
            await asyncio.sleep(min(poll, 1.0))
        return len(forced)

    async def _evict(self, pod: Obj) -> None:
        meta = pod["metadata"]
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": meta["name"], "namespace": meta["namespace"]},
            "deleteOptions": {"preconditions": {"uid": meta["uid"]}},
        }
        try:
            await self.api.post(PODS, meta["name"], "eviction", body, meta["namespace"])
        except ApiError as refused:
            if refused.code not in (404, 409, 429):  # gone, replaced, or its budget says not now
                raise

    async def _delete(self, pod: Obj) -> None:
        meta = pod["metadata"]
        try:
            await self.api.delete(PODS, meta["name"], meta["namespace"], uid=meta["uid"])
        except ApiError as refused:
            if refused.code not in (404, 409):
                raise

    def _overdue(self, node: Obj) -> bool:
        since = broken_since(node)
        return since is not None and self.now() - since >= self.clocks.repair_wait

    async def _event(self, node: Obj, severity: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        name = node["metadata"]["name"]
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        event: Obj = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}.{next(_EVENT_NUMBERS):x}", "namespace": "default"},
            # kubectl describe looks for a node's Events by this uid
            "involvedObject": {"kind": "Node", "name": name, "uid": name},
            "type": severity,
            "reason": reason,
            "message": message,
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "reportingInstance": COMPONENT,
            "count": 1,
            "firstTimestamp": at,
            "lastTimestamp": at,
        }
        await self.api.create(EVENTS, event, "default")


def _condition(node: Obj, type_: str) -> Obj:
    for entry in (node.get("status") or {}).get("conditions") or []:
        if entry["type"] == type_:
            return dict(entry)
    return {}
