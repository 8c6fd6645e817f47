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
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self, TypeVar

from gameday import recovery
from gameday.clock import Epoch
from gameday.errors import ExperimentError, SettingsError
from gameday.model import (
    STREAM_BROKEN,
    Finding,
    NodeMark,
    Phase,
    PodMark,
    Reply,
    Sample,
    Step,
    Timeline,
    Verdict,
)
from gameday.units import Seconds, show_duration
from gameday.windows import Window, fault_low, marks, of, requests, window

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
    given = {k: v for k, v in value.items() if k != "type"}
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


def _needed(at_least: float) -> int:
    return max(50, math.ceil(0.5 / (1 - at_least) - 1e-6)) if at_least < 1 else 100


def _where(timeline: Timeline, start: float, end: float) -> str:
    """A window in UTC: the same text wherever the directory is judged again."""
    return f"{_clock(timeline, start)}–{_clock(timeline, end)} UTC"


def _clock(timeline: Timeline, t: float) -> str:
    epoch = Epoch(timeline.about.epoch_wall, timeline.about.epoch_mono)
    day = math.floor(epoch.to_wall(t)) % 86400
    return f"{day // 3600:02}:{day // 60 % 60:02}:{day % 60:02}"


def _worst_time(timeline: Timeline, bad: Sequence[float]) -> str:
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
    return f"worst {_where(timeline, best[1], best[2])}"


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ExperimentError(f"{name} must be a share above 0 and up to 1, not {value}")


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ExperimentError(f"{name} must be a positive number of seconds, not {value}")


def _suffix(cls: str | None, zone: str | None) -> str:
    return "".join(f" ({what})" for what in (cls, zone and f"zone {zone}") if what)


# ── of requests ─────────────────────────────────────────────────────────────────────────────────


@objective
@dataclass(frozen=True, slots=True)
class Success(Objective):
    """The share of requests that ended properly."""

    at_least: float
    cls: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        _check_share("Success.at_least", self.at_least)

    @property
    def title(self) -> str:
        return f"success{_suffix(self.cls, self.zone)} ≥ {share(self.at_least)}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        some = requests(timeline, phase, self.cls, self.zone)
        return _share_finding(timeline, phase, self.title, self.at_least, some, [r for r in some if r.ok])


def _share_finding(
    timeline: Timeline, phase: Phase, title: str, at_least: float, some: Sequence[Reply], good: Sequence[Reply]
) -> Finding:
    n, ok = len(some), len(good)
    if not n:
        return Finding(phase, title, INCONCLUSIVE, None, at_least, "share", evidence="no request in this phase")
    observed, (low, high) = ok / n, wilson(ok, n)
    is_good = {id(r) for r in good}
    evidence = _worst_time(timeline, [r.t_intended for r in some if id(r) not in is_good])
    needed = _needed(at_least)
    if ok >= needed:
        status = PASS if observed >= at_least else FAIL
    else:
        # With fewer, only so many failures as would break the limit among the needed number decide.
        status = FAIL if n - ok > max(1, (1 - at_least) * max(needed, n)) else INCONCLUSIVE
        evidence = f"{ok} good requests are too few, {needed} are needed; {evidence}".rstrip("; ")
    return Finding(phase, title, status, observed, at_least, "share", low, high, n, evidence)


@dataclass(frozen=True, slots=True)
class Quantiles(Objective):
    """A latency below a limit for a share of requests. Exactly one of p50, p95, p99 is given, in seconds."""

    p50: Seconds | None = None
    p95: Seconds | None = None
    p99: Seconds | None = None
    cls: str | None = None
    zone: str | None = None

    what: ClassVar[str] = "latency"

    def __post_init__(self) -> None:
        given = [(name, v) for name in ("p50", "p95", "p99") if (v := getattr(self, name)) is not None]
        if len(given) != 1:
            raise ExperimentError(f"{type(self).__name__} takes exactly one of p50, p95 and p99")
        _check_seconds(f"{type(self).__name__}.{given[0][0]}", given[0][1])

    @property
    def at(self) -> tuple[float, Seconds, str]:
        """The quantile, its limit and its name."""
        for p, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
            limit: float | None = getattr(self, name)
            if limit is not None:
                return p, limit, name
        raise AssertionError("checked when it was made")

    @property
    def title(self) -> str:
        _, limit, name = self.at
        return f"{self.what}{_suffix(self.cls, self.zone)} {name} ≤ {show_duration(limit)}"

    @abstractmethod
    def values(self, reply: Reply) -> Sequence[float]:
        """The request's latencies; infinite where what was waited for never came."""

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        p, limit, _ = self.at
        some = requests(timeline, phase, self.cls, self.zone)
        pairs = [(v, r.t_intended) for r in some for v in self.values(r)]
        ordered = sorted(v for v, _ in pairs)
        answered = sum(1 for v in ordered if v < math.inf)
        needed = max(30, math.ceil(2 / (1 - p) - 1e-6))
        if not ordered:
            return Finding(phase, self.title, INCONCLUSIVE, None, limit, "s", evidence="nothing to measure")
        value, low, high = quantile(ordered, p)
        evidence = _worst_time(timeline, [t for v, t in pairs if v > limit])
        if answered < len(ordered):
            evidence = f"{len(ordered) - answered} of {len(ordered)} never came; {evidence}".rstrip("; ")
        status = PASS if value <= limit else FAIL
        if answered < needed:
            # Too few answers prove nothing good; enough that never came prove the opposite.
            status = FAIL if status is FAIL and len(ordered) >= needed else INCONCLUSIVE
            evidence = f"{answered} answers are too few, {needed} are needed; {evidence}".rstrip("; ")
        return Finding(
            phase, self.title, status, _finite(value), limit, "s", _finite(low), _finite(high), len(ordered), evidence
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@objective
@dataclass(frozen=True, slots=True)
class FirstToken(Quantiles):
    """Time to first token after the *intended* send time; one that never came is infinitely late."""

    what: ClassVar[str] = "first token"

    def values(self, reply: Reply) -> Sequence[float]:
        return (math.inf,) if reply.ttft is None else (reply.ttft,)


@objective
@dataclass(frozen=True, slots=True)
class UnbrokenStreams(Objective):
    """No stream that had begun is cut off, but for those served by `except_on="targets"` of the fault."""

    except_on: Literal["", "targets"] = ""
    at_most: int = 0
    cls: str | None = None

    @property
    def title(self) -> str:
        on = ", except on the targets" if self.except_on else ""
        return f"{self.at_most or 'no'} stream{'' if self.at_most == 1 else 's'} broken{on}{_suffix(self.cls, None)}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        some = [r for r in requests(timeline, phase, self.cls) if r.t_first is not None]
        targets = {p.rsplit("/", 1)[-1] for p in timeline.fault.pods} if self.except_on == "targets" else set()
        broken = [r for r in some if r.outcome in STREAM_BROKEN]
        # A stream whose pod we do not know may have run anywhere: it counts.
        bad = [r for r in broken if r.pod is None or r.pod.rsplit("/", 1)[-1] not in targets]
        where = sorted({r.pod or "unknown pod" for r in bad})
        evidence = f"{len(broken) - len(bad)} broken on the targets" if self.except_on else ""
        if bad:
            evidence = f"broken on {', '.join(where[:5])}; {_worst_time(timeline, [r.t_end for r in bad])}"
        if len(bad) > self.at_most:
            status = FAIL
        elif len(some) - len(broken) < 10:
            status, evidence = INCONCLUSIVE, f"only {len(some)} streams had begun; {evidence}".rstrip("; ")
        else:
            status = PASS
        count = float(len(bad))
        return Finding(
            phase, self.title, status, count, float(self.at_most), "count", count, count, len(some), evidence
        )


@objective
@dataclass(frozen=True, slots=True)
class Recovers(Objective):
    """The service is back within its objectives `within` seconds of the fault, and stays so for `hold`.

    A request is good when it ended properly, with its first token within `first_token` and its end within
    `end_to_end` where these are given. Judged over during and after, in whatever list it stands.
    `recovers="after_heal"`: only repair can end this fault, so the clock runs from the heal.
    """

    within: Seconds
    hold: Seconds = 10.0
    at_least: float = 0.99
    first_token: Seconds | None = None
    end_to_end: Seconds | None = None
    recovers: Literal["by_failover", "after_heal"] = "by_failover"

    def __post_init__(self) -> None:
        _check_seconds("Recovers.within", self.within)
        _check_seconds("Recovers.hold", self.hold)
        _check_share("Recovers.at_least", self.at_least)
        _check_seconds("Recovers.first_token", self.first_token)
        _check_seconds("Recovers.end_to_end", self.end_to_end)
        if self.recovers not in ("by_failover", "after_heal"):
            raise ExperimentError(f"Recovers.recovers is by_failover or after_heal, not {self.recovers!r}")

    @property
    def title(self) -> str:
        of_heal = " of the heal" if self.recovers == "after_heal" else ""
        return f"recovers within {show_duration(self.within)}{of_heal}"

    def good(self, reply: Reply) -> bool:
        late = self.first_token is not None and (reply.ttft is None or reply.ttft > self.first_token)
        slow = self.end_to_end is not None and reply.latency > self.end_to_end
        return reply.ok and not late and not slow

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        found = recovery.examine(timeline, self)
        measured = recovery.measure(timeline, self)
        status, why = self._status(found)
        evidence = "; ".join(p for p in (why, measured.story) if p)
        n = len(found.series.t)
        return Finding(
            phase, self.title, status, measured.seconds, self.within, "s", measured.low, measured.high, n, evidence
        )

    def _status(self, found: recovery.Measured) -> tuple[Verdict, str]:
        if found.fault is None:
            return INCONCLUSIVE, "the fault was not seen to act"
        if found.series.end - found.fault.end < self.hold:
            return INCONCLUSIVE, f"observed for less than the hold time of {show_duration(self.hold)}"
        states = [self._one(found, b) for b in found.backs]
        worst = max(states, key=lambda s: s[0].rank, default=(PASS, ""))
        if worst[0] is not FAIL and sum(found.series.good) < 2 * recovery.RUN:
            return INCONCLUSIVE, "too few good requests to see a recovery"
        if worst[0] is PASS and found.gap > self.within:
            return INCONCLUSIVE, f"no request for {show_duration(found.gap)}, longer than the limit itself"
        return worst

    def _one(self, found: recovery.Measured, back: recovery.Back) -> tuple[Verdict, str]:
        if back.by_heal == "yes":
            return FAIL, "recovered only by the heal"
        if back.last - back.onset.end > self.within:
            return FAIL, "" if back.held else "never back"
        if not back.held:
            return INCONCLUSIVE, "the window ended before the service had been back for the whole hold time"
        if back.by_heal == "maybe":
            return INCONCLUSIVE, "cannot tell whether it recovered before the heal or by it"
        # `sure`, not only the interval: a wider share of failures must not turn doubt into a pass.
        if back.sure is None or max(back.sure, back.high) - back.onset.start > self.within:
            return INCONCLUSIVE, f"too close to the limit to tell: {recovery.RUN} good requests are needed within it"
        return PASS, ""


# ── of Prometheus ───────────────────────────────────────────────────────────────────────────────


@objective
@dataclass(frozen=True, slots=True)
class Promql(Objective):
    """Every sample of a query within its limit, over the whole phase. Exactly one of the limits is given.

    `series`: a plain selector of the series behind the query; it is watched for being stale.
    """

    query: str
    at_most: float | None = None
    at_least: float | None = None
    name: str = ""
    unit: str = ""
    series: str = ""

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
        """The query for the age of the oldest of the series, seconds."""
        return f"max(time() - timestamp({self.series}))"

    def queries(self) -> tuple[tuple[str, str], ...]:
        name = self.name or self.query
        return ((name, self.query), *(((f"age of {name}", self.age),) if self.series else ()))

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        limit = self.at_most if self.at_most is not None else self.at_least
        span = window(timeline, phase)
        found = [] if span is None else [s for s in timeline.samples if s.query == self.query and s.t in span]
        raw = f"{self.query} → {found[-1].raw or found[-1].error or found[-1].value}" if found else self.query
        trouble = "the phase has no window" if span is None else unsound(timeline, span, found)
        if not trouble and self.series and span is not None:
            trouble = stale(timeline, span, self.age)
        if trouble:
            return Finding(
                phase,
                self.title,
                INCONCLUSIVE,
                None,
                limit,
                self.unit,
                samples=len(found),
                evidence=f"{trouble}; {raw}",
            )
        values = [s.value for s in found if s.value is not None]
        worst = max(values) if self.at_most is not None else min(values)
        kept = worst <= self.at_most if self.at_most is not None else worst >= (self.at_least or 0.0)
        status = PASS if kept else FAIL
        return Finding(
            phase, self.title, status, worst, limit, self.unit, min(values), max(values), len(values), f"worst; {raw}"
        )


FEWEST = 4  # scrape intervals that a window must hold, and samples


def unsound(timeline: Timeline, span: Window, found: Sequence[Sample]) -> str:
    """Why these samples cannot be judged; empty when they can."""
    scrape = timeline.about.scrape_interval
    if not found:
        return "no sample in this phase"
    if trouble := next((t for s in found if (t := _unusable(s))), ""):
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


def _unusable(sample: Sample) -> str:
    if sample.error:
        return f"Prometheus answered with an error: {sample.error}"
    if sample.value is None:
        return "Prometheus has no data"
    return "" if math.isfinite(sample.value) else f"the value is {sample.value}"


def stale(timeline: Timeline, span: Window, query: str) -> str:
    """Why the series behind a query are not fresh; empty when they are."""
    ages = [s for s in timeline.samples if s.query == query and s.t in span]
    if trouble := unsound(timeline, span, ages):
        return f"the age of the series is unknown: {trouble}"
    oldest = max(s.value for s in ages if s.value is not None)
    if oldest > 3 * timeline.about.scrape_interval:
        return f"the series is stale: its last scrape was {show_duration(oldest)} old"
    return ""


# ── of the cluster ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod as it was at one instant."""

    pod: str
    zone: str
    node: str
    owner: str
    ready: bool


def pods_at(timeline: Timeline, t: float) -> list[PodState]:
    """The pods that there were at t, by their last transitions up to then."""
    state: dict[str, PodState] = {}
    for m in sorted(of(timeline, PodMark), key=lambda m: m.t):
        if m.t > t:
            break
        if m.stage == "gone":
            state.pop(m.uid, None)
            continue
        was = state.get(m.uid, PodState(m.pod, "", "", "", False))
        ready = m.stage == "ready" or (was.ready and m.stage in ("exists", "created", "scheduled", "started"))
        state[m.uid] = PodState(m.pod, m.zone or was.zone, m.node or was.node, m.owner or was.owner, ready)
    return list(state.values())


def _end(timeline: Timeline, phase: Phase) -> float | None:
    span = window(timeline, phase)
    return None if span is None else span.end


@objective
@dataclass(frozen=True, slots=True)
class Replicas(Objective):
    """So many pods are ready when the phase ends."""

    at_least: int
    owner: str = ""

    @property
    def title(self) -> str:
        return f"ready replicas{_suffix(self.owner or None, None)} ≥ {self.at_least}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        end = _end(timeline, phase)
        pods = [] if end is None else [p for p in pods_at(timeline, end) if not self.owner or p.owner == self.owner]
        if not any(True for _ in of(timeline, PodMark)) or end is None:
            return _unseen(phase, self.title, float(self.at_least), "no pod was seen")
        ready = sorted(p.pod for p in pods if p.ready)
        status = PASS if len(ready) >= self.at_least else FAIL
        n = float(len(ready))
        return Finding(
            phase, self.title, status, n, float(self.at_least), "count", n, n, len(pods), f"ready: {', '.join(ready)}"
        )


def _unseen(phase: Phase, title: str, limit: float | None, why: str, unit: str = "count") -> Finding:
    return Finding(phase, title, INCONCLUSIVE, None, limit, unit, evidence=why)


@objective
@dataclass(frozen=True, slots=True)
class Spread(Objective):
    """Ready pods per zone differ by no more than `max_skew` when the phase ends. Zones are those of the nodes."""

    max_skew: int = 1
    owner: str = ""

    @property
    def title(self) -> str:
        return f"spread over zones{_suffix(self.owner or None, None)}, skew ≤ {self.max_skew}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        end = _end(timeline, phase)
        zones = {n.zone for n in of(timeline, NodeMark) if n.zone} | {p.zone for p in of(timeline, PodMark) if p.zone}
        if end is None or len(zones) < 2:
            return _unseen(phase, self.title, float(self.max_skew), f"{len(zones)} zones seen, a spread needs 2")
        ready = [p for p in pods_at(timeline, end) if p.ready and (not self.owner or p.owner == self.owner)]
        per_zone = {z: sum(1 for p in ready if p.zone == z) for z in sorted(zones)}
        evidence = ", ".join(f"{z}: {n}" for z, n in per_zone.items())
        if any(not p.zone for p in ready):
            return _unseen(phase, self.title, float(self.max_skew), f"a ready pod's zone is unknown; {evidence}")
        skew = float(max(per_zone.values()) - min(per_zone.values()))
        status = FAIL if skew > self.max_skew or not ready else PASS
        return Finding(phase, self.title, status, skew, float(self.max_skew), "count", skew, skew, len(ready), evidence)


@objective
@dataclass(frozen=True, slots=True)
class NodeReplaced(Objective):
    """The fault's nodes are gone and as many new ones have become ready, by the end of the phase."""

    within: Seconds | None = None

    @property
    def title(self) -> str:
        return "node replaced" + (f" within {show_duration(self.within)}" if self.within is not None else "")

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        harm, end, wanted = fault_low(timeline), _end(timeline, phase), len(timeline.fault.nodes)
        seen = [m for m in of(timeline, NodeMark) if harm is not None and end is not None and harm <= m.t <= end]
        if harm is None or end is None or not wanted or not any(True for _ in of(timeline, NodeMark)):
            return _unseen(phase, self.title, self.within, "no node was aimed at, or none was seen", "s")
        gone = {m.node: m.t for m in seen if m.what == "gone" and m.node in timeline.fault.nodes}
        born = {m.node: m.t for m in seen if m.what == "created"}
        ready = sorted(
            min(m.t for m in seen if m.node == n and m.what == "ready" and m.t >= t)
            for n, t in born.items()
            if any(m.node == n and m.what == "ready" and m.t >= t for m in seen)
        )
        evidence = f"gone: {', '.join(sorted(gone)) or 'none'}; new and ready: {len(ready)}"
        if len(gone) < wanted or len(ready) < wanted:
            return Finding(phase, self.title, FAIL, None, self.within, "s", samples=len(seen), evidence=evidence)
        took = max(ready[wanted - 1], *gone.values()) - harm
        status = PASS if self.within is None or took <= self.within else FAIL
        return Finding(phase, self.title, status, took, self.within, "s", took, took, len(seen), evidence)


@objective
@dataclass(frozen=True, slots=True)
class NodeKept(Objective):
    """The fault's nodes are neither replaced nor cordoned, although the detector has reported the fault.

    Counts only when the phase lasted `for_at_least` after the report: the repair wait and two polls.
    """

    for_at_least: Seconds = 660.0

    @property
    def title(self) -> str:
        return f"node kept for {show_duration(self.for_at_least)} after the report"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        harm, end, nodes = fault_low(timeline), _end(timeline, phase), timeline.fault.nodes
        if harm is None or end is None or not nodes:
            return _unseen(phase, self.title, self.for_at_least, "no node was aimed at", "s")
        seen = [m for m in of(timeline, NodeMark) if m.node in nodes and harm <= m.t <= end]
        touched = [m for m in seen if m.what == "gone" or (m.what == "cordoned" and "gameday" not in m.detail)]
        if touched:
            m = min(touched, key=lambda m: m.t)
            kept, why = m.t - harm, f"{m.node} {m.what} {show_duration(m.t - harm)} after the fault"
            return Finding(phase, self.title, FAIL, kept, self.for_at_least, "s", kept, kept, len(seen), why)
        told = {m.node: m.t for m in sorted(seen, key=lambda m: -m.t) if m.what.startswith("detected")}
        if set(told) != set(nodes):
            return _unseen(phase, self.title, self.for_at_least, "the detector has not reported the fault", "s")
        kept = end - max(told.values())
        status, why = PASS, "reported, and nothing was done"
        if kept < self.for_at_least:
            status, why = INCONCLUSIVE, "the window ended before a repair would have begun"
        return Finding(phase, self.title, status, kept, self.for_at_least, "s", kept, kept, len(seen), why)


@objective
@dataclass(frozen=True, slots=True)
class NothingLeftBehind(Objective):
    """The fault is healed and nothing of ours is left in the cluster."""

    @property
    def title(self) -> str:
        return "nothing left behind"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        steps = [Step.CLEAN] if timeline.fault.one_shot else [Step.HEALED, Step.CLEAN]
        latest = {(m.step, m.what): m for step in steps for m in marks(timeline, step)}
        missing = [s.value for s in steps if not any(step is s for step, _ in latest)]
        left = [f"{m.what or m.step.value}: {m.detail or 'not ok'}" for m in latest.values() if not m.ok]
        if left or missing:
            why = "; ".join(left + [f"never seen to be {s}" for s in missing])
            return Finding(phase, self.title, ERROR, float(len(left)), 0.0, "count", samples=len(latest), evidence=why)
        return Finding(phase, self.title, PASS, 0.0, 0.0, "count", 0.0, 0.0, len(latest), "verified clean")
