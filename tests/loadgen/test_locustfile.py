"""Locust as people run it: its command line, CSV, failures, master and worker, /metrics."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from openai_server import Server

from gameday import clock
from loadgen import records

FILE = Path(__file__).parents[2] / "loadgen" / "locustfile.py"
LOAD = ["--model", "tiny", "--output-tokens", "3", "--rate", "2", "--exit-code-on-error", "0"]
LOAD += ["--long-share", "0.3", "--long-tokens", "12", "--canary-rate", "20"]
SHAPE = """
from locust import LoadTestShape

class Steps(LoadTestShape):
    def tick(self):
        at = self.get_run_time()
        return None if at > 5 else (4 if at < 2 else 16, 100)
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Server() as url:
        yield url


def _command(*more: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", str(FILE), *more]


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _ended(done: subprocess.CompletedProcess[str]) -> None:
    """With 0, or with 1 and the reason: on a busy machine the generator may not keep up, and must say so."""
    assert done.returncode == ("NOT SOUND" in done.stderr), done.stderr


def test_headless_with_csv_and_records(url: str, tmp_path: Path) -> None:
    more = ["--headless", "-u", "10", "-r", "10", "--host", url, "--csv", str(tmp_path / "stats")]
    command = _command(*more, *LOAD, "--records", str(tmp_path / "records"))
    file = tmp_path / "records" / "replies.0.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as locust:
        clock.wait_until(lambda: file.exists() and file.read_bytes().count(b"\n") > 150, within=60, what="150 replies")
        locust.terminate()
        _, said = locust.communicate(timeout=60)
    _ended(subprocess.CompletedProcess(command, locust.returncode, "", said))
    end = json.loads((tmp_path / "records" / "load.0.jsonl").read_text().splitlines()[-1])
    assert end["kind"] == "load_end"
    assert end["planned"] == end["ok"] > 20
    table = (tmp_path / "stats_stats.csv").read_text()
    assert all(entry in table for entry in ("reply,chat", "first token,chat", "time per token,chat", "tokens/s,chat"))
    assert all(f"{entry},{cls}" in table for entry in ("reply", "first token") for cls in ("chat", "long", "canary"))
    replies = [*records.Follower(tmp_path / "records" / "replies.0.jsonl").replies()]
    assert len(replies) == end["planned"]
    share = Counter(r.cls for r in replies)
    assert 0.1 < share["long"] / (share["long"] + share["chat"]) < 0.5
    canaries = [r for r in replies if r.cls == "canary"]
    assert all(r.tokens == 1 for r in canaries)
    gaps = [b.t_intended - a.t_intended for a, b in pairwise(sorted(canaries, key=lambda r: r.t_intended))]
    assert gaps == pytest.approx([0.05] * len(gaps), abs=1e-5)
    assert 0.4 < sum(not r.conn_reused for r in canaries) / len(canaries) < 0.8
    assert {r.tokens for r in replies if r.cls == "long"} == {12}
    count, failures = next(row for row in table.splitlines() if row.startswith("reply,chat")).split(",")[2:4]
    assert 10 < int(count) <= end["planned"]  # Locust writes its table once a second; the records are the account
    assert failures == "0"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model", "huge"], "has no model 'huge'"),
        (["--rate", "nan"], "cannot be negative or infinite"),
        (["--records", "/proc/nowhere"], "the records cannot be written to /proc/nowhere"),
        (["--metrics-port", "99999"], "/metrics cannot be served on port 99999"),
    ],
)
def test_unknown_model_is_one_sentence_and_an_exit_code(url: str, more: list[str], says: str) -> None:
    command = _command("--headless", "-u", "1", "-t", "20s", "--host", url, *LOAD, *more)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "account:" not in done.stderr
    assert "Traceback" not in done.stderr


def test_master_and_worker_with_metrics(url: str, tmp_path: Path) -> None:
    port, metrics = _port(), _port()
    master = _command("--master", "--master-bind-port", str(port), "--headless", "--expect-workers", "1")
    master += ["-u", "10", "-r", "10", "-t", "90s", "--host", url, "--csv", str(tmp_path / "stats"), *LOAD]
    worker = _command("--worker", "--master-port", str(port), "--metrics-port", str(metrics))
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(master, stdout=log, stderr=log) as lead,
        subprocess.Popen(worker, stdout=log, stderr=log) as hand,
    ):
        try:

            def scraped() -> bool:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=1) as answer:
                        return b'gameday_replies_total{cls="chat",outcome="ok"}' in answer.read()
                except OSError:
                    return False

            clock.wait_until(scraped, within=30, what="replies in /metrics")
            table = tmp_path / "stats_stats.csv"
            clock.wait_until(lambda: "reply,chat," in table.read_text(), within=30, what="replies in the CSV")
            lead.terminate()
            assert lead.wait(20) == 0, (tmp_path / "log").read_text()
        finally:
            lead.kill()
            hand.kill()


def test_a_generator_that_stood_still_says_so(url: str, tmp_path: Path) -> None:
    """By its exit code, too, when a signal ends it: Locust takes that before it stops its users."""
    command = _command("--headless", "-u", "5", "-r", "5", "--host", url, *LOAD, "--records", str(tmp_path))
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as locust:
        replies = tmp_path / "replies.0.jsonl"
        clock.wait_until(lambda: replies.exists() and replies.stat().st_size > 0, within=20, what="replies")
        locust.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        locust.send_signal(signal.SIGCONT)
        so_far = replies.stat().st_size
        clock.wait_until(lambda: replies.stat().st_size > so_far, within=20, what="more replies")
        locust.terminate()
        _, said = locust.communicate(timeout=60)
    assert locust.returncode == 1, said
    assert "requests were sent more than 10 ms late: believe no latency of this run" in said
    end = json.loads((tmp_path / "load.0.jsonl").read_text().splitlines()[-1])
    assert end["planned"] == end["ok"] > 0


def test_a_lost_worker_is_said_by_the_master(url: str, tmp_path: Path) -> None:
    """Stock Locust carries on with what is left, and ends with 0."""
    port = _port()
    master = _command("--master", "--master-bind-port", str(port), "--headless", "--expect-workers", "2")
    master += ["-u", "10", "-r", "10", "-t", "60s", "--host", url, *LOAD]
    out = [tmp_path / "0", tmp_path / "1"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(master, stdout=log, stderr=log) as lead:
        hands = [
            subprocess.Popen(_command("--worker", "--master-port", str(port)), stdout=log, stderr=log) for _ in out
        ]
        try:

            def running() -> bool:
                return b"All users spawned" in (tmp_path / "log").read_bytes()

            clock.wait_until(running, within=20, what="the users of both workers")
            hands[0].kill()

            def said() -> bool:
                return b"was lost: the run is short, and not sound" in (tmp_path / "log").read_bytes()

            clock.wait_until(said, within=20, what="the master's word")
            lead.terminate()
            assert lead.wait(20) == 2
        finally:
            for process in (lead, *hands):
                process.kill()
                process.wait()


def test_a_shape_leads_the_users(url: str, tmp_path: Path) -> None:
    """4 users for 2 s, then 16: the arrivals follow, users × rate."""
    (tmp_path / "shape.py").write_text(SHAPE)
    command = [sys.executable, "-m", "locust", "-f", f"{FILE},{tmp_path / 'shape.py'}", "--headless", "--host", url]
    command += [*LOAD, "--rate", "5", "--records", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    _ended(done)
    end = json.loads((tmp_path / "load.0.jsonl").read_text().splitlines()[-1])
    assert end["planned"] == end["ok"]
    replies = [*records.Follower(tmp_path / "replies.0.jsonl").replies()]
    begin = min(r.t_intended for r in replies)
    people = [r.t_intended - begin for r in replies if r.cls != "canary"]
    early, late = sum(0.5 < t < 1.5 for t in people), sum(3.5 < t < 4.5 for t in people)
    assert 8 <= early <= 36  # 20 expected, Poisson
    assert 45 <= late <= 120  # 80 expected


def _ask(where: str, **form: str) -> bytes:
    data = urllib.parse.urlencode(form).encode() if form else None
    with urllib.request.urlopen(where, data, timeout=5) as answer:
        body: bytes = answer.read()
    return body


def test_the_web_page_starts_and_stops_a_test(url: str, tmp_path: Path) -> None:
    port = _port()
    page = f"http://127.0.0.1:{port}"
    command = _command("--web-host", "127.0.0.1", "--web-port", str(port), *LOAD, "--records", str(tmp_path))
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as locust:
        try:

            def up() -> bool:
                try:
                    return b"<html" in _ask(page)
                except OSError:
                    return False

            def stats() -> dict[str, Any]:
                found: dict[str, Any] = json.loads(_ask(f"{page}/stats/requests"))
                return found

            def all_classes() -> bool:
                now = stats()  # at most 2 s old: maybe of the test before
                seen = {(s["method"], s["name"]) for s in now["stats"] if s["num_requests"] > 3}
                return (
                    now["state"] == "running"
                    and now["user_count"] == 6
                    and {("reply", c) for c in ("chat", "long", "canary")} | {("tokens/s", "long")} <= seen
                )

            clock.wait_until(up, within=20, what="the page")
            for _ in range(2):  # a test can be started again
                said = json.loads(_ask(f"{page}/swarm", user_count="6", spawn_rate="10", host=url))
                assert said["success"] is True
                clock.wait_until(all_classes, within=20, what="every class in the page's statistics")
                assert all(s["num_failures"] == 0 for s in stats()["stats"])
                _ask(f"{page}/stop", now="yes")  # a form makes it a POST
                clock.wait_until(lambda: stats()["state"] == "stopped", within=40, what="the end of the test")
                end = json.loads((tmp_path / "load.0.jsonl").read_text().splitlines()[-1])
                assert end["planned"] == end["ok"] > 10
        finally:
            locust.terminate()
            locust.wait(20)
