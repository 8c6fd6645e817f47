"""The HTTP side: paths, verbs, parameters, media types, watches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import yaml
from aiohttp import web

from sandbox.apiserver import conversion, discovery, errors, logs, patch, rbac, reviews, subresources, tables
from sandbox.apiserver.authn import ANONYMOUS, Identity, Tokens, service_account
from sandbox.apiserver.core import Core, Event, Page, Query, Write
from sandbox.apiserver.resources import REVIEWS, Resource
from sandbox.apiserver.selectors import parse_fields, parse_labels
from sandbox.apiserver.store import Stored
from sandbox.client import ApiError, Obj

log = logging.getLogger(__name__)
JSON = "application/json"
BOOKMARK_SECONDS = 30.0
WATCH_SECONDS = 1800.0  # the real server ends watches after 30 to 60 minutes
MAX_BODY = 3 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A request's address inside the API."""

    res: Resource
    namespace: str | None  # None: all namespaces, or cluster-scoped
    name: str = ""
    sub: str = ""

    @property
    def space(self) -> str:
        return self.namespace or ""


class Handler:
    def __init__(self, core: Core, tokens: Tokens, rules: rbac.Rules) -> None:
        self._core, self._tokens, self._rules = core, tokens, rules
        self._discovery = discovery.Discovery(core)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except ApiError as error:
            return failure(error)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        user = self._identify(request)
        target = self._resolve(request.path)
        if target is None:
            return self._plain(request, user)
        verb = _verb(request, target)
        self._rules.check(user, verb, target.res, target.namespace, target.name, target.sub)
        match verb:
            case "get":
                return await self._get(request, target)
            case "list":
                return self._list(request, target)
            case "watch":
                return await self._watch(request, target)
            case _:
                return await self._write(request, target, verb, user)

    # -- who and where

    def _identify(self, request: web.BaseRequest) -> Identity:
        header = request.headers.get("Authorization", "")
        user = ANONYMOUS
        if header[:7].lower() == "bearer ":
            found = self._tokens.identify(header[7:].strip())
            if found is None:
                raise errors.unauthorized()
            user = found
        return self._impersonated(request, user)

    def _impersonated(self, request: web.BaseRequest, user: Identity) -> Identity:
        name = request.headers.get("Impersonate-User")
        groups = tuple(request.headers.getall("Impersonate-Group", ()))
        if name is None:
            if groups:
                raise errors.bad_request("requested [] but did not specify a user")
            return user
        self._rules.check_impersonation(user, name, groups)
        parts = name.split(":")
        if name.startswith("system:serviceaccount:") and len(parts) == 4 and not groups:
            return service_account(parts[2], parts[3])
        if name == ANONYMOUS.user:
            return ANONYMOUS
        return Identity(name, groups).authenticated

    def _resolve(self, path: str) -> Target | None:
        parts = [part for part in path.split("/") if part]
        if len(parts) >= 3 and parts[0] == "api":
            group, version, rest = "", parts[1], parts[2:]
        elif len(parts) >= 4 and parts[0] == "apis":
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            return None
        namespace = None
        if len(rest) >= 3 and rest[0] == "namespaces" and not (group == "" and rest[2] in ("status", "finalize")):
            namespace, rest = rest[1], rest[2:]
        res = self._core.registry.find(group, version, rest[0])
        if res is None or (namespace is not None and not res.namespaced) or len(rest) > 3:
            return None
        name = rest[1] if len(rest) > 1 else ""
        sub = rest[2] if len(rest) > 2 else ""
        if (name and res.namespaced and namespace is None) or (sub and sub not in res.subs):
            return None
        return Target(res, namespace if res.namespaced else ("" if name else None), name, sub)

    def _plain(self, request: web.BaseRequest, user: Identity) -> web.StreamResponse:
        """What is no resource: discovery, health, OpenAPI."""
        self._rules.check_path(user, request.method.lower(), request.path)
        if request.method not in ("GET", "HEAD"):
            raise errors.no_such_path()
        found = self._discovery.answer(request.path, request.headers.get("Accept", ""))
        if found is None:
            return web.Response(status=404, text="404 page not found\n", content_type="text/plain")
        return web.Response(status=found.status, body=found.body, headers={"Content-Type": found.media_type})

    # -- reading

    async def _get(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        if target.sub == "log":
            return await logs.proxy(self._core, request, target.space, target.name)
        if target.sub in ("exec", "attach", "portforward", "binding", "eviction", "token"):
            raise errors.method_not_allowed()
        stored = self._core.get(target.res, target.space, target.name)
        if target.sub == "scale":
            return _json(subresources.scale_of(target.res, stored.obj))
        return self._one(request, target.res, stored)

    def _one(self, request: web.BaseRequest, res: Resource, stored: Stored, status: int = 200) -> web.Response:
        if wanted := _as_table(request):
            page = Page([stored], stored.version)
            return _json(tables.render(res, page, wanted, request.query.get("includeObject", "Metadata")), status)
        return _raw(_served(res, stored), status)

    def _query(self, request: web.BaseRequest, target: Target) -> Query:
        res = target.res
        fields = request.query.get("fieldSelector", "")
        if target.name:
            fields = ",".join(filter(None, (fields, f"metadata.name={target.name}")))
        labels = parse_labels(request.query.get("labelSelector", ""))
        return Query(labels, parse_fields(fields, res.key, res.custom.selectable if res.custom else ()))

    def _list(self, request: web.BaseRequest, target: Target) -> web.Response:
        res, query = target.res, self._query(request, target)
        limit, cont = _int(request.query, "limit") or 0, request.query.get("continue", "")
        self._check_list_version(request)
        page = self._core.page(res, target.namespace, query, limit, cont)
        if wanted := _as_table(request):
            return _json(tables.render(res, page, wanted, request.query.get("includeObject", "Metadata")))
        return _raw(_encode_list(res, page))

    def _check_list_version(self, request: web.BaseRequest) -> None:
        version = request.query.get("resourceVersion", "")
        if version and not version.isdigit():
            raise errors.bad_request(f'resourceVersion: Invalid value: "{version}": strconv.ParseUint: parsing '
                                     f'"{version}": invalid syntax')
        if version and int(version) > self._core.store.version:
            raise _too_large(int(version), self._core.store.version)

    async def _watch(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        res, query = target.res, self._query(request, target)
        version = request.query.get("resourceVersion", "")
        self._check_list_version(request)
        seconds = _int(request.query, "timeoutSeconds")
        response = web.StreamResponse(headers={"Content-Type": JSON})
        response.enable_chunked_encoding()
        await response.prepare(request)
        encode = _EventEncoder(res, _as_table(request), request.query.get("includeObject", "Metadata"))
        initial = version in ("", "0")
        since = self._core.store.version if initial else int(version)
        stream = _Stream(response, encode, res, self._core, bookmarks=_flag(request.query, "allowWatchBookmarks"))
        if initial and request.query.get("sendInitialEvents") != "false":
            await stream.initial(self._core.select(res, target.namespace, query))
            if _flag(request.query, "sendInitialEvents"):
                await stream.bookmark(initial_end=True)
        try:
            async with asyncio.timeout(seconds if seconds else WATCH_SECONDS):
                await stream.run(self._core.watch(res, target.namespace, query, since))
        except TimeoutError:
            await stream.close()
        except ApiError as error:
            await response.write(orjson.dumps({"type": "ERROR", "object": errors.status_body(error)}) + b"\n")
        except (ConnectionError, aiohttp.ClientError):
            log.debug("watch of %s closed by the client", res.plural)
            return response
        await response.write_eof()
        return response

    # -- writing

    async def _write(
        self, request: web.BaseRequest, target: Target, verb: str, user: Identity
    ) -> web.StreamResponse:
        write = Write(user, dry_run=_dry_run(request.query))
        core, res, space, name, sub = self._core, target.res, target.space, target.name, target.sub
        media = request.content_type
        body = await _body(request, optional=verb.startswith("delete"))
        match verb:
            case "create" if sub:
                return _json(self._post(target, body, write), 201)
            case "create" if res.key in REVIEWS:
                return _json(reviews.answer(res, body, user, self._tokens, self._rules, target.space), 201)
            case "create":
                _check_kind(res, body)
                return self._one(request, res, core.create(res, space, body, write), 201)
            case "update" if sub == "scale":
                return _json(subresources.set_scale(core, res, space, name, body, write))
            case "update":
                _check_kind(res, body)
                return self._one(request, res, core.update(res, space, name, body, write, sub))
            case "patch":
                return self._patch(request, target, media, body, write)
            case "delete":
                stored, gone = core.delete(res, space, name, {**body, **_delete_params(request.query)}, write)
                return self._deleted(request, res, stored, gone)
            case _:
                query = self._query(request, target)
                options = {**body, **_delete_params(request.query)}
                found = core.delete_all(res, target.namespace, query, options, write)
                return _raw(_encode_list(res, Page(found, core.store.version)))

    def _patch(
        self, request: web.BaseRequest, target: Target, media: str, body: Any, write: Write
    ) -> web.StreamResponse:
        core, res, space, name, sub = self._core, target.res, target.space, target.name, target.sub
        kind = patch.CONTENT_TYPES.get(media)
        if kind is None:
            raise _unsupported_media(list(patch.CONTENT_TYPES))
        if sub == "scale":
            return _json(subresources.patch_scale(core, res, space, name, kind, body, write))
        return self._one(request, res, core.patch(res, space, name, kind, body, write, sub))

    def _post(self, target: Target, body: Obj, write: Write) -> Obj:
        core, res, space, name = self._core, target.res, target.space, target.name
        match res.key, target.sub:
            case "pods", "binding":
                return subresources.bind(core, res, space, name, body, write)
            case "pods", "eviction":
                return subresources.evict(core, res, space, name, body, write)
            case "serviceaccounts", "token":
                return subresources.token_request(core, self._tokens, space, name, body, write)
            case _:
                raise errors.method_not_allowed()

    def _deleted(self, request: web.BaseRequest, res: Resource, stored: Stored, gone: bool) -> web.Response:
        if not gone or res.key in _RETURN_DELETED:
            return self._one(request, res, stored)
        meta = stored.obj["metadata"]
        details = {"name": meta["name"], "group": res.group, "kind": res.plural, "uid": meta["uid"]}
        if not res.group:
            del details["group"]
        return _json({**subresources.SUCCESS, "details": details})


_RETURN_DELETED = frozenset({"pods", "services", "serviceaccounts", "persistentvolumeclaims", "resourcequotas"})


class _EventEncoder:
    def __init__(self, res: Resource, table: str, include: str) -> None:
        self._res, self._table, self._include = res, table, include
        self._first = True

    def __call__(self, type: str, stored: Stored) -> bytes:
        if self._table:
            page = Page([stored], stored.version)
            obj = tables.render(self._res, page, self._table, self._include, columns=self._first)
            self._first = False
            return orjson.dumps({"type": type, "object": obj}) + b"\n"
        return b'{"type":"' + type.encode() + b'","object":' + _served(self._res, stored) + b"}\n"


class _Stream:
    """Writes a watch's events and bookmarks."""

    def __init__(
        self, response: web.StreamResponse, encode: _EventEncoder, res: Resource, core: Core, *, bookmarks: bool
    ) -> None:
        self._response, self._encode, self._res, self._core = response, encode, res, core
        self._bookmarks = bookmarks
        self._sent = time.monotonic()

    async def initial(self, found: list[Stored]) -> None:
        if found:
            await self._response.write(b"".join(self._encode("ADDED", stored) for stored in found))

    async def run(self, batches: Any) -> None:
        pending: asyncio.Task[list[Event]] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(batches))
                done, _ = await asyncio.wait({pending}, timeout=BOOKMARK_SECONDS)
                if not done:
                    await self.bookmark()
                    continue
                try:
                    events = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                await self._response.write(b"".join(self._encode(event.type, event.stored) for event in events))
        finally:
            if pending:
                pending.cancel()
                await asyncio.wait({pending})
            await batches.aclose()

    async def bookmark(self, *, initial_end: bool = False) -> None:
        if not self._bookmarks:
            return
        meta: Obj = {"resourceVersion": str(self._core.store.version), "creationTimestamp": None}
        if initial_end:
            meta["annotations"] = {"k8s.io/initial-events-end": "true"}
        obj = {"kind": self._res.kind, "apiVersion": self._res.api_version, "metadata": meta}
        await self._response.write(orjson.dumps({"type": "BOOKMARK", "object": obj}) + b"\n")

    async def close(self) -> None:
        await self.bookmark()


# -- small things of HTTP


def failure(error: ApiError) -> web.Response:
    headers = {"Content-Type": JSON}
    if retry := error.details.get("retryAfterSeconds"):
        headers["Retry-After"] = str(retry)
    return web.Response(status=error.code, body=orjson.dumps(errors.status_body(error)), headers=headers)


def _raw(body: bytes, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body, headers={"Content-Type": JSON})


def _json(obj: Any, status: int = 200) -> web.Response:
    return _raw(orjson.dumps(obj), status)


def _served(res: Resource, stored: Stored) -> bytes:
    if conversion.is_stored_form(res):
        return stored.raw
    return orjson.dumps(conversion.from_storage(res, stored.obj))


def _encode_list(res: Resource, page: Page) -> bytes:
    meta: Obj = {"resourceVersion": str(page.version)}
    if page.cont:
        meta["continue"] = page.cont
    if page.remaining is not None:
        meta["remainingItemCount"] = page.remaining
    kind = res.list_kind or f"{res.kind}List"
    head = orjson.dumps({"kind": kind, "apiVersion": res.api_version, "metadata": meta})
    return head[:-1] + b',"items":[' + b",".join(_item(res, stored) for stored in page.items) + b"]}"


def _item(res: Resource, stored: Stored) -> bytes:
    """Items of built-in lists come without kind and apiVersion."""
    raw = _served(res, stored)
    if res.custom is not None:
        return raw
    prefix = b'{"kind":"' + res.kind.encode() + b'","apiVersion":"' + res.api_version.encode() + b'",'
    return b"{" + raw[len(prefix):] if raw.startswith(prefix) else raw


def _verb(request: web.BaseRequest, target: Target) -> str:
    match request.method:
        case "GET" | "HEAD":
            if _flag(request.query, "watch"):
                return "watch"
            return "get" if target.name else "list"
        case "POST":
            return "create"
        case "PUT" if target.name:
            return "update"
        case "PATCH" if target.name:
            return "patch"
        case "DELETE":
            return "delete" if target.name else "deletecollection"
        case _:
            raise errors.method_not_allowed()


def _flag(query: Mapping[str, str], name: str) -> bool:
    return query.get(name, "").lower() in ("1", "true", "t")


def _int(query: Mapping[str, str], name: str) -> int | None:
    value = query.get(name)
    if not value:
        return None
    if not value.lstrip("-").isdigit():
        raise errors.bad_request(f'{name}: Invalid value: "{value}": strconv.ParseInt: parsing "{value}": invalid syntax')
    return int(value)


def _dry_run(query: Mapping[str, str]) -> bool:
    value = query.get("dryRun")
    if value not in (None, "All"):
        cause = errors.Cause("FieldValueNotSupported", f'Unsupported value: "{value}": supported values: "All"',
                             "dryRun")
        raise errors.invalid("meta.k8s.io", "CreateOptions", "", [cause])
    return value == "All"


def _delete_params(query: Mapping[str, str]) -> Obj:
    options: Obj = {}
    if (grace := _int(query, "gracePeriodSeconds")) is not None:
        options["gracePeriodSeconds"] = grace
    if policy := query.get("propagationPolicy"):
        options["propagationPolicy"] = policy
    return options


def _unsupported_media(accepted: list[str]) -> ApiError:
    text = (
        "the body of the request was in an unknown format - accepted media types include: " + ", ".join(accepted)
    )
    return ApiError(415, "UnsupportedMediaType", text)


async def _body(request: web.BaseRequest, *, optional: bool) -> Any:
    raw = await request.read()
    if not raw and optional:
        return {}
    if len(raw) > MAX_BODY:
        raise ApiError(413, "RequestEntityTooLarge", f"limit is {MAX_BODY}")
    if "yaml" in request.content_type:
        return yaml.safe_load(raw)
    if "json" not in request.content_type and request.content_type != "application/octet-stream":
        raise _unsupported_media([JSON, "application/yaml"])
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as wrong:
        raise errors.bad_request(f"couldn't get version/kind; json parse error: {wrong}") from wrong


def _check_kind(res: Resource, body: Any) -> None:
    if not isinstance(body, dict):
        raise errors.bad_request("the body of the request is not an object")
    if body.get("kind", res.kind) != res.kind or body.get("apiVersion", res.api_version) != res.api_version:
        raise errors.bad_request(
            f"the API version in the data ({body.get('apiVersion')}) does not match the expected API version "
            f"({res.api_version})"
        )


def _as_table(request: web.BaseRequest) -> str:
    """The version of Table that the client wants most, or ""."""
    accept = request.headers.get("Accept", "")
    if "as=Table" not in accept:
        return ""
    first = accept.split(",")[0]
    if "as=Table" not in first:
        return ""
    return "v1beta1" if "v=v1beta1" in first else "v1"


def _too_large(asked: int, have: int) -> ApiError:
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    text = f"Timeout: Too large resource version: {asked}, current: {have}"
    return ApiError(504, "Timeout", text, {"causes": [cause], "retryAfterSeconds": 1})
