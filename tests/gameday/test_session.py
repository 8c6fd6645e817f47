"""The orchestrator where it matters most: nothing keeps it from healing, and nothing senseless begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from faults import NodeDrain, PodHang, PodKill, PodStop, Zone, ZonePartition, undo as undoing
from faults.base import CORDONED, Plan, Roll, Undo, View
from gameday import clock
from gameday.cluster import Cluster, Node, Pod
from gameday.errors import ClusterError, ExperimentError, RecordError
from gameday.heal import Healer
from gameday.kinds import CONFIGMAPS, LEASES, NODES
from gameday.ledger import Ledger
from gameday.lock import NAME, Lock
from gameday.model import FaultFacts, FaultMark, Note, Sample, Step
from gameday.objectives import Objectives, Recovers, Success
from gameday.run import Session, Spec, again
from gameday.settings import load
from loadgen.traffic import Chat

FACTS = FaultFacts("test", "two nodes", one_shot=False, lasting=60, pods=("llm/p",))


def spec(lasting: float = 60, **objectives: Any) -> Spec:
    asked = {"before": (Success(0.9),), "after": (Recovers(within=20, hold=10),)} | objectives
    return Spec("drill", Chat(per_second=1), PodKill(lasting=lasting), Objectives(**asked))


def session(tmp_path: Path, cluster: Any = None, *, say: Any = lambda _: None, **settings: Any) -> Session:
    given = {"scrape_interval": 1, "steady": 8, "hold": 8, "heal_within": 3, "selector": "app=x"} | settings
    arena: Any = SimpleNamespace(
        cluster=cluster,
        settings=load(given),
        run_id="r1",
        root=tmp_path,
        seed=7,
        sandbox=True,
        say=say,
        progress=lambda _: None,
        reproduce=str,
        prometheus=None,
    )
    return Session(arena, spec())


def aimed(made: Session, cluster: Cluster, tmp_path: Path) -> list[str]:
    """Two nodes cordoned by us, in the ledger, as if the harm had just been done."""
    undos = []
    for name in ("n1", "n2"):
        metadata = {"name": name, "annotations": {CORDONED: "t1"}}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"unschedulable": True}}
        uid = cluster.create(NODES, node)["metadata"]["uid"]
        undos.append(Undo("uncordon", "cordon", name, uid=uid, value="t1"))
    ledger = Ledger(cluster, tmp_path / "ledger.jsonl", "gd-t1-ledger", {"app.kubernetes.io/managed-by": "gameday"})
    ledger.write(undos)
    made._ledger, made._harm = ledger, 1.0
    made._plan = Plan(FACTS, (), tuple(undos))
    made._healer = Healer(cluster, ledger, undos, made.tape, within=3)
    return ["n1", "n2"]


@pytest.fixture(autouse=True)
def swept(cluster: Cluster) -> Any:
    yield
    for found in cluster.list(NODES):
        cluster.delete(NODES, found["metadata"]["name"])
    for found in cluster.list(CONFIGMAPS, "llm", labels="app.kubernetes.io/managed-by=gameday"):
        cluster.delete(CONFIGMAPS, found["metadata"]["name"], "llm")


def cordoned(cluster: Cluster) -> list[str]:
    return [node.name for node in cluster.nodes() if node.unschedulable]


class FullDisk:
    def event(self, _: object) -> None:
        raise OSError(28, "No space left on device")

    sample = event

    def close(self) -> None:
        pass


def test_a_full_disk_does_not_keep_us_from_healing(cluster: Cluster, tmp_path: Path) -> None:
    made = session(tmp_path, cluster)
    aimed(made, cluster, tmp_path)
    made.tape._recorder = FullDisk()  # type: ignore[assignment]
    made.heal()
    assert cordoned(cluster) == []
    with pytest.raises(RecordError, match="No space left"):
        made.conclude()


def test_a_record_that_cannot_be_flushed_is_broken_and_raises_nothing(tmp_path: Path) -> None:
    class Full(FullDisk):
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    made = session(tmp_path)
    made.tape._recorder = Full()  # type: ignore[assignment]
    made.tape.close()
    assert "No space left" in made.tape.broken


def test_a_dead_console_does_not_keep_us_from_healing(cluster: Cluster, tmp_path: Path) -> None:
    def say(_: str) -> None:
        raise BrokenPipeError

    made = session(tmp_path, cluster, say=say)
    aimed(made, cluster, tmp_path)
    made.stop("error", "interrupted")
    made.heal()
    assert cordoned(cluster) == []


def test_one_undo_that_fails_does_not_keep_the_next_from_being_done(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = undoing.Work._step

    def fails_once(self: undoing.Work) -> str | None:
        if self.entry.name == "n1":
            raise ClusterError("n1 cannot be undone")
        return real(self)

    made = session(tmp_path, cluster)
    aimed(made, cluster, tmp_path)
    monkeypatch.setattr(undoing.Work, "_step", fails_once)
    made.heal()
    assert cordoned(cluster) == ["n1"]
    marks = [event for event in made.tape.events if isinstance(event, FaultMark)]
    assert [mark.ok for mark in marks if mark.step is Step.HEALED] == [False]
    assert any(isinstance(event, Note) and event.level == "error" for event in made.tape.events)
    monkeypatch.setattr(undoing.Work, "_step", real)
    made.heal()
    assert cordoned(cluster) == []


class Looks:
    """The proofs' last looks, each of which does something odd."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.last_look = self.demand_detection = self.tell_uncovered = happens

    def see_gone(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("wrong", [ClusterError("the API server is away"), KeyError("a bug")])
def test_a_last_look_that_raises_does_not_keep_us_from_undoing(
    wrong: Exception, cluster: Cluster, tmp_path: Path
) -> None:
    def happens() -> None:
        raise wrong

    made = session(tmp_path, cluster)
    aimed(made, cluster, tmp_path)
    made._effects = Looks(happens)  # type: ignore[assignment]
    made.heal()
    assert cordoned(cluster) == [] and made._healed
    told = [event for event in made.tape.events if isinstance(event, Note)]
    assert [one.level for one in told] == ["inconclusive"] * 3, "nobody knows whether it acted to the end"


def test_the_guard_stays_armed_until_the_fault_is_undone(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, armed = session(tmp_path, cluster), []
    aimed(made, cluster, tmp_path)
    guard: Any = SimpleNamespace(harm=1.0)
    made._guard = guard
    made._effects = Looks(lambda: armed.append(guard.harm))  # type: ignore[assignment]
    real = undoing.Work._step

    def step(self: undoing.Work) -> str | None:
        armed.append(guard.harm)
        if "n2" not in failing:
            return real(self)
        raise ClusterError("n2 cannot be undone")

    failing = ["n2"]
    monkeypatch.setattr(undoing.Work, "_step", step)
    made.heal()
    assert guard.harm == 1.0 and set(armed) == {1.0}, "it is not undone, so it is in force"
    failing.clear()
    made.heal()
    assert guard.harm is None and set(armed) == {1.0}


def test_an_error_after_the_first_stop_is_noted(tmp_path: Path) -> None:
    made = session(tmp_path)
    made.stop("inconclusive", "the effect was lost")
    made.stop("inconclusive", "a second look")
    made.interrupt(15)
    told = [(event.level, event.text) for event in made.tape.events if isinstance(event, Note)]
    assert [level for level, _ in told] == ["inconclusive", "error"]
    assert made.interrupted == 15


@pytest.mark.parametrize("harmed", [False, True])
def test_a_teams_rollbacks_run_only_where_its_method_began(
    harmed: bool, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steady state is not reached, nothing is injected: a rollback would change what was never changed."""
    made = session(tmp_path, cluster)
    aimed(made, cluster, tmp_path)
    assert made._plan is not None
    entry = Undo("rollback", "rollbacks", "theirs", value="{}")
    ledger = Ledger(cluster, tmp_path / "l.jsonl", "gd-t2-ledger", {"app.kubernetes.io/managed-by": "gameday"})
    ledger.write([entry])
    made._harm = 1.0 if harmed else None
    made._healer = Healer(cluster, ledger, [entry], made.tape, within=3)
    ran: list[str] = []
    monkeypatch.setattr(undoing.Work, "_roll_back", lambda self: ran.append(self.entry.name) or "done")
    made.heal()
    assert made._healed and ran == (["theirs"] if harmed else [])
    assert not cluster.get(CONFIGMAPS, "gd-t2-ledger", "llm").get("data")


@pytest.mark.parametrize("what", ["lease", "ledger"])
def test_nothing_is_injected_once_lock_or_ledger_are_gone(what: str, cluster: Cluster, tmp_path: Path) -> None:
    """A laptop sleeps in the steady window, and somebody runs `gameday heal` meanwhile."""
    made = session(tmp_path, cluster)
    made._lock = Lock(cluster, "r1/drill", {"app.kubernetes.io/managed-by": "gameday"}, cluster_wide=False)
    made._lock.acquire(on_lost=print)
    aimed(made, cluster, tmp_path)
    made._harm = None
    assert made._plan is not None
    sent: list[str] = []
    act = Roll("engine", "llm", "u", {})
    made._plan = replace(made._plan, acts=(act,))
    made._effects = SimpleNamespace(ready=lambda: True, provable=lambda: True)  # type: ignore[assignment]
    made._still_valid = made._may_begin = lambda _: True  # type: ignore[method-assign]
    made._begin_harm = lambda *_: sent.append("harm")  # type: ignore[method-assign]
    if what == "lease":
        cluster.delete(LEASES, NAME, "llm")
    else:
        cluster.delete(CONFIGMAPS, "gd-t1-ledger", "llm")
    made.inject()
    made._lock.release()
    assert sent == [] and made._harm is None
    assert [event.level for event in made.tape.events if isinstance(event, Note)] == ["error"]


def engine(name: str, node: str = "n1", zone: str = "a", *, ready: bool = True) -> Pod:
    labels, ports, owner = {"app": "x"}, (8000,), "ReplicaSet/e-1"
    return Pod(
        name, "llm", f"u-{name}", node, zone, "10.0.0.1", "Running", ready, False, labels, 0, False, ports, 0, owner,
        "c", "",
    )  # fmt: skip


def seen(pods: tuple[Pod, ...]) -> View:
    nodes = tuple(Node(f"n{i}", f"u{i}", zone, True, False, 0) for i, zone in enumerate("abc", 1))
    return View("llm", "app=x", pods, pods, nodes, "t", (), {}, 7, 1.0, True, True, True)


def stays_valid(fault: Any, before: tuple[Pod, ...], now: tuple[Pod, ...], tmp_path: Path) -> bool:
    """Whether a plan that was made for the one is good for the other."""
    made = session(tmp_path)
    made.spec = replace(made.spec, fault=fault)
    made._before = seen(before)
    made.view = lambda: seen(now)  # type: ignore[method-assign]
    valid = made._still_valid(fault.plan(made._before))
    assert valid is not made.stopped
    return valid


def test_engines_that_an_autoscaler_adds_in_the_steady_window_are_beside_the_fault(tmp_path: Path) -> None:
    """Our load makes it add some, and the draw came out otherwise: every run beside an autoscaler was INCONCLUSIVE."""
    before = tuple(engine(f"e{i}", f"n{i % 3 + 1}", "abc"[i % 3]) for i in range(6))
    more = tuple(engine(f"a{i}", "n1", "a") for i in range(4))
    loading = (*before, engine("e9", ready=False))
    for number, fault in enumerate((PodKill(60), PodStop(60), PodHang(60), PodKill(60, count=2))):
        where = tmp_path / str(number)
        assert stays_valid(fault, before, (*more, *before), where)
        assert stays_valid(fault, loading, (*before, engine("e9")), where), "it was there, and is ready now"
        assert not stays_valid(fault, before, before[:3], where), "targets may be among those that have gone"


def test_a_pod_that_comes_into_a_cut_or_onto_a_drained_node_changes_the_plan(tmp_path: Path) -> None:
    before = tuple(engine(f"e{i}", f"n{i % 3 + 1}", "abc"[i % 3]) for i in range(6))
    (drained,) = NodeDrain(60).plan(seen(before)).facts.nodes
    others = [node for node in ("n1", "n2", "n3") if node != drained]
    assert not stays_valid(NodeDrain(60), before, (*before, engine("new", drained)), tmp_path)
    assert stays_valid(NodeDrain(60), before, (*before, engine("new", others[0])), tmp_path)
    assert not stays_valid(ZonePartition(Zone("a"), 60), before, (*before, engine("new", "n2", "b")), tmp_path)


def test_a_stop_condition_that_is_met_already_is_not_the_faults_doing(tmp_path: Path) -> None:
    """It ended the fault in its first second, and the service had failed."""
    value: list[float | None] = [9.0]

    class Answers:
        def sample(self, name: str, query: str) -> Sample:
            return Sample(clock.now(), query, name, value[0], error="" if value[0] is not None else "no data")

    def begins(number: int, **settings: Any) -> tuple[bool, str]:
        made = session(tmp_path / str(number), **settings)
        made._arena.prometheus = Answers()  # type: ignore[misc, assignment]
        made._watcher = cast(Any, SimpleNamespace(engines=lambda: (engine("e1"), engine("e2", ready=False))))
        good = made._may_begin(Plan(FACTS, (), ()))
        assert good is not made.stopped
        return good, " ".join(event.text for event in made.tape.events if isinstance(event, Note))

    queue = {"stop_when": ["sum(queue) > 8"]}
    assert "sum(queue) > 8 is met already: 9" in begins(1, **queue)[1]
    value[0] = None
    assert "is not known (no data)" in begins(2, **queue)[1]
    value[0] = 3.0
    assert begins(3, **queue) == (True, "")
    assert "only 1 replicas are ready, the stop condition is 2" in begins(4, stop_replicas=2)[1]
    assert begins(5, stop_replicas=1) == (True, "")


# ── what may not begin ──────────────────────────────────────────────────────────────────────────


def refuse(tmp_path: Path, wanted: Spec, told: str, **settings: Any) -> None:
    made = session(tmp_path, **settings)
    made.spec = wanted
    with pytest.raises(ExperimentError, match=told):
        made.check_spec()


def test_a_fault_that_ends_before_the_rto_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, spec(lasting=25), "less than RTO")
    session(tmp_path).check_spec()


def test_an_experiment_without_a_steady_state_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, spec(before=()), "no steady state")


def test_windows_that_prometheus_cannot_confirm_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, spec(), "shorter than 4 scrape intervals", scrape_interval=15)


def test_a_selector_that_we_cannot_follow_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, spec(), "key=value", selector="app in (a, b)")


def test_a_later_trial_is_repeated_by_as_many_trials() -> None:
    assert again("pytest experiments -k x --seed 7", 1) == "pytest experiments -k x --seed 7"
    assert again("pytest experiments -k x --seed 7", 3) == "pytest experiments -k x --seed 7 --trials 3"


def test_untouched_is_only_what_was_looked_at_and_found_clean(cluster: Cluster, tmp_path: Path) -> None:
    made = session(tmp_path, cluster)
    assert made.untouched, "it never came to anything"
    made._lock = object()  # type: ignore[assignment]
    assert not made.untouched, "nobody looked"
    made.tape.mark(Step.CLEAN, True)
    assert made.untouched
    made._harm = 1.0
    assert not made.untouched
    made._harm = None
    made.tape.mark(Step.CLEAN, False, detail="Pod gd-prober")
    assert not made.untouched


def test_nodes_that_were_reset_are_looked_for_in_the_end(cluster: Cluster, tmp_path: Path) -> None:
    made = session(tmp_path, cluster)
    asked: list[float] = []
    made._effects = cast(Any, SimpleNamespace(see_back=asked.append))
    made.finish()
    assert asked == [], "nothing was harmed"
    made = session(tmp_path, cluster)
    made._effects, made._harm = cast(Any, SimpleNamespace(see_back=asked.append)), 1.0
    made.finish()
    assert asked == [made._settings.heal_within]
