"""Prometheus discovery of pods over HTTP, with the labels that `kubernetes_sd_configs` (role: pod) gives.

Debian's Prometheus is built without Kubernetes discovery; with the same `__meta_kubernetes_*` labels the
relabelling rules stay those of a real cluster.

Source: Prometheus documentation, kubernetes_sd_config and http_sd_config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import orjson
from aiohttp import web

from sandbox.client import NODES, PODS, Api, Informer, Obj

_BAD = re.compile(r"[^a-zA-Z0-9_]")
_PREFIX = "__meta_kubernetes_"


def _mapped(kind: str, values: Mapping[str, str] | None) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name, value in (values or {}).items():
        clean = _BAD.sub("_", name)
        labels[f"{_PREFIX}{kind}_{clean}"] = value
        labels[f"{_PREFIX}{kind}present_{clean}"] = "true"
    return labels


def pod_labels(pod: Obj, node: Obj | None = None) -> dict[str, str]:
    """The labels of all of a pod's targets."""
    meta, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    ready = next((c["status"] for c in status.get("conditions") or [] if c["type"] == "Ready"), "unknown")
    owner: Obj = next((ref for ref in meta.get("ownerReferences") or [] if ref.get("controller")), {})
    labels = {
        "namespace": meta["namespace"],
        "pod_name": meta["name"],
        "pod_ip": status.get("podIP", ""),
        "pod_ready": ready.lower(),
        "pod_phase": status.get("phase", "Unknown"),
        "pod_node_name": spec.get("nodeName", ""),
        "pod_host_ip": status.get("hostIP", ""),
        "pod_uid": meta["uid"],
        "pod_controller_kind": owner.get("kind", ""),
        "pod_controller_name": owner.get("name", ""),
    }
    found = {f"{_PREFIX}{name}": value for name, value in labels.items()}
    found |= _mapped("pod_label", meta.get("labels")) | _mapped("pod_annotation", meta.get("annotations"))
    if node is not None:
        found[f"{_PREFIX}node_name"] = node["metadata"]["name"]
        found |= _mapped("node_label", node["metadata"].get("labels"))
    return found


def targets(pod: Obj, node: Obj | None = None) -> list[Obj]:
    """One group per declared container port, or one per container that declares none; init containers too."""
    spec, status = pod["spec"], pod.get("status") or {}
    ip = status.get("podIP")
    if not ip:
        return []
    common = pod_labels(pod, node)
    groups: list[Obj] = []
    for init, part in ((False, "containers"), (True, "initContainers")):
        statuses = status.get("initContainerStatuses" if init else "containerStatuses") or []
        ids = {one["name"]: one.get("containerID", "") for one in statuses}
        for container in spec.get(part) or []:
            name = container["name"]
            own = {
                f"{_PREFIX}pod_container_name": name,
                f"{_PREFIX}pod_container_id": ids.get(name, ""),
                f"{_PREFIX}pod_container_image": container["image"],
                f"{_PREFIX}pod_container_init": str(init).lower(),
            }
            for port in container.get("ports") or [None]:
                labels = {**common, **own}
                address = ip
                if port is not None:
                    address = f"{ip}:{port['containerPort']}"
                    labels[f"{_PREFIX}pod_container_port_name"] = port.get("name", "")
                    labels[f"{_PREFIX}pod_container_port_number"] = str(port["containerPort"])
                    labels[f"{_PREFIX}pod_container_port_protocol"] = port.get("protocol", "TCP")
                groups.append({"targets": [address], "labels": labels})
    return groups


class Discovery:
    """Serves all pods of the cluster as target groups."""

    def __init__(self, api: Api) -> None:
        self._pods, self._nodes = Informer(api, PODS), Informer(api, NODES)

    async def serve(self, host: str, port: int) -> None:
        """Until cancelled."""
        app = web.Application()
        app.router.add_get("/pods", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            async with self._nodes.running():
                await self._pods.run()
        finally:
            await runner.cleanup()

    async def _answer(self, _: web.Request) -> web.Response:
        groups = [
            group
            for pod in self._pods.objects.values()
            for group in targets(pod, self._nodes.get(pod["spec"].get("nodeName", "")))
        ]
        return web.Response(body=orjson.dumps(groups), content_type="application/json")
