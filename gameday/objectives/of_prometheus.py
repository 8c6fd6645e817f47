"""Objectives that Prometheus confirms, over windows. It never measures a recovery."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson

from gameday.clock import Epoch
from gameday.errors import ExperimentError
from gameday.model import Finding, Phase, Sample, Timeline
from gameday.objectives.base import FAIL, INCONCLUSIVE, PASS, Objective, check_seconds, objective, unseen, where
from gameday.promql import age_of_all, age_of_any, selectors
from gameday.recovery import fault_instant
from gameday.units import Seconds, show_duration
from gameday.windows import Window, window


@objective
@dataclass(frozen=True, slots=True)
class Promql(Objective):
    """Every sample of a query within its limit, over the whole phase. Exactly one of the limits is given.

    The series behind the query are watched for being stale, and must all exist. They are found in the query; `series`
    names them where that is not what is meant: plain selectors, of which one exists. `rate(errors[1m]) or vector(0)`
    is such a query: a counter that was never raised cannot be told from one that is misspelt, `series=("requests",)`
    can.
    """

    query: str
    at_most: float | None = None
    at_least: float | None = None
    name: str = ""
    unit: str = ""
    series: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ExperimentError(f"Promql {self.name or self.query!r} takes exactly one of at_most and at_least")
        if not self.query.strip():
            raise ExperimentError("Promql needs a query")

    @property
    def title(self) -> str:
        sign, limit = ("≤", self.at_most) if self.at_most is not None else ("≥", self.at_least)
        return f"{self.name or self.query} {sign} {limit:g}{' ' + self.unit if self.unit else ''}"

    @property
    def age(self) -> str:
        """The query for the age of the oldest of the series, seconds; "" where there are none (`time()`)."""
        if self.series:
            return age_of_any(self.series)
        found = () if re.search(r"\babsent(_over_time)?\s*\(", self.query) else selectors(self.query)
        return age_of_all(found) if found else ""

    def queries(self) -> tuple[tuple[str, str], ...]:
        name = self.name or self.query
        return ((name, self.query), *(((f"age of {name}", self.age),) if self.age else ()))

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        limit = self.at_most if self.at_most is not None else self.at_least
        span = window(timeline, phase)
        found = [] if span is None else samples_of(timeline, self.query, span)
        usable = [s.value for s in found if s.value is not None and not _unusable(timeline, s)]
        broken = [v for v in usable if not self.keeps(v)]
        missing = "the phase has no window" if span is None else unsound(timeline, span, found)
        old = stale(timeline, span, self.age) if self.age and span is not None else ""
        if old or (missing and not broken):  # a limit that was broken is broken, whatever else was not seen
            raw = f"{self.query} → {_answer(found[-1])}" if found else self.query
            why = f"{missing or old}; {raw}"
            return Finding(phase, self.title, INCONCLUSIVE, None, limit, self.unit, samples=len(found), evidence=why)
        worst = max(usable) if self.at_most is not None else min(usable)
        at = next(s for s in found if s.value == worst)
        evidence = f"worst at {where(timeline, at.t, at.t)}; {self.query} → {_answer(at)}"
        status = FAIL if broken else PASS
        low, high = min(usable), max(usable)
        return Finding(phase, self.title, status, worst, limit, self.unit, low, high, len(usable), evidence)

    def keeps(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)


def samples_of(timeline: Timeline, query: str, span: Window) -> list[Sample]:
    """The samples of a query within a window, in the order of time."""
    return sorted((s for s in timeline.samples if s.query == query and s.t in span), key=lambda s: (s.t, s.name))


def _answer(sample: Sample) -> str:
    return sample.raw or sample.error or str(sample.value)


FEWEST = 4  # scrape intervals that a window must hold, and samples


def unsound(timeline: Timeline, span: Window, found: Sequence[Sample]) -> str:
    """Why these samples cannot be judged; empty when they can."""
    scrape = timeline.about.scrape_interval
    if not found:
        return "no sample in this phase"
    if trouble := next((t for s in found if (t := _unusable(timeline, s))), ""):
        return trouble
    if span.length < FEWEST * scrape:
        return f"the window of {show_duration(span.length)} is shorter than {FEWEST} scrape intervals"
    if len(found) < FEWEST:
        return f"{len(found)} samples are too few, {FEWEST} are needed"
    edges = [span.start, *sorted(s.t for s in found), span.end]
    hole = max(b - a for a, b in pairwise(edges))
    if hole > 3 * max(scrape, 1.0):
        return f"no sample for {show_duration(hole)}"
    return ""


def _unusable(timeline: Timeline, sample: Sample) -> str:
    if sample.error:
        return f"Prometheus answered with an error: {sample.error}"
    if sample.value is None:
        return "Prometheus has no data"
    if not math.isfinite(sample.value):
        return f"the value is {sample.value}"
    ahead = _clock_ahead(timeline, sample)
    if ahead is None:
        return "its answer does not tell its time, so that its clock cannot be held against ours"
    if abs(ahead) > max(CLOCKS_APART, timeline.about.scrape_interval):
        return f"Prometheus' clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} ours"
    return ""


ANSWERS_WITHIN = 3.0  # seconds between our question's instant and the one of the answer, at most
CLOCKS_APART = 2.0  # seconds that clocks may differ


def _clock_ahead(timeline: Timeline, sample: Sample) -> float | None:
    """By how much the answer's own time differs from ours beyond what answering takes; None when it tells none.

    A sample without any answer was not asked of a Prometheus (a test's, or an older record's): 0.
    """
    told = sample.told if sample.told is not None else _told_time(sample.raw)
    if told is None:
        return None if sample.raw else 0.0
    ours = Epoch(timeline.about.epoch_wall, timeline.about.epoch_mono).to_wall(sample.t)
    if told < ours:
        return told - ours
    return max(0.0, told - ours - ANSWERS_WITHIN)


def _told_time(raw: str) -> float | None:
    """The evaluation time in `[{"metric": …, "value": [time, "1"]}]`, Unix seconds."""
    try:
        answer: Any = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None  # cut short as evidence, or not kept
    if not isinstance(answer, list) or not answer:
        return None
    value = answer[0].get("value") if isinstance(answer[0], dict) else answer
    return float(value[0]) if isinstance(value, list) and value and isinstance(value[0], int | float) else None


def stale(timeline: Timeline, span: Window, query: str) -> str:
    """Why the series behind a query are not fresh; empty when they are."""
    ages = samples_of(timeline, query, span)
    if trouble := unsound(timeline, span, ages):
        return f"the age of the series is unknown: {trouble}"
    oldest = max(s.value for s in ages if s.value is not None)
    if oldest > 3 * timeline.about.scrape_interval:
        return f"the series is stale: its last scrape was {show_duration(oldest)} old"
    return ""


@objective
@dataclass(frozen=True, slots=True)
class Alerts(Objective):
    """An alert fires `within` seconds of the fault: the time to detect. Its resolution is that of the scrapes.

    It must not fire before: then nothing can be said of what it detects.
    """

    fires: str
    within: Seconds
    labels: str = ""  # further label matchers: 'severity="page"'

    def __post_init__(self) -> None:
        check_seconds("Alerts.within", self.within)
        if not self.fires.strip() or '"' in self.fires:
            raise ExperimentError(f"Alerts.fires is an alert's name, not {self.fires!r}")

    @property
    def title(self) -> str:
        return f"alert {self.fires} fires within {show_duration(self.within)}"

    @property
    def query(self) -> str:
        more = f",{self.labels}" if self.labels else ""
        # An alert that is not active has no series; 0 tells it from a Prometheus without an answer.
        return f'count(ALERTS{{alertname="{self.fires}",alertstate="firing"{more}}}) or vector(0)'

    def queries(self) -> tuple[tuple[str, str], ...]:
        return ((f"alert {self.fires}", self.query),)

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        fault = fault_instant(timeline)
        spans = [w for p in Phase if (w := window(timeline, p))]
        if fault is None or not spans:
            return unseen(phase, self.title, self.within, "the fault was not seen to act", "s")
        start, end = min(w.start for w in spans), max(w.end for w in spans)
        found = samples_of(timeline, self.query, Window(start, end))
        fired = next((s for s in found if s.t >= fault.start and (s.value or 0) >= 1), None)
        look = Window(start, end if fired is None else min(end, fired.t + timeline.about.scrape_interval))
        trouble = unsound(timeline, look, [s for s in found if s.t in look])
        if any((s.value or 0) >= 1 for s in found if s.t < fault.start):
            trouble = "it fired before the fault already"
        if trouble:
            return unseen(phase, self.title, self.within, trouble, "s")
        if fired is None:
            seen = end - fault.end
            status = FAIL if seen > self.within else INCONCLUSIVE
            why = f"it did not fire within {show_duration(seen)}"
            return Finding(phase, self.title, status, None, self.within, "s", max(0.0, seen), None, len(found), why)
        before = max((s.t for s in found if s.t < fired.t), default=fault.start)
        low, high = max(0.0, before - fault.end), fired.t - fault.start
        status = PASS if high <= self.within else FAIL if low > self.within else INCONCLUSIVE
        took = min(max(low, fired.t - fault.end), high)
        evidence = f"fired {where(timeline, before, fired.t)}; {self.query} → {fired.raw or fired.value}"
        return Finding(phase, self.title, status, took, self.within, "s", low, high, len(found), evidence)
