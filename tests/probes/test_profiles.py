"""Metric profiles: the PromQL is valid, exact at bucket edges, and follows renamed metrics."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gameday.errors import ExperimentError
from gameday.objectives import Alerts, Promql, objective_from_json
from probes.profiles import (
    ENVOY,
    ENVOY_AI_GATEWAY,
    ISTIO,
    NGINX_INGRESS,
    PROFILES,
    SGLANG,
    TENSORFLOW_SERVING,
    TGI,
    TRITON,
    VLLM,
    Metric,
    Profile,
)

PROMTOOL = shutil.which("promtool")
ASKS: tuple[Callable[[Profile], Metric], ...] = (
    lambda p: p.first_token_within(0.5, selector='namespace="llm"'),
    lambda p: p.inter_token_within(0.1, selector='namespace="llm"'),
    lambda p: p.end_to_end_within(2.5),
    lambda p: p.quantile("first token", 0.95),
    lambda p: p.quantile("inter-token", 0.99, window="30s"),
    lambda p: p.quantile("end to end", 0.5),
    lambda p: p.waiting(selector='pod=~"my-llama32-.*"'),
    lambda p: p.running(),
    lambda p: p.cache_usage(),
    lambda p: p.success(),
    lambda p: p.tokens_per_second(),
)


def metrics() -> list[Metric]:
    found = []
    for profile in PROFILES.values():
        for ask in ASKS:
            try:
                found.append(ask(profile))
            except ExperimentError:
                continue  # this vendor does not measure it, and says so
    return found


def test_every_vendor_offers_something() -> None:
    names = [m.name for m in metrics()]
    assert len(names) == len(set(names)) >= 40
    for profile in PROFILES.values():
        assert any(name.startswith(profile.name) for name in names), profile.name


def promtool(tmp_path: Path, groups: dict[str, object], *command: str) -> subprocess.CompletedProcess[str]:
    if PROMTOOL is None:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(groups))
    return subprocess.run([PROMTOOL, *command, str(path)], capture_output=True, text=True, check=False, timeout=60)


def test_prometheus_accepts_every_query(tmp_path: Path) -> None:
    queries = [q for m in metrics() for _, q in m.at_most(1.0).queries()]
    queries.append(Alerts("ServiceDown", within=60.0, labels='severity="page"').query)
    rules = [{"record": f"q:{i}", "expr": q} for i, q in enumerate(queries)]
    done = promtool(tmp_path, {"groups": [{"name": "all", "rules": rules}]}, "check", "rules")
    assert done.returncode == 0, done.stderr
    assert f"{len(queries)} rules found" in done.stdout


def answers(tmp_path: Path, metric: Metric, series: dict[str, str], wanted: float | None, query: str = "") -> None:
    """Hold the query against what the real Prometheus engine computes from these series, after 2 minutes."""
    samples = [] if wanted is None else [{"labels": "{}", "value": wanted}]
    test = {
        "interval": "10s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query or metric.query, "eval_time": "2m", "exp_samples": samples}],
    }
    done = promtool(tmp_path, {"rule_files": [], "evaluation_interval": "10s", "tests": [test]}, "test", "rules")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_share_is_exact_at_an_edge(tmp_path: Path) -> None:
    series = {
        'vllm:time_to_first_token_seconds_bucket{le="0.5"}': "0+90x12",
        'vllm:time_to_first_token_seconds_bucket{le="1.0"}': "0+100x12",
        "vllm:time_to_first_token_seconds_count": "0+100x12",
    }
    answers(tmp_path, VLLM.first_token_within(0.5), series, 0.9)
    answers(tmp_path, VLLM.first_token_within(1.0), series, 1)
    renamed = {name.replace("1.0", "1"): values for name, values in series.items()}
    answers(tmp_path, VLLM.first_token_within(1.0), renamed, 1)


def test_older_names_are_found(tmp_path: Path) -> None:
    answers(tmp_path, VLLM.cache_usage(), {'vllm:gpu_cache_usage_perc{pod="a"}': "0.25x12"}, 0.25)
    answers(tmp_path, VLLM.cache_usage(), {'vllm:kv_cache_usage_perc{pod="a"}': "0.5x12"}, 0.5)
    both = {'vllm:kv_cache_usage_perc{pod="a"}': "0.5x12", 'vllm:gpu_cache_usage_perc{pod="a"}': "0.25x12"}
    answers(tmp_path, VLLM.cache_usage(), both, 0.5)


def test_sglang_is_found_by_a_colon_and_by_an_underscore(tmp_path: Path) -> None:
    answers(tmp_path, SGLANG.waiting(), {'sglang:num_queue_reqs{pod="a"}': "3x12"}, 3)
    answers(tmp_path, SGLANG.waiting(), {'sglang_num_queue_reqs{pod="a"}': "4x12"}, 4)


def test_a_name_may_bring_its_own_matchers(tmp_path: Path) -> None:
    series = {
        'nv_trt_llm_request_metrics{request_type="waiting",namespace="llm"}': "5x12",
        'nv_trt_llm_request_metrics{request_type="active",namespace="llm"}': "7x12",
    }
    answers(tmp_path, TRITON.waiting(selector='namespace="llm"'), series, 5)
    answers(tmp_path, TRITON.running(), series, 7)
    answers(tmp_path, TRITON.waiting(), {'nv_inference_pending_request_count{model="m"}': "2x12"}, 2)
    assert 'request_type="waiting",namespace="llm"' in TRITON.waiting(selector='namespace="llm"').series[0]


def test_gateways_count_their_failures(tmp_path: Path) -> None:
    ai = {
        "gen_ai_server_request_duration_seconds_count": "0+90x12",
        'gen_ai_server_request_duration_seconds_count{error_type="_OTHER"}': "0+10x12",
    }
    answers(tmp_path, ENVOY_AI_GATEWAY.success(), ai, 0.9)
    nginx = {
        'nginx_ingress_controller_requests{status="200"}': "0+60x12",
        'nginx_ingress_controller_requests{status="503"}': "0+30x12",
        'nginx_ingress_controller_requests{status="499"}': "0+10x12",  # the client gave up: on us
    }
    answers(tmp_path, NGINX_INGRESS.success(), nginx, 0.6)


def test_an_older_name_has_its_own_unit(tmp_path: Path) -> None:
    new = {
        'istio_request_duration_milliseconds_bucket{le="1000"}': "0+70x12",
        "istio_request_duration_milliseconds_count": "0+100x12",
    }
    old = {
        'istio_request_duration_seconds_bucket{le="1"}': "0+80x12",
        "istio_request_duration_seconds_count": "0+100x12",
    }
    answers(tmp_path, ISTIO.end_to_end_within(1.0), new, 0.7)
    answers(tmp_path, ISTIO.end_to_end_within(1.0), old, 0.8)


def test_microseconds_become_seconds(tmp_path: Path) -> None:
    series = {
        ':tensorflow:serving:request_latency_bucket{le="1e+06"}': "0+70x12",
        ":tensorflow:serving:request_latency_count": "0+100x12",
    }
    answers(tmp_path, TENSORFLOW_SERVING.end_to_end_within(1.0), series, 0.7)


def test_success_counts_failures(tmp_path: Path) -> None:
    series = {"nv_inference_request_success": "0+90x12", "nv_inference_request_failure": "0+10x12"}
    answers(tmp_path, TRITON.success(), series, 0.9)
    istio = {
        'istio_requests_total{response_code="200"}': "0+75x12",
        'istio_requests_total{response_code="503"}': "0+25x12",
    }
    answers(tmp_path, ISTIO.success(), istio, 0.75)
    answers(tmp_path, ISTIO.success(), {'istio_requests_total{response_code="503"}': "0+25x12"}, 0)
    answers(tmp_path, ISTIO.success(), {}, None)


def test_an_aborted_request_is_no_success(tmp_path: Path) -> None:
    series = {
        'vllm:request_success_total{finished_reason="stop"}': "0+80x12",
        'vllm:request_success_total{finished_reason="abort"}': "0+20x12",
    }
    answers(tmp_path, VLLM.success(), series, 0.8)


def test_the_age_of_stale_series_shows(tmp_path: Path) -> None:
    metric = VLLM.waiting()
    age = metric.at_most(5).queries()[1][1]
    answers(tmp_path, metric, {'vllm:num_requests_waiting{pod="a"}': "3x6"}, 60, age)
    answers(tmp_path, metric, {'vllm:num_requests_waiting{pod="a"}': "3x12"}, 0, age)
    answers(tmp_path, metric, {}, None, age)


def test_the_age_of_all_series_of_a_query(tmp_path: Path) -> None:
    asked = Promql('sum(rate(good{job="x"}[1m])) / sum(rate(total[1m]))', at_least=0.9)
    age = asked.queries()[1][1]
    fresh, old = {'good{job="x",pod="a"}': "0+9x12"}, {'total{job="x",pod="a"}': "0+10x6"}
    both = fresh | {'total{job="x",pod="a"}': "0+10x12"}
    answers(tmp_path, VLLM.waiting(), both, 0, age)
    answers(tmp_path, VLLM.waiting(), fresh | old, 60, age)
    answers(tmp_path, VLLM.waiting(), fresh, None, age)
    answers(tmp_path, VLLM.waiting(), {"other": "0+10x6"}, None, age)


def test_a_misspelt_series_does_not_hide_behind_a_fallback(tmp_path: Path) -> None:
    asked = Promql("sum(rate(misspelt_errors_total[1m])) or 0 * sum(up)", at_most=0.01)
    answers(tmp_path, VLLM.waiting(), {'up{pod="a"}': "1x12"}, None, asked.age)


def test_an_alert_that_is_not_active_is_zero_and_not_missing(tmp_path: Path) -> None:
    query = Alerts("ServiceDown", within=60.0).query
    firing = {'ALERTS{alertname="ServiceDown",alertstate="firing",pod="a"}': "1x12"}
    pending = {'ALERTS{alertname="ServiceDown",alertstate="pending"}': "1x12"}
    answers(tmp_path, VLLM.waiting(), firing, 1, query)
    answers(tmp_path, VLLM.waiting(), pending, 0, query)
    answers(tmp_path, VLLM.waiting(), {}, 0, query)


def test_a_limit_between_edges_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"no bucket edge at 600 ms .* take 500 ms or 750 ms"):
        VLLM.first_token_within(0.6)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: TGI.first_token_within(0.5), "TGI has no latency 'first token'; it has end to end, inter-token"),
        (SGLANG.success, "SGLang does not count good requests"),
        (TRITON.tokens_per_second, "Triton does not count tokens"),
        (ENVOY.cache_usage, "Envoy does not show cache usage"),
        (lambda: VLLM.quantile("first token", 1.5), "a quantile lies between 0 and 1"),
        (lambda: VLLM.first_token_within(0.5, window="1 minute"), "a window is a duration"),
    ],
)
def test_what_a_vendor_does_not_measure_is_an_error(ask: Callable[[], Metric], sentence: str) -> None:
    with pytest.raises(ExperimentError, match=sentence):
        ask()


def test_a_metric_becomes_an_objective_that_can_be_recorded() -> None:
    asked = VLLM.waiting(selector='namespace="llm"').at_most(20)
    assert asked == Promql(
        'sum({__name__="vllm:num_requests_waiting",namespace="llm"})',
        at_most=20,
        name="vLLM waiting",
        series=('{__name__="vllm:num_requests_waiting",namespace="llm"}',),
    )
    assert asked.title == "vLLM waiting ≤ 20"
    assert objective_from_json(asked.to_json()) == asked
