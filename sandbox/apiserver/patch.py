"""The three ways to patch: JSON merge patch (RFC 7386), JSON patch (RFC 6902), strategic merge.

Strategic merge is driven by a table of list merge keys, the `patchMergeKey` tags of the Kubernetes API
types (v1.36): a list named here is merged by its key, any other is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from sandbox.apiserver.errors import Bare, bad_request, internal
from sandbox.client import ApiError, Obj

Json = Any


def merge(target: Json, patch: Json) -> Json:
    """RFC 7386; the target is not altered."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


class _Refused(Exception):
    """The JSON patch cannot be carried out."""


def json_patch(target: Obj, patch: Json) -> Obj:
    """RFC 6902. Raises ApiError: 400 when malformed, 422 when it cannot be carried out."""
    if not isinstance(patch, list) or not all(isinstance(op, dict) for op in patch):
        raise bad_request(
            "error decoding patch: json: cannot unmarshal object into Go value of type []handlers.jsonPatchOp"
        )
    result: Json = copy.deepcopy(target)
    for op in patch:
        try:
            result = _operate(result, op)
        except _Refused as refused:
            text = "the server rejected our request due to an error in our request"
            raise Bare(422, "Invalid", text) from refused
    return result  # type: ignore[no-any-return]


def _tokens(path: str) -> list[str]:
    if path and not path.startswith("/"):
        raise _Refused(f"invalid path {path!r}")
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _walk(doc: Json, tokens: list[str], path: str) -> Json:
    for token in tokens:
        if isinstance(doc, dict) and token in doc:
            doc = doc[token]
        elif isinstance(doc, list) and token.isdigit() and int(token) < len(doc):
            doc = doc[int(token)]
        else:
            raise _Refused(f"path {path!r} does not exist")
    return doc


def _operate(doc: Json, op: Obj) -> Json:
    path = str(op.get("path", ""))
    tokens = _tokens(path)
    match op.get("op"):
        case "add":
            return _add(doc, tokens, path, op.get("value"))
        case "remove":
            _remove(doc, tokens, path)
        case "replace":
            if not tokens:
                return op.get("value")
            parent = _walk(doc, tokens[:-1], path)
            if isinstance(parent, list):
                _walk(doc, tokens, path)
            _set(parent, tokens[-1], op.get("value"))  # a missing key is added: the real server's library is lenient
        case "test":
            if _walk(doc, tokens, path) != op.get("value"):
                raise _Refused(f"testing path {path!r} failed")
        case "move":
            value = _walk(doc, _tokens(str(op.get("from", ""))), str(op.get("from")))
            _remove(doc, _tokens(str(op.get("from", ""))), str(op.get("from")))
            return _add(doc, tokens, path, value)
        case "copy":
            value = copy.deepcopy(_walk(doc, _tokens(str(op.get("from", ""))), str(op.get("from"))))
            return _add(doc, tokens, path, value)
        case other:
            raise _Refused(f"unknown operation {other!r}")
    return doc


def _set(parent: Json, token: str, value: Json) -> None:
    if isinstance(parent, list):
        parent[int(token)] = value
    else:
        parent[token] = value


def _add(doc: Json, tokens: list[str], path: str, value: Json) -> Json:
    if not tokens:
        return value
    parent = _walk(doc, tokens[:-1], path)
    last = tokens[-1]
    if isinstance(parent, dict):
        parent[last] = value
    elif isinstance(parent, list) and (last == "-" or (last.isdigit() and int(last) <= len(parent))):
        parent.insert(len(parent) if last == "-" else int(last), value)
    else:
        raise _Refused(f"path {path!r} does not exist")
    return doc


def _remove(doc: Json, tokens: list[str], path: str) -> None:
    _walk(doc, tokens, path)
    if not tokens:
        raise _Refused("cannot remove the whole document")
    parent = _walk(doc, tokens[:-1], path)
    if isinstance(parent, list):
        del parent[int(tokens[-1])]
    else:
        del parent[tokens[-1]]


def merge_key(field: str, *, service: bool = False) -> str | None:
    """The key by which a list field is merged, for OpenAPI."""
    if field == "ports":
        return "port" if service else "containerPort"
    return _MERGE_KEYS.get(field)


# Field name → merge key. `ports` is by containerPort in containers, by port in Services.
_MERGE_KEYS: dict[str, str] = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "conditions": "type",
    "addresses": "type",
    "ownerReferences": "uid",
    "secrets": "name",
}
# Lists of plain values that are merged as sets.
_SETS = frozenset({"finalizers", "podCIDRs"})
# Where a name of the table above means something else: these are replaced as a whole.
_ATOMIC_PARENTS = frozenset({"endpoints", "subsets"})
_DIRECTIVES = ("$patch", "$retainKeys")


def strategic(target: Obj, patch: Obj) -> Obj:
    """Strategic merge patch of a built-in kind; the target is not altered."""
    return _strategic_map(target, patch)


def _merge_key(field: str, items: list[Json], parent: str) -> str | None:
    if parent in _ATOMIC_PARENTS:
        return None
    if field == "ports":
        container = any(isinstance(item, dict) and "containerPort" in item for item in items)
        return "containerPort" if container or parent in ("containers", "initContainers") else "port"
    return _MERGE_KEYS.get(field)


def _strategic_map(target: Json, patch: Obj, parent: str = "") -> Obj:
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    result: Obj = dict(target) if isinstance(target, dict) else {}
    retain = patch.get("$retainKeys")
    if isinstance(retain, list):
        result = {key: value for key, value in result.items() if key in retain}
    for key, value in patch.items():
        if key in _DIRECTIVES:
            continue
        if key.startswith("$setElementOrder/"):
            field = key.split("/", 1)[1]
            if field not in patch and isinstance(result.get(field), list):
                result[field] = _strategic_list(field, result[field], [], parent, value)
            continue
        if key.startswith("$deleteFromPrimitiveList/"):
            field = key.split("/", 1)[1]
            result[field] = [item for item in result.get(field) or [] if item not in value]
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = _strategic_map(result.get(key), value, key)
        elif isinstance(value, list):
            order = patch.get(f"$setElementOrder/{key}")
            result[key] = _strategic_list(key, result.get(key), value, parent, order)
        else:
            result[key] = value
    return result


def _strategic_list(field: str, target: Json, patch: list[Json], parent: str, order: list[Json] | None) -> list[Json]:
    old: list[Json] = list(target) if isinstance(target, list) else []
    if field in _SETS:
        merged = old + [item for item in patch if item not in old]
        return _arrange(merged, old, order or patch, lambda item: item)
    key = _merge_key(field, [*old, *patch], parent)
    if key is None or not all(isinstance(item, dict) for item in patch):
        return [_strip(item) for item in patch]
    if any(item.get("$patch") == "replace" for item in patch):
        return [_strip(item) for item in patch if item.get("$patch") != "replace"]
    return _arrange(_merge_items(field, old, patch, key), old, order or patch, lambda item: item.get(key))


def _merge_items(field: str, old: list[Json], patch: list[Json], key: str) -> list[Json]:
    result = list(old)
    for item in patch:
        if key not in item:
            shown = " ".join(f"{name}:{value}" for name, value in sorted(item.items()))
            raise internal(f"map: map[{shown}] does not contain declared merge key: {key}")
        at = next((i for i, have in enumerate(result) if have.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            result = [have for have in result if have.get(key) != item[key]]
        elif at is None:
            result.append(_strategic_map({}, item, field))
        else:
            result[at] = _strategic_map(result[at], item, field)
    return result


def _arrange(merged: list[Json], old: list[Json], order: list[Json], ident: Callable[[Json], Json]) -> list[Json]:
    """The order of a merged list: the patch's own, with the server's other items where the server had them.

    As `mergeSortedSlice` of apimachinery's strategicpatch: an item that only the server has goes before a
    patched one only if both were there and it stood before.
    """
    wanted = [ident(item) for item in order]
    before = [ident(item) for item in old]
    patched = sorted((item for item in merged if ident(item) in wanted), key=lambda item: wanted.index(ident(item)))
    others = [item for item in merged if ident(item) not in wanted]
    result = []
    while patched and others:
        left, right = ident(others[0]), ident(patched[0])
        first = left in before and right in before and before.index(left) < before.index(right)
        result.append((others if first else patched).pop(0))
    return result + patched + others


def _strip(item: Json) -> Json:
    """Without directives: what is put in place as a whole must not carry them."""
    if isinstance(item, dict):
        return {key: _strip(value) for key, value in item.items() if key not in _DIRECTIVES and value is not None}
    return item


CONTENT_TYPES = {
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/json-patch+json": "json",
}


def apply(kind: str, target: Obj, body: Json, *, custom: bool) -> Obj:
    """Patch a copy of `target`. Custom resources know no strategic merge (415 in the real server)."""
    if kind == "json":
        return json_patch(target, body)
    if not isinstance(body, dict):
        raise bad_request("error decoding patch: json: cannot unmarshal array into Go value of type map[string]any")
    if kind == "strategic" and custom:
        raise ApiError(
            415,
            "UnsupportedMediaType",
            "the body of the request was in an unknown format - accepted media types include: "
            "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
        )
    return strategic(target, body) if kind == "strategic" else merge(target, body)
