"""The opposites: operations that are harmless on the reference stack must fail on one that is run without care.

One sandbox and one run of pytest for all of them: the experiments are short, since what goes wrong does so at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage import Rehearsal, Stage, raised

from gameday.cluster import Cluster
from gameday.kinds import DEPLOYMENTS, NODES

pytestmark = pytest.mark.thorough

EXPERIMENTS = """
from faults import NodeCrash, NodeDrain, PodHang, PodStop, RollingUpdate, ZombieEngine
from gameday.objectives import Drained, NothingLeftBehind, Replaced, Replicas, Success, UnbrokenStreams
from loadgen.traffic import Chat

def run(experiment, fault, *during, long_share=0.08):
    experiment(
        traffic=Chat(per_second=15, long_share=long_share),
        before=[Success(at_least=0.99)],
        fault=fault,
        during=during,
        after=[NothingLeftBehind()],
    )

def test_pod_stop(experiment):
    run(experiment, PodStop(lasting=6), UnbrokenStreams(), long_share=0.3)

def test_pod_hang(experiment):
    run(experiment, PodHang(lasting=10), Success(at_least=0.98), Replicas(at_least=6))

def test_zombie_engine(experiment):
    run(experiment, ZombieEngine(lasting=8), Success(at_least=0.98))

def test_node_drain(experiment):
    run(experiment, NodeDrain(lasting=6), Drained())

def test_rolling_update(experiment):
    run(experiment, RollingUpdate(lasting=8), Success(at_least=0.95), Replaced())

def test_node_crash(experiment):
    run(experiment, NodeCrash(lasting=8), Success(at_least=0.98))
"""


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, Rehearsal]]:
    for stage in raised(tmp_path_factory.mktemp("careless"), "careless"):
        path = stage.tmp / "test_opposites.py"
        path.write_text(EXPERIMENTS)
        env = {"GAMEDAY_STEADY": "5", "GAMEDAY_HOLD": "4"}
        yield stage, stage.finish(stage.start(str(path), "--seed", "7", env=env), within=400)


@pytest.mark.parametrize(
    ("name", "missed"),
    [
        ("pod_stop", "no streams broken"),
        ("pod_hang", "ready replicas"),
        ("zombie_engine", "success"),
        ("node_drain", "drained"),
        ("rolling_update", "success"),
        ("node_crash", "success"),
    ],
)
def test_what_is_harmless_with_care_fails_without(careless: tuple[Stage, Rehearsal], name: str, missed: str) -> None:
    _, done = careless
    verdict = done.verdict(name)
    assert verdict["verdict"] == "FAIL", done.out
    failed = [one["objective"] for one in verdict["findings"] if one["status"] == "FAIL"]
    assert any(one.startswith(missed) for one in failed), failed
    sound = {one["objective"]: one["status"] for one in verdict["findings"] if one["phase"] == "run"}
    assert sound["fault proven"] == "PASS" == sound["cluster clean"], sound


def test_a_drain_that_the_budget_forbids_evicts_no_engine(careless: tuple[Stage, Rehearsal]) -> None:
    _, done = careless
    (finding,) = [one for one in done.verdict("node_drain")["findings"] if one["objective"] == "drained"]
    assert "not drained: llm/my-llama32" in finding["evidence"] and "disruption budget" in finding["evidence"]


def test_everything_is_as_it_was(careless: tuple[Stage, Rehearsal]) -> None:
    stage, _ = careless
    running = stage.running
    cluster = Cluster.connect(context=running.context, kubeconfig=Path(running.kubeconfig), namespace="llm")
    assert not [node["metadata"]["name"] for node in cluster.list(NODES) if node["spec"].get("unschedulable")]
    template = cluster.get(DEPLOYMENTS, "my-llama32", "llm")["spec"]["template"]
    assert not [key for key in template["metadata"].get("annotations", {}) if key.startswith("gameday.dev/")]
