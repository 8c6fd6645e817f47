"""Protobuf bodies, as kubectl's typed clients (`create`, `drain`, …) and operators send them for built-in kinds.

Decoded into the JSON that Go would make of them; the rest of the server works with that. `protobuf.json` holds each
message's fields as triples "number name type": the type is a scalar, a name of the table, `[]T` or `{}T`, and ends in
"?" where JSON leaves out its zero; the name "-" stands for a message whose fields JSON has among the others. What is
not in the table is an error. Answers are JSON, which those clients take as well.
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Any, NamedTuple, TypeAlias

import orjson

from sandbox.client import ApiError, Obj

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"
_VARINT_BYTES = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_Raw: TypeAlias = int | float | bytes


class _Broken(Exception):
    """Not protobuf, or more than the table knows."""


class _Field(NamedTuple):
    name: str
    form: str  # "[]", "{}" or ""
    type: str
    omits_zero: bool


@functools.cache
def _table() -> Obj:
    return orjson.loads(resources.files(__package__).joinpath("protobuf.json").read_bytes())  # type: ignore[no-any-return]


@functools.cache
def _fields(type: str) -> dict[int, _Field]:
    words = _table()["types"][type].split()
    found = {}
    for number, name, of in zip(words[::3], words[1::3], words[2::3], strict=True):
        form = of[:2] if of[:2] in ("[]", "{}") else ""
        found[int(number)] = _Field(name, form, of.removeprefix(form).removesuffix("?"), of.endswith("?"))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:  # nearly all are short
        return data[at], at + 1
    value = 0
    for i in range(_VARINT_BYTES):
        if at + i >= len(data):
            raise _Broken("unexpected end")
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value & 2**64 - 1, at + i + 1
    raise _Broken("a number that does not end")


def _bytes(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise _Broken("unexpected end")
    return data[at : at + length]


def _entries(data: bytes) -> Iterator[tuple[int, _Raw]]:
    """Field numbers with their value: a number, or the bytes of what has a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
            case 1:
                yield tag >> 3, struct.unpack("<d", _bytes(data, at, 8))[0]
                at += 8
            case 2:
                length, at = _varint(data, at)
                yield tag >> 3, _bytes(data, at, length)
                at += length
            case wire:
                raise _Broken(f"wire type {wire}")


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _double(value: float) -> float:
    return int(value) if value.is_integer() else value


def _intstr(raw: bytes) -> str | int:
    found = dict(_entries(raw))
    textual = _value("bool", found.get(1, 0))
    return _value("string", found.get(3, b"")) if textual else _value("int32", found.get(2, 0))  # type: ignore[no-any-return]


def _quantity(raw: bytes) -> str:
    return _value("string", dict(_entries(raw)).get(1, b"0"))  # type: ignore[no-any-return]


def _json(raw: bytes) -> Any:
    """What is JSON already: field 1."""
    text = _value("string", dict(_entries(raw)).get(1, b""))
    return orjson.loads(text) if text else None


def _moment(raw: bytes, spec: str) -> str | None:
    """Seconds and, for micro times, nanoseconds since 1970; None (JSON: null) for no time."""
    if not raw:
        return None
    found = dict(_entries(raw))
    seconds, nanoseconds = _value("int64", found.get(1, 0)), _value("int32", found.get(2, 0))
    time = _EPOCH + timedelta(seconds=seconds, microseconds=nanoseconds // 1000 if spec == "microseconds" else 0)
    return time.replace(tzinfo=None).isoformat(timespec=spec) + "Z"


# The form on the wire, and how JSON has it; None stands for null.
_SCALARS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "string": (bytes, bytes.decode),
    "bytes": (bytes, lambda raw: base64.b64encode(raw).decode()),
    "bool": (int, bool),
    "int32": (int, _signed),
    "int64": (int, _signed),
    "double": (float, _double),
    "quantity": (bytes, _quantity),
    "intstr": (bytes, _intstr),
    "raw": (bytes, _json),
    "time": (bytes, functools.partial(_moment, spec="seconds")),
    "microtime": (bytes, functools.partial(_moment, spec="microseconds")),
}
# Messages of which JSON has one field alone: the first that is there, the next without.
_CHOICES = {
    "JSONSchemaPropsOrBool": ("schema", "allows"),
    "JSONSchemaPropsOrArray": ("jSONSchemas", "schema"),
    "JSONSchemaPropsOrStringArray": ("property", "schema"),
}


def _value(type: str, raw: _Raw) -> Any:
    scalar = _SCALARS.get(type)
    if scalar is not None and isinstance(raw, scalar[0]):
        return scalar[1](raw)
    if scalar is None and isinstance(raw, bytes):
        return _composed(type, raw)
    raise _Broken(f"{raw!r:.40} where {type} belongs")


def _composed(type: str, raw: bytes) -> Any:
    if type.startswith("[]"):  # a list on its own: field 1
        return [_value(type[2:], item) for number, item in _entries(raw) if number == 1]
    found = _message(type, raw)
    if type in _CHOICES:
        return next((found[name] for name in _CHOICES[type] if name in found), None)
    return found


def _list(type: str, raw: _Raw) -> list[Any]:
    """One item; several of numbers that came packed."""
    if isinstance(raw, bytes) and _SCALARS.get(type, (bytes,))[0] is int:
        return [_value(type, item) for item in _varints(raw)]
    return [_value(type, raw)]


def _entry(field: _Field, raw: _Raw) -> tuple[str, Any]:
    """A map's key and value; left out on the wire, either is empty."""
    entry = dict(_entries(raw)) if isinstance(raw, bytes) else {}
    return _value("string", entry.get(1, b"")), _value(field.type, entry.get(2, b""))


def _message(type: str, data: bytes) -> Obj:
    fields = _fields(type)
    result: Obj = {}
    for number, raw in _entries(data):
        field = fields.get(number)
        if field is None:
            raise _Broken(f"field {number} of {type}")
        if field.name == "-":
            result |= _value(field.type, raw)
        elif field.form == "[]":
            result.setdefault(field.name, []).extend(_list(field.type, raw))
        elif field.form == "{}":
            key, value = _entry(field, raw)
            result.setdefault(field.name, {})[key] = value
        else:
            value = _value(field.type, raw)
            if value is not None and (value or not field.omits_zero):
                result[field.name] = value
    return result


def decode(body: bytes) -> Obj:
    """The object in a protobuf body. Raises ApiError(415) for what cannot be decoded."""
    try:
        return _decode(body)
    except (_Broken, ValueError, OverflowError, RecursionError) as broken:
        text = (
            f"the sandbox's API server does not understand this protobuf body ({broken}); send it as JSON, for example "
            "with kubectl create -f"
        )
        raise ApiError(415, "UnsupportedMediaType", text) from broken


def _decode(body: bytes) -> Obj:
    if not body.startswith(_MAGIC):
        raise _Broken("no magic")
    wrapper = dict(_entries(body[len(_MAGIC) :]))
    meta, raw = wrapper.get(1, b""), wrapper.get(2, b"")
    if not isinstance(meta, bytes) or not isinstance(raw, bytes):
        raise _Broken("no envelope")
    named = dict(_entries(meta))
    version, kind = (_value("string", named.get(number, b"")) for number in (1, 2))
    # Every group has the options, in its own version.
    type = _table()["kinds"].get("v1/DeleteOptions" if kind == "DeleteOptions" else f"{version}/{kind}")
    if type is None:
        raise _Broken(f"{version} {kind}")
    return {"apiVersion": version, "kind": kind, **_message(type, raw)}
