"""The runs beside a run: how an experiment's verdict and recovery time went, as a small picture and in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gameday.model import Verdict
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
    """An experiment over the latest runs; `width` and `height` are the picture's, in pixels."""

    experiment: str
    dots: tuple[Dot, ...]
    width: float
    height: float
    said: str


def trends(run_root: Path) -> tuple[Trend, ...]:
    """Every experiment of the run with its past, oldest first; () where the run stands alone."""
    past = sorted(_runs(run_root), key=_began)[-LATEST:]
    if len(past) < 2:
        return ()
    runs: dict[str, list[tuple[Path, Entry]]] = defaultdict(list)
    for root in past:
        for entry in verdicts.entries(root):
            runs[entry.name].append((root, entry))
    now = {entry.name for entry in verdicts.entries(run_root)}
    return tuple(_trend(name, seen) for name, seen in sorted(runs.items()) if name in now and len(seen) > 1)


def _runs(run_root: Path) -> list[Path]:
    """This run and those that began before it."""
    until = _began(run_root)
    return [d for d in run_root.resolve().parent.iterdir() if d.is_dir() and 0 < _began(d) <= until]


def _began(run_root: Path) -> float:
    """Wall time at which the run's first experiment began; 0 where there is none."""
    return min(
        (float(e.about["epoch_wall"]) for e in verdicts.entries(run_root) if "epoch_wall" in e.about), default=0.0
    )


def _trend(name: str, seen: Sequence[tuple[Path, Entry]]) -> Trend:
    tops = [r.high or r.seconds or 0.0 for _, e in seen if (r := e.judgement.recovery) is not None]
    top = max(tops, default=0.0) or 1.0
    dots = tuple(_dot(i, root, entry, top) for i, (root, entry) in enumerate(seen))
    tally = words.tally(e.judgement.verdict for _, e in seen)
    return Trend(name, dots, 2 * _PAD + _STEP * (len(dots) - 1), _HEIGHT, f"{len(dots)} runs: {tally}")


def _dot(i: int, root: Path, entry: Entry, top: float) -> Dot:
    recovery = entry.judgement.recovery
    seconds = recovery.seconds if recovery and recovery.seconds is not None else 0.0

    def up(value: float | None) -> float:
        return round(_HEIGHT - _PAD - (seconds if value is None else value) / top * (_HEIGHT - 2 * _PAD), 1)

    said = words.recovered(recovery) if recovery else "no recovery asked"
    return Dot(
        x=_PAD + _STEP * i,
        y=up(seconds),
        low=up(recovery.low if recovery else None),
        high=up(recovery.high if recovery else None),
        verdict=entry.judgement.verdict,
        said=f"{root.name}: {entry.judgement.verdict}, {said}, seed {entry.judgement.seed}",
        link=f"../{root.name}/{entry.name}/report.html" if entry.reported else "",
    )
