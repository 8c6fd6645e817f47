"""Pods: admission, quality of service, and how long their deletion takes."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from sandbox.apiserver import errors
from sandbox.client import Obj

if TYPE_CHECKING:
    from sandbox.apiserver.core import Core

_TOKEN_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105
_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"
_NO_EXECUTE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def admit(core: Core, obj: Obj) -> None:
    """The admission plugins that matter: ServiceAccount, Priority, DefaultTolerationSeconds."""
    spec = obj["spec"]
    _service_account(core, obj)
    _priority(core, obj)
    _tolerations(spec, core.clocks.toleration_seconds)
    obj["status"]["qosClass"] = qos(spec)


def _forbid(obj: Obj, why: str) -> Exception:
    return errors.forbidden("", "pods", obj["metadata"]["name"], why)


def _service_account(core: Core, obj: Obj) -> None:
    spec, namespace = obj["spec"], obj["metadata"]["namespace"]
    if "kubernetes.io/config.mirror" in (obj["metadata"].get("annotations") or {}):
        return
    name = spec.get("serviceAccountName") or "default"
    spec["serviceAccountName"] = spec["serviceAccount"] = name
    account = core.store.get("serviceaccounts", namespace, name)
    if account is None and name != "default":  # its controller makes "default" in its own time
        raise _forbid(obj, f'error looking up service account {namespace}/{name}: serviceaccount "{name}" not found')
    found = account.obj if account else {}
    if pull := found.get("imagePullSecrets"):
        spec.setdefault("imagePullSecrets", pull)
    wanted = spec.get("automountServiceAccountToken")
    if wanted is None:
        wanted = found.get("automountServiceAccountToken", True)
    if wanted:
        _mount_token(spec)


def _mount_token(spec: Obj) -> None:
    bare = [
        container
        for container in [*(spec.get("initContainers") or []), *spec["containers"]]
        if not any(mount.get("mountPath") == _TOKEN_DIR for mount in container.get("volumeMounts") or [])
    ]
    if not bare:
        return
    named = (volume["name"] for volume in spec.get("volumes") or [] if volume["name"].startswith("kube-api-access-"))
    name = next(named, None)
    if name is None:
        name = "kube-api-access-" + "".join(secrets.choice(_SUFFIX) for _ in range(5))
        spec["volumes"] = [*(spec.get("volumes") or []), _token_volume(name)]
    for container in bare:
        mount = {"name": name, "readOnly": True, "mountPath": _TOKEN_DIR}
        container["volumeMounts"] = [*(container.get("volumeMounts") or []), mount]


def _token_volume(name: str) -> Obj:
    namespace = {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    sources = [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]
    return {"name": name, "projected": {"sources": sources, "defaultMode": 420}}


def _priority(core: Core, obj: Obj) -> None:
    spec = obj["spec"]
    name = spec.get("priorityClassName")
    found = None
    if name:
        found = core.store.get("priorityclasses.scheduling.k8s.io", "", name)
        if found is None:
            raise _forbid(obj, f"no PriorityClass with name {name} was found")
    else:
        classes = core.store.list("priorityclasses.scheduling.k8s.io")
        found = next((cls for cls in classes if cls.obj.get("globalDefault")), None)
        if found is not None:
            spec["priorityClassName"] = found.obj["metadata"]["name"]
    spec["priority"] = found.obj.get("value", 0) if found else 0
    policy = found.obj.get("preemptionPolicy", "PreemptLowerPriority") if found else "PreemptLowerPriority"
    spec.setdefault("preemptionPolicy", policy)


def _tolerations(spec: Obj, seconds: int) -> None:
    have = spec.get("tolerations") or []

    def tolerated(key: str) -> bool:
        return any((tol.get("key") or key) == key and tol.get("effect") in (None, "", "NoExecute") for tol in have)

    added = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}
        for key in _NO_EXECUTE
        if not tolerated(key)
    ]
    if added:
        spec["tolerations"] = [*have, *added]


def qos(spec: Obj) -> str:
    """BestEffort, Burstable or Guaranteed, by CPU and memory of all containers."""
    any_set, guaranteed = False, True
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        resources = container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for name in ("cpu", "memory"):
            any_set |= name in requests or name in limits
            guaranteed &= name in limits and requests.get(name) == limits[name]
    if not any_set:
        return "BestEffort"
    return "Guaranteed" if guaranteed else "Burstable"


def before_create(obj: Obj) -> None:
    spec = obj["spec"]
    obj["status"] = {"phase": "Pending"}
    if spec.get("terminationGracePeriodSeconds", 0) < 0:
        spec["terminationGracePeriodSeconds"] = 1
    if spec.get("schedulingGates"):
        obj["status"]["conditions"] = [
            {
                "type": "PodScheduled",
                "status": "False",
                "lastProbeTime": None,
                "lastTransitionTime": None,
                "reason": "SchedulingGated",
                "message": "Scheduling is blocked due to non-empty scheduling gates",
            }
        ]


def grace(obj: Obj, asked: int | None) -> int:
    """Seconds; 0 when no kubelet has to agree."""
    spec, status = obj["spec"], obj.get("status") or {}
    period = int(asked if asked is not None else spec.get("terminationGracePeriodSeconds", 30))
    if period < 0:
        period = 1
    if not spec.get("nodeName") or status.get("phase") in ("Succeeded", "Failed"):
        return 0
    return period
