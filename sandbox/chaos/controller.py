"""The chaos controller: lives through every experiment's life as Chaos Mesh does (source: facts/chaos-mesh.md).

Each pass over an experiment: finalizer, desired phase, conditions (which therefore lag the records by one pass),
records, and when all is recovered and deletion asked for, the finalizer goes. Only ever PATCHes the chaos kinds.

`webhooks` plays Chaos Mesh's admission on the sandbox's own API server. On another control plane nobody does:
- A changed spec is put back, with a Warning Event.
- A spec that the webhook would refuse is accepted, but selects nothing, and a Warning Event says why.
Nothing selected is terminal, as long as this controller runs.
"""

from __future__ import annotations

import asyncio
import calendar
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from sandbox.chaos import gotime
from sandbox.chaos.actions import ACK_SECONDS, Action, CannotAct, Experiment, action
from sandbox.chaos.calls import HttpDaemons
from sandbox.chaos.events import Recorder
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
    paused,
)
from sandbox.chaos.selectors import CannotSelect, containers, draw, namespaces, select
from sandbox.client import (
    CRDS,
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

KINDS = (
    PODCHAOS,
    NETWORKCHAOS,
    STRESSCHAOS,
    *(
        Kind("chaos-mesh.org", "v1alpha1", kind.lower(), kind)
        for kind in ("IOChaos", "DNSChaos", "HTTPChaos", "TimeChaos", "KernelChaos")
    ),
)
FINALIZER = "chaos-mesh/records"
CLEAN_FINALIZER = "chaos-mesh.chaos-mesh.org/cleanFinalizer"  # "forced" acts only in a pass without errors
RETRY_FIRST, RETRY_MAX = 0.1, 10.0  # seconds, doubling
CRD_FILE = Path(__file__).parent / "crds" / "chaos-mesh.yaml"
CRD_SECONDS = 10.0  # for the API to serve a definition

_LOST = (aiohttp.ClientError, OSError, TimeoutError)


def crds() -> list[Obj]:
    """The sandbox's definitions of Chaos Mesh's resources."""
    items: list[Obj] = yaml.safe_load(CRD_FILE.read_text())["items"]
    return items


async def install_crds(api: Api) -> None:
    """Create the definitions, or bring existing ones up to date; returns when the API serves them.

    Raises ApiError, or TimeoutError when a definition is not served within `CRD_SECONDS`.
    """
    for crd in crds():
        try:
            await api.create(CRDS, crd)
        except ApiError as exists:
            if not exists.conflict:
                raise
            await api.patch(CRDS, crd["metadata"]["name"], {"spec": crd["spec"]})
    async with asyncio.timeout(CRD_SECONDS):
        for kind in (*KINDS, PODNETWORKCHAOS):
            while not await _served(api, kind):  # noqa: ASYNC110  # the API tells by answering, not by an event
                await asyncio.sleep(0.05)


async def _served(api: Api, kind: Kind) -> bool:
    try:
        await api.list(kind)
    except ApiError as not_yet:
        if not not_yet.not_found:
            raise
        return False
    return True


async def run(api: Api) -> None:
    """Install the definitions of Chaos Mesh's resources and run until cancelled."""
    await install_crds(api)
    await Controller(api).run()


Key = tuple[Kind, str, str]  # kind, namespace, name


@dataclass(slots=True)
class Worker:
    """What the controller remembers of one experiment between passes."""

    key: Key
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    uid: str = ""
    spec: Obj = field(default_factory=dict)
    unselectable: bool = False
    failures: int = 0  # passes with an error, in a row
    committed: dict[str, float] = field(default_factory=dict)

    def meets(self, obj: Obj) -> None:
        """Forget an earlier experiment of the same name."""
        if self.uid != obj["metadata"]["uid"]:
            self.uid, self.spec = obj["metadata"]["uid"], obj["spec"]
            self.unselectable, self.failures, self.committed = False, 0, {}

    def back_off(self) -> float:
        self.failures += 1
        return float(min(RETRY_FIRST * 2 ** (self.failures - 1), RETRY_MAX))


class Controller:
    def __init__(self, api: Api, rng: random.Random | None = None) -> None:
        self._api = api
        self._daemons = HttpDaemons()
        self._rng = rng or random.Random()  # noqa: S311  # which pod dies is no secret
        self._recorder = Recorder(api)
        self._podnetworks = Informer(api, PODNETWORKCHAOS, on_event=self._on_podnetwork)
        self._workers: dict[Key, Worker] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._recorder.run())
            tasks.create_task(self._podnetworks.run())
            await self._podnetworks.synced.wait()
            for kind in KINDS:
                tasks.create_task(Informer(self._api, kind, on_event=self._on_event(kind, tasks)).run())

    def _on_event(self, kind: Kind, tasks: asyncio.TaskGroup) -> Callable[[EventType, Obj, Obj | None], None]:
        def on_event(type: EventType, new: Obj, old: Obj | None) -> None:
            key = kind, new["metadata"]["namespace"], new["metadata"]["name"]
            worker = self._workers.get(key)
            if worker is None and type != "DELETED":
                worker = self._workers[key] = Worker(key)
                tasks.create_task(self._work(worker))
            if worker and (type != "MODIFIED" or _relevant(new) != _relevant(old)):
                worker.wake.set()

        return on_event

    def _on_podnetwork(self, type: EventType, new: Obj, old: Obj | None) -> None:
        """Some daemon answered: look who waited for it."""
        pod = f"{new['metadata']['namespace']}/{new['metadata']['name']}"
        for worker in self._workers.values():
            if pod in worker.committed:
                worker.wake.set()

    async def _work(self, worker: Worker) -> None:
        """Passes over one experiment, until it is gone."""
        while True:
            worker.wake.clear()
            try:
                delay = await self._pass(worker)
            except ApiError as error:
                if error.not_found and not worker.wake.is_set():
                    del self._workers[worker.key]
                    return
                expected = error.conflict or error.not_found  # somebody else's change, or its end, came first
                log.log(logging.DEBUG if expected else logging.WARNING, "%s: %s", worker.key[2], error)
                delay = worker.back_off()
            except _LOST as lost:
                log.warning("%s: %s", worker.key[2], lost)
                delay = worker.back_off()
            try:
                async with asyncio.timeout(delay):
                    await worker.wake.wait()
            except TimeoutError:
                continue

    async def _pass(self, worker: Worker) -> float | None:
        """One pass; seconds until the next, None to wait for a change. ApiError 404: the experiment is gone."""
        kind, namespace, name = worker.key
        obj = await self._api.get(kind, name, namespace)
        worker.meets(obj)
        obj = await self._keep_spec(worker, await self._keep_finalizer(worker, obj))
        act = action(kind.kind, obj["spec"])
        obj, left = await self._desired_phase(worker, obj, act)
        obj = await self._conditions(worker, obj)
        run = Experiment(self._api, obj, _records(obj), self._podnetworks, worker.committed, self._daemons)
        run.instances = dict(obj["status"].get("instances") or {})
        failed = await self._step(worker, run, act)
        if failed:
            left = min(worker.back_off(), left or RETRY_MAX)
        else:
            worker.failures = 0
            await self._clean(worker, obj, run.records)
        waits = any(record.phase in (APPLYING, RECOVERING) for record in run.records)
        return min(left or ACK_SECONDS, ACK_SECONDS) if waits else left

    async def _patch(self, worker: Worker, patch: Obj) -> Obj:
        kind, namespace, name = worker.key
        return await self._api.patch(kind, name, patch, namespace)

    async def _keep_finalizer(self, worker: Worker, obj: Obj) -> Obj:
        meta = obj["metadata"]
        finalizers = meta.get("finalizers") or []
        if meta.get("deletionTimestamp") or FINALIZER in finalizers:
            return obj
        self._recorder.normal(obj, "FinalizerInited", "Finalizer has been inited")
        change = {"finalizers": [*finalizers, FINALIZER], "resourceVersion": meta["resourceVersion"]}
        kept = await self._patch(worker, {"metadata": change})
        self._recorder.updated(obj, "finalizer")
        return kept

    async def _keep_spec(self, worker: Worker, obj: Obj) -> Obj:
        if obj["spec"] == worker.spec:
            return obj
        self._recorder.failed(obj, "update spec", "Cannot update chaos spec")
        kind, namespace, name = worker.key
        put_back = [{"op": "replace", "path": "/spec", "value": worker.spec}]
        return await self._api.patch(kind, name, put_back, namespace, type="json")

    async def _desired_phase(self, worker: Worker, obj: Obj, act: Action) -> tuple[Obj, float | None]:
        """The object with its desired phase written, and the seconds until its duration is over."""
        desired, reason, message, left = _desire(obj, act)
        if (obj.get("status") or {}).get("experiment", {}).get("desiredPhase") == desired:
            return obj, left
        if message:
            self._recorder.normal(obj, reason, message)
        kept = await self._patch(worker, {"status": {"experiment": {"desiredPhase": desired}}})
        self._recorder.updated(obj, "desiredPhase")
        return kept, left

    async def _conditions(self, worker: Worker, obj: Obj) -> Obj:
        new = conditions(obj, _records(obj))
        if obj["status"].get("conditions") == new:
            return obj
        return await self._patch(worker, {"status": {"conditions": new}})

    async def _step(self, worker: Worker, run: Experiment, act: Action) -> bool:
        """Move every record one step towards the desired phase and write them down; True if any failed."""
        fresh = False
        if not run.records and not worker.unselectable and "deletionTimestamp" not in run.object["metadata"]:
            try:
                run.records = await self._select(worker.key[0].kind, run.object, act)
                fresh = True
            except CannotSelect as wrong:
                worker.unselectable = True
                self._recorder.failed(run.object, "select targets", str(wrong))
        desired = run.object["status"]["experiment"]["desiredPhase"]
        steps = [(record, operation) for record in run.records if (operation := record.wants(desired))]
        before = [record.json for record in run.records]
        failures = await asyncio.gather(*(self._operate(run, act, record, operation) for record, operation in steps))
        after = [record.json for record in run.records]
        if fresh or after != before:
            status: Obj = {"experiment": {"containerRecords": after}}
            if run.instances:
                status["instances"] = run.instances
            await self._patch(worker, {"status": status})
            self._recorder.updated(run.object, "records")
        return any(failures)

    async def _operate(self, run: Experiment, act: Action, record: Record, operation: Operation) -> bool:
        """One operation on one record; True if it failed."""
        apply = operation == "Apply"
        try:
            record.phase = await (act.apply(run, record) if apply else act.recover(run, record))
        except (CannotAct, ApiError) as failure:
            record.note(operation, str(failure))
            self._recorder.failed(run.object, f"{operation.lower()} chaos", str(failure))
            return True
        if apply and record.phase == INJECTED:
            record.injected += 1
            record.note(operation)
            self._recorder.normal(run.object, "Applied", f"Successfully apply chaos for {record.id}")
        elif not apply and record.phase == NOT_INJECTED:
            record.recovered += 1
            record.note(operation)
            self._recorder.normal(run.object, "Recovered", f"Successfully recover chaos for {record.id}")
        return False

    async def _select(self, kind: str, obj: Obj, act: Action) -> list[Record]:
        """The experiment's targets, chosen once. Raises `CannotSelect` when any side selects nothing."""
        spec, own = obj["spec"], obj["metadata"]["namespace"]
        if wrong := refusal(kind, spec):
            raise CannotSelect(wrong)
        sides = {".": spec}
        if kind == NETWORKCHAOS.kind and spec.get("target"):
            sides[".Target"] = spec["target"]
        records = []
        for key, side in sides.items():
            for pod in draw(await self._matching(side["selector"], own), side["mode"], side.get("value"), self._rng):
                where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
                names = containers(pod, spec.get("containerNames")) if act.containers else [""]
                records += [Record(f"{where}/{name}" if name else where, key) for name in names]
            if not any(record.key == key for record in records):
                raise CannotSelect("no target has been selected")
        return records

    async def _matching(self, selector: Mapping[str, Any], own: str) -> list[Obj]:
        pods = [pod for namespace in namespaces(selector, own) for pod in (await self._api.list(PODS, namespace))[0]]
        needs_nodes = selector.get("nodes") or selector.get("nodeSelectors")
        nodes = (await self._api.list(NODES))[0] if needs_nodes else []
        return select(selector, own, pods, nodes)

    async def _clean(self, worker: Worker, obj: Obj, records: list[Record]) -> None:
        """Let a deleted experiment go once it is recovered, or when told to by force."""
        meta = obj["metadata"]
        if not meta.get("deletionTimestamp") or not meta.get("finalizers"):
            return
        forced = (meta.get("annotations") or {}).get(CLEAN_FINALIZER) == "forced"
        if forced or all(record.phase == NOT_INJECTED for record in records):
            self._recorder.normal(obj, "FinalizerInited", "Finalizer has been removed")
            await self._patch(worker, {"metadata": {"finalizers": []}})


def refusal(kind: str, spec: Mapping[str, Any]) -> str | None:  # noqa: PLR0911 – a list of reasons
    """Why Chaos Mesh's webhook would refuse `spec`, or why the sandbox must. Partitions are not validated."""
    if spec.get("remoteCluster"):
        return "the sandbox has no remote clusters"
    if kind == "PodChaos" and spec["action"] == "container-kill" and not spec.get("containerNames"):
        return "the spec is invalid: the name of container is required on container-kill"
    if kind == "StressChaos" and not spec.get("stressors") and not spec.get("stressngStressors"):
        return "the spec is invalid: missing stressors"
    if kind == "TimeChaos" or spec.get("action") == "partition":
        return None
    if kind == NETWORKCHAOS.kind and (wrong := _misdirected(spec)):
        return wrong
    try:
        gotime.seconds(spec.get("duration") or "0")
    except ValueError as wrong:
        return f"the spec is invalid: {wrong}"
    return None


def _misdirected(spec: Mapping[str, Any]) -> str | None:
    if spec.get("direction", "to") == "to":
        return None
    if not spec.get("target"):
        return "the spec is invalid: the directions from and both need a target, unless the action is partition"
    if spec.get("externalTargets"):
        return "the spec is invalid: external targets go with the direction to only, unless the action is partition"
    return None


def _desire(obj: Obj, act: Action) -> tuple[str, str, str, float | None]:
    """Desired phase, the Event's reason and message when it changes ("": none), and seconds until the duration is over.

    The duration counts from the creation, and runs on while paused.
    """
    if obj["metadata"].get("deletionTimestamp"):
        return STOP, "Deleted", "Experiment has been deleted", None
    if act.one_shot:
        return RUN, "", "", None  # Chaos Mesh says nothing of the start of these
    left = _left(obj)
    if left is not None and left <= 0:
        return STOP, "TimeUp", "Time up according to the duration", None
    if paused(obj):
        return STOP, "Paused", "Experiment has been paused", left
    return RUN, "Started", "Experiment has started", left


def _left(obj: Obj) -> float | None:
    """Seconds until the duration is over, from the creation on; None when it never is."""
    if not (duration := obj["spec"].get("duration")):
        return None
    try:
        lasting = gotime.seconds(duration)
    except ValueError:
        return None  # not validated for partitions and clocks, and then never over, as in Chaos Mesh
    created = calendar.timegm(time.strptime(obj["metadata"]["creationTimestamp"], "%Y-%m-%dT%H:%M:%SZ"))
    return created + lasting - time.time()


def _records(obj: Obj) -> list[Record]:
    experiment = (obj.get("status") or {}).get("experiment") or {}
    return [Record.of(raw) for raw in experiment.get("containerRecords") or ()]


def _relevant(obj: Obj | None) -> object:
    """What of an experiment calls for a pass: everything but its records' events, which every failure adds to."""
    if obj is None:
        return None
    meta, status = obj["metadata"], obj.get("status") or {}
    experiment = status.get("experiment") or {}
    return (
        meta["uid"],
        obj.get("spec"),
        meta.get("annotations"),
        meta.get("finalizers"),
        meta.get("deletionTimestamp"),
        experiment.get("desiredPhase"),
        [{**raw, "events": None} for raw in experiment.get("containerRecords") or ()],
        status.get("conditions"),
    )
