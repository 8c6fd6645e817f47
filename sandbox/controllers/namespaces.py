"""Namespaces: the default ServiceAccount and root certificate of the living, the end of the terminating."""

from __future__ import annotations

from sandbox.client import CONFIGMAPS, NAMESPACES, SERVICEACCOUNTS, ApiError, Key, Obj
from sandbox.controllers.objects import deleting, name, namespace
from sandbox.controllers.work import Controller, Shared

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
    """Every namespace has the certificate authority of the API server in a ConfigMap.

    The text comes from `kube-system`, where the API server's start puts it; without it there is nothing to publish.
    """

    name = "root-ca-cert-publisher"

    def setup(self) -> None:
        self.namespaces = self.shared.caches.of(NAMESPACES)
        self.namespaces.subscribe(lambda type, obj, old: self.queue.add(("", name(obj))) if old is None else None)
        self.maps = self.shared.caches.of(CONFIGMAPS)
        self.maps.subscribe(lambda type, obj, old: self._map_changed(obj))

    def _map_changed(self, obj: Obj) -> None:
        if name(obj) != _ROOT_CA:
            return
        if namespace(obj) == "kube-system":
            for _, space in self.namespaces.objects:
                self.queue.add(("", space))
        else:
            self.queue.add(("", namespace(obj)))

    async def reconcile(self, key: Key) -> None:
        space = self.namespaces.objects.get(key)
        source = self.maps.get(_ROOT_CA, "kube-system")
        if space is None or deleting(space) or source is None or key[1] == "kube-system":
            return
        data = {"ca.crt": (source.get("data") or {}).get("ca.crt", "")}
        held = self.maps.get(_ROOT_CA, key[1])
        if held is not None and held.get("data") == data:
            return
        note = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints."
        meta = {"name": _ROOT_CA, "namespace": key[1], "annotations": {"kubernetes.io/description": note}}
        if held is not None:
            await self.shared.update(CONFIGMAPS, {**held, "data": data})
            return
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
        await self.shared.create(CONFIGMAPS, body)
