"""Custom resources: definitions become resources of the registry, their schemas default, prune and validate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox.apiserver.resources import Resource
from sandbox.apiserver.store import Change
from sandbox.client import Obj

if TYPE_CHECKING:
    from sandbox.apiserver.core import Core

KEY = "customresourcedefinitions.apiextensions.k8s.io"
CLEANUP = "customresourcecleanup.apiextensions.k8s.io"


@dataclass(frozen=True, slots=True)
class CustomVersion:
    """One served version of a CRD."""

    storage_version: str
    schema: Obj | None
    columns: tuple[Obj, ...]
    scale: Obj | None
    status: bool
    selectable: tuple[str, ...]


class CustomTypes:
    def __init__(self, core: Core) -> None:
        self._core = core
        core.store.on_change(KEY, self._changed)

    def _changed(self, change: Change) -> None:
        spec = change.new.obj["spec"]
        group, names = spec["group"], spec["names"]
        registry = self._core.registry
        registry.remove(group, names["plural"])
        if change.type == "DELETED":
            self._core.store.end_subscriptions(f"{names['plural']}.{group}")
            return
        storage = next(version["name"] for version in spec["versions"] if version.get("storage"))
        for version in spec["versions"]:
            if version.get("served"):
                registry.add(_resource(spec, version, storage))

    def default(self, res: Resource, obj: Obj) -> None:
        """Fill defaults of the schema."""

    def before_create(self, res: Resource, obj: Obj) -> None:
        obj["metadata"]["generation"] = 1
        if res.custom and res.custom.status:
            obj.pop("status", None)

    def before_update(self, res: Resource, new: Obj) -> None:
        """Prune."""

    def before_create_crd(self, obj: Obj) -> None:
        names = obj["spec"].get("names") or {}
        kind = names.get("kind", "")
        accepted = {**names, "singular": names.get("singular") or kind.lower(),
                    "listKind": names.get("listKind") or f"{kind}List"}
        at = obj["metadata"]["creationTimestamp"]
        obj["status"] = {
            "conditions": [
                {"type": "NamesAccepted", "status": "True", "lastTransitionTime": at, "reason": "NoConflicts",
                 "message": "no conflicts found"},
                {"type": "Established", "status": "True", "lastTransitionTime": at, "reason": "InitialNamesAccepted",
                 "message": "the initial names have been accepted"},
            ],
            "acceptedNames": accepted,
            "storedVersions": [v["name"] for v in obj["spec"]["versions"] if v.get("storage")],
        }

    def before_update_crd(self, new: Obj, old: Obj) -> None:
        stored = list((old.get("status") or {}).get("storedVersions") or [])
        for version in new["spec"]["versions"]:
            if version.get("storage") and version["name"] not in stored:
                stored.append(version["name"])
        new["status"] = {**old["status"], "storedVersions": stored}


def _resource(spec: Obj, version: Obj, storage: str) -> Resource:
    names = spec["names"]
    subs = version.get("subresources") or {}
    custom = CustomVersion(
        storage_version=storage,
        schema=(version.get("schema") or {}).get("openAPIV3Schema"),
        columns=tuple(version.get("additionalPrinterColumns") or ()),
        scale=subs.get("scale"),
        status="status" in subs,
        selectable=tuple(field["jsonPath"].lstrip(".") for field in version.get("selectableFields") or ()),
    )
    return Resource(
        group=spec["group"],
        version=version["name"],
        plural=names["plural"],
        kind=names["kind"],
        namespaced=spec.get("scope") == "Namespaced",
        short=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()),
        subs=tuple(sub for sub in ("scale", "status") if sub in subs),
        singular=names.get("singular") or names["kind"].lower(),
        list_kind=names.get("listKind") or f"{names['kind']}List",
        custom=custom,
    )
