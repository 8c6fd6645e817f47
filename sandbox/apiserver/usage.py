"""metrics.k8s.io: what pods and nodes use, as a metrics server shows it (`kubectl top`)."""

from __future__ import annotations

from datetime import UTC, datetime

from sandbox.apiserver import errors
from sandbox.apiserver.core import Core, Query
from sandbox.apiserver.resources import Resource
from sandbox.client import Obj
from sandbox.metrics import Metrics, Snapshot, Usage

GROUP = "metrics.k8s.io"
RESOURCES = (
    Resource(GROUP, "v1beta1", "nodes", "NodeMetrics", False, verbs=("get", "list")),
    Resource(GROUP, "v1beta1", "pods", "PodMetrics", True, verbs=("get", "list")),
)


class ResourceMetrics:
    def __init__(self, core: Core, metrics: Metrics) -> None:
        self._core, self._metrics = core, metrics
        for resource in RESOURCES:
            core.registry.add(resource)

    async def get(self, res: Resource, namespace: str, name: str) -> Obj:
        """One object. Raises ApiError(404), also while there are no metrics of it."""
        stored = self._core.store.get(res.plural, namespace, name)
        shown = _show(res, stored.obj, await self._metrics.usage()) if stored else None
        if shown is None:
            raise errors.not_found(GROUP, res.plural, f"{namespace}/{name}" if namespace else name)
        return shown

    async def list(self, res: Resource, namespace: str | None, query: Query) -> Obj:
        """All of which there are metrics."""
        snapshot = await self._metrics.usage()
        found = [stored.obj for stored in self._core.store.list(res.plural, namespace) if query.matches(stored.obj)]
        items = [shown for obj in found if (shown := _show(res, obj, snapshot))]
        return {"kind": f"{res.kind}List", "apiVersion": res.api_version, "metadata": {}, "items": items}


def _show(res: Resource, obj: Obj, snapshot: Snapshot) -> Obj | None:
    meta = obj["metadata"]
    name, namespace = meta["name"], meta.get("namespace", "")
    shown: Obj = {"kind": res.kind, "apiVersion": res.api_version, "metadata": {"name": name}}
    at = datetime.fromtimestamp(snapshot.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    shown["metadata"] |= {"creationTimestamp": at, **({"labels": meta["labels"]} if meta.get("labels") else {})}
    times = {"timestamp": at, "window": f"{snapshot.window:.3f}s"}
    if not res.namespaced:
        used = snapshot.usage.get(("", name, ""))
        return {**shown, **times, "usage": _usage(used)} if used else None
    containers = [{"name": c, "usage": _usage(used)} for c, used in sorted(snapshot.of_pod(namespace, name).items())]
    shown["metadata"]["namespace"] = namespace
    return {**shown, **times, "containers": containers} if containers else None


def _usage(used: Usage) -> Obj:
    return {"cpu": f"{round(used.cpu * 1e9)}n", "memory": f"{round(used.memory / 1024)}Ki"}


def kubelets(core: Core) -> dict[str, str]:
    """Nodes that say where their kubelet answers: name → URL."""
    found = {}
    for stored in core.store.list("nodes"):
        status = stored.obj.get("status") or {}
        addresses = {entry["type"]: entry["address"] for entry in status.get("addresses") or []}
        port = ((status.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}).get("Port")
        if port and "InternalIP" in addresses:
            found[stored.obj["metadata"]["name"]] = f"{core.kubelet_scheme}://{addresses['InternalIP']}:{port}"
    return found
