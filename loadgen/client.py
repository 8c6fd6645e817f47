"""The streaming client: HTTP/1.1 on non-blocking sockets and the gevent loop, one greenlet per request.

Stock clients report broken streams as successes (facts/loadgen.md); this one tells 20 ways to fail apart, stamps
every byte right after `recv`, and never retries. One timer per request bounds every stage, look-ups included.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import gevent
from gevent.hub import get_hub

from gameday.model import Outcome
from loadgen import answer
from loadgen.plan import Kind
from loadgen.target import Target

READ, WRITE = 1, 2
IDLE_MAX = 4.0
"""Seconds after which an idle connection is not used again: below the 5 s at which uvicorn (vLLM) closes it.
A server that announces less (`Keep-Alive: timeout=…`) is believed."""
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN})
"""Errors of this machine (file descriptors, ports, memory): nothing was sent, and the service is not to blame."""
WE_SLEPT = 0.05
"""Seconds by which a timer is late when this process stood still."""
AFTER_DONE = 0.5
"""Seconds that the rest of the body may take after `[DONE]` before the connection is given up (not the reply)."""


class Expired(BaseException):
    """A deadline passed; thrown into the request's greenlet, and never leaves the client."""


@dataclass(slots=True, eq=False)
class Call:
    """One request under way; `gameday.model.Reply` explains the fields."""

    seq: int
    cls: str
    t_intended: float
    outcome: Outcome = Outcome.CENSORED
    t_start: float | None = None
    t_dns: float | None = None
    t_conn: float | None = None
    t_sent: float | None = None
    t_headers: float | None = None
    t_first: float | None = None
    t_last_progress: float | None = None
    t_end: float = 0.0
    itl: list[float] | None = None
    tokens: int = 0
    status: int | None = None
    finish_reason: str | None = None
    got_done: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    conn_reused: bool = False
    peer: str | None = None
    pod: str | None = None
    zone: str | None = None
    via: str | None = None
    detail: str = ""
    text: str = ""  # what was said, of a class that keeps it; not recorded

    def end(self, outcome: Outcome, detail: str = "", at: float | None = None) -> None:
        self.outcome = outcome
        self.detail = detail
        self.t_end = monotonic() if at is None else at


class Guard:
    """One lazy timer for all deadlines of a request: moving a deadline later costs an assignment."""

    __slots__ = ("_armed", "_greenlet", "_loop", "_timer", "limit", "outcome", "total")

    def __init__(self, total: float) -> None:
        self._loop = get_hub().loop
        self._greenlet = gevent.getcurrent()
        self._timer: Any = None
        self._armed = 0.0
        self.total = total  # the instant at which everything ends
        self.limit = total
        self.outcome = Outcome.DEADLINE

    def until(self, instant: float, outcome: Outcome) -> None:
        """The stage that now begins must end by `instant`, or it ends as `outcome`."""
        self.outcome = outcome
        self.limit = min(instant, self.total)
        if self._timer is None or self.limit < self._armed:
            self._arm()

    @property
    def verdict(self) -> Outcome:
        return Outcome.DEADLINE if self.limit >= self.total else self.outcome

    def _arm(self) -> None:
        self.close()
        self._armed = self.limit
        self._timer = self._loop.timer(max(0.0, self.limit - monotonic()))
        self._timer.start(self._fire, update=True)

    def _fire(self) -> None:
        late = monotonic() - self._armed
        if monotonic() < self.limit:
            self._arm()
        elif late > WE_SLEPT:  # what came meanwhile waits in the socket: it is read before anything is given up
            self.close()
            self._armed = monotonic()
            self._timer = self._loop.timer(WE_SLEPT / 2)
            self._timer.start(self._fire, update=True)
        else:
            self.close()
            self._greenlet.throw(Expired)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None


class Conn:
    """A connection. `recv` gives None when there is nothing (yet), b"" at the end."""

    __slots__ = ("_in", "_out", "idle_until", "peer", "sock", "tls")

    def __init__(self, sock: _socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer
        self.idle_until = 0.0
        self.tls: ssl.SSLObject | None = None

    def wait(self, event: int) -> None:
        hub = get_hub()
        watcher = hub.loop.io(self.sock.fileno(), event)
        try:
            hub.wait(watcher)
        finally:
            watcher.stop()
            watcher.close()

    def handshake(self, context: ssl.SSLContext, host: str) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        while True:
            try:
                self.tls.do_handshake()
                self._flush()
                return
            except ssl.SSLWantReadError:
                self._flush()
                self.wait(READ)
                data = self.sock.recv(65536)
                if not data:
                    raise ssl.SSLEOFError("the server closed the connection during the handshake") from None
                self._in.write(data)

    def _flush(self) -> None:
        if self._out.pending:
            self._send(self._out.read())

    def send(self, data: bytes) -> None:
        if self.tls is None:
            self._send(data)
        else:
            self.tls.write(data)
            self._flush()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                self.wait(WRITE)

    def recv(self) -> bytes | None:
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return None
        if self.tls is None:
            return data
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()
        return self._decrypt()

    def _decrypt(self) -> bytes | None:
        assert self.tls is not None
        parts: list[bytes] = []
        try:
            while part := self.tls.read(65536):
                parts.append(part)
        except ssl.SSLWantReadError:
            return b"".join(parts) or None
        except ssl.SSLEOFError:  # closed without close_notify: HTTP's own framing tells whether something is missing
            pass
        return b"".join(parts)  # after the last bytes, the next recv tells the end again

    def alive(self) -> bool:
        """Whether an idle connection is still open and silent."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self.sock.close()


class Client:
    """Speaks to one target, with a pool of idle connections used in turn (so that all of them stay warm)."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._tls = target.tls()
        self._heads = {api: target.head(api) for api in ("chat", "completions")}
        self._idle: deque[Conn] = deque()
        self._served_by = target.served_by.encode()
        self._served_zone = target.served_zone.encode()
        self._served_via = target.served_via.encode()
        self._literal = _literal(target.host, target.port)

    def close(self) -> None:
        while self._idle:
            self._idle.popleft().close()

    def perform(self, call: Call, cls: Kind, body: bytes, *, fresh: bool) -> None:
        """Send `call` and follow it to its end, which is then written into it. Raises only GreenletExit (censored)."""
        call.t_start = monotonic()
        guard = Guard(call.t_start + cls.deadlines.total)
        exchange = _Exchange(self, call, cls, guard)
        try:
            exchange.run(body, fresh)
        except Expired:
            call.end(guard.verdict, f"nothing within the {guard.verdict.value} limit")
        except Failed as e:
            call.end(e.outcome, str(e))
        finally:
            guard.close()
            exchange.release()

    def pick(self, fresh: bool) -> Conn | None:
        """An idle connection that still looks alive."""
        while self._idle and not fresh:
            conn = self._idle.popleft()
            if monotonic() <= conn.idle_until and conn.alive():
                return conn
            conn.close()
        return None

    def give_back(self, conn: Conn, idle_max: float) -> None:
        conn.idle_until = monotonic() + idle_max
        self._idle.append(conn)

    def sweep(self) -> None:
        """Close what has been idle for too long (called every second)."""
        now = monotonic()
        for _ in range(len(self._idle)):
            conn = self._idle.popleft()
            if conn.idle_until < now:
                conn.close()
            else:
                self._idle.append(conn)


class Failed(Exception):
    """A request's end other than a deadline."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


_Address = tuple[int, tuple[Any, ...]]


def _literal(host: str, port: int) -> list[_Address] | None:
    """The address, when the host is one already."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, (host, port) if family == socket.AF_INET else (host, port, 0, 0))]
    return None


class _Exchange:
    """One request on one connection."""

    __slots__ = ("_call", "_client", "_cls", "_conn", "_guard", "_http", "_keep", "_last")

    def __init__(self, client: Client, call: Call, cls: Kind, guard: Guard) -> None:
        self._client = client
        self._call = call
        self._cls = cls
        self._guard = guard
        self._conn: Conn | None = None
        self._http = answer.Http()
        self._keep = False
        self._last = 0.0  # the last token

    def release(self) -> None:
        if self._conn is not None:
            if self._keep:
                self._client.give_back(self._conn, min(IDLE_MAX, self._http.idle_max))
            else:
                self._conn.close()
            self._conn = None

    def run(self, body: bytes, fresh: bool) -> None:
        call, client = self._call, self._client
        conn = client.pick(fresh)
        call.conn_reused = conn is not None
        self._conn = conn or self._connect()
        call.peer = self._conn.peer
        head = client._heads[self._cls.api] + str(len(body)).encode()
        end = b"\r\nConnection: close\r\n\r\n" if fresh else b"\r\n\r\n"
        assert call.t_start is not None
        limit = self._cls.deadlines.first_token if self._cls.stream else self._cls.deadlines.total
        self._guard.until(call.t_start + limit, Outcome.HEADER_TIMEOUT)
        try:
            self._conn.send(head + end + body)
            call.t_sent = monotonic()
            self._follow(fresh)
        except answer.BadAnswer as e:
            raise Failed(Outcome.BAD_ANSWER, str(e)) from None
        except ssl.SSLError as e:
            raise Failed(Outcome.TLS, _words(e)) from None
        except OSError as e:
            raise self._lost(_words(e), reset=True) from None

    def _connect(self) -> Conn:
        call, guard, limits = self._call, self._guard, self._cls.deadlines
        addresses = self._client._literal
        if addresses is None:
            guard.until(monotonic() + limits.dns, Outcome.DNS)
            addresses = self._resolve()
            call.t_dns = monotonic()
        limit = monotonic() + limits.connect
        conn = self._conn = self._reach(addresses, limit)
        guard.until(limit, Outcome.CONNECT_TIMEOUT)
        if self._client._tls is not None:
            try:
                conn.handshake(self._client._tls, self._client.target.host)
            except ssl.SSLError as e:
                raise Failed(Outcome.TLS, _words(e)) from None
            except OSError as e:
                raise Failed(Outcome.CONNECT_RESET, _words(e)) from None
        call.t_conn = monotonic()
        return conn

    def _reach(self, addresses: list[_Address], limit: float) -> Conn:
        """The first address that takes us. Each gets its share of the time: a black hole must not hide the others."""
        failure = Failed(Outcome.DNS, "the name has no address")
        for n, (family, address) in enumerate(addresses):
            now = monotonic()
            self._guard.until(now + (limit - now) / (len(addresses) - n), Outcome.CONNECT_TIMEOUT)
            try:
                return self._open(family, address)
            except Failed as e:
                failure = e
                if e.outcome is Outcome.CLIENT_SHED:
                    break
            except Expired:
                if n == len(addresses) - 1 or self._guard.verdict is Outcome.DEADLINE:
                    raise
        raise failure

    def _resolve(self) -> list[_Address]:
        target = self._client.target
        try:
            found = get_hub().resolver.getaddrinfo(target.host, target.port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:
            raise Failed(Outcome.DNS, f"{target.host}: {_words(e)}") from None
        return [(int(family), address) for family, _, _, _, address in found]

    def _open(self, family: int, address: tuple[Any, ...]) -> Conn:
        try:
            sock = _socket.socket(family, socket.SOCK_STREAM)
        except OSError as e:
            raise Failed(Outcome.CLIENT_SHED if e.errno in OURS else Outcome.REFUSED, _words(e)) from None
        conn = Conn(sock, f"{address[0]}:{address[1]}")
        self._call.peer = conn.peer
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                conn.wait(WRITE)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except BaseException:
            sock.close()
            raise
        if code == 0:
            return conn
        sock.close()
        outcome = {errno.ECONNRESET: Outcome.CONNECT_RESET, errno.ETIMEDOUT: Outcome.CONNECT_TIMEOUT}
        refused = Outcome.CLIENT_SHED if code in OURS else Outcome.REFUSED
        raise Failed(outcome.get(code, refused), f"{conn.peer}: {os.strerror(code)}")

    def _lost(self, why: str, *, reset: bool) -> Failed:
        """The connection ended too early: what that means depends on how far the answer had come."""
        if self._http.head_done:
            return Failed(Outcome.RESET_MID if reset else Outcome.TRUNCATED, why)
        if self._call.conn_reused and not self._http.began:
            return Failed(Outcome.RESET_ON_REUSE, why)
        if reset and not self._http.began:
            return Failed(Outcome.CONNECT_RESET, why)
        return Failed(Outcome.CLOSED_BEFORE_HEADERS, why)

    def _follow(self, fresh: bool) -> None:
        """Read the answer. The watcher stays armed throughout: per token one wake-up, one recv, one scan."""
        conn, hub = self._conn, get_hub()
        assert conn is not None
        watcher = hub.loop.io(conn.sock.fileno(), READ)
        watcher.start(gevent.getcurrent().switch)
        try:
            payload = self._head(conn, hub.switch)
            content = self._http.headers.get(b"content-type", b"").lower()
            if self._http.status == 200 and content.startswith(b"text/event-stream"):
                self._stream(conn, hub.switch, payload)
            else:
                self._whole(conn, hub.switch, payload)
        finally:
            watcher.stop()
            watcher.close()
        self._keep = self._http.complete and self._http.keep_alive and not fresh

    def _head(self, conn: Conn, pause: Callable[[], object]) -> bytes:
        call, http = self._call, self._http
        while True:
            pause()
            data = conn.recv()
            if data is None:
                continue
            now = monotonic()
            if not data:
                raise self._lost("closed before an answer", reset=False)
            payload = http.feed(data)
            if http.head_done:
                break
        call.t_headers = call.t_last_progress = now
        call.status = http.status
        call.pod = _text(http.headers.get(self._client._served_by))
        call.zone = _text(http.headers.get(self._client._served_zone))
        call.via = _text(http.headers.get(self._client._served_via))
        return payload

    def _stream(self, conn: Conn, pause: Callable[[], object], payload: bytes) -> None:
        call, http = self._call, self._http
        events = answer.Stream(self._cls.keep)
        assert call.t_start is not None
        assert call.t_headers is not None
        self._guard.until(call.t_start + self._cls.deadlines.first_token, Outcome.FIRST_TOKEN_TIMEOUT)
        now = call.t_headers
        ended = False
        try:
            if payload:
                self._note(events, events.feed(payload), now)
            while not (events.done or events.error or ended or http.complete):
                pause()
                data = conn.recv()
                if data is None:
                    continue
                now = monotonic()
                if data:
                    self._note(events, events.feed(http.feed(data)), now)
                else:
                    ended = True
                    http.close()
        finally:
            self._copy(events)
        self._judge_stream(events, now)
        if self._cls.keep and call.outcome is Outcome.OK:
            with suppress(answer.BadAnswer):  # then the plan's answer is repeated
                call.text = events.text()
        if events.done and not http.complete and not ended:
            self._drain(conn, pause)

    def _note(self, events: answer.Stream, tokens: int, now: float) -> None:
        """Write down what came at `now`, and move the stall limit."""
        call, guard = self._call, self._guard
        stall = now + self._cls.deadlines.stall
        if tokens:
            call.tokens += tokens
            if call.itl is None:
                call.t_first = now
                call.itl = []
                guard.until(stall, Outcome.STALL)
            else:
                call.itl.append(round(now - self._last, 4))
            if tokens > 1:  # they came in one piece
                call.itl += [0.0] * (tokens - 1)
            self._last = now
        if events.heard:
            events.heard = False
            call.t_last_progress = now
            if call.itl is not None:
                guard.limit = stall if stall < guard.total else guard.total

    def _copy(self, events: answer.Stream) -> None:
        call = self._call
        call.got_done = events.done
        call.finish_reason = events.finish_reason
        call.prompt_tokens = events.prompt_tokens
        call.completion_tokens = events.completion_tokens

    def _judge_stream(self, events: answer.Stream, now: float) -> None:
        if events.error is not None:
            self._call.end(Outcome.SSE_ERROR, events.error, now)
        elif events.finish_reason in ("error", "abort"):
            self._call.end(Outcome.SSE_ERROR, f"finish_reason is {events.finish_reason}", now)
        elif events.done and events.finish_reason:
            self._good(now)
        elif events.done:
            self._call.end(Outcome.NO_DONE, "[DONE] without a finish_reason", now)
        elif events.inside or not self._http.complete:
            where = "an event" if events.inside else "the body"
            self._call.end(Outcome.TRUNCATED, f"the connection closed inside {where}", now)
        else:
            self._call.end(Outcome.NO_DONE, "the stream ended without [DONE]", now)

    def _good(self, now: float) -> None:
        """A stream that ended well. Without a word it is good only when the server counts a token (it may be blank)."""
        call = self._call
        if not call.tokens:
            if not call.completion_tokens:
                call.end(Outcome.BAD_ANSWER, "ended well, without a token", now)
                return
            call.tokens = call.completion_tokens
            call.t_first = now
        call.end(Outcome.OK, "", now)

    def _drain(self, conn: Conn, pause: Callable[[], object]) -> None:
        """Take the rest of a body after `[DONE]`, so that the connection can be used again; the reply has ended."""
        self._guard.until(monotonic() + AFTER_DONE, Outcome.DEADLINE)
        try:
            while not self._http.complete:
                pause()
                data = conn.recv()
                if data is None:
                    continue
                if not data:
                    return
                self._http.feed(data)
        except (Expired, OSError, answer.BadAnswer):
            return

    def _whole(self, conn: Conn, pause: Callable[[], object], payload: bytes) -> None:
        """An answer that is not a stream: a completion in one piece, or an error."""
        call, http = self._call, self._http
        assert call.t_start is not None
        self._guard.until(self._guard.total, Outcome.DEADLINE)
        parts = [payload]
        size, limit = len(payload), answer.MAX_BODY if http.status == 200 else answer.MAX_HEAD
        try:
            while not http.complete:
                if size > limit:
                    raise answer.BadAnswer(f"an answer of more than {limit} bytes")
                pause()
                data = conn.recv()
                if data is None:
                    continue
                call.t_last_progress = monotonic()
                if data:
                    parts.append(http.feed(data))
                    size += len(parts[-1])
                elif http.close():
                    break
                else:
                    raise self._lost("closed inside the body", reset=False)
        except (Failed, Expired, OSError, answer.BadAnswer):
            if http.status == 200:
                raise
        if http.status == 200:
            self._completion(b"".join(parts))
        else:  # the status says it all, even when the explanation was cut off
            self._refusal(b"".join(parts))

    def _completion(self, body: bytes) -> None:
        call = self._call
        if self._cls.stream:
            kind = answer.show(self._http.headers.get(b"content-type", b"nothing"))
            raise Failed(Outcome.BAD_ANSWER, f"an event stream was asked for, {kind} came")
        data = answer.parse(body)
        if data.get("error"):
            raise Failed(Outcome.SSE_ERROR, answer.plain(data["error"]))
        call.finish_reason = answer.finish_of(data)
        call.prompt_tokens, call.completion_tokens = answer.usage_of(data)
        if not call.finish_reason:
            raise Failed(Outcome.BAD_ANSWER, "an answer without a finish_reason")
        if call.finish_reason in ("error", "abort"):
            raise Failed(Outcome.SSE_ERROR, f"finish_reason is {call.finish_reason}")
        text = answer.text_of(data)
        call.tokens = call.completion_tokens or 0
        if not (call.tokens or text):
            raise Failed(Outcome.BAD_ANSWER, "ended well, without a token")
        call.end(Outcome.OK)
        call.text = text if self._cls.keep else ""
        call.t_first = call.t_end

    def _refusal(self, body: bytes) -> None:
        status = self._http.status
        where = self._http.headers.get(b"location", b"") if 300 <= status < 400 else b""
        detail = f"{status} {answer.show(where or body)}".strip()
        if status == 429:
            self._call.end(Outcome.HTTP_429, detail)
        elif 400 <= status < 500:
            self._call.end(Outcome.HTTP_4XX, detail)
        elif status >= 500:
            self._call.end(Outcome.HTTP_5XX, detail)
        else:
            self._call.end(Outcome.BAD_ANSWER, detail)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _words(e: OSError | UnicodeError) -> str:
    return getattr(e, "strerror", None) or str(e) or type(e).__name__
