"""A sandbox of an ordinary user: the same in a user namespace, but for what it says it cannot enforce."""

from __future__ import annotations

import asyncio
import gc
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_world import NS, World, chosen
from nodes_world import PYTHON, api_of, eventually, living, pod, printed, require_root_and_prometheus

from sandbox.client import NETWORKCHAOS
from sandbox.up import Running, down, find

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ORDINARY = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    require_root_and_prometheus()  # only to play the other: root owns the interpreter here
    if shutil.which("unshare") is None or subprocess.run((*ORDINARY, "true"), check=False).returncode:
        pytest.skip("needs unshare, and a kernel that lets it make a user namespace")
    state = tmp_path_factory.mktemp("ordinary") / "s"
    command = (*ORDINARY, sys.executable, "-m", "sandbox.up", "up", "--stack", "none", "--state-dir", str(state))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "not enforced: CPU and memory limits" in done.stdout and "not enforced: runAsUser" in done.stdout
        found = find(state)
        assert found is not None
        yield found
    finally:
        down(state)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


SAY = """
import os, socket, time
print(os.getuid(), flush=True)
print(socket.gethostbyname('kubernetes.default'), flush=True)
socket.create_connection(('kubernetes.default', 443), timeout=5)
try: open('/etc/gameday-test', 'w')
except OSError as error: print(error.errno, flush=True)
time.sleep(600)
"""


def test_pods_run_and_reach_services_and_what_is_not_enforced_is_told(running: Running) -> None:
    assert Path(f"/proc/{running.pid}/uid_map").read_text().split() == ["1000", "0", "1"]

    async def scenario() -> None:
        web = {"image": PYTHON, "args": ["python3", "-c", SAY], "securityContext": {"runAsUser": 65534}}
        limits = {"resources": {"limits": {"memory": "64Mi"}}}
        async with living(running, pod("ordinary", web | limits)) as life:

            async def said() -> list[str]:
                lines = (await printed(running, "ordinary")).splitlines()
                return lines if len(lines) == 3 else []

            assert await eventually(said, within=10) == ["0", "10.96.0.1", "30"]
            (limit,) = await life.events("LimitsNotEnforced")
            (user,) = await life.events("NotEnforced")
            assert "memory limit of web" in limit["message"] and "runAsUser" in user["message"]

    asyncio.run(scenario())


def test_network_chaos_acts(running: Running) -> None:
    async def scenario() -> None:
        manifest = pod("slow", {"args": ["python3", "-c", "import time; time.sleep(600)"]})
        manifest["metadata"]["labels"] = {"app": "slow"}
        async with living(running, manifest) as life:
            await life.until(lambda s: s.ready)
            async with api_of(running) as api:
                one = World(api, asyncio.create_task(asyncio.Event().wait()))  # type: ignore[arg-type]
                spec = {"action": "delay", "mode": "all", "selector": chosen("slow"), "delay": {"latency": "50ms"}}
                await one.chaos(NETWORKCHAOS, "late", spec)
                await one.injected(NETWORKCHAOS, "late")
                await one.delete(NETWORKCHAOS, "late")
                one.controller.cancel()
                assert life.seen[-1].object["metadata"]["namespace"] == NS

    asyncio.run(scenario())
