"""Objectives of time: how soon the service is back, and how long it may be away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gameday import recovery
from gameday.errors import ExperimentError
from gameday.model import Finding, Phase, Reply, Timeline, Verdict
from gameday.objectives.base import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    Objective,
    check_seconds,
    check_share,
    objective,
    suffix,
    unseen,
    where,
)
from gameday.units import Seconds, show_duration
from gameday.windows import chosen, fault_low, window

LAST_WORD = 1.0  # seconds without a request at the end of the observation that may be chance at a few per second


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
    cls: str | None = None

    def __post_init__(self) -> None:
        check_seconds("Recovers.within", self.within)
        check_seconds("Recovers.hold", self.hold)
        check_share("Recovers.at_least", self.at_least)
        check_seconds("Recovers.first_token", self.first_token)
        check_seconds("Recovers.end_to_end", self.end_to_end)
        if self.recovers not in ("by_failover", "after_heal"):
            raise ExperimentError(f"Recovers.recovers is by_failover or after_heal, not {self.recovers!r}")

    @property
    def title(self) -> str:
        of_heal = " of the heal" if self.recovers == "after_heal" else ""
        return f"recovers{suffix(self.cls, None)} within {show_duration(self.within)}{of_heal}"

    def good(self, reply: Reply) -> bool:
        late = self.first_token is not None and (reply.ttft is None or reply.ttft > self.first_token)
        slow = self.end_to_end is not None and reply.latency > self.end_to_end
        return reply.ok and not late and not slow

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        found = recovery.examine(timeline, self)
        measured = recovery.summary(timeline, found)
        status, why = self._status(found)
        ours = (r.t_intended for r in timeline.replies if self.cls is None or r.cls == self.cls)
        last = max((t for t in ours if t <= found.series.end), default=-math.inf)
        quiet = found.series.end - last
        if status is PASS and quiet > LAST_WORD:
            status, why = INCONCLUSIVE, f"no request in the last {quiet:.0f} s: the load ended before the window"
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


BIN = 1.0  # seconds by which StaysUp looks at the service


@objective
@dataclass(frozen=True, slots=True)
class StaysUp(Objective):
    """The service is never down for longer than its maximum tolerable downtime (MTD).

    A second in which fewer than `up_from` of the requests were good is down; so is one without any request. Judged
    from the fault to the end of what was observed, in whatever list it stands. A downtime of n such seconds may have
    lasted up to one second less or more: PASS and FAIL leave that room.
    """

    mtd: Seconds
    up_from: float = 0.5
    cls: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        check_seconds("StaysUp.mtd", self.mtd)
        check_share("StaysUp.up_from", self.up_from)

    @property
    def title(self) -> str:
        return f"never down{suffix(self.cls, self.zone)} for longer than {show_duration(self.mtd)}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        start = fault_low(timeline)
        ends = [w.end for p in (Phase.DURING, Phase.AFTER) if (w := window(timeline, p))]
        if start is None or not ends or max(ends) - start < 2 * BIN:
            return unseen(phase, self.title, self.mtd, "nothing was observed after the fault", "s")
        count = math.floor((max(ends) - start) / BIN)
        good, total = [0] * count, [0] * count
        for r in chosen(timeline, self.cls, self.zone):
            at = math.floor((r.t_intended - start) / BIN)
            if 0 <= at < count:
                total[at] += 1
                good[at] += r.ok
        longest, at = _longest([g < self.up_from * n or n == 0 for g, n in zip(good, total, strict=True)])
        down = longest * BIN
        low, high = (max(0.0, down - BIN), down + BIN) if longest else (0.0, BIN)
        status = PASS if high <= self.mtd else FAIL if low > self.mtd else INCONCLUSIVE
        begin = start + at * BIN
        evidence = f"down {where(timeline, begin, begin + down)}" if longest else "never down"
        return Finding(phase, self.title, status, down, self.mtd, "s", low, high, sum(total), evidence)


def _longest(down: list[bool]) -> tuple[int, int]:
    """Length and first index of the longest run of True."""
    best, at, run = 0, 0, 0
    for i, is_down in enumerate(down):
        run = run + 1 if is_down else 0
        if run > best:
            best, at = run, i - run + 1
    return best, at
