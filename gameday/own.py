"""A team's own `*.chaos.yaml` and `*.chaos.json`: their fault; our load, lock, ledger, stops and verdict.

What gameday needs besides stands in the file itself, where Chaos Toolkit ignores it:

    extensions:
    - name: gameday
      traffic: {per_second: 20}                 # chat users; the default is 10 per second
      lasting: 60                               # seconds from the first action to the rollbacks
      objectives:                               # default: success ≥ 99 % before, ≥ 95 % during, nothing left behind
        before: [{type: Success, at_least: 0.999}]
        after: [{type: Recovers, within: 30, hold: 20}]
      proof: [latency is there]                 # probes with a tolerance that hold only while the fault is on
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults.chaostoolkit import ChaosToolkit
from gameday.activities import Own, parse, read
from gameday.collect import name_of
from gameday.errors import ExperimentError, GamedayError
from gameday.objectives import NothingLeftBehind, Objectives, Success
from gameday.spec import Spec
from loadgen.traffic import Chat, Traffic

LASTING = 30.0  # seconds, where the file says nothing and its pauses are shorter


def load(path: Path) -> tuple[Own, Spec]:
    """The experiment, and what is asked of the service while it runs. Raises `ExperimentError` with the place."""
    own = parse(read(path), path.name)
    extension, place = own.extension, f"{path.name}: extensions[gameday]"
    lasting = extension.get("lasting", max(LASTING, own.pausing))
    if isinstance(lasting, bool) or not isinstance(lasting, int | float) or not 0 < lasting <= 86400:
        raise ExperimentError(f"{place}.lasting: {lasting!r} is not a number of seconds up to a day.")
    traffic, objectives = _traffic(extension, place), _objectives(extension, place)
    return own, Spec(name_of(path), traffic, ChaosToolkit(own.text, float(lasting)), objectives)


def _traffic(extension: Any, place: str) -> Traffic:
    if "traffic" not in extension:
        return Chat(per_second=10)
    try:
        return Traffic.from_json({"type": "Chat", **extension["traffic"]})
    except (GamedayError, TypeError, ValueError) as wrong:
        raise ExperimentError(f"{place}.traffic: {wrong}") from wrong


def _objectives(extension: Any, place: str) -> Objectives:
    if "objectives" not in extension:
        return Objectives((Success(at_least=0.99),), (Success(at_least=0.95),), (NothingLeftBehind(),))
    try:
        return Objectives.from_json(extension["objectives"])
    except (GamedayError, TypeError, ValueError, AttributeError) as wrong:
        raise ExperimentError(f"{place}.objectives: {wrong}") from wrong
