"""Stress in real containers: their CPU quota is used up, their memory limit is hit, and nothing stays."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_world import NS, World, chosen, condition_of, on, records
from nodes_world import PYTHON, host_pids, sandbox

from benchmarks.processes import family
from sandbox.chaos.stress import Refused, Stress, parse
from sandbox.client import PODS, STRESSCHAOS, Obj
from sandbox.node.cgroups import base_name
from sandbox.up import Running

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("stress"), nodes_per_zone=2) as made:
        if made.not_enforced:
            pytest.skip(made.not_enforced)
        yield made


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


async def start(one: World, name: str, node: str = "node-a-1", **limits: str) -> Obj:
    web: Obj = {"name": "web", "image": PYTHON, "args": ["python3", "-c", "import time; time.sleep(600)"]}
    spec = {
        "nodeName": node,
        "containers": [web | {"resources": {"limits": limits}}],
        "terminationGracePeriodSeconds": 1,
    }
    await one.api.create(PODS, {"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}, NS)
    return await ready(one, name)


async def ready(one: World, name: str) -> Obj:
    async def probe() -> Obj | None:
        pod = await one.api.get(PODS, name, NS)
        return pod if condition_of(pod, "Ready") == "True" else None

    found: Obj = await one.until(f"{name} Ready", probe)
    return found


async def stress(one: World, name: str, app: str, **more: Any) -> None:
    await one.chaos(STRESSCHAOS, name, {"mode": "all", "selector": chosen(app), **more})


def throttled(running: Running, pod: Obj) -> int:
    base = base_name(Path(running.state_dir))
    (stat,) = Path("/sys/fs/cgroup").rglob(f"{base}/*/{pod['metadata']['uid']}/web.0/cpu.stat")
    return int(dict(line.split() for line in stat.read_text().splitlines())["nr_throttled"])


def machine(running: Running, name: str) -> int:
    """The pid of a machine of this sandbox."""
    (pid,) = [pid for pid in host_pids(f"gameday: node {name}") if running.pid in ancestors(pid)]
    return pid


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def zombies(running: Running) -> list[int]:
    """Found by a soak: workers that outlived their stressor by a moment were left to a process that reaps none."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    return [pid for pid in family(running.pid) if state(pid) == "Z"]


async def no_stressors() -> bool:
    return not host_pids("chaos stressor")


def test_cpu_stress_uses_the_containers_quota_and_ends(running: Running) -> None:
    async def test(one: World) -> None:
        pod = await start(one, "busy", cpu="200m")
        before = throttled(running, pod)
        await stress(one, "burn", "busy", stressors={"cpu": {"workers": 2, "load": 100}})
        found = await one.injected(STRESSCHAOS, "burn")
        assert [record["id"] for record in records(found)] == [f"{NS}/busy/web"]
        assert found["status"]["instances"][f"{NS}/busy/web"]["startTime"]

        async def more() -> bool:
            return throttled(running, pod) >= before + 3

        await one.until("the quota is used up", more)
        await one.delete(STRESSCHAOS, "burn")
        await one.until("no stressor is left", no_stressors)
        assert not zombies(running), "the container's first process would keep them"
        assert (await one.api.get(PODS, "busy", NS))["status"]["containerStatuses"][0]["restartCount"] == 0
        await one.api.delete(PODS, "busy", NS, grace=0)

    on(running, test)


def test_memory_stress_beyond_the_limit_is_an_oom_kill(running: Running) -> None:
    async def test(one: World) -> None:
        await start(one, "full", memory="96Mi")
        await stress(one, "fill", "full", stressors={"memory": {"workers": 1, "size": "400MB"}})

        async def killed() -> Obj | None:
            pod = await one.api.get(PODS, "full", NS)
            status = pod["status"]["containerStatuses"][0]
            ended = (status["state"].get("terminated") or status["lastState"].get("terminated")) or {}
            return status if (ended.get("reason"), ended.get("exitCode")) == ("OOMKilled", 137) else None

        await one.until("the container is OOMKilled", killed)
        await one.until("its stressor went with it", no_stressors)
        await one.delete(STRESSCHAOS, "fill")
        await one.api.delete(PODS, "full", NS, grace=0)

    on(running, test)


def test_memory_stress_within_the_limit_is_borne_and_paused(running: Running) -> None:
    async def test(one: World) -> None:
        await start(one, "half", memory="256Mi")
        await stress(one, "some", "half", stressors={"memory": {"workers": 1, "size": "30%"}})
        await one.injected(STRESSCHAOS, "some")
        assert host_pids("chaos stressor")
        pause = {"metadata": {"annotations": {"experiment.chaos-mesh.org/pause": "true"}}}
        await one.api.patch(STRESSCHAOS, "some", pause, NS)
        await one.recovered(STRESSCHAOS, "some")
        await one.until("paused: no stressor", no_stressors)
        await one.api.patch(STRESSCHAOS, "some", {"metadata": {"annotations": None}}, NS)
        await one.injected(STRESSCHAOS, "some")
        assert host_pids("chaos stressor")
        await one.delete(STRESSCHAOS, "some")
        await one.until("no stressor is left", no_stressors)
        assert (await one.api.get(PODS, "half", NS))["status"]["containerStatuses"][0]["restartCount"] == 0
        await one.api.delete(PODS, "half", NS, grace=0)

    on(running, test)


def test_stress_ends_by_itself_after_its_duration(running: Running) -> None:
    async def test(one: World) -> None:
        await start(one, "brief", cpu="200m")
        await stress(one, "short", "brief", duration="3s", stressors={"cpu": {"workers": 1}})
        await one.recovered(STRESSCHAOS, "short")
        await one.until("no stressor is left", no_stressors)
        await one.delete(STRESSCHAOS, "short")
        await one.api.delete(PODS, "brief", NS, grace=0)

    on(running, test)


def test_what_is_refused_says_why(running: Running) -> None:
    async def test(one: World) -> None:
        await start(one, "plain")
        await stress(one, "ng", "plain", stressngStressors="--cpu 1")
        await one.noted(STRESSCHAOS, "ng", "Chaos Mesh ignores stressngStressors")
        await stress(one, "share", "plain", stressors={"memory": {"workers": 1, "size": "50%"}})
        await one.noted(STRESSCHAOS, "share", "it has none")
        for name in ("ng", "share"):
            await one.delete(STRESSCHAOS, name)
        await one.api.delete(PODS, "plain", NS, grace=0)

    on(running, test)


def test_a_daemon_that_is_dead_leaves_the_object_stuck(running: Running) -> None:
    async def test(one: World) -> None:
        await start(one, "far", "node-a-2", cpu="100m")
        await stress(one, "stuck", "far", stressors={"cpu": {"workers": 1}})
        await one.injected(STRESSCHAOS, "stuck")
        os.kill(machine(running, "node-a-2"), signal.SIGPWR)
        await one.api.delete(STRESSCHAOS, "stuck", NS)
        found = await one.noted(STRESSCHAOS, "stuck", "does not answer")
        assert records(found)[0]["phase"] == "Injected" and found["metadata"]["finalizers"]
        await one.api.patch(STRESSCHAOS, "stuck", {"metadata": {"finalizers": []}}, NS)
        await one.gone(STRESSCHAOS, "stuck")

    on(running, test)


# — pure —

GIB = 2**30


def test_what_is_asked_for() -> None:
    cpu = {"stressors": {"cpu": {"workers": 2, "load": 30}}}
    assert parse(cpu, None, GIB) == Stress(cpu_workers=2, cpu_load=0.3)
    memory = {"stressors": {"memory": {"workers": 1, "size": "25%", "oomScoreAdj": 5}}}
    assert parse(memory, 4 * GIB, GIB) == Stress(memory_workers=1, memory_bytes=GIB, oom_score_adj=5)
    assert parse({"stressors": {"memory": {"workers": 1}}}, GIB, GIB).memory_bytes == GIB, "all of it"
    assert parse({"stressors": {"memory": {"workers": 1, "size": "64MB"}}}, None, GIB).memory_bytes == 64 << 20


@pytest.mark.parametrize(
    ("stressors", "why"),
    [
        ({"cpu": {"workers": 1, "options": ["--x"]}}, "no options"),
        ({"memory": {"workers": 1, "size": "much"}}, "no size"),
        ({"memory": {"workers": 3, "size": "256MB"}}, "most of the machine"),
        ({"memory": {"workers": 1}}, "it has none"),
    ],
)
def test_what_is_not_made(stressors: Obj, why: str) -> None:
    with pytest.raises(Refused, match=why):
        parse({"stressors": stressors}, None, GIB)
