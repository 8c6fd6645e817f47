"""The runs beside a run: how an experiment's verdict and recovery time went, as a small picture and in words."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gameday.model import Judgement, Phase, Verdict
from reports import verdicts, words
from reports.verdicts import Entry

LATEST = 20  # runs shown at most
_STEP, _HEIGHT, _PAD = 22, 56, 12  # pixels


@dataclass(frozen=True, slots=True)
class Dot:
    """One run of an experiment. `low`, `high`: the interval of the recovery, as y; larger seconds are higher up."""

    x: float
    y: float
    low: float
    high: float
    verdict: Verdict
    said: str
    link: str


@dataclass(frozen=True, slots=True)
class Trend:
    """One measure of an experiment over the latest runs; `width` and `height` are the picture's, in pixels."""

    experiment: str
    what: str
    dots: tuple[Dot, ...]
    width: float
    height: float
    said: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a run came to: the worst verdict of its trials, and its slowest measurement (seconds)."""

    column: int
    verdict: Verdict
    value: float | None
    low: float | None
    high: float | None
    said: str
    link: str


def trends(run_root: Path) -> tuple[Trend, ...]:
    """Every experiment of the run with its past, oldest first; () where the run stands alone.

    Runs stand in the same column in every picture. Of trials the worst verdict and the slowest measurement count.
    """
    past = sorted(_runs(run_root), key=_began)[-LATEST:]
    if len(past) < 2:
        return ()
    runs: dict[str, list[tuple[int, Path, list[Entry]]]] = defaultdict(list)
    for column, root in enumerate(past):
        trials: dict[str, list[Entry]] = defaultdict(list)
        for entry in verdicts.entries(root):
            trials[entry.judgement.experiment].append(entry)
        for name, entries in trials.items():
            runs[name].append((column, root, entries))
    now = {entry.judgement.experiment for entry in verdicts.entries(run_root)}
    return tuple(t for name, seen in sorted(runs.items()) if name in now and len(seen) > 1 for t in _pair(name, seen))


def _pair(name: str, seen: Sequence[tuple[int, Path, list[Entry]]]) -> Iterator[Trend]:
    """The recovery; and the first token, where it was asked for."""
    yield _trend(name, "recovery", [_seen(*one, _recovery) for one in seen])
    tokens = [_seen(*one, _first_token) for one in seen]
    if any(t.value is not None for t in tokens):
        yield _trend(name, "first token p95, fault lasting", tokens)


Figures = tuple[float | None, float | None, float | None, str]


def _seen(column: int, root: Path, entries: Sequence[Entry], measure: Callable[[Judgement], Figures]) -> _Seen:
    values = [math.inf if (value := measure(e.judgement)[0]) is None else value for e in entries]
    slowest = entries[values.index(max(values))]  # none is slower than the one that never came back
    value, low, high, said = measure(slowest.judgement)
    verdict = Verdict.worst(e.judgement.verdict for e in entries)
    trials = f" (the slowest of {len(entries)} trials)" if len(entries) > 1 else ""
    return _Seen(
        column, verdict, value, low, high,
        said=f"{root.name}: {verdict}, {said}{trials}, seed {entries[0].judgement.seed}",
        link=f"../{root.name}/{slowest.name}/report.html" if slowest.reported else "",
    )  # fmt: skip


def _recovery(judgement: Judgement) -> Figures:
    recovery = judgement.recovery
    if recovery is None:
        return None, None, None, "no recovery asked"
    return recovery.seconds, recovery.low, recovery.high, words.recovered(recovery)


def _first_token(judgement: Judgement) -> Figures:
    asked = [
        f for f in judgement.findings
        if f.phase is Phase.DURING and f.unit == "s" and "first token" in f.objective and "p95" in f.objective
    ]  # fmt: skip
    if not asked:
        return None, None, None, "not asked"
    worst = max(asked, key=lambda f: f.observed or 0.0)
    return worst.observed, worst.low, worst.high, words.observed(worst)


def _runs(run_root: Path) -> list[Path]:
    """This run and those that began before it."""
    until = _began(run_root)
    return [d for d in run_root.resolve().parent.iterdir() if d.is_dir() and 0 < _began(d) <= until]


def _began(run_root: Path) -> float:
    """Wall time at which the run's first experiment began; 0 where there is none."""
    return min(
        (t for e in verdicts.entries(run_root) if (t := verdicts.number(e.about.get("epoch_wall"))) < math.inf),
        default=0.0,
    )


def _trend(name: str, what: str, seen: Sequence[_Seen]) -> Trend:
    top = max((s.high or s.value or 0.0 for s in seen), default=0.0) or 1.0
    dots = tuple(_dot(one, top) for one in seen)
    columns = max(one.column for one in seen)
    return Trend(name, what, dots, 2 * _PAD + _STEP * columns, _HEIGHT, _words(seen))


def _words(seen: Sequence[_Seen]) -> str:
    """`now 1.15 s; before 2.20 s (0.90–3.10) in 3 runs · 3 PASS`"""
    values = [s.value for s in seen[:-1] if s.value is not None]
    told = f"now {words.quantity(seen[-1].value, 's')}"
    if values:
        middle, *range_ = (words.quantity(v, "s") for v in (statistics.median(values), min(values), max(values)))
        told += f"; before {middle}"
        if len(set(range_)) > 1:
            told += f", from {' to '.join(range_)}"
    return f"{told} · {len(seen)} runs: {words.tally(s.verdict for s in seen)}"


def _dot(one: _Seen, top: float) -> Dot:
    """One without a value (it never came back, or was not measured) stands at the upper edge: it is no zero."""
    seconds = top * 1.2 if one.value is None else one.value

    def up(value: float | None) -> float:
        return round(_HEIGHT - _PAD - (seconds if value is None else value) / top * (_HEIGHT - 2 * _PAD), 1)

    return Dot(_PAD + _STEP * one.column, up(seconds), up(one.low), up(one.high), one.verdict, one.said, one.link)
