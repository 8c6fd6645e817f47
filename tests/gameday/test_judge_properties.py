"""What must hold for every timeline: failures never help, order does not matter, intervals hold their points."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import HealthCheck, given, settings, strategies as st
from planted import FAULT, HARM, Plant, run_of

from gameday import record
from gameday.judge import judge
from gameday.model import Judgement, Outcome, Phase, Reply, Timeline, Verdict
from gameday.objectives import (
    Availability,
    Capacity,
    EndToEnd,
    FirstToken,
    Goodput,
    InterToken,
    Objectives,
    Recovers,
    StaysUp,
    Success,
    TokensPerSecond,
    UnbrokenStreams,
)

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
