"""A team's own probes as proof and as steady state: they must hold to the end, and the last look is a short one."""

from __future__ import annotations

import sys
from pathlib import Path
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
HERE = "tests_last_look_theirs"


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What their probe says is whether a file is there."""
    text = f"import pathlib\ndef says(name): return pathlib.Path({str(tmp_path)!r}, name).exists()\n"
    (tmp_path / f"{HERE}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, HERE, raising=False)
    return tmp_path


def says(name: str) -> dict[str, Any]:
    provider = {"type": "python", "module": HERE, "func": "says", "arguments": {"name": name}}
    return {"name": name, "type": "probe", "tolerance": True, "provider": provider}


def made(**more: Any) -> tuple[Witness, Tape]:
    method = [{"name": "a", "type": "action", "provider": {"type": "process", "path": "true"}}]
    own = parse({"title": "x", "method": method, **more}, "x")
    tape = Tape(lambda _: None)
    empty: Any = SimpleNamespace(environment=dict, kinds=lambda _: (), list=lambda *_: [], engines=lambda: ())
    return Witness(Plan(FACTS, (Call("1. a", own.text, 0, True),), ()), empty, empty, tape, empty, ("llm",)), tape


def proof(*probes: dict[str, Any]) -> dict[str, Any]:
    return {"extensions": [{"name": "gameday", "proof": list(probes)}]}


def effects(tape: Tape) -> list[bool]:
    return [one.ok for one in tape.events if isinstance(one, FaultMark)]


def notes(tape: Tape) -> list[tuple[str, str]]:
    return [(one.level, one.text) for one in tape.events if isinstance(one, Note)]


def test_a_proof_of_theirs_must_hold_until_the_heal(theirs: Path) -> None:
    unseen, _ = made(**proof(says("slow")))
    assert not unseen.prove_all(since=1.0)
    (theirs / "slow").touch()
    seen, tape = made(**proof(says("slow")))
    assert seen.prove_all(since=1.0) and effects(tape) == [True]
    (theirs / "slow").unlink()
    seen.demand_detection()
    assert effects(tape) == [True, False], "lost before the heal, which the judge calls INCONCLUSIVE"


def test_proofs_that_hang_right_before_the_heal_do_not_keep_the_fault_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together have a few seconds; pauses are not waited for either."""
    monkeypatch.setattr(witness, "LAST_LOOK", 0.3)
    hangs = {"name": "h", "type": "probe", "tolerance": True, "pauses": {"before": 60}}
    hangs["provider"] = {"type": "python", "module": "gameday.clock", "func": "pause", "arguments": {"for_seconds": 3}}
    seen, tape = made(**proof(hangs, hangs | {"name": "i"}))
    seen._proven = True
    begun = clock.now()
    seen.demand_detection()
    assert clock.now() - begun < 30 and effects(tape) == [False]
    assert "'h' has not ended" in notes(tape)[-1][1]


def test_their_steady_state_is_held_before_and_after(theirs: Path) -> None:
    (theirs / "fine").touch()
    seen, tape = made(**{"steady-state-hypothesis": {"probes": [says("fine")]}})
    assert seen.ready()
    seen.look_after()
    assert [level for level, _ in notes(tape)] == ["info", "info"]
    (theirs / "fine").unlink()
    seen.look_after()
    level, text = notes(tape)[-1]
    assert level == "fail" and text.startswith("the experiment's own steady state after: ")
    assert not seen.ready() and tape.stopped
    assert "nothing was injected" in notes(tape)[-1][1]
