"""Every stop condition, broken on purpose: it stops, with the right word and the reason; and it does not stop else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from gameday import clock, halt
from gameday.cluster import Cluster
from gameday.errors import LockError
from gameday.flow import Flow
from gameday.guard import Guard
from gameday.kinds import CONFIGMAPS
from gameday.lock import Lock
from gameday.model import Heartbeat, Note, Outcome, Reply
from gameday.settings import load
from gameday.tape import Tape
from loadgen.launch import Tail
from probes.prometheus import Prometheus

NOBODY = Prometheus("http://127.0.0.1:9")
READY = SimpleNamespace(ready=True)


class Workers:
    """A load that gives the tails it was told to."""

    def __init__(self) -> None:
        self.tail, self.lives = Tail(), True

    def poll(self) -> Tail:
        return self.tail

    def alive(self) -> bool:
        return self.lives

    def begin(self, at: float) -> None:
        pass


class Scene:
    """A guard in the midst of a fault that began 60 s ago, all well."""

    def __init__(self, tmp_path: Path, prometheus: Prometheus = NOBODY, **settings: Any) -> None:
        self.settings = load(
            {"scrape_interval": 1, "stop_after": 10, "stop_file": tmp_path / "gameday.stop"} | settings
        )
        self.tape = Tape(lambda _: None)
        self.flow, self.load = Flow(keep=20), Workers()
        self.flow._load = self.load  # type: ignore[assignment]
        self.sampler = SimpleNamespace(blind_for=lambda: 0.0, last_error="")
        self.watcher = SimpleNamespace(blind=lambda _: "", engines=lambda: (READY,) * 3)
        self.ear = SimpleNamespace(look=lambda: None, start=lambda: None, stop=lambda: None)
        made: list[Any] = [self.settings, self.tape, self.flow, self.sampler, self.watcher, prometheus, self.ear]
        self.guard = Guard(*made)
        self.guard.harm = clock.now() - 60

    def replies(self, good: int, bad: int, silent: int = 0) -> None:
        now = clock.now()
        outcomes = [Outcome.OK] * good + [Outcome.HTTP_5XX] * bad
        some = tuple(Reply(0, n, "chat", now - 3, now - 1, outcome) for n, outcome in enumerate(outcomes))
        self.load.tail = Tail(replies=some, silent=silent)

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(event.level, event.text) for event in self.tape.events if isinstance(event, Note)]

    def look(self) -> list[tuple[str, str]]:
        self.guard.look()
        return self.told


def test_all_is_well(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stop_replicas=3, stop_burn=14.4, slo=0.99)
    scene.replies(good=90, bad=5)
    assert scene.look() == [] and not scene.tape.stopped


def test_success_below_the_floor_fails(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stop_below=0.2)
    scene.replies(good=1, bad=9)
    assert scene.look() == [("fail", "success fell to 10.0% over 10 s, below the stop condition of 20.0 %")]
    assert scene.tape.breached


def test_a_request_that_hangs_counts_as_bad_already(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stop_below=0.2)
    scene.replies(good=0, bad=0, silent=5)
    ((level, text),) = scene.look()
    assert level == "fail" and "0.0%" in text


def test_no_request_at_all_says_nothing_of_the_service(tmp_path: Path) -> None:
    assert Scene(tmp_path).look() == []


def test_a_fault_younger_than_the_window_is_not_judged_yet(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.guard.harm = clock.now() - 5
    scene.replies(good=0, bad=9)
    assert scene.look() == []


def test_before_the_harm_no_client_condition_stops(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stop_replicas=9)
    scene.guard.harm = None
    scene.replies(good=0, bad=9)
    assert scene.look() == []


def test_a_burning_error_budget_fails(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stop_burn=14.4, slo=0.99)
    scene.replies(good=80, bad=20)
    ((level, text),) = scene.look()
    assert level == "fail" and "burnt 20.0 times too fast" in text


def test_too_few_replicas_fail(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stop_replicas=4)
    assert scene.look() == [("fail", "only 3 replicas are ready, the stop condition is 4")]


def test_a_lost_worker_is_inconclusive(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.load.lives = False
    assert scene.look() == [("inconclusive", "a load worker was lost")]


def test_a_load_generator_that_hangs_is_inconclusive(tmp_path: Path) -> None:
    """Its process lives; its heartbeats do not come. Silence is no failure of the service."""
    scene = Scene(tmp_path)
    scene.flow.begin(clock.now() - 7)
    ((level, text),) = scene.look()
    assert level == "inconclusive" and "silent for 7" in text
    scene = Scene(tmp_path)
    scene.flow.begin(clock.now() - 7)
    scene.load.tail = Tail(beats=(Heartbeat(0.0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0),))
    assert scene.look() == []


def test_a_blind_prometheus_and_a_blind_watch_are_inconclusive(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.sampler.blind_for = lambda: 5.5
    scene.sampler.last_error = "connection failed"
    assert scene.look() == [("inconclusive", "Prometheus has been blind for 5.5 s (connection failed)")]
    scene = Scene(tmp_path)
    scene.watcher.blind = lambda _: "no word from the watch of pods"
    assert scene.look() == [("inconclusive", "Kubernetes cannot be seen: no word from the watch of pods")]


def test_a_guard_that_crashes_stops_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    scene = Scene(tmp_path)
    scene.watcher.blind = lambda _: 1 / 0
    scene.guard.start()
    assert scene.tape.stopping.wait(timeout=10)
    assert scene.told[0][0] == "error"
    scene.guard.stop()


# ── PromQL and alerts ───────────────────────────────────────────────────────────────────────────


class Answers(BaseHTTPRequestHandler):
    """Prometheus's query API, with the vectors that `server.results` has for a query."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)["query"][0]
        result = self.server.results.get(query, [])  # type: ignore[attr-defined]
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(results: dict[str, list[dict[str, Any]]]) -> Iterator[Prometheus]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.results = results  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    prometheus = Prometheus(f"http://127.0.0.1:{server.server_port}")
    try:
        yield prometheus
    finally:
        prometheus.close()
        server.shutdown()
        thread.join()
        server.server_close()


def one(value: float, **labels: str) -> dict[str, Any]:
    return {"metric": labels, "value": [0, str(value)]}


def stops(scene: Scene) -> list[tuple[str, str]]:
    """What the guard says once it has asked."""
    scene.guard.start()
    stopped = scene.tape.stopping.wait(timeout=10)
    scene.guard.stop()
    assert stopped, "nothing stopped"
    return scene.told


def goes_on(scene: Scene, asked: int) -> bool:
    """Whether nothing stops it until `asked` answers are in."""
    scene.guard.start()
    clock.wait_until(lambda: len(scene.tape.samples) >= asked or scene.tape.stopped, within=10, what="the answers")
    scene.guard.look()
    scene.guard.stop()
    return not scene.tape.stopped


def test_a_promql_condition_that_is_met_fails(tmp_path: Path) -> None:
    with answering({"max(queue)": [one(31)]}) as prometheus:
        scene = Scene(tmp_path, prometheus, stop_when=("max(queue) > 30",))
        assert stops(scene) == [("fail", "the stop condition max(queue) > 30 is met: 31")]
    with answering({"max(queue)": [one(30)]}) as prometheus:
        assert goes_on(Scene(tmp_path, prometheus, stop_when=("max(queue) > 30",)), asked=2)


def test_a_promql_condition_without_data_is_blind_not_fulfilled(tmp_path: Path) -> None:
    with answering({}) as prometheus:
        scene = Scene(tmp_path, prometheus, stop_when=("max(queue) > 30",), scrape_interval=0.1)
        ((level, text),) = stops(scene)
    assert level == "inconclusive" and "max(queue) > 30 has been blind" in text and "no data" in text


ALERTS = 'ALERTS{alertstate="firing",severity="critical"}'


def test_an_alert_that_is_not_ours_fails(tmp_path: Path) -> None:
    critical = {"stop_alerts": 'severity="critical"', "expected_alerts": ("EngineDown",)}
    ours = one(1, alertname="EngineDown")
    with answering({ALERTS: [ours, one(1, alertname="DiskFull")]}) as prometheus:
        scene = Scene(tmp_path, prometheus, **critical)
        assert stops(scene) == [("fail", "an alert fires that is not of this experiment: DiskFull")]
    with answering({ALERTS: [ours]}) as prometheus:
        assert goes_on(Scene(tmp_path, prometheus, **critical), asked=2)


def test_alerts_that_cannot_be_asked_for_are_blind(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stop_alerts='severity="critical"', scrape_interval=0.1)
    ((level, text),) = stops(scene)
    assert level == "inconclusive" and "alerts has been blind" in text


# ── gameday stop ────────────────────────────────────────────────────────────────────────────────

LABELS = {"app.kubernetes.io/managed-by": "gameday", "gameday.dev/run": "r1"}


class Worker:
    """A game day that obeys: it holds the lock, and gives it back when it hears a stop."""

    def __init__(self, cluster: Cluster, name: str, file: Path) -> None:
        self.cluster, self.heard, self.why = cluster, threading.Event(), ""
        self.lock = Lock(cluster, name, LABELS, cluster_wide=False)
        self.lock.acquire(on_lost=print)
        self.ear = halt.Ear(cluster, name, file, self.hear)
        self.ear.start()

    def hear(self, why: str) -> None:
        self.why = why
        self.heard.set()

    def obey(self) -> None:
        if self.heard.wait(timeout=20):
            self.leave()

    def leave(self) -> None:
        self.ear.stop()
        halt.clear(self.cluster, self.lock.holder)
        self.lock.release()


def test_gameday_stop_ends_the_one_at_work(cluster: Cluster, tmp_path: Path) -> None:
    work = Worker(cluster, "r1/zone_outage", tmp_path / "gameday.stop")
    obeys = threading.Thread(target=work.obey)
    obeys.start()
    said: list[str] = []
    took = halt.request(cluster, "users complain", within=20, say=said.append)
    obeys.join()
    assert work.why == "stopped by `gameday stop`: users complain" and took < 20
    assert "r1/zone_outage" in said[0]
    assert cluster.find(CONFIGMAPS, halt.NAME, "llm") is None


def test_a_stop_for_another_run_is_not_ours(cluster: Cluster, tmp_path: Path) -> None:
    metadata = {"name": halt.NAME, "namespace": "llm", "labels": LABELS | {"gameday.dev/role": "stop"}}
    old = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"holder": "r0/pod_kill"}}
    cluster.create(CONFIGMAPS, old)
    work = Worker(cluster, "r1/zone_outage", tmp_path / "gameday.stop")
    assert not work.heard.wait(timeout=1)
    cluster.patch(CONFIGMAPS, halt.NAME, {"data": {"holder": "r1/zone_outage"}}, "llm")
    assert work.heard.wait(timeout=10), "the same, were it ours"
    work.leave()


def test_gameday_stop_with_nobody_at_work_says_so(cluster: Cluster) -> None:
    with pytest.raises(LockError, match="No game day is at work in llm"):
        halt.request(cluster, "", within=5, say=print)


def test_the_stop_file_stops(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "gameday.stop"
    why: list[str] = []
    ear = halt.Ear(cluster, "r1/x", file, why.append)
    ear.look()
    assert why == []
    file.touch()
    ear.look()
    assert why == [f"stopped by the file {file}"]
