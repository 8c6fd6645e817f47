"""Stopped in mid-fault, by everything that may stop it: healed within seconds, told why, and nothing is left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stage import Lines, Rehearsal, Stage
from test_rehearsal import assert_clean, cluster_of, wait_for_six_engines, written

from gameday import clock, record
from gameday.kinds import NETWORKCHAOS, PODCHAOS
from gameday.model import FaultMark, Note, Step

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "gameday"), str(ROOT / "benchmarks")]

import crash  # noqa: E402
import severed  # noqa: E402

DRILL = """
from faults import ZoneOutage, ZonePartition
from gameday.objectives import NothingLeftBehind, Success
from loadgen.traffic import Chat

ASKED = dict(traffic=Chat(per_second=5), before=[Success(at_least=0.9)], during=[Success(at_least=0.5)],
             after=[NothingLeftBehind()])

def test_cut(experiment, zone):
    experiment(fault=ZonePartition(zone, lasting=60), **ASKED)

def test_out(experiment, zone):
    experiment(fault=ZoneOutage(zone, lasting=60), **ASKED)
"""
QUICK = {"GAMEDAY_STEADY": "4", "GAMEDAY_HOLD": "4"}


def started(stage: Stage, which: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    file = written(stage, "test_stops_drill.py", DRILL)
    return stage.start(file, "-k", which, "--seed", "7", *arguments, env={**QUICK, **(env or {})})


def broken(stage: Stage) -> Callable[[], bool]:
    """Whether the fault is in force."""
    cluster = cluster_of(stage)
    return lambda: bool(cluster.list(NETWORKCHAOS, "llm") or cluster.list(PODCHAOS, "llm"))


def notes(done: Rehearsal, name: str) -> list[Note]:
    return [event for event in record.load(done.root / name)[0].events if isinstance(event, Note)]


def healed_after(done: Rehearsal, name: str, level: str) -> float:
    """Seconds from the reason to the last undo verified and seen to be gone."""
    told = next(note.t for note in notes(done, name) if note.level == level)
    events = record.load(done.root / name)[0].events
    (at,) = [e.t for e in events if isinstance(e, FaultMark) and e.step is Step.HEALED and e.ok]
    return at - told


def failed(done: Rehearsal, name: str) -> bool:
    """FAIL by a stop condition; on a machine too busy for the load generator it may be called INCONCLUSIVE instead."""
    verdict = done.verdict(name)
    breached = any(one["objective"] == "stop condition" and one["status"] == "FAIL" for one in verdict["findings"])
    unfit = any(one["objective"] == "load generator fit" and one["status"] != "PASS" for one in verdict["findings"])
    return breached and (verdict["verdict"] == "FAIL" or unfit)


def ended(stage: Stage, process: subprocess.Popen[str]) -> Rehearsal:
    return stage.finish(process, within=120)


@pytest.mark.thorough
def test_a_breached_stop_condition_heals_and_fails(reference: Stage) -> None:
    done = ended(reference, started(reference, "test_out", env={"GAMEDAY_STOP_REPLICAS": "5"}))
    assert done.code == 1 and failed(done, "out"), done.out
    assert "replicas are ready, the stop condition is 5" in done.out and "stops when: success <" in done.out
    assert healed_after(done, "out", "fail") < 15  # idle it takes 2 s; this machine may be busy
    assert_clean(reference)
    wait_for_six_engines(cluster_of(reference))


@pytest.mark.thorough
def test_gameday_stop_ends_it(reference: Stage) -> None:
    process = started(reference, "test_cut")
    seen = Lines(process)
    clock.wait_until(lambda: "during" in seen.text, within=90, what="the fault")
    told = reference.gameday("stop", "--reason", "the pager rang")
    seen.rest(within=60)
    assert told.returncode == 0 and "it healed and left after" in told.stdout, told.stderr
    done = Rehearsal(process.returncode, seen.text, sorted((reference.tmp / "runs").glob("*"))[-1])
    assert process.returncode == 1 and failed(done, "cut"), seen.text
    assert "stopped by `gameday stop`: the pager rang" in seen.text
    assert "cut  after" not in seen.text, "nothing more was wanted"
    assert_clean(reference)
    again = reference.gameday("stop")
    assert again.returncode == 2 and "No game day is at work" in again.stderr


@pytest.mark.thorough
def test_a_console_that_nobody_reads_does_not_keep_it_from_healing(reference: Stage) -> None:
    """As after Ctrl-S: every write to the console blocks, from before the fault until after the heal."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    file = written(reference, "test_stops_drill.py", DRILL)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--seed", "7", "--runs-dir"]
    env = {**reference.env, **QUICK, "GAMEDAY_STOP_REPLICAS": "5"}
    process = subprocess.Popen(
        [*command, str(reference.tmp / "runs"), file, "-k", "test_out"], cwd=ROOT, env=env, stdout=theirs
    )
    try:
        in_force = broken(reference)
        # It may say what it says before the fault; then the pipe is filled.
        blocked = False

        def drain_until_broken() -> bool:
            nonlocal blocked
            if in_force():
                os.set_blocking(theirs, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(theirs, b"." * 64)
                os.set_blocking(theirs, True)
                blocked = True
                return True
            os.set_blocking(ours, False)
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 65536)
            return False

        clock.wait_until(drain_until_broken, within=90, what="the fault")
        assert blocked
        clock.wait_until(lambda: not in_force(), within=45, what="healed, though its fault would last 60 s")
    finally:
        os.close(theirs)
        os.set_blocking(ours, True)
        with os.fdopen(ours, "rb") as rest:
            rest.read()
        process.wait(timeout=60)
    assert process.returncode == 1
    assert_clean(reference)
    wait_for_six_engines(cluster_of(reference))


@pytest.mark.thorough
def test_a_load_generator_that_dies_heals_and_is_inconclusive(reference: Stage) -> None:
    process = started(reference, "test_cut")
    seen = Lines(process)
    clock.wait_until(lambda: "during" in seen.text, within=90, what="the fault")
    (worker,) = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _locust_of(path, process.pid)]
    os.kill(worker, signal.SIGKILL)
    out = seen.rest(within=90)
    assert process.returncode == 1 and "a load worker was lost" in out and "1 inconclusive" in out, out
    assert_clean(reference)


def _locust_of(stat: Path, parent: int) -> bool:
    try:
        if int(stat.read_text().rpartition(")")[2].split()[1]) != parent:
            return False
        return b"locust" in (stat.parent / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.thorough
def test_an_api_server_lost_in_mid_fault_is_waited_for_and_healed(reference: Stage) -> None:
    """Away for longer than the lock lasts; the kubeconfig is the sandbox's, by way of a proxy that is cut."""
    with severed.line(Path(reference.running.kubeconfig), reference.tmp) as api:
        process = started(reference, "test_cut", "--kubeconfig", str(api.kubeconfig))
        seen = Lines(process)
        clock.wait_until(lambda: "during" in seen.text, within=90, what="the fault")
        api.cut()
        clock.wait_until(lambda: "error: " in seen.text, within=60, what="the loss to be noticed")
        clock.pause(3)
        assert broken(reference)(), "nobody could have healed it"
        api.join()
        out = seen.rest(within=90)
    assert process.returncode == 1 and "could not be renewed" in out, out
    assert re.search(r"healed|undone", out) and "Traceback" not in out, out
    assert_clean(reference)


@pytest.mark.thorough
def test_a_disk_that_fills_up_in_mid_fault_does_not_keep_it_from_healing(reference: Stage) -> None:
    """The record of what happened is lost, so nothing is judged; the cluster is whole all the same."""
    with small_disk(reference.tmp / "small") as disk:
        process = started(reference, "test_cut", "--runs-dir", str(disk))
        seen = Lines(process)
        clock.wait_until(lambda: "during" in seen.text, within=90, what="the fault")
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"." * 4096)
        out = seen.rest(within=120)
    assert process.returncode == 1 and "No space left on device" in out, out
    assert "1 error" in out and " passed" not in out, out
    assert_clean(reference)


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root for a disk of its own")
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "gameday-small", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 2))])
def test_kill_nine_at_a_random_instant_leaves_nothing_that_heal_does_not_undo(reference: Stage, number: int) -> None:
    """A handful of what benchmarks/crash.py does fifty times; here `gameday heal` waits for the Lease to run out."""
    rng = random.Random(f"{os.environ.get('GITHUB_RUN_ID', 'crash')}-{number}")
    bench = crash.Bench(reference.running, reference.tmp)
    name, at = crash.NAMES[number], rng.uniform(6, 18)
    found = bench.kill_one(name, at, wait=number == 0, alone=False)
    assert found.left == (), f"{name} killed after {at:.1f} s, {found.during}"
