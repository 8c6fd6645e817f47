"""What probers may conclude: a failing connection proves something only if it worked before, and others still do."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from faults.base import Cut, Dead, Mute, Plan
from gameday.cluster import Node
from gameday.errors import ClusterError, MissingCapability
from gameday.model import FaultFacts
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


def at(*keys: str, ip: str = "10.244.0.1") -> frozenset[tuple[str, str]]:
    """Ready pods at their addresses."""
    return frozenset((key, ip) for key in keys)


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
    ready = at(*(key for key, _ in TARGETS))
    assert not world.reach.look_gone(Cut("b"), ready).holds
    world.rounds(3)
    assert world.reach.look_gone(Cut("b"), ready).settled
    nothing = world.reach.look_gone(Cut("b"), frozenset())
    assert not nothing.holds and "no pair" in nothing.detail


def test_a_pod_that_still_loads_does_not_hold_up_the_heal(world: World) -> None:
    world.rounds(3, {("a", "b"), ("c", "b")})  # engine-b itself is not back yet
    assert world.reach.look_gone(Cut("b"), at("llm/engine-a", "llm/engine-c")).settled


def test_a_pod_that_came_back_at_another_address_is_not_waited_for_at_its_old_one(world: World) -> None:
    """A StatefulSet's pods keep their names: after each replacement the fault was never seen to be gone."""
    world.rounds(3, {("a", "b"), ("c", "b")})
    ready = at("llm/engine-a", "llm/engine-c") | at("llm/engine-b", ip="10.244.0.77")
    assert world.reach.look_gone(Cut("b"), ready).settled


def test_a_prober_on_a_node_that_is_reset_has_no_word_in_it(world: World) -> None:
    """One node per zone: the zone's prober died with the node, and its last word was that all is well."""
    dead = Dead(("llm/engine-b",))
    for doomed, holds in ((False, False), (True, True)):
        world.reach._tracks["b"].doomed = doomed
        for _ in range(3):
            world.number += 1
            for zone in "ac":
                world.reach._take(world.reach._tracks[zone], json.dumps({"n": world.number, "up": "101"}))
        assert world.reach.look(dead).holds is holds
    for track in world.reach._tracks.values():
        track.doomed = True
    assert "no prober could reach" in world.reach.look(dead).detail


def test_what_could_never_be_proven_is_known_before_the_harm(world: World) -> None:
    assert world.reach.blind(Dead(("llm/engine-b",))) == "" == world.reach.blind(Cut("b"))
    assert "llm/engine-unseen" in world.reach.blind(Dead(("llm/engine-b", "llm/engine-unseen")))
    alone = World()
    alone.rounds(3, {(one, other) for one in "abc" for other in "ac"})
    alone.reach.settle()
    assert "as a control" in alone.reach.blind(Dead(("llm/engine-b",)))
    blocked = World()
    blocked.rounds(3, ALL_TO_B)
    blocked.reach.settle()
    assert "NetworkPolicy" in blocked.reach.blind(Dead(("llm/engine-b",)))


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


# ── pods that take connections and answer none ──────────────────────────────────────────────────

ASKED = [f"llm/engine-{zone}?{ask}" for zone in "ab" for ask in ("health", "generate")]


class Asking:
    """One prober, which asks two engines; `rounds` feeds which questions go unanswered."""

    def __init__(self) -> None:
        view: Any = SimpleNamespace(namespace="llm", probers=PROBERS[:1])
        self.reach = Reach(None, view, "image", 60)  # type: ignore[arg-type]
        keys = [*ASKED, "llm/engine-a", "llm/engine-b"]
        self.targets = tuple(Target(key, "a", "10.244.0.1", 8000, "GET" if "?" in key else "") for key in keys)
        self.reach._tracks["a"] = _Track("a", self.targets)
        self.number = 0
        self.rounds(3)
        self.reach.settle()

    def rounds(self, count: int, *mute: str) -> None:
        for _ in range(count):
            self.number += 1
            bits = "".join("0" if target.key in mute else "1" for target in self.targets)
            self.reach._take(self.reach._tracks["a"], json.dumps({"n": self.number, "up": bits}))


HUNG, ZOMBIE = Mute(("llm/engine-a",), "health"), Mute(("llm/engine-a",), "generate")


def test_a_hang_is_proven_by_health_that_is_not_answered_while_others_answer() -> None:
    asking = Asking()
    asking.rounds(3)
    assert not asking.reach.look(HUNG).holds
    asking.rounds(3, "llm/engine-a?health", "llm/engine-a?generate")
    assert asking.reach.look(HUNG).settled, "its kernel still takes connections, which proves nothing"
    asking.rounds(3, "llm/engine-a?health", "llm/engine-b?health")
    seen = asking.reach.look(HUNG)
    assert not seen.holds and "reaches nothing at all" in seen.detail


def test_a_zombie_says_that_it_is_well_and_generates_nothing() -> None:
    asking = Asking()
    asking.rounds(3, "llm/engine-a?generate")
    assert asking.reach.look(ZOMBIE).settled
    asking.rounds(3, "llm/engine-a?generate", "llm/engine-a?health")
    seen = asking.reach.look(ZOMBIE)
    assert not seen.holds and "engine-a?health" in seen.detail, "that is a hang, and whoever asks for /health sees it"


def test_a_mute_pod_is_gone_when_it_answers_again_and_no_pair_proves_nothing() -> None:
    asking = Asking()
    asking.rounds(3, "llm/engine-a?generate")
    assert not asking.reach.look_gone(ZOMBIE, at("llm/engine-a")).holds
    asking.rounds(3)
    assert asking.reach.look_gone(ZOMBIE, at("llm/engine-a")).settled
    assert not asking.reach.look_gone(ZOMBIE, frozenset()).holds


def test_what_a_pod_must_answer_to_be_seen_mute_is_told() -> None:
    asking = Asking()
    assert asking.reach.blind(HUNG) == "" == asking.reach.blind(ZOMBIE)
    asking.rounds(3, "llm/engine-a?health", "llm/engine-a?generate")
    asking.reach.settle()
    assert "answer GET /health with 2xx" in asking.reach.blind(HUNG)
    assert "answer POST /v1/completions for one token with 2xx" in asking.reach.blind(ZOMBIE)


def test_questions_are_no_connections() -> None:
    asking = Asking()
    asking.rounds(3, *ASKED)
    assert not asking.reach.look(Dead(("llm/engine-a",))).holds
    assert asking.reach.look_gone(Dead(("llm/engine-a",)), at("llm/engine-a")).holds


def test_the_probers_script_tells_a_hang_from_a_refusal_and_an_answer() -> None:
    """The real script against real sockets: one that answers, one whose process is stopped, one that says 500."""

    def server(answer: bytes | None) -> socket.socket:
        sock = socket.create_server(("127.0.0.1", 0))
        if answer is not None:
            threading.Thread(target=serve, args=(sock, answer), daemon=True).start()
        return sock

    def serve(sock: socket.socket, answer: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = sock.accept()
                with client:
                    client.recv(4096)
                    client.sendall(answer)

    good, ill = server(b"HTTP/1.1 200 OK\r\n\r\n"), server(b"HTTP/1.1 500 No\r\n\r\n")
    with good, ill, server(None) as stopped, socket.create_server(("127.0.0.1", 0)) as free:
        ports = [sock.getsockname()[1] for sock in (good, ill, stopped)]
        targets = [["127.0.0.1", port, "GET / HTTP/1.1\r\n\r\n"] for port in ports] + [["127.0.0.1", ports[2]]]
        free_port = str(free.getsockname()[1])
        free.close()
        arguments = [json.dumps(targets), "0.05", "0.4", "1.2", free_port, "127.0.0.1", "0.3"]
        done = subprocess.run(
            [sys.executable, "-c", reach.SCRIPT, *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    seen = [json.loads(line)["up"] for line in done.stdout.splitlines()]
    assert seen and set(seen) == {"1001"}, "answered; refused; silent; and its kernel takes the connection"


# ── probers that do not come up ─────────────────────────────────────────────────────────────────


class Pending:
    """A cluster in which nothing ever runs, for this reason."""

    namespace = "llm"

    def __init__(self, **status: Any) -> None:
        self._status = {"phase": "Pending", **status}

    def create(self, *_: Any) -> None:
        pass

    def get(self, *_: Any) -> Any:
        return {"spec": {}, "status": self._status}


def pending(stop: threading.Event | None = None, within: float = 0.1, **status: Any) -> str:
    view: Any = SimpleNamespace(namespace="llm", probers=PROBERS[:1], pods=(), ready=(), labels={}, nodes=())
    made = Reach(Pending(**status), view, "image", 60)  # type: ignore[arg-type]
    plan = Plan(FaultFacts("x", "x", one_shot=True, lasting=1, pods=()), (), ())
    with pytest.raises(ClusterError) as told:
        made.start(plan, lambda _: None, within, stop)
    assert isinstance(told.value, MissingCapability) is (stop is None)
    return str(told.value)


def test_a_stop_does_not_wait_for_a_prober_that_does_not_come() -> None:
    """SIGTERM came while an image was pulled in vain: the grace period was over before anything was taken away."""
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    begun = time.monotonic()
    assert "stopped while waiting for prober gd-x-prober-a" in pending(stop, within=60.0)
    assert time.monotonic() - begun < 30


def test_why_a_prober_does_not_run_is_told() -> None:
    full = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu"}
    assert "no node takes it: 0/3 nodes are available" in pending(conditions=[full])
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    assert "ErrImagePull not found" in pending(containerStatuses=[{"state": waiting}])
    assert "phase Pending" in pending()
