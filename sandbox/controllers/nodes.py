"""Node lifecycle: silence makes a node Unknown, conditions become taints, taints evict pods, lost pods are collected.

The rules of kube-controller-manager 1.36 (pkg/controller/{nodelifecycle,tainteviction,podgc}); measured in
facts/kubelet.md §6. Nothing here reads a node's own clock: silence is counted from when a sign of life was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sandbox.client import LEASES, NODES, PODS, ApiError, EventType, Key, Obj
from sandbox.controllers.objects import (
    REGION,
    ZONE,
    condition,
    conditions,
    created,
    finished,
    generation,
    key,
    labels,
    name,
    namespace,
    node_of,
    stamp,
    taints,
    tolerates,
    uid,
)
from sandbox.controllers.work import MALFORMED, TRANSPORT, Controller, Shared
from sandbox.options import REAL, Clocks

log = logging.getLogger(__name__)

NOT_READY = "node.kubernetes.io/not-ready"
UNREACHABLE = "node.kubernetes.io/unreachable"
UNSCHEDULABLE = "node.kubernetes.io/unschedulable"
_PRESSURE = {
    "MemoryPressure": "node.kubernetes.io/memory-pressure",
    "DiskPressure": "node.kubernetes.io/disk-pressure",
    "PIDPressure": "node.kubernetes.io/pid-pressure",
    "NetworkUnavailable": "node.kubernetes.io/network-unavailable",
}
_MANAGED = {NOT_READY, UNREACHABLE, UNSCHEDULABLE, *_PRESSURE.values()}
_WATCHED = ("Ready", "MemoryPressure", "DiskPressure", "PIDPressure")
_LEASE_SPACE = "kube-node-lease"
_STARTUP_GRACE = 60.0  # seconds for a node that never reported, at real clocks
_LARGE = 50  # nodes; a smaller zone that is mostly lost is not evicted from at all
_SLOW = 0.01  # evictions per second in a large zone that is mostly lost

ZoneState = Literal["Normal", "Partial", "Full"]


def readiness(node: Obj) -> str:
    """Status of the Ready condition; "" when the node never reported."""
    return str((condition(node, "Ready") or {}).get("status") or "")


def no_schedule(node: Obj) -> set[str]:
    """The keys of the NoSchedule taints a node's conditions call for."""
    keys = {key for type, key in _PRESSURE.items() if (condition(node, type) or {}).get("status") == "True"}
    if (node.get("spec") or {}).get("unschedulable"):
        keys.add(UNSCHEDULABLE)
    match readiness(node):
        case "False":
            keys.add(NOT_READY)
        case "Unknown":
            keys.add(UNREACHABLE)
        case "":  # as registered: not before its first report
            keys.update(t["key"] for t in taints(node) if t["key"] == NOT_READY and t["effect"] == "NoSchedule")
        case _:
            pass
    return keys


def tainted(node: Obj, wanted: set[str], managed: set[str], effect: str) -> list[Obj]:
    """A node's taints with exactly `wanted` of the `managed` keys at this effect; others stay as they are."""
    kept = [t for t in taints(node) if t["effect"] != effect or t["key"] not in managed or t["key"] in wanted]
    have = {t["key"] for t in kept if t["effect"] == effect}
    return [*kept, *({"key": k, "effect": effect, "timeAdded": stamp()} for k in sorted(wanted - have))]


def zone_of(node: Obj) -> str:
    return f"{labels(node).get(REGION, '')}/{labels(node).get(ZONE, '')}"


def zone_state(ready: Iterable[bool]) -> ZoneState:
    """Full: nothing left. Partial: at least 55 % and more than two nodes lost."""
    flags = list(ready)
    lost = flags.count(False)
    if lost and lost == len(flags):
        return "Full"
    return "Partial" if lost > 2 and lost / len(flags) >= 0.55 else "Normal"


def eviction_rate(state: ZoneState, nodes: int, normal: float) -> float:
    """Nodes per second of a zone that may be tainted NoExecute."""
    if state != "Partial":
        return normal
    return _SLOW if nodes > _LARGE else 0.0


def unknown_conditions(node: Obj) -> list[Obj]:
    """The conditions of a node that went silent."""
    at = stamp()
    fresh = []
    held = conditions(node)
    for one in held:
        if one["type"] in _WATCHED and one.get("status") != "Unknown":
            one = {  # noqa: PLW2901
                **one,
                "status": "Unknown",
                "lastTransitionTime": at,
                "reason": "NodeStatusUnknown",
                "message": "Kubelet stopped posting node status.",
            }
        fresh.append(one)
    for type in _WATCHED:
        if all(one["type"] != type for one in held):
            fresh.append({
                "type": type,
                "status": "Unknown",
                "lastHeartbeatTime": created(node),
                "lastTransitionTime": at,
                "reason": "NodeStatusNeverUpdated",
                "message": "Kubelet never posted node status.",
            })  # fmt: skip
    return fresh


@dataclass(slots=True)
class Bucket:
    """A token bucket of size one on a clock of seconds."""

    rate: float
    tokens: float = 1.0
    at: float = 0.0

    def take(self, now: float) -> bool:
        self.tokens = min(1.0, self.tokens + (now - self.at) * self.rate) if self.at else self.tokens
        self.at = now
        if self.tokens < 1.0 or self.rate <= 0:
            return False
        self.tokens -= 1.0
        return True

    def wait(self) -> float:
        """Seconds from the last look until there is a token again."""
        return (1.0 - self.tokens) / self.rate if self.rate > 0 else float("inf")


@dataclass(slots=True)
class _Zone:
    bucket: Bucket
    pending: OrderedDict[str, None] = field(default_factory=OrderedDict)  # nodes to taint NoExecute


class NodeLifecycle(Controller):
    """Watches over nodes; its queue re-computes the NoSchedule taints of those that changed."""

    name = "node"

    def __init__(self, shared: Shared, clocks: Clocks) -> None:
        self._clocks = clocks
        self._scale = clocks.lease_renew / REAL.lease_renew
        self._seen: dict[str, float] = {}  # node → when a sign of life was last seen
        self._unmarked: set[str] = set()  # nodes whose pods could not all be marked unready
        self._zones: defaultdict[str, _Zone] = defaultdict(lambda: _Zone(Bucket(clocks.eviction_per_second)))
        self._all_lost = False
        super().__init__(shared)

    def setup(self) -> None:
        self.nodes, self.pods = self.shared.caches.of(NODES), self.shared.caches.of(PODS)
        self.nodes.subscribe(self._node_changed)
        self.shared.caches.of(LEASES).subscribe(self._lease_changed)

    def record(self, obj: Obj, kind: object, type: str, reason: str, message: str) -> None:
        self.shared.recorder.record(obj, NODES, type, reason, message, source="node-controller")

    def _alive(self, node: str) -> None:
        self._seen[node] = asyncio.get_running_loop().time()

    def _node_changed(self, type: EventType, node: Obj, old: Obj | None) -> None:
        title = name(node)
        if type == "DELETED":
            self._seen.pop(title, None)
            self._unmarked.discard(title)
            self._zones[zone_of(node)].pending.pop(title, None)
            text = f"Node {title} event: Removing Node {title} from Controller"
            self.record(node, NODES, "Normal", "RemovingNode", text)
            return
        if old is None:
            text = f"Node {title} event: Registered Node {title} in Controller"
            self.record(node, NODES, "Normal", "RegisteredNode", text)
        if old is None or self._reported(node) != self._reported(old):
            self._alive(title)
        if old is None or conditions(old) != conditions(node) or old.get("spec") != node.get("spec"):
            self.queue.add(key(node))

    @staticmethod
    def _reported(node: Obj) -> tuple[object, ...]:
        """What changes when the kubelet posts status; our own marking as Unknown is no sign of life."""
        found = condition(node, "Ready") or {}
        status = found.get("status")
        return found.get("lastHeartbeatTime"), status if status != "Unknown" else None

    def _lease_changed(self, type: EventType, lease: Obj, old: Obj | None) -> None:
        if type == "DELETED" or namespace(lease) != _LEASE_SPACE:
            return
        if old is None or (old.get("spec") or {}).get("renewTime") != (lease.get("spec") or {}).get("renewTime"):
            self._alive(name(lease))

    # -- NoSchedule

    async def reconcile(self, key: Key) -> None:
        node = self.nodes.objects.get(key)
        if node is not None:
            await self._set_taints(node, tainted(node, no_schedule(node), _MANAGED, "NoSchedule"))

    async def _set_taints(self, node: Obj, wanted: list[Obj]) -> None:
        if wanted == taints(node):
            return
        version = node["metadata"]["resourceVersion"]
        patch = {"metadata": {"resourceVersion": version}, "spec": {"taints": wanted or None}}
        await self.shared.patch(NODES, node, patch)

    # -- the watch over all nodes

    async def background(self, group: asyncio.TaskGroup) -> None:
        group.create_task(self._monitor(), name="node monitor")

    async def _monitor(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            states: dict[str, str] = {}
            for node in list(self.nodes.objects.values()):
                try:
                    states[name(node)] = await self._look_at(node, loop.time())
                except (ApiError, *TRANSPORT) as error:  # looked at again in a moment
                    log.info("node %s: %s", name(node), error)
                    states[name(node)] = readiness(node)
                except MALFORMED:
                    log.exception("cannot judge node %s", name(node))
            self._judge_zones(states, loop.time())
            wait = await self._taint_pending(loop.time())
            await asyncio.sleep(min(self._clocks.node_monitor_period, max(wait, 0.01)))

    async def _look_at(self, node: Obj, at: float) -> str:
        """Mark a silent node; returns its readiness now."""
        before = readiness(node)
        grace = self._clocks.node_monitor_grace
        if not before:
            grace = max(grace, _STARTUP_GRACE * self._scale)
        current = before or "Unknown"
        if at - self._seen.setdefault(name(node), at) > grace:
            current = "Unknown"
            fresh = unknown_conditions(node)
            if fresh != conditions(node):
                node = await self.shared.status(NODES, node, {**(node.get("status") or {}), "conditions": fresh})
        if before or current == "True":
            await self._follow(node, current)
        if current != "True" and before == "True":
            self.record(node, NODES, "Normal", "NodeNotReady", f"Node {name(node)} status is now: NodeNotReady")
            self._unmarked.add(name(node))
        if name(node) in self._unmarked and current != "True":
            await self._mark_pods(node)
        self._unmarked.discard(name(node))
        return current

    async def _follow(self, node: Obj, current: str) -> None:
        """Have the NoExecute taint follow readiness: away at once, swapped at once, added in turn."""
        have = {t["key"] for t in taints(node) if t["effect"] == "NoExecute"} & {NOT_READY, UNREACHABLE}
        pending = self._zones[zone_of(node)].pending
        if current == "True":
            pending.pop(name(node), None)
            await self._no_execute(node, set())
            return
        wanted = NOT_READY if current == "False" else UNREACHABLE
        if wanted in have:
            return
        if have:
            await self._no_execute(node, {wanted})
        else:
            pending[name(node)] = None

    async def _no_execute(self, node: Obj, wanted: set[str]) -> None:
        await self._set_taints(node, tainted(node, wanted, {NOT_READY, UNREACHABLE}, "NoExecute"))

    async def _mark_pods(self, node: Obj) -> None:
        for pod in self.pods.by("node", name(node)):
            found = condition(pod, "Ready")
            if found is None or found.get("status") != "True":
                continue
            fresh = {"type": "Ready", "status": "False", "lastTransitionTime": stamp()}
            with contextlib.suppress(ApiError):  # gone, or written by its kubelet this moment
                await self.shared.patch(PODS, pod, {"status": {"conditions": [fresh]}}, sub="status", type="strategic")
                self.shared.recorder.record(
                    pod, PODS, "Warning", "NodeNotReady", "Node is not ready", source="node-controller"
                )

    # -- zones

    def _judge_zones(self, states: Mapping[str, str], at: float) -> None:
        """Set each zone's eviction rate; when everything is lost, the fault is more likely ours: evict nothing."""
        flags: defaultdict[str, list[bool]] = defaultdict(list)
        for node in self.nodes.objects.values():
            flags[zone_of(node)].append(states.get(name(node), readiness(node)) == "True")
        found = {zone: zone_state(ready) for zone, ready in flags.items()}
        all_lost = bool(found) and all(state == "Full" for state in found.values())
        if self._all_lost and not all_lost:
            for silent in self._seen:
                self._seen[silent] = at  # what was silent with all others gets a fresh chance
        self._all_lost = all_lost
        for zone, state in found.items():
            rate = eviction_rate(state, len(flags[zone]), self._clocks.eviction_per_second)
            self._zones[zone].bucket.rate = 0.0 if all_lost else rate

    async def _taint_pending(self, at: float) -> float:
        """Taint as many lost nodes as the rates allow; returns seconds until the next may be."""
        if self._all_lost:
            await self._spare_all()
            return float("inf")
        wait = float("inf")
        for zone in list(self._zones.values()):
            while zone.pending:
                if not zone.bucket.take(at):
                    wait = min(wait, zone.bucket.wait())
                    break
                title, _ = zone.pending.popitem(last=False)
                await self._taint(title, zone)
        return wait

    async def _taint(self, title: str, zone: _Zone) -> None:
        node = self.nodes.get(title)
        if node is None or readiness(node) not in ("False", "Unknown"):
            return
        try:
            await self._no_execute(node, {NOT_READY if readiness(node) == "False" else UNREACHABLE})
        except (ApiError, *TRANSPORT) as error:
            log.debug("taint of %s: %s", title, error)
            zone.bucket.tokens += 1.0  # unused
            zone.pending[title] = None

    async def _spare_all(self) -> None:
        for node in list(self.nodes.objects.values()):
            with contextlib.suppress(ApiError, *TRANSPORT):  # tried again at the next look
                await self._no_execute(node, set())


# -- eviction


def patience(node: Obj, pod: Obj) -> float | None:
    """Seconds a pod may stay on a node with its NoExecute taints; None: for ever."""
    evicting = [t for t in taints(node) if t["effect"] == "NoExecute"]
    held = pod["spec"].get("tolerations") or ()
    limits: list[float] = []
    for taint in evicting:
        matching = [t for t in held if tolerates(t, taint)]
        if not matching:
            return 0.0
        limits += [max(0.0, float(t["tolerationSeconds"])) for t in matching if t.get("tolerationSeconds") is not None]
    return min(limits) if limits else None


class TaintEviction(Controller):
    """Deletes pods that no longer tolerate their node."""

    name = "taint-eviction"
    workers = 4

    def setup(self) -> None:
        self._since: dict[str, float] = {}  # uid of a pod to be evicted → since when
        self._evicted: set[str] = set()
        self.nodes, self.pods = self.shared.caches.of(NODES), self.shared.caches.of(PODS)
        self.pods.subscribe(self._pod_changed)
        self.nodes.subscribe(self._node_changed)

    def _pod_changed(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        if type == "DELETED":
            self._since.pop(uid(pod), None)
            self._evicted.discard(uid(pod))
        elif node_of(pod) and (old is None or old["spec"] != pod["spec"]):
            self.queue.add(key(pod))

    def _node_changed(self, type: EventType, node: Obj, old: Obj | None) -> None:
        if old is None or type == "DELETED" or self._evicting(old) != self._evicting(node):
            for pod in self.pods.by("node", name(node)):
                self.queue.add(key(pod))

    @staticmethod
    def _evicting(node: Obj) -> list[str]:
        return sorted(t["key"] for t in taints(node) if t["effect"] == "NoExecute")

    async def reconcile(self, key: Key) -> None:
        pod = self.pods.objects.get(key)
        node = self.nodes.get(node_of(pod)) if pod is not None else None
        if pod is None or uid(pod) in self._evicted:
            return
        wait = patience(node, pod) if node is not None else None
        if wait is None:
            if self._since.pop(uid(pod), None) is not None:
                self._say(pod, f"Cancelling deletion of Pod {key[0]}/{key[1]}")
            return
        at = asyncio.get_running_loop().time()
        due = self._since.setdefault(uid(pod), at) + wait
        if due > at:
            self.queue.add_after(key, due - at)
            return
        await self._evict(pod)

    async def _evict(self, pod: Obj) -> None:
        self._say(pod, f"Marking for deletion Pod {namespace(pod)}/{name(pod)}")
        await disrupt(self.shared, pod, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
        await self.shared.delete(PODS, pod)
        self._evicted.add(uid(pod))
        self._since.pop(uid(pod), None)

    def _say(self, pod: Obj, message: str) -> None:
        self.shared.recorder.record(
            pod, PODS, "Normal", "TaintManagerEviction", message, source="taint-eviction-controller"
        )


async def disrupt(shared: Shared, pod: Obj, reason: str, message: str, **status: object) -> None:
    """Say on a pod why it is about to be deleted."""
    mark = {
        "type": "DisruptionTarget",
        "status": "True",
        "observedGeneration": generation(pod),
        "lastTransitionTime": stamp(),
        "reason": reason,
        "message": message,
    }
    try:
        patch = {"status": {**status, "conditions": [mark]}}
        await shared.patch(PODS, pod, patch, sub="status", type="strategic")
    except ApiError as error:
        if not error.not_found:
            raise


# -- pods of nodes that are no more


class PodCollector(Controller):
    """Deletes, without grace, the pods of nodes that have been gone for the quarantine."""

    name = "pod-garbage-collector"
    _QUARANTINE = 40.0  # seconds at real clocks

    def __init__(self, shared: Shared, clocks: Clocks) -> None:
        self._wait = self._QUARANTINE * clocks.lease_renew / REAL.lease_renew
        super().__init__(shared)

    def setup(self) -> None:
        self.nodes, self.pods = self.shared.caches.of(NODES), self.shared.caches.of(PODS)
        self.pods.subscribe(self._pod_changed)
        self.nodes.subscribe(
            lambda type, obj, old: self.queue.add_after(key(obj), self._wait) if type == "DELETED" else None
        )

    def _pod_changed(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        arrived = old is None or node_of(old) != node_of(pod)
        if type != "DELETED" and node_of(pod) and arrived and self.nodes.get(node_of(pod)) is None:
            self.queue.add_after(("", node_of(pod)), self._wait)

    async def reconcile(self, key: Key) -> None:
        if self.nodes.objects.get(key) is not None or not self.pods.by("node", key[1]):
            return
        try:
            await self.shared.api.get(NODES, key[1])
        except ApiError as error:
            if not error.not_found:
                raise
        else:
            return
        for pod in self.pods.by("node", key[1]):
            if not finished(pod):
                await disrupt(self.shared, pod, "DeletionByPodGC", "PodGC: node no longer exists", phase="Failed")
            await self.shared.delete(PODS, pod, grace=0)
