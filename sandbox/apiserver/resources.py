"""What the server serves: every resource type with its names, verbs and subresources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox.apiserver.crds import CustomVersion

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource in one version. Versions of one resource share a `key`, and so their objects."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subs: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    singular: str = ""
    list_kind: str = ""
    alias: str = ""  # the key under which another group's resource stores the same objects
    custom: CustomVersion | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        return self.alias or self.qualified

    @property
    def qualified(self) -> str:
        """As error messages say it: `deployments.apps`, `pods`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


_STATUS = ("status",)


def _core(plural: str, kind: str, *short: str, subs: tuple[str, ...] = (), namespaced: bool = True) -> Resource:
    return Resource("", "v1", plural, kind, namespaced, short, subs=subs)


def _apps(plural: str, kind: str, *short: str, subs: tuple[str, ...] = ("scale", "status")) -> Resource:
    return Resource("apps", "v1", plural, kind, True, short, ("all",), subs)


_RBAC = "rbac.authorization.k8s.io"

BUILTIN: tuple[Resource, ...] = (
    replace(
        _core("pods", "Pod", "po", subs=("binding", "ephemeralcontainers", "eviction", "exec", "log", "status")),
        categories=("all",),
    ),
    _core("nodes", "Node", "no", subs=_STATUS, namespaced=False),
    replace(
        _core("namespaces", "Namespace", "ns", subs=("finalize", "status"), namespaced=False),
        verbs=tuple(verb for verb in ALL_VERBS if verb != "deletecollection"),
    ),
    replace(_core("services", "Service", "svc", subs=_STATUS), categories=("all",)),
    replace(_core("endpoints", "Endpoints", "ep"), singular="endpoints"),
    _core("configmaps", "ConfigMap", "cm"),
    _core("secrets", "Secret"),
    _core("serviceaccounts", "ServiceAccount", "sa", subs=("token",)),
    _core("events", "Event", "ev"),
    _core("persistentvolumeclaims", "PersistentVolumeClaim", "pvc", subs=_STATUS),
    _core("resourcequotas", "ResourceQuota", "quota", subs=_STATUS),
    _core("limitranges", "LimitRange", "limits"),
    Resource("", "v1", "bindings", "Binding", verbs=("create",)),
    # Known, but nothing acts on them here: what is written to them is refused (see strategy.UNSUPPORTED).
    _core("persistentvolumes", "PersistentVolume", "pv", namespaced=False, subs=_STATUS),
    replace(
        _core("replicationcontrollers", "ReplicationController", "rc", subs=("scale", "status")), categories=("all",)
    ),
    Resource("networking.k8s.io", "v1", "ingresses", "Ingress", True, ("ing",), (), _STATUS),
    Resource("storage.k8s.io", "v1", "storageclasses", "StorageClass", False, ("sc",)),
    Resource("events.k8s.io", "v1", "events", "Event", True, ("ev",), alias="events"),
    _apps("deployments", "Deployment", "deploy"),
    _apps("replicasets", "ReplicaSet", "rs"),
    _apps("statefulsets", "StatefulSet", "sts"),
    _apps("daemonsets", "DaemonSet", "ds", subs=_STATUS),
    Resource("apps", "v1", "controllerrevisions", "ControllerRevision"),
    Resource("batch", "v1", "jobs", "Job", True, (), ("all",), _STATUS),
    Resource("batch", "v1", "cronjobs", "CronJob", True, ("cj",), ("all",), _STATUS),
    Resource(
        "autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", True, ("hpa",), ("all",), _STATUS
    ),
    Resource(
        "autoscaling", "v1", "horizontalpodautoscalers", "HorizontalPodAutoscaler", True, ("hpa",), ("all",), _STATUS
    ),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True, ("pdb",), (), _STATUS),
    Resource("coordination.k8s.io", "v1", "leases", "Lease"),
    Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    Resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", False, ("pc",)),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", True, ("netpol",)),
    Resource(_RBAC, "v1", "roles", "Role"),
    Resource(_RBAC, "v1", "rolebindings", "RoleBinding"),
    Resource(_RBAC, "v1", "clusterroles", "ClusterRole", False),
    Resource(_RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", False),
    Resource(
        "apiextensions.k8s.io",
        "v1",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        False,
        ("crd", "crds"),
        ("api-extensions",),
        _STATUS,
    ),
    *(
        Resource("authorization.k8s.io", "v1", plural, kind, plural.startswith("local"), verbs=("create",))
        for plural, kind in (
            ("selfsubjectaccessreviews", "SelfSubjectAccessReview"),
            ("selfsubjectrulesreviews", "SelfSubjectRulesReview"),
            ("subjectaccessreviews", "SubjectAccessReview"),
            ("localsubjectaccessreviews", "LocalSubjectAccessReview"),
        )
    ),
    Resource("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", False, verbs=("create",)),
    Resource("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", False, verbs=("create",)),
)
# Without storage: a POST is answered and forgotten.
REVIEWS = frozenset(resource.key for resource in BUILTIN if resource.verbs == ("create",))


class Registry:
    """Finds resources by group, version and plural; custom ones come and go."""

    def __init__(self, resources: Iterable[Resource] = BUILTIN) -> None:
        self._all: dict[tuple[str, str, str], Resource] = {}
        for resource in resources:
            self.add(resource)

    def __iter__(self) -> Iterator[Resource]:
        return iter(self._all.values())

    def add(self, resource: Resource) -> None:
        self._all[resource.group, resource.version, resource.plural] = resource

    def remove(self, group: str, plural: str) -> None:
        for key in [key for key in self._all if key[0] == group and key[2] == plural]:
            del self._all[key]

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        return self._all.get((group, version, plural))

    def by_kind(self, group: str, version: str, kind: str) -> Resource | None:
        found = (res for res in self._all.values() if (res.group, res.version, res.kind) == (group, version, kind))
        return next(found, None)

    def by_key(self, key: str) -> Resource | None:
        return next((res for res in self._all.values() if res.qualified == key), None)

    def is_builtin(self, group: str) -> bool:
        return any(res.group == group for res in BUILTIN)

    def groups(self) -> dict[str, list[str]]:
        """Group → versions, in the order of their preference."""
        groups: dict[str, list[str]] = {}
        for res in self._all.values():
            versions = groups.setdefault(res.group, [])
            if res.version not in versions:
                versions.append(res.version)
        return groups

    def in_version(self, group: str, version: str) -> list[Resource]:
        return [res for res in self._all.values() if (res.group, res.version) == (group, version)]
