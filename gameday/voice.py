"""The console, spoken to from a thread of its own.

A console that does not take what is said (Ctrl-S, a pipe that nobody reads) blocks that thread and nothing else:
stop conditions are looked at, and faults are healed, all the same. What is said first is said first; of the progress
only the newest counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable

from gameday import clock
from reports.live import Progress

LINES = 1000  # kept for a console that is blocked
CLOSES_WITHIN = 2.0  # seconds that the end waits for it


class Voice:
    """Says lines and shows progress. Thread-safe."""

    def __init__(self, say: Callable[[str], None], progress: Callable[[Progress], None]) -> None:
        self._say, self._show = say, progress
        self._lines: deque[str] = deque(maxlen=LINES)
        self._progress: Progress | None = None
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def say(self, line: str) -> None:
        with self._changed:
            if not self._closed:
                self._lines.append(line)
                self._wake()
                return
        with contextlib.suppress(OSError, ValueError):
            self._say(line)

    def progress(self, progress: Progress) -> None:
        with self._changed:
            if not self._closed:
                self._progress = progress
                self._wake()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="console", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._lines and self._progress is None:
                    if self._closed:
                        return
                    self._changed.wait()
                line = self._lines.popleft() if self._lines else None
                progress, self._progress = (None, self._progress) if line is not None else (self._progress, None)
                self._busy = True
            with contextlib.suppress(OSError, ValueError):  # a console that is gone (EPIPE, EIO, closed)
                if line is not None:
                    self._say(line)
                elif progress is not None:
                    self._show(progress)

    def close(self) -> None:
        """Wait a moment until all is said; what a blocked console does not take is lost."""
        until = clock.now() + CLOSES_WITHIN
        with self._changed:
            self._progress = None
            while self._thread is not None and (self._lines or self._busy) and (left := until - clock.now()) > 0:
                self._changed.wait(left)
            self._closed = True
            self._lines.clear()
            self._changed.notify_all()
