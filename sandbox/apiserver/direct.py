"""`sandbox.client.Api` without HTTP, for what runs in the API server's process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import orjson

from sandbox.apiserver import errors, subresources
from sandbox.apiserver.authn import MASTER, Identity, Tokens
from sandbox.apiserver.core import Core, Query, Write
from sandbox.apiserver.resources import Resource
from sandbox.apiserver.selectors import parse_fields, parse_labels
from sandbox.client import Kind, Obj, PatchType, WatchEvent


class DirectApi:
    """Objects that it returns are copies: callers may keep and edit them."""

    def __init__(self, core: Core, tokens: Tokens, user: Identity = MASTER) -> None:
        self._core, self._tokens = core, tokens
        self._write = Write(
            user, validation="Ignore", manager="kube-controller-manager"
        )  # nobody would read the warnings

    def _resource(self, kind: Kind) -> Resource:
        found = self._core.registry.find(kind.group, kind.version, kind.plural)
        if found is None:
            raise errors.no_such_path()
        return found

    def _query(self, res: Resource, labels: str, fields: str) -> Query:
        return Query(parse_labels(labels), parse_fields(fields, res.key, res.custom.selectable if res.custom else ()))

    async def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
        return self._core.get(self._resource(kind), namespace or "", name).copy()

    async def list(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Obj], str]:
        res = self._resource(kind)
        found = self._core.select(res, namespace, self._query(res, labels, fields))
        return [stored.copy() for stored in found], str(self._core.store.version)

    async def watch(
        self, kind: Kind, namespace: str | None = None, *, since: str, labels: str = "", fields: str = ""
    ) -> AsyncIterator[WatchEvent]:
        res = self._resource(kind)
        async for events in self._core.watch(res, namespace, self._query(res, labels, fields), int(since)):
            for event in events:
                yield WatchEvent(event.type, event.stored.copy())

    async def create(self, kind: Kind, obj: Obj, namespace: str | None = None) -> Obj:
        res = self._resource(kind)
        space = (namespace or obj["metadata"].get("namespace") or "") if res.namespaced else ""
        return self._core.create(res, space, _copy(obj), self._write).copy()

    async def update(self, kind: Kind, obj: Obj, *, sub: str | None = None) -> Obj:
        res, meta = self._resource(kind), obj["metadata"]
        space = meta.get("namespace", "")
        if sub == "scale":
            return subresources.set_scale(self._core, res, space, meta["name"], _copy(obj), self._write)
        return self._core.update(res, space, meta["name"], _copy(obj), self._write, sub or "").copy()

    async def patch(
        self,
        kind: Kind,
        name: str,
        patch: Obj | Sequence[Obj],
        namespace: str | None = None,
        *,
        sub: str | None = None,
        type: PatchType = "merge",
    ) -> Obj:
        res = self._resource(kind)
        body = _copy(patch)
        if sub == "scale":
            return subresources.patch_scale(self._core, res, namespace or "", name, type, body, self._write)
        return self._core.patch(res, namespace or "", name, type, body, self._write, sub or "").copy()

    async def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str | None = None,
        *,
        grace: int | None = None,
        propagation: str | None = None,
        uid: str | None = None,
    ) -> Obj:
        options: Obj = {}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        if propagation:
            options["propagationPolicy"] = propagation
        if uid:
            options["preconditions"] = {"uid": uid}
        stored, _ = self._core.delete(self._resource(kind), namespace or "", name, options, self._write)
        return stored.copy()

    async def post(self, kind: Kind, name: str, sub: str, body: Obj, namespace: str | None = None) -> Obj:
        res = self._resource(kind)
        space = namespace or ""
        match res.key, sub:
            case "pods", "binding":
                return subresources.bind(self._core, res, space, name, body, self._write)
            case "pods", "eviction":
                return subresources.evict(self._core, res, space, name, body, self._write)
            case "serviceaccounts", "token":
                return subresources.token_request(self._core, self._tokens, space, name, body, self._write)
            case _:
                raise errors.no_such_path()


def _copy(obj: Obj | Sequence[Obj]) -> Obj:
    return orjson.loads(orjson.dumps(obj))  # type: ignore[no-any-return]
