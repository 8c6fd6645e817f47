"""Reading verdict.json back, and finding the experiments of a run.

An experiment directory without a verdict is an ERROR in every report: a run that died is never left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from gameday.errors import RecordError
from gameday.model import Counts, Finding, Judgement, Phase, Recovery, Verdict

VERDICT = "verdict.json"
RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One experiment of a run: its directory and its judgement; `about` is run.json's account of it, as text."""

    dir: Path
    judgement: Judgement
    about: Mapping[str, str]

    @property
    def name(self) -> str:
        """The experiment, with the trial where there are several."""
        return self.dir.name

    @property
    def report(self) -> Path | None:
        path = self.dir / "report.html"
        return path if path.is_file() else None


def read(run_dir: Path) -> Judgement:
    """The judgement in `run_dir/verdict.json`; RecordError names the file when it cannot be read."""
    path = run_dir / VERDICT
    try:
        data = json.loads(path.read_bytes())
        return _judgement(data)
    except FileNotFoundError as error:
        raise RecordError(f"{path} is missing: the experiment ended before it was judged.") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise RecordError(f"{path} is not a verdict: {error}.") from error


def entries(run_root: Path) -> tuple[Entry, ...]:
    """The experiments below `runs/<run-id>/`, in the order in which they began."""
    if not run_root.is_dir():
        raise RecordError(f"{run_root} is not a run directory.")
    found = [_entry(d) for d in run_root.iterdir() if (d / RUN).is_file() or (d / VERDICT).is_file()]
    return tuple(sorted(found, key=lambda e: (_number(e.about.get("epoch_mono")), e.name)))


def _entry(run_dir: Path) -> Entry:
    about = _about(run_dir / RUN)
    try:
        judgement = read(run_dir)
    except RecordError as error:
        judgement = _lost(run_dir.name, about, str(error))
    return Entry(run_dir, judgement, about)


def _lost(name: str, about: Mapping[str, str], why: str) -> Judgement:
    finding = Finding("run", "a verdict was reached", Verdict.ERROR, None, None, "", evidence=why)
    seed = about.get("seed", "")
    return Judgement(
        experiment=about.get("experiment", name),
        verdict=Verdict.ERROR,
        findings=(finding,),
        recovery=None,
        counts=Counts(),
        seed=int(seed) if seed.isdecimal() else 0,
        target=about.get("target", ""),
        reproduce=about.get("reproduce", ""),
    )


def _about(path: Path) -> Mapping[str, str]:
    """The plain values of run.json, wherever they are nested; empty when it cannot be read (that is reported)."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return MappingProxyType({})
    inner = data.get("about", data) if isinstance(data, dict) else {}
    return MappingProxyType({k: str(v) for k, v in inner.items() if isinstance(v, (str, int, float))})


def _number(text: str | None) -> float:
    try:
        return float(text or "inf")
    except ValueError:
        return float("inf")


def _judgement(data: Mapping[str, object]) -> Judgement:
    recovery = data["recovery"]
    return Judgement(
        experiment=str(data["experiment"]),
        verdict=Verdict(str(data["verdict"])),
        findings=tuple(_finding(_mapping(f)) for f in _items(data["findings"])),
        recovery=None if recovery is None else _recovery(_mapping(recovery)),
        counts=Counts(**{f.name: _whole(_mapping(data["counts"])[f.name]) for f in fields(Counts)}),
        seed=_whole(data["seed"]),
        target=str(data["target"]),
        reproduce=str(data["reproduce"]),
    )


def _finding(data: Mapping[str, object]) -> Finding:
    phase = str(data["phase"])
    return Finding(
        phase="run" if phase == "run" else Phase(phase),
        objective=str(data["objective"]),
        status=Verdict(str(data["status"])),
        observed=_float(data.get("observed")),
        limit=_float(data.get("limit")),
        unit=str(data.get("unit", "")),
        low=_float(data.get("low")),
        high=_float(data.get("high")),
        samples=_whole(data.get("samples", 0)),
        evidence=str(data.get("evidence", "")),
    )


def _recovery(data: Mapping[str, object]) -> Recovery:
    stages = {str(k): _float(v) for k, v in _mapping(data.get("stages", {})).items()}
    return Recovery(
        seconds=_float(data.get("seconds")),
        low=_float(data.get("low")),
        high=_float(data.get("high")),
        stages={name: after for name, after in stages.items() if after is not None},
        t_fault_low=_float(data.get("t_fault_low")),
        t_fault_high=_float(data.get("t_fault_high")),
        t_back=_float(data.get("t_back")),
        story=str(data.get("story", "")),
    )


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, not {value!r:.60}")
    return value


def _items(value: object) -> Iterable[object]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, not {value!r:.60}")
    return value


def _float(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, not {value!r:.60}")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, not {value!r:.60}")
    return value
