"""Repeated trials: 3 of 3, the worst case, and intervals that hold all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planted import FAULT, HARM, Plant, between

from gameday.judge import judge
from gameday.model import Judgement, Verdict
from gameday.objectives import Objectives, Recovers, Success
from gameday.trials import pool

ASKED = Objectives(before=(Success(0.99),), after=(Success(0.9), Recovers(10.0, hold=5.0)))


def trial(seconds: float, seed: int = 1) -> Judgement:
    fault = replace(FAULT, one_shot=True)
    return judge(Plant(between(HARM + 0.2, HARM + 0.2 + seconds), seed=seed, fault=fault).build(), ASKED)


def test_three_of_three() -> None:
    found = pool([trial(2), trial(5), trial(3)])
    assert (found.passed, found.of, found.verdict) == (3, 3, Verdict.PASS)
    assert found.recovery is not None and found.recovery.seconds == pytest.approx(5, abs=0.05)
    assert found.recovery_low is not None and found.recovery_low < 2
    assert found.recovery_high is not None and found.recovery_high > 5
    assert found.story.startswith("3 of 3 · slowest recovery 5.0 s")
    assert found.pass_rate_low < 0.5 < found.pass_rate_high == 1.0  # three green trials prove little


def test_one_of_three_failed() -> None:
    found = pool([trial(2), trial(15), trial(3)])
    assert (found.passed, found.of, found.verdict) == (2, 3, Verdict.FAIL)
    recovers = next(f for f in found.findings if f.objective.startswith("recovers"))
    assert (recovers.passed, recovers.of, recovers.worst) == (2, 3, Verdict.FAIL)
    assert recovers.high is not None and recovers.high > 15


def test_one_never_recovered() -> None:
    found = pool([trial(2), trial(1000)])
    assert found.recovery is not None and found.recovery.seconds is None
    assert found.recovery_high is None
    assert "never" in found.story


def test_shares_are_pooled_by_their_samples() -> None:
    one, two = trial(2), trial(2)
    pooled = pool([one, two])
    success = next(f for f in pooled.findings if f.objective == "success ≥ 90 %")
    assert success.observed == 1.0
    assert success.low is not None and success.low < 1.0


def test_a_trial_that_judged_less_is_not_green() -> None:
    short = replace(trial(2), findings=trial(2).findings[:-1])
    recovers = next(f for f in pool([trial(2), short]).findings if f.objective.startswith("recovers"))
    assert recovers.worst is Verdict.INCONCLUSIVE


def test_a_trial_that_was_asked_for_and_never_ran_has_not_passed() -> None:
    found = pool([trial(2), trial(3)], asked=3)
    assert (found.passed, found.of, found.verdict) == (2, 3, Verdict.INCONCLUSIVE)
    assert found.recovery_high is None  # who knows
    assert all(f.worst is not Verdict.PASS for f in found.findings)
    assert found.story.startswith("2 of 3")


def test_the_worst_case_is_one_of_the_trials() -> None:
    recovers = next(f for f in pool([trial(2), trial(5)]).findings if f.objective.startswith("recovers"))
    assert recovers.least == pytest.approx(2, abs=0.1) and recovers.most == pytest.approx(5, abs=0.1)


def test_only_trials_of_one_experiment_are_pooled() -> None:
    with pytest.raises(ValueError, match="one experiment"):
        pool([])
    with pytest.raises(ValueError, match="pod_kill"):
        pool([trial(2), replace(trial(2), experiment="pod_kill")])
