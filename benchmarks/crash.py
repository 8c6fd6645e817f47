"""Killed at a random instant, is everything healed? `python benchmarks/crash.py [TIMES] [--seed S] …`

On a sandbox of its own: an experiment is drawn and started, its whole process tree (pytest and the load generator)
is killed with SIGKILL at a random instant, and then either `gameday heal` is run, or (every K-th time) nothing is done
until whatever has an end of its own has ended by itself. After that nothing may be left: see `left`.

A killed run holds its Lease until it runs out (20 s), which `gameday heal` waits for; without `--wait` the Lease is
aged by hand, to save that time. Prints one line per kill and a summary; exit code 1 when anything was left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: it has a loadgen.py

from faults.base import CORDONED, OURS  # noqa: E402
from faults.undo import PAUSE  # noqa: E402
from gameday import clock  # noqa: E402
from gameday.cluster import Cluster  # noqa: E402
from gameday.errors import LoadError  # noqa: E402
from gameday.kinds import (  # noqa: E402
    CONFIGMAPS,
    JOBS,
    LEASES,
    NETWORKCHAOS,
    NODES,
    PODCHAOS,
    PODNETWORKCHAOS,
    PODS,
    STRESSCHAOS,
)
from loadgen.check import one_token  # noqa: E402
from sandbox.options import Options  # noqa: E402
from sandbox.up import Running, down, up  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 24.0  # seconds; kills fall between 0 and this after the start of pytest, which covers a whole experiment
OWN_END = 75.0  # seconds after which whatever has an end of its own has ended: lasting + its margins
GPU = "nvidia.com/gpu"

EXPERIMENTS = """
from faults import PodKill, Xid, ZoneOutage, ZonePartition
from gameday.objectives import Success
from loadgen.traffic import Chat

ASKED = dict(traffic=Chat(per_second=5), before=[Success(at_least=0.5)], during=[Success(at_least=0.1)])

def test_pod_kill(experiment):
    experiment(fault=PodKill(lasting=8), **ASKED)

def test_zone_partition(experiment, zone):
    experiment(fault=ZonePartition(zone, lasting=8), **ASKED)

def test_zone_outage(experiment, zone):
    experiment(fault=ZoneOutage(zone, lasting=8), **ASKED)

def test_zone_outage_elsewhere(experiment, zone):
    experiment(fault=ZoneOutage(zone, lasting=8, replacements="elsewhere"), **ASKED)

def test_gpu_xid_79(experiment):
    experiment(fault=Xid(79, lasting=8), **ASKED)
"""
NAMES = ("pod_kill", "zone_partition", "zone_outage", "zone_outage_elsewhere", "gpu_xid_79")


@dataclass(frozen=True, slots=True)
class Kill:
    """What became of one."""

    experiment: str
    at: float  # seconds after the start of pytest
    during: str  # the last thing that its record says
    heal_seconds: float | None  # of `gameday heal`; None: it was left alone until its own end
    left: tuple[str, ...]


class Bench:
    """A sandbox, and ways to break an experiment on it."""

    def __init__(self, running: Running, tmp: Path) -> None:
        self.running, self.tmp = running, tmp
        self.cluster = Cluster.connect(
            context=running.context, kubeconfig=Path(running.kubeconfig), namespace=running.namespace
        )
        self.file = tmp / "test_crash_drill.py"
        self.file.write_text(EXPERIMENTS)
        self.gpus = self._gpus()

    @property
    def env(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "GAMEDAY_", "COV_"))}
        return {**own, "GAMEDAY_STATE_DIR": self.running.state_dir, "GAMEDAY_STEADY": "4", "GAMEDAY_HOLD": "4"}

    def gameday(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gameday.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=200, check=False)

    def kill_one(self, name: str, at: float, *, wait: bool, alone: bool) -> Kill:
        """Start the experiment, kill it `at` seconds later, heal (or leave it alone), and look what is left."""
        log = self.tmp / "pytest.log"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--runs-dir", str(self.tmp / "runs")]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, str(self.file), "-k", f"test_{name} and not test_{name}_", "--seed", "7"],
                cwd=ROOT,
                env=self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        time.sleep(at)
        kill_tree(process.pid)
        process.wait()
        during = self._last_word()
        seconds = None
        if alone:
            time.sleep(OWN_END)
            left = self.in_force()
            self._heal(wait)
        else:
            left, begun = (), clock.now()
            left = self._heal(wait)
            seconds = clock.now() - begun
        return Kill(name, at, during, seconds, (*left, *self.left()))

    def _heal(self, wait: bool) -> tuple[str, ...]:
        if not wait:
            self._age_leases()
        healed = self.gameday("heal")
        if healed.returncode:
            return (f"gameday heal: {healed.stderr.strip()}",)
        again = self.gameday("heal")
        return () if again.stdout.strip() == "nothing to heal" else (f"a second heal found {again.stdout.strip()}",)

    def _age_leases(self) -> None:
        for name, namespace in (("gameday", self.cluster.namespace), ("gameday-cluster", "default")):
            if self.cluster.find(LEASES, name, namespace):
                self.cluster.patch(LEASES, name, {"spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}}, namespace)

    def _last_word(self) -> str:
        """Where the killed experiment was, by its own record."""
        found = sorted((self.tmp / "runs").glob("*/*/events.jsonl"), key=lambda path: path.stat().st_mtime)
        word = "before its record"
        if not found:
            return word
        for line in found[-1].read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut
                event = json.loads(line)
                if event.get("kind") == "phase":
                    word = f"{event['phase']} {event['edge']}"
                elif event.get("kind") == "fault":
                    word = f"{event['step']} {event.get('what', '')}".strip()
        found[-1].rename(found[-1].with_suffix(".seen"))
        return word

    # ── what is left ────────────────────────────────────────────────────────────────────────

    def in_force(self) -> tuple[str, ...]:
        """Chaos that is still in force: what should have ended by itself."""
        found = []
        for kind in (PODCHAOS, NETWORKCHAOS, STRESSCHAOS):
            for obj in self.cluster.list(kind, self.cluster.namespace):
                status = obj.get("status", {})
                one_shot = obj["spec"].get("action") in ("pod-kill", "container-kill")
                if not one_shot and status.get("experiment", {}).get("desiredPhase") != "Stop":
                    found.append(f"{kind.kind} {obj['metadata']['name']} is in force after its own end")
        return (*found, *self._paused())

    def left(self) -> tuple[str, ...]:
        """Everything of ours that is left, by what the cluster shows; waits for the engines to be whole again."""
        cluster, namespace = self.cluster, self.cluster.namespace
        found = []
        for kind in (PODCHAOS, NETWORKCHAOS, STRESSCHAOS):
            found += [f"{kind.kind} {obj['metadata']['name']}" for obj in cluster.list(kind, namespace)]
        for kind in (PODS, JOBS, CONFIGMAPS, LEASES):
            for where in (namespace, "default"):
                found += [f"{kind.kind} {obj['metadata']['name']}" for obj in cluster.list(kind, where, labels=OURS)]
        for obj in cluster.list(NODES):
            name, annotations = obj["metadata"]["name"], obj["metadata"].get("annotations") or {}
            if obj.get("spec", {}).get("unschedulable") or CORDONED in annotations:
                found.append(f"node {name} is cordoned")
        for obj in cluster.list(PODNETWORKCHAOS, namespace):
            if obj.get("spec"):
                found.append(f"rules in {obj['metadata']['name']}")
        found += self._paused()
        try:
            clock.wait_until(self._whole, within=90, what="six ready engines and all GPUs")
            one_token(self.running.target_url, self.running.model)
        except (clock.Waited, LoadError) as wrong:
            found.append(str(wrong))
        return tuple(found)

    def _paused(self) -> list[str]:
        pods = self.cluster.list(PODS, self.cluster.namespace)
        return [
            f"{obj['metadata']['name']} has the pause image"
            for obj in pods
            if any(PAUSE in one.get("image", "") for one in obj["spec"].get("containers", []))
        ]

    def _whole(self) -> bool:
        ready = sum(pod.ready for pod in self.cluster.pods(labels=self.running.selector))
        return ready == 6 and sum(self._gpus().values()) == sum(self.gpus.values())

    def _gpus(self) -> dict[str, int]:
        return {node.name: node.gpus for node in self.cluster.nodes()}


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything beneath it, as the machine's death would: nobody is left to clean up."""
    children: dict[int, list[int]] = collections.defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children[int(fields[1])].append(int(stat.parent.name))
    tree, found = [pid], []
    while tree:
        found.append(one := tree.pop())
        tree += children[one]
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


@contextlib.contextmanager
def bench(tmp: Path) -> Iterator[Bench]:
    options = Options(
        state_dir=tmp / "state", prometheus_bin=os.environ.get("PROMETHEUS_BIN", "prometheus"), parent=os.getpid()
    )
    running = up(options, lambda _: None)
    try:
        yield Bench(running, tmp)
    finally:
        down(tmp / "state")


def drawn(times: int, seed: int) -> list[tuple[str, float]]:
    """(experiment, instant of the kill) pairs; every experiment comes up about equally often."""
    rng = random.Random(seed)
    return [(NAMES[number % len(NAMES)], rng.uniform(0, LONGEST)) for number in range(times)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("times", nargs="?", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--wait", action="store_true", help="wait for Leases to run out, as in earnest")
    parser.add_argument("--alone", type=int, default=0, metavar="K", help="leave every K-th alone until its own end")
    given = parser.parse_args()
    killed: list[Kill] = []
    with tempfile.TemporaryDirectory(prefix="crash-") as tmp, bench(Path(tmp)) as made:
        for number, (name, at) in enumerate(drawn(given.times, given.seed), 1):
            alone = bool(given.alone) and number % given.alone == 0
            one = made.kill_one(name, at, wait=given.wait, alone=alone)
            killed.append(one)
            took = "left alone" if one.heal_seconds is None else f"healed in {one.heal_seconds:4.1f} s"
            told = ", ".join(one.left) or "nothing left"
            print(f"{number:>3}  {name:<22} {at:5.1f} s  after: {one.during:<22} {took:<17} {told}", flush=True)
    bad = [one for one in killed if one.left]
    points = collections.Counter(one.during.split()[0] for one in killed)
    print(f"{len(killed)} kills, {len(bad)} with something left; killed after: {dict(points.most_common())}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
