"""The one clock: CLOCK_MONOTONIC of the harness's host, shared by all its processes.

Every instant in a run directory is float seconds of this clock. `Epoch` ties it to wall time once,
for people. Only this module sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

Instant = float


def now() -> Instant:
    return time.monotonic()


@dataclass(frozen=True, slots=True)
class Epoch:
    """`wall` (Unix seconds) and `mono` were read together."""

    wall: float
    mono: Instant

    @classmethod
    def read(cls) -> Epoch:
        return cls(time.time(), time.monotonic())

    def to_wall(self, instant: Instant) -> float:
        return self.wall + (instant - self.mono)

    def to_mono(self, wall: float) -> Instant:
        return self.mono + (wall - self.wall)

    def show(self, instant: Instant) -> str:
        """Local time of day, for consoles and reports."""
        return datetime.fromtimestamp(self.to_wall(instant), UTC).astimezone().strftime("%H:%M:%S")


class Waited(TimeoutError):
    """What was waited for did not come in time; the message names it."""


def wait_until(
    ready: Callable[[], bool], *, within: float, every: float = 0.1, what: str, stop: threading.Event | None = None
) -> None:
    """Wait until `ready()` holds; raise `Waited` naming `what` after `within` seconds or when `stop` is set."""
    deadline = now() + within
    while not ready():
        if now() >= deadline:
            raise Waited(f"{what} did not happen within {within:.0f} s")
        if stop is not None:
            if stop.wait(every):
                raise Waited(f"stopped while waiting for {what}")
        else:
            time.sleep(every)


def pause(for_seconds: float, stop: threading.Event | None = None) -> bool:
    """Sleep, unless `stop` is set first; tells whether the whole time passed."""
    if stop is not None:
        return not stop.wait(max(0.0, for_seconds))
    time.sleep(max(0.0, for_seconds))
    return True
