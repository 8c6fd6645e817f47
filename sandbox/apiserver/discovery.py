"""Discovery, version, health."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from sandbox.apiserver import errors, openapi
from sandbox.apiserver.core import Core
from sandbox.apiserver.resources import Resource
from sandbox.client import Obj

_SUB_VERBS: dict[str, tuple[str, ...]] = {
    "binding": ("create",),
    "eviction": ("create",),
    "token": ("create",),
    "log": ("get",),
    "exec": ("create", "get"),
    "finalize": ("update",),
}
_SUB_KINDS: dict[str, tuple[str, str, str]] = {
    "scale": ("autoscaling", "v1", "Scale"),
    "eviction": ("policy", "v1", "Eviction"),
    "binding": ("", "v1", "Binding"),
    "token": ("authentication.k8s.io", "v1", "TokenRequest"),
    "exec": ("", "v1", "PodExecOptions"),
}
VERSION: Obj = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0-gameday",
    "gitCommit": "0000000000000000000000000000000000000000",
    "gitTreeState": "clean",
    "buildDate": "2026-04-22T00:00:00Z",
    "goVersion": "go1.26.0",
    "compiler": "gc",
    "platform": "linux/amd64",
}


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    media_type: str = "application/json"
    status: int = 200


def _json(obj: Any) -> Answer:
    return Answer(orjson.dumps(obj))


_AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"


class Discovery:
    def __init__(self, core: Core) -> None:
        self._core = core

    def answer(self, path: str, accept: str) -> Answer | None:
        """None: nothing is served there. Raises ApiError(404) where the API itself says so."""
        first, *rest = [part for part in path.split("/") if part] or [""]
        match first:
            case "":
                return _json({"paths": self._paths()})
            case "version":
                return _json(VERSION)
            case "healthz" | "livez" | "readyz":
                return Answer(b"ok", "text/plain; charset=utf-8")
            case "api" | "apis":
                return self._discover(first, rest, accept)
            case "openapi":
                return self._openapi(rest)
            case _:
                return None

    def _discover(self, root: str, rest: list[str], accept: str) -> Answer | None:
        if root == "api" and rest:
            rest = ["", *rest]
        match rest:
            case [] if _wants_aggregated(accept):
                named = root == "apis"
                return self._aggregated([group for group in self._core.registry.groups() if bool(group) is named])
            case []:
                return _json(self._legacy() if root == "api" else self._groups())
            case [group]:
                return self._group(group)
            case [group, version]:
                return self._resources(group, version)
            case _:
                return None

    def _openapi(self, rest: list[str]) -> Answer | None:
        registry = self._core.registry
        match rest:
            case ["v2"]:
                return _json(openapi.v2(registry))
            case ["v3"]:
                return _json(openapi.index(registry))
            case ["v3", *group_version]:
                found = openapi.v3(registry, "/".join(group_version))
                return _json(found) if found else None
            case _:
                return None

    def _paths(self) -> list[str]:
        found = ["/api", "/api/v1", "/apis"]
        for group, versions in self._core.registry.groups().items():
            if group:
                found += [f"/apis/{group}", *(f"/apis/{group}/{version}" for version in versions)]
        return [*sorted(found), "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version"]

    @staticmethod
    def _legacy() -> Obj:
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}

    def _groups(self) -> Obj:
        groups = [_group(group, versions) for group, versions in self._core.registry.groups().items() if group]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}

    def _group(self, group: str) -> Answer | None:
        versions = self._core.registry.groups().get(group)
        return _json({"kind": "APIGroup", "apiVersion": "v1", **_group(group, versions)}) if versions else None

    def _resources(self, group: str, version: str) -> Answer | None:
        found = self._core.registry.in_version(group, version)
        if not found and self._core.registry.is_builtin(group):
            raise errors.no_such_path()
        if not found:
            return None
        entries = [entry for res in found for entry in _entries(res)]
        api_version = f"{group}/{version}" if group else version
        body: Obj = {"kind": "APIResourceList", "groupVersion": api_version, "resources": entries}
        if group:
            body["apiVersion"] = "v1"
        return _json(body)

    def _aggregated(self, groups: list[str]) -> Answer:
        registry = self._core.registry
        items = []
        for group in groups:
            versions = [
                {
                    "version": version,
                    "resources": [_aggregate(res) for res in registry.in_version(group, version)],
                    "freshness": "Current",
                }
                for version in registry.groups()[group]
            ]
            meta: Obj = {"creationTimestamp": None}
            if group:
                meta["name"] = group
            items.append({"metadata": meta, "versions": versions})
        body = {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}
        return Answer(orjson.dumps(body), _AGGREGATED)


def _wants_aggregated(accept: str) -> bool:
    """Whether the first form that the client asks for is the aggregated one, in the version served here."""
    for entry in accept.split(","):
        params = {part.strip() for part in entry.split(";")}
        if {"g=apidiscovery.k8s.io", "as=APIGroupDiscoveryList"} <= params:
            if "v=v2" in params and "application/json" in params:
                return True
        elif "application/json" in params:
            return False
    return False


def _aggregate(res: Resource) -> Obj:
    """A resource as aggregated discovery shows it; built-in kinds leave their own group out."""
    mine = {"group": res.group, "version": res.version} if res.custom else {"group": "", "version": ""}
    entry: Obj = {
        "resource": res.plural,
        "responseKind": {**mine, "kind": res.kind},
        "scope": "Namespaced" if res.namespaced else "Cluster",
        "singularResource": res.singular or res.kind.lower(),
        "verbs": list(res.verbs),
    }
    if res.short:
        entry["shortNames"] = list(res.short)
    if res.categories:
        entry["categories"] = list(res.categories)
    if res.subs:
        entry["subresources"] = [_aggregate_sub(res, sub, mine) for sub in res.subs]
    return entry


def _aggregate_sub(res: Resource, sub: str, mine: Obj) -> Obj:
    kind: Obj = {**mine, "kind": res.kind}
    if sub in _SUB_KINDS:
        group, version, name = _SUB_KINDS[sub]
        kind = {"group": group, "version": version if group else "", "kind": name}
    return {"subresource": sub, "responseKind": kind, "verbs": _sub(res, sub)["verbs"]}


def _group(group: str, versions: list[str]) -> Obj:
    entries = [{"groupVersion": f"{group}/{version}", "version": version} for version in versions]
    return {"name": group, "versions": entries, "preferredVersion": entries[0]}


def _entries(res: Resource) -> list[Obj]:
    entry: Obj = {
        "name": res.plural,
        "singularName": res.singular or res.kind.lower(),
        "namespaced": res.namespaced,
        "kind": res.kind,
        "verbs": list(res.verbs),
    }
    if res.short:
        entry["shortNames"] = list(res.short)
    if res.categories:
        entry["categories"] = list(res.categories)
    return [entry, *(_sub(res, sub) for sub in res.subs)]


def _sub(res: Resource, sub: str) -> Obj:
    entry: Obj = {
        "name": f"{res.plural}/{sub}",
        "singularName": "",
        "namespaced": res.namespaced,
        "kind": res.kind,
        "verbs": list(_SUB_VERBS.get(sub, ("get", "patch", "update"))),
    }
    if sub in _SUB_KINDS:
        group, version, kind = _SUB_KINDS[sub]
        entry["kind"] = kind
        if group:
            entry |= {"group": group, "version": version}
    return entry
