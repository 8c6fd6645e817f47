"""Every way in which Prometheus may fail to answer, by a real server: none of them ends green."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from planted import ABOUT, BEFORE, END, Plant

from gameday import clock
from gameday.clock import Epoch
from gameday.model import Phase, Sample, Verdict
from gameday.objectives import Promql
from probes import prometheus as module
from probes.prometheus import Prometheus, Sampler

UP = Promql("up", at_least=1.0, name="targets up")


def answer(*series: object, kind: str = "vector") -> bytes:
    result = series[0] if kind == "scalar" else list(series)
    return json.dumps({"status": "success", "data": {"resultType": kind, "result": result}}).encode()


def one(value: str, ahead: float = 0.0) -> dict[str, object]:
    return {"metric": {"job": "llm"}, "value": [time.time() + ahead, value]}


class Failing(BaseHTTPRequestHandler):
    how = "fine"

    def do_GET(self) -> None:
        how = type(self).how
        if how == "hangs":
            time.sleep(2)
            return
        if how == "drips":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(20):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            return
        status, body = {
            "HTTP 500": (500, b"internal error"),
            "HTTP 503": (503, b"<html>down</html>"),
            "HTTP 422": (422, b'{"status": "error", "errorType": "execution", "error": "too many samples"}'),
            "error in a 200": (200, b'{"status": "error", "errorType": "timeout", "error": "query timed out"}'),
            "not JSON": (200, b"<html>login</html>"),
            "an empty body": (200, b""),
            "cut short": (200, answer(one("1"))[:-20]),
            "no data": (200, answer()),
            "a list": (200, b"[]"),
            "data of null": (200, b'{"status": "success", "data": null}'),
            "NaN": (200, answer(one("NaN"))),
            "infinite": (200, answer(one("+Inf"))),
            "two series": (200, answer(one("1"), one("1"))),
            "no value": (200, answer({"metric": {}})),
            "not a number": (200, answer(one("one"))),
            "behind": (200, answer(one("1", ahead=-60))),
            "ahead": (200, answer(one("1", ahead=60))),
            "fine": (200, answer(one("1"))),
            "a scalar": (200, answer([time.time(), "1"], kind="scalar")),
        }[how]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def how(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    yield
    Failing.how = "fine"


def judged(answered: Sample) -> tuple[Verdict, str]:
    """The verdict of a run in which this was the answer in one second, and all others were fine."""
    late = 0.0 if answered.told is None else answered.told - Epoch.read().to_wall(answered.t)

    def told(t: float, off: float) -> float:
        return ABOUT.epoch_wall + t - ABOUT.epoch_mono + off

    seconds = [BEFORE + i + 0.5 for i in range(int(END - BEFORE))]
    samples = [Sample(t, "up", "up", 1.0, told=told(t, 0)) for t in seconds if t != 110.5]
    samples += [Sample(t, UP.age, "age", 0.2, told=told(t, 0)) for t in seconds]
    wrong = replace(answered, t=110.5, told=None if answered.told is None else told(110.5, late))
    found = UP.judge(Plant(samples=[*samples, wrong]).build(), Phase.DURING)
    return found.status, found.evidence


@pytest.mark.parametrize("mode", ["fine", "a scalar"])
def test_an_answer_is_an_answer(server: str, how: None, mode: str) -> None:
    Failing.how = mode
    found = Prometheus(server).sample("up", "up")
    assert (found.value, found.error) == (1.0, "")
    assert judged(found)[0] is Verdict.PASS


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("HTTP 500", "500"),
        ("HTTP 503", "503"),
        ("HTTP 422", "too many samples"),
        ("error in a 200", "Prometheus"),
        ("not JSON", "Prometheus"),
        ("an empty body", "Prometheus"),
        ("cut short", "Prometheus"),
        ("no data", "no data"),
        ("a list", "no Prometheus' JSON"),
        ("data of null", "no Prometheus' JSON"),
        ("NaN", "nan"),
        ("infinite", "inf"),
        ("two series", "2 series"),
        ("no value", "unexpected answer"),
        ("not a number", "unexpected answer"),
        ("behind", "behind ours"),
        ("ahead", "ahead of ours"),
        ("hangs", "timeout"),
        ("drips", "Prometheus"),
    ],
)
def test_every_way_to_fail_is_inconclusive(server: str, how: None, mode: str, told: str) -> None:
    Failing.how = mode
    begun = clock.now()
    found = Prometheus(server).sample("up", "up")
    assert clock.now() - begun < 5
    verdict, why = judged(found)
    assert verdict is Verdict.INCONCLUSIVE
    assert told in why, why


def test_nobody_there_is_inconclusive(how: None) -> None:
    found = Prometheus("http://127.0.0.1:9").sample("up", "up")
    verdict, why = judged(found)
    assert verdict is Verdict.INCONCLUSIVE and "connection failed" in why


@pytest.mark.parametrize("mode", ["HTTP 500", "hangs", "no data"])
def test_a_sampler_that_gets_no_answers_is_blind(server: str, how: None, mode: str) -> None:
    """What it could not see is recorded, and it says for how long it has seen nothing."""
    seen: list[Sample] = []
    sampler = Sampler(Prometheus(server), UP.queries(), 0.1, seen.append)
    sampler.start()
    try:
        clock.wait_until(lambda: any(s.value == 1.0 for s in seen), within=10, what="a first answer")
        Failing.how = mode
        clock.wait_until(lambda: sampler.blind_for() > 1.2 and sampler.last_error != "", within=20, what="blindness")
    finally:
        Failing.how = "fine"
        sampler.stop()
    assert any(s.error for s in seen)
