"""Before any load: one completion of one token, with the standard library alone (no gevent, no threads)."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path

from gameday.errors import LoadError
from gameday.model import Outcome, Reply
from loadgen import answer, target as target_
from loadgen.plan import Plan


def every_kind(
    plan: Plan,
    target: str,
    model: str,
    *,
    headers: Mapping[str, str] | None = None,
    api_key_file: Path | None = None,
    api_key_env: str | None = None,
    ca_file: Path | None = None,
) -> None:
    """One token by each API, in a stream or in one piece, as the plan uses them. Raises LoadError."""
    for api, stream in sorted({(kind.api, kind.stream) for kind in plan.classes}):
        one_token(
            target,
            model,
            api=api,
            stream=stream,
            headers=headers,
            api_key_file=api_key_file,
            api_key_env=api_key_env,
            ca_file=ca_file,
        )


def one_token(
    target: str,
    model: str,
    *,
    within: float = 10.0,
    served_by: str = "x-served-by",
    served_zone: str = "x-served-zone",
    served_via: str = "x-gateway",
    api_key_file: Path | None = None,
    api_key_env: str | None = None,
    headers: Mapping[str, str] | None = None,
    ca_file: Path | None = None,
    api: str = "chat",
    stream: bool = True,
) -> Reply:
    """A one-token completion. Raises LoadError with one sentence for everything but a good reply.

    `within` (seconds) bounds all of it but the look-up of the name, which is the resolver's.
    """
    whom = target_.parse(
        target,
        model,
        served_by=served_by,
        served_zone=served_zone,
        served_via=served_via,
        headers=headers,
        api_key=target_.read_key(api_key_file, api_key_env),
        ca_file=str(ca_file) if ca_file else None,
    )
    try:
        return _ask(whom, api, time.monotonic(), within, stream)
    except ssl.SSLError as e:
        why = getattr(e, "verify_message", "") or e.reason or str(e)
        odd = isinstance(e, ssl.SSLCertVerificationError)
        ours = "; name the CA (ca_file, --ca-file) if it is your own" if odd else ""
        raise LoadError(f"TLS with {whom.url} failed: {why}{ours}") from e
    except (socket.gaierror, UnicodeError) as e:
        raise LoadError(f"the target {whom.url} cannot be found: {getattr(e, 'strerror', e)}") from e
    except TimeoutError as e:
        raise LoadError(f"the target {whom.url} did not answer within {within:g} s") from e
    except OSError as e:
        raise LoadError(f"the target {whom.url} cannot be reached: {e.strerror or e}") from e
    except answer.BadAnswer as e:
        raise LoadError(f"the target {whom.url} does not speak the OpenAI API: {e}") from e


def _ask(whom: target_.Target, api: str, t_start: float, within: float, stream: bool) -> Reply:
    what: dict[str, object] = {"prompt": "Hi"}
    if api == "chat":
        what = {"messages": [{"role": "user", "content": "Hi"}]}
    asked = {"model": whom.model, **what, "max_tokens": 1, "temperature": 0, "stream": stream}
    body = json.dumps(asked).encode()
    head = whom.head(api) + f"{len(body)}\r\nConnection: close\r\n\r\n".encode()
    context = whom.tls()
    with socket.create_connection((whom.host, whom.port), timeout=within) as plain:
        plain.settimeout(_left(t_start + within))
        with context.wrap_socket(plain, server_hostname=whom.host) if context else plain as conn:
            t_conn = time.monotonic()
            conn.sendall(head + body)
            told = _Told(conn, t_start + within)
            told.t_sent = time.monotonic()
            return _judge(told, whom, t_start, t_conn, stream)


def _left(until: float) -> float:
    """Seconds that are left. Raises TimeoutError when none are: one limit bounds a server that drips, too."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Told:
    """What a server says, as it comes."""

    def __init__(self, conn: socket.socket, until: float) -> None:
        self._conn = conn
        self._until = until
        self.http = answer.Http()
        self.t_sent = 0.0

    def more(self) -> bytes | None:
        """Bytes of the body, maybe none yet; None at its end."""
        if self.http.complete:
            return None
        self._conn.settimeout(_left(self._until))
        data = self._conn.recv(65536)
        if data:
            return self.http.feed(data)
        if not self.http.head_done:
            raise answer.BadAnswer("it closed the connection without an answer")
        if not self.http.close():
            raise answer.BadAnswer("it closed the connection in the middle of its answer")
        return None

    def head(self) -> bytes:
        data: bytes | None = b""
        while not self.http.head_done:
            data = self.more()
        return data or b""

    def rest(self, begin: bytes) -> bytes:
        parts, size = [begin], len(begin)
        while size < answer.MAX_BODY and (data := self.more()) is not None:
            parts.append(data)
            size += len(data)
        return b"".join(parts)


def _judge(told: _Told, whom: target_.Target, t_start: float, t_conn: float, stream: bool) -> Reply:
    begin = told.head()
    t_headers = time.monotonic()
    headers = told.http.headers
    if told.http.status != 200:
        raise _refused(whom, told.http.status, headers.get(b"location") or _some(told, begin))
    events = answer.Stream()
    t_first: float | None = None
    if stream:
        data: bytes | None = begin
        while data is not None and not (events.done or events.error):
            if events.feed(data) and t_first is None:
                t_first = time.monotonic()
            data = told.more()
        tokens = 1 if t_first else events.completion_tokens or 0
    else:
        tokens = _whole(told.rest(begin), events)
    if events.error is not None:
        raise LoadError(f"the target {whom.url} reports an error: {events.error}")
    if not (events.done and events.finish_reason):
        raise LoadError(f"the target {whom.url} ended a one-token stream without finish_reason and [DONE]")
    return Reply(
        worker=-1,
        seq=-1,
        cls="check",
        t_intended=t_start,
        t_end=time.monotonic(),
        outcome=Outcome.OK,
        t_start=t_start,
        t_conn=t_conn,
        t_sent=told.t_sent,
        t_headers=t_headers,
        t_first=t_first,
        t_last_progress=t_first,
        tokens=tokens,
        status=200,
        finish_reason=events.finish_reason,
        got_done=stream,
        prompt_tokens=events.prompt_tokens,
        completion_tokens=events.completion_tokens,
        pod=_header(headers, whom.served_by),
        zone=_header(headers, whom.served_zone),
        via=_header(headers, whom.served_via),
    )


def _whole(body: bytes, events: answer.Stream) -> int:
    """An answer in one piece, written into `events`; its tokens."""
    data = answer.parse(body)
    if data.get("error"):
        events.error = answer.plain(data["error"])
    events.finish_reason = answer.finish_of(data)
    events.prompt_tokens, events.completion_tokens = answer.usage_of(data)
    events.done = True
    return events.completion_tokens or 0


def _some(told: _Told, begin: bytes) -> bytes:
    """The start of an explanation, as far as it comes."""
    try:
        while len(begin) < answer.MAX_DETAIL and (data := told.more()) is not None:
            begin += data
    except (OSError, answer.BadAnswer):
        pass
    return begin


def _header(headers: Mapping[bytes, bytes], name: str) -> str | None:
    value = headers.get(name.encode())
    return None if value is None else value.decode("utf-8", "replace")


def _refused(whom: target_.Target, status: int, body: bytes) -> LoadError:
    said = answer.show(body).strip()
    if status in (401, 403):
        return LoadError(f"the target {whom.url} refuses us ({status}): check the API key: {said}")
    if 300 <= status < 400:
        return LoadError(f"the target {whom.url} answers with {status}, a redirection to {said}: name that one instead")
    if status == 404:
        return LoadError(f"the target {whom.url} has no model {whom.model!r}, or no /v1 API there (404): {said}")
    return LoadError(f"the target {whom.url} answers with {status}: {said}")
