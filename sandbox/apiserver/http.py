"""The HTTP side: paths, verbs, parameters, media types, watches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson
from aiohttp import web

from sandbox.apiserver import (
    conversion,
    discovery,
    errors,
    execs,
    logs,
    media,
    params,
    patch,
    paths,
    rbac,
    reviews,
    subresources,
    tables,
    usage,
)
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
    def __init__(
        self, core: Core, tokens: Tokens, rules: rbac.Rules, metrics: usage.ResourceMetrics | None = None
    ) -> None:
        self._core, self._tokens, self._rules, self._metrics = core, tokens, rules, metrics
        self._discovery = discovery.Discovery(core)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            answer = await self._answer(request)
        except ApiError as error:
            answer = failure(error)
        except ConnectionError:
            if request.transport is not None and not request.transport.is_closing():
                raise
            return web.Response()  # the client has gone, also while an answer's head was on its way: nobody reads this
        if "/endpoints" in request.path and not answer.prepared:
            address = paths.parse(request.path)
            if address and (address.group, address.plural) == ("", "endpoints"):
                answer.headers["Warning"] = media.warning(_ENDPOINTS_DEPRECATED)
        return answer

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        user = self._identify(request)
        address = paths.parse(request.path)
        if address is None:
            return self._plain(request, user)
        verb = paths.verb(request.method, address, watch=_flag(request.query, "watch"))
        space = address.namespace or ""
        if address.plural == "namespaces" and not address.group:
            space = address.name
        ask = rbac.Ask(verb, address.group, address.plural, space, address.name, address.sub)
        self._rules.check(user, ask)
        if (address.group, address.plural) == ("", "pods") and address.sub in _STREAMS_REFUSED:
            raise ApiError(501, "NotImplemented", f"pods/{address.sub} is not supported by the sandbox")
        target = self._target(address, verb)
        if target.sub == "exec":
            self._rules.check(user, replace(ask, verb="create"))  # whatever the method: since 1.35
            return await execs.proxy(self._core, request, target.space, target.name)
        params.check(request.query)
        media.check_accept(request)
        if verb in ("get", "list", "watch"):
            return await self._read(request, target, verb)
        return await self._write(request, target, verb, user)

    async def _read(self, request: web.BaseRequest, target: Target, verb: str) -> web.StreamResponse:
        if target.res.group == usage.GROUP:
            return await self._usage(request, target)
        if verb == "get":
            return await self._get(request, target)
        return self._list(request, target) if verb == "list" else await self._watch(request, target)

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
                raise errors.bad_request("requested groups without impersonating a user")
            return user
        self._rules.check_impersonation(user, name, groups)
        parts = name.split(":")
        if name.startswith("system:serviceaccount:") and len(parts) == 4 and not groups:
            return service_account(parts[2], parts[3])
        if name == ANONYMOUS.user:
            return ANONYMOUS
        return Identity(name, groups).authenticated

    def _target(self, address: paths.Address, verb: str) -> Target:
        """What is served there. Raises ApiError(404 or 405)."""
        res = self._core.registry.find(address.group, address.version, address.plural)
        missing = errors.no_such_path() if self._core.registry.is_builtin(address.group) else NoSuchPage()
        if res is None or (address.namespace is not None and not res.namespaced):
            raise missing
        if address.sub and address.sub not in res.subs:
            if res.custom is not None:
                raise errors.not_found(res.group, res.plural, address.name)
            raise missing
        nowhere = res.namespaced and address.namespace is None
        if nowhere and address.name:
            raise missing
        if nowhere and verb == "create" and res.key not in REVIEWS:
            raise missing if res.custom else errors.method_not_allowed()
        if verb not in res.verbs and not address.sub:
            raise errors.method_not_allowed()
        if res.namespaced:
            return Target(res, address.namespace, address.name, address.sub)
        return Target(res, "" if address.name else None, address.name, address.sub)

    def _plain(self, request: web.BaseRequest, user: Identity) -> web.StreamResponse:
        """What is no resource: discovery, health, OpenAPI."""
        self._rules.check_path(user, request.method.lower(), request.path)
        if request.method not in ("GET", "HEAD"):
            raise errors.no_such_path()
        found = self._discovery.answer(request.path, request.headers.get("Accept", ""))
        if found is None:
            raise NoSuchPage()
        return web.Response(status=found.status, body=found.body, headers={"Content-Type": found.media_type})

    # -- reading

    async def _get(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        if target.sub == "log":
            return await logs.proxy(self._core, request, target.space, target.name)
        if target.sub in ("binding", "eviction", "token"):
            raise errors.method_not_allowed()
        if target.sub == "scale":
            return _json(subresources.read_scale(self._core, target.res, target.space, target.name))
        stored = self._core.get(target.res, target.space, target.name)
        return self._one(request, target.res, stored)

    async def _usage(self, request: web.BaseRequest, target: Target) -> web.Response:
        assert self._metrics is not None, "it has put the resource there"
        if target.name:
            return _json(await self._metrics.get(target.res, target.space, target.name))
        return _json(await self._metrics.list(target.res, target.namespace, self._query(request, target)))

    def _one(
        self, request: web.BaseRequest, res: Resource, stored: Stored, status: int = 200, write: Write | None = None
    ) -> web.Response:
        form = media.form(request)
        match form.kind:
            case "Table":
                page = Page([stored], stored.version)
                answer = _json(tables.render(res, page, form.version, _include(request)), status)
            case "PartialObjectMetadata":
                answer = _json(tables.partial(stored.obj), status)
            case _ if form.yaml:
                answer = media.yaml_answer(conversion.from_storage(res, stored.obj), status)
            case _:
                answer = _raw(_served(res, stored), status)
        if write is not None and write.warnings:
            answer.headers["Warning"] = ", ".join(media.warning(text) for text in write.warnings)
        return answer

    def _query(self, request: web.BaseRequest, target: Target) -> Query:
        res = target.res
        fields = request.query.get("fieldSelector", "")
        if target.name:
            fields = ",".join(filter(None, (fields, f"metadata.name={target.name}")))
        labels = parse_labels(request.query.get("labelSelector", ""))
        return Query(labels, parse_fields(fields, res.key, res.custom.selectable if res.custom else ()))

    def _list(self, request: web.BaseRequest, target: Target) -> web.Response:
        res, query = target.res, self._query(request, target)
        limit, cont = max(_int(request.query, "limit") or 0, 0), request.query.get("continue", "")
        self._check_list_version(request, cont)
        page = self._core.page(res, target.namespace, query, limit, cont)
        form = media.form(request)
        match form.kind:
            case "Table":
                return _json(tables.render(res, page, form.version, _include(request)))
            case "PartialObjectMetadataList":
                return _json(tables.partial_list(page))
            case _ if form.yaml:
                return media.yaml_answer(orjson.loads(_encode_list(res, page)))
            case _:
                return _raw(_encode_list(res, page))

    def _check_list_version(self, request: web.BaseRequest, cont: str = "") -> None:
        version, match = request.query.get("resourceVersion", ""), request.query.get("resourceVersionMatch", "")
        current = self._core.store.version
        if version and not version.isdigit():
            raise errors.internal(
                f'resourceVersion: Invalid value: "{version}": strconv.ParseUint: parsing "{version}": invalid syntax'
            )
        if cont and version not in ("", "0"):
            raise errors.bad_request("specifying resource version is not allowed when using continue")
        if match and not version and not _flag(request.query, "watch"):
            raise params.invalid_options(
                "ListOptions",
                "resourceVersionMatch",
                "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
                "FieldValueForbidden",
            )
        if version and int(version) > current:
            raise _too_large(int(version), current)
        if match == "Exact" and int(version) != current:
            raise errors.expired(f"The resourceVersion for the provided list is too old: {version} ({current})")

    async def _watch(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        res, query = target.res, self._query(request, target)
        version = request.query.get("resourceVersion", "")
        self._check_list_version(request)
        params.check_watch(request.query)
        seconds = _int(request.query, "timeoutSeconds")
        response = web.StreamResponse(headers={"Content-Type": JSON})
        response.enable_chunked_encoding()
        await response.prepare(request)
        form = media.form(request)
        encode = _EventEncoder(res, form, _include(request))
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
        await response.write_eof()
        return response

    # -- writing

    async def _write(self, request: web.BaseRequest, target: Target, verb: str, user: Identity) -> web.StreamResponse:
        core, res, space, name, sub = self._core, target.res, target.space, target.name, target.sub
        options = params.write_options(request.query, verb)
        manager = request.query.get("fieldManager") or request.headers.get("User-Agent", "unknown").split("/")[0]
        write = Write(user, dry_run=options.dry_run, validation=options.validation, manager=manager)
        if verb == "patch":
            return await self._patch(request, target, write)
        if verb.startswith("delete"):
            return await self._delete(request, target, verb, write)
        body = await media.body(request, res.kind)
        if verb == "create" and (sub or res.key in REVIEWS):
            return _json(self._post(target, body, write), 201)
        if sub == "scale":
            return _json(subresources.set_scale(core, res, space, name, body, write))
        media.check_kind(core.registry, res, body)
        if request.content_type == JSON and options.validation != "Ignore":
            _check_duplicates(res, await request.read(), write)
        fresh = verb == "create" or core.store.get(res.key, space, name) is None
        if verb == "create":
            stored = core.create(res, space, body, write)
        else:
            stored = core.update(res, space, name, body, write, sub)
        return self._one(request, res, stored, 201 if fresh else 200, write)

    async def _patch(self, request: web.BaseRequest, target: Target, write: Write) -> web.StreamResponse:
        core, res, space, name, sub = self._core, target.res, target.space, target.name, target.sub
        if request.content_type.startswith(media.APPLY):
            return await self._apply(request, target, write)
        if request.query.get("force"):
            why = "Forbidden: may not be specified for non-apply patch"
            raise params.invalid_options("PatchOptions", "force", why, "FieldValueForbidden")
        kind = patch.CONTENT_TYPES.get(request.content_type)
        if kind is None:
            raise media.unsupported_patch(request.content_type)
        body = await media.body(request, res.kind, patch=True)
        if sub == "scale":
            return _json(subresources.patch_scale(core, res, space, name, kind, body, write))
        return self._one(request, res, core.patch(res, space, name, kind, body, write, sub), 200, write)

    async def _apply(self, request: web.BaseRequest, target: Target, write: Write) -> web.StreamResponse:
        core, res, space, name, sub = self._core, target.res, target.space, target.name, target.sub
        if not request.query.get("fieldManager"):
            why = "Required value: is required for apply patch"
            raise params.invalid_options("PatchOptions", "fieldManager", why, "FieldValueRequired")
        if sub not in ("", "status"):
            raise media.unsupported_patch(request.content_type)
        if core.store.get(res.key, space, name) is None:
            self._rules.check(write.user, rbac.Ask("create", res.group, res.plural, space, name, sub))
        body = await media.body(request, res.kind, patch=True)
        if not isinstance(body, dict):
            raise errors.bad_request("error decoding YAML: not an object")
        media.check_kind(core.registry, res, body)
        force = _flag(request.query, "force")
        stored, fresh = core.apply(res, space, name, body, write, sub, force=force)
        return self._one(request, res, stored, 201 if fresh else 200, write)

    async def _delete(self, request: web.BaseRequest, target: Target, verb: str, write: Write) -> web.StreamResponse:
        core, res = self._core, target.res
        body = await media.body(request, "DeleteOptions", optional=True)
        if not isinstance(body, dict):
            raise errors.bad_request("DeleteOptions must be an object")
        if body.get("kind", "DeleteOptions") != "DeleteOptions":
            kind, version = body["kind"], body.get("apiVersion")
            raise errors.bad_request(
                f'no kind "{kind}" is registered for version "{version}" in scheme "{media.SCHEME}"'
            )
        options = {**body, **params.delete_options(request.query)}
        if body.get("dryRun"):
            write = replace(write, dry_run=True)
        params.check_propagation(options)
        headers = _job_warning(res, options)
        if verb == "delete":
            try:
                stored, gone = core.delete(res, target.space, target.name, options, write)
            except ApiError as error:
                answer = failure(error)
            else:
                answer = self._deleted(request, res, stored, gone)
            answer.headers.update(headers)
            return answer
        found = core.delete_all(res, target.namespace, self._query(request, target), options, write)
        return _raw(_encode_list(res, Page(found, core.store.version)))

    def _post(self, target: Target, body: Obj, write: Write) -> Obj:
        core, res, space, name = self._core, target.res, target.space, target.name
        match res.key, target.sub:
            case "pods", "binding":
                return subresources.bind(core, res, space, name, body, write)
            case "pods", "eviction":
                return subresources.evict(core, res, space, name, body, write)
            case "serviceaccounts", "token":
                return subresources.token_request(core, self._tokens, space, name, body, write)
            case "bindings", "":
                pods = core.registry.find("", "v1", "pods")
                assert pods is not None
                return subresources.bind(core, pods, space, (body.get("metadata") or {}).get("name", ""), body, write)
            case _ if res.key in REVIEWS:
                return reviews.answer(res, body, write.user, self._tokens, self._rules, space)
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


_STREAMS_REFUSED = frozenset({"attach", "portforward", "proxy"})
_RETURN_DELETED = frozenset({"pods", "services", "serviceaccounts", "persistentvolumeclaims", "resourcequotas"})


_ENDPOINTS_DEPRECATED = "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice"


class _EventEncoder:
    def __init__(self, res: Resource, form: media.Form, include: str) -> None:
        self._res, self._form, self._include = res, form, include
        self._first = True

    def __call__(self, type: str, stored: Stored) -> bytes:
        if self._form.kind == "Table":
            page = Page([stored], stored.version)
            obj = tables.render(self._res, page, self._form.version, self._include, columns=self._first)
            self._first = False
            return orjson.dumps({"type": type, "object": obj}) + b"\n"
        if self._form.kind == "PartialObjectMetadata":
            return orjson.dumps({"type": type, "object": tables.partial(stored.obj)}) + b"\n"
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


def _check_duplicates(res: Resource, raw: bytes, write: Write) -> None:
    found = [f'duplicate field "{name}"' for name in media.duplicates(raw)]
    if found and write.validation == "Strict":
        raise errors.Undecodable(res.version, res.kind, f"strict decoding error: {', '.join(found)}")
    write.warnings.extend(found)


def _job_warning(res: Resource, options: Obj) -> dict[str, str]:
    if res.key != "jobs.batch" or options.get("propagationPolicy") or options.get("orphanDependents") is not None:
        return {}
    text = (
        "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or "
        "set propagationPolicy=Orphan to suppress this warning"
    )
    return {"Warning": media.warning(text)}


class NoSuchPage(ApiError):
    """404 in plain text: not even the API's own error, but the HTTP server's."""

    def __init__(self) -> None:
        super().__init__(404, "", "404 page not found")


def failure(error: ApiError) -> web.Response:
    if isinstance(error, NoSuchPage):
        return web.Response(status=404, text=f"{error}\n", headers={"Content-Type": "text/plain; charset=utf-8"})
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
    return b"{" + raw[len(prefix) :] if raw.startswith(prefix) else raw


def _flag(query: Mapping[str, str], name: str) -> bool:
    return query.get(name, "").lower() in ("1", "true", "t")


def _int(query: Mapping[str, str], name: str) -> int | None:
    value = query.get(name)
    if not value:
        return None
    if not value.lstrip("-").isdigit():
        raise errors.bad_request(f'strconv.ParseInt: parsing "{value}": invalid syntax')
    return int(value)


def _include(request: web.BaseRequest) -> str:
    return request.query.get("includeObject", "Metadata")


def _too_large(asked: int, have: int) -> ApiError:
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    text = f"Timeout: Too large resource version: {asked}, current: {have}"
    return ApiError(504, "Timeout", text, {"causes": [cause], "retryAfterSeconds": 1})
