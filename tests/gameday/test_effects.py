"""What the proofs tell besides: pods that a cut does not cover, and that a stop cut them short."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from planted import HARM, Plant

from faults.base import Cordoned, Cut, Dead, Evict, Mute, Newborn, Plan, Roll
from gameday import clock, effects as effects_
from gameday.cluster import Cluster, Node, Watched
from gameday.effects import Effects, lasting
from gameday.judge import judge
from gameday.model import Event, EvictionMark, FaultFacts, FaultMark, Note, PodMark, Step, Timeline
from gameday.objectives import Objectives, Success
from gameday.tape import Tape
from probes.kube import Watcher
from probes.reach import LOST, Seen

FACTS = FaultFacts("zone partition", "zone a is cut off", one_shot=False, lasting=60, pods=("llm/p",), zone="a")


def told(*marks: PodMark, cuts: str = "a") -> list[str]:
    tape = Tape(lambda _: None)
    for mark in marks:
        tape.emit(mark)
    nobody: Any = SimpleNamespace()
    Effects(Plan(FACTS, (), (), cuts=cuts), nobody, nobody, tape).tell_uncovered()
    return [event.text for event in tape.events if isinstance(event, Note) and event.level == "warning"]


def born(name: str, zone: str, *, covered: bool = False) -> tuple[PodMark, PodMark]:
    """A new pod has no node, and so no zone, until it is scheduled."""
    made = PodMark(1.0, f"llm/{name}", f"uid-{name}", "created", covered=covered)
    return made, PodMark(2.0, f"llm/{name}", f"uid-{name}", "scheduled", zone=zone, covered=True)


def test_pods_born_in_a_cut_zone_are_told() -> None:
    assert told(*born("late", "a")) == ["born in zone a after the injection, and so not cut off: llm/late"]


def test_pods_born_elsewhere_or_before_or_without_a_cut_are_not() -> None:
    assert told(*born("late", "b"), *born("early", "a", covered=True)) == []
    assert told(*born("late", "a"), cuts="") == []


def seen_last(*holds: bool, silent: bool = False) -> list[tuple[bool, str]]:
    """What the last look before the heal recorded, where the probers showed this one after the other."""
    tape, looks = Tape(lambda _: None), list(holds)

    def look(*_: object) -> Seen:
        return Seen(looks.pop(0) if len(looks) > 1 else looks[0], True, 1.0, 0.0, "as the probers see it")

    reach: Any = SimpleNamespace(look=look, silent=lambda _: ("a",) if silent else ())
    acts: Any = (SimpleNamespace(what="cut", proof=Cut("a")), SimpleNamespace(what="kill", proof=Dead(("llm/p",))))
    plan = Plan(FACTS, acts, ())
    assert lasting(plan) == ("cut",)  # a death need not last: what is dead does not come back under its address
    nobody: Any = SimpleNamespace()
    effects = Effects(plan, reach, nobody, tape)
    effects.last_look()
    assert not tape.events  # what never came to act cannot last
    looks[:0] = [True]
    assert effects.prove(acts[0], 0.0)
    effects.last_look()
    return [(event.ok, event.what) for event in tape.events if isinstance(event, FaultMark)][1:]


def test_a_lasting_effect_is_looked_at_right_before_the_heal() -> None:
    assert seen_last(True) == [(True, "cut")]


def test_one_odd_look_is_not_the_end_of_it() -> None:
    assert seen_last(False, True) == [(True, "cut")]


def test_an_effect_that_is_gone_before_the_heal_is_recorded() -> None:
    assert seen_last(False) == [(False, "cut")]
    assert seen_last(True, silent=True) == [(False, "cut")]  # the prober's last word is old


def mute(stage: str | None, *holds: bool, early: bool = False) -> list[tuple[bool, str]]:
    """What is recorded of a pod that was proven mute, answers (`holds` False) or not, and got a mark of this stage."""
    tape, looks = Tape(lambda _: None), [True, *holds]
    proven = clock.now()
    shown: Any = lambda *_: Seen(looks.pop(0) if len(looks) > 1 else looks[0], True, proven, proven, "")  # noqa: E731
    act: Any = SimpleNamespace(what="pod-hang", proof=Mute(("llm/p",), "health"))
    plan = Plan(FACTS, (act,), ())
    assert lasting(plan) == ("pod-hang",)
    nobody: Any = SimpleNamespace()
    effects = Effects(plan, SimpleNamespace(look=shown, silent=lambda _: ()), nobody, tape)  # type: ignore[arg-type]
    assert effects.prove(act, 0.0)
    if stage:
        tape.emit(PodMark(proven - 1 if early else clock.now(), "llm/p", "uid-p", stage))  # type: ignore[arg-type]
    for _ in range(LOST + 2):
        effects.watch()
    effects.last_look()
    return [(event.ok, event.what) for event in tape.events if isinstance(event, FaultMark)][1:]


def test_a_mute_pod_that_answers_again_by_itself_was_let_go_too_early() -> None:
    assert (False, "pod-hang") in mute(None, False)  # the Job's pod was evicted, and its trap let the process go on
    assert (False, "pod-hang") in mute("unready", False)
    assert (False, "pod-hang") in mute("restarted", False, early=True)  # before the fault


def test_a_mute_pod_stays_mute_or_is_noticed() -> None:
    assert mute(None, True) == [(True, "pod-hang")]
    assert mute("restarted", False) == [(True, "pod-hang")]
    assert mute("gone", False) == [(True, "pod-hang")]


# ── stopped while the proof is awaited ──────────────────────────────────────────────────────────

ASKED = Objectives(before=(Success(0.9),), during=(Success(0.1),))


def unproven(*more: Event) -> Timeline:
    """A run whose fault was injected, and ended before anybody saw it act."""
    whole = Plant(poisson=10).build()
    marks = [e for e in whole.events if not (isinstance(e, FaultMark) and e.step is Step.EFFECT)]
    return replace(whole, events=tuple(sorted((*marks, *more), key=lambda event: event.t)))


def verdict(run: Timeline) -> str:
    found = judge(run, ASKED)
    return f"{found.verdict}: {next(one.evidence for one in found.findings if one.objective == 'fault proven')}"


def test_a_breach_before_the_proof_is_a_failure_of_the_service() -> None:
    breach = Note(HARM + 3, "fail", "only 4 replicas are ready, the stop condition is 5")
    assert verdict(unproven(breach)).startswith("FAIL: a stop condition was met before")
    assert verdict(unproven()).startswith("INCONCLUSIVE")
    early = Note(HARM - 3, "fail", "before anything was done")
    assert verdict(unproven(early)).startswith("INCONCLUSIVE")


def test_a_breach_does_not_hide_an_effect_that_was_not_there() -> None:
    breach = Note(HARM + 3, "fail", "only 4 replicas are ready, the stop condition is 5")
    unseen = FaultMark(HARM + 2, Step.EFFECT, False, "partition", "3 pairs not as expected")
    assert verdict(unproven(unseen, breach)).startswith("INCONCLUSIVE")
    failed = FaultMark(HARM + 1, Step.INJECTED, False, "partition", "the selector selected nothing")
    assert verdict(unproven(failed, breach)).startswith("INCONCLUSIVE")


def test_a_proof_that_a_stop_cut_short_is_not_called_missing() -> None:
    tape = Tape(lambda _: None)
    act: Any = SimpleNamespace(what="partition", proof=Cut("a"), within=30.0)
    reach: Any = SimpleNamespace(look=lambda *_: Seen(False, False, 0, 0, "not yet"))
    nobody: Any = SimpleNamespace()
    effects = Effects(Plan(FACTS, (), ()), reach, nobody, tape)
    threading.Timer(0.2, tape.stop, ("fail", "only 4 replicas are ready")).start()
    assert not effects.prove(act, 0.0)
    assert [event.text for event in tape.events if isinstance(event, Note)] == ["only 4 replicas are ready"]
    assert not [event for event in tape.events if isinstance(event, FaultMark)]


# ── a drain that moves nobody ───────────────────────────────────────────────────────────────────


def test_a_drain_that_moved_nobody_is_not_proven_however_often_it_was_asked_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(effects_, "SHOWN_WITHIN", 0.2)
    act = Evict((("llm/p", "uid-p"),), within=3600, proof=Cordoned(("n1",)))

    def proven(*answers: Literal["accepted", "refused"], ends: str = "uid-p") -> tuple[bool, Tape]:
        tape = Tape(lambda _: None)
        watch = Watcher(Cluster.__new__(Cluster), {}, "", tape.emit)
        watch._nodes["uid-n1"] = Node("n1", "uid-n1", "a", True, True, 0)
        harm = clock.now()
        for answer in answers:
            tape.emit(EvictionMark(clock.now(), "llm/p", answer))
        watch._ending[ends] = clock.now()
        nobody: Any = SimpleNamespace()
        return Effects(Plan(FACTS, (act,), ()), nobody, watch, tape).prove(act, harm), tape

    assert proven("refused", "accepted")[0]
    assert not proven("accepted", ends="uid-q")[0], "accepted, but nobody saw it go"
    done, tape = proven("refused", "refused")
    (mark,) = [event for event in tape.events if isinstance(event, FaultMark)]
    assert not done and not mark.ok and mark.step is Step.EFFECT and "no eviction was accepted" in mark.detail
    assert tape.stopped


def test_an_update_that_somebody_takes_back_was_let_go_too_early() -> None:
    """Argo CD heals itself within seconds; the rollout had been proven once, and nobody looked again."""

    def looked(image: str, *, taken_back: bool) -> list[bool]:
        tape, nobody = Tape(lambda _: None), SimpleNamespace()
        watch = Watcher(nobody, {"app": "e"}, "e", tape.emit)  # type: ignore[arg-type]

        def born(what: Literal["ADDED", "DELETED"]) -> None:
            owners = [{"kind": "ReplicaSet", "name": "e-2"}]
            meta = {"name": "new", "namespace": "llm", "uid": "u2", "ownerReferences": owners}
            watch._on_pod(Watched(what, {"metadata": meta, "spec": {"containers": []}, "status": {}}), True)

        (act,) = acts = (Roll("e", "llm", "u", {}, Newborn("e", lasting=not image)),)
        effects = Effects(Plan(FACTS, acts, ()), nobody, watch, tape)  # type: ignore[arg-type]
        harm = clock.now()
        born("ADDED")
        assert effects.prove(act, harm)
        if taken_back:
            born("DELETED")
        for _ in range(LOST + 2):
            effects.watch()
        effects.last_look()
        return [one.ok for one in tape.events if isinstance(one, FaultMark)][1:]

    assert looked("", taken_back=False) == [True]
    assert False in looked("", taken_back=True)
    assert looked("bad", taken_back=True) == [], "that a bad version is taken back is what is hoped for"


# ── what nobody could prove ─────────────────────────────────────────────────────────────────────


def test_a_fault_that_nobody_could_see_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod was killed first, and then found to be out of every prober's reach."""
    monkeypatch.setattr(effects_, "SETTLES_WITHIN", 0.0)
    why = ["no prober could reach llm/p before"]
    settled: list[None] = []
    reach: Any = SimpleNamespace(blind=lambda _: why[0] if why else "", settle=lambda: settled.append(None))
    act: Any = SimpleNamespace(what="pod-kill", proof=Dead(("llm/p",)))
    tape, nobody = Tape(lambda _: None), SimpleNamespace()
    effects = Effects(Plan(FACTS, (act,), ()), reach, nobody, tape)  # type: ignore[arg-type]
    assert not effects.provable() and tape.stopped
    assert any("nothing was injected" in one.text for one in tape.events if isinstance(one, Note))
    why.clear()
    tape.resume()
    assert effects.provable() and not tape.stopped and len(settled) > 1


# ── a node that was reset must come back ────────────────────────────────────────────────────────

BEFORE = (Node("n1", "u1", "a", True, False, 0, boot="b1"), Node("n2", "u2", "b", True, False, 0, boot="c1"))


def back(*nodes: Node, proven: bool = True, later: tuple[Node, ...] = ()) -> list[FaultMark]:
    """What is recorded of n1, reset, where the watch shows these nodes at the heal, and `later` in the end."""
    tape = Tape(lambda _: None)
    shown = [BEFORE, nodes, later or nodes]
    watch: Any = SimpleNamespace(nodes=lambda: shown[0], exist=lambda _: False, ready_at=frozenset)
    reach: Any = SimpleNamespace()
    facts = replace(FACTS, name="node crash", one_shot=True)
    mute: Any = SimpleNamespace(what="cut", proof=Mute(("llm/p",), "health"))  # so that nobody asks for strays
    effects = Effects(Plan(facts, (mute,), (), resets=("n1",)), reach, watch, tape)
    assert effects.ready()
    if proven:
        effects._biting["node-crash"] = clock.now()
    shown.pop(0)
    effects.see_gone(Cluster.__new__(Cluster), "run")
    shown.pop(0)
    effects.see_back(0.3)
    return [event for event in tape.events if isinstance(event, FaultMark) and event.what == "n1"]


def test_a_node_that_stays_down_after_its_crash_is_a_mess_left_behind() -> None:
    (mark,) = back(replace(BEFORE[0], ready=False), BEFORE[1])
    assert mark.step is Step.GONE and not mark.ok and mark.detail.startswith("n1 is not Ready")
    whole = Plant(poisson=10).build()
    run = replace(whole, fault=replace(whole.fault, one_shot=True))
    assert judge(run, ASKED).verdict == "PASS"
    left = replace(run, events=(*run.events, replace(mark, t=run.events[-1].t)))
    assert judge(left, ASKED).verdict == "ERROR"
    (gone,) = back(BEFORE[1])
    assert not gone.ok and "no new node is ready in its place" in gone.detail


def test_a_crashed_node_counts_as_back_only_with_a_new_boot_or_as_a_new_machine() -> None:
    stale, again = BEFORE, replace(BEFORE[0], boot="b2")
    assert [one.ok for one in back(*stale)] == [False]  # the control plane has not noticed yet, or nothing happened
    assert [one.ok for one in back(again, BEFORE[1])] == [True]
    assert [one.ok for one in back(*stale, later=(again, BEFORE[1]))] == [True]
    assert [one.ok for one in back(replace(BEFORE[0], uid="u3", boot="b2"), BEFORE[1])] == [True]
    assert [one.ok for one in back(BEFORE[1], replace(BEFORE[0], name="n3", uid="u3"))] == [True]
    assert [one.ok for one in back(*stale, proven=False)] == [True], "a reset that never was leaves nothing to wait for"


def test_nothing_is_reset_that_the_watch_does_not_show() -> None:
    tape, watch = Tape(lambda _: None), SimpleNamespace(nodes=lambda: BEFORE)
    nobody: Any = watch
    assert not Effects(Plan(FACTS, (), (), resets=("n9",)), nobody, nobody, tape).ready()
    assert tape.stopped
