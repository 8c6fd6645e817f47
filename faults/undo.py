"""Taking back: each undo does, then looks whether it is done. Safe to repeat, by anyone, from the ledger alone."""

from __future__ import annotations

import json

from faults import stuck
from faults.base import CORDONED, ROLLED, Undo
from gameday import activities, clock
from gameday.clock import Instant
from gameday.cluster import Cluster, Obj, Refused, Unreachable
from gameday.errors import ClusterError, HealError
from gameday.kinds import BY_KIND, DEPLOYMENTS, NODES

PAUSE = "/pause"  # Chaos Mesh's pod-failure image is `…/pause`
NOT_BEGUN = "the method never began, so there is nothing to roll back"
EVERY = 0.1  # seconds between looks
SLOW = 1.0  # seconds; an answer that took longer was waited for by the client, which rides out lost connections
RETRY_MAX = 2.0  # seconds; after an error looks are spaced out, doubling, up to so much


class Work:
    """One undo under way, looked at as often as you like.

    It may take `within` seconds of an API server that answers. While none answers it is tried until `until`, the
    instant at which the fault ends by itself (where it does).
    """

    def __init__(self, cluster: Cluster, entry: Undo, within: float, until: Instant = 0.0) -> None:
        self.entry = entry
        self.begun = clock.now()
        self._cluster, self._within, self._until = cluster, within, until
        self._counted = self.begun  # from when on `within` counts
        self._pause, self._next = EVERY, self.begun
        self._error: ClusterError | None = None
        self._away = False
        self._stuck = stuck.Watch(within)
        self._rollbacks: activities.Rollbacks | None = None

    def look(self) -> str | None:
        """Do what is to be done now; words when it is undone, None when not yet.

        Raises `HealError` with what is left, and the command that undoes it by hand, when the time is over.
        """
        asked = clock.now()
        if asked < self._next:
            return None
        try:
            found = self._step()
        except ClusterError as wrong:
            self._error = wrong
            self._pause = min(RETRY_MAX, self._pause * 2)
        else:
            self._error, self._pause = None, EVERY
            if found is not None:
                return f"{found}{self._stuck.told}"
        now = clock.now()
        self._next = now + self._pause
        away, was_away, self._away = isinstance(self._error, Unreachable), self._away, False
        if away and now < self._until:
            self._away = True
        elif (was_away or now - asked > SLOW) and now < max(self._until, self.begun + 2 * self._within):
            self._counted = now  # an API server that was away took nothing off the time for the undo itself
        if now >= (max(self._counted + self._within, self._until) if away else self._counted + self._within):
            raise HealError(self._late())
        return None

    def _late(self) -> str:
        spent = clock.now() - self.begun
        late = f"undoing {self.entry.what} {self.entry.name} did not happen within {spent:.0f} s"
        return f"{late}{self._why()}; by hand: {self.entry.command()}"

    def _step(self) -> str | None:
        entry = self.entry
        if entry.verb == "delete":
            return self._delete()
        if entry.verb == "template":
            return _template(self._cluster, entry)
        if entry.verb == "rollback":
            return self._roll_back()
        node = self._cluster.find(NODES, entry.name)
        if node is None or node["metadata"]["uid"] != entry.uid:
            return f"node {entry.name} was replaced, nothing to undo"
        if entry.verb == "uncordon":
            return _uncordon(self._cluster, entry, node)
        return _offer(self._cluster, entry, node)

    def _roll_back(self) -> str | None:
        """All of them, even when one raises; what raised is not undone."""
        if self._rollbacks is None:
            self._rollbacks = activities.Rollbacks(self.entry.value, self._cluster.environment())
        told, failed = self._rollbacks.look()
        if failed:
            raise HealError(f"{failed}; by hand: {self.entry.command()}")
        return told

    def _delete(self) -> str | None:
        entry, kind = self.entry, BY_KIND[self.entry.kind]
        obj = self._cluster.find(kind, entry.name, entry.namespace)
        if obj is None:
            return f"{entry.kind} {entry.name} is gone"
        if "deletionTimestamp" not in obj["metadata"]:
            self._cluster.delete(kind, entry.name, entry.namespace, grace=1 if entry.kind == "Pod" else None)
        else:
            self._stuck.look(self._cluster, kind, obj)
        return None

    def _why(self) -> str:
        """What keeps it, in brackets; "" when nothing is known."""
        if self._error is not None:
            return f" ({self._error})"
        if self._stuck.why:
            return f" ({self._stuck.why})"
        if self.entry.verb != "delete":
            return ""
        try:
            obj = self._cluster.find(BY_KIND[self.entry.kind], self.entry.name, self.entry.namespace)
        except ClusterError:
            return ""
        held = (obj or {}).get("metadata", {}).get("finalizers")
        return f" (held by finalizer {', '.join(held)})" if held else ""


def _template(cluster: Cluster, entry: Undo) -> str | None:
    """Take our annotation, and our image where it is still ours, out of the pod template again."""
    found = cluster.find(DEPLOYMENTS, entry.name, entry.namespace)
    if found is None or found["metadata"]["uid"] != entry.uid:
        return f"Deployment {entry.name} was replaced, nothing to undo"
    ours, template = json.loads(entry.value), found["spec"]["template"]
    if (template["metadata"].get("annotations") or {}).get(ROLLED) != ours["token"]:
        return f"Deployment {entry.name} has its former pod template"
    images = {one["name"]: one.get("image") for one in template["spec"].get("containers") or []}
    change: Obj = {"metadata": {"annotations": {ROLLED: None}}}
    if "image" in ours and images.get(ours["container"]) == ours["image"]:
        change["spec"] = {"containers": [{"name": ours["container"], "image": ours["was"]}]}
    cluster.patch(DEPLOYMENTS, entry.name, {"spec": {"template": change}}, entry.namespace, type="strategic")
    return None


def _offer(cluster: Cluster, entry: Undo, node: Obj) -> str | None:
    offers = node.get("status", {}).get("allocatable", {}).get(entry.resource)
    if offers == entry.value:
        return f"node {entry.name} offers {entry.value} {entry.resource}"
    if entry.ours and offers != entry.ours:
        return f"node {entry.name} offers {offers} {entry.resource}, which is not our doing"
    change = {"status": {"allocatable": {entry.resource: entry.value}}}
    cluster.patch(NODES, entry.name, change, sub="status")
    return None


def _uncordon(cluster: Cluster, entry: Undo, node: Obj) -> str | None:
    mark = (node["metadata"].get("annotations") or {}).get(CORDONED)
    if mark != entry.value:
        return f"node {entry.name} is not cordoned by us"
    # The version makes it ours alone: whoever cordons the node at this instant is not overruled.
    version = node["metadata"].get("resourceVersion")
    change = {"annotations": {CORDONED: None}, "resourceVersion": version}
    try:
        cluster.patch(NODES, entry.name, {"metadata": change, "spec": {"unschedulable": None}})
    except Refused as refused:
        if refused.code != 409:
            raise
    return None


def undo(cluster: Cluster, entry: Undo, *, within: float) -> str:
    """Do one undo and verify it; returns what was found, in words. Raises `HealError` as `Work.look` does."""
    work = Work(cluster, entry, within)
    while (found := work.look()) is None:
        clock.pause(EVERY / 2)
    return found


def pods_of(cluster: Cluster, names: tuple[str, ...]) -> tuple[Obj, ...]:
    """Those of `names` ("ns/pod") that exist."""
    found = (cluster.find(BY_KIND["Pod"], *reversed(name.split("/"))) for name in names)
    return tuple(obj for obj in found if obj)


def still_paused(pods: tuple[Obj, ...]) -> tuple[str, ...]:
    """Those ("ns/pod") that carry the pause image: the failure is in force."""
    return tuple(f"{pod['metadata']['namespace']}/{pod['metadata']['name']}" for pod in pods if _paused(pod))


def containers_run(pods: tuple[Obj, ...]) -> bool:
    """Whether every one that is to stay runs its own image again, and is Ready."""
    return all(_runs(pod) for pod in pods if "deletionTimestamp" not in pod["metadata"])


def _paused(pod: Obj) -> bool:
    return any(PAUSE in container.get("image", "") for container in pod["spec"].get("containers", []))


def _runs(obj: Obj) -> bool:
    conditions = {c["type"]: c.get("status") for c in obj.get("status", {}).get("conditions") or []}
    return not _paused(obj) and conditions.get("Ready") == "True"
