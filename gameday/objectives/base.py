"""Objectives: what a service promises, as types with units. Each judges a timeline into a `Finding`.

How a share or a quantile is judged: the *observed* value against the limit decides; the interval (95 %) beside it
informs. A limit that so few requests cannot resolve is INCONCLUSIVE: a share of at least L needs 0.5 / (1 − L) good
requests (99.9 %: 500; never fewer than 50), a quantile p needs 2 / (1 − p) answers (p95: 40; never fewer than 30).
Only *good* requests count towards what is needed, so that further failures never make a phase judgeable.

Durations are seconds, shares lie in [0, 1].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

from gameday.clock import Epoch
from gameday.errors import ExperimentError, SettingsError
from gameday.model import Finding, Phase, Timeline, Verdict
from gameday.windows import window

PASS, FAIL, INCONCLUSIVE, ERROR = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR


@dataclass(frozen=True, slots=True)
class Objective(ABC):
    """One promise. Subclasses are frozen dataclasses whose fields are JSON values."""

    @property
    @abstractmethod
    def title(self) -> str:
        """As people read it: `success ≥ 99 %`."""

    @abstractmethod
    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        """Hold it against what was recorded; never raises, for missing data is a finding too."""

    def queries(self) -> tuple[tuple[str, str], ...]:
        """(name, PromQL) of what the harness must sample for it."""
        return ()

    def to_json(self) -> dict[str, Any]:
        return {"type": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self)}}


KINDS: dict[str, type[Objective]] = {}
K = TypeVar("K", bound=type[Objective])


def objective(cls: K) -> K:
    """Register a kind of objective, so that run.json can be read back."""
    KINDS[cls.__name__] = cls
    return cls


def objective_from_json(value: Any) -> Objective:
    if not isinstance(value, dict) or value.get("type") not in KINDS:
        raise ExperimentError(f"no such objective: {value!r}; known are {', '.join(sorted(KINDS))}")
    cls = KINDS[value["type"]]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "type"}
    unknown = given.keys() - {f.name for f in fields(cls)}
    if unknown:
        raise ExperimentError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    try:
        return cls(**given)
    except TypeError as error:
        raise ExperimentError(f"{cls.__name__} is incomplete: {error}") from error


@dataclass(frozen=True, slots=True)
class Objectives:
    """What is asked of the service in each phase."""

    before: tuple[Objective, ...] = ()
    during: tuple[Objective, ...] = ()
    after: tuple[Objective, ...] = ()

    def items(self) -> tuple[tuple[Phase, Objective], ...]:
        phases = ((Phase.BEFORE, self.before), (Phase.DURING, self.during), (Phase.AFTER, self.after))
        return tuple((phase, o) for phase, some in phases for o in some)

    def queries(self) -> tuple[tuple[str, str], ...]:
        """All that must be sampled, each query once."""
        return tuple(dict.fromkeys(q for _, o in self.items() for q in o.queries()))

    def to_json(self) -> dict[str, Any]:
        return {p.value: [o.to_json() for q, o in self.items() if q is p] for p in Phase}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        if value.keys() - {p.value for p in Phase}:
            raise ExperimentError(f"objectives belong to before, during or after, not to {sorted(value)}")
        lists = {p.value: tuple(objective_from_json(o) for o in value.get(p.value, ())) for p in Phase}
        return cls(**lists)


def override(objectives: Objectives, settings: Mapping[str, float | str | bool]) -> Objectives:
    """Replace values: `{"Success.during.at_least": 0.95}`; a key that hits nothing is an error."""
    for key, value in settings.items():
        objectives = _override_one(objectives, key, value)
    return objectives


def _override_one(objectives: Objectives, key: str, value: float | str | bool) -> Objectives:
    parts = key.split(".")
    if len(parts) != 3 or parts[1] not in {p.value for p in Phase}:
        raise SettingsError(f"{key!r} is not of the form Objective.phase.field, as in Success.during.at_least")
    kind, phase, name = parts
    some: tuple[Objective, ...] = getattr(objectives, phase)
    hits = [o for o in some if type(o).__name__ == kind]
    if not hits:
        asked = ", ".join(sorted({type(o).__name__ for o in some})) or "nothing"
        raise SettingsError(f"{key!r} overrides nothing: {phase} asks for {asked}")
    current = {f.name for f in fields(hits[0])}
    if name not in current:
        raise SettingsError(f"{key!r}: {kind} has no {name!r}, only {', '.join(sorted(current))}")
    was = next((v for o in hits if (v := getattr(o, name)) is not None), None)
    if isinstance(was, float) and not isinstance(value, str | bool):
        value = float(value)
    if was is not None and type(value) is not type(was):
        raise SettingsError(f"{key!r} must be a {type(was).__name__}, as {was!r} is; {value!r} is not")
    try:
        new = tuple(replace(o, **{name: value}) if type(o).__name__ == kind else o for o in some)
    except ExperimentError as error:
        raise SettingsError(f"{key!r}: {error}") from error
    return replace(objectives, **{phase: new})


# ── small helpers ───────────────────────────────────────────────────────────────────────────────


def share(value: float) -> str:
    """A share without digits that say nothing: `99 %`, `99.95 %`."""
    return f"{value * 100:.4f}".rstrip("0").rstrip(".") + " %"


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of k in n."""
    if n == 0:
        return 0.0, 1.0
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def quantile(ordered: Sequence[float], p: float) -> tuple[float, float, float]:
    """The p-quantile (nearest rank) of ascending values and its 95 % interval from order statistics."""
    n = len(ordered)
    half = 1.96 * math.sqrt(n * p * (1 - p))
    at = max(0, math.ceil(p * n) - 1)
    low = max(0, min(at, math.floor(p * n - half) - 1))
    high = min(n - 1, max(at, math.ceil(p * n + half) - 1))
    return ordered[at], ordered[low], ordered[high]


def needed_for(at_least: float) -> int:
    return max(50, math.ceil(0.5 / (1 - at_least) - 1e-6)) if at_least < 1 else 100


def where(timeline: Timeline, start: float, end: float) -> str:
    """A window in UTC: the same text wherever the directory is judged again."""
    return f"{_clock(timeline, start)}–{_clock(timeline, end)} UTC"


def _clock(timeline: Timeline, t: float) -> str:
    epoch = Epoch(timeline.about.epoch_wall, timeline.about.epoch_mono)
    day = math.floor(epoch.to_wall(t)) % 86400
    return f"{day // 3600:02}:{day // 60 % 60:02}:{day % 60:02}"


def worst_time(timeline: Timeline, bad: Sequence[float]) -> str:
    """The densest stretch of bad instants: joined while less than two seconds apart."""
    if not bad:
        return ""
    best, start, count, last = (0, bad[0], bad[0]), bad[0], 0, bad[0]
    for t in bad:
        if t - last >= 2:
            start, count = t, 0
        count, last = count + 1, t
        if count > best[0]:
            best = (count, start, t)
    return f"worst {where(timeline, best[1], best[2])}"


def check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ExperimentError(f"{name} must be a share above 0 and up to 1, not {value}")


def check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ExperimentError(f"{name} must be a positive number of seconds, not {value}")


def suffix(cls: str | None, zone: str | None) -> str:
    return "".join(f" ({what})" for what in (cls, zone and f"zone {zone}") if what)


def unseen(phase: Phase, title: str, limit: float | None, why: str, unit: str = "count") -> Finding:
    return Finding(phase, title, INCONCLUSIVE, None, limit, unit, evidence=why)


def end_of(timeline: Timeline, phase: Phase) -> float | None:
    span = window(timeline, phase)
    return None if span is None else span.end


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
