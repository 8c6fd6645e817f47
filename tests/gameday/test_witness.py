"""Whether a team's own experiment bites and leaves nothing behind: seen by us, whatever it says of itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from faults import ChaosToolkit
from faults.base import Call, Plan
from gameday import witness
from gameday.activities import parse
from gameday.cluster import Obj
from gameday.kinds import DEPLOYMENTS, NODES, PODCHAOS, Kind
from gameday.model import EndpointMark, Event, FaultFacts, FaultMark, NodeMark, Note, PodMark, Step
from gameday.tape import Tape
from gameday.witness import Witness

FACTS = FaultFacts("theirs", "Theirs", one_shot=False, lasting=60, pods=())
HERE = "tests_witness_theirs"


class World:
    """A cluster of one node and one Deployment, probers whose `broken` pairs are planted, and a tape."""

    namespace = "llm"

    def __init__(self) -> None:
        self.nodes: list[Obj] = [{"metadata": {"name": "n1"}, "spec": {}}]
        self.deployments: list[Obj] = [{"metadata": {"name": "engine"}, "spec": {"replicas": 3}}]
        self.chaos: list[Obj] = []
        self.pairs: tuple[str, ...] = ()
        self.tape = Tape(lambda _: None)

    def served(self, _: str) -> frozenset[str]:
        return frozenset({"podchaos"})

    def list(self, kind: Kind, _: str | None = None) -> list[Obj]:
        return {NODES: self.nodes, DEPLOYMENTS: self.deployments, PODCHAOS: self.chaos}[kind]

    def environment(self) -> dict[str, str]:
        return {}

    def broken(self) -> tuple[str, ...]:
        return self.pairs

    def said(self, step: Step) -> list[bool]:
        return [one.ok for one in self.tape.events if isinstance(one, FaultMark) and one.step is step]

    def notes(self) -> list[str]:
        return [f"{one.level}: {one.text}" for one in self.tape.events if isinstance(one, Note)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(witness, "SEEN_WITHIN", 0.2)
    monkeypatch.setattr(witness, "GONE_WITHIN", 0.2)
    return World()


def made(world: World, **more: Any) -> Witness:
    method = [{"name": "a", "type": "action", "provider": {"type": "process", "path": "true"}}]
    own = parse({"title": "x", "method": method, **more}, "x")
    stub: Any = world
    found = Witness(Plan(FACTS, (Call("1. a", own.text, 0, True),), ()), stub, stub, world.tape, stub)
    assert ChaosToolkit(own.text, 60).experiment == own.text
    return found


def probe(value: str, tolerance: Any, name: str = "theirs") -> dict[str, Any]:
    provider = {"type": "python", "module": HERE, "func": "says", "arguments": {"name": value}}
    return {"name": name, "type": "probe", "tolerance": tolerance, "provider": provider}


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What their probe says is in a file."""
    (tmp_path / f"{HERE}.py").write_text(
        f"import pathlib\ndef says(name): return pathlib.Path('{tmp_path}', name).exists()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, HERE, raising=False)
    return tmp_path


# ── the effect ──────────────────────────────────────────────────────────────────────────────────


def test_nothing_seen_to_change_is_no_effect(world: World) -> None:
    seen = made(world)
    assert seen.ready()
    world.tape.emit(PodMark(5.0, "llm/x", "u", "created"))
    world.tape.emit(PodMark(0.5, "llm/x", "u", "gone"))  # before the harm
    assert not seen.prove_all(since=1.0)
    assert world.said(Step.EFFECT) == [False] and world.tape.stopped
    assert "inconclusive: the method ran, but nothing was seen to change" in world.notes()[-1]


@pytest.mark.parametrize(
    "event",
    [
        PodMark(5.0, "llm/x", "u", "gone"),
        PodMark(5.0, "llm/x", "u", "restarted"),
        EndpointMark(5.0, "gateway", "llm/x", False, True),
        NodeMark(5.0, "n1", "not ready"),
        NodeMark(5.0, "n1", "cordoned"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_counts_as_an_effect(world: World, event: Event) -> None:
    seen = made(world)
    world.tape.emit(event)
    assert seen.prove_all(since=1.0) and world.said(Step.EFFECT) == [True]


def test_a_connection_that_broke_is_an_effect(world: World) -> None:
    world.pairs = ("a→llm/x",)
    assert made(world).prove_all(since=1.0)


def test_a_proof_of_theirs_must_hold_until_the_heal(world: World, theirs: Path) -> None:
    seen = made(world, extensions=[{"name": "gameday", "proof": [probe("slow", True)]}])
    assert not made(World(), extensions=[{"name": "gameday", "proof": [probe("slow", True)]}]).prove_all(1.0)
    (theirs / "slow").touch()
    assert seen.prove_all(since=1.0) and world.said(Step.EFFECT) == [True]
    (theirs / "slow").unlink()
    seen.demand_detection()
    assert world.said(Step.EFFECT) == [True, False], "lost before the heal, which the judge calls INCONCLUSIVE"


# ── their steady state ──────────────────────────────────────────────────────────────────────────


def test_their_steady_state_is_held_before_and_after(world: World, theirs: Path) -> None:
    (theirs / "fine").touch()
    seen = made(world, **{"steady-state-hypothesis": {"probes": [probe("fine", True)]}})
    assert seen.ready()
    seen.look_after()
    assert [note.split(":")[0] for note in world.notes()] == ["info", "info"]
    (theirs / "fine").unlink()
    seen.look_after()
    assert world.notes()[-1].startswith("fail: the experiment's own steady state after: ")
    assert not seen.ready() and world.tape.stopped
    assert "nothing was injected" in world.notes()[-1]


# ── what is left behind ─────────────────────────────────────────────────────────────────────────


def test_everything_as_before_is_gone(world: World) -> None:
    world.nodes[0]["spec"] = {"unschedulable": True}  # somebody else's cordon, there before
    seen = made(world)
    assert seen.ready()
    world.nodes.append({"metadata": {"name": "n2"}, "spec": {"taints": [{"key": "node.kubernetes.io/not-ready"}]}})
    world.nodes.pop()
    seen.see_gone(seen._cluster, "r1")
    assert world.said(Step.GONE) == [True]


@pytest.mark.parametrize("what", ["chaos", "cordon", "taint", "replicas", "deployment"])
def test_what_is_left_behind_is_told(world: World, what: str) -> None:
    seen = made(world)
    assert seen.ready()
    if what == "chaos":
        world.chaos.append({"metadata": {"name": "theirs"}})
    elif what == "cordon":
        world.nodes[0] = {"metadata": {"name": "n1"}, "spec": {"unschedulable": True}}
    elif what == "taint":
        world.nodes[0] = {"metadata": {"name": "n1"}, "spec": {"taints": [{"key": "theirs"}]}}
    elif what == "replicas":
        world.deployments[0] = {"metadata": {"name": "engine"}, "spec": {"replicas": 1}}
    else:
        world.deployments.clear()
    seen.see_gone(seen._cluster, "r1")
    assert world.said(Step.GONE) == [False]
    (mark,) = [one for one in world.tape.events if isinstance(one, FaultMark) and one.step is Step.GONE]
    assert mark.detail.startswith("left behind: ")
