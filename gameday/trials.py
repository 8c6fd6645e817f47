"""Repeated trials of one experiment, seen together: how many passed, the worst, and the range of what was seen.

One green trial of a rare failure proves little: of k passes in k, the rule of three says that the failure rate may
still be 3/k (95 %). Pure functions of judgements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gameday.model import Finding, Judgement, Phase, Recovery, Verdict
from gameday.objectives.base import wilson
from gameday.units import show_duration


@dataclass(frozen=True, slots=True)
class Pooled:
    """One objective over all trials. `observed` is the mean of the trials', weighted by their samples.

    `low` and `high` span the intervals of all trials: what any of them leaves possible. `least` and `most` are the
    trials' own values: the worst case is one of them.
    """

    phase: Phase | Literal["run"]
    objective: str
    passed: int
    of: int
    worst: Verdict
    observed: float | None
    low: float | None
    high: float | None
    least: float | None
    most: float | None
    limit: float | None
    unit: str


@dataclass(frozen=True, slots=True)
class Trials:
    """`passed` of `of` trials passed; `verdict` is the worst; `recovery` is the slowest trial's.

    `of` counts the trials that were asked for; one that never ran has not passed.
    """

    experiment: str
    passed: int
    of: int
    verdict: Verdict
    findings: tuple[Pooled, ...]
    recovery: Recovery | None
    recovery_low: float | None  # of all trials
    recovery_high: float | None  # None: one of them never recovered
    missing: int  # trials that were asked for and never ran
    pass_rate_low: float  # 95 % interval of the share that would pass
    pass_rate_high: float

    @property
    def story(self) -> str:
        """`3 of 3` and the worst case, in one line."""
        told = f"{self.passed} of {self.of}"
        if self.recovery is None:
            return told
        slowest = "never" if self.recovery.seconds is None else show_duration(self.recovery.seconds)
        return f"{told} · slowest recovery {slowest}"


def pool(judgements: Sequence[Judgement], asked: int | None = None) -> Trials:
    """All trials of one experiment, in any order; `asked`: how many there should be, by default as many as there are.

    Raises ValueError for none, or for several experiments.
    """
    names = {j.experiment for j in judgements}
    if len(names) != 1:
        raise ValueError(f"trials of one experiment are pooled, not of {sorted(names)}")
    passed = sum(j.passed for j in judgements)
    measured = [j.recovery for j in judgements if j.recovery is not None]
    highs = [r.high for r in measured if r.high is not None]
    count = max(len(judgements), asked or 0)
    never = count - len(judgements)
    missing = [Verdict.INCONCLUSIVE] * never
    low, high = wilson(passed, count)
    return Trials(
        experiment=names.pop(),
        passed=passed,
        of=count,
        verdict=Verdict.worst([*missing, *(j.verdict for j in judgements)]),
        findings=_pool_findings(judgements, count),
        recovery=max(measured, key=_slow, default=None),
        recovery_low=min((r.low for r in measured if r.low is not None), default=None),
        recovery_high=max(highs) if highs and len(highs) == len(measured) and not missing else None,
        missing=never,
        pass_rate_low=low,
        pass_rate_high=high,
    )


def _slow(recovery: Recovery) -> tuple[bool, float]:
    return recovery.seconds is None, recovery.seconds or 0.0


def _pool_findings(judgements: Sequence[Judgement], trials: int) -> tuple[Pooled, ...]:
    groups: dict[tuple[str, str], list[Finding]] = {}
    for judgement in judgements:
        for f in judgement.findings:
            groups.setdefault((str(f.phase), f.objective), []).append(f)
    return tuple(_pool_one(some, trials) for some in groups.values())


def _pool_one(some: Sequence[Finding], trials: int) -> Pooled:
    seen = [(f.observed, max(1, f.samples)) for f in some if f.observed is not None]
    total = sum(n for _, n in seen)
    worst = Verdict.worst(f.status for f in some)
    if len(some) < trials:  # in some trial it was not even judged
        worst = Verdict.worst([worst, Verdict.INCONCLUSIVE])
    return Pooled(
        phase=some[0].phase,
        objective=some[0].objective,
        passed=sum(f.status is Verdict.PASS for f in some),
        of=trials,
        worst=worst,
        observed=sum(x * n for x, n in seen) / total if total else None,
        low=min((f.low for f in some if f.low is not None), default=None),
        high=max((f.high for f in some if f.high is not None), default=None),
        least=min((x for x, _ in seen), default=None),
        most=max((x for x, _ in seen), default=None),
        limit=some[0].limit,
        unit=some[0].unit,
    )
