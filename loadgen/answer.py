"""An HTTP/1.1 answer, byte by byte: chunks, server-sent events, tokens. No I/O, no clock.

JSON is parsed only where it must be (the end, usage, errors): per token there is a byte scan.
Chunked coding: RFC 9112 section 7.1. Event stream: the HTML standard, section 9.2.
"""

from __future__ import annotations

import json
import re

MAX_HEAD = 65536
MAX_DETAIL = 200
MAX_EVENT = 1 << 20
"""Bytes of one server-sent event: what has no end must not fill our memory."""
MAX_BODY = 8 << 20
"""Bytes of an answer in one piece."""


class BadAnswer(ValueError):
    """What came is not HTTP, not an event stream or not JSON."""


class Http:
    """One answer. `feed` gives the body's bytes; `complete` says whether the body ended as announced."""

    __slots__ = (
        "_buf",
        "_chunked",
        "_left",
        "_until_close",
        "complete",
        "head_done",
        "headers",
        "keep_alive",
        "status",
    )

    def __init__(self) -> None:
        self._buf = b""
        self._chunked = False
        self._left = -1  # bytes left of this chunk or of the body; −1: a chunk's size comes next; −2: trailers
        self._until_close = False
        self.complete = False
        self.head_done = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.keep_alive = True

    @property
    def began(self) -> bool:
        return self.head_done or bool(self._buf)

    def feed(self, data: bytes) -> bytes:
        while not self.head_done:  # a 1xx has a head of its own, before the answer's
            data = self._buf + data
            self._buf = b""
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD or not b"HTTP/1.".startswith(data[:7]):
                    raise BadAnswer(f"not an HTTP answer: {show(data)}")
                self._buf = data
                return b""
            self._head(data[:end])
            data = data[end + 4 :]
        if self._until_close:
            return data
        if self._chunked:
            return self._chunks(data)
        took = data[: self._left]
        self._left -= len(took)
        self.complete = self._left == 0
        if len(took) < len(data):
            self.keep_alive = False  # nobody asked for the rest: it must not be taken for the next answer
        return took

    def _head(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        first = lines[0].split(b" ", 2)
        if len(first) < 2 or not first[0].startswith(b"HTTP/1.") or not first[1].isdigit():
            raise BadAnswer(f"not an HTTP answer: {show(lines[0])}")
        status = int(first[1])
        if 100 <= status < 200:
            return
        headers: dict[bytes, bytes] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if not colon:
                raise BadAnswer(f"not an HTTP header: {show(line)}")
            headers[name.lower()] = value.strip()
        self.status, self.headers, self.head_done = status, headers, True
        connection = headers.get(b"connection", b"").lower()
        self.keep_alive = b"close" not in connection and (first[0] != b"HTTP/1.0" or b"keep-alive" in connection)
        if status in (204, 304):  # without a body, whatever their heads say
            self._left = 0
            self.complete = True
        elif b"chunked" in headers.get(b"transfer-encoding", b"").lower():
            self._chunked = True
        elif b"content-length" in headers:
            length = headers[b"content-length"]
            if not length.isdigit():
                raise BadAnswer(f"not a content length: {show(length)}")
            self._left = int(length)
            self.complete = self._left == 0
        else:
            self._until_close = True
            self.keep_alive = False

    @property
    def idle_max(self) -> float:
        """Seconds that the connection may be idle, with a fifth to spare, when the server says so."""
        found = _TIMEOUT.search(self.headers.get(b"keep-alive", b""))
        return float("inf") if found is None else 0.8 * int(found[1])

    def close(self) -> bool:
        """The connection ended. Tells whether that was a proper end of the body."""
        if self._until_close:
            self.complete = True
        return self.complete

    def _chunks(self, data: bytes) -> bytes:
        if self._buf:
            data, self._buf = self._buf + data, b""
        elif self._left == -1:  # the usual case: exactly one whole chunk
            eol = data.find(b"\r\n")
            if eol > 0:
                size = _size(data, 0, eol)
                if size and len(data) == eol + size + 4:
                    if data[-2:] != b"\r\n":
                        raise BadAnswer("a chunk does not end with its line break")
                    return data[eol + 2 : -2]
        return self._chunks_slow(data)

    def _chunks_slow(self, data: bytes) -> bytes:
        out: list[bytes] = []
        pos, end = 0, len(data)
        while pos < end:
            if self._left > 0:
                took = data[pos : pos + self._left]
                out.append(took)
                pos += len(took)
                self._left -= len(took)
                continue
            if self._left == 0:  # the line break after a chunk
                if end - pos < 2:
                    break
                if data[pos : pos + 2] != b"\r\n":
                    raise BadAnswer("a chunk does not end with its line break")
                pos += 2
                self._left = -1
                continue
            eol = data.find(b"\r\n", pos)
            if eol < 0:
                if end - pos > 4096:
                    raise BadAnswer("a chunk's size line has no end")
                break
            if self._left == -1:
                size = _size(data, pos, eol)
                self._left = size or -2
            elif eol == pos:  # the empty line after the trailers
                self.complete = True
                self.keep_alive = self.keep_alive and eol + 2 == end
                pos = end
                break
            pos = eol + 2
        self._buf = data[pos:]
        return b"".join(out)


_TIMEOUT = re.compile(rb"timeout=(\d{1,6})")
_HEX = re.compile(rb"[0-9a-fA-F]{1,15}[ \t]*(?:;|$)")  # int() alone takes signs and underscores


def _size(data: bytes, pos: int, eol: int) -> int:
    text = data[pos:eol]
    if not _HEX.match(text):
        raise BadAnswer(f"not a chunk size: {show(text)}")
    return int(text.partition(b";")[0], 16)


def show(data: bytes) -> str:
    """The start of bytes, for an error message."""
    return data[:MAX_DETAIL].decode("utf-8", "replace")


_CONTENT = re.compile(rb'"(?:content|text|reasoning_content|reasoning|arguments)"\s*:\s*"(?!")')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = re.compile(rb'"error"\s*:\s*[{"]')


class Stream:
    """A completion as server-sent events. `feed` gives how many content tokens the bytes brought."""

    __slots__ = ("_carry", "_kept", "completion_tokens", "done", "error", "finish_reason", "heard", "prompt_tokens")

    def __init__(self, keep: bool = False) -> None:
        self._carry = b""
        self._kept: list[bytes] | None = [] if keep else None
        self.done = False
        self.heard = False  # some event came since the caller last looked
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None

    @property
    def inside(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._carry.strip())

    def feed(self, data: bytes) -> int:
        if self._carry:
            data = self._carry + data
            self._carry = b""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        if data[-2:] != b"\n\n":
            cut = data.rfind(b"\n\n")
            if cut < 0:
                if len(data) > MAX_EVENT:
                    raise BadAnswer(f"an event of more than {MAX_EVENT} bytes: {show(data)}")
                self._carry = data
                return 0
            self._carry = data[cut + 2 :]
            data = data[: cut + 2]
        tokens = 0
        for event in data[:-2].split(b"\n\n"):
            tokens += self._event(event)
        return tokens

    def _event(self, event: bytes) -> int:
        if event[:6] == b"data: " and b"\n" not in event:
            payload = event[6:]
        else:
            lines = event.split(b"\n")
            payload = b"\n".join(line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:"))
            if not payload.strip():  # comments, ids, keep-alives
                if event and not event.startswith((b":", b"event:", b"id:", b"retry:", b"data:", b"\n")):
                    raise BadAnswer(f"not a server-sent event: {show(event)}")
                return 0
            if any(line.startswith(b"event:") and line[6:].strip() == b"error" for line in lines):
                self.error = show(payload)  # `_look` may find better words
        self.heard = True
        if payload == b"[DONE]":
            self.done = True
            return 0
        if payload[:1] != b"{":
            if self.error:  # in words
                return 0
            raise BadAnswer(f"not a JSON event: {show(payload)}")
        if _FINISH.search(payload) or _USAGE.search(payload) or _ERROR.search(payload):
            self._look(payload)
        if not _CONTENT.search(payload):
            return 0
        if self._kept is not None:
            self._kept.append(payload)
        return 1

    def text(self) -> str:
        """What was said, of a stream that is kept; parsed here, after the end, and not while tokens come."""
        return "".join(text_of(parse(payload)) for payload in self._kept or ())

    def _look(self, payload: bytes) -> None:
        data = parse(payload)
        error = data.get("error")
        if error:
            self.error = plain(error.get("message", error) if isinstance(error, dict) else error)
        self.finish_reason = finish_of(data) or self.finish_reason
        prompt, completion = usage_of(data)
        self.prompt_tokens = self.prompt_tokens if prompt is None else prompt
        self.completion_tokens = self.completion_tokens if completion is None else completion


def parse(payload: bytes) -> dict[str, object]:
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError) as e:
        raise BadAnswer(f"not JSON ({e}): {show(payload)}") from None
    if not isinstance(data, dict):
        raise BadAnswer(f"not a JSON object: {show(payload)}")
    return data


def finish_of(data: dict[str, object]) -> str | None:
    choices = data.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        reason = choices[0].get("finish_reason")
        return plain(reason) if isinstance(reason, str) else None
    return None


def plain(value: object) -> str:
    """A server's words, short and fit for UTF-8: JSON may hold half of a surrogate pair."""
    return str(value)[:MAX_DETAIL].encode("utf-8", "replace").decode()


def text_of(data: dict[str, object]) -> str:
    """The words of a chunk or of a whole answer; "" where there are none (a tool call, say)."""
    choices = data.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        return ""
    said = choices[0].get("delta") or choices[0].get("message") or choices[0]
    text = said.get("content", said.get("text")) if isinstance(said, dict) else None
    return text if isinstance(text, str) else ""


def usage_of(data: dict[str, object]) -> tuple[int | None, int | None]:
    """(prompt tokens, completion tokens), as far as they are there."""
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None, None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    prompt, completion = (c if type(c) is int and 0 <= c < 1 << 53 else None for c in counts)
    return prompt, completion
