"""The load while it flows: workers followed live, and the figures of the last seconds.

The record that is judged is the workers' own; what is kept here serves stop conditions and the progress line.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from gameday import clock
from gameday.errors import LoadError
from gameday.model import Reply
from gameday.settings import Settings
from loadgen import launch, plan as load_plan
from loadgen.traffic import Traffic

RECENT = 3.0  # seconds that live figures look back
DRAIN, DRAIN_MOST = 4.0, 60.0  # seconds that requests under way get at the end: at least, and at most
SILENT = 2.0  # seconds without a word after which a request under way counts as bad for the stop conditions, at least


@dataclass(frozen=True, slots=True)
class Figures:
    """The last seconds, for people."""

    per_second: float
    success: float | None
    ttft_p95: float | None
    in_flight: int


class Flow:
    """One experiment's load. Thread-safe."""

    def __init__(self, keep: float) -> None:
        self._keep = keep + 5  # seconds for which replies count as recent
        self._lock = threading.Lock()
        self._load: launch.Load | None = None
        self._recent: deque[Reply] = deque()
        self._in_flight = self._silent = 0
        self._beat: clock.Instant | None = None  # when a worker last said that it lives
        self.replies: list[Reply] = []

    def start(self, traffic: Traffic, seed: int, lasting: float, settings: Settings, out: Path) -> None:
        """Start workers that have read the plan and wait for `begin`."""
        plan = load_plan.make(traffic, seed, lasting)
        plan.write(out / "plan.json")
        self._load = launch.start(
            out / "plan.json",
            target=settings.target,
            model=settings.model,
            out=out,
            workers=settings.load_workers,
            served_by=settings.served_by,
            served_zone=settings.served_zone,
            served_via=settings.served_via,
            api_key_file=settings.api_key_file,
            ca_file=settings.ca_file,
            # A model that thinks for seconds before its first token does not hang; whoever looks back far can wait.
            silent_after=max(SILENT, settings.stop_after / 4),
        )

    def begin(self, at: clock.Instant) -> None:
        assert self._load is not None, "prepared"
        self._load.begin(at)
        self._beat = at

    def alive(self) -> bool:
        """False when a worker was lost."""
        return self._load is None or self._load.alive()

    def silent_for(self) -> float:
        """Seconds since a worker last gave a sign of life; 0 before the load begins."""
        with self._lock:
            return 0.0 if self._beat is None or self._load is None else clock.now() - self._beat

    def follow(self) -> None:
        """Take in what happened since the last look."""
        with self._lock:
            if self._load is None:
                return
            tail = self._load.poll()
            self._in_flight, self._silent = tail.in_flight, tail.silent
            if tail.beats:
                self._beat = clock.now()
            self.replies.extend(tail.replies)
            self._recent.extend(tail.replies)
            horizon = clock.now() - self._keep
            while self._recent and self._recent[0].t_end < horizon:
                self._recent.popleft()

    def end(self, *, hurried: bool = False) -> str:
        """Stop arrivals and workers; returns why the load is not sound, "" when it is.

        What is under way gets twice the time that any good request took: with less, a slow model's usual requests
        would be cut off, and look like hanging ones.
        """
        if self._load is None:
            return ""
        wrong = ""
        try:
            longest = 0.0 if hurried else max((reply.latency for reply in self.replies if reply.ok), default=0.0)
            self._load.stop(within=min(max(DRAIN, 2 * longest), DRAIN_MOST))
        except LoadError as lost:
            wrong = str(lost)
        self.follow()
        with self._lock:
            self._load = None
        return wrong

    # ── the last seconds ────────────────────────────────────────────────────────────────────

    def share(self, since: clock.Instant) -> float | None:
        """Success share of what completed since then; requests that hang count as bad already. None: nothing did."""
        with self._lock:
            some = [reply for reply in self._recent if reply.t_end >= since and reply.counted]
            total = len(some) + self._silent
        return sum(reply.ok for reply in some) / total if total else None

    def good_since(self, since: clock.Instant) -> float | None:
        """Success share of what was to be sent since then; None when nothing came back."""
        with self._lock:
            some = [reply for reply in self._recent if reply.t_intended >= since and reply.counted]
        return sum(reply.ok for reply in some) / len(some) if some else None

    def figures(self) -> Figures:
        now = clock.now()
        with self._lock:
            some = [reply for reply in self._recent if reply.t_end >= now - RECENT and reply.counted]
        ttfts = sorted(reply.ttft for reply in some if reply.ttft is not None)
        return Figures(
            per_second=len(some) / RECENT,
            success=sum(reply.ok for reply in some) / len(some) if some else None,
            ttft_p95=ttfts[min(len(ttfts) - 1, math.floor(0.95 * len(ttfts)))] if ttfts else None,
            in_flight=self._in_flight,
        )
