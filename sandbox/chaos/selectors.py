"""Which pods an experiment strikes: Chaos Mesh's selectors and modes, as pure functions.

Whatever a selector asks that the sandbox does not know raises `CannotSelect`: an ignored condition would
select more pods than were meant. Source: facts/chaos-mesh.md.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sandbox.client import Obj

Selector = Mapping[str, Any]


def _phase(pod: Obj) -> str:
    return str(pod.get("status", {}).get("phase", ""))


KNOWN = frozenset(
    {
        "namespaces",
        "labelSelectors",
        "expressionSelectors",
        "annotationSelectors",
        "fieldSelectors",
        "nodes",
        "nodeSelectors",
        "pods",
        "podPhaseSelectors",
    }
)
PHASES = frozenset({"Pending", "Running", "Succeeded", "Failed", "Unknown"})
# What a real API server lets a client select pods by.
FIELDS: Mapping[str, Callable[[Obj], str]] = {
    "metadata.name": lambda pod: str(pod["metadata"]["name"]),
    "metadata.namespace": lambda pod: str(pod["metadata"].get("namespace", "")),
    "spec.nodeName": lambda pod: str(pod["spec"].get("nodeName", "")),
    "spec.restartPolicy": lambda pod: str(pod["spec"].get("restartPolicy", "")),
    "spec.schedulerName": lambda pod: str(pod["spec"].get("schedulerName", "")),
    "spec.serviceAccountName": lambda pod: str(pod["spec"].get("serviceAccountName", "")),
    "spec.hostNetwork": lambda pod: "true" if pod["spec"].get("hostNetwork") else "false",
    "status.phase": _phase,
    "status.podIP": lambda pod: str(pod.get("status", {}).get("podIP", "")),
    "status.nominatedNodeName": lambda pod: str(pod.get("status", {}).get("nominatedNodeName", "")),
}


class CannotSelect(Exception):
    """The selector or the mode asks for something wrong, unknown or absent; the text is one sentence."""


def namespaces(selector: Selector, own: str) -> list[str]:
    """The namespaces to look into; `own` (the experiment's) when the selector names none."""
    if listed := selector.get("pods"):
        return sorted(listed)
    return list(dict.fromkeys(selector.get("namespaces") or [own]))


def select(selector: Selector, own: str, pods: Sequence[Obj], nodes: Sequence[Obj]) -> list[Obj]:
    """The pods that `selector` means, ordered by namespace and name.

    `pods` and `nodes` are what the cluster has; `own` is the experiment's namespace. Named `pods` bypass every
    other condition, and those that do not exist are skipped. Raises `CannotSelect`.
    """
    if strange := sorted(set(selector) - KNOWN):
        raise CannotSelect(f"the sandbox does not know the selector {strange[0]!r}")
    if listed := selector.get("pods"):
        found = [pod for pod in pods if pod["metadata"]["name"] in (listed.get(pod["metadata"]["namespace"]) or ())]
    else:
        conditions = _conditions(selector, own, nodes)
        found = [pod for pod in pods if all(holds(pod) for holds in conditions)]
    return sorted(found, key=lambda pod: (pod["metadata"]["namespace"], pod["metadata"]["name"]))


def draw(pods: Sequence[Obj], mode: str, value: str | None, rng: random.Random) -> list[Obj]:
    """As many of `pods` as `mode` and `value` ask for, drawn by `rng`. Raises `CannotSelect`.

    `fixed` is clamped to what there is, the percentages round up, `random-max-percent` may draw none.
    """
    if not pods:
        raise CannotSelect("no pod is selected")
    match mode:
        case "all":
            return list(pods)
        case "one":
            count = 1
        case "fixed":
            count = _number(mode, value)
            if count <= 0:
                raise CannotSelect("cannot select any pod as value below or equal 0")
        case "fixed-percent":
            count = math.ceil(len(pods) * _percent(mode, value) / 100)
        case "random-max-percent":
            count = math.ceil(len(pods) * rng.randint(0, _percent(mode, value)) / 100)
        case _:
            raise CannotSelect(f"mode {mode!r} is unknown")
    chosen = rng.sample(range(len(pods)), min(count, len(pods)))
    return [pods[index] for index in sorted(chosen)]


def containers(pod: Obj, names: Sequence[str] | None) -> list[str]:
    """The pod's containers among `names`; the first container when `names` is empty."""
    present = [str(container["name"]) for container in pod["spec"]["containers"]]
    return [name for name in present if name in names] if names else present[:1]


def _number(mode: str, value: str | None) -> int:
    try:
        return int(value or "")
    except ValueError:
        raise CannotSelect(f"mode {mode} needs a whole number as value, not {value!r}") from None


def _percent(mode: str, value: str | None) -> int:
    percent = _number(mode, value)
    if percent == 0:
        raise CannotSelect("cannot select any pod as value below or equal 0")
    if not 0 < percent <= 100:
        raise CannotSelect(f"mode {mode} needs a value in (0, 100], not {percent}")
    return percent


Condition = Callable[[Obj], bool]


def _conditions(selector: Selector, own: str, nodes: Sequence[Obj]) -> list[Condition]:
    inside = set(namespaces(selector, own))
    conditions: list[Condition] = [lambda pod: pod["metadata"]["namespace"] in inside]
    if labels := selector.get("labelSelectors"):
        conditions.append(lambda pod: _includes(pod["metadata"].get("labels"), labels))
    if annotations := selector.get("annotationSelectors"):
        conditions.append(lambda pod: _includes(pod["metadata"].get("annotations"), annotations))
    conditions += [_expression(expression) for expression in selector.get("expressionSelectors") or ()]
    conditions += [_field(path, wanted) for path, wanted in (selector.get("fieldSelectors") or {}).items()]
    if phases := selector.get("podPhaseSelectors"):
        conditions.append(_phases(phases))
    if selector.get("nodes") or selector.get("nodeSelectors"):
        on = _nodes(selector, nodes)
        conditions.append(lambda pod: pod["spec"].get("nodeName") in on)
    return conditions


def _includes(have: Mapping[str, str] | None, want: Mapping[str, str]) -> bool:
    return all((have or {}).get(key) == value for key, value in want.items())


def _expression(expression: Mapping[str, Any]) -> Condition:
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or []
    if operator in ("In", "NotIn") and not values:
        raise CannotSelect(f"expression on {key!r}: {operator} needs values")
    if operator in ("Exists", "DoesNotExist") and values:
        raise CannotSelect(f"expression on {key!r}: {operator} takes no values")

    def label(pod: Obj) -> str | None:
        value: str | None = (pod["metadata"].get("labels") or {}).get(key)
        return value

    match operator:
        case "In":
            return lambda pod: label(pod) in values
        case "NotIn":
            return lambda pod: label(pod) not in values
        case "Exists":
            return lambda pod: label(pod) is not None
        case "DoesNotExist":
            return lambda pod: label(pod) is None
    raise CannotSelect(f"expression on {key!r}: {operator!r} is not a valid label selector operator")


def _field(path: str, wanted: str) -> Condition:
    if path not in FIELDS:
        raise CannotSelect(f"field label not supported: {path}")
    read = FIELDS[path]
    return lambda pod: read(pod) == wanted


def _phases(wanted: Sequence[str]) -> Condition:
    """Phases, or with a leading "!" phases to leave out, as Chaos Mesh reads them."""
    for phase in wanted:
        if phase.removeprefix("!") not in PHASES:
            raise CannotSelect(f"pod phase {phase!r} is unknown")
    without = {phase[1:] for phase in wanted if phase.startswith("!")}
    within = {phase for phase in wanted if not phase.startswith("!")}
    return lambda pod: _phase(pod) not in without and (not within or _phase(pod) in within)


def _nodes(selector: Selector, nodes: Sequence[Obj]) -> set[str]:
    """`nodes` and those that `nodeSelectors` (equality, all of them) match, together."""
    known = {str(node["metadata"]["name"]) for node in nodes}
    named = set(selector.get("nodes") or ())
    if unknown := sorted(named - known):
        raise CannotSelect(f'nodes "{unknown[0]}" not found')
    if labels := selector.get("nodeSelectors"):
        named |= {str(node["metadata"]["name"]) for node in nodes if _includes(node["metadata"].get("labels"), labels)}
    return named
