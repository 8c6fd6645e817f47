"""Label and field selectors. What cannot be parsed or is not indexed is an error, never ignored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sandbox.apiserver.errors import bad_request
from sandbox.client import Obj

Labels = Mapping[str, str]
_NAME = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?)"
_VALUE = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_SET = re.compile(rf"({_NAME})\s+(in|notin)\s*\(([^()]*)\)$")
_EQUAL = re.compile(rf"({_NAME})\s*(==|=|!=)\s*({_VALUE})$")
_ORDER = re.compile(rf"({_NAME})\s*(>|<)\s*(-?\d+)$")
_EXISTS = re.compile(rf"(!?)\s*({_NAME})$")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One term; `op` is in, notin, exists, absent, gt or lt."""

    key: str
    op: str
    values: frozenset[str] = frozenset()

    def matches(self, labels: Labels) -> bool:
        value = labels.get(self.key)
        match self.op:
            case "in":
                return value in self.values
            case "notin":  # also true without the label, as in Kubernetes
                return value not in self.values
            case "exists":
                return value is not None
            case "absent":
                return value is None
            case _:
                return value is not None and self._ordered(value)

    def _ordered(self, value: str) -> bool:
        if not re.fullmatch(r"-?\d+", value):
            return False
        bound = int(next(iter(self.values)))
        return int(value) > bound if self.op == "gt" else int(value) < bound


@dataclass(frozen=True, slots=True)
class LabelSelector:
    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Labels | None) -> bool:
        return all(req.matches(labels or {}) for req in self.requirements)


def _terms(text: str) -> list[str]:
    """Split at commas outside parentheses."""
    return [term.strip() for term in re.split(r",(?![^()]*\))", text)]


def parse_labels(text: str) -> LabelSelector:
    """Raises ApiError(400)."""
    if not text.strip():
        return LabelSelector()
    return LabelSelector(tuple(_requirement(term, text) for term in _terms(text)))


def _requirement(term: str, whole: str) -> Requirement:
    if found := _SET.match(term):
        values = frozenset(value.strip() for value in found[3].split(","))
        return Requirement(found[1], found[2], values)
    if found := _EQUAL.match(term):
        return Requirement(found[1], "notin" if found[2] == "!=" else "in", frozenset({found[3]}))
    if found := _ORDER.match(term):
        return Requirement(found[1], "gt" if found[2] == ">" else "lt", frozenset({found[3]}))
    if found := _EXISTS.match(term):
        return Requirement(found[2], "absent" if found[1] else "exists")
    raise bad_request(f"unable to parse requirement: {term!r} in {whole!r}")


def from_object(selector: Obj | None) -> LabelSelector | None:
    """A LabelSelector object; None (absent) selects nothing and stays None."""
    if selector is None:
        return None
    found = [Requirement(key, "in", frozenset({value})) for key, value in (selector.get("matchLabels") or {}).items()]
    ops = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "absent"}
    for expr in selector.get("matchExpressions") or []:
        found.append(Requirement(expr["key"], ops[expr["operator"]], frozenset(expr.get("values") or ())))
    return LabelSelector(tuple(found))


def _path(path: str) -> Callable[[Obj], str]:
    keys = path.split(".")

    def read(obj: Obj) -> str:
        value: object = obj
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool):
            return str(value).lower()
        return "" if value is None else str(value)

    return read


# The fields that the real server indexes, per resource; metadata.name and .namespace always are.
_FIELDS: dict[str, tuple[str, ...]] = {
    "pods": ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName",
             "spec.hostNetwork", "status.phase", "status.podIP", "status.nominatedNodeName"),
    "nodes": ("spec.unschedulable",),
    "namespaces": ("status.phase",),
    "secrets": ("type",),
    "services": ("spec.clusterIP", "spec.type"),
    "jobs.batch": ("status.successful",),
    "replicasets.apps": ("status.replicas",),
    "events": ("involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid",
               "involvedObject.apiVersion", "involvedObject.resourceVersion", "involvedObject.fieldPath",
               "reason", "reportingComponent", "source", "type"),
}
_BOOLEANS = ("spec.unschedulable", "spec.hostNetwork")


@dataclass(frozen=True, slots=True)
class FieldTerm:
    read: Callable[[Obj], str]
    equal: bool
    value: str

    def matches(self, obj: Obj) -> bool:
        return (self.read(obj) == self.value) is self.equal


@dataclass(frozen=True, slots=True)
class FieldSelector:
    terms: tuple[FieldTerm, ...] = ()
    name: str | None = None  # the one name it can match, when it says so

    def matches(self, obj: Obj) -> bool:
        return all(term.matches(obj) for term in self.terms)


def _read(field: str) -> Callable[[Obj], str]:
    if field in _BOOLEANS:
        return lambda obj: _path(field)(obj) or "false"
    if field == "source":
        return lambda obj: _path("source.component")(obj) or _path("reportingComponent")(obj)
    if field == "status.successful":
        return lambda obj: _path("status.succeeded")(obj) or "0"
    return _path(field)


def parse_fields(text: str, key: str, extra: tuple[str, ...] = ()) -> FieldSelector:
    """Raises ApiError(400) for a field that `key` does not index."""
    if not text.strip():
        return FieldSelector()
    known = ("metadata.name", "metadata.namespace", *_FIELDS.get(key, ()), *extra)
    terms = []
    name = None
    for term in text.split(","):
        found = re.fullmatch(r"\s*([^=!\s]+)\s*(==|=|!=)\s*(.*?)\s*", term)
        if not found:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{term}'")
        field, equal, value = found[1], found[2] != "!=", found[3]
        if field not in known:
            raise bad_request(f"field label not supported: {field}")
        if field == "metadata.name" and equal:
            name = value
        terms.append(FieldTerm(_read(field), equal, value))
    return FieldSelector(tuple(terms), name)
