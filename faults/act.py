"""Doing what a plan says, and asking the control plane whether it happened.

`perform` sends one act and waits for its control proof. That only says that the *control action* succeeded;
whether anything broke is for `probes.reach` to see.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from faults.base import CORDONED, Act, Allocatable, Apply, Call, Cordon, Evict, Job, Roll
from gameday import activities, clock
from gameday.cluster import Cluster, Obj, Refused, Unreachable
from gameday.errors import ClusterError, GamedayError
from gameday.kinds import DEPLOYMENTS, JOBS, NODES, PODS, Kind
from gameday.model import EvictionMark

T = TypeVar("T")
Emit = Callable[[EvictionMark], None]
SELECTS_WITHIN = 2.0  # seconds for a controller to choose its targets; "nothing selected" is final after that
TRIES = 10  # patches of an object that others write as well
POLL = 0.05  # seconds between looks at a chaos resource's records


class NotInjected(GamedayError):
    """The control plane says, or never says otherwise, that the act did not happen."""


@dataclass(frozen=True, slots=True)
class Record:
    """One containerRecord of a chaos resource."""

    id: str
    phase: str
    message: str  # its last word
    failed: bool  # the last word is a failure


def records(obj: Obj) -> tuple[Record, ...]:
    found = obj.get("status", {}).get("experiment", {}).get("containerRecords") or []
    return tuple(_record(one) for one in found)


def _record(found: Obj) -> Record:
    last = (found.get("events") or [{}])[-1]
    return Record(found.get("id", ""), found.get("phase", ""), last.get("message", ""), last.get("type") == "Failed")


def condition(obj: Obj, type: str) -> str:
    conditions = obj.get("status", {}).get("conditions") or []
    return next((one.get("status", "") for one in conditions if one.get("type") == type), "")


def injected(obj: Obj, expected: int) -> bool:
    """The reliable predicate of facts/chaos-mesh.md: desiredPhase Run, all records Injected, count as expected.

    Raises `NotInjected` where it cannot come any more.
    """
    found = records(obj)
    if found and len(found) != expected:
        raise NotInjected(f"{len(found)} targets were selected, not {expected}: the cluster changed under the plan")
    running = obj.get("status", {}).get("experiment", {}).get("desiredPhase") == "Run"
    return running and bool(found) and all(one.phase == "Injected" for one in found)


def selected_nothing(obj: Obj) -> bool:
    """No record, and `Selected=False`. It may also be read in the first moments, before the targets were chosen."""
    return not records(obj) and condition(obj, "Selected") == "False"


def perform(  # noqa: PLR0911 - a line for each kind of act
    cluster: Cluster, act: Act, stop: threading.Event, emit: Emit = lambda _: None
) -> str:
    """Do it and wait for the control proof; returns what was proven, in words. Raises `NotInjected`.

    `emit` hears of what happens meanwhile: each eviction that was accepted or refused.
    """
    if isinstance(act, Apply):
        return _apply(cluster, act, stop)
    if isinstance(act, Job):
        return _job(cluster, act, stop)
    if isinstance(act, Cordon):
        return _cordon(cluster, act)
    if isinstance(act, Evict):
        return _evict(cluster, act, stop, emit)
    if isinstance(act, Roll):
        return _roll(cluster, act, stop)
    if isinstance(act, Call):
        return _call(cluster, act, stop)
    return _allocatable(cluster, act)


def _look_for(cluster: Cluster, kind: Kind, name: str, namespace: str) -> Obj | Literal["gone"] | None:
    """As `_look`, but an object that does not exist is "gone"."""
    try:
        return _look(cluster, kind, name, namespace)
    except Refused as refused:
        if refused.code == 404:
            return "gone"
        raise


def _look(cluster: Cluster, kind: Kind, name: str, namespace: str) -> Obj | None:
    return _unless_away(lambda: cluster.get(kind, name, namespace))


def _unless_away(ask: Callable[[], T]) -> T | None:
    """The answer, or None while the API server is away or throttles us: the wait's own bound decides."""
    try:
        return ask()
    except Unreachable:
        return None
    except Refused as refused:
        if refused.code == 429 or refused.code >= 500:
            return None
        raise


def _cordon(cluster: Cluster, act: Cordon) -> str:
    """Only what nobody else has cordoned or replaced meanwhile; our mark is what the undo goes by."""
    for name, uid in act.nodes:
        _cordon_one(cluster, name, uid, act.token)
    return f"{len(act.nodes)} node(s) cordoned"


def _cordon_one(cluster: Cluster, name: str, uid: str, token: str) -> None:
    """The version makes it ours alone: whoever cordons the node between our look and our patch is not overruled."""
    for _ in range(TRIES):
        node = cluster.get(NODES, name)
        meta = node["metadata"]
        if meta["uid"] != uid:
            raise NotInjected(f"node {name} was replaced after the plan was made")
        if node.get("spec", {}).get("unschedulable"):
            if (meta.get("annotations") or {}).get(CORDONED) == token:
                return  # by ourselves, in a patch whose answer was lost
            raise NotInjected(f"{name} was cordoned by somebody else after the plan was made")
        change = {"annotations": {CORDONED: token}, "resourceVersion": meta.get("resourceVersion")}
        try:
            cluster.patch(NODES, name, {"metadata": change, "spec": {"unschedulable": True}})
            return
        except Refused as refused:
            if refused.code != 409:
                raise  # a conflict may only be the kubelet's status: look again
    raise NotInjected(f"{name} changes too fast to be cordoned: {TRIES} patches met another version")


def _apply(cluster: Cluster, act: Apply, stop: threading.Event) -> str:
    name, namespace = act.manifest["metadata"]["name"], act.manifest["metadata"]["namespace"]
    cluster.create(act.kind, act.manifest)
    last: Obj = {}
    begun = clock.now()

    def ready() -> bool:
        nonlocal last
        if (seen := _look(cluster, act.kind, name, namespace)) is None:
            return False
        last = seen
        if selected_nothing(last) and clock.now() - begun > SELECTS_WITHIN:
            raise NotInjected(
                "the selector selected nothing (Selected=False), which Chaos Mesh never retries; where it filters "
                "namespaces, annotate this one: chaos-mesh.org/inject=enabled"
            )
        return injected(last, act.records)

    try:
        clock.wait_until(ready, within=act.within, every=POLL, what=f"{act.kind.kind} {name} injected", stop=stop)
    except clock.Waited as late:
        bad = next((one for one in records(last) if one.phase != "Injected"), None)
        why = f"{bad.id} is {bad.phase!r}: {bad.message or 'no reason given'}" if bad else "it has no records"
        raise NotInjected(f"{late}; {why}") from late
    return f"{act.records} of {act.records} records Injected"


def _job(cluster: Cluster, act: Job, stop: threading.Event) -> str:
    name, namespace = act.manifest["metadata"]["name"], act.manifest["metadata"]["namespace"]
    cluster.create(JOBS, act.manifest)

    def done() -> bool:
        status = (_look(cluster, JOBS, name, namespace) or {}).get("status", {})
        if status.get("failed"):
            raise NotInjected(f"Job {name} failed: {_last_words(cluster, name, namespace)}")
        return bool(status.get(act.until)) and (act.until != "active" or _placed(cluster, name, namespace))

    try:
        clock.wait_until(done, within=act.within, every=0.1, what=f"Job {name} {act.until}", stop=stop)
    except clock.Waited as late:
        raise NotInjected(f"{late}: {_last_words(cluster, name, namespace)}") from late
    return f"Job {name} {'completed' if act.until == 'succeeded' else f'is {act.until}'}"


def _placed(cluster: Cluster, job: str, namespace: str) -> bool:
    """Whether a pod of the Job has a node: one that waits for it counts as active as well, and does nothing."""
    pods = _unless_away(lambda: cluster.list(PODS, namespace, labels=f"job-name={job}")) or ()
    return any(pod.get("spec", {}).get("nodeName") for pod in pods)


def _last_words(cluster: Cluster, job: str, namespace: str) -> str:
    """Why a Job's pod does not do what it should, as far as its status and its log tell."""
    advice = f"see kubectl -n {namespace} describe job {job}"
    try:
        for pod in cluster.list(PODS, namespace, labels=f"job-name={job}"):
            status = pod.get("status", {})
            for one in status.get("conditions") or []:
                if one.get("type") == "PodScheduled" and one.get("status") == "False":
                    advice = f"{one.get('message') or 'it found no node'}; {advice}"
            for one in status.get("containerStatuses") or []:
                for state in (one.get("state") or {}).values():
                    if why := state.get("message") or state.get("reason"):
                        advice = f"{why}; {advice}"
            if text := cluster.log(pod["metadata"]["name"], namespace):
                return f"{text.splitlines()[-1]}; {advice}"
            if why := status.get("message"):
                return f"{why}; {advice}"
    except ClusterError:
        pass
    return advice


class _Drain:
    """Evictions under way: which pods are left, and how often each was refused."""

    def __init__(self, cluster: Cluster, act: Evict, emit: Emit) -> None:
        self._cluster, self._act, self._emit = cluster, act, emit
        self._next = dict.fromkeys(act.pods, 0.0)  # when it is asked for again
        self.accepted: set[str] = set()
        self.refused: dict[str, int] = {}
        self.last = ""

    def done(self) -> bool:
        """Look after every pod that is left; whether none is."""
        for key, uid in list(self._next):
            namespace, name = key.split("/")
            found = _look_for(self._cluster, PODS, name, namespace)
            if found == "gone" or (isinstance(found, dict) and found["metadata"]["uid"] != uid):
                del self._next[key, uid]
            elif isinstance(found, dict) and "deletionTimestamp" not in found["metadata"]:
                self._ask(key, uid)
        return not self._next

    def _ask(self, key: str, uid: str) -> None:
        if clock.now() < self._next[key, uid]:
            return
        namespace, name = key.split("/")
        self._next[key, uid] = clock.now() + self._act.every
        try:
            self._cluster.evict(name, namespace, uid=uid)
        except Refused as refused:
            if refused.code in (404, 409) or refused.code >= 500:
                return  # gone, another one of its name (which the next look sees), or asked again
            if refused.code != 429:
                raise NotInjected(f"the eviction of {key} was refused for good: {refused}") from refused
            self.refused[key] = self.refused.get(key, 0) + 1
            self.last = str(refused)
            self._emit(EvictionMark(clock.now(), key, "refused", str(refused)))
            return
        except Unreachable:
            return  # asked again
        self.accepted.add(key)
        self._emit(EvictionMark(clock.now(), key, "accepted"))

    @property
    def told(self) -> str:
        times = sum(self.refused.values())
        told = (
            f"{len(self.accepted)} of {len(self._act.pods)} evictions accepted, {times} refused by disruption budgets"
        )
        left = sorted(key for key, _ in self._next)
        return told + (f"; {', '.join(left)} still there: {self.last}".rstrip(": ") if left else "")


def _evict(cluster: Cluster, act: Evict, stop: threading.Event, emit: Emit) -> str:
    """As `kubectl drain`: ask, ask again while a budget refuses, wait until they are gone or the time is over."""
    drain = _Drain(cluster, act, emit)
    try:
        clock.wait_until(drain.done, within=act.within, every=0.2, what="the pods are evicted", stop=stop)
    except clock.Waited:
        if not drain.accepted and not drain.refused:
            raise NotInjected("no eviction was answered") from None
    return drain.told


def _roll(cluster: Cluster, act: Roll, stop: threading.Event) -> str:
    """Change the template of exactly the Deployment that was planned for; the controller must take notice."""
    if cluster.get(DEPLOYMENTS, act.name, act.namespace)["metadata"]["uid"] != act.uid:
        raise NotInjected(f"Deployment {act.name} was replaced after the plan was made")
    changed = cluster.patch(
        DEPLOYMENTS, act.name, {"spec": {"template": act.template}}, act.namespace, type="strategic"
    )
    generation = changed["metadata"]["generation"]

    def observed() -> bool:
        status = (_look(cluster, DEPLOYMENTS, act.name, act.namespace) or {}).get("status", {})
        return bool(status.get("observedGeneration", 0) >= generation)

    try:
        clock.wait_until(observed, within=act.within, every=POLL, what=f"Deployment {act.name} observed", stop=stop)
    except clock.Waited as late:
        raise NotInjected(str(late)) from late
    return f"generation {generation} of Deployment {act.name} observed"


def _call(cluster: Cluster, act: Call, stop: threading.Event) -> str:
    """Raises `NotInjected` when the activity raised, and `activities.OutOfTolerance` for a probe of the method."""
    own = activities.of_text(act.experiment)
    one, environment = own.method[act.number], cluster.environment()
    try:
        if one.action:
            output = activities.run(own, one, environment, stop)
            return f"{one.name}: done" + (f" ({activities.words(output)})" if output is not None else "")
        return activities.probe(own, one, environment, stop)
    except activities.Unreadable as wrong:
        raise NotInjected(str(wrong)) from wrong


def _allocatable(cluster: Cluster, act: Allocatable) -> str:
    cluster.patch(NODES, act.node, {"status": {"allocatable": {act.resource: act.value}}}, sub="status")
    shown = cluster.get(NODES, act.node).get("status", {}).get("allocatable", {}).get(act.resource)
    if shown != act.value:
        raise NotInjected(f"{act.node} still offers {shown} {act.resource}")
    return f"{act.node} offers {act.value} {act.resource}"


def manifests(acts: tuple[Act, ...]) -> Iterator[tuple[str, Obj]]:
    """(what, manifest) of every object that the acts create."""
    for act in acts:
        if isinstance(act, Apply | Job):
            yield act.what, act.manifest


def by_hand(act: Act) -> str:
    """The command that would do what an act changes; "" for acts that create an object."""
    if isinstance(act, Cordon):
        nodes = " ".join(name for name, _ in act.nodes)
        return f"kubectl cordon {nodes} && kubectl annotate node {nodes} {CORDONED}={act.token}"
    if isinstance(act, Allocatable):
        value = f'{{"status":{{"allocatable":{{"{act.resource}":"{act.value}"}}}}}}'
        return f"kubectl patch node {act.node} --subresource=status --type=merge -p '{value}'"
    if isinstance(act, Roll):
        value = json.dumps({"spec": {"template": act.template}})
        return f"kubectl -n {act.namespace} patch deployment {act.name} --type=strategic -p '{value}'"
    if isinstance(act, Evict):
        pods = " ".join(sorted(key.partition("/")[2] for key, _ in act.pods))
        return f"kubectl drain … (here: the eviction of {pods}, again while a disruption budget refuses)"
    if isinstance(act, Call):
        return f"its {'action' if act.action else 'probe'} {act.what}"
    return ""
