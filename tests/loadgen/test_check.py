"""The one-token check, and the kinds of endpoint: keys, TLS, completions, answers in one piece."""

from __future__ import annotations

import datetime
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).parent))
from openai_server import Server

from gameday import clock
from gameday.errors import LoadError
from gameday.model import Outcome, Reply
from loadgen import launch, selftest
from loadgen.check import one_token
from loadgen.misbehave import HEAD, Failing, chunk, event
from loadgen.plan import make
from loadgen.traffic import Stream, Traffic, fixed


@pytest.fixture(scope="module")
def cert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    ip = x509.IPAddress(__import__("ipaddress").ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([ip]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "cert.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_good_target(tmp_path: Path) -> None:
    with Server() as url:
        reply = one_token(url + "/v1", "tiny")
        assert reply.ok
        assert reply.got_done
        assert reply.tokens == 1
        assert reply.pod == "pod-1"
        assert reply.ttft is not None
        assert one_token(url, "tiny", api="completions").ok
        with pytest.raises(LoadError, match=r"has no model 'huge'.*404"):
            one_token(url, "huge")


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sesame\n")
    monkeypatch.setenv("GAMEDAY_TEST_KEY", "sesame")
    with Server(key="sesame") as url:
        assert one_token(url, "tiny", api_key_file=tmp_path / "key").ok
        assert one_token(url, "tiny", api_key_env="GAMEDAY_TEST_KEY").ok
        with pytest.raises(LoadError, match=r"refuses us \(401\): check the API key"):
            one_token(url, "tiny")


def test_an_odd_target_is_one_sentence() -> None:
    """Each in its time, however it drips; and what is odd but right is good."""
    good = chunk(event("a")) + chunk(event(None, "stop")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    assert _ask_raw(hint + HEAD + good).tokens == 1
    for data, says in (
        (
            b"HTTP/1.1 308 Moved\r\nLocation: https://there/\r\nContent-Length: 0\r\n\r\n",
            "redirection to https://there/",
        ),
        (b"HTTP/1.1 403 No\r\nContent-Length: 4\r\n\r\nnope", r"refuses us \(403\): check the API key: nope"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 99\r\n\r\nnope", r"refuses us \(401\)"),  # and closes
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ndata: ", "closed the connection in the middle"),
        (b"", "closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "not an HTTP answer"),
        (HEAD + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n", "without finish_reason"),
        (HEAD + chunk(b'data: {"error":{"message":"CUDA"}}\n\n') + b"0\r\n\r\n", "reports an error: CUDA"),
    ):
        with pytest.raises(LoadError, match=says):
            _ask_raw(data)

    def drip(server: Failing, conn: socket.socket) -> None:
        for byte in HEAD:
            conn.sendall(bytes([byte]))
            server.pause(0.05)

    server = Failing(drip)
    try:
        with pytest.raises(LoadError, match=r"did not answer within 0\.5 s"):
            one_token(f"http://127.0.0.1:{server.port}", "tiny", within=0.5)
    finally:
        server.close()


def _ask_raw(data: bytes) -> Reply:
    def way(server: Failing, conn: socket.socket) -> None:
        conn.sendall(data)
        conn.close()

    server = Failing(way)
    try:
        return one_token(f"http://127.0.0.1:{server.port}", "tiny", within=10)
    finally:
        server.close()


def test_answers_in_one_piece_are_checked_as_such(tmp_path: Path) -> None:
    with Server() as url:
        reply = one_token(url, "tiny", stream=False)
    assert (reply.ok, reply.tokens, reply.finish_reason, reply.got_done) == (True, 1, "length", False)


def test_nobody_there_and_not_http() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(LoadError, match="cannot be reached"):
            one_token(f"http://127.0.0.1:{bound.getsockname()[1]}", "tiny")
        bound.listen()
        with pytest.raises(LoadError, match=r"did not answer within 0\.2 s"):
            one_token(f"http://127.0.0.1:{bound.getsockname()[1]}", "tiny", within=0.2)
    with pytest.raises(LoadError, match="not a URL"):
        one_token("127.0.0.1:80", "tiny")


def _run(url: str, out: Path, streams: tuple[Stream, ...], ca: Path | None = None) -> list[Reply]:
    plan = make(Traffic(streams=streams), 1, 1.0)
    plan.write(out / "plan.json")
    load = launch.start(out / "plan.json", target=url, model="tiny", out=out, ca_file=ca)
    load.begin(clock.now())
    replies: list[Reply] = []

    def over() -> bool:
        replies.extend(load.poll().replies)
        return len(replies) == len(plan)

    clock.wait_until(over, within=15, what="every reply")
    load.stop(within=1)
    return replies


def _stream(name: str, **more: object) -> Stream:
    given: dict[str, object] = {"name": name, "per_second": 20, "prompt": fixed(2000), "output": fixed(4), **more}
    return Stream(**given)  # type: ignore[arg-type]


def test_tls_completions_and_whole_answers(cert: Path, tmp_path: Path) -> None:
    streams = (
        _stream("chat"),
        _stream("talk", turns=2, think=0.1),
        _stream("text", api="completions"),
        _stream("whole", stream=False),
        _stream("whole text", stream=False, api="completions", fresh="always"),
    )
    with Server(cert=cert) as url:
        assert one_token(url, "tiny", ca_file=cert).ok
        with pytest.raises(LoadError, match=r"TLS with .* failed: self-signed certificate; name the CA"):
            one_token(url, "tiny")
    with Server() as plain, pytest.raises(LoadError, match=r"TLS with .* failed: \S+$"):
        one_token(plain.replace("http:", "https:"), "tiny")
    with Server(cert=cert) as url:
        replies = _run(url, tmp_path, streams, cert)
        assert {r.outcome for r in replies} == {Outcome.OK}
        assert {r.cls for r in replies} == {"chat", "talk", "text", "whole", "whole text"}
        assert all(r.completion_tokens == r.tokens == 4 for r in replies)
        assert any(r.conn_reused for r in replies)
        (tmp_path / "2").mkdir()
        untrusting = _run(url, tmp_path / "2", streams[:1])
    assert {r.outcome for r in untrusting} == {Outcome.TLS}


@pytest.mark.parametrize("stream", [True, False])
def test_later_turns_repeat_the_servers_answers_when_told_so(tmp_path: Path, stream: bool) -> None:
    """Arrivals never wait: of an answer that came too late, or not at all, the plan's text is repeated."""
    session = {"turns": 3, "think": 0.1, "output": fixed(4), "stream": stream, "per_second": 60}
    streams = (_stream("real", history="answers", **session), _stream("planned", **session))
    with Server() as url:
        replies = _run(url, tmp_path, streams)
    said = {name: Counter(r.via for r in replies if r.cls == name and r.via) for name in ("real", "planned")}
    assert {r.outcome for r in replies} == {Outcome.OK}
    assert set(said["planned"]) == {"the service keeps its"}
    assert said["real"]["word word word word"] > 0
    assert set(said["real"]) <= {"word word word word", "the service keeps its"}
    assert said["real"]["the service keeps its"] > 0  # some turns come within 40 ms, the time of an answer


def test_names_are_looked_up_and_unknown_names_are_dns(tmp_path: Path) -> None:
    with Server() as url:
        replies = _run(url.replace("127.0.0.1", "localhost"), tmp_path, (_stream("chat", fresh="always"),))
    assert {r.outcome for r in replies} == {Outcome.OK}
    assert all(r.t_dns is not None for r in replies)


def test_every_way_to_fail_is_told_apart() -> None:
    said: list[str] = []
    assert selftest.run(said.append) == 0, "\n".join(said)
    assert said[-1].startswith("13 of 13")
