"""What holds for every object: names, labels, annotations, owners, finalizers; and the causes of a 422."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson

from sandbox.apiserver.errors import Cause
from sandbox.apiserver.resources import Resource
from sandbox.client import Obj

SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_KEY_NAME = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_LABEL_VALUE = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
CONFIG_KEY = r"[-._a-zA-Z0-9]+"
_ANNOTATIONS_BYTES = 262144
STANDARD_FINALIZERS = frozenset({"orphan", "foregroundDeletion", "kubernetes"})


# -- causes


def show(value: Any) -> str:
    return "null" if value is None else orjson.dumps(value).decode()


def invalid(field: str, value: Any, why: str) -> Cause:
    return Cause("FieldValueInvalid", f"Invalid value: {show(value)}: {why}", field)


def required(field: str, why: str = "") -> Cause:
    return Cause("FieldValueRequired", f"Required value: {why}" if why else "Required value", field)


def unsupported(field: str, value: Any, supported: Iterable[str]) -> Cause:
    listed = ", ".join(f'"{entry}"' for entry in supported)
    return Cause("FieldValueNotSupported", f"Unsupported value: {show(value)}: supported values: {listed}", field)


def forbidden(field: str, why: str) -> Cause:
    return Cause("FieldValueForbidden", f"Forbidden: {why}", field)


def duplicate(field: str, value: Any) -> Cause:
    return Cause("FieldValueDuplicate", f"Duplicate value: {show(value)}", field)


def missing(field: str, value: Any) -> Cause:
    return Cause("FieldValueNotFound", f"Not found: {show(value)}", field)


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def full(pattern: str, text: str) -> bool:
    return _regex(pattern).fullmatch(text) is not None


# -- names


_SUBDOMAIN_WHY = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    f"end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{SUBDOMAIN}')"
)
_LABEL_WHY = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    f"an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '{LABEL}')"
)


def subdomain(text: str) -> list[str]:
    too_long = ["must be no more than 253 characters"] if len(text) > 253 else []
    return too_long + ([] if full(SUBDOMAIN, text) else [_SUBDOMAIN_WHY])


def label(text: str) -> list[str]:
    too_long = ["must be no more than 63 characters"] if len(text) > 63 else []
    if full(LABEL, text):
        return too_long
    return [*too_long, "must not contain dots" if full(SUBDOMAIN, text) else _LABEL_WHY]


def _path_segment(text: str) -> list[str]:
    if text in (".", ".."):
        return [f"may not be '{text}'"]
    return [f"may not contain '{char}'" for char in "/%" if char in text]


_NAMES: dict[str, Callable[[str], list[str]]] = {
    "Namespace": label,
    "Service": label,
    "Role": _path_segment,
    "RoleBinding": _path_segment,
    "ClusterRole": _path_segment,
    "ClusterRoleBinding": _path_segment,
}


def _names(res: Resource, meta: Obj) -> list[Cause]:
    check = subdomain if res.custom else _NAMES.get(res.kind, subdomain)
    causes = []
    prefix, name = meta.get("generateName"), meta.get("name")
    if prefix:
        shown = prefix[:-1] if prefix.endswith("-") else prefix
        causes = [invalid("metadata.generateName", prefix, why) for why in check(shown) if len(prefix) <= 58]
    if not name:
        return [*causes, required("metadata.name", "name or generateName is required")]
    return causes + [invalid("metadata.name", name, why) for why in check(name)]


# -- labels, annotations


def label_value(text: str) -> list[str]:
    if len(text) > 63:
        return ["must be no more than 63 bytes"]
    if full(_LABEL_VALUE, text):
        return []
    return [
        "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start "
        "and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for "
        f"validation is '{_LABEL_VALUE}')"
    ]


def qualified_name(text: str, whole: str = "a valid label key") -> list[str]:
    """Errors of a label's or annotation's key."""
    rule = (
        "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
        f"character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '{_KEY_NAME}')"
    )
    parts = text.split("/")
    if len(parts) > 2:
        return [f"{whole} {rule} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"]
    found = []
    if len(parts) == 2:
        found = (
            ["prefix part must be non-empty"] if not parts[0] else [f"prefix part {why}" for why in subdomain(parts[0])]
        )
    name = parts[-1]
    if not name:
        return [*found, "name part must be non-empty"]
    if len(name) > 63:
        found.append("name part must be no more than 63 bytes")
    return found if full(_KEY_NAME, name) else [*found, f"name part {rule}"]


def labels(values: Obj | None, field: str) -> list[Cause]:
    causes = []
    for key, value in (values or {}).items():
        causes += [invalid(field, key, why) for why in qualified_name(key)]
        causes += [invalid(field, value, why) for why in label_value(value)]
    return causes


def label_selector(selector: Obj, field: str) -> list[Cause]:
    causes = []
    for i, expr in enumerate(selector.get("matchExpressions") or []):
        at = f"{field}.matchExpressions[{i}]"
        operator = expr.get("operator")
        if operator not in ("In", "NotIn", "Exists", "DoesNotExist"):
            causes.append(invalid(f"{at}.operator", operator or "", "not a valid selector operator"))
        elif operator in ("In", "NotIn") and not expr.get("values"):
            causes.append(required(f"{at}.values", "must be specified when `operator` is 'In' or 'NotIn'"))
        elif operator in ("Exists", "DoesNotExist") and expr.get("values"):
            causes.append(
                forbidden(f"{at}.values", "may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
            )
    return causes + labels(selector.get("matchLabels"), f"{field}.matchLabels")


def _annotations(values: Obj | None, field: str) -> list[Cause]:
    causes = []
    for key in values or {}:
        causes += [invalid(field, key, why) for why in qualified_name(key.lower(), "a valid annotation key")]
    if sum(len(key) + len(value) for key, value in (values or {}).items()) > _ANNOTATIONS_BYTES:
        text = f"Too long: may not be more than {_ANNOTATIONS_BYTES} bytes"
        causes.append(Cause("FieldValueTooLong", text, field))
    return causes


def _owners(owners: Sequence[Obj] | None) -> list[Cause]:
    causes = [
        invalid(f"metadata.ownerReferences.{key}", owner.get(key, ""), "must not be empty")
        for owner in owners or []
        for key in ("apiVersion", "kind", "name", "uid")
        if not owner.get(key)
    ]
    if sum(bool(owner.get("controller")) for owner in owners or []) > 1:
        why = "Only one reference can have Controller set to true."
        causes.append(invalid("metadata.ownerReferences", owners, why))
    return causes


def _finalizers(finalizers: Sequence[str] | None, *, strict: bool) -> list[Cause]:
    causes = []
    for i, entry in enumerate(finalizers or []):
        field = f"metadata.finalizers[{i}]"
        causes += [invalid(field, entry, why) for why in qualified_name(entry)]
        if strict and "/" not in entry and entry not in STANDARD_FINALIZERS:
            causes.append(invalid(field, entry, "name is neither a standard finalizer name nor is it fully qualified"))
    return causes


def metadata(res: Resource, meta: Obj) -> list[Cause]:
    return [
        *_names(res, meta),
        *labels(meta.get("labels"), "metadata.labels"),
        *_annotations(meta.get("annotations"), "metadata.annotations"),
        *_owners(meta.get("ownerReferences")),
        *_finalizers(meta.get("finalizers"), strict=not res.custom and res.group != "apiextensions.k8s.io"),
    ]
