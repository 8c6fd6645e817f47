"""A team's own Chaos Toolkit experiments: some must be green; what chaoslib would call completed must not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaoslib.experiment import ensure_experiment_is_valid
from stage import ROOT, Lines, Rehearsal, Stage
from test_rehearsal import assert_clean, cluster_of, wait_for_six_engines

from gameday import clock
from gameday.kinds import CONFIGMAPS, LEASES, NODES
from gameday.ledger import LEDGERS

SECRET = "planted-secret-7d1f"

# What a team might have written: actions and probes of their own, on the cluster that the environment names.
ACTIONS = """
import os, pathlib, signal, time
from chaosk8s import create_k8s_api_client
from kubernetes import client

def nothing(): return True
def raises(): raise RuntimeError("boom")
def leaves(): raise SystemExit(3)
def says_none(): return None
def says_nan(): return float("nan")
def says_one(): return 1
def sleeps(): pathlib.Path(os.environ["SLEEPING"]).touch(); time.sleep(30); return True

def core(secrets=None): return client.CoreV1Api(create_k8s_api_client(secrets))

def cordon(on=True, secrets=None):
    api = core(secrets)
    engines = api.list_namespaced_pod("llm", label_selector="app=my-llama32").items
    name = sorted({pod.spec.node_name for pod in engines if pod.spec.node_name})[0]  # other nodes would prove nothing
    api.patch_node(name, {"spec": {"unschedulable": on or None}})
    return name

def uses(secrets=None):
    raise RuntimeError("the database refused " + secrets["password"])
"""


def activity(func: str, kind: str = "action", **more: Any) -> dict[str, Any]:
    provider = {"type": "python", "module": "their_actions", "func": func, **more.pop("provider", {})}
    return {"type": kind, "name": more.pop("name", func), "provider": provider, **more}


CORDON = activity("cordon")
UNCORDON = activity("cordon", name="uncordon", provider={"arguments": {"on": False}})
KILL = {
    "type": "action",
    "name": "kill an engine",
    "provider": {
        "type": "python",
        "module": "chaosk8s.pod.actions",
        "func": "terminate_pods",
        "arguments": {"label_selector": "app=my-llama32", "ns": "llm", "rand": True, "qty": 1, "grace_period": 0},
    },
}
SERVICE_IS_THERE = {
    "type": "probe",
    "name": "the gateway's service is there",
    "tolerance": True,
    "provider": {
        "type": "python",
        "module": "chaosk8s.service.probes",
        "func": "service_is_initialized",
        "arguments": {"name": "gateway", "ns": "llm"},
    },
}


def written(
    stage: Stage,
    name: str,
    method: list[Any],
    rollbacks: list[Any] | None = None,
    probes: list[Any] | None = None,
    **more: Any,
) -> Path:
    folder = stage.tmp / "theirs"
    folder.mkdir(exist_ok=True)
    (folder / "their_actions.py").write_text(ACTIONS)
    path = folder / f"{name}.chaos.yaml"
    hypothesis = {"title": "it is there", "probes": probes if probes is not None else [SERVICE_IS_THERE]}
    experiment = {
        "version": "1.0.0",
        "title": f"Their {name}",
        "description": "As a team wrote it.",
        "steady-state-hypothesis": hypothesis,
        "method": method,
        "rollbacks": rollbacks or [],
        "extensions": [{"name": "gameday", "lasting": 8}],
        **more,
    }
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


def env(stage: Stage, more: Mapping[str, str] | None = None) -> dict[str, str]:
    where = os.pathsep.join([str(stage.tmp / "theirs"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": where, "GAMEDAY_STEADY": "5", "GAMEDAY_HOLD": "5", **(more or {})}


def rehearse(stage: Stage, path: Path, more: Mapping[str, str] | None = None) -> Rehearsal:
    return stage.finish(stage.start(str(path), env=env(stage, more)))


def heal(stage: Stage) -> subprocess.CompletedProcess[str]:
    """From whatever machine has the modules of their rollbacks."""
    command = [sys.executable, "-m", "gameday.cli", "heal"]
    given = {**stage.env, **env(stage)}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=120, check=False)


def unfit(done: Rehearsal, name: str) -> bool:
    """A busy machine makes the load generator unfit, which is not what is tested here."""
    found = done.verdict(name)["findings"]
    return [one["objective"] for one in found if one["status"] != "PASS"] == ["load generator fit"]


@pytest.mark.thorough
def test_a_teams_experiment_passes_under_our_load_and_verdict(reference: Stage) -> None:
    """Killed by chaostoolkit-kubernetes, proven by our watches, judged by our load; then valid, and repeatable."""
    path = written(reference, "kill", [KILL])
    ensure_experiment_is_valid(yaml.safe_load(path.read_text()))
    assert reference.gameday("validate", str(path)).stdout.endswith("is valid: kill\n")
    done = rehearse(reference, path)
    assert done.code == 0 or unfit(done, "kill"), done.out
    verdict = done.verdict("kill")
    proven = next(one for one in verdict["findings"] if one["objective"] == "fault proven")
    assert proven["status"] == "PASS" and verdict["counts"]["ok"] > 500
    events = [json.loads(line) for line in (done.root / "kill" / "events.jsonl").read_text().splitlines()]
    effect = next(one for one in events if one.get("step") == "effect")
    assert effect["ok"] and "my-llama32" in effect["detail"]
    said = [one["text"] for one in events if one.get("kind") == "note"]
    assert [text.split(":")[0] for text in said if "steady state" in text] == [
        "steady state before",
        "steady state after",
    ]
    ensure_experiment_is_valid(json.loads((done.root / "kill" / "experiment.json").read_text()))
    wait_for_six_engines(cluster_of(reference))
    assert_clean(reference)


@pytest.mark.thorough
def test_plain_chaos_validates_and_repeats_it(reference: Stage) -> None:
    """`chaos run` exits 0 for whatever fails; with our actions in it, only for PASS."""
    newest = max((reference.tmp / "runs").glob("*/kill/experiment.json"), key=lambda path: path.stat().st_mtime)

    def chaos(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        given = {**reference.env, **env(reference), "GAMEDAY_RUNS_DIR": str(reference.tmp / "chaos"), **more}
        return subprocess.run(
            [sys.executable, "-m", "chaostoolkit", *words],
            cwd=reference.tmp,
            env=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    assert chaos("validate", str(newest)).returncode == 0
    done = chaos("run", str(newest), GAMEDAY_CONTEXT="gameday-sandbox")
    (verdict,) = (reference.tmp / "chaos").glob("*/kill/verdict.json")
    found = json.loads(verdict.read_text())
    short = [one["objective"] for one in found["findings"] if one["status"] != "PASS"]
    assert set(short) <= {"load generator fit"} and done.returncode == (1 if short else 0), done.stdout + done.stderr
    assert found["verdict"] in done.stdout
    wait_for_six_engines(cluster_of(reference))
    assert_clean(reference)


@pytest.mark.thorough
def test_a_cordon_that_its_rollback_lifts(reference: Stage) -> None:
    done = rehearse(reference, written(reference, "cordon", [CORDON], [UNCORDON]))
    assert done.code == 0 or unfit(done, "cordon"), done.out
    ledger = (done.root / "cordon" / "ledger.jsonl").read_text()
    assert '"verb": "rollback"' in ledger
    assert_clean(reference)


# ── must not be green ───────────────────────────────────────────────────────────────────────────


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "parts", "verdict", "told"),
    [
        ("idle", {"method": [activity("nothing")]}, "INCONCLUSIVE", "nothing was seen to change"),
        (
            "raising",
            {"method": [activity("raises"), CORDON], "rollbacks": [UNCORDON]},
            "INCONCLUSIVE",
            "boom",
        ),
        (
            "none",
            {"method": [CORDON], "rollbacks": [UNCORDON], "probes": [activity("says_none", "probe", tolerance=[0, 1])]},
            "INCONCLUSIVE",
            "nothing was injected",
        ),
        (
            "nan",
            {"method": [CORDON, activity("says_nan", "probe", tolerance=[0, 1])], "rollbacks": [UNCORDON]},
            "INCONCLUSIVE",
            "which says nothing",
        ),
        (
            "beyond",
            {"method": [CORDON, activity("says_one", "probe", tolerance=[2, 3])], "rollbacks": [UNCORDON]},
            "FAIL",
            "not within",
        ),
        ("mess", {"method": [CORDON]}, "ERROR", "left behind: node"),
    ],
)
def test_what_chaoslib_would_call_completed_is_not_green(
    reference: Stage, name: str, parts: dict[str, Any], verdict: str, told: str
) -> None:
    done = rehearse(reference, written(reference, name, **parts))
    try:
        assert done.code == 1, done.out
        assert done.verdict(name)["verdict"] == verdict, done.out
        assert told in " ".join(done.out.split()) or told in json.dumps(done.verdict(name)), done.out
        if verdict != "ERROR":
            assert_clean(reference)
    finally:
        cluster = cluster_of(reference)
        for node in cluster.nodes():
            if node.unschedulable:
                cluster.patch(NODES, node.name, {"spec": {"unschedulable": None}})


@pytest.mark.thorough
def test_a_rollback_that_raises_is_an_error(reference: Stage) -> None:
    done = rehearse(reference, written(reference, "torn", [CORDON], [activity("raises"), UNCORDON]))
    assert done.code == 1 and done.verdict("torn")["verdict"] == "ERROR", done.out
    assert "rollback 'raises' raised" in json.dumps(done.verdict("torn"))
    cluster = cluster_of(reference)
    assert not [node for node in cluster.nodes() if node.unschedulable], "the other rollbacks ran all the same"
    assert cluster.list(CONFIGMAPS, "llm", labels=LEDGERS), "and the ledger keeps what is not undone"
    again = heal(reference)
    assert again.returncode == 2 and "boom" in again.stderr, again.stderr
    for found in cluster.list(CONFIGMAPS, "llm", labels=LEDGERS):
        cluster.delete(CONFIGMAPS, found["metadata"]["name"], "llm")
    assert_clean(reference)


@pytest.mark.thorough
def test_sigterm_in_an_action_heals_at_once_and_injects_nothing_more(reference: Stage) -> None:
    """chaoslib swallows it, injects the next fault, and calls the experiment completed."""
    flag = reference.tmp / "sleeping"
    path = written(reference, "stopped", [CORDON, activity("sleeps"), KILL], [UNCORDON])
    process = reference.start(str(path), env=env(reference, {"SLEEPING": str(flag)}))
    seen = Lines(process)
    clock.wait_until(lambda: flag.exists() or process.poll() is not None, within=90, what="the sleeping action")
    begun = clock.now()
    process.send_signal(signal.SIGTERM)
    out = seen.rest(within=60)
    assert clock.now() - begun < 25, "it does not wait for the action's 30 s"
    assert process.returncode not in (0, -signal.SIGTERM) and "interrupted by SIGTERM" in out, out
    assert_clean(reference)
    run = max((reference.tmp / "runs").glob("*/stopped"), key=lambda found: found.stat().st_mtime)
    assert "kill an engine" not in (run / "events.jsonl").read_text()


@pytest.mark.thorough
def test_kill_nine_is_healed_from_the_ledger_by_its_rollbacks(reference: Stage) -> None:
    flag = reference.tmp / "sleeping-9"
    path = written(reference, "killed", [CORDON, activity("sleeps")], [UNCORDON])
    process = reference.start(str(path), env=env(reference, {"SLEEPING": str(flag)}))
    seen = Lines(process)
    clock.wait_until(lambda: flag.exists() or process.poll() is not None, within=90, what="the sleeping action")
    process.kill()
    seen.rest(within=30)
    cluster = cluster_of(reference)
    assert [node for node in cluster.nodes() if node.unschedulable]
    for name, namespace in (("gameday", "llm"), ("gameday-cluster", "default")):
        cluster.patch(LEASES, name, {"spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}}, namespace)
    healed = heal(reference)
    assert healed.returncode == 0 and "rollback" in healed.stdout, healed.stdout + healed.stderr
    assert not [node for node in cluster.nodes() if node.unschedulable]
    assert_clean(reference)


# ── secrets and reach ───────────────────────────────────────────────────────────────────────────


@pytest.mark.thorough
def test_a_secret_is_nowhere_in_the_record(reference: Stage) -> None:
    secrets = {"db": {"password": {"type": "env", "key": "THEIR_PASSWORD"}}}
    path = written(reference, "secret", [activity("uses", provider={"secrets": ["db"]})], secrets=secrets)
    process = reference.start(
        str(path), f"--junitxml={reference.tmp}/j.xml", env=env(reference, {"THEIR_PASSWORD": SECRET})
    )
    done = reference.finish(process)
    assert done.code == 1 and "the database refused ***" in done.out, done.out
    assert SECRET not in done.out
    for found in [*done.root.rglob("*"), reference.tmp / "j.xml"]:
        assert not found.is_file() or SECRET.encode() not in found.read_bytes(), found
    assert_clean(reference)


@pytest.mark.thorough
def test_actions_that_would_reach_elsewhere_never_begin(reference: Stage) -> None:
    elsewhere = json.loads(json.dumps(KILL))
    elsewhere["provider"]["arguments"]["ns"] = "kube-system"
    everywhere = json.loads(json.dumps(KILL))
    del everywhere["provider"]["arguments"]["label_selector"]
    nowhere = json.loads(json.dumps(KILL))
    del nowhere["provider"]["arguments"]["ns"]
    for name, action, told in (
        ("elsewhere", elsewhere, "which is not in allow_namespaces"),
        ("everywhere", everywhere, "which would mean all of them"),
        ("nowhere", nowhere, "which would mean 'default'"),
    ):
        done = rehearse(reference, written(reference, name, [action]))
        assert done.code == 1 and "1 error" in done.out, done.out
        assert told in " ".join(done.out.split()), done.out
        assert not (done.root / name / "events.jsonl").exists(), "nothing began"
    assert_clean(reference)
