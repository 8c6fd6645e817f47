"""What the sandbox can do to a target, and how it takes it back: one `Action` per action of Chaos Mesh.

An action moves one record along its cycle: `apply` and `recover` return the record's next phase. `CannotAct`
(or an ApiError) leaves the phase as it is and becomes the record's Failed event; the controller tries again.
What the sandbox cannot do is `Refused`: its `apply` always fails and says why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sandbox.chaos import podnetwork
from sandbox.chaos.records import APPLYING, INJECTED, NOT_INJECTED, RECOVERING, Record, now
from sandbox.client import PODNETWORKCHAOS, PODS, Api, ApiError, Informer, Obj

PAUSE_IMAGE = "gcr.io/google-containers/pause:latest"
KILL_ANNOTATION = "sandbox.gameday.dev/kill-containers"  # obeyed by the node agent, once per token
ACK_SECONDS = 5.0  # a chaos daemon that has not answered for this long is reported as unreachable

Spec = Mapping[str, Any]


class Daemons(Protocol):
    """The chaos daemons of the nodes, called directly."""

    async def call(self, method: str, host: str, path: str, body: Obj | None = None) -> Obj:
        """Raises `CannotAct` with the daemon's refusal, or that it does not answer."""
        ...


class CannotAct(Exception):
    """The operation failed for now; the text says why and stands in the record's event."""


@dataclass(slots=True)
class Experiment:
    """One pass over one experiment: the object, its records, and what the actions need to know."""

    api: Api
    object: Obj
    records: list[Record]
    podnetworks: Informer
    committed: dict[str, float]  # record id → when its PodNetworkChaos was last written (monotonic seconds)
    daemons: Daemons
    instances: dict[str, Any] = field(default_factory=dict)  # record id → the generation to wait for, or a stressor
    _pods: dict[str, Obj] | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def spec(self) -> Spec:
        spec: Spec = self.object["spec"]
        return spec

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def source(self) -> str:
        return f"{self.object['metadata']['namespace']}/{self.name}"

    async def pods(self) -> dict[str, Obj]:
        """The targets that exist, by "namespace/name"; read once per pass."""
        async with self._lock:  # all records ask at once
            if self._pods is None:
                found: dict[str, Obj] = {}
                for namespace in {record.pod[0] for record in self.records}:
                    items, _ = await self.api.list(PODS, namespace)
                    found |= {f"{namespace}/{pod['metadata']['name']}": pod for pod in items}
                self._pods = found
        return self._pods

    async def pod(self, record: Record) -> Obj:
        """The record's pod. Raises `CannotAct` when it is gone."""
        namespace, name = record.pod
        pod = (await self.pods()).get(f"{namespace}/{name}")
        if pod is None:
            raise CannotAct(f'pods "{name}" not found')
        return pod


class Action(Protocol):
    @property
    def one_shot(self) -> bool:
        """Never paused, never over: it happens once."""
        ...

    @property
    def containers(self) -> bool:
        """Strikes containers (records "namespace/pod/container"), not whole pods."""
        ...

    async def apply(self, run: Experiment, record: Record) -> str: ...

    async def recover(self, run: Experiment, record: Record) -> str: ...


@dataclass(frozen=True, slots=True)
class Refused:
    """Accepted as a resource, never injected."""

    reason: str
    containers: bool = False
    one_shot: bool = False

    async def apply(self, run: Experiment, record: Record) -> str:
        raise CannotAct(self.reason)

    async def recover(self, run: Experiment, record: Record) -> str:
        return NOT_INJECTED


class PodKill:
    """DELETE with the experiment's grace period, 0 unless it says otherwise."""

    one_shot = True
    containers = False

    async def apply(self, run: Experiment, record: Record) -> str:
        namespace, name = record.pod
        await run.api.delete(PODS, name, namespace, grace=int(run.spec.get("gracePeriod") or 0))
        return INJECTED

    async def recover(self, run: Experiment, record: Record) -> str:
        return NOT_INJECTED


class ContainerKill:
    """SIGKILL to containers through the node agent: the stand-in for the daemon's call to the runtime."""

    one_shot = True
    containers = True

    async def apply(self, run: Experiment, record: Record) -> str:
        pod = await run.pod(record)
        statuses = pod.get("status", {}).get("containerStatuses") or []
        if not any(entry["name"] == record.container and "running" in entry.get("state", {}) for entry in statuses):
            raise CannotAct(f"container {record.container} of pod {'/'.join(record.pod)} is not running")
        # The same text from every record of this pod, so that they do not overwrite one another.
        names = [other.container for other in run.records if other.pod == record.pod]
        value = f"{run.object['metadata']['uid']}:{','.join(names)}"
        namespace, name = record.pod
        await run.api.patch(PODS, name, {"metadata": {"annotations": {KILL_ANNOTATION: value}}}, namespace)
        return INJECTED

    async def recover(self, run: Experiment, record: Record) -> str:
        return NOT_INJECTED


class PodFailure:
    """Every image of the pod becomes the pause image; the originals wait in annotations on the pod.

    A second pod-failure on the same pod saves the pause image as the original, as in Chaos Mesh.
    """

    one_shot = False
    containers = False

    async def apply(self, run: Experiment, record: Record) -> str:
        pod = await run.pod(record)
        annotations = pod["metadata"].get("annotations") or {}
        saved: dict[str, str | None] = {}
        images: Obj = {}
        for part, container in _every_container(pod):
            key = image_key(run.name, container["name"], initial=part == "initContainers")
            if key not in annotations:
                saved[key] = container["image"]
                images.setdefault(part, []).append({"name": container["name"], "image": PAUSE_IMAGE})
        await self._patch(run, record, saved, images)
        return INJECTED

    async def recover(self, run: Experiment, record: Record) -> str:
        pod = (await run.pods()).get(record.id)
        if pod is None:
            return NOT_INJECTED
        annotations = pod["metadata"].get("annotations") or {}
        dropped: dict[str, str | None] = {}
        images: Obj = {}
        for part, container in _every_container(pod):
            key = image_key(run.name, container["name"], initial=part == "initContainers")
            if key in annotations:
                dropped[key] = None
                images.setdefault(part, []).append({"name": container["name"], "image": annotations[key]})
        try:
            await self._patch(run, record, dropped, images)
        except ApiError as gone:
            if not gone.not_found:
                raise
        return NOT_INJECTED

    async def _patch(self, run: Experiment, record: Record, annotations: dict[str, str | None], images: Obj) -> None:
        if images:
            namespace, name = record.pod
            patch = {"metadata": {"annotations": annotations}, "spec": images}
            await run.api.patch(PODS, name, patch, namespace, type="strategic")


def image_key(chaos: str, container: str, *, initial: bool) -> str:
    """The annotation that holds a container's own image, as Chaos Mesh names it (at most 63 characters)."""
    container += "-init" if initial else "-normal"
    key = f"chaos-mesh-{chaos}-pod-failure-{container}-image"
    return key if len(key) <= 63 else container


def _every_container(pod: Obj) -> list[tuple[str, Obj]]:
    parts = ("containers", "initContainers")
    return [(part, container) for part in parts for container in pod["spec"].get(part) or ()]


Entries = Callable[[str, Spec, Mapping[str, Sequence[str]], Mapping[str, str], str], Obj]


@dataclass(frozen=True, slots=True)
class Network:
    """Rules in the network namespaces of pods, by way of PodNetworkChaos and the nodes' daemons."""

    entries: Entries  # what has to be done to one pod: `podnetwork.partition` or `.control`
    one_shot: bool = False
    containers: bool = False

    async def apply(self, run: Experiment, record: Record) -> str:
        if record.phase == APPLYING:
            return await self._synced(run, record, INJECTED)
        pod = await run.pod(record)
        if pod.get("status", {}).get("phase") != "Running":
            raise CannotAct(f"pod {record.id} is not running")
        ids: dict[str, list[str]] = {}
        addresses = {}
        for other in run.records:
            ids.setdefault(other.key, []).append(other.id)
            if address := (await run.pod(other)).get("status", {}).get("podIP"):
                addresses[other.id] = address
        try:
            entries = self.entries(run.source, run.spec, ids, addresses, record.id)
        except podnetwork.BadTarget as bad:
            raise CannotAct(str(bad)) from bad
        if not entries:
            return INJECTED  # the other side's traffic is controlled, not this one's
        await self._commit(run, record, pod, entries)
        return APPLYING

    async def recover(self, run: Experiment, record: Record) -> str:
        if record.phase == RECOVERING:
            return await self._synced(run, record, NOT_INJECTED)
        pod = (await run.pods()).get(record.id)
        if pod is None or pod.get("status", {}).get("phase") != "Running":
            return NOT_INJECTED  # the namespace that held the rules went with the pod
        await self._commit(run, record, pod, {})
        return RECOVERING

    async def _synced(self, run: Experiment, record: Record, done: str) -> str:
        """`done` once the daemon has realised what was committed, else the phase as it is."""
        namespace, name = record.pod
        found = run.podnetworks.get(name, namespace)
        if found is None or record.id not in await run.pods():
            return NOT_INJECTED
        status = found.get("status") or {}
        if status.get("observedGeneration", 0) >= run.instances.get(record.id, 0):
            if failure := status.get("failedMessage"):
                raise CannotAct(failure)
            return done
        since = run.committed.setdefault(record.id, time.monotonic())
        if time.monotonic() - since >= ACK_SECONDS:
            node = (await run.pod(record))["spec"].get("nodeName")
            raise CannotAct(f"the chaos daemon on node {node} does not answer")
        return record.phase

    async def _commit(self, run: Experiment, record: Record, pod: Obj, entries: Spec) -> None:
        """Exchange this experiment's part of the pod's PodNetworkChaos, whoever else writes there meanwhile."""
        namespace, name = record.pod
        found = run.podnetworks.get(name, namespace)
        while True:
            try:
                written = await self._write(run.api, pod, found, run.source, entries)
                break
            except ApiError as lost:
                if not lost.conflict and not lost.not_found:
                    raise
            try:
                found = await run.api.get(PODNETWORKCHAOS, name, namespace)
            except ApiError as missing:
                if not missing.not_found:
                    raise
                found = None
        run.instances[record.id] = written["metadata"]["generation"]
        run.committed[record.id] = time.monotonic()
        run.podnetworks.objects.setdefault((namespace, name), written)

    async def _write(self, api: Api, pod: Obj, found: Obj | None, source: str, entries: Spec) -> Obj:
        meta = pod["metadata"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        if found and [ref["uid"] for ref in found["metadata"].get("ownerReferences") or ()] != [meta["uid"]]:
            await api.delete(PODNETWORKCHAOS, meta["name"], meta["namespace"], uid=found["metadata"]["uid"])
            found = None  # it belonged to an earlier pod of this name
        if found is None:
            new: Obj = {
                "apiVersion": PODNETWORKCHAOS.api_version,
                "kind": PODNETWORKCHAOS.kind,
                "metadata": {"name": meta["name"], "namespace": meta["namespace"], "ownerReferences": [owner]},
                "spec": podnetwork.replaced({}, source, entries),
            }
            return await api.create(PODNETWORKCHAOS, new, meta["namespace"])
        spec = podnetwork.replaced(found.get("spec") or {}, source, entries)
        return found if spec == found.get("spec") else await api.update(PODNETWORKCHAOS, {**found, "spec": spec})


class Stress:
    """Load on CPU and memory inside containers, made by the chaos daemon of their node."""

    one_shot = False
    containers = True

    async def apply(self, run: Experiment, record: Record) -> str:
        pod = await run.pod(record)
        await run.daemons.call("POST", self._host(pod), self._path(run, record), dict(run.spec))
        run.instances[record.id] = {"uid": self._path(run, record), "startTime": now()}
        return INJECTED

    async def recover(self, run: Experiment, record: Record) -> str:
        pod = (await run.pods()).get("/".join(record.pod))
        if pod is not None:
            await run.daemons.call("DELETE", self._host(pod), self._path(run, record))
        run.instances[record.id] = None
        return NOT_INJECTED

    @staticmethod
    def _path(run: Experiment, record: Record) -> str:
        """The same at every try, so that none is started twice."""
        return f"/stress/{run.object['metadata']['uid']}/{record.id}"

    @staticmethod
    def _host(pod: Obj) -> str:
        host: str = (pod.get("status") or {}).get("hostIP") or ""
        if not host:
            raise CannotAct(f"pod {pod['metadata']['name']} is on no node yet")
        return host


_POD_ACTIONS: dict[str, Action] = {
    "pod-kill": PodKill(),
    "pod-failure": PodFailure(),
    "container-kill": ContainerKill(),
}
_REFUSED = {
    "IOChaos": Refused("the sandbox cannot hook into file systems: it has no FUSE", containers=True),
    "DNSChaos": Refused("the sandbox has no chaos-dns-server", containers=True),
    "HTTPChaos": Refused("the sandbox has no HTTP tampering proxy"),
    "TimeChaos": Refused("the sandbox cannot shift a process's clock", containers=True),
    "KernelChaos": Refused("the sandbox cannot inject faults into the kernel", containers=True),
}


def action(kind: str, spec: Spec) -> Action:
    """What carries out `spec`, an object of `kind`."""
    if kind == "PodChaos":
        return _POD_ACTIONS[spec["action"]]
    if kind == "NetworkChaos":
        return Network(podnetwork.partition if spec["action"] == "partition" else podnetwork.control)
    return Stress() if kind == "StressChaos" else _REFUSED[kind]
