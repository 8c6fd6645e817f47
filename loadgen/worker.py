"""One load worker inside a Locust process, led by `loadgen.launch` over a socket of JSON lines.

From the parent: `{"job": {…}}`, `{"begin": instant}`, `{"stop": seconds}`.
To the parent: `{"ready": arrivals}` or `{"error": sentence}`, every 0.2 s `{"in_flight": n, "silent": n}`, at the end
`{"ended": true}`, or `{"error": sentence}` when the load generator itself broke.
When the parent is gone the worker stops by itself: an orphan must not go on loading anybody's service.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.lock
import gevent.socket

from gameday.errors import LoadError
from gameday.model import LoadEnd
from loadgen import records, target as target_
from loadgen.client import Call, Client
from loadgen.engine import Arrival, Engine, Walk
from loadgen.metrics import Metrics
from loadgen.plan import Plan
from loadgen.prompts import Bodies

FD = "GAMEDAY_LOAD_FD"
"""Environment variable with the number of the inherited socket."""
STATUS_EVERY = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is told. Secrets travel by file name or variable name only."""

    plan: str
    target: str
    model: str
    out: str
    worker: int
    workers: int
    served_by: str = "x-served-by"
    served_zone: str = "x-served-zone"
    served_via: str = "x-gateway"
    headers: dict[str, str] = field(default_factory=dict)
    api_key_file: str | None = None
    api_key_env: str | None = None
    ca_file: str | None = None
    metrics_port: int = 0  # 0: none
    metrics_address: str = "127.0.0.1"
    silent_after: float = 2.0  # seconds without a token after which a request under way is reported as silent

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def target_of(self) -> target_.Target:
        key = target_.read_key(Path(self.api_key_file) if self.api_key_file else None, self.api_key_env)
        return target_.parse(
            self.target,
            self.model,
            served_by=self.served_by,
            served_zone=self.served_zone,
            served_via=self.served_via,
            headers=self.headers,
            api_key=key,
            ca_file=self.ca_file,
        )


_Hear = Callable[[Call], None]


def _both(one: _Hear | None, other: _Hear | None) -> _Hear | None:
    if one is None or other is None:
        return one or other

    def both(call: Call) -> None:
        one(call)
        other(call)

    return both


class Worker:
    """Serves one job from the socket `fd`, then it is over."""

    def __init__(self, fd: int, on_end: Callable[[Call], None] | None = None) -> None:
        self._sock = gevent.socket.socket(fileno=fd)
        self._parent = os.getppid()
        self._on_end = on_end
        self._walk: Walk | None = None
        self._engine: Engine | None = None
        self._end: LoadEnd | None = None
        self._finished = False
        self._ending = gevent.lock.RLock()
        self._within = 0.0
        self._buf = b""

    def serve(self) -> None:
        try:
            message = self._read()
            if message is None:
                return
            job = Job(**message["job"])
            arrivals = self._prepare(job)
        except LoadError as e:
            self._tell({"error": str(e)})
            return
        gc.collect()
        gc.freeze()  # the plan never dies: collections need not walk it
        self._tell({"ready": len(arrivals)})
        message = self._read()
        if message is not None and "begin" in message:
            assert self._engine is not None
            self._walk = Walk(self._engine, arrivals, float(message["begin"]))
            status = gevent.spawn(self._status, job.silent_after)
            message = self._read()
            status.kill()
        try:
            self.finish(float(message["stop"]) if message is not None else 0.0)
        except LoadError as e:
            self._tell({"error": str(e)})
        else:
            self._tell({"ended": True})

    def _prepare(self, job: Job) -> list[Arrival]:
        plan = Plan.read(Path(job.plan))
        target = job.target_of()
        bodies = Bodies(plan, target)
        out = Path(job.out)
        metrics = Metrics() if job.metrics_port else None
        if metrics is not None:
            metrics.serve(job.metrics_port, job.metrics_address)
        self._engine = Engine(
            Client(target),
            worker=job.worker,
            in_flight_max=max(1, plan.traffic.in_flight_max // job.workers),
            replies=records.Writer(records.replies_path(out, job.worker)),
            load=records.Writer(records.load_path(out, job.worker)),
            on_end=_both(self._on_end, metrics.reply if metrics else None),
            on_beat=metrics.beat if metrics else None,
            on_text=bodies.heard,
        )
        self._within = max(c.deadlines.total for c in plan.classes)
        classes = plan.classes
        return [
            Arrival(i, plan.t[i], classes[plan.cls[i]], bool(plan.fresh[i]), bodies.of)
            for i in plan.share(job.worker, job.workers)
        ]

    def finish(self, within: float | None = None) -> None:
        """Stop, drain, write the account; once, whoever calls first. `within` None: up to the longest deadline."""
        with self._ending:
            if self._finished or self._engine is None:
                return
            limit = self._within if within is None else within
            walk = self._walk or Walk(self._engine, (), 0.0)
            self._finished = True
            self._end = walk.stop(limit)

    def _status(self, silent_after: float) -> None:
        assert self._engine is not None
        while True:
            self._tell({"in_flight": self._engine.in_flight, "silent": self._engine.silent(silent_after)})
            gevent.sleep(STATUS_EVERY)
            if self._engine.broken:
                self._tell({"error": self._engine.broken})
            if os.getppid() != self._parent:
                self._sock.close()  # ends `serve`'s read, and with it the load
                return

    def _tell(self, message: dict[str, Any]) -> None:
        """A parent that does not listen must not hold us up: what does not fit is dropped."""
        data = json.dumps(message).encode() + b"\n"
        try:
            if "in_flight" in message:
                self._sock._sock.send(data)
            else:
                with gevent.Timeout(2, False):
                    self._sock.sendall(data)
        except OSError:
            return

    def _read(self) -> dict[str, Any] | None:
        """The parent's next message; None when the parent is gone."""
        while b"\n" not in self._buf:
            try:
                data = self._sock.recv(65536)
            except OSError:
                return None
            if not data:
                return None
            self._buf += data
        line, _, self._buf = self._buf.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message
