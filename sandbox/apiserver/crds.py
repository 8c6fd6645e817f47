"""Custom resources: definitions become resources of the registry, their schemas default, prune and validate."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandbox.apiserver import errors, rules, schema as schemas
from sandbox.apiserver.errors import Cause
from sandbox.apiserver.resources import Resource
from sandbox.apiserver.store import Change
from sandbox.apiserver.times import now
from sandbox.client import Obj

if TYPE_CHECKING:
    from sandbox.apiserver.core import Core

KEY = "customresourcedefinitions.apiextensions.k8s.io"
CLEANUP = "customresourcecleanup.apiextensions.k8s.io"


@dataclass(frozen=True, slots=True)
class CustomVersion:
    """One served version of a CRD."""

    storage_version: str
    schema: Obj | None
    columns: tuple[Obj, ...]
    scale: Obj | None
    status: bool
    selectable: tuple[str, ...]


class CustomTypes:
    """Keeps the registry in step with the CRDs, and CRDs' conditions in step with the registry."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._watched: set[str] = set()
        core.store.on_change(KEY, self._changed)

    # -- objects

    def decode(self, res: Resource, obj: Obj) -> tuple[Obj, list[str]]:
        """The object as far as its schema knows it, and the paths of what was dropped."""
        unknown: list[str] = []
        schema = res.custom.schema if res.custom else None
        return (schemas.prune(schema, obj, unknown) if schema else obj), unknown

    def default(self, res: Resource, obj: Obj) -> None:
        if res.custom and res.custom.schema:
            schemas.default(res.custom.schema, obj)

    def check(self, res: Resource, obj: Obj, sub: str) -> list[Cause]:
        schema = res.custom.schema if res.custom else None
        if not schema:
            return []
        if sub != "status":
            return schemas.validate(schema, obj)
        # The real server looks at the status alone, and so names fields from there.
        found = schemas.validate((schema.get("properties") or {}).get("status") or {}, obj.get("status"))
        return [Cause(cause.reason, cause.message, f"status.{cause.field}") for cause in found]

    def before_create(self, res: Resource, obj: Obj) -> None:
        obj["metadata"]["generation"] = 1
        if res.custom and res.custom.status:
            obj.pop("status", None)

    # -- definitions

    def before_create_crd(self, obj: Obj) -> None:
        versions = (obj.get("spec") or {}).get("versions") or []
        stored = [version["name"] for version in versions if version.get("storage")]
        obj["status"] = {"conditions": None, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": stored[:1]}

    def before_update_crd(self, new: Obj, old: Obj) -> None:
        stored = list((old.get("status") or {}).get("storedVersions") or [])
        for version in new["spec"]["versions"]:
            if version.get("storage") and version["name"] not in stored:
                stored.append(version["name"])
        new["status"] = {**(old.get("status") or {}), "storedVersions": stored}

    def on_delete_crd(self, obj: Obj) -> None:
        message = "CustomResource deletion is in progress"
        _set_condition(obj, "Terminating", "True", "InstanceDeletionPending", message)

    def _changed(self, change: Change) -> None:
        obj = change.new.obj
        spec = obj["spec"]
        group, plural = spec["group"], spec["names"]["plural"]
        if change.type == "DELETED":
            self._core.registry.remove(group, plural)
            self._core.store.end_subscriptions(f"{plural}.{group}")
        elif obj["metadata"].get("deletionTimestamp"):
            self._clean_up(obj)
        elif not (obj.get("status") or {}).get("conditions"):
            self._accept(obj)
        elif _is_true(obj, "Established"):
            self._serve(spec)

    def _serve(self, spec: Obj) -> None:
        registry = self._core.registry
        registry.remove(spec["group"], spec["names"]["plural"])
        storage = next(version["name"] for version in spec["versions"] if version.get("storage"))
        for version in sorted(spec["versions"], key=_preference):
            if version.get("served"):
                registry.add(_resource(spec, version, storage))
        key = f"{spec['names']['plural']}.{spec['group']}"
        if key not in self._watched:
            self._watched.add(key)
            self._core.store.begin(key)
            self._core.store.on_change(key, self._instance_changed)

    def _accept(self, obj: Obj) -> None:
        """Names that nobody else has in the group are accepted; then the resource is served."""
        obj = copy.deepcopy(obj)
        names = obj["spec"]["names"]
        conflict = self._conflict(obj)
        if conflict:
            kind, name = conflict
            _set_condition(obj, "NamesAccepted", "False", kind, f'"{name}" is already in use')
            _set_condition(obj, "Established", "False", "NotAccepted", "not all names are accepted")
        else:
            _set_condition(obj, "NamesAccepted", "True", "NoConflicts", "no conflicts found")
            _set_condition(obj, "Established", "True", "InitialNamesAccepted", "the initial names have been accepted")
            obj["status"]["acceptedNames"] = names
            obj["metadata"]["finalizers"] = [*(obj["metadata"].get("finalizers") or []), CLEANUP]
        self._core.store.put(KEY, obj)

    def _conflict(self, obj: Obj) -> tuple[str, str] | None:
        taken: set[str] = set()
        kinds: set[str] = set()
        for stored in self._core.store.list(KEY):
            other = stored.obj
            if other["metadata"]["name"] == obj["metadata"]["name"] or other["spec"]["group"] != obj["spec"]["group"]:
                continue
            names = (other.get("status") or {}).get("acceptedNames") or {}
            taken |= {names.get("plural", ""), names.get("singular", ""), *(names.get("shortNames") or [])}
            kinds |= {names.get("kind", ""), names.get("listKind", "")}
        wanted = obj["spec"]["names"]
        checks = (
            ("PluralConflict", [wanted["plural"]], taken),
            ("SingularConflict", [wanted.get("singular", "")], taken),
            ("ShortNamesConflict", wanted.get("shortNames") or [], taken),
            ("KindConflict", [wanted["kind"]], kinds),
            ("ListKindConflict", [wanted.get("listKind", "")], kinds),
        )
        return next(((why, name) for why, names, used in checks for name in names if name and name in used), None)

    # -- the end

    def _instance_changed(self, change: Change) -> None:
        if change.type != "DELETED":
            return
        for stored in list(self._core.store.list(KEY)):
            if stored.obj["metadata"].get("deletionTimestamp"):
                self._clean_up(stored.obj)

    def _clean_up(self, crd: Obj) -> None:
        """Delete what is left of the kind; without instances the definition may go."""
        if CLEANUP not in (crd["metadata"].get("finalizers") or []):
            return
        spec = crd["spec"]
        key = f"{spec['names']['plural']}.{spec['group']}"
        res = self._core.registry.by_key(key)
        for stored in list(self._core.store.list(key)):
            meta = stored.obj["metadata"]
            if res is not None and not meta.get("deletionTimestamp"):
                self._core.delete(res, meta.get("namespace", ""), meta["name"], {})
        found = self._core.store.get(KEY, "", crd["metadata"]["name"])
        if found is None or any(True for _ in self._core.store.list(key)):
            return
        obj = found.copy()
        kept = [entry for entry in obj["metadata"]["finalizers"] if entry != CLEANUP]
        obj["metadata"]["finalizers"] = kept
        if kept:
            self._core.store.put(KEY, obj)
        else:
            self._core.store.remove(KEY, obj)


def _preference(version: Obj) -> tuple[int, int, int, str]:
    """GA before beta before alpha, newer before older (apimachinery's version priority)."""
    name = version["name"]
    found = re.fullmatch(r"v(\d+)(?:(alpha|beta)(\d+))?", name)
    if not found:
        return (3, 0, 0, name)
    stage = {None: 0, "beta": 1, "alpha": 2}[found[2]]
    return (stage, -int(found[1]), -int(found[3] or 0), name)


def _is_true(obj: Obj, type: str) -> bool:
    return any(c["type"] == type and c["status"] == "True" for c in obj["status"].get("conditions") or [])


def _set_condition(obj: Obj, type: str, status: str, reason: str, message: str) -> None:
    conditions = [c for c in obj["status"].get("conditions") or [] if c["type"] != type]
    conditions.append(
        {"type": type, "status": status, "lastTransitionTime": now(), "reason": reason, "message": message}
    )
    obj["status"]["conditions"] = conditions


# -- validation of definitions


def _walk(schema: Any, path: str) -> Iterator[tuple[str, Obj]]:
    """Every schema inside a schema, with its path as messages write it."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    properties = schema.get("properties") or {}
    if not isinstance(properties, dict):
        raise errors.bad_request(f"{path}.properties must be an object")
    for name, sub in properties.items():
        yield from _walk(sub, f"{path}.properties[{name}]")
    for key in ("items", "additionalProperties"):
        yield from _walk(schema.get(key), f"{path}.{key}")


_NUMBERS = (
    "minimum",
    "maximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
)
_LISTS = ("required", "enum", "allOf", "anyOf", "oneOf")


def _keywords(schema: Obj, where: str) -> list[Cause]:
    """Keywords whose values are of no use to validation."""
    causes = []
    for key in _NUMBERS:
        value = schema.get(key, 0)
        if not isinstance(value, int | float):
            causes.append(rules.invalid(f"{where}.{key}", value, "must be a number"))
    for key in _LISTS:
        if not isinstance(schema.get(key) or [], list):
            causes.append(rules.invalid(f"{where}.{key}", schema[key], "must be a list"))
    pattern = schema.get("pattern") or ""
    try:
        re.compile(pattern)
    except (re.error, TypeError):
        causes.append(rules.invalid(f"{where}.pattern", pattern, "must be a valid regular expression"))
    return causes


def _structural(schema: Obj, path: str) -> list[Cause]:
    causes = []
    if schema.get("type") != "object":
        causes.append(rules.invalid(f"{path}.type", schema.get("type", ""), "must be object at the root"))
    for where, sub in _walk(schema, path):
        wrong = _keywords(sub, where)
        causes += wrong
        if "x-kubernetes-validations" in sub:
            why = "CEL rules are not supported by the sandbox's API server"
            causes.append(rules.forbidden(f"{where}.x-kubernetes-validations", why))
        free = sub.get(schemas.INT_OR_STRING) or sub.get(schemas.PRESERVE)
        if not sub.get("type") and not free and where != path:
            noun = "array items" if where.endswith(".items") else "object fields"
            causes.append(rules.required(f"{where}.type", f"must not be empty for specified {noun}"))
        if "default" in sub and not wrong:
            causes += [
                Cause(cause.reason, cause.message, f"{where}.default{cause.field and '.' + cause.field}")
                for cause in schemas.validate(sub, sub["default"], "")
            ]
    return causes


def check_crd(obj: Obj) -> list[Cause]:
    """What is wrong with a CustomResourceDefinition."""
    spec = obj["spec"]
    names, group, versions = spec.get("names") or {}, spec.get("group") or "", spec.get("versions") or []
    causes = []
    if obj["metadata"].get("name") != f"{names.get('plural')}.{group}":
        why = 'must be spec.names.plural+"."+spec.group'
        causes.append(rules.invalid("metadata.name", obj["metadata"].get("name"), why))
    causes += [rules.required(f"spec.names.{key}") for key in ("plural", "kind") if not names.get(key)]
    if spec.get("scope") not in ("Cluster", "Namespaced"):
        causes.append(rules.unsupported("spec.scope", spec.get("scope", ""), ("Cluster", "Namespaced")))
    if sum(bool(version.get("storage")) for version in versions) != 1:
        why = "must have exactly one version marked as storage version"
        causes.append(rules.invalid("spec.versions", [v.get("name") for v in versions], why))
    one = len({str(version.get("schema")) for version in versions}) == 1
    for i, version in enumerate(versions):
        at = "spec.validation" if one else f"spec.versions[{i}].schema"
        schema = (version.get("schema") or {}).get("openAPIV3Schema")
        if schema is None:
            causes.append(rules.required(f"spec.versions[{i}].schema.openAPIV3Schema"))
        elif not one or i == 0:
            causes += _structural(schema, f"{at}.openAPIV3Schema")
    return causes


def _resource(spec: Obj, version: Obj, storage: str) -> Resource:
    names = spec["names"]
    subs = version.get("subresources") or {}
    custom = CustomVersion(
        storage_version=storage,
        schema=(version.get("schema") or {}).get("openAPIV3Schema"),
        columns=tuple(version.get("additionalPrinterColumns") or ()),
        scale=subs.get("scale"),
        status="status" in subs,
        selectable=tuple(field["jsonPath"].lstrip(".") for field in version.get("selectableFields") or ()),
    )
    return Resource(
        group=spec["group"],
        version=version["name"],
        plural=names["plural"],
        kind=names["kind"],
        namespaced=spec.get("scope") == "Namespaced",
        short=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()),
        subs=tuple(sub for sub in ("scale", "status") if sub in subs),
        verbs=("delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"),
        singular=names.get("singular") or names["kind"].lower(),
        list_kind=names.get("listKind") or f"{names['kind']}List",
        custom=custom,
    )
