"""The scheduler: takes pending pods by priority and age, finds each a node, binds it, or says why not."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from sandbox.client import (
    NODES,
    PDBS,
    PODS,
    REPLICASETS,
    SERVICES,
    STATEFULSETS,
    ApiError,
    EventType,
    Key,
    Obj,
)
from sandbox.controllers.catalog import CLAIMS
from sandbox.controllers.claims import unbound
from sandbox.controllers.objects import (
    condition,
    controller,
    deleting,
    finished,
    generation,
    key,
    labels,
    matches,
    name,
    namespace,
    node_of,
    stamp,
    uid,
)
from sandbox.controllers.placement import (
    NodeState,
    Refusal,
    best,
    explain,
    explain_all,
    feasible,
    preempt,
    priority,
    state_of,
)
from sandbox.controllers.work import MALFORMED, TRANSPORT, Controller

log = logging.getLogger(__name__)

SCHEDULER = "default-scheduler"
_FLUSH = 300.0  # seconds after which refused pods are tried again without a reason


def wants_node(pod: Obj) -> bool:
    spec = pod["spec"]
    return (
        not node_of(pod)
        and not deleting(pod)
        and not finished(pod)
        and spec.get("schedulerName", SCHEDULER) == SCHEDULER
        and not spec.get("schedulingGates")
    )


def _concerns(node: Obj) -> tuple[object, ...]:
    """What of a node decides about placement; heartbeats are not part of it."""
    spec, status = node.get("spec") or {}, node.get("status") or {}
    return spec.get("taints") or [], spec.get("unschedulable"), labels(node), status.get("allocatable")


def _minds_others(pod: Obj) -> bool:
    spec = pod["spec"]
    affinity = spec.get("affinity") or {}
    return bool(spec.get("topologySpreadConstraints") or affinity.get("podAffinity") or affinity.get("podAntiAffinity"))


class Scheduler(Controller):
    name = "scheduler"
    workers = 0  # pods are taken one after another, in an order of their own

    def setup(self) -> None:
        caches = self.shared.caches
        self.nodes, self.pods = caches.of(NODES), caches.of(PODS)
        self.services, self.sets = caches.of(SERVICES), caches.of(REPLICASETS)
        self.statefuls, self.budgets = caches.of(STATEFULSETS), caches.of(PDBS)
        self._pending: dict[Key, Obj] = {}  # to be tried now, in the order they came
        self._refused: dict[Key, Obj] = {}  # waiting for the cluster to change
        self.claims = caches.of(CLAIMS)
        self._assumed: dict[str, str] = {}  # uid of a pod being bound → its node
        self._failures: dict[str, int] = {}
        self._wake = asyncio.Event()
        self.pods.subscribe(self._pod_changed)
        self.nodes.subscribe(self._node_changed)
        self.claims.subscribe(lambda type, claim, old: self._retry())

    def _pod_changed(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        at = key(pod)
        if type != "DELETED" and wants_node(pod):
            if uid(pod) in self._assumed:
                return
            if at in self._refused and old is not None and old["spec"] == pod["spec"] and labels(old) == labels(pod):
                self._refused[at] = pod
                return
            self._refused.pop(at, None)
            self._pending[at] = pod
            self._wake.set()
            return  # a pod already pending keeps its turn
        self._pending.pop(at, None)
        self._refused.pop(at, None)
        self._assumed.pop(uid(pod), None)
        if type == "DELETED":
            self._failures.pop(uid(pod), None)
        freed = type == "DELETED" or finished(pod)
        moved = old is not None and (not node_of(old) or labels(old) != labels(pod) or deleting(old) != deleting(pod))
        if node_of(pod) and (freed or moved or old is None):
            self._retry(others_only=not freed)

    def _node_changed(self, type: EventType, node: Obj, old: Obj | None) -> None:
        if old is None or type == "DELETED" or _concerns(node) != _concerns(old):
            self._retry()

    def _retry(self, *, others_only: bool = False) -> None:
        """Try refused pods again; `others_only`: those for which it matters where other pods are."""
        for at, pod in list(self._refused.items()):
            if not others_only or _minds_others(pod):
                self._pending[at] = self._refused.pop(at)
                self._wake.set()

    async def background(self, group: asyncio.TaskGroup) -> None:
        group.create_task(self._loop(group), name=self.name)

    async def _loop(self, group: asyncio.TaskGroup) -> None:
        while True:
            if not self._pending:
                self._wake.clear()
                try:
                    await asyncio.wait_for(self._wake.wait(), _FLUSH)
                except TimeoutError:
                    self._retry()
                continue
            at = max(self._pending, key=self._importance)  # of equals the first
            pod = self._pending.pop(at)
            try:
                await self._schedule(pod, group)
            except MALFORMED:
                log.exception("the scheduler cannot handle %s/%s", *at)
            await asyncio.sleep(0)

    def _importance(self, at: Key) -> int:
        return priority(self._pending[at])

    def _states(self) -> list[NodeState]:
        states = {name(node): state_of(node, ()) for node in self.nodes.objects.values() if not deleting(node)}
        for pod in self.pods.objects.values():
            where = node_of(pod) or self._assumed.get(uid(pod), "")
            if where in states and not finished(pod):
                states[where].add(pod)
        return [states[node] for node in sorted(states)]

    async def _schedule(self, pod: Obj, group: asyncio.TaskGroup) -> None:
        states = self._states()
        if states and (why := unbound(pod, self.claims.objects)):
            self._refused[key(pod)] = pod
            await self._refuse(pod, explain_all(len(states), why), "")
            return
        self._reserve_nominated(pod, states)
        good, refused = feasible(pod, states)
        if good:
            chosen = best(pod, good, states, self._workload_selector(pod))
            self._assumed[uid(pod)] = chosen.name
            group.create_task(self._bind(pod, chosen.node), name="bind")
            return
        self._refused[key(pod)] = pod
        message = explain(pod, refused)
        nominated = ""
        if pod["spec"].get("preemptionPolicy") != "Never" and refused:
            nominated = await self._preempt(pod, states, refused)
        await self._refuse(pod, message, nominated)

    def _reserve_nominated(self, pod: Obj, states: list[NodeState]) -> None:
        """Room that was made for a more important pod is not given to a lesser one."""
        by_name = {state.name: state for state in states}
        for other in (*self._pending.values(), *self._refused.values()):
            where = (other.get("status") or {}).get("nominatedNodeName")
            if where in by_name and uid(other) != uid(pod) and priority(other) >= priority(pod):
                by_name[where].add(other)

    def _workload_selector(self, pod: Obj) -> Obj | None:
        """What the default spreading counts: the pod's services, ReplicaSet and StatefulSet, all together."""
        space = namespace(pod)
        together: Obj = {"matchLabels": {}, "matchExpressions": []}
        for service in self.services.by("namespace", space):
            selector = service["spec"].get("selector")
            if selector and matches({"matchLabels": selector}, labels(pod)):
                together["matchLabels"].update(selector)
        ref = controller(pod)
        cache = {"ReplicaSet": self.sets, "StatefulSet": self.statefuls}.get(ref["kind"] if ref else "")
        owner = cache.objects.get((space, ref["name"])) if cache is not None and ref else None
        if owner is not None:
            selector = owner["spec"].get("selector") or {}
            together["matchLabels"].update(selector.get("matchLabels") or {})
            together["matchExpressions"] += selector.get("matchExpressions") or []
        return together if together["matchLabels"] or together["matchExpressions"] else None

    async def _bind(self, pod: Obj, node: Obj) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name(pod), "namespace": namespace(pod), "uid": uid(pod)},
            "target": {"apiVersion": "v1", "kind": "Node", "name": name(node)},
        }
        try:
            await self.shared.api.post(PODS, name(pod), "binding", body, namespace(pod))
        except (ApiError, *TRANSPORT) as error:
            self._assumed.pop(uid(pod), None)
            gone = isinstance(error, ApiError) and error.not_found
            if not gone:
                log.info("binding %s/%s: %s", namespace(pod), name(pod), error)
                await self._later(pod)
            return
        self._failures.pop(uid(pod), None)
        message = f"Successfully assigned {namespace(pod)}/{name(pod)} to {name(node)}"
        self.shared.recorder.note(pod, PODS, "Normal", "Scheduled", message, source=SCHEDULER, action="Binding")

    async def _later(self, pod: Obj) -> None:
        """Try again after a growing pause, with the pod as it is then."""
        count = self._failures[uid(pod)] = self._failures.get(uid(pod), 0) + 1
        await asyncio.sleep(min(0.1 * 2**count, 10.0))
        held = self.pods.objects.get(key(pod))
        if held is not None and uid(held) == uid(pod) and wants_node(held):
            self._pending[key(held)] = held
            self._wake.set()

    # -- refusal

    async def _refuse(self, pod: Obj, message: str, nominated: str) -> None:
        held = condition(pod, "PodScheduled") or {}
        known = (pod.get("status") or {}).get("nominatedNodeName") or ""
        if held.get("status") == "False" and held.get("message") == message and nominated in ("", known):
            return
        fresh = {
            "type": "PodScheduled",
            "status": "False",
            "observedGeneration": generation(pod),
            "reason": "Unschedulable",
            "message": message,
            "lastProbeTime": None,
            "lastTransitionTime": held["lastTransitionTime"] if held.get("status") == "False" else stamp(),
        }
        status: Obj = {"conditions": [fresh]}
        if nominated:
            status["nominatedNodeName"] = nominated
        if held.get("message") != message:
            self.shared.recorder.note(
                pod, PODS, "Warning", "FailedScheduling", message, source=SCHEDULER, action="Scheduling"
            )
        with contextlib.suppress(ApiError, *TRANSPORT):  # told again at the next attempt
            await self.shared.patch(PODS, pod, {"status": status}, sub="status", type="strategic")

    async def _preempt(self, pod: Obj, states: list[NodeState], refused: dict[str, Refusal]) -> str:
        """Make room by evicting lesser pods; returns the node nominated for `pod`, "" when none."""
        known = (pod.get("status") or {}).get("nominatedNodeName") or ""
        if any(state.name == known and _being_freed(pod, state) for state in states):
            return known
        found = preempt(pod, states, refused, self._guarded)
        if found is None:
            return ""
        state, gone = found
        for victim in gone:
            if deleting(victim):
                continue
            self.shared.recorder.note(
                victim, PODS, "Normal", "Preempted", f"Preempted by pod {uid(pod)} on node {state.name}",
                source=SCHEDULER, action="Preempting",
            )  # fmt: skip
            mark = {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "PreemptionByScheduler",
                "message": f"{SCHEDULER}: preempting to accommodate a higher priority pod",
                "lastTransitionTime": stamp(),
            }
            with contextlib.suppress(ApiError, *TRANSPORT):  # a victim that stays is chosen again
                status = {"status": {"conditions": [mark]}}
                await self.shared.patch(PODS, victim, status, sub="status", type="strategic")
                await self.shared.delete(PODS, victim)
        return state.name

    def _guarded(self, pod: Obj) -> bool:
        return any(
            matches(budget["spec"].get("selector"), labels(pod))
            and int((budget.get("status") or {}).get("disruptionsAllowed") or 0) <= 0
            for budget in self.budgets.by("namespace", namespace(pod))
        )


def _being_freed(pod: Obj, state: NodeState) -> bool:
    """Whether lesser pods are already on their way out of the nominated node."""
    return any(deleting(other) and priority(other) < priority(pod) for other in state.pods)
