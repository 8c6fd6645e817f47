"""Workers on other machines, here over the loopback: the same records, exact accounts, and no short runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from openai_server import Server
from test_check import cert as cert  # the fixture

from gameday import clock
from gameday.errors import LoadError
from gameday.model import LoadEnd, Outcome, Reply
from loadgen import check, far, launch, records, wire
from loadgen.plan import Plan, make
from loadgen.run import run
from loadgen.traffic import Stream, Traffic, fixed

TOKEN = "open-sesame-open-sesame"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Server() as url:
        yield url


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


class Lent:
    """A `gameday load worker` in a process of its own."""

    def __init__(self, token: Path, *more: str) -> None:
        command = [sys.executable, "-m", "loadgen.cli", "worker", "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*command, "--token-file", str(token), *more], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        self.said: list[str] = []
        line = self.process.stdout.readline()
        self.address = line.split()[-1]
        self._thread = threading.Thread(target=lambda: self.said.extend(self.process.stdout or ()))
        self._thread.start()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        self._thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def lent(token: Path, *more: str) -> Iterator[Lent]:
    worker = Lent(token, *more)
    try:
        yield worker
    finally:
        assert worker.end() in (0, -signal.SIGKILL)


def _traffic(per_second: float = 40, tokens: int = 3) -> Traffic:
    stream = Stream(name="chat", per_second=per_second, prompt=fixed(8), output=fixed(tokens), arrivals="constant")
    return Traffic(streams=(stream,))


def _plan(out: Path, traffic: Traffic, seconds: float) -> tuple[Path, Plan]:
    plan = make(traffic, 7, seconds)
    plan.write(out / "plan.json")
    return out / "plan.json", plan


def test_it_takes_its_share_and_hands_its_records_back(url: str, token: Path, tmp_path: Path) -> None:
    path, plan = _plan(tmp_path, _traffic(), 2)
    with lent(token) as worker:
        load = launch.start(
            path, target=url, model="tiny", out=tmp_path, remote=(worker.address,), remote_token_file=token
        )
        begin = clock.now() + 0.2
        load.begin(begin)
        replies: list[Reply] = []

        def all_there() -> bool:
            replies.extend(load.poll().replies)
            return len(replies) == len(plan)

        clock.wait_until(all_there, within=20, what="every reply")
        assert load.alive()
        clocks = load.clocks()
        ends = load.stop(within=5)
        assert not load.alive()
    assert sorted(r.seq for r in replies) == list(range(len(plan)))
    assert {r.seq for r in replies if r.worker == 1} == set(plan.share(1, 2))
    assert {r.outcome for r in replies} == {Outcome.OK}
    assert all(r.t_intended == pytest.approx(begin + plan.t[r.seq], abs=0.002) for r in replies)
    assert sum(e.planned for e in ends) == sum(e.ok for e in ends) == len(plan)
    assert isinstance(ends[1], LoadEnd)
    ((address, measured),) = clocks.items()
    assert address == worker.address
    assert abs(measured.seconds) <= measured.uncertainty < 0.05  # it is the same clock
    lines = [json.loads(line) for line in (tmp_path / "clock.1.jsonl").read_text().splitlines()]
    assert len(lines) >= far.RECENT
    assert all(line["worker"] == 1 and line["uncertainty"] > 0 for line in lines)
    assert any("done" in line for line in worker.said)


def test_only_elsewhere_by_the_command_twice_with_tls(url: str, token: Path, cert: Path, tmp_path: Path) -> None:
    with lent(token, "--cert", str(cert)) as worker:
        for name in ("a", "b"):
            account = run(
                target=url,
                model="tiny",
                traffic=_traffic(),
                seconds=1.5,
                seed=1,
                workers=0,
                remote=(worker.address,),
                remote_token_file=token,
                remote_ca=cert,
                out=tmp_path / name,
                say=lambda _: None,
            )
            assert account.planned == account.ok == 60
            assert worker.address in account.clocks
        with pytest.raises(LoadError, match=r"speak our language|closed the connection|said nothing"):
            _start(url, token, worker.address, tmp_path / "plain")  # without TLS


def test_it_asks_for_a_token_itself(url: str, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service inside a cluster may be out of the leader's reach."""
    monkeypatch.setattr(check, "one_token", lambda *_, **__: pytest.fail("the leader asked"))
    more = {"traffic": _traffic(), "seconds": 1, "seed": 1, "workers": 0, "remote_token_file": token}
    with lent(token) as worker:
        say: list[str] = []
        good = {"target": url, "model": "tiny", "remote": (worker.address,), "say": say.append, **more}
        assert run(out=tmp_path / "good", **good).planned == 40  # type: ignore[arg-type]
        with pytest.raises(LoadError, match=r"load worker 0 at .*: the target .* has no model 'huge'"):
            run(out=tmp_path / "bad", **{**good, "model": "huge"})  # type: ignore[arg-type]


def test_it_has_metrics_of_its_own(url: str, token: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with lent(token, "--metrics-port", str(port)) as worker:
        load = _start(url, token, worker.address, tmp_path / "out")
        load.begin(clock.now())

        def scraped() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
                return b'gameday_replies_total{cls="chat",outcome="ok"}' in answer.read()

        clock.wait_until(scraped, within=30, what="replies in the worker's /metrics")
        load.stop(within=5)


def _start(url: str, token: Path, *addresses: str | Path, seconds: float = 30) -> launch.Load:
    out = Path(addresses[-1])
    out.mkdir(exist_ok=True)
    path, _ = _plan(out, _traffic(20), seconds)
    remote = tuple(str(a) for a in addresses[:-1])
    return launch.start(path, target=url, model="tiny", out=out, workers=0, remote=remote, remote_token_file=token)


def _wait(load: launch.Load, count: int) -> None:
    replies: list[Reply] = []

    def enough() -> bool:
        replies.extend(load.poll().replies)
        return len(replies) >= count

    clock.wait_until(enough, within=20, what=f"{count} replies")


def test_records_are_on_the_leaders_clock() -> None:
    """A worker whose clock is 1000 s ahead, with a slow way there: the offset is within its uncertainty."""
    measured = far.offset(sent=50.0, got=1050.010, answered=1050.011, came=50.013)
    assert measured.seconds == pytest.approx(1000.004, abs=1e-9)
    assert measured.uncertainty == pytest.approx(0.006, abs=1e-9)
    assert abs(measured.seconds - 1000.0) <= measured.uncertainty


def test_a_worker_that_is_stopped_makes_the_run_invalid(url: str, token: Path, tmp_path: Path) -> None:
    with lent(token) as worker:
        load = _start(url, token, worker.address, tmp_path / "out")
        load.begin(clock.now())
        _wait(load, 10)
        worker.process.send_signal(signal.SIGTERM)
        clock.wait_until(lambda: not load.alive(), within=30, what="the loss to be seen")
        worker.process.wait(20)
        with pytest.raises(LoadError, match=r"load worker 0 at .* was lost \(its machine stopped it \(SIGTERM\)\)"):
            load.stop(within=1)


def test_a_worker_that_vanishes_makes_the_run_invalid(url: str, token: Path, tmp_path: Path) -> None:
    with lent(token) as worker:
        load = _start(url, token, worker.address, tmp_path / "out")
        load.begin(clock.now())
        _wait(load, 10)
        worker.process.kill()
        clock.wait_until(lambda: not load.alive(), within=30, what="the loss to be seen")
        with pytest.raises(LoadError, match="the load is not sound"):
            load.stop(within=1)


def test_a_worker_that_falls_silent_is_lost(url: str, token: Path, tmp_path: Path) -> None:
    with lent(token) as worker:
        load = _start(url, token, worker.address, tmp_path / "out")
        load.begin(clock.now())
        _wait(load, 5)
        os.kill(worker.process.pid, signal.SIGSTOP)
        try:
            clock.wait_until(lambda: not load.alive(), within=far.SILENT_MAX + 5, what="the silence to be noticed")
            with pytest.raises(LoadError, match="said nothing for 5 s"):
                load.stop(within=0)
        finally:
            os.kill(worker.process.pid, signal.SIGCONT)


def test_without_its_leader_the_load_ends(url: str, token: Path, tmp_path: Path) -> None:
    with lent(token) as worker:
        load = _start(url, token, worker.address, tmp_path / "out")
        load.begin(clock.now())
        _wait(load, 5)
        load.kill()
        clock.wait_until(lambda: any("leader" in line for line in worker.said), within=30, what="the worker's word")
        again = _start(url, token, worker.address, tmp_path / "again", seconds=1)  # it serves the next leader
        again.begin(clock.now())
        _wait(again, 20)
        assert again.stop(within=5)[0].planned == 20


def test_strangers_are_refused_and_told_nothing(url: str, token: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("another-token-of-someone")
    with lent(token) as worker:
        with pytest.raises(LoadError, match=r"the load worker at .* refuses our token"):
            _start(url, other, worker.address, tmp_path / "out")
        with socket.create_connection(wire.split(worker.address), timeout=5) as stranger:
            hello = stranger.recv(4096)
            assert TOKEN.encode() not in hello
            stranger.sendall(b"\xff\xff\xff\xffGET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(4096) == b""
        with socket.create_connection(wire.split(worker.address), timeout=5) as liar:
            link = wire.Wire(liar)
            link.one(5)
            link.send({"nonce": "n", "proof": "0" * 64})
            assert link.one(5) == {"error": "refuses our token"}
            with pytest.raises(wire.Gone, match="closed the connection"):
                link.one(2)
        load = _start(url, token, worker.address, tmp_path / "out")
        with pytest.raises(LoadError, match="serves another leader"):
            _start(url, token, worker.address, tmp_path / "busy")
        load.kill()


def test_an_impostor_of_a_worker_gets_no_job(token: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:

        def pose() -> None:
            sock, _ = door.accept()
            with sock:
                link = wire.Wire(sock)
                link.send({"gameday": wire.VERSION, "nonce": "n"})
                link.one(5)
                link.send({"proof": "0" * 64})
                clock.wait_until(lambda: sock.recv(1) == b"", within=30, what="the leader to leave")

        thread = threading.Thread(target=pose)
        thread.start()
        with pytest.raises(LoadError, match="does not know the token"):
            _start("http://127.0.0.1:1", token, f"127.0.0.1:{door.getsockname()[1]}", tmp_path / "out")
        thread.join()


def test_what_the_worker_cannot_do_is_one_sentence(url: str, token: Path, tmp_path: Path) -> None:
    with (
        lent(token, "--api-key-env", "GAMEDAY_TEST_NO_SUCH_KEY") as worker,
        pytest.raises(LoadError, match="no API key in GAMEDAY_TEST_NO_SUCH_KEY"),
    ):
        _start(url, token, worker.address, tmp_path / "out")
    with pytest.raises(LoadError, match="cannot be reached: Connection refused"):
        _start(url, token, worker.address, tmp_path / "out")
    with pytest.raises(LoadError, match="not an address"):
        _start(url, token, "nowhere", tmp_path / "out")
    with pytest.raises(LoadError, match="named once"):
        _start(url, token, worker.address, worker.address, tmp_path / "out")
    token.write_text("short")
    with pytest.raises(LoadError, match="at least 16 characters"):
        _start(url, token, worker.address, tmp_path / "out")


def test_fewer_records_than_were_written_is_a_loss(tmp_path: Path, token: Path) -> None:
    """The worker says how many lines it recorded; the leader must hold exactly those."""
    (tmp_path / "plan.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as door:

        def worker() -> None:
            sock, _ = door.accept()
            with sock:
                link = wire.Wire(sock)
                wire.greet(link, TOKEN)
                seen: list[str] = []
                while "planned" not in seen:
                    seen += [key for _, message in link.receive(1) for key in message]
                link.send({"ready": True})
                for _ in range(far.RECENT):
                    sent = link.one(5)["ping"]
                    link.send({"ping": sent, "got": time.monotonic() + 1000, "answered": time.monotonic() + 1000})
                link.send({"replies": '{"seq":0,"t_end":1005.0,"t_intended":1004.0,"outcome":"ok"}\n'})
                link.send({"ended": {"replies": 2, "load": 0}})

        thread = threading.Thread(target=worker)
        thread.start()
        one = far.Far(0, f"127.0.0.1:{door.getsockname()[1]}", TOKEN, None, tmp_path)
        one.give({}, tmp_path / "plan.json")
        assert one.wait(10)
        thread.join()
        one.close()
    with pytest.raises(LoadError, match=r"it recorded .*2.* lines and handed back .*1"):
        one.account()
    (line,) = records.Follower(tmp_path / "replies.0.jsonl").lines()
    assert line["t_intended"] == pytest.approx(4.0, abs=0.05)
    assert line["t_end"] == pytest.approx(5.0, abs=0.05)
    assert one.best.seconds == pytest.approx(1000.0, abs=0.05)
