"""Reaching someone else's cluster: what real API servers, plugins, proxies and token files do, each planted."""

from __future__ import annotations

import base64
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes.config import incluster_config

from gameday import clock
from gameday.censor import censored
from gameday.cluster import Cluster, Refused, Unreachable, Watched
from gameday.errors import ClusterError
from gameday.kinds import CONFIGMAPS, PODS, SERVICEACCOUNTS

SECRET = "planted-token-5f2e9c"

Answer = tuple[int, dict[str, str], Any]


class Fake:
    """An API server that answers as `plan(method, path, headers)` says, and remembers who asked."""

    def __init__(self, plan: Callable[[str, str, dict[str, str]], Answer], port: int = 0) -> None:
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.held: list[socket.socket] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake.held.append(self.connection)

            def answer(self) -> None:
                if length := int(self.headers.get("Content-Length", 0)):
                    self.rfile.read(length)
                headers = {key.lower(): value for key, value in self.headers.items()}
                fake.seen.append((self.command, self.path, headers))
                code, more, body = plan(self.command, self.path, headers)
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                for key, value in {"Content-Length": str(len(raw)), **more}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - the base class calls them so

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that hang up are part of the play

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """As when the process ends: kept-alive connections go too."""
        self.server.shutdown()
        for one in self.held:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.server.server_close()
        self._thread.join(timeout=5)


@contextmanager
def serving(plan: Callable[[str, str, dict[str, str]], Answer]) -> Iterator[Fake]:
    fake = Fake(plan)
    try:
        yield fake
    finally:
        fake.close()


def config(path: Path, server: str, user: dict[str, Any], *, context: str = "staging", **cluster: Any) -> Path:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": context, "cluster": {"server": server, **cluster}}],
                "users": [{"name": context, "user": user}],
                "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
            }
        )
    )
    return path


def connect(path: Path | str, context: str = "staging") -> Cluster:
    return Cluster.connect(context=context, kubeconfig=Path(path), namespace="llm")


def version(_: str, __: str, ___: dict[str, str]) -> Answer:
    return 200, {}, {"gitVersion": "v1.33.1"}


def knows(tokens: list[str]) -> Callable[[str, str, dict[str, str]], Answer]:
    """Answers whoever bears the last of `tokens` that was issued; 401 to all others."""

    def plan(_: str, __: str, headers: dict[str, str]) -> Answer:
        if headers.get("authorization", "").removeprefix("Bearer ").removeprefix("bearer ") in tokens:
            return 200, {}, {"gitVersion": "v1.33.1"}
        return 401, {}, {"kind": "Status", "reason": "Unauthorized", "message": "Unauthorized", "code": 401}

    return plan


# ── kubeconfig lists ────────────────────────────────────────────────────────────────────────────


def test_a_context_is_found_in_a_list_of_kubeconfigs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(version) as fake:
        first = config(tmp_path / "one", "http://127.0.0.1:9", {}, context="other")
        second = config(tmp_path / "two", fake.url, {"token": SECRET})
        both = f"{first}:{tmp_path / 'missing'}:{second}"
        assert connect(both).version() == "v1.33.1"
        monkeypatch.setenv("KUBECONFIG", both)
        assert Cluster.connect(context="staging", namespace="llm").version() == "v1.33.1"
        with pytest.raises(ClusterError, match="it has: other, staging"):
            connect(both, "prod")
    assert fake.seen[0][2]["authorization"] == f"Bearer {SECRET}"


# ── exec plugins ────────────────────────────────────────────────────────────────────────────────


def plugin(tmp_path: Path, body: str) -> dict[str, Any]:
    script = tmp_path / "plugin.py"
    script.write_text(body)
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
            "interactiveMode": "Never",
        }
    }


ISSUES = """
import json, pathlib, sys
count = pathlib.Path(__file__).with_name("count")
n = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(n))
status = {"token": f"token-{n}"}
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}))
"""


def test_an_exec_plugins_token_that_expires_in_mid_run_is_fetched_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = ["token-1"]
    with serving(knows(valid)) as fake:
        cluster = connect(config(tmp_path / "config", fake.url, plugin(tmp_path, ISSUES)))
        assert cluster.version() == "v1.33.1"
        valid[:] = ["token-2"]  # what we hold expires
        monkeypatch.setattr("gameday.login.RENEW_AFTER", 0.0)
        asked = [threading.Thread(target=cluster.version, daemon=True) for _ in range(8)]
        for thread in asked:  # many threads meet the 401: one of them runs the plugin
            thread.start()
        for thread in asked:
            thread.join(timeout=10)
        assert cluster.version() == "v1.33.1"
    assert (tmp_path / "count").read_text() == "2"


def test_credentials_that_stay_bad_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gameday.login.RENEW_AFTER", 0.0)
    with serving(knows([])) as fake:
        cluster = connect(config(tmp_path / "config", fake.url, {"token": SECRET}))
        with pytest.raises(Refused, match="does not know these credentials") as told:
            cluster.version()
        assert len(fake.seen) == 2, "once more with credentials loaded anew, and not again"
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import sys; sys.exit('the session of alice has expired')", "the session of alice has expired"),
        ("print('no json')", "failed to decode"),
        ('print(\'{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}\')', "status"),
    ],
)
def test_a_plugin_that_fails_is_no_anonymous_user(tmp_path: Path, body: str, told: str) -> None:
    with serving(version) as fake:
        with pytest.raises(ClusterError, match="cannot be had") as wrong:
            connect(config(tmp_path / "config", fake.url, plugin(tmp_path, body)))
        assert told in str(wrong.value) and "\n" not in str(wrong.value)
        assert fake.seen == []


def test_a_plugin_that_is_not_installed_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "gke-gcloud-auth-nowhere"}}
    with pytest.raises(ClusterError, match="gke-gcloud-auth-nowhere"):
        connect(config(tmp_path / "config", "http://127.0.0.1:9", user))
    assert capfd.readouterr().err == "", "the client's own logging stays quiet"


# ── token files, service accounts ───────────────────────────────────────────────────────────────


def test_a_rotated_token_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gameday.login.RENEW_AFTER", 0.0)
    token = tmp_path / "token"
    token.write_text("first")
    valid = ["first"]
    with serving(knows(valid)) as fake:
        cluster = connect(config(tmp_path / "config", fake.url, {"tokenFile": str(token)}))
        assert cluster.version() == "v1.33.1"
        valid[:] = ["second"]
        token.write_text("second")
        assert cluster.version() == "v1.33.1"


def test_a_pods_own_service_account(kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--in-cluster` against the real thing: CA, token file, and the token's rotation."""
    admin = yaml.safe_load(kubeconfig.read_text())
    server = urlsplit(admin["clusters"][0]["cluster"]["server"])
    (tmp_path / "token").write_text("a token that has expired")
    cluster = Cluster.connect(context="gameday-sandbox", kubeconfig=kubeconfig, namespace="llm")
    cluster.create(
        SERVICEACCOUNTS,
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "night", "namespace": "llm"}},
    )
    authority = admin["clusters"][0]["cluster"]
    if "certificate-authority" in authority:
        path = Path(authority["certificate-authority"])
    else:
        path = tmp_path / "ca.crt"
        path.write_bytes(base64.b64decode(authority["certificate-authority-data"]))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(path))
    monkeypatch.setattr("gameday.login.RENEW_AFTER", 0.0)
    with pytest.raises(ClusterError, match="Service host/port is not set"):
        Cluster.connect(context=None, in_cluster=True, namespace="llm")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(server.hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    inside = Cluster.connect(context=None, in_cluster=True, namespace="llm")
    with pytest.raises(Refused, match="401"):
        inside.version()
    answer = cluster.call(
        "POST",
        SERVICEACCOUNTS.path("llm", "night", "token"),
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}},
    )
    (tmp_path / "token").write_text(answer["status"]["token"])  # kubelet rotates it
    assert inside.version().startswith("v1.")
    assert not inside.can("delete", PODS, "llm"), "it is that account, with its few rights"


# ── proxies ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def tunnel() -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that knows CONNECT; tells where it was asked to go."""
    asked: list[str] = []
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        finally:
            source.close()

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            asked.append(head.decode().split("\r\n")[0])
            host, port = head.decode().split(" ")[1].split(":")
            there = socket.create_connection((host, int(port)))
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for pair in ((client, there), (there, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)
        server.close()


def through(kubeconfig: Path, path: Path, proxy: str) -> Path:
    admin = yaml.safe_load(kubeconfig.read_text())
    admin["clusters"][0]["cluster"]["proxy-url"] = proxy
    path.write_text(yaml.safe_dump(admin))
    return path


def test_a_clusters_proxy_is_used(kubeconfig: Path, tmp_path: Path) -> None:
    with tunnel() as (proxy, asked):
        cluster = connect(through(kubeconfig, tmp_path / "config", proxy), "gameday-sandbox")
        assert cluster.version().startswith("v1.")
        assert asked and asked[0].startswith("CONNECT 127.0.0.1:")


def test_a_dead_proxy_is_told_without_its_password(kubeconfig: Path, tmp_path: Path) -> None:
    dead = f"http://alice:{SECRET}@127.0.0.1:9"
    with pytest.raises(Unreachable, match="does not answer") as told:
        connect(through(kubeconfig, tmp_path / "config", dead), "gameday-sandbox").version()
    assert SECRET not in str(told.value) and "\n" not in str(told.value)


def test_tokens_and_passwords_are_censored() -> None:
    for text in (f"Authorization: Bearer {SECRET}", f"http://bob:{SECRET}@proxy:80/", f'{{"token": "{SECRET}"}}'):
        assert SECRET not in censored(text) and "***" in censored(text)
    assert censored("pods is forbidden in llm") == "pods is forbidden in llm"


# ── throttling, restarts, old versions ──────────────────────────────────────────────────────────


def test_throttling_is_waited_out_as_long_as_the_server_asks(tmp_path: Path) -> None:
    left = [2]

    def plan(*_: Any) -> Answer:
        if left[0]:
            left[0] -= 1
            return 429, {"Retry-After": "1"}, b"Too many requests, please try again later."
        return 201, {}, {"metadata": {"name": "x"}}

    with serving(plan) as fake:
        begun = clock.now()
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": "llm"}}
        assert connect(config(tmp_path / "config", fake.url, {})).create(PODS, pod)["metadata"]["name"] == "x"
        assert clock.now() - begun >= 2
        assert [method for method, *_ in fake.seen] == ["POST"] * 3


def test_throttling_without_end_and_evictions_are_told(tmp_path: Path) -> None:
    plan: Callable[..., Answer] = lambda *_: (  # noqa: E731
        429,
        {"Retry-After": "9"},
        {"reason": "TooManyRequests", "message": "Cannot evict pod as it would violate the pod's disruption budget."},
    )
    with serving(plan) as fake:
        cluster = connect(config(tmp_path / "config", fake.url, {}))
        with pytest.raises(Refused) as told:
            cluster.version()
        assert told.value.code == 429 and len(fake.seen) == 1, "9 s are longer than we wait"
        with pytest.raises(Refused, match="disruption budget"):
            cluster.call("POST", "/api/v1/namespaces/llm/pods/x/eviction", body={})
        assert len(fake.seen) == 2


def test_a_restart_of_the_api_server_is_waited_out(tmp_path: Path) -> None:
    fake = Fake(version)
    cluster = connect(config(tmp_path / "config", fake.url, {}))
    assert cluster.version() == "v1.33.1"
    fake.close()
    back: list[Fake] = []

    def restart() -> None:
        clock.pause(0.7)
        back.append(Fake(version, fake.port))

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": "llm"}}
        assert cluster.create(PODS, pod), "a POST that was never sent may be sent again"
    finally:
        thread.join()
        back[0].close()
    assert [method for method, *_ in back[0].seen] == ["POST"], "and only once"


def test_a_server_that_never_answered_is_told_at_once(tmp_path: Path) -> None:
    begun = clock.now()
    with pytest.raises(Unreachable):
        connect(config(tmp_path / "config", "http://127.0.0.1:9", {})).version()
    assert clock.now() - begun < 3


def test_a_watch_outlives_410_and_throttling(tmp_path: Path) -> None:
    """An expired resourceVersion, in the stream and as an answer: the watch lists again and misses nothing."""
    lists, watches = [0], [0]

    def plan(_: str, path: str, __: dict[str, str]) -> Answer:
        if "watch=1" not in path:
            lists[0] += 1
            if lists[0] == 2:
                return 429, {"Retry-After": "1"}, b"Too many requests, please try again later."
            names = ["old", "new"][: 1 + (lists[0] > 2)]
            items = [{"metadata": {"name": n, "namespace": "llm", "uid": n, "resourceVersion": "1"}} for n in names]
            return 200, {}, {"metadata": {"resourceVersion": str(lists[0])}, "items": items}
        watches[0] += 1
        gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        if watches[0] == 1:
            return 200, {}, json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n"
        return 410, {}, gone

    seen: list[tuple[str, str]] = []
    stop = threading.Event()

    def note(event: Watched) -> None:
        seen.append((event.type, event.object["metadata"]["name"]))

    with serving(plan) as fake:
        cluster = connect(config(tmp_path / "config", fake.url, {}))
        thread = threading.Thread(target=cluster.watch, args=(CONFIGMAPS, "llm", note, stop), daemon=True)
        thread.start()
        clock.wait_until(lambda: lists[0] >= 4, within=15, what="lists after both kinds of 410")
        stop.set()
        thread.join(timeout=10)
    assert seen == [("ADDED", "old"), ("ADDED", "new")]
