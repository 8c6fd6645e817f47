"""Notifications, against local servers: the right payloads, bounded and honest deliveries, no secret anywhere."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import synthetic

from gameday import record
from gameday.errors import SettingsError
from gameday.model import Finding, Judgement, Phase, Verdict
from reports.notify import Delivery, Notify, grafana, post, slack, tell
from reports.notify.news import gather
from reports.notify.pagerduty import dedup_key

SECRET = "s3cr3t-T0K3N-XYZZY"
SECRETS = {name: f"{SECRET}-{name}" for name in ("slack", "pagerduty", "webhook", "grafana")}
EVIL = "<!channel> <https://evil|click> ```& </pre><b>"


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Server:
    """Answers with the statuses in turn, the last of them for ever; `delay` seconds late."""

    url: str
    statuses: list[int]
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)


@contextmanager
def serving(*statuses: int, delay: float = 0.0, headers: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server("", list(statuses or (200,)), delay, headers or {})
    gone = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append(Request(self.path, dict(self.headers), json.loads(body)))
            if gone.wait(server.delay):
                return
            status = server.statuses.pop(0) if len(server.statuses) > 1 else server.statuses[0]
            echo = f"you sent {self.path} {dict(self.headers)} ".encode() + body  # as careless servers do
            self.send_response(status, f"phrase {self.path}")
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(echo)))
            self.end_headers()
            self.wfile.write(echo)

        def do_GET(self) -> None:  # a followed redirect would come as one
            server.requests.append(Request(self.path, dict(self.headers), {}))
            self.send_error(405)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        gone.set()
        http.shutdown()
        http.server_close()
        thread.join(5)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "PAUSE", 0.01)
    monkeypatch.setattr(post, "ANSWER_WITHIN", 15.0)  # a busy machine is no dead server
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "ANSWER_WITHIN", 0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "20261124-090000-7419"
    synthetic.write(root / "zone_outage", synthetic.timeline())
    (root / "zone_outage" / "report.html").touch()
    return root


def verdict(of: Verdict, name: str = "zone_outage", evidence: str = "3.10 s, worst 14:02") -> Judgement:
    finding = Finding(Phase.DURING, "first token p95 ≤ 2.5 s", of, 3.1, 2.5, "s", evidence=evidence)
    return replace(synthetic.judgement(), experiment=name, verdict=of, findings=(finding,))


def everyone(tmp_path: Path, url: str, **more: Any) -> Notify:
    """All four channels, their secrets in files, all of them answered by one server."""
    told = {
        "slack": f"{url}/services/T00/B00/{SECRETS['slack']}",
        "pagerduty": SECRETS["pagerduty"],
        "webhook": f"{url}/hook?key={SECRETS['webhook']}",
        "grafana": SECRETS["grafana"],
    }
    for name, text in told.items():
        (tmp_path / name).write_text(f"{text}\n")
    return Notify(
        **{
            "slack_webhook_file": tmp_path / "slack",
            "pagerduty_key_file": tmp_path / "pagerduty",
            "pagerduty_url": f"{url}/v2/enqueue",
            "webhook_url_file": tmp_path / "webhook",
            "grafana_url": f"{url}/grafana",
            "grafana_token_file": tmp_path / "grafana",
            **more,
        }
    )


def only(channel: str, everyone: Notify) -> Notify:
    """The configuration with one channel left."""
    fields = {
        "slack": ("slack_webhook_file",),
        "pagerduty": ("pagerduty_key_file",),
        "webhook": ("webhook_url_file",),
        "grafana": ("grafana_token_file", "grafana_url"),
    }
    off: dict[str, Any] = {
        f: "" if f == "grafana_url" else None for name, fs in fields.items() if name != channel for f in fs
    }
    return replace(everyone, **off)


# ── the payloads ────────────────────────────────────────────────────────────────────────────────


def test_nobody_is_told_unless_named(root: Path) -> None:
    assert tell(Notify(), root, [verdict(Verdict.FAIL)]) == ()


def test_everyone_is_told(tmp_path: Path, server: Server, root: Path) -> None:
    told = tell(everyone(tmp_path, server.url), root, [verdict(Verdict.FAIL)])
    assert [(d.to, d.ok, d.detail) for d in told] == [
        ("Slack", True, "message sent"),
        ("PagerDuty: zone_outage", True, "incident triggered"),
        ("webhook", True, "message sent"),
        ("Grafana: zone_outage", True, "fault window marked"),
    ]
    assert {r.path.split("?")[0] for r in server.requests} == {
        f"/services/T00/B00/{SECRETS['slack']}", "/v2/enqueue", "/hook", "/grafana/api/annotations",
    }  # fmt: skip
    assert all(r.headers["Content-Type"] == "application/json" for r in server.requests)
    assert told[0].line == "told  Slack  message sent"


def test_slack_is_told_the_story(tmp_path: Path, server: Server, root: Path) -> None:
    config = replace(only("slack", everyone(tmp_path, server.url)), report_url="https://ci.example/runs")
    tell(config, root, [verdict(Verdict.PASS, "pod_kill"), verdict(Verdict.FAIL)])
    (sent,) = server.requests
    assert sent.body["text"] == "Game day on gameday-sandbox v1.32: 1 FAIL · 1 PASS"
    header, bad, good, foot = sent.body["blocks"]
    assert header == {"type": "header", "text": {"type": "plain_text", "text": sent.body["text"]}}
    link = "https://ci.example/runs/20261124-090000-7419"
    assert bad["text"]["text"].startswith(f":x: *FAIL* <{link}/zone_outage/report.html|zone_outage>\n")
    assert "first token p95 ≤ 2.5 s · was 3.10 s" in bad["text"]["text"]
    assert "reproduce: pytest experiments -k zone_outage --seed 7419```" in bad["text"]["text"]
    assert good["text"]["text"] == ":white_check_mark: *PASS* pod_kill · back after 3.17 s (3.14–3.37)"
    assert foot["elements"][0]["text"].startswith(f"<{link}/index.html|20261124-090000-7419> · seed 7419 · target http")


def test_slack_gets_no_more_than_it_takes(root: Path) -> None:
    many = [verdict(Verdict.FAIL, f"experiment_{i}", EVIL + "&" * 5000) for i in range(70)]
    many.append(verdict(Verdict.PASS, "pod_kill"))
    body = slack.body(gather(root, many, cluster="c" * 300, report_url="", regressed=["&" * 4000]))
    assert len(body["blocks"]) == 50
    assert len(body["blocks"][0]["text"]["text"]) <= 150
    texts = [b["text"]["text"] for b in body["blocks"] if b["type"] == "section"]
    assert all(0 < len(text) <= 3000 for text in texts)
    assert "… and 25 more" in texts
    assert all(text.count("```") in (0, 2) for text in texts)
    assert "<!channel>" not in json.dumps(body) and "<https://evil" not in json.dumps(body)


def test_slack_quiet_says_nothing_when_all_is_well(tmp_path: Path, server: Server, root: Path) -> None:
    config = replace(only("slack", everyone(tmp_path, server.url)), slack_quiet=True)
    assert tell(config, root, [verdict(Verdict.PASS)]) == ()
    assert tell(config, root, [verdict(Verdict.PASS), verdict(Verdict.INCONCLUSIVE, "pod_kill")])[0].ok
    assert tell(config, root, [])[0].ok  # a game day without experiments is no good news
    assert "no experiment ran" in server.requests[-1].body["text"]
    assert len(server.requests) == 2


def test_a_regression_is_told_though_every_verdict_is_pass(tmp_path: Path, server: Server, root: Path) -> None:
    config = everyone(tmp_path, server.url, slack_quiet=True)
    tell(config, root, [verdict(Verdict.PASS)], regressed=["zone_outage: recovery 9 s · <noise> up to 4 s"])
    (said,) = [r.body for r in server.requests if "blocks" in r.body]
    assert "1 REGRESSED" in said["text"]
    assert "zone_outage: recovery 9 s · &lt;noise&gt; up to 4 s" in str(said["blocks"])
    (document,) = [r.body for r in server.requests if "experiments" in r.body]
    assert document["regressed"] == ["zone_outage: recovery 9 s · <noise> up to 4 s"]
    assert [r.body["event_action"] for r in server.requests if "event_action" in r.body] == ["resolve"]


def test_pagerduty_is_triggered_by_fail_and_error_and_resolved_by_pass(
    tmp_path: Path, server: Server, root: Path
) -> None:
    config = only("pagerduty", everyone(tmp_path, server.url))
    for of in (Verdict.FAIL, Verdict.ERROR, Verdict.INCONCLUSIVE, Verdict.PASS):
        tell(config, root, [verdict(of)])
    fail, error, passed = (r.body for r in server.requests)
    assert (fail["event_action"], fail["payload"]["severity"]) == ("trigger", "error")
    assert (error["event_action"], error["payload"]["severity"]) == ("trigger", "critical")
    assert passed == {"routing_key": SECRETS["pagerduty"], "event_action": "resolve", "dedup_key": fail["dedup_key"]}
    assert fail["dedup_key"] == error["dedup_key"] == "gameday/gameday-sandbox v1.32/zone_outage"
    payload = fail["payload"]
    assert payload["summary"].startswith("FAIL zone_outage on gameday-sandbox v1.32: during: first token p95 ≤ 2.5 s")
    assert payload["source"] == "gameday-sandbox v1.32" and payload["component"] == "zone_outage"
    assert payload["group"] == "llm" and payload["class"] == "game day"
    assert payload["custom_details"]["reproduce"] == "pytest experiments -k zone_outage --seed 7419"
    assert payload["custom_details"]["recovery"]["seconds"] == pytest.approx(3.167, abs=0.01)


def test_pagerduty_gets_no_more_than_it_takes(tmp_path: Path, server: Server, root: Path) -> None:
    tell(only("pagerduty", everyone(tmp_path, server.url)), root, [verdict(Verdict.FAIL, "x" * 300, "y" * 2000)])
    (sent,) = server.requests
    assert len(sent.body["dedup_key"]) <= 255 and len(sent.body["payload"]["summary"]) <= 1024
    assert dedup_key("a" * 300) != dedup_key("a" * 301)


def test_one_key_per_experiment_and_cluster_even_when_it_never_began(
    tmp_path: Path, server: Server, root: Path
) -> None:
    config = replace(only("pagerduty", everyone(tmp_path, server.url)), cluster="prod")
    tell(config, tmp_path / "none", [verdict(Verdict.ERROR)])
    tell(config, root, [verdict(Verdict.PASS), verdict(Verdict.PASS, "pod_kill")])
    keys = [r.body["dedup_key"] for r in server.requests]
    assert keys[0] == "gameday/prod/zone_outage"
    assert sorted(keys[1:]) == ["gameday/prod/pod_kill", "gameday/prod/zone_outage"]


def test_a_new_kubernetes_does_not_orphan_an_incident(root: Path, tmp_path: Path) -> None:
    keys = set()
    for version in ("v1.34.1", "v1.35.0"):
        about = replace(synthetic.ABOUT, cluster=f"prod, Kubernetes {version}")
        synthetic.write(tmp_path / version / "zone_outage", replace(synthetic.timeline(), about=about))
        keys.add(gather(tmp_path / version, [], cluster="", report_url="").key("zone_outage"))
    assert keys == {"gameday/prod/zone_outage"}


def test_of_trials_the_worst_counts(tmp_path: Path, server: Server, root: Path) -> None:
    tell(
        only("pagerduty", everyone(tmp_path, server.url)),
        root,
        [verdict(Verdict.PASS), verdict(Verdict.FAIL), verdict(Verdict.PASS)],
    )
    (sent,) = server.requests
    assert sent.body["event_action"] == "trigger"


def test_the_link_leads_to_the_trial_that_counts(tmp_path: Path, root: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(root / "zone_outage", run / "zone_outage")
    shutil.copytree(root / "zone_outage", run / "zone_outage.2")
    failed = verdict(Verdict.FAIL)
    record.write_verdict(run / "zone_outage.2", failed)
    (item,) = gather(run, [synthetic.judgement(), failed], cluster="", report_url="https://ci.example/r/").items
    assert item.verdict is Verdict.FAIL
    assert item.link == "https://ci.example/r/run/zone_outage.2/report.html"


def test_a_webhook_gets_the_figures(tmp_path: Path, server: Server, root: Path) -> None:
    tell(only("webhook", everyone(tmp_path, server.url)), root, [verdict(Verdict.FAIL)])
    (sent,) = server.requests
    assert sent.headers["Idempotency-Key"] == "gameday-20261124-090000-7419"
    assert {k: sent.body[k] for k in ("version", "run", "cluster", "namespace", "verdict")} == {
        "version": 1, "run": "20261124-090000-7419", "cluster": "gameday-sandbox v1.32", "namespace": "llm",
        "verdict": "FAIL",
    }  # fmt: skip
    (one,) = sent.body["experiments"]
    assert one["verdict"] == "FAIL" and one["seed"] == 7419 and one["counts"]["planned"] == 6886
    assert one["reasons"] == ["during: first token p95 ≤ 2.5 s · was 3.10 s · 3.10 s, worst 14:02"]


def test_grafana_marks_the_fault_s_window(tmp_path: Path, server: Server, root: Path) -> None:
    config = replace(only("grafana", everyone(tmp_path, server.url)), grafana_dashboard="gameday-llm")
    tell(config, root, [])
    (sent,) = server.requests
    assert sent.headers["Authorization"] == f"Bearer {SECRETS['grafana']}"
    wall = synthetic.ABOUT.epoch_wall - synthetic.ABOUT.epoch_mono
    assert sent.body == {
        "time": round((wall + synthetic.F) * 1000),
        "timeEnd": round((wall + synthetic.UNDO + 1.5) * 1000),  # seen to be gone
        "tags": ["gameday", "zone_outage", "PASS"],
        "text": "zone b is gone: 2 engines and 1 gateway on 2 nodes: PASS (seed 7419)",
        "dashboardUID": "gameday-llm",
    }


def test_grafana_marks_nothing_where_nothing_was_broken(tmp_path: Path, server: Server) -> None:
    made = synthetic.timeline()
    calm = replace(made, events=tuple(e for e in made.events if e.kind != "fault"))
    synthetic.write(tmp_path / "run" / "zone_outage", calm)
    assert tell(only("grafana", everyone(tmp_path, server.url)), tmp_path / "run", []) == ()


def test_a_one_shot_s_window_ends_when_the_service_was_back(tmp_path: Path) -> None:
    made = synthetic.timeline()
    kept = tuple(e for e in made.events if e.kind != "fault" or getattr(e, "step", "") in ("apply", "effect"))
    synthetic.write(tmp_path / "run" / "pod_kill", replace(made, events=kept))
    (entry,) = gather(tmp_path / "run", [], cluster="", report_url="").entries
    seen = grafana.region(entry)
    assert seen is not None
    assert seen.end - seen.start == pytest.approx(synthetic.BACK - synthetic.F, abs=0.3)


def test_a_broken_record_is_shown_beside_a_good_one(tmp_path: Path, server: Server, root: Path) -> None:
    shutil.copytree(root / "zone_outage", tmp_path / "run" / "zone_outage")
    shutil.copytree(root / "zone_outage", tmp_path / "run" / "broken")
    (tmp_path / "run" / "broken" / "events.jsonl").write_text("no json\n")
    told = tell(only("grafana", everyone(tmp_path, server.url)), tmp_path / "run", [])
    assert sorted((d.to, d.ok) for d in told) == [("Grafana: broken", False), ("Grafana: zone_outage", True)]
    assert len(server.requests) == 1


# ── servers that misbehave ──────────────────────────────────────────────────────────────────────


def told_one(channel: str, tmp_path: Path, url: str, root: Path, **more: Any) -> Delivery:
    (told,) = tell(only(channel, everyone(tmp_path, url, **more)), root, [verdict(Verdict.FAIL)])
    return told


@pytest.mark.parametrize("channel", ["slack", "pagerduty", "webhook", "grafana"])
def test_a_busy_server_is_asked_again(tmp_path: Path, root: Path, channel: str) -> None:
    with serving(429, 503, 200) as server:
        told = told_one(channel, tmp_path, server.url, root)
    assert told.ok and told.attempts == 3
    assert len(server.requests) == 3
    assert server.requests[0].body == server.requests[2].body


@pytest.mark.parametrize(
    ("status", "tries", "said"),
    [
        (500, 3, "answered 500 Internal Server Error"),
        (400, 1, "answered 400 Bad Request"),
        (403, 1, "answered 403 Forbidden: the address or the token is wrong, or was revoked"),
        (299, 1, "message sent"),
        (799, 3, "answered 799"),
    ],
)
def test_what_a_server_answers_is_told(tmp_path: Path, root: Path, status: int, tries: int, said: str) -> None:
    with serving(status) as server:
        told = told_one("webhook", tmp_path, server.url, root)
    assert (told.ok, told.detail, told.attempts) == (status < 300, said, tries)
    assert len(server.requests) == tries


def test_what_cannot_be_told_apart_is_not_sent_twice(tmp_path: Path, root: Path, impatient: None) -> None:
    """A message that may have arrived is not repeated where it would be shown twice."""
    with serving(delay=30) as server:
        assert told_one("slack", tmp_path, server.url, root).attempts == 1
    with serving(500) as server:
        assert told_one("grafana", tmp_path, server.url, root).attempts == 1
    with serving(delay=30) as server:
        told = told_one("pagerduty", tmp_path, server.url, root)
    assert told.attempts == 3 and told.detail == "did not answer within 0.5 s"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(tmp_path: Path, server: Server, root: Path, status: int) -> None:
    with serving(status, headers={"Location": f"{server.url}/elsewhere"}) as first:
        for channel in ("slack", "pagerduty", "webhook", "grafana"):
            told = told_one(channel, tmp_path, first.url, root)
            assert not told.ok and "not followed" in told.detail
    assert len(first.requests) == 4
    assert server.requests == []


def test_nobody_there(tmp_path: Path, root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refused
        told = told_one("slack", tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}", root)
    assert (told.ok, told.attempts) == (False, 3)
    assert told.detail == "cannot be reached: check the address and the network"
    assert told.line.startswith("NOT TOLD  Slack  cannot be reached")


def test_the_environment_s_proxy_is_used(
    tmp_path: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    assert told_one("slack", tmp_path, "http://hooks.invalid", root).ok
    assert server.requests[0].path.startswith("http://hooks.invalid/services/")
    monkeypatch.setenv("no_proxy", "hooks.invalid")
    assert not told_one("slack", tmp_path, "http://hooks.invalid", root).ok
    assert len(server.requests) == 1


def test_netrc_does_not_fight_the_token(
    tmp_path: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert told_one("grafana", tmp_path, server.url, root).ok
    assert server.requests[0].headers["Authorization"] == f"Bearer {SECRETS['grafana']}"


def test_a_server_that_hangs_up_or_speaks_something_else(tmp_path: Path, root: Path) -> None:
    for answer in (b"", b"220 smtp.example ESMTP\r\n"):
        with _raw(answer) as url:
            told = told_one("slack", tmp_path, url, root)
        assert not told.ok and told.detail.startswith("broke the connection off"), told


def test_no_tls_where_tls_is_asked_for(tmp_path: Path, root: Path) -> None:
    with _raw(b"HTTP/1.1 200 OK\r\n\r\n") as url:
        told = told_one("webhook", tmp_path, url.replace("http", "https"), root)
    assert not told.ok
    assert "TLS" in told.detail or "reached" in told.detail


@contextmanager
def _raw(answer: bytes) -> Iterator[str]:
    """Reads what comes, answers with these bytes, hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5)

        def work() -> None:
            while True:
                try:
                    peer, _ = listening.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(65536)
                    peer.sendall(answer)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_a_server_that_drips_is_given_up(tmp_path: Path, root: Path, impatient: None) -> None:
    """A byte now and then resets timeouts of single reads; ours is for the whole answer."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            peer, _ = listening.accept()
            with peer:
                while not stop.wait(0.05):
                    try:
                        peer.sendall(b"H")
                    except OSError:
                        return

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        began = time.monotonic()
        told = told_one("slack", tmp_path, f"http://127.0.0.1:{listening.getsockname()[1]}", root)
        stop.set()
        thread.join(5)
    assert not told.ok
    assert time.monotonic() - began < 3


def test_all_of_them_together_are_bounded(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "ANSWER_WITHIN", 60.0)
    many = [verdict(Verdict.FAIL, f"experiment_{i}") for i in range(20)]
    with serving(delay=60) as server:
        began = time.monotonic()
        told = tell(everyone(tmp_path, server.url, within=0.5), root, many)
        took = time.monotonic() - began
    assert took < 5
    assert len(told) == 23
    assert {(d.ok, d.detail) for d in told} == {(False, "no answer within 0.5 s")}


def test_retry_after_is_heeded_and_bounded(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "LONGEST_PAUSE", 0.2)
    for asked, least in (("86400", 0.2), ("0", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)):
        with serving(429, 200, headers={"Retry-After": asked}) as server:
            began = time.monotonic()
            assert told_one("slack", tmp_path, server.url, root).ok
        assert least <= time.monotonic() - began < 5


# ── configuration and secrets ───────────────────────────────────────────────────────────────────


def test_a_secret_may_come_from_the_environment(
    tmp_path: Path, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLACK_HOOK", f"{server.url}/services/x")
    (told,) = tell(Notify(slack_webhook_env="SLACK_HOOK"), root, [verdict(Verdict.FAIL)])
    assert told.ok
    (told,) = tell(Notify(slack_webhook_env="NO_SUCH_HOOK"), root, [verdict(Verdict.FAIL)])
    assert told == Delivery("Slack", False, "the environment variable NO_SUCH_HOOK is empty or not set", 0)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty or not set"),
        (f"ftp://x/{SECRET}".encode(), "does not hold an http or https address"),
        (f"http://[::{SECRET}".encode(), "does not hold an http or https address"),
        (f"http://h/a\nhttp://h/{SECRET}".encode(), "does not hold one word of plain characters"),
        (f"http://h/{SECRET}".encode() + b"\xff", "is not text"),
        (f"http://h:99999/{SECRET}".encode(), "does not hold an http or https address"),
    ],
)
def test_a_secret_that_cannot_be_used_is_named_by_its_place(
    tmp_path: Path, root: Path, held: bytes | None, said: str
) -> None:
    path = tmp_path / "hook"
    if held is not None:
        path.write_bytes(held)
    (told,) = tell(Notify(slack_webhook_file=path), root, [verdict(Verdict.FAIL)])
    assert not told.ok and told.detail == f"the file {path} {said}"
    assert SECRET not in told.line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"grafana_url": "https://g"}, "Grafana needs both"),
        ({"grafana_token_env": "T"}, "Grafana needs both"),
        ({"grafana_url": f"https://u:{SECRET}@g", "grafana_token_env": "T"}, "secrets belong into a file"),
        ({"report_url": f"{SECRET} nowhere"}, "report_url is not a URL"),
        ({"slack_webhook_env": "A", "slack_webhook_file": Path("b")}, "both set"),
        ({"within": 0}, "within must be above 0 s"),
        ({"attempts": 0}, "attempts above 0"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        Notify(**wrong)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("kind", ["well", "failing", "redirecting", "slow", "nobody"])
def test_no_secret_is_shown_anywhere(
    tmp_path: Path,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Every place a secret could leak to, with servers that repeat what they were sent."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / "secrets").mkdir()
    run = tmp_path / "runs" / root.name
    shutil.copytree(root, run)
    ways: dict[str, dict[str, Any]] = {
        "well": {},
        "failing": {"statuses": (500,)},
        "redirecting": {"statuses": (302,), "headers": {"Location": f"/{SECRET}"}},
        "slow": {"delay": 30.0},
        "nobody": {},
    }
    how = ways[kind]
    if kind == "slow":
        monkeypatch.setattr(post, "ANSWER_WITHIN", 0.5)
    with serving(*how.pop("statuses", ()), **how) as server:
        url = "http://127.0.0.1:1" if kind == "nobody" else server.url
        config = everyone(tmp_path / "secrets", url)
        told = tell(config, run, [verdict(Verdict.FAIL)])
    assert len(told) == 4 and all(d.ok == (kind == "well") for d in told)
    sent = json.dumps([r.body for r in server.requests])
    assert sent.count(SECRET) == sent.count(SECRETS["pagerduty"])  # PagerDuty wants its key in the body
    out = capfd.readouterr()
    shown = [out.out, out.err, caplog.text, repr(told), repr(config), *(d.line for d in told)]
    shown += [path.read_text(encoding="utf-8", errors="replace") for path in run.rglob("*") if path.is_file()]
    assert len(shown) > 10
    assert not any(SECRET in text for text in shown)


def test_telling_changes_no_record(tmp_path: Path, root: Path) -> None:
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with serving(500) as server:
        judged = verdict(Verdict.PASS)
        told = tell(everyone(tmp_path, server.url), root, [judged])
    assert not any(d.ok for d in told)
    assert judged.verdict is Verdict.PASS
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_a_gate_that_is_closed_is_told_though_every_verdict_is_pass(tmp_path: Path, server: Server, root: Path) -> None:
    """A baseline that cannot be read, or --gate-strict: pytest was red, and Slack said nothing."""
    config = everyone(tmp_path, server.url, slack_quiet=True)
    tell(config, root, [verdict(Verdict.PASS)], closed="gate CLOSED: runs/<1> cannot be read")
    (said,) = [r.body for r in server.requests if "blocks" in r.body]
    assert "gate CLOSED" in said["text"] and "gate CLOSED: runs/&lt;1&gt; cannot be read" in str(said["blocks"])
    (document,) = [r.body for r in server.requests if "experiments" in r.body]
    assert document["closed"] == "gate CLOSED: runs/<1> cannot be read"
