"""Load for people who run Locust themselves: each Locust user is an open-loop source of arrivals."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import gevent

from gameday.errors import LoadError
from gameday.model import LoadEnd
from loadgen import records, target as target_
from loadgen.client import Call, Client
from loadgen.engine import Engine
from loadgen.metrics import Metrics
from loadgen.plan import Kind
from loadgen.prompts import Writer
from loadgen.traffic import Deadlines


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of the command line."""

    host: str
    model: str
    rate: float
    prompt_tokens: int
    output_tokens: int
    api: str
    api_key_file: str
    api_key_env: str
    ca_file: str
    records: str
    seed: int


class Source:
    """One process's engine for one test run; users call `walk`."""

    def __init__(
        self, choice: Choice, on_end: Callable[[Call], None], metrics: Metrics | None, worker: int = 0
    ) -> None:
        if choice.rate <= 0 or choice.prompt_tokens < 1 or choice.output_tokens < 1:
            raise LoadError("--rate, --prompt-tokens and --output-tokens must be positive")
        key = target_.read_key(Path(choice.api_key_file) if choice.api_key_file else None, choice.api_key_env or None)
        target = target_.parse(choice.host, choice.model, api_key=key, ca_file=choice.ca_file or None)
        self._choice = choice
        self._kind = Kind(choice.api, choice.api, True, Deadlines(), 0, "")
        self._writer = Writer(target)
        self._random = random.Random(choice.seed + worker)  # noqa: S311 - arrivals, not secrets
        self._seq = 0
        self._next: dict[int, float] = {}
        out = Path(choice.records) if choice.records else None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

        def ended(call: Call) -> None:
            on_end(call)
            if metrics is not None:
                metrics.reply(call)

        self.engine = Engine(
            Client(target),
            worker=worker,
            replies=records.Writer(records.replies_path(out, worker)) if out else None,
            load=records.Writer(records.load_path(out, worker)) if out else None,
            on_end=ended,
            on_beat=metrics.beat if metrics is not None else None,
        )

    def walk(self, user: Any) -> None:
        """Wait for this user's next arrival and send it. The schedule is absolute: being late delays nothing after."""
        due = self._next.get(id(user), monotonic()) + self._random.expovariate(self._choice.rate)
        self._next[id(user)] = due
        while (early := due - monotonic()) > 0:
            gevent.sleep(early)
        seq, self._seq = self._seq, self._seq + 1
        choice = self._choice

        def body() -> bytes:
            words = f"{choice.seed}-{seq}"
            return self._writer.body(choice.api, words, choice.prompt_tokens, choice.output_tokens)

        self.engine.send(seq, self._kind, due, body)

    def leave(self, user: Any) -> None:
        self._next.pop(id(user), None)

    def close(self, within: float) -> LoadEnd:
        t_stop = monotonic()
        planned = self._seq
        self.engine.drain(within)
        return self.engine.close(planned, t_stop)
