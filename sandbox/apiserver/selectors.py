"""Label and field selectors. What cannot be parsed or is not indexed is an error, never ignored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sandbox.apiserver import rules
from sandbox.apiserver.errors import bad_request
from sandbox.client import ApiError, Obj

Labels = Mapping[str, str]


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


# The grammar, and the errors, of apimachinery's labels/selector.go.
_WORDS = re.compile(r"\s*(?:(==|!=|[()!,=<>])|([^()!,=<>\s]+))")
_OPS = {"=": "in", "==": "in", "!=": "notin", ">": "gt", "<": "lt"}


class _Parser:
    def __init__(self, text: str) -> None:
        self._words = ["".join(found) for found in _WORDS.findall(text)]

    def _peek(self) -> str:
        return self._words[0] if self._words else ""

    def _next(self) -> str:
        return self._words.pop(0) if self._words else ""

    def parse(self) -> list[Requirement]:
        found: list[Requirement] = []
        while True:
            word = self._peek()
            if word in ("", ")", "(", "=", "==", "!=", ">", "<") or (word == "," and not found):
                if not word and not found:
                    return found
                raise bad_request(f"found '{word}', expected: !, identifier, or 'end of string'")
            found.append(self._requirement())
            word = self._next()
            if not word:
                return found
            if word != ",":
                raise bad_request(f"found '{word}', expected: ',' or 'end of string'")
            if not self._peek():
                raise bad_request("found '', expected: identifier after ','")

    def _requirement(self) -> Requirement:
        absent = self._peek() == "!"
        if absent:
            self._next()
        key = self._next()
        if why := rules.qualified_name(key):
            raise _unparsed(f'<nil>: Invalid value: "{key}": {why[0]}')
        if absent or self._peek() in ("", ","):
            return Requirement(key, "absent" if absent else "exists")
        word = self._next()
        if word in ("in", "notin"):
            return Requirement(key, word, self._checked(key, self._values()))
        if word not in _OPS:
            raise _unparsed(f"found '{word}', expected: in, notin, =, ==, !=, gt, lt")
        value = "" if self._peek() in ("", ",") else self._next()
        if word in "<>" and not re.fullmatch(r"-?\d+", value):
            raise _unparsed(
                f"values[0]: Invalid value: \"{value}\": for 'Gt', 'Lt' operators, the value must be an integer"
            )
        return Requirement(key, _OPS[word], self._checked(key, [value]))

    def _values(self) -> list[str]:
        word = self._next()
        if word != "(":
            raise _unparsed(f"found '{word}' expected: '('")
        values, last = [], ","
        while (word := self._next()) != ")":
            if not word:
                raise _unparsed("found '', expected: ',', or ')'")
            if word != ",":
                values.append(word)
            elif last == ",":
                values.append("")
            last = word
        return values if values and last != "," else [*values, ""]

    @staticmethod
    def _checked(key: str, values: list[str]) -> frozenset[str]:
        for i, value in enumerate(values):
            if why := rules.label_value(value):
                raise _unparsed(f'values[{i}][{key}]: Invalid value: "{value}": {why[0]}')
        return frozenset(values)


def _unparsed(why: str) -> ApiError:
    return bad_request(f"unable to parse requirement: {why}")


def parse_labels(text: str) -> LabelSelector:
    """Raises ApiError(400)."""
    return LabelSelector(tuple(_Parser(text).parse())) if text.strip() else LabelSelector()


def from_object(selector: Obj | None) -> LabelSelector | None:
    """A LabelSelector object; None (absent) selects nothing and stays None."""
    if selector is None:
        return None
    found = [Requirement(key, "in", frozenset({value})) for key, value in (selector.get("matchLabels") or {}).items()]
    ops = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "absent"}
    for expr in selector.get("matchExpressions") or []:
        found.append(Requirement(expr["key"], ops[expr["operator"]], frozenset(expr.get("values") or ())))
    return LabelSelector(tuple(found))


EVERY_LABEL = LabelSelector()


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
    "pods": (
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    ),
    "nodes": ("spec.unschedulable",),
    "namespaces": ("status.phase",),
    "secrets": ("type",),
    "services": ("spec.clusterIP", "spec.type"),
    "jobs.batch": ("status.successful",),
    "replicasets.apps": ("status.replicas",),
    "events": (
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ),
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


EVERY_FIELD = FieldSelector()


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
        if field not in known and key in _FIELDS:
            raise bad_request(f"field label not supported: {field}")
        if field not in known:
            listed = ", ".join(f'"{name}"' for name in known)
            raise bad_request(f'"{field}" is not a known field selector: only {listed}')
        if field == "metadata.name" and equal:
            name = value
        terms.append(FieldTerm(_read(field), equal, value))
    return FieldSelector(tuple(terms), name)
