"""What the watches prove: nodes that are cordoned, pods that were born after the harm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gameday import clock
from gameday.cluster import Watched
from probes.kube import Watcher, deployment_of


def watcher() -> Watcher:
    nobody: Any = None
    return Watcher(nobody, {"app": "engine"}, "engine", lambda _: None)


def pod(name: str, owner: str = "engine-5d4f") -> Any:
    owners = [{"kind": "ReplicaSet", "name": owner}]
    metadata = {"name": name, "namespace": "llm", "uid": f"uid-{name}", "ownerReferences": owners, "labels": {}}
    return {"metadata": metadata, "spec": {"containers": [{"name": "c", "image": "i"}]}, "status": {}}


def test_only_a_pod_of_that_deployment_born_since_then_proves_a_rollout() -> None:
    watch = watcher()
    watch._on_pod(Watched("ADDED", pod("old")), False)
    harm = clock.now()
    assert not watch.newborn("engine", harm).holds, "what the first list brought is older than we are"
    watch._on_pod(Watched("ADDED", pod("other", "gateway-77aa")), True)
    assert not watch.newborn("engine", harm).holds
    watch._on_pod(Watched("ADDED", pod("new", "engine-9c8b")), True)
    seen = watch.newborn("engine", harm)
    assert seen.settled and "new" in seen.detail and seen.since >= harm
    assert not watch.newborn("engine", clock.now() + 1).holds


def test_a_pod_of_the_former_replicaset_is_no_rollout() -> None:
    """A paused Deployment takes a new template and does nothing; an autoscaler's next pod proved it all the same."""
    watch = watcher()
    watch._on_pod(Watched("ADDED", pod("old")), False)
    harm = clock.now()
    watch._on_pod(Watched("ADDED", pod("scaled-up")), True)
    assert not watch.newborn("engine", harm).holds


def endpoints(name: str, *pods: str, ready: bool = True) -> Any:
    metadata = {"name": name, "labels": {"kubernetes.io/service-name": "chat"}}
    made = [{"targetRef": {"name": p, "namespace": "llm"}, "conditions": {"ready": ready}} for p in pods]
    return {"metadata": metadata, "endpoints": made}


def test_each_of_a_services_slices_speaks_for_its_own_pods() -> None:
    """Two slices (dual stack, many pods): an event of one took all pods of the other out of rotation."""
    marks: list[Any] = []
    nobody: Any = SimpleNamespace(namespace="llm")
    watch = Watcher(nobody, {"app": "engine"}, "engine", marks.append)
    for slice_ in (endpoints("v4", "e1", "e2"), endpoints("v6", "e1"), endpoints("more", "e3")):
        watch._on_slice(Watched("ADDED", slice_), True)
    assert [(mark.pod, mark.ready) for mark in marks] == [("llm/e1", True), ("llm/e2", True), ("llm/e3", True)]
    marks.clear()
    watch._on_slice(Watched("MODIFIED", endpoints("v4", "e2")), True)
    assert marks == [], "e1 is in another slice still"
    watch._on_slice(Watched("MODIFIED", endpoints("v6", "e1", ready=False)), True)
    watch._on_slice(Watched("DELETED", endpoints("more", "e3")), True)
    watch._on_slice(Watched("MODIFIED", endpoints("v6")), True)
    assert [(mark.pod, mark.ready, mark.present) for mark in marks] == [
        ("llm/e1", False, True),
        ("llm/e3", False, False),
        ("llm/e1", False, False),
    ]


def test_a_drain_acts_when_the_watch_has_seen_all_of_its_cordons() -> None:
    watch = watcher()
    for name, cordoned in (("n1", True), ("n2", False)):
        metadata = {"name": name, "uid": name, "labels": {}}
        watch._on_node(
            Watched("ADDED", {"metadata": metadata, "spec": {"unschedulable": cordoned}, "status": {}}), True
        )
    watch._on_pod(Watched("ADDED", pod("old")), False)
    watch._on_pod(Watched("DELETED", pod("old")), True)
    assert watch.drained(("n1",), {"uid-old"}, 0.0).settled
    seen = watch.drained(("n1", "n2"), {"uid-old"}, 0.0)
    assert not seen.holds and "n2 still schedulable" in seen.detail
    assert not watch.drained(("unknown",), {"uid-old"}, 0.0).holds


def test_a_drain_acts_from_the_first_evicted_pod_that_has_to_go_and_moves_nobody_without_one() -> None:
    watch = watcher()
    metadata = {"name": "n1", "uid": "n1", "labels": {}}
    watch._on_node(Watched("ADDED", {"metadata": metadata, "spec": {"unschedulable": True}, "status": {}}), True)
    for name, node in (("here", "n1"), ("elsewhere", "n2")):
        made = pod(name)
        made["spec"]["nodeName"] = node
        watch._on_pod(Watched("ADDED", made), False)
    harm = clock.now()
    for name in ("elsewhere", "here"):
        ended = pod(name)
        ended["spec"]["nodeName"] = "n1" if name == "here" else "n2"
        ended["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        watch._on_pod(Watched("MODIFIED", ended), True)
    after = clock.now()
    seen = watch.drained(("n1",), {"uid-here"}, harm)
    assert seen.settled and harm <= seen.since <= after and "1 evicted pod(s) ending" in seen.detail
    assert not watch.drained(("n1",), {"uid-here"}, after + 1).holds, "of earlier ends nothing follows"
    assert not watch.drained(("n1",), {"uid-stays"}, harm).holds, "that others end by themselves is not the drain"
    assert "no eviction was accepted" in watch.drained(("n1",), set(), harm).detail


def test_whether_a_pod_is_still_there() -> None:
    watch = watcher()
    watch._on_pod(Watched("ADDED", pod("old")), False)
    assert watch.exist(["llm/old", "llm/x"]) and not watch.exist(["llm/x"])
    watch._on_pod(Watched("DELETED", pod("old")), True)
    assert not watch.exist(["llm/old"])


def test_another_pod_of_its_name_is_not_still_there() -> None:
    """As StatefulSets make them: a mute pod that was replaced was taken for one that has to answer again."""
    marks: list[Any] = []
    nobody: Any = None
    watch = Watcher(nobody, {"app": "engine"}, "engine", marks.append)
    watch._on_pod(Watched("ADDED", pod("engine-0")), False)
    watch.aim(frozenset({"llm/engine-0"}))
    assert watch.exist(["llm/engine-0"])
    watch._on_pod(Watched("DELETED", pod("engine-0")), True)
    again = pod("engine-0")
    again["metadata"]["uid"] = "uid-2"
    watch._on_pod(Watched("ADDED", again), True)
    assert not watch.exist(["llm/engine-0"])
    assert [(mark.stage, mark.target, mark.covered) for mark in marks] == [
        ("exists", False, True),
        ("gone", True, True),
        ("created", False, False),
    ]


@pytest.mark.parametrize(
    ("owner", "deployment"),
    [("ReplicaSet/my-llama32-6d4f", "my-llama32"), ("StatefulSet/db", ""), ("", ""), ("ReplicaSet/bare", "")],
)
def test_the_deployment_of_an_owner(owner: str, deployment: str) -> None:
    assert deployment_of(owner) == deployment
