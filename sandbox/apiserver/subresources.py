"""Pod eviction and binding, scale, service-account tokens."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Any

from sandbox.apiserver import errors, patch
from sandbox.apiserver.authn import Tokens
from sandbox.apiserver.core import Core, Write
from sandbox.apiserver.resources import Resource
from sandbox.apiserver.selectors import from_object
from sandbox.apiserver.store import Stored
from sandbox.apiserver.times import now
from sandbox.client import ApiError, Obj

SUCCESS: Obj = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
PDB_KEY = "poddisruptionbudgets.policy"
TOKEN_SECONDS = 3600


def bind(core: Core, pods: Resource, namespace: str, name: str, body: Obj, write: Write) -> Obj:
    """Give a pod its node; 409 when it has one."""
    ref = body.get("target") or {}
    target = ref.get("name")
    if ref.get("kind") not in (None, "", "Node"):
        raise errors.internal(f'target.kind: Unsupported value: "{ref["kind"]}": supported values: "Node", "<empty>"')
    if not target:
        raise errors.internal("target.name: Required value")
    pod = core.get(pods, namespace, name)
    meta = pod.obj["metadata"]
    wanted = (body.get("metadata") or {}).get("uid")
    if wanted and wanted != meta["uid"]:
        why = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {meta['uid']}"
        raise errors.conflict("", "pods", name, why)
    if meta.get("deletionTimestamp"):
        raise errors.conflict("", "pods/binding", name, f"pod {name} is being deleted, cannot be assigned to a host")
    if pod.obj["spec"].get("schedulingGates"):
        raise errors.conflict("", "pods/binding", name, f"pod {name} has non-empty .spec.schedulingGates")
    if node := pod.obj["spec"].get("nodeName"):
        raise errors.conflict("", "pods/binding", name, f'pod {name} is already assigned to node "{node}"')

    def assign(obj: Obj) -> None:
        obj["spec"]["nodeName"] = target
        conditions = [c for c in obj["status"].get("conditions") or [] if c["type"] != "PodScheduled"]
        conditions.append(
            {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": now()}
        )
        obj["status"]["conditions"] = conditions

    if not write.dry_run:
        fresh = pod.copy()
        assign(fresh)
        core.store.put(pods.key, fresh)
    return {**SUCCESS, "code": 201}


def evict(core: Core, pods: Resource, namespace: str, name: str, body: Obj, write: Write) -> Obj:
    """Delete a pod if its disruption budget lets it go; 429 when not."""
    if (body.get("metadata") or {}).get("name") != name:
        raise errors.bad_request("name in URL does not match name in Eviction object")
    pod = core.get(pods, namespace, name)
    options: Obj = dict(body.get("deleteOptions") or {})
    if options.get("dryRun"):
        write = replace(write, dry_run=True)
    core.check_preconditions(pods, pod, options.get("preconditions") or {})  # before the budget and the pod are marked
    if not _ignores_budget(pod.obj):
        budget = _budget(core, pod.obj)
        if budget is not None and not _unready_may_go(pod.obj, budget.obj):
            _take(core, budget, name, write)
    if pod.obj["spec"].get("nodeName") and not write.dry_run:
        _mark(core, pods, namespace, name)
    core.delete(pods, namespace, name, options, write)
    return {**SUCCESS, "code": 201}


def _mark(core: Core, pods: Resource, namespace: str, name: str) -> None:
    """Tell the pod's readers why it goes."""
    pod = core.get(pods, namespace, name).copy()
    conditions = [c for c in pod["status"].get("conditions") or [] if c["type"] != "DisruptionTarget"]
    conditions.append(
        {
            "type": "DisruptionTarget",
            "status": "True",
            "lastProbeTime": None,
            "lastTransitionTime": now(),
            "reason": "EvictionByEvictionAPI",
            "message": "Eviction API: evicting",
        }
    )
    pod["status"]["conditions"] = conditions
    core.store.put(pods.key, pod)


def _ignores_budget(pod: Obj) -> bool:
    phase = (pod.get("status") or {}).get("phase")
    return phase in ("Succeeded", "Failed", "Pending") or bool(pod["metadata"].get("deletionTimestamp"))


def _budget(core: Core, pod: Obj) -> Stored | None:
    found = []
    for stored in core.store.list(PDB_KEY, pod["metadata"]["namespace"]):
        selector = from_object(stored.obj["spec"].get("selector"))
        if selector is not None and selector.matches(pod["metadata"].get("labels")):
            found.append(stored)
    if len(found) > 1:
        raise ApiError(
            500,
            "InternalError",
            "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
        )
    return found[0] if found else None


def is_ready(pod: Obj) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _unready_may_go(pod: Obj, budget: Obj) -> bool:
    """An unready pod goes when the healthy ones suffice (or always, by policy AlwaysAllow)."""
    if is_ready(pod):
        return False
    if budget["spec"].get("unhealthyPodEvictionPolicy") == "AlwaysAllow":
        return True
    status = budget.get("status") or {}
    return bool(status.get("currentHealthy", 0) >= status.get("desiredHealthy", 0) > 0)


def _take(core: Core, budget: Stored, pod: str, write: Write) -> None:
    """Use one allowed disruption, at once, so that two evictions cannot use the same one."""
    obj = budget.copy()
    status = obj.setdefault("status", {})
    name = obj["metadata"]["name"]
    if status.get("observedGeneration", 0) < obj["metadata"].get("generation", 0):
        raise _too_many(f"The disruption budget {name} is still being processed by the server.", name, 10)
    allowed = status.get("disruptionsAllowed", 0)
    if allowed <= 0:
        raise _too_many(
            f"The disruption budget {name} needs {status.get('desiredHealthy', 0)} healthy pods and has "
            f"{status.get('currentHealthy', 0)} currently",
            name,
            0,
        )
    status["disruptionsAllowed"] = allowed - 1
    status.setdefault("disruptedPods", {})[pod] = now()
    if not write.dry_run:
        core.store.put(PDB_KEY, obj)


def _too_many(why: str, budget: str, retry: int) -> ApiError:
    text = "Cannot evict pod as it would violate the pod's disruption budget."
    cause = {"reason": "DisruptionBudget", "message": why}
    details: Obj = {"causes": [cause]}
    if retry:
        details["retryAfterSeconds"] = retry
    return ApiError(429, "TooManyRequests", text, details)


# -- scale


def selector_text(selector: Obj | None) -> str:
    """As `kubectl` writes selectors: a=b,c in (d,e)."""
    if not selector:
        return ""
    terms = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for expr in selector.get("matchExpressions") or []:
        values = ",".join(sorted(expr.get("values") or []))
        terms.append(
            {
                "In": f"{expr['key']} in ({values})",
                "NotIn": f"{expr['key']} notin ({values})",
                "Exists": expr["key"],
                "DoesNotExist": f"!{expr['key']}",
            }[expr["operator"]]
        )
    return ",".join(sorted(terms))


def _dig(obj: Obj, path: str) -> Any:
    value: Any = obj
    for part in path.strip(".").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def read_scale(core: Core, res: Resource, namespace: str, name: str) -> Obj:
    """GET of a Scale; a custom resource that does not say how many it wants has none."""
    obj = core.get(res, namespace, name).obj
    if res.custom is not None and res.custom.scale is not None:
        path = res.custom.scale["specReplicasPath"]
        if _dig(obj, path) is None:
            why = f'the spec replicas field "{path}" does not exist'
            raise ApiError(500, "InternalError", f"Internal error occurred: {why}", {"causes": [{"message": why}]})
    return scale_of(res, obj)


def scale_of(res: Resource, obj: Obj) -> Obj:
    """The Scale object of a workload or of a custom resource that declares one."""
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    if res.custom is not None and res.custom.scale is not None:
        paths = res.custom.scale
        wanted = _dig(obj, paths["specReplicasPath"])
        have = _dig(obj, paths["statusReplicasPath"]) or 0
        selector = _dig(obj, paths["labelSelectorPath"]) if paths.get("labelSelectorPath") else None
    else:
        wanted, have = spec.get("replicas", 0), status.get("replicas", 0)
        selector = selector_text(spec.get("selector"))
    meta = obj["metadata"]
    kept = {
        key: meta[key] for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp") if key in meta
    }
    shown: Obj = {"replicas": have}
    if selector:
        shown["selector"] = selector
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": kept,
        "spec": {"replicas": wanted} if wanted else {},
        "status": shown,
    }


def set_scale(core: Core, res: Resource, namespace: str, name: str, scale: Obj, write: Write) -> Obj:
    """PUT of a Scale."""
    replicas = (scale.get("spec") or {}).get("replicas", 0)
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise errors.bad_request("spec.replicas must be a number")
    if replicas < 0 and res.custom is not None:
        field = res.custom.scale["specReplicasPath"] if res.custom.scale else ".spec.replicas"
        why = f"Invalid value: {replicas}: should be a non-negative integer"
        raise errors.invalid(res.group, res.kind, name, [errors.Cause("FieldValueInvalid", why, field)])
    if replicas < 0:
        cause = errors.Cause(
            "FieldValueInvalid", f"Invalid value: {replicas}: must be greater than or equal to 0", "spec.replicas"
        )
        raise errors.invalid("autoscaling", "Scale", name, [cause])
    old = core.get(res, namespace, name)
    obj = old.copy()
    version = (scale.get("metadata") or {}).get("resourceVersion")
    if version:
        obj["metadata"]["resourceVersion"] = version
    _put_replicas(res, obj, replicas)
    return scale_of(res, core.update(res, namespace, name, obj, write).obj)


def _put_replicas(res: Resource, obj: Obj, replicas: int) -> None:
    path = res.custom.scale["specReplicasPath"] if res.custom and res.custom.scale else ".spec.replicas"
    *parents, last = path.strip(".").split(".")
    for part in parents:
        obj = obj.setdefault(part, {})
    obj[last] = replicas


def patch_scale(core: Core, res: Resource, namespace: str, name: str, kind: str, body: Any, write: Write) -> Obj:
    scale = scale_of(res, core.get(res, namespace, name).obj)
    return set_scale(core, res, namespace, name, patch.apply(kind, scale, body, custom=False), write)


# -- tokens


def token_request(core: Core, tokens: Tokens, namespace: str, name: str, body: Obj, write: Write) -> Obj:
    """TokenRequest: a token for a service account, which may be bound to a pod."""
    account = core.store.get("serviceaccounts", namespace, name)
    if account is None:
        raise errors.not_found("", "serviceaccounts", name)
    spec = body.get("spec") or {}
    seconds = int(spec.get("expirationSeconds") or TOKEN_SECONDS)
    if seconds < 600:
        cause = errors.Cause(
            "FieldValueInvalid",
            f"Invalid value: {seconds}: may not specify a duration less than 10 minutes",
            "spec.expirationSeconds",
        )
        raise errors.invalid("authentication.k8s.io", "TokenRequest", name, [cause])
    issued = int(time.time())
    mine: Obj = {"namespace": namespace, "serviceaccount": {"name": name, "uid": account.obj["metadata"]["uid"]}}
    if bound := spec.get("boundObjectRef"):
        mine[str(bound.get("kind", "")).lower()] = {"name": bound.get("name"), "uid": bound.get("uid")}
    audiences = spec.get("audiences") or ["https://kubernetes.default.svc"]
    claims: Obj = {
        "aud": audiences,
        "exp": issued + seconds,
        "iat": issued,
        "nbf": issued,
        "iss": "https://kubernetes.default.svc",
        "jti": str(uuid.uuid4()),
        "kubernetes.io": mine,
        "sub": f"system:serviceaccount:{namespace}:{name}",
    }
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(issued + seconds))
    return {
        "kind": "TokenRequest",
        "apiVersion": "authentication.k8s.io/v1",
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": now()},
        "spec": {"audiences": audiences, "expirationSeconds": seconds, "boundObjectRef": spec.get("boundObjectRef")},
        "status": {"token": tokens.issue(claims), "expirationTimestamp": expires},
    }


def token_alive(core: Core, claims: Obj) -> bool:
    """Whether the account, and the pod it is bound to, are still the ones of the token."""
    mine = claims["kubernetes.io"]
    account = core.store.get("serviceaccounts", mine["namespace"], mine["serviceaccount"]["name"])
    if account is None or account.obj["metadata"]["uid"] != mine["serviceaccount"]["uid"]:
        return False
    if pod := mine.get("pod"):
        found = core.store.get("pods", mine["namespace"], pod["name"])
        return found is not None and pod["uid"] in (None, found.obj["metadata"]["uid"])
    return True
