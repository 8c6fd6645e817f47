"""Every objective with what keeps it, what breaks it, and what leaves it open."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from planted import ABOUT, AFTER, BEFORE, END, FAULT, HARM, UNDO, Plant, between, without

from gameday.errors import ExperimentError, SettingsError
from gameday.model import (
    FaultMark,
    Finding,
    NodeMark,
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
    Objective,
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
    objective_from_json,
    override,
)
from gameday.objectives.base import KINDS, quantile, wilson

PASS, FAIL, OPEN, ERROR = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR
DURING = Phase.DURING


def during(objective: Objective, run: Timeline | Plant) -> Finding:
    return objective.judge(run.build() if isinstance(run, Plant) else run, DURING)


def some(q: float, seed: int = 1) -> Callable[[float], bool]:
    rng = random.Random(seed)
    return lambda t: t >= HARM and rng.random() < q


# ── success ──


def test_success() -> None:
    found = during(Success(0.99), Plant(some(0.005)))
    assert found.status is PASS
    assert found.observed is not None and found.low is not None and found.high is not None
    assert found.low < found.observed < found.high
    assert found.samples == 1500
    assert during(Success(0.99), Plant(some(0.02))).status is FAIL


def test_success_names_the_worst_time() -> None:
    found = during(Success(0.99), Plant(between(110, 114)))
    assert found.evidence == "worst 22:15:10–22:15:13 UTC"


@pytest.mark.parametrize(
    ("at_least", "requests", "failed", "wanted"),
    [
        (0.999, 1000, 0, PASS),
        (0.999, 500, 0, PASS),
        (0.999, 499, 0, OPEN),  # too few to tell 99.9 % from less
        (0.999, 700, 1, FAIL),
        (0.999, 1001, 1, PASS),
        (0.99, 50, 0, PASS),
        (0.99, 49, 0, OPEN),
        (0.99, 40, 5, FAIL),
        (0.5, 49, 10, OPEN),
        (1.0, 100, 0, PASS),
        (1.0, 99, 0, OPEN),
        (1.0, 1000, 1, FAIL),
    ],
)
def test_success_needs_enough_requests_for_its_limit(
    at_least: float, requests: int, failed: int, wanted: Verdict
) -> None:
    bad = set(random.Random(1).sample(range(requests), failed))
    run = Plant().build()
    replies = tuple(
        Reply(0, i, "chat", HARM + 1 + i / 100, HARM + 2 + i / 100, Outcome.HTTP_5XX if i in bad else Outcome.OK)
        for i in range(requests)
    )
    assert during(Success(at_least), replace(run, replies=replies)).status is wanted


def test_no_request_is_inconclusive() -> None:
    empty = replace(Plant().build(), replies=())
    objectives = [
        Success(0.9), FirstToken(p95=1), InterToken(p95=1), EndToEnd(p95=1), Goodput(0.9, first_token=1.0),
        TokensPerSecond(1), Capacity(0.5), Availability(0.999), UnbrokenStreams(), Recovers(10),
    ]  # fmt: skip
    for o in objectives:
        assert o.judge(empty, DURING).status is OPEN, o
    assert StaysUp(60.0).judge(empty, DURING).status is OPEN  # down all the time, for all we know, but not for 61 s


def test_a_phase_without_marks_is_inconclusive() -> None:
    run = without(Plant().build(), lambda e: isinstance(e, PhaseMark) and e.phase is DURING)
    for o in (Success(0.9), FirstToken(p95=1), Promql("up", at_least=1), Replicas(1), Spread(1), NodeReplaced()):
        assert o.judge(run, DURING).status is OPEN, o


def test_what_broke_after_the_fault_belongs_to_during() -> None:
    run = Plant().build()
    broken = Reply(0, 10**6, "long", HARM - 5, HARM + 1, Outcome.RESET_MID, t_first=HARM - 4, pod="llm/engine-b")
    long_ok = replace(broken, seq=10**6 + 1, outcome=Outcome.OK)
    both = replace(run, replies=(*run.replies, broken, long_ok))
    assert Success(0.999).judge(both, Phase.BEFORE).observed == 1.0
    assert during(Success(0.9), both).samples == during(Success(0.9), run).samples + 1
    assert UnbrokenStreams().judge(both, DURING).status is FAIL
    assert UnbrokenStreams().judge(both, Phase.BEFORE).status is PASS


def test_by_class_and_by_zone() -> None:
    run = Plant(pods=("engine-a", "engine-b")).build()
    replies = tuple(
        replace(r, cls="long" if r.seq % 2 else "chat", outcome=Outcome.STALL if r.zone == "b" else r.outcome)
        for r in run.replies
    )
    run = replace(run, replies=replies)
    assert during(Success(0.99, cls="chat"), run).status is PASS
    assert during(Success(0.99, cls="long"), run).status is FAIL
    assert during(Success(0.99, zone="a"), run).status is PASS
    assert during(Success(0.99, zone="b"), run).observed == 0
    assert Success(0.99, zone="b").title == "success (zone b) ≥ 99 %"
    assert Success(0.99, cls="long", zone="b").title == "success (long) (zone b) ≥ 99 %"


def test_a_failure_of_an_unknown_zone_counts_for_every_zone() -> None:
    run = Plant(between(110, 120)).build()  # refused: no zone answered
    assert during(Success(0.99, zone="a"), run).status is FAIL
    assert during(FirstToken(p95=1.0, zone="a"), run).status is FAIL


# ── latencies ──


def test_first_token_quantiles() -> None:
    run = Plant(ttft=lambda t: 2.0 if t >= HARM and int(t * 50) % 10 == 0 else 0.05)
    assert during(FirstToken(p50=0.1), run).status is PASS
    found = during(FirstToken(p95=1.0), run)
    assert found.status is FAIL
    assert found.observed == pytest.approx(2.0)
    assert found.objective == "first token p95 ≤ 1 s"
    assert during(FirstToken(p95=2.5), run).status is PASS


def test_a_token_that_never_came_is_infinitely_late() -> None:
    run = Plant(between(110, 113))  # a tenth of the phase
    found = during(FirstToken(p95=2.5), run)
    assert found.status is FAIL
    assert found.observed is None
    assert "150 of 1500 never came" in found.evidence
    assert during(FirstToken(p50=2.5), run).status is PASS


def test_a_quantile_needs_enough_answers() -> None:
    run = Plant(per_second=1.5).build()
    assert during(FirstToken(p95=1), run).samples == 45
    assert during(FirstToken(p95=1), run).status is PASS
    assert during(FirstToken(p99=1), run).status is OPEN
    assert "200 are needed" in during(FirstToken(p99=1), run).evidence


def test_the_interval_of_a_quantile_holds_the_truth() -> None:
    rng, misses = random.Random(5), 0
    truth = -math.log(0.05)
    for _ in range(400):
        _, low, high = quantile(sorted(rng.expovariate(1) for _ in range(300)), 0.95)
        misses += not low <= truth <= high
    assert misses <= 40  # 95 % would be 20; nearest ranks are a little off


def test_the_interval_of_a_share_holds_the_truth() -> None:
    rng, misses = random.Random(5), 0
    for _ in range(400):
        low, high = wilson(sum(rng.random() < 0.97 for _ in range(500)), 500)
        misses += not low <= 0.97 <= high
    assert misses <= 36


def test_inter_token_sees_a_stall() -> None:
    run = Plant().build()
    assert during(InterToken(p99=0.1), run).status is PASS
    stalled = tuple(
        replace(r, outcome=Outcome.STALL, t_last_progress=r.t_first, t_end=r.t_intended + 2.05)
        if r.t_intended >= HARM and r.seq % 20 == 0
        else r
        for r in run.replies
    )
    found = during(InterToken(p99=0.1), replace(run, replies=stalled))
    assert found.status is FAIL
    assert found.observed == pytest.approx(2.0)


def test_broken_streams_do_not_make_inter_token_judgeable() -> None:
    """Found by a property: 194 gaps were too few, and six resets more made them enough for a pass."""
    run = Plant(per_second=6.0).build()  # 180 gaps during, 200 are needed
    asked = InterToken(p99=0.5)
    assert during(asked, run).status is OPEN
    broken = [replace(r, seq=r.seq + 10**6, outcome=Outcome.RESET_MID) for r in run.replies][-30:]
    assert during(asked, replace(run, replies=(*run.replies, *broken))).status is not PASS


def test_broken_streams_do_not_outweigh_a_stall() -> None:
    run = Plant().build()
    slow = [replace(r, itl=(0.9,)) if r.t_intended >= HARM and r.seq % 60 == 0 else r for r in run.replies]
    asked = InterToken(p99=0.5)
    assert during(asked, replace(run, replies=tuple(slow))).status is FAIL
    began = Reply(0, 0, "chat", 110.0, 110.1, Outcome.RESET_MID, t_first=110.05, itl=(0.01,) * 5, t_last_progress=110.1)
    many = tuple(replace(began, seq=10**6 + i) for i in range(2000))
    assert during(asked, replace(run, replies=(*slow, *many))).status is FAIL


def test_end_to_end_and_goodput() -> None:
    run = Plant(some(0.02), ttft=lambda t: 0.6 if t >= HARM and int(t * 50) % 20 == 0 else 0.05)
    assert during(EndToEnd(p95=0.7), run).status is PASS
    assert during(EndToEnd(p99=0.7), run).status is FAIL  # 2 % never ended
    assert during(Goodput(0.9, first_token=0.5), run).status is PASS
    found = during(Goodput(0.95, first_token=0.5), run)
    assert found.status is FAIL
    assert found.observed == pytest.approx(0.98 * 0.95, abs=0.01)
    assert during(Goodput(0.95, inter_token=0.01, end_to_end=9.0), run).observed == 0.0


def test_an_outage_cannot_show_full_goodput() -> None:
    assert during(Goodput(0.99, first_token=1.0), Plant(between(100, 115))).observed == pytest.approx(0.5, abs=0.01)


# ── streams ──


def broken_streams(*pods: str | None) -> Timeline:
    run = Plant().build()
    more = tuple(
        Reply(0, 10**6 + i, "chat", HARM + 1, HARM + 2, Outcome.RESET_MID, t_first=HARM + 1.5, pod=pod)
        for i, pod in enumerate(pods)
    )
    return replace(run, replies=(*run.replies, *more))


@pytest.mark.parametrize(
    ("pods", "wanted", "count"),
    [
        ((), PASS, 0),
        (("llm/engine-b",), PASS, 0),
        (("engine-b", "llm/engine-b"), PASS, 0),
        (("llm/engine-a",), FAIL, 1),
        ((None,), FAIL, 1),  # of an unknown pod: it may have run anywhere
        (("llm/engine-b", None, "llm/engine-a"), FAIL, 2),
    ],
)
def test_streams_may_break_on_the_targets_only(pods: tuple[str | None, ...], wanted: Verdict, count: int) -> None:
    found = during(UnbrokenStreams(except_on="targets"), broken_streams(*pods))
    assert (found.status, found.observed) == (wanted, count)
    assert during(UnbrokenStreams(), broken_streams(*pods)).observed == len(pods)


def test_a_request_that_never_began_to_stream_is_not_a_broken_stream() -> None:
    assert during(UnbrokenStreams(), Plant(some(0.3))).status is PASS


def test_so_many_streams_may_break() -> None:
    assert during(UnbrokenStreams(at_most=2), broken_streams(None, None)).status is PASS
    assert UnbrokenStreams(at_most=2).title == "2 streams broken"


# ── throughput, availability, downtime ──


def test_tokens_per_second() -> None:
    found = during(TokensPerSecond(90), Plant())
    assert found.status is PASS
    assert found.observed == pytest.approx(100, rel=0.01)  # 50 requests/s of two tokens
    assert during(TokensPerSecond(90), Plant(between(110, 115))).status is FAIL


def test_tokens_of_broken_streams_are_worth_nothing() -> None:
    more = tuple(replace(r, tokens=1000, completion_tokens=1000) for r in broken_streams("x", "y").replies)
    found = during(TokensPerSecond(90), replace(Plant().build(), replies=tuple(r for r in more if not r.ok)))
    assert found.status is OPEN


def test_capacity_is_a_share_of_the_steady_state() -> None:
    assert during(Capacity(0.9), Plant(some(0.05))).status is PASS
    found = during(Capacity(0.9), Plant(between(100, 110)))
    assert found.status is FAIL
    assert found.observed == pytest.approx(2 / 3, abs=0.02)


def test_availability_burns_the_error_budget() -> None:
    run = Plant(between(100, 110))  # 10 s of 30
    found = during(Availability(0.999, burns_at_most=0.01), run)
    assert found.status is PASS
    assert found.observed == pytest.approx(10 / (0.001 * 30 * 86400), rel=0.01)
    assert during(Availability(0.9999, burns_at_most=0.01), run).status is FAIL
    assert Availability(0.999).title == "availability 99.9 %: burns ≤ 100 % of the budget of 30 days"


def test_failures_do_not_make_availability_judgeable() -> None:
    few = Plant(per_second=1.5).build()  # 45 requests during, 50 good ones are needed
    asked = Availability(0.999)
    assert during(asked, few).status is OPEN
    failed = tuple(replace(r, seq=r.seq + 10**6, outcome=Outcome.REFUSED) for r in few.replies[-20:])
    assert during(asked, replace(few, replies=(*few.replies, *failed))).status is OPEN
    assert during(Availability(0.9999, burns_at_most=0.001), Plant(lambda t: t >= HARM)).status is FAIL


def test_by_zone_and_class_where_it_makes_sense() -> None:
    run = Plant(lambda t: 105 <= t < 115).build()
    named = dict(enumerate("abc"))
    lost = [replace(r, zone=named[r.seq % 3]) if not r.ok else r for r in run.replies]
    new = [replace(r, outcome=Outcome.OK, tokens=2) if not r.ok and r.zone != "a" else r for r in lost]
    lost_a = replace(run, replies=tuple(new))
    assert during(StaysUp(5.0, zone="a"), lost_a).status is FAIL
    assert during(StaysUp(5.0, zone="b"), lost_a).status is PASS
    assert during(StaysUp(5.0), lost_a).status is PASS
    assert during(Availability(0.9999, burns_at_most=0.01, zone="a"), lost_a).status is FAIL
    assert during(Availability(0.9999, burns_at_most=0.01, zone="b"), lost_a).status is PASS
    assert during(TokensPerSecond(30, zone="b"), lost_a).status is PASS
    assert during(TokensPerSecond(30, zone="a"), lost_a).status is FAIL
    assert StaysUp(5.0, zone="a").title == "never down (zone a) for longer than 5 s"


@pytest.mark.parametrize(("mtd", "wanted"), [(12.0, PASS), (10.0, OPEN), (8.0, FAIL)])
def test_downtime_is_held_against_the_mtd(mtd: float, wanted: Verdict) -> None:
    found = during(StaysUp(mtd), Plant(lambda t: 105 <= t < 115 or 120 <= t < 124))
    assert found.status is wanted
    assert found.observed == 10


def test_half_an_outage_is_down_by_its_share() -> None:
    assert during(StaysUp(5.0), Plant(some(0.2))).observed == 0
    assert during(StaysUp(5.0, up_from=0.9), Plant(some(0.2))).status is FAIL


# ── Prometheus ──


def sampled(values: dict[float, float | None], **more: object) -> Timeline:
    error = str(more.get("error", ""))
    samples = [
        Sample(t, "up", "up", v, error if v is None else "", str(more.get("raw", ""))) for t, v in values.items()
    ]
    return Plant(samples=[*samples, *fresh()]).build()


def fresh(age: float = 0.2) -> list[Sample]:
    """The age of the series behind `up`."""
    return [Sample(80.6 + i, UP.age, "age of up", age) for i in range(80)]


def every_second(value: float | None = 1.0, start: float = 80, end: float = 160) -> dict[float, float | None]:
    return {start + i + 0.5: value for i in range(int(end - start))}


UP = Promql("up", at_least=1.0, name="targets up")


def test_promql() -> None:
    found = during(UP, sampled(every_second()))
    assert (found.status, found.observed, found.samples) == (PASS, 1.0, 30)
    worse = sampled({**every_second(), 110.5: 0.0})
    assert during(UP, worse).status is FAIL
    assert during(UP, worse).observed == 0.0
    assert UP.judge(worse, Phase.BEFORE).status is PASS
    assert during(Promql("up", at_most=1.0), sampled({**every_second(), 110.5: 2.0})).status is FAIL
    assert "up →" in during(UP, worse).evidence


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (sampled({}), "no sample"),
        (sampled({**every_second(), 110.5: None}), "Prometheus has no data"),
        (sampled({**every_second(), 110.5: None}, error="HTTP 500"), "error: HTTP 500"),
        (sampled({**every_second(), 110.5: None}, error="timeout after 3 s"), "error: timeout"),
        (sampled({**every_second(), 110.5: math.nan}), "the value is nan"),
        (sampled({**every_second(), 110.5: math.inf}), "the value is inf"),
        (sampled({101.0: 1.0, 111.0: 1.0, 121.0: 1.0}), "3 samples are too few"),
        (sampled(every_second(end=120)), "no sample for 10.5 s"),
        (sampled(every_second(start=110)), "no sample for 10.5 s"),
    ],
)  # fmt: skip
def test_promql_fails_closed(run: Timeline, why: str) -> None:
    found = during(UP, run)
    assert found.status is OPEN
    assert found.observed is None
    assert why in found.evidence


def test_a_window_of_less_than_four_scrapes_is_inconclusive() -> None:
    run = sampled(every_second())
    assert during(UP, replace(run, about=replace(ABOUT, scrape_interval=15.0))).status is OPEN


@pytest.mark.parametrize("series", [(), ("up{job='llm'}",)])
def test_stale_series_are_inconclusive(series: tuple[str, ...]) -> None:
    asked = replace(UP, series=series)
    age = asked.queries()[1][1]
    assert age == f"max(time() - timestamp({series[0] if series else 'up'}))"

    def run(old: float | None) -> Timeline:
        ages = [Sample(80.6 + i, age, "age", old if i > 30 else 0.2) for i in range(80)]
        plain = tuple(s for s in sampled(every_second()).samples if s.query == "up")
        return replace(sampled(every_second()), samples=(*plain, *(ages if old is not None else ())))

    assert during(asked, run(0.5)).status is PASS
    assert during(asked, run(40.0)).status is OPEN
    assert "stale" in during(asked, run(40.0)).evidence
    assert during(asked, run(None)).status is OPEN  # nobody looked at their age


@pytest.mark.parametrize("missing", [{}, {"error": "HTTP 500"}])
def test_a_broken_limit_is_broken_whatever_else_was_not_seen(missing: dict[str, object]) -> None:
    blind = sampled({**every_second(), 110.5: 0.0, 112.5: None}, **missing)
    found = during(UP, blind)
    assert (found.status, found.observed) == (FAIL, 0.0)


def test_an_answer_that_does_not_tell_its_time_is_inconclusive() -> None:
    """Its clock cannot be checked: a long answer is cut short as evidence, and once passed by that."""
    cut = json.dumps([{"metric": {"x": "y" * 3000}, "value": [ABOUT.epoch_wall, "1"]}])[:2000]
    found = during(UP, sampled(every_second(), raw=cut))
    assert found.status is OPEN and "does not tell its time" in found.evidence
    told = tuple(
        replace(s, told=ABOUT.epoch_wall + s.t - ABOUT.epoch_mono) for s in sampled(every_second(), raw=cut).samples
    )
    assert during(UP, Plant(samples=told)).status is PASS


@pytest.mark.parametrize(("skew", "wanted"), [(0.0, PASS), (-1.5, PASS), (-30.0, OPEN), (30.0, OPEN), (-2.5, OPEN)])
def test_clocks_that_differ_are_inconclusive(skew: float, wanted: Verdict) -> None:
    samples = [
        Sample(t, "up", "up", 1.0, "", json.dumps([{"metric": {}, "value": [ABOUT.epoch_wall + t + skew, "1"]}]))
        for t in every_second()
    ]
    found = during(UP, Plant(samples=[*samples, *fresh()]))
    assert found.status is wanted
    assert ("clock is" in found.evidence) == (wanted is OPEN)


DOWN = Alerts("ServiceDown", within=10.0)


def alerting(fires_at: float, until: float = END) -> Timeline:
    samples = [Sample(t, DOWN.query, "a", 1.0 if fires_at <= t < until else 0.0) for t in every_second()]
    return Plant(samples=samples).build()


@pytest.mark.parametrize(
    ("fires_at", "wanted"), [(105.0, PASS), (110.2, OPEN), (125.0, FAIL), (999.0, FAIL), (90.0, OPEN)]
)
def test_alerts(fires_at: float, wanted: Verdict) -> None:
    found = during(DOWN, alerting(fires_at))
    assert found.status is wanted
    if wanted is PASS:
        assert found.low is not None and found.observed is not None and found.high is not None
        assert found.low <= 4.8 <= found.high
        assert found.low <= found.observed <= found.high


def test_an_alert_that_nobody_looked_for_is_inconclusive() -> None:
    assert during(DOWN, Plant()).status is OPEN
    blind = alerting(105.0)
    gone = tuple(replace(s, value=None, error="HTTP 500") if s.t > 100 else s for s in blind.samples)
    assert during(DOWN, replace(blind, samples=gone)).status is OPEN
    assert 'alertname="ServiceDown"' in DOWN.query


# ── the cluster ──


def pod(t: float, name: str, stage: str, zone: str = "b") -> PodMark:
    return PodMark(t, f"llm/{name}", f"uid-{name}", stage, f"node-{zone}", zone, "engine")  # type: ignore[arg-type]


def test_replicas_at_the_end_of_the_phase() -> None:
    gone = [pod(101, "engine-b", "gone")]
    back = [*gone, pod(105, "engine-n", "created"), pod(120, "engine-n", "ready")]
    late = [*gone, pod(105, "engine-n", "created"), pod(140, "engine-n", "ready")]
    assert during(Replicas(3), Plant()).status is PASS
    assert during(Replicas(3), Plant(extra=[*gone])).status is FAIL
    assert during(Replicas(3), Plant(extra=[*back])).status is PASS
    assert during(Replicas(3), Plant(extra=[*late])).status is FAIL
    assert Replicas(3).judge(Plant(extra=[*late]).build(), Phase.AFTER).status is PASS
    assert during(Replicas(3), Plant(extra=[pod(101, "engine-b", "unready")])).status is FAIL
    assert during(Replicas(3), Plant(extra=[pod(101, "engine-b", "terminating")])).status is FAIL
    assert during(Replicas(3, owner="gateway"), Plant()).status is FAIL
    gateway = [replace(pod(101, "gateway-1", "ready"), owner="ReplicaSet/gateway-5d4f")]
    assert during(Replicas(4), Plant(extra=gateway)).status is FAIL  # a gateway is no replica of the engine
    assert during(Replicas(4, owner="*"), Plant(extra=gateway)).status is PASS
    assert during(Replicas(1), without(Plant().build(), lambda e: isinstance(e, PodMark))).status is OPEN


def test_spread_over_zones() -> None:
    packed = [pod(101, "engine-b", "gone"), pod(102, "engine-n", "created", "a"), pod(103, "engine-n", "ready", "a")]
    assert during(Spread(1), Plant()).status is PASS
    found = during(Spread(1), Plant(extra=[*packed]))
    assert (found.status, found.observed, found.evidence) == (FAIL, 2.0, "a: 2, b: 0, c: 1")
    assert during(Spread(2), Plant(extra=[*packed])).status is PASS
    assert during(Spread(1), Plant(pods=("engine-a",))).status is OPEN  # one zone is no spread
    nowhere = [PodMark(103, "llm/engine-x", "uid-x", "ready", owner="engine")]
    assert during(Spread(1), Plant(extra=[*nowhere])).status is OPEN


def node(t: float, name: str, what: str, detail: str = "") -> NodeMark:
    return NodeMark(t, name, what, "b", detail)


def test_node_replaced() -> None:
    gone, born = [node(110, "node-b", "gone")], [node(112, "node-n", "created"), node(118, "node-n", "ready")]
    found = during(NodeReplaced(), Plant(extra=[*gone, *born]))
    assert (found.status, found.observed) == (PASS, 18.0)
    assert during(NodeReplaced(within=10.0), Plant(extra=[*gone, *born])).status is FAIL
    assert during(NodeReplaced(), Plant(extra=[*gone])).status is FAIL
    assert during(NodeReplaced(), Plant(extra=[*born])).status is FAIL
    assert during(NodeReplaced(), Plant(extra=[*gone, *born[:1]])).status is FAIL
    assert during(NodeReplaced(), Plant(extra=[node(110, "node-a", "gone"), *born])).status is FAIL
    assert during(NodeReplaced(), Plant(fault=replace(FAULT, nodes=()))).status is OPEN


def test_node_kept_counts_only_after_the_detector_has_spoken() -> None:
    told = [node(103, "node-b", "detected")]
    assert during(NodeKept(for_at_least=20.0), Plant(extra=[*told])).status is PASS
    assert during(NodeKept(for_at_least=20.0), Plant()).status is OPEN
    assert during(NodeKept(for_at_least=28.0), Plant(extra=[*told])).status is OPEN
    assert during(NodeKept(), Plant(extra=[*told])).status is OPEN
    assert during(NodeKept(20.0), Plant(extra=[*told, node(120, "node-b", "gone")])).status is FAIL
    assert during(NodeKept(20.0), Plant(extra=[*told, node(120, "node-b", "cordoned")])).status is FAIL
    ours = node(120, "node-b", "cordoned", "by gameday")
    assert during(NodeKept(20.0), Plant(extra=[*told, ours])).status is PASS
    assert during(NodeKept(20.0), Plant(extra=[*told, node(120, "node-a", "gone")])).status is PASS
    two = replace(FAULT, nodes=("node-a", "node-b"))
    assert during(NodeKept(20.0), Plant(extra=[*told], fault=two)).status is OPEN


def test_nothing_left_behind() -> None:
    asked = NothingLeftBehind()
    assert during(asked, Plant()).status is PASS
    for step in (Step.CLEAN, Step.HEALED):
        missing = without(Plant().build(), lambda e, s=step: isinstance(e, FaultMark) and e.step is s)  # type: ignore[misc]
        assert during(asked, missing).status is ERROR
    left = [FaultMark(END + 2, Step.CLEAN, False, detail="NetworkChaos gd-1")]
    found = during(asked, Plant(extra=[*left]))
    assert found.status is ERROR
    assert "NetworkChaos gd-1" in found.evidence


# ── as data ──


EXAMPLES: tuple[Objective, ...] = (
    Alerts("Down", within=60.0, labels='severity="page"'), Availability(0.999), Capacity(0.9), EndToEnd(p99=5.0),
    Drained(within=60.0, refused_at_least=1), NeverFewer(4), NodesReady(6), Replaced(within=60.0),
    FirstToken(p95=2.5, cls="chat"), Goodput(0.9, first_token=1.0), InterToken(p50=0.1), NodeKept(30.0),
    NodeReplaced(within=60.0), NothingLeftBehind(), Promql("up", at_least=1.0, series=("up",)), Recovers(120.0),
    Replicas(6, owner="my-llama32"), Spread(1), StaysUp(600.0), Success(0.99, zone="a"), TokensPerSecond(100.0),
    UnbrokenStreams(except_on="targets"),
)  # fmt: skip


def test_every_objective_has_an_example_here() -> None:
    assert {type(o).__name__ for o in EXAMPLES} == KINDS.keys()


@pytest.mark.parametrize("asked", EXAMPLES, ids=lambda o: type(o).__name__)
def test_an_objective_survives_json(asked: Objective) -> None:
    assert objective_from_json(json.loads(json.dumps(asked.to_json()))) == asked
    assert asked.title


def test_objectives_survive_json() -> None:
    asked = Objectives(EXAMPLES[:3], EXAMPLES[3:9], EXAMPLES[9:])
    assert Objectives.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    assert len(asked.queries()) == len(set(asked.queries())) == 3


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"type": "Sucess"}, "no such objective"),
        ({"type": "Success"}, "incomplete"),
        ({"type": "Success", "at_least": 0.9, "at_most": 1}, "Success has no at_most"),
        ("Success", "no such objective"),
    ],
)
def test_a_bad_objective_is_one_sentence(value: object, sentence: str) -> None:
    with pytest.raises(ExperimentError, match=sentence):
        objective_from_json(value)


def somehow() -> Objective:
    return objective_from_json({"type": "Recovers", "within": 10, "recovers": "somehow"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Success(99), lambda: Success(0), FirstToken, lambda: FirstToken(p50=1, p95=1),
        lambda: FirstToken(p95=-1), lambda: Recovers(0), lambda: Recovers(10, hold=0), lambda: Goodput(0.9),
        somehow, lambda: Promql("up"), lambda: Promql("up", at_most=1, at_least=1),
        lambda: Promql(" ", at_most=1), lambda: StaysUp(0), lambda: Availability(1.0), lambda: TokensPerSecond(0),
        lambda: Capacity(1.5), lambda: Alerts("", within=1), lambda: Alerts("A", within=0),
        lambda: Replicas(0), lambda: Spread(-1), lambda: NodeReplaced(within=-1), lambda: NodeKept(0),
        lambda: UnbrokenStreams(except_on="target"),  # type: ignore[arg-type]
        lambda: UnbrokenStreams(at_most=-1), lambda: NeverFewer(0), lambda: NodesReady(0),
        lambda: Drained(refused_at_least=-1), lambda: Replaced(within=0),
    ],
)  # fmt: skip
def test_an_objective_that_contradicts_itself_is_refused(make: Callable[[], Objective]) -> None:
    with pytest.raises(ExperimentError):
        make()


def test_override() -> None:
    asked = Objectives(during=(Success(0.99), FirstToken(p95=2.5)), after=(Recovers(120.0),))
    new = override(asked, {"Success.during.at_least": 0.95, "Recovers.after.within": 300})
    assert new.during[0] == Success(0.95)
    assert new.after[0] == Recovers(300.0)
    assert new.during[1] == asked.during[1]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("Success.at_least", 0.9, "not of the form"),
        ("Success.sometimes.at_least", 0.9, "not of the form"),
        ("Success.before.at_least", 0.9, "overrides nothing: before asks for nothing"),
        ("Recovers.during.within", 9.0, "overrides nothing: during asks for FirstToken, Success"),
        ("Success.during.at_lest", 0.9, "Success has no 'at_lest', only at_least, cls, zone"),
        ("Success.during.at_least", "much", "must be a float"),
        ("Success.during.at_least", 95.0, "must be a share"),
    ],
)
def test_override_is_strict(key: str, value: float | str, sentence: str) -> None:
    asked = Objectives(during=(Success(0.99), FirstToken(p95=2.5)))
    with pytest.raises(SettingsError, match=sentence):
        override(asked, {key: value})


def test_phases_do_not_overlap() -> None:
    run = Plant(poisson=20).build()
    seen: list[int] = []
    for phase, (start, end) in {
        Phase.BEFORE: (BEFORE, HARM - 0.1), DURING: (HARM, UNDO), Phase.AFTER: (AFTER, END)
    }.items():  # fmt: skip
        found = Success(0.5).judge(run, phase)
        seen.append(found.samples)
        inside = sum(start <= r.t_intended < end for r in run.replies)
        assert inside - 5 <= found.samples <= inside
    assert len(run.replies) - 60 < sum(seen) < len(run.replies)


def test_a_stream_through_a_lost_gateway_ran_on_the_target() -> None:
    """The engine lived, but the gateway in the lost zone carried the stream."""
    run = broken_streams("engine-elsewhere")
    lost = replace(run.fault, pods=(*run.fault.pods, "llm/gateway-b"))
    through = tuple(replace(r, via="gateway-b") if not r.ok else r for r in run.replies)
    asked = UnbrokenStreams(except_on="targets")
    assert during(asked, replace(run, replies=through)).status is FAIL
    assert during(asked, replace(run, fault=lost, replies=through)).status is PASS
    assert during(asked, replace(run, fault=lost)).status is FAIL


def test_a_pod_that_took_a_targets_name_is_no_target() -> None:
    """A StatefulSet's: its broken streams were excused as long as the run lasted."""
    run = broken_streams("engine-b")
    (broken,) = (r.t_intended for r in run.replies if not r.ok)
    asked = UnbrokenStreams(except_on="targets")
    for at, wanted in ((broken - 1, FAIL), (broken + 1, PASS)):
        again = PodMark(at, "llm/engine-b", "uid-2", "created", owner="engine")
        assert during(asked, replace(run, events=(*run.events, again))).status is wanted
