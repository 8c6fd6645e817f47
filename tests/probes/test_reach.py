"""What probers may conclude: a failing connection proves something only if it worked before, and others still do."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from faults.base import Cut, Dead
from gameday.cluster import Node
from probes import reach
from probes.reach import Reach, Target, _Track

TARGETS = (("llm/engine-a", "a"), ("llm/engine-b", "b"), ("llm/engine-c", "c"))
PROBERS = tuple((f"gd-x-prober-{zone}", zone) for zone in "abc")


class World:
    """Three zones, one engine and one prober in each; `rounds` feeds what every prober sees."""

    def __init__(self) -> None:
        view: Any = SimpleNamespace(namespace="llm", probers=PROBERS)
        self.reach = Reach(None, view, "image", 60)  # type: ignore[arg-type]
        self.number = 0
        for _, zone in PROBERS:
            targets = tuple(Target(key, where, "10.244.0.1", 8000) for key, where in TARGETS)
            self.reach._tracks[zone] = _Track(zone, targets)

    def rounds(self, count: int, down: set[tuple[str, str]] = frozenset()) -> None:  # type: ignore[assignment]
        """`down`: (prober's zone, target's zone) pairs that fail."""
        for _ in range(count):
            self.number += 1
            for zone, track in self.reach._tracks.items():
                bits = "".join("0" if (zone, where) in down else "1" for _, where in TARGETS)
                self.reach._take(track, json.dumps({"n": self.number, "up": bits}))


@pytest.fixture
def world() -> World:
    made = World()
    made.rounds(3)
    made.reach.settle()
    return made


CUT_B = {("b", "a"), ("b", "c"), ("a", "b"), ("c", "b")}
ALL_TO_B = {("a", "b"), ("b", "b"), ("c", "b")}


def test_a_cut_is_proven_when_it_lasts_for_two_rounds(world: World) -> None:
    assert not world.reach.look(Cut("b")).holds
    world.rounds(1, CUT_B)
    first = world.reach.look(Cut("b"))
    assert first.holds and not first.settled
    world.rounds(1, CUT_B)
    assert world.reach.look(Cut("b")).settled


def test_a_leak_in_the_cut_is_no_cut(world: World) -> None:
    world.rounds(3, CUT_B - {("a", "b")})
    seen = world.reach.look(Cut("b"))
    assert not seen.holds and "a→llm/engine-b" in seen.detail


def test_everything_down_is_no_cut_for_there_is_no_control(world: World) -> None:
    world.rounds(3, {(one, other) for one in "abc" for other in "abc"})
    seen = world.reach.look(Cut("b"))
    assert not seen.holds and "reaches nothing at all" in seen.detail


def test_a_death_is_proven_by_all_who_could_reach_it(world: World) -> None:
    world.rounds(2, ALL_TO_B - {("c", "b")})
    assert not world.reach.look(Dead(("llm/engine-b",))).holds
    world.rounds(2, ALL_TO_B)
    assert world.reach.look(Dead(("llm/engine-b",))).settled


def test_what_was_never_reachable_proves_nothing_by_failing() -> None:
    """A NetworkPolicy, or a declared port on which nobody listens: it fails with the fault and without."""
    blocked = World()
    blocked.rounds(3, ALL_TO_B)
    blocked.reach.settle()
    blocked.rounds(3, ALL_TO_B)
    seen = blocked.reach.look(Dead(("llm/engine-b",)))
    assert not seen.holds and "before" in seen.detail


def test_every_pod_of_the_proof_must_have_been_seen(world: World) -> None:
    world.rounds(3, ALL_TO_B)
    seen = world.reach.look(Dead(("llm/engine-b", "llm/engine-unseen")))
    assert not seen.holds and "llm/engine-unseen" in seen.detail


def test_gone_is_seen_on_pods_that_are_ready_and_never_vacuously(world: World) -> None:
    world.rounds(3, CUT_B)
    ready = frozenset(key for key, _ in TARGETS)
    assert not world.reach.look_gone(Cut("b"), ready).holds
    world.rounds(3)
    assert world.reach.look_gone(Cut("b"), ready).settled
    nothing = world.reach.look_gone(Cut("b"), frozenset())
    assert not nothing.holds and "no pair" in nothing.detail


def test_a_pod_that_still_loads_does_not_hold_up_the_heal(world: World) -> None:
    world.rounds(3, {("a", "b"), ("c", "b")})  # engine-b itself is not back yet
    assert world.reach.look_gone(Cut("b"), frozenset({"llm/engine-a", "llm/engine-c"})).settled


def test_a_log_taken_up_anew_is_not_counted_twice(world: World) -> None:
    track = world.reach._tracks["a"]
    before = track.row["llm/engine-a"]
    for number in range(1, 4):
        world.reach._take(track, json.dumps({"n": number, "up": "000"}))
    assert track.row["llm/engine-a"] == before and track.up["llm/engine-a"]


def test_a_silent_prober_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = reach.clock.now()
    monkeypatch.setattr(reach.clock, "now", lambda: now + 10)
    assert world.reach.silent(3) == ("a", "b", "c")


def test_a_prober_tolerates_what_all_nodes_of_its_zone_are_tainted_with() -> None:
    def node(name: str, *taints: tuple[str, str], ready: bool = True) -> Node:
        return Node(name, f"uid-{name}", "a", ready, False, 0, taints=taints)

    ours, theirs = ("dedicated", "NoSchedule"), ("team", "NoExecute")
    nodes = (node("n1", ours, theirs), node("n2", ours), node("n3", ready=False))
    wanted = {"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}
    assert reach._tolerated(nodes, "a") == [wanted]
    assert reach._tolerated((*nodes, node("n4")), "a") == [], "one node without taints is enough"
    assert reach._tolerated(nodes, "b") == []
