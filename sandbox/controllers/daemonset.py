"""DaemonSets: one pod on every node that admits it.

Follows kube-controller-manager 1.36 (pkg/controller/daemon): pods are pinned to their node by node affinity and
tolerate what ails nodes; the scheduler binds them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from sandbox.client import DAEMONSETS, NODES, PODS, ApiError, EventType, Key, Obj
from sandbox.controllers import history
from sandbox.controllers.objects import (
    REVISION_HASH,
    available_in,
    created,
    deleting,
    finished,
    generation,
    key,
    labels,
    name,
    namespace,
    node_matches,
    node_of,
    now,
    phase,
    pod_from,
    present,
    ready,
    scaled,
    selects_nothing,
    taints,
    uid,
    untolerated,
)
from sandbox.controllers.work import Controller, each, namespace_ends

_GENERATION = "pod-template-generation"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_NODE = "node.kubernetes.io"
_PAUSE, _PAUSE_MAX = 1.0, 900.0  # seconds between replacements of a daemon that fails again and again


def tolerations(spec: Obj) -> list[Obj]:
    """A template's tolerations with those every daemon gets."""
    always = [
        {"key": f"{_NODE}/{key}", "operator": "Exists", "effect": effect}
        for key, effect in (
            ("not-ready", "NoExecute"),
            ("unreachable", "NoExecute"),
            ("disk-pressure", "NoSchedule"),
            ("memory-pressure", "NoSchedule"),
            ("pid-pressure", "NoSchedule"),
            ("unschedulable", "NoSchedule"),
            *((("network-unavailable", "NoSchedule"),) if spec.get("hostNetwork") else ()),
        )
    ]
    have = spec.get("tolerations") or []
    return [*have, *(one for one in always if one not in have)]


def pinned(spec: Obj, node: str) -> Obj:
    """A pod spec that fits one node only."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    affinity = dict(spec.get("affinity") or {})
    node_affinity = dict(affinity.get("nodeAffinity") or {})
    terms = (node_affinity.get(_REQUIRED) or {}).get("nodeSelectorTerms") or [{}]
    node_affinity[_REQUIRED] = {"nodeSelectorTerms": [{**term, "matchFields": [field]} for term in terms]}
    return {**spec, "affinity": {**affinity, "nodeAffinity": node_affinity}, "tolerations": tolerations(spec)}


def target(pod: Obj) -> str:
    """The node a daemon pod is for, bound or not."""
    if node_of(pod):
        return node_of(pod)
    affinity = ((pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}).get(_REQUIRED) or {}
    for term in affinity.get("nodeSelectorTerms") or ():
        for field in term.get("matchFields") or ():
            if field["key"] == "metadata.name" and field.get("values"):
                return str(field["values"][0])
    return ""


def admits(owner: Obj, node: Obj) -> tuple[bool, bool]:
    """(a pod should be started there, a running one may stay)."""
    spec = owner["spec"]["template"]["spec"]
    if not node_matches(spec, node) or spec.get("nodeName", name(node)) != name(node):
        return False, False
    held = tolerations(spec)
    start = untolerated(taints(node), held, ("NoSchedule", "NoExecute")) is None
    return start, untolerated(taints(node), held, ("NoExecute",)) is None


def unavailable_limit(owner: Obj, nodes: int) -> int:
    rolling = (owner["spec"].get("updateStrategy") or {}).get("rollingUpdate") or {}
    return max(1, scaled(rolling.get("maxUnavailable", 1), nodes, up=True))


class DaemonSets(Controller):
    name = "daemonset"

    def setup(self) -> None:
        self._pauses: dict[tuple[str, str], tuple[int, float]] = {}  # (owner, node) → failures, next replacement
        self.sets = self.watch_own(DAEMONSETS)
        self.pods = self.watch_owned(PODS, DAEMONSETS)
        self.nodes = self.shared.caches.of(NODES)
        self.nodes.subscribe(self._node_changed)

    def _node_changed(self, type: EventType, node: Obj, old: Obj | None) -> None:
        if old is None or type == "DELETED" or taints(old) != taints(node) or labels(old) != labels(node):
            for owner in self.sets.objects.values():
                self.queue.add(key(owner))

    async def reconcile(self, key: Key) -> None:
        owner = self.sets.objects.get(key)
        if owner is None or deleting(owner) or selects_nothing(owner["spec"].get("selector")):
            return
        revision = history.hash_of(await history.current(self.shared, owner, DAEMONSETS, full_hash=False))
        await self._place(owner, revision)
        await self._roll(owner, revision)
        await self._report(key, revision)
        pods = self.pods.by("controller", uid(owner))
        await history.truncate(self.shared, owner, {revision, *(labels(p).get(REVISION_HASH, "") for p in pods)})

    def _by_node(self, owner: Obj) -> dict[str, list[Obj]]:
        found: defaultdict[str, list[Obj]] = defaultdict(list)
        for pod in self.pods.by("controller", uid(owner)):
            found[target(pod)].append(pod)
        return found

    async def _place(self, owner: Obj, revision: str) -> None:
        """A pod for each node that lacks one, none for those that do not admit it."""
        pods = self._by_node(owner)
        missing: list[str] = []
        surplus: list[Obj] = []
        for node in self.nodes.objects.values():
            start, stay = admits(owner, node)
            here = pods.pop(name(node), [])
            ended = [pod for pod in here if finished(pod) and not deleting(pod)]
            if ended and self._may_replace(owner, node):
                for pod in ended:
                    self._failure_event(owner, pod, node)
                surplus += ended
            alive = [pod for pod in here if not finished(pod)]
            running = [pod for pod in alive if not deleting(pod)]
            if not stay:
                surplus += running
            elif start and not alive and not deleting(node) and set(map(uid, ended)) <= set(map(uid, surplus)):
                missing.append(name(node))
            else:
                surplus += sorted(running, key=lambda pod: (not node_of(pod), created(pod)))[1:]
        for title, left in pods.items():  # of nodes that are gone; bound ones fall to the pod collector
            surplus += [pod for pod in left if not node_of(pod) and not deleting(pod) and self.nodes.get(title) is None]
        await each([self._create(owner, node, revision) for node in missing])
        await each([self._delete(owner, pod) for pod in surplus])

    def _may_replace(self, owner: Obj, node: Obj) -> bool:
        """Pods that end at once are replaced ever more slowly."""
        at = asyncio.get_running_loop().time()
        where = uid(owner), name(node)
        count, until = self._pauses.get(where, (0, 0.0))
        if at < until:
            self.queue.add_after(key(owner), until - at)
            return False
        count = count + 1 if at < until + _PAUSE_MAX else 1
        self._pauses[where] = count, at + min(_PAUSE * 2.0 ** (count - 1), _PAUSE_MAX)
        return True

    def _failure_event(self, owner: Obj, pod: Obj, node: Obj) -> None:
        what, reason = ("failed", "FailedDaemonPod") if phase(pod) == "Failed" else ("succeeded", "SucceededDaemonPod")
        text = f"Found {what} daemon pod {namespace(pod)}/{name(pod)} on node {name(node)}, will try to "
        text += "kill it" if what == "failed" else "delete it"
        self.record(owner, DAEMONSETS, "Warning" if what == "failed" else "Normal", reason, text)

    async def _create(self, owner: Obj, node: str, revision: str) -> None:
        pod = pod_from(owner["spec"]["template"], owner, DAEMONSETS)
        pod["metadata"]["labels"] = {
            **pod["metadata"].get("labels", {}),
            REVISION_HASH: revision,
            _GENERATION: str(generation(owner)),
        }
        pod["spec"] = pinned(pod["spec"], node)
        try:
            made = await self.shared.create(PODS, pod)
        except ApiError as error:
            if not namespace_ends(error):
                self.record(owner, DAEMONSETS, "Warning", "FailedCreate", f"Error creating: {error}")
                raise
            return
        self.record(owner, DAEMONSETS, "Normal", "SuccessfulCreate", f"Created pod: {name(made)}")

    async def _delete(self, owner: Obj, pod: Obj) -> None:
        await self.shared.delete(PODS, pod)
        self.record(owner, DAEMONSETS, "Normal", "SuccessfulDelete", f"Deleted pod: {name(pod)}")

    async def _roll(self, owner: Obj, revision: str) -> None:
        """Replace pods of older revisions, broken ones at once, others within maxUnavailable."""
        if (owner["spec"].get("updateStrategy") or {}).get("type", "RollingUpdate") != "RollingUpdate":
            return
        wanted = [name(node) for node in self.nodes.objects.values() if admits(owner, node)[0]]
        pods = self._by_node(owner)
        spare = unavailable_limit(owner, len(wanted))
        old: list[Obj] = []
        for node in wanted:
            running = [pod for pod in pods.get(node, ()) if not deleting(pod) and not finished(pod)]
            good = [pod for pod in running if self._available(owner, pod)]
            if not good:
                spare -= 1
            old += [pod for pod in running if labels(pod).get(REVISION_HASH) != revision]
        broken = [pod for pod in old if not self._available(owner, pod)]
        working = [pod for pod in old if self._available(owner, pod)]
        await each([self._delete(owner, pod) for pod in (*broken, *working[: max(0, spare)])])

    @staticmethod
    def _available(owner: Obj, pod: Obj) -> bool:
        return available_in(pod, int(owner["spec"].get("minReadySeconds") or 0), now()) == 0

    async def _report(self, key: Key, revision: str) -> None:
        owner = self.sets.objects.get(key)
        if owner is None:
            return
        status = self._status(owner, revision, list(self.nodes.objects.values()))
        if status != owner.get("status"):
            await self.shared.status(DAEMONSETS, owner, status)

    def _status(self, owner: Obj, revision: str, nodes: Sequence[Obj]) -> Obj:
        pods = self._by_node(owner)
        current = wrong = desired = good = usable = updated = 0
        for node in nodes:
            start, _ = admits(owner, node)
            here = sorted((p for p in pods.get(name(node), ()) if not finished(p)), key=created)
            desired += start
            current += start and bool(here)
            wrong += not start and bool(here)
            if start and here:
                good += ready(here[0]) and not deleting(here[0])
                usable += ready(here[0]) and not deleting(here[0]) and self._available(owner, here[0])
                updated += labels(here[0]).get(REVISION_HASH) == revision
        return {
            "currentNumberScheduled": current,
            "numberMisscheduled": wrong,
            "desiredNumberScheduled": desired,
            "numberReady": good,
            "observedGeneration": generation(owner),
            **present({
                "updatedNumberScheduled": updated,
                "numberAvailable": usable,
                "numberUnavailable": desired - usable,
            }),
        }  # fmt: skip
