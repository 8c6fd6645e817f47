"""What the proofs tell besides: pods that a cut does not cover."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from faults.base import Plan
from gameday.effects import Effects
from gameday.model import FaultFacts, Note, PodMark
from gameday.tape import Tape

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
