"""Stop conditions (DESIGN 2): what ends an experiment early, healed at once.

They are looked at from threads of their own, so that nothing the experiment waits for keeps them from being seen,
and no slow Prometheus keeps the client's view from being acted on. A breach is FAIL, with its reason; a condition
that cannot be looked at for more than two scrape intervals is INCONCLUSIVE, and heals as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from gameday import clock
from gameday.clock import Instant
from gameday.flow import Flow
from gameday.halt import Ear
from gameday.model import Sample
from gameday.settings import Settings
from gameday.tape import Tape
from gameday.units import show_duration, show_share
from probes.kube import Watcher
from probes.prometheus import TIMEOUT, Prometheus, Sampler

EVERY = 0.25  # seconds between looks at the load, the pods and the stop file
ASK = 1.0  # seconds between questions to Prometheus
WATCH_SILENT = 20.0  # seconds without a sign of life from a watch until it is called blind
LOAD_SILENT = 6.0  # seconds without a heartbeat (one a second) until the load generator is called dead


class Guard:
    """Follows the load, Prometheus and the cluster; `harm` is set while a fault is in force."""

    def __init__(
        self,
        settings: Settings,
        tape: Tape,
        flow: Flow,
        sampler: Sampler,
        watcher: Watcher,
        prometheus: Prometheus,
        ear: Ear,
    ) -> None:
        self._settings, self._tape, self._flow = settings, tape, flow
        self._sampler, self._watcher, self._ear = sampler, watcher, ear
        self._asked = Questions(settings, tape, prometheus)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self.harm: Instant | None = None

    @property
    def armed(self) -> str:
        """What would stop the experiment, for people."""
        settings = self._settings
        window = show_duration(settings.stop_after)
        found = [f"success < {show_share(settings.stop_below)} for {window}"]
        if settings.stop_burn:
            found.append(f"error budget of {show_share(settings.slo)} burns {settings.stop_burn:g} × for {window}")
        if settings.stop_replicas:
            found.append(f"fewer than {settings.stop_replicas} replicas ready")
        found += [str(one) for one in settings.thresholds]
        if settings.stop_alerts:
            found.append(f"an alert with {settings.stop_alerts} fires")
        return f"stops when: {' · '.join(found)} · `gameday stop`"

    def start(self) -> None:
        self._ear.start()
        self._asked.start()
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._ear.stop()
        self._asked.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(EVERY):
                self.look()
        finally:
            if not self._end.is_set():
                self._tape.stop("error", "the stop conditions could not be looked at any more (a bug): healing")

    def look(self) -> None:
        """One look at everything that can be looked at without asking anybody."""
        self._flow.follow()
        self._ear.look()
        self._blind()
        if self.harm is not None:
            self._client(self.harm)
            self._replicas()
        self._asked.judge(self.harm)

    def _blind(self) -> None:
        if not self._flow.alive():
            self._tape.stop("inconclusive", "a load worker was lost")
        if (silent := self._flow.silent_for()) > LOAD_SILENT:
            self._tape.stop("inconclusive", f"the load generator has been silent for {silent:.1f} s")
        limit = _blind_after(self._settings)
        if (blind_for := self._sampler.blind_for()) > limit:
            why = self._sampler.last_error or "no answer"
            self._tape.stop("inconclusive", f"Prometheus has been blind for {blind_for:.1f} s ({why})")
        if blind := self._watcher.blind(WATCH_SILENT):
            self._tape.stop("inconclusive", f"Kubernetes cannot be seen: {blind}")

    def _client(self, harm: Instant) -> None:
        """By completion time, over a whole window since the harm; what hangs beyond its limit is bad already."""
        settings, window = self._settings, show_duration(self._settings.stop_after)
        since = clock.now() - settings.stop_after
        if harm > since or (share := self._flow.share(since)) is None:
            return
        if share < settings.stop_below:
            floor = show_share(settings.stop_below)
            self._tape.stop("fail", f"success fell to {share:.1%} over {window}, below the stop condition of {floor}")
        burn = (1 - share) / (1 - settings.slo)
        if settings.stop_burn and burn >= settings.stop_burn:
            self._tape.stop(
                "fail",
                f"the error budget of {show_share(settings.slo)} burnt {burn:.1f} times too fast over {window}, "
                f"the stop condition is {settings.stop_burn:g}",
            )

    def _replicas(self) -> None:
        floor = self._settings.stop_replicas
        if floor and (ready := sum(pod.ready for pod in self._watcher.engines())) < floor:
            self._tape.stop("fail", f"only {ready} replicas are ready, the stop condition is {floor}")


def _blind_after(settings: Settings) -> float:
    """Seconds without an answer of Prometheus; a question may be under way for `TIMEOUT`."""
    return 2 * settings.scrape_interval + TIMEOUT


class Questions:
    """What Prometheus is asked every second; the answers are judged by the guard, and recorded."""

    def __init__(self, settings: Settings, tape: Tape, prometheus: Prometheus) -> None:
        self._settings, self._tape, self._prometheus = settings, tape, prometheus
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._latest: dict[str, Sample] = {}
        self._good: dict[str, Instant] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        asked: list[tuple[str, Callable[[], Sample]]] = [
            (str(one), lambda one=one: self._prometheus.sample(f"stop: {one}", one.query))  # type: ignore[misc]
            for one in self._settings.thresholds
        ]
        if self._settings.stop_alerts:
            asked.append(("alerts", self._alerts))
        if asked:
            now = clock.now()
            self._good = {name: now for name, _ in asked}
            self._thread = threading.Thread(target=self._run, args=(asked,), name="stop-queries", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=TIMEOUT + 1)

    def _alerts(self) -> Sample:
        return self._prometheus.firing(self._settings.stop_alerts, self._settings.expected_alerts)

    def _run(self, asked: list[tuple[str, Callable[[], Sample]]]) -> None:
        while not self._end.is_set():
            begun = clock.now()
            for name, ask in asked:
                sample = ask()
                self._tape.sample(sample)
                with self._lock:
                    self._latest[name] = sample
                    if sample.value is not None:
                        self._good[name] = sample.t
            self._end.wait(max(0.05, ASK - (clock.now() - begun)))

    def judge(self, harm: Instant | None) -> None:
        """Stop for what is broken since the harm, and for what could not be asked at all."""
        with self._lock:
            latest, good = dict(self._latest), dict(self._good)
        now, limit = clock.now(), _blind_after(self._settings)
        for name, at in good.items():
            if now - at > limit:
                why = latest[name].error if name in latest else "no answer"
                self._tape.stop(
                    "inconclusive", f"the stop condition {name} has been blind for {now - at:.1f} s ({why})"
                )
        if harm is None:
            return
        for one in self._settings.thresholds:
            seen = latest.get(str(one))
            if seen is not None and seen.t >= harm and seen.value is not None and one.broken_by(seen.value):
                self._tape.stop("fail", f"the stop condition {one} is met: {seen.value:.4g}")
        alerts = latest.get("alerts")
        if alerts is not None and alerts.t >= harm and alerts.value:
            self._tape.stop("fail", f"an alert fires that is not of this experiment: {alerts.raw}")
