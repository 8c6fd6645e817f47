"""Locust as people run it: its command line, CSV, failures, master and worker, /metrics."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from openai_server import Server

from gameday import clock

FILE = Path(__file__).parents[2] / "loadgen" / "locustfile.py"
LOAD = ["--model", "tiny", "--output-tokens", "3", "--rate", "2", "--exit-code-on-error", "0"]


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


def test_headless_with_csv_and_records(url: str, tmp_path: Path) -> None:
    more = ["--headless", "-u", "10", "-r", "10", "-t", "3s", "--host", url, "--csv", str(tmp_path / "stats")]
    done = subprocess.run(
        _command(*more, *LOAD, "--records", str(tmp_path / "records")),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    end = json.loads((tmp_path / "records" / "load.0.jsonl").read_text().splitlines()[-1])
    assert end["kind"] == "load_end"
    assert end["planned"] == end["ok"] > 20
    table = (tmp_path / "stats_stats.csv").read_text()
    assert all(entry in table for entry in ("reply,chat", "first token,chat", "time per token,chat", "tokens/s,chat"))
    count, failures = next(row for row in table.splitlines() if row.startswith("reply,chat")).split(",")[2:4]
    assert 10 < int(count) <= end["planned"]  # Locust writes its table once a second; the records are the account
    assert failures == "0"


def test_unknown_model_is_one_sentence_and_an_exit_code(url: str) -> None:
    more = ["--headless", "-u", "1", "-t", "20s", "--host", url, "--model", "huge"]
    done = subprocess.run(_command(*more), capture_output=True, text=True, timeout=15, check=False)
    assert done.returncode == 2
    assert "has no model 'huge'" in done.stderr
    assert "Traceback" not in done.stderr


def test_master_and_worker_with_metrics(url: str, tmp_path: Path) -> None:
    port, metrics = _port(), _port()
    master = _command("--master", "--master-bind-port", str(port), "--headless", "--expect-workers", "1")
    master += ["-u", "10", "-r", "10", "-t", "4s", "--host", url, "--csv", str(tmp_path / "stats"), *LOAD]
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

            clock.wait_until(scraped, within=15, what="replies in /metrics")
            assert lead.wait(20) == 0, (tmp_path / "log").read_text()
        finally:
            lead.kill()
            hand.kill()
    assert "reply,chat," in (tmp_path / "stats_stats.csv").read_text()
