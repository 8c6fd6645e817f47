"""Load for people who run Locust themselves: each Locust user is an open-loop source of arrivals.

The mix is that of `Chat`: a main stream, long streams, and the canary at a constant rate, whatever the users do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import numpy as np

from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd
from loadgen import records, sound, target as target_
from loadgen.client import Call, Client
from loadgen.engine import Engine
from loadgen.metrics import Metrics
from loadgen.plan import draw, kind_of
from loadgen.prompts import Writer
from loadgen.traffic import Api, Chat, Stream


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of the command line."""

    host: str
    model: str
    rate: float
    prompt_tokens: int  # 0: as people's chats are
    output_tokens: int
    long_share: float
    long_tokens: int
    canary_rate: float
    api: Api
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
        chat = _chat(choice)
        key = target_.read_key(Path(choice.api_key_file) if choice.api_key_file else None, choice.api_key_env or None)
        target = target_.parse(choice.host, choice.model, api_key=key, ca_file=choice.ca_file or None)
        self._choice = choice
        self._streams = {s.name: s for s in chat.streams if isinstance(s, Stream)}
        self._kinds = {s.name: kind_of(s, chat.deadlines) for s in chat.streams}
        self._writer = Writer(target)
        self._random = random.Random(choice.seed + worker)  # noqa: S311 - arrivals, not secrets
        self._lengths = np.random.default_rng([choice.seed, worker])
        self._number = worker
        self._seq = 0
        self._canary: gevent.Greenlet | None = None
        self._next: dict[int, float] = {}
        out = Path(choice.records) if choice.records else None
        self._begin = self._stopped = monotonic()
        self._beats: list[Heartbeat] = []
        self._punctual = sound.Punctuality()

        def ended(call: Call) -> None:
            on_end(call)
            self._punctual.add(call.outcome, call.t_intended, call.t_start)
            if metrics is not None:
                metrics.reply(call)

        def beat(one: Heartbeat) -> None:
            self._beats.append(one)
            if metrics is not None:
                metrics.beat(one)

        replies, load = _writers(out, worker)
        self.engine = Engine(Client(target), worker=worker, replies=replies, load=load, on_end=ended, on_beat=beat)

    def walk(self, user: Any) -> None:
        """Wait for this user's next arrival and send it. The schedule is absolute: being late delays nothing after."""
        due = self._next.get(id(user), monotonic()) + self._random.expovariate(self._choice.rate)
        self._next[id(user)] = due
        while (early := due - monotonic()) > 0:
            gevent.sleep(early)
        long = "long" in self._streams and self._random.random() < self._choice.long_share
        self._send(due, "long" if long or self._choice.api not in self._streams else self._choice.api)

    def begin(self) -> None:
        """The canary sings from here on."""
        if "canary" in self._streams:
            self._canary = gevent.spawn(self._sing, monotonic())

    def _sing(self, begin: float) -> None:
        count = 0
        while True:
            count += 1
            due = begin + count / self._choice.canary_rate
            while (early := due - monotonic()) > 0:
                gevent.sleep(early)
            self._send(due, "canary", fresh=count % 2 == 1)

    def _send(self, due: float, cls: str, *, fresh: bool = False) -> None:
        seq, self._seq = self._seq, self._seq + 1
        choice, stream = self._choice, self._streams[cls]
        prompt, output = (int(draw(lengths, 1, self._lengths)[0]) for lengths in (stream.prompt, stream.output))

        def body() -> bytes:
            return self._writer.body(choice.api, f"{choice.seed}-{self._number}-{seq}", prompt, output)

        self.engine.send(seq, self._kinds[cls], due, body, fresh=fresh)

    def leave(self, user: Any) -> None:
        self._next.pop(id(user), None)

    def close(self, within: float) -> LoadEnd:
        t_stop = self._stopped = monotonic()
        if self._canary is not None:
            self._canary.kill()
        planned = self._seq
        self.engine.drain(within)
        return self.engine.close(planned, t_stop)

    def unsound(self) -> list[str]:
        """After `close`: why the latencies are not (only) the service's; empty when the generator kept up."""
        return [*sound.trouble(self._number, self._beats, self._begin, self._stopped), *self._punctual.trouble()]


def _writers(out: Path | None, worker: int) -> tuple[records.Writer | None, records.Writer | None]:
    if out is None:
        return None, None
    try:
        out.mkdir(parents=True, exist_ok=True)
        return records.Writer(records.replies_path(out, worker)), records.Writer(records.load_path(out, worker))
    except OSError as e:
        raise LoadError(f"the records cannot be written to {out}: {e.strerror or e}") from e


def _chat(choice: Choice) -> Chat:
    """Raises LoadError for options that contradict themselves."""
    if choice.rate <= 0 or choice.prompt_tokens < 0 or choice.output_tokens < 0:
        raise LoadError("--rate must be positive, --prompt-tokens and --output-tokens cannot be negative")
    lengths = {name: n for name in ("prompt_tokens", "output_tokens") if (n := getattr(choice, name))}
    return Chat(
        per_second=choice.rate,
        long_share=choice.long_share,
        long_tokens=choice.long_tokens,
        canary_per_second=choice.canary_rate,
        api=choice.api,
        **lengths,
    )
