"""`gameday load run`: exact accounts, whatever ends it; refuses what it cannot measure."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from openai_server import Server

from gameday import clock
from gameday.cli import main
from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd, Outcome, Reply
from loadgen import launch
from loadgen.cli import load as load_cli
from loadgen.plan import Plan, make
from loadgen.run import Books, Ticks, run
from loadgen.traffic import Chat, Stream, Trace, Traffic, fixed


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Server() as url:
        yield url


def _steady(per_second: float = 20, tokens: int = 3) -> Traffic:
    return Traffic(streams=(Stream(name="chat", per_second=per_second, prompt=fixed(8), output=fixed(tokens)),))


def test_every_request_of_the_plan_is_in_the_account(url: str, tmp_path: Path) -> None:
    said: list[str] = []
    traffic = Chat(per_second=10, output_tokens=3, long_tokens=12, canary_per_second=20)
    account = run(
        target=url,
        model="tiny",
        traffic=traffic,
        seconds=2.5,
        seed=3,
        workers=2,
        out=tmp_path / "run",
        say=said.append,
        every=1,
    )
    assert account.ended == "plan"
    assert account.planned == account.ok == len(make(traffic, 3, 2.5))
    assert account.outcomes == {"ok": account.planned}
    assert {p.cls for p in account.parts} == {"chat", "long", "canary"}
    assert sum(p.planned for p in account.parts) == account.planned
    chat = next(p for p in account.parts if p.cls == "chat")
    assert 0.01 < chat.first_token.p50 <= chat.first_token.p95 <= chat.first_token.p99 < chat.reply.p99
    assert any(" ok 100.00%" in line for line in said)
    saved = json.loads((tmp_path / "run" / "account.json").read_text())
    assert saved["planned"] == account.planned
    assert saved["sound"] is account.sound
    assert Plan.read(tmp_path / "run" / "plan.json").seed == 3
    with pytest.raises(LoadError, match="holds the records of a run"):
        run(target=url, model="tiny", traffic=traffic, seconds=1, seed=3, out=tmp_path / "run", say=said.append)


def test_a_trace_replays(url: str, tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:17:0{n}.0000000,{10 + n},{2 + n}" for n in range(6)]
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    trace = Trace(path=str(tmp_path / "trace.csv"), speed_up=4)
    account = run(target=url, model="tiny", traffic=trace, seconds=2, seed=1, out=tmp_path / "out", say=lambda _: None)
    assert account.planned == account.ok == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_drains_and_accounts(url: str, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "loadgen.cli", "run", "--target", url, "--model", "tiny", "--seconds", "60"]
    command += ["--rate", "20", "--canary-rate", "10", "--output-tokens", "30", "--every", "1"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " ok 100.00%" in line:
                break
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(40) in (0, 1), rest
    account = json.loads((tmp_path / "out" / "account.json").read_text())
    assert account["ended"] == number.name
    assert account["planned"] == account["ok"] > 0  # it drained
    assert f"ended by {number.name}" in rest


def test_a_lost_worker_is_an_error_never_a_short_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[launch.Load] = []
    start = launch.start

    def spy(*args: object, **kwargs: object) -> launch.Load:
        started.append(start(*args, **kwargs))  # type: ignore[arg-type]
        return started[0]

    def say(line: str) -> None:
        if "/s  ok" in line:
            started[0]._procs[1].process.kill()

    monkeypatch.setattr(launch, "start", spy)
    with pytest.raises(LoadError, match="load worker 1 was lost"):
        run(
            target=url,
            model="tiny",
            traffic=_steady(),
            seconds=30,
            seed=1,
            workers=2,
            out=tmp_path / "out",
            say=say,
            every=0.5,
        )
    assert not (tmp_path / "out" / "account.json").exists()


def test_a_worker_that_stood_still_makes_the_run_unsound(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was due while it stood was sent late: the account is exact, and gives no latencies."""
    started: list[launch.Load] = []
    start = launch.start

    def spy(*args: object, **kwargs: object) -> launch.Load:
        started.append(start(*args, **kwargs))  # type: ignore[arg-type]
        return started[0]

    def say(line: str) -> None:
        if "/s  ok" in line and started:
            worker = started.pop()._procs[0].process
            worker.send_signal(signal.SIGSTOP)
            threading.Timer(1.0, worker.send_signal, (signal.SIGCONT,)).start()

    monkeypatch.setattr(launch, "start", spy)
    traffic = _steady(50)
    account = run(target=url, model="tiny", traffic=traffic, seconds=5, seed=1, out=tmp_path / "o", say=say, every=1)
    assert account.planned == account.ok == len(make(traffic, 1, 5))
    assert not account.sound
    assert any("late" in why for why in account.unsound)
    assert account.lines()[-1] == "no latencies are given for this run"


def test_metrics_in_plan_mode(url: str, tmp_path: Path) -> None:
    make(_steady(), 1, 30).write(tmp_path / "plan.json")
    port = _port()
    load = launch.start(tmp_path / "plan.json", target=url, model="tiny", out=tmp_path, metrics_port=port)
    load.begin(clock.now())

    def scraped() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            text = answer.read().decode()
        return 'gameday_replies_total{cls="chat",outcome="ok"}' in text and "gameday_cpu_share 0." in text

    clock.wait_until(scraped, within=15, what="replies in /metrics")
    with pytest.raises(LoadError, match=f"/metrics cannot be served on port {port}"):
        launch.start(tmp_path / "plan.json", target=url, model="tiny", out=tmp_path / "2", metrics_port=port)
    load.stop(within=2)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


# ── the books, by themselves ────────────────────────────────────────────────────────────────────


def _reply(seq: int, plan: Plan, **more: object) -> Reply:
    t = 100 + plan.t[seq]
    given: dict[str, object] = {"t_first": t + 0.1, "tokens": 2, "itl": (0.02,), "outcome": Outcome.OK, **more}
    return Reply(worker=0, seq=seq, cls="chat", t_intended=t, t_end=t + 0.2, **given)  # type: ignore[arg-type]


def _beat(t: float, **more: float) -> Heartbeat:
    given: dict[str, float] = {"delay_p99": 0.001, "run_queue": 0.0, **more}
    return Heartbeat(t=t, worker=0, in_flight=0, started=0, ok=0, failed=0, shed=0, cpu=0.1, **given)


def _books(seconds: float = 10) -> tuple[Books, Plan, list[Reply], LoadEnd]:
    plan = make(_steady(10), 1, seconds)
    replies = [_reply(seq, plan) for seq in range(len(plan))]
    end = LoadEnd(100 + seconds, 0, len(plan), len(plan), 0, 0, 0, 100 + seconds)
    return Books(plan, 100.0), plan, replies, end


def test_books_find_holes_and_doubles() -> None:
    books, plan, replies, end = _books()
    books.take(launch.Tail(tuple(replies)))
    books.close((end,), 1)
    with pytest.raises(LoadError, match="request 3 is recorded twice"):
        books.take(launch.Tail((replies[3],)))
    books, *_ = _books()
    books.take(launch.Tail(tuple(replies[1:])))
    with pytest.raises(LoadError, match=f"account for {len(plan)} requests, {len(plan) - 1} are recorded"):
        books.close((end,), 1)
    short = LoadEnd(110, 0, len(plan) - 1, len(plan) - 1, 0, 0, 0, 110)
    with pytest.raises(LoadError, match="never sent request 0"):
        books.close((short,), 1)


@pytest.mark.parametrize(
    ("more", "says"),
    [({"run_queue": 0.2}, "20% of a second"), ({"delay_p99": 0.05}, "50 ms late")],
)
def test_saturation_is_refused(more: dict[str, float], says: str) -> None:
    books, _, replies, end = _books()
    books.take(launch.Tail(tuple(replies), tuple(_beat(101 + n, **(more if n in (3, 7) else {})) for n in range(10))))
    account = books.account((end,), ended="plan", clocks={}, out=Path("x"))
    assert not account.sound
    assert says in account.unsound[0]
    assert not any("first token" in line for line in account.lines())
    assert account.lines()[-1] == "no latencies are given for this run"


def test_a_short_stop_in_a_long_run_is_refused() -> None:
    """One heartbeat in a hundred is bad, and so is every request of that second: a p99 of them is ours."""
    books, _, replies, end = _books(100)
    late = [dataclasses.replace(r, t_start=r.t_intended + (0.5 if 150 < r.t_intended < 151 else 0)) for r in replies]
    books.take(launch.Tail(tuple(late), tuple(_beat(101 + n, delay_p99=0.5 if n == 50 else 0.0) for n in range(100))))
    (why,) = books.account((end,), ended="plan", clocks={}, out=Path("x")).unsound
    assert why.endswith("requests were sent more than 10 ms late")


def test_an_outage_cannot_hide_in_what_was_shed() -> None:
    books, plan, replies, _ = _books(100)
    shed = [dataclasses.replace(r, outcome=Outcome.CLIENT_SHED, t_start=None) for r in replies[:20]]
    books.take(launch.Tail((*shed, *replies[20:]), tuple(_beat(101 + n) for n in range(100))))
    end = LoadEnd(200, 0, len(plan), len(plan) - 20, 0, 20, 0, 200)
    (why,) = books.account((end,), ended="plan", clocks={}, out=Path("x")).unsound
    assert why.startswith("20 requests were never sent")


def test_silence_is_refused_and_one_bad_second_is_not() -> None:
    books, _, replies, end = _books()
    books.take(
        launch.Tail(tuple(replies), tuple(_beat(101 + n, delay_p99=0.05 if n == 4 else 0.001) for n in range(10)))
    )
    assert books.account((end,), ended="plan", clocks={}, out=Path("x")).sound
    books, *_ = _books()
    books.take(launch.Tail(tuple(replies), tuple(_beat(101 + n) for n in range(5))))
    account = books.account((end,), ended="plan", clocks={}, out=Path("x"))
    assert account.unsound == ("no heartbeat of load worker 0 for 5.0 s",)


def test_an_outage_cannot_improve_a_quantile() -> None:
    books, plan, replies, end = _books()
    lost = [_reply(s, plan, t_first=None, tokens=0, itl=(), outcome=Outcome.REFUSED) for s in range(10)]
    books.take(launch.Tail((*lost, *replies[10:]), tuple(_beat(101 + n) for n in range(10))))
    end = LoadEnd(110, 0, len(plan), len(plan) - 10, 10, 0, 0, 110)
    account = books.account((end,), ended="plan", clocks={}, out=Path("x"))
    (part,) = account.parts
    assert part.first_token.n == len(plan)
    assert part.first_token.p50 == pytest.approx(0.1)
    assert math.isinf(part.first_token.p95)
    assert json.loads(json.dumps(account.to_json()))["parts"][0]["first_token"]["p95"] is None
    assert any("never" in line for line in account.lines())


def test_tokens_that_came_while_draining_took_time_too() -> None:
    books, plan, replies, end = _books()
    late = _reply(len(plan) - 1, plan, tokens=1000)
    late = dataclasses.replace(late, t_end=120.0)
    books.take(launch.Tail((*replies[:-1], late)))
    account = books.account((end,), ended="plan", clocks={}, out=Path("x"))
    assert account.seconds == 10
    assert account.tokens_per_second == pytest.approx((2 * (len(plan) - 1) + 1000) / 20, abs=0.01)


def test_quantiles_are_exact_to_a_tick() -> None:
    ticks = Ticks()
    for n in range(1, 101):
        ticks.add(n / 100)
    assert (ticks.spread().p50, ticks.spread().p95, ticks.spread().p99) == (0.5, 0.95, 0.99)
    assert Ticks().spread().n == 0


# ── the command ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rate", "-1"], "cannot be negative"),
        (["--rate", "nan"], "cannot be negative or infinite"),
        (["--arrivals", "gamma", "--burstiness", "0"], "burstiness must be positive"),
        (["--long-share", "1.5"], "long_share lies in"),
        (["--ramp", "-1:2:3"], "a ramp cannot be negative"),
        (["--spike", "1:2:nan"], "a spike cannot be negative"),
        (["--turns", "0"], "turns must be"),
        (["--think", "-1", "--turns", "2"], "think"),
        (["--rate", "0", "--canary-rate", "0"], "at least one stream"),
        (["--rate", "1e9"], "at most 5000000 are possible"),
        (["--extra", "[1]"], "not a JSON object"),
        (["--prefix-groups", "3"], "go together"),
        (["--deadline", "patience:3"], "'patience' is not a deadline"),
        (["--deadline", "total:soon"], "is not a deadline like"),
        (["--deadline", "total:-1"], "must be positive"),
        (["--trace", "x.csv", "--rate", "5"], "--rate does not go with --trace"),
        (["--speed-up", "5"], "--speed-up goes with --trace"),
        (["--traffic", "x.json", "--no-stream"], "--no-stream goes into the traffic spec"),
        (["--out", "/proc/nowhere"], "cannot be written to /proc/nowhere"),
        (["--target", "http://127.0.0.1:1"], "cannot be reached: Connection refused"),
        (["--target", "http://no..name:80"], "cannot be found"),
        (["--target", "http://127.0.0.1:80/a b"], "percent-encode"),
        (["--header", "X: €"], "characters that HTTP cannot carry"),
        (["--header", "X Y: z"], "'X Y' is not a header's name"),
        (["--header", "Content-Length: 3"], "Content-Length is the load generator's own"),
        (["--api-key-env", "GAMEDAY_TEST_NO_SUCH_KEY"], "no API key in GAMEDAY_TEST_NO_SUCH_KEY"),
        (["--model", "huge"], "has no model 'huge'"),
        (["--trace", "/nonexistent.csv"], "cannot be read"),
        (["--traffic", "/nonexistent.json"], "cannot be read"),
        (["--ramp", "1:2"], "not three numbers"),
        (["--header", "nothing"], "not a header"),
        (["--seconds", "0"], "positive duration"),
        (["--seed", "-1"], "seed cannot be negative"),
        (["--target", "nowhere"], "not a URL"),
        (["--workers", "0"], "at least one worker"),
        (["--worker", "127.0.0.1:1"], "need a token"),
        (["--api-key-file", "/nonexistent"], "cannot be read"),
        (["--metrics-port", "65535", "--workers", "2"], "not a port"),
    ],
)
def test_bad_input_is_one_sentence(url: str, tmp_path: Path, more: list[str], says: str) -> None:
    command = ["run", "--target", url, "--model", "tiny", "--out", str(tmp_path / "out"), *more]
    done = CliRunner().invoke(load_cli, command)
    assert done.exit_code == 2
    assert says in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "replies.0.jsonl").exists()


def test_the_gameday_command_has_the_group() -> None:
    done = CliRunner().invoke(main, ["load", "--help"])
    assert done.exit_code == 0
    assert all(name in done.output for name in ("run", "selftest", "worker"))
