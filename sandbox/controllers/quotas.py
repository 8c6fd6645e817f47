"""ResourceQuotas: what of them is used, in their status. The API server refuses by itself."""

from __future__ import annotations

from collections.abc import Iterable

from sandbox import quota
from sandbox.client import EventType, Key, Kind, Obj
from sandbox.controllers.catalog import QUOTAS, Catalog
from sandbox.controllers.objects import deleting, finished, key, namespace
from sandbox.controllers.work import Controller, Shared


class ResourceQuotas(Controller):
    name = "resourcequota"

    def __init__(self, shared: Shared, catalog: Catalog) -> None:
        self.catalog = catalog
        super().__init__(shared)

    def setup(self) -> None:
        self.quotas = self.watch_own(QUOTAS)
        self.catalog.follow(self._changed)

    def _changed(self, kind: Kind, type: EventType, obj: Obj, old: Obj | None) -> None:
        if type == "MODIFIED" and old is not None and finished(old) == finished(obj):
            return
        for held in self.quotas.by("namespace", namespace(obj)) if namespace(obj) else ():
            self.queue.add(key(held))

    async def reconcile(self, key: Key) -> None:
        found = self.quotas.objects.get(key)
        if found is None or deleting(found):
            return
        hard = (found.get("spec") or {}).get("hard") or {}

        def listed(plural: str) -> Iterable[Obj]:
            name, _, group = plural.partition(".")
            kind = next((kind for kind in self.catalog.kinds if (kind.plural, kind.group) == (name, group)), None)
            return self.shared.caches.of(kind).by("namespace", key[0]) if kind else ()

        use = quota.used(hard, listed)
        status = {"hard": hard, "used": {name: quota.text(value, hard[name]) for name, value in use.items()}}
        if status != found.get("status"):
            await self.shared.status(QUOTAS, found, status)
