"""ReplicaSets: keep the wanted number of pods, adopt and release, choose whom to let go.

Order of victims and status arithmetic as in kube-controller-manager 1.36 (pkg/controller/controller_utils.go,
pkg/controller/replicaset).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sandbox.client import PODS, REPLICASETS, ApiError, EventType, Key, Kind, Obj
from sandbox.controllers.objects import (
    active,
    available_in,
    condition,
    controller,
    controller_ref,
    created,
    deleting,
    finished,
    generation,
    labels,
    matches,
    moment,
    name,
    namespace,
    node_of,
    notes,
    now,
    owners,
    phase,
    pod_from,
    present,
    ready,
    selects_nothing,
    stamp,
    uid,
)
from sandbox.controllers.work import Controller, Shared, each, namespace_ends, slow_start

_BURST = 500  # pods created or deleted in one go
_PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}
_COST = "controller.kubernetes.io/pod-deletion-cost"


def victims(pods: Sequence[Obj], count: int, crowd: Counter[str], at: datetime) -> list[Obj]:
    """The `count` pods to delete first; `crowd` counts the related active pods on each node."""

    def order(pod: Obj) -> tuple[Any, ...]:
        return (
            bool(node_of(pod)),
            _PHASES.get(phase(pod), 1),
            ready(pod),
            _deletion_cost(pod),
            -crowd[node_of(pod)],
            _log_age(_ready_since(pod), at) if ready(pod) else 0,
            -_restarts(pod),
            _log_age(created(pod), at),
            uid(pod),
        )

    return sorted(pods, key=order)[:count]


def _deletion_cost(pod: Obj) -> int:
    try:
        return int(notes(pod).get(_COST, "0"))
    except ValueError:
        return 0


def _ready_since(pod: Obj) -> str:
    found = condition(pod, "Ready")
    return str((found or {}).get("lastTransitionTime") or "")


def _log_age(since: str, at: datetime) -> int:
    """Ages compare on a logarithmic scale, so that no pod is doomed for being a second younger."""
    if not since:
        return -1
    age = (at - moment(since)).total_seconds()
    return int(math.log2(age)) if age >= 1 else -1


def _restarts(pod: Obj) -> int:
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return max((int(s.get("restartCount") or 0) for s in statuses), default=0)


def status_of(rs: Obj, pods: Sequence[Obj], terminating: int, at: datetime, failure: str = "") -> tuple[Obj, float]:
    """The status for these active pods, and seconds until one of them becomes available (0: none waits)."""
    spec = rs["spec"]
    wanted = (spec.get("template") or {}).get("metadata", {}).get("labels") or {}
    waits = [available_in(pod, spec.get("minReadySeconds") or 0, at) for pod in pods]
    fresh = present({
        "fullyLabeledReplicas": sum(wanted.items() <= labels(pod).items() for pod in pods),
        "readyReplicas": sum(wait is not None for wait in waits),
        "availableReplicas": sum(wait == 0 for wait in waits),
        "conditions": _failure_condition(rs, failure, at),
    })  # fmt: skip
    status = {
        "replicas": len(pods),
        **fresh,
        "terminatingReplicas": terminating,
        "observedGeneration": generation(rs),
    }
    return status, min((wait for wait in waits if wait), default=0.0)


def _failure_condition(rs: Obj, failure: str, at: datetime) -> list[Obj]:
    if not failure:
        return []
    held = condition(rs, "ReplicaFailure")
    if held is not None and held.get("reason") == "FailedCreate":
        return [held]
    return [{
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreate",
        "message": failure,
        "lastTransitionTime": stamp(at),
    }]  # fmt: skip


async def claim(shared: Shared, owner: Obj, kind: Kind, selector: Obj, owned: Kind, found: Sequence[Obj]) -> list[Obj]:
    """The objects of ours that match; adopts matching orphans, releases what no longer matches."""
    mine = []
    for obj in found:
        ref = controller(obj)
        if ref is not None and ref.get("uid") != uid(owner):
            continue
        fits = matches(selector, labels(obj))
        if ref is not None and fits:
            mine.append(obj)
        elif ref is not None and not deleting(owner):
            await _set_owners(shared, owned, obj, [r for r in owners(obj) if r.get("uid") != uid(owner)])
        elif ref is None and fits and not deleting(owner) and not deleting(obj):
            adopted = await _set_owners(shared, owned, obj, [*owners(obj), controller_ref(owner, kind)])
            if adopted is not None:
                mine.append(adopted)
    return mine


async def _set_owners(shared: Shared, kind: Kind, obj: Obj, refs: list[Obj]) -> Obj | None:
    version = obj["metadata"].get("resourceVersion")
    patch = {"metadata": {"ownerReferences": refs or None, "resourceVersion": version}}
    try:
        return await shared.patch(kind, obj, patch)
    except ApiError as error:
        if error.not_found:
            return None
        raise


class ReplicaSets(Controller):
    name = "replicaset"
    workers = 4

    def setup(self) -> None:
        self.sets = self.watch_own(REPLICASETS)
        self.pods = self.watch_owned(PODS, REPLICASETS)
        self.pods.subscribe(self._orphan_seen)

    def _orphan_seen(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        if type == "DELETED" or controller(pod) is not None or deleting(pod):
            return
        for rs in self.sets.by("namespace", namespace(pod)):
            if matches(rs["spec"].get("selector"), labels(pod)):
                self.queue.add((namespace(rs), name(rs)))

    async def reconcile(self, key: Key) -> None:
        rs = self.sets.objects.get(key)
        if rs is None or selects_nothing(rs["spec"].get("selector")):
            return
        selector = rs["spec"]["selector"]
        candidates = [
            pod
            for pod in (*self.pods.by("controller", uid(rs)), *self._orphans(rs))
            if namespace(pod) == namespace(rs) and not finished(pod)
        ]
        mine = await claim(self.shared, rs, REPLICASETS, selector, PODS, candidates)
        failure = ""
        if not deleting(rs):
            try:
                await self._scale(rs, [pod for pod in mine if active(pod)])
            except ApiError as error:
                if not namespace_ends(error):
                    failure = str(error)
                    self.record(rs, REPLICASETS, "Warning", "FailedCreate", f"Error creating: {error}")
                    self.queue.add_after(key, 1.0)
        await self._report(key, failure)

    def _orphans(self, rs: Obj) -> list[Obj]:
        """Pods of the namespace that nobody controls and that match."""
        selector = rs["spec"]["selector"]
        return [
            pod
            for pod in self.pods.by("controller", "")
            if namespace(pod) == namespace(rs) and not deleting(pod) and matches(selector, labels(pod))
        ]

    async def _scale(self, rs: Obj, pods: list[Obj]) -> None:
        missing = int(rs["spec"].get("replicas", 1)) - len(pods)
        if missing > 0:
            await slow_start(min(missing, _BURST), lambda: self._create(rs))
        elif missing < 0:
            chosen = victims(pods, min(-missing, _BURST), self._crowd(rs), now())
            await each([self._delete(rs, pod) for pod in chosen])

    async def _create(self, rs: Obj) -> None:
        pod = await self.shared.create(PODS, pod_from(rs["spec"]["template"], rs, REPLICASETS))
        self.record(rs, REPLICASETS, "Normal", "SuccessfulCreate", f"Created pod: {name(pod)}")

    async def _delete(self, rs: Obj, pod: Obj) -> None:
        await self.shared.delete(PODS, pod)
        self.record(rs, REPLICASETS, "Normal", "SuccessfulDelete", f"Deleted pod: {name(pod)}")

    def _crowd(self, rs: Obj) -> Counter[str]:
        """Active pods per node of all ReplicaSets under the same Deployment."""
        ref = controller(rs)
        family = self.sets.by("controller", ref["uid"]) if ref else [rs]
        return Counter(node_of(pod) for one in family for pod in self.pods.by("controller", uid(one)) if active(pod))

    async def _report(self, key: Key, failure: str) -> None:
        rs = self.sets.objects.get(key)
        if rs is None:
            return
        mine = [pod for pod in self.pods.by("controller", uid(rs)) if not finished(pod)]
        terminating = sum(deleting(pod) for pod in mine)
        status, wait = status_of(rs, [pod for pod in mine if active(pod)], terminating, now(), failure)
        if wait:
            self.queue.add_after(key, wait)
        if status != rs.get("status"):
            await self.shared.status(REPLICASETS, rs, status)
