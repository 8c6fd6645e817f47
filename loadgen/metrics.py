"""The client's view as Prometheus metrics, for users' own Prometheus: histograms on vLLM's bucket edges.

An objective on a bucket edge is exact; an interpolated quantile is not (facts/loadgen.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from gameday.errors import LoadError
from gameday.model import Heartbeat, Outcome
from loadgen.client import Call

TTFT_EDGES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
ITL_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class Durations(Collector):
    """A histogram by class, cheap for every token. What never came is beyond all edges: an outage cannot improve it."""

    def __init__(self, name: str, text: str, edges: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._edges = tuple(edges)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def add(self, cls: str, all_: Iterable[float | None]) -> None:
        """Seconds, or None for what never came (it is not in the sum)."""
        counts = self._counts.setdefault(cls, [0] * (len(self._edges) + 1))
        sum_ = 0.0
        for one in all_:
            counts[-1 if one is None else bisect_left(self._edges, one)] += 1
            sum_ += one or 0.0
        self._sums[cls] = self._sums.get(cls, 0.0) + sum_

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=["cls"])
        names = [*(str(float(edge)) for edge in self._edges), "+Inf"]
        for cls, counts in [*self._counts.items()]:
            below = [sum(counts[: n + 1]) for n in range(len(counts))]
            buckets = list(zip(names, map(float, below), strict=True))
            family.add_metric([cls], buckets, self._sums.get(cls, 0.0))
        yield family


class Metrics:
    """Give `reply` and `beat` to an `Engine`, and `serve` a port."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        mine = self.registry
        self._replies = Counter("gameday_replies", "Requests by class and outcome", ["cls", "outcome"], registry=mine)
        self._tokens = Counter("gameday_tokens", "Tokens received", ["cls"], registry=mine)
        since = "From the intended send time; what never came is in the last bucket"
        self._ttft = Durations("gameday_time_to_first_token_seconds", since, TTFT_EDGES, mine)
        self._itl = Durations("gameday_inter_token_latency_seconds", "Gaps between a reply's tokens", ITL_EDGES, mine)
        self._latency = Durations("gameday_e2e_request_latency_seconds", since, TTFT_EDGES, mine)
        self._in_flight = Gauge("gameday_requests_in_flight", "Requests under way", registry=mine)
        self._delay = Gauge("gameday_schedule_delay_p99_seconds", "In the last second", registry=mine)
        self._run_queue = Gauge("gameday_run_queue_share", "Share of the last second without a CPU", registry=mine)
        self._cpu = Gauge("gameday_cpu_share", "Share of the last second on a CPU", registry=mine)

    def serve(self, port: int, address: str = "127.0.0.1") -> None:
        """Answer GET /metrics. Raises LoadError when the port is taken."""
        try:
            start_http_server(port, addr=address, registry=self.registry)
        except (OSError, OverflowError) as e:
            raise LoadError(f"/metrics cannot be served on port {port}: {e}") from e

    def reply(self, call: Call) -> None:
        self._replies.labels(call.cls, str(call.outcome)).inc()
        self._tokens.labels(call.cls).inc(call.tokens)
        if call.outcome in (Outcome.CLIENT_SHED, Outcome.CENSORED):
            return
        good = call.outcome is Outcome.OK
        self._ttft.add(call.cls, (None if call.t_first is None else call.t_first - call.t_intended,))
        self._latency.add(call.cls, (call.t_end - call.t_intended if good else None,))
        if call.itl:
            self._itl.add(call.cls, call.itl)

    def beat(self, beat: Heartbeat) -> None:
        self._in_flight.set(beat.in_flight)
        self._delay.set(beat.delay_p99)
        self._run_queue.set(beat.run_queue)
        self._cpu.set(beat.cpu)
