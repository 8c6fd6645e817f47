"""PodDisruptionBudgets: how many pods may be evicted right now.

Arithmetic of kube-controller-manager 1.36 (pkg/controller/disruption). The eviction API spends the
budget by itself and notes the pod in `status.disruptedPods` until it is seen terminating.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sandbox.client import DEPLOYMENTS, PDBS, PODS, REPLICASETS, STATEFULSETS, EventType, Key, Obj
from sandbox.controllers.objects import (
    condition,
    controller,
    deleting,
    generation,
    labels,
    matches,
    name,
    namespace,
    now,
    ready,
    scaled,
    seconds_since,
    stamp,
    uid,
)
from sandbox.controllers.work import Cache, Controller

_FORGET = 120.0  # seconds the eviction API's note is believed without the pod terminating


class NoScale(ValueError):
    """A pod's controller cannot tell how many pods there should be."""


@dataclass(frozen=True, slots=True)
class Budget:
    allowed: int
    healthy: int
    desired: int
    expected: int


def budget(spec: Obj, pods: Sequence[Obj], disrupted: set[str], scale: Callable[[], int]) -> Budget:
    """The numbers of a budget over `pods`; `scale()` tells how many pods their controllers want.

    Raises NoScale when that is needed and not to be had.
    """
    healthy = sum(ready(pod) and not deleting(pod) and name(pod) not in disrupted for pod in pods)
    most, least = spec.get("maxUnavailable"), spec.get("minAvailable")
    if most is not None:
        expected = scale()
        desired = max(0, expected - scaled(most, expected, up=True))
    elif isinstance(least, str) and least.endswith("%"):
        expected = scale()
        desired = scaled(least, expected, up=True)
    else:
        expected, desired = len(pods), int(least or 0)
    allowed = max(0, healthy - desired) if expected > 0 else 0
    return Budget(allowed, healthy, desired, expected)


class DisruptionBudgets(Controller):
    name = "disruption"
    source = "controllermanager"

    def setup(self) -> None:
        self.budgets = self.watch_own(PDBS)
        caches = self.shared.caches
        self.pods = caches.of(PODS)
        self.sets, self.deployments = caches.of(REPLICASETS), caches.of(DEPLOYMENTS)
        self.statefuls = caches.of(STATEFULSETS)
        self.pods.subscribe(self._pod_changed)
        for cache in (self.sets, self.deployments, self.statefuls):
            cache.subscribe(self._scale_changed)

    def _pod_changed(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        for pdb in self.budgets.by("namespace", namespace(pod)):
            selector = pdb["spec"].get("selector")
            if matches(selector, labels(pod)) or (old is not None and matches(selector, labels(old))):
                self.queue.add((namespace(pdb), name(pdb)))

    def _scale_changed(self, type: EventType, obj: Obj, old: Obj | None) -> None:
        if old is not None and type == "MODIFIED" and old["spec"].get("replicas") == obj["spec"].get("replicas"):
            return
        for pdb in self.budgets.by("namespace", namespace(obj)):
            self.queue.add((namespace(pdb), name(pdb)))

    async def reconcile(self, key: Key) -> None:
        pdb = self.budgets.objects.get(key)
        if pdb is None or deleting(pdb):
            return
        selector = pdb["spec"].get("selector")
        pods = [pod for pod in self.pods.by("namespace", key[0]) if matches(selector, labels(pod))]
        noted = self._still_disrupted(key, pdb, pods)
        try:
            found = budget(pdb["spec"], pods, set(noted), lambda: self._scale(pods))
        except NoScale as error:
            self.record(pdb, PDBS, "Warning", "CalculateExpectedPodCountFailed", str(error))
            await self._fail_safe(pdb, str(error))
            return
        await self._write(pdb, found, noted)

    def _still_disrupted(self, key: Key, pdb: Obj, pods: Sequence[Obj]) -> dict[str, str]:
        """Pods the eviction API let go that are not terminating yet."""
        noted = (pdb.get("status") or {}).get("disruptedPods") or {}
        alive = {name(pod) for pod in pods if not deleting(pod)}
        kept = {}
        for pod, at in noted.items():
            left = _FORGET - seconds_since(at)
            if pod in alive and left > 0:
                kept[pod] = at
                self.queue.add_after(key, left)
        return kept

    def _scale(self, pods: Sequence[Obj]) -> int:
        """The pods wanted by the controllers of these pods; pods without one add nothing."""
        wanted: dict[str, int] = {}
        for pod in pods:
            ref = controller(pod)
            if ref is None or ref["uid"] in wanted:
                continue
            owner, replicas = self._owner_scale(pod, ref)
            wanted[owner] = replicas
        return sum(wanted.values())

    def _owner_scale(self, pod: Obj, ref: Obj) -> tuple[str, int]:
        caches: dict[str, Cache] = {"ReplicaSet": self.sets, "StatefulSet": self.statefuls}
        if ref["kind"] not in caches:
            plural = f"{ref['kind'].lower()}s.{ref['apiVersion'].split('/')[0]}"
            raise NoScale(f"{plural} does not implement the scale subresource")
        owner = caches[ref["kind"]].objects.get((namespace(pod), ref["name"]))
        if owner is None:
            return ref["uid"], 0
        above = controller(owner)
        if above is not None and above["kind"] == "Deployment":
            deployment = self.deployments.objects.get((namespace(pod), above["name"]))
            if deployment is not None and uid(deployment) == above["uid"]:
                owner = deployment
        return uid(owner), int(owner["spec"].get("replicas", 1))

    async def _write(self, pdb: Obj, found: Budget, noted: dict[str, str]) -> None:
        status: Obj = {
            "currentHealthy": found.healthy,
            "desiredHealthy": found.desired,
            "disruptionsAllowed": found.allowed,
            "expectedPods": found.expected,
            "observedGeneration": generation(pdb),
        }
        if noted:
            status["disruptedPods"] = noted
        reason = "SufficientPods" if found.allowed > 0 else "InsufficientPods"
        status["conditions"] = [_condition(pdb, found.allowed > 0, reason, "")]
        if status != (pdb.get("status") or {}):
            await self.shared.status(PDBS, pdb, status)

    async def _fail_safe(self, pdb: Obj, message: str) -> None:
        """No eviction while the numbers are unknown."""
        status = {
            "currentHealthy": 0,
            "desiredHealthy": 0,
            "expectedPods": 0,
            **(pdb.get("status") or {}),
            "disruptionsAllowed": 0,
            "observedGeneration": generation(pdb),
            "conditions": [_condition(pdb, False, "SyncFailed", message)],
        }
        if status != (pdb.get("status") or {}):
            await self.shared.status(PDBS, pdb, status)


def _condition(pdb: Obj, allowed: bool, reason: str, message: str) -> Obj:
    held = condition(pdb, "DisruptionAllowed") or {}
    status = "True" if allowed else "False"
    return {
        "type": "DisruptionAllowed",
        "status": status,
        "observedGeneration": generation(pdb),
        "lastTransitionTime": held["lastTransitionTime"] if held.get("status") == status else stamp(now()),
        "reason": reason,
        "message": message,
    }
