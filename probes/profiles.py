"""Metric profiles: what an engine or gateway calls its latency, queue and errors, so that nobody has to write PromQL.

    VLLM.first_token_within(seconds(0.5), selector='namespace="llm"').at_least(0.95)
    VLLM.waiting(selector='namespace="llm"').at_most(20)

A `Metric` is a query with the series behind it; `at_most` and `at_least` make a `Promql` objective of it. Where a
vendor renamed a metric, the newest name that has data is taken (`new or old`). Latency is asked as the *share* of
requests below a bucket's edge: exact, where an interpolated quantile is a guess; a limit between two edges is
refused. Names: facts/loadgen.md; the vendors' own metric references.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gameday.errors import ExperimentError
from gameday.objectives import Promql
from gameday.units import Seconds, show_duration

TTFT_EDGES = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_EDGES = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)


@dataclass(frozen=True, slots=True)
class Metric:
    """A query with one number as its answer, and selectors of the series behind it (one of them exists)."""

    name: str
    query: str
    series: tuple[str, ...]
    unit: str = ""

    def at_most(self, value: float) -> Promql:
        return Promql(self.query, at_most=value, name=self.name, unit=self.unit, series=self.series)

    def at_least(self, value: float) -> Promql:
        return Promql(self.query, at_least=value, name=self.name, unit=self.unit, series=self.series)


@dataclass(frozen=True, slots=True)
class Histogram:
    """A latency: its names (newest first, without suffix), each with its unit in seconds; bucket edges where known."""

    names: Mapping[str, float]
    edges: tuple[Seconds, ...] = ()


@dataclass(frozen=True, slots=True)
class Rate:
    """A counter (newest name first) and the matchers that pick what is meant."""

    names: tuple[str, ...]
    matchers: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """One vendor's names. What a vendor does not measure is absent, and asking for it is an error that says so."""

    name: str
    latencies: Mapping[str, Histogram] = field(default_factory=dict)
    gauges: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    good: Rate | None = None
    failed: Rate | None = None
    every: Rate | None = None  # all requests; good + failed where a vendor has no such counter
    tokens: Rate | None = None

    def first_token_within(self, limit: Seconds, *, window: str = "1m", selector: str = "") -> Metric:
        """Share of requests whose first token came within `limit`."""
        return self._within("first token", limit, window, selector)

    def inter_token_within(self, limit: Seconds, *, window: str = "1m", selector: str = "") -> Metric:
        """Share of gaps between tokens of at most `limit`."""
        return self._within("inter-token", limit, window, selector)

    def end_to_end_within(self, limit: Seconds, *, window: str = "1m", selector: str = "") -> Metric:
        """Share of requests that were answered within `limit`."""
        return self._within("end to end", limit, window, selector)

    def quantile(self, what: str, p: float, *, window: str = "1m", selector: str = "") -> Metric:
        """An interpolated quantile in seconds; `what` is "first token", "inter-token" or "end to end"."""
        if not 0 < p < 1:
            raise ExperimentError(f"a quantile lies between 0 and 1, not {p}")
        found = self._latency(what)

        def ask(name: str) -> str:
            rate = f"sum by (le) (rate({_select(f'{name}_bucket', selector)}[{_checked(window)}]))"
            asked, scale = f"histogram_quantile({p:g}, {rate})", found.names[name]
            return asked if scale == 1 else f"{asked} * {scale:g}"

        series = tuple(_select(f"{n}_count", selector) for n in found.names)
        return Metric(f"{self.name} {what} p{p * 100:g}", _newest(found.names, ask), series, "s")

    def waiting(self, *, selector: str = "") -> Metric:
        """Requests in the queue, all pods together."""
        return self._gauge("waiting", "sum", selector)

    def running(self, *, selector: str = "") -> Metric:
        return self._gauge("running", "sum", selector)

    def cache_usage(self, *, selector: str = "") -> Metric:
        """KV cache in use, 0–1: the fullest pod."""
        return self._gauge("cache usage", "max", selector)

    def success(self, *, window: str = "1m", selector: str = "") -> Metric:
        """Share of requests that the vendor counts as good. (Clients know better: what died exports nothing.)"""
        if self.good is None:
            raise ExperimentError(f"{self.name} does not count good requests")
        if self.every is None and self.failed is None:
            raise ExperimentError(f"{self.name} counts only good requests, so that it shows no share of them")
        good = _rate(self.good, window, selector)
        if self.every is not None:
            total = _rate(self.every, window, selector)
        else:
            assert self.failed is not None
            total = f"({good} + ({_rate(self.failed, window, selector)} or vector(0)))"
        # None good is 0 of what there was; none at all is no data.
        query = f"({good} or vector(0)) / {total}"
        return Metric(f"{self.name} success", query, _series(self.every or self.good, selector), "share")

    def tokens_per_second(self, *, window: str = "1m", selector: str = "") -> Metric:
        """Generated tokens per second, all pods together."""
        if self.tokens is None:
            raise ExperimentError(f"{self.name} does not count tokens")
        query = _rate(self.tokens, window, selector)
        return Metric(f"{self.name} tokens", query, _series(self.tokens, selector), "1/s")

    def _latency(self, what: str) -> Histogram:
        if what not in self.latencies:
            known = ", ".join(sorted(self.latencies)) or "none"
            raise ExperimentError(f"{self.name} has no latency {what!r}; it has {known}")
        return self.latencies[what]

    def _within(self, what: str, limit: Seconds, window: str, selector: str) -> Metric:
        found = self._latency(what)
        if found.edges and not any(abs(limit - e) < 1e-9 for e in found.edges):
            near = " or ".join(show_duration(e) for e in _nearest(found.edges, limit))
            raise ExperimentError(f"{self.name} has no bucket edge at {show_duration(limit)} for {what}: take {near}")

        def ask(name: str) -> str:
            bucket = _select(f"{name}_bucket", f'le=~"{_edge(limit / found.names[name])}"', selector)
            count = _select(f"{name}_count", selector)
            return f"sum(rate({bucket}[{_checked(window)}])) / sum(rate({count}[{window}]))"

        series = tuple(_select(f"{n}_count", selector) for n in found.names)
        return Metric(f"{self.name} {what} ≤ {show_duration(limit)}", _newest(found.names, ask), series, "share")

    def _gauge(self, what: str, by: str, selector: str) -> Metric:
        if what not in self.gauges:
            raise ExperimentError(f"{self.name} does not show {what}")
        names = self.gauges[what]
        query = _newest(names, lambda name: f"{by}({_select(name, selector)})")
        return Metric(f"{self.name} {what}", query, tuple(_select(n, selector) for n in names))


def _nearest(edges: tuple[float, ...], limit: float) -> list[float]:
    below, above = [e for e in edges if e < limit], [e for e in edges if e > limit]
    return below[-1:] + above[:1]


def _select(name: str, *matchers: str) -> str:
    """A selector by name; the name stands as a matcher, for some vendors' names have colons or begin with one.

    A name may bring matchers of its own: `requests{type="waiting"}`.
    """
    name, _, own = name.removesuffix("}").partition("{")
    matchers = (own, *matchers)
    return "{" + ",".join([f'__name__="{name}"', *(m for m in matchers if m)]) + "}"


def _newest(names: Iterable[str], ask: Callable[[str], str]) -> str:
    return " or ".join(ask(name) for name in names)


def _rate(rate: Rate, window: str, selector: str) -> str:
    asked = [f"sum(rate({_select(n, rate.matchers, selector)}[{_checked(window)}]))" for n in rate.names]
    return asked[0] if len(asked) == 1 else f"({' or '.join(asked)})"


def _series(rate: Rate, selector: str) -> tuple[str, ...]:
    return tuple(_select(n, rate.matchers, selector) for n in rate.names)


def _edge(value: float) -> str:
    """An edge as exporters write it: `1` or `1.0`, `2.5`, `1e+06`."""
    plain, short = repr(round(value, 9)), f"{value:g}"
    ways = dict.fromkeys([short, plain, plain.removesuffix(".0")])
    return "|".join(way.replace(".", "[.]").replace("+", "[+]") for way in ways)


def _checked(window: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(ms|s|m|h|d)", window):
        raise ExperimentError(f"a window is a duration as Prometheus writes it (30s, 1m), not {window!r}")
    return window


VLLM = Profile(
    "vLLM",
    latencies={
        "first token": Histogram({"vllm:time_to_first_token_seconds": 1}, TTFT_EDGES),
        "inter-token": Histogram(
            {"vllm:inter_token_latency_seconds": 1, "vllm:time_per_output_token_seconds": 1}, ITL_EDGES
        ),
        "end to end": Histogram({"vllm:e2e_request_latency_seconds": 1}),
    },
    gauges={
        "waiting": ("vllm:num_requests_waiting",),
        "running": ("vllm:num_requests_running",),
        "cache usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    },
    # Aborted requests are "success" to vLLM.
    good=Rate(("vllm:request_success_total", "vllm:request_success"), 'finished_reason!~"abort|error"'),
    every=Rate(("vllm:request_success_total", "vllm:request_success")),
    tokens=Rate(("vllm:generation_tokens_total", "vllm:generation_tokens")),
)

SGLANG = Profile(
    "SGLang",  # its names have had a colon and an underscore, by version
    latencies={
        "first token": Histogram({"sglang_time_to_first_token_seconds": 1, "sglang:time_to_first_token_seconds": 1}),
        "inter-token": Histogram(
            {
                "sglang_inter_token_latency_seconds": 1,
                "sglang:inter_token_latency_seconds": 1,
                "sglang:time_per_output_token_seconds": 1,
            }
        ),
        "end to end": Histogram({"sglang_e2e_request_latency_seconds": 1, "sglang:e2e_request_latency_seconds": 1}),
    },
    gauges={
        "waiting": ("sglang_num_queue_reqs", "sglang:num_queue_reqs"),
        "running": ("sglang_num_running_reqs", "sglang:num_running_reqs"),
        "cache usage": ("sglang_token_usage", "sglang:token_usage"),
    },
    tokens=Rate(("sglang_generation_tokens_total", "sglang:generation_tokens_total")),
)

TGI = Profile(
    "TGI",
    latencies={
        "inter-token": Histogram({"tgi_request_mean_time_per_token_duration": 1}),
        "end to end": Histogram({"tgi_request_duration": 1}),
    },
    gauges={"waiting": ("tgi_queue_size",), "running": ("tgi_batch_current_size",)},
    good=Rate(("tgi_request_success",)),
    every=Rate(("tgi_request_count",)),
    tokens=Rate(("tgi_request_generated_tokens_sum",)),
)

TRITON = Profile(
    "Triton",
    # To the first answer, which is a token only where the model streams; off unless --metrics-config says so.
    latencies={"first token": Histogram({"nv_inference_first_response_histogram_ms": 0.001})},
    gauges={  # the TensorRT-LLM backend's own, else what Triton queues in front of any backend
        "waiting": ('nv_trt_llm_request_metrics{request_type="waiting"}', "nv_inference_pending_request_count"),
        "running": ('nv_trt_llm_request_metrics{request_type="active"}',),
        "cache usage": ('nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction"}',),
    },
    good=Rate(("nv_inference_request_success",)),
    failed=Rate(("nv_inference_request_failure",)),
)

TENSORFLOW_SERVING = Profile(
    "TensorFlow Serving",
    latencies={"end to end": Histogram({":tensorflow:serving:request_latency": 1e-6})},
    good=Rate((":tensorflow:serving:request_count",), 'status="OK"'),
    every=Rate((":tensorflow:serving:request_count",)),
)

ISTIO = Profile(
    "Istio",
    latencies={
        "end to end": Histogram({"istio_request_duration_milliseconds": 0.001, "istio_request_duration_seconds": 1})
    },
    good=Rate(("istio_requests_total",), 'response_code!~"5..|0|429"'),
    every=Rate(("istio_requests_total",)),
)

ENVOY = Profile(
    "Envoy",
    latencies={"end to end": Histogram({"envoy_cluster_upstream_rq_time": 0.001})},
    gauges={
        "waiting": ("envoy_cluster_upstream_rq_pending_active",),
        "running": ("envoy_cluster_upstream_rq_active",),
    },
    good=Rate(("envoy_cluster_upstream_rq_xx",), 'envoy_response_code_class!="5"'),
    every=Rate(("envoy_cluster_upstream_rq_xx",)),
)

INFERENCE_GATEWAY = Profile(
    "Inference gateway",  # Gateway API inference extension; objective since v1, model before
    latencies={
        "end to end": Histogram(
            {"inference_objective_request_duration_seconds": 1, "inference_model_request_duration_seconds": 1}
        )
    },
    gauges={
        "waiting": ("inference_pool_average_queue_size",),
        "running": ("inference_objective_running_requests", "inference_model_running_requests"),
        "cache usage": ("inference_pool_average_kv_cache_utilization",),
    },
)

ENVOY_AI_GATEWAY = Profile(
    "Envoy AI Gateway",  # OpenTelemetry's names for generative AI, as its Prometheus exporter writes them
    latencies={
        "first token": Histogram({"gen_ai_server_time_to_first_token_seconds": 1}),
        "inter-token": Histogram({"gen_ai_server_time_per_output_token_seconds": 1}),
        "end to end": Histogram({"gen_ai_server_request_duration_seconds": 1}),
    },
    good=Rate(("gen_ai_server_request_duration_seconds_count",), 'error_type=""'),
    every=Rate(("gen_ai_server_request_duration_seconds_count",)),
    tokens=Rate(("gen_ai_client_token_usage_token_sum", "gen_ai_client_token_usage_sum"), 'gen_ai_token_type="output"'),
)

NGINX_INGRESS = Profile(
    "ingress-nginx",
    latencies={"end to end": Histogram({"nginx_ingress_controller_request_duration_seconds": 1})},
    good=Rate(("nginx_ingress_controller_requests",), 'status!~"5..|499|429"'),
    every=Rate(("nginx_ingress_controller_requests",)),
)

SANDBOX_GATEWAY = Profile(
    "gateway",
    latencies={
        "first token": Histogram({"gateway_time_to_first_token_seconds": 1}, TTFT_EDGES),
        "end to end": Histogram({"gateway_request_duration_seconds": 1}),
    },
    gauges={"running": ("gateway_in_flight",)},
    good=Rate(("gateway_requests_total",), 'code!~"5.."'),
    every=Rate(("gateway_requests_total",)),
)

PROFILES: Mapping[str, Profile] = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "tgi": TGI,
    "triton": TRITON,
    "tensorflow-serving": TENSORFLOW_SERVING,
    "istio": ISTIO,
    "envoy": ENVOY,
    "inference-gateway": INFERENCE_GATEWAY,
    "envoy-ai-gateway": ENVOY_AI_GATEWAY,
    "ingress-nginx": NGINX_INGRESS,
    "sandbox-gateway": SANDBOX_GATEWAY,
}
