"""Alert rules: each fires when it should, and none does on a healthy service (promtool computes, not we)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promtool
import pytest
import yaml

from sandbox import prometheus as sandbox_prometheus
from sandbox.options import COMPRESSED, REAL, Clocks

DAY = 1440  # minutes
POD = 'namespace="llm",model_name="m",pod="{pod}"'


def rules() -> list[dict[str, Any]]:
    return [r for p in promtool.RULES for g in yaml.safe_load(p.read_text())["groups"] for r in g["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def engine(name: str, values: str, pod: str = "a") -> dict[str, str]:
    return {"series": f"vllm:{name}{{{POD.format(pod=pod)}}}", "values": values}


def gateway(name: str, values: str, **labels: str) -> dict[str, str]:
    more = "".join(f',{key}="{value}"' for key, value in labels.items())
    return {"series": f'gateway_{name}{{namespace="llm",pod="g"{more}}}', "values": values}


def requests(*spans: tuple[int, float]) -> list[dict[str, str]]:
    """10 requests a second; spans of (minutes, share that fails)."""
    return [
        gateway("requests_total", counter([(n, 600 * (1 - share)) for n, share in spans]), code="200"),
        gateway("requests_total", counter([(n, 600 * share) for n, share in spans]), code="503"),
    ]


def first_tokens(*spans: tuple[int, float]) -> list[dict[str, str]]:
    """10 first tokens a second; spans of (minutes, share that comes after 2.5 s)."""
    in_time = counter([(n, 600 * (1 - share)) for n, share in spans])
    return [
        gateway("time_to_first_token_seconds_count", counter([(n, 600) for n, _ in spans])),
        gateway("time_to_first_token_seconds_bucket", in_time, le="2.5"),
    ]


def counter(spans: list[tuple[int, float]]) -> str:
    """A counter, a sample a minute, that grows by so much a minute for so many minutes."""
    told, value = [], 0.0
    for minutes, step in spans:
        told.append(f"{value:g}+{step:g}x{minutes - 1}")
        value = float(f"{value:g}") + step * minutes
    return " ".join(told)


XID = 'DCGM_FI_DEV_XID_ERRORS{Hostname="n1",gpu="0"}'
GPUS = 'kube_node_status_{what}{{node="n1",resource="nvidia_com_gpu"}}'


@dataclass(frozen=True)
class Case:
    """What is seen, and the minutes at which the alert fires and does not."""

    alert: str
    seen: list[dict[str, str]]
    fires: tuple[int, ...]
    quiet: tuple[int, ...]


CASES = (
    # Half of all requests fail from minute 60 to 70.
    Case("LLMErrorBudgetBurnsFast", requests((60, 0), (10, 0.5), (170, 0)), (66,), (60, 235)),
    Case("LLMErrorBudgetBurnsFast", requests((120, 0.02)), (60,), (1,)),
    Case("LLMErrorBudgetBurns", requests((2 * DAY, 0.005)), (DAY,), (2,)),
    Case("LLMFirstTokenBudgetBurnsFast", first_tokens((60, 0), (30, 0.6), (170, 0)), (80,), (60, 255)),
    Case("LLMFirstTokenBudgetBurns", first_tokens((2 * DAY, 0.04)), (DAY,), (2,)),
    Case("LLMEnginesGone", [engine("num_requests_running", "1x30 stale")], (40,), (30,)),
    Case(
        "LLMEnginesLost",
        [engine("num_requests_running", "1x90"), engine("num_requests_running", "1x30 stale", "b")],
        (40, 80),
        (30, 33),
    ),
    Case(
        "LLMEngineHangs",
        [
            engine("num_requests_running", "4x30"),
            engine("generation_tokens_total", "0+500x10 5000x20"),
            engine("prompt_tokens_total", "0+500x10 5000x20"),
        ],
        (20,),
        (10,),
    ),
    Case("LLMQueueGrows", [engine("num_requests_waiting", "2x10 30x20")], (20,), (10, 13)),
    Case("LLMCacheFull", [engine("kv_cache_usage_perc", "0.6x10 0.97x20")], (25,), (10, 15)),
    Case("LLMPreempts", [engine("num_preemptions_total", "0x10 0+30x30")], (30,), (10,)),
    Case("LLMGatewayGone", [gateway("in_flight", "3x30 stale")], (40,), (30,)),
    Case("LLMNoEndpoints", [gateway("endpoints", "6x10 0x20", state="used")], (20,), (10,)),
    Case("LLMEjects", [gateway("ejections_total", "0x10 0+1x10 9x40")], (18,), (10, 45)),
    Case("GPUXidFatal", [{"series": XID, "values": "_x9 79x60"}], (12, 60), (8,)),
    Case("GPUXidSeen", [{"series": XID, "values": "_x9 13x20 31x40"}], (12, 33), (8, 27, 60)),
    Case(
        "GPUsMissing",
        [
            {"series": GPUS.format(what="capacity"), "values": "8x40"},
            {"series": GPUS.format(what="allocatable"), "values": "8x10 7x30"},
        ],
        (20,),
        (10, 14),
    ),
)


def test_every_alert_is_tried() -> None:
    assert {case.alert for case in CASES} == set(alerts())


@pytest.mark.parametrize("path", promtool.RULES, ids=lambda p: p.stem)
def test_promtool_accepts_the_rules(path: Path) -> None:
    done = promtool.run("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.alert}-{c.fires[0]}")
def test_it_fires_when_it_should_and_only_then(tmp_path: Path, case: Case) -> None:
    for minutes, wanted in ((case.fires, True), (case.quiet, False)):
        for minute in minutes:
            assert fires(tmp_path, case.alert, case.seen, minute) is wanted, f"{case.alert} at minute {minute}"


def fires(tmp_path: Path, alert: str, seen: list[dict[str, str]], minute: int) -> bool:
    """promtool compares with what is expected: nothing here, so that its answer tells what fires."""
    test = {
        "interval": "1m",
        "input_series": seen,
        "alert_rule_test": [{"alertname": alert, "eval_time": f"{minute}m", "exp_alerts": []}],
    }
    done = promtool.test_rules(tmp_path, test, every="5m" if minute >= DAY else "1m")
    if done.returncode == 0:
        return False
    assert f"alertname: {alert}" in done.stdout + done.stderr, done.stdout + done.stderr
    assert "got:[" in (done.stdout + done.stderr).replace("\n", "").replace(" ", ""), done.stdout + done.stderr
    return True


def test_a_healthy_service_alerts_nobody(tmp_path: Path) -> None:
    """Also 0.05 % of errors, and 0.5 % of late first tokens, are within the budgets."""
    seen = [
        *requests((DAY, 0.0005)),
        *first_tokens((DAY, 0.005)),
        *(engine("num_requests_running", f"4x{DAY}", pod) for pod in "abc"),
        *(engine("num_requests_waiting", f"1x{DAY}", pod) for pod in "abc"),
        *(engine("kv_cache_usage_perc", f"0.5x{DAY}", pod) for pod in "abc"),
        *(engine("num_preemptions_total", f"0x{DAY}", pod) for pod in "abc"),
        *(engine("generation_tokens_total", f"0+900x{DAY}", pod) for pod in "abc"),
        *(engine("prompt_tokens_total", f"0+900x{DAY}", pod) for pod in "abc"),
        gateway("in_flight", f"12x{DAY}"),
        gateway("endpoints", f"6x{DAY}", state="used"),
        gateway("ejections_total", f"1x{DAY}"),
        {"series": GPUS.format(what="capacity"), "values": f"8x{DAY}"},
        {"series": GPUS.format(what="allocatable"), "values": f"8x{DAY}"},
    ]
    quiet = [
        {"alertname": name, "eval_time": f"{minute}m", "exp_alerts": []}
        for name in alerts()
        for minute in (10, 90, DAY - 1)
    ]
    done = promtool.test_rules(tmp_path, {"interval": "1m", "input_series": seen, "alert_rule_test": quiet}, every="5m")
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_error_is_a_ratio_of_0_and_no_request_is_no_ratio(tmp_path: Path) -> None:
    def ratio(seen: list[dict[str, str]], wanted: list[dict[str, Any]]) -> None:
        asked = {"expr": "llm:request_errors:ratio1h", "eval_time": "90m", "exp_samples": wanted}
        done = promtool.test_rules(tmp_path, {"interval": "1m", "input_series": seen, "promql_expr_test": [asked]})
        assert done.returncode == 0, done.stdout + done.stderr

    only_good = [gateway("requests_total", counter([(90, 600)]), code="200")]
    ratio(only_good, [{"labels": 'llm:request_errors:ratio1h{namespace="llm"}', "value": 0}])
    ratio([gateway("requests_total", "7x90", code="200")], [])


def test_every_alert_says_what_to_do() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket", "info"), name
        assert rule["annotations"]["summary"] and rule["annotations"]["description"], name


@pytest.mark.parametrize("clocks", [COMPRESSED, REAL], ids=lambda c: c.name)
def test_the_sandbox_s_alerts_are_promql(tmp_path: Path, clocks: Clocks) -> None:
    path = tmp_path / "alerts.yml"
    path.write_text(sandbox_prometheus.rules(clocks))
    done = promtool.run("check", "rules", path)
    assert done.returncode == 0 and "2 rules found" in done.stdout, done.stdout + done.stderr


def test_the_sandbox_s_alerts_fire_when_engines_are_lost_and_not_when_a_rollout_surges(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(sandbox_prometheus.rules(COMPRESSED))
    # Six, of which two go and come back; then two more for a while.
    lives = ["1x120"] * 4 + ["1x30 stale _x19 1x70"] * 2 + ["_x70 1x20 stale _x29"] * 2
    series = [
        {"series": f'up{{app="my-llama32",namespace="llm",pod="{i}"}}', "values": values}
        for i, values in enumerate(lives)
    ]
    fires = {"exp_labels": {"severity": "page", "namespace": "llm"}}
    asked = [
        {"eval_time": f"{at}s", "alertname": "LLMEnginesLost", "exp_alerts": [fires] if lost else []}
        for at, lost in ((20, False), (35, True), (46, True), (56, False), (75, False), (95, False), (110, False))
    ]
    tests = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "1s",
        "tests": [{"interval": "1s", "input_series": series, "alert_rule_test": asked}],
    }
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump(tests))
    done = promtool.run("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
