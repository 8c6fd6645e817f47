"""Stop conditions (DESIGN 2): what ends an experiment early, healed at once.

They are looked at from a thread of their own, so that nothing the experiment waits for keeps them from being seen.
"""

from __future__ import annotations

import threading

from gameday import clock
from gameday.flow import Flow
from gameday.settings import Settings
from gameday.tape import Tape
from gameday.units import show_duration
from probes.kube import Watcher
from probes.prometheus import TIMEOUT, Sampler

EVERY = 0.25  # seconds between looks
WATCH_SILENT = 20.0  # seconds without a sign of life from a watch until it is called blind


class Guard:
    """Follows the load, Prometheus and the watches; `harm` is set while a fault is in force."""

    def __init__(self, settings: Settings, tape: Tape, flow: Flow, sampler: Sampler, watcher: Watcher) -> None:
        self._settings, self._tape, self._flow = settings, tape, flow
        self._sampler, self._watcher = sampler, watcher
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self.harm: clock.Instant | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(EVERY):
                self.look()
        finally:
            if not self._end.is_set():
                self._tape.stop("error", "the stop conditions could not be looked at any more (a bug): healing")

    def look(self) -> None:
        """One look at everything."""
        settings = self._settings
        self._flow.follow()
        if not self._flow.alive():
            self._tape.stop("inconclusive", "a load worker was lost")
        limit = 2 * settings.scrape_interval + TIMEOUT  # a question may be under way for TIMEOUT
        if (blind_for := self._sampler.blind_for()) > limit:
            why = self._sampler.last_error or "no answer"
            self._tape.stop("inconclusive", f"Prometheus has been blind for {blind_for:.1f} s ({why})")
        if blind := self._watcher.blind(WATCH_SILENT):
            self._tape.stop("inconclusive", f"Kubernetes cannot be seen: {blind}")
        since, harm = clock.now() - settings.stop_after, self.harm
        if harm is not None and harm <= since and (share := self._flow.share(since)) < settings.stop_below:
            self._tape.stop(
                "fail",
                f"success fell to {share:.1%} over {show_duration(settings.stop_after)}, "
                f"below the stop condition of {settings.stop_below:.0%}",
            )
