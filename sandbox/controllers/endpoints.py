"""EndpointSlices, and the legacy Endpoints beside them: which pods of a Service get traffic.

Conditions ready/serving/terminating as in kube-controller-manager 1.36 (facts/kubelet.md §0, §3, §6).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sandbox.client import ENDPOINTS, ENDPOINTSLICES, NODES, PODS, SERVICES, EventType, Key, Obj
from sandbox.controllers.objects import (
    ZONE,
    condition,
    controller_ref,
    created,
    deleting,
    finished,
    key,
    labels,
    matches,
    name,
    namespace,
    node_of,
    plain,
    present,
    ready,
    uid,
)
from sandbox.controllers.work import Cache, Controller, each

_SERVICE = "kubernetes.io/service-name"
_MANAGED = "endpointslice.kubernetes.io/managed-by"
_MANAGER = "endpointslice-controller.k8s.io"
_HEADLESS = "service.kubernetes.io/headless"
_TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"
_PER_SLICE = 100

Ports = tuple[tuple[str, str, int], ...]  # (name, protocol, number)


def endpoint(service: Obj, pod: Obj, zone: str | None) -> Obj:
    serving, ending = ready(pod), deleting(pod)
    spec = pod["spec"]
    named = spec.get("hostname") and spec.get("subdomain") == name(service)
    return present({
        "addresses": [pod["status"]["podIP"]],
        "conditions": {
            "ready": bool(service["spec"].get("publishNotReadyAddresses")) or (serving and not ending),
            "serving": serving,
            "terminating": ending,
        },
        "hostname": spec["hostname"] if named else None,
        "nodeName": node_of(pod),
        "targetRef": _target(pod),
        "zone": zone,
    })  # fmt: skip


def _target(pod: Obj) -> Obj:
    return {"kind": "Pod", "namespace": namespace(pod), "name": name(pod), "uid": uid(pod)}


def ports_of(service: Obj, pod: Obj) -> Ports:
    """The Service's ports on this pod; a named target port that the pod does not have is left out."""
    found = []
    for port in service["spec"].get("ports") or ():
        number = port_number(port, pod)
        if number is not None:
            found.append((port.get("name") or "", port.get("protocol") or "TCP", number))
    return tuple(found)


def port_number(port: Obj, pod: Obj) -> int | None:
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target or int(port["port"])
    for container in pod["spec"]["containers"]:
        for one in container.get("ports") or ():
            if one.get("name") == target and (one.get("protocol") or "TCP") == (port.get("protocol") or "TCP"):
                return int(one["containerPort"])
    return None


def port_objects(ports: Ports) -> list[Obj]:
    return [{"name": title, "protocol": protocol, "port": number} for title, protocol, number in ports]


def subsets(service: Obj, pods: Iterable[Obj]) -> list[Obj]:
    """The legacy view: ready and not ready addresses by port set; terminating pods are absent."""
    groups: dict[Ports, tuple[list[Obj], list[Obj]]] = {}
    everyone = bool(service["spec"].get("publishNotReadyAddresses"))
    for pod in pods:
        if deleting(pod):
            continue
        spec = pod["spec"]
        named = spec.get("hostname") and spec.get("subdomain") == name(service)
        address = present({
            "ip": pod["status"]["podIP"],
            "hostname": spec["hostname"] if named else None,
            "nodeName": node_of(pod),
            "targetRef": _target(pod),
        })  # fmt: skip
        good, bad = groups.setdefault(ports_of(service, pod), ([], []))
        (good if everyone or ready(pod) else bad).append(address)
    return [
        present({
            "addresses": sorted(good, key=lambda a: a["ip"]),
            "notReadyAddresses": sorted(bad, key=lambda a: a["ip"]),
            "ports": [present(port) for port in port_objects(ports)],
        })
        for ports, (good, bad) in sorted(groups.items())
    ]  # fmt: skip


def trigger(service: Obj, pods: Iterable[Obj]) -> str:
    """When the last change happened that these endpoints follow."""
    times = [created(service)]
    for pod in pods:
        times.append((condition(pod, "Ready") or {}).get("lastTransitionTime") or created(pod))
    return max(times)


def serves(pod: Obj) -> bool:
    """Whether a pod belongs into a slice at all."""
    return bool((pod.get("status") or {}).get("podIP")) and not finished(pod)


def _visible(pod: Obj) -> tuple[object, ...]:
    status = pod.get("status") or {}
    return labels(pod), status.get("podIP"), status.get("phase"), ready(pod), deleting(pod), node_of(pod)


def _selected(services: Cache, pod: Obj) -> Iterable[Key]:
    for service in services.by("namespace", namespace(pod)):
        selector = service["spec"].get("selector")
        if selector and matches({"matchLabels": selector}, labels(pod)):
            yield key(service)


class _OfServices(Controller):
    """Follows Services and the pods they select."""

    def setup(self) -> None:
        self.services = self.watch_own(SERVICES)
        self.pods = self.shared.caches.of(PODS)
        self.pods.subscribe(self._pod_changed)

    def _pod_changed(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        if type == "MODIFIED" and old is not None and _visible(old) == _visible(pod):
            return
        for seen in (pod, old):
            if seen is not None:
                for at in _selected(self.services, seen):
                    self.queue.add(at)

    def selected(self, service: Obj) -> list[Obj]:
        selector = {"matchLabels": service["spec"]["selector"]}
        found = self.pods.by("namespace", namespace(service))
        return sorted((p for p in found if serves(p) and matches(selector, labels(p))), key=name)

    def service(self, key: Key) -> Obj | None:
        """The Service, if its endpoints are ours to keep."""
        service = self.services.objects.get(key)
        if service is None or deleting(service) or not service["spec"].get("selector"):
            return None
        return None if service["spec"].get("type") == "ExternalName" else service


class EndpointSlices(_OfServices):
    name = "endpointslice"
    workers = 4

    def setup(self) -> None:
        super().setup()
        self.slices = self.shared.caches.of(ENDPOINTSLICES)
        self.slices.subscribe(self._slice_changed)
        self.nodes = self.shared.caches.of(NODES)
        self.nodes.subscribe(self._node_changed)

    def _slice_changed(self, type: EventType, found: Obj, old: Obj | None) -> None:
        service = labels(found).get(_SERVICE)
        if service and labels(found).get(_MANAGED) == _MANAGER:
            self.queue.add((namespace(found), service))

    def _node_changed(self, type: EventType, node: Obj, old: Obj | None) -> None:
        """Pods wait for their node to be known. One that goes is no reason to look again, as in the real
        controller: its endpoints stay until the pods change or are collected.
        """
        if type != "ADDED":
            return
        for pod in self.pods.by("node", name(node)):
            for at in _selected(self.services, pod):
                self.queue.add(at)

    async def reconcile(self, key: Key) -> None:
        service = self.service(key)
        held = [
            s
            for s in self.slices.by("namespace", key[0])
            if labels(s).get(_SERVICE) == key[1] and labels(s).get(_MANAGED) == _MANAGER and not deleting(s)
        ]
        if service is None:
            at = self.services.objects.get(key)
            if at is None or not at["spec"].get("selector"):
                await each([self.shared.delete(ENDPOINTSLICES, s) for s in held])
            return
        everyone = bool(service["spec"].get("publishNotReadyAddresses"))
        pods = [pod for pod in self.selected(service) if everyone or self.nodes.get(node_of(pod)) is not None]
        await self._write(service, sorted(held, key=lambda s: (created(s), name(s))), pods)

    async def _write(self, service: Obj, held: list[Obj], pods: list[Obj]) -> None:
        """Use the slices there are, in their order; create what lacks, delete what is left over."""
        wanted = self._contents(service, pods)
        at = trigger(service, pods)
        jobs = []
        for i, (ports, endpoints) in enumerate(wanted):
            if i < len(held):
                jobs.append(self._update(service, held[i], ports, endpoints, at))
            else:
                jobs.append(self._create(service, ports, endpoints, at))
        await each([*jobs, *(self.shared.delete(ENDPOINTSLICES, s) for s in held[len(wanted) :])])

    def _contents(self, service: Obj, pods: Sequence[Obj]) -> list[tuple[list[Obj] | None, list[Obj] | None]]:
        groups: dict[Ports, list[Obj]] = {}
        for pod in pods:
            node = self.nodes.get(node_of(pod))
            zone = labels(node).get(ZONE) if node else None
            groups.setdefault(ports_of(service, pod), []).append(endpoint(service, pod, zone))
        contents: list[tuple[list[Obj] | None, list[Obj] | None]] = [
            (port_objects(ports), found[start : start + _PER_SLICE])
            for ports, found in sorted(groups.items())
            for start in range(0, len(found), _PER_SLICE)
        ]
        return contents or [(None, None)]

    @staticmethod
    def _labels(service: Obj) -> dict[str, str]:
        headless = {_HEADLESS: ""} if service["spec"].get("clusterIP") == "None" else {}
        return {**labels(service), **headless, _MANAGED: _MANAGER, _SERVICE: name(service)}

    async def _create(self, service: Obj, ports: list[Obj] | None, endpoints: list[Obj] | None, at: str) -> None:
        await self.shared.create(ENDPOINTSLICES, {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "generateName": f"{name(service)}-",
                "namespace": namespace(service),
                "labels": self._labels(service),
                "annotations": {_TRIGGER: at},
                "ownerReferences": [controller_ref(service, SERVICES)],
            },
            "addressType": (service["spec"].get("ipFamilies") or ["IPv4"])[0],
            "endpoints": endpoints,
            "ports": ports,
        })  # fmt: skip

    async def _update(
        self, service: Obj, held: Obj, ports: list[Obj] | None, endpoints: list[Obj] | None, at: str
    ) -> None:
        wanted = self._labels(service)
        same = plain(held.get("endpoints")) == plain(endpoints) and plain(held.get("ports")) == plain(ports)
        if same and labels(held) == wanted:
            return
        meta = {**held["metadata"], "labels": wanted}
        meta["annotations"] = {**(meta.get("annotations") or {}), _TRIGGER: at}
        await self.shared.update(ENDPOINTSLICES, {**held, "metadata": meta, "endpoints": endpoints, "ports": ports})


class LegacyEndpoints(_OfServices):
    name = "endpoint"
    _LABEL = "endpoints.kubernetes.io/managed-by"

    def setup(self) -> None:
        super().setup()
        self.endpoints = self.shared.caches.of(ENDPOINTS)
        self.endpoints.subscribe(lambda type, obj, old: self.queue.add(key(obj)) if type == "DELETED" else None)

    async def reconcile(self, key: Key) -> None:
        service = self.service(key)
        held = self.endpoints.objects.get(key)
        if service is None:
            ours = held is not None and labels(held).get(self._LABEL) == "endpoint-controller"
            if held is not None and ours and key not in self.services.objects:
                await self.shared.delete(ENDPOINTS, held)
            return
        pods = self.selected(service)
        wanted = subsets(service, pods)
        headless = {_HEADLESS: ""} if service["spec"].get("clusterIP") == "None" else {}
        tags = {**labels(service), **headless, self._LABEL: "endpoint-controller"}
        if held is not None and plain(held.get("subsets") or []) == plain(wanted) and labels(held) == tags:
            return
        meta = {
            **(held["metadata"] if held else {"name": name(service), "namespace": namespace(service)}),
            "labels": tags,
            "annotations": {_TRIGGER: trigger(service, pods)},
        }
        body: Obj = {"apiVersion": "v1", "kind": "Endpoints", "metadata": meta, "subsets": wanted}
        if held is None:
            await self.shared.create(ENDPOINTS, body)
        else:
            await self.shared.update(ENDPOINTS, body)
