"""`gameday load worker`: lend this machine to a leader elsewhere, one run after the other.

The leader sends a job and the plan; Locust runs here as it does under a leader of its own, and what it records goes
back while it is recorded. API keys and the target's CA are this machine's own: a leader cannot name files here.
A leader that is silent is gone, and its load ends.
"""

from __future__ import annotations

import hashlib
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gameday.errors import LoadError
from loadgen import launch, records, wire as wire_
from loadgen.check import every_kind
from loadgen.plan import Plan

LEADER_SILENT = 10.0
"""Seconds without a word after which the leader is gone."""
STATUS_EVERY = 0.2
PLAN_MAX = 1 << 30
PART = 1 << 19
"""Bytes of records in one frame (JSON in JSON: quotes double)."""
JOB = {"target", "model", "worker", "workers", "served_by", "served_zone", "served_via", "headers", "silent_after"}


@dataclass(frozen=True, slots=True)
class Own:
    """What this machine keeps to itself."""

    api_key_file: Path | None = None
    api_key_env: str | None = None
    ca_file: Path | None = None
    metrics_port: int = 0  # 0: none
    metrics_address: str = "127.0.0.1"


@dataclass(slots=True)
class Stop:
    """Set by signals: an attribute only, since a handler must not take a lock (docs/adr/0003)."""

    by: str = ""

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _: object) -> None:
        self.by = signal.Signals(number).name


def serve(
    listen: str,
    token_file: Path,
    say: Callable[[str], None],
    *,
    own: Own | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    once: bool = False,
    stop: Stop | None = None,
) -> None:
    """Serve leaders until SIGTERM or SIGINT (or, with `once`, one leader). Raises LoadError before it listens."""
    token = wire_.read_token(token_file)
    host, port = wire_.split(listen)
    context = _context(cert, key)
    stop = stop or Stop()
    try:
        door = socket.create_server((host, port))
    except OSError as e:
        raise LoadError(f"cannot listen on {listen}: {e.strerror or e}") from e
    with door:
        door.settimeout(0.2)
        stop.listen()
        clear = "" if context or wire_.loopback(host) else " (without TLS: records and prompts travel in the clear)"
        say(f"load worker listens on {host}:{door.getsockname()[1]}{clear}")
        while not stop.by:
            try:
                sock, peer = door.accept()
            except TimeoutError:
                continue
            served = _meet(sock, context, f"{peer[0]}:{peer[1]}", token, own or Own(), door, stop, say)
            if served and once:
                return


def _context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as e:
        raise LoadError(f"the certificate {cert} cannot be used: {e}") from e
    return context


def _meet(
    sock: socket.socket,
    context: ssl.SSLContext | None,
    peer: str,
    token: str,
    own: Own,
    door: socket.socket,
    stop: Stop,
    say: Callable[[str], None],
) -> bool:
    """One leader, from the handshake to the end; tells whether it was one."""
    wire: wire_.Wire | None = None
    known = False
    try:
        sock.settimeout(wire_.HELLO_WITHIN)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = context.wrap_socket(sock, server_side=True) if context else sock
        wire = wire_.Wire(sock)
        wire_.greet(wire, token)
        known = True
        with tempfile.TemporaryDirectory(prefix="gameday-load-") as room:
            _Session(wire, Path(room), own, door, stop).run()
        say(f"leader {peer}: done")
    except wire_.Gone as e:
        say(f"leader {peer} {e}")
    except OSError as e:
        say(f"leader {peer}: {e.strerror or e}")
    except (TypeError, ValueError) as e:
        say(f"leader {peer} does not speak our language: {e}")
    except LoadError as e:
        say(f"leader {peer}: {e}")
        if wire is not None:
            with suppress(wire_.Gone):
                wire.send({"error": str(e)})
    finally:
        sock.close()
    return known


class _Tail:
    """The whole lines that a file has gained."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self.lines = 0

    def read(self) -> str:
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read(PART)
        except FileNotFoundError:
            return ""
        data = data[: data.rfind(b"\n") + 1]
        self._at += len(data)
        self.lines += data.count(b"\n")
        return data.decode()


@dataclass(slots=True)
class _Ending:
    """`Load.stop` in a thread, while the records go on flowing."""

    load: launch.Load
    within: float
    error: str = ""
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._stop, name="ending", daemon=True)
        self.thread.start()

    def _stop(self) -> None:
        try:
            self.load.stop(self.within)
        except LoadError as e:
            self.error = str(e)


class _Session:
    def __init__(self, wire: wire_.Wire, room: Path, own: Own, door: socket.socket, stop: Stop) -> None:
        self._wire = wire
        self._room = room
        self._own = own
        self._door = door
        self._stop = stop
        self._heard = time.monotonic()
        self._ending: _Ending | None = None
        self._begun = False

    def run(self) -> None:
        """Raises LoadError for what the leader should know, Gone when it is gone."""
        job, plan = self._order()
        given = {name: value for name, value in job.items() if name not in ("worker", "workers")}
        own = self._own
        every_kind(
            Plan.read(plan),
            job["target"],
            job["model"],
            headers=job["headers"],
            api_key_file=own.api_key_file,
            api_key_env=own.api_key_env,
            ca_file=own.ca_file,
        )
        load = launch.start(
            plan,
            out=self._room,
            workers=1,
            number=int(job["worker"]),
            of=int(job["workers"]),
            api_key_file=own.api_key_file,
            api_key_env=own.api_key_env,
            ca_file=own.ca_file,
            metrics_port=own.metrics_port,
            metrics_address=own.metrics_address,
            **given,
        )
        tails = {
            "replies": _Tail(records.replies_path(self._room, job["worker"])),
            "load": _Tail(records.load_path(self._room, job["worker"])),
        }
        try:
            self._heard = time.monotonic()
            self._wire.send({"ready": True})
            self._follow(load, tails)
        finally:
            if self._ending is None or self._ending.thread.is_alive():
                load.kill()  # the leader is gone: its load must not go on
            if self._ending is not None:
                self._ending.thread.join()

    def _order(self) -> tuple[dict[str, Any], Path]:
        """The job and the plan, as the leader sends them first."""
        job: dict[str, Any] | None = None
        path, digest, size = self._room / "plan.json", hashlib.sha256(), 0
        with path.open("wb") as file:
            while time.monotonic() - self._heard < LEADER_SILENT:
                for came, message in self._wire.receive(0.2):
                    self._heard = came
                    if "job" in message:
                        job = _checked(message["job"])
                    elif "plan" in message and job is not None:
                        part = str(message["plan"]).encode()
                        size += len(part)
                        if size > PLAN_MAX:
                            raise LoadError(f"a plan of more than {PLAN_MAX} bytes is not taken")
                        digest.update(part)
                        file.write(part)
                    elif "planned" in message and job is not None:
                        if message["planned"] != digest.hexdigest():
                            raise LoadError("the plan did not arrive as it was sent")
                        return job, path
                    else:
                        raise LoadError("a job and a plan come first")
        raise wire_.Gone("gave no job")

    def _follow(self, load: launch.Load, tails: dict[str, _Tail]) -> None:
        status_at = 0.0
        while True:
            for came, message in self._wire.receive(0.02):
                self._heard = came
                self._obey(load, message, came)
            now = time.monotonic()
            if now - self._heard > LEADER_SILENT:
                raise wire_.Gone(f"said nothing for {LEADER_SILENT:g} s")
            over = self._ending is not None and not self._ending.thread.is_alive()  # before the last look at the files
            if self._ending is None and now >= status_at:
                tail = load.poll()
                self._wire.send({"in_flight": tail.in_flight, "silent": tail.silent})
                status_at = now + STATUS_EVERY
                self._watch(load)
            moved = False
            for kind, tail_ in tails.items():
                if text := tail_.read():
                    self._wire.send({kind: text})
                    moved = True
            if over and not moved:
                assert self._ending is not None
                if self._ending.error:
                    raise LoadError(self._ending.error)
                self._wire.send({"ended": {kind: tail_.lines for kind, tail_ in tails.items()}})
                return

    def _watch(self, load: launch.Load) -> None:
        if self._stop.by:
            raise LoadError(f"its machine stopped it ({self._stop.by})")
        if not load.alive():
            raise LoadError("its Locust process ended")
        with suppress(TimeoutError, OSError):  # one leader at a time
            self._door.settimeout(0)
            other, _ = self._door.accept()
            with other, suppress(wire_.Gone):
                wire_.Wire(other).send({"error": "serves another leader"})
        self._door.settimeout(0.2)

    def _obey(self, load: launch.Load, message: dict[str, Any], came: float) -> None:
        if "ping" in message:
            self._wire.send({"ping": message["ping"], "got": came, "answered": time.monotonic()})
        elif "begin" in message and not self._begun:
            self._begun = True
            load.begin(float(message["begin"]))
        elif "stop" in message and self._ending is None:
            self._ending = _Ending(load, float(message["stop"]))
        else:
            raise LoadError(f"it was told what it does not know: {str(message)[:80]}")


def _checked(job: object) -> dict[str, Any]:
    if not isinstance(job, dict) or set(job) != JOB:
        raise LoadError("the leader's version differs from the worker's: its job has other fields")
    if not (type(job["worker"]) is int and type(job["workers"]) is int and 0 <= job["worker"] < job["workers"]):
        raise LoadError("the leader's job has no worker's number")
    if not isinstance(job["headers"], dict):
        raise LoadError("the leader's job has no headers")
    return job
