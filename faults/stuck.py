"""A chaos resource that its finalizer keeps: detected, explained, and released in the way that works.

Chaos Mesh takes its finalizer away only when every record is recovered. Where a node's daemon is unreachable that
never comes, and its annotation `cleanFinalizer=forced` does nothing exactly then (facts: #3929, #3913). What works:
the pods whose own recovery failed are replaced, one at a time, so that no residue lives on, and its finalizer is taken
away. Pods are evicted, not deleted, while they are Ready, so that a PodDisruptionBudget is still heeded.

Where no record tells of a failure, nobody recovers anything: the controller is down, and every pod of the fault (of a
partition: both sides) would have to go. That is for people to decide, who can start the controller instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from faults.act import Record, records
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
        self._silent = 2 * within / 3  # no controller answers at all
        self._since: Instant | None = None
        self._replaced: set[str] = set()
        self.why = ""
        self.told = ""

    def look(self, cluster: Cluster, kind: Kind, obj: Obj) -> None:
        """Release `obj` once it is stuck.

        Raises `HealError`, with the commands, where a pod would not come back by itself or no controller is at work.
        """
        if kind.group != GROUP or FINALIZER not in (obj["metadata"].get("finalizers") or []):
            return
        now = clock.now()
        self._since = self._since or now
        failing = _failures(obj)
        told = "; ".join(f"{id}: {why}" for id, why in sorted(failing.items())[:1])
        self.why = f"Chaos Mesh does not recover it: {told or 'no word from its controller'}"
        if now - self._since < (self._patience if failing else self._silent):
            return
        carriers = _carriers(cluster, obj)
        if not failing:
            raise HealError(_without_controller(obj, carriers, now - self._since))
        if carriers:
            self._replace_one(cluster, obj, carriers, {_pod_of(id) for id in failing})
            return
        cluster.patch(kind, obj["metadata"]["name"], _released(obj), obj["metadata"]["namespace"])
        pods = ", ".join(sorted(self._replaced)) or "none was left"
        self.told = f" (its finalizer was stuck: {told}; released, pods replaced: {pods})"

    def _replace_one(self, cluster: Cluster, obj: Obj, carriers: Mapping[str, Obj], failing: set[str]) -> None:
        """The next of the pods that cannot be recovered; the others are Chaos Mesh's, which still works on them."""
        self.why += f"; {', '.join(carriers)} still {'carry' if len(carriers) > 1 else 'carries'} it"
        doomed = {name: pod for name, pod in carriers.items() if name in failing}
        for name, found in doomed.items():
            namespace, pod = name.split("/")
            if not any(one.get("controller") for one in found["metadata"].get("ownerReferences") or []):
                raise HealError(
                    f"{name} may still carry the fault of {obj['kind']} {obj['metadata']['name']}, which Chaos Mesh "
                    f"cannot recover, and no controller would replace it: kubectl -n {namespace} delete pod {pod}"
                )
        if doomed and not any("deletionTimestamp" in found["metadata"] for found in doomed.values()):
            name = next(iter(doomed))
            _replace(cluster, doomed[name])
            self._replaced.add(name)


def _unrecovered(obj: Obj) -> list[Record]:
    return [one for one in records(obj) if one.phase != RECOVERED]


def _pod_of(id: str) -> str:
    return "/".join(id.split("/")[:2])


def _failures(obj: Obj) -> dict[str, str]:
    """Record → its last word, for those whose last word is a failure."""
    return {one.id: one.message or "no reason given" for one in _unrecovered(obj) if one.failed}


def _carriers(cluster: Cluster, obj: Obj) -> dict[str, Obj]:
    """Pods that may still carry the fault, by "ns/pod"."""
    names = sorted({_pod_of(one.id) for one in _unrecovered(obj)})
    found = {name: cluster.find(PODS, *reversed(name.split("/"))) for name in names}
    return {name: pod for name, pod in found.items() if pod and not _younger(pod, obj) and not _ours(pod)}


def _released(obj: Obj) -> Obj:
    """The patch that takes away Chaos Mesh's finalizer, and nobody else's."""
    meta = obj["metadata"]
    others = [one for one in meta["finalizers"] if one != FINALIZER]
    return {"metadata": {"finalizers": others, "resourceVersion": meta.get("resourceVersion")}}


def _without_controller(obj: Obj, carriers: Mapping[str, Obj], waited: float) -> str:
    what, meta = f"{obj['kind']} {obj['metadata']['name']}", obj["metadata"]
    others = json.dumps({"metadata": {"finalizers": _released(obj)["metadata"]["finalizers"]}})
    pods = "".join(f"kubectl -n {name.split('/')[0]} delete pod {name.split('/')[1]}; " for name in carriers)
    return (
        f"{what} is deleted, but for {waited:.0f} s Chaos Mesh's controller gives no word of its recovery. See that it "
        "runs (kubectl get pods -A | grep chaos-controller-manager), then `gameday heal`. If it cannot run, replace "
        f"what still carries the fault, one at a time: {pods}then "
        f"kubectl -n {meta['namespace']} patch {obj['kind'].lower()} {meta['name']} --type=merge -p '{others}'"
    )


def _younger(pod: Obj, obj: Obj) -> bool:
    """Created after the fault: another pod of the same name."""
    return str(pod["metadata"]["creationTimestamp"]) > str(obj["metadata"]["creationTimestamp"])


def _ours(pod: Obj) -> bool:
    """A prober, which goes anyway."""
    return (pod["metadata"].get("labels") or {}).get(MANAGED) == "gameday"


def _replace(cluster: Cluster, pod: Obj) -> None:
    """Evict it while it serves; what the budget refuses now is asked for again. Never another one of its name."""
    name, namespace, uid = (pod["metadata"][key] for key in ("name", "namespace", "uid"))
    conditions = {one["type"]: one.get("status") for one in pod.get("status", {}).get("conditions") or []}
    try:
        if conditions.get("Ready") == "True":
            cluster.evict(name, namespace, uid=uid)
        else:
            cluster.delete(PODS, name, namespace, uid=uid)
    except Refused as refused:
        if refused.code not in (404, 409, 429):
            raise
