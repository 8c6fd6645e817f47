"""The streaming client, against servers that are odd rather than broken, and on a machine that runs short.

The client needs gevent and a process of its own: `ask` runs it in one.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from gameday.model import Outcome, Reply
from loadgen import answer, misbehave
from loadgen.misbehave import Failing, chunk, event
from loadgen.records import reply_of

CLIENT = """
import json, resource, socket, sys, time
import gevent
from loadgen import target
from loadgen.client import Call, Client
from loadgen.engine import line
from loadgen.plan import Kind
from loadgen.traffic import Deadlines

def ask(given):
    limits = Deadlines(dns=1.0, connect=0.6, first_token=given["first"], stall=0.6, total=30.0)
    kind = Kind("c", "chat", given["stream"], limits, 0, "", False)
    client = Client(target.parse(f"http://{given['host']}:{given['ports'][0]}", "m"))
    if len(given["ports"]) > 1:
        client._literal = [(socket.AF_INET, ("127.0.0.1", port)) for port in given["ports"]]
    if given["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (given["files"], given["files"]))
    def one(seq):
        call = Call(seq, "c", time.monotonic())
        client.perform(call, kind, b"{}", fresh=given["fresh"])
        return json.loads(line(call, 0))
    if given["at_once"]:
        return [g.get() for g in [gevent.spawn(one, seq) for seq in range(given["times"])]]
    return [one(seq) for seq in range(given["times"])]
for text in sys.stdin:
    print(json.dumps(ask(json.loads(text))), flush=True)
"""


class Asker:
    """The client's process; it answers one question after the other."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", CLIENT]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *ports: int, **more: object) -> list[Reply]:
        given = {"ports": ports, "host": "127.0.0.1", "stream": True, "files": 0, "fresh": False, "first": 10.0}
        given |= {"times": 1, "at_once": False, **more}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return [reply_of(data) for data in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        self.process.communicate(timeout=10)


@contextmanager
def asker() -> Iterator[Asker]:
    own = Asker()
    try:
        yield own
    finally:
        own.close()


@pytest.fixture(scope="module")
def ask() -> Iterator[Asker]:
    with asker() as own:
        yield own


One = Callable[..., Reply]


@pytest.fixture
def one(ask: Asker) -> One:
    """Ask a server that treats every request in one way."""

    def asked(way: Callable[[Failing, socket.socket], None], **more: object) -> Reply:
        with serving(way) as server:
            (reply,) = ask(server.port, **more)
        return reply

    return asked


@contextmanager
def serving(way: Callable[[Failing, socket.socket], None]) -> Iterator[Failing]:
    server = Failing(way)
    try:
        yield server
    finally:
        server.close()


def says(data: bytes, close: bool = False) -> Callable[[Failing, socket.socket], None]:
    def way(server: Failing, conn: socket.socket) -> None:
        conn.sendall(data)
        if close:
            conn.close()

    return way


STOP = event(None, "stop")
DONE = b"data: [DONE]\n\n"
SSE = b"Content-Type: text/event-stream\r\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":1}}\n\n'


def whole(body: dict[str, object], status: str = "200 OK") -> bytes:
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def test_a_stream_that_ends_with_the_connection(one: One) -> None:
    reply = one(says(b"HTTP/1.0 200 OK\r\n" + SSE + b"\r\n" + event("a") + event("b") + STOP + DONE, close=True))
    assert (reply.outcome, reply.tokens) == (Outcome.OK, 2)


def test_all_in_one_piece_and_a_type_in_capitals(one: One) -> None:
    body = event("a") + STOP + USAGE + DONE
    head = f"Content-Type: Text/Event-Stream; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    reply = one(says(b"HTTP/1.1 200 OK\r\n" + head + body))
    assert (reply.outcome, reply.tokens, reply.completion_tokens) == (Outcome.OK, 1, 1)
    assert reply.t_first == reply.t_headers


def test_a_good_end_without_a_token_is_not_good(one: One) -> None:
    """An engine that answers nothing, in good form, would otherwise be green."""
    reply = one(says(misbehave.HEAD + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n"))
    assert reply.outcome is Outcome.BAD_ANSWER
    assert reply.detail == "ended well, without a token"
    reply = one(says(whole({"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})), stream=False)
    assert reply.outcome is Outcome.BAD_ANSWER


def test_a_blank_token_is_one_when_the_server_counts_it(one: One) -> None:
    """The first token may be the end of the text, or half of a character: it took its time all the same."""
    reply = one(says(misbehave.HEAD + chunk(event("")) + chunk(STOP) + chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n"))
    assert (reply.outcome, reply.tokens, reply.completion_tokens) == (Outcome.OK, 1, 1)
    assert reply.t_first is not None


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_abort_is_none_of_the_good_ends(one: One, reason: str) -> None:
    choice = {"message": {"content": "a"}, "finish_reason": reason}
    assert one(says(whole({"choices": [choice]})), stream=False).outcome is Outcome.SSE_ERROR


def test_a_redirection_says_whereto(one: One) -> None:
    reply = one(says(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: https://elsewhere/v1\r\nContent-Length: 0\r\n\r\n"))
    assert (reply.outcome, reply.detail) == (Outcome.BAD_ANSWER, "307 https://elsewhere/v1")


def test_no_content_is_no_answer_and_does_not_wait(one: One) -> None:
    reply = one(says(b"HTTP/1.1 204 No Content\r\n\r\n"))
    assert reply.outcome is Outcome.BAD_ANSWER
    assert reply.latency < 20  # of 30


def _endless(begin: bytes) -> Callable[[Failing, socket.socket], None]:
    def way(server: Failing, conn: socket.socket) -> None:
        conn.sendall(begin)
        while True:
            conn.sendall(b"x" * 65536)

    return way


@pytest.mark.parametrize(
    ("begin", "stream", "says_"),
    [
        (b"HTTP/1.1 200 OK\r\n" + SSE + b"\r\ndata: ", True, "an event of more than"),
        (b"HTTP/1.1 200 OK\r\n\r\n", False, f"an answer of more than {answer.MAX_BODY} bytes"),
        (b"HTTP/1.1 500 Oops\r\n\r\n", True, "500 xxx"),
        (b"HTTP/1.1 ", True, "not an HTTP answer"),
    ],
)
def test_an_answer_without_an_end_is_cut_off(one: One, begin: bytes, stream: bool, says_: str) -> None:
    reply = one(_endless(begin), stream=stream, first=30.0)
    assert reply.outcome in (Outcome.BAD_ANSWER, Outcome.HTTP_5XX)
    assert says_ in reply.detail


def test_a_head_that_drips_is_bounded(one: One) -> None:
    def way(server: Failing, conn: socket.socket) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"y" * 1000:
            conn.sendall(bytes([byte]))
            server.pause(0.05)

    reply = one(way, first=0.8)
    assert reply.outcome is Outcome.HEADER_TIMEOUT
    assert 0.7 < reply.latency < 20


def test_an_odd_end_of_a_kept_connection_is_not_used_again(ask: Asker) -> None:
    """Bytes that nobody asked for would be taken for the next answer."""
    body = misbehave.HEAD + chunk(event("a")) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n"
    with serving(says(body + b"HTTP/1.1 200 OK\r\n")) as server:
        replies = ask(server.port, times=3)
    assert {r.outcome for r in replies} == {Outcome.OK}
    assert not any(r.conn_reused for r in replies)
    with serving(says(body)) as server:
        assert [r.conn_reused for r in ask(server.port, times=3)] == [False, True, True]
        assert [r.conn_reused for r in ask(server.port, times=3, fresh=True)] == [False] * 3


def test_a_server_that_keeps_connections_briefly_is_believed(ask: Asker) -> None:
    """Else it closes while the next request is on its way, and that would look like a failure."""
    end = chunk(event("a")) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n"
    for keep, reused in ((b"timeout=0", False), (b"timeout=5, max=100", True)):
        head = misbehave.HEAD[:-2] + b"Keep-Alive: " + keep + b"\r\n\r\n"
        with serving(says(head + end)) as server:
            assert ask(server.port, times=2)[1].conn_reused is reused


def test_an_address_that_swallows_everything_does_not_hide_the_next(ask: Asker) -> None:
    hole = misbehave.Full()
    body = misbehave.HEAD + chunk(event("a")) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n"
    nobody = misbehave.Nobody()
    try:
        with serving(says(body)) as server:
            (reply,) = ask(nobody.port, hole.port, server.port)
            assert reply.outcome is Outcome.OK
            assert reply.peer == f"127.0.0.1:{server.port}"
        (lost,) = ask(nobody.port, hole.port)
        assert lost.outcome is Outcome.CONNECT_TIMEOUT
        (lost,) = ask(hole.port, nobody.port)
        assert lost.outcome is Outcome.REFUSED
    finally:
        hole.close()
        nobody.close()


def test_our_own_sleep_is_not_the_services_stall() -> None:
    """A client that stood still finds the answer in its socket: it is read before a limit is judged."""
    spoke, slept = threading.Event(), threading.Event()

    def way(server: Failing, conn: socket.socket) -> None:
        conn.sendall(misbehave.HEAD + chunk(event("a")))
        server.pause(0.1)
        conn.sendall(chunk(event("b")))
        spoke.set()
        slept.wait(10)
        conn.sendall(chunk(event("c")) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n")

    with asker() as own, serving(way) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(own, server.port)
        assert spoke.wait(20)
        own.process.send_signal(signal.SIGSTOP)
        slept.set()
        time.sleep(1.5)  # beyond the stall limit of 0.6 s
        own.process.send_signal(signal.SIGCONT)
        (reply,) = asked.result()
    assert (reply.outcome, reply.tokens) == (Outcome.OK, 3)


def test_our_own_shortage_is_not_the_services_failure() -> None:
    """Without a file descriptor nothing was sent: shed, not refused, and not lost from the account."""
    with asker() as short, serving(misbehave.silent) as server:
        replies = short(server.port, times=60, at_once=True, files=40, first=0.8)
    assert {r.outcome for r in replies} == {Outcome.CLIENT_SHED, Outcome.HEADER_TIMEOUT}
    assert any("Too many open files" in r.detail for r in replies)


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with asker() as own, serving(misbehave.good) as server:
        assert own(server.port)[0].outcome is Outcome.OK


def test_ipv6(ask: Asker) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as door:
        port = door.getsockname()[1]
        (reply,) = ask(port, host="[::1]", first=0.8)  # nobody answers: it is the connection that counts
    assert reply.outcome is Outcome.HEADER_TIMEOUT
    assert reply.peer == f"::1:{port}"
