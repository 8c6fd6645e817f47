"""The chaos controller: it runs PodChaos and NetworkChaos with Chaos Mesh's life cycle (source: facts/chaos-mesh.md).

Targets are chosen once. A record goes Not Injected → (Wait) → Injected → (Wait) → Not Injected, one way only.
Kinds and actions that a sandbox of processes cannot do faithfully get Failed/Apply records that say why.
Emulated: the webhook that forbids changes of a spec; here the targets that were chosen stay, whatever it says later.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml

from sandbox.chaos import podnetwork, selectors
from sandbox.chaos.gotime import seconds
from sandbox.chaos.records import (
    APPLYING,
    INJECTED,
    NOT_INJECTED,
    RECOVERING,
    RUN,
    STOP,
    Operation,
    Record,
    conditions,
    now,
    paused,
)
from sandbox.client import (
    CRDS,
    EVENTS,
    NETWORKCHAOS,
    NODES,
    PODCHAOS,
    PODNETWORKCHAOS,
    PODS,
    STRESSCHAOS,
    Api,
    ApiError,
    EventType,
    Informer,
    Kind,
    Obj,
)

log = logging.getLogger(__name__)

FINALIZER = "chaos-mesh/records"
CLEAN = "chaos-mesh.chaos-mesh.org/cleanFinalizer"
KILL = "sandbox.gameday.dev/kill-containers"
ORIGINAL = "sandbox.gameday.dev/image-before-"  # + the experiment's name, "." and the container
PAUSE_IMAGE = "gcr.io/google-containers/pause:latest"
ONE_SHOT = frozenset({"pod-kill", "container-kill"})
RETRY_FIRST, RETRY_MAX = 0.2, 30.0


def _kind(kind: str) -> Kind:
    return Kind("chaos-mesh.org", "v1alpha1", kind.lower(), kind)


UNSUPPORTED = {
    "StressChaos": "the sandbox has no cgroups to stress a pod in",
    "IOChaos": "the sandbox has no file system to put faults into",
    "DNSChaos": "the sandbox has no DNS server to break",
    "HTTPChaos": "the sandbox has no proxy in front of pods",
    "TimeChaos": "the sandbox cannot shift a process's clock",
    "KernelChaos": "the sandbox shares its kernel with the host",
}
KINDS: tuple[Kind, ...] = (PODCHAOS, NETWORKCHAOS, STRESSCHAOS, *(_kind(k) for k in UNSUPPORTED if k != "StressChaos"))


class Failed(Exception):
    """An operation on one record failed; the text goes into its events, and it is tried again."""


class Waiting(Exception):
    """The operation was begun, and its end is not known yet."""


async def install_crds(api: Api) -> None:
    """Create or update the sandbox's CustomResourceDefinitions of chaos-mesh.org."""
    text = importlib.resources.files("sandbox.chaos").joinpath("crds/chaos-mesh.yaml").read_text()
    for crd in yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["items"]:  # noqa: S506
        try:
            await api.create(CRDS, crd)
        except ApiError as there:
            if not there.conflict:
                raise
            await api.patch(CRDS, crd["metadata"]["name"], {"spec": crd["spec"]})


Id = tuple[str, str, str]  # kind, namespace, name


class Controller:
    """Level-triggered: each experiment is brought one step on whenever it, or what it waits for, changes."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._chaos = {kind.kind: Informer(api, kind, on_event=self._changed) for kind in KINDS}
        self._pods = Informer(api, PODS)
        self._nodes = Informer(api, NODES)
        self._networks = Informer(api, PODNETWORKCHAOS, on_event=self._network_changed)
        self._due: asyncio.Queue[Id] = asyncio.Queue()
        self._queued: set[Id] = set()
        self._delays: dict[Id, float] = {}
        self._waiting: dict[tuple[str, str], set[Id]] = {}  # PodNetworkChaos → experiments that wait for it
        self._rng = random.Random()  # noqa: S311 - draws targets, no secrets

    def _changed(self, type: EventType, new: Obj, old: Obj | None) -> None:
        if type != "DELETED":
            self._queue((new["kind"], new["metadata"]["namespace"], new["metadata"]["name"]))

    def _network_changed(self, type: EventType, new: Obj, old: Obj | None) -> None:
        for waiting in self._waiting.pop((new["metadata"]["namespace"], new["metadata"]["name"]), ()):
            self._queue(waiting)

    def _queue(self, id: Id) -> None:
        if id not in self._queued:
            self._queued.add(id)
            self._due.put_nowait(id)

    def _later(self, id: Id, delay: float) -> None:
        asyncio.get_running_loop().call_later(max(0.01, delay), self._queue, id)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for informer in (*self._chaos.values(), self._pods, self._nodes, self._networks):
                group.create_task(informer.run())
            group.create_task(self._work())

    async def _work(self) -> None:
        for informer in (*self._chaos.values(), self._pods, self._nodes, self._networks):
            await informer.synced.wait()
        while True:
            id = await self._due.get()
            self._queued.discard(id)
            try:
                await self._reconcile(id)
            except (ApiError, OSError) as wrong:
                log.info("%s %s/%s: %s", *id, wrong)
                self._back_off(id)

    def _back_off(self, id: Id) -> None:
        delay = self._delays.get(id, RETRY_FIRST)
        self._delays[id] = min(delay * 2, RETRY_MAX)
        self._later(id, delay)

    # ── one experiment ──────────────────────────────────────────────────────────────────────

    async def _reconcile(self, id: Id) -> None:
        kind = next(kind for kind in KINDS if kind.kind == id[0])
        obj = self._chaos[id[0]].get(id[2], id[1])
        if obj is None:
            return
        meta = obj["metadata"]
        deleting = "deletionTimestamp" in meta
        if not deleting and FINALIZER not in (meta.get("finalizers") or []):
            await self._api.patch(
                kind, id[2], {"metadata": {"finalizers": [*(meta.get("finalizers") or []), FINALIZER]}}, id[1]
            )
            return  # the change brings us back
        raw = (obj.get("status") or {}).get("experiment", {}).get("containerRecords")
        records = [Record.of(one) for one in raw or ()]
        refused = any(
            c["type"] == "Selected" and c["status"] == "False"
            for c in (obj.get("status") or {}).get("conditions") or ()
        )
        if not records and not deleting and not refused:
            records = await self._select(kind, obj)
        desired = self._desired(id, obj, deleting)
        trouble = await self._bring(id, obj, records, desired)
        await self._write(kind, obj, records, desired)
        if deleting:
            await self._let_go(kind, obj, records)
        if trouble:
            self._back_off(id)
        else:
            self._delays.pop(id, None)

    def _desired(self, id: Id, obj: Obj, deleting: bool) -> str:
        """Run or Stop; looks again when the duration, counted from creation, will be over."""
        if deleting:
            return STOP
        one_shot = obj["spec"].get("action") in ONE_SHOT
        text = obj["spec"].get("duration")
        if text and not one_shot:
            created = datetime.fromisoformat(obj["metadata"]["creationTimestamp"]).timestamp()
            left = created + seconds(text) - time.time()
            if left <= 0:
                return STOP
            self._later(id, left)
        return STOP if paused(obj) and not one_shot else RUN

    async def _select(self, kind: Kind, obj: Obj) -> list[Record]:
        """Choose the targets, once; nothing selected is terminal."""
        spec, own = obj["spec"], obj["metadata"]["namespace"]
        try:
            records = self._targets(kind, ".", spec, spec, own)
            if kind is NETWORKCHAOS and (target := spec.get("target")):
                records += self._targets(kind, ".Target", target, spec, own)
        except selectors.CannotSelect as nothing:
            await self._event(obj, "Warning", "Failed", f"Failed to select targets: {nothing}")
            return []
        return records

    def _targets(
        self, kind: Kind, key: str, part: Mapping[str, Any], spec: Mapping[str, Any], own: str
    ) -> list[Record]:
        pods = list(self._pods.objects.values())
        wanted = selectors.namespaces(part.get("selector") or {}, own)
        among = [pod for pod in pods if pod["metadata"]["namespace"] in wanted]
        found = selectors.select(part.get("selector") or {}, own, among, list(self._nodes.objects.values()))
        chosen = selectors.draw(found, part.get("mode", "one"), part.get("value"), self._rng)
        names = [(pod, f"{pod['metadata']['namespace']}/{pod['metadata']['name']}") for pod in chosen]
        if kind is PODCHAOS and spec.get("action") == "container-kill":
            return [
                Record(f"{name}/{container}", key)
                for pod, name in names
                for container in selectors.containers(pod, spec.get("containerNames"))
            ]
        return [Record(name, key) for _, name in names]

    async def _bring(self, id: Id, obj: Obj, records: Sequence[Record], desired: str) -> bool:
        """Take every record a step towards `desired`; tells whether one failed and must be tried again."""
        steps = [(record, operation) for record in records if (operation := record.wants(desired))]
        done = await asyncio.gather(*(self._step(id, obj, records, *step) for step in steps))
        return not all(done)

    async def _step(self, id: Id, obj: Obj, records: Sequence[Record], record: Record, operation: Operation) -> bool:
        act = self._action(obj, operation)
        try:
            await act(id, obj, records, record)
        except Waiting:
            record.phase = APPLYING if operation == "Apply" else RECOVERING
            return True
        except Failed as failed:
            record.note(operation, str(failed))
            return False
        record.note(operation)
        if operation == "Apply":
            record.phase, record.injected = INJECTED, record.injected + 1
        else:
            record.phase, record.recovered = NOT_INJECTED, record.recovered + 1
        return True

    def _action(self, obj: Obj, operation: Operation) -> Callable[[Id, Obj, Sequence[Record], Record], Awaitable[None]]:
        action = obj["spec"].get("action", "")
        actions = {
            ("PodChaos", "pod-kill", "Apply"): self._kill_pod,
            ("PodChaos", "container-kill", "Apply"): self._kill_container,
            ("PodChaos", "pod-failure", "Apply"): self._fail_pod,
            ("PodChaos", "pod-failure", "Recover"): self._unfail_pod,
            ("NetworkChaos", "partition", "Apply"): self._cut,
            ("NetworkChaos", "partition", "Recover"): self._uncut,
        }
        return actions.get((obj["kind"], action, operation), self._refuse if operation == "Apply" else self._nothing)

    async def _refuse(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        action = obj["spec"].get("action", "")
        why = UNSUPPORTED.get(obj["kind"]) or f"the sandbox cannot do {obj['kind']} {action}"
        raise Failed(why)

    async def _nothing(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        """There is nothing to recover."""

    # ── PodChaos ────────────────────────────────────────────────────────────────────────────

    async def _pod(self, record: Record) -> Obj:
        namespace, name = record.pod
        try:
            return await self._api.get(PODS, name, namespace)
        except ApiError as gone:
            if gone.not_found:
                raise Failed(f'pods "{name}" not found') from gone
            raise Failed(str(gone)) from gone

    async def _kill_pod(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        namespace, name = record.pod
        try:
            await self._api.delete(PODS, name, namespace, grace=int(obj["spec"].get("gracePeriod") or 0))
        except ApiError as wrong:
            raise Failed(str(wrong)) from wrong

    async def _kill_container(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        namespace, name = record.pod
        mine = [r.container for r in records if r.pod == record.pod]
        token = uuid.uuid5(uuid.UUID(obj["metadata"]["uid"]), str(record.injected))
        patch = {"metadata": {"annotations": {KILL: f"{token}:{','.join(mine)}"}}}
        try:
            await self._api.patch(PODS, name, patch, namespace)
        except ApiError as wrong:
            raise Failed(str(wrong)) from wrong

    async def _fail_pod(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        """Every image becomes a pause image; what was there is remembered on the pod.

        A second pod-failure on the same pod remembers *pause*, as Chaos Mesh does.
        """
        pod = await self._pod(record)
        annotations: Obj = {}
        spec: Obj = {}
        for group in ("containers", "initContainers"):
            for container in pod["spec"].get(group) or ():
                annotations[f"{ORIGINAL}{id[2]}.{container['name']}"] = container["image"]
                spec.setdefault(group, []).append({"name": container["name"], "image": PAUSE_IMAGE})
        await self._patch_pod(record, {"metadata": {"annotations": annotations}, "spec": spec})

    async def _unfail_pod(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        try:
            pod = await self._pod(record)
        except Failed as gone:
            if "not found" in str(gone):
                return  # a pod that is gone counts as recovered
            raise
        kept = pod["metadata"].get("annotations") or {}
        annotations: Obj = {}
        spec: Obj = {}
        for group in ("containers", "initContainers"):
            for container in pod["spec"].get(group) or ():
                key = f"{ORIGINAL}{id[2]}.{container['name']}"
                if key in kept:
                    annotations[key] = None
                    spec.setdefault(group, []).append({"name": container["name"], "image": kept[key]})
        if annotations:
            await self._patch_pod(record, {"metadata": {"annotations": annotations}, "spec": spec})

    async def _patch_pod(self, record: Record, patch: Obj) -> None:
        namespace, name = record.pod
        try:
            await self._api.patch(PODS, name, patch, namespace, type="strategic")
        except ApiError as wrong:
            raise Failed(str(wrong)) from wrong

    # ── NetworkChaos ────────────────────────────────────────────────────────────────────────

    async def _cut(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        pod = self._pods.get(record.pod[1], record.pod[0])
        if pod is None:
            raise Failed(f'pods "{record.pod[1]}" not found')
        if pod["spec"].get("hostNetwork"):
            raise Failed("pods on the host's network are never injected")
        addresses = {
            one.id: ip
            for one in records
            if (found := self._pods.get(one.pod[1], one.pod[0])) and (ip := found.get("status", {}).get("podIP"))
        }
        ids = {key: [one.id for one in records if one.key == key] for key in (".", ".Target")}
        source = f"{id[1]}/{id[2]}"
        try:
            entries = podnetwork.partition(source, obj["spec"], ids, addresses, record.id)
        except podnetwork.BadTarget as bad:
            raise Failed(str(bad)) from bad
        await self._network(id, record, pod, source, entries)

    async def _uncut(self, id: Id, obj: Obj, records: Sequence[Record], record: Record) -> None:
        pod = self._pods.get(record.pod[1], record.pod[0])
        if pod is None:
            return  # a pod that is gone counts as recovered
        await self._network(id, record, pod, f"{id[1]}/{id[2]}", {})

    async def _network(self, id: Id, record: Record, pod: Obj, source: str, entries: Obj) -> None:
        """Write the pod's PodNetworkChaos and wait until its node's daemon has done it."""
        namespace, name = record.pod
        try:
            current = await self._api.get(PODNETWORKCHAOS, name, namespace)
        except ApiError as missing:
            if not missing.not_found:
                raise Failed(str(missing)) from missing
            if not entries:
                return
            current = await self._create_network(pod)
        spec = podnetwork.replaced(current.get("spec") or {}, source, entries)
        if spec != (current.get("spec") or {}):
            patch = {"spec": {part: spec.get(part) for part in podnetwork.LISTS}}
            try:
                current = await self._api.patch(PODNETWORKCHAOS, name, patch, namespace)
            except ApiError as wrong:
                raise Failed(str(wrong)) from wrong
        status = current.get("status") or {}
        if status.get("observedGeneration", 0) < current["metadata"].get("generation", 1):
            self._waiting.setdefault((namespace, name), set()).add(id)
            raise Waiting
        if failed := status.get("failedMessage"):
            raise Failed(failed)

    async def _create_network(self, pod: Obj) -> Obj:
        meta = pod["metadata"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        metadata = {"name": meta["name"], "namespace": meta["namespace"], "ownerReferences": [owner]}
        obj = {
            "apiVersion": PODNETWORKCHAOS.api_version,
            "kind": PODNETWORKCHAOS.kind,
            "metadata": metadata,
            "spec": {},
        }
        try:
            return await self._api.create(PODNETWORKCHAOS, obj)
        except ApiError as wrong:
            raise Failed(str(wrong)) from wrong

    # ── status ──────────────────────────────────────────────────────────────────────────────

    async def _write(self, kind: Kind, obj: Obj, records: Sequence[Record], desired: str) -> None:
        """Only ever PATCH: the chaos kinds have no status subresource."""
        status = {
            "conditions": conditions(obj, records),
            "experiment": {"desiredPhase": desired, "containerRecords": [record.json for record in records]},
        }
        old = obj.get("status") or {}
        if {key: old.get(key) for key in status} == status:
            return
        meta = obj["metadata"]
        try:
            await self._api.patch(kind, meta["name"], {"status": status}, meta["namespace"])
        except ApiError as wrong:
            if not wrong.not_found:
                raise

    async def _let_go(self, kind: Kind, obj: Obj, records: Sequence[Record]) -> None:
        """Take our finalizer off once all records are exactly Not Injected, or when that is forced."""
        meta = obj["metadata"]
        kept = [one for one in meta.get("finalizers") or () if one != FINALIZER]
        forced = (meta.get("annotations") or {}).get(CLEAN) == "forced" and not any(
            record.phase == INJECTED and record.events and record.events[-1]["type"] == "Failed" for record in records
        )
        if len(kept) == len(meta.get("finalizers") or ()) or not (
            forced or all(record.phase == NOT_INJECTED for record in records)
        ):
            return
        try:
            await self._api.patch(kind, meta["name"], {"metadata": {"finalizers": kept}}, meta["namespace"])
        except ApiError as gone:
            if not gone.not_found:
                raise

    async def _event(self, obj: Obj, type: str, reason: str, message: str) -> None:
        meta = obj["metadata"]
        about = {
            "apiVersion": obj["apiVersion"],
            "kind": obj["kind"],
            "name": meta["name"],
            "namespace": meta["namespace"],
        }
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{meta['name']}.{uuid.uuid4().hex[:12]}", "namespace": meta["namespace"]},
            "involvedObject": about | {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]},
            "type": type,
            "reason": reason,
            "message": message,
            "source": {"component": "chaos-controller-manager"},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
        }
        try:
            await self._api.create(EVENTS, event)
        except ApiError as wrong:
            log.info("no event for %s: %s", meta["name"], wrong)


async def run(api: Api) -> None:
    """Install the definitions and run every experiment, until cancelled."""
    await install_crds(api)
    await Controller(api).run()
