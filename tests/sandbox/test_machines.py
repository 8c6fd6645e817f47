"""Machines crash and boot again; pods that share the machine's processes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from nodes_world import READINESS, api_of, eventually, living, pod, sandbox

from faults.freeze import FREEZE
from sandbox.client import NODES, PODS, Obj
from sandbox.up import Running

# A TLS transport that is cancelled in the middle of a watch closes a moment after its loop has.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("machines") / "s") as found:
        yield found


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def shell(name: str, script: str, container: Obj | None = None, **spec: Any) -> Obj:
    web = {"name": "web", "image": "busybox:1.36", "command": ["sh", "-c", script], "args": None} | (container or {})
    return pod(name, web, restartPolicy="Never", terminationGracePeriodSeconds=1, **spec)


def sysrq(name: str, key: str) -> Obj:
    """A pod that writes `key` to the machine's /proc/sysrq-trigger, each time that it starts."""
    mount = {"volumeMounts": [{"name": "sysrq", "mountPath": "/sysrq-trigger"}]}
    volumes = [{"name": "sysrq", "hostPath": {"path": "/proc/sysrq-trigger"}}]
    return shell(name, f"sleep 0.5; echo {key} > /sysrq-trigger; sleep 60", mount, volumes=volumes)


def test_a_reset_machine_boots_again_and_takes_up_its_pods(running: Running) -> None:
    """facts/kubelet.md §6: same pod objects, new sandboxes, one restart more, last state Unknown/255."""

    async def scenario() -> None:
        async with living(running, pod("survivor", {"readinessProbe": READINESS})) as life:
            await life.until(lambda s: s.ready)
            before = await life.api.get(NODES, "node-a-1")
            mark = len(life.seen)
            async with living(running, sysrq("trigger", "b")) as trigger:
                lost = await life.until(lambda s: s.ended, within=25, since=mark)
                assert lost.ended == lost.ended | {"exitCode": 255, "reason": "Unknown"}
                assert "podIP" not in lost.status and not lost.ready and lost.restarts == 0
                back = await life.until(lambda s: s.ready, within=15, since=mark + 1)
                while back.restarts == 0:  # states of before the crash come first
                    back = await life.until(lambda s: s.ready and s.restarts, within=15, since=mark + 1)
                assert back.restarts == 1 and back.last and back.last["exitCode"] == 255
                assert [e["reason"] for e in await life.events("SandboxChanged")] == ["SandboxChanged"]
                # What must not run twice does not: it would crash the machine again.
                ended = await trigger.until(lambda s: s.status.get("phase") == "Failed", within=10)
                assert ended.restarts == 0
            after = await life.api.get(NODES, "node-a-1")
            assert after["metadata"]["uid"] == before["metadata"]["uid"]
            assert after["status"]["nodeInfo"]["bootID"] != before["status"]["nodeInfo"]["bootID"]

            async def ready() -> bool:
                node = await life.api.get(NODES, "node-a-1")
                return any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"])

            await eventually(ready, within=5)

    asyncio.run(scenario())


def test_a_pod_with_the_hosts_processes_stops_those_of_one_pod_and_lets_them_go(running: Running) -> None:
    """The script of PodHang and ZombieEngine, as its Job runs it."""

    async def scenario() -> None:
        async with (
            living(running, pod("victim", {"readinessProbe": READINESS})) as victim,
            living(running, pod("bystander", {"readinessProbe": READINESS})) as bystander,
        ):
            uid = (await victim.until(lambda s: s.ready)).object["metadata"]["uid"]
            await bystander.until(lambda s: s.ready)
            wanted = {"POD_UID": uid, "POD_NAME": "victim", "PATTERN": ".", "SECONDS_HELD": "600"}
            env = {"env": [{"name": key, "value": value} for key, value in wanted.items()]}
            async with living(running, shell("warden", FREEZE, env, hostPID=True)) as warden:
                await victim.until(lambda s: s.condition("Ready").get("status") == "False", since=len(victim.seen) - 1)
                mark = len(victim.seen)
                assert bystander.seen[-1].ready, "and neither its kubelet nor anybody else"
                await warden.delete(grace=5)
                await warden.gone(within=10)
                await victim.until(lambda s: s.ready, since=mark)
            async with api_of(running) as api:
                left = await api.get(PODS, "victim", "default")
                assert left["status"]["containerStatuses"][0]["restartCount"] == 0, "stopped, not killed"

    asyncio.run(scenario())


def test_nothing_is_stopped_where_nothing_matches(running: Running) -> None:
    async def scenario() -> None:
        wanted = {"POD_UID": "nobody", "POD_NAME": "nobody", "PATTERN": ".", "SECONDS_HELD": "600"}
        env = {"env": [{"name": key, "value": value} for key, value in wanted.items()]}
        async with living(running, shell("warden", FREEZE, env, hostPID=True)) as warden:
            ended = await warden.until(lambda s: s.status.get("phase") == "Failed")
            assert ended.ended and ended.ended["exitCode"] == 1

    asyncio.run(scenario())


def test_a_crashed_machine_stays_down_until_its_node_is_deleted(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, sysrq("halt", "c")) as life:
            await life.until(lambda s: s.running)

            async def unknown() -> bool:
                node = await life.api.get(NODES, "node-a-1")
                return any(c["type"] == "Ready" and c["status"] == "Unknown" for c in node["status"]["conditions"])

            await eventually(unknown, within=12)
            await life.api.delete(NODES, "node-a-1")

            async def replaced() -> bool:
                nodes, _ = await life.api.list(NODES)
                return [n["metadata"]["name"] for n in nodes] == ["node-a-2"]

            await eventually(replaced, within=8)

    asyncio.run(scenario())
