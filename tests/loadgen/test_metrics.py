"""What a Prometheus sees of the client: an outage cannot improve it, no gap is averaged away, a real one takes it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent))
from openai_server import Server

from gameday import clock
from loadgen import launch
from loadgen.metrics import ITL_EDGES, TTFT_EDGES, Durations
from loadgen.plan import make
from loadgen.traffic import Stream, Traffic, fixed


def _buckets(registry: CollectorRegistry) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {s.labels.get("le", s.name): s.value for f in families for s in f.samples if s.labels.get("cls") == "chat"}


def test_what_never_came_is_beyond_every_edge() -> None:
    registry = CollectorRegistry()
    durations = Durations("gameday_x_seconds", "x", TTFT_EDGES, registry)
    durations.add("chat", [0.3, 0.5, None, None])
    seen = _buckets(registry)
    assert (seen["0.25"], seen["0.5"], seen["80.0"], seen["+Inf"]) == (0, 2, 2, 4)
    assert seen["gameday_x_seconds_count"] == 4
    assert seen["gameday_x_seconds_sum"] == pytest.approx(0.8)


def test_every_gap_counts() -> None:
    """The mean of 63 gaps of 20 ms and one of 2 s is 51 ms: nobody would see the stall."""
    registry = CollectorRegistry()
    durations = Durations("gameday_x_seconds", "x", ITL_EDGES, registry)
    durations.add("chat", [0.02] * 63 + [2.0])
    seen = _buckets(registry)
    assert (seen["0.01"], seen["0.025"], seen["1.0"], seen["2.5"]) == (0, 63, 63, 64)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def test_a_real_prometheus_scrapes_it(tmp_path: Path) -> None:
    binary = os.environ.get("PROMETHEUS_BIN") or shutil.which("prometheus")
    if not binary:
        pytest.skip("no Prometheus here: name one with PROMETHEUS_BIN")
    stream = Stream(name="chat", per_second=20, prompt=fixed(8), output=fixed(3))
    make(Traffic(streams=(stream,)), 1, 60).write(tmp_path / "plan.json")
    metrics, port = _port(), _port()
    scrape = {"job_name": "load", "static_configs": [{"targets": [f"127.0.0.1:{metrics}"]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [binary, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")

    def ask(query: str) -> float:
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                result = json.load(answer)["data"]["result"]
        except OSError:
            return -1
        return float(result[0]["value"][1]) if result else -1

    with (
        Server() as url,
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        load = launch.start(tmp_path / "plan.json", target=url, model="tiny", out=tmp_path, metrics_port=metrics)
        try:
            load.begin(clock.now())
            good = 'gameday_replies_total{cls="chat",outcome="ok"}'
            clock.wait_until(lambda: ask(good) >= 20, within=30, what="replies in Prometheus")
            ttft = "gameday_time_to_first_token_seconds"
            assert ask(f'{ttft}_bucket{{le="5.0"}} / ignoring(le) {ttft}_count') == 1
            assert ask("gameday_inter_token_latency_seconds_count") >= 2 * 20
            assert ask("gameday_cpu_share") > 0
        finally:
            load.stop(within=2)
            process.terminate()
            process.wait(20)
