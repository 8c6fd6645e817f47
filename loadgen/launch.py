"""Starting, following and stopping the load: Locust in processes of its own, one per worker.

    load = launch.start(plan_path, target=url, model=name, out=run_dir, workers=1)
    load.begin(clock.now() + 1)
    tail = load.poll()                  # as often as you like
    ends = load.stop(within=30)         # or LoadError naming the worker that was lost

Importing this imports neither Locust nor gevent: they never meet the caller's threads or Kubernetes client.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gameday import clock
from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd, Reply
from loadgen import records, target as target_
from loadgen.plan import Plan

READY_WITHIN = 30.0
"""Seconds for Locust to start and a worker to read its plan."""
GRACE = 5.0
"""Seconds beyond `within` for a worker to write its account and leave."""

NICE = -20
"""Priority of a worker, where we may set it: on a busy machine its own wait for a CPU would look like the service's."""

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Tail:
    """What happened since the last look. `in_flight` and `silent` are the workers' latest word:
    requests under way, and those among them that have not brought a byte for `silent_after` seconds."""

    replies: tuple[Reply, ...] = ()
    beats: tuple[Heartbeat, ...] = ()
    in_flight: int = 0
    silent: int = 0


@dataclass(slots=True, eq=False)
class _Proc:
    number: int
    process: subprocess.Popen[bytes]
    sock: socket.socket
    log: Path
    replies: records.Follower
    load: records.Follower
    buf: bytes = b""
    in_flight: int = 0
    silent: int = 0
    ended: bool = False
    end: LoadEnd | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"load worker {self.number}"


class Load:
    """Running workers. Not thread-safe: one thread leads it."""

    def __init__(self, procs: tuple[_Proc, ...]) -> None:
        self._procs = procs

    def begin(self, at: clock.Instant) -> None:
        """All workers count the plan's time from `at`."""
        for proc in self._procs:
            _tell(proc, {"begin": at})

    def alive(self) -> bool:
        """False as soon as one worker is gone."""
        return all(p.process.poll() is None for p in self._procs)

    def poll(self) -> Tail:
        """New replies and heartbeats since the last call; never waits."""
        for proc in self._procs:
            _listen(proc)
        replies = tuple(r for p in self._procs for r in p.replies.replies())
        beats: list[Heartbeat] = []
        for proc in self._procs:
            for event in proc.load.events():
                if isinstance(event, Heartbeat):
                    beats.append(event)
                else:
                    proc.end = event
        return Tail(replies, tuple(beats), sum(p.in_flight for p in self._procs), sum(p.silent for p in self._procs))

    def stop(self, within: float) -> tuple[LoadEnd, ...]:
        """Stop arrivals, wait up to `within` seconds for what is under way, censor the rest, end the workers.

        A later `poll` still gives the last replies. Raises LoadError when a worker was lost: then the run is not sound.
        """
        for proc in self._procs:
            with contextlib.suppress(LoadError):
                _tell(proc, {"stop": within})
        until = clock.now() + within + GRACE
        for proc in self._procs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                proc.process.wait(max(0.1, until - clock.now()))
        self.kill()
        return tuple(_account(p) for p in self._procs)

    def kill(self) -> None:
        """End the workers at once; their account may be missing then."""
        for proc in self._procs:
            if proc.process.poll() is None:
                proc.process.send_signal(signal.SIGKILL)
            proc.process.wait()
            proc.sock.close()


def start(
    plan_path: Path,
    *,
    target: str,
    model: str,
    out: Path,
    workers: int = 1,
    served_by: str = "x-served-by",
    served_zone: str = "x-served-zone",
    served_via: str = "x-gateway",
    api_key_file: Path | None = None,
    api_key_env: str | None = None,
    headers: Mapping[str, str] | None = None,
    ca_file: Path | None = None,
    silent_after: float = 2.0,
) -> Load:
    """Start `workers` Locust processes that have read the plan and wait for `begin`.

    Records go to `out`. Raises LoadError, before any load, for a bad plan, URL, key or CA file, and when a worker
    does not come up.
    """
    if workers < 1:
        raise LoadError(f"the load needs at least one worker, not {workers}")
    Plan.read(plan_path)
    target_.parse(target, model, headers=headers, ca_file=str(ca_file) if ca_file else None).tls()
    target_.read_key(api_key_file, api_key_env)
    out.mkdir(parents=True, exist_ok=True)
    common = {
        "plan": str(plan_path),
        "target": target,
        "model": model,
        "out": str(out),
        "workers": workers,
        "served_by": served_by,
        "served_zone": served_zone,
        "served_via": served_via,
        "headers": dict(headers or {}),
        "api_key_file": str(api_key_file) if api_key_file else None,
        "api_key_env": api_key_env,
        "ca_file": str(ca_file) if ca_file else None,
        "silent_after": silent_after,
    }
    load = Load(tuple(_spawn(n, target, out) for n in range(workers)))
    try:
        for proc in load._procs:
            _tell(proc, {"job": {**common, "worker": proc.number}})
        until = clock.now() + READY_WITHIN
        for proc in load._procs:
            _await_ready(proc, until)
    except BaseException:
        load.kill()
        raise
    return load


def _spawn(number: int, target: str, out: Path) -> _Proc:
    mine, theirs = socket.socketpair()
    for path in (records.replies_path(out, number), records.load_path(out, number)):
        path.unlink(missing_ok=True)  # never take an earlier run's records for this one's
    log = out / f"locust.{number}.log"
    command = [sys.executable, "-m", "locust", "-f", str(_ROOT / "loadgen" / "locustfile.py"), "--headless"]
    command += ["--users", "1", "--spawn-rate", "1", "--host", target, "--exit-code-on-error", "0", "--only-summary"]
    search = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)
    with theirs, log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is the harness's to handle: the load goes on until it is told
            env={**os.environ, "PYTHONPATH": search, "GAMEDAY_LOAD_FD": str(theirs.fileno())},
        )
    _first_on_cpu(process.pid)
    replies = records.Follower(records.replies_path(out, number))
    load = records.Follower(records.load_path(out, number))
    return _Proc(number, process, mine, log, replies, load)


def _first_on_cpu(pid: int) -> None:
    """Let a measuring client go first, where we may. Sessions are scheduled as groups: the group's priority counts."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


def _tell(proc: _Proc, message: Mapping[str, object]) -> None:
    try:
        proc.sock.sendall(json.dumps(message).encode() + b"\n")
    except OSError as e:
        raise _lost(proc) from e


def _lost(proc: _Proc) -> LoadError:
    code = proc.process.poll()
    how = "does not answer" if code is None else f"ended with signal {-code}" if code < 0 else f"ended with code {code}"
    return LoadError(f"{proc.name} was lost ({how}): the load is not sound; see {proc.log}")


def _listen(proc: _Proc, wait: float = 0.0) -> bool:
    """Take in what the worker has said; tells whether it may say more."""
    try:
        proc.sock.settimeout(wait or 0.0)
        data = proc.sock.recv(65536)
    except (BlockingIOError, TimeoutError):
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            proc.sock.settimeout(None)
    *lines, proc.buf = (proc.buf + data).split(b"\n")
    for line in lines:
        message = json.loads(line)
        if "in_flight" in message:
            proc.in_flight, proc.silent = message["in_flight"], message["silent"]
        else:
            proc.messages.append(message)
    return bool(data)


def _await_ready(proc: _Proc, until: float) -> None:
    while not proc.messages:
        left = until - clock.now()
        if left <= 0:
            raise LoadError(f"{proc.name} was not ready within {READY_WITHIN:.0f} s; see {proc.log}")
        if not _listen(proc, min(left, 1.0)):
            raise _lost(proc)
    message = proc.messages.pop(0)
    if "error" in message:
        raise LoadError(str(message["error"]))


def _account(proc: _Proc) -> LoadEnd:
    """The worker's own account, held against itself."""
    last = records.Follower(records.load_path(proc.log.parent, proc.number))
    try:
        ends = [e for e in last.events() if isinstance(e, LoadEnd)]
    finally:
        last.close()
    if len(ends) != 1:
        raise _lost(proc)
    end = ends[0]
    if end.planned != end.ok + end.failed + end.shed + end.censored:
        raise LoadError(f"{proc.name} planned {end.planned} requests and cannot account for all of them: {end}")
    return end
