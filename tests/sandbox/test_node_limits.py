"""CPU and memory limits: what the kernel enforces, what a kubelet says of it, and that no control group stays."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes_world import PYTHON, eventually, living, pod, sandbox

from sandbox.node import cgroups
from sandbox.node.cgroups import Group, Limits, Unavailable, base_name, container_limits, oom_score, roots
from sandbox.up import Running, down

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

V1 = """\
22 20 0:20 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
23 20 0:21 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
24 20 0:22 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
EAT = "data = []\nfor _ in range(400): data.append(b'x' * 1_000_000)\nimport time\ntime.sleep(60)"
BURN = "while True: pass"


def ours(state: Path) -> list[Path]:
    return [found for found in Path("/sys/fs/cgroup").rglob(base_name(state)) if found.is_dir()]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("state") / "s") as found:
        if found.not_enforced:
            pytest.skip(found.not_enforced)
        yield found


def limited(name: str, code: str, **limits: str) -> dict[str, object]:
    return pod(name, {"image": PYTHON, "args": ["python3", "-c", code], "resources": {"limits": limits}})


def test_a_container_that_outgrows_its_memory_limit_is_oom_killed(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, limited("eater", EAT, memory="64Mi")) as life:
            dead = await life.until(lambda s: s.ended or s.last)
            ended = dead.ended or dead.last
            assert ended and (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")

    asyncio.run(scenario())


def test_a_container_within_its_limit_lives(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, limited("modest", EAT, memory="600Mi")) as life:
            await life.until(lambda s: s.running)
            await asyncio.sleep(0.5)
            assert not any(s.ended or s.last for s in life.seen)

    asyncio.run(scenario())


def test_a_crash_by_another_hand_is_no_oom_kill(running: Running) -> None:
    async def scenario() -> None:
        code = "import os, signal; os.kill(os.getpid(), 9); raise SystemExit(3)"  # PID 1 does not hear its own
        async with living(running, limited("crasher", code, memory="64Mi")) as life:
            dead = await life.until(lambda s: s.ended or s.last)
            ended = dead.ended or dead.last
            assert ended and (ended["exitCode"], ended["reason"]) == (3, "Error")

    asyncio.run(scenario())


def test_a_cpu_limit_is_a_quota(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, limited("burner", BURN, cpu="200m")) as life:
            found = await life.until(lambda s: s.running)
            uid = found.object["metadata"]["uid"]
            (base,) = [group for group in ours(Path(running.state_dir)) if (group / "cpu.stat").exists()]
            stat = base / "node-a-1" / uid / "web.0" / "cpu.stat"

            def throttled() -> int:
                return int(dict(line.split() for line in stat.read_text().splitlines())["nr_throttled"])

            async with asyncio.timeout(10):
                while throttled() < 3:  # noqa: ASYNC110 – the kernel counts, and tells nobody
                    await asyncio.sleep(0.1)

    asyncio.run(scenario())


def test_a_pods_groups_go_with_it(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, limited("gone", "import time; time.sleep(60)", memory="64Mi")) as life:
            found = await life.until(lambda s: s.running)
            uid = found.object["metadata"]["uid"]
            assert [list(group.rglob(uid)) for group in ours(Path(running.state_dir))] != [[]]
            await life.delete(grace=1)
            await life.gone()

            async def removed() -> bool:
                return not any(list(group.rglob(uid)) for group in ours(Path(running.state_dir)))

            assert await eventually(removed)

    asyncio.run(scenario())


def test_no_group_outlives_down_nor_a_crash(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with sandbox(state) as first:
        if first.not_enforced:
            pytest.skip(first.not_enforced)
        assert ours(state)
        os.kill(first.pid, signal.SIGKILL)
        while first.alive:
            time.sleep(0.01)
        assert ours(state), "the kernel keeps groups; they are swept"
        with sandbox(state) as second:
            assert second.pid != first.pid
    assert not ours(state)


def test_a_crash_is_swept_by_down(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with sandbox(state) as first:
        os.kill(first.pid, signal.SIGKILL)
        while first.alive:
            time.sleep(0.01)
        down(state)
        assert not ours(state)


def test_where_no_groups_can_be_made_the_sandbox_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has none that may be written: `up` says it, `status` shows it, a pod with limits has an Event."""
    monkeypatch.setenv(cgroups.REFUSE, "1")
    with sandbox(tmp_path / "state") as found:
        assert "CPU and memory limits" in found.not_enforced

        async def scenario() -> None:
            async with living(found, limited("free", "import time; time.sleep(60)", memory="64Mi")) as life:
                await life.until(lambda s: s.running)
                (event,) = await life.events("LimitsNotEnforced")
                assert "memory limit of web" in event["message"]

        asyncio.run(scenario())


# — where groups lie —


def test_version_1_nests_below_the_group_that_we_are_in() -> None:
    found = roots(V1, "4:memory:/session/x\n1:cpu:/\n0::/\n")
    assert found == Group(1, "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/memory/session/x")


def test_version_1_in_a_container_that_sees_its_own_group_as_the_top() -> None:
    inside = V1.replace("0:21 / ", "0:21 /docker/abc ")
    assert roots(inside, "4:memory:/docker/abc\n1:cpu:/\n").memory == "/sys/fs/cgroup/memory"
    assert roots(inside, "4:memory:/elsewhere\n1:cpu:/\n").memory == "/sys/fs/cgroup/memory"


def test_version_2_needs_both_controllers(tmp_path: Path) -> None:
    mounted = f"24 20 0:22 / {tmp_path} rw,relatime - cgroup2 cgroup2 rw\n"
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert roots(mounted, "0::/user.slice\n") == Group(2, str(tmp_path), str(tmp_path))
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    with pytest.raises(Unavailable, match="mounts no control groups"):
        roots(mounted, "0::/\n")


def test_version_2_writes_its_own_files(tmp_path: Path) -> None:
    """What is written; the kernel's part of version 2 is tested where its controllers are on the unified hierarchy."""
    pod_group = Group(2, str(tmp_path / "pod"), str(tmp_path / "pod")).make()
    assert (tmp_path / "pod" / "cgroup.subtree_control").read_text() == "+cpu +memory"
    leaf = pod_group.child("web.0").make(Limits(1500, 2**26), leaf=True)
    read = {name: (tmp_path / "pod" / "web.0" / name).read_text() for name in ("cpu.max", "memory.max")}
    assert read == {"cpu.max": "150000 100000", "memory.max": str(2**26)}
    assert (tmp_path / "pod" / "web.0" / "memory.oom.group").read_text() == "1"
    assert not (tmp_path / "pod" / "web.0" / "cgroup.subtree_control").exists()
    assert leaf.directories == leaf.entered(Limits()) == (str(tmp_path / "pod" / "web.0"),)
    (tmp_path / "pod" / "web.0" / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert leaf.oom_kills() == 1


def test_version_1_without_a_cpu_limit_stays_out_of_the_cpu_hierarchy() -> None:
    group = Group(1, "/cpu", "/memory")
    assert group.entered(Limits()) == ("/memory",) and group.entered(Limits(cpu_milli=100)) == ("/cpu", "/memory")


def test_the_least_quota_is_what_the_kernel_takes(tmp_path: Path) -> None:
    Group(2, str(tmp_path / "x"), str(tmp_path / "x")).make(Limits(1), leaf=True)
    assert (tmp_path / "x" / "cpu.max").read_text() == "1000 100000"


def test_limits_and_scores() -> None:
    assert container_limits({"cpu": 250, "memory": 64 * 2**20 * 1000}) == Limits(250, 64 * 2**20)
    assert container_limits({}) == Limits()
    gib = 2**30
    assert [oom_score("Guaranteed", gib, 32 * gib), oom_score("BestEffort", 0, 32 * gib)] == [-997, 1000]
    assert oom_score("Burstable", 2 * gib, 32 * gib) == 938
    assert oom_score("Burstable", 0, 32 * gib) == 999
    assert oom_score("Burstable", 32 * gib, 32 * gib) == 3


def test_only_our_own_directories_are_swept(tmp_path: Path) -> None:
    state, other = tmp_path / "state", tmp_path / "precious"
    state.mkdir()
    other.mkdir()
    (state / cgroups.RECORD).write_text(f'["{other}"]')
    cgroups.sweep(state)
    assert other.exists()
