"""Objectives that the cluster decides: pods, zones, nodes, and what is left behind."""

from __future__ import annotations

from dataclasses import dataclass

from gameday.errors import ExperimentError
from gameday.model import Finding, NodeMark, Phase, PodMark, Step, Timeline
from gameday.objectives.base import (
    ERROR,
    FAIL,
    INCONCLUSIVE,
    PASS,
    Objective,
    check_seconds,
    end_of,
    objective,
    suffix,
    unseen,
)
from gameday.units import Seconds, show_duration
from gameday.windows import fault_low, marks, of


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod as it was at one instant."""

    pod: str
    zone: str
    node: str
    owner: str
    ready: bool
    uid: str = ""


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
        state[m.uid] = PodState(m.pod, m.zone or was.zone, m.node or was.node, m.owner or was.owner, ready, m.uid)
    return list(state.values())


def owned(timeline: Timeline, pods: list[PodState], owner: str) -> list[PodState]:
    """Those of `pods` that `owner` means. "": the engines, which are owned by their Service's name alone, while
    everything else is "Kind/name" (probes.kube); all pods where a record knows no engines. "*": all."""
    engines = {m.owner for m in of(timeline, PodMark) if m.owner and "/" not in m.owner}
    wanted = {owner} if owner else engines
    return [p for p in pods if owner == "*" or not wanted or p.owner in wanted]


@objective
@dataclass(frozen=True, slots=True)
class Replicas(Objective):
    """So many pods are ready when the phase ends: the engines, those of `owner`, or all of them ("*")."""

    at_least: int
    owner: str = ""

    def __post_init__(self) -> None:
        if self.at_least < 1:
            raise ExperimentError(f"Replicas.at_least must be 1 or more: {self.at_least} promises nothing")

    @property
    def title(self) -> str:
        return f"ready replicas{suffix(self.owner or None, None)} ≥ {self.at_least}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        end = end_of(timeline, phase)
        pods = [] if end is None else owned(timeline, pods_at(timeline, end), self.owner)
        if not any(True for _ in of(timeline, PodMark)) or end is None:
            return unseen(phase, self.title, float(self.at_least), "no pod was seen")
        ready = sorted(p.pod for p in pods if p.ready)
        status = PASS if len(ready) >= self.at_least else FAIL
        n = float(len(ready))
        return Finding(
            phase, self.title, status, n, float(self.at_least), "count", n, n, len(pods), f"ready: {', '.join(ready)}"
        )


@objective
@dataclass(frozen=True, slots=True)
class Spread(Objective):
    """Ready pods per zone differ by no more than `max_skew` when the phase ends. Zones are those of the nodes.

    The pods are the engines, those of `owner`, or all of them ("*").
    """

    max_skew: int = 1
    owner: str = ""

    def __post_init__(self) -> None:
        if self.max_skew < 0:
            raise ExperimentError(f"Spread.max_skew cannot be negative, as {self.max_skew} is")

    @property
    def title(self) -> str:
        return f"spread over zones{suffix(self.owner or None, None)}, skew ≤ {self.max_skew}"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        end = end_of(timeline, phase)
        zones = {n.zone for n in of(timeline, NodeMark) if n.zone} | {p.zone for p in of(timeline, PodMark) if p.zone}
        if end is None or len(zones) < 2:
            return unseen(phase, self.title, float(self.max_skew), f"{len(zones)} zones seen, a spread needs 2")
        ready = [p for p in owned(timeline, pods_at(timeline, end), self.owner) if p.ready]
        per_zone = {z: sum(1 for p in ready if p.zone == z) for z in sorted(zones)}
        evidence = ", ".join(f"{z}: {n}" for z, n in per_zone.items())
        if any(not p.zone for p in ready):
            return unseen(phase, self.title, float(self.max_skew), f"a ready pod's zone is unknown; {evidence}")
        skew = float(max(per_zone.values()) - min(per_zone.values()))
        status = FAIL if skew > self.max_skew or not ready else PASS
        return Finding(phase, self.title, status, skew, float(self.max_skew), "count", skew, skew, len(ready), evidence)


@objective
@dataclass(frozen=True, slots=True)
class NodeReplaced(Objective):
    """The fault's nodes are gone and as many new ones have become ready, by the end of the phase."""

    within: Seconds | None = None

    def __post_init__(self) -> None:
        check_seconds("NodeReplaced.within", self.within)

    @property
    def title(self) -> str:
        return "node replaced" + (f" within {show_duration(self.within)}" if self.within is not None else "")

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        harm, end, wanted = fault_low(timeline), end_of(timeline, phase), len(timeline.fault.nodes)
        seen = [m for m in of(timeline, NodeMark) if harm is not None and end is not None and harm <= m.t <= end]
        if harm is None or end is None or not wanted or not any(True for _ in of(timeline, NodeMark)):
            return unseen(phase, self.title, self.within, "no node was aimed at, or none was seen", "s")
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

    def __post_init__(self) -> None:
        check_seconds("NodeKept.for_at_least", self.for_at_least)

    @property
    def title(self) -> str:
        return f"node kept for {show_duration(self.for_at_least)} after the report"

    def judge(self, timeline: Timeline, phase: Phase) -> Finding:
        harm, end, nodes = fault_low(timeline), end_of(timeline, phase), timeline.fault.nodes
        if harm is None or end is None or not nodes:
            return unseen(phase, self.title, self.for_at_least, "no node was aimed at", "s")
        reports = [
            m for m in of(timeline, NodeMark) if m.node in nodes and m.what.startswith("detected") and m.t <= end
        ]
        begun = min([harm, *(m.t for m in reports)])  # the signal goes before the harm, and so may the report
        seen = [m for m in of(timeline, NodeMark) if m.node in nodes and begun <= m.t <= end]
        touched = [m for m in seen if m.what == "gone" or (m.what == "cordoned" and "gameday" not in m.detail)]
        if touched:
            m = min(touched, key=lambda m: m.t)
            kept, why = m.t - harm, f"{m.node} {m.what} {show_duration(m.t - harm)} after the fault"
            return Finding(phase, self.title, FAIL, kept, self.for_at_least, "s", kept, kept, len(seen), why)
        # The signal goes before the harm, so the detector's report may, too.
        reports = [
            m for m in of(timeline, NodeMark) if m.node in nodes and m.what.startswith("detected") and m.t <= end
        ]
        told = {m.node: m.t for m in sorted(reports, key=lambda m: -m.t)}
        if set(told) != set(nodes):
            return unseen(phase, self.title, self.for_at_least, "the detector has not reported the fault", "s")
        kept = end - max(harm, *told.values())
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
        harmless = timeline.fault.one_shot or fault_low(timeline) is None
        steps = [Step.CLEAN] if harmless else [Step.HEALED, Step.CLEAN]
        latest = {(m.step, m.what): m for step in steps for m in marks(timeline, step)}
        missing = [s.value for s in steps if not any(step is s for step, _ in latest)]
        left = [f"{m.what or m.step.value}: {m.detail or 'not ok'}" for m in latest.values() if not m.ok]
        if left or missing:
            why = "; ".join(left + [f"never seen to be {s}" for s in missing])
            return Finding(phase, self.title, ERROR, float(len(left)), 0.0, "count", samples=len(latest), evidence=why)
        return Finding(phase, self.title, PASS, 0.0, 0.0, "count", 0.0, 0.0, len(latest), "verified clean")
