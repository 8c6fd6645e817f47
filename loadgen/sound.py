"""Whether the load generator itself kept up: otherwise latencies are partly its own, and none may be believed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from gameday.model import Heartbeat, Outcome

RUN_QUEUE = 0.05
"""Share of a second that a worker may wait for a CPU (DESIGN 5, as the judge has it)."""
DELAY = 0.010
"""Seconds of schedule delay (p99) that are still the service's latency and not ours."""
SATURATED_SHARE = 0.05
"""Share of the run's seconds that may be worse than that."""
LATE_SHARE = 0.005
"""Share of the requests that may be sent later than that: half of what decides a p99."""
SHED_SHARE = 0.01
"""Share of the requests that may be shed (as the judge has it): what was not sent is in no quantile."""
SILENT = 3.0
"""Seconds without a heartbeat that make a run unsound."""


@dataclass(slots=True)
class Punctuality:
    """Counts requests sent late, or not at all. A stop of a second spoils one heartbeat, but all that was due in it."""

    started: int = 0
    late: int = 0
    shed: int = 0

    def add(self, outcome: Outcome, t_intended: float, t_start: float | None) -> None:
        self.shed += outcome is Outcome.CLIENT_SHED
        if t_start is not None:
            self.started += 1
            self.late += t_start - t_intended > DELAY

    def trouble(self) -> list[str]:
        said: list[str] = []
        if self.late > LATE_SHARE * self.started:
            said.append(f"{self.late} of {self.started} requests were sent more than {1000 * DELAY:.0f} ms late")
        if self.shed > SHED_SHARE * (self.started + self.shed):
            said.append(f"{self.shed} requests were never sent: too many were under way, or this machine ran short")
        return said


def trouble(worker: int, beats: Iterable[Heartbeat], begin: float, end: float) -> list[str]:
    """What a worker says of itself while requests were sent; a second's heartbeat comes at its end."""
    inside = sorted((b for b in beats if begin < b.t <= end + 1), key=lambda b: b.t)
    edges = [begin, *(b.t for b in inside), max(end, inside[-1].t if inside else end)]
    silent = max(b - a for a, b in pairwise(edges))
    said: list[str] = []
    if silent > SILENT:
        said.append(f"no heartbeat of load worker {worker} for {silent:.1f} s")
    bad = [b for b in inside if b.run_queue > RUN_QUEUE or b.delay_p99 > DELAY]
    if len(bad) > max(1, SATURATED_SHARE * len(inside)):
        said.append(
            f"load worker {worker} was saturated in {len(bad)} of {len(inside)} s: it sent up to "
            f"{1000 * max(b.delay_p99 for b in bad):.0f} ms late and waited up to "
            f"{max(b.run_queue for b in bad):.0%} of a second for a CPU; use more workers or machines"
        )
    return said
