"""End to end on the sandbox, with real load, faults and Prometheus: one that must be green, many that must not."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chaoslib.experiment import ensure_experiment_is_valid
from stage import Lines, Stage

from gameday import clock
from gameday.cluster import Cluster
from gameday.kinds import CONFIGMAPS, LEASES, NETWORKCHAOS, NODES, PODCHAOS, PODS
from gameday.ledger import LEDGERS, strays

SHORT = """
from faults import PodKill, Zone, ZoneOutage, ZonePartition
from gameday.objectives import FirstToken, NothingLeftBehind, Recovers, Success
from loadgen.traffic import Chat
"""
PARTITION = (
    SHORT
    + """
def test_partition(experiment, zone):
    experiment(
        traffic=Chat(per_second=10),
        before=[Success(at_least=0.99)],
        fault=ZonePartition(zone, lasting=40),
        during=[Success(at_least=0.5)],
        after=[NothingLeftBehind()],
    )
"""
)


def cluster_of(stage: Stage) -> Cluster:
    running = stage.running
    return Cluster.connect(context=running.context, kubeconfig=Path(running.kubeconfig), namespace=running.namespace)


def assert_clean(stage: Stage) -> None:
    """Nothing of any run is left in the cluster."""
    cluster = cluster_of(stage)
    assert strays(cluster) == ()
    assert cluster.list(CONFIGMAPS, cluster.namespace, labels=LEDGERS) == []
    assert cluster.list(PODCHAOS, cluster.namespace) == [] == cluster.list(NETWORKCHAOS, cluster.namespace)
    assert [one for one in cluster.list(LEASES, cluster.namespace) if one["metadata"]["name"] == "gameday"] == []
    assert not [node.name for node in cluster.nodes() if node.unschedulable]


def wait_for_six_engines(cluster: Cluster) -> None:
    def ready() -> bool:
        return sum(pod.ready for pod in cluster.pods(labels="app=my-llama32")) == 6

    clock.wait_until(ready, within=60, what="six ready engines")


def written(stage: Stage, name: str, text: str) -> str:
    """An experiment in a repository of the user's own; the plugin is there because gameday is installed."""
    path = stage.tmp / name
    path.write_text(text)
    return str(path)


# ── green, and it can be told why ───────────────────────────────────────────────────────────────


def test_pod_kill_passes_with_everything_that_a_verdict_needs(reference: Stage) -> None:
    done = reference.rehearse("experiments", "-k", "pod_kill", "--seed", "7", f"--junitxml={reference.tmp}/junit.xml")
    assert done.code == 0, done.out
    verdict = done.verdict("pod_kill")
    assert verdict["verdict"] == "PASS" and verdict["seed"] == 7
    counts = verdict["counts"]
    assert counts["planned"] == sum(counts[key] for key in ("ok", "failed", "shed", "censored")) > 1000
    recovery = verdict["recovery"]
    assert recovery["low"] <= recovery["seconds"] <= recovery["high"] <= 10
    folder = done.root / "pod_kill"
    for name in (
        "run.json",
        "plan.json",
        "samples.jsonl",
        "events.jsonl",
        "experiment.json",
        "journal.json",
        "seal.json",
    ):
        assert (folder / name).stat().st_size > 2, name
    assert (folder / "manifests" / "pod-kill.yaml").exists()
    page = (folder / "report.html").read_text()
    assert "PASS" in page
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=[\"']?https?:", outside), "the page must open offline"
    assert json.loads((folder / "journal.json").read_text())["status"] == "completed"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sum(one.get("value") is not None for one in samples) > 10, "Prometheus was asked and answered"
    assert_clean(reference)
    # the verdict is a function of the record
    before = (folder / "verdict.json").read_bytes()
    judged = reference.gameday("judge", str(done.root))
    assert judged.returncode == 0, judged.stderr
    assert (folder / "verdict.json").read_bytes() == before
    # and an edited record is refused, with the place
    with (folder / "events.jsonl").open("a") as file:
        file.write("{}\n")
    refused = reference.gameday("judge", str(folder))
    assert refused.returncode == 2 and "events.jsonl" in refused.stderr and "Traceback" not in refused.stderr


def test_the_experiment_is_valid_under_chaos_toolkit(reference: Stage) -> None:
    newest = max((reference.tmp / "runs").glob("*/pod_kill/experiment.json"), key=lambda path: path.stat().st_mtime)
    ensure_experiment_is_valid(json.loads(newest.read_text()))
    told = reference.gameday("validate", str(newest))
    assert told.returncode == 0 and "pod_kill" in told.stdout, told.stderr


# ── must not be green ───────────────────────────────────────────────────────────────────────────


def test_zone_outage_fails_on_the_fragile_stack(fragile: Stage) -> None:
    done = fragile.rehearse("experiments", "-k", "zone_outage", "--seed", "7")
    assert done.code == 1, done.out
    verdict = done.verdict("zone_outage")
    assert verdict["verdict"] == "FAIL", done.out
    assert any(one["status"] == "FAIL" and one["objective"].startswith("success") for one in verdict["findings"])
    assert "FAIL" in done.out
    assert_clean(fragile)


def test_a_prometheus_that_is_down_is_an_error(reference: Stage) -> None:
    done = reference.rehearse("experiments", "-k", "pod_kill", "--prometheus", "http://127.0.0.1:9")
    assert done.code == 1
    assert "1 error" in done.out and "Prometheus at http://127.0.0.1:9 does not answer" in done.out
    assert_clean(reference)


def test_a_target_that_answers_nothing_is_an_error(reference: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        done = reference.rehearse("experiments", "-k", "pod_kill", "--target", url)
    assert done.code == 1 and "1 error" in done.out and "did not answer" in done.out, done.out
    assert_clean(reference)


@contextmanager
def proxy(upstream: str) -> Iterator[tuple[str, threading.Event]]:
    """A TCP proxy to `upstream` (host:port); once its event is set, it takes connections and says nothing."""
    host, port = upstream.removeprefix("http://").split(":")
    dead, server = threading.Event(), socket.create_server(("127.0.0.1", 0), backlog=128)
    held: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if dead.is_set():
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            held.append(client)
            if dead.is_set():
                continue
            there = socket.create_connection((host, int(port)))
            held.append(there)
            for pair in ((client, there), (there, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    acceptor = threading.Thread(target=serve, daemon=True)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", dead
    finally:
        server.shutdown(socket.SHUT_RDWR)  # wakes the accept
        acceptor.join(timeout=10)
        server.close()
        for sock in held:
            sock.close()


@pytest.mark.thorough
def test_a_target_that_goes_deaf_before_the_fault_is_inconclusive(reference: Stage) -> None:
    with proxy(reference.running.target_url) as (url, dead):
        process = reference.start(written(reference, "test_deaf.py", PARTITION), "--target", url)
        seen = Lines(process)
        clock.wait_until(lambda: "before" in seen.text, within=60, what="the phase before the fault")
        dead.set()
        out = seen.rest(within=120)
    assert process.returncode == 1 and "1 inconclusive" in out, out
    assert "steady state was not reached, nothing was injected" in out
    assert_clean(reference)


@pytest.mark.thorough
def test_a_prometheus_that_goes_blind_heals_and_is_inconclusive(reference: Stage) -> None:
    with proxy(reference.running.prometheus_url) as (url, dead):
        process = reference.start(written(reference, "test_blind.py", PARTITION), "--prometheus", url)
        seen = Lines(process)
        clock.wait_until(lambda: "during" in seen.text, within=90, what="the fault")
        dead.set()
        out = seen.rest(within=120)
    assert process.returncode == 1 and "1 inconclusive" in out and "blind" in out, out
    assert_clean(reference)


def test_a_fault_that_selects_nothing_or_has_no_effect_is_inconclusive(reference: Stage) -> None:
    """Records may say Injected while what was to die lives on: the probers are not fooled."""
    text = (
        SHORT
        + """
import copy
from dataclasses import dataclass, replace
from faults.base import Dead

@dataclass(frozen=True)
class Missed(PodKill):
    def plan(self, view):
        plan = PodKill.plan(self, view)
        (act,) = plan.acts
        manifest = copy.deepcopy(act.manifest)
        manifest["spec"]["selector"]["pods"] = {view.namespace: ["nobody"]}
        return replace(plan, acts=(replace(act, manifest=manifest),))

@dataclass(frozen=True)
class Toothless(PodKill):
    def plan(self, view):
        plan = PodKill.plan(self, view)
        (act,) = plan.acts
        other = next(pod for pod in view.ready if pod.key not in plan.facts.pods)
        return replace(plan, acts=(replace(act, proof=Dead((other.key,)), within=5.0),))

def run(experiment, fault):
    experiment(traffic=Chat(per_second=10), before=[Success(at_least=0.99)], fault=fault,
               during=[Success(at_least=0.5)], after=[NothingLeftBehind()])

def test_missed(experiment):
    run(experiment, Missed(lasting=10))

def test_toothless(experiment):
    run(experiment, Toothless(lasting=10))
"""
    )
    path = written(reference, "test_unproven.py", text)
    done = reference.finish(reference.start(path, env={"GAMEDAY_STEADY": "5"}))
    assert done.code == 1 and "2 inconclusive" in done.out, done.out
    for name, why in (("missed", "selected nothing"), ("toothless", "its effect was not seen")):
        told = done.verdict(name)
        assert told["verdict"] == "INCONCLUSIVE"
        assert any(why in one["evidence"] for one in told["findings"]), told["findings"]
    assert_clean(reference)


# ── stopped, killed, contested ──────────────────────────────────────────────────────────────────


def test_sigterm_in_mid_fault_heals(reference: Stage) -> None:
    process = reference.start(written(reference, "test_stopped.py", PARTITION))
    seen = Lines(process)
    cluster = cluster_of(reference)
    clock.wait_until(lambda: bool(cluster.list(NETWORKCHAOS, "llm")), within=90, what="the partition")
    process.send_signal(signal.SIGTERM)
    out = seen.rest(within=60)
    assert process.returncode not in (0, -signal.SIGTERM), out
    assert "interrupted by SIGTERM" in out
    assert_clean(reference)


@pytest.mark.thorough
def test_kill_nine_in_mid_fault_is_healed_from_the_ledger(reference: Stage) -> None:
    process = reference.start("experiments", "-k", "zone_outage", "--seed", "7")
    cluster = cluster_of(reference)
    clock.wait_until(
        lambda: any(node.unschedulable for node in cluster.nodes()) and bool(cluster.list(NETWORKCHAOS, "llm")),
        within=90,
        what="cordon and partition",
    )
    process.kill()
    process.communicate(timeout=30)
    # As if its Lease had run out; `gameday heal` would wait for that.
    cluster.patch(LEASES, "gameday", {"spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}}, "llm")
    cluster.patch(LEASES, "gameday-cluster", {"spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}}, "default")
    blocked = reference.rehearse("experiments", "-k", "pod_kill")
    assert blocked.code == 1 and "gameday heal" in blocked.out, blocked.out
    healed = reference.gameday("heal")
    assert healed.returncode == 0, healed.stderr
    assert strays(cluster) == () and not any(node.unschedulable for node in cluster.nodes())
    assert reference.gameday("heal").stdout.strip() == "nothing to heal"
    for name, namespace in (("gameday", "llm"), ("gameday-cluster", "default")):
        cluster.delete(LEASES, name, namespace)
    wait_for_six_engines(cluster)


def test_a_second_game_day_is_refused(reference: Stage) -> None:
    first = reference.start(written(reference, "test_first.py", PARTITION))
    seen = Lines(first)
    cluster = cluster_of(reference)
    clock.wait_until(lambda: cluster.find(LEASES, "gameday", "llm") is not None, within=60, what="the first one's lock")
    second = reference.rehearse("experiments", "-k", "pod_kill")
    assert second.code == 1 and "holds the lock in llm" in second.out, second.out
    first.send_signal(signal.SIGTERM)
    seen.rest(within=60)
    assert_clean(reference)


def test_dry_run_prints_and_validates_and_applies_nothing(reference: Stage) -> None:
    done = reference.rehearse("experiments", "-k", "zone_outage", "--dry-run", "-rs")
    assert done.code == 0 and "1 skipped" in done.out, done.out
    for kind, count in (("NetworkChaos", 1), ("PodChaos", 1), ("Lease", 2), ("ConfigMap", 1), ("Pod", 3)):
        assert len(re.findall(rf"^kind: {kind}$", done.out, re.MULTILINE)) == count, kind
    assert "change: kubectl cordon" in done.out and "undo: kubectl uncordon" in done.out
    assert "undo: kubectl -n llm delete networkchaos" in done.out
    assert_clean(reference)


def test_doctor_says_what_is_wrong(reference: Stage) -> None:
    good = reference.gameday("doctor", "--json")
    assert good.returncode == 0, good.stdout
    assert all(check["ok"] for check in json.loads(good.stdout))
    bad = reference.gameday("doctor", "--namespace", "kube-system")
    assert bad.returncode == 1 and "allow_namespaces" in bad.stdout


def test_pods_are_where_they_were(reference: Stage) -> None:
    """After all of the above the stack is whole: nothing of any fault lingers."""
    cluster = cluster_of(reference)
    wait_for_six_engines(cluster)
    leftovers = [
        obj["metadata"]["name"] for obj in cluster.list(PODS, "llm") if obj["metadata"]["name"].startswith("gd-")
    ]
    assert leftovers == []
    assert len(cluster.list(NODES)) == 6
    assert Path(reference.running.kubeconfig).exists()
