"""A team's experiment: what counts as its effect, and what as a mess."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from faults.base import Call, Plan
from gameday import witness
from gameday.model import EndpointMark, Event, FaultFacts, FaultMark, NodeMark, PodMark, Step
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
    return Witness(Plan(FACTS, (Call("1. x", TEXT, 0, True),), ()), reach, watcher, tape, cluster), tape


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
