"""The client's view as Prometheus metrics, for users' own Prometheus: histograms on vLLM's bucket edges.

An objective on a bucket edge is exact; an interpolated quantile is not (facts/loadgen.md).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from gameday.errors import LoadError
from gameday.model import Heartbeat
from loadgen.client import Call

TTFT_EDGES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
ITL_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class Metrics:
    """Give `reply` and `beat` to an `Engine`, and `serve` a port."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        mine = self.registry
        self._replies = Counter("gameday_replies", "Requests by class and outcome", ["cls", "outcome"], registry=mine)
        self._tokens = Counter("gameday_tokens", "Tokens received", ["cls"], registry=mine)
        self._ttft = Histogram(
            "gameday_time_to_first_token_seconds",
            "From the intended send time",
            ["cls"],
            buckets=TTFT_EDGES,
            registry=mine,
        )
        self._itl = Histogram(
            "gameday_inter_token_latency_seconds",
            "Mean gap between a reply's tokens",
            ["cls"],
            buckets=ITL_EDGES,
            registry=mine,
        )
        self._latency = Histogram(
            "gameday_e2e_request_latency_seconds",
            "From the intended send time",
            ["cls"],
            buckets=TTFT_EDGES,
            registry=mine,
        )
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
        self._latency.labels(call.cls).observe(call.t_end - call.t_intended)
        if call.t_first is not None:
            self._ttft.labels(call.cls).observe(call.t_first - call.t_intended)
        if call.itl:
            self._itl.labels(call.cls).observe(sum(call.itl) / len(call.itl))

    def beat(self, beat: Heartbeat) -> None:
        self._in_flight.set(beat.in_flight)
        self._delay.set(beat.delay_p99)
        self._run_queue.set(beat.run_queue)
        self._cpu.set(beat.cpu)
