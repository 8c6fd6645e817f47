"""Leave to begin: a freeze, an open incident, or no answer at all keeps everything from beginning."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gameday import leave
from gameday.errors import SettingsError, TargetError
from gameday.settings import load

SATURDAY = datetime(2026, 11, 28, 12, 0)


def ask(lasting: float = 60, now: datetime | None = None, **settings: Any) -> str:
    return leave.ask(load(settings), lasting, now=now)


def refused(told: str, **given: Any) -> None:
    with pytest.raises(TargetError, match=told):
        ask(**given)


def test_nothing_is_asked_by_default() -> None:
    assert "nothing is to be asked" in ask()


def test_a_stop_file_keeps_everything_from_beginning(tmp_path: Path) -> None:
    file = tmp_path / "gameday.stop"
    assert ask(stop_file=file)
    file.touch()
    refused("remove it when experiments may run again", stop_file=file)


def test_a_freeze_keeps_from_beginning_also_what_would_run_into_it() -> None:
    refused("change freeze is on", now=SATURDAY, freeze=("Fri 16:00-Mon 08:00",))
    refused("would begin meanwhile", now=datetime(2026, 11, 27, 15, 55), lasting=600, freeze=("Fri 16:00-Mon 08:00",))
    assert ask(now=datetime(2026, 11, 27, 15, 40), lasting=600, freeze=("Fri 16:00-Mon 08:00",))


def test_a_freeze_that_is_none_is_refused_by_the_settings() -> None:
    with pytest.raises(SettingsError, match="freeze"):
        load({"freeze": ("weekends",)})


def python(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", text


def test_a_command_gives_leave_by_its_exit_code() -> None:
    assert sys.executable in ask(incident_command=python("pass"))
    refused(r"\(exit code 1\): INC-7 is open", incident_command=python("print('INC-7 is open'); raise SystemExit(1)"))
    refused("cannot be run", incident_command=("/does/not/exist",))


def test_a_command_that_hangs_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave, "WITHIN", 0.3)
    refused("gave no answer within", incident_command=python("import time; time.sleep(60)"))


class Incidents(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.server.token = self.headers.get("Authorization", "")  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(status: int, body: Any) -> Iterator[tuple[str, Any]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Incidents)
    server.answer = status, body if isinstance(body, bytes) else json.dumps(body).encode()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/alerts?active=true", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("status", "body"), [(204, b""), (200, []), (200, {"incidents": [], "more": False})])
def test_an_url_gives_leave_when_it_lists_nothing(status: int, body: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    with serving(status, body) as (url, server):
        told = ask(incident_url=url, incident_token_file=token)
    assert server.token == "Bearer s3cret" and "s3cret" not in told


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, [{"id": 1}, {"id": 2}], "2 incident.s. are open"),
        (200, {"incidents": [{"id": 1}]}, "1 incident.s. are open"),
        (200, {"status": "ok"}, "lists no incidents: no leave"),
        (200, b"<html>", "lists no incidents: no leave"),
        (302, b"", "answers 302: no leave"),
        (503, [], "answers 503: no leave"),
    ],
)
def test_anything_else_is_no_leave(status: int, body: Any, told: str) -> None:
    with serving(status, body) as (url, _):
        refused(told, incident_url=url)


def test_no_answer_is_no_leave() -> None:
    refused("does not answer: no leave", incident_url="http://127.0.0.1:9/")
