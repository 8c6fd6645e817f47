"""Healing in the worst moments: an undo that hangs, an API server that is away, and nothing that is not ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from severed import line

from faults import undo as undoing
from faults.act import NotInjected, perform
from faults.base import CORDONED, MANAGED, RUN, Cordon, Undo
from gameday import clock, heal as heal_
from gameday.cluster import Cluster
from gameday.heal import Healer
from gameday.kinds import CONFIGMAPS, NODES, PODS
from gameday.ledger import Ledger, leftovers
from gameday.model import FaultMark, Note, Step
from gameday.tape import Tape

LABELS = {MANAGED: "gameday", RUN: "r1"}


@pytest.fixture(autouse=True)
def swept(cluster: Cluster) -> Iterator[None]:
    yield
    for found in cluster.list(NODES):
        cluster.delete(NODES, found["metadata"]["name"])
    for found in cluster.list(CONFIGMAPS, "llm", labels=f"{MANAGED}=gameday"):
        cluster.delete(CONFIGMAPS, found["metadata"]["name"], "llm")


def cordon(cluster: Cluster, *names: str) -> list[Undo]:
    undos = []
    for name in names:
        metadata = {"name": name, "annotations": {CORDONED: "t1"}}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"unschedulable": True}}
        uid = cluster.create(NODES, node)["metadata"]["uid"]
        undos.append(Undo("uncordon", "cordon", name, uid=uid, value="t1"))
    return undos


def stuck_pod(cluster: Cluster, name: str) -> Undo:
    """What no delete takes away until its finalizer is lifted."""
    metadata = {"name": name, "namespace": "llm", "labels": LABELS, "finalizers": ["example.org/held"]}
    spec = {"containers": [{"name": "c", "image": "busybox:1.36"}]}
    cluster.create(PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    return Undo("delete", "held", name, kind="Pod", namespace="llm")


def release(cluster: Cluster, name: str) -> None:
    if cluster.find(PODS, name, "llm"):
        cluster.patch(PODS, name, {"metadata": {"finalizers": None}}, "llm")


def healer(cluster: Cluster, undos: list[Undo], tmp_path: Path, within: float) -> tuple[Healer, Tape]:
    tape = Tape(lambda _: None)
    ledger = Ledger(cluster, tmp_path / "ledger.jsonl", "gd-t1-ledger", LABELS)
    ledger.write(undos)
    return Healer(cluster, ledger, undos, tape, within), tape


def cordoned(cluster: Cluster) -> list[str]:
    return [node.name for node in cluster.nodes() if node.unschedulable]


def steps(tape: Tape) -> list[tuple[str, bool]]:
    return [(e.what, e.ok) for e in tape.events if isinstance(e, FaultMark) and e.step is Step.RECOVERED]


def test_undos_that_hang_eat_nobodys_time(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hang for all of their time; the two after them are done long before that."""
    monkeypatch.setattr(heal_, "PATIENCE", 0.3)
    stuck = [stuck_pod(cluster, f"held-{number}") for number in range(3)]
    undos = [*stuck, *cordon(cluster, "n1", "n2")]
    made, tape = healer(cluster, undos, tmp_path, within=6)
    seen: list[float] = []
    begun = clock.now()

    def look() -> None:
        clock.wait_until(lambda: cordoned(cluster) == [], within=60, what="both nodes uncordoned")
        seen.append(clock.now() - begun)

    watcher = threading.Thread(target=look)
    watcher.start()
    assert not made.heal()
    whole = clock.now() - begun
    watcher.join()
    assert seen[0] < whole - 1, f"uncordoned after {seen[0]:.1f} of {whole:.1f} s"
    assert sorted(steps(tape)) == [("cordon", True)] * 2 + [("held", False)] * 3
    assert [entry.name for _, entry in leftovers(cluster)[0].entries] == ["held-0", "held-1", "held-2"]
    for entry in stuck:
        release(cluster, entry.name)
    assert made.heal() and leftovers(cluster)[0].entries == ()


def test_an_api_server_that_is_away_is_tried_until_it_is_back(
    cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    """It is away for longer than an undo may take; the fault has not ended by itself yet."""
    undos = cordon(cluster, "n1", "n2")
    with line(kubeconfig, tmp_path) as api:
        through = Cluster.connect(context="gameday-sandbox", kubeconfig=api.kubeconfig, namespace="llm")
        made, tape = healer(through, undos, tmp_path, within=1)
        api.cut()
        threading.Timer(4, api.join).start()
        begun = clock.now()
        assert made.heal(until=clock.now() + 60), tape.events
        took = clock.now() - begun
    assert cordoned(cluster) == [] and 4 <= took < 20
    assert api.refused < 40, "tried again with back-off, not in a rush"
    assert steps(tape) == [("cordon", True)] * 2


def test_an_api_server_that_never_comes_back_is_given_up_at_the_faults_own_end(
    cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    undos = cordon(cluster, "n1")
    with line(kubeconfig, tmp_path) as api:
        through = Cluster.connect(context="gameday-sandbox", kubeconfig=api.kubeconfig, namespace="llm")
        made, tape = healer(through, undos, tmp_path, within=0.5)
        api.cut()
        begun = clock.now()
        assert not made.heal(until=clock.now() + 3)
        assert 3 <= clock.now() - begun < 20
    (told,) = [event.text for event in tape.events if isinstance(event, Note)]
    assert "does not answer" in told and "by hand: kubectl uncordon n1" in told
    assert [entry for _, entry in leftovers(cluster)[0].entries] == undos, (
        "it is still in the ledger, for `gameday heal`"
    )


def test_whoever_cordons_at_the_same_instant_is_not_overruled(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and our patch somebody takes the node over (their mark replaces ours)."""
    (entry,) = cordon(cluster, "n1")
    real = Cluster.find

    def find(self: Cluster, *given: Any, **more: Any) -> Any:
        found = real(self, *given, **more)
        monkeypatch.setattr(Cluster, "find", real)
        self.patch(NODES, "n1", {"metadata": {"annotations": {CORDONED: "t2"}}})
        return found

    monkeypatch.setattr(Cluster, "find", find)
    assert "not cordoned by us" in undoing.undo(cluster, entry, within=5)
    assert cordoned(cluster) == ["n1"]


# ── cordoning, while others work on the same nodes ──


def ready_node(cluster: Cluster, name: str) -> str:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {}}
    return str(cluster.create(NODES, node)["metadata"]["uid"])


def perform_cordon(cluster: Cluster, uid: str) -> str:
    return perform(cluster, Cordon((("n1", uid),), "t1"), threading.Event())


def meanwhile(monkeypatch: pytest.MonkeyPatch, patch: dict[str, Any]) -> None:
    """Somebody changes n1 between our look and our patch."""
    real = Cluster.get

    def get(self: Cluster, *given: Any, **more: Any) -> Any:
        found = real(self, *given, **more)
        monkeypatch.setattr(Cluster, "get", real)
        self.patch(NODES, "n1", patch)
        return found

    monkeypatch.setattr(Cluster, "get", get)


def test_a_node_that_was_replaced_after_the_plan_is_not_cordoned(cluster: Cluster) -> None:
    """Its undo speaks of the one before, and would leave the cordon on the new one."""
    ready_node(cluster, "n1")
    with pytest.raises(NotInjected, match="n1 was replaced after the plan"):
        perform_cordon(cluster, "of-the-one-before")
    assert cordoned(cluster) == []


def test_an_operator_who_cordons_between_our_look_and_our_patch_keeps_the_cordon(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = ready_node(cluster, "n1")
    meanwhile(monkeypatch, {"spec": {"unschedulable": True}})
    with pytest.raises(NotInjected, match="cordoned by somebody else"):
        perform_cordon(cluster, uid)
    entry = Undo("uncordon", "cordon", "n1", uid=uid, value="t1")
    assert "not cordoned by us" in undoing.undo(cluster, entry, within=5)
    assert cordoned(cluster) == ["n1"]


def test_a_kubelet_that_writes_between_our_look_and_our_patch_is_no_conflict(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = ready_node(cluster, "n1")
    meanwhile(monkeypatch, {"metadata": {"annotations": {"kubelet": "was here"}}})
    assert perform_cordon(cluster, uid) == "1 node(s) cordoned"
    assert perform_cordon(cluster, uid), "our own cordon, whose answer was lost, is none of somebody else"
    assert [node.cordoned_by for node in cluster.nodes()] == ["t1"]


# ── a pod-failure that is still in force ──


@pytest.fixture
def paused(cluster: Cluster) -> Iterator[Undo]:
    """A pod with Chaos Mesh's pause image, whose resource is already gone; and the undo that waits for the pod."""
    spec = {"containers": [{"name": "c", "image": "gcr.io/google-containers/pause"}]}
    metadata = {"name": "failed", "namespace": "llm", "labels": {"app": "engine"}}
    cluster.create(PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    yield Undo("delete", "pod-failure", "gone", kind="Pod", namespace="llm", running=("llm/failed",))
    cluster.delete(PODS, "failed", "llm", grace=0)


def test_a_stop_does_not_strike_a_pod_failure_that_is_still_in_force(
    cluster: Cluster, tmp_path: Path, paused: Undo
) -> None:
    made, tape = healer(cluster, [paused], tmp_path, within=0.5)
    tape.stop("fail", "success fell below the stop condition")
    assert not made.heal()
    assert steps(tape) == [("pod-failure", False)]
    assert [entry for _, entry in leftovers(cluster)[0].entries] == [paused], "for `gameday heal`"


def test_a_stop_lets_the_next_undo_wait_for_the_pause_image_but_not_for_ready(
    cluster: Cluster, tmp_path: Path, paused: Undo
) -> None:
    """The partition goes after the pod-failure, in a hurry as well; that the pod is not Ready holds nobody up."""
    made, tape = healer(cluster, [paused, *cordon(cluster, "n1")], tmp_path, within=30)
    tape.stop("fail", "success fell below the stop condition")
    seen: list[list[str]] = []

    def recover() -> None:
        seen.append(cordoned(cluster))
        own = [{"op": "replace", "path": "/spec/containers/0/image", "value": "engine:v1"}]
        cluster.patch(PODS, "failed", own, "llm", type="json")

    threading.Timer(heal_.HURRIED + 1, recover).start()
    begun = clock.now()
    assert made.heal() and clock.now() - begun < 25, "it never becomes Ready here"
    assert seen == [["n1"]] and steps(tape) == [("pod-failure", True), ("cordon", True)]
