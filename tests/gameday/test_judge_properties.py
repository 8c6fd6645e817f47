"""What must hold for every timeline: failures never help, order does not matter, intervals hold their points."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from hypothesis import HealthCheck, Phase as HypothesisPhase, given, settings, strategies as st
from planted import BEFORE, END, FAULT, HARM, UNDO, Plant, run_of

from gameday import record
from gameday.judge import judge
from gameday.model import (
    Event,
    EvictionMark,
    FaultMark,
    Finding,
    Heartbeat,
    Judgement,
    LoadEnd,
    NodeMark,
    Note,
    Outcome,
    Phase,
    PhaseMark,
    PodMark,
    Reply,
    Sample,
    Step,
    Timeline,
    Verdict,
)
from gameday.objectives import (
    Alerts,
    Availability,
    Capacity,
    Drained,
    EndToEnd,
    FirstToken,
    Goodput,
    InterToken,
    NeverFewer,
    NodeKept,
    NodeReplaced,
    NodesReady,
    NothingLeftBehind,
    Objectives,
    Promql,
    Recovers,
    Replaced,
    Replicas,
    Spread,
    StaysUp,
    Success,
    TokensPerSecond,
    UnbrokenStreams,
)
from gameday.objectives.base import KINDS

ASKED = Objectives(
    before=(Success(0.9),),
    during=(
        Success(0.9), Success(0.99, zone="a"), FirstToken(p95=1.0), InterToken(p99=0.5), EndToEnd(p95=2.0),
        Goodput(0.8, first_token=1.0), UnbrokenStreams(except_on="targets"), TokensPerSecond(5.0), Capacity(0.8),
        Availability(0.999, burns_at_most=0.01), StaysUp(8.0),
    ),
    after=(
        Success(0.99), Recovers(6.0, hold=5.0), Recovers(6.0, hold=5.0, recovers="after_heal"),
        Recovers(3.0, hold=2.0, at_least=0.95, first_token=1.0),
    ),
)  # fmt: skip

spans = st.tuples(st.floats(HARM, 158), st.floats(0.02, 12), st.sampled_from([1.0, 0.7, 0.4, 0.2, 0.05]))
outages = st.lists(spans, max_size=4)
BREAKS = (Outcome.REFUSED, Outcome.HTTP_5XX, Outcome.RESET_MID, Outcome.STALL, Outcome.FIRST_TOKEN_TIMEOUT)


def plant(outs: Sequence[tuple[float, float, float]], seed: int, one_shot: bool, slow: bool) -> Timeline:
    rng = random.Random(seed)

    def bad(t: float) -> bool:
        return any(start <= t < start + length and rng.random() < q for start, length, q in outs)

    fault = replace(FAULT, one_shot=one_shot)
    ttft = (lambda t: 1.5 if 104 <= t < 106 else 0.05) if slow else (lambda _: 0.05)
    return Plant(bad, per_second=10, poisson=5, seed=seed, fault=fault, ttft=ttft).build()


def broken(reply: Reply, how: Outcome, pod: str | None) -> Reply:
    began = how in (Outcome.RESET_MID, Outcome.STALL)
    return replace(
        reply, outcome=how, pod=pod, zone=None, finish_reason=None, got_done=False,
        t_first=reply.t_first if began else None, itl=reply.itl if began else (), t_end=reply.t_intended + 0.3,
    )  # fmt: skip


def rebuilt(run: Timeline, replies: Sequence[Reply]) -> Timeline:
    events = [e for e in run.events if e.kind != "load_end"]
    return run_of(replies, events, run.samples, run.fault, run.about)


def better(new: Verdict, old: Verdict) -> bool:
    return new.rank < old.rank


def compare(before: Judgement, after: Judgement) -> None:
    for old, new in zip(before.findings, after.findings, strict=True):
        if old.phase != "run":
            assert not better(new.status, old.status), (old, new)
    assert not better(after.verdict, before.verdict), (before.verdict, after.verdict)


few = settings(
    max_examples=int(os.environ.get("GAMEDAY_EXAMPLES", "20")),
    deadline=None,
    phases=[HypothesisPhase.explicit, HypothesisPhase.reuse, HypothesisPhase.generate],  # shrinking takes minutes here
    suppress_health_check=[HealthCheck.too_slow],
)


@few
@given(
    outages, st.integers(0, 9999), st.booleans(), st.booleans(),
    st.floats(HARM, 159), st.floats(0.05, 10), st.sampled_from([1.0, 0.5, 0.1]), st.sampled_from(BREAKS),
    st.sampled_from([None, "llm/engine-a", "llm/engine-b"]),
)  # fmt: skip
def test_turning_successes_into_failures_never_improves_a_verdict(
    outs: list[tuple[float, float, float]], seed: int, one_shot: bool, slow: bool,
    start: float, length: float, q: float, how: Outcome, pod: str | None,
) -> None:  # fmt: skip
    run = plant(outs, seed, one_shot, slow)
    rng = random.Random(seed + 1)
    worse = [
        broken(r, how, pod) if r.ok and start <= r.t_intended < start + length and rng.random() < q else r
        for r in run.replies
    ]
    compare(judge(run, ASKED), judge(rebuilt(run, worse), ASKED))


@few
@given(
    outages, st.integers(0, 9999), st.booleans(), st.lists(st.floats(HARM, 159.9), min_size=1, max_size=60),
    st.sampled_from(BREAKS), st.sampled_from([None, "llm/engine-a", "llm/engine-b"]),
)  # fmt: skip
def test_additional_failures_never_improve_a_verdict(
    outs: list[tuple[float, float, float]], seed: int, one_shot: bool, times: list[float], how: Outcome,
    pod: str | None,
) -> None:  # fmt: skip
    run = plant(outs, seed, one_shot, slow=False)
    model = run.replies[0]
    more = [
        broken(replace(model, seq=10**6 + i, t_intended=t, t_start=t, t_first=t + 0.1), how, pod)
        for i, t in enumerate(times)
    ]
    renumbered = [replace(r, seq=i) for i, r in enumerate(sorted((*run.replies, *more), key=lambda r: r.t_intended))]
    compare(judge(run, ASKED), judge(rebuilt(run, renumbered), ASKED))


@few
@given(outages, st.integers(0, 9999), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_the_record_changes_nothing(
    outs: list[tuple[float, float, float]], seed: int, one_shot: bool, rng: random.Random
) -> None:
    run = plant(outs, seed, one_shot, slow=True)
    replies, events = list(run.replies), list(run.events)
    rng.shuffle(replies)
    rng.shuffle(events)
    raw = replace(run, replies=tuple(replies), events=tuple(events))
    assert judge(raw, ASKED) == judge(run, ASKED)
    again = record.timeline(run.about, run.fault, replies, list(run.samples), events)
    assert again == run


@few
@given(outages, st.integers(0, 9999), st.booleans(), st.booleans())
def test_intervals_hold_their_points(
    outs: list[tuple[float, float, float]], seed: int, one_shot: bool, slow: bool
) -> None:
    found = judge(plant(outs, seed, one_shot, slow), ASKED)
    for f in found.findings:
        if f.observed is not None:
            assert f.low is None or f.low <= f.observed + 1e-9, f
            assert f.high is None or f.observed <= f.high + 1e-9, f
    recovery = found.recovery
    assert recovery is not None
    if recovery.seconds is not None:
        assert recovery.low is not None and recovery.high is not None
        assert 0 <= recovery.low <= recovery.seconds <= recovery.high


@few
@given(st.floats(100.31, 110), st.floats(0.3, 15), st.integers(0, 9999))
def test_a_total_outage_is_covered(start: float, length: float, seed: int) -> None:
    run = plant([(start, length, 1.0)], seed, one_shot=True, slow=False)
    found = judge(run, Objectives(after=(Recovers(30.0, hold=5.0),))).recovery
    assert found is not None and found.t_back is not None
    gap = 0.1  # 10 requests/s at least
    assert start + length - gap <= found.t_back <= start + length + gap


@few
@given(outages, st.integers(0, 9999))
def test_a_pass_means_that_the_service_was_back(outs: list[tuple[float, float, float]], seed: int) -> None:
    run = plant(outs, seed, one_shot=True, slow=False)
    asked = Recovers(6.0, hold=5.0)
    if asked.judge(run, Phase.AFTER).status is Verdict.PASS:
        late = [r for r in run.replies if HARM + 6.4 <= r.t_intended < HARM + 11]
        assert sum(not r.ok for r in late) <= 0.6 * len(late)


# ── what the cluster and Prometheus say, and what the harness did ──

UP = Promql("up", at_least=1.0, series=("up",))
DOWN = Alerts("ServiceDown", within=20.0)
EVERYTHING = Objectives(
    before=(*ASKED.before, Spread(1)),
    during=(
        *ASKED.during,
        UP,
        DOWN,
        Replicas(2),
        Spread(2),
        NodeReplaced(within=20.0),
        NodeKept(10.0),
        NeverFewer(2),
        Drained(within=20.0, refused_at_least=1),
        Replaced(within=20.0),
    ),
    after=(*ASKED.after, Replicas(3), NodesReady(1), NothingLeftBehind()),
)
"""Every kind of objective there is."""


def asked_of(replaced: bool) -> Objectives:
    """A node is replaced or kept, not both: so that all can be green."""
    other = NodeKept if replaced else (NodeReplaced, Drained, Replaced)
    return replace(EVERYTHING, during=tuple(o for o in EVERYTHING.during if not isinstance(o, other)))


mild = st.lists(st.tuples(st.floats(HARM, 140), st.floats(0.02, 0.3), st.sampled_from([1.0, 0.3])), max_size=1)


def everything(outs: Sequence[tuple[float, float, float]], seed: int, fires_at: float, replaced: bool) -> Timeline:
    rng = random.Random(seed)
    seconds = [BEFORE + i + 0.5 for i in range(int(END - BEFORE))]
    samples = [
        *(Sample(t, "up", "up", 1.0) for t in seconds),
        *(Sample(t, UP.age, "age", 0.3) for t in seconds),
        *(Sample(t, DOWN.query, "alert", 1.0 if t >= fires_at else 0.0) for t in seconds),
    ]
    node: list[Event] = [NodeMark(BEFORE - 4, "node-a", "ready", "a")]
    node += [NodeMark(HARM + 2, "node-b", "detected", "b", "Xid 79")]
    if replaced:
        made = [("node-b", "gone"), ("node-n", "created"), ("node-n", "ready")]
        node += [NodeMark(HARM + 3.0 + i, name, what, "b") for i, (name, what) in enumerate(made)]
        node += [EvictionMark(HARM + 1.0 + i, "llm/engine-b", how) for i, how in enumerate(("refused", "accepted"))]
        node += [PodMark(HARM + 2.5, "llm/engine-b", "uid-engine-b", "gone", "node-b", "b", "engine")]
        stages: tuple[Literal["created", "ready"], ...] = ("created", "ready")
        node += [
            PodMark(HARM + 6.0 + i, "llm/engine-n", "uid-n", s, "node-n", "b", "engine") for i, s in enumerate(stages)
        ]

    def bad(t: float) -> bool:
        return any(start <= t < start + length and rng.random() < q for start, length, q in outs)

    return Plant(bad, per_second=25, seed=seed, samples=samples, extra=node).build()


def never_greener(before: Judgement, after: Judgement) -> None:
    def of_service(one: Judgement) -> list[Finding]:
        return [f for f in one.findings if f.phase != "run"]  # notes add findings of the run

    for old, new in zip(of_service(before), of_service(after), strict=True):
        if new.status is Verdict.PASS:
            assert old.status is Verdict.PASS, (old, new)
    assert after.verdict is not Verdict.PASS or before.verdict is Verdict.PASS, (before.verdict, after.verdict)


TROUBLES = ("error", "nan", "broken", "old", "skewed", "unready", "gone", "lost", "left", "undo", "note", "busy")
instants = st.floats(BEFORE + 1, END - 1)


def troubled(run: Timeline, what: str, t: float) -> Timeline:
    """Something goes wrong at t that has nothing to do with requests."""
    wrong = {"error": None, "nan": float("nan"), "broken": 0.0, "old": 99.0, "skewed": 1.0}
    if what in wrong:
        query = UP.age if what == "old" else "up"
        error = "HTTP 500" if what == "error" else ""
        told = run.about.epoch_wall + t - run.about.epoch_mono + (60.0 if what == "skewed" else 0.0)
        sample = Sample(t, query, "planted", wrong[what], error, told=told)
        return record.timeline(run.about, run.fault, list(run.replies), [*run.samples, sample], list(run.events))
    new: dict[str, Event] = {
        "unready": PodMark(t, "llm/engine-a", "uid-engine-a", "unready", "node-a", "a", "engine"),
        "gone": PodMark(t, "llm/engine-c", "uid-engine-c", "gone", "node-c", "c", "engine"),
        "lost": FaultMark(min(t, UNDO - 0.1), Step.EFFECT, False, "probe across the cut", "it answers"),
        "left": FaultMark(END + 5, Step.CLEAN, False, detail="NetworkChaos gd-1"),
        "undo": FaultMark(END + 4, Step.HEALED, False, "", "uncordon: 403"),
        "note": Note(t, "inconclusive", "Kubernetes cannot be seen"),
        "busy": Heartbeat(t, 0, 5, 0, 0, 0, 0, 0.5, 0.9, 0.9),
    }
    return record.timeline(run.about, run.fault, list(run.replies), list(run.samples), [*run.events, new[what]])


@few
@given(
    st.one_of(mild, outages), st.integers(0, 9999), st.floats(HARM + 1, HARM + 15), st.booleans(),
    st.lists(st.tuples(st.sampled_from(TROUBLES), instants), min_size=1, max_size=4),
)  # fmt: skip
def test_trouble_never_makes_anything_green(
    outs: list[tuple[float, float, float]], seed: int, fires_at: float, replaced: bool,
    troubles: list[tuple[str, float]],
) -> None:  # fmt: skip
    run = everything(outs, seed, fires_at, replaced)
    worse = run
    for what, t in troubles:
        worse = troubled(worse, what, t)
    never_greener(judge(run, asked_of(replaced)), judge(worse, asked_of(replaced)))


WITNESSES = (PhaseMark, FaultMark, Heartbeat, LoadEnd)


@few
@given(
    outages, st.integers(0, 9999), st.booleans(), st.floats(0.01, 0.9), st.sampled_from(["events", "samples", "both"])
)
def test_losing_witnesses_never_makes_anything_green(
    outs: list[tuple[float, float, float]], seed: int, replaced: bool, share: float, what: str
) -> None:
    """What speaks for the run is lost at random: marks, heartbeats, accounts, ready pods, samples."""
    run = everything(outs, seed, HARM + 5, replaced)
    rng = random.Random(seed + 2)

    def kept(event: Event) -> bool:
        speaks = isinstance(event, WITNESSES) or (isinstance(event, PodMark) and event.stage == "ready")
        return not speaks or rng.random() > share

    events = tuple(e for e in run.events if kept(e)) if what != "samples" else run.events
    samples = tuple(s for s in run.samples if rng.random() > share) if what != "events" else run.samples
    asked = asked_of(replaced)
    before, after = judge(run, asked), judge(replace(run, events=events, samples=samples), asked)
    assert after.verdict is not Verdict.PASS or before.verdict is Verdict.PASS, (before.verdict, after.verdict)


@few
@given(mild, st.integers(0, 9999), st.floats(0.001, 0.5))
def test_losing_requests_is_never_green(outs: list[tuple[float, float, float]], seed: int, share: float) -> None:
    run = everything(outs, seed, HARM + 5, replaced=True)
    rng = random.Random(seed + 3)
    left = tuple(r for r in run.replies if rng.random() > share)
    if len(left) < len(run.replies):
        assert judge(replace(run, replies=left), asked_of(True)).verdict is not Verdict.PASS


def test_everything_can_be_green() -> None:
    """Else the properties above would say nothing."""
    for replaced in (True, False):
        found = judge(everything([], 1, HARM + 5, replaced), asked_of(replaced))
        assert found.verdict is Verdict.PASS, [f for f in found.findings if f.status is not Verdict.PASS]
    assert {type(o).__name__ for _, o in EVERYTHING.items()} == KINDS.keys()


@few
@given(outages, st.integers(0, 9999), st.floats(HARM - 5, HARM + 30), st.booleans())
def test_order_and_intervals_of_everything(
    outs: list[tuple[float, float, float]], seed: int, fires_at: float, replaced: bool
) -> None:
    run = everything(outs, seed, fires_at, replaced)
    replies, samples, events = list(run.replies), list(run.samples), list(run.events)
    for some in (replies, samples, events):
        random.Random(seed).shuffle(some)  # type: ignore[arg-type]
    found = judge(run, EVERYTHING)
    assert (
        judge(replace(run, replies=tuple(replies), samples=tuple(samples), events=tuple(events)), EVERYTHING) == found
    )
    for f in found.findings:
        if f.observed is not None:
            assert f.low is None or f.low <= f.observed + 1e-9, f
            assert f.high is None or f.observed <= f.high + 1e-9, f
