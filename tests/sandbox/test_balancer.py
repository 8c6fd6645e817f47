"""The gateway's parts without a network: choice and ejection of endpoints, the retry budget, HTTP parsing."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st
from llm_world import endpoint as slice_endpoint

from sandbox.images.balancer import Balancer, Budget, Endpoint, Place, Policy, places
from sandbox.images.upstream import Broken, Connection, Pool


def place(pod: str, zone: str = "a") -> Place:
    return Place(f"uid-{pod}", pod, zone, f"10.0.0.{pod}", 8000)


async def _sick(_: Endpoint) -> bool:
    return False


def balancer(
    policy: Policy | None = None,
    healthy: Callable[[Endpoint], Awaitable[bool]] = _sick,
    on_change: Callable[[Endpoint], None] = lambda _: None,
) -> Balancer:
    def pool(where: Place) -> Pool:
        return Pool(where.host, where.port, connect_timeout=1, idle_seconds=1)

    made = Balancer(policy or Policy(base=60), pool, healthy, on_change, random.Random(1))
    made.update([place("1", "a"), place("2", "b"), place("3", "c")])
    return made


def _by_pod(made: Balancer) -> dict[str, Endpoint]:
    return {endpoint.place.pod: endpoint for endpoint in made.endpoints}


async def _until(what: Callable[[], bool], within: float = 5.0) -> None:
    deadline = asyncio.get_running_loop().time() + within
    while not what():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within} s"
        await asyncio.sleep(0.005)


def test_the_least_loaded_endpoint_is_picked_and_ties_are_spread() -> None:
    async def story() -> None:
        made = balancer()
        ties = Counter(one.place.pod for _ in range(300) if (one := made.pick()))
        assert set(ties) == {"1", "2", "3"} and min(ties.values()) > 60
        _by_pod(made)["1"].in_flight = _by_pod(made)["3"].in_flight = 1
        assert {made.pick() for _ in range(20)} == {_by_pod(made)["2"]}

    asyncio.run(story())


def test_a_second_attempt_goes_where_an_answer_began_last() -> None:
    async def story() -> None:
        made = balancer()
        one, two, three = (_by_pod(made)[pod] for pod in "123")
        for endpoint in (two, three, one):
            made.succeeded(endpoint)
            await asyncio.sleep(0.002)
        three.in_flight = 5
        assert made.pick([one]) is three
        assert made.pick([one, two, three]) is None

    asyncio.run(story())


def test_no_connection_ejects_at_once_other_failures_after_two_in_a_row() -> None:
    async def story() -> None:
        made = balancer()
        one, two, three = (_by_pod(made)[pod] for pod in "123")
        made.failed(one, "connect_timeout")
        made.failed(two, "reset")
        made.succeeded(two)
        made.failed(two, "reset")
        made.failed(three)
        made.failed(three)
        assert (one.ejected, two.ejected, three.ejected) == (True, False, True)
        assert {made.pick(), made.pick()} == {two}
        made.failed(two, "refused")
        assert {made.pick() for _ in range(50)} == {one, two, three}  # panic: all or none

    asyncio.run(story())


def test_without_ejection_nothing_is_left_out() -> None:
    async def story() -> None:
        made = balancer(Policy(eject=False))
        one = _by_pod(made)["1"]
        for _ in range(5):
            made.failed(one, "refused")
        made.suspect(one)
        assert not one.ejected and one.looking is None

    asyncio.run(story())


def test_an_ejected_endpoint_is_asked_ever_more_rarely_and_comes_back_when_it_answers() -> None:
    async def story() -> None:
        asked: list[float] = []
        changes: list[bool] = []

        async def healthy(_: Endpoint) -> bool:
            asked.append(asyncio.get_running_loop().time())
            return len(asked) == 5

        made = balancer(Policy(base=0.03, most=0.1), healthy, lambda endpoint: changes.append(endpoint.ejected))
        one = _by_pod(made)["1"]
        began = asyncio.get_running_loop().time()
        made.failed(one, "refused")
        await _until(lambda: not one.ejected)
        waits = [after - before for before, after in zip([began, *asked], asked, strict=False)]
        for wait, least in zip(waits, [0.03, 0.06, 0.1, 0.1, 0.1], strict=True):
            assert least - 0.002 <= wait < least + 1
        assert changes == [True, False]
        made.failed(one, "refused")  # again: the wait goes on from where it was
        assert one.ejected
        made.succeeded(_by_pod(made)["2"])
        await _until(lambda: len(asked) == 6)
        assert asked[5] - asked[4] >= 0.098

    asyncio.run(story())


def test_a_suspect_that_answers_stays_and_one_that_does_not_goes() -> None:
    async def story() -> None:
        answers = {"1": True, "2": False}

        async def healthy(endpoint: Endpoint) -> bool:
            return answers[endpoint.place.pod]

        made = balancer(Policy(base=60), healthy)
        one, two = (_by_pod(made)[pod] for pod in "12")
        made.suspect(one)
        made.suspect(two)
        await _until(lambda: two.ejected and one.looking is None)
        assert not one.ejected

    asyncio.run(story())


def test_a_replaced_endpoint_is_new_and_late_news_of_the_old_one_does_not_touch_it() -> None:
    async def story() -> None:
        made = balancer()
        old = _by_pod(made)["1"]
        made.failed(old, "refused")
        made.update([place("2")])
        made.update([place("1"), place("2")])
        new = _by_pod(made)["1"]
        made.failed(old, "refused")
        made.suspect(old)
        assert new is not old and not new.ejected and old.looking is not None and old.looking.cancelling()

    asyncio.run(story())


def test_retries_are_a_share_of_the_requests() -> None:
    budget = Budget(share=0.25, most=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]
    for _ in range(400):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


def _slice(*endpoints: dict[str, Any]) -> dict[str, Any]:
    return {"ports": [{"name": "http", "port": 8000}], "endpoints": list(endpoints)}


def test_ready_endpoints_are_used_or_else_those_that_still_serve() -> None:
    ready = slice_endpoint("10.0.0.1", "e1", "a")
    ending = slice_endpoint("10.0.0.2", "e2", "b", ready=False)
    gone = slice_endpoint("10.0.0.3", "e3", "c", ready=False, serving=False)
    silent = slice_endpoint("10.0.0.4", "e4", "c")
    del silent["conditions"]
    assert [found.pod for found in places([_slice(ready, ending, gone)])] == ["e1"]
    assert [found.pod for found in places([_slice(ending, gone)])] == ["e2"]
    assert [found.pod for found in places([_slice(silent)])] == ["e4"]
    assert places([{"ports": None, "endpoints": None}]) == []
    assert places([_slice(ready)])[0] == Place("uid-e1", "e1", "a", "10.0.0.1", 8000, "node-a-1")


class _Wire(asyncio.Transport):
    """A transport that only remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close


def _exchange(pieces: list[bytes], *, eof: bool) -> tuple[bytes, str, bool]:
    """Feed an answer in pieces; returns its body, how it ended ("": not yet), and if the connection can serve on."""

    async def story() -> tuple[bytes, str, bool]:
        connection = Connection()
        connection.connection_made(_Wire())
        exchange = connection.send(b"GET / HTTP/1.1\r\n\r\n")
        body: list[bytes] = []
        exchange.forward(body.append)
        for piece in pieces:
            connection.data_received(piece)
        usable = connection.usable
        if eof:
            connection.connection_lost(None)
        end = ""
        if exchange.done.done():
            broken = exchange.done.exception()
            end = broken.cause if isinstance(broken, Broken) else "whole"
        return b"".join(body), end, usable

    return asyncio.run(story())


def _cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(point % (len(data) + 1) for point in at)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


bodies = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
cuts = st.lists(st.integers(0, 10_000), max_size=12)


def _chunked(body: list[bytes], trailer: bytes = b"") -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in body)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


@given(bodies, cuts, st.sampled_from([b"", b"x-trailer: 1\r\n"]))
def test_a_chunked_answer_is_read_however_it_is_cut(body: list[bytes], at: list[int], trailer: bytes) -> None:
    assert _exchange(_cut(_chunked(body, trailer), at), eof=False) == (b"".join(body), "whole", True)


@given(bodies, cuts, st.integers(0, 10_000))
def test_a_truncated_answer_is_never_whole(body: list[bytes], at: list[int], length: int) -> None:
    whole = _chunked(body)
    part = whole[: length % len(whole)]
    seen, end, _ = _exchange(_cut(part, at), eof=True)
    assert end == "closed" and b"".join(body).startswith(seen)


@given(st.binary(max_size=80), cuts)
def test_an_answer_of_a_known_length_is_read_however_it_is_cut(body: bytes, at: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    assert _exchange(_cut(data, at), eof=False) == (body, "whole", True)


@pytest.mark.parametrize(
    ("data", "eof", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nabc", False, (b"abc", "", False)),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", True, (b"abc", "whole", False)),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc", False, (b"abc", "whole", False)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcd", False, (b"", "protocol", False)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", False, (b"", "protocol", False)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, (b"", "whole", True)),
        (b"SSH-2.0-OpenSSH\r\n\r\n", False, (b"", "protocol", False)),
        (b"", True, (b"", "closed", False)),
    ],
)
def test_other_answers(data: bytes, eof: bool, expected: tuple[bytes, str, bool]) -> None:
    assert _exchange([data], eof=eof) == expected
