"""Objectives of operations: what a drain, a rollout or the loss of a node must come to, as the watches saw it."""

from __future__ import annotations

from dataclasses import dataclass

from gameday.errors import ExperimentError
from gameday.model import EvictionMark, Finding, NodeMark, Phase, PodMark, Timeline
from gameday.objectives.base import FAIL, PASS, Objective, check_seconds, end_of, objective, suffix, unseen
from gameday.objectives.of_cluster import PodState, owned, pods_at
from gameday.units import Seconds, show_duration
from gameday.windows import fault_low, of, window


def _within(within: Seconds | None) -> str:
    return "" if within is None else f" within {show_duration(within)}"


@objective
@dataclass(frozen=True, slots=True)
class Drained(Objective):
    """Every eviction was accepted in the end and its pod is gone, by the end of the phase.

    `refused_at_least`: so many requests must have been refused by a disruption budget: it was seen to protect.
    """

    within: Seconds | None = None
    refused_at_least: int = 0

    def __post_init__(self) -> None:
        check_seconds("Drained.within", self.within)
        if self.refused_at_least < 0:
            raise ExperimentError(f"Drained.refused_at_least cannot be negative, as {self.refused_at_least} is")

    @property
    def title(self) -> str:
        refused = f", after ≥ {self.refused_at_least} refusals by the budget" if self.refused_at_least else ""
        return f"drained{_within(self.within)}{refused}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        harm, end = fault_low(timeline), end_of(timeline, phase)
        asked = [m for m in of(timeline, EvictionMark) if harm is not None and end is not None and harm <= m.t <= end]
        if harm is None or end is None or not asked or not timeline.fault.pods:
            return unseen(phase, self.title, self.within, "no eviction was asked for", "s")
        refused = [m for m in asked if m.answer == "refused"]
        accepted = {m.pod for m in asked if m.answer == "accepted"}
        gone = {m.pod: m.t for m in of(timeline, PodMark) if m.stage == "gone" and harm <= m.t <= end}
        left = sorted(set(timeline.fault.pods) - (accepted & gone.keys()))
        told = f"{len(accepted)} of {len(timeline.fault.pods)} evictions accepted, {len(refused)} refused by the budget"
        if left:
            why = f"{told}; not drained: {', '.join(left)}" + (f": {refused[-1].detail}" if refused else "")
            return Finding(phase, self.title, FAIL, None, self.within, "s", samples=len(asked), evidence=why)
        took = max(gone[pod] for pod in timeline.fault.pods) - harm
        late = self.within is not None and took > self.within
        status = FAIL if late or len(refused) < self.refused_at_least else PASS
        return Finding(phase, self.title, status, took, self.within, "s", took, took, len(asked), told)


@objective
@dataclass(frozen=True, slots=True)
class Replaced(Objective):
    """The fault's pods that `owner` means (the engines) have left, and as many new ones are ready, by the end."""

    within: Seconds | None = None
    owner: str = ""

    def __post_init__(self) -> None:
        check_seconds("Replaced.within", self.within)

    @property
    def title(self) -> str:
        return f"pods replaced{suffix(self.owner or None, None)}{_within(self.within)}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        harm, end = fault_low(timeline), end_of(timeline, phase)
        if harm is None or end is None:
            return unseen(phase, self.title, self.within, "the fault was not seen to act", "s")
        before = owned(timeline, pods_at(timeline, harm), self.owner)
        hit = {p.uid for p in before if p.pod in timeline.fault.pods}  # a StatefulSet's replacement has the same name
        if not hit:
            return unseen(phase, self.title, self.within, "none of the fault's pods is meant", "s")
        seen = sorted((m for m in of(timeline, PodMark) if harm <= m.t <= end), key=lambda m: m.t)
        left = {m.uid: m.t for m in reversed(seen) if m.uid in hit and m.stage in ("terminating", "gone")}
        born = {m.uid for m in seen if m.stage == "created"} - hit
        ready = {m.uid: m.t for m in reversed(seen) if m.uid in born and m.stage == "ready"}
        now_ready = {p.uid for p in owned(timeline, pods_at(timeline, end), self.owner) if p.ready} & ready.keys()
        told = f"{len(left)} of {len(hit)} left, {len(now_ready)} new ones ready"
        if len(left) < len(hit) or len(now_ready) < len(hit):
            return Finding(phase, self.title, FAIL, None, self.within, "s", samples=len(seen), evidence=told)
        took = max(*left.values(), sorted(ready[uid] for uid in now_ready)[len(hit) - 1]) - harm
        status = FAIL if self.within is not None and took > self.within else PASS
        return Finding(phase, self.title, status, took, self.within, "s", took, took, len(seen), told)


@objective
@dataclass(frozen=True, slots=True)
class NeverFewer(Objective):
    """At every instant of the phase at least so many pods are ready: the engines, those of `owner`, or all ("*")."""

    than: int
    owner: str = ""

    def __post_init__(self) -> None:
        if self.than < 1:
            raise ExperimentError(f"NeverFewer.than must be 1 or more: {self.than} promises nothing")

    @property
    def title(self) -> str:
        return f"never fewer than {self.than} ready{suffix(self.owner or None, None)}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        span = window(timeline, phase)
        if span is None or not any(True for _ in of(timeline, PodMark)):
            return unseen(phase, self.title, float(self.than), "no pod was seen")
        moments = [span.start, *sorted({m.t for m in of(timeline, PodMark) if m.t in span})]
        counts = [(self._ready(timeline, t), t) for t in moments]
        fewest, when = min(counts)
        status = PASS if fewest >= self.than else FAIL
        least = float(fewest)
        why = f"fewest {show_duration(round(when - span.start, 1))} into the phase" if status is FAIL else ""
        limit = float(self.than)
        return Finding(phase, self.title, status, least, limit, "count", least, least, len(moments), why)

    def _ready(self, timeline: Timeline, t: float) -> int:
        pods: list[PodState] = owned(timeline, pods_at(timeline, t), self.owner)
        return sum(p.ready for p in pods)


@objective
@dataclass(frozen=True, slots=True)
class NodesReady(Objective):
    """So many nodes are ready when the phase ends."""

    at_least: int

    def __post_init__(self) -> None:
        if self.at_least < 1:
            raise ExperimentError(f"NodesReady.at_least must be 1 or more: {self.at_least} promises nothing")

    @property
    def title(self) -> str:
        return f"ready nodes ≥ {self.at_least}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        end = end_of(timeline, phase)
        seen = sorted((m for m in of(timeline, NodeMark) if end is not None and m.t <= end), key=lambda m: m.t)
        if not seen:
            return unseen(phase, self.title, float(self.at_least), "no node was seen")
        ready: set[str] = set()
        for m in seen:
            if m.what == "ready":
                ready.add(m.node)
            elif m.what in ("not ready", "gone"):
                ready.discard(m.node)
        n = float(len(ready))
        status = PASS if n >= self.at_least else FAIL
        why = f"ready: {', '.join(sorted(ready))}"
        return Finding(phase, self.title, status, n, float(self.at_least), "count", n, n, len(seen), why)
