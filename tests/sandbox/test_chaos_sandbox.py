"""Experiments on real machines: processes die, images change, packets are dropped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chaos_world import NS, World, condition_of, on
from nodes_world import PYTHON, SERVER, sandbox

from sandbox.client import NETWORKCHAOS, PODCHAOS, PODS, Obj
from sandbox.up import Running

PAUSE = "gcr.io/google-containers/pause:latest"
PROBE = """
import socket, sys, time
while True:
    try:
        socket.create_connection((sys.argv[1], 8000), timeout=0.3).close()
        print('open', flush=True)
    except OSError:
        print('shut', flush=True)
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("chaos"), zones=("a", "b")) as made:
        yield made


async def start(one: World, name: str, node: str, *args: str) -> Obj:
    """A Ready pod: the web server, or what `args` say."""
    command = ["python3", "-u", "-c", *(args or (SERVER,))]
    container: Obj = {"name": "web", "image": PYTHON, "args": command}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 2}
    await one.api.create(PODS, {"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}, NS)
    return await ready(one, name)


async def ready(one: World, name: str, restarts: int = 0) -> Obj:
    async def probe() -> Obj | None:
        pod = await one.api.get(PODS, name, NS)
        statuses = pod.get("status", {}).get("containerStatuses") or [{}]
        ok = condition_of(pod, "Ready") == "True" and statuses[0].get("restartCount", 0) >= restarts
        return pod if ok else None

    return await one.until(f"{name} Ready after {restarts} restarts", probe)


def test_container_kill_restarts_the_container(running: Running) -> None:
    async def test(one: World) -> None:
        before = await start(one, "killed", "node-a-1")
        await one.pod_chaos("ck", "container-kill", "killed", containerNames=["web"])
        await one.injected(PODCHAOS, "ck")
        after = await ready(one, "killed", restarts=1)
        (status,) = after["status"]["containerStatuses"]
        assert status["lastState"]["terminated"]["exitCode"] == 137
        assert status["restartCount"] == 1, "once per experiment"
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        await one.delete(PODCHAOS, "ck")

    on(running, test)


def test_pod_failure_runs_pause_in_the_same_pod_and_recovers(running: Running) -> None:
    async def test(one: World) -> None:
        before = await start(one, "failed", "node-a-1")
        await one.pod_chaos("pf", "pod-failure", "failed")
        await one.injected(PODCHAOS, "pf")

        async def paused() -> Obj | None:
            pod = await one.api.get(PODS, "failed", NS)
            (status,) = pod["status"]["containerStatuses"]
            return pod if status["image"] == PAUSE and "running" in status["state"] else None

        during = await one.until("the pause image runs", paused)
        assert during["metadata"]["uid"] == before["metadata"]["uid"]
        assert during["status"]["podIP"] == before["status"]["podIP"]
        await one.delete(PODCHAOS, "pf")
        after = await ready(one, "failed", restarts=2)
        assert after["spec"]["containers"][0]["image"] == PYTHON

    on(running, test)


def test_partition_between_machines_cuts_and_heals(running: Running) -> None:
    async def test(one: World) -> None:
        server = await start(one, "server", "node-a-1")
        await start(one, "client", "node-b-1", PROBE, server["status"]["podIP"])

        async def says(word: str) -> None:
            async def probe() -> bool:
                path = PODS.path(NS, "client", "log")
                async with one.api._session.get(  # type: ignore[union-attr]
                    running.api_url + path, params={"tailLines": "2"}
                ) as answer:
                    return (await answer.text()).split()[-2:] == [word] * 2

            await one.until(f"the client finds the server {word}", probe)

        await says("open")
        await one.partition("zone", "client", "server", "both")
        await one.injected(NETWORKCHAOS, "zone")
        await says("shut")
        await one.delete(NETWORKCHAOS, "zone")
        await says("open")

    on(running, test)
