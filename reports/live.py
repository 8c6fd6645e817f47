"""Live progress: a panel that redraws on a terminal, plain lines where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Group, RenderableType
from rich.live import Live as RichLive
from rich.text import Text

from gameday.clock import Instant, now
from gameday.units import show_duration, show_share
from reports.console import console
from reports.words import fine_duration, one_line

PLAIN_EVERY = 5.0  # seconds between plain lines


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known now. Shares and latencies are of the last seconds; None: nothing was seen yet."""

    experiment: str
    phase: str
    left_seconds: float
    per_second: float
    success: float | None
    ttft_p95: float | None  # seconds
    broken: tuple[str, ...]  # what is broken now, in words
    in_flight: int

    @property
    def words(self) -> str:
        success = "–" if self.success is None else show_share(self.success)
        ttft = "–" if self.ttft_p95 is None else fine_duration(self.ttft_p95)
        return (
            f"{self.phase:<7} {_countdown(self.left_seconds):>10} left · {self.per_second:5.1f} req/s"
            f" · success {success} · first token p95 {ttft} · {self.in_flight} in flight"
        )

    @property
    def said_broken(self) -> str:
        return one_line("; ".join(self.broken)) or "nothing"


def _countdown(left: float) -> str:
    return show_duration(max(0.0, round(left)) or 0.0) if left >= 1 else "0 s"


class Live:
    """`with Live() as live: live.update(progress)`, from one thread at a time.

    Where `file` is no terminal it writes a line at most every 5 s and on each change of phase.
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], Instant] = now) -> None:
        self._file = file
        self._clock = clock
        self._rich: RichLive | None = None
        self._last: Progress | None = None
        self._said_at: Instant | None = None

    def __enter__(self) -> Self:
        shown = console(self._file)
        if shown.is_terminal:
            self._rich = RichLive(console=shown, transient=True, auto_refresh=False, redirect_stdout=False)
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def update(self, progress: Progress) -> None:
        if self._rich is not None:
            self._rich.update(_panel(progress), refresh=True)
        elif self._due(progress):
            broken = f" · broken: {progress.said_broken}" if progress.broken else ""
            self.say(f"{progress.experiment}  {progress.words}{broken}")
            self._said_at = self._clock()
        self._last = progress

    def say(self, line: str) -> None:
        """A line that stays: a phase, a proof, a stop. Control characters are taken out."""
        # Asked for anew: the standard output may be captured when we are made and a terminal when we speak.
        out = self._rich.console if self._rich is not None else console(self._file)
        out.print(Text("".join(c if c.isprintable() else " " for c in line)), soft_wrap=True)

    def _due(self, progress: Progress) -> bool:
        if self._last is None or self._said_at is None:
            return True
        changed = (progress.experiment, progress.phase) != (self._last.experiment, self._last.phase)
        return changed or self._clock() - self._said_at >= PLAIN_EVERY


def _panel(progress: Progress) -> RenderableType:
    head = Text.assemble((progress.experiment, "bold"), "  ", progress.words)
    broken = Text.assemble("broken now: ", (progress.said_broken, "bold red" if progress.broken else "green"))
    return Group(head, broken)
