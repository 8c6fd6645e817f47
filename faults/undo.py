"""Taking back: each undo does, then looks whether it is done. Safe to repeat, by anyone, from the ledger alone."""

from __future__ import annotations

from faults.base import CORDONED, Undo
from gameday import clock
from gameday.cluster import Cluster, Obj
from gameday.errors import ClusterError, HealError
from gameday.kinds import BY_KIND, NODES

PAUSE = "/pause"  # Chaos Mesh's pod-failure image is `…/pause`


def undo(cluster: Cluster, entry: Undo, *, within: float) -> str:
    """Do one undo and verify it; returns what was found, in words.

    An API server that does not answer is tried again until `within` seconds are over.
    Raises `HealError` with what is left and the command that undoes it by hand.
    """
    found = ""
    last: ClusterError | None = None

    def done() -> bool:
        nonlocal found, last
        try:
            result = _step(cluster, entry)
        except ClusterError as wrong:
            last = wrong
            return False
        found = result or found
        return result is not None

    try:
        clock.wait_until(done, within=within, every=0.1, what=f"undoing {entry.what} {entry.name}")
    except clock.Waited as late:
        raise HealError(f"{late}{_why(cluster, entry, last)}; by hand: {entry.command()}") from late
    return found


def _step(cluster: Cluster, entry: Undo) -> str | None:
    """One try: words when it is undone, None when not yet."""
    if entry.verb == "delete":
        return _delete(cluster, entry)
    node = cluster.find(NODES, entry.name)
    if node is None or node["metadata"]["uid"] != entry.uid:
        return f"node {entry.name} was replaced, nothing to undo"
    if entry.verb == "uncordon":
        mark = (node["metadata"].get("annotations") or {}).get(CORDONED)
        if mark != entry.value:
            return f"node {entry.name} is not cordoned by us"
        cluster.patch(
            NODES, entry.name, {"metadata": {"annotations": {CORDONED: None}}, "spec": {"unschedulable": None}}
        )
        return None
    if node.get("status", {}).get("allocatable", {}).get(entry.resource) == entry.value:
        return f"node {entry.name} offers {entry.value} {entry.resource}"
    cluster.patch(NODES, entry.name, {"status": {"allocatable": {entry.resource: entry.value}}}, sub="status")
    return None


def _delete(cluster: Cluster, entry: Undo) -> str | None:
    kind = BY_KIND[entry.kind]
    obj = cluster.find(kind, entry.name, entry.namespace)
    if obj is None:
        return f"{entry.kind} {entry.name} is gone"
    if "deletionTimestamp" not in obj["metadata"]:
        cluster.delete(kind, entry.name, entry.namespace, grace=1 if entry.kind == "Pod" else None)
    return None


def _why(cluster: Cluster, entry: Undo, last: ClusterError | None) -> str:
    if last is not None:
        return f" ({last})"
    if entry.verb != "delete":
        return ""
    try:
        obj = cluster.find(BY_KIND[entry.kind], entry.name, entry.namespace)
    except ClusterError:
        return ""
    held = (obj or {}).get("metadata", {}).get("finalizers")
    return f" (held by finalizer {', '.join(held)})" if held else ""


def still_paused(cluster: Cluster, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` ("ns/pod") that exist and still carry the pause image: the failure is in force."""
    found = []
    for name in names:
        namespace, pod = name.split("/")
        obj = cluster.find(BY_KIND["Pod"], pod, namespace)
        if obj and any(PAUSE in container.get("image", "") for container in obj["spec"].get("containers", [])):
            found.append(name)
    return tuple(found)


def containers_run(cluster: Cluster, names: tuple[str, ...]) -> bool:
    """Whether every pod of `names` ("ns/pod") that still exists runs its own image again, and is Ready."""
    for name in names:
        namespace, pod = name.split("/")
        obj = cluster.find(BY_KIND["Pod"], pod, namespace)
        if obj is not None and "deletionTimestamp" not in obj["metadata"] and not _runs(obj):
            return False
    return True


def _runs(obj: Obj) -> bool:
    images = [container.get("image", "") for container in obj["spec"].get("containers", [])]
    conditions = {c["type"]: c.get("status") for c in obj.get("status", {}).get("conditions") or []}
    return not any(PAUSE in image for image in images) and conditions.get("Ready") == "True"
