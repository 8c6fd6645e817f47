"""A sandbox comes up, goes down, and leaves nothing; whatever dies."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner
from nodes_world import api_of, eventually, host_pids, living, pod, require_root_and_prometheus, sandbox

from benchmarks.processes import family
from gameday.cli import main
from sandbox import deploy
from sandbox.client import DEPLOYMENTS, NODES, SERVICES, ApiError, Kind
from sandbox.options import BARE, COMPRESSED, REAL, Options
from sandbox.up import Running, SandboxError, down, find, up

# A TLS transport that is cancelled in the middle of a watch closes a moment after its loop has.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def quiet(_: str) -> None:
    """Progress is of no interest here."""


def host_state() -> dict[str, str]:
    """What a sandbox could leave in the host's kernel."""
    commands = (("ip", "netns"), ("ip", "-o", "link"), ("ip", "-o", "addr"), ("nft", "list", "tables"))
    found = {" ".join(c): subprocess.run(c, capture_output=True, text=True, check=False).stdout for c in commands}
    found["mounts"] = Path("/proc/self/mounts").read_text()
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _lives(pid)}


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(what: Callable[[], object], within: float = 3.0) -> None:
    deadline = time.monotonic() + within
    while not what():
        assert time.monotonic() < deadline, f"not so within {within} s"
        time.sleep(0.02)


def test_the_whole_stack_comes_up_serves_and_goes_without_a_trace(tmp_path: Path) -> None:
    require_root_and_prometheus()
    before, state, lines = host_state(), tmp_path / "state", []
    began = time.monotonic()
    running = up(Options(state_dir=state, parent=os.getpid()), lines.append)
    took = time.monotonic() - began
    try:
        assert took < 30, f"up took {took:.1f} s"
        assert lines and find(state) == running and not running.expendable
        assert host_state() == before, "the host's network and mounts are as they were"
        asyncio.run(serves(running))
        everything = family(running.pid)
        assert len(everything) > 30
    finally:
        began = time.monotonic()
        assert down(state)
        took = time.monotonic() - began
    assert took < 3, f"down took {took:.1f} s"
    assert not alive(everything) and not state.exists() and host_state() == before
    assert not down(state) and find(state) is None


async def serves(running: Running) -> None:
    async with aiohttp.ClientSession() as session:
        question = {"model": running.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        zones = set()
        for _ in range(60):  # the choice is random: of 12, one test in 40 missed a zone
            async with session.post(f"{running.target_url}/v1/chat/completions", json=question) as answer:
                assert answer.status == 200 and (await answer.json())["choices"]
                zones.add(answer.headers["x-served-zone"])
        assert zones == {"a", "b", "c"}
        async with session.get(f"{running.prometheus_url}/api/v1/query", params={"query": "up"}) as answer:
            series = (await answer.json())["data"]["result"]
    assert {s["metric"]["zone"] for s in series} == {"a", "b", "c"}
    assert {s["metric"]["namespace"] for s in series} >= {"llm"} and all(s["value"][1] == "1" for s in series)
    engines = [s for s in series if s["metric"]["app"] == running.model]
    assert len(engines) == 6 and len({s["metric"]["node"] for s in engines}) == 6
    async with api_of(running) as api:
        service = await api.get(SERVICES, "gateway", running.namespace)
        assert service["status"]["loadBalancer"]["ingress"][0]["ip"] == "127.0.0.1"


def test_kill_minus_9_of_the_supervisor_leaves_nothing_and_up_works_again(tmp_path: Path) -> None:
    before, state = host_state(), tmp_path / "state"
    with sandbox(state) as running:
        asyncio.run(_run_one_pod(running))
        everything = family(running.pid)
        os.kill(running.pid, signal.SIGKILL)
        wait_for(lambda: not alive(everything), within=1)
        assert host_state() == before and find(state) is None
        with sandbox(state) as again:
            assert again.pid != running.pid and find(state) == again


async def _run_one_pod(running: Running) -> None:
    async with living(running, pod("one")) as life:
        await life.until(lambda s: s.running)


@pytest.mark.parametrize("title", ["gameday: control plane", "gameday: fabric", "gameday: launcher", "gameday: addons"])
def test_the_death_of_an_essential_process_ends_the_sandbox(tmp_path: Path, title: str) -> None:
    with sandbox(tmp_path / "state") as running:
        everything = family(running.pid)
        (victim,) = set(host_pids(title)) & everything
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: not alive(everything))
        assert find(tmp_path / "state") is None


def test_the_sandbox_ends_with_its_parent(tmp_path: Path) -> None:
    require_root_and_prometheus()
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        running = up(Options(state_dir=tmp_path / "state", bare=True, parent=parent.pid), quiet)
        everything = family(running.pid)
        parent.kill()
        wait_for(lambda: not alive(everything))
    finally:
        parent.kill()
        parent.wait()
        down(tmp_path / "state")


def test_killing_a_machine_takes_all_its_pods_at_once(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        async with living(running, pod("victim")) as life:
            await life.until(lambda s: s.running)
            (machine,) = set(host_pids("gameday: node node-a-1")) & family(running.pid)
            lost = family(machine)
            assert len(lost) >= 3, "the machine, its kubelet and the pod"
            os.kill(machine, signal.SIGKILL)
            wait_for(lambda: not alive(lost), within=0.5)

            async def unknown() -> bool:
                node = await life.api.get(NODES, "node-a-1")
                return any(c["type"] == "Ready" and c["status"] == "Unknown" for c in node["status"]["conditions"])

            await eventually(unknown, within=COMPRESSED.node_monitor_grace + 3)
            await life.api.delete(NODES, "node-a-1")

            async def replaced() -> bool:
                nodes, _ = await life.api.list(NODES)
                return [n["metadata"]["name"] for n in nodes] == ["node-a-2"]

            await eventually(replaced, within=COMPRESSED.machine_boot + 3)

    with sandbox(tmp_path / "state") as running:
        asyncio.run(scenario(running))


def test_a_frozen_kubelet_loses_its_node_and_gets_it_back_with_its_pods(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        async with living(running, pod("steady")) as life:
            await life.until(lambda s: s.ready)
            (kubelet,) = set(host_pids("gameday: kubelet node-a-1")) & family(running.pid)
            os.kill(kubelet, signal.SIGSTOP)
            grace = COMPRESSED.node_monitor_grace
            mark = len(life.seen)
            lost = await life.until(lambda s: not s.ready, within=grace + 4, since=mark)
            assert lost.running and lost.condition("ContainersReady")["status"] == "True", "nobody asked the container"
            os.kill(kubelet, signal.SIGCONT)
            back = await life.until(lambda s: s.ready, since=life.seen.index(lost))
            assert back.restarts == 0 and back.web["containerID"] == lost.web["containerID"]

            async def ready() -> bool:
                node = await life.api.get(NODES, "node-a-1")
                return deploy.is_ready(node)

            await eventually(ready)

    with sandbox(tmp_path / "state") as running:
        asyncio.run(scenario(running))


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("after_lines", [0, 1, 3])
def test_an_interrupted_up_leaves_nothing(tmp_path: Path, sig: signal.Signals, after_lines: int) -> None:
    require_root_and_prometheus()
    state = tmp_path / "state"
    # Whoever runs the tests in the background may have SIGINT ignored, and children inherit that.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "sandbox.up", "up", "--state-dir", str(state)]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert starter.stdout is not None
    with starter.stdout:
        for _ in range(after_lines):
            assert starter.stdout.readline()
        if not after_lines:
            wait_for((state / "supervisor.json").exists)
        pid = json.loads((state / "supervisor.json").read_text())["pid"]
        everything = family(pid)
        starter.send_signal(sig)
        starter.wait(timeout=5)
    wait_for(lambda: not alive(everything | {pid}))
    wait_for(lambda: not state.exists())


def test_an_ordinary_user_needs_no_root() -> None:
    require_root_and_prometheus()
    packages, project = Path(aiohttp.__file__).parent.parent, deploy.STACKS.parent.parent
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3"]
    with tempfile.TemporaryDirectory(prefix="gameday-") as home:
        os.chown(home, 65534, 65534)
        state = Path(home) / "state"
        env = {**os.environ, "PYTHONPATH": str(packages), "HOME": home}

        def run(*argv: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*user, *argv], cwd=project, env=env, capture_output=True, text=True, check=False)

        tried = run("-c", "import aiohttp, orjson, uvloop, sandbox.node.linux as l; l.unshare(l.CLONE_NEWUSER)")
        if tried.returncode:
            pytest.skip(f"no interpreter or no namespaces for an ordinary user: {tried.stderr[-200:]}")
        try:
            done = run("-m", "sandbox.up", "up", "--state-dir", str(state))
            assert done.returncode == 0, done.stderr
            running = find(state)
            assert running is not None
            assert Path(f"/proc/{running.pid}").stat().st_uid == 65534
            asyncio.run(serves(running))
        finally:
            down(state)


def test_a_port_in_use_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    require_root_and_prometheus()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SandboxError, match=f"port {port} .* API server, cannot be had: Address already in use"):
            up(Options(state_dir=tmp_path / "state", api_port=port, bare=True), quiet)
    assert not (tmp_path / "state").exists()


def test_a_missing_prometheus_is_named(tmp_path: Path) -> None:
    require_root_and_prometheus()
    with pytest.raises(SandboxError, match=r"no Prometheus binary .*PROMETHEUS_BIN"):
        up(Options(state_dir=tmp_path / "state", prometheus_bin="/nowhere/prometheus"), quiet)
    assert not (tmp_path / "state").exists()


def test_a_prometheus_that_does_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    require_root_and_prometheus()
    fake = tmp_path / "prometheus"
    fake.write_text("#!/bin/sh\necho out of luck\nexit 7\n")
    fake.chmod(0o755)
    with pytest.raises(SandboxError, match="prometheus exited with code 7: out of luck"):
        up(Options(state_dir=tmp_path / "state", prometheus_bin=str(fake), stack="none"), quiet)
    assert not (tmp_path / "state").exists()


def test_a_second_sandbox_in_the_same_place_is_refused(tmp_path: Path) -> None:
    with sandbox(tmp_path / "state", bare=True) as running:
        with pytest.raises(SandboxError, match=rf"is up already \(pid {running.pid}"):
            up(Options(state_dir=tmp_path / "state", bare=True), quiet)
        assert find(tmp_path / "state") == running


def test_two_sandboxes_in_two_places_do_not_meet(tmp_path: Path) -> None:
    with sandbox(tmp_path / "one") as one, sandbox(tmp_path / "two") as two:
        assert one.api_url != two.api_url
        assert down(tmp_path / "one") and find(tmp_path / "two") == two


def test_foreign_files_in_the_state_directory_survive(tmp_path: Path) -> None:
    mine = tmp_path / "precious.txt"
    mine.write_text("keep")
    with sandbox(tmp_path, bare=True):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious.txt"]


def test_a_stack_that_does_not_get_ready_says_which_pods_and_why(tmp_path: Path) -> None:
    async def scenario(running: Running) -> None:
        async with api_of(running) as api:
            await deploy.stack(api, "reference")
            broken = {"containers": [{"name": "gateway", "args": ["--no-such-option"]}]}
            change = {"spec": {"template": {"spec": broken}}}
            await api.patch(DEPLOYMENTS, "gateway", change, "llm", type="strategic")
            with pytest.raises(SandboxError) as caught:
                await deploy.ready(api, "reference", 6, Path(running.state_dir))
            text = str(caught.value)
            assert text.startswith("the stack is not ready after 6 s: ") and "Deployment my-llama32" in text
            assert "Insufficient nvidia.com/gpu" in text, "an engine without a GPU"
            assert "CrashLoopBackOff" in text and "unrecognized arguments: --no-such-option" in text

    with sandbox(tmp_path / "state", gpus_per_node=1) as running:
        asyncio.run(scenario(running))


def test_a_bare_sandbox_is_a_control_plane_on_the_clocks_of_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the control plane runs in namespaces")
    monkeypatch.setenv("GAMEDAY_STATE_DIR", str(tmp_path / "state"))
    done = CliRunner().invoke(main, ["up", "--bare"])
    try:
        assert done.exit_code == 0, done.output
        running = find(tmp_path / "state")
        assert running and running.clocks == "bare" and not running.target_url and not running.prometheus_url
        assert (BARE.node_monitor_grace, BARE.node_monitor_period) == (8, 1)
        assert replace(BARE, name="real", node_monitor_grace=50, node_monitor_period=5) == REAL, "and else as they are"

        async def look() -> None:
            async with api_of(running) as api:
                assert (await api.list(NODES))[0] == []
                with pytest.raises(ApiError):  # nobody is there to ask for metrics
                    await api.list(Kind("metrics.k8s.io", "v1beta1", "pods", "PodMetrics"))

        asyncio.run(look())
    finally:
        assert CliRunner().invoke(main, ["down"]).output == "sandbox is down\n"
