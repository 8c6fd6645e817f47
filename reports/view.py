"""What is drawn: the timeline turned into points, bins, lanes and marks. Pure; x is seconds since the fault.

Where there was no fault, x counts from the first phase mark, and `Axis.name` says so.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gameday.clock import Epoch, Instant
from gameday.model import (
    STREAM_BROKEN,
    EndpointMark,
    EvictionMark,
    FaultMark,
    Finding,
    Judgement,
    KubeEvent,
    NodeMark,
    Note,
    Outcome,
    Phase,
    PhaseMark,
    PodMark,
    RecordMark,
    Recovery,
    Reply,
    Sample,
    Step,
    Timeline,
)
from gameday.windows import requests

WIDTHS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds that a bin may hold
BINS = 400  # on the whole axis, at most: more are not told apart on a screen
POINTS = 4000  # good requests drawn at most, beside the slowest of every bin
BAD_POINTS = 6000  # others drawn at most: more would lie on top of each other, and fill the file
LANES = 60  # pods drawn at most


class Group(StrEnum):
    """How a request ended, as coarse as an eye can tell apart."""

    GOOD = "good"
    BROKEN = "stream broken"
    FAILED = "failed"
    UNCOUNTED = "not counted"


def group(reply: Reply) -> Group:
    if reply.ok:
        return Group.GOOD
    if not reply.counted:
        return Group.UNCOUNTED
    return Group.BROKEN if reply.outcome in STREAM_BROKEN and reply.t_first is not None else Group.FAILED


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Axis:
    """The common x axis: seconds since `zero`."""

    zero: Instant
    name: str
    start: float
    end: float
    phases: tuple[Span, ...]
    fault: Span | None  # from the first harm sent to the undo (one-shot: to the proof)
    back: float | None  # R, where an outage was seen
    unsure: tuple[Span, ...] = ()  # within which F and R are known to lie

    @property
    def bin(self) -> float:
        """Seconds that are drawn as one."""
        return next((w for w in WIDTHS if (self.end - self.start) / w <= BINS), WIDTHS[-1])

    def at(self, instant: Instant) -> float:
        return round(instant - self.zero, 4)


@dataclass(frozen=True, slots=True)
class Point:
    """One request. `y`: good: seconds to the first token; others: seconds until they ended. From the intended send."""

    x: float
    y: float
    group: Group
    cls: str
    outcome: Outcome
    pod: str
    zone: str
    detail: str


@dataclass(frozen=True, slots=True)
class Points:
    """`one_in`: of the good ones, beside the slowest of each bin; `bad_one_in` is 1 but in the largest outages."""

    drawn: tuple[Point, ...]
    one_in: int
    bad_one_in: int
    good_total: int
    good_drawn: int
    bad_total: int
    bad_drawn: int


@dataclass(frozen=True, slots=True)
class Bins:
    """By intended send time: `rows[name][i]` begins at `left[i]` and ends `width` seconds later."""

    left: tuple[float, ...]
    width: float
    rows: Mapping[str, tuple[float, ...]]


class State(StrEnum):
    PENDING = "created, not scheduled"
    SCHEDULED = "scheduled"
    LOADING = "started, loading"
    READY = "ready"
    UNREADY = "not ready"
    TERMINATING = "terminating"


@dataclass(frozen=True, slots=True)
class Stay:
    """A pod was in one state for a while."""

    state: State
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Lane:
    pod: str
    label: str
    zone: str
    node: str
    target: bool
    stays: tuple[Stay, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    x: float
    lane: str
    what: str
    ok: bool = True


def axis(timeline: Timeline, judgement: Judgement) -> Axis:
    marks = [e for e in timeline.events if isinstance(e, FaultMark)]
    phases = [e for e in timeline.events if isinstance(e, PhaseMark)]
    applied = min((m.t for m in marks if m.step is Step.APPLY), default=None)
    times = [e.t for e in phases] + [r.t_intended for r in timeline.replies] + [m.t for m in marks]
    first, last = min(times, default=0.0), max(times, default=1.0)
    zero = applied if applied is not None else min((e.t for e in phases), default=first)
    recovery = judgement.recovery
    back = recovery.t_back - zero if recovery and recovery.t_back is not None and recovery.seconds else None
    return Axis(
        zero=zero,
        name="seconds since the fault" if applied is not None else "seconds since the start (no fault was injected)",
        start=first - zero,
        end=max(last - zero, first - zero + 1),
        phases=_phases(phases, zero, last),
        fault=_fault(timeline, marks, zero, last),
        back=back,
        unsure=_unsure(recovery, zero),
    )


def _unsure(recovery: Recovery | None, zero: Instant) -> tuple[Span, ...]:
    if recovery is None or recovery.t_fault_low is None or recovery.t_fault_high is None:
        return ()
    fault = Span("F", recovery.t_fault_low - zero, recovery.t_fault_high - zero)
    if recovery.t_back is None or not recovery.seconds or recovery.low is None or recovery.high is None:
        return (fault,)
    back = recovery.t_back - zero
    return fault, Span("R", back - (recovery.seconds - recovery.low), back + (recovery.high - recovery.seconds))


def _phases(marks: Sequence[PhaseMark], zero: Instant, last: Instant) -> tuple[Span, ...]:
    spans = []
    for phase in Phase:
        starts = [m.t for m in marks if m.phase is phase and m.edge == "start"]
        ends = [m.t for m in marks if m.phase is phase and m.edge == "end"]
        if starts:
            spans.append(Span(phase, min(starts) - zero, max(ends, default=last) - zero))
    return tuple(spans)


def _fault(timeline: Timeline, marks: Sequence[FaultMark], zero: Instant, last: Instant) -> Span | None:
    applied = [m.t for m in marks if m.step is Step.APPLY]
    if not applied:
        return None
    ends = [m.t for m in marks if m.step is Step.UNDO]
    if timeline.fault.one_shot:
        ends = ends or [m.t for m in marks if m.step in (Step.EFFECT, Step.INJECTED) and m.ok]
    end = min(ends, default=min(applied) + 1 if timeline.fault.one_shot else last)
    return Span(timeline.fault.name, min(applied) - zero, end - zero)


def points(timeline: Timeline, on: Axis) -> Points:
    """All requests that did not end well, and of the good ones every n-th and the slowest of every bin."""
    good = [r for r in timeline.replies if r.ok]
    bad = [r for r in timeline.replies if not r.ok]
    one_in, bad_one_in = max(1, math.ceil(len(good) / POINTS)), max(1, math.ceil(len(bad) / BAD_POINTS))
    slowest: dict[int, Reply] = {}
    for reply in good:
        key = math.floor(on.at(reply.t_intended) / on.bin)
        if key not in slowest or _seconds(reply) > _seconds(slowest[key]):
            slowest[key] = reply
    kept = {(r.worker, r.seq): r for r in [*good[::one_in], *slowest.values()]}
    kept_bad = bad[::bad_one_in]
    drawn = sorted([*kept.values(), *kept_bad], key=lambda r: r.t_intended)
    return Points(
        drawn=tuple(_point(r, on) for r in drawn),
        one_in=one_in,
        bad_one_in=bad_one_in,
        good_total=len(good),
        good_drawn=len(kept),
        bad_total=len(bad),
        bad_drawn=len(kept_bad),
    )


def _seconds(reply: Reply) -> float:
    return reply.ttft if reply.ok and reply.ttft is not None else reply.latency


def _point(reply: Reply, on: Axis) -> Point:
    return Point(
        x=round(on.at(reply.t_intended), 3),
        y=round(max(_seconds(reply), 0.001), 4),
        group=group(reply),
        cls=reply.cls,
        outcome=reply.outcome,
        pod=reply.pod or "",
        zone=reply.zone or "",
        detail=reply.detail[:80],
    )


def _edges(on: Axis) -> tuple[float, ...]:
    first = math.floor(on.start / on.bin)
    return tuple(i * on.bin for i in range(first, math.ceil(on.end / on.bin) + 1))


def rates(timeline: Timeline, on: Axis) -> Bins:
    """Requests per second by how they ended, per bin of intended send time."""
    width = on.bin
    seen = Counter((math.floor(on.at(r.t_intended) / width), group(r)) for r in timeline.replies)
    left = _edges(on)
    rows = {g: tuple(seen[round(x / width), g] / width for x in left) for g in Group}
    return Bins(left, width, {str(g): row for g, row in rows.items() if g is Group.GOOD or any(row)})


NO_ANSWER = "no answer"


def zone_shares(timeline: Timeline, on: Axis) -> Bins:
    """Which zone answered, as a share of the requests of each bin; empty when no reply names a zone."""
    zones = sorted({r.zone for r in timeline.replies if r.zone})
    if not zones:
        return Bins((), on.bin, {})
    width = on.bin
    counted = (r for r in timeline.replies if r.counted)
    seen = Counter((math.floor(on.at(r.t_intended) / width), r.zone or NO_ANSWER) for r in counted)
    totals: dict[int, int] = defaultdict(int)
    for (key, _), count in seen.items():
        totals[key] += count
    left = _edges(on)
    keys = [round(x / width) for x in left]
    rows = {z: tuple(seen[k, z] / totals[k] if totals[k] else 0.0 for k in keys) for z in [*zones, NO_ANSWER]}
    return Bins(left, width, {z: row for z, row in rows.items() if any(row)})


_STATES: Mapping[str, State] = {
    "exists": State.UNREADY,  # a watch that begins finds pods as they are; a ready one is marked so at once
    "created": State.PENDING,
    "scheduled": State.SCHEDULED,
    "started": State.LOADING,
    "restarted": State.LOADING,
    "ready": State.READY,
    "unready": State.UNREADY,
    "terminating": State.TERMINATING,
}


def lanes(timeline: Timeline, on: Axis) -> tuple[Lane, ...]:
    """One lane per pod: those of one zone together, in the order in which they appeared."""
    marks: dict[str, list[PodMark]] = defaultdict(list)
    for event in timeline.events:
        if isinstance(event, PodMark):
            marks[event.pod].append(event)
    aimed = frozenset(timeline.fault.pods)
    made = [_lane(pod, sorted(seen, key=lambda m: m.t), pod in aimed, on) for pod, seen in marks.items()]
    made.sort(key=lambda lane: (lane.zone, lane.stays[0].start if lane.stays else 0.0, lane.pod))
    return tuple(made)


def _lane(pod: str, marks: Sequence[PodMark], aimed: bool, on: Axis) -> Lane:
    ends = [*(m.t for m in marks[1:]), on.zero + on.end]
    stays = tuple(
        Stay(state, max(on.start, on.at(mark.t)), on.at(end))
        for mark, end in zip(marks, ends, strict=True)
        if end > mark.t and (state := _STATES.get(mark.stage)) is not None
    )
    zone = next((m.zone for m in reversed(marks) if m.zone), "")
    node = next((m.node for m in reversed(marks) if m.node), "")
    target = aimed or any(m.target for m in marks)
    return Lane(pod, _label(marks[-1], zone, target), zone, node, target, stays)


def _label(mark: PodMark, zone: str, target: bool) -> str:
    """Short enough for a phone: the workload, the end of the pod's name, the zone."""
    name = mark.pod.rsplit("/", 1)[-1]
    head, _, tail = name.rpartition("-")
    # An owner is a Service's name, or "ReplicaSet/gateway-5f6b7", whose hash says nothing.
    kind, _, owner = mark.owner.rpartition("/")
    workload = (owner.rpartition("-")[0] if kind == "ReplicaSet" else owner) or head.rpartition("-")[0] or name
    short = f"{workload[:12]}…{tail[-6:]}" if head else name
    return f"{'◆ ' if target else ''}{short[:20]} {zone[:8]}".strip()


def fault_marks(timeline: Timeline) -> tuple[FaultMark, ...]:
    """The fault's steps; of proofs that were looked at again and again, each change and the last look."""
    kept: list[FaultMark] = []
    last: dict[tuple[Step, str], FaultMark] = {}
    for mark in sorted((e for e in timeline.events if isinstance(e, FaultMark)), key=lambda m: m.t):
        key = (mark.step, mark.what)
        same = last.get(key)
        if mark.step is not Step.EFFECT or same is None or same.ok is not mark.ok:
            kept.append(mark)
        last[key] = mark
    kept += [m for m in last.values() if m not in kept]
    return tuple(sorted(kept, key=lambda m: m.t))


def marks(timeline: Timeline, on: Axis) -> tuple[Mark, ...]:
    """What happened beside the traffic: the fault's steps, the cluster's changes and events, alerts, notes."""
    events = [*fault_marks(timeline), *(e for e in timeline.events if not isinstance(e, FaultMark))]
    found = [m for e in events if (m := _mark(e, on)) is not None]
    found += _alerts(timeline.samples, on)
    return tuple(sorted(found, key=lambda m: m.x))


ALERT = "alert "  # begins the name of samples that tell whether an alert fires
SAME_ALERT = 2.0  # seconds within which two questions see one and the same change

MARK_LANES = ("fault", "chaos records", "endpoints", "nodes", "events", "alerts", "notes")


def _mark(event: object, on: Axis) -> Mark | None:
    ok = True
    match event:
        case FaultMark():
            lane, said, ok = "fault", " ".join((event.step, event.what, event.detail)), event.ok
        case RecordMark():
            lane, said = "chaos records", f"{event.resource} {event.id}: {event.phase} {event.message}"
        case EndpointMark():
            ok = event.ready and event.present
            lane, said = "endpoints", f"{event.pod} {'in' if ok else 'out of'} {event.service}"
        case NodeMark():
            lane, said, ok = "nodes", f"{event.node}: {event.what} {event.detail}", "not ready" not in event.what
        case KubeEvent():
            lane, said = "events", f"{event.object}: {event.reason}: {event.message}"
            ok = event.type != "Warning"
        case EvictionMark():
            lane, said, ok = (
                "events",
                f"eviction of {event.pod} {event.answer} {event.detail}",
                event.answer == "accepted",
            )
        case Note():
            lane, said, ok = "notes", f"{event.level}: {event.text}", event.level == "info"
        case _:
            return None
    return Mark(on.at(event.t), lane, " ".join(said.split()), ok)


def _alerts(samples: Iterable[Sample], on: Axis) -> list[Mark]:
    """Where an alert began or ceased to fire, as sampled; one that an objective also asks for is marked once."""
    firing: dict[tuple[str, str], bool] = {}
    found: dict[tuple[str, bool], list[Mark]] = defaultdict(list)
    for sample in samples:
        if not sample.name.startswith(ALERT) or sample.value is None:
            continue
        key, now = (sample.name, sample.query), sample.value >= 1
        if now is not firing.get(key, False):
            x = on.at(sample.t)
            near = found[sample.name, now]
            if not near or x - near[-1].x > SAME_ALERT:
                early = now and key not in firing and x < min(0.0, on.start + SAME_ALERT)
                said = "was firing already" if early else "fires" if now else "is resolved"
                near.append(Mark(x, "alerts", f"{sample.name} {said}", not now))
        firing[key] = now
    return [mark for marks_ in found.values() for mark in marks_]


def thin_marks(found: Iterable[Mark], on: Axis) -> tuple[Mark, ...]:
    """One mark per lane, kind and thousandth of the axis: the others would be drawn over it."""
    width = max((on.end - on.start) / 1000, 1e-9)
    seen: dict[tuple[int, str, bool, str], list[Mark]] = defaultdict(list)
    for mark in found:
        key = (math.floor(mark.x / width), mark.lane, mark.ok, mark.what[:40])
        seen[key].append(mark)
    return tuple(same[0] for same in seen.values())


def latency_limits(findings: Iterable[Finding], on: Axis) -> tuple[Span, ...]:
    """First-token limits as (name, limit) per phase: `Span.start`/`end` are the phase's, the limit is in the name."""
    spans = {p.name: p for p in on.phases}
    return tuple(
        Span(str(f.limit), spans[f.phase].start, spans[f.phase].end)
        for f in findings
        if f.unit == "s" and f.limit is not None and "first token" in f.objective and f.phase in spans
    )


@dataclass(frozen=True, slots=True)
class PhaseFigures:
    """A phase in figures, for those who do not see the chart. Latencies in seconds."""

    phase: str
    requests: int
    good: int
    broken: int
    failed: int
    uncounted: int
    p50: float | None
    p95: float | None
    zones: Mapping[str, float]


def figures(timeline: Timeline, on: Axis) -> tuple[PhaseFigures, ...]:
    """As the objectives count: a stream that broke after the fault belongs to `during`, whenever it was sent.

    A first token that never came is infinitely late.
    """
    return tuple(_figures(span, timeline, on) for span in on.phases)


def _figures(span: Span, timeline: Timeline, on: Axis) -> PhaseFigures:
    counted = requests(timeline, Phase(span.name))
    uncounted = [r for r in timeline.replies if not r.counted and span.start <= on.at(r.t_intended) < span.end]
    groups = Counter(group(r) for r in counted)
    ttfts = sorted(math.inf if r.ttft is None else r.ttft for r in counted)
    zones = Counter(r.zone or NO_ANSWER for r in counted)
    return PhaseFigures(
        phase=span.name,
        requests=len(counted) + len(uncounted),
        good=groups[Group.GOOD],
        broken=groups[Group.BROKEN],
        failed=groups[Group.FAILED],
        uncounted=len(uncounted),
        p50=quantile(ttfts, 0.5),
        p95=quantile(ttfts, 0.95),
        zones={z: n / len(counted) for z, n in sorted(zones.items())},
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank quantile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


@dataclass(frozen=True, slots=True)
class Worst:
    """A second of the run."""

    x: float
    wall: str
    share: float


def worst_second(timeline: Timeline, on: Axis) -> Worst | None:
    """The second with the largest share of bad requests; None when there was no bad one."""
    total: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    for reply in timeline.replies:
        if reply.counted:
            key = math.floor(on.at(reply.t_intended))
            total[key] += 1
            bad[key] += not reply.ok
    if not any(bad.values()):
        return None
    key = max(bad, key=lambda k: (bad[k] / total[k], bad[k]))
    epoch = Epoch(timeline.about.epoch_wall, timeline.about.epoch_mono)
    return Worst(key, epoch.show(on.zero + key), bad[key] / total[key])


@dataclass(frozen=True, slots=True)
class Query:
    """What Prometheus answered over the run."""

    name: str
    query: str
    samples: int
    missing: int
    low: float | None
    high: float | None
    error: str


def queries(timeline: Timeline) -> tuple[Query, ...]:
    grouped: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    errors: dict[tuple[str, str], str] = {}
    for sample in timeline.samples:
        key = (sample.name, sample.query)
        grouped[key].append(sample.value)
        if sample.error:
            errors[key] = sample.error
    return tuple(_query(*key, values, errors.get(key, "")) for key, values in grouped.items())


def _query(name: str, query: str, values: Sequence[float | None], error: str) -> Query:
    seen = [v for v in values if v is not None and math.isfinite(v)]
    return Query(
        name, query, len(values), len(values) - len(seen), min(seen, default=None), max(seen, default=None), error
    )


def busiest(found: Sequence[Lane]) -> tuple[Lane, ...]:
    """At most LANES lanes, in their order: targets and pods that changed before those that stood still."""
    ranked = sorted(found, key=lambda lane: (not lane.target, -len(lane.stays)))
    kept = {lane.pod for lane in ranked[:LANES]}
    return tuple(lane for lane in found if lane.pod in kept)
