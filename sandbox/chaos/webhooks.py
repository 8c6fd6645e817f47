"""What Chaos Mesh's webhooks do to an experiment on its way into the API: defaults, refusals, no second thoughts.

The words are those of Chaos Mesh 2.8; covered are the fields that the sandbox can act on. What is wrong with a manifest
shows here and not only on the user's cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sandbox.chaos import gotime
from sandbox.client import ApiError, Obj

_CORRELATED = ("delay", "loss", "duplicate", "corrupt")
_RATE = re.compile(r"(.*?)\s*(kbit|mbit|gbit|tbit|tbps|gbps|mbps|kbps|bps|bit)")
_KINDS = frozenset({"PodChaos", "NetworkChaos", "StressChaos"})


def admit(obj: Obj, old: Obj | None) -> None:
    """Fill in defaults and raise ApiError(403) for what Chaos Mesh does not take; `old`: what is replaced."""
    kind = obj["kind"]
    if kind not in _KINDS:
        return
    spec = obj.get("spec") or {}
    _default(kind, spec)
    if old is not None:
        if spec != old.get("spec"):
            raise _denied(kind, "Cannot update chaos spec")
        return
    found = [f"{path}: Invalid value: {value}: {why}" for path, value, why in _wrong(kind, spec)]
    if found:
        raise _denied(kind, found[0] if len(found) == 1 else f"[{', '.join(found)}]")


def _denied(kind: str, why: str) -> ApiError:
    text = f'admission webhook "v{kind.lower()}.kb.io" denied the request: {why}'
    return ApiError(403, "Forbidden", text)


def _default(kind: str, spec: Obj) -> None:
    if kind != "NetworkChaos":
        return
    spec.setdefault("direction", "to")
    for part in _CORRELATED:
        if part in spec:
            spec[part].setdefault("correlation", "0")
    if "delay" in spec:
        spec["delay"].setdefault("jitter", "0ms")


_Wrong = tuple[str, str, str]  # path, value as JSON, why


def _wrong(kind: str, spec: Mapping[str, Any]) -> list[_Wrong]:
    found = _value("Spec.ContainerSelector", spec) if kind != "NetworkChaos" else []
    inner = "Spec.PodSelector" if kind == "NetworkChaos" else "Spec.ContainerSelector.PodSelector"
    found += _value(inner, spec)
    try:
        gotime.seconds(spec.get("duration") or "0")
    except ValueError as wrong:
        found.append(("Spec.Duration", _quoted(spec["duration"]), f"parse duration field error: time: {wrong}"))
    if kind == "PodChaos" and spec["action"] == "container-kill" and not spec.get("containerNames"):
        why = "the name of container is required on container-kill action: invalid value"
        found.append(("Spec.containerNames", "null", why))
    if kind == "NetworkChaos":
        found += _network(spec)
    return found


def _value(path: str, spec: Mapping[str, Any]) -> list[_Wrong]:
    """Of how many targets, or of which share."""
    mode, value = spec.get("mode"), spec.get("value", "")
    if mode not in ("fixed", "fixed-percent", "random-max-percent"):
        return []
    at, shown = f"{path}.value", _quoted(value)
    if not re.fullmatch(r"[+-]?\d+", value):
        return [(at, shown, f"parse value field error:strconv.Atoi: parsing {shown}: invalid syntax")]
    number = int(value)
    if mode == "fixed":
        return [] if number > 0 else [(at, shown, f"value must be greater than 0 with mode:{mode}")]
    right = 0 < number <= 100
    return [] if right else [(at, shown, f"value of {number} is invalid, Must be (0,100] with mode:{mode}")]


def _network(spec: Mapping[str, Any]) -> list[_Wrong]:
    found: list[_Wrong] = []
    rate = (spec.get("bandwidth") or {}).get("rate")
    if rate is not None and not (parts := _RATE.fullmatch(rate.strip().lower())):
        found.append(("Spec.TcParameter.Bandwidth.Rate", _quoted(rate), "parse rate field error:invalid unit"))
    elif rate is not None and parts and not parts[1].isdigit():
        why = f"parse rate field error:strconv.ParseUint: parsing {_quoted(parts[1])}: invalid syntax"
        found.append(("Spec.TcParameter.Bandwidth.Rate", _quoted(rate), why))
    direction = spec["direction"]
    if spec["action"] == "partition" or direction == "to":
        return found
    at = "Spec.direction", _quoted(direction)
    if spec.get("externalTargets") is not None:
        found.append((*at, "external targets cannot be used with `from` and `both` direction in netem action yet"))
    if not spec.get("target"):
        found.append((*at, "`from` and `both` direction cannot be used when targets is empty in netem action"))
    return found


def _quoted(text: str) -> str:
    return f'"{text}"'
