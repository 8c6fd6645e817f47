"""What happens, as it happens: written to the record, kept for whoever looks at it live, and the one stop.

Every part of an experiment writes here and looks here whether it is to stop. Thread-safe.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gameday import clock, record
from gameday.censor import censored
from gameday.errors import RecordError
from gameday.model import About, Event, FaultFacts, FaultMark, Note, Phase, PhaseMark, Reply, Sample, Step, Timeline
from gameday.voice import Voice
from reports.live import Progress

Level = Literal["info", "warning", "inconclusive", "fail", "error"]


class Tape:
    """One experiment's events and samples, and its stop."""

    def __init__(self, say: Callable[[str], None], progress: Callable[[Progress], None] = lambda _: None) -> None:
        self.voice = Voice(say, progress)
        self._guard, self._stops = threading.Lock(), threading.Lock()
        self._recorder: record.Recorder | None = None
        self.events: list[Event] = []
        self.samples: list[Sample] = []
        self.broken = ""  # why the record could not be written, "" while it can
        self.stopping = threading.Event()  # set: no further waiting, heal
        self.breached = False  # a stop condition ended the fault, and nothing else is wrong
        self.interrupted: int | None = None  # by this signal

    # ── writing ─────────────────────────────────────────────────────────────────────────────

    def open(self, directory: Path) -> None:
        try:
            recorder = record.Recorder(directory)
        except OSError as wrong:
            raise RecordError(f"{directory} cannot be written: {wrong.strerror}; choose another --runs-dir.") from wrong
        with self._guard:
            self._recorder = recorder
            for event in self.events:  # what came before there was a record
                recorder.event(event)

    def close(self) -> None:
        with self._guard:
            recorder, self._recorder = self._recorder, None
        if recorder is not None:
            try:
                recorder.close()
            except OSError as wrong:  # what was still to be flushed did not fit
                self.broken = self.broken or str(wrong)
                with contextlib.suppress(OSError):
                    recorder.close()  # its other file
        self.voice.close()

    def emit(self, event: Event) -> None:
        """Record it. Never raises: a full disk must not keep us from healing; it makes the verdict ERROR."""
        with self._guard:
            self.events.append(event)
            try:
                if self._recorder:
                    self._recorder.event(event)
            except (OSError, RecordError) as wrong:
                self.broken = self.broken or str(wrong)

    def sample(self, sample: Sample) -> None:
        with self._guard:
            self.samples.append(sample)
            try:
                if self._recorder:
                    self._recorder.sample(sample)
            except (OSError, RecordError) as wrong:
                self.broken = self.broken or str(wrong)

    def say(self, line: str) -> None:
        self.voice.say(line)

    def note(self, level: Level, text: str) -> None:
        text = censored(text)
        self.emit(Note(clock.now(), level, text))
        if level != "info":
            self.say(f"{level}: {text}")

    def mark(self, step: Step, ok: bool, what: str = "", detail: str = "", **more: Any) -> None:
        self.emit(FaultMark(more.pop("t", clock.now()), step, ok, what, censored(detail), **more))

    def phase(self, phase: Phase, edge: Literal["start", "end"]) -> None:
        self.emit(PhaseMark(clock.now(), phase, edge))

    def timeline(self, about: About, fault: FaultFacts, replies: list[Reply], *more: Event) -> Timeline:
        """What is known so far, as the judge will see it."""
        with self._guard:
            return record.timeline(about, fault, replies, self.samples, [*self.events, *more])

    # ── the stop ────────────────────────────────────────────────────────────────────────────

    def stop(self, level: Level, text: str, *, over: bool = False) -> None:
        """End what is going on: heal, and judge with this note. May be called from any thread.

        The first reason counts, but an error is always noted. `over`: nor is anything wanted after the heal.
        """
        with self._stops:
            first = not self.stopping.is_set()
            self.breached = level == "fail" and (first or self.breached) and not over
            self.stopping.set()
        if first or level == "error":
            self.note(level, text)

    def interrupt(self, number: int) -> None:
        """A signal arrived: stop, heal without waiting for anybody to be ready, and start nothing more."""
        self.interrupted = number
        self.stop("error", f"interrupted by {signal.Signals(number).name}: healing")

    @property
    def stopped(self) -> bool:
        return self.stopping.is_set()

    def resume(self) -> None:
        """After a breached stop condition: the fault was cut short, whether the service comes back is worth knowing."""
        self.stopping.clear()
