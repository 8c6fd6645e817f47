"""Doing what a plan says, and asking the control plane whether it happened.

`perform` sends one act and waits for its control proof. That only says that the *control action* succeeded;
whether anything broke is for `probes.reach` to see.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from faults.base import CORDONED, Act, Allocatable, Apply, Cordon, Job
from gameday import clock
from gameday.cluster import Cluster, Obj, Refused, Unreachable
from gameday.errors import GamedayError
from gameday.kinds import JOBS, NODES, Kind

SELECTS_WITHIN = 2.0  # seconds for a controller to choose its targets; "nothing selected" is final after that
POLL = 0.05  # seconds between looks at a chaos resource's records


class NotInjected(GamedayError):
    """The control plane says, or never says otherwise, that the act did not happen."""


@dataclass(frozen=True, slots=True)
class Record:
    """One containerRecord of a chaos resource."""

    id: str
    phase: str
    message: str


def records(obj: Obj) -> tuple[Record, ...]:
    found = obj.get("status", {}).get("experiment", {}).get("containerRecords") or []
    return tuple(
        Record(one.get("id", ""), one.get("phase", ""), (one.get("events") or [{}])[-1].get("message", ""))
        for one in found
    )


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


def perform(cluster: Cluster, act: Act, stop: threading.Event) -> str:
    """Do it and wait for the control proof; returns what was proven, in words. Raises `NotInjected`."""
    if isinstance(act, Apply):
        return _apply(cluster, act, stop)
    if isinstance(act, Job):
        return _job(cluster, act, stop)
    if isinstance(act, Cordon):
        return _cordon(cluster, act)
    return _allocatable(cluster, act)


def _look(cluster: Cluster, kind: Kind, name: str, namespace: str) -> Obj | None:
    """The object, or None while the API server is away or throttles us: the wait's own bound decides."""
    try:
        return cluster.get(kind, name, namespace)
    except Unreachable:
        return None
    except Refused as refused:
        if refused.code == 429 or refused.code >= 500:
            return None
        raise


def _cordon(cluster: Cluster, act: Cordon) -> str:
    """Only what nobody else has cordoned meanwhile; our mark is what the undo goes by."""
    for name in act.nodes:
        if cluster.get(NODES, name).get("spec", {}).get("unschedulable"):
            raise NotInjected(f"{name} was cordoned by somebody else after the plan was made")
        mark = {"metadata": {"annotations": {CORDONED: act.token}}, "spec": {"unschedulable": True}}
        cluster.patch(NODES, name, mark)
    return f"{len(act.nodes)} node(s) cordoned"


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
            raise NotInjected(f"Job {name} failed: see kubectl -n {namespace} describe job {name}")
        return bool(status.get("succeeded"))

    try:
        clock.wait_until(done, within=act.within, every=0.1, what=f"Job {name} completed", stop=stop)
    except clock.Waited as late:
        raise NotInjected(str(late)) from late
    return f"Job {name} completed"


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
    """The command that would do what an act changes on nodes; "" for acts that create an object."""
    if isinstance(act, Cordon):
        nodes = " ".join(act.nodes)
        return f"kubectl cordon {nodes} && kubectl annotate node {nodes} {CORDONED}={act.token}"
    if isinstance(act, Allocatable):
        value = f'{{"status":{{"allocatable":{{"{act.resource}":"{act.value}"}}}}}}'
        return f"kubectl patch node {act.node} --subresource=status --type=merge -p '{value}'"
    return ""
