"""The open loop: one greenlet walks the plan on the monotonic clock and starts a greenlet per request.

Nothing that the service does delays an arrival. Every request planned is accounted for exactly once:
planned = ok + failed + shed + censored. The engine watches itself and says so every second.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

import gevent
import gevent.event
import orjson

from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd, Outcome
from loadgen import records
from loadgen.client import Call, Client
from loadgen.plan import Kind

FLUSH_EVERY = 0.05
BEAT_EVERY = 1.0

Body = Callable[[], bytes]


class Cpu:
    """Shares of the time since the last look that this thread ran, and that it waited for a CPU."""

    def __init__(self) -> None:
        self._last = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        try:
            with open("/proc/self/schedstat", "rb") as file:  # noqa: PTH123 - once a second, in the hot process
                ran, waited, _ = file.read().split()
        except (OSError, ValueError) as e:
            raise LoadError(f"the load generator cannot watch itself: /proc/self/schedstat: {e}") from e
        return monotonic(), int(ran) / 1e9, int(waited) / 1e9

    def look(self) -> tuple[float, float]:
        """(on a CPU, waiting for one), each 0–1."""
        before, self._last = self._last, self._read()
        wall = max(1e-6, self._last[0] - before[0])
        return min(1.0, (self._last[1] - before[1]) / wall), min(1.0, (self._last[2] - before[2]) / wall)


class Engine:
    """Sends requests and keeps their account. `on_end` hears every reply (for live statistics)."""

    def __init__(
        self,
        client: Client,
        *,
        worker: int = 0,
        in_flight_max: int = 2000,
        replies: records.Writer | None = None,
        load: records.Writer | None = None,
        on_end: Callable[[Call], None] | None = None,
        on_beat: Callable[[Heartbeat], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> None:
        self.client = client
        self.worker = worker
        self._in_flight_max = in_flight_max
        self._replies = replies
        self._load = load
        self._on_end = on_end
        self._on_beat = on_beat
        self._on_text = on_text
        self._under_way: dict[Call, Any] = {}
        self._empty = gevent.event.Event()
        self._empty.set()
        self.started = self.ok = self.failed = self.shed = self.censored = 0
        self._delays: list[float] = []
        self.broken = ""  # an error of our own, in words: the account is then worth nothing
        self._cpu = Cpu()
        self._beat_at = monotonic()
        self._housekeeping = gevent.spawn(self._keep_house)

    # ── sending ─────────────────────────────────────────────────────────────────────────────────

    def send(self, seq: int, cls: Kind, due: float, body: Body, *, fresh: bool = False) -> None:
        """Start one request now, or shed it when too many are under way."""
        call = Call(seq, cls.name, due)
        if len(self._under_way) >= self._in_flight_max:
            call.end(Outcome.CLIENT_SHED, f"{self._in_flight_max} requests were under way")
            self._account(call)
            return
        self.started += 1
        self._empty.clear()
        self._under_way[call] = gevent.spawn(self._one, call, cls, body, fresh)

    def _one(self, call: Call, cls: Kind, body: Body, fresh: bool) -> None:
        self._delays.append(monotonic() - call.t_intended)
        try:
            self.client.perform(call, cls, body(), fresh=fresh)
            if call.text and self._on_text is not None:
                self._on_text(call.seq, call.text)
        except Exception as e:  # noqa: BLE001 - whatever it is, it is ours, and must not pass for the service's
            self._break(f"request {call.seq}", e)
        finally:
            if self._under_way.pop(call, None) is not None:
                self._account(call)
            if not self._under_way:
                self._empty.set()

    def _break(self, what: str, e: Exception) -> None:
        if not self.broken:
            traceback.print_exc()
            self.broken = f"{what} met an error of the load generator itself: {type(e).__name__}: {e}"

    def censor(self, seq: int, cls: Kind, due: float) -> None:
        """Account for a request that was due and not sent because we stopped."""
        call = Call(seq, cls.name, due)
        call.end(Outcome.CENSORED, "stopped before it was sent")
        self._account(call)

    def _account(self, call: Call) -> None:
        if not call.t_end:
            call.t_end = monotonic()
        if call.outcome is Outcome.OK:
            self.ok += 1
        elif call.outcome is Outcome.CLIENT_SHED:
            self.shed += 1
        elif call.outcome is Outcome.CENSORED:
            self.censored += 1
        else:
            self.failed += 1
        if self._replies is not None:
            self._replies.add(line(call, self.worker))
        if self._on_end is not None:
            self._on_end(call)

    # ── ending ──────────────────────────────────────────────────────────────────────────────────

    @property
    def in_flight(self) -> int:
        return len(self._under_way)

    def silent(self, limit: float) -> int:
        """How many are under way without a token for longer than `limit` seconds."""
        since = monotonic() - limit
        return sum((c.t_last_progress or c.t_intended) < since for c in self._under_way)

    def drain(self, within: float) -> None:
        """Wait for what is under way, at most `within` seconds; the rest is censored."""
        self._empty.wait(max(0.0, within))
        left = list(self._under_way.items())
        self._under_way.clear()
        for call, _ in left:
            call.end(Outcome.CENSORED, "stopped before it ended")
            self._account(call)
        gevent.killall([greenlet for _, greenlet in left], block=True, timeout=2)

    def close(self, planned: int, t_stop: float) -> LoadEnd:
        """The last words: account and files. Raises LoadError, without an account, when the engine itself broke."""
        self._housekeeping.kill()
        try:
            return self._close(planned, t_stop)
        except OSError as e:
            self._break("the record", e)
            raise LoadError(self.broken) from e
        finally:
            self.client.close()

    def _close(self, planned: int, t_stop: float) -> LoadEnd:
        self._beat()
        end = LoadEnd(monotonic(), self.worker, planned, self.ok, self.failed, self.shed, self.censored, t_stop)
        if self._replies is not None:
            self._replies.close()
        if self.broken:
            raise LoadError(self.broken)
        if self._load is not None:
            self._load.add(records.event_line(end))
            self._load.close()
        return end

    # ── watching itself ─────────────────────────────────────────────────────────────────────────

    def _keep_house(self) -> None:
        while True:
            due = monotonic() + FLUSH_EVERY
            gevent.sleep(FLUSH_EVERY)
            self._delays.append(monotonic() - due)  # between few arrivals, too, our lateness would be in every stamp
            try:
                if self._replies is not None:
                    self._replies.flush()
                if monotonic() - self._beat_at >= BEAT_EVERY:
                    self._beat()
            except OSError as e:  # the disk is full, say
                self._break("the record", e)

    def _beat(self) -> None:
        self._beat_at = max(self._beat_at + BEAT_EVERY, monotonic() - BEAT_EVERY)
        delays, self._delays = sorted(self._delays), []
        cpu, run_queue = self._cpu.look()
        beat = Heartbeat(
            t=monotonic(),
            worker=self.worker,
            in_flight=self.in_flight,
            started=self.started,
            ok=self.ok,
            failed=self.failed,
            shed=self.shed,
            delay_p99=round(delays[int(0.99 * (len(delays) - 1))], 6) if delays else 0.0,
            run_queue=round(run_queue, 5),
            cpu=round(cpu, 5),
        )
        self.client.sweep()
        if self._load is not None:
            self._load.add(records.event_line(beat))
            self._load.flush()
        if self._on_beat is not None:
            self._on_beat(beat)


_DEFAULTS: tuple[tuple[str, object], ...] = tuple(
    (name, f.default)
    for name, f in Call.__dataclass_fields__.items()
    if name not in ("seq", "cls", "t_intended", "itl", "text")
)
_OUTCOMES = {o: str(o) for o in Outcome}
_ALWAYS = ("outcome", "t_end")


def line(call: Call, worker: int) -> bytes:
    """A reply's record: instants to 1 µs, gaps to 0.1 ms."""
    data: dict[str, object] = {
        "worker": worker,
        "seq": call.seq,
        "cls": call.cls,
        "t_intended": round(call.t_intended, 6),
    }
    for name, default in _DEFAULTS:
        value = getattr(call, name)
        if value != default or name in _ALWAYS:
            data[name] = round(value, 6) if type(value) is float else value
    data["outcome"] = _OUTCOMES[call.outcome]
    if call.itl:
        data["itl"] = call.itl
    return orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE)


class Walk:
    """Sends one worker's share of a plan from `begin` on."""

    def __init__(self, engine: Engine, arrivals: Iterable[Arrival], begin: float) -> None:
        self._engine = engine
        self._arrivals = tuple(arrivals)
        self._begin = begin
        self._next = 0
        self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        begin, send = self._begin, self._engine.send
        for arrival in self._arrivals:
            due = begin + arrival.t
            early = due - monotonic()
            while early > 0:
                gevent.sleep(early)
                early = due - monotonic()
            if self._next % 64 == 63:
                gevent.sleep(0)  # behind schedule, too, requests must get to run
            self._next += 1
            send(arrival.seq, arrival.cls, due, arrival.body, fresh=arrival.fresh)

    def stop(self, within: float) -> LoadEnd:
        """Call off what is not yet due, drain, censor the rest, close the account."""
        t_stop = monotonic()
        self._greenlet.kill()
        due = [a for a in self._arrivals[self._next :] if self._begin + a.t < t_stop]
        for arrival in due:
            self._engine.censor(arrival.seq, arrival.cls, self._begin + arrival.t)
        planned = self._next + len(due)
        self._engine.drain(within)
        return self._engine.close(planned, t_stop)


class Arrival:
    """One line of a worker's share; the body is made when it is sent."""

    __slots__ = ("_make", "cls", "fresh", "seq", "t")

    def __init__(self, seq: int, t: float, cls: Kind, fresh: bool, make: Callable[[int], bytes]) -> None:
        self.seq = seq
        self.t = t
        self.cls = cls
        self.fresh = fresh
        self._make = make

    def body(self) -> bytes:
        return self._make(self.seq)
