"""Server-side apply: who owns which fields of an object, how what is applied is merged, and what conflicts.

Pure. Ownership is kept for objects that were applied at least once; what others had written before the first apply
belongs to `before-first-apply`, as on a real server.
Source: sigs.k8s.io/structured-merge-diff v6, apimachinery's managedfields (Kubernetes 1.36).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from sandbox.apiserver.patch import merge_key
from sandbox.apiserver.times import now
from sandbox.client import ApiError, Obj

Path = tuple[str, ...]  # "f:name", 'k:{"name":"x"}', 'v:"x"'
FieldSet = frozenset[Path]
FIRST = "before-first-apply"
APPLY, UPDATE = "Apply", "Update"
# Nobody owns an object's identity, nor what the server itself keeps.
_UNOWNED = frozenset(
    {("f:apiVersion",), ("f:kind",)}
    | {("f:metadata",), *(("f:metadata", f"f:{name}") for name in (
        "name", "namespace", "uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "selfLink",
        "deletionTimestamp", "deletionGracePeriodSeconds"))}
)  # fmt: skip
# Fields of the built-in kinds that are replaced as a whole (x-kubernetes-map-type: atomic).
_ATOMIC = frozenset(
    {"selector", "labelSelector", "namespaceSelector", "podSelector", "nodeSelector", "secretKeyRef", "configMapKeyRef",
     "fieldRef", "resourceFieldRef", "targetRef", "involvedObject", "claimRef", "nodeSelectorTerms",
     "requiredDuringSchedulingIgnoredDuringExecution"}
)  # fmt: skip
_SETS = frozenset({"finalizers", "podCIDRs"})
_MORE_KEYS = {"containerPort": ("containerPort", "protocol"), "port": ("port", "protocol"),
              "topologyKey": ("topologyKey", "whenUnsatisfiable")}  # fmt: skip
_KEY_DEFAULTS = {"protocol": "TCP"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a value's type: of a built-in kind by its field's name, of a custom one by its schema."""

    field: str = ""
    parent: str = ""
    schema: Mapping[str, Any] | None = None  # None: a built-in kind

    def child(self, name: str) -> Shape:
        if self.schema is None:
            return Shape(name, self.field)
        inner = (self.schema.get("properties") or {}).get(name) or self.schema.get("additionalProperties")
        return Shape(name, self.field, inner if isinstance(inner, dict) else {})

    def item(self) -> Shape:
        return Shape(self.field, self.parent, None if self.schema is None else self.schema.get("items") or {})

    def kind(self, value: Any) -> Literal["atomic", "map", "keyed", "set"]:
        if isinstance(value, dict):
            if self.schema is None:
                return "atomic" if self.field in _ATOMIC else "map"
            return "atomic" if self.schema.get("x-kubernetes-map-type") == "atomic" else "map"
        if not isinstance(value, list):
            return "atomic"
        if self.schema is not None:
            types: dict[Any, Literal["keyed", "set"]] = {"map": "keyed", "set": "set"}
            return types.get(self.schema.get("x-kubernetes-list-type"), "atomic")
        if self.field in _SETS:
            return "set"
        return "keyed" if self.keys() and self.field not in _ATOMIC else "atomic"

    def keys(self) -> tuple[str, ...]:
        if self.schema is not None:
            return tuple(self.schema.get("x-kubernetes-list-map-keys") or ())
        if self.parent in ("endpoints", "subsets"):
            return ()
        service = self.field == "ports" and self.parent not in ("containers", "initContainers")
        key = merge_key(self.field, service=service)
        return _MORE_KEYS.get(key, (key,)) if key else ()


def _ident(item: Any, keys: Sequence[str]) -> str:
    values = {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in keys if key in item or key in _KEY_DEFAULTS}
    return "k:" + orjson.dumps(values, option=orjson.OPT_SORT_KEYS).decode()


def _value(item: Any) -> str:
    return "v:" + orjson.dumps(item).decode()


def fields(value: Any, shape: Shape, at: Path = ()) -> set[Path]:
    """The paths that stand for a value: its leaves, and the items of keyed lists themselves."""
    match shape.kind(value):
        case "map" if value:
            found = set().union(*(fields(inner, shape.child(key), (*at, f"f:{key}")) for key, inner in value.items()))
        case "keyed" if value:
            keys, inside = shape.keys(), shape.item()
            found = set()
            for item in value:
                here = (*at, _ident(item, keys))
                found |= {here} | fields(item, inside, here)
        case "set" if value:
            found = {(*at, _value(item)) for item in value}
        case _:
            found = {at}
    return found if at else {path for path in found if path not in _UNOWNED}


def merge(live: Any, applied: Any, shape: Shape) -> Any:
    """What is applied, put into what is there."""
    kind = shape.kind(applied)
    if kind == "map" and isinstance(live, dict):
        merged = {key: merge(live[key], value, shape.child(key)) if key in live else value
                  for key, value in applied.items()}  # fmt: skip
        return {**{key: merged.get(key, value) for key, value in live.items()}, **merged}
    if kind == "keyed" and isinstance(live, list):
        keys, result = shape.keys(), list(live)
        places = {_ident(item, keys): i for i, item in enumerate(result)}
        for item in applied:
            place = places.get(_ident(item, keys))
            if place is None:
                result.append(item)
            else:
                result[place] = merge(result[place], item, shape.item())
        return result
    if kind == "set" and isinstance(live, list):
        return [*live, *(item for item in applied if item not in live)]
    return applied


def changed(old: Any, new: Any, shape: Shape, at: Path = ()) -> set[Path]:
    """The paths of what is new or different in `new`."""
    if old == new:
        return set()
    kind = shape.kind(new)
    if kind == "map" and isinstance(old, dict) and new:
        found: set[Path] = set()
        for key, value in new.items():
            here, inner = (*at, f"f:{key}"), shape.child(key)
            found |= changed(old[key], value, inner, here) if key in old else fields(value, inner, here)
        return found if at else {path for path in found if path not in _UNOWNED}
    if kind == "keyed" and isinstance(old, list) and new:
        keys, inside = shape.keys(), shape.item()
        held = {_ident(item, keys): item for item in old}
        found = set()
        for item in new:
            here, before = (*at, _ident(item, keys)), held.get(_ident(item, keys))
            found |= {here} | fields(item, inside, here) if before is None else changed(before, item, inside, here)
        return found
    if kind == "set" and isinstance(old, list):
        return {(*at, _value(item)) for item in new if item not in old}
    return fields(new, shape, at)


def without(value: Obj, gone: Iterable[Path], shape: Shape) -> Obj:
    """The object without what stands at these paths; maps and lists that become empty go too."""
    result = copy.deepcopy(value)
    for path in sorted(gone, key=len):
        _remove(result, path, shape)
    return result


def _remove(value: Any, path: Path, shape: Shape) -> bool:
    """True when the container has become empty."""
    step, rest = path[0], path[1:]
    if isinstance(value, dict):
        name = step[2:]
        if name in value and (not rest or _remove(value[name], rest, shape.child(name))):
            del value[name]
    elif isinstance(value, list):
        keys = shape.keys()
        for i, item in enumerate(value):
            same = (
                _value(item) == step if step.startswith("v:") else isinstance(item, dict) and _ident(item, keys) == step
            )
            if same:
                if not rest or _remove(item, rest, shape.item()):
                    del value[i]
                break
    return not value


# -- managedFields


@dataclass(frozen=True, slots=True)
class Owner:
    name: str
    operation: str
    version: str
    sub: str = ""


Owners = dict[Owner, FieldSet]


def read(entries: Iterable[Obj]) -> Owners:
    owners: Owners = {}
    for entry in entries:
        owner = Owner(entry["manager"], entry["operation"], entry["apiVersion"], entry.get("subresource", ""))
        owners[owner] = frozenset(_paths(entry["fieldsV1"]))
    return owners


def _paths(tree: Obj, at: Path = ()) -> Iterable[Path]:
    for step, inner in tree.items():
        if step == ".":
            yield at
        elif inner:
            yield from _paths(inner, (*at, step))
        else:
            yield (*at, step)


def write(owners: Owners, before: Iterable[Obj]) -> list[Obj]:
    """As stored; what has not changed keeps its time."""
    times = {owner: (paths, entry.get("time")) for entry in before for owner, paths in read([entry]).items()}
    found = []
    for owner, paths in owners.items():
        if not paths:
            continue
        old, at = times.get(owner, (None, None))
        entry: Obj = {
            "manager": owner.name,
            "operation": owner.operation,
            "apiVersion": owner.version,
            "time": at if old == paths and at else now(),
            "fieldsType": "FieldsV1",
            "fieldsV1": _tree(paths),
        }
        found.append({**entry, "subresource": owner.sub} if owner.sub else entry)
    return found


def _tree(paths: FieldSet) -> Obj:
    tree: Obj = {}
    for path in sorted(paths):
        node = tree
        for step in path:
            node = node.setdefault(step, {})
    inner = {path[:n] for path in paths for n in range(1, len(path))}
    for path in paths & inner:  # a keyed list's item, of which more is owned
        node = tree
        for step in path:
            node = node[step]
        node["."] = {}
    return _dotted_first(tree)


def _dotted_first(tree: Obj) -> Obj:
    return {key: _dotted_first(tree[key]) for key in sorted(tree)}


def shown(path: Path) -> str:
    """As messages name it: .spec.containers[name="x"].image."""
    text = ""
    for step in path:
        if step.startswith("f:"):
            text += f".{step[2:]}"
        elif step.startswith("k:"):
            values = orjson.loads(step[2:])
            text += "[" + ",".join(f"{key}={orjson.dumps(value).decode()}" for key, value in values.items()) + "]"
        else:
            text += f"[={step[2:]}]"
    return text


def applied(live: Obj | None, body: Obj, owner: Owner, shape: Shape, *, force: bool) -> tuple[Obj, list[Obj]]:
    """(the object as wanted now, its managedFields). Raises ApiError(409) on conflicts that are not forced."""
    entries = ((live or {}).get("metadata") or {}).get("managedFields") or []
    owners = read(entries)
    if live is not None and not entries:
        rest = {key: value for key, value in live.items() if key != "status"}
        owners[Owner(FIRST, UPDATE, owner.version)] = frozenset(fields(rest, shape))
    mine = frozenset(fields(body, shape))
    if live is None:
        return body, write({owner: mine}, ())
    merged = merge(live, body, shape)
    different = changed(live, merged, shape)
    others = {who: paths for who, paths in owners.items() if who != owner}
    clashes = {who: hit for who, paths in others.items() if (hit := paths & different)}
    if clashes and not force:
        raise _conflict(clashes)
    others = {who: paths - clashes.get(who, frozenset()) for who, paths in others.items()}
    lost = owners.get(owner, frozenset()) - mine - frozenset().union(*others.values())
    return without(merged, lost, shape), write({**others, owner: mine}, entries)


def updated(old: Obj, new: Obj, owner: Owner, shape: Shape) -> list[Obj]:
    """managedFields after a write that was no apply: what it changed is the writer's, what it removed nobody's."""
    entries = old["metadata"].get("managedFields") or []
    different = frozenset(changed(old, new, shape))
    there = frozenset(fields(new, shape))
    owners = {who: (paths if who == owner else paths - different) & there for who, paths in read(entries).items()}
    if different:
        owners[owner] = owners.get(owner, frozenset()) | different
    return write(owners, entries)


def _conflict(clashes: Mapping[Owner, FieldSet]) -> ApiError:
    count = sum(map(len, clashes.values()))
    causes, parts = [], []
    for who, paths in sorted(clashes.items(), key=lambda entry: entry[0].name):
        using = f" using {who.version}" if who.operation == UPDATE else ""
        name = f'"{who.name}"{using}' + (f' with subresource "{who.sub}"' if who.sub else "")
        places = sorted(map(shown, paths))
        causes += [{"reason": "FieldManagerConflict", "message": f"conflict with {name}", "field": at} for at in places]
        parts.append(
            f"conflict with {name}: {places[0]}"
            if len(places) == 1
            else f"conflicts with {name}:\n" + "\n".join(f"- {at}" for at in places)
        )
    text = f"Apply failed with {count} conflict{'s' if count > 1 else ''}: " + "\n".join(parts)
    return ApiError(409, "Conflict", text, {"causes": causes})
