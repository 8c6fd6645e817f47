"""The leader's view of a load worker on another machine (`gameday load worker`).

Its records come over the connection, are put on this machine's clock, and land in the files that a worker of our own
would write. A worker that is lost, or hands back less than it recorded, makes the run invalid.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gameday.errors import LoadError
from gameday.model import LoadEnd
from loadgen import records, wire as wire_

PING_EVERY = 0.5
RECENT = 16
"""Round trips that the clock's offset is taken from (the quickest of them): 8 s of drift are under 1 ms."""
SILENT_MAX = 5.0
"""Seconds without a word after which a worker is lost."""
PART = 1 << 20


@dataclass(frozen=True, slots=True)
class Offset:
    """The worker's clock minus ours, seconds; the truth is within ± `uncertainty` (half of the round trip)."""

    seconds: float
    uncertainty: float


def offset(sent: float, got: float, answered: float, came: float) -> Offset:
    """From one round trip: `sent` and `came` on our clock, `got` and `answered` on the worker's (as NTP does)."""
    return Offset(((got - sent) + (answered - came)) / 2, ((came - sent) - (answered - got)) / 2)


class Far:
    """One worker elsewhere. A thread speaks to it; the leader asks this object."""

    def __init__(self, number: int, address: str, token: str, ca_file: Path | None, out: Path) -> None:
        self.number = number
        self.name = f"load worker {number} at {address}"
        self.address = address
        self.out = out
        self.in_flight = self.silent = 0
        self.why = ""  # why it was lost
        self.ended = False
        self.offsets: deque[Offset] = deque(maxlen=RECENT)
        self.ready = threading.Event()
        self._wire = wire_.call(address, token, ca_file)
        self._say: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
        self._over = threading.Event()
        self._closing = False
        self._lines = {"replies": 0, "load": 0}
        self.replies = records.Follower(records.replies_path(out, number))
        self.load = records.Follower(records.load_path(out, number))
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    # ── what the leader does ────────────────────────────────────────────────────────────────────

    def give(self, job: Mapping[str, object], plan: Path) -> None:
        """Hand over the job and the plan, and begin to listen."""
        text = plan.read_text(encoding="ascii")
        try:
            self._wire.send({"job": job})
            for at in range(0, len(text), PART):
                self._wire.send({"plan": text[at : at + PART]})
            self._wire.send({"planned": hashlib.sha256(text.encode()).hexdigest()})
        except wire_.Gone as e:
            raise LoadError(f"{self.name} {e}") from e
        self._thread.start()

    def begin(self, at: float) -> None:
        self._say.put({"begin": at + self.best.seconds})

    def stop(self, within: float) -> None:
        self._say.put({"stop": within})

    @property
    def best(self) -> Offset:
        return min(self.offsets, key=lambda o: o.uncertainty)

    @property
    def running(self) -> bool:
        return not self._over.is_set()

    def wait(self, seconds: float) -> bool:
        return self._over.wait(seconds)

    def close(self) -> None:
        self._closing = True
        if self._thread.is_alive():
            self._thread.join(5)
        self._wire.close()

    def account(self) -> LoadEnd:
        """Raises LoadError when the worker was lost or did not hand everything back."""
        if not self.ended:
            raise LoadError(f"{self.name} was lost ({self.why or 'it did not end in time'}): the load is not sound")
        last = records.Follower(records.load_path(self.out, self.number))
        try:
            ends = [e for e in last.events() if isinstance(e, LoadEnd)]
        finally:
            last.close()
        if len(ends) != 1:
            raise LoadError(f"{self.name} gave no account: the load is not sound")
        return ends[0]

    # ── what the thread does ────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        files = {
            "replies": records.Writer(records.replies_path(self.out, self.number)),
            "load": records.Writer(records.load_path(self.out, self.number)),
            "clock": records.Writer(self.out / f"clock.{self.number}.jsonl"),
        }
        try:
            self._serve(files)
        except wire_.Gone as e:
            self.why = self.why or f"it {e}"
        except (KeyError, TypeError, ValueError) as e:
            self.why = f"it does not speak our language: {e!r}"
        finally:
            for file in files.values():
                file.close()
            self._over.set()
            self.ready.set()

    def _serve(self, files: Mapping[str, records.Writer]) -> None:
        heard, ping_at = time.monotonic(), time.monotonic()
        started = False  # until it is, the worker starts its processes and is silent
        while not (self._closing or self.ended or self.why):
            now = time.monotonic()
            if started and now >= ping_at:
                self._wire.send({"ping": now})
                ping_at = now + (PING_EVERY if self.ready.is_set() else 0.02)
            while not self._say.empty():
                self._wire.send(self._say.get())
            for came, message in self._wire.receive(0.02):
                heard = came
                started = started or "ready" in message
                self._take(message, came, files)
            if started and time.monotonic() - heard > SILENT_MAX:
                raise wire_.Gone(f"said nothing for {SILENT_MAX:g} s")

    def _take(self, message: dict[str, Any], came: float, files: Mapping[str, records.Writer]) -> None:
        if "ping" in message:
            self.offsets.append(offset(message["ping"], message["got"], message["answered"], came))
            self._note(came, files["clock"])
            if len(self.offsets) == RECENT:
                self.ready.set()
        for kind in ("replies", "load"):
            if kind in message:
                self._keep(kind, message[kind], files[kind])
        if "in_flight" in message:
            self.in_flight, self.silent = int(message["in_flight"]), int(message["silent"])
        if "error" in message:
            self.why = str(message["error"])
        if "ended" in message:
            if message["ended"] != self._lines:
                self.why = f"it recorded {message['ended']} lines and handed back {self._lines}"
            else:
                self.in_flight = self.silent = 0
                self.ended = True

    def _note(self, now: float, file: records.Writer) -> None:
        best = self.best
        data = {"t": now, "worker": self.number, "offset": best.seconds, "uncertainty": best.uncertainty}
        file.add(orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE))
        file.flush()

    def _keep(self, kind: str, text: str, file: records.Writer) -> None:
        """Put whole lines on our clock."""
        minus = self.best.seconds
        for line in text.splitlines():
            data = orjson.loads(line)
            for name, value in data.items():
                if name == "t" or name.startswith("t_"):
                    data[name] = round(value - minus, 6)
            file.add(orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE))
            self._lines[kind] += 1
        file.flush()
