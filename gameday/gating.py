"""pytest as a release gate: with `--gate`, what got slower than in earlier runs, beyond their noise, is not green."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from gameday.errors import RecordError
from reports.gate import gate, history


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks of the gate. No `baselines`: the runs beside this one."""

    baselines: tuple[Path, ...]
    by: float
    last: int
    strict: bool


@dataclass(frozen=True, slots=True)
class Held:
    """What it came to; `regressed` in words."""

    passed: bool
    story: str
    markdown: str = ""
    regressed: tuple[str, ...] = ()

    @property
    def closed(self) -> str:
        """Why, where nothing regressed; "" for an open gate."""
        return "" if self.passed or self.regressed else self.story.splitlines()[-1]


def asked(config: pytest.Config) -> Asked | None:
    """None where the command line asks for no gate."""
    baselines = tuple(Path(one) for one in config.getoption("gameday_baseline") or ())
    if not (config.getoption("gameday_gate") or baselines):
        return None
    by, last = config.getoption("gameday_gate_by"), config.getoption("gameday_gate_last")
    return Asked(baselines, by, last, config.getoption("gameday_gate_strict"))


def hold(root: Path | None, wanted: Asked) -> Held:
    """The run in `root` (None: there is none), held against what was asked for. Raises nothing."""
    if root is None or not root.is_dir():
        return Held(False, "gate CLOSED: no experiment ran, so there is nothing to let through")
    try:
        found = gate(root, wanted.baselines or history(root), by=wanted.by, last=wanted.last, strict=wanted.strict)
    except RecordError as wrong:
        return Held(False, f"gate CLOSED: {wrong}")
    slower = tuple(f"{f.experiment}: {f.what} {f.row[3]} · {f.evidence}" for f in found.regressed)
    return Held(found.passed, found.story, found.markdown, slower)
