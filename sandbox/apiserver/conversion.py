"""Between the version asked for and the version stored, where one resource is served in several."""

from __future__ import annotations

from sandbox.apiserver.resources import Resource
from sandbox.client import Obj


def to_storage(res: Resource, obj: Obj) -> Obj:
    if res.alias == "events":
        return _event_to_core(obj)
    if res.custom is not None:
        return {**obj, "kind": res.kind, "apiVersion": f"{res.group}/{res.custom.storage_version}"}
    return {**obj, "kind": res.kind, "apiVersion": res.api_version}


def from_storage(res: Resource, obj: Obj) -> Obj:
    if res.alias == "events":
        return _event_from_core(obj)
    return obj if obj.get("apiVersion") == res.api_version else {**obj, "apiVersion": res.api_version}


def is_stored_form(res: Resource) -> bool:
    """Whether stored bytes can be served as they are."""
    return not res.alias and (res.custom is None or res.custom.storage_version == res.version)


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
