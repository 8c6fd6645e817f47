"""ResourceQuotas: what counts, and how much of it is used. Pure; the API server refuses by it, a controller reports it.

Known are counts of objects (`pods`, `count/deployments.apps`, …) and what pods request or are limited to of any
resource. Source: pkg/quota/v1 and its evaluators, Kubernetes 1.36.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal

from sandbox.client import Obj
from sandbox.controllers.objects import finished, milli

# Objects of the core group have a short name beside `count/…`.
SHORT = ("pods", "services", "secrets", "configmaps", "persistentvolumeclaims", "replicationcontrollers",
         "resourcequotas")  # fmt: skip
_OF_PODS = re.compile(r"^(requests|limits)\.(.+)$")
Lister = Callable[[str], Iterable[Obj]]  # "deployments.apps" → its objects in the quota's namespace


def understood(key: str) -> bool:
    """Whether a key of `spec.hard` is enforced here."""
    if key in SHORT or key in ("cpu", "memory"):
        return True
    if found := _OF_PODS.match(key):
        return found[2] != "storage" and not found[2].startswith("ephemeral")
    return bool(re.fullmatch(r"count/[a-z0-9.-]+", key))


def counted(key: str) -> str:
    """The objects of which a key is the number: "pods", "deployments.apps"; "" when it is no number of objects."""
    return key if key in SHORT else key[len("count/") :] if key.startswith("count/") else ""


def part(key: str) -> tuple[str, str]:
    """("requests" or "limits", resource) of a key that sums over pods."""
    found = _OF_PODS.match(key)
    return (found[1], found[2]) if found else ("requests", key)


def of_pod(pod: Obj, key: str) -> int:
    """Thousandths of a pod's requests or limits: its containers together, or its greatest initContainer."""
    where, resource = part(key)

    def asked(containers: Iterable[Obj]) -> list[int]:
        return [milli(((c.get("resources") or {}).get(where) or {}).get(resource, 0)) for c in containers]

    return max(sum(asked(pod["spec"]["containers"])), *asked(pod["spec"].get("initContainers") or ()), 0)


def lacking(pod: Obj, key: str) -> list[str]:
    """Containers that must say what they need of this, since a quota counts it, and do not."""
    where, resource = part(key)
    if resource not in ("cpu", "memory"):
        return []
    containers = [*(pod["spec"].get("initContainers") or ()), *pod["spec"]["containers"]]
    return [c["name"] for c in containers if resource not in ((c.get("resources") or {}).get(where) or {})]


def used(keys: Iterable[str], listed: Lister) -> dict[str, int]:
    """Thousandths in use, by key. Pods that have finished use nothing, but for `count/pods`."""
    found = {}
    for key in keys:
        if plural := counted(key):
            objects = list(listed(plural))
            found[key] = 1000 * sum(key != "pods" or not finished(obj) for obj in objects)
        else:
            found[key] = sum(of_pod(pod, key) for pod in listed("pods") if not finished(pod))
    return found


def text(thousandths: int, like: str = "") -> str:
    """A quantity, with binary suffixes where `like` has them."""
    if thousandths % 1000:
        return f"{thousandths}m"
    value, base, suffixes = thousandths // 1000, 1000, ("", "k", "M", "G", "T")
    if like.endswith("i"):
        base, suffixes = 1024, ("", "Ki", "Mi", "Gi", "Ti")
    step = 0
    while value and value % base == 0 and step < len(suffixes) - 1:
        value, step = value // base, step + 1
    return f"{Decimal(value)}{suffixes[step]}"


def exceeded(name: str, hard: Mapping[str, str], use: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """Why a quota has no room for what is wanted; "" when it has."""
    over = sorted(key for key, more in wanted.items() if more and use[key] + more > milli(hard[key]))
    if not over:
        return ""

    def listed(values: Mapping[str, int]) -> str:
        return ",".join(f"{key}={text(values[key], hard[key])}" for key in over)

    limits = ",".join(f"{key}={hard[key]}" for key in over)
    return f"exceeded quota: {name}, requested: {listed(wanted)}, used: {listed(use)}, limited: {limits}"
