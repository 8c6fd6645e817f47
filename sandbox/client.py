"""The one client with which the sandbox's own parts speak to the Kubernetes API.

Node agents, controllers, the chaos controller, the repair and the relays use nothing else, so
that the control plane behind it can be exchanged for the real one.

Objects are plain JSON objects as the API serves them (`Obj`): the sandbox plays Kubernetes, whose
contract *is* that JSON.

Errors: `ApiError` (a Status answered, with `.code` and `.reason`); transport errors are aiohttp's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import aiohttp
import orjson

from gameday.kinds import (
    CONFIGMAPS as CONFIGMAPS,
    CONTROLLERREVISIONS as CONTROLLERREVISIONS,
    CRDS as CRDS,
    DAEMONSETS as DAEMONSETS,
    DEPLOYMENTS as DEPLOYMENTS,
    ENDPOINTS as ENDPOINTS,
    ENDPOINTSLICES as ENDPOINTSLICES,
    EVENTS as EVENTS,
    HPAS as HPAS,
    JOBS as JOBS,
    LEASES as LEASES,
    NAMESPACES as NAMESPACES,
    NETWORKCHAOS as NETWORKCHAOS,
    NETWORKPOLICIES as NETWORKPOLICIES,
    NODES as NODES,
    PDBS as PDBS,
    PODCHAOS as PODCHAOS,
    PODNETWORKCHAOS as PODNETWORKCHAOS,
    PODS as PODS,
    REPLICASETS as REPLICASETS,
    SECRETS as SECRETS,
    SERVICEACCOUNTS as SERVICEACCOUNTS,
    SERVICES as SERVICES,
    STATEFULSETS as STATEFULSETS,
    STRESSCHAOS as STRESSCHAOS,
    Kind as Kind,
)

log = logging.getLogger(__name__)

Obj = dict[str, Any]
PatchType = Literal["merge", "strategic", "json"]
EventType = Literal["ADDED", "MODIFIED", "DELETED"]


class ApiError(Exception):
    """The API answered with a Status: `code` (HTTP), `reason` (machine word), the message as text."""

    def __init__(self, code: int, reason: str, message: str, details: Obj | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.details = details or {}

    @property
    def not_found(self) -> bool:
        return self.code == 404

    @property
    def conflict(self) -> bool:
        return self.code == 409


@dataclass(frozen=True, slots=True)
class WatchEvent:
    type: EventType
    object: Obj


class Api(Protocol):
    """What controllers and agents need of a Kubernetes API.

    `labels` and `fields` are selector strings as in kubectl ("a=b,c!=d", "spec.nodeName=n1").
    """

    async def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj: ...

    async def list(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Obj], str]:
        """The objects and the list's resourceVersion (where a watch goes on)."""
        ...

    def watch(
        self, kind: Kind, namespace: str | None = None, *, since: str, labels: str = "", fields: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Changes after `since`; ends when the server ends it, raises ApiError(410) when too old."""
        ...

    async def create(self, kind: Kind, obj: Obj, namespace: str | None = None) -> Obj: ...

    async def update(self, kind: Kind, obj: Obj, *, sub: str | None = None) -> Obj: ...

    async def patch(
        self,
        kind: Kind,
        name: str,
        patch: Obj | Sequence[Obj],
        namespace: str | None = None,
        *,
        sub: str | None = None,
        type: PatchType = "merge",
    ) -> Obj: ...

    async def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str | None = None,
        *,
        grace: int | None = None,
        propagation: str | None = None,
        uid: str | None = None,
    ) -> Obj: ...

    async def post(self, kind: Kind, name: str, sub: str, body: Obj, namespace: str | None = None) -> Obj:
        """POST to a subresource: `binding`, `eviction`, `token`."""
        ...


_RETRIES, _RETRY_SECONDS = 10, 5  # as client-go tries; no wait longer than this
_PATCH = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}


class HttpApi:
    """`Api` over HTTPS. Use as an async context manager, inside the loop that calls it."""

    def __init__(self, server: str, token: str, ca: str | None = None, user_agent: str = "gameday-sandbox") -> None:
        """`server` is `https://host:port`, `ca` the PEM text of its certificate authority."""
        self._server = server.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "User-Agent": user_agent, "Accept": "application/json"}
        self._ssl = ssl.create_default_context(cadata=ca) if ca else None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpApi:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._ssl if self._ssl else True, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def _call(
        self,
        method: str,
        path: str,
        body: object = None,
        params: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Obj:
        """One request; again where the server says when, as client-go does: a kind whose storage is not ready yet."""
        assert self._session is not None, "HttpApi is an async context manager"
        tries = 0
        while True:
            tries += 1
            async with self._session.request(
                method,
                self._server + path,
                data=None if body is None else orjson.dumps(body),
                params=params,
                headers={"Content-Type": content} if body is not None else None,
                timeout=aiohttp.ClientTimeout(total=30),
            ) as answer:
                raw = await answer.read()
                later = answer.headers.get("Retry-After", "")
                budget = path.endswith("/eviction")  # its 429 is an answer: the caller's to weigh
                if answer.status != 429 or not later.isdigit() or budget or tries > _RETRIES:
                    return self._object(answer.status, raw)
            await asyncio.sleep(min(int(later), _RETRY_SECONDS))

    @staticmethod
    def _object(status: int, raw: bytes) -> Obj:
        try:
            obj = orjson.loads(raw)
        except orjson.JSONDecodeError:
            obj = {"message": raw.decode(errors="replace")}
        if status >= 400:
            raise ApiError(status, obj.get("reason", ""), obj.get("message", f"HTTP {status}"), obj.get("details"))
        return obj  # type: ignore[no-any-return]

    async def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
        return await self._call("GET", kind.path(namespace, name))

    async def list(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Obj], str]:
        found = await self._call("GET", kind.path(namespace), params=_selectors(labels, fields))
        items = found.get("items") or []
        for item in items:  # lists leave these out of their items
            item.setdefault("kind", kind.kind)
            item.setdefault("apiVersion", kind.api_version)
        return items, found["metadata"]["resourceVersion"]

    async def watch(
        self, kind: Kind, namespace: str | None = None, *, since: str, labels: str = "", fields: str = ""
    ) -> AsyncIterator[WatchEvent]:
        assert self._session is not None, "HttpApi is an async context manager"
        params = {"watch": "1", "resourceVersion": since, "allowWatchBookmarks": "true", **_selectors(labels, fields)}
        async with self._session.get(
            self._server + kind.path(namespace), params=params, timeout=aiohttp.ClientTimeout(total=None)
        ) as answer:
            if answer.status >= 400:
                self._object(answer.status, await answer.read())
            buffer = b""
            async for chunk in answer.content.iter_any():  # readline() would cap a line's length
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    if not line:
                        continue
                    event = orjson.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise ApiError(status.get("code", 500), status.get("reason", ""), status.get("message", ""))
                    if event["type"] != "BOOKMARK":
                        yield WatchEvent(event["type"], event["object"])

    async def create(self, kind: Kind, obj: Obj, namespace: str | None = None) -> Obj:
        return await self._call("POST", kind.path(namespace or obj["metadata"].get("namespace")), obj)

    async def update(self, kind: Kind, obj: Obj, *, sub: str | None = None) -> Obj:
        meta = obj["metadata"]
        return await self._call("PUT", kind.path(meta.get("namespace"), meta["name"], sub), obj)

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
        return await self._call("PATCH", kind.path(namespace, name, sub), patch, content=_PATCH[type])

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
        options: Obj = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        if propagation:
            options["propagationPolicy"] = propagation
        if uid:
            options["preconditions"] = {"uid": uid}
        return await self._call("DELETE", kind.path(namespace, name), options)

    async def post(self, kind: Kind, name: str, sub: str, body: Obj, namespace: str | None = None) -> Obj:
        return await self._call("POST", kind.path(namespace, name, sub), body)


def _selectors(labels: str, fields: str) -> dict[str, str]:
    chosen = {}
    if labels:
        chosen["labelSelector"] = labels
    if fields:
        chosen["fieldSelector"] = fields
    return chosen


Key = tuple[str, str]  # (namespace or "", name)


class Informer:
    """A local copy of one kind, kept current by list and watch; re-lists after 410 and lost connections.

    `objects` maps (namespace, name) to the newest object seen. `on_event(type, new, old)` is called in
    the loop for every change, the first list's objects included (as ADDED); it must not block.
    """

    def __init__(
        self,
        api: Api,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        on_event: Callable[[EventType, Obj, Obj | None], None] | None = None,
    ) -> None:
        self._api, self._kind, self._namespace = api, kind, namespace
        self._labels, self._fields, self._on_event = labels, fields, on_event
        self.objects: dict[Key, Obj] = {}
        self.synced = asyncio.Event()

    def get(self, name: str, namespace: str | None = None) -> Obj | None:
        return self.objects.get((namespace or "", name))

    async def run(self) -> None:
        """Run until cancelled."""
        delay = 0.1
        while True:
            try:
                items, since = await self._api.list(
                    self._kind, self._namespace, labels=self._labels, fields=self._fields
                )
                self._replace(items)
                self.synced.set()
                delay = 0.1
                while True:
                    async for event in self._api.watch(
                        self._kind, self._namespace, since=since, labels=self._labels, fields=self._fields
                    ):
                        since = event.object["metadata"]["resourceVersion"]
                        self._apply(event.type, event.object)
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.debug("watch of %s lost: %s; listing again in %.1f s", self._kind.plural, lost, delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Informer]:
        """Run in the background; entered once the first list is in."""
        task = asyncio.create_task(self.run())
        try:
            await self.synced.wait()
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _replace(self, items: Sequence[Obj]) -> None:
        seen = {_key(item) for item in items}
        for key in [key for key in self.objects if key not in seen]:
            self._apply("DELETED", self.objects[key])
        for item in items:
            old = self.objects.get(_key(item))
            if old is None or old["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
                self._apply("ADDED" if old is None else "MODIFIED", item)

    def _apply(self, type: EventType, obj: Obj) -> None:
        key = _key(obj)
        old = self.objects.get(key)
        if type == "DELETED":
            self.objects.pop(key, None)
        else:
            self.objects[key] = obj
        if self._on_event:
            self._on_event(type, obj, old)


def _key(obj: Obj) -> Key:
    meta = obj["metadata"]
    return meta.get("namespace", ""), meta["name"]
