"""`gameday load run`: the load by itself. Plan, check, start, watch, stop, account.

    account = run(target=url, model=name, traffic=Chat(per_second=20), seconds=60, seed=1, out=out, say=print)

Every request planned is in the account. Latencies count from the intended send time, and a request that got no token
(or did not end well) counts as one that took for ever: an outage cannot improve a quantile.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gameday import clock
from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd, Outcome, Reply
from loadgen import launch, plan as plan_, sound
from loadgen.check import every_kind
from loadgen.far import Offset
from loadgen.plan import Plan
from loadgen.traffic import Trace, Traffic

TICK = 0.1
LEAD = 0.5
"""Seconds between the order to begin and the plan's zero."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles in seconds, to 0.1 ms; infinite where that many never came."""

    n: int
    p50: float
    p95: float
    p99: float

    def show(self) -> str:
        if not self.n:
            return "—"
        return " / ".join("never" if math.isinf(v) else f"{v:.4g} s" for v in (self.p50, self.p95, self.p99))


@dataclass(frozen=True, slots=True)
class Part:
    """One class of requests. `gap` is over all gaps between tokens."""

    cls: str
    planned: int
    ok: int
    failed: int
    shed: int
    censored: int
    first_token: Spread
    gap: Spread
    reply: Spread


@dataclass(frozen=True, slots=True)
class Account:
    """planned = ok + failed + shed + censored, exactly. `sound` says whether the latencies are the service's."""

    planned: int
    ok: int
    failed: int
    shed: int
    censored: int
    outcomes: Mapping[str, int]
    parts: tuple[Part, ...]
    seconds: float  # from the plan's zero until arrivals stopped
    tokens_per_second: float  # until the last reply's end
    ended: str  # "plan", "SIGINT", "SIGTERM", or "worker": one was told to stop
    unsound: tuple[str, ...]
    clocks: Mapping[str, Offset]  # of workers elsewhere
    seed: int
    out: str

    @property
    def sound(self) -> bool:
        return not self.unsound

    def to_json(self) -> dict[str, object]:
        """For account.json; what is infinite there is null."""
        plain = json.loads(json.dumps({**asdict(self), "sound": self.sound}), parse_constant=lambda _: None)
        assert isinstance(plain, dict)
        return plain

    def lines(self) -> list[str]:
        """As people read it. Without soundness, no latency is shown."""
        said = [
            f"planned {self.planned} = ok {self.ok} + failed {self.failed} "
            f"+ shed {self.shed} + censored {self.censored}   in {self.seconds:.1f} s"
            + ("" if self.ended == "plan" else f", ended by {self.ended}")
        ]
        bad = {name: n for name, n in self.outcomes.items() if name != Outcome.OK}
        if bad:
            said.append("not ok: " + ", ".join(f"{n} {name}" for name, n in sorted(bad.items(), key=lambda i: -i[1])))
        for address, offset in self.clocks.items():
            said.append(f"clock of {address}: {offset.seconds:+.6f} s ± {1000 * offset.uncertainty:.3f} ms")
        if self.unsound:
            return [*said, *(f"NOT SOUND: {why}" for why in self.unsound), "no latencies are given for this run"]
        said.append(f"{'p50 / p95 / p99':<12}{'first token':^32}{'between tokens':^32}{'whole reply':^32}")
        for part in self.parts:
            told = (part.first_token, part.gap, part.reply)
            said.append(f"  {part.cls:<13}" + "".join(f"{one.show():^32}" for one in told).rstrip())
        said.append(f"  {self.tokens_per_second:.1f} tokens/s · seed {self.seed} · {self.out}")
        return said


class Ticks:
    """Counts durations in ticks of 0.1 ms: exact to that, in memory that does not grow with the run."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._never = 0

    def add(self, seconds: float | None) -> None:
        if seconds is None:
            self._never += 1
        else:
            self._counts[round(seconds * 10_000)] += 1

    def spread(self) -> Spread:
        n = self._counts.total() + self._never
        wanted = [math.ceil(q * n) for q in (0.5, 0.95, 0.99)]
        values: list[float] = []
        below = 0
        for tick in sorted(self._counts):
            below += self._counts[tick]
            while len(values) < len(wanted) and below >= wanted[len(values)]:
                values.append(tick / 10_000)
        values += [math.inf] * (len(wanted) - len(values))
        return Spread(n, *values)


class Class:
    """What is kept of one class."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.first, self.gaps, self.whole = Ticks(), Ticks(), Ticks()

    def add(self, reply: Reply) -> None:
        self.outcomes[reply.outcome] += 1
        if reply.counted:
            self.first.add(reply.ttft)
            self.whole.add(reply.latency if reply.ok else None)
        for gap in reply.itl:
            self.gaps.add(gap)

    def part(self, cls: str) -> Part:
        total = self.outcomes.total()
        ok, shed = self.outcomes[Outcome.OK], self.outcomes[Outcome.CLIENT_SHED]
        censored = self.outcomes[Outcome.CENSORED]
        spreads = (self.first.spread(), self.gaps.spread(), self.whole.spread())
        return Part(cls, total, ok, total - ok - shed - censored, shed, censored, *spreads)


class Books:
    """Everything that comes back, held against the plan."""

    def __init__(self, plan: Plan, begin: clock.Instant) -> None:
        self._plan = plan
        self._begin = begin
        self._seen = bytearray(len(plan))
        self._classes = {kind.name: Class() for kind in plan.classes}
        self._beats: dict[int, list[Heartbeat]] = {}
        self._punctual = sound.Punctuality()
        self._tokens = 0
        self._last = begin  # the end of the last reply

    def take(self, tail: launch.Tail) -> None:
        for reply in tail.replies:
            if not 0 <= reply.seq < len(self._seen) or self._seen[reply.seq]:
                raise LoadError(f"request {reply.seq} is recorded twice, or was never planned: the load is not sound")
            self._seen[reply.seq] = 1
            self._classes[reply.cls].add(reply)
            self._tokens += reply.tokens
            self._punctual.add(reply.outcome, reply.t_intended, reply.t_start)
            self._last = max(self._last, reply.t_end)
        for beat in tail.beats:
            self._beats.setdefault(beat.worker, []).append(beat)

    def close(self, ends: tuple[LoadEnd, ...], shares: int) -> None:
        """Raises LoadError unless records, accounts and plan agree for every request."""
        planned = sum(e.planned for e in ends)
        seen = sum(self._seen)
        if seen != planned:
            raise LoadError(f"the workers account for {planned} requests, {seen} are recorded: the load is not sound")
        for end in ends:
            until = end.t_stop - self._begin - 1e-4  # instants are recorded to 1 µs
            missing = [i for i in self._plan.share(end.worker, shares) if self._plan.t[i] < until and not self._seen[i]]
            if missing:
                raise LoadError(
                    f"load worker {end.worker} never sent request {missing[0]} and {len(missing) - 1} others "
                    "that were due: the load is not sound"
                )

    def account(self, ends: tuple[LoadEnd, ...], *, ended: str, clocks: Mapping[str, Offset], out: Path) -> Account:
        outcomes = Counter[Outcome]()
        for each in self._classes.values():
            outcomes += each.outcomes
        seconds = max(0.001, min(max(e.t_stop for e in ends) - self._begin, self._plan.seconds))
        return Account(
            planned=sum(e.planned for e in ends),
            ok=sum(e.ok for e in ends),
            failed=sum(e.failed for e in ends),
            shed=sum(e.shed for e in ends),
            censored=sum(e.censored for e in ends),
            outcomes={str(k): n for k, n in sorted(outcomes.items())},
            parts=tuple(c.part(name) for name, c in self._classes.items() if c.outcomes),
            seconds=round(seconds, 3),
            tokens_per_second=round(self._tokens / max(seconds, self._last - self._begin), 2),
            ended=ended,
            unsound=(*self._trouble(ends, self._begin + seconds), *self._punctual.trouble()),
            clocks=clocks,
            seed=self._plan.seed,
            out=str(out),
        )

    def _trouble(self, ends: tuple[LoadEnd, ...], until: float) -> list[str]:
        beats = {end.worker: self._beats.get(end.worker, []) for end in ends}
        return [why for n, mine in beats.items() for why in sound.trouble(n, mine, self._begin, until)]


@dataclass(slots=True)
class Window:
    """The live line's view: replies since the last line."""

    ended: int = 0
    good: int = 0
    counted: int = 0
    first: Ticks = field(default_factory=Ticks)
    bad: Counter[str] = field(default_factory=Counter)

    def take(self, replies: Sequence[Reply]) -> None:
        self.ended += len(replies)
        for reply in replies:
            if reply.counted:
                self.counted += 1
                self.good += reply.ok
                self.first.add(reply.ttft)
            if not reply.ok:
                self.bad[str(reply.outcome)] += 1

    def line(self, elapsed: float, over: float, tail: launch.Tail) -> str:
        share = f"{self.good / self.counted:7.2%}" if self.counted else "      —"
        worst = ", ".join(f"{n} {name}" for name, n in self.bad.most_common(3))
        return (
            f"{elapsed:5.0f} s  {self.ended / over:6.1f}/s  ok {share}  first token {self.first.spread().show()}  "
            f"{tail.in_flight} under way, {tail.silent} silent  {worst}"
        ).rstrip()


class Signals:
    """SIGINT and SIGTERM stop the arrivals. The handler sets an attribute only (docs/adr/0003)."""

    def __init__(self) -> None:
        self.by = ""
        self._old: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, _: object) -> None:
        self.by = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def run(
    *,
    target: str,
    model: str,
    traffic: Traffic | Trace,
    seconds: float,
    seed: int,
    out: Path,
    say: Callable[[str], None],
    workers: int = 1,
    every: float = 5.0,
    headers: Mapping[str, str] | None = None,
    api_key_file: Path | None = None,
    api_key_env: str | None = None,
    ca_file: Path | None = None,
    metrics_port: int = 0,
    metrics_address: str = "127.0.0.1",
    remote: Sequence[str] = (),
    remote_token_file: Path | None = None,
    remote_ca: Path | None = None,
) -> Account:
    """Load `target` for `seconds`; a live line `every` so many seconds; records, load.json and account.json in `out`.

    SIGINT and SIGTERM stop the arrivals; what is under way is waited for, and accounted for. Raises LoadError, with
    one sentence, for anything that keeps the load from starting or from being accounted for: a lost worker above all.
    """
    wanted = Traffic(streams=(traffic,)) if isinstance(traffic, Trace) else traffic
    plan = plan_.make(wanted, seed, seconds)
    _empty(out)
    if workers:  # workers elsewhere ask for themselves: it may be that only they can reach the target
        every_kind(
            plan,
            target,
            model,
            headers=headers,
            api_key_file=api_key_file,
            api_key_env=api_key_env,
            ca_file=ca_file,
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        plan.write(out / "plan.json")
    except OSError as e:
        raise LoadError(f"the records cannot be written to {out}: {e.strerror or e}") from e
    with Signals() as signals:
        load = launch.start(
            out / "plan.json",
            target=target,
            model=model,
            out=out,
            workers=workers,
            headers=headers,
            api_key_file=api_key_file,
            api_key_env=api_key_env,
            ca_file=ca_file,
            metrics_port=metrics_port,
            metrics_address=metrics_address,
            remote=remote,
            remote_token_file=remote_token_file,
            remote_ca=remote_ca,
        )
        shares = workers + len(remote)
        account = _lead(load, plan, shares, out, signals, say, every, about={"target": target, "model": model})
    try:
        (out / "account.json").write_text(json.dumps(account.to_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise LoadError(f"the account cannot be written to {out}: {e.strerror or e}") from e
    return account


def _empty(out: Path) -> None:
    """Records of two runs must not mix; what a start that failed left behind may go."""
    if out.is_file():
        raise LoadError(f"{out} is a file, and the records need a directory")
    if any(path.stat().st_size for path in out.glob("replies.*.jsonl")):
        raise LoadError(f"{out} holds the records of a run already")
    for pattern in ("replies.*.jsonl", "load.*.jsonl", "clock.*.jsonl"):
        for path in out.glob(pattern):
            path.unlink()


def _lead(
    load: launch.Load,
    plan: Plan,
    shares: int,
    out: Path,
    signals: Signals,
    say: Callable[[str], None],
    every: float,
    about: Mapping[str, object],
) -> Account:
    begin = clock.now() + LEAD
    books = Books(plan, begin)
    within = max(kind.deadlines.total for kind in plan.classes) + 1
    try:
        _note(out, plan, shares, begin, about)
        say(f"{len(plan)} requests in {plan.seconds:g} s, {shares} worker(s), seed {plan.seed}, records in {out}")
        load.begin(begin)
        ended = _watch(load, books, begin, plan, signals, say, every)
        say(f"arrivals end ({ended}); up to {within:.0f} s for what is under way")
        clocks = load.clocks()
        ends = load.stop(0.0 if ended == "worker" else within)  # a lost one must not be waited for
        books.take(load.poll())
    finally:
        load.kill()
    books.close(ends, shares)
    return books.account(ends, ended=ended, clocks=clocks, out=out)


def _note(out: Path, plan: Plan, shares: int, begin: clock.Instant, about: Mapping[str, object]) -> None:
    epoch = clock.Epoch.read()
    data = {
        **about,
        "seed": plan.seed,
        "seconds": plan.seconds,
        "workers": shares,
        "begin": begin,
        "epoch_wall": epoch.wall,
        "epoch_mono": epoch.mono,
    }
    (out / "load.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _watch(
    load: launch.Load,
    books: Books,
    begin: clock.Instant,
    plan: Plan,
    signals: Signals,
    say: Callable[[str], None],
    every: float,
) -> str:
    """Until the plan is over, a signal comes, or a worker is gone; tells which."""
    window, since = Window(), begin
    end = begin + plan.seconds
    while True:
        tail = load.poll()
        books.take(tail)
        window.take(tail.replies)
        now = clock.now()
        if signals.by:
            return signals.by
        if not load.alive():
            return "worker"
        if now >= end:
            return "plan"
        if now - since >= every:
            say(window.line(now - begin, now - since, tail))
            window, since = Window(), now
        clock.pause(min(TICK, max(0.0, end - now)))
