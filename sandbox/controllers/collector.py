"""Garbage collection: dependents follow their owners, in the background, the foreground, or are orphaned.

The rules of kube-controller-manager 1.36 (pkg/controller/garbagecollector). Queue keys are (errand, uid).
"""

from __future__ import annotations

from collections import defaultdict

from sandbox.client import ApiError, EventType, Key, Kind, Obj
from sandbox.controllers.catalog import Catalog
from sandbox.controllers.objects import deleting, finalizers, name, namespace, owners, uid
from sandbox.controllers.work import Controller, Shared

ORPHAN, FOREGROUND = "orphan", "foregroundDeletion"


def waits_for_dependents(obj: Obj) -> bool:
    return deleting(obj) and FOREGROUND in finalizers(obj)


def blocks(dependent: Obj, owner: str) -> bool:
    return any(ref.get("uid") == owner and ref.get("blockOwnerDeletion") for ref in owners(dependent))


class GarbageCollector(Controller):
    name = "garbage-collector"
    workers = 4

    def __init__(self, shared: Shared, catalog: Catalog) -> None:
        self.catalog = catalog
        self._items: dict[str, tuple[Kind, Key]] = {}
        self._dependents: defaultdict[str, set[str]] = defaultdict(set)
        super().__init__(shared)

    def setup(self) -> None:
        self.catalog.follow(self._changed)

    # -- the graph

    def _changed(self, kind: Kind, type: EventType, obj: Obj, old: Obj | None) -> None:
        identity = uid(obj)
        before = {ref["uid"] for ref in owners(old)} if old is not None else set()
        if type == "DELETED":
            self._forget(identity, before | {ref["uid"] for ref in owners(obj)})
            return
        if old is not None and owners(old) == owners(obj) and not deleting(obj):
            return
        self._items[identity] = (kind, (namespace(obj), name(obj)))
        after = {ref["uid"] for ref in owners(obj)}
        for owner in before - after:
            self._unlink(identity, owner)
        for owner in after:
            self._dependents[owner].add(identity)
            self.queue.add(("foreground", owner))  # cheap when the owner is not being deleted
        fresh = old is None or before != after
        if after and (fresh or any(not self._alive(owner) for owner in after)):
            self.queue.add(("item", identity))
        if deleting(obj):
            self._deletion_seen(obj)

    def _deletion_seen(self, obj: Obj) -> None:
        if ORPHAN in finalizers(obj):
            self.queue.add(("orphan", uid(obj)))
        if FOREGROUND in finalizers(obj):
            self.queue.add(("foreground", uid(obj)))
            for dependent in self._dependents.get(uid(obj), ()):
                self.queue.add(("item", dependent))

    def _forget(self, identity: str, above: set[str]) -> None:
        self._items.pop(identity, None)
        for owner in above:
            self._unlink(identity, owner)
        for dependent in self._dependents.get(identity, ()):
            self.queue.add(("item", dependent))

    def _unlink(self, dependent: str, owner: str) -> None:
        held = self._dependents.get(owner)
        if held is not None:
            held.discard(dependent)
            if not held:
                del self._dependents[owner]
        self.queue.add(("foreground", owner))

    def _alive(self, identity: str) -> bool:
        found = self._held(identity)
        return found is not None and not deleting(found[1])

    def _held(self, identity: str) -> tuple[Kind, Obj] | None:
        at = self._items.get(identity)
        if at is None or at[0] not in self.catalog.kinds:
            return None
        obj = self.catalog.get(at[0], *at[1])
        return (at[0], obj) if obj is not None and uid(obj) == identity else None

    # -- errands

    async def reconcile(self, key: Key) -> None:
        errand, identity = key
        found = self._held(identity)
        if found is None:
            return
        kind, obj = found
        match errand:
            case "item":
                await self._attempt(kind, obj)
            case "foreground" if waits_for_dependents(obj):
                await self._finish_foreground(kind, obj)
            case "orphan" if deleting(obj) and ORPHAN in finalizers(obj):
                await self._orphan_dependents(kind, obj)
            case _:
                pass

    async def _attempt(self, kind: Kind, obj: Obj) -> None:
        """Delete an object none of whose owners is left; drop references to owners that are gone."""
        if deleting(obj) or not owners(obj):
            return
        solid: list[Obj] = []
        waiting: list[Obj] = []
        dangling: list[Obj] = []
        for ref in owners(obj):
            owner = await self._owner(obj, ref)
            (dangling if owner is None else waiting if waits_for_dependents(owner) else solid).append(ref)
        if solid:
            if dangling or waiting:
                await self._keep_owners(kind, obj, solid)
            return
        if waiting and self._dependents.get(uid(obj)):
            policy = "Foreground"
        elif ORPHAN in finalizers(obj):
            policy = "Orphan"
        else:
            policy = "Foreground" if FOREGROUND in finalizers(obj) else "Background"
        await self.shared.delete(kind, obj, propagation=policy)

    async def _owner(self, obj: Obj, ref: Obj) -> Obj | None:
        """The owner, from what we know or else from the server; a kind nobody serves counts as there."""
        found = self._held(ref["uid"])
        if found is not None:
            return found[1]
        kind = self.catalog.find(ref["apiVersion"], ref["kind"])
        if kind is None:
            return ref | {"metadata": {}}
        try:
            owner = await self.shared.api.get(kind, ref["name"], namespace(obj) if kind.namespaced else None)
        except ApiError as error:
            if error.not_found:
                return None
            raise
        return owner if uid(owner) == ref["uid"] else None

    async def _finish_foreground(self, kind: Kind, obj: Obj) -> None:
        for identity in self._dependents.get(uid(obj), ()):
            dependent = self._held(identity)
            if dependent is not None and blocks(dependent[1], uid(obj)):
                return
        await self._drop_finalizer(kind, obj, FOREGROUND)

    async def _orphan_dependents(self, kind: Kind, obj: Obj) -> None:
        for identity in list(self._dependents.get(uid(obj), ())):
            dependent = self._held(identity)
            if dependent is not None:
                rest = [ref for ref in owners(dependent[1]) if ref["uid"] != uid(obj)]
                await self._keep_owners(*dependent, rest)
        await self._drop_finalizer(kind, obj, ORPHAN)

    async def _keep_owners(self, kind: Kind, obj: Obj, refs: list[Obj]) -> None:
        version = obj["metadata"]["resourceVersion"]
        patch = {"metadata": {"ownerReferences": refs or None, "resourceVersion": version}}
        await self._patch(kind, obj, patch)

    async def _drop_finalizer(self, kind: Kind, obj: Obj, which: str) -> None:
        rest = [one for one in finalizers(obj) if one != which]
        version = obj["metadata"]["resourceVersion"]
        await self._patch(kind, obj, {"metadata": {"finalizers": rest or None, "resourceVersion": version}})

    async def _patch(self, kind: Kind, obj: Obj, patch: Obj) -> None:
        try:
            await self.shared.patch(kind, obj, patch)
        except ApiError as error:
            if not error.not_found:
                raise
