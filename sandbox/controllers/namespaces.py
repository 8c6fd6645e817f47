"""Namespaces: the default ServiceAccount and root certificate of the living, the end of the terminating."""

from __future__ import annotations

from collections import Counter

from sandbox.client import (
    CONFIGMAPS,
    EVENTS,
    NAMESPACES,
    PODS,
    SERVICEACCOUNTS,
    ApiError,
    EventType,
    Key,
    Kind,
    Obj,
)
from sandbox.controllers.catalog import Catalog
from sandbox.controllers.objects import conditions, deleting, finalizers, name, namespace, seconds_since, stamp
from sandbox.controllers.work import Controller, Shared
from sandbox.options import REAL, Clocks

_ROOT_CA = "kube-root-ca.crt"


class ServiceAccounts(Controller):
    """Every namespace that is not terminating has a ServiceAccount `default`."""

    name = "serviceaccount"

    def setup(self) -> None:
        self.namespaces = self.shared.caches.of(NAMESPACES)
        self.namespaces.subscribe(lambda type, obj, old: self.queue.add(("", name(obj))) if old is None else None)
        self.accounts = self.shared.caches.of(SERVICEACCOUNTS)
        self.accounts.subscribe(
            lambda type, obj, old: self.queue.add(("", namespace(obj))) if type == "DELETED" else None
        )

    async def reconcile(self, key: Key) -> None:
        space = self.namespaces.objects.get(key)
        if space is None or deleting(space) or self.accounts.get("default", key[1]) is not None:
            return
        account: Obj = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": key[1]},
        }
        await create_once(self.shared, account)


async def create_once(shared: Shared, account: Obj) -> None:
    try:
        await shared.create(SERVICEACCOUNTS, account)
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise


class RootCertificates(Controller):
    """Every namespace has the API server's certificate authority (PEM) in a ConfigMap; pods mount it."""

    name = "root-ca-cert-publisher"

    def __init__(self, shared: Shared, root_ca: str) -> None:
        self._data = {"ca.crt": root_ca}
        super().__init__(shared)

    def setup(self) -> None:
        self.namespaces = self.shared.caches.of(NAMESPACES)
        self.namespaces.subscribe(lambda type, obj, old: self.queue.add(("", name(obj))) if old is None else None)
        self.maps = self.shared.caches.of(CONFIGMAPS)
        self.maps.subscribe(
            lambda type, obj, old: self.queue.add(("", namespace(obj))) if name(obj) == _ROOT_CA else None
        )

    async def reconcile(self, key: Key) -> None:
        space = self.namespaces.objects.get(key)
        if space is None or deleting(space):
            return
        held = self.maps.get(_ROOT_CA, key[1])
        if held is not None:
            if held.get("data") != self._data:
                await self.shared.update(CONFIGMAPS, {**held, "data": self._data})
            return
        note = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints."
        meta = {"name": _ROOT_CA, "namespace": key[1], "annotations": {"kubernetes.io/description": note}}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": self._data}
        await self.shared.create(CONFIGMAPS, body)


# -- termination


def remaining_conditions(left: dict[Kind, list[Obj]], held: list[Obj]) -> list[Obj]:
    """The conditions of a terminating namespace that still holds these objects."""
    many = sorted(f"{kind.plural}.{kind.group} has {len(found)} resource instances" for kind, found in left.items())
    tokens = Counter(token for found in left.values() for obj in found for token in finalizers(obj))
    waits = sorted(f"{token} in {count} resource instances" for token, count in tokens.items())
    fresh = [
        ("NamespaceDeletionDiscoveryFailure", "", "ResourcesDiscovered", "All resources successfully discovered"),
        ("NamespaceDeletionGroupVersionParsingFailure", "", "ParsedGroupVersions",
         "All legacy kube types successfully parsed"),
        ("NamespaceDeletionContentFailure", "", "ContentDeleted",
         "All content successfully deleted, may be waiting on finalization"),
        ("NamespaceContentRemaining", many, "SomeResourcesRemain", "Some resources are remaining: " + ", ".join(many))
        if many
        else ("NamespaceContentRemaining", "", "ContentRemoved", "All content successfully removed"),
        ("NamespaceFinalizersRemaining", waits, "SomeFinalizersRemain",
         "Some content in the namespace has finalizers remaining: " + ", ".join(waits))
        if waits
        else ("NamespaceFinalizersRemaining", "", "ContentHasNoFinalizers",
              "All content-preserving finalizers finished"),
    ]  # fmt: skip
    before = {c["type"]: c for c in held}
    made = []
    for type, given, reason, message in fresh:
        status = "True" if given else "False"
        old = before.get(type) or {}
        since = old["lastTransitionTime"] if old.get("status") == status else stamp()
        made.append({
            "type": type,
            "status": status,
            "lastTransitionTime": since,
            "reason": reason,
            "message": message,
        })  # fmt: skip
    return made


class Termination(Controller):
    """Empties terminating namespaces, pods first, and releases them once nothing is left."""

    name = "namespace"
    _AGAIN = 1.0  # seconds; changes of its contents come sooner
    _GRACE = 5.0  # seconds before the first look, at real clocks

    def __init__(self, shared: Shared, catalog: Catalog, clocks: Clocks) -> None:
        self.catalog = catalog
        self._grace = self._GRACE * clocks.lease_renew / REAL.lease_renew
        super().__init__(shared)

    def setup(self) -> None:
        self.namespaces = self.shared.caches.of(NAMESPACES)
        self.namespaces.subscribe(self._namespace_changed)
        self.catalog.follow(self._content_changed)

    def _namespace_changed(self, type: EventType, space: Obj, old: Obj | None) -> None:
        if deleting(space) and type != "DELETED":
            self.queue.add_after(("", name(space)), max(0.0, self._left(space)))

    def _left(self, space: Obj) -> float:
        """Seconds until the first look."""
        return self._grace - seconds_since(space["metadata"]["deletionTimestamp"])

    def _content_changed(self, kind: Kind, type: EventType, obj: Obj, old: Obj | None) -> None:
        space = self.namespaces.get(namespace(obj)) if namespace(obj) else None
        if space is not None and deleting(space) and self._left(space) <= 0:
            self.queue.add(("", namespace(obj)))

    async def reconcile(self, key: Key) -> None:
        space = self.namespaces.objects.get(key)
        if space is None or not deleting(space) or not (space.get("spec") or {}).get("finalizers"):
            return
        left = await self._empty(key[1])
        status = {**(space.get("status") or {}), "conditions": remaining_conditions(left, conditions(space))}
        if left:
            if status != space.get("status"):
                await self.shared.status(NAMESPACES, space, status)
            self.queue.add_after(key, self._AGAIN)
            return
        rest = [one for one in space["spec"]["finalizers"] if one != "kubernetes"]
        await self.shared.update(NAMESPACES, {**space, "spec": {**space["spec"], "finalizers": rest}}, sub="finalize")

    async def _empty(self, space: str) -> dict[Kind, list[Obj]]:
        """Delete what is there; returns what still is. Other kinds wait for the pods to be gone."""
        pods = await self._delete_all(PODS, space)
        if pods:
            return {PODS: pods}
        left = {}
        for kind in (*sorted(self.catalog.kinds, key=Kind.path), EVENTS):
            if not kind.namespaced or kind == PODS:
                continue
            found = await self._delete_all(kind, space)
            if found:
                left[kind] = found
        return left

    async def _delete_all(self, kind: Kind, space: str) -> list[Obj]:
        try:
            found, _ = await self.shared.api.list(kind, space)
            for obj in found:
                if not deleting(obj):
                    await self._delete(kind, obj)
            return (await self.shared.api.list(kind, space))[0] if found else []
        except ApiError as error:
            if error.not_found:  # the kind itself has gone
                return []
            raise

    async def _delete(self, kind: Kind, obj: Obj) -> None:
        if kind == EVENTS:  # nobody follows events
            await self.shared.api.delete(kind, name(obj), namespace(obj))
        else:
            await self.shared.delete(kind, obj, propagation="Background")
