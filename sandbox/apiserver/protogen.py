"""Makes `protobuf.json`: `python -m sandbox.apiserver.protogen API_DIR APIMACHINERY_DIR APIEXTENSIONS_DIR`.

The directories are those of the Go modules k8s.io/api, k8s.io/apimachinery and k8s.io/apiextensions-apiserver of one
release. `generated.proto` says which number and type a field has on the wire, the tags of the Go struct of the same
name say how JSON calls it and whether JSON leaves out its zero. Nothing imports this module.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.apiserver import types

TARGET = Path(__file__).with_name("protobuf.json")
_META = "k8s.io.apimachinery.pkg.apis.meta.v1"
_EXTENSIONS = "k8s.io.apiextensions_apiserver.pkg.apis.apiextensions.v1"
# Messages whose JSON is no object of their fields.
_SPECIAL = {
    f"{_META}.Time": "time",
    f"{_META}.MicroTime": "microtime",
    f"{_META}.FieldsV1": "raw",
    "k8s.io.apimachinery.pkg.runtime.RawExtension": "raw",
    "k8s.io.apimachinery.pkg.api.resource.Quantity": "quantity",
    "k8s.io.apimachinery.pkg.util.intstr.IntOrString": "intstr",
    f"{_EXTENSIONS}.JSON": "raw",
}
_PACKAGES = {"": "core", "apiextensions.k8s.io": _EXTENSIONS.rsplit(".", 1)[0]}
_SCALARS = frozenset({"string", "bool", "int32", "int64", "double", "bytes"})
_PROTO_MESSAGE = re.compile(r"^message (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_PROTO_FIELD = re.compile(r"^  (optional|repeated|map<string, ([^>]+)>) (?:(\S+) )?(\w+) = (\d+);", re.MULTILINE)
_GO_STRUCT = re.compile(r"^type (\w+) struct \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_GO_FIELD = re.compile(r"^\t(?:\w+\s+)?(\S+)\s+`([^`]*)`", re.MULTILINE)
_GO_TAG = re.compile(r'(\w+):"([^"]*)"')


class Unreadable(Exception):
    """The sources are not what this generator knows."""


@dataclass(frozen=True, slots=True)
class _GoField:
    name: str  # "" where JSON has the fields of the struct instead
    omits_zero: bool


@dataclass(slots=True)
class Generator:
    roots: dict[str, Path]  # by the prefix of the proto packages
    types: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def _directory(self, package: str) -> Path:
        for prefix, root in self.roots.items():
            if package.startswith(f"{prefix}."):
                return root.joinpath(*package.removeprefix(f"{prefix}.").split("."))
        raise Unreadable(f"no directory for {package}")

    def add(self, message: str) -> str:
        """The table's name of a message, which is added with all that it consists of."""
        if message in _SPECIAL:
            return _SPECIAL[message]
        if message in self.names:
            return self.names[message]
        package, _, short = message.rpartition(".")
        directory = self._directory(package)
        body = _proto(directory)[short]
        structs = _structs(directory)
        if short not in structs and body:  # a named list is a message of its items
            ((_, _, type, name, number),) = _PROTO_FIELD.findall(body)
            if (name, number) != ("items", "1"):
                raise Unreadable(message)
            return f"[]{self._kind(package, type)}"
        name = short if short not in self.types else message.removeprefix("k8s.io.api.")
        self.names[message] = name
        self.types[name] = ""  # its place, for types that contain themselves
        self.types[name] = " ".join(self._words(package, body, structs.get(short, {})))
        return name

    def _words(self, package: str, body: str, struct: dict[int, _GoField]) -> list[str]:
        fields = _PROTO_FIELD.findall(body)
        if {int(digits) for *_, digits in fields} != struct.keys():
            raise Unreadable(f"not the fields {sorted(struct)}: {package} {body}")
        words = []
        for form, of, type, _, digits in fields:
            known = struct[int(digits)]
            if form == "optional":
                kind = self._kind(package, type)
                kind += "?" if kind in _SCALARS and known.omits_zero else ""
            else:
                kind = f"[]{self._kind(package, type)}" if form == "repeated" else f"{{}}{self._kind(package, of)}"
            words += [digits, known.name or "-", kind]
        return words

    def _kind(self, package: str, type: str) -> str:
        if type in _SCALARS:
            return type
        return self.add(type[1:] if type.startswith(".") else f"{package}.{type}")


@functools.cache
def _proto(directory: Path) -> dict[str, str]:
    return dict(_PROTO_MESSAGE.findall((directory / "generated.proto").read_text()))


@functools.cache
def _structs(directory: Path) -> dict[str, dict[int, _GoField]]:
    found = {}
    for path in sorted(directory.glob("types*.go")):
        for name, body in _GO_STRUCT.findall(path.read_text()):
            found[name] = dict(_go_fields(body))
    return found


def _go_fields(body: str) -> list[tuple[int, _GoField]]:
    found = []
    for type, tag in _GO_FIELD.findall(body):
        tags = dict(_GO_TAG.findall(tag))
        if "protobuf" not in tags:  # kind and apiVersion are the envelope's
            continue
        _, number, *rest = tags["protobuf"].split(",")
        named = next((word.removeprefix("name=") for word in rest if word.startswith("name=")), "")
        name, *options = tags.get("json", named).split(",")
        omits = bool({"omitempty", "omitzero"} & set(options)) and not type.startswith("*")
        found.append((int(number), _GoField(name, omits)))
    return found


def _message(api_version: str, kind: str) -> str:
    group, _, version = api_version.rpartition("/")
    if kind == "DeleteOptions":
        return f"{_META}.{kind}"
    package = _PACKAGES.get(group, group.split(".", maxsplit=1)[0])
    return f"{package if package.startswith('k8s.io.') else f'k8s.io.api.{package}'}.{version}.{kind}"


def generate(api: Path, apimachinery: Path, apiextensions: Path) -> bytes:
    roots = {"k8s.io.api": api, "k8s.io.apimachinery": apimachinery, "k8s.io.apiextensions_apiserver": apiextensions}
    generator = Generator(roots)
    kinds = {key: generator.add(_message(*key.rsplit("/", 1))) for key in types.kinds()}
    table = {"kinds": kinds, "types": dict(sorted(generator.types.items()))}
    return json.dumps(table, indent=0, separators=(",", ":")).encode() + b"\n"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    TARGET.write_bytes(generate(*map(Path, sys.argv[1:])))
