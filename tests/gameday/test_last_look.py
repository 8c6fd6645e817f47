"""The last look at a team's own proofs, right before the heal, does not keep their fault in force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from faults.base import Call, Plan
from gameday import clock, witness
from gameday.activities import parse
from gameday.model import FaultFacts, FaultMark, Note
from gameday.tape import Tape
from gameday.witness import Witness

FACTS = FaultFacts("theirs", "Theirs", one_shot=False, lasting=60, pods=())


def test_proofs_that_hang_right_before_the_heal_do_not_keep_the_fault_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together have a few seconds; pauses are not waited for either."""
    monkeypatch.setattr(witness, "LAST_LOOK", 0.3)
    hangs = {"name": "h", "type": "probe", "tolerance": True, "pauses": {"before": 60}}
    hangs["provider"] = {"type": "python", "module": "gameday.clock", "func": "pause", "arguments": {"for_seconds": 3}}
    plain = {
        "title": "x",
        "method": [{"name": "a", "type": "action", "provider": {"type": "process", "path": "true"}}],
        "extensions": [{"name": "gameday", "proof": [hangs, hangs | {"name": "i"}]}],
    }
    tape, nobody = Tape(lambda _: None), SimpleNamespace(environment=dict)
    stub: Any = nobody
    act = Call("1. a", parse(plain, "x").text, 0, True)
    seen = Witness(Plan(FACTS, (act,), ()), stub, stub, tape, stub)
    seen._proven = True
    begun = clock.now()
    seen.demand_detection()
    assert clock.now() - begun < 30
    assert [one.ok for one in tape.events if isinstance(one, FaultMark)] == [False]
    assert "'h' has not ended" in next(one.text for one in tape.events if isinstance(one, Note))
