"""The controllers over a real control-plane process; the tests play kubelet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sandbox.client import (
    CONFIGMAPS,
    CRDS,
    DAEMONSETS,
    DEPLOYMENTS,
    ENDPOINTSLICES,
    HPAS,
    JOBS,
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    REPLICASETS,
    SERVICES,
    STATEFULSETS,
    ApiError,
    HttpApi,
    Informer,
    Kind,
    Obj,
)
from sandbox.controllers.objects import micro_stamp, stamp
from sandbox.options import COMPRESSED

ROOT = Path(__file__).parents[2]
ZONE = "topology.kubernetes.io/zone"
WITHIN = 15.0  # seconds; generous, the machine may be busy


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """(URL, token, CA) of a control plane with compressed clocks."""
    state = tmp_path_factory.mktemp("control-plane")
    command = [sys.executable, "-m", "sandbox.controlplane", "--state-dir", str(state), "--clocks", COMPRESSED.name]
    errors = (state / "errors").open("w")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, (state / "errors").read_text()
        yield url, (state / "token").read_text().strip(), (state / "ca.crt").read_text()
    finally:
        process.terminate()
        process.communicate(timeout=10)
        errors.close()
        assert "Traceback" not in (state / "errors").read_text()


async def until(look: Callable[[], Awaitable[Any]], good: Callable[[Any], bool], what: str) -> Any:
    """Look until it is good, at most WITHIN seconds."""
    end = time.monotonic() + WITHIN
    while True:
        seen = await look()
        if good(seen):
            return seen
        assert time.monotonic() < end, f"never {what}; last seen: {seen}"
        await asyncio.sleep(0.02)


def contains(name: str, names: set[str]) -> bool:
    return name in names


def established(crd: Obj) -> bool:
    return any(c["type"] == "Established" and c["status"] == "True" for c in crd["status"].get("conditions") or ())


def reads(status: str, node: Obj) -> bool:
    return any(c["type"] == "Ready" and c["status"] == status for c in node["status"]["conditions"])


def effects(node: Obj) -> set[str]:
    return {taint["effect"] for taint in node["spec"].get("taints") or ()}


@dataclass(frozen=True)
class World:
    """A namespace and some nodes that the test keeps alive."""

    api: HttpApi
    space: str
    beating: set[str]

    async def add_nodes(self, *zones: str) -> list[str]:
        names = [f"{self.space}-{zone}{i}" for i, zone in enumerate(zones)]
        for name, zone in zip(names, zones, strict=True):
            labels = {"kubernetes.io/hostname": name, ZONE: f"{self.space}-{zone}", "world": self.space}
            await self.api.create(NODES, {"metadata": {"name": name, "labels": labels}})
            await self.report(name, "True")
            lease = {"metadata": {"name": name, "namespace": "kube-node-lease"}, "spec": {"holderIdentity": name}}
            await self.api.create(LEASES, lease)
            self.beating.add(name)
        for name in names:
            await until(partial(self.api.get, NODES, name), lambda n: not n["spec"].get("taints"), "untainted")
        return names

    async def report(self, node: str, ready: str) -> None:
        room = {"cpu": "8", "memory": "32Gi", "pods": "50", "nvidia.com/gpu": "2"}
        at = stamp()
        found = {"type": "Ready", "status": ready, "reason": "KubeletReady", "message": "", "lastHeartbeatTime": at,
                 "lastTransitionTime": at}  # fmt: skip
        status = {"allocatable": room, "capacity": room, "conditions": [found]}
        await self.api.patch(NODES, node, {"status": status}, sub="status")

    async def beat(self) -> None:
        while True:
            for name in sorted(self.beating):
                with contextlib.suppress(ApiError):
                    patch = {"spec": {"renewTime": micro_stamp()}}
                    await self.api.patch(LEASES, name, patch, "kube-node-lease")
            await asyncio.sleep(0.5)

    async def pods(self, app: str) -> list[Obj]:
        return (await self.api.list(PODS, self.space, labels=f"app={app}"))[0]

    async def maps(self) -> set[str]:
        return {m["metadata"]["name"] for m in (await self.api.list(CONFIGMAPS, self.space))[0]}

    async def names(self) -> set[str]:
        return {p["metadata"]["name"] for p in (await self.api.list(PODS, self.space))[0]}

    async def bound(self) -> set[str]:
        found, _ = await self.api.list(PODS, self.space)
        return {p["metadata"]["name"] for p in found if p["spec"].get("nodeName")}

    async def terminating(self) -> set[str]:
        found, _ = await self.api.list(PODS, self.space)
        return {p["metadata"]["name"] for p in found if "deletionTimestamp" in p["metadata"]}

    async def renewed(self) -> set[str]:
        """Pods with the image `y`."""
        found, _ = await self.api.list(PODS, self.space)
        return {p["metadata"]["name"] for p in found if p["spec"]["containers"][0]["image"] == "y"}

    async def ready(self, pod: Obj, ip: str = "", *, phase: str = "Running") -> None:
        good = "True" if phase == "Running" else "False"
        found = [{"type": t, "status": s, "lastTransitionTime": stamp()}
                 for t, s in (("PodScheduled", "True"), ("Ready", good))]  # fmt: skip
        status: Obj = {"phase": phase, "conditions": found}
        if ip:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        await self.api.patch(PODS, pod["metadata"]["name"], {"status": status}, self.space, sub="status")

    async def make(self, kind: Kind, name: str, **spec: Any) -> Obj:
        body = {"metadata": {"name": name, "namespace": self.space}, "spec": spec}
        return await self.api.create(kind, {"apiVersion": kind.api_version, "kind": kind.kind, **body})

    def workload(self, app: str, **more: Any) -> Obj:
        """selector and template; pods go to this world's nodes only."""
        spec = {"containers": [{"name": "c", "image": "x"}], "nodeSelector": {"world": self.space}, **more}
        template = {"metadata": {"labels": {"app": app}}, "spec": spec}
        return {"selector": {"matchLabels": {"app": app}}, "template": template}


@contextlib.asynccontextmanager
async def world(control_plane: tuple[str, str, str], space: str) -> AsyncIterator[World]:
    url, token, ca = control_plane
    async with HttpApi(url, token, ca) as api:
        await api.create(NAMESPACES, {"metadata": {"name": space}})
        made = World(api, space, set())
        beat = asyncio.create_task(made.beat())
        try:
            yield made
        finally:
            beat.cancel()
            for name in list(made.beating):
                with contextlib.suppress(ApiError):
                    await api.delete(NODES, name)


def test_a_deployment_is_bound_spread_and_quick(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "quick") as w:
            await w.add_nodes(*"aabbcc")
            async with Informer(w.api, PODS, w.space).running() as pods:
                start = time.monotonic()
                await w.make(DEPLOYMENTS, "web", replicas=6, **w.workload("web"))

                async def nodes() -> list[str]:
                    return [p["spec"].get("nodeName", "") for p in pods.objects.values()]

                found = await until(nodes, lambda n: len(n) == 6 and all(n), "six bound pods")
                took = time.monotonic() - start
            assert len(set(found)) == 6
            assert took < 3, f"{took:.2f} s"  # 0.3 s alone on the machine

    asyncio.run(scene())


def test_endpoints_follow_readiness_at_once(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "slices") as w:
            await w.add_nodes("a")
            await w.make(SERVICES, "s", selector={"app": "web"}, ports=[{"port": 80, "targetPort": 8080}])
            await w.make(DEPLOYMENTS, "web", replicas=1, **w.workload("web"))
            (pod,) = await until(
                lambda: w.pods("web"), lambda p: bool(p and p[0]["spec"].get("nodeName")), "a bound pod"
            )
            async with Informer(w.api, ENDPOINTSLICES, w.space).running() as slices:

                async def endpoints() -> list[Obj]:
                    return [e for s in slices.objects.values() for e in s.get("endpoints") or ()]

                start = time.monotonic()
                await w.ready(pod, "10.9.0.1")
                (one,) = await until(endpoints, lambda e: bool(e and e[0]["conditions"]["ready"]), "a ready endpoint")
                assert time.monotonic() - start < 2  # 0.05 s alone on the machine
                assert one["zone"] == "slices-a"
                await w.api.delete(PODS, pod["metadata"]["name"], w.space)
                (one,) = await until(endpoints, lambda e: e[0]["conditions"]["terminating"], "terminating")
                assert (one["conditions"]["ready"], one["conditions"]["serving"]) == (False, True)

    asyncio.run(scene())


def test_a_lost_node_is_evicted_and_its_deployment_moves(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "lost") as w:
            names = await w.add_nodes(*"aaa")
            await w.make(DEPLOYMENTS, "web", replicas=1, **w.workload("web"))
            (pod,) = await until(
                lambda: w.pods("web"), lambda p: bool(p and p[0]["spec"].get("nodeName")), "a bound pod"
            )
            await w.ready(pod)
            lost = pod["spec"]["nodeName"]
            start = time.monotonic()
            w.beating.discard(lost)

            async def conditions() -> dict[str, str]:
                node = await w.api.get(NODES, lost)
                return {c["type"]: c["status"] for c in node["status"]["conditions"]}

            await until(conditions, lambda c: c["Ready"] == "Unknown", "Unknown")
            assert time.monotonic() - start >= COMPRESSED.node_monitor_grace - 1

            async def elsewhere() -> list[str]:
                alive = [p for p in await w.pods("web") if "deletionTimestamp" not in p["metadata"]]
                return [p["spec"].get("nodeName", "") for p in alive]

            moved = await until(elsewhere, lambda n: len(n) == 1 and n[0] not in ("", lost), "moved")
            assert moved[0] in names
            assert time.monotonic() - start >= COMPRESSED.node_monitor_grace + COMPRESSED.toleration_seconds - 2
            gone = await w.api.get(PODS, pod["metadata"]["name"], w.space)
            assert "DisruptionTarget" in [c["type"] for c in gone["status"]["conditions"]]
            await w.report(lost, "True")
            w.beating.add(lost)
            await until(lambda: w.api.get(NODES, lost), lambda n: not n["spec"].get("taints"), "untainted again")
            await w.api.delete(NODES, lost)
            await until(lambda: w.pods("web"), lambda p: len(p) == 1, "collected with its node")

    asyncio.run(scene())


def test_when_everything_is_lost_nothing_is_evicted(control_plane: tuple[str, str, str]) -> None:
    """All nodes silent at once: the control plane distrusts itself, and gives them a fresh chance afterwards."""

    async def scene() -> None:
        async with world(control_plane, "blackout") as w:
            first, second = await w.add_nodes("a", "b")
            others = [n for n in (await w.api.list(NODES))[0] if n["metadata"]["name"] not in (first, second)]
            assert not others  # each test deletes its nodes
            w.beating.clear()
            for name in (first, second):
                await until(partial(w.api.get, NODES, name), partial(reads, "Unknown"), "Unknown")
            seen = time.monotonic()
            while time.monotonic() - seen < 4 * COMPRESSED.node_monitor_period:
                for name in (first, second):
                    assert effects(await w.api.get(NODES, name)) == {"NoSchedule"}
                await asyncio.sleep(0.1)
            w.beating.add(first)
            await w.report(first, "True")
            await until(partial(w.api.get, NODES, first), lambda n: not n["spec"].get("taints"), "untainted")
            await until(partial(w.api.get, NODES, second), lambda n: "NoExecute" in effects(n), "evicted from")
            w.beating.add(second)  # for the clean-up

    asyncio.run(scene())


def test_daemons_run_on_every_node_and_roll(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "daemons") as w:
            first, second = await w.add_nodes(*"ab")
            await w.make(DAEMONSETS, "d", **w.workload("d"))
            pods = await until(
                lambda: w.pods("d"), lambda p: len(p) == 2 and all(x["spec"].get("nodeName") for x in p), "two pods"
            )
            assert {p["spec"]["nodeName"] for p in pods} == {first, second}
            for pod in pods:
                await w.ready(pod)
            await until(
                lambda: w.api.get(DAEMONSETS, "d", w.space), lambda d: d["status"].get("numberAvailable") == 2, "status"
            )
            image = [{"name": "c", "image": "y"}]
            patch = {"spec": {"template": {"spec": {"containers": image}}}}
            await w.api.patch(DAEMONSETS, "d", patch, w.space, type="strategic")
            await until(
                lambda: w.pods("d"),
                lambda p: sum("deletionTimestamp" in x["metadata"] for x in p) == 1,
                "one pod replaced at a time",
            )
            (going,) = await until(w.terminating, lambda names: len(names) == 1, "one terminating")
            await w.api.delete(PODS, going, w.space, grace=0)
            await until(w.renewed, lambda names: len(names) == 1, "its successor")
            failing = next(iter(await w.renewed()))
            await w.ready(await w.api.get(PODS, failing, w.space), phase="Failed")
            await until(w.names, lambda names: failing not in names and len(names) == 2, "the failed one replaced")
            (third,) = await w.add_nodes("c")
            await until(
                lambda: w.pods("d"), lambda p: third in [x["spec"].get("nodeName") for x in p], "on the new node"
            )

    asyncio.run(scene())


def test_statefulset_rolls_from_the_highest(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "stateful") as w:
            await w.add_nodes("a")
            await w.make(STATEFULSETS, "db", replicas=2, serviceName="db", **w.workload("db"))
            for name in ("db-0", "db-1"):
                await until(w.bound, partial(contains, name), f"{name} bound")
                await w.ready(await w.api.get(PODS, name, w.space))
            patch = {"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "y"}]}}}}
            await w.api.patch(STATEFULSETS, "db", patch, w.space, type="strategic")
            for name in ("db-1", "db-0"):
                await until(w.terminating, partial(contains, name), f"{name} going")
                await w.api.delete(PODS, name, w.space, grace=0)
                await until(w.renewed, partial(contains, name), f"{name} new")
                await until(w.bound, partial(contains, name), f"{name} bound again")
                await w.ready(await w.api.get(PODS, name, w.space))
            done = await until(
                lambda: w.api.get(STATEFULSETS, "db", w.space),
                lambda s: s["status"]["currentRevision"] == s["status"]["updateRevision"],
                "complete",
            )
            assert done["status"]["updatedReplicas"] == 2

    asyncio.run(scene())


def test_a_failing_job_gives_up(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "jobs") as w:
            template = {"spec": {"containers": [{"name": "c", "image": "x"}], "restartPolicy": "Never"}}
            await w.make(JOBS, "j", template=template, backoffLimit=0)
            found = await until(
                lambda: w.api.list(PODS, w.space, labels="job-name=j"), lambda f: len(f[0]) == 1, "a pod"
            )
            (pod,) = found[0]
            await w.ready(pod, phase="Failed")
            job = await until(
                lambda: w.api.get(JOBS, "j", w.space),
                lambda j: any(c["type"] == "Failed" for c in j["status"].get("conditions") or ()),
                "failed",
            )
            assert job["status"]["failed"] == 1
            assert [c["reason"] for c in job["status"]["conditions"]] == ["BackoffLimitExceeded"] * 2

    asyncio.run(scene())


@pytest.mark.parametrize("seed", range(3))
def test_a_deployment_converges_whatever_happens(control_plane: tuple[str, str, str], seed: int) -> None:
    """Scaling, new images, pauses, dying pods in any order: in the end exactly the wanted pods run."""
    dice = random.Random(seed)
    space = f"storm{seed}"

    async def kubelet(w: World, pods: Informer) -> None:
        while True:
            for pod in list(pods.objects.values()):
                with contextlib.suppress(ApiError):
                    if "deletionTimestamp" in pod["metadata"]:
                        await w.api.delete(PODS, pod["metadata"]["name"], w.space, grace=0)
                    elif pod["spec"].get("nodeName") and pod["status"]["phase"] == "Pending":
                        await w.ready(pod)
                await asyncio.sleep(dice.random() * 0.005)
            await asyncio.sleep(0.02)

    async def strike(w: World, pods: Informer) -> None:
        """Do one random thing."""
        spec: Obj = {}
        match dice.randrange(5):
            case 0:
                spec = {"replicas": dice.randrange(8)}
            case 1:
                image = [{"name": "c", "image": dice.choice("xyz")}]
                spec = {"template": {"spec": {"containers": image}}}
            case 2:
                spec = {"paused": dice.random() < 0.5}
            case _ if pods.objects:
                victim = dice.choice(sorted(pods.objects))
                if dice.random() < 0.5:
                    await w.api.delete(PODS, victim[1], w.space)
                else:
                    await w.ready(pods.objects[victim], phase="Failed")
        if spec:
            await w.api.patch(DEPLOYMENTS, "web", {"spec": spec}, w.space, type="strategic")

    async def scene() -> None:
        async with world(control_plane, space) as w, Informer(w.api, PODS, w.space).running() as pods:
            await w.add_nodes(*"abc")
            await w.make(DEPLOYMENTS, "web", replicas=4, **w.workload("web"))
            player = asyncio.create_task(kubelet(w, pods))
            for _ in range(60):
                with contextlib.suppress(ApiError):
                    await strike(w, pods)
                await asyncio.sleep(dice.random() * 0.06)
            last = {"replicas": 5, "paused": False, "template": {"spec": {"containers": [{"name": "c", "image": "w"}]}}}
            await w.api.patch(DEPLOYMENTS, "web", {"spec": last}, w.space, type="strategic")

            async def state() -> tuple[list[str], list[int], Obj]:
                alive = [p for p in await w.pods("web") if "deletionTimestamp" not in p["metadata"]]
                running = [p["spec"]["containers"][0]["image"] for p in alive if p["status"]["phase"] == "Running"]
                sets, _ = await w.api.list(REPLICASETS, w.space)
                deployment = await w.api.get(DEPLOYMENTS, "web", w.space)
                return running, sorted(rs["spec"]["replicas"] for rs in sets if rs["spec"]["replicas"]), deployment

            seen = await until(
                state,
                lambda s: s[0] == ["w"] * 5 and s[1] == [5] and s[2]["status"].get("availableReplicas") == 5,
                f"settled (seed {seed})",
            )
            await asyncio.sleep(0.3)
            assert (await state())[:2] == seen[:2]
            player.cancel()

    asyncio.run(scene())


def test_foreground_deletion_ends_with_the_owner(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "foreground") as w:
            await w.make(DEPLOYMENTS, "web", replicas=2, **w.workload("web"))
            await until(lambda: w.pods("web"), lambda p: len(p) == 2, "two pods")
            await w.api.delete(DEPLOYMENTS, "web", w.space, propagation="Foreground")
            async with Informer(w.api, DEPLOYMENTS, w.space).running() as left:

                async def owners() -> int:
                    return len(left.objects)

                await until(owners, lambda n: n == 0, "the Deployment gone")
            assert (await w.api.list(REPLICASETS, w.space))[0] == []
            assert await w.pods("web") == []

    asyncio.run(scene())


def test_custom_resources_take_their_dependents_along(control_plane: tuple[str, str, str]) -> None:
    widgets = Kind("controllers.test", "v1", "widgets", "Widget")
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    crd: Obj = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.controllers.test"},
        "spec": {
            "group": "controllers.test",
            "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "listKind": "WidgetList"},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }

    async def scene() -> None:
        async with world(control_plane, "custom") as w:
            await w.api.create(CRDS, crd)
            try:
                await until(partial(w.api.get, CRDS, "widgets.controllers.test"), established, "established")
                owner = await w.make(widgets, "w")
                ref = {"apiVersion": "controllers.test/v1", "kind": "Widget", "name": "w",
                       "uid": owner["metadata"]["uid"]}  # fmt: skip
                meta = {"name": "owned", "namespace": w.space, "ownerReferences": [ref]}
                await w.api.create(CONFIGMAPS, {"metadata": meta})
                await w.api.delete(widgets, "w", w.space)
                await until(w.maps, lambda names: "owned" not in names, "the dependent gone")
                meta["ownerReferences"] = [{**ref, "uid": "00000000-0000-0000-0000-000000000000"}]
                await w.api.create(CONFIGMAPS, {"metadata": meta})
                await until(w.maps, lambda names: "owned" not in names, "an orphan from birth gone")
            finally:
                await w.api.delete(CRDS, "widgets.controllers.test")

    asyncio.run(scene())


def test_deleting_a_namespace_takes_everything_along(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "doomed") as w:
            await w.make(DEPLOYMENTS, "web", replicas=2, **w.workload("web"))
            await until(lambda: w.pods("web"), lambda p: len(p) == 2, "two pods")
            await w.api.delete(NAMESPACES, w.space)

            async def gone() -> bool:
                try:
                    await w.api.get(NAMESPACES, w.space)
                except ApiError as error:
                    return error.not_found
                return False

            await until(gone, bool, "gone")
            assert (await w.api.list(REPLICASETS))[0] == [
                rs for rs in (await w.api.list(REPLICASETS))[0] if rs["metadata"]["namespace"] != w.space
            ]

    asyncio.run(scene())


def test_an_autoscaler_without_metrics_says_so(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "scaled") as w:
            await w.make(DEPLOYMENTS, "web", replicas=1, **w.workload("web"))
            metric = {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization",
                      "averageUtilization": 50}}}  # fmt: skip
            ref = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}
            await w.make(HPAS, "h", scaleTargetRef=ref, minReplicas=2, maxReplicas=4, metrics=[metric])
            await until(
                lambda: w.api.get(DEPLOYMENTS, "web", w.space), lambda d: d["spec"]["replicas"] == 2, "at its minimum"
            )

            async def reasons() -> dict[str, str]:
                hpa = await w.api.get(HPAS, "h", w.space)
                return {c["type"]: c["reason"] for c in (hpa.get("status") or {}).get("conditions") or ()}

            found = await until(reasons, lambda r: "ScalingActive" in r, "a condition")
            assert found["ScalingActive"] == "FailedGetResourceMetric"

    asyncio.run(scene())


def test_an_idle_control_plane_costs_nothing(control_plane: tuple[str, str, str]) -> None:
    """No loop of the controllers turns faster than the clocks ask for."""
    del control_plane
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    plane = next(c for c in children if b"sandbox.controlplane" in Path(f"/proc/{c}/cmdline").read_bytes())

    def cpu() -> int:
        fields = Path(f"/proc/{plane}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    async def scene() -> None:
        before = cpu()
        await asyncio.sleep(2)
        ticks = cpu() - before
        assert ticks / os.sysconf("SC_CLK_TCK") < 0.3  # seconds of CPU in two seconds

    asyncio.run(scene())
