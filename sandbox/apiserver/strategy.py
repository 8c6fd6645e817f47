"""What is particular to a kind when it is created, updated and deleted (the real server's strategies).

Also the admission that the sandbox needs: service accounts, priorities, tolerations, allocation.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from sandbox.apiserver import errors, limits, pods, services
from sandbox.apiserver.authn import Identity
from sandbox.apiserver.crds import KEY
from sandbox.apiserver.resources import Resource
from sandbox.client import ApiError, Obj

if TYPE_CHECKING:
    from sandbox.apiserver.core import Core

_INITIAL_STATUS: dict[str, Any] = {
    "Deployment": {},
    "ReplicaSet": {"replicas": 0},
    "StatefulSet": {"replicas": 0, "availableReplicas": 0},
    "DaemonSet": {"currentNumberScheduled": 0, "numberMisscheduled": 0, "desiredNumberScheduled": 0, "numberReady": 0},
    "Job": {},
    "CronJob": {},
    "Service": {"loadBalancer": {}},
    "Namespace": {"phase": "Active"},
    "PersistentVolumeClaim": {"phase": "Pending"},
    "ResourceQuota": {},
    "HorizontalPodAutoscaler": {"desiredReplicas": 0, "currentMetrics": None},
    "PodDisruptionBudget": {
        "disruptionsAllowed": 0,
        "currentHealthy": 0,
        "desiredHealthy": 0,
        "expectedPods": 0,
    },
}
_GENERATIONS = frozenset(
    {
        "Pod",
        "Deployment",
        "ReplicaSet",
        "StatefulSet",
        "DaemonSet",
        "Job",
        "CronJob",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "PriorityClass",
        "CustomResourceDefinition",
        "EndpointSlice",
    }
)
# Nothing in the sandbox acts on these; accepting them would be a lie.
UNSUPPORTED = frozenset({"PersistentVolume", "ReplicationController", "Ingress", "StorageClass"})
# Kinds whose rules look into `spec`: it is there, if empty, as a Go struct is.
_WITH_SPEC = frozenset(
    {
        "Pod",
        "Deployment",
        "ReplicaSet",
        "StatefulSet",
        "DaemonSet",
        "Job",
        "CronJob",
        "Service",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
        "Lease",
        "CustomResourceDefinition",
        "NetworkPolicy",
        "LimitRange",
        "ResourceQuota",
        "PersistentVolumeClaim",
        "Node",
    }
)
_CREATE_ON_UPDATE = frozenset(
    {
        "Lease",
        "Event",
        "Endpoints",
        "LimitRange",
        "Service",
        "Role",
        "RoleBinding",
        "ClusterRole",
        "ClusterRoleBinding",
    }
)
_VERSION_ON_UPDATE = frozenset({"Lease", "PodDisruptionBudget", "CustomResourceDefinition"})
# Metadata that counts as wanted state too.
_GENERATION_COUNTS = {"Deployment": "annotations", "EndpointSlice": "labels"}
_FINALIZERS = {"PersistentVolumeClaim": ("kubernetes.io/pvc-protection",)}  # until no pod uses it: see its controller
_NOT_READY = "node.kubernetes.io/not-ready"


def creates_on_update(res: Resource) -> bool:
    return res.kind in _CREATE_ON_UPDATE


def needs_version(res: Resource) -> bool:
    """PUT without resourceVersion is refused."""
    return res.custom is not None or res.kind in _VERSION_ON_UPDATE


def before_create(core: Core, res: Resource, obj: Obj, user: Identity) -> None:
    if res.custom is not None:
        core.custom.before_create(res, obj)
        return
    if res.kind in UNSUPPORTED:
        raise ApiError(501, "NotImplemented", f"the sandbox has nothing that would act on a {res.kind}")
    if res.kind in _GENERATIONS:
        obj["metadata"]["generation"] = 1
    if res.kind in _WITH_SPEC and not isinstance(obj.get("spec"), dict):
        obj["spec"] = {}
    _finalizers(obj["metadata"], _FINALIZERS.get(res.kind, ()))
    if res.kind in _INITIAL_STATUS:
        obj["status"] = dict(_INITIAL_STATUS[res.kind])
    match res.kind:
        case "Pod":
            pods.before_create(obj)
        case "Node":
            _taint_new_node(obj["spec"])
        case "Namespace":
            spec = obj.get("spec") or {}
            finalizers = spec.get("finalizers") or []
            obj["spec"] = {
                **spec,
                "finalizers": [*finalizers, *(["kubernetes"] if "kubernetes" not in finalizers else [])],
            }
        case "Secret" | "ConfigMap":
            _string_data(obj)
        case "Job":
            _job_labels(obj)
        case "DaemonSet":
            _sub(obj["metadata"], "annotations").setdefault("deprecated.daemonset.template.generation", "1")
        case "CustomResourceDefinition":
            core.custom.before_create_crd(obj)


def _finalizers(meta: Obj, wanted: tuple[str, ...]) -> None:
    held = meta.get("finalizers") or []
    if added := [entry for entry in wanted if entry not in held]:
        meta["finalizers"] = [*held, *added]


def _taint_new_node(spec: Obj) -> None:
    """Nothing is scheduled before the node life cycle controller has seen the node Ready."""
    taints = spec.get("taints") or []
    if not any(taint.get("key") == _NOT_READY and taint.get("effect") == "NoSchedule" for taint in taints):
        spec["taints"] = [*taints, {"key": _NOT_READY, "effect": "NoSchedule"}]


def _sub(obj: Obj, key: str) -> Obj:
    if obj.get(key) is None:
        obj[key] = {}
    return obj[key]  # type: ignore[no-any-return]


def _string_data(obj: Obj) -> None:
    """Secrets may be written in clear; they are stored in base64."""
    clear = obj.pop("stringData", None) if obj.get("kind") == "Secret" else None
    if clear:
        data = _sub(obj, "data")
        data.update({key: base64.b64encode(value.encode()).decode() for key, value in clear.items()})


def _job_labels(obj: Obj) -> None:
    spec, meta = obj["spec"], obj["metadata"]
    if spec.get("manualSelector"):
        return
    labels = {
        "batch.kubernetes.io/controller-uid": meta["uid"],
        "batch.kubernetes.io/job-name": meta.get("name", ""),
        "controller-uid": meta["uid"],
        "job-name": meta.get("name", ""),
    }
    template = _sub(_sub(spec, "template"), "metadata")
    _sub(template, "labels").update(labels)
    _sub(meta, "labels")
    for key, value in labels.items():
        meta["labels"].setdefault(key, value)
    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": meta["uid"]}}


def admit_create(core: Core, res: Resource, obj: Obj, user: Identity) -> None:
    match res.kind:
        case "Pod" if res.custom is None:
            limits.apply_ranges(core, obj)
            pods.admit(core, obj)
        case "Service" if res.custom is None:
            services.allocate(core, obj, None)
        case "LimitRange" | "ResourceQuota" if res.custom is None:
            limits.refuse_unknown(obj)
    limits.hold_to_quotas(core, res, obj)


def before_update(core: Core, res: Resource, new: Obj, old: Obj, sub: str) -> Obj:
    """Keep apart what the subresources own: `status` here, all the rest there."""
    if sub == "status":
        return _status_update(res, new, old)
    if sub == "finalize":
        return {**old, "spec": {**old.get("spec", {}), "finalizers": (new.get("spec") or {}).get("finalizers") or []}}
    if res.custom is None and res.kind in _WITH_SPEC and not isinstance(new.get("spec"), dict):
        new["spec"] = {}
    keeps_status = "status" in res.subs
    if keeps_status:
        new.pop("status", None)
        if "status" in old:
            new["status"] = old["status"]
    if res.custom is not None:
        return new
    match res.kind:
        case "Namespace":
            new["spec"] = old.get("spec", {})
        case "Secret":
            _string_data(new)
        case "Service":
            services.keep_allocation(new, old)
        case "CustomResourceDefinition":
            core.custom.before_update_crd(new, old)
    return new


def _status_update(res: Resource, new: Obj, old: Obj) -> Obj:
    merged = dict(old)
    if "status" in new:
        merged["status"] = new["status"]
    elif res.custom is not None:
        merged.pop("status", None)
    if res.custom is None:  # labels and annotations of built-in kinds may be changed along with the status
        meta = dict(new["metadata"])
        for key in ("ownerReferences", "finalizers"):
            meta.pop(key, None)
            if key in old["metadata"]:
                meta[key] = old["metadata"][key]
        merged["metadata"] = {
            key: meta[key]
            for key in (*[k for k in old["metadata"] if k in meta], *[k for k in meta if k not in old["metadata"]])
        }
    return merged


def admit_update(core: Core, res: Resource, new: Obj, old: Obj, user: Identity, sub: str) -> None:
    if res.kind in ("LimitRange", "ResourceQuota") and res.custom is None:
        limits.refuse_unknown(new)
    if res.kind == "Service" and res.custom is None and not sub:
        services.allocate(core, new, old)


def count_generation(res: Resource, new: Obj, old: Obj, sub: str) -> None:
    """`generation` counts changes of what is wanted, not of what is."""
    before = old["metadata"].get("generation")
    if before is None:
        return
    ignored = {"metadata", "kind", "apiVersion"}
    if "status" in res.subs or res.custom is None:
        ignored.add("status")
    changed = {k: v for k, v in new.items() if k not in ignored} != {k: v for k, v in old.items() if k not in ignored}
    if res.custom is None and sub != "status" and (key := _GENERATION_COUNTS.get(res.kind)):
        changed |= new["metadata"].get(key) != old["metadata"].get(key)
    if changed:
        new["metadata"]["generation"] = before + 1


def grace(res: Resource, obj: Obj, asked: int | None) -> int:
    """Seconds until a deletion may be carried out."""
    return pods.grace(obj, asked) if res.key == "pods" else 0


def admit_delete(res: Resource, obj: Obj) -> None:
    name = obj["metadata"]["name"]
    if res.key == "namespaces" and name in ("default", "kube-system", "kube-public", "kube-node-lease"):
        raise errors.forbidden("", "namespaces", name, "this namespace may not be deleted")


def on_delete(core: Core, res: Resource, obj: Obj) -> None:
    """A deletion begins and will take a while."""
    if res.key == KEY:
        core.custom.on_delete_crd(obj)
        obj["metadata"].pop("deletionGracePeriodSeconds", None)
    if res.key == "namespaces":
        obj["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}
        obj["metadata"].pop("deletionGracePeriodSeconds", None)
