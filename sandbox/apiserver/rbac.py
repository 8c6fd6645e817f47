"""Role-based access control: who may do what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.apiserver import errors
from sandbox.apiserver.authn import Identity
from sandbox.apiserver.core import Core
from sandbox.client import Obj

GROUP = "rbac.authorization.k8s.io"


@dataclass(frozen=True, slots=True)
class Ask:
    """One question: may this verb be used there? `path` alone for what is no resource."""

    verb: str
    group: str = ""
    plural: str = ""
    namespace: str = ""
    name: str = ""
    sub: str = ""
    path: str = ""

    @property
    def resource(self) -> str:
        return f"{self.plural}/{self.sub}" if self.sub else self.plural


def _covers(rule: Obj, ask: Ask) -> bool:
    verbs = rule.get("verbs") or []
    if "*" not in verbs and ask.verb not in verbs:
        return False
    if ask.path:
        return any(
            url in ("*", ask.path) or (url.endswith("*") and ask.path.startswith(url[:-1]))
            for url in rule.get("nonResourceURLs") or []
        )
    groups = rule.get("apiGroups") or []
    if "*" not in groups and ask.group not in groups:
        return False
    wanted = rule.get("resources") or []
    if not ("*" in wanted or ask.resource in wanted or (ask.sub and f"*/{ask.sub}" in wanted)):
        return False
    names = rule.get("resourceNames") or []
    return not names or ask.name in names


def _subject(binding: Obj, user: Identity) -> str | None:
    """How the binding names this user, as reasons quote it."""
    for subject in binding.get("subjects") or []:
        kind, name = subject.get("kind"), subject.get("name")
        if kind == "User" and name == user.user:
            return f'User "{name}"'
        if kind == "Group" and name in user.groups:
            return f'Group "{name}"'
        if kind == "ServiceAccount":
            space = subject.get("namespace") or binding["metadata"].get("namespace", "")
            if user.user == f"system:serviceaccount:{space}:{name}":
                return f'ServiceAccount "{name}/{space}"'
    return None


class Rules:
    def __init__(self, core: Core) -> None:
        self._core = core

    def _role(self, ref: Obj, namespace: str) -> list[Obj]:
        cluster = ref.get("kind") == "ClusterRole"
        key = f"{'clusterroles' if cluster else 'roles'}.{GROUP}"
        found = self._core.store.get(key, "" if cluster else namespace, ref.get("name", ""))
        return (found.obj.get("rules") or []) if found else []

    def _grants(self, user: Identity, namespace: str) -> Iterator[tuple[str, list[Obj]]]:
        """Every binding of the user that holds in the namespace: its reason and its rules."""
        store = self._core.store
        for stored in store.table(f"clusterrolebindings.{GROUP}").values():
            binding = stored.obj
            if subject := _subject(binding, user):
                ref = binding["roleRef"]
                why = f'ClusterRoleBinding "{binding["metadata"]["name"]}" of ClusterRole "{ref["name"]}" to {subject}'
                yield why, self._role(ref, "")
        if not namespace:
            return
        for (space, _), stored in store.table(f"rolebindings.{GROUP}").items():
            if space == namespace and (subject := _subject(stored.obj, user)):
                ref = stored.obj["roleRef"]
                name = f"{stored.obj['metadata']['name']}/{space}"
                yield f'RoleBinding "{name}" of {ref["kind"]} "{ref["name"]}" to {subject}', self._role(ref, space)

    def allowed(self, user: Identity, ask: Ask) -> str | None:
        """The reason why it is allowed ("" for masters), None if it is not."""
        if user.master:
            return ""
        for why, rules in self._grants(user, ask.namespace):
            if any(_covers(rule, ask) for rule in rules):
                return f"RBAC: allowed by {why}"
        return None

    def rules_of(self, user: Identity, namespace: str) -> list[Obj]:
        if user.master:
            return [
                {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]},
                {"verbs": ["*"], "nonResourceURLs": ["*"]},
            ]
        return [rule for _, rules in self._grants(user, namespace) for rule in rules]

    def check(self, user: Identity, ask: Ask) -> None:
        """Raises ApiError(403)."""
        if self.allowed(user, ask) is not None:
            return
        scope = f'in the namespace "{ask.namespace}"' if ask.namespace else "at the cluster scope"
        why = f'User "{user.user}" cannot {ask.verb} resource "{ask.resource}" in API group "{ask.group}" {scope}'
        name = "" if ask.verb in ("create", "list", "watch", "deletecollection") and not ask.sub else ask.name
        raise errors.forbidden(ask.group, ask.plural, name, why)

    def check_path(self, user: Identity, verb: str, path: str) -> None:
        """Raises ApiError(403)."""
        if self.allowed(user, Ask(verb, path=path)) is None:
            raise errors.Bare(403, "Forbidden", f'forbidden: User "{user.user}" cannot {verb} path "{path}"')

    def check_impersonation(self, user: Identity, name: str, groups: tuple[str, ...]) -> None:
        """Raises ApiError(403)."""
        self.check(user, Ask("impersonate", plural="users", name=name))
        for group in groups:
            self.check(user, Ask("impersonate", plural="groups", name=group))


# The bootstrap policy, as far as the sandbox's parts and users need it
# (plugin/pkg/auth/authorizer/rbac/bootstrappolicy of Kubernetes 1.36, condensed).
_READ = ["get", "list", "watch"]
_WRITE = ["create", "delete", "deletecollection", "patch", "update"]
_VIEW: list[Obj] = [
    {
        "apiGroups": [""],
        "verbs": _READ,
        "resources": [
            "configmaps",
            "endpoints",
            "persistentvolumeclaims",
            "pods",
            "pods/log",
            "pods/status",
            "serviceaccounts",
            "services",
            "services/status",
            "events",
            "limitranges",
            "resourcequotas",
            "namespaces",
        ],
    },
    {
        "apiGroups": ["apps"],
        "verbs": _READ,
        "resources": [
            "controllerrevisions",
            "daemonsets",
            "daemonsets/status",
            "deployments",
            "deployments/scale",
            "deployments/status",
            "replicasets",
            "replicasets/scale",
            "replicasets/status",
            "statefulsets",
            "statefulsets/scale",
            "statefulsets/status",
        ],
    },
    {
        "apiGroups": ["autoscaling"],
        "verbs": _READ,
        "resources": ["horizontalpodautoscalers", "horizontalpodautoscalers/status"],
    },
    {"apiGroups": ["batch"], "verbs": _READ, "resources": ["cronjobs", "cronjobs/status", "jobs", "jobs/status"]},
    {"apiGroups": ["policy"], "verbs": _READ, "resources": ["poddisruptionbudgets", "poddisruptionbudgets/status"]},
    {"apiGroups": ["networking.k8s.io"], "verbs": _READ, "resources": ["networkpolicies"]},
    {"apiGroups": ["discovery.k8s.io"], "verbs": _READ, "resources": ["endpointslices"]},
]
_EDIT: list[Obj] = [
    *_VIEW,
    {"apiGroups": [""], "verbs": [*_READ, *_WRITE], "resources": ["secrets"]},
    {
        "apiGroups": [""],
        "verbs": _WRITE,
        "resources": [
            "configmaps",
            "endpoints",
            "events",
            "persistentvolumeclaims",
            "pods",
            "serviceaccounts",
            "services",
        ],
    },
    {"apiGroups": [""], "verbs": ["create"], "resources": ["pods/eviction", "serviceaccounts/token"]},
    {
        "apiGroups": ["apps"],
        "verbs": _WRITE,
        "resources": [
            "daemonsets",
            "deployments",
            "deployments/scale",
            "replicasets",
            "replicasets/scale",
            "statefulsets",
            "statefulsets/scale",
        ],
    },
    {"apiGroups": ["autoscaling"], "verbs": _WRITE, "resources": ["horizontalpodautoscalers"]},
    {"apiGroups": ["batch"], "verbs": _WRITE, "resources": ["cronjobs", "jobs"]},
    {"apiGroups": ["policy"], "verbs": _WRITE, "resources": ["poddisruptionbudgets"]},
    {"apiGroups": ["networking.k8s.io"], "verbs": _WRITE, "resources": ["networkpolicies"]},
    {"apiGroups": ["coordination.k8s.io"], "verbs": [*_READ, *_WRITE], "resources": ["leases"]},
]
_ADMIN: list[Obj] = [
    *_EDIT,
    {"apiGroups": [GROUP], "verbs": [*_READ, *_WRITE], "resources": ["roles", "rolebindings"]},
    {"apiGroups": ["authorization.k8s.io"], "verbs": ["create"], "resources": ["localsubjectaccessreviews"]},
]
_NODE: list[Obj] = [
    {
        "apiGroups": [""],
        "verbs": _READ,
        "resources": [
            "services",
            "pods",
            "nodes",
            "configmaps",
            "secrets",
            "endpoints",
            "namespaces",
            "serviceaccounts",
        ],
    },
    {"apiGroups": [""], "verbs": ["create", "update", "patch", "delete"], "resources": ["nodes", "pods"]},
    {"apiGroups": [""], "verbs": ["get", "update", "patch"], "resources": ["nodes/status", "pods/status"]},
    {"apiGroups": [""], "verbs": ["create"], "resources": ["pods/eviction", "serviceaccounts/token"]},
    {"apiGroups": ["", "events.k8s.io"], "verbs": ["create", "update", "patch"], "resources": ["events"]},
    {"apiGroups": ["coordination.k8s.io"], "verbs": [*_READ, *_WRITE], "resources": ["leases"]},
    {"apiGroups": ["authentication.k8s.io"], "verbs": ["create"], "resources": ["tokenreviews"]},
    {"apiGroups": ["authorization.k8s.io"], "verbs": ["create"], "resources": ["subjectaccessreviews"]},
    # The chaos daemon lives in the node agent's process and uses its identity.
    {"apiGroups": ["chaos-mesh.org"], "verbs": [*_READ, "update", "patch"], "resources": ["*"]},
]
_PUBLIC = ["/healthz", "/livez", "/readyz", "/version", "/version/"]
_DISCOVERY = ["/api", "/api/*", "/apis", "/apis/*", *_PUBLIC, "/openapi", "/openapi/*"]
_BASIC: list[Obj] = [
    {
        "apiGroups": ["authorization.k8s.io"],
        "verbs": ["create"],
        "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
    },
    {"apiGroups": ["authentication.k8s.io"], "verbs": ["create"], "resources": ["selfsubjectreviews"]},
]
CLUSTER_ROLES: dict[str, list[Obj]] = {
    "cluster-admin": [
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
        {"nonResourceURLs": ["*"], "verbs": ["*"]},
    ],
    "admin": _ADMIN,
    "edit": _EDIT,
    "view": _VIEW,
    "system:node": _NODE,
    "system:basic-user": _BASIC,
    "system:discovery": [{"nonResourceURLs": _DISCOVERY, "verbs": ["get"]}],
    "system:public-info-viewer": [{"nonResourceURLs": _PUBLIC, "verbs": ["get"]}],
}
CLUSTER_BINDINGS: dict[str, tuple[str, ...]] = {
    "cluster-admin": ("system:masters",),
    "system:node": ("system:nodes",),
    "system:basic-user": ("system:authenticated",),
    "system:discovery": ("system:authenticated",),
    "system:public-info-viewer": ("system:authenticated", "system:unauthenticated"),
}


def binding(name: str, groups: tuple[str, ...]) -> Obj:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
        "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "Group", "apiGroup": GROUP, "name": group} for group in groups],
    }
