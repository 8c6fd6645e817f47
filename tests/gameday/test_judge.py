"""The verdict fails closed: one planted violation each, and none of them may end green."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from planted import (
    ABOUT,
    AFTER,
    BEFORE,
    END,
    FAULT,
    GONE,
    HARM,
    PROOF,
    UNDO,
    Plant,
    accounts,
    between,
    without,
)

from gameday.judge import judge, verdict_of
from gameday.model import (
    Event,
    FaultMark,
    Finding,
    Heartbeat,
    Judgement,
    LoadEnd,
    Note,
    Outcome,
    Phase,
    PhaseMark,
    Reply,
    Step,
    Timeline,
    Verdict,
)
from gameday.objectives import FirstToken, NothingLeftBehind, Objectives, Promql, Recovers, Success, UnbrokenStreams
from gameday.record import verdict_json

PASS, FAIL, OPEN, ERROR = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR
ASKED = Objectives(
    before=(Success(0.999), FirstToken(p95=1.0)),
    during=(Success(0.9), UnbrokenStreams(except_on="targets")),
    after=(Recovers(10.0, hold=5.0), NothingLeftBehind()),
)


def why(judgement: Judgement) -> str:
    return "; ".join(f.evidence for f in judgement.findings if f.phase == "run" and f.status is not PASS)


def drop(run: Timeline, *steps: Step) -> Timeline:
    return without(run, lambda e: isinstance(e, FaultMark) and e.step in steps)


def add(run: Timeline, *events: Event) -> Timeline:
    return replace(run, events=tuple(sorted((*run.events, *events), key=lambda e: e.t)))


def beats(run: Timeline, change: Callable[[Heartbeat], Heartbeat | None]) -> Timeline:
    new = [change(e) if isinstance(e, Heartbeat) else e for e in run.events]
    return replace(run, events=tuple(e for e in new if e is not None))


def account(run: Timeline, **changes: int) -> Timeline:
    return replace(run, events=tuple(replace(e, **changes) if isinstance(e, LoadEnd) else e for e in run.events))


def good() -> Timeline:
    return Plant(between(HARM + 0.2, HARM + 2), poisson=10).build()


def test_a_sound_run_that_keeps_its_promises_passes() -> None:
    found = judge(good(), ASKED)
    assert found.verdict is PASS, found.findings
    assert found.passed
    assert {f.phase for f in found.findings} == {"run", *Phase}
    assert [f.objective for f in found.findings if f.phase == "run"] == [
        "load as planned", "enough load", "load generator fit", "load reaches the system under test", "steady state",
        "fault proven", "fault healed",
        "cluster clean",
    ]  # fmt: skip
    assert found.recovery is not None
    assert found.recovery.seconds == pytest.approx(1.9, abs=0.2)
    assert found.counts.planned == found.counts.ok + found.counts.failed == len(good().replies)
    assert (found.seed, found.experiment, found.reproduce) == (7419, "zone_outage", ABOUT.reproduce)


# ── each of these once ended green somewhere ──

lost_at_120 = FaultMark(120.0, Step.EFFECT, False, "probe across the cut", "a probe came through")
VIOLATIONS: dict[str, tuple[Callable[[], Timeline], Verdict, str]] = {
    "no load at all": (lambda: replace(good(), replies=()), OPEN, "do not match its account"),
    "no load worker": (
        lambda: without(replace(good(), replies=()), lambda e: isinstance(e, LoadEnd | Heartbeat)),
        OPEN,
        "no load worker left a record",
    ),
    "a worker that was lost": (lambda: without(good(), lambda e: isinstance(e, LoadEnd)), OPEN, "worker 0 was lost"),
    "a worker that left only heartbeats": (
        lambda: add(good(), *(Heartbeat(BEFORE + i, 1, 0, 0, 0, 0, 0, 0.0, 0.0, 0.1) for i in range(82))),
        OPEN,
        "worker 1 was lost",
    ),
    "a worker that left no trace": (
        lambda: replace(good(), about=replace(ABOUT, settings={"load_workers": "2"})),
        OPEN,
        "2 load workers were started, 1 left a record",
    ),
    "requests that nobody accounts for": (
        lambda: with_replies(good(), tuple(r for r in good().replies if not 1000 <= r.seq < 1010)),
        OPEN,
        "nobody accounts for request 1000",
    ),
    "records lost on the way": (lambda: replace(good(), replies=good().replies[:-5]), OPEN, "do not match its account"),
    "records twice": (
        lambda: with_replies(good(), (*good().replies, good().replies[-1])),
        OPEN,
        "recorded more than once",
    ),
    "an account that does not add up": (lambda: account(good(), planned=9999), OPEN, "planned 9999 requests"),
    "failures called successes": (lambda: account(good(), ok=4900, failed=0, planned=4900), OPEN, "do not match"),
    "two accounts of one worker": (lambda: add(good(), *accounts(good().replies)), OPEN, "left 2 final accounts"),
    "requests that we did not send": (lambda: shed(good()), OPEN, "never sent"),
    "too little load": (lambda: Plant(per_second=1.0).build(), OPEN, "during: 30 requests"),
    "a saturated generator (CPU)": (
        lambda: beats(good(), lambda h: replace(h, run_queue=0.2) if 110 <= h.t < 113 else h),
        OPEN,
        "saturated in 3 of 30 s",
    ),
    "a saturated generator (schedule)": (
        lambda: beats(good(), lambda h: replace(h, delay_p99=0.05) if 90 <= h.t < 93 else h),
        OPEN,
        "saturated in 3 of 20 s (delay up to 50 ms",
    ),
    "a generator that fell silent": (
        lambda: beats(good(), lambda h: None if 110 < h.t < 115 else h),
        OPEN,
        "no heartbeat of worker 0 for 5.0 s",
    ),
    "no heartbeats": (lambda: beats(good(), lambda _: None), OPEN, "no heartbeat"),
    "no steady state": (lambda: Plant(between(85, 86)).build(), OPEN, "not reached: success ≥ 99.9 %"),
    "a slow steady state": (lambda: Plant(ttft=lambda _: 1.5).build(), OPEN, "not reached: first token"),
    "a phase before that never ended": (
        lambda: without(good(), lambda e: e == PhaseMark(HARM - 0.1, Phase.BEFORE, "end")),
        OPEN,
        "the phase before the fault is not complete",
    ),
    "a phase after that never came": (
        lambda: without(good(), lambda e: isinstance(e, PhaseMark) and e.phase is Phase.AFTER),
        OPEN,
        "no complete phase after",
    ),
    "no harm": (lambda: drop(good(), Step.APPLY), OPEN, "no harm was sent"),
    "harm before its undo was written": (lambda: drop(good(), Step.LEDGER), OPEN, "no undo was written"),
    "a fault that was not injected": (lambda: drop(good(), Step.INJECTED), OPEN, "not injected by the control plane"),
    "a part that was not injected": (
        lambda: add(good(), FaultMark(101.0, Step.INJECTED, False, "pod-kill", "3 of 4")),
        OPEN,
        "pod-kill: never injected",
    ),
    "a fault that did not act": (lambda: drop(good(), Step.EFFECT), OPEN, "not seen to act"),
    "an effect that was only looked for": (
        lambda: add(drop(good(), Step.EFFECT), FaultMark(PROOF, Step.EFFECT, False, "probe", "it answers")),
        OPEN,
        "it answers",
    ),
    "a second effect that was not seen": (
        lambda: add(good(), FaultMark(101.0, Step.EFFECT, False, "process", "still there")),
        OPEN,
        "process: never seen to act",
    ),
    "an effect that was proven after the heal only": (
        lambda: add(drop(good(), Step.EFFECT), FaultMark(UNDO + 1, Step.EFFECT, True, "probe")),
        OPEN,
        "not seen to act before the heal",
    ),
    "an effect that was lost": (lambda: add(good(), lost_at_120), OPEN, "lost before the heal"),
    "an effect that nobody saw until the heal": (
        lambda: replace(good(), fault=replace(FAULT, watched=("probe across the cut",))),
        OPEN,
        "nobody saw that probe across the cut still acted right before the heal",
    ),
    "no undo": (lambda: drop(good(), Step.UNDO), ERROR, "no undo was sent"),
    "not recovered in the control plane": (lambda: drop(good(), Step.RECOVERED), ERROR, "never seen to be recovered"),
    "an effect that was not seen to go": (lambda: drop(good(), Step.GONE), ERROR, "never seen to be gone"),
    "not healed": (lambda: drop(good(), Step.HEALED), ERROR, "never seen to be healed"),
    "an undo that failed": (
        lambda: add(good(), FaultMark(GONE + 1, Step.HEALED, False, "", "uncordon node-b: 403")),
        ERROR,
        "uncordon node-b: 403",
    ),
    "nobody cleaned": (lambda: drop(good(), Step.CLEAN), ERROR, "nobody looked"),
    "something was left": (
        lambda: add(good(), FaultMark(END + 3, Step.CLEAN, False, detail="NetworkChaos gd-1")),
        ERROR,
        "NetworkChaos gd-1",
    ),
    "an error note": (lambda: add(good(), Note(120.0, "error", "the lock was lost")), ERROR, "the lock was lost"),
    "a stop condition": (lambda: add(good(), Note(120.0, "fail", "success fell to 3 %")), FAIL, "success fell to 3 %"),
    "a blind harness": (lambda: add(good(), Note(120.0, "inconclusive", "Prometheus blind")), OPEN, "Prometheus blind"),
}


def with_replies(run: Timeline, replies: tuple[Reply, ...]) -> Timeline:
    events = (*(e for e in run.events if not isinstance(e, LoadEnd)), *accounts(replies))
    return replace(run, replies=replies, events=events)


def shed(run: Timeline) -> Timeline:
    new = tuple(replace(r, outcome=Outcome.CLIENT_SHED) if 110 <= r.t_intended < 112 else r for r in run.replies)
    return with_replies(run, new)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_planted_violation_is_never_green(name: str) -> None:
    make, wanted, told = VIOLATIONS[name]
    found = judge(make(), ASKED)
    assert found.verdict is wanted, (found.verdict, why(found))
    assert told in why(found)


def test_the_steady_state_needs_no_fault_to_be_inconclusive() -> None:
    """Steady state not reached: nothing was injected, nothing healed, and it is no ERROR as long as all is clean."""
    run = Plant(between(85, 86)).build()
    run = drop(run, *(s for s in Step if s is not Step.CLEAN))
    run = without(run, lambda e: isinstance(e, PhaseMark) and e.phase is not Phase.BEFORE)
    assert judge(run, ASKED).verdict is OPEN


def test_a_one_shot_fault_has_no_heal() -> None:
    once = replace(FAULT, one_shot=True)
    run = drop(Plant(between(HARM + 0.2, HARM + 2), fault=once).build(), Step.UNDO)
    assert judge(run, ASKED).verdict is PASS
    gone_again = FaultMark(110.0, Step.EFFECT, False, "probe across the cut", "the pod is back")
    assert judge(add(run, gone_again), ASKED).verdict is PASS
    failed = FaultMark(130.0, Step.HEALED, False, "pod-kill", "CR could not be deleted")
    assert judge(add(run, failed), ASKED).verdict is ERROR


def test_a_lasting_effect_that_was_seen_until_the_heal_is_proven() -> None:
    seen = FaultMark(UNDO - 0.1, Step.EFFECT, True, "probe across the cut", "no probe came through")
    run = add(replace(good(), fault=replace(FAULT, watched=("probe across the cut",))), seen)
    assert judge(run, ASKED).verdict is PASS


def test_a_breach_before_the_fault_was_complete_is_a_failure_of_the_service() -> None:
    """The second part was never injected, since the stop condition came first."""
    seen = FaultMark(UNDO - 0.1, Step.EFFECT, True, "probe across the cut", "no probe came through")
    run = add(replace(good(), fault=replace(FAULT, watched=("probe across the cut", "pod-failure"))), seen)
    assert judge(run, ASKED).verdict is OPEN
    assert judge(add(run, Note(125.0, "fail", "success fell to 3 %")), ASKED).verdict is FAIL


def test_a_heal_that_worked_the_second_time_worked() -> None:
    first = FaultMark(UNDO + 0.1, Step.RECOVERED, False, "", "timeout")
    assert judge(add(good(), first), ASKED).verdict is PASS


def test_a_single_busy_second_is_tolerated() -> None:
    run = beats(good(), lambda h: replace(h, run_queue=0.2, delay_p99=0.03) if 110 <= h.t < 111 else h)
    assert judge(run, ASKED).verdict is PASS


def test_saturation_outside_of_the_judged_phases_does_not_matter() -> None:
    run = add(good(), *(Heartbeat(BEFORE - 10 + i, 0, 5, 0, 0, 0, 0, 0.5, 0.9, 0.9) for i in range(9)))
    assert judge(run, ASKED).verdict is PASS


def test_an_unsound_run_is_inconclusive_whatever_it_found() -> None:
    bad = Plant(between(HARM + 0.2, 131)).build()
    assert judge(bad, ASKED).verdict is FAIL
    assert judge(drop(bad, Step.EFFECT), ASKED).verdict is OPEN
    assert judge(drop(bad, Step.EFFECT, Step.CLEAN), ASKED).verdict is ERROR


def test_a_broken_promise_fails() -> None:
    found = judge(Plant(between(HARM + 0.2, HARM + 14)).build(), ASKED)
    assert found.verdict is FAIL
    failed = [f.objective for f in found.findings if f.status is FAIL]
    assert failed == ["success ≥ 90 %", "recovers within 10 s"]


def test_missing_metrics_are_inconclusive_although_all_else_is_fine() -> None:
    asked = replace(ASKED, during=(*ASKED.during, Promql("up", at_least=1.0)))
    assert judge(good(), asked).verdict is OPEN


def test_a_service_that_hangs_when_the_load_stops_is_not_back() -> None:
    """What hung until the load was stopped is censored, but it did fail."""

    def cut_off(r: Reply, waited: float) -> Reply:
        return replace(r, outcome=Outcome.CENSORED, t_first=None, t_end=r.t_intended + waited, itl=(), tokens=0)

    def ends(waited: float) -> Timeline:
        run = good()
        new = [cut_off(r, waited) if r.t_intended >= END - 5 else r for r in run.replies]
        return with_replies(run, tuple(new))

    assert judge(ends(4.0), ASKED).verdict is OPEN  # down at the end of what was observed
    assert Success(0.99).judge(ends(4.0), Phase.AFTER).status is FAIL
    assert judge(ends(0.5), ASKED).verdict is PASS  # cut off while it was answering in good time


def test_every_finding_names_its_evidence() -> None:
    for f in judge(good(), ASKED).findings:
        assert f.evidence or f.phase == "run", f
    before = next(f for f in judge(good(), ASKED).findings if f.objective == "success ≥ 99.9 %")
    assert before.evidence.endswith(" UTC") and str(before.samples) in before.evidence


def test_asking_nothing_is_inconclusive() -> None:
    assert judge(good(), Objectives()).verdict is OPEN
    assert judge(good(), Objectives(before=ASKED.before)).verdict is PASS  # a drill of the harness itself


def test_the_order_of_verdicts() -> None:
    def finding(status: Verdict) -> Finding:
        return Finding("run", "x", status, None, None, "")

    assert verdict_of([], []) is OPEN
    assert verdict_of([finding(PASS)], [finding(PASS)]) is PASS
    assert verdict_of([finding(PASS)], [finding(OPEN), finding(FAIL)]) is FAIL
    assert verdict_of([finding(OPEN)], [finding(FAIL)]) is OPEN
    assert verdict_of([finding(OPEN)], [finding(ERROR)]) is ERROR
    assert verdict_of([finding(ERROR), finding(OPEN)], [finding(PASS)]) is ERROR


def test_the_verdict_as_data_has_all_that_is_promised() -> None:
    data = json.loads(json.dumps(verdict_json(judge(good(), ASKED))))
    assert set(data) >= {"experiment", "verdict", "findings", "recovery", "counts", "seed", "target", "reproduce"}
    assert set(data["counts"]) == {"planned", "ok", "failed", "shed", "censored"}
    assert set(data["recovery"]) >= {"seconds", "low", "high", "stages"}
    assert all(
        set(f) >= {"phase", "objective", "status", "observed", "limit", "unit", "low", "high", "evidence"}
        for f in data["findings"]
    )


def test_phases_come_from_the_marks() -> None:
    assert AFTER > UNDO
    late = Plant(between(AFTER + 5, AFTER + 5.2)).build()
    assert judge(late, ASKED).verdict is PASS  # ten requests of 1475, and back at once


def test_a_breached_stop_condition_fails_although_it_ends_the_run() -> None:
    """The run heals at once and never comes to its last phase: that is the service's doing, and no excuse."""
    ended = without(good(), lambda e: isinstance(e, PhaseMark) and e.phase is Phase.AFTER)
    assert judge(ended, ASKED).verdict is OPEN
    assert judge(add(ended, Note(120.0, "fail", "success fell to 3 %")), ASKED).verdict is FAIL


def test_load_on_another_service_is_no_result() -> None:
    """Faults here, requests there: everything looks fine, and nothing was tested."""
    elsewhere = replace(good(), replies=tuple(replace(r, pod="other-1") for r in good().replies))
    found = judge(elsewhere, ASKED)
    assert found.verdict is OPEN
    assert any("0 of" in f.evidence and f.status is OPEN for f in found.findings if f.phase == "run")
    mostly = replace(good(), replies=tuple(replace(r, pod="other-1") if r.seq % 3 else r for r in good().replies))
    assert judge(mostly, ASKED).verdict is OPEN  # a third of the requests dilutes whatever happens to us
    partly = replace(good(), replies=tuple(r if r.seq % 3 else replace(r, pod="other-1") for r in good().replies))
    assert judge(partly, ASKED).verdict is PASS
    unnamed = replace(good(), replies=tuple(replace(r, pod=None) for r in good().replies))
    assert judge(unnamed, ASKED).verdict is OPEN
    waived = replace(unnamed, about=replace(unnamed.about, settings={"served_by": ""}))
    assert judge(waived, ASKED).verdict is PASS


def test_load_that_ends_before_the_window_shows_no_recovery() -> None:
    run = good()
    short = replace(run, replies=tuple(r for r in run.replies if r.t_intended < AFTER + 3))
    asked = Recovers(within=40, hold=8)
    assert asked.judge(run, Phase.AFTER).status is PASS
    found = asked.judge(short, Phase.AFTER)
    assert found.status is OPEN and "the load ended before the window" in found.evidence


def test_a_pod_that_served_nobody_before_shows_nothing_by_dying() -> None:
    """Sticky sessions, or a balancer of connections: the killed pod had had no request, and the run was green."""
    run = Plant().build()
    elsewhere = replace(run, replies=tuple(replace(r, pod="engine-a", zone="a") for r in run.replies))
    judged = judge(elsewhere, ASKED)
    assert judged.verdict is OPEN and "none from those that were broken" in why(judged)
    through = replace(run, replies=tuple(replace(r, pod="engine-a", via="engine-b") for r in run.replies))
    assert "none from those" not in why(judge(through, ASKED)), "a gateway that is broken carried it"


def test_load_that_ends_in_the_middle_of_a_phase_is_not_enough() -> None:
    """A trace that was shorter than the fault: fifty requests at its beginning made the whole phase green."""
    run = good()
    asked = Objectives(before=(Success(0.99),), during=(Success(0.9),))
    assert judge(run, asked).verdict is PASS
    for begin, end in ((HARM + 15, END), (HARM + 8, HARM + 18)):
        kept = [r for r in run.replies if not begin <= r.t_intended < end]
        replies = tuple(replace(r, seq=seq) for seq, r in enumerate(kept))
        others = (e for e in run.events if not isinstance(e, LoadEnd))
        found = judge(replace(run, replies=replies, events=(*others, *accounts(replies))), asked)
        assert found.verdict is OPEN and "during: no request for" in why(found)
