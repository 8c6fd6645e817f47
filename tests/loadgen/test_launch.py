"""The load as the harness drives it: real Locust processes against a real server."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from openai_server import Server

from gameday import clock
from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd, Outcome, Reply
from loadgen import launch, records
from loadgen.plan import Plan, make
from loadgen.traffic import Chat, Deadlines, Stream, Traffic, fixed


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Server() as url:
        yield url


def _plan(out: Path, traffic: Traffic, seconds: float = 30.0) -> tuple[Path, Plan]:
    plan = make(traffic, 7, seconds)
    plan.write(out / "plan.json")
    return out / "plan.json", plan


def _steady(per_second: float, tokens: int, **more: object) -> Traffic:
    stream = Stream(name="chat", per_second=per_second, prompt=fixed(8), output=fixed(tokens), arrivals="constant")
    return Traffic(streams=(stream,), **more)  # type: ignore[arg-type]


def _until(load: launch.Load, replies: list[Reply], count: int) -> None:
    def enough() -> bool:
        replies.extend(load.poll().replies)
        return len(replies) >= count

    clock.wait_until(enough, within=20, every=0.02, what=f"{count} replies")


def _sound(ends: tuple[LoadEnd, ...], replies: list[Reply], plan: Plan, begin: float) -> None:
    """Exact conservation, from the accounts and from the records, each by itself."""
    planned = sum(e.planned for e in ends)
    assert planned == sum(e.ok + e.failed + e.shed + e.censored for e in ends)
    assert len(replies) == planned
    assert len({r.seq for r in replies}) == planned
    assert all(r.t_intended == pytest.approx(begin + plan.t[r.seq], abs=2e-6) for r in replies)
    if len(ends) == 1:
        assert planned == plan.due_before(ends[0].t_stop - begin)


def test_mixed_chat_is_all_good_and_accounted_for(url: str, tmp_path: Path) -> None:
    path, plan = _plan(tmp_path, Chat(per_second=20, output_tokens=5, long_tokens=20, canary_per_second=50))
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    begin = clock.now() + 0.2
    load.begin(begin)
    replies: list[Reply] = []
    _until(load, replies, 120)
    assert load.alive()
    ends = load.stop(within=5)
    assert not load.alive()
    replies += load.poll().replies
    _sound(ends, replies, plan, begin)
    assert {r.outcome for r in replies} == {Outcome.OK}
    assert {r.cls for r in replies} == {"chat", "long", "canary"}
    assert all(r.pod == "pod-1" and r.zone == "a" and r.got_done and r.finish_reason for r in replies)
    assert all(r.tokens == r.completion_tokens == plan.output[r.seq] for r in replies)
    assert all(r.conn_reused is False for r in replies if plan.fresh[r.seq])
    assert any(r.conn_reused for r in replies if r.cls == "canary")
    assert all(len(r.itl) == r.tokens - 1 for r in replies)


def test_stop_censors_what_is_under_way(url: str, tmp_path: Path) -> None:
    path, plan = _plan(tmp_path, _steady(20, tokens=1000))
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    begin = clock.now() + 0.1
    load.begin(begin)
    clock.wait_until(lambda: load.poll().in_flight >= 10, within=30, what="ten streams under way")
    ends = load.stop(within=0.2)
    replies = [*records.Follower(tmp_path / "replies.0.jsonl").replies()]
    _sound(ends, replies, plan, begin)
    assert ends[0].censored == ends[0].planned >= 10


def test_sigterm_to_a_worker_accounts_for_everything(url: str, tmp_path: Path) -> None:
    path, plan = _plan(tmp_path, _steady(50, tokens=20))
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    begin = clock.now() + 0.1
    load.begin(begin)
    replies: list[Reply] = []
    _until(load, replies, 20)
    os.kill(load._procs[0].process.pid, signal.SIGTERM)
    clock.wait_until(lambda: not load.alive(), within=15, what="the worker's end")
    ends = load.stop(within=0)
    replies += load.poll().replies
    _sound(ends, replies, plan, begin)
    assert ends[0].ok == ends[0].planned  # it drained


def test_target_that_vanishes_leaves_failures_not_holes(tmp_path: Path) -> None:
    server = Server()
    with server as url:
        path, plan = _plan(tmp_path, _steady(50, tokens=30))
        load = launch.start(path, target=url, model="tiny", out=tmp_path)
        begin = clock.now() + 0.1
        load.begin(begin)
        replies: list[Reply] = []
        _until(load, replies, 20)
        server.process.kill()
        _until(load, replies, 60)
        ends = load.stop(within=5)
    replies += load.poll().replies
    _sound(ends, replies, plan, begin)
    outcomes = {r.outcome for r in replies}
    assert Outcome.OK in outcomes
    assert Outcome.REFUSED in outcomes
    assert outcomes & {Outcome.RESET_MID, Outcome.TRUNCATED}
    assert Outcome.CENSORED not in outcomes


def test_hanging_target_is_seen_while_it_hangs(tmp_path: Path) -> None:
    """Ten users on a dead server once made a green run with 0 requests (facts/loadgen.md)."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as hole:
        traffic = _steady(20, tokens=5, deadlines=Deadlines(first_token=1.0))
        path, plan = _plan(tmp_path, traffic)
        load = launch.start(
            path, target=f"http://127.0.0.1:{hole.getsockname()[1]}", model="m", out=tmp_path, silent_after=0.5
        )
        begin = clock.now() + 0.1
        load.begin(begin)
        clock.wait_until(lambda: load.poll().silent >= 5, within=30, what="silence")
        ends = load.stop(within=3)
    replies = [*records.Follower(tmp_path / "replies.0.jsonl").replies()]
    _sound(ends, replies, plan, begin)
    assert ends[0].failed == ends[0].planned > 0
    assert {r.outcome for r in replies} == {Outcome.HEADER_TIMEOUT}


def test_two_workers_share_the_plan(url: str, tmp_path: Path) -> None:
    path, plan = _plan(tmp_path, _steady(60, tokens=2), seconds=1.5)
    load = launch.start(path, target=url, model="tiny", out=tmp_path, workers=2)
    begin = clock.now() + 0.2
    load.begin(begin)
    replies: list[Reply] = []
    _until(load, replies, len(plan))
    ends = load.stop(within=5)
    _sound(ends, replies, plan, begin)
    assert sum(e.planned for e in ends) == len(plan)
    assert {r.worker for r in replies} == {0, 1}


def test_lost_worker_makes_the_load_invalid(url: str, tmp_path: Path) -> None:
    path, _ = _plan(tmp_path, _steady(60, tokens=2))
    load = launch.start(path, target=url, model="tiny", out=tmp_path, workers=2)
    load.begin(clock.now())
    replies: list[Reply] = []
    _until(load, replies, 20)
    load._procs[1].process.kill()
    clock.wait_until(lambda: not load.alive(), within=30, what="the loss to be seen")
    with pytest.raises(LoadError, match="load worker 1 was lost"):
        load.stop(within=1)
    assert all(p.process.poll() is not None for p in load._procs)


def test_a_record_that_cannot_be_written_makes_the_load_invalid(url: str, tmp_path: Path) -> None:
    """As when the disk is full: noticed while it runs, in words, and never an account."""
    path, _ = _plan(tmp_path, _steady(60, tokens=2))
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    resource.prlimit(load._procs[0].process.pid, resource.RLIMIT_FSIZE, (5000, 5000))
    load.begin(clock.now())

    def seen() -> bool:
        load.poll()
        return not load.alive()

    clock.wait_until(seen, within=15, what="the loss to be seen")
    with pytest.raises(LoadError, match=r"load worker 0: the record met an error.*File too large.*not sound"):
        load.stop(within=1)
    assert not any(isinstance(e, LoadEnd) for e in records.Follower(tmp_path / "load.0.jsonl").events())


def test_somebodys_locust_settings_do_not_end_our_load(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (".locust.conf", "locust.conf"):
        (tmp_path / name).write_text("run-time = 1s\nautostart = true\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCUST_RUN_TIME", "1")
    path, plan = _plan(tmp_path, _steady(20, tokens=2), seconds=3)
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    begin = clock.now()
    load.begin(begin)
    replies: list[Reply] = []
    _until(load, replies, len(plan))
    _sound(load.stop(within=5), replies, plan, begin)


def test_orphan_stops_by_itself(url: str, tmp_path: Path) -> None:
    path, _ = _plan(tmp_path, _steady(20, tokens=2))
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    load.begin(clock.now())
    replies: list[Reply] = []
    _until(load, replies, 3)
    load._procs[0].sock.close()  # as the kernel does when the harness dies
    clock.wait_until(lambda: load._procs[0].process.poll() is not None, within=30, what="the orphan's end")
    assert any(isinstance(e, LoadEnd) for e in records.Follower(tmp_path / "load.0.jsonl").events())
    load.kill()


def test_sheds_beyond_its_own_limit_and_says_so(url: str, tmp_path: Path) -> None:
    path, plan = _plan(tmp_path, _steady(100, tokens=1000, in_flight_max=5))
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    begin = clock.now() + 0.1
    load.begin(begin)
    replies: list[Reply] = []
    _until(load, replies, 20)
    ends = load.stop(within=0)
    replies += load.poll().replies
    _sound(ends, replies, plan, begin)
    assert ends[0].censored == 5
    assert ends[0].shed == ends[0].planned - 5


def test_heartbeats_watch_the_worker(url: str, tmp_path: Path) -> None:
    path, _ = _plan(tmp_path, _steady(50, tokens=2))
    load = launch.start(path, target=url, model="tiny", out=tmp_path)
    load.begin(clock.now())
    beats: list[Heartbeat] = []

    def two() -> bool:
        beats.extend(load.poll().beats)
        return sum(b.started > 0 for b in beats) >= 2

    clock.wait_until(two, within=30, what="two heartbeats under load")
    load.stop(within=2)
    assert all(0 <= b.run_queue <= 1 and 0 < b.cpu <= 1 for b in beats)
    assert beats[-1].delay_p99 > 0
    assert beats[-1].started == pytest.approx(beats[-2].started + 50, abs=25)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"target": "gateway:8000"}, "not a URL"),
        ({"target": "http://"}, "not a URL"),
        ({"target": "http://h:99999"}, "not a URL"),
        ({"model": ""}, "name of a model"),
        ({"workers": 0}, "at least one worker"),
        ({"api_key_env": "GAMEDAY_TEST_NO_SUCH_KEY"}, "no API key in GAMEDAY_TEST_NO_SUCH_KEY"),
        ({"api_key_file": Path("/nonexistent/key")}, "cannot be read"),
        ({"target": "https://h", "ca_file": Path("/nonexistent/ca")}, "CA file"),
        ({"headers": {"X": "a\r\nb"}}, "line break"),
    ],
)
def test_bad_input_starts_nothing(tmp_path: Path, more: dict[str, object], says: str) -> None:
    path, _ = _plan(tmp_path, _steady(1, tokens=1))
    given: dict[str, object] = {"target": "http://127.0.0.1:1", "model": "tiny", "out": tmp_path / "out", **more}
    with pytest.raises(LoadError, match=says):
        launch.start(path, **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_damaged_plan_is_refused(tmp_path: Path) -> None:
    path, _ = _plan(tmp_path, _steady(1, tokens=1))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LoadError, match=r"plan.*cannot be read"):
        launch.start(path, target="http://127.0.0.1:1", model="m", out=tmp_path)
