"""A chaos resource that its finalizer keeps: as few pods as possible are replaced, and none without a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from faults.stuck import FINALIZER, Watch
from gameday.cluster import Cluster, Refused
from gameday.errors import HealError
from gameday.kinds import NETWORKCHAOS, PODS, Kind

Obj = dict[str, Any]
FAILED = {"type": "Failed", "operation": "Recover", "message": "daemon on n1 does not answer"}
APPLIED = {"type": "Succeeded", "operation": "Apply"}


class Carriers(Cluster):
    """Pods of a partition; one that was asked to end is terminating until it is buried."""

    def __init__(self, *names: str) -> None:
        self.there = {name: f"uid-{name}" for name in names}
        self.ending: list[str] = []
        self.patches: list[Any] = []
        self.unready: set[str] = set()
        self.reborn = False  # the look is of a pod that is replaced before the eviction

    def find(self, kind: Kind, name: str, namespace: str | None = None) -> Obj | None:
        assert kind is PODS and namespace == "llm"
        if name not in self.there:
            return None
        metadata: Obj = {"name": name, "namespace": "llm", "uid": self.there[name], "creationTimestamp": "2026-01-01"}
        metadata["ownerReferences"] = [{"controller": True}]
        if name in self.ending:
            metadata["deletionTimestamp"] = "now"
        ready = "False" if name in self.unready else "True"
        return {"metadata": metadata, "status": {"conditions": [{"type": "Ready", "status": ready}]}}

    def evict(self, pod: str, namespace: str, *, uid: str) -> None:
        if self.reborn or self.there[pod] != uid:
            raise Refused(409, "Conflict", "the UID in the precondition does not match")
        self.ending.append(pod)

    def delete(self, kind: Kind, name: str, namespace: str | None = None, **given: Any) -> bool:
        self.evict(name, "llm", uid=given["uid"])
        return True

    def patch(self, kind: Kind, name: str, patch: Any, namespace: str | None = None, **_: Any) -> Obj:
        self.patches.append(patch["metadata"])
        return {}

    def bury(self) -> None:
        for name in self.ending:
            del self.there[name]
        self.ending.clear()


def cut(**last: tuple[str, Obj]) -> Obj:
    """The resource, being deleted; pod → (phase, the last event of its record)."""
    records = [{"id": f"llm/{pod}", "phase": phase, "events": [event]} for pod, (phase, event) in last.items()]
    metadata = {"name": "cut", "namespace": "llm", "creationTimestamp": "2026-01-02", "resourceVersion": "7"}
    metadata["finalizers"] = ["theirs.org/held", FINALIZER]  # type: ignore[assignment]
    status = {"experiment": {"containerRecords": records}}
    return {"kind": "NetworkChaos", "metadata": metadata, "status": status}


def test_pods_that_cannot_be_recovered_are_replaced_one_at_a_time() -> None:
    cluster, watch = Carriers("a", "b", "c"), Watch(within=0)
    stuck = cut(a=("Injected", FAILED), b=("Injected", FAILED), c=("Not Injected", APPLIED))
    replaced = []
    for _ in range(2):
        for _ in range(3):
            watch.look(cluster, NETWORKCHAOS, stuck)
            assert len(cluster.ending) == 1, "the next one has to wait until this one is gone"
        replaced += cluster.ending
        cluster.bury()
    watch.look(cluster, NETWORKCHAOS, stuck)
    assert replaced == ["a", "b"] and sorted(cluster.there) == ["c"], "what was recovered is left alone"
    assert cluster.patches == [{"finalizers": ["theirs.org/held"], "resourceVersion": "7"}], "theirs stays"
    assert "released, pods replaced: llm/a, llm/b" in watch.told


def test_pods_that_are_still_being_recovered_are_waited_for_and_not_replaced() -> None:
    cluster, watch = Carriers("a", "b"), Watch(within=0)
    cluster.unready.add("a")
    watch.look(cluster, NETWORKCHAOS, cut(a=("Injected", FAILED), b=("Injected", APPLIED)))
    cluster.bury()
    watch.look(cluster, NETWORKCHAOS, cut(a=("Injected", FAILED), b=("Injected", APPLIED)))
    assert sorted(cluster.there) == ["b"] and cluster.ending == [] and cluster.patches == []
    assert "llm/b still carries it" in watch.why
    watch.look(cluster, NETWORKCHAOS, cut(a=("Injected", FAILED), b=("Not Injected", APPLIED)))
    assert len(cluster.patches) == 1


def test_a_controller_that_is_down_costs_no_pod_and_no_finalizer() -> None:
    """Both sides of a partition would have to go, and with them the service."""
    names = "abcdef"
    cluster, watch = Carriers(*names), Watch(within=0)
    with pytest.raises(HealError) as told:
        watch.look(cluster, NETWORKCHAOS, cut(**dict.fromkeys(names, ("Injected", APPLIED))))
    assert cluster.ending == [] and cluster.patches == [] and len(cluster.there) == 6
    text = str(told.value)
    assert "chaos-controller-manager" in text and "kubectl -n llm delete pod a; " in text
    patch = json.loads(text.partition("-p '")[2].removesuffix("'"))
    assert patch == {"metadata": {"finalizers": ["theirs.org/held"]}}


def test_a_pod_that_was_replaced_at_this_instant_is_left_alone() -> None:
    cluster, watch = Carriers("a"), Watch(within=0)
    cluster.reborn = True
    watch.look(cluster, NETWORKCHAOS, cut(a=("Injected", FAILED)))
    assert cluster.ending == [] and cluster.patches == []
