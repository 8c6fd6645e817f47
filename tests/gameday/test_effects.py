"""What the proofs tell besides: pods that a cut does not cover."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from faults.base import Cut, Dead, Plan
from gameday.effects import Effects, lasting
from gameday.model import FaultFacts, FaultMark, Note, PodMark
from gameday.tape import Tape
from probes.reach import Seen

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
