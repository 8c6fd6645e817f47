"""The types of the built-in kinds: what each field must be, and which fields there are.

`types.json` is generated from the OpenAPI that the `kubernetes` client package carries (release 1.37). A type
is a name of the table, a scalar, `[]T` or `{}T`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import orjson

from sandbox.apiserver import errors
from sandbox.client import Obj

_QUANTITY = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+|[numkKMGTPE]i?)?")
_QUANTITY_ERROR = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
_GO_NAMES = {
    "quantity": "resource.Quantity",
    "intstr": "intstr.IntOrString",
    "time": "v1.Time",
    "microtime": "v1.MicroTime",
    "bytes": "[]uint8",
}
_BOUNDS = {"int32": 2**31, "int64": 2**63}


@functools.cache
def _table() -> Obj:
    return orjson.loads(resources.files(__package__).joinpath("types.json").read_bytes())  # type: ignore[no-any-return]


def type_of(api_version: str, kind: str) -> str | None:
    """The name of a kind's type; None for custom kinds."""
    return _table()["kinds"].get(f"{api_version}/{kind}")  # type: ignore[no-any-return]


def kinds() -> list[str]:
    """The built-in kinds: "<apiVersion>/<kind>"."""
    return list(_table()["kinds"])


def fields_of(name: str) -> Obj:
    return _table()["types"][name]  # type: ignore[no-any-return]


class _Wrong(Exception):
    """The value cannot be decoded."""


@dataclass(slots=True)
class _Decoder:
    unknown: list[str] = field(default_factory=list)

    def decode(self, type: str, value: Any, struct: str, path: str, at: str) -> Any:
        """`path` names fields as Go does, `at` with indices."""
        if type.startswith("[]"):
            return self._list(type[2:], value, struct, path, at)
        if type.startswith("{}"):
            return self._map(type[2:], value, struct, path, at)
        if type == "any":
            return value
        fields = _table()["types"].get(type)
        if fields is None:
            return _scalar(type, value, struct, path)
        if not isinstance(value, dict):
            raise _mismatch(value, struct, path, f"v1.{type}")
        if "" in fields:  # free-form
            return value
        result = {}
        for key, item in value.items():
            known = fields.get(key)
            if known is None:
                self.unknown.append(f"{at}.{key}" if at else key)
            elif item is not None:
                inner, where = (f"{path}.{key}", f"{at}.{key}") if path else (key, key)
                result[key] = self.decode(known, item, type, inner, where)
        return result

    def _list(self, type: str, value: Any, struct: str, path: str, at: str) -> Any:
        if not isinstance(value, list):
            raise _mismatch(value, struct, path, f"[]{_go(type)}")
        return [self.decode(type, item, struct, path, f"{at}[{i}]") for i, item in enumerate(value)]

    def _map(self, type: str, value: Any, struct: str, path: str, at: str) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(value, struct, path, f"map[string]{_go(type)}")
        return {
            key: self.decode(type, item, struct, path, f"{at}.{key}") if item is not None else _zero(type)
            for key, item in value.items()
        }


def _zero(type: str) -> Any:
    return "" if type in ("string", "bytes") else "0" if type == "quantity" else None


def _go(type: str) -> str:
    return _GO_NAMES.get(type) or (f"v1.{type}" if type[0].isupper() else type)


def _json_kind(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case str():
            return "string"
        case int() | float():
            return "number"
        case list():
            return "array"
        case _:
            return "object"


def _mismatch(value: Any, struct: str, path: str, go_type: str) -> _Wrong:
    return _Wrong(f"json: cannot unmarshal {_json_kind(value)} into Go struct field {struct}.{path} of type {go_type}")


_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "bool": (bool,),
    "int32": (int, float),
    "int64": (int, float),
    "float64": (int, float),
    "intstr": (int, str),
    "quantity": (int, float, str),
    "bytes": (str,),
    "time": (str,),
    "microtime": (str,),
}


def _scalar(type: str, value: Any, struct: str, path: str) -> Any:
    fits = isinstance(value, _PYTHON[type]) and (type == "bool" or not isinstance(value, bool))
    if not fits:
        raise _mismatch(value, struct, path, _go(type))
    match type:
        case "int32" | "int64":
            return _checked_int(type, value, struct, path)
        case "quantity":
            return _checked_quantity(str(value))
        case "bytes":
            return _checked_base64(value)
        case "time" | "microtime":
            return _checked_time(type, value)
        case _:
            return value


def _checked_int(type: str, value: float, struct: str, path: str) -> int:
    if value != int(value) or not -_BOUNDS[type] <= value < _BOUNDS[type]:
        raise _Wrong(f"json: cannot unmarshal number {value} into Go struct field {struct}.{path} of type {type}")
    return int(value)


def _checked_quantity(value: str) -> str:
    if not _QUANTITY.fullmatch(value):
        raise _Wrong(_QUANTITY_ERROR)
    return value


_TIMES = {
    "time": (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"), "2006-01-02T15:04:05Z07:00"),
    "microtime": (
        re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)"),
        "2006-01-02T15:04:05.000000Z07:00",
    ),
}


def _checked_time(type: str, value: str) -> str:
    pattern, layout = _TIMES[type]
    if not pattern.fullmatch(value):
        raise _Wrong(f'parsing time "{value}" as "{layout}": cannot parse "{value}" as "2006"')
    if type == "time" and "." in value:
        value = re.sub(r"\.\d+", "", value)  # whole seconds
    return value


def _checked_base64(value: str) -> str:
    try:
        base64.b64decode(value, validate=True)
    except binascii.Error as wrong:
        bad = re.search(r"[^A-Za-z0-9+/=]", value)
        raise _Wrong(f"illegal base64 data at input byte {bad.start() if bad else len(value)}") from wrong
    return value


def decode(api_version: str, kind: str, obj: Obj) -> tuple[Obj, list[str]]:
    """The object with only known fields, and the unknown ones' paths.

    Raises ApiError(400) when a value has the wrong type.
    """
    type = type_of(api_version, kind)
    if type is None:
        return obj, []
    decoder = _Decoder()
    try:
        return decoder.decode(type, obj, type, "", ""), decoder.unknown
    except _Wrong as wrong:
        raise errors.Undecodable(api_version.rsplit("/", 1)[-1], kind, str(wrong)) from wrong


def decode_meta(version: str, kind: str, meta: Obj) -> tuple[Obj, list[str]]:
    """`decode` for the metadata of custom resources."""
    decoder = _Decoder()
    try:
        return decoder.decode("ObjectMeta", meta, "ObjectMeta", "metadata", "metadata"), decoder.unknown
    except _Wrong as wrong:
        raise errors.Undecodable(version, kind, str(wrong)) from wrong
