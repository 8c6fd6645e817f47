"""A chaos resource that its finalizer keeps: detected, explained, and released in the way that works.

Chaos Mesh takes its finalizer away only when every record is recovered. Where a node's daemon is unreachable that
never comes, and its annotation `cleanFinalizer=forced` does nothing exactly then (facts: #3929, #3913). What works:
the pods that may still carry the fault are replaced, so that no residue lives on, and the finalizer is taken away.
Pods are evicted, not deleted, while they are Ready, so that a PodDisruptionBudget is still heeded.
"""

from __future__ import annotations

from faults.base import MANAGED
from gameday import clock
from gameday.clock import Instant
from gameday.cluster import Cluster, Obj, Refused
from gameday.errors import HealError
from gameday.kinds import PODS, Kind

GROUP = "chaos-mesh.org"
FINALIZER = "chaos-mesh/records"
RECOVERED = "Not Injected"
PATIENCE = 10.0  # seconds for which a failing recovery is left to Chaos Mesh, which tries again by itself


class Watch:
    """Follows one resource that is being deleted. `why`: what keeps it; `told`: what was done about it."""

    def __init__(self, within: float) -> None:
        self._patience = min(PATIENCE, within / 3)
        self._silent = 2 * within / 3  # no controller answers at all: not much later, so that there is time left
        self._since: Instant | None = None
        self._replaced: set[str] = set()
        self.why = ""
        self.told = ""

    def look(self, cluster: Cluster, kind: Kind, obj: Obj) -> None:
        """Release `obj` once it is stuck. Raises `HealError` where a pod would not come back by itself."""
        if kind.group != GROUP or FINALIZER not in (obj["metadata"].get("finalizers") or []):
            return
        now = clock.now()
        self._since = self._since or now
        failing = _failure(obj)
        self.why = f"Chaos Mesh does not recover it: {failing or 'no word from its controller'}"
        if now - self._since < (self._patience if failing else self._silent):
            return
        if self._pods_left(cluster, obj):
            return
        name, namespace = obj["metadata"]["name"], obj["metadata"]["namespace"]
        cluster.patch(kind, name, {"metadata": {"finalizers": []}}, namespace)
        pods = ", ".join(sorted(self._replaced)) or "none was left"
        self.told = f" (its finalizer was stuck: {failing or 'no controller'}; released, pods replaced: {pods})"

    def _pods_left(self, cluster: Cluster, obj: Obj) -> bool:
        """Replace the pods that may still carry the fault; whether any of them is there still."""
        left = False
        for name in _unrecovered(obj):
            namespace, pod = name.split("/")[:2]
            found = cluster.find(PODS, pod, namespace)
            if found is None or _younger(found, obj) or _ours(found):
                continue
            left = True
            self.why += f"; {name} still carries it"
            if "deletionTimestamp" in found["metadata"]:
                continue
            if not any(one.get("controller") for one in found["metadata"].get("ownerReferences") or []):
                raise HealError(
                    f"{name} may still carry the fault of {obj['kind']} {obj['metadata']['name']}, which Chaos Mesh "
                    f"cannot recover, and no controller would replace it: kubectl -n {namespace} delete pod {pod}"
                )
            _replace(cluster, found)
            self._replaced.add(name)
        return left


def _failure(obj: Obj) -> str:
    """The last word of a record that cannot be recovered, "" where none failed."""
    for record in obj.get("status", {}).get("experiment", {}).get("containerRecords") or []:
        events = record.get("events") or []
        if record.get("phase") != RECOVERED and events and events[-1].get("type") == "Failed":
            return f"{record.get('id')}: {events[-1].get('message') or 'no reason given'}"
    return ""


def _unrecovered(obj: Obj) -> list[str]:
    found = obj.get("status", {}).get("experiment", {}).get("containerRecords") or []
    return sorted({"/".join(one["id"].split("/")[:2]) for one in found if one.get("phase") != RECOVERED})


def _younger(pod: Obj, obj: Obj) -> bool:
    """Created after the fault: another pod of the same name."""
    return str(pod["metadata"]["creationTimestamp"]) > str(obj["metadata"]["creationTimestamp"])


def _ours(pod: Obj) -> bool:
    """A prober, which goes anyway."""
    return (pod["metadata"].get("labels") or {}).get(MANAGED) == "gameday"


def _replace(cluster: Cluster, pod: Obj) -> None:
    """Evict it while it serves; what the budget refuses now is asked for again."""
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    conditions = {one["type"]: one.get("status") for one in pod.get("status", {}).get("conditions") or []}
    if conditions.get("Ready") != "True":
        cluster.delete(PODS, name, namespace)
        return
    try:
        cluster.evict(name, namespace)
    except Refused as refused:
        if refused.code not in (404, 429):
            raise
