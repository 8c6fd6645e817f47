"""HorizontalPodAutoscalers, as far as a cluster without a metrics API lets them go.

Bounds are enforced. The sandbox serves no metrics.k8s.io, so that every metric is missing: the conditions say so in
kube-controller-manager's words (pkg/controller/podautoscaler), and nothing is scaled on a guess.
"""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.client import DEPLOYMENTS, HPAS, REPLICASETS, STATEFULSETS, EventType, Key, Kind, Obj
from sandbox.controllers.objects import conditions, deleting, generation, key, name, namespace, stamp
from sandbox.controllers.work import Controller, Shared
from sandbox.options import REAL, Clocks

_SYNC = 15.0  # seconds at real clocks
_TARGETS = {"Deployment": DEPLOYMENTS, "ReplicaSet": REPLICASETS, "StatefulSet": STATEFULSETS}
_FAILED = {
    "Resource": "FailedGetResourceMetric",
    "ContainerResource": "FailedGetContainerResourceMetric",
    "Pods": "FailedGetPodsMetric",
    "Object": "FailedGetObjectMetric",
    "External": "FailedGetExternalMetric",
}


def bounded(current: int, least: int, most: int) -> tuple[int, str]:
    """(wanted replicas, why they differ or ""); zero means that autoscaling is off."""
    if current == 0:
        return 0, ""
    if current > most:
        return most, "Current number of replicas above Spec.MaxReplicas"
    if current < least:
        return least, "Current number of replicas below Spec.MinReplicas"
    return current, ""


def missing(metrics: Sequence[Obj]) -> tuple[str, str]:
    """(reason, message) of a condition on the first of these metrics."""
    first: Obj = metrics[0] if metrics else {"type": "Resource", "resource": {"name": "cpu"}}
    kind = first["type"]
    reason = _FAILED.get(kind, "InvalidMetricSourceType")
    if kind in ("Resource", "ContainerResource"):
        source = first["resource" if kind == "Resource" else "containerResource"]
        what = source["name"]
        use = "utilization" if (source.get("target") or {}).get("type", "Utilization") == "Utilization" else "usage"
        cause = (
            f"failed to get {what} {use}: unable to get metrics for resource {what}: unable to fetch metrics from "
            "resource metrics API: the server could not find the requested resource (get pods.metrics.k8s.io)"
        )
    else:
        cause = f"unable to get metric of type {kind}: no metrics API is served"
    return reason, f"the HPA was unable to compute the replica count: {cause}"


class Autoscalers(Controller):
    name = "horizontal-pod-autoscaler"
    source = "horizontal-pod-autoscaler"

    def __init__(self, shared: Shared, clocks: Clocks) -> None:
        self._period = _SYNC * clocks.lease_renew / REAL.lease_renew
        super().__init__(shared)

    def setup(self) -> None:
        self.autoscalers = self.watch_own(HPAS)
        for kind in _TARGETS.values():
            self.shared.caches.of(kind).subscribe(self._target_changed)

    def _target_changed(self, type: EventType, target: Obj, old: Obj | None) -> None:
        if old is not None and old["spec"].get("replicas") == target["spec"].get("replicas"):
            return
        for hpa in self.autoscalers.by("namespace", namespace(target)):
            if hpa["spec"]["scaleTargetRef"]["name"] == name(target):
                self.queue.add(key(hpa))

    async def reconcile(self, key: Key) -> None:
        hpa = self.autoscalers.objects.get(key)
        if hpa is None or deleting(hpa):
            return
        self.queue.add_after(key, self._period)
        ref = hpa["spec"]["scaleTargetRef"]
        kind = _TARGETS.get(ref["kind"])
        target = self.shared.caches.of(kind).get(ref["name"], key[0]) if kind is not None else None
        if kind is None or target is None:
            why = f'{ref["kind"].lower()}s "{ref["name"]}" not found'
            text = f"the HPA controller was unable to get the target's current scale: {why}"
            await self._report(hpa, {"AbleToScale": ("False", "FailedGetScale", text)}, 0, 0)
            self.record(hpa, HPAS, "Warning", "FailedGetScale", text)
            return
        await self._follow(hpa, kind, target)

    async def _follow(self, hpa: Obj, kind: Kind, target: Obj) -> None:
        current = int(target["spec"].get("replicas", 1))
        wanted, why = bounded(current, int(hpa["spec"].get("minReplicas") or 1), int(hpa["spec"]["maxReplicas"]))
        got = "the HPA controller was able to get the target's current scale"
        found = {"AbleToScale": ("True", "SucceededGetScale", got)}
        if current == 0:
            text = "scaling is disabled since the replica count of the target is zero"
            found["ScalingActive"] = ("False", "ScalingDisabled", text)
        elif why:
            await self.shared.patch(kind, target, {"spec": {"replicas": wanted}})
            text = f"the HPA controller was able to update the target scale to {wanted}"
            found["AbleToScale"] = ("True", "SucceededRescale", text)
            self.record(hpa, HPAS, "Normal", "SuccessfulRescale", f"New size: {wanted}; reason: {why}")
        else:
            reason, message = missing(hpa["spec"].get("metrics") or ())
            found["ScalingActive"] = ("False", reason, message)
            self.record(hpa, HPAS, "Warning", reason, message)
        await self._report(hpa, found, current, wanted)

    async def _report(self, hpa: Obj, found: dict[str, tuple[str, str, str]], current: int, wanted: int) -> None:
        held = {c["type"]: c for c in conditions(hpa)}
        for type, (status, reason, message) in found.items():
            old = held.get(type) or {}
            since = old["lastTransitionTime"] if old.get("status") == status else stamp()
            held[type] = {"type": type, "status": status, "reason": reason, "message": message,
                          "lastTransitionTime": since}  # fmt: skip
        fresh = {
            **(hpa.get("status") or {}),
            "observedGeneration": generation(hpa),
            "currentReplicas": current,
            "desiredReplicas": wanted,
            "conditions": list(held.values()),
        }
        if fresh != hpa.get("status"):
            await self.shared.status(HPAS, hpa, fresh)
