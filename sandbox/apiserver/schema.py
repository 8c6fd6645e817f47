"""Structural schemas of custom resources: pruning, defaulting and validation, in the real server's words.

Covers the OpenAPI v3 subset that CRDs may use; CEL rules (`x-kubernetes-validations`) are not evaluated and are
refused when a CRD is created.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from datetime import datetime
from typing import Any

import orjson

from sandbox.apiserver.errors import Cause
from sandbox.client import Obj

PRESERVE = "x-kubernetes-preserve-unknown-fields"
EMBEDDED = "x-kubernetes-embedded-resource"
INT_OR_STRING = "x-kubernetes-int-or-string"
_ROOT = ("apiVersion", "kind", "metadata")


# -- pruning


def prune(schema: Obj, value: Any, unknown: list[str], path: str = "", *, root: bool = True) -> Any:
    """Drop what the schema does not name; the paths of what was dropped are appended to `unknown`."""
    if isinstance(value, list):
        items = schema.get("items")
        if not isinstance(items, dict):
            return value
        return [prune(items, item, unknown, f"{path}[{i}]", root=False) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    properties, more = schema.get("properties") or {}, schema.get("additionalProperties")
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        if (root or schema.get(EMBEDDED)) and key in _ROOT:
            kept[key] = item
        elif key in properties:
            if item is None and not properties[key].get("nullable") and "default" not in properties[key]:
                continue  # null counts as absent where it is not allowed
            kept[key] = prune(properties[key], item, unknown, where, root=False)
        elif isinstance(more, dict):
            kept[key] = prune(more, item, unknown, where, root=False)
        elif more is True or schema.get(PRESERVE):
            kept[key] = item
        else:
            unknown.append(where)
    return kept


# -- defaulting


def default(schema: Obj, value: Any) -> None:
    """Fill defaults in place; null where it is not allowed counts as absent if there is a default."""
    if isinstance(value, dict):
        for key, sub in (schema.get("properties") or {}).items():
            if "default" in sub and (key not in value or (value[key] is None and not sub.get("nullable"))):
                value[key] = copy.deepcopy(sub["default"])
            if key in value:
                default(sub, value[key])
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            known = schema.get("properties") or {}
            for key, item in value.items():
                if key not in known:
                    default(more, item)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value:
            default(schema["items"], item)


# -- validation


_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "boolean",
    str: "string",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
}


def _type(value: Any) -> str:
    return _TYPES[type(value)]


def _quote(value: Any) -> str:
    return orjson.dumps(value).decode()


def _is(value: Any, wanted: str) -> bool:
    have = _type(value)
    return have == wanted or (wanted == "number" and have == "integer")


def validate(schema: Obj, value: Any, path: str = "") -> list[Cause]:
    """Everything wrong with a value."""
    if value is None:
        if schema.get("nullable") or (not schema.get("type") and not schema.get(INT_OR_STRING)):
            return []
        return [_wrong_type(path, schema.get("type", "integer"), value)]
    wanted = schema.get("type")
    if schema.get(INT_OR_STRING):
        if _type(value) not in ("integer", "string"):
            return [_int_or_string(path, value)]
    elif wanted and not _is(value, wanted):
        return _type_errors(schema, value, path)
    causes = list(_enum(schema, value, path))
    match value:
        case str():
            causes += _string(schema, value, path)
        case int() | float() if not isinstance(value, bool):
            causes += _number(schema, value, path)
        case list():
            causes += _array(schema, value, path)
        case dict():
            causes += _object(schema, value, path)
    return causes + _junctions(schema, value, path)


def _wrong_type(path: str, wanted: str, value: Any) -> Cause:
    have = _type(value)
    return Cause(
        "FieldValueTypeInvalid", f'Invalid value: "{have}": {path} in body must be of type {wanted}: "{have}"', path
    )


def _int_or_string(path: str, value: Any) -> Cause:
    have = _type(value)
    text = f'Invalid value: "{have}": {path} in body must be of type integer,string: "{have}"'
    return Cause("FieldValueTypeInvalid", text, path)


def _type_errors(schema: Obj, value: Any, path: str) -> list[Cause]:
    causes = [_wrong_type(path, schema["type"], value)]
    if schema["type"] == "integer" and isinstance(value, float):
        text = f'Invalid value: "": Checked value must be of type integer (default format) in {path}'
        causes.insert(0, Cause("FieldValueInvalid", text, "<nil>"))
    return causes


def _enum(schema: Obj, value: Any, path: str) -> list[Cause]:
    allowed = schema.get("enum")
    if not allowed or value in allowed:
        return []
    listed = ", ".join(_quote(entry) for entry in allowed)
    return [Cause("FieldValueNotSupported", f"Unsupported value: {_quote(value)}: supported values: {listed}", path)]


def _invalid(path: str, value: Any, why: str) -> Cause:
    return Cause("FieldValueInvalid", f"Invalid value: {_quote(value)}: {path} in body {why}", path)


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _string(schema: Obj, value: str, path: str) -> list[Cause]:
    """The first thing that is wrong; the real server stops there too."""
    longest, shortest = schema.get("maxLength"), schema.get("minLength")
    if longest is not None and len(value) > longest:
        return [Cause("FieldValueTooLong", f"Too long: may not be more than {longest} bytes", path)]
    if shortest is not None and len(value) < shortest:
        return [_invalid(path, value, f"should be at least {shortest} chars long")]
    pattern = schema.get("pattern")
    if pattern and not _regex(pattern).search(value):
        return [_invalid(path, value, f"should match '{pattern}'")]
    kind = schema.get("format")
    if kind and not _formatted(kind, value):
        text = f"Invalid value: {_quote(value)}: {path} in body must be of type {kind}: {_quote(value)}"
        return [Cause("FieldValueTypeInvalid", text, path)]
    return []


def _formatted(kind: str, value: str) -> bool:
    """Whether a string has the format; formats that are not known here are not checked, as in OpenAPI."""
    if kind not in ("date-time", "date"):
        return True
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return kind == "date" or "T" in value


def _number(schema: Obj, value: float, path: str) -> list[Cause]:
    causes = []
    multiple = schema.get("multipleOf")
    if multiple:
        if value == 0:  # a peculiarity of the real server's library
            causes.append(
                Cause(
                    "FieldValueInvalid",
                    f"Invalid value: {_quote(value)}: factor MultipleOf declared for {path} must be positive: 0",
                    path,
                )
            )
        elif not math.isclose(value / multiple, round(value / multiple)):
            causes.append(_invalid(path, value, f"should be a multiple of {multiple}"))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None:
        if schema.get("exclusiveMinimum") and value <= low:
            causes.append(_invalid(path, value, f"should be greater than {low}"))
        elif value < low:
            causes.append(_invalid(path, value, f"should be greater than or equal to {low}"))
    if high is not None:
        if schema.get("exclusiveMaximum") and value >= high:
            causes.append(_invalid(path, value, f"should be less than {high}"))
        elif value > high:
            causes.append(_invalid(path, value, f"should be less than or equal to {high}"))
    bounds = {"int32": 2**31, "int64": 2**63}
    limit = bounds.get(schema.get("format", ""))
    if limit and not -limit <= value < limit:
        causes.append(_invalid(path, value, f"must be of type {schema['format']}"))
    return causes


def _too_many(path: str, have: int, most: int) -> Cause:
    items = "item" if most == 1 else "items"
    return Cause("FieldValueTooMany", f"Too many: {have}: must have at most {most} {items}", path)


def _array(schema: Obj, value: list[Any], path: str) -> list[Cause]:
    causes = []
    least, most = schema.get("minItems"), schema.get("maxItems")
    if least is not None and len(value) < least:
        text = f"Invalid value: {len(value)}: {path} in body should have at least {least} items"
        causes.append(Cause("FieldValueInvalid", text, path))
    if most is not None and len(value) > most:
        causes.append(_too_many(path, len(value), most))
    items = schema.get("items")
    if isinstance(items, dict):
        for i, item in enumerate(value):
            causes += validate(items, item, f"{path}[{i}]")
    return causes + _duplicates(schema, value, path)


def _duplicates(schema: Obj, value: list[Any], path: str) -> list[Cause]:
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("set", "map"):
        return []
    keys = schema.get("x-kubernetes-list-map-keys") or []
    causes, seen = [], []
    for i, item in enumerate(value):
        ident = {key: item.get(key) for key in keys} if kind == "map" and isinstance(item, dict) else item
        if ident in seen:
            causes.append(Cause("FieldValueDuplicate", f"Duplicate value: {_quote(ident)}", f"{path}[{i}]"))
        seen.append(ident)
    return causes


def _object(schema: Obj, value: Obj, path: str) -> list[Cause]:
    def below(key: str) -> str:
        return f"{path}.{key}" if path else key

    causes = [
        Cause("FieldValueRequired", "Required value", below(key))
        for key in schema.get("required") or []
        if key not in value
    ]
    most = schema.get("maxProperties")
    if most is not None and len(value) > most:
        causes.append(_too_many(path, len(value), most))
    least = schema.get("minProperties")
    if least is not None and len(value) < least:
        causes.append(_invalid(path, len(value), f"should have at least {least} properties"))
    properties, more = schema.get("properties") or {}, schema.get("additionalProperties")
    for key, item in value.items():
        if key in properties:
            causes += validate(properties[key], item, below(key))
        elif isinstance(more, dict):
            causes += validate(more, item, below(key))
    return causes


def _junctions(schema: Obj, value: Any, path: str) -> list[Cause]:
    causes: list[Cause] = []
    for part in schema.get("allOf") or []:
        causes += validate(part, value, path)
    if parts := schema.get("anyOf"):
        causes += _any_of([validate(part, value, path) for part in parts], path)
    if parts := schema.get("oneOf"):
        causes += _one_of([validate(part, value, path) for part in parts], path)
    if (part := schema.get("not")) and not validate(part, value, path):
        causes.append(_junction(path, "must not validate the schema (not)"))
    return causes


def _any_of(findings: list[list[Cause]], path: str) -> list[Cause]:
    if any(not causes for causes in findings):
        return []
    return [_junction(path, "must validate at least one schema (anyOf)"), *findings[0]]


def _one_of(findings: list[list[Cause]], path: str) -> list[Cause]:
    valid = sum(not causes for causes in findings)
    if valid == 1:
        return []
    why = f"must validate one and only one schema (oneOf). Found {valid or 'none'} valid"
    return [_junction(path, why + (" alternatives" if valid else "")), *([] if valid else findings[0])]


def _junction(path: str, why: str) -> Cause:
    return Cause("FieldValueInvalid", f'Invalid value: "": "{path}" {why}', "<nil>")
