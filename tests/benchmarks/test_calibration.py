"""The figures on recovery time that we claim hold on a small sample (the benchmark takes hundreds)."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import calibration

from gameday.model import Heartbeat, Outcome, Reply


@pytest.mark.parametrize(("share", "runs"), [(1.0, 25), (1 / 6, 25), (2 / 3, 25)])
def test_intervals_cover_planted_outages(share: float, runs: int) -> None:
    rng = random.Random(20)
    found = calibration.figures("sample", [calibration.draw(rng, share, 0.0) for _ in range(runs)])
    assert found.covered >= (runs - 1) / runs, found.missed
    if share == 1.0:
        assert found.error_p99 <= 0.05


def test_the_naive_definition_does_not_cover_partial_outages() -> None:
    rng = random.Random(20)
    found = calibration.figures("sample", [calibration.draw(rng, 1 / 3, 0.0) for _ in range(25)])
    assert found.naive_covered < 0.7 < found.covered


# ── what a real failing server and real clients left ──


def session() -> calibration.Session:
    """A total outage of 2 s and one of latency, as they would have been recorded."""
    planted = (
        {"begin": [10.0, 10.002], "end": [12.0, 12.002], "mode": "hang", "bad": 6},
        {"begin": [25.0, 25.002], "end": [26.0, 26.002], "mode": "slow", "bad": 6},
    )
    replies = []
    for i in range(40 * 50):
        t = i / 50
        down, slow = 10.001 <= t < 12.001, 25.001 <= t < 26.001
        outcome = Outcome.FIRST_TOKEN_TIMEOUT if down else Outcome.OK
        first = None if down else t + (0.4 if slow else 0.01)
        replies.append(Reply(0, i, "canary", t, t + 0.5, outcome, t_start=t, t_sent=t, t_first=first))
    beats = tuple(Heartbeat(float(s), 0, 1, 0, 0, 0, 0, 0.001, 0.01, 0.1) for s in range(41))
    return calibration.Session(0.0, "never", 7, 0, planted, tuple(replies), beats)


def test_a_chunk_comes_back_from_its_file(tmp_path: Path) -> None:
    session().write(tmp_path / "session.7.0.jsonl.gz")
    assert calibration.Session.read(tmp_path / "session.7.0.jsonl.gz") == session()
    assert calibration.recorded(tmp_path).keys() == {"hang, total", "slow, total"}


def test_chunks_add_up(tmp_path: Path) -> None:
    session().write(tmp_path / "session.7.0.jsonl.gz")
    session().write(tmp_path / "session.8.0.jsonl.gz")
    found = calibration.recorded(tmp_path)
    assert [len(some) for some in found.values()] == [2, 2]
    assert all(r.covers and r.fit and r.error < 0.02 for some in found.values() for r in some)
    assert calibration.report(found) == 0


def test_an_interval_that_misses_the_truth_is_counted() -> None:
    made = session()
    lie = ({**made.planted[0], "end": [13.0, 13.002]},)
    (result,) = calibration.measured(replace(made, planted=lie))["hang, total"]
    assert not result.covers and result.error > 0.9
    assert calibration.report({"hang, total": [result]}) == 1


def test_a_generator_that_was_not_fit_is_told_and_counts() -> None:
    made = session()
    busy = tuple(replace(h, run_queue=0.5) if h.t < 20 else h for h in made.beats)
    found = calibration.measured(replace(made, beats=busy))
    assert [r.fit for some in found.values() for r in some] == [False, True]


def test_a_blurred_truth_is_set_aside() -> None:
    made = session()
    blurred = ({**made.planted[0], "end": [12.0, 12.1]}, made.planted[1])
    found = calibration.measured(replace(made, planted=blurred))
    assert set(found) == {calibration.BLURRED, "slow, total"}


def test_the_planted_server_knows_when_it_failed(tmp_path: Path) -> None:
    """What was sent after the end is good, what was answered before the beginning is good, all between is bad."""
    begin = time.monotonic() + 1.0
    (tmp_path / "schedule.json").write_text(
        json.dumps([{"begin": begin, "end": begin + 0.3, "mode": "error", "bad": 6}])
    )
    server = [sys.executable, str(Path(calibration.__file__).with_name("planted_server.py"))]
    asked: list[tuple[float, float, bool]] = []  # sent, answered, good
    truth = tmp_path / "truth.jsonl"
    process = subprocess.Popen([*server, tmp_path / "schedule.json", truth], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        while time.monotonic() < begin + 30 and (not truth.exists() or not truth.read_text() or len(asked) < 50):
            sent = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("POST", "/v1/chat/completions", b"{}")
            good = connection.getresponse().status == 200
            asked.append((sent, time.monotonic(), good))
            connection.close()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    told = json.loads(truth.read_text())
    (began, begun), (ending, ended) = told["begin"], told["end"]
    assert began <= begun <= ending <= ended
    assert all(good for sent, answered, good in asked if answered < began or sent > ended)
    between = [good for sent, answered, good in asked if sent > begun and answered < ending]
    assert between and not any(between)
