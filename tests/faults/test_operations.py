"""Acts and undos of operations: evictions that budgets refuse, templates that change and change back."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from faults.act import NotInjected, perform
from faults.base import Evict, Job, Roll, Undo
from faults.undo import Work
from gameday.cluster import Cluster, Refused, Unreachable, to_workload
from gameday.kinds import DEPLOYMENTS, JOBS, PODS, Kind
from gameday.model import EvictionMark

Obj = dict[str, Any]


class Budgeted(Cluster):
    """Pods whose evictions a budget refuses so many times, and whose objects go once one is accepted."""

    def __init__(self, refusals: dict[str, int], code: int = 429) -> None:
        self.refusals, self.code = refusals, code
        self.there = {name: f"uid-{name}" for name in refusals}

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
        assert kind is PODS
        if name not in self.there:
            raise Refused(404, "NotFound", f"pods {name!r} not found")
        return {"metadata": {"name": name, "uid": self.there[name]}}

    def evict(self, pod: str, namespace: str, *, uid: str) -> None:
        if self.there[pod] != uid:
            raise Refused(409, "Conflict", "the UID in the precondition does not match")
        if self.refusals[pod] > 0:
            self.refusals[pod] -= 1
            raise Refused(
                self.code, "TooManyRequests", "Cannot evict pod as it would violate the pod's disruption budget."
            )
        del self.there[pod]


def evict(names: tuple[str, ...], within: float = 5.0) -> Evict:
    return Evict(tuple((f"llm/{name}", f"uid-{name}") for name in names), within, every=0.01)


def test_evictions_are_asked_for_again_until_the_budget_lets_go_and_each_answer_is_told() -> None:
    told: list[EvictionMark] = []
    said = perform(Budgeted({"a": 0, "b": 2}), evict(("a", "b")), threading.Event(), told.append)
    assert said == "2 of 2 evictions accepted, 2 refused by disruption budgets"
    assert sorted((mark.pod, mark.answer) for mark in told) == [
        ("llm/a", "accepted"), ("llm/b", "accepted"), ("llm/b", "refused"), ("llm/b", "refused")
    ]  # fmt: skip
    assert "disruption budget" in next(mark.detail for mark in told if mark.answer == "refused")


def test_a_budget_that_never_lets_go_is_an_answer_for_the_objectives() -> None:
    said = perform(Budgeted({"a": 10_000}), evict(("a",), within=0.3), threading.Event())
    assert said.startswith("0 of 1 evictions accepted") and "llm/a still there: Cannot evict pod" in said


def test_a_pod_of_the_same_name_but_another_uid_is_left_alone() -> None:
    cluster = Budgeted({"a": 10_000})
    cluster.there["a"] = "another"
    assert perform(cluster, evict(("a",)), threading.Event()).startswith("0 of 1 evictions accepted, 0 refused")
    assert cluster.refusals == {"a": 10_000}, "nobody asked"


def test_a_pod_that_is_replaced_between_our_look_and_the_eviction_is_not_evicted() -> None:
    """A StatefulSet gives the next pod the same name: it has done nothing to deserve it."""

    class Reborn(Budgeted):
        def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
            found = super().get(kind, name, namespace)
            self.there[name] = "another"
            return found

    cluster = Reborn({"a": 0})
    assert perform(cluster, evict(("a",)), threading.Event()).startswith("0 of 1 evictions accepted, 0 refused")
    assert cluster.there == {"a": "another"}


def test_an_eviction_that_is_forbidden_for_good_injects_nothing() -> None:
    with pytest.raises(NotInjected, match="refused for good"):
        perform(Budgeted({"a": 1}, code=403), evict(("a",)), threading.Event())


def test_an_api_server_that_answers_no_eviction_injects_nothing() -> None:
    class Deaf(Budgeted):
        def evict(self, pod: str, namespace: str, *, uid: str) -> None:
            raise Unreachable("no answer")

    with pytest.raises(NotInjected, match="no eviction was answered"):
        perform(Deaf({"a": 0}), evict(("a",), within=0.2), threading.Event())


# ── templates ───────────────────────────────────────────────────────────────────────────────────


class Rolled(Cluster):
    """One Deployment; strategic patches of annotations and of the one container's image."""

    def __init__(self, uid: str = "u1", image: str = "v1", annotations: dict[str, str] | None = None) -> None:
        self.uid, self.image, self.annotations = uid, image, annotations or {}
        self.generation, self.patches = 1, 0

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
        assert kind is DEPLOYMENTS
        container = {"name": "engine", "image": self.image}
        template = {"metadata": {"annotations": dict(self.annotations)}, "spec": {"containers": [container]}}
        metadata = {"name": name, "namespace": namespace, "uid": self.uid, "generation": self.generation}
        status = {"observedGeneration": self.generation}
        return {"metadata": metadata, "spec": {"template": template}, "status": status}

    def patch(self, kind: Kind, name: str, patch: Any, namespace: str | None = None, **_: Any) -> Obj:
        self.generation, self.patches = self.generation + 1, self.patches + 1
        template = patch["spec"]["template"]
        changed = self.annotations | template.get("metadata", {}).get("annotations", {})
        self.annotations = {key: value for key, value in changed.items() if value is not None}
        for container in template.get("spec", {}).get("containers", []):
            self.image = container["image"]
        return self.get(kind, name, namespace)


OURS = '{"container": "engine", "image": "v2", "token": "t1", "was": "v1"}'
UNDO = Undo("template", "rollout", "engine", kind="Deployment", namespace="llm", uid="u1", value=OURS)
TEMPLATE = {
    "metadata": {"annotations": {"gameday.dev/rolled-out-by": "t1"}},
    "spec": {"containers": [{"name": "engine", "image": "v2"}]},
}


def undo(cluster: Cluster, entry: Undo = UNDO) -> str:
    work = Work(cluster, entry, within=5)
    for _ in range(100):
        if (told := work.look()) is not None:
            return told
        threading.Event().wait(0.02)
    raise AssertionError("never undone")


def test_a_template_is_changed_and_changed_back_to_what_it_was() -> None:
    cluster = Rolled(annotations={"mine": "x"})
    said = perform(cluster, Roll("engine", "llm", "u1", TEMPLATE), threading.Event())
    assert said == "generation 2 of Deployment engine observed" and cluster.image == "v2"
    assert undo(cluster) == "Deployment engine has its former pod template"
    assert (cluster.image, cluster.annotations) == ("v1", {"mine": "x"})
    patches = cluster.patches
    assert undo(cluster) and cluster.patches == patches, "a second time changes nothing"


def test_an_image_that_somebody_else_set_meanwhile_stays() -> None:
    cluster = Rolled()
    perform(cluster, Roll("engine", "llm", "u1", TEMPLATE), threading.Event())
    cluster.image = "v3"
    undo(cluster)
    assert (cluster.image, cluster.annotations) == ("v3", {})


def test_a_deployment_that_was_replaced_is_neither_rolled_nor_undone() -> None:
    cluster = Rolled(uid="u2")
    with pytest.raises(NotInjected, match="was replaced"):
        perform(cluster, Roll("engine", "llm", "u1", TEMPLATE), threading.Event())
    assert undo(cluster) == "Deployment engine was replaced, nothing to undo" and cluster.patches == 0


@pytest.mark.parametrize(
    ("strategy", "most"),
    [
        ({}, 1),  # 25 % of 6, rounded down
        ({"type": "Recreate"}, 6),
        ({"rollingUpdate": {"maxUnavailable": "50%"}}, 3),
        ({"rollingUpdate": {"maxUnavailable": 0}}, 0),
        ({"rollingUpdate": {"maxUnavailable": 9}}, 6),
    ],
)
def test_how_many_pods_a_strategy_takes_away_at_once(strategy: Obj, most: int) -> None:
    spec = {"replicas": 6, "strategy": strategy, "template": {"spec": {"containers": [{"name": "e", "image": "i"}]}}}
    found = to_workload({"metadata": {"name": "e", "namespace": "llm", "uid": "u"}, "spec": spec})
    assert found.max_unavailable == most and found.images == {"e": "i"}


# ── Jobs ────────────────────────────────────────────────────────────────────────────────────────


class Jobs(Cluster):
    def __init__(self, status: Obj, log: str = "", pod: Obj | None = None) -> None:
        self.status, self._log, self.pod = status, log, pod or {}

    def create(self, kind: Kind, obj: Obj, *, dry_run: bool = False) -> Obj:
        return obj

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
        assert kind is JOBS
        return {"status": self.status}

    def list(self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = "") -> list[Obj]:
        assert kind is PODS and labels == "job-name=j"
        return [{"metadata": {"name": "job-pod"}, "status": {}} | self.pod]

    def log(self, pod: str, namespace: str, *, lines: int = 20) -> str:
        return self._log


def job(until: Any) -> Job:
    return Job("freeze", {"metadata": {"name": "j", "namespace": "llm"}}, until=until, within=0.3)


def test_a_job_is_at_work_when_it_says_so() -> None:
    assert perform(Jobs({"active": 1, "ready": 1}), job("ready"), threading.Event()) == "Job j is ready"
    with pytest.raises(NotInjected, match="Job j ready"):
        perform(Jobs({"active": 1}), job("ready"), threading.Event())


def test_a_job_whose_pod_found_no_node_is_not_at_work_and_says_why() -> None:
    """A pod that waits for a node counts as active, and a node crash was called injected."""
    message = "0/6 nodes are available: 6 node(s) didn't match Pod's node affinity/selector."
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    waiting = {"spec": {}, "status": {"phase": "Pending", "conditions": [unscheduled]}}
    with pytest.raises(NotInjected, match="0/6 nodes are available"):
        perform(Jobs({"active": 1}, pod=waiting), job("active"), threading.Event())
    bound = {"spec": {"nodeName": "n1"}, "status": {"phase": "Pending"}}
    assert perform(Jobs({"active": 1}, pod=bound), job("active"), threading.Event()) == "Job j is active"


def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(NotInjected, match="no process of pod x matches EngineCore"):
        perform(Jobs({"failed": 1}, "no process of pod x matches EngineCore"), job("ready"), threading.Event())
