"""What Chaos Mesh's controllers do with an experiment, step by step: the same scenarios on theirs and on the sandbox's.

    python tests/sandbox/chaos_scenarios.py KUBECONFIG > tests/sandbox/chaos_mesh.json

records them on a cluster where the real controllers run (webhooks and all), `test_chaos_oracle.py` plays them on the
sandbox's and compares. No kubelet and no daemon is needed: pods are objects on a node that is not there, and a stand-in
answers for the chaos daemon. What is kept has no times, uids or counts of retries.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sandbox.client import (  # noqa: E402
    EVENTS,
    NAMESPACES,
    NETWORKCHAOS,
    PODCHAOS,
    PODNETWORKCHAOS,
    PODS,
    ApiError,
    HttpApi,
    Informer,
    Kind,
    Obj,
)

RECORDED = Path(__file__).with_name("chaos_mesh.json")
ACCOUNTS = Kind("", "v1", "serviceaccounts", "ServiceAccount")
WITHIN, QUIET = 20.0, 0.7  # seconds: for a state to come, and without a change until it counts as settled
PAUSE = {"metadata": {"annotations": {"experiment.chaos-mesh.org/pause": "true"}}}
RESUME = {"metadata": {"annotations": {"experiment.chaos-mesh.org/pause": None}}}
ADDRESSES = {"a": "10.9.0.2", "b": "10.9.0.3", "c": "10.9.0.4", "d": "10.9.0.5"}


@dataclass(slots=True)
class Scene:
    """One scenario's namespace, and what was seen there."""

    api: HttpApi
    ns: str
    seen: list[Obj] = field(default_factory=list)
    broken: str = ""  # what the daemon says instead of doing it

    # -- what is there

    async def pod(self, name: str, *, phase: str = "Running", init: bool = False, **labels: str) -> None:
        containers = [{"name": name, "image": f"{name}:1"} for name in ("main", "side")]
        spec: Obj = {"nodeName": "n1", "containers": containers, "terminationGracePeriodSeconds": 0}
        if init:
            spec["initContainers"] = [{"name": "first", "image": "first:1"}]
        meta = {"name": name, "namespace": self.ns, "labels": {"app": name, "all": "yes", **labels}}
        await self.api.create(PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        running = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        statuses = [
            {"name": one["name"], "image": one["image"], "imageID": "", "containerID": f"containerd://{one['name']}"}
            | {"ready": True, "restartCount": 0, "state": running}
            for one in containers
        ]
        address = ADDRESSES[name]
        status = {"phase": phase, "containerStatuses": statuses, "podIP": address, "podIPs": [{"ip": address}]}
        await self.api.patch(PODS, name, {"status": status}, self.ns, sub="status")

    @contextlib.asynccontextmanager
    async def daemon(self) -> AsyncIterator[None]:
        """Says of each PodNetworkChaos that it is realised, or why not."""

        async def answer(obj: Obj) -> None:
            meta, status = obj["metadata"], {"failedMessage": "not yet"}
            with contextlib.suppress(ApiError, aiohttp.ClientError):
                while status["failedMessage"]:
                    status = {"observedGeneration": meta["generation"], "failedMessage": self.broken}
                    await self.api.patch(PODNETWORKCHAOS, meta["name"], {"status": status}, self.ns, sub="status")
                    await asyncio.sleep(0.3 if self.broken else 0)

        tasks: set[asyncio.Task[None]] = set()

        def note(kind: str, obj: Obj, _: Obj | None) -> None:
            observed = (obj.get("status") or {}).get("observedGeneration")
            if kind != "DELETED" and observed != obj["metadata"]["generation"]:
                tasks.add(asyncio.create_task(answer(obj)))

        async with Informer(self.api, PODNETWORKCHAOS, self.ns, on_event=note).running():
            yield
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what is done

    def select(self, *apps: str, **more: Any) -> Obj:
        wanted = {"key": "app", "operator": "In", "values": list(apps)}
        return {"namespaces": [self.ns], "expressionSelectors": [wanted], **more}

    async def create(self, kind: Kind, spec: Obj, name: str = "x") -> None:
        body = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "metadata": {"name": name, "namespace": self.ns},
            "spec": spec,
        }
        await self._answered("create", name, self.api.create(kind, body))

    async def patch(self, kind: Kind, change: Obj, name: str = "x") -> None:
        await self._answered("patch", name, self.api.patch(kind, name, change, self.ns))

    async def delete(self, kind: Kind, name: str = "x") -> None:
        await self._answered("delete", name, self.api.delete(kind, name, self.ns))

    async def _answered(self, what: str, name: str, call: Awaitable[Obj]) -> None:
        try:
            await call
        except ApiError as refused:
            self.seen.append({"step": f"{what} {name}", "refused": refused.code, "message": self._text(str(refused))})

    # -- what is seen

    async def until(self, kind: Kind, condition: str, name: str = "x", desired: str = "") -> None:
        """Note the object once `condition` ("AllInjected") holds, or a record says ("note: text"), and it is quiet."""

        def holds(obj: Obj) -> bool:
            status = obj.get("status") or {}
            met = {one["type"] for one in status.get("conditions") or [] if one["status"] == "True"}
            phase = (status.get("experiment") or {}).get("desiredPhase", "")
            return condition in met and (not desired or phase == desired)

        await self._wait(kind, name, holds, f"{condition} {desired}".strip())

    async def says(self, kind: Kind, text: str, name: str = "x") -> None:
        """Note the object once an event of a record holds `text`."""
        await self._wait(kind, name, lambda obj: text in json.dumps(obj.get("status") or {}), f"says {text}")

    async def _wait(self, kind: Kind, name: str, holds: Callable[[Obj], bool], what: str) -> None:
        loop = asyncio.get_running_loop()
        end, last, since = loop.time() + WITHIN, "", loop.time()
        while True:
            obj = await self.api.get(kind, name, self.ns)
            state, now = json.dumps(self._kept(obj), sort_keys=True), loop.time()
            if state != last:
                last, since = state, now
            if holds(obj) and now - since > QUIET:
                break
            assert now < end, f"{self.ns}: {what} did not come: {last}"
            await asyncio.sleep(0.05)
        self.seen.append({"step": what, "object": self._kept(obj)})

    async def gone(self, kind: Kind, name: str = "x") -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + WITHIN
        with contextlib.suppress(ApiError):
            while True:
                left = await self.api.get(kind, name, self.ns)
                assert loop.time() < end, f"{self.ns}: {name} does not go: {json.dumps(self._kept(left))}"
                await asyncio.sleep(0.05)
        self.seen.append({"step": f"{kind.kind} {name} is gone"})

    async def rules(self, *pods: str) -> None:
        """Note what the controllers want of the daemon for these pods."""
        found = {}
        for pod in pods:
            with contextlib.suppress(ApiError):
                found[pod] = (await self.api.get(PODNETWORKCHAOS, pod, self.ns)).get("spec") or {}
        for spec in found.values():
            for entry in spec.get("ipsets") or []:
                entry.get("cidrs", []).sort()
        self.seen.append({"step": "rules", "pods": found})

    async def pods(self) -> None:
        """Note the pods with their images and annotations."""
        found, _ = await self.api.list(PODS, self.ns)
        kept = {}
        for pod in found:
            parts = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
            notes = pod["metadata"].get("annotations") or {}
            kept[pod["metadata"]["name"]] = {
                "images": {one["name"]: one["image"] for one in parts},
                "annotations": {key: value for key, value in notes.items() if "chaos" in key or "gameday" in key},
            }
        self.seen.append({"step": "pods", "pods": kept})

    async def events(self, name: str = "x") -> None:
        """Note the Events about the object, each once."""
        found, _ = await self.api.list(EVENTS, self.ns, fields=f"involvedObject.name={name}")
        told = {f"{one['type']} {one['reason']}: {self._text(one['message'])}" for one in found}
        self.seen.append({"step": "events", "told": sorted(told)})

    def _text(self, text: str) -> str:
        text = text.replace(self.ns, "NS")
        text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z?", "<time>", text)
        return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<uid>", text)

    def _kept(self, obj: Obj) -> Obj:
        status = obj.get("status") or {}
        experiment = status.get("experiment") or {}
        records = [self._record(one) for one in experiment.get("containerRecords") or []]
        kept = {
            "finalizers": obj["metadata"].get("finalizers") or [],
            "spec": json.loads(json.dumps(obj["spec"]).replace(self.ns, "NS")),
            "conditions": {one["type"]: one["status"] for one in status.get("conditions") or []},
            "desiredPhase": experiment.get("desiredPhase", ""),
            "records": sorted(records, key=lambda one: (str(one["id"]), str(one["selectorKey"]))),
        }
        if instances := status.get("instances"):
            kept["instances"] = sorted(key.replace(self.ns, "NS") for key in instances)
        return kept

    def _record(self, record: Mapping[str, Any]) -> Obj:
        told: list[str] = []
        for event in record.get("events") or []:
            line = f"{event['type']} {event['operation']} {self._text(event.get('message', ''))}".strip()
            if not told or told[-1] != line:  # how often it tries again is chance
                told.append(line)
        failed = any(line.startswith("Failed") for line in told)
        kept = {key: record.get(key) for key in ("selectorKey", "phase", "injectedCount", "recoveredCount")}
        return {**kept, "id": str(record.get("id", "")).replace(self.ns, "NS"), "events": told, "failed": failed}


Scenario = Callable[[Scene], Awaitable[None]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(test: Scenario) -> Scenario:
    SCENARIOS[test.__name__.replace("_", "-")] = test  # type: ignore[attr-defined]
    return test


async def abc(one: Scene) -> None:
    for name in ("a", "b", "c"):
        await one.pod(name)


# -- PodChaos


@scenario
async def pod_kill(one: Scene) -> None:
    await abc(one)
    await one.create(PODCHAOS, {"action": "pod-kill", "mode": "all", "selector": one.select("a", "b")})
    await one.until(PODCHAOS, "AllInjected")
    await one.pods()
    await one.events()
    await one.delete(PODCHAOS)
    await one.gone(PODCHAOS)


@scenario
async def pod_kill_with_duration(one: Scene) -> None:
    await abc(one)
    spec = {"action": "pod-kill", "mode": "all", "selector": one.select("a"), "duration": "2s"}
    await one.create(PODCHAOS, spec)
    await one.until(PODCHAOS, "AllInjected")
    await asyncio.sleep(2.5)
    await one.says(PODCHAOS, "Run")
    await one.events()


@scenario
async def pod_kill_that_selects_nothing(one: Scene) -> None:
    await abc(one)
    await one.create(PODCHAOS, {"action": "pod-kill", "mode": "all", "selector": one.select("nobody")})
    await asyncio.sleep(2)
    await one.says(PODCHAOS, "Selected")
    await one.events()
    await one.pod("d", app="nobody")
    await asyncio.sleep(2)
    await one.says(PODCHAOS, "Selected")
    await one.delete(PODCHAOS)
    await one.gone(PODCHAOS)


@scenario
async def pod_failure(one: Scene) -> None:
    await one.pod("a", init=True)
    await one.pod("b")
    await one.create(PODCHAOS, {"action": "pod-failure", "mode": "all", "selector": one.select("a")})
    await one.until(PODCHAOS, "AllInjected")
    await one.pods()
    await one.delete(PODCHAOS)
    await one.gone(PODCHAOS)
    await one.pods()


@scenario
async def pod_failure_with_duration(one: Scene) -> None:
    await abc(one)
    spec = {"action": "pod-failure", "mode": "all", "selector": one.select("a"), "duration": "8s"}
    await one.create(PODCHAOS, spec)
    await one.until(PODCHAOS, "AllInjected", desired="Run")
    await one.until(PODCHAOS, "AllRecovered", desired="Stop")
    await one.pods()
    await one.events()


@scenario
async def pod_failure_paused_and_resumed(one: Scene) -> None:
    await abc(one)
    await one.create(PODCHAOS, {"action": "pod-failure", "mode": "all", "selector": one.select("a")})
    await one.until(PODCHAOS, "AllInjected")
    await one.patch(PODCHAOS, PAUSE)
    await one.until(PODCHAOS, "AllRecovered", desired="Stop")
    await one.pods()
    await one.patch(PODCHAOS, RESUME)
    await one.until(PODCHAOS, "AllInjected", desired="Run")
    await one.events()


@scenario
async def pod_failure_of_a_pod_that_goes(one: Scene) -> None:
    await abc(one)
    await one.create(PODCHAOS, {"action": "pod-failure", "mode": "all", "selector": one.select("a")})
    await one.until(PODCHAOS, "AllInjected")
    await one.api.delete(PODS, "a", one.ns, grace=0)
    await asyncio.sleep(1)
    await one.says(PODCHAOS, "Selected")
    await one.delete(PODCHAOS)
    await one.gone(PODCHAOS)


@scenario
async def some_of_many(one: Scene) -> None:
    await abc(one)
    await one.pod("d")
    for mode, value in (("one", ""), ("fixed", "3"), ("fixed-percent", "50"), ("fixed", "9")):
        name = f"{mode}-{value or 1}"
        spec = {"action": "pod-failure", "mode": mode, "selector": {"namespaces": [one.ns], "labelSelectors": ALL}}
        await one.create(PODCHAOS, spec | ({"value": value} if value else {}), name)
        await one._wait(PODCHAOS, name, lambda obj: "AllInjected" in json.dumps(obj.get("status")), name)
        chosen = one.seen.pop()["object"]
        one.seen.append({"step": name, "chosen": len(chosen["records"]), "conditions": chosen["conditions"]})
        await one.delete(PODCHAOS, name)
        await one.gone(PODCHAOS, name)


ALL = {"all": "yes"}


@scenario
async def pods_that_do_not_run(one: Scene) -> None:
    await one.pod("a", phase="Pending")
    await one.pod("b", phase="Running")
    spec = {"action": "pod-failure", "mode": "all", "selector": one.select("a", "b")}
    await one.create(PODCHAOS, spec)
    await one.until(PODCHAOS, "AllInjected")
    selector = one.select("a", "b", podPhaseSelectors=["Running"])
    await one.create(PODCHAOS, {**spec, "selector": selector}, "y")
    await one.until(PODCHAOS, "AllInjected", "y")


@scenario
async def what_admission_refuses(one: Scene) -> None:
    await abc(one)
    chosen = one.select("a")
    podchaos: tuple[Obj, ...] = (
        {"action": "pod-kill", "mode": "fixed", "selector": chosen},
        {"action": "pod-kill", "mode": "fixed", "value": "x", "selector": chosen},
        {"action": "pod-kill", "mode": "fixed-percent", "value": "0", "selector": chosen},
        {"action": "pod-kill", "mode": "fixed-percent", "value": "101", "selector": chosen},
        {"action": "pod-kill", "mode": "some", "selector": chosen},
        {"action": "pod-nap", "mode": "all", "selector": chosen},
        {"action": "pod-failure", "mode": "all", "selector": chosen, "duration": "soon"},
        {"action": "pod-kill", "mode": "all", "selector": chosen, "gracePeriod": -1},
        {"action": "container-kill", "mode": "all", "selector": chosen},
    )
    for number, spec in enumerate(podchaos):
        await one.create(PODCHAOS, spec, f"pod-{number}")
    net = {"mode": "all", "selector": chosen}
    target = {"mode": "all", "selector": one.select("b")}
    networkchaos: tuple[Obj, ...] = (
        {"action": "delay", **net},
        {"action": "delay", **net, "delay": {"latency": "much"}},
        {"action": "delay", **net, "delay": {"latency": "10ms", "correlation": "101"}},
        {"action": "loss", **net, "loss": {"loss": "-1"}},
        {"action": "bandwidth", **net, "bandwidth": {"rate": "fast", "limit": 1, "buffer": 1}},
        {"action": "partition", **net, "direction": "up", "target": target},
        {"action": "partition", **net, "direction": "from"},
        {"action": "partition", **net, "direction": "from", "externalTargets": ["10.9.9.9"]},
        {"action": "delay", **net, "delay": {"latency": "1ms"}, "direction": "from"},
        {"action": "delay", **net, "delay": {"latency": "1ms"}, "direction": "both", "externalTargets": ["10.9.9.9"]},
        {"action": "partition", **net, "target": target, "duration": "-"},
        {"action": "delay", **net, "delay": {"latency": "1ms"}, "duration": "-"},
    )
    for number, spec in enumerate(networkchaos):
        await one.create(NETWORKCHAOS, spec, f"net-{number}")


@scenario
async def a_spec_does_not_change(one: Scene) -> None:
    await abc(one)
    await one.create(PODCHAOS, {"action": "pod-failure", "mode": "all", "selector": one.select("a")})
    await one.until(PODCHAOS, "AllInjected")
    await one.patch(PODCHAOS, {"spec": {"mode": "one"}})
    await one.patch(PODCHAOS, {"spec": {"duration": "10s"}})
    await one.patch(PODCHAOS, {"metadata": {"labels": {"x": "y"}}})


# -- NetworkChaos


def cut(one: Scene, direction: str, **more: Any) -> Obj:
    target = {"mode": "all", "selector": one.select("b", "c")}
    chosen = {"mode": "all", "selector": one.select("a"), "target": target}
    return {"action": "partition", "direction": direction, **chosen, **more}


@scenario
async def partition(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        for direction in ("both", "to", "from"):
            await one.create(NETWORKCHAOS, cut(one, direction), direction)
            await one.until(NETWORKCHAOS, "AllInjected", direction)
            await one.rules("a", "b", "c")
            await one.delete(NETWORKCHAOS, direction)
            await one.gone(NETWORKCHAOS, direction)
        await one.rules("a", "b", "c")


@scenario
async def partition_with_duration(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        await one.create(NETWORKCHAOS, cut(one, "both", duration="8s"))
        await one.until(NETWORKCHAOS, "AllInjected", desired="Run")
        await one.until(NETWORKCHAOS, "AllRecovered", desired="Stop")
        await one.rules("a", "b")
        await one.events()


@scenario
async def partition_from_everybody(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        spec = {"action": "partition", "mode": "all", "selector": one.select("a"), "direction": "to"}
        await one.create(NETWORKCHAOS, spec)
        await one.until(NETWORKCHAOS, "AllInjected")
        await one.rules("a", "b")
        await one.delete(NETWORKCHAOS)
        await one.gone(NETWORKCHAOS)
        await one.create(NETWORKCHAOS, {**spec, "externalTargets": ["10.7.0.0/16", "10.8.0.1"]}, "y")
        await one.until(NETWORKCHAOS, "AllInjected", "y")
        await one.rules("a", "b")


@scenario
async def partition_without_a_target(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        target = {"mode": "all", "selector": one.select("nobody")}
        await one.create(NETWORKCHAOS, cut(one, "both", target=target))
        await asyncio.sleep(2)
        await one.says(NETWORKCHAOS, "Selected")
        await one.rules("a", "b")
        await one.events()
        await one.delete(NETWORKCHAOS)
        await one.gone(NETWORKCHAOS)


@scenario
async def two_partitions_at_once(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        await one.create(NETWORKCHAOS, cut(one, "both"), "first")
        await one.until(NETWORKCHAOS, "AllInjected", "first")
        await one.create(NETWORKCHAOS, cut(one, "to"), "second")
        await one.until(NETWORKCHAOS, "AllInjected", "second")
        await one.rules("a", "b")
        await one.delete(NETWORKCHAOS, "first")
        await one.gone(NETWORKCHAOS, "first")
        await one.rules("a", "b")


@scenario
async def partition_that_the_daemon_refuses(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        one.broken = "no such device"
        await one.create(NETWORKCHAOS, cut(one, "to"))
        await one.says(NETWORKCHAOS, "no such device")
        one.broken = ""
        await one.delete(NETWORKCHAOS)
        await one.gone(NETWORKCHAOS)


@scenario
async def partition_of_a_pod_that_goes(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        await one.create(NETWORKCHAOS, cut(one, "both"))
        await one.until(NETWORKCHAOS, "AllInjected")
        await one.api.delete(PODS, "b", one.ns, grace=0)
        await asyncio.sleep(1)
        await one.says(NETWORKCHAOS, "Selected")
        await one.delete(NETWORKCHAOS)
        await one.gone(NETWORKCHAOS)


@scenario
async def partition_paused_and_resumed(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        await one.create(NETWORKCHAOS, cut(one, "both"))
        await one.until(NETWORKCHAOS, "AllInjected")
        await one.patch(NETWORKCHAOS, PAUSE)
        await one.until(NETWORKCHAOS, "AllRecovered", desired="Stop")
        await one.rules("a", "b")
        await one.patch(NETWORKCHAOS, RESUME)
        await one.until(NETWORKCHAOS, "AllInjected", desired="Run")
        await one.events()


@scenario
async def traffic(one: Scene) -> None:
    await abc(one)
    async with one.daemon():
        chosen = {"mode": "all", "selector": one.select("a")}
        target = {"target": {"mode": "all", "selector": one.select("b")}}
        for name, spec in (
            ("delay-all", {"action": "delay", "delay": {"latency": "50ms"}}),
            (
                "delay-to",
                {"action": "delay", "delay": {"latency": "50ms", "jitter": "5ms"}, "direction": "to"} | target,
            ),
            ("delay-from", {"action": "delay", "delay": {"latency": "50ms"}, "direction": "from"} | target),
            ("delay-both", {"action": "delay", "delay": {"latency": "50ms"}, "direction": "both"} | target),
            ("loss-to", {"action": "loss", "loss": {"loss": "30", "correlation": "50"}, "direction": "to"} | target),
            (
                "rate-to",
                {"action": "bandwidth", "bandwidth": {"rate": "1mbps", "limit": 20000, "buffer": 10000}} | target,
            ),
        ):
            await one.create(NETWORKCHAOS, {**chosen, **spec}, name)
            await one.until(NETWORKCHAOS, "AllInjected", name)
            await one.rules("a", "b")
            await one.delete(NETWORKCHAOS, name)
            await one.gone(NETWORKCHAOS, name)


# -- running them


async def play(api: HttpApi, name: str) -> list[Obj]:
    """What one scenario shows, in a namespace of its own."""
    ns = f"chaos-{name}"[:60].rstrip("-")
    meta = {"name": ns}
    await api.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    with contextlib.suppress(ApiError):  # there already: a controller's work where one runs
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": ns}}
        await api.create(ACCOUNTS, account)
    one = Scene(api, ns)
    try:
        await SCENARIOS[name](one)
    finally:
        for kind in (PODCHAOS, NETWORKCHAOS):
            for left in (await api.list(kind, ns))[0]:
                await api.patch(kind, left["metadata"]["name"], {"metadata": {"finalizers": None}}, ns)
                with contextlib.suppress(ApiError):
                    await api.delete(kind, left["metadata"]["name"], ns)
        await api.delete(NAMESPACES, ns)
    return one.seen


async def record(config: Obj, wanted: list[str]) -> dict[str, list[Obj]]:
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
    async with HttpApi(cluster["server"], user["token"], ca) as api:
        names, turn = wanted or list(SCENARIOS), asyncio.Semaphore(2)  # their client makes 30 requests a second

        async def take(name: str) -> list[Obj]:
            async with turn:
                return await play(api, name)

        played = await asyncio.gather(*(take(name) for name in names), return_exceptions=True)
    for name, seen in zip(names, played, strict=True):
        if isinstance(seen, BaseException):
            print(f"{name}: {seen!r}", file=sys.stderr)
    return {name: seen for name, seen in zip(names, played, strict=True) if not isinstance(seen, BaseException)}


if __name__ == "__main__":
    found = asyncio.run(record(yaml.safe_load(Path(sys.argv[1]).read_text()), sys.argv[2:]))
    json.dump(found, sys.stdout, indent=1, sort_keys=True)
    print()
