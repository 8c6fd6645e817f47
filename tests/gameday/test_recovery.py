"""Recovery time against planted truths: when it is over, what counts, and whose doing it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from planted import AFTER, END, FAULT, GONE, HARM, PROOF, UNDO, Plant, between, without

from gameday import recovery
from gameday.model import EndpointMark, Event, FaultMark, Outcome, Phase, PodMark, Recovery, Reply, Step, Verdict
from gameday.objectives import Recovers

ONE_SHOT = replace(FAULT, one_shot=True, name="pod kill")
ASKED = Recovers(within=10.0, hold=5.0)


def measured(plant: Plant, asked: Recovers = ASKED) -> Recovery:
    return recovery.measure(plant.build(), asked)


def status(plant: Plant, asked: Recovers = ASKED) -> Verdict:
    return asked.judge(plant.build(), Phase.AFTER).status


def share(q: float, start: float, end: float, seed: int = 3) -> Callable[[float], bool]:
    rng = random.Random(seed)
    return lambda t: start <= t < end and rng.random() < q


# ── total outages ──


def test_a_total_outage_is_measured_to_the_canarys_gap() -> None:
    found = measured(Plant(between(100.2, 104.7), fault=ONE_SHOT))
    assert found.seconds is not None and found.low is not None and found.high is not None
    assert found.t_back == pytest.approx(104.7, abs=0.02)
    assert found.seconds == pytest.approx(4.5, abs=0.04)
    assert found.low <= 4.5 <= found.high
    assert found.t_fault_low == HARM
    assert found.t_fault_high == PROOF


def test_a_target_that_answers_badly_is_an_earlier_proof() -> None:
    plant = Plant(between(100.1, 104.7), fault=ONE_SHOT)
    run = plant.build()
    bad = next(i for i, r in enumerate(run.replies) if r.t_intended >= 100.1)
    replies = list(run.replies)
    replies[bad] = replace(replies[bad], pod="llm/engine-b", outcome=Outcome.RESET_MID)
    found = recovery.measure(replace(run, replies=tuple(replies)), ASKED)
    assert found.t_fault_high == pytest.approx(replies[bad].t_end)
    replies[bad] = replace(replies[bad], pod="llm/engine-a")
    found = recovery.measure(replace(run, replies=tuple(replies)), ASKED)
    assert found.t_fault_high == PROOF


def test_a_slow_detector_does_not_move_the_fault() -> None:
    plant = Plant(between(100.2, 104.7), fault=ONE_SHOT)
    slow = [FaultMark(103.0, Step.EFFECT, True, "node-problem-detector")]
    assert measured(replace(plant, extra=slow)) == measured(plant)


def test_no_outage_is_nothing_with_the_sampling_gap_as_its_bound() -> None:
    found = measured(Plant(fault=ONE_SHOT))
    assert (found.seconds, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.02, abs=1e-6)
    assert found.story == "no outage seen"


def test_without_a_proof_there_is_no_recovery_time() -> None:
    run = without(Plant(fault=ONE_SHOT).build(), lambda e: isinstance(e, FaultMark) and e.step is Step.EFFECT)
    assert recovery.measure(run, ASKED).seconds is None
    assert ASKED.judge(run, Phase.AFTER).status is Verdict.INCONCLUSIVE


# ── the limit ──


@pytest.mark.parametrize(
    ("until", "wanted"),
    [(105.0, Verdict.PASS), (109.5, Verdict.INCONCLUSIVE), (110.15, Verdict.INCONCLUSIVE), (110.9, Verdict.FAIL)],
)
def test_the_interval_is_held_against_the_limit(until: float, wanted: Verdict) -> None:
    assert status(Plant(between(100.2, until), fault=ONE_SHOT)) is wanted


def test_never_back_fails() -> None:
    plant = Plant(lambda t: t >= 100.2, fault=ONE_SHOT)
    assert status(plant) is Verdict.FAIL
    found = measured(plant)
    assert found.seconds is None and found.high is None
    assert "never back" in found.story


def test_a_window_that_ends_too_early_is_inconclusive() -> None:
    late = Plant(between(155.5, 158), fault=ONE_SHOT)  # bad at 155.5–158, the window ends at 160, hold is 5
    assert status(late) is Verdict.INCONCLUSIVE
    assert "before the service had been back" in ASKED.judge(late.build(), Phase.AFTER).evidence


def test_too_few_requests_are_inconclusive() -> None:
    assert status(Plant(fault=ONE_SHOT, per_second=0.5)) is Verdict.INCONCLUSIVE


# ── partial outages ──


@pytest.mark.parametrize("q", [1 / 6, 1 / 3, 1 / 2, 2 / 3])
def test_the_interval_covers_a_partial_outage(q: float) -> None:
    for seed in range(10):
        plant = Plant(share(q, 100.2, 106.0, seed), poisson=30, seed=seed, fault=ONE_SHOT)
        found = measured(plant)
        assert found.low is not None and found.high is not None and found.seconds is not None
        assert found.low <= 5.8 <= found.high, seed
        assert found.low <= found.seconds <= found.high


def test_a_good_request_within_an_outage_is_no_recovery() -> None:
    plant = Plant(lambda t: 100.2 <= t < 108 and not 103 <= t < 103.1, fault=ONE_SHOT)
    assert measured(plant).t_back == pytest.approx(108, abs=0.05)


def test_noise_long_after_does_not_move_the_recovery() -> None:
    plain = measured(Plant(between(100.2, 104.7), fault=ONE_SHOT))
    noisy = measured(Plant(lambda t: 100.2 <= t < 104.7 or 120.0 <= t < 120.02, fault=ONE_SHOT))
    assert noisy.seconds == plain.seconds


def test_noise_right_after_widens_the_interval_upwards() -> None:
    plain = measured(Plant(between(100.2, 104.7), fault=ONE_SHOT))
    noisy = measured(Plant(lambda t: 100.2 <= t < 104.7 or 105.2 <= t < 105.22, fault=ONE_SHOT))
    assert noisy.seconds == plain.seconds
    assert noisy.high is not None and plain.high is not None and noisy.high > plain.high + 0.4


def test_the_objective_must_hold_over_the_whole_hold_time() -> None:
    # After 104 two in ten fail for 4 s more: not back until 108.
    sparse = Plant(lambda t: 100.2 <= t < 104 or (104 <= t < 108 and int(t * 50) % 5 == 0), fault=ONE_SHOT)
    assert measured(sparse).t_back == pytest.approx(108, abs=0.3)


# ── latency ──


def test_a_slow_service_is_not_back() -> None:
    slow = Plant(fault=ONE_SHOT, ttft=lambda t: 0.8 if 100.2 <= t < 107 else 0.05)
    assert measured(slow).seconds == 0.0
    asked = replace(ASKED, first_token=0.5)
    assert measured(slow, asked).t_back == pytest.approx(107, abs=0.05)
    assert status(slow, replace(asked, within=5.0)) is Verdict.FAIL
    assert measured(slow, replace(ASKED, end_to_end=0.5)).t_back == pytest.approx(107, abs=0.05)


# ── the heal ──


def test_our_own_heal_is_not_a_recovery() -> None:
    plant = Plant(between(100.2, 130.2))
    assert status(plant, replace(ASKED, within=60.0)) is Verdict.FAIL
    assert "only by the heal" in measured(plant).story


def test_a_recovery_right_at_the_heal_cannot_be_told() -> None:
    assert status(Plant(between(100.2, UNDO - 0.3)), replace(ASKED, within=60.0)) is Verdict.INCONCLUSIVE


def test_a_failover_before_the_heal_counts() -> None:
    assert status(Plant(between(100.2, 108.0))) is Verdict.PASS


def test_after_heal_the_clock_runs_from_the_heal() -> None:
    asked = replace(ASKED, recovers="after_heal")
    plant = Plant(between(100.2, 133.0))
    found = measured(plant, asked)
    assert found.low is not None and found.high is not None
    assert found.low == pytest.approx(133.0 - GONE, abs=0.1)
    assert found.high == pytest.approx(133.0 - UNDO, abs=0.2)
    assert status(plant, asked) is Verdict.PASS
    assert status(plant, replace(asked, within=2.0)) is Verdict.FAIL
    assert asked.title == "recovers within 10 s of the heal"


def test_a_relapse_after_the_heal_has_its_own_clock_and_the_worse_counts() -> None:
    plant = Plant(lambda t: 100.2 <= t < 103 or 135 <= t < 148)
    assert status(plant) is Verdict.FAIL
    found = measured(plant)
    assert found.seconds == pytest.approx(13.0, abs=0.05)
    assert "relapse" in found.story
    short = Plant(lambda t: 100.2 <= t < 106 or 135 <= t < 137)
    assert measured(short).seconds == pytest.approx(5.8, abs=0.05)
    assert status(short) is Verdict.PASS


def test_repeated_outages_before_the_hold_time_are_one() -> None:
    plant = Plant(lambda t: 100.2 <= t < 102 or 104 <= t < 106 or 107.5 <= t < 109)
    assert measured(plant).t_back == pytest.approx(109, abs=0.05)


def test_a_relapse_while_the_fault_lasts_counts_as_well() -> None:
    plant = Plant(lambda t: 100.2 <= t < 102 or 112 <= t < 128, fault=ONE_SHOT)
    assert status(plant) is Verdict.FAIL
    assert measured(plant).seconds == pytest.approx(16, abs=0.05)


def test_a_late_effect_within_the_hold_time_is_the_faults() -> None:
    plant = Plant(between(103.0, 108.0))
    assert measured(plant).t_back == pytest.approx(108, abs=0.05)
    assert measured(plant).seconds == pytest.approx(8.0, abs=0.35)


# ── straddling ──


def test_a_stream_that_broke_does_not_count_as_sent_later() -> None:
    run = Plant(fault=ONE_SHOT).build()
    broken = Reply(0, 999_999, "long", 95.0, 100.2, Outcome.RESET_MID, t_first=95.1, pod="llm/engine-b")
    found = recovery.measure(replace(run, replies=(*run.replies, broken)), ASKED)
    assert found.seconds == 0.0
    assert found.t_fault_high == 100.2


def test_a_delayed_send_widens_the_upper_end() -> None:
    run = Plant(between(100.2, 104.7), fault=ONE_SHOT).build()
    late = tuple(replace(r, t_start=r.t_intended + 0.5) if 104.7 <= r.t_intended < 104.9 else r for r in run.replies)
    plain, delayed = recovery.measure(run, ASKED), recovery.measure(replace(run, replies=late), ASKED)
    assert plain.high is not None and delayed.high is not None
    assert delayed.high >= plain.high + 0.3
    assert delayed.low == plain.low


def test_a_request_counts_as_sent_when_it_was_on_the_wire() -> None:
    """A client that was stalled between its decision and the send has not seen the service any earlier."""
    run = Plant(between(100.2, 104.7), fault=ONE_SHOT).build()
    new = [replace(r, t_sent=r.t_intended + 0.4) if 104.7 <= r.t_intended < 104.8 else r for r in run.replies]
    plain, stalled = recovery.measure(run, ASKED), recovery.measure(replace(run, replies=tuple(new)), ASKED)
    assert plain.high is not None and stalled.high is not None
    assert stalled.high >= plain.high + 0.3


def test_the_last_of_the_good_requests_to_be_sent_bounds_the_recovery() -> None:
    """They may leave in another order than they were meant to: only all of them together prove it."""
    run = Plant(share(0.5, 100.2, 104.7), fault=ONE_SHOT).build()
    last = max(r.t_intended for r in run.replies if not r.ok)
    second = sorted(r.t_intended for r in run.replies if r.t_intended > last)[1]
    new = [replace(r, t_start=second + 2) if r.t_intended == second else r for r in run.replies]
    plain, mixed = recovery.measure(run, ASKED), recovery.measure(replace(run, replies=tuple(new)), ASKED)
    assert plain.high is not None and mixed.high is not None
    assert mixed.high >= plain.high + 1


def test_a_proof_before_the_first_bad_request_is_the_best_guess_of_the_fault() -> None:
    """The middle of its bounds was up to half their width off, although good requests before the proof say more."""
    plant = Plant(between(100.305, 104.7), fault=ONE_SHOT)  # proven at 100.3, no request in between
    run = plant.build()
    run = replace(run, replies=tuple(r for r in run.replies if not 100.301 < r.t_intended < 100.306))
    found = recovery.measure(run, ASKED)
    assert found.seconds == pytest.approx(4.4, abs=0.03)
    nobody_hit = recovery.examine(Plant(between(106.3, 108), fault=ONE_SHOT).build(), ASKED)
    assert nobody_hit.point == pytest.approx((HARM + PROOF) / 2)  # nothing tells where in its bounds


def test_recovery_of_one_class_of_requests() -> None:
    run = Plant(between(100.2, 104.7), fault=ONE_SHOT).build()
    new = [replace(r, cls="chat", outcome=Outcome.OK) if r.seq % 2 else r for r in run.replies]
    mixed = replace(run, replies=tuple(new))
    canary = recovery.measure(mixed, replace(ASKED, cls="canary"))
    assert canary.seconds == pytest.approx(4.5, abs=0.06)
    assert recovery.measure(mixed, replace(ASKED, cls="chat")).seconds == 0.0
    assert replace(ASKED, cls="chat").judge(mixed, Phase.AFTER).status is Verdict.PASS
    assert replace(ASKED, cls="long").judge(mixed, Phase.AFTER).status is Verdict.INCONCLUSIVE  # nobody asked


def test_shed_and_censored_requests_say_nothing() -> None:
    run = Plant(between(100.2, 104.7), fault=ONE_SHOT).build()
    more = [replace(r, seq=r.seq + 1_000_000, outcome=Outcome.CLIENT_SHED) for r in run.replies if r.t_intended > 110]
    assert recovery.measure(replace(run, replies=(*run.replies, *more)), ASKED) == recovery.measure(run, ASKED)


# ── stages ──


def test_stages_come_from_watches_and_replies() -> None:
    new = "llm/engine-n"
    marks: list[Event] = [
        EndpointMark(101.0, "llm", "llm/engine-a", ready=False),  # not a target
        EndpointMark(101.5, "llm", "llm/engine-b", ready=False, target=True),
        PodMark(102.0, new, "uid-n", "created"),
        PodMark(103.0, new, "uid-n", "scheduled", "node-a", "a"),
        PodMark(104.0, new, "uid-n", "started"),
        PodMark(109.0, new, "uid-n", "ready"),
        PodMark(99.0, "llm/engine-old", "uid-o", "created"),
        PodMark(100.5, "llm/engine-old", "uid-o", "ready"),
    ]
    plant = Plant(between(100.2, 108.0), fault=ONE_SHOT, extra=marks, pods=("engine-a", "engine-c"))
    run = plant.build()
    served = replace(run.replies[-1], t_intended=110.0, t_first=110.1, pod=new, seq=777_777)
    found = recovery.measure(replace(run, replies=(*run.replies, served)), ASKED)
    fault = 100.2
    wanted = {"noticed": 101.5, "moved": 103, "started": 104, "loaded": 109, "served": 110.1, "steady": 108}
    assert list(found.stages) == list(wanted)
    for name, t in wanted.items():
        assert found.stages[name] == pytest.approx(t - fault, abs=0.05), name
    assert "noticed 1.3 s" in found.story


def test_pods_that_restart_in_place_are_loaded_again() -> None:
    marks = [
        PodMark(100.4, "llm/engine-b", "uid-engine-b", "unready", target=True),
        PodMark(103.0, "llm/engine-b", "uid-engine-b", "restarted", target=True),
        PodMark(107.0, "llm/engine-b", "uid-engine-b", "ready", target=True),
    ]
    found = measured(Plant(between(100.2, 107.2), extra=marks, fault=ONE_SHOT))
    assert found.stages["started"] == pytest.approx(2.8, abs=0.05)
    assert found.stages["loaded"] == pytest.approx(6.8, abs=0.05)


# ── the rules themselves ──


def test_runs_needed() -> None:
    assert recovery.run_needed(1.0) == 1
    assert recovery.run_needed(0.5) == 8
    assert recovery.run_needed(1 / 6) == 30
    assert recovery.run_needed(0.001) == recovery.run_needed(0.1) == recovery.RUN == 51


def test_the_observation_covers_during_and_after() -> None:
    found = recovery.examine(Plant(between(100.2, 104.7)).build(), ASKED)
    assert found.series.start == HARM
    assert found.series.end == END
    assert found.series.t[-1] > AFTER
