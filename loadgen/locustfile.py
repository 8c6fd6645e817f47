"""The Locust side: `locust -f loadgen/locustfile.py --host http://gateway:8000 --model my-llama32`.

Every Locust user is a source of arrivals at `--rate` requests a second (open loop: it never waits for an
answer), so that users × rate is the load, also under a LoadTestShape, on the web page and on several workers.
Started by gameday itself (`loadgen.launch`), the one user replays the plan instead.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import gevent
from locust import User, task

from gameday.model import Outcome
from loadgen.client import Call
from loadgen.worker import FD, Worker


class Broken(Exception):
    """How a request failed, for Locust's failure table; one per outcome, so that they add up."""

    def __repr__(self) -> str:
        return str(self)


_BROKEN = {o: Broken(str(o)) for o in Outcome}


class Feed:
    """Fires Locust's own entries for every reply. The truth is in the records; this is for watching."""

    def __init__(self, environment: Any) -> None:
        self._fire = environment.events.request.fire

    def __call__(self, call: Call) -> None:
        self._one("reply", call.cls, call.t_end - call.t_intended, call.tokens, _error(call))
        if call.t_first is None:
            return
        self._one("first token", call.cls, call.t_first - call.t_intended, 0, None)
        if call.itl and call.outcome is Outcome.OK:
            speaking = sum(call.itl)
            self._one("worst gap", call.cls, max(call.itl), 0, None)
            self._one("time per token", call.cls, speaking / len(call.itl), 0, None)
            if speaking > 0:  # in Locust's table, the "time" of this entry is a rate
                self._one("tokens/s", call.cls, len(call.itl) / speaking / 1000, 0, None)

    def _one(self, kind: str, cls: str, seconds: float, length: int, error: Broken | None) -> None:
        self._fire(
            request_type=kind,
            name=cls,
            response_time=seconds * 1000,
            response_length=length,
            exception=error,
            context={},
        )


def _error(call: Call) -> Broken | None:
    return None if call.outcome is Outcome.OK else _BROKEN[call.outcome]


if FD in os.environ:

    class Replay(User):  # type: ignore[misc]  # Locust is not typed for us
        """Replays this worker's share of the plan."""

        @task  # type: ignore[untyped-decorator]
        def replay(self) -> None:
            worker = Worker(int(os.environ[FD]), Feed(self.environment))
            self.environment.events.quitting.add_listener(lambda **_: worker.finish())
            worker.serve()
            os.kill(os.getpid(), signal.SIGTERM)  # Locust's orderly way out
            gevent.sleep(60)
