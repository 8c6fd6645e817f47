"""Watches that go blind, early, late or half, are noticed; the cluster that changed before the harm is, too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faults import PodKill
from faults.base import Plan, Undo
from gameday import clock
from gameday.cluster import Cluster, Watched
from gameday.errors import TargetError
from gameday.kinds import PODS, Kind
from gameday.model import Event, FaultFacts, Note, PodMark
from gameday.objectives import Objectives, Recovers, Success
from gameday.run import Session
from gameday.settings import load
from gameday.spec import Spec
from loadgen.traffic import Chat
from probes.kube import Watcher

LABELS = {"app": "x"}


def pod(name: str) -> dict[str, Any]:
    spec = {"containers": [{"name": "c", "image": "busybox:1.36"}]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "llm", "labels": LABELS},
        "spec": spec,
    }


class OneLook:
    """The real cluster, whose watches list once and then hang in silence, as behind a dead proxy."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    def watch(
        self,
        kind: Kind,
        where: str | None,
        on_event: Callable[[Watched], None],
        stop: threading.Event,
        on_alive: Callable[[], None],
    ) -> None:
        for found in self._cluster.list(kind, where):
            on_event(Watched("ADDED", found))
        on_alive()
        stop.wait()


@pytest.fixture
def engine(cluster: Cluster) -> Iterator[str]:
    cluster.create(PODS, pod("engine-1"))
    yield "engine-1"
    for found in cluster.list(PODS, "llm"):
        cluster.delete(PODS, found["metadata"]["name"], "llm", grace=0)


def watching(cluster: Any, events: list[Event]) -> Watcher:
    watcher = Watcher(cluster, LABELS, "x", events.append)
    watcher.start(chaos=False)
    clock.wait_until(lambda: any(isinstance(e, PodMark) for e in events), within=10, what="the first pod")
    return watcher


def test_a_watch_that_delivers_agrees_with_the_cluster(cluster: Cluster, engine: str) -> None:
    watcher = watching(cluster, [])
    try:
        assert watcher.differs(10) == ""
        cluster.create(PODS, pod("engine-2"))
        assert watcher.differs(10) == ""
    finally:
        watcher.stop()


def test_a_watch_that_went_blind_late_does_not_pass_for_the_cluster(cluster: Cluster, engine: str) -> None:
    """It has not been silent for long enough to be called blind, and shows a pod that is gone."""
    watcher = watching(OneLook(cluster), [])
    try:
        assert watcher.blind(20) == ""
        cluster.delete(PODS, engine, "llm", grace=0)
        assert "engine-1 is not as the watch last showed it" in watcher.differs(0.5)
    finally:
        watcher.stop()


def test_a_silent_watch_is_called_blind_by_name(cluster: Cluster, engine: str) -> None:
    watcher = watching(OneLook(cluster), [])
    try:
        clock.wait_until(lambda: "pods in llm" in watcher.blind(0.3), within=10, what="it to be blind")
    finally:
        watcher.stop()


def test_an_object_that_cannot_be_read_makes_its_watch_no_witness(cluster: Cluster, engine: str) -> None:
    class Odd(OneLook):
        def watch(
            self, kind: Kind, where: str | None, on_event: Callable[[Watched], None], *more: Any, **_: Any
        ) -> None:
            on_event(Watched("MODIFIED", {"metadata": None}))

    watcher = Watcher(Odd(cluster), LABELS, "x", lambda _: None)  # type: ignore[arg-type]
    watcher.start(chaos=False)
    try:
        clock.wait_until(lambda: watcher.blind(20) != "", within=10, what="the watch to break")
        assert "met an object that it cannot read" in watcher.blind(20)
    finally:
        watcher.stop()


# ── between the plan and the injection ──


def session(tmp_path: Path, later: Callable[[Plan], Plan]) -> tuple[Session, Plan]:
    """A session whose fault plans once, and comes to `later` when it is asked again."""
    settings = load({"scrape_interval": 1, "steady": 8, "hold": 8, "selector": "app=x"})
    arena: Any = SimpleNamespace(
        cluster=None, settings=settings, run_id="r1", root=tmp_path, seed=7, sandbox=True, prometheus=None,
        say=lambda _: None, progress=lambda _: None,
    )  # fmt: skip
    asked = Objectives(before=(Success(0.9),), after=(Recovers(within=20, hold=10),))
    made = Session(arena, Spec("drill", Chat(per_second=1), PodKill(lasting=60), asked))
    plan = Plan(FaultFacts("kill", "one pod", True, 60, pods=("llm/p1",)), ("kill p1",), ())  # type: ignore[arg-type]
    made.spec = replace(made.spec, fault=SimpleNamespace(plan=lambda _: later(plan)))  # type: ignore[arg-type]
    made.view = lambda: None  # type: ignore[assignment, method-assign, return-value]
    return made, plan


def told(made: Session) -> list[tuple[str, str]]:
    return [(event.level, event.text) for event in made.tape.events if isinstance(event, Note)]


def test_the_same_cluster_is_still_valid(tmp_path: Path) -> None:
    made, plan = session(tmp_path, lambda plan: plan)
    assert made._still_valid(plan) and told(made) == []


def test_another_target_is_not_what_was_planned(tmp_path: Path) -> None:
    def moved(plan: Plan) -> Plan:
        return replace(plan, acts=("kill p2",), facts=replace(plan.facts, pods=("llm/p2",)))  # type: ignore[arg-type]

    made, plan = session(tmp_path, moved)
    assert not made._still_valid(plan) and made.stopped
    assert told(made) == [("inconclusive", "the cluster changed between the plan and the injection: llm/p1, llm/p2")]


def test_an_undo_that_would_restore_an_older_state_is_not_what_was_planned(tmp_path: Path) -> None:
    """In the steady window somebody releases eng:2: the same act, but its undo in the ledger would bring eng:1 back."""
    was, now = (Undo("template", "rollout", "eng", uid="u1", value=image) for image in ("eng:1", "eng:2"))
    made, plan = session(tmp_path, lambda plan: replace(plan, undos=(now,)))
    assert not made._still_valid(replace(plan, undos=(was,)))
    ((level, text),) = told(made)
    assert level == "inconclusive" and text.endswith("what the undo would restore (eng)")


def test_the_same_act_on_other_pods_is_not_what_was_planned(tmp_path: Path) -> None:
    made, plan = session(tmp_path, lambda plan: replace(plan, facts=replace(plan.facts, pods=("llm/p1", "llm/p2"))))
    assert not made._still_valid(plan)
    assert told(made)[0][1].endswith("the injection: llm/p2")


def test_a_target_that_is_gone_before_the_injection_is_inconclusive(tmp_path: Path) -> None:
    def gone(_: Plan) -> Plan:
        raise TargetError("no pod is ready")

    made, plan = session(tmp_path, gone)
    assert not made._still_valid(plan)
    ((level, text),) = told(made)
    assert level == "inconclusive" and "no pod is ready" in text
