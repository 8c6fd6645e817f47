"""Prometheus, asked for values: the only module that imports `prometheus_api_client`.

It confirms objectives over windows; it never measures a recovery. Every question is bounded in time, and
every way of not answering becomes a `Sample` that says so.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import requests
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException
from urllib3.util.retry import Retry

from gameday import clock
from gameday.errors import PrometheusError, SettingsError
from gameday.model import Sample
from probes.alerts import Alerts

TIMEOUT = 3.0  # seconds for one query
# TypeError, AttributeError: JSON of another shape than Prometheus' (some other API's).
_NO_ANSWER = (requests.RequestException, PrometheusApiClientException, KeyError, ValueError, TypeError, AttributeError)
RAW = 2000  # characters of a raw answer kept as evidence


class Prometheus:
    """One Prometheus at `url`; the bearer token comes from a file and is never shown."""

    def __init__(self, url: str, token_file: Path | None = None) -> None:
        headers = {}
        if token_file:
            try:
                headers["Authorization"] = f"Bearer {token_file.read_text().strip()}"
            except OSError as wrong:
                raise SettingsError(f"prometheus_token_file {token_file} cannot be read: {wrong.strerror}") from wrong
        self.url = url
        self._connect = PrometheusConnect(url=url, headers=headers, retry=Retry(total=0))

    def sample(self, name: str, query: str) -> Sample:
        """One reading. More than one series is an error: an objective needs one number."""
        at = clock.now()
        try:
            found = self._connect.custom_query(query, timeout=TIMEOUT)
        except _NO_ANSWER as wrong:
            odd = isinstance(wrong, TypeError | AttributeError)
            return Sample(at, query, name, None, error="that is no Prometheus' JSON" if odd else _short(wrong))
        raw = json.dumps(found)[:RAW]
        if isinstance(found, list) and found and not isinstance(found[0], dict):
            found = [{"value": found}]  # a scalar: [time, "value"]
        if not found:
            return Sample(at, query, name, None, error="no data", raw=raw)
        if len(found) > 1:
            return Sample(at, query, name, None, error=f"{len(found)} series, not one", raw=raw)
        try:
            told, value = float(found[0]["value"][0]), float(found[0]["value"][1])
        except (KeyError, IndexError, TypeError, ValueError) as wrong:
            return Sample(at, query, name, None, error=f"unexpected answer ({wrong!r})", raw=raw)
        if not math.isfinite(value):
            return Sample(at, query, name, None, error=f"value is {value}", raw=raw, told=told)
        return Sample(at, query, name, value, raw=raw, told=told)

    def firing(self, matchers: str, expected: tuple[str, ...] = ()) -> Sample:
        """How many alerts with these label matchers fire, those named in `expected` aside; `raw` lists their names.

        An alert that does not fire has no series, so that nothing counts as none only where Prometheus answers.
        """
        at, query = clock.now(), f'ALERTS{{alertstate="firing",{matchers}}}'
        try:
            found = self._connect.custom_query(query, timeout=TIMEOUT)
            names = sorted({str(one["metric"].get("alertname", "?")) for one in found} - set(expected))
        except _NO_ANSWER as wrong:
            return Sample(at, query, "alerts", None, error=_short(wrong))
        return Sample(at, query, "alerts", float(len(names)), raw=", ".join(names)[:RAW])

    def close(self) -> None:
        self._connect.close()

    def series(self, query: str) -> list[dict[str, str]]:
        """The labels of all series that answer. Raises `PrometheusError` where there is no answer."""
        try:
            found = self._connect.custom_query(query, timeout=TIMEOUT)
            return [{str(k): str(v) for k, v in one["metric"].items()} for one in found]
        except TypeError as wrong:
            raise PrometheusError(f"Prometheus at {self.url} answers {query} with no series.") from wrong
        except _NO_ANSWER as wrong:
            raise PrometheusError(f"Prometheus at {self.url} does not answer {query} ({_short(wrong)}).") from wrong

    def targets_up(self) -> float:
        """How many targets are up, by fresh data. Raises `PrometheusError` when there is none."""
        found = self.sample("up", "count(up == 1)")
        if found.value is None:
            raise PrometheusError(f"Prometheus at {self.url} does not answer with data ({found.error}).")
        return found.value


class Sampler:
    """Asks all queries once per interval from one thread, until stopped."""

    def __init__(
        self,
        prometheus: Prometheus,
        queries: tuple[tuple[str, str], ...],
        interval: float,
        emit: Callable[[Sample], None],
    ) -> None:
        self._prometheus, self._queries, self._interval, self._emit = prometheus, queries, interval, emit
        self._alerts = Alerts(prometheus)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prometheus", daemon=True)
        self.last_good = clock.now()
        self.last_error = ""

    def start(self) -> None:
        self.last_good = clock.now()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=TIMEOUT * max(1, len(self._queries)) + 1)

    def blind_for(self) -> float:
        """Seconds since Prometheus last answered at all."""
        return clock.now() - self.last_good

    def _run(self) -> None:
        while not self._stop.is_set():
            begun = clock.now()
            alive = self._prometheus.sample("up", "count(up == 1)")
            if alive.value is not None:
                self.last_good = alive.t
            else:
                self.last_error = alive.error
            self._emit(alive)
            for name, query in self._queries:
                self._emit(self._prometheus.sample(name, query))
            for changed in self._alerts.look():
                self._emit(changed)
            self._stop.wait(max(0.05, self._interval - (clock.now() - begun)))


def _short(wrong: Exception) -> str:
    text = str(wrong)
    # Without retries, urllib3 wraps a read timeout, and requests calls that a failed connection.
    if isinstance(wrong, requests.Timeout) or "timed out" in text:
        return f"timeout after {TIMEOUT:g} s"
    if isinstance(wrong, requests.ConnectionError):
        return "connection failed"
    return text[:200]
