"""Alerts as Prometheus has them: each time one begins or ceases to fire becomes a sample, for the timeline.

Nobody has to ask for them: a game day that pages someone should show when.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from gameday import clock
from gameday.errors import PrometheusError
from gameday.model import Sample

QUERY = 'ALERTS{alertstate="firing"}'
MOST = 300  # changes told of one run: a storm of alerts must not fill the record
PLACES = ("namespace", "service", "zone", "node", "pod", "instance")  # labels that say where


class Asked(Protocol):
    """A Prometheus: the labels of the series that answer a query. Raises `PrometheusError`."""

    def series(self, query: str) -> Sequence[Mapping[str, str]]: ...


class Alerts:
    """Ask again and again; each `look` yields what has changed since the one before."""

    def __init__(self, prometheus: Asked) -> None:
        self._prometheus = prometheus
        self._firing: dict[str, str] = {}  # by selector: what it is called
        self._told = 0

    def look(self) -> Iterator[Sample]:
        """1 for an alert that fires now, 0 for one that does no more. No answer changes nothing."""
        at = clock.now()
        try:
            now = {selector(labels): called(labels) for labels in self._prometheus.series(QUERY)}
        except PrometheusError:
            return  # that Prometheus is blind is seen and told elsewhere
        begun = [(one, name, 1.0) for one, name in now.items() if one not in self._firing]
        ended = [(one, name, 0.0) for one, name in self._firing.items() if one not in now]
        self._firing = now
        for one, name, value in sorted(begun + ended)[: MOST - self._told]:
            self._told += 1
            yield Sample(at, one, name, value)


def selector(labels: Mapping[str, str]) -> str:
    """The alert's series, as PromQL writes it."""
    told = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()) if k != "__name__")
    return f"ALERTS{{{told}}}"


def called(labels: Mapping[str, str]) -> str:
    """`alert EngineDown (llm, pod-1)`"""
    where = ", ".join(labels[name] for name in PLACES if labels.get(name))
    return f"alert {labels.get('alertname', '?')}{f' ({where})' if where else ''}"
