"""Objectives that requests decide: what a user would have seen."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gameday.errors import ExperimentError
from gameday.model import STREAM_BROKEN, Finding, Phase, PodMark, Reply, Timeline
from gameday.objectives.base import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    Objective,
    check_seconds,
    check_share,
    finite,
    needed_for,
    objective,
    quantile,
    share,
    suffix,
    unseen,
    where,
    wilson,
    worst_time,
)
from gameday.units import Seconds, show_duration
from gameday.windows import of, requests, window


@objective
@dataclass(frozen=True, slots=True)
class Success(Objective):
    """The share of requests that ended properly."""

    at_least: float
    cls: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        check_share("Success.at_least", self.at_least)

    @property
    def title(self) -> str:
        return f"success{suffix(self.cls, self.zone)} ≥ {share(self.at_least)}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        some = requests(timeline, phase, self.cls, self.zone)
        return share_finding(timeline, phase, self.title, self.at_least, some, [r for r in some if r.ok])


def share_finding(
    timeline: Timeline, phase: Phase, title: str, at_least: float, some: Sequence[Reply], good: Sequence[Reply]
) -> Finding:
    n, ok = len(some), len(good)
    if not n:
        return Finding(phase, title, INCONCLUSIVE, None, at_least, "share", evidence="no request in this phase")
    observed, (low, high) = ok / n, wilson(ok, n)
    is_good = {id(r) for r in good}
    evidence = worst_time(timeline, [r.t_intended for r in some if id(r) not in is_good])
    needed = needed_for(at_least)
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
        check_seconds(f"{type(self).__name__}.{given[0][0]}", given[0][1])

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
        return f"{self.what}{suffix(self.cls, self.zone)} {name} ≤ {show_duration(limit)}"

    @abstractmethod
    def values(self, reply: Reply) -> Sequence[float]:
        """The request's latencies; infinite where what was waited for never came."""

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        p, limit, _ = self.at
        some = requests(timeline, phase, self.cls, self.zone)
        pairs = [(v, r.t_intended) for r in some for v in self.values(r)]
        ordered = sorted(v for v, _ in pairs)
        answered = sum(1 for r in some if r.ok for v in self.values(r) if v < math.inf)
        needed = max(30, math.ceil(2 / (1 - p) - 1e-6))
        if not ordered:
            return Finding(phase, self.title, INCONCLUSIVE, None, limit, "s", evidence="nothing to measure")
        value, low, high = quantile(ordered, p)
        evidence = worst_time(timeline, [t for v, t in pairs if v > limit])
        if never := sum(1 for v in ordered if v == math.inf):
            evidence = f"{never} of {len(ordered)} never came; {evidence}".rstrip("; ")
        status = PASS if value <= limit else FAIL
        if answered < needed:
            # Too few answers prove nothing good; so many late ones as break the limit among enough prove the opposite.
            late = sum(1 for v in ordered if v > limit)
            status = FAIL if late > (1 - p) * max(needed, len(ordered)) + 1e-9 else INCONCLUSIVE
            evidence = f"{answered} answers are too few, {needed} are needed; {evidence}".rstrip("; ")
        return Finding(
            phase, self.title, status, finite(value), limit, "s", finite(low), finite(high), len(ordered), evidence
        )


@objective
@dataclass(frozen=True, slots=True)
class FirstToken(Quantiles):
    """Time to first token after the *intended* send time; one that never came is infinitely late."""

    what: ClassVar[str] = "first token"

    def values(self, reply: Reply) -> Sequence[float]:
        return (math.inf,) if reply.ttft is None else (reply.ttft,)


@objective
@dataclass(frozen=True, slots=True)
class InterToken(Quantiles):
    """Gaps between tokens, of all streams together.

    A stream that broke has the gap until it was given up, and one without end when that is within the limit: its next
    token never came. Its good gaps are worth nothing, lest many broken streams outweigh one stall.
    """

    what: ClassVar[str] = "inter-token"

    def values(self, reply: Reply) -> Sequence[float]:
        if reply.outcome in STREAM_BROKEN and reply.t_first is not None:
            last = reply.t_first if reply.t_last_progress is None else reply.t_last_progress
            limit, gap = self.at[1], reply.t_end - last
            return (*(v for v in reply.itl if v > limit), gap if gap > limit else math.inf)
        return reply.itl


@objective
@dataclass(frozen=True, slots=True)
class EndToEnd(Quantiles):
    """From the intended send time to the proper end; infinite for a request that did not end properly."""

    what: ClassVar[str] = "end to end"

    def values(self, reply: Reply) -> Sequence[float]:
        return (reply.latency if reply.ok else math.inf,)


@objective
@dataclass(frozen=True, slots=True)
class Goodput(Objective):
    """The share of *all* requests that ended properly and within all latency limits that are given.

    `inter_token` holds for a request's mean gap between tokens. Over all, not over successful ones: otherwise an
    outage could show 100 % (facts/loadgen.md on inference-perf).
    """

    at_least: float
    first_token: Seconds | None = None
    inter_token: Seconds | None = None
    end_to_end: Seconds | None = None
    cls: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        check_share("Goodput.at_least", self.at_least)
        for name in ("first_token", "inter_token", "end_to_end"):
            check_seconds(f"Goodput.{name}", getattr(self, name))
        if self.first_token is None and self.inter_token is None and self.end_to_end is None:
            raise ExperimentError("Goodput needs first_token, inter_token or end_to_end; without them it is Success")

    @property
    def title(self) -> str:
        limits = (("first token", self.first_token), ("inter-token", self.inter_token), ("end", self.end_to_end))
        told = ", ".join(f"{name} ≤ {show_duration(v)}" for name, v in limits if v is not None)
        return f"goodput{suffix(self.cls, self.zone)} ≥ {share(self.at_least)} ({told})"

    def good(self, reply: Reply) -> bool:
        mean = sum(reply.itl) / len(reply.itl) if reply.itl else 0.0
        late = self.first_token is not None and (reply.ttft is None or reply.ttft > self.first_token)
        slow = self.inter_token is not None and mean > self.inter_token
        long = self.end_to_end is not None and reply.latency > self.end_to_end
        return reply.ok and not (late or slow or long)

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        some = requests(timeline, phase, self.cls, self.zone)
        return share_finding(timeline, phase, self.title, self.at_least, some, [r for r in some if self.good(r)])


@objective
@dataclass(frozen=True, slots=True)
class TokensPerSecond(Objective):
    """Output tokens per second, of requests that ended properly (what a broken stream brought is worth nothing)."""

    at_least: float
    cls: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.at_least < math.inf:
            raise ExperimentError(f"TokensPerSecond.at_least must be positive, not {self.at_least}")

    @property
    def title(self) -> str:
        return f"tokens{suffix(self.cls, self.zone)} ≥ {self.at_least:g}/s"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        span = window(timeline, phase)
        some = [r for r in requests(timeline, phase, self.cls, self.zone) if r.ok]
        if span is None or len(some) < needed_for(0.0) or span.length < 2:
            return unseen(phase, self.title, self.at_least, f"{len(some)} good requests are too few", "1/s")
        per_second: Counter[int] = Counter()
        for r in some:
            per_second[int(r.t_intended - span.start)] += r.completion_tokens or r.tokens
        seconds = [per_second[i] for i in range(int(span.length))]
        rate = sum(per_second.values()) / span.length
        mean = sum(seconds) / len(seconds)
        error = math.sqrt(sum((x - mean) ** 2 for x in seconds) / (len(seconds) - 1) / len(seconds))
        slowest = span.start + min(range(len(seconds)), key=lambda i: seconds[i])
        evidence = f"worst {where(timeline, slowest, slowest + 1)}: {min(seconds)} tokens"
        status = PASS if rate >= self.at_least else FAIL
        low, high = max(0.0, rate - 1.96 * error), rate + 1.96 * error
        return Finding(phase, self.title, status, rate, self.at_least, "1/s", low, high, len(some), evidence)


@objective
@dataclass(frozen=True, slots=True)
class Capacity(Objective):
    """Properly answered requests per second, as a share of what was asked per second in the steady state."""

    at_least: float
    cls: str | None = None

    def __post_init__(self) -> None:
        check_share("Capacity.at_least", self.at_least)

    @property
    def title(self) -> str:
        return f"capacity{suffix(self.cls, None)} ≥ {share(self.at_least)} of steady"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        now, then = window(timeline, phase), window(timeline, Phase.BEFORE)
        steady = requests(timeline, Phase.BEFORE, self.cls)
        asked, answered = len(steady), sum(r.ok for r in steady)
        good = sum(1 for r in requests(timeline, phase, self.cls) if r.ok)
        if now is None or then is None or answered < needed_for(self.at_least):
            return unseen(phase, self.title, self.at_least, f"{answered} answers before the fault are too few", "share")
        observed = (good / now.length) / (asked / then.length)
        # Both counts vary: of a Poisson count n, by its square root.
        error = observed * math.sqrt(1 / max(good, 1) + 1 / asked)
        evidence = f"{good / now.length:.1f}/s of {asked / then.length:.1f}/s"
        status = PASS if observed >= self.at_least else FAIL
        low, high = max(0.0, observed - 1.96 * error), observed + 1.96 * error
        return Finding(phase, self.title, status, observed, self.at_least, "share", low, high, good, evidence)


@objective
@dataclass(frozen=True, slots=True)
class Availability(Objective):
    """What the phase cost of the error budget of an availability objective.

    99.9 % over 30 days allows 43 minutes of total outage; a phase of 60 s with a third of the requests lost costs
    20 s of them. `burns_at_most` is the share of the budget that one such incident may cost.
    """

    slo: float
    period: Seconds = 30 * 86400.0
    burns_at_most: float = 1.0
    cls: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.slo < 1:
            raise ExperimentError(f"Availability.slo must be a share below 1, not {self.slo}")
        check_seconds("Availability.period", self.period)
        check_seconds("Availability.burns_at_most", self.burns_at_most)

    @property
    def title(self) -> str:
        days = f"{self.period / 86400:g} days"
        of = suffix(self.cls, self.zone)
        return f"availability{of} {share(self.slo)}: burns ≤ {share(self.burns_at_most)} of the budget of {days}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        span, some = window(timeline, phase), requests(timeline, phase, self.cls, self.zone)
        ok = sum(1 for r in some if r.ok)
        budget = (1 - self.slo) * self.period
        if span is None or not some:
            return unseen(phase, self.title, self.burns_at_most, "no request in this phase", "share")
        low, high = (x * span.length / budget for x in wilson(len(some) - ok, len(some)))
        lost = (len(some) - ok) / len(some) * span.length
        evidence = f"{lost:.1f} s of {show_duration(budget)}"
        status = PASS if lost / budget <= self.burns_at_most else FAIL
        if ok < needed_for(0.0):  # good ones: failures must not make a phase judgeable
            least = (len(some) - ok) / max(needed_for(0.0), len(some)) * span.length
            status = FAIL if least / budget > self.burns_at_most else INCONCLUSIVE
            evidence = f"{ok} good requests are too few, {needed_for(0.0)} are needed; {evidence}"
        return Finding(
            phase, self.title, status, lost / budget, self.burns_at_most, "share", low, high, len(some), evidence
        )


@objective
@dataclass(frozen=True, slots=True)
class UnbrokenStreams(Objective):
    """No stream that had begun is cut off, but for those served by `except_on="targets"` of the fault."""

    except_on: Literal["", "targets"] = ""
    at_most: int = 0
    cls: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        if self.except_on not in ("", "targets"):
            raise ExperimentError(f'UnbrokenStreams.except_on is "targets" or nothing, not {self.except_on!r}')
        if self.at_most < 0:
            raise ExperimentError(f"UnbrokenStreams.at_most cannot be negative, as {self.at_most} is")

    @property
    def title(self) -> str:
        on = ", except on the targets" if self.except_on else ""
        return (
            f"{self.at_most or 'no'} stream{'' if self.at_most == 1 else 's'} broken{on}{suffix(self.cls, self.zone)}"
        )

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        some = [r for r in requests(timeline, phase, self.cls, self.zone) if r.t_first is not None]
        targets = {p.rsplit("/", 1)[-1] for p in timeline.fault.pods} if self.except_on == "targets" else set()
        reborn = _reborn(timeline, targets)
        broken = [r for r in some if r.outcome in STREAM_BROKEN]
        # A stream whose pods we do not know may have run anywhere: it counts.
        bad = [r for r in broken if not _ran_on(r, {t for t in targets if r.t_intended < reborn.get(t, math.inf)})]
        where = sorted({f"{r.pod or 'unknown pod'}{f' via {r.via}' if r.via else ''}" for r in bad})
        evidence = f"{len(broken) - len(bad)} broken on the targets" if self.except_on else ""
        if bad:
            evidence = f"broken on {', '.join(where[:5])}; {worst_time(timeline, [r.t_end for r in bad])}"
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


def _reborn(timeline: Timeline, names: set[str]) -> dict[str, float]:
    """When another pod took the name of one of these, as StatefulSets have it: that one is no target."""
    made = [m for m in of(timeline, PodMark) if m.stage == "created" and m.pod.rsplit("/", 1)[-1] in names]
    return {m.pod.rsplit("/", 1)[-1]: m.t for m in sorted(made, key=lambda m: -m.t)}


def _ran_on(reply: Reply, pods: set[str]) -> bool:
    """Whether one of the pods that carried the stream, engine or gateway, is among `pods` (names)."""
    return any(name.rsplit("/", 1)[-1] in pods for name in (reply.pod, reply.via) if name)
