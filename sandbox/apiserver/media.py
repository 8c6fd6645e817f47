"""Media types: what clients send, and the form in which they want their answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import orjson
import yaml
from aiohttp import web

from sandbox.apiserver import errors, protobuf
from sandbox.apiserver.resources import Registry, Resource
from sandbox.client import ApiError

JSON, YAML = "application/json", "application/yaml"
APPLY = "application/apply-patch"  # +yaml, of which JSON is a part
MAX_BODY = 3 * 1024 * 1024
_FORMS = ("Table", "PartialObjectMetadata", "PartialObjectMetadataList")
SCHEME = "pkg/api/legacyscheme/scheme.go:30"


@dataclass(frozen=True, slots=True)
class Form:
    """`kind` is "" for the object itself, else Table or one of the partial kinds in `version`."""

    kind: str = ""
    version: str = "v1"
    yaml: bool = False


def _accepted(request: web.BaseRequest) -> list[tuple[str, dict[str, str]]]:
    found = []
    for entry in request.headers.get("Accept", "").split(","):
        type, *params = (part.strip() for part in entry.split(";"))
        found.append((type, dict(param.split("=", 1) for param in params if "=" in param)))
    return found


def form(request: web.BaseRequest) -> Form:
    """The first form in the Accept header that can be had; the plain object if none."""
    for type, params in _accepted(request):
        if type in ("", "*/*", "application/*", JSON):
            kind = params.get("as", "")
            if not kind:
                return Form()
            if kind in _FORMS:
                return Form(kind, params.get("v", "v1"))
        elif type == YAML:
            return Form(yaml=True)
    return Form()


def check_accept(request: web.BaseRequest) -> None:
    """Raises ApiError(406) if no form that the client takes can be had."""
    for type, _ in _accepted(request):
        if type in ("", "*/*", "application/*", JSON, YAML) or type.startswith("text/plain"):
            return
    text = (
        "406: Not Acceptable\n\nAvailable representations: application/json, application/yaml, "
        "application/vnd.kubernetes.protobuf"
    )
    raise errors.Bare(406, "NotAcceptable", text)


def yaml_answer(obj: Any, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=yaml.safe_dump(obj, sort_keys=False).encode(), headers={"Content-Type": YAML}
    )


def warning(text: str) -> str:
    """The value of a Warning header."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'299 - "{quoted}"'


def unsupported_patch(type: str) -> ApiError:
    if type.startswith(APPLY):
        return ApiError(415, "UnsupportedMediaType", "this is not applied on the server side by the sandbox")
    return errors.Bare(415, "UnsupportedMediaType", "415: Unsupported Media Type")


def duplicates(raw: bytes) -> list[str]:
    """The fields that a JSON body names twice; orjson takes the last one silently."""
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        found.extend(name for i, name in enumerate(names) if name in names[:i])

    json.loads(raw, object_pairs_hook=note)
    return found


async def body(request: web.BaseRequest, kind: str, *, optional: bool = False, patch: bool = False) -> Any:
    """The decoded body. Raises ApiError: 400, 413, 415."""
    raw = await request.read()
    if not raw and optional:
        return {}
    if len(raw) > MAX_BODY:
        raise ApiError(413, "RequestEntityTooLarge", f"Request entity too large: limit is {MAX_BODY}")
    type = request.content_type
    if type == protobuf.MEDIA_TYPE:
        return protobuf.decode(raw)
    if not patch and type not in (JSON, YAML, "application/octet-stream"):  # the last stands for none
        raise ApiError(
            415,
            "UnsupportedMediaType",
            "the body of the request was in an unknown format - accepted media types include: application/json, "
            "application/yaml, application/vnd.kubernetes.protobuf",
        )
    try:
        return yaml.safe_load(raw) if type == YAML or type.startswith(APPLY) else orjson.loads(raw)
    except (orjson.JSONDecodeError, yaml.YAMLError) as wrong:
        text = raw.decode(errors="replace")
        if patch:
            raise errors.bad_request(f"error decoding patch: {_go_json_error(text)}") from wrong
        raise errors.bad_request(
            f"the object provided is unrecognized (must be of type {kind}): couldn't get version/kind; json parse "
            f"error: {_go_json_error(text)} ({text[:64] or '<empty>'})"
        ) from wrong


def _go_json_error(text: str) -> str:
    """What Go's decoder says about text that is not JSON."""
    try:
        json.loads(text)
    except json.JSONDecodeError as wrong:
        if wrong.pos >= len(text):
            return "unexpected end of JSON input"
        wanted = "object key string" if "property name" in wrong.msg else "value"
        return f"invalid character {text[wrong.pos]!r} looking for beginning of {wanted}"
    return "invalid JSON"


def check_kind(registry: Registry, res: Resource, obj: Any) -> None:
    """The body must be of the resource's kind and version, or say nothing. Raises ApiError(400 or 422)."""
    if not isinstance(obj, dict):
        raise errors.bad_request(f"the object provided is unrecognized (must be of type {res.kind})")
    kind, version = str(obj.get("kind") or res.kind), str(obj.get("apiVersion") or res.api_version)
    if kind == res.kind and version == res.api_version:
        return
    if res.custom is not None:
        if version != res.api_version:
            raise errors.bad_request(
                f"the API version in the data ({version}) does not match the expected API version ({res.api_version})"
            )
        cause = errors.Cause("FieldValueInvalid", f'Invalid value: "{kind}": must be {res.kind}', "kind")
        name = (obj.get("metadata") or {}).get("name", "")
        raise errors.invalid(res.group, kind, name, [cause])
    group, _, short = version.rpartition("/")
    if registry.by_kind(group, short, kind) is not None:
        why = f"converting ({short}.{kind}) to ({_internal(res)}.{res.kind}): unknown conversion"
    else:
        why = f'no kind "{kind}" is registered for version "{version}" in scheme "{SCHEME}"'
    raise errors.Undecodable(short, res.kind, why, kind)


def _internal(res: Resource) -> str:
    return res.group.split(".")[0] if res.group else "core"
