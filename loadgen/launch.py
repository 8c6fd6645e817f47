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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gameday import clock
from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd, Reply
from loadgen import records, target as target_, wire
from loadgen.far import Far, Offset
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
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"load worker {self.number}"

    @property
    def error(self) -> str:
        """What went wrong in it, in its own words."""
        return next((str(m["error"]) for m in self.messages if "error" in m), "")


class Load:
    """Running workers, here and elsewhere. Not thread-safe: one thread leads it."""

    def __init__(self, procs: tuple[_Proc, ...], far: tuple[Far, ...] = ()) -> None:
        self._procs = procs
        self._far = far

    def begin(self, at: clock.Instant) -> None:
        """All workers count the plan's time from `at`."""
        for far in self._far:
            far.begin(at)
        for proc in self._procs:
            _tell(proc, {"begin": at})

    def alive(self) -> bool:
        """False as soon as one worker is gone, or broken."""
        here = all(p.process.poll() is None and not p.error for p in self._procs)
        return here and all(f.running for f in self._far)

    def clocks(self) -> Mapping[str, Offset]:
        """By address, how the clocks of workers elsewhere differ from ours, and how surely."""
        return {f.address: f.best for f in self._far if f.offsets}

    def poll(self) -> Tail:
        """New replies and heartbeats since the last call; never waits."""
        for proc in self._procs:
            _listen(proc)
        all_: tuple[_Proc | Far, ...] = (*self._procs, *self._far)
        replies = tuple(r for w in all_ for r in w.replies.replies())
        beats = tuple(e for w in all_ for e in w.load.events() if isinstance(e, Heartbeat))
        return Tail(replies, beats, sum(w.in_flight for w in all_), sum(w.silent for w in all_))

    def stop(self, within: float) -> tuple[LoadEnd, ...]:
        """Stop arrivals, wait up to `within` seconds for what is under way, censor the rest, end the workers.

        A later `poll` still gives the last replies. Raises LoadError when a worker was lost: then the run is not sound.
        """
        for far in self._far:
            far.stop(within)
        for proc in self._procs:
            with contextlib.suppress(LoadError):
                _tell(proc, {"stop": within})
        until = clock.now() + within + GRACE
        for proc in self._procs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                proc.process.wait(max(0.1, until - clock.now()))
        for far in self._far:
            far.wait(max(0.1, until + GRACE - clock.now()))
        for proc in self._procs:
            _listen(proc)  # its last words
        self.kill()
        ends = tuple(_account(p) for p in self._procs) + tuple(f.account() for f in self._far)
        for end in ends:
            if end.planned != end.ok + end.failed + end.shed + end.censored:
                raise LoadError(
                    f"load worker {end.worker} planned {end.planned} requests and cannot account for all of them: {end}"
                )
        return ends

    def kill(self) -> None:
        """End the workers at once; their account may be missing then."""
        for proc in self._procs:
            if proc.process.poll() is None:
                proc.process.send_signal(signal.SIGKILL)
            proc.process.wait()
            proc.sock.close()
        for far in self._far:
            far.close()  # without a leader it stops by itself


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
    metrics_port: int = 0,
    metrics_address: str = "127.0.0.1",
    remote: Sequence[str] = (),
    remote_token_file: Path | None = None,
    remote_ca: Path | None = None,
    number: int = 0,
    of: int | None = None,
) -> Load:
    """Start `workers` Locust processes that have read the plan and wait for `begin`.

    Records go to `out`. With a `metrics_port`, the nth of them serves /metrics at that port + n.
    `remote` are addresses of `gameday load worker`s on other machines, which take their share as well; `remote_ca`
    makes us speak TLS with them. Workers are numbered from `number` on, and send their shares `of` so many (by
    default all that are started here). Raises LoadError, before any load, for a bad plan, URL, key or CA file, and
    when a worker does not come up.
    """
    if workers < 0 or workers + len(remote) < 1:
        raise LoadError(f"the load needs at least one worker, not {workers}")
    if metrics_port and not 0 < metrics_port <= 65535 - workers:
        raise LoadError(f"{metrics_port} is not a port that /metrics can be served on")
    Plan.read(plan_path)
    target_.parse(target, model, headers=headers, ca_file=str(ca_file) if ca_file else None).tls()
    target_.read_key(api_key_file, api_key_env)
    token = _token(remote, remote_token_file)
    out.mkdir(parents=True, exist_ok=True)
    abroad = {
        "target": target,
        "model": model,
        "workers": of or workers + len(remote),
        "served_by": served_by,
        "served_zone": served_zone,
        "served_via": served_via,
        "headers": dict(headers or {}),
        "silent_after": silent_after,
    }
    common = {
        **abroad,
        "plan": str(plan_path),
        "out": str(out),
        "api_key_file": str(api_key_file) if api_key_file else None,
        "api_key_env": api_key_env,
        "ca_file": str(ca_file) if ca_file else None,
    }
    load = Load((), ())
    try:
        for n, address in enumerate(remote, number + workers):
            _clean(out, n)
            load._far += (Far(n, address, token, remote_ca, out),)
        for n in range(number, number + workers):
            load._procs += (_spawn(n, target, out),)
        for far in load._far:
            far.give({**abroad, "worker": far.number}, plan_path)
        for proc in load._procs:
            port = metrics_port and metrics_port + proc.number - number
            serving = {"metrics_port": port, "metrics_address": metrics_address}
            _tell(proc, {"job": {**common, "worker": proc.number, **serving}})
        _await_all(load, clock.now() + READY_WITHIN)
    except BaseException:
        load.kill()
        raise
    return load


def _token(remote: Sequence[str], file: Path | None) -> str:
    if not remote:
        return ""
    for address in remote:
        wire.split(address)
    if len(set(remote)) != len(remote):
        raise LoadError(f"a worker elsewhere takes one share, and is named once: {', '.join(remote)}")
    if file is None:
        raise LoadError("workers on other machines need a token: --token-file")
    return wire.read_token(file)


def _clean(out: Path, number: int) -> None:
    """Never take an earlier run's records for this one's."""
    for path in (records.replies_path(out, number), records.load_path(out, number)):
        path.unlink(missing_ok=True)


def _spawn(number: int, target: str, out: Path) -> _Proc:
    mine, theirs = socket.socketpair()
    _clean(out, number)
    log = out / f"locust.{number}.log"
    command = [sys.executable, "-m", "loadgen.locusts", "-f", str(_ROOT / "loadgen" / "locustfile.py"), "--headless"]
    command += ["--users", "1", "--spawn-rate", "1", "--host", target, "--exit-code-on-error", "0", "--only-summary"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    search = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)
    with theirs, log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is the harness's to handle: the load goes on until it is told
            env={**env, "PYTHONPATH": search, "GAMEDAY_LOAD_FD": str(theirs.fileno())},
        )
    first_on_cpu(process.pid)
    replies = records.Follower(records.replies_path(out, number))
    load = records.Follower(records.load_path(out, number))
    return _Proc(number, process, mine, log, replies, load)


def first_on_cpu(pid: int) -> None:
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
    if proc.error:
        return LoadError(f"{proc.name}: {proc.error}: the load is not sound; see {proc.log}")
    code = proc.process.poll()
    how = "does not answer" if code is None else f"ended with signal {-code}" if code < 0 else f"ended with code {code}"
    return LoadError(f"{proc.name} was lost ({how}): the load is not sound; see {proc.log}")


def _listen(proc: _Proc, wait: float = 0.0) -> bool:
    """Take in what the worker has said; tells whether it may say more."""
    try:
        proc.sock.settimeout(wait or 0.0)
        data = proc.sock.recv(1 << 20)
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


def _await_all(load: Load, until: float) -> None:
    for proc in load._procs:
        _await_ready(proc, until)
    for far in load._far:
        if not far.ready.wait(max(0.1, until - clock.now())):
            raise LoadError(f"{far.name} was not ready within {READY_WITHIN:.0f} s")
        if far.why:
            raise LoadError(f"{far.name}: {far.why}")


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
    """The worker's own account."""
    last = records.Follower(records.load_path(proc.log.parent, proc.number))
    try:
        ends = [e for e in last.events() if isinstance(e, LoadEnd)]
    finally:
        last.close()
    if len(ends) != 1:
        raise _lost(proc)
    return ends[0]
