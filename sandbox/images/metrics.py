"""Counters, gauges and histograms in Prometheus' text format, cheap enough to be scraped every second.

The text of every series is made once; a scrape only joins numbers to it (a `prometheus_client` scrape of a
vLLM-sized registry took 3.6 ms, facts/sandbox-recipes.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, TypeVar

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's own edges, in seconds (facts/loadgen.md); SLOs are best put on one of them.
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LENGTH_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)


class Value:
    """One series of a counter or a gauge."""

    __slots__ = ("_head", "value")

    def __init__(self, name: str, labels: str) -> None:
        self._head = f"{name}{{{labels}}} " if labels else f"{name} "
        self.value: float = 0

    def inc(self, by: float = 1) -> None:
        self.value += by

    def set(self, value: float) -> None:
        self.value = value

    def lines(self) -> Iterator[str]:
        yield f"{self._head}{self.value!r}"


class Histogram:
    """One series of a histogram; `edges` ascend, +Inf is added."""

    __slots__ = ("_counts", "_edges", "_heads", "_sum_head", "sum")

    def __init__(self, name: str, labels: str, edges: Sequence[float]) -> None:
        lead = f"{labels}," if labels else ""
        tail = f"{{{labels}}} " if labels else " "
        self._edges = tuple(edges)
        self._counts = [0] * (len(self._edges) + 1)
        self._heads = [f'{name}_bucket{{{lead}le="{edge!r}"}} ' for edge in map(float, self._edges)]
        self._heads += [f'{name}_bucket{{{lead}le="+Inf"}} ', f"{name}_count{tail}"]
        self._sum_head = f"{name}_sum{tail}"
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self.sum += value

    def lines(self) -> Iterator[str]:
        total = 0
        for head, count in zip(self._heads, self._counts, strict=False):
            total += count
            yield f"{head}{total}"
        yield f"{self._heads[-1]}{total}"
        yield f"{self._sum_head}{self.sum!r}"


Series = TypeVar("Series", Value, Histogram)


class Family(Generic[Series]):
    """All series of one name, told apart by their labels."""

    def __init__(self, name: str, kind: str, about: str, labels: Sequence[str], make: Callable[[str], Series]) -> None:
        self._head = f"# HELP {name} {about}\n# TYPE {name} {kind}"
        self._labels = tuple(labels)
        self._make: Callable[[str], Series] = make
        self._series: dict[tuple[str, ...], Series] = {}

    def of(self, *values: str) -> Series:
        """The series with these label values, in the family's order of labels."""
        found = self._series.get(values)
        if found is None:
            pairs = zip(self._labels, values, strict=True)
            text = ",".join(f'{label}="{_escaped(value)}"' for label, value in pairs)
            found = self._series[values] = self._make(text)
        return found

    def drop(self, *values: str) -> None:
        """Forget a series: it is absent from the next scrape."""
        self._series.pop(values, None)

    def lines(self) -> Iterator[str]:
        yield self._head
        for series in self._series.values():
            yield from series.lines()


class Registry:
    """The metrics of one process, rendered in the order of their making."""

    def __init__(self) -> None:
        self._families: list[Family[Value] | Family[Histogram]] = []

    def values(self, kind: Literal["counter", "gauge"], name: str, about: str, *labels: str) -> Family[Value]:
        family = Family(name, kind, about, labels, lambda text: Value(name, text))
        self._families.append(family)
        return family

    def histograms(self, name: str, about: str, edges: Sequence[float], *labels: str) -> Family[Histogram]:
        family = Family(name, "histogram", about, labels, lambda text: Histogram(name, text, edges))
        self._families.append(family)
        return family

    def render(self) -> str:
        return "\n".join(line for family in self._families for line in family.lines()) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
