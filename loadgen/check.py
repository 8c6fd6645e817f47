"""Before any load: one completion of one token, with the standard library alone (no gevent, no threads)."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path

from gameday.errors import LoadError
from gameday.model import Outcome, Reply
from loadgen import answer, target as target_


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
) -> Reply:
    """A streamed one-token completion. Raises LoadError with one sentence for everything but a good reply.

    `within` (seconds) bounds every wait for the network.
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
    context = whom.tls()
    connection: http.client.HTTPConnection
    if context is None:
        connection = http.client.HTTPConnection(whom.host, whom.port, timeout=within)
    else:
        connection = http.client.HTTPSConnection(whom.host, whom.port, timeout=within, context=context)
    try:
        return _ask(connection, whom, api, within)
    except ssl.SSLError as e:
        why = getattr(e, "verify_message", "") or e.reason or str(e)
        raise LoadError(f"TLS with {whom.url} failed: {why}; name the CA by --ca-file if it is your own") from e
    except socket.gaierror as e:
        raise LoadError(f"the target {whom.url} cannot be found: {e.strerror}") from e
    except TimeoutError as e:
        raise LoadError(f"the target {whom.url} did not answer within {within:g} s") from e
    except OSError as e:
        raise LoadError(f"the target {whom.url} cannot be reached: {e.strerror or e}") from e
    except (http.client.HTTPException, answer.BadAnswer) as e:
        raise LoadError(f"the target {whom.url} does not speak the OpenAI API: {e or type(e).__name__}") from e
    finally:
        connection.close()


def _ask(connection: http.client.HTTPConnection, whom: target_.Target, api: str, within: float) -> Reply:
    what: dict[str, object] = {"prompt": "Hi"}
    if api == "chat":
        what = {"messages": [{"role": "user", "content": "Hi"}]}
    body = json.dumps({"model": whom.model, **what, "max_tokens": 1, "temperature": 0, "stream": True}).encode()
    lines = whom.head(api).decode("latin-1").split("\r\n")
    path = lines[0].split(" ")[1]
    headers = dict(line.split(": ", 1) for line in lines[1:-1])
    t_start = time.monotonic()
    connection.connect()
    t_conn = time.monotonic()
    connection.request("POST", path, body, headers)
    t_sent = time.monotonic()
    response = connection.getresponse()
    t_headers = time.monotonic()
    if response.status != 200:
        raise _refused(whom, response.status, response.read(4096))
    events, t_first = _read(response, t_start + within, whom)
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
        t_sent=t_sent,
        t_headers=t_headers,
        t_first=t_first,
        t_last_progress=t_first,
        tokens=1 if t_first else 0,
        status=200,
        finish_reason=events.finish_reason,
        got_done=True,
        prompt_tokens=events.prompt_tokens,
        completion_tokens=events.completion_tokens,
        pod=response.headers.get(whom.served_by),
        zone=response.headers.get(whom.served_zone),
        via=response.headers.get(whom.served_via),
    )


def _read(response: http.client.HTTPResponse, until: float, whom: target_.Target) -> tuple[answer.Stream, float | None]:
    events = answer.Stream()
    t_first: float | None = None
    while not events.done and (data := response.read1(65536)):
        if events.feed(data) and t_first is None:
            t_first = time.monotonic()
        if time.monotonic() > until:
            raise TimeoutError
    return events, t_first


def _refused(whom: target_.Target, status: int, body: bytes) -> LoadError:
    said = answer.show(body).strip()
    if status in (401, 403):
        return LoadError(f"the target {whom.url} refuses us ({status}): check the API key: {said}")
    if status == 404:
        return LoadError(f"the target {whom.url} has no model {whom.model!r}, or no /v1 API there (404): {said}")
    return LoadError(f"the target {whom.url} answers with {status}: {said}")
