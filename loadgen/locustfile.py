"""The Locust side: `locust -f loadgen/locustfile.py --host http://gateway:8000 --model my-llama32`.

Every Locust user is a source of arrivals at `--rate` requests a second (open loop: it never waits for an
answer), so that users × rate is the load, also under a LoadTestShape, on the web page and on several workers.
A share of it is long streams; a canary of `--canary-rate` tiny requests a second comes on top.
Started by gameday itself (`loadgen.launch`), the one user replays the plan instead.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import gevent
from locust import User, events, task
from locust.runners import STATE_MISSING, STATE_RUNNING, STATE_SPAWNING, MasterRunner

from gameday.errors import LoadError
from gameday.model import Outcome
from loadgen.check import one_token
from loadgen.client import Call
from loadgen.metrics import Metrics
from loadgen.people import Choice, Source
from loadgen.traffic import Deadlines
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

else:

    class Person(User):  # type: ignore[misc]  # Locust is not typed for us
        """Asks at `--rate` requests a second, whether answers come or not."""

        @task  # type: ignore[untyped-decorator]
        def ask(self) -> None:
            source = _sources.get(self.environment)
            if source is None:  # the test could not start, or is ending
                gevent.sleep(0.1)
            else:
                source.walk(self)

        def on_stop(self) -> None:
            source = _sources.get(self.environment)
            if source is not None:
                source.leave(self)

    _sources: dict[Any, Source] = {}
    _metrics: list[Metrics] = []  # one for the process: a test may be started again from the web page

    @events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
    def _options(parser: Any, **_: Any) -> None:
        group = parser.add_argument_group("gameday")
        for name, default, text in (
            ("--model", "my-llama32", "the model's name"),
            ("--rate", 1.0, "requests a second of each user; users × rate is the load"),
            ("--prompt-tokens", 0, "tokens of each prompt, about; 0: lognormal, median 120"),
            ("--output-tokens", 0, "max_tokens of each request; 0: lognormal, median 48"),
            ("--long-share", 0.08, "share of the requests that are long streams"),
            ("--long-tokens", 320, "max_tokens of a long stream"),
            ("--canary-rate", 50.0, "one-token requests a second, of each process, half on fresh connections; 0: none"),
            ("--api", "chat", "chat or completions"),
            ("--api-key-file", "", "file with the API key"),
            ("--api-key-env", "", "environment variable with the API key"),
            ("--ca-file", "", "CA of the target's certificate"),
            ("--records", "", "directory for a record of every reply"),
            ("--metrics-port", 0, "port for /metrics, 0: none"),
            ("--seed", 1, "seed of the arrivals"),
        ):
            env = f"GAMEDAY_{name[2:].upper().replace('-', '_')}"
            group.add_argument(name, type=type(default), default=default, help=text, env_var=env)

    @events.init.add_listener  # type: ignore[untyped-decorator]
    def _serve(environment: Any, **_: Any) -> None:
        """Once for a process, from its own options: a master's replace a worker's when the test starts."""
        port = environment.parsed_options.metrics_port
        if port and not isinstance(environment.runner, MasterRunner):
            _metrics.append(Metrics())
            try:
                _metrics[0].serve(port)
            except LoadError as e:
                logging.getLogger("gameday").error("%s", e)
                sys.exit(2)

    @events.test_start.add_listener  # type: ignore[untyped-decorator]
    def _start(environment: Any, **_: Any) -> None:
        if isinstance(environment.runner, MasterRunner):
            gevent.spawn(_watch, environment)  # its workers do the asking
            return
        options = environment.parsed_options
        choice = Choice(environment.host or "", **{f: getattr(options, f) for f in _CHOICES})
        try:
            number = max(0, getattr(environment.runner, "worker_index", 0))
            _sources[environment] = Source(choice, Feed(environment), _metrics[0] if _metrics else None, number)
            one_token(
                choice.host,
                choice.model,
                api=choice.api,
                api_key_file=Path(choice.api_key_file) if choice.api_key_file else None,
                api_key_env=choice.api_key_env or None,
                ca_file=Path(choice.ca_file) if choice.ca_file else None,
            )
            _sources[environment].begin()
        except LoadError as e:
            logging.getLogger("gameday").error("%s", e)
            environment.process_exit_code = 2
            _sources.pop(environment, None)
            if environment.web_ui is None:
                os.kill(os.getpid(), signal.SIGTERM)

    def _watch(environment: Any) -> None:
        """A lost worker takes its share of the load away: Locust would go on, and end with 0."""
        runner = environment.runner
        seen: dict[str, Any] = {}
        began = False
        while not began or runner.state in (STATE_SPAWNING, STATE_RUNNING):
            began = began or runner.state in (STATE_SPAWNING, STATE_RUNNING)
            now = dict(runner.clients.items())
            gone = [i for i, node in seen.items() if i not in now or node.state == STATE_MISSING]
            for name in gone:
                logging.getLogger("gameday").error("load worker %s was lost: the run is short, and not sound", name)
                environment.process_exit_code = 2
            seen = {i: node for i, node in now.items() if node.state != STATE_MISSING}
            gevent.sleep(0.2)

    @events.test_stop.add_listener  # type: ignore[untyped-decorator]
    def _stop(environment: Any, **_: Any) -> None:
        """Users are gone; what they asked is waited for, so that nothing vanishes unrecorded."""
        source = _sources.pop(environment, None)
        if source is None:
            return
        try:
            end = source.close(Deadlines().total)
        except LoadError as e:
            logging.getLogger("gameday").error("%s: the load is not sound", e)
            environment.process_exit_code = 2
            return
        logging.getLogger("gameday").info("account: %s", end)
        for why in source.unsound():
            logging.getLogger("gameday").error("NOT SOUND: %s: believe no latency of this run", why)
            environment.process_exit_code = environment.process_exit_code or 1
        if end.planned != end.ok + end.failed + end.shed + end.censored:
            environment.process_exit_code = 2

    @events.quitting.add_listener  # type: ignore[untyped-decorator]
    def _quit(environment: Any, **_: Any) -> None:
        """Locust takes its exit code before it stops the users: what they leave behind must be known by then."""
        if environment in _sources and environment.runner is not None:
            environment.runner.stop()

    _CHOICES = tuple(f.name for f in fields(Choice) if f.name != "host")
