"""What Prometheus answered over the run, as series that can be drawn. Pure; x is seconds since the fault."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from gameday.model import Finding, Phase, Sample, Timeline
from reports.view import ALERT, Axis

AGE = "age of "  # begins the name of samples that tell how old another one's series is
TARGETS = "count(up == 1)"  # asked in every run, as a sign of life
POINTS = 800  # drawn per series: the lowest and the highest of each stretch, so that no peak is lost
CHARTS = 8


@dataclass(frozen=True, slots=True)
class Limit:
    """What was asked of the series while a phase lasted."""

    start: float
    end: float
    value: float


@dataclass(frozen=True, slots=True)
class Series:
    """`points`: (x, value), NaN where the line breaks. `missing`: instants at which there was no answer."""

    name: str
    query: str
    points: tuple[tuple[float, float], ...]
    missing: tuple[float, ...]
    limits: tuple[Limit, ...]
    samples: int
    error: str  # the last reason why there was no answer
    thinned: bool

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(y for _, y in self.points if math.isfinite(y))


def series(timeline: Timeline, findings: Sequence[Finding], on: Axis) -> tuple[Series, ...]:
    """A series per query: those with a limit first, then the others, then which targets were up."""
    grouped: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in timeline.samples:
        if not sample.name.startswith((ALERT, AGE)):
            grouped[sample.name, sample.query].append(sample)
    found = [_series(name, query, seen, findings, on) for (name, query), seen in grouped.items()]
    return tuple(sorted(found, key=lambda s: (s.query == TARGETS, not s.limits, s.name)))


def _series(name: str, query: str, seen: Sequence[Sample], findings: Sequence[Finding], on: Axis) -> Series:
    read = [(on.at(s.t), math.nan if s.value is None else s.value) for s in seen]
    kept = tuple(_thinned(read)) if len(read) > POINTS else tuple(read)
    missing = [x for x, y in read if not math.isfinite(y)]
    return Series(
        name=name,
        query=query,
        points=tuple((x, y if math.isfinite(y) else math.nan) for x, y in kept),
        missing=tuple(missing[:: max(1, math.ceil(len(missing) / POINTS))]),
        limits=tuple(_limits(name, findings, on)),
        samples=len(seen),
        error=next((s.error for s in reversed(seen) if s.error), ""),
        thinned=len(kept) < len(read),
    )


def _thinned(read: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Of each stretch the lowest, the highest and one that is missing, in the order of time."""
    width = (read[-1][0] - read[0][0]) / (POINTS / 2) or 1.0
    for _, group in groupby(read, key=lambda point: math.floor((point[0] - read[0][0]) / width)):
        some = list(group)
        known = [p for p in some if math.isfinite(p[1])]
        lost = [p for p in some if not math.isfinite(p[1])][:1]
        ends = [min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])] if known else []
        yield from sorted({*ends, *lost})


def _limits(name: str, findings: Iterable[Finding], on: Axis) -> Iterator[Limit]:
    spans = {p.name: p for p in on.phases}
    for f in findings:
        asked = f.limit is not None and f.objective.startswith((f"{name} ≤ ", f"{name} ≥ "))
        if asked and f.limit is not None and isinstance(f.phase, Phase) and f.phase in spans:
            yield Limit(spans[f.phase].start, spans[f.phase].end, f.limit)
