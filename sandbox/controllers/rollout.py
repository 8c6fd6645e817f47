"""The arithmetic of a Deployment's rollout: who may grow, who must shrink, by how much.

Pure functions over `Size` (a ReplicaSet as the arithmetic sees it). The rules are those of
kube-controller-manager 1.36 (pkg/controller/deployment/{rolling,sync}.go, util/deployment_util.go).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sandbox.controllers.objects import scaled


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a rollout may deviate from `replicas`, in pods."""

    replicas: int
    surge: int
    unavailable: int

    @property
    def most(self) -> int:
        return self.replicas + self.surge

    @property
    def least_available(self) -> int:
        return self.replicas - self.unavailable


@dataclass(frozen=True, slots=True)
class Size:
    """A ReplicaSet: its wanted and available pods, its creation order, the bound it was last scaled under."""

    name: str
    replicas: int
    available: int = 0
    created: str = ""
    most: int = 0  # annotation deployment.kubernetes.io/max-replicas; 0: unknown


def bounds(replicas: int, kind: str, surge: int | str, unavailable: int | str) -> Bounds:
    """Resolve percentages; both zero would never move, so one pod may then be unavailable."""
    if kind != "RollingUpdate":
        return Bounds(replicas, 0, 0)
    more, fewer = scaled(surge, replicas, up=True), scaled(unavailable, replicas, up=False)
    if more == 0 and fewer == 0:
        fewer = 1
    return Bounds(replicas, more, min(fewer, replicas))


def new_size(limit: Bounds, kind: str, new: int, total: int) -> int:
    """Wanted pods of the new ReplicaSet, now `new` of `total` over all of them."""
    if kind != "RollingUpdate":
        return limit.replicas
    if total >= limit.most:
        return new
    return new + min(limit.most - total, limit.replicas - new)


def shrink_old(limit: Bounds, new: Size, old: Sequence[Size]) -> dict[str, int]:
    """The sizes of the old ReplicaSets that change: unhealthy pods first, then as many as availability allows."""
    total = new.replicas + sum(one.replicas for one in old)
    spare = total - limit.least_available - (new.replicas - new.available)
    if spare <= 0:
        return {}
    changed: dict[str, int] = {}
    left = []
    for one in sorted(old, key=lambda size: size.created):
        unhealthy = min(spare, max(0, one.replicas - one.available))
        if unhealthy:
            spare -= unhealthy
            one = replace(one, replicas=one.replicas - unhealthy)  # noqa: PLW2901
            changed[one.name] = one.replicas
        left.append(one)
    excess = new.available + sum(one.available for one in old) - limit.least_available
    for one in left:
        fewer = min(one.replicas, excess)
        if fewer > 0:
            excess -= fewer
            changed[one.name] = one.replicas - fewer
    return changed


def proportional(limit: Bounds, sets: Sequence[Size], status_replicas: int) -> dict[str, int]:
    """New sizes when a Deployment is scaled in the middle of a rollout: each set gets its share."""
    active = [one for one in sets if one.replicas > 0]
    allowed = limit.most if limit.replicas > 0 else 0
    to_add = allowed - sum(one.replicas for one in active)
    # Growing, larger and newer sets come first; shrinking, larger and older ones.
    active.sort(key=lambda one: one.created, reverse=to_add > 0)
    active.sort(key=lambda one: one.replicas, reverse=True)
    sizes: dict[str, int] = {}
    added = 0
    for one in active:
        share = _share(limit, one, to_add - added, status_replicas) if to_add else 0
        sizes[one.name] = one.replicas + share
        added += share
    if active and to_add:
        first = active[0].name
        sizes[first] = max(0, sizes[first] + to_add - added)
    return sizes


def _share(limit: Bounds, one: Size, open: int, status_replicas: int) -> int:
    if open == 0:
        return 0
    if limit.replicas == 0:
        fraction = -one.replicas
    else:
        base = one.most or status_replicas or limit.most
        fraction = int(one.replicas * limit.most / base + 0.5) - one.replicas
    return min(fraction, open) if open > 0 else max(fraction, open)
