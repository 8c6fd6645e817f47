"""A team's experiment: what counts as its effect, and what as a mess."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from faults.base import Call, Plan
from gameday import witness
from gameday.cluster import Obj, Refused
from gameday.kinds import Kind
from gameday.model import EndpointMark, Event, FaultFacts, FaultMark, NodeMark, Note, PodMark, Step
from gameday.tape import Tape
from gameday.witness import Witness

FACTS = FaultFacts("Chaos Toolkit experiment", "Theirs", one_shot=True, lasting=60, pods=())
TEXT = json.dumps({"title": "Theirs", "method": [{"name": "x", "type": "action"}]})
ENGINES = tuple(SimpleNamespace(key=f"llm/engine-{n}", node=f"node-{n}") for n in (1, 2))
HARM = 10.0


def made(cluster: Any = None, broken: tuple[str, ...] = ()) -> tuple[Witness, Tape]:
    tape = Tape(lambda _: None)
    reach: Any = SimpleNamespace(broken=lambda: broken)
    watcher: Any = SimpleNamespace(engines=lambda: ENGINES)
    plan = Plan(FACTS, (Call("1. x", TEXT, 0, True),), ())
    return Witness(plan, reach, watcher, tape, cluster, ("llm", "data")), tape


class Planted:
    """Objects of a cluster by (plural, namespace); `hidden`: what may not be listed."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str | None], list[Obj]] = {}
        self.hidden: set[tuple[str, str | None]] = set()
        self.put("nodes", None, "node-1")
        self.put("deployments", "llm", "chat", replicas=2)

    def put(self, plural: str, namespace: str | None, name: str, **spec: Any) -> None:
        made = {"metadata": {"name": name, "namespace": namespace}, "spec": spec}
        kept = [one for one in self.objects.get((plural, namespace), []) if one["metadata"]["name"] != name]
        self.objects[plural, namespace] = [*kept, made]

    def kinds(self, group_version: str) -> tuple[Kind, ...]:
        group, _, version = group_version.partition("/")
        served = ("podchaos", "podchaos/status", "httpchaos", "iochaos", "schedules", "podnetworkchaos")
        of_cluster = Kind(group, version, "remoteclusters", "RemoteCluster", namespaced=False)
        return (*(Kind(group, version, one, one) for one in served), of_cluster)

    def list(self, kind: Kind, namespace: str | None = None) -> list[Obj]:
        assert kind.namespaced is (namespace is not None) and "/" not in kind.plural
        if (kind.plural, namespace) in self.hidden:
            raise Refused(403, "Forbidden", f"cannot list {kind.plural} in {namespace}")
        return self.objects.get((kind.plural, namespace), [])


def proven(*events: Event, broken: tuple[str, ...] = ()) -> FaultMark:
    found, tape = made(broken=broken)
    for event in events:
        tape.emit(event)
    assert found.prove_all(HARM) is not tape.stopped
    (mark,) = [one for one in tape.events if isinstance(one, FaultMark)]
    assert mark.step is Step.EFFECT
    return mark


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "SEEN_WITHIN", 0.0)
    monkeypatch.setattr(witness, "GONE_WITHIN", 0.0)


OTHERS = (
    PodMark(11.0, "llm/batch-x", "u9", "gone"),
    EndpointMark(11.0, "other", "llm/batch-x", ready=False),
    NodeMark(11.0, "node-9", "not ready"),
)


def test_a_coincidence_does_not_prove_a_teams_fault() -> None:
    """Any pod of the namespace that went, and any node, counted: a batch Job that ended was proof enough."""
    mark = proven(*OTHERS, PodMark(9.0, "llm/engine-1", "u1", "gone"), broken=("a→llm/batch-x",))
    assert not mark.ok and "nothing was seen to change of the engines" in mark.detail


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (PodMark(11.0, "llm/engine-1", "u1", "restarted"), "llm/engine-1 restarted"),
        (EndpointMark(11.0, "chat", "llm/engine-2", ready=False), "llm/engine-2 out of chat"),
        (NodeMark(11.0, "node-2", "cordoned"), "node-2 cordoned"),
    ],
)
def test_what_changes_of_the_engines_proves_it(event: Event, told: str) -> None:
    mark = proven(*OTHERS, event)
    assert mark.ok and mark.detail == told


def test_a_connection_to_an_engine_that_breaks_proves_it() -> None:
    assert proven(broken=("a→llm/engine-1",)).detail == "a→llm/engine-1 fails"


# ── what it leaves behind ───────────────────────────────────────────────────────────────────────


def left(*puts: tuple[Any, ...], removed: tuple[str, str] | None = None, **spec: Any) -> FaultMark:
    """What is recorded at the end when these were put into the cluster after the first action."""
    cluster = Planted()
    cluster.put("statefulsets", "data", "store", replicas=3)
    cluster.put("networkpolicies", "llm", "theirs")
    found, tape = made(cluster)
    assert found.ready()
    for put in puts:
        cluster.put(*put, **spec)
    if removed:
        cluster.objects[removed] = []
    found.see_gone(cluster, "r1")  # type: ignore[arg-type]
    (mark,) = [one for one in tape.events if isinstance(one, FaultMark)]
    assert mark.step is Step.GONE
    return mark


@pytest.mark.parametrize("plural", ["podchaos", "httpchaos", "iochaos", "schedules", "networkpolicies"])
@pytest.mark.parametrize("namespace", ["llm", "data"])
def test_a_mess_of_any_kind_in_any_allowed_namespace_is_seen(plural: str, namespace: str) -> None:
    """Only PodChaos, NetworkChaos and StressChaos were looked for, and only in the namespace under test."""
    mark = left((plural, namespace, "x"))
    assert not mark.ok and f"{namespace}/x is there" in mark.detail


def test_what_was_scaled_or_removed_is_a_mess() -> None:
    assert "StatefulSet data/store is 0 replicas" in left(("statefulsets", "data", "store"), replicas=0).detail
    assert "StatefulSet data/store is gone" in left(removed=("statefulsets", "data")).detail
    assert "NetworkPolicy llm/theirs is gone" in left(removed=("networkpolicies", "llm")).detail
    assert "Deployment llm/chat is gone" in left(removed=("deployments", "llm")).detail


def test_without_a_mess_it_is_as_before() -> None:
    assert left().ok
    assert left(("podnetworkchaos", "llm", "p")).ok, "Chaos Mesh keeps its own books"


@pytest.mark.parametrize("hidden", [("httpchaos", "llm"), ("statefulsets", "data"), ("networkpolicies", "data")])
def test_where_a_mess_could_not_be_seen_nothing_begins(hidden: tuple[str, str]) -> None:
    cluster = Planted()
    cluster.hidden = {hidden}
    found, tape = made(cluster)
    assert not found.ready() and tape.stopped
    (note,) = [one for one in tape.events if isinstance(one, Note)]
    assert note.level == "inconclusive" and f"cannot list {hidden[0]} in {hidden[1]}" in note.text
    assert "gameday rbac" in note.text


def test_an_engine_that_is_gone_was_known_before() -> None:
    found, tape = made(Planted())
    assert found.ready()
    found._watcher = SimpleNamespace(engines=lambda: ())  # type: ignore[assignment]
    tape.emit(PodMark(11.0, "llm/engine-1", "u1", "gone"))
    assert found.prove_all(HARM)


# ── what autoscalers do is not the experiment's mess ────────────────────────────────────────────

SCALED = {"kind": "Deployment", "name": "chat"}


def scaled(cluster: Planted, most: int = 6) -> None:
    cluster.put("horizontalpodautoscalers", "llm", "chat", scaleTargetRef=SCALED, minReplicas=2, maxReplicas=most)


def after(change: Any, cluster: Planted | None = None) -> FaultMark:
    planted = cluster or Planted()
    found, tape = made(planted)
    assert found.ready()
    change(planted)
    found.see_gone(planted, "r1")  # type: ignore[arg-type]
    return next(one for one in tape.events if isinstance(one, FaultMark))


def test_replicas_that_an_autoscaler_has_moved_are_not_left_behind() -> None:
    """The load that we send makes it scale out: every experiment beside an autoscaler was an ERROR."""
    with_scaler = Planted()
    scaled(with_scaler)
    assert after(lambda c: c.put("deployments", "llm", "chat", replicas=5), with_scaler).ok
    none = after(lambda c: c.put("deployments", "llm", "chat", replicas=0), with_scaler)
    assert not none.ok and "Deployment llm/chat is 0 replicas" in none.detail, "no autoscaler brings that back"
    assert not after(lambda c: c.put("deployments", "llm", "chat", replicas=5)).ok, "without one it is somebody's doing"


def test_an_autoscaler_that_is_otherwise_or_gone_is_left_behind() -> None:
    one, other = Planted(), Planted()
    scaled(one)
    scaled(other)
    changed = after(lambda c: scaled(c, most=1), one)
    assert not changed.ok and "HorizontalPodAutoscaler llm/chat is for 2 to 1 replicas" in changed.detail
    gone = after(lambda c: c.objects.pop(("horizontalpodautoscalers", "llm")), other)
    assert not gone.ok and "HorizontalPodAutoscaler llm/chat is gone" in gone.detail


def test_nodes_that_come_or_are_taken_away_are_an_autoscalers_doing() -> None:
    soft = [{"key": "DeletionCandidateOfClusterAutoscaler", "effect": "PreferNoSchedule"}]
    starting = [{"key": "node.cilium.io/agent-not-ready", "effect": "NoSchedule"}]
    leaves = [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]
    assert after(lambda c: c.put("nodes", None, "node-9")).ok
    assert after(lambda c: c.put("nodes", None, "node-9", taints=starting)).ok
    assert after(lambda c: c.put("nodes", None, "node-1", taints=soft)).ok
    assert after(lambda c: c.put("nodes", None, "node-1", taints=leaves, unschedulable=True)).ok
    assert after(lambda c: c.put("nodes", None, "node-1", taints=[{"key": "karpenter.sh/disrupted"}])).ok
    assert not after(lambda c: c.put("nodes", None, "node-9", unschedulable=True)).ok
    assert not after(lambda c: c.put("nodes", None, "node-1", taints=[{"key": "theirs"}])).ok
    assert not after(lambda c: c.put("nodes", None, "node-1", unschedulable=True)).ok
