"""A run in one JSON document, for other programs: every experiment's verdict.json, and the worst verdict of all.

    {"version": 1, "run": …, "verdict": …, "experiments": [{"name", "dir", "seconds", "report", …verdict.json}],
     "trials": [{"experiment", "passed", "of", "verdict", "pass_rate_low", "pass_rate_high"}]}

Durations in seconds. `version` grows when a field changes its meaning or goes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gameday.model import Verdict
from gameday.record import verdict_json
from reports import verdicts

SUMMARY = "summary.json"
VERSION = 1


def write(run_root: Path) -> Path:
    """Write `run_root/summary.json`; RecordError where there is no run."""
    path = run_root / SUMMARY
    path.write_text(json.dumps(summary(run_root), indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return path


def summary(run_root: Path) -> dict[str, Any]:
    entries = verdicts.entries(run_root)
    trials = verdicts.trials(entries)
    return {
        "version": VERSION,
        "run": run_root.resolve().name,
        "verdict": str(Verdict.worst([*(e.judgement.verdict for e in entries), *(t.verdict for t in trials)])),
        "experiments": [_experiment(entry) for entry in entries],
        "trials": [
            {
                "experiment": t.experiment,
                "passed": t.passed,
                "of": t.of,
                "verdict": str(t.verdict),
                "pass_rate_low": t.pass_rate_low,
                "pass_rate_high": t.pass_rate_high,
            }
            for t in trials
        ],
    }


def _experiment(entry: verdicts.Entry) -> dict[str, Any]:
    return {
        **verdict_json(entry.judgement),
        "name": entry.name,
        "dir": entry.name,
        "seconds": entry.seconds,
        "report": f"{entry.name}/report.html" if entry.reported else None,
    }
