"""What the API server does, without HTTP: create, read, list, update, patch, delete, watch.

Every write is one synchronous step, so nothing can come between its read and its write.
"""

from __future__ import annotations

import base64
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from sandbox.apiserver import conversion, crds, defaults, errors, managed, media, patch, strategy, types, validation
from sandbox.apiserver.authn import MASTER, Identity
from sandbox.apiserver.crds import CustomTypes
from sandbox.apiserver.resources import Registry, Resource
from sandbox.apiserver.selectors import EVERY_FIELD, EVERY_LABEL, FieldSelector, LabelSelector
from sandbox.apiserver.store import Change, ChangeType, Compacted, Store, Stored
from sandbox.apiserver.times import at, now
from sandbox.client import ApiError, Obj
from sandbox.options import COMPRESSED, Clocks

SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # no vowels: no words; as the real server's
_SYSTEM_META = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink")
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"


@dataclass(frozen=True, slots=True)
class Write:
    """How a write is meant, besides its body."""

    user: Identity = MASTER
    dry_run: bool = False
    validation: str = "Warn"  # of unknown fields: Ignore, Warn or Strict
    warnings: list[str] = field(default_factory=list)  # for the client, filled by the write
    manager: str = "unknown"  # who shall own the fields that change
    managed: list[Obj] | None = None  # managedFields, settled already: by an apply


@dataclass(frozen=True, slots=True)
class Query:
    """What a list or watch asks for."""

    labels: LabelSelector = EVERY_LABEL
    fields: FieldSelector = EVERY_FIELD

    def matches(self, obj: Obj) -> bool:
        return self.labels.matches(obj["metadata"].get("labels")) and self.fields.matches(obj)


ALL = Query()
BY_MASTER = Write(validation="Ignore")
_DROP_EMPTY = (
    "labels",
    "annotations",
    "finalizers",
    "ownerReferences",
    "generateName",
    "uid",
    "resourceVersion",
    "namespace",
    "creationTimestamp",
)


@dataclass(frozen=True, slots=True)
class Page:
    items: Sequence[Stored]
    version: int
    cont: str = ""
    remaining: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    type: ChangeType
    stored: Stored


def _shape(res: Resource) -> managed.Shape:
    """What server-side apply must know of a resource's type."""
    return managed.Shape(schema=(res.custom.schema or {}) if res.custom else None)


Webhooks = Callable[[Obj, Obj | None], None]  # a custom object, and what it replaces


class Core:
    def __init__(self, clocks: Clocks = COMPRESSED, webhooks: Webhooks | None = None) -> None:
        """`webhooks` sees every custom object before it is checked; it may change or refuse it (ApiError)."""
        self.clocks = clocks
        self._webhooks = webhooks
        self.kubelet_scheme = (
            "http"  # or "https": certificates of kubelets are taken as they come, as the real one does
        )
        self.store = Store()
        self.registry = Registry()
        self.custom = CustomTypes(self)
        self._snapshots: dict[str, tuple[Sequence[Stored], int]] = {}

    # -- reading

    def get(self, res: Resource, namespace: str, name: str) -> Stored:
        found = self.store.get(res.key, namespace, name)
        if found is None:
            raise errors.not_found(res.group, res.plural, name)
        return found

    def select(self, res: Resource, namespace: str | None, query: Query = ALL) -> list[Stored]:
        if query is ALL:
            return list(self.store.list(res.key, namespace))
        if query.fields.name is not None and namespace is not None:
            found = self.store.get(res.key, namespace, query.fields.name)
            return [found] if found and query.matches(found.obj) else []
        return [stored for stored in self.store.list(res.key, namespace) if query.matches(stored.obj)]

    def page(self, res: Resource, namespace: str | None, query: Query, limit: int, cont: str) -> Page:
        """One page of a list; pages that follow come from the state of the first."""
        if cont:
            items, version, start = self._continued(cont)
        else:
            items, version, start = self.select(res, namespace, query), self.store.version, 0
        if not limit or start + limit >= len(items):
            return Page(items[start:] if start else items, version)
        ident = (cont and _decode_continue(cont)["id"]) or secrets.token_hex(8)
        self._snapshots[ident] = (items, version)
        while len(self._snapshots) > 64:
            del self._snapshots[next(iter(self._snapshots))]
        end = start + limit
        token = base64.urlsafe_b64encode(orjson.dumps({"id": ident, "start": end})).decode()
        exact = query.labels.requirements == () and query.fields.terms == ()
        return Page(items[start:end], version, token, len(items) - end if exact else None)

    def _continued(self, cont: str) -> tuple[Sequence[Stored], int, int]:
        token = _decode_continue(cont)
        if token["id"] not in self._snapshots:
            raise errors.expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new "
                "list without the continue parameter, or use the continue token in this response to retrieve the "
                "remainder of the results. Continuing with the provided token results in an inconsistent list - "
                "objects that were created, modified, or deleted between the time the first chunk was returned and "
                "now may show up in the list."
            )
        items, version = self._snapshots[token["id"]]
        return items, version, token["start"]

    async def watch(self, res: Resource, namespace: str | None, query: Query, since: int) -> AsyncIterator[list[Event]]:
        """Batches of what happens after `since`. Raises ApiError(410) when that is too long ago."""
        try:
            subscription = self.store.subscribe(res.key, since)
        except Compacted as gone:
            raise errors.expired(f"too old resource version: {since} ({gone.oldest})") from gone
        try:
            while True:
                changes = await subscription.take()
                events = [event for change in changes if (event := _seen(change, namespace, query))]
                if events:
                    yield events
                if subscription.ended:
                    return
        finally:
            self.store.unsubscribe(subscription)

    # -- writing

    def create(self, res: Resource, namespace: str, body: Obj, write: Write = BY_MASTER) -> Stored:
        obj = self._received(res, namespace, body, write)
        meta = obj["metadata"]
        if res.namespaced:
            self._check_namespace(res, namespace, meta)
        name = meta.get("name")
        if not name and meta.get("generateName"):
            name = self._generate(res, namespace, meta["generateName"])
            meta["name"] = name
        if meta.get("resourceVersion"):
            raise errors.internal("resourceVersion should not be set on objects to be created")
        for key in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"):
            meta.pop(key, None)
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = now()
        strategy.before_create(self, res, obj, write.user)
        defaults.apply(res, obj, self)
        self._admit(res, obj)
        validation.check_create(res, obj, self._check_kind(res, obj))
        strategy.admit_create(self, res, obj, write.user)
        if self.store.get(res.key, namespace, meta["name"]) is not None:
            raise self._exists(res, namespace, meta["name"])
        obj = _ordered(obj)
        if write.dry_run:
            return Stored(obj, orjson.dumps(obj), 0)
        return self.store.put(res.key, obj)

    def _exists(self, res: Resource, namespace: str, name: str) -> ApiError:
        error = errors.already_exists(res.group, res.plural, name)
        if self.get(res, namespace, name).obj["metadata"].get("deletionTimestamp"):
            return ApiError(error.code, error.reason, f"object is being deleted: {error}", error.details)
        return error

    def _received(self, res: Resource, namespace: str, body: Obj, write: Write) -> Obj:
        """The body in the form in which it is stored: types checked, unknown fields dropped, its namespace settled."""
        obj = conversion.to_storage(res, self._decode(res, body, write))
        meta = {key: value for key, value in (obj.get("metadata") or {}).items() if value or key not in _DROP_EMPTY}
        meta.pop("managedFields", None)
        if write.managed is not None:
            meta["managedFields"] = write.managed
        if res.namespaced:
            if meta.setdefault("namespace", namespace) != namespace:
                raise errors.bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request"
                )
        elif meta.pop("namespace", None):
            raise errors.bad_request("namespace may not be set on a cluster-scoped object")
        obj["metadata"] = meta
        return obj

    def _known(self, res: Resource, body: Obj) -> tuple[Obj, list[str]]:
        """The body as far as its type knows it, and the paths of what it does not know."""
        body = {**body, "kind": res.kind, "apiVersion": res.api_version}
        if res.custom is None:
            return types.decode(res.api_version, res.kind, body)
        obj, unknown = self.custom.decode(res, body)
        meta, more = types.decode_meta(res.version, res.kind, obj.get("metadata") or {})
        return {**obj, "metadata": meta}, [*more, *unknown]

    def _decode(self, res: Resource, body: Obj, write: Write) -> Obj:
        obj, unknown = self._known(res, body)
        if unknown and write.validation == "Strict":
            listed = ", ".join(f'unknown field "{entry}"' for entry in unknown)
            raise errors.Undecodable(res.version, res.kind, f"strict decoding error: {listed}")
        if write.validation != "Ignore":
            write.warnings.extend(f'unknown field "{entry}"' for entry in unknown)
        return obj

    def _check_namespace(self, res: Resource, namespace: str, meta: Obj) -> None:
        found = self.store.get("namespaces", "", namespace)
        if found is None:
            raise errors.not_found("", "namespaces", namespace)
        if found.obj["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            error = errors.forbidden(res.group, res.plural, meta.get("name") or "", why)
            cause = {
                "reason": "NamespaceTerminating",
                "message": f"namespace {namespace} is being terminated",
                "field": "metadata.namespace",
            }
            error.details["causes"] = [cause]
            raise error

    def _generate(self, res: Resource, namespace: str, prefix: str) -> str:
        while True:
            name = prefix[:58] + "".join(secrets.choice(SUFFIX_ALPHABET) for _ in range(5))
            if self.store.get(res.key, namespace, name) is None:
                return name

    def update(self, res: Resource, namespace: str, name: str, body: Obj, write: Write, sub: str = "") -> Stored:
        old = self.store.get(res.key, namespace, name)
        if old is None:
            if not sub and strategy.creates_on_update(res):
                return self.create(res, namespace, body, write)
            raise errors.not_found(res.group, res.plural, name)
        new = self._received(res, namespace, body, write)
        meta = new["metadata"]
        if not meta.get("name"):
            raise errors.bad_request(
                f"the name of the object ({name} based on URL) was undeterminable: name must be provided"
            )
        if meta["name"] != name:
            raise errors.bad_request(
                f"the name of the object ({meta['name']}) does not match the name on the URL ({name})"
            )
        version = meta.get("resourceVersion")
        if not version and strategy.needs_version(res):
            cause = errors.Cause(
                "FieldValueInvalid", "Invalid value: 0: must be specified for an update", "metadata.resourceVersion"
            )
            raise errors.invalid(res.group, res.plural, name, [cause])
        if version and not version.isdigit():
            raise errors.internal(f'strconv.ParseUint: parsing "{version}": invalid syntax')
        if meta.get("uid") and meta["uid"] != old.obj["metadata"]["uid"]:
            raise _uid_mismatch(res, namespace, name, meta["uid"], old.obj["metadata"]["uid"])
        if version and version not in ("0", str(old.version)):
            raise errors.stale(res.group, res.plural, name)
        return self._replace(res, old, new, write, sub)

    def edit(
        self, res: Resource, namespace: str, name: str, change: Callable[[Obj], Any], write: Write, sub: str = ""
    ) -> Stored:
        """Read, change, write: for patches and the server's own changes. `change` edits or returns the new object."""
        old = self.get(res, namespace, name)
        fresh = old.copy()
        changed = change(fresh)
        return self.update(res, namespace, name, fresh if changed is None else changed, write, sub)

    def patch(
        self,
        res: Resource,
        namespace: str,
        name: str,
        kind: str,
        body: Any,
        write: Write = BY_MASTER,
        sub: str = "",
    ) -> Stored:
        old = self.get(res, namespace, name)
        shown = conversion.from_storage(res, old.copy())
        new = patch.apply(kind, shown, body, custom=res.custom is not None)
        if isinstance(new.get("metadata"), dict):
            new["metadata"].setdefault("name", name)
            new["metadata"].setdefault("resourceVersion", str(old.version))
        try:
            media.check_kind(self.registry, res, new)
            return self.update(res, namespace, name, new, write, sub)
        except errors.Undecodable as wrong:
            raise wrong.in_patch(new) from wrong

    def apply(
        self, res: Resource, namespace: str, name: str, body: Obj, write: Write, sub: str = "", *, force: bool = False
    ) -> tuple[Stored, bool]:
        """Server-side apply: (the object, whether it is new). Raises ApiError(409) on conflicts."""
        meta = body.get("metadata") or {}
        if meta.get("managedFields"):
            raise errors.bad_request("metadata.managedFields must be nil")
        if meta.setdefault("name", name) != name:
            text = f"the name of the object ({meta['name']}) does not match the name on the URL ({name})"
            raise errors.bad_request(text)
        old = self.store.get(res.key, namespace, name)
        if old is None and sub:
            raise errors.not_found(res.group, res.plural, name)
        wanted = self._applicable(res, {**body, "metadata": meta}, sub)
        shown = conversion.from_storage(res, old.copy()) if old else None
        owner = managed.Owner(write.manager, managed.APPLY, res.api_version, sub)
        merged, entries = managed.applied(shown, wanted, owner, _shape(res), force=force)
        write = replace(write, managed=entries)
        if old is None:
            return self.create(res, namespace, merged, write), True
        merged["metadata"]["resourceVersion"] = meta.get("resourceVersion") or str(old.version)
        return self.update(res, namespace, name, merged, write, sub), False

    def _applicable(self, res: Resource, body: Obj, sub: str) -> Obj:
        """What is applied, its types checked: unknown fields are refused, whatever the validation asked for."""
        found, unknown = self._known(res, body)
        if unknown:
            at = f"{(body['metadata'].get('namespace') or '')}/{body['metadata']['name']}"
            where = f"{at}; {res.api_version}, Kind={res.kind}"
            raise errors.internal(
                f"failed to create typed patch object ({where}): .{unknown[0]}: field not declared in schema"
            )
        if sub == "status":
            return {key: value for key, value in found.items() if key in ("kind", "apiVersion", "metadata", "status")}
        return {key: value for key, value in found.items() if key != "status" or "status" not in res.subs}

    def _replace(self, res: Resource, old: Stored, new: Obj, write: Write, sub: str) -> Stored:
        meta, before = new["metadata"], old.obj["metadata"]
        for key in _SYSTEM_META:
            meta.pop(key, None)
            if key in before:
                meta[key] = before[key]
        meta["resourceVersion"] = before["resourceVersion"]
        new = strategy.before_update(self, res, new, old.obj, sub)
        defaults.apply(res, new, self)
        if not sub:
            self._admit(res, new, old.obj)
        validation.check_update(res, new, old.obj, sub, self._check_kind(res, new, sub))
        strategy.admit_update(self, res, new, old.obj, write.user, sub)
        if write.managed is None and before.get("managedFields"):
            owner = managed.Owner(write.manager, managed.UPDATE, res.api_version, sub)
            meta = new["metadata"]
            meta["managedFields"] = managed.updated(old.obj, new, owner, _shape(res))
        new = _ordered(new)
        if new == old.obj:
            return old
        strategy.count_generation(res, new, old.obj, sub)
        if write.dry_run:
            return Stored(new, orjson.dumps(new), old.version)
        if self._is_finished(res, new):
            gone = self.store.remove(res.key, new)
            return _with_version(new, gone.version)
        return self.store.put(res.key, new)

    def _admit(self, res: Resource, obj: Obj, old: Obj | None = None) -> None:
        if res.custom is not None and self._webhooks is not None:
            self._webhooks(obj, old)

    def _check_kind(self, res: Resource, obj: Obj, sub: str = "") -> list[errors.Cause]:
        if res.custom is not None:
            return self.custom.check(res, obj, sub)
        return crds.check_crd(obj) if res.key == crds.KEY else []

    def _is_finished(self, res: Resource, obj: Obj) -> bool:
        """A deletion that only waited for finalizers, and has none left."""
        meta = obj["metadata"]
        if not meta.get("deletionTimestamp") or meta.get("finalizers") or meta.get("deletionGracePeriodSeconds"):
            return False
        return not (res.key == "namespaces" and (obj.get("spec") or {}).get("finalizers"))

    # -- deleting

    def delete(
        self, res: Resource, namespace: str, name: str, options: Obj, write: Write = BY_MASTER
    ) -> tuple[Stored, bool]:
        """Delete or begin to; returns the last state and whether the object is gone."""
        old = self.get(res, namespace, name)
        self.check_preconditions(res, old, options.get("preconditions") or {})
        strategy.admit_delete(res, old.obj)
        obj = old.copy()
        meta = obj["metadata"]
        self._set_propagation(res, obj, options)
        grace = strategy.grace(res, obj, options.get("gracePeriodSeconds"))
        waits = bool(meta.get("finalizers")) or (res.key == "namespaces" and bool(obj["spec"].get("finalizers")))
        if meta.get("deletionTimestamp") and not self._hastens(meta, grace, waits):
            return self._keep(res, old, obj, write), False
        if not grace and not waits and res.key != "pods":
            version = old.version if write.dry_run else self.store.remove(res.key, obj).version
            return _with_version(obj, version), True
        started = meta.get("deletionTimestamp")
        if not started or grace < meta.get("deletionGracePeriodSeconds", 0):
            meta["deletionTimestamp"] = at(grace)
            meta["deletionGracePeriodSeconds"] = grace
        if not started and "generation" in meta:
            meta["generation"] += 1
        if not grace and not waits:
            self._keep(res, old, obj, write)  # watchers see the end announced, as a MODIFIED
            version = old.version if write.dry_run else self.store.remove(res.key, obj).version
            return _with_version(obj, version), True
        strategy.on_delete(self, res, obj)
        return self._keep(res, old, obj, write), False

    @staticmethod
    def _hastens(meta: Obj, grace: int, waits: bool) -> bool:
        left = meta.get("deletionGracePeriodSeconds", 0)
        return grace < left or (not waits and not grace)

    def _keep(self, res: Resource, old: Stored, obj: Obj, write: Write) -> Stored:
        if obj == old.obj:
            return old
        obj = _ordered(obj)
        if write.dry_run:
            return Stored(obj, orjson.dumps(obj), old.version)
        return self.store.put(res.key, obj)

    @staticmethod
    def check_preconditions(res: Resource, old: Stored, wanted: Obj) -> None:
        meta = old.obj["metadata"]
        for key, what, fate in (
            ("uid", "UID", "deleted and then recreated"),
            ("resourceVersion", "ResourceVersion", "modified"),
        ):
            asked = wanted.get(key)
            if asked and asked != meta[key]:
                why = (
                    f"the {what} in the precondition ({asked}) does not match the {what} in record ({meta[key]}). "
                    f"The object might have been {fate}"
                )
                raise errors.conflict(res.group, res.kind, meta["name"], why)

    @staticmethod
    def _set_propagation(res: Resource, obj: Obj, options: Obj) -> None:
        """Foreground and orphan deletion are finalizers that the garbage collector removes."""
        policy = options.get("propagationPolicy")
        if options.get("orphanDependents") or (not policy and res.kind == "Job" and res.custom is None):
            policy = "Orphan"  # what batch/v1 does with Jobs unless told otherwise
        if not policy:
            return
        meta = obj["metadata"]
        kept = [entry for entry in meta.get("finalizers") or [] if entry not in (FOREGROUND, ORPHAN)]
        if policy == "Foreground":
            kept.append(FOREGROUND)
        elif policy == "Orphan":
            kept.append(ORPHAN)
        if kept:
            meta["finalizers"] = kept
        else:
            meta.pop("finalizers", None)

    def delete_all(
        self, res: Resource, namespace: str | None, query: Query, options: Obj, write: Write
    ) -> list[Stored]:
        found = self.select(res, namespace, query)
        for stored in found:
            meta = stored.obj["metadata"]
            try:
                self.delete(res, meta.get("namespace", ""), meta["name"], options, write)
            except ApiError as error:
                if not error.not_found:
                    raise
        return found


def _decode_continue(token: str) -> Obj:
    raw = b""
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        decoded = orjson.loads(raw)
    except ValueError as wrong:
        first = f"'\\x{raw[0]:02x}'" if raw and not 32 <= raw[0] < 127 else repr(chr(raw[0])) if raw else "''"
        raise errors.bad_request(
            f"invalid continue token: continue key is not valid: invalid character {first} looking for beginning of "
            "value"
        ) from wrong
    if not isinstance(decoded, dict) or not {"id", "start"} <= decoded.keys():
        raise errors.bad_request("invalid continue token: continue key is not valid")
    return decoded


def _uid_mismatch(res: Resource, namespace: str, name: str, wanted: str, have: str) -> ApiError:
    key = "/".join(filter(None, ("/registry", res.plural, namespace, name)))
    why = (
        f"StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: Precondition "
        f"failed: UID in precondition: {wanted}, UID in object meta: {have}"
    )
    return errors.conflict(res.group, res.plural, name, why)


def _with_version(obj: Obj, version: int) -> Stored:
    """The last sight of an object that is gone."""
    obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(version)}}
    return Stored(obj, orjson.dumps(obj), version)


def _seen(change: Change, namespace: str | None, query: Query) -> Event | None:
    """A change as a watch with this selector sees it: entering is ADDED, leaving is DELETED."""
    if namespace is not None and change.new.obj["metadata"].get("namespace", "") != namespace:
        return None
    if query is ALL:
        return Event(change.type, change.new)
    had = change.old is not None and query.matches(change.old.obj)
    has = change.type != "DELETED" and query.matches(change.new.obj)
    if has:
        return Event("MODIFIED" if had else "ADDED", change.new)
    if not had:
        return None
    if change.type == "DELETED" or change.old is None:
        return Event("DELETED", change.new)
    last = change.old.copy()  # as it was while it still matched, at the version of the change
    last["metadata"]["resourceVersion"] = str(change.version)
    return Event("DELETED", replace(change.old, obj=last, raw=orjson.dumps(last), version=change.version))


_ORDER = ("kind", "apiVersion", "metadata", "spec", "status")


def _ordered(obj: Obj) -> Obj:
    """Keys in the order in which the real server serves them; lists cut off `kind` and `apiVersion`."""
    head = {key: obj[key] for key in _ORDER if key in obj}
    return {**head, **{key: value for key, value in obj.items() if key not in head}}
