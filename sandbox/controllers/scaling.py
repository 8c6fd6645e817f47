"""The arithmetic of a HorizontalPodAutoscaler: how many replicas its metrics ask for, and how far it may go at once.

Pure functions. Source: pkg/controller/podautoscaler of Kubernetes 1.36 (replica_calculator.go, horizontal.go).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

TOLERANCE = 0.1
DOWN_WINDOW = 300.0  # seconds at real clocks: of the recommendations in it, the highest counts


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods of a target, as one metric sees them: by name, with a value where there is one."""

    ready: Mapping[str, float]
    unready: Set[str] = frozenset()  # not yet serving: what they use says nothing
    missing: Set[str] = frozenset()  # no value

    def __len__(self) -> int:
        return len(self.ready) + len(self.unready) + len(self.missing)


def by_ratio(current: int, ratio: float, pods: int, tolerance: float = TOLERANCE) -> int:
    """Replicas that bring a ratio of usage to target back to 1; within the tolerance, no change."""
    return current if abs(1 - ratio) <= tolerance else math.ceil(ratio * pods)


def by_average(current: int, pods: Pods, target: float) -> int:
    """Replicas for a wanted average per pod. Pods without a value count against a change in either direction.

    `pods.ready` must not be empty.
    """
    ratio = sum(pods.ready.values()) / len(pods.ready) / target
    unready = pods.unready if ratio > 1 else frozenset()
    if not pods.missing and not unready:
        return by_ratio(current, ratio, len(pods.ready))
    values = dict(pods.ready)
    values |= dict.fromkeys(pods.missing, target if ratio < 1 else 0.0)
    values |= dict.fromkeys(unready, 0.0)
    return _cautious(current, ratio, sum(values.values()) / len(values) / target, len(values))


def by_utilization(current: int, pods: Pods, requests: Mapping[str, float], percent: float) -> int:
    """Replicas for a wanted share (%) of what the pods request. `pods.ready` must not be empty."""

    def utilization(used: Mapping[str, float]) -> float:
        return 100 * sum(used.values()) / sum(requests[pod] for pod in used)

    ratio = utilization(pods.ready) / percent
    unready = pods.unready if ratio > 1 else frozenset()
    if not pods.missing and not unready:
        return by_ratio(current, ratio, len(pods.ready))
    used = dict(pods.ready)
    if ratio < 1:
        used |= {pod: requests[pod] * max(100.0, percent) / 100 for pod in pods.missing}
    else:
        used |= dict.fromkeys(pods.missing, 0.0)
    used |= dict.fromkeys(unready, 0.0)
    return _cautious(current, ratio, utilization(used) / percent, len(used))


def _cautious(current: int, first: float, ratio: float, pods: int) -> int:
    """With the guesses put in: no change if they make the direction doubtful."""
    if abs(1 - ratio) <= TOLERANCE or (first - 1) * (ratio - 1) < 0:
        return current
    wanted = math.ceil(ratio * pods)
    return current if (ratio < 1 and wanted > current) or (ratio > 1 and wanted < current) else wanted


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `value` pods, or percent, in `seconds`."""

    kind: str  # "Pods" or "Percent"
    value: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Rules:
    """One direction of `spec.behavior`."""

    window: float
    policies: tuple[Policy, ...]
    select: str = "Max"  # "Min", or "Disabled"


@dataclass(slots=True)
class History:
    """What an autoscaler has recommended and done: (seconds, replicas), (seconds, change)."""

    recommended: list[tuple[float, int]] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def trim(self, now: float, keep: float) -> None:
        self.recommended = [entry for entry in self.recommended if entry[0] >= now - keep]
        self.changes = [entry for entry in self.changes if entry[0] >= now - keep]


@dataclass(frozen=True, slots=True)
class Step:
    """Where to go now, and the conditions that say why not farther: {type: (status, reason, message)}."""

    replicas: int
    conditions: dict[str, tuple[str, str, str]]


_STEADY = ("True", "ReadyForNewScale", "recommended size matches current size")
_WITHIN = ("False", "DesiredWithinRange", "the desired count is within the acceptable range")


def step(
    current: int, wanted: int, least: int, most: int, now: float, history: History, up: Rules | None, down: Rules
) -> Step:
    """The next size. `up` None: no behavior is given, so growth is at most to twice the size, or 4."""
    history.recommended.append((now, wanted))
    conditions = {"AbleToScale": _STEADY}
    stable = _stabilized(current, now, history, up.window if up else 0.0, down.window)
    if stable > wanted:
        text = "recent recommendations were higher than current one, applying the highest recent recommendation"
        conditions["AbleToScale"] = ("True", "ScaleDownStabilized", text)
    elif stable < wanted:
        text = "recent recommendations were lower than current one, applying the lowest recent recommendation"
        conditions["AbleToScale"] = ("True", "ScaleUpStabilized", text)
    low, high = least, most
    fast_up = fast_down = False
    if stable > current:
        limit = max(2 * current, 4) if up is None else _up_limit(current, up, now, history)
        high, fast_up = min(most, limit), limit < most
    elif stable < current and (up is not None):
        limit = _down_limit(current, down, now, history)
        low, fast_down = max(least, limit), limit > least
    if stable > high:
        reason = ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate")
        if not fast_up:
            reason = ("TooManyReplicas", "the desired replica count is more than the maximum replica count")
        return Step(high, {**conditions, "ScalingLimited": ("True", *reason)})
    if stable < low:
        reason = ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate")
        if not fast_down:
            reason = ("TooFewReplicas", "the desired replica count is less than the minimum replica count")
        return Step(low, {**conditions, "ScalingLimited": ("True", *reason)})
    return Step(stable, {**conditions, "ScalingLimited": _WITHIN})


def _stabilized(current: int, now: float, history: History, up: float, down: float) -> int:
    """Of the recent recommendations, the one that changes least in either direction."""
    floor = min(replicas for at, replicas in history.recommended if at >= now - up)
    ceiling = max(replicas for at, replicas in history.recommended if at >= now - down)
    return min(max(current, floor), ceiling) if floor <= ceiling else current


def _up_limit(current: int, rules: Rules, now: float, history: History) -> int:
    if rules.select == "Disabled":
        return current
    limits = []
    for policy in rules.policies:
        start = current - _changed(history, now, policy.seconds, up=True)
        grown = start + policy.value if policy.kind == "Pods" else math.ceil(start * (1 + policy.value / 100))
        limits.append(grown)
    return max(current, min(limits) if rules.select == "Min" else max(limits))


def _down_limit(current: int, rules: Rules, now: float, history: History) -> int:
    if rules.select == "Disabled":
        return current
    limits = []
    for policy in rules.policies:
        start = current + _changed(history, now, policy.seconds, up=False)
        shrunk = start - policy.value if policy.kind == "Pods" else math.floor(start * (1 - policy.value / 100))
        limits.append(shrunk)
    return min(current, max(limits) if rules.select == "Min" else min(limits))


def _changed(history: History, now: float, seconds: float, *, up: bool) -> int:
    return sum(abs(change) for at, change in history.changes if at >= now - seconds and (change > 0) is up)
