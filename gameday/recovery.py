"""Recovery time, with an error bar (DESIGN 5).

Requests are put in the order in which they were meant to be sent; each is good or bad. Bad requests that belong
together make an *outage*; every outage gets its own clock and the slowest one counts:

- A bad request at which the objective is broken over the window of length `hold` that begins with it is *broken*.
- Two bad requests are of the same outage when fewer than `RUN` good ones lie between them, or when a broken one
  follows the first within `hold`. Both rules only look forward and do not estimate anything: further failures can add
  links, never remove one, so they cannot improve a verdict. `RUN` is m for the smallest share told apart, one in ten.
- R begins the first run of m good requests, (1 − q)^m ≤ 0.005, from which the objective holds over the whole hold
  time, q being the share of bad requests in the outage's tail (its lower confidence bound: a large q would claim more
  precision than it has). R lies in (last bad before it, m-th good]; where bad requests follow within `RUN` good ones,
  the interval's upper end goes beyond them, for they may be noise or the outage's end.
- The clock of the outage that follows the fault runs from F ∈ [first harm sent, F_high]; of a later one from its own
  onset; under `recovers="after_heal"`, of one that lasts into the heal from the heal.

Pure functions of the timeline. All instants and durations are seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, Protocol

from gameday.model import EndpointMark, Phase, PodMark, Recovery, Reply, Step, Timeline
from gameday.units import show_duration
from gameday.windows import Window, chosen, counted, fault_low, first, marks, of, window

CHANCE = 0.005  # of a run of m good requests while the outage still lasts
SMALLEST_SHARE = 0.1
TAIL = 20  # bad requests from which the share at an outage's beginning or end is estimated
FEW = 5  # bad requests below which a share is not estimated but taken for the smallest
NEAR = 1.0  # seconds after the effect in which even a tolerated outage is blamed on the fault


def run_needed(share: float) -> int:
    """How many good requests in a row show that an outage with this share of bad ones is over."""
    if share >= 1 - CHANCE:
        return 1
    return max(1, math.ceil(math.log(CHANCE) / math.log(1 - max(share, SMALLEST_SHARE)) - 1e-9))


RUN = run_needed(SMALLEST_SHARE)


class Asked(Protocol):
    """What `Recovers` says; named here so that the objective can use this module."""

    @property
    def within(self) -> float: ...
    @property
    def hold(self) -> float: ...
    @property
    def at_least(self) -> float: ...
    @property
    def recovers(self) -> Literal["by_failover", "after_heal"]: ...
    @property
    def cls(self) -> str | None: ...
    def good(self, reply: Reply) -> bool:
        """Whether the request ended properly within the latency objectives."""
        ...


@dataclass(frozen=True, slots=True)
class Series:
    """Requests in intended order: `t` meant to be sent, `sent` truly sent, `good`."""

    t: tuple[float, ...]
    sent: tuple[float, ...]
    good: tuple[bool, ...]
    bad_before: tuple[int, ...]  # cumulative, one longer
    start: float  # of the observation: no harm before
    end: float

    @classmethod
    def of(cls, replies: Sequence[Reply], asked: Asked, start: float, end: float) -> Series:
        good = tuple(asked.good(r) for r in replies)
        # On the wire at `t_sent`: a client that was stalled or still connecting has sent nothing before.
        sent = tuple(max(r.t_intended, r.t_start or r.t_intended, r.t_sent or r.t_intended) for r in replies)
        bad_before = tuple(accumulate((not g for g in good), initial=0))
        return cls(tuple(r.t_intended for r in replies), sent, good, bad_before, start, end)

    def bads(self) -> list[int]:
        return [i for i, g in enumerate(self.good) if not g]

    def share_bad(self, lo: int, hi: int) -> float:
        return (self.bad_before[hi] - self.bad_before[lo]) / (hi - lo) if hi > lo else 0.0


@dataclass(frozen=True, slots=True)
class Outage:
    """Bad requests that belong together: indices of the first and last, their number.

    `broken`: more of them than the objective allows, so it is not merely tolerated noise.
    """

    first: int
    last: int
    size: int
    broken: bool


@dataclass(frozen=True, slots=True)
class Back:
    """One outage's recovery. `low`/`high` bound R; a verdict rests on `last` and `sure`, which depend on no estimate.

    `sure` is the instant of the RUN-th good request after `last`; None: unseen.
    """

    outage: Outage
    onset: Window  # when its clock started, with its uncertainty
    clock: Literal["fault", "onset", "heal"]
    point: float
    low: float
    last: float  # the outage's last bad request, be it noise or not
    high: float
    sure: float | None
    held: bool  # the hold window after R was observed to its end
    by_heal: Literal["no", "maybe", "yes"]

    @property
    def seconds_low(self) -> float:
        return max(0.0, self.low - self.onset.end)

    @property
    def seconds_high(self) -> float:
        return max(0.0, self.high - self.onset.start)


@dataclass(frozen=True, slots=True)
class Measured:
    """All outages after the fault; `fault` is None when no harm was sent, `series` is what was looked at."""

    fault: Window | None
    point: float | None  # best guess of F
    series: Series
    backs: tuple[Back, ...]
    gap: float  # the longest time without a request, seconds

    @property
    def worst(self) -> Back | None:
        """The slowest, which is reported. Of tolerated ones near the fault only the largest: the others are noise.

        (A verdict looks at all of them.)
        """
        near = [b for b in self.backs if b.clock == "fault"]
        largest = max(near, key=lambda b: b.outage.size, default=None)
        some = [b for b in self.backs if b.clock != "fault" or b.outage.broken or b is largest]
        return max(some, key=lambda b: (not b.held, b.by_heal == "yes", b.high - b.onset.start), default=None)


def fault_instant(timeline: Timeline) -> Window | None:
    """[F_low, F_high]: from the first harm sent to the effect's proof or the first bad reply by a target."""
    low = fault_low(timeline)
    if low is None:
        return None
    proofs = [m.t for m in marks(timeline, Step.EFFECT) if m.ok and m.t >= low]
    targets = frozenset(p.rsplit("/", 1)[-1] for p in timeline.fault.pods)
    bad = [r.t_end for r in timeline.replies if counted(r) and not r.ok and r.t_end >= low and _pod(r) in targets]
    found = proofs + bad
    return Window(low, min(found)) if found else None


def _pod(reply: Reply) -> str | None:
    return reply.pod.rsplit("/", 1)[-1] if reply.pod else None


def examine(timeline: Timeline, asked: Asked) -> Measured:
    """Find every outage from the fault to the end of what was observed, and when each was over."""
    fault = fault_instant(timeline)
    low = fault_low(timeline)
    spans = [w for p in (Phase.DURING, Phase.AFTER) if (w := window(timeline, p))]
    end = max((w.end for w in spans), default=low if low is not None else 0.0)
    some = [] if low is None else [r for r in chosen(timeline, asked.cls) if low <= r.t_intended < end]
    series = Series.of(sorted(some, key=lambda r: (r.t_intended, r.seq)), asked, low or 0.0, end)
    if fault is None or low is None:
        return Measured(None, None, series, (), math.inf)
    seen = outages(series, asked)
    point = _fault_point(timeline, asked, series, fault, seen)
    edges = (low, *series.t, end)
    gap = max(b - a for a, b in pairwise(edges))
    backs = tuple(_back(timeline, asked, series, fault, o) for o in seen)
    return Measured(fault, point, series, backs, gap)


def _fault_point(timeline: Timeline, asked: Asked, series: Series, fault: Window, seen: Sequence[Outage]) -> float:
    """The best guess of F within its bounds: not long before the first sign of harm, or the proof.

    A request that was sent after F and was good all the same is as likely as the outage's share of good ones; so the
    middle of the bounds is a good guess only where no outage follows the proof.
    """
    broken = [
        r.t_end
        for r in chosen(timeline, asked.cls)
        if r.t_intended < fault.start <= r.t_end < fault.end and not asked.good(r)
    ]
    lo, hi = bisect_left(series.t, fault.start), bisect_right(series.t, fault.end)
    first_bad = next((i for i in range(lo, len(series.t)) if not series.good[i]), None)
    if broken and (first_bad is None or min(broken) < series.t[first_bad]):
        return min(broken)
    if first_bad is None or first_bad - hi >= RUN:
        return (fault.start + fault.end) / 2
    outage = next(o for o in seen if o.first <= first_bad <= o.last)
    bads = [i for i in range(outage.first, outage.last + 1) if not series.good[i]][:TAIL]
    share = series.share_bad(outage.first, bads[-1] + 1)
    latest = min(fault.end, series.t[first_bad])
    edges = [latest, *(series.t[i] for i in range(min(first_bad, hi) - 1, lo - 1, -1)), fault.start]
    return _halfway(edges, share)


def outages(series: Series, asked: Asked) -> list[Outage]:
    """Link bad requests to outages, in the order of time."""
    bads = series.bads()
    broken = [i for i in bads if _broken(series, asked, i)]
    found: list[Outage] = []
    start = bads[0] if bads else 0
    for a, b in pairwise([*bads, len(series.t) + RUN + 1]):
        at = bisect_left(broken, b)
        near = at < len(broken) and series.t[broken[at]] - series.t[a] <= asked.hold
        if b - a - 1 < RUN or near:
            continue
        size = series.bad_before[a + 1] - series.bad_before[start]
        found.append(Outage(start, a, size, bisect_left(broken, start) < bisect_right(broken, a)))
        start = b
    return found


def _broken(series: Series, asked: Asked, i: int) -> bool:
    """Whether the objective is broken over the hold window that begins with request i.

    Near the end of the observation the window's *size* is that of the last whole one.
    """
    begin = max(series.start, min(series.t[i], series.end - asked.hold))
    lo, hi = bisect_left(series.t, begin), bisect_right(series.t, begin + asked.hold)
    return series.bad_before[hi] - series.bad_before[i] > (1 - asked.at_least) * (hi - lo) + 1e-9


def _holds(series: Series, asked: Asked, i: int) -> bool:
    """Whether the objective holds over the whole hold time after request i."""
    lo, hi = i + 1, bisect_right(series.t, series.t[i] + asked.hold)
    return series.bad_before[hi] - series.bad_before[lo] <= (1 - asked.at_least) * (hi - lo) + 1e-9


def _held_at_end(series: Series, asked: Asked) -> bool:
    """Whether the observation ended with a whole hold time in which the objective held."""
    lo, n = bisect_left(series.t, series.end - asked.hold), len(series.t)
    bad = series.bad_before[n] - series.bad_before[lo]
    return series.end - asked.hold >= series.start and bad <= (1 - asked.at_least) * (n - lo) + 1e-9


def _tail_share(series: Series, bads: Sequence[int]) -> tuple[float, float]:
    """Share of bad requests up to the last of these: estimate, and lower bound (95 %, Wilson)."""
    looks = []
    for b in {bads[0], bads[max(0, len(bads) - TAIL)]}:
        k, n = series.bad_before[bads[-1] + 1] - series.bad_before[b], bads[-1] + 1 - b
        # A look begins with a bad request by choice, which says nothing about the share; so few say nothing at all.
        looks.append((_wilson_low(k - 1, n - 1) if k >= FEW else 0.0, (k - 0.5) / n))
    low, estimate = min(looks)
    return estimate, low


def _wilson_low(k: int, n: int) -> float:
    """The one-sided 95 % lower bound of a share of k in n."""
    p, z = k / n, 1.64
    return (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def _back(timeline: Timeline, asked: Asked, series: Series, fault: Window, outage: Outage) -> Back:
    last, m, share = _turn(series, asked, outage)
    low = series.t[last]
    high = _sent(series, outage.last, m)
    sure = _sent(series, outage.last, RUN) if outage.last + RUN < len(series.t) else None
    point = _median(series, last, m, share)
    held = not outage.broken or _held_at_end(series, asked)
    onset, clock = _onset(timeline, asked, series, fault, outage)
    undo = None if timeline.fault.one_shot else first(timeline, Step.UNDO)
    by_heal: Literal["no", "maybe", "yes"] = "no"
    if undo is not None and outage.broken and series.t[outage.first] < undo and asked.recovers == "by_failover":
        surely = series.end if sure is None else sure
        by_heal = "yes" if series.t[outage.last] >= undo else "maybe" if surely >= undo else "no"
    return Back(outage, onset, clock, point, low, series.t[outage.last], max(high, low), sure, held, by_heal)


def _sent(series: Series, last: int, m: int) -> float:
    """When the last of the m requests after `last` was sent: requests may leave in another order than intended."""
    if last + m >= len(series.t):
        return series.end
    return max(series.sent[last + 1 : last + m + 1])


def _turn(series: Series, asked: Asked, outage: Outage) -> tuple[int, int, float]:
    """The bad request after which R lies, how many good ones prove it, and the share q before it."""
    bads = [i for i in range(outage.first, outage.last + 1) if not series.good[i]]
    for k, (a, b) in enumerate(pairwise(bads)):
        if b - a - 1 < 1 or not _holds(series, asked, a):
            continue
        share, low = _tail_share(series, bads[: k + 1])
        m = run_needed(low)
        if b - a - 1 >= m:
            return a, m, share
    share, low = _tail_share(series, bads)
    return bads[-1], run_needed(low), share


def _median(series: Series, last: int, m: int, share: float) -> float:
    """The median of R, after the last bad request and before the m-th good one."""
    edges = [series.t[last], *sorted(series.sent[last + 1 : last + m + 1])]
    if len(edges) < 2:
        return min(series.end, series.t[last])
    return _halfway(edges, share)


def _halfway(edges: Sequence[float], share: float) -> float:
    """The median of an instant near `edges[0]`: gap j from there is as likely as its width times (1 − q)^j.

    The edges are good requests, each of which the outage would have let through with 1 − q.
    """
    weights = [abs(b - a) * (1 - share) ** j for j, (a, b) in enumerate(pairwise(edges))]
    half = sum(weights) / 2
    for weight, (a, b) in zip(weights, pairwise(edges), strict=True):
        if weight >= half:
            return a + (b - a) * (half / weight if weight else 0.0)
        half -= weight
    return edges[-1]


def _onset(
    timeline: Timeline, asked: Asked, series: Series, fault: Window, outage: Outage
) -> tuple[Window, Literal["fault", "onset", "heal"]]:
    t = series.t[outage.first]
    undo = None if timeline.fault.one_shot else first(timeline, Step.UNDO)
    if asked.recovers == "after_heal" and undo is not None and t < undo:
        gone = [m.t for s in (Step.RECOVERED, Step.GONE) for m in marks(timeline, s) if m.ok and m.t >= undo]
        return Window(undo, min(gone, default=undo)), "heal"
    # The proof, not F_high: a bad reply that lowers F_high must not move an outage out of the fault's reach.
    proof = min((m.t for m in marks(timeline, Step.EFFECT) if m.ok and m.t >= fault.start), default=fault.end)
    if (undo is None or t < undo) and t <= proof + (max(asked.hold, NEAR) if outage.broken else NEAR):
        return fault, "fault"
    before = series.t[outage.first - 1] if outage.first else fault.start
    return Window(before, t), "onset"


def measure(timeline: Timeline, asked: Asked) -> Recovery:
    """Recovery time R − F of the slowest outage, its interval and its stages; `seconds` None: never back."""
    return summary(timeline, examine(timeline, asked))


def summary(timeline: Timeline, found: Measured) -> Recovery:
    """What `measure` says of outages that were examined already."""
    if found.fault is None or found.point is None:
        return Recovery(None, None, None, story="the fault was not seen to act")
    fault = found.fault
    worst = found.worst
    if worst is None:
        steps = stages(timeline, found.point, found.point)
        return Recovery(0.0, 0.0, found.gap, steps, fault.start, fault.end, found.point, "no outage seen")
    steps = stages(timeline, found.point, worst.point if worst.held else None)
    low, high = worst.seconds_low, worst.seconds_high
    if not worst.held:
        return Recovery(None, low, None, steps, fault.start, fault.end, None, "never back for the whole hold time")
    origin = found.point if worst.clock == "fault" else (worst.onset.start + worst.onset.end) / 2
    value = min(max(worst.point - origin, low), high)
    story = _story(steps, worst, len(found.backs))
    return Recovery(value, low, high, steps, fault.start, fault.end, worst.point, story)


def _story(steps: Mapping[str, float], worst: Back, outages_seen: int) -> str:
    parts = []
    if worst.by_heal == "yes":
        parts.append("recovered only by the heal")
    if worst.clock == "onset":
        parts.append("a relapse, from its own onset")
    if worst.clock == "heal":
        parts.append("from the heal")
    if outages_seen > 1:
        parts.append(f"the slowest of {outages_seen} outages")
    parts += [f"{name} {show_duration(after)}" for name, after in steps.items()]
    return " · ".join(parts)


def stages(timeline: Timeline, fault: float, back: float | None) -> dict[str, float]:
    """Seconds after F at which each step towards recovery was first seen; a step that was not seen is absent.

    Moved, started, loaded and served are those of replacements: pods that were created after F, and targets that
    came back in place. Where the fault also hit other workloads (a zone's gateways), those of the engines count.
    """
    hit = {p.rsplit("/", 1)[-1] for p in timeline.fault.pods}
    owner = {p.pod.rsplit("/", 1)[-1]: p.owner for p in of(timeline, PodMark)}
    owners = {owner.get(name, "") for name in hit}
    # The engines are owned by their Service's name, everything else by "Kind/name" (probes.kube).
    ours = {one for one in owners if one and "/" not in one} or owners
    targets = {name for name in hit if owner.get(name, "") in ours}
    found: dict[str, float] = {}

    def note(name: str, t: float) -> None:
        if t >= fault and (name not in found or t - fault < found[name]):
            found[name] = t - fault

    for e in of(timeline, EndpointMark):
        if not (e.ready and e.present) and e.pod.rsplit("/", 1)[-1] in targets:
            note("noticed", e.t)
    came_back: set[str] = set()
    ready: dict[str, float] = {}
    for p in sorted(of(timeline, PodMark), key=lambda m: m.t):
        name = p.pod.rsplit("/", 1)[-1]
        if p.owner not in ours:
            continue
        is_new = p.stage == "created" and name not in targets
        is_back = p.stage in ("unready", "restarted", "created") and (p.target or name in targets)
        if p.t >= fault and (is_new or is_back):
            came_back.add(name)
        if name in came_back and p.stage in _STAGE_OF:
            note(_STAGE_OF[p.stage], p.t)
            if p.stage == "ready":
                ready.setdefault(name, p.t)
    for r in timeline.replies:
        since = ready.get(_pod(r) or "")
        if r.ok and r.t_first is not None and since is not None and r.t_intended >= since:
            note("served", r.t_first)
    if back is not None:
        note("steady", back)
    return {name: found[name] for name in STAGES if name in found}


STAGES = ("noticed", "moved", "started", "loaded", "served", "steady")
_STAGE_OF: Mapping[str, str] = {"scheduled": "moved", "started": "started", "restarted": "started", "ready": "loaded"}
