"""OpenAPI documents, made from the type table: what kubectl validates, explains and merges with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from sandbox.apiserver import patch, types
from sandbox.apiserver.resources import Registry, Resource
from sandbox.client import Obj

_SCALARS: dict[str, Obj] = {
    "string": {"type": "string"},
    "bool": {"type": "boolean"},
    "int32": {"type": "integer", "format": "int32"},
    "int64": {"type": "integer", "format": "int64"},
    "float64": {"type": "number", "format": "double"},
    "time": {"type": "string", "format": "date-time"},
    "microtime": {"type": "string", "format": "date-time"},
    "bytes": {"type": "string", "format": "byte"},
    "quantity": {"type": "string"},
    "intstr": {"type": "string", "format": "int-or-string"},
    "any": {"type": "object"},
}
_META = frozenset(
    {
        "ObjectMeta",
        "OwnerReference",
        "LabelSelector",
        "LabelSelectorRequirement",
        "DeleteOptions",
        "Preconditions",
        "Condition",
        "ListMeta",
        "ManagedFieldsEntry",
    }
)
_PACKAGES = {
    "": "io.k8s.api.core.v1",
    "apiextensions.k8s.io": "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1",
}


def _name(type: str, res: Resource) -> str:
    """A type's name as the real documents have it, for kinds; what they consist of goes with core/v1."""
    if type in _META:
        return f"io.k8s.apimachinery.pkg.apis.meta.v1.{type}"
    if type == types.type_of(res.api_version, res.kind):
        short = res.group.removesuffix(".k8s.io").removesuffix(".authorization")
        return f"{_PACKAGES.get(res.group, f'io.k8s.api.{short}.{res.version}')}.{type}"
    return f"io.k8s.api.core.v1.{type}"


class _Schemas:
    """Collects the schemas that kinds consist of. `prefix` is where references point."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.found: Obj = {}

    def kind(self, res: Resource) -> str | None:
        type = types.type_of(res.api_version, res.kind)
        if type is None:
            return None
        name = self._add(type, res)
        gvk = {"group": res.group, "version": res.version, "kind": res.kind}
        self.found[name]["x-kubernetes-group-version-kind"] = [gvk]
        return name

    def _add(self, type: str, res: Resource) -> str:
        name = _name(type, res)
        if name not in self.found:
            schema: Obj = {"type": "object", "description": type}
            self.found[name] = schema
            fields = types.fields_of(type)
            if "" not in fields:
                schema["properties"] = {key: self._field(key, sub, type, res) for key, sub in fields.items()}
        return name

    def _field(self, key: str, type: str, parent: str, res: Resource) -> Obj:
        schema = self._schema(type, res)
        merged = patch.merge_key(key, service=parent == "ServiceSpec") if type.startswith("[]") else None
        if merged:
            schema |= {"x-kubernetes-patch-merge-key": merged, "x-kubernetes-patch-strategy": "merge"}
        elif key in ("finalizers", "podCIDRs"):
            schema["x-kubernetes-patch-strategy"] = "merge"
        return schema

    def _schema(self, type: str, res: Resource) -> Obj:
        if type.startswith("[]"):
            return {"type": "array", "items": self._schema(type[2:], res)}
        if type.startswith("{}"):
            return {"type": "object", "additionalProperties": self._schema(type[2:], res)}
        if type in _SCALARS:
            return dict(_SCALARS[type])
        return {"$ref": self._prefix + self._add(type, res)}


def _parameters() -> list[Obj]:
    names = ("dryRun", "fieldManager", "fieldValidation")
    return [{"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}} for name in names]


def _paths(resources: list[Resource], parameters: Callable[[], list[Obj]]) -> Obj:
    paths: Obj = {}
    for res in resources:
        base = f"/apis/{res.group}/{res.version}" if res.group else f"/api/{res.version}"
        below = "/namespaces/{namespace}" if res.namespaced else ""
        gvk = {"group": res.group, "version": res.version, "kind": res.kind}
        answer: Obj = {"responses": {"200": {"description": "OK"}}, "x-kubernetes-group-version-kind": gvk}
        collection = f"{base}{below}/{res.plural}"
        paths[collection] = {
            "get": {**answer, "x-kubernetes-action": "list"},
            "post": {**answer, "x-kubernetes-action": "post", "parameters": parameters()},
        }
        if "get" in res.verbs:
            paths[collection + "/{name}"] = {
                "get": {**answer, "x-kubernetes-action": "get"},
                "put": {**answer, "x-kubernetes-action": "put", "parameters": parameters()},
                "patch": {**answer, "x-kubernetes-action": "patch", "parameters": parameters()},
                "delete": {**answer, "x-kubernetes-action": "delete"},
            }
    return paths


_INFO = {"title": "Kubernetes", "version": "v1.36.0"}


def _key(group: str, version: str) -> str:
    return f"apis/{group}/{version}" if group else f"api/{version}"


def index(registry: Registry) -> Obj:
    """/openapi/v3: where each group version's document is."""
    paths = {}
    for group, versions in registry.groups().items():
        for version in versions:
            key = _key(group, version)
            content = repr([(res.plural, res.custom) for res in registry.in_version(group, version)])
            digest = hashlib.sha256(content.encode()).hexdigest()
            paths[key] = {"serverRelativeURL": f"/openapi/v3/{key}?hash={digest[:32].upper()}"}
    return {"paths": paths}


def v3(registry: Registry, key: str) -> Obj | None:
    """/openapi/v3/apis/GROUP/VERSION; None for a group version that is not served."""
    parts = key.split("/")
    group, version = ("", parts[1]) if parts[0] == "api" and len(parts) == 2 else ("/".join(parts[1:-1]), parts[-1])
    resources = registry.in_version(group, version)
    if not resources:
        return None
    schemas = _Schemas("#/components/schemas/")
    for res in resources:
        if schemas.kind(res) is None and res.custom is not None:
            schemas.found[_custom_name(res)] = _custom_schema(res)
    paths = _paths(resources, _parameters)
    return {"openapi": "3.0.0", "info": _INFO, "paths": paths, "components": {"schemas": schemas.found}}


def _custom_name(res: Resource) -> str:
    return ".".join([*reversed(res.group.split(".")), res.version, res.kind])


def _custom_schema(res: Resource) -> Obj:
    assert res.custom is not None
    schema: Obj = dict(res.custom.schema or {"type": "object"})
    schema["x-kubernetes-group-version-kind"] = [{"group": res.group, "version": res.version, "kind": res.kind}]
    return schema


def v2(registry: Registry) -> Any:
    """/openapi/v2, the whole API in one document."""
    schemas = _Schemas("#/definitions/")
    resources = list(registry)
    for res in resources:
        if schemas.kind(res) is None and res.custom is not None:
            schemas.found[_custom_name(res)] = _custom_schema(res)

    def parameters() -> list[Obj]:
        return [{"name": entry["name"], "in": "query", "type": "string"} for entry in _parameters()]

    return {"swagger": "2.0", "info": _INFO, "paths": _paths(resources, parameters), "definitions": schemas.found}
