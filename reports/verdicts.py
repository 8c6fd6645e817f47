"""The experiments of a run and their verdicts.

An experiment that ended without a verdict is an ERROR in every report: what died is never left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gameday.errors import RecordError
from gameday.model import Counts, Finding, Judgement, Verdict
from gameday.record import read_verdict, write_verdict
from gameday.trials import Trials, pool

RUN = "run.json"
SIGNS = (RUN, "verdict.json", "events.jsonl", "experiment.json")
"""Files by which the directory of an experiment is known, however early it died."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One experiment of a run; `about` is what run.json says of it, as text."""

    dir: Path
    judgement: Judgement
    about: Mapping[str, str]

    @property
    def name(self) -> str:
        """The experiment, with the trial where there are several."""
        return self.dir.name

    @property
    def reported(self) -> bool:
        return (self.dir / "report.html").is_file()

    @property
    def asked(self) -> int:
        """How many trials of the experiment were asked for; 1 where the record does not say."""
        try:
            return int(json.loads((self.dir / RUN).read_bytes())["about"]["settings"]["trials"])
        except (OSError, ValueError, LookupError, TypeError):
            return 1

    @property
    def seconds(self) -> float | None:
        """How long it took, from the run's start to its last event; None when the record does not say."""
        try:
            last = (self.dir / "events.jsonl").read_bytes().splitlines()[-1]
            return max(0.0, float(json.loads(last)["t"]) - float(self.about["epoch_mono"]))
        except (OSError, ValueError, LookupError, TypeError):
            return None


def read(run_dir: Path) -> Judgement:
    """The judgement in `run_dir`; of one that has none, or one that cannot be read, an ERROR that says so."""
    try:
        return read_verdict(run_dir)
    except RecordError as error:
        return _lost(run_dir, str(error))


def entries(run_root: Path) -> tuple[Entry, ...]:
    """The experiments below `runs/<run-id>/`, in the order in which they began; RecordError where there is no run."""
    if not run_root.is_dir():
        raise RecordError(f"{run_root} is not a run directory")
    dirs = sorted(d for d in run_root.iterdir() if any((d / name).is_file() for name in SIGNS))
    found = [Entry(d, read(d), _about(d)) for d in dirs]
    return tuple(sorted(found, key=lambda e: number(e.about.get("epoch_mono"))))


BEGUN = "experiment could begin"
"""The objective of the only finding of an experiment that could not begin."""


def keep(run_root: Path, judgements: Iterable[Judgement]) -> None:
    """Write down the experiments that could not begin: they have no record, and must not be missing from the reports.

    A trial that never ran is not written: its absence is told by the number of trials that were asked for.
    """
    for judgement in judgements:
        errors = [f for f in judgement.findings if f.objective == BEGUN and f.status is Verdict.ERROR]
        directory = run_root / judgement.experiment
        if not errors or (directory.exists() and not (directory / "verdict.json").exists()):
            continue
        if directory.exists() and read(directory) != judgement:
            directory = directory.with_name(f"{directory.name}.not_begun")
        directory.mkdir(parents=True, exist_ok=True)
        write_verdict(directory, judgement)


def trials(entries: Iterable[Entry]) -> tuple[Trials, ...]:
    """The experiments that were, or should have been, tried more than once, pooled."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.judgement.experiment, []).append(entry)
    asked = {name: max(e.asked for e in some) for name, some in grouped.items()}
    return tuple(
        pool([e.judgement for e in some], asked[name])
        for name, some in grouped.items()
        if max(len(some), asked[name]) > 1
    )


def _lost(run_dir: Path, why: str) -> Judgement:
    about = _about(run_dir)
    seed = about.get("seed", "")
    return Judgement(
        experiment=about.get("experiment", run_dir.name),
        verdict=Verdict.ERROR,
        findings=(Finding("run", "a verdict was reached", Verdict.ERROR, None, None, "", evidence=why),),
        recovery=None,
        counts=Counts(),
        seed=int(seed) if seed.isdecimal() else 0,
        target=about.get("target", ""),
        reproduce=about.get("reproduce", ""),
    )


def _about(run_dir: Path) -> Mapping[str, str]:
    """The plain values of run.json's `about`; empty when it cannot be read, which the verdict's absence then tells."""
    try:
        about = json.loads((run_dir / RUN).read_bytes())["about"]
        return MappingProxyType({k: str(v) for k, v in about.items() if isinstance(v, (str, int, float))})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return MappingProxyType({})


def number(text: str | None) -> float:
    """What run.json says, infinite where it says none."""
    try:
        return float(text or "inf")
    except ValueError:
        return float("inf")
