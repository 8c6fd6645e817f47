"""Every kind of object there is: the built-in ones and those that CustomResourceDefinitions add."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sandbox.client import (
    CONFIGMAPS,
    CONTROLLERREVISIONS,
    CRDS,
    DAEMONSETS,
    DEPLOYMENTS,
    ENDPOINTS,
    ENDPOINTSLICES,
    HPAS,
    JOBS,
    LEASES,
    NAMESPACES,
    NODES,
    PDBS,
    PODS,
    REPLICASETS,
    SECRETS,
    SERVICEACCOUNTS,
    SERVICES,
    STATEFULSETS,
    Api,
    ApiError,
    EventType,
    Kind,
    Obj,
)
from sandbox.controllers.objects import deleting, is_true, uid
from sandbox.controllers.work import Caches

log = logging.getLogger(__name__)

_RBAC = "rbac.authorization.k8s.io"
CRONJOBS = Kind("batch", "v1", "cronjobs", "CronJob")
CLAIMS = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
QUOTAS = Kind("", "v1", "resourcequotas", "ResourceQuota")
_ALWAYS = (
    PODS, NODES, NAMESPACES, SERVICES, ENDPOINTS, CONFIGMAPS, SECRETS, SERVICEACCOUNTS, DEPLOYMENTS, REPLICASETS,
    STATEFULSETS, DAEMONSETS, CONTROLLERREVISIONS, JOBS, LEASES, ENDPOINTSLICES, PDBS, CRDS,
)  # fmt: skip
_IF_SERVED = (
    HPAS,
    CRONJOBS,
    CLAIMS,
    QUOTAS,
    Kind("", "v1", "limitranges", "LimitRange"),
    Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    Kind(_RBAC, "v1", "roles", "Role"),
    Kind(_RBAC, "v1", "rolebindings", "RoleBinding"),
    Kind(_RBAC, "v1", "clusterroles", "ClusterRole", namespaced=False),
    Kind(_RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
)

Follower = Callable[[Kind, EventType, Obj, Obj | None], None]


class Catalog:
    """Follows all objects of all kinds, telling its followers of every change."""

    def __init__(self, api: Api, caches: Caches) -> None:
        self._api, self._caches = api, caches
        self._followers: list[Follower] = []
        self._custom: dict[str, tuple[Kind, ...]] = {}  # by the CRD's uid
        self.kinds: set[Kind] = set()

    def follow(self, follower: Follower) -> None:
        """Call before `start`."""
        self._followers.append(follower)

    async def start(self) -> None:
        """Begin with the built-in kinds; the custom ones come as their definitions are established."""
        for kind in _ALWAYS:
            self._add(kind)
        for kind in _IF_SERVED:
            try:
                await self._api.list(kind)
            except ApiError as error:
                if not error.not_found:
                    raise
                log.debug("%s are not served here", kind.plural)
            else:
                self._add(kind)
        self._caches.of(CRDS).subscribe(self._definition_changed)
        await asyncio.gather(*(self._caches.of(kind).synced.wait() for kind in list(self.kinds)))

    def find(self, api_version: str, kind: str) -> Kind | None:
        """The kind an owner reference names; of custom kinds any served version will do."""
        group = api_version.rpartition("/")[0]
        return next((k for k in self.kinds if k.kind == kind and k.group == group), None)

    def get(self, kind: Kind, namespace: str, name: str) -> Obj | None:
        return self._caches.of(kind).objects.get((namespace if kind.namespaced else "", name))

    def _add(self, kind: Kind) -> None:
        if kind in self.kinds:
            return
        self.kinds.add(kind)
        self._caches.of(kind).subscribe(lambda type, obj, old: self._tell(kind, type, obj, old))

    def _tell(self, kind: Kind, type: EventType, obj: Obj, old: Obj | None) -> None:
        for follower in self._followers:
            follower(kind, type, obj, old)

    def _definition_changed(self, type: EventType, crd: Obj, old: Obj | None) -> None:
        served = () if type == "DELETED" or deleting(crd) or not is_true(crd, "Established") else custom_kinds(crd)
        before = self._custom.get(uid(crd), ())
        for kind in before:
            if kind not in served:
                self._remove(kind)
        for kind in served:
            self._add(kind)
        self._custom[uid(crd)] = served
        if type == "DELETED":
            self._custom.pop(uid(crd), None)

    def _remove(self, kind: Kind) -> None:
        self.kinds.discard(kind)
        for obj in list(self._caches.of(kind).objects.values()):
            self._tell(kind, "DELETED", obj, obj)
        self._caches.drop(kind)


def custom_kinds(crd: Obj) -> tuple[Kind, ...]:
    """The one version of a custom kind to follow: that in which it is stored, else the first that is served."""
    spec = crd["spec"]
    served = [v for v in spec["versions"] if v.get("served")]
    chosen = next((v for v in served if v.get("storage")), served[0] if served else None)
    if chosen is None:
        return ()
    names = spec["names"]
    namespaced = spec.get("scope") == "Namespaced"
    return (Kind(spec["group"], chosen["name"], names["plural"], names["kind"], namespaced=namespaced),)
