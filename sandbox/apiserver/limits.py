"""Admission by LimitRange (of containers) and ResourceQuota, in the words of the real plugins.

Sources: plugin/pkg/admission/limitranger, pkg/quota/v1 (Kubernetes 1.36).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sandbox import quota
from sandbox.apiserver import errors
from sandbox.apiserver.resources import Resource
from sandbox.client import ApiError, Obj
from sandbox.controllers.objects import milli

if TYPE_CHECKING:
    from sandbox.apiserver.core import Core

_NOTE = "kubernetes.io/limit-ranger"


def refuse_unknown(obj: Obj) -> None:
    """What a LimitRange or ResourceQuota asks for beyond what is enforced here. Raises ApiError(501)."""
    spec = obj.get("spec") or {}
    types = sorted({item.get("type", "") for item in spec.get("limits") or ()} - {"Container"})
    if types:
        raise ApiError(501, "NotImplemented", f"the sandbox limits ranges of Container only, not of {', '.join(types)}")
    if spec.get("scopes") or spec.get("scopeSelector"):
        raise ApiError(501, "NotImplemented", "the sandbox has no scopes of quotas")
    keys = sorted(key for key in spec.get("hard") or () if not quota.understood(key))
    if keys:
        raise ApiError(501, "NotImplemented", f"the sandbox has no quota of {', '.join(keys)}")


# -- LimitRange


def apply_ranges(core: Core, pod: Obj) -> None:
    """Fill in a namespace's defaults, then hold its containers to the range. Raises ApiError(403)."""
    namespace = pod["metadata"]["namespace"]
    ranges = [item for stored in core.store.list("limitranges", namespace) for item in stored.obj["spec"]["limits"]]
    if not ranges:
        return
    containers = [*(pod["spec"].get("initContainers") or ()), *pod["spec"]["containers"]]
    notes = [note for container in containers for note in _fill(container, ranges)]
    if notes:
        annotations = pod["metadata"].get("annotations") or {}
        pod["metadata"]["annotations"] = {**annotations, _NOTE: f"LimitRanger plugin set: {'; '.join(notes)}"}
    wrong = [why for container in containers for item in ranges for why in _outside(container, item)]
    if wrong:
        text = wrong[0] if len(wrong) == 1 else f"[{', '.join(wrong)}]"
        raise errors.forbidden("", "pods", pod["metadata"]["name"], text)


def _fill(container: Obj, ranges: Iterable[Obj]) -> list[str]:
    resources = dict(container.get("resources") or {})
    notes = []
    for part, default, word in (("requests", "defaultRequest", "request"), ("limits", "default", "limit")):
        have = dict(resources.get(part) or {})
        added = {
            name: value for item in ranges for name, value in (item.get(default) or {}).items() if name not in have
        }
        if added:
            resources[part] = {**have, **added}
            notes.append(f"{', '.join(sorted(added))} {word} for container {container['name']}")
    if notes:
        container["resources"] = resources
    return notes


def _outside(container: Obj, item: Obj) -> list[str]:
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    wrong = []
    for name, least in sorted((item.get("min") or {}).items()):
        rule = f"minimum {name} usage per Container is {least}"
        if name not in requests:
            wrong.append(f"{rule}.  No request is specified")
        too_small = [(w, v) for w, v in _values(requests, limits, name) if milli(v) < milli(least)]
        wrong += [f"{rule}, but {word} is {value}" for word, value in too_small[:1]]
    for name, most in sorted((item.get("max") or {}).items()):
        rule = f"maximum {name} usage per Container is {most}"
        if name not in limits:
            wrong.append(f"{rule}.  No limit is specified")
        too_great = [(w, v) for w, v in _values(requests, limits, name) if milli(v) > milli(most)]
        wrong += [f"{rule}, but {word} is {value}" for word, value in too_great[-1:]]
    for name, ratio in sorted((item.get("maxLimitRequestRatio") or {}).items()):
        if name in requests and name in limits and milli(limits[name]) * 1000 > milli(ratio) * milli(requests[name]):
            have = milli(limits[name]) / milli(requests[name])
            wrong.append(f"{name} max limit to request ratio per Container is {ratio}, but provided ratio is {have:f}")
    return wrong


def _values(requests: Obj, limits: Obj, name: str) -> list[tuple[str, str]]:
    """What a container says of a resource: its request, then its limit."""
    return [(word, values[name]) for word, values in (("request", requests), ("limit", limits)) if name in values]


# -- ResourceQuota


def hold_to_quotas(core: Core, res: Resource, obj: Obj) -> None:
    """Refuse an object for which a quota of its namespace has no room. Raises ApiError(403)."""
    namespace = obj["metadata"].get("namespace", "")
    quotas = core.store.list("resourcequotas", namespace) if namespace else ()
    for stored in quotas:
        hard = stored.obj["spec"].get("hard") or {}
        wanted = {key: _wants(res, obj, key) for key in hard}
        name = stored.obj["metadata"]["name"]
        if res.key == "pods" and (silent := _silent(obj, hard)):
            raise errors.forbidden(res.group, res.plural, obj["metadata"]["name"], f"failed quota: {name}: {silent}")
        use = quota.used(hard, lambda plural: [one.obj for one in core.store.list(plural, namespace)])
        if why := quota.exceeded(name, hard, use, wanted):
            raise errors.forbidden(res.group, res.plural, obj["metadata"]["name"], why)


def _wants(res: Resource, obj: Obj, key: str) -> int:
    if plural := quota.counted(key):
        return 1000 if plural == res.key else 0
    return quota.of_pod(obj, key) if res.key == "pods" else 0


def _silent(pod: Obj, hard: Iterable[str]) -> str:
    lacking = {key: names for key in sorted(hard) if not quota.counted(key) and (names := quota.lacking(pod, key))}
    said = "; ".join(f"{key} for: {','.join(sorted(names))}" for key, names in lacking.items())
    return f"must specify {said}" if said else ""
