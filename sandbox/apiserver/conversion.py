"""Between the version asked for and the version stored, where one resource is served in several."""

from __future__ import annotations

from sandbox.apiserver.resources import Resource
from sandbox.client import Obj


def to_storage(res: Resource, obj: Obj) -> Obj:
    if res.alias == "events":
        return _event_to_core(obj)
    if _is_old_hpa(res):
        return _hpa_to_v2(obj)
    if res.custom is not None:
        return {**obj, "kind": res.kind, "apiVersion": f"{res.group}/{res.custom.storage_version}"}
    return {**obj, "kind": res.kind, "apiVersion": res.api_version}


def from_storage(res: Resource, obj: Obj) -> Obj:
    if res.alias == "events":
        return _event_from_core(obj)
    if _is_old_hpa(res):
        return _hpa_from_v2(obj)
    return obj if obj.get("apiVersion") == res.api_version else {**obj, "apiVersion": res.api_version}


def is_stored_form(res: Resource) -> bool:
    """Whether stored bytes can be served as they are."""
    return not res.alias and not _is_old_hpa(res) and (res.custom is None or res.custom.storage_version == res.version)


# events.k8s.io/v1 name → core/v1 name (staging/src/k8s.io/api/events/v1/types.go)
_EVENT = {
    "regarding": "involvedObject",
    "note": "message",
    "reportingController": "reportingComponent",
    "deprecatedSource": "source",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedCount": "count",
}
_EVENT_BACK = {core: new for new, core in _EVENT.items()}


def _event_to_core(obj: Obj) -> Obj:
    core = {_EVENT.get(key, key): value for key, value in obj.items()}
    return {**core, "kind": "Event", "apiVersion": "v1"}


def _event_from_core(obj: Obj) -> Obj:
    new = {_EVENT_BACK.get(key, key): value for key, value in obj.items()}
    return {**new, "kind": "Event", "apiVersion": "events.k8s.io/v1"}


def _is_old_hpa(res: Resource) -> bool:
    return (res.group, res.version) == ("autoscaling", "v1") and res.kind == "HorizontalPodAutoscaler"


def _is_cpu(metric: Obj) -> bool:
    resource = metric.get("resource") or {}
    return resource.get("name") == "cpu" and "averageUtilization" in (resource.get("target") or {})


def _hpa_to_v2(obj: Obj) -> Obj:
    """autoscaling/v1 knows one metric, the CPU's utilization."""
    spec = dict(obj.get("spec") or {})
    percent = spec.pop("targetCPUUtilizationPercentage", None)
    if percent is not None:
        target = {"type": "Utilization", "averageUtilization": percent}
        spec["metrics"] = [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    status = dict(obj.get("status") or {})
    status.pop("currentCPUUtilizationPercentage", None)
    return {**obj, "kind": "HorizontalPodAutoscaler", "apiVersion": "autoscaling/v2", "spec": spec, "status": status}


def _hpa_from_v2(obj: Obj) -> Obj:
    """Metrics that autoscaling/v1 does not know are left out of what it shows."""
    spec, status = dict(obj.get("spec") or {}), dict(obj.get("status") or {})
    cpu = next((metric for metric in spec.pop("metrics", None) or [] if _is_cpu(metric)), None)
    if cpu is not None:
        spec["targetCPUUtilizationPercentage"] = cpu["resource"]["target"]["averageUtilization"]
    spec.pop("behavior", None)
    status.pop("currentMetrics", None)
    status.pop("conditions", None)
    return {**obj, "apiVersion": "autoscaling/v1", "spec": spec, "status": status}
