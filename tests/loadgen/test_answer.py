"""HTTP answers and event streams, however they are cut: what a server may do, and what it may do wrong."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings, strategies as st

from loadgen import answer

GOOD = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\r\n\r\n'
    b": a comment, to keep the connection\r\n\r\n"
    b'data: {"choices":[{"delta":{"content":"Hello"},"finish_reason":null}]}\r\n\r\n'
    b"event: message\r\nid: 7\r\nretry: 100\r\n"
    b'data: {"choices":[{"delta":{"content":" \\"error\\": {"},\r\ndata: "finish_reason":null}]}\r\n\r\n'
    b"data:\r\n\r\n"
    b'data:{"choices": [{"delta": {"content" : "!"}, "finish_reason" : "stop"}]}\r\n\r\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\r\n\r\n'
    b"data: [DONE]\r\n\r\n"
)


def _chunked(body: bytes, size: int) -> bytes:
    parts = [body[n : n + size] for n in range(0, len(body), size)]
    return b"".join(f"{len(p):X};name=value\r\n".encode() + p + b"\r\n" for p in parts) + b"0\r\nTrailer: x\r\n\r\n"


def _answer(body: bytes, size: int) -> bytes:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"
    return b"HTTP/1.1 100 Continue\r\n\r\n" + hint * 3 + head + _chunked(body, size)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 400), st.lists(st.integers(1, 3000), max_size=40))
@example(10_000, [])
@example(10_000, list(range(1, 3000)))
def test_however_it_is_cut_it_says_the_same(size: int, cuts: list[int]) -> None:
    data = _answer(GOOD, size)
    http, events = answer.Http(), answer.Stream(keep=True)
    tokens, edges = 0, sorted({0, *(c for c in cuts if c < len(data)), len(data)})
    for a, b in pairwise(edges):
        tokens += events.feed(http.feed(data[a:b]))
    assert http.complete
    assert http.keep_alive
    assert http.status == 200
    assert http.headers[b"x-a"] == b"b"
    assert events.done
    assert tokens == 3
    assert (events.finish_reason, events.prompt_tokens, events.completion_tokens) == ("stop", 5, 3)
    assert events.error is None
    assert events.text() == 'Hello "error": {!'


def _read(data: bytes) -> tuple[answer.Http, bytes]:
    http = answer.Http()
    return http, http.feed(data)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_an_answer_without_a_body_has_ended(status: bytes) -> None:
    http, _ = _read(b"HTTP/1.1 " + status + b"\r\nServer: x\r\n\r\n")
    assert http.complete


def test_http_1_0_ends_with_the_connection() -> None:
    http, body = _read(b"HTTP/1.0 200 OK\r\n\r\nsome")
    assert body == b"some"
    assert not http.complete
    assert http.close()
    assert not http.keep_alive


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"-5\r\nx", "not a chunk size"),
        (b"1_0\r\nx", "not a chunk size"),
        (b"0x5\r\nx", "not a chunk size"),
        (b"\r\n", "not a chunk size"),
        (b"fffffffffffffffff\r\nx", "not a chunk size"),
        (b"3\r\nabcdef\r\n", "line break"),
        (b"5" * 5000, "no end"),
    ],
)
def test_broken_chunks(data: bytes, says: str) -> None:
    with pytest.raises(answer.BadAnswer, match=says):
        _read(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data)


def test_many_interim_answers_are_no_recursion() -> None:
    http, body = _read(b"HTTP/1.1 102 Processing\r\n\r\n" * 5000 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (http.status, body, http.complete) == (200, b"ok", True)


def test_an_error_event_is_an_error_whatever_it_carries() -> None:
    for payload, says in (
        (b'{"message":"out of memory"}', "out of memory"),
        (b"out of memory", "out of memory"),
        (b'{"error":{"message":"gone"}}', "gone"),
        (b'{"error":"gone","error_type":"generation"}', "gone"),
    ):
        events = answer.Stream()
        events.feed(b"event: error\ndata: " + payload + b"\n\n")
        assert says in str(events.error)
    events = answer.Stream()
    events.feed(b'event: error-free\ndata: {"choices":[]}\n\n')
    assert events.error is None


def _refused(payload: bytes, says: str) -> None:
    with pytest.raises(answer.BadAnswer, match=says):
        answer.Stream().feed(payload)


def test_what_is_no_event_stream_is_refused() -> None:
    _refused(b"<html>a proxy's page</html>\n\n", "not a server-sent event")
    _refused(b"data: hello\n\n", "not a JSON event")
    _refused(b'data: {"usage": {\n\n', "not JSON")
    _refused(b'data: {"usage": {"a":' + b"[" * 100_000 + b"\n\n", "not JSON")


def test_an_event_without_an_end_does_not_fill_the_memory() -> None:
    events = answer.Stream()
    with pytest.raises(answer.BadAnswer, match="an event of more than"):
        for _ in range(1000):
            events.feed(b"data: " + b"x" * 65536)


def test_what_a_server_says_can_be_recorded() -> None:
    """Half a surrogate pair, a number beyond 64 bits, a count that is none: none of it may spoil a record."""
    events = answer.Stream()
    events.feed(b'data: {"choices":[{"finish_reason":"\\ud800"}],"error":{"message":"\\udfff!"}}\n\n')
    assert events.finish_reason is not None
    assert events.error is not None
    json.dumps([events.finish_reason, events.error], ensure_ascii=False).encode()
    for count in ("-1", "true", "1e3", '"7"', "9" * 30):
        events.feed(b'data: {"usage":{"prompt_tokens":%s,"completion_tokens":4}}\n\n' % count.encode())
        assert (events.prompt_tokens, events.completion_tokens) == (None, 4)
