"""The dashboard: Grafana can load it, Prometheus can answer it, and what it asks for exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promtool
import pytest
import yaml

from sandbox.images.engine import Numbers as Engine
from sandbox.images.gateway import Numbers as Gateway

FILES = sorted((promtool.ROOT / "deploy" / "grafana").glob("*.json"))
DASHBOARD: dict[str, Any] = json.loads((promtool.ROOT / "deploy" / "grafana" / "llm-service.json").read_text())
OURS = {"prometheus": "${datasource}", "grafana": "-- Grafana --"}
ELSEWHERE = {  # what others export: kube-state-metrics, dcgm-exporter, Prometheus itself
    *("kube_deployment_status_replicas_ready", "kube_deployment_spec_replicas"),
    *("kube_node_status_capacity", "kube_node_status_allocatable"),
    *("DCGM_FI_DEV_XID_ERRORS", "DCGM_FI_DEV_GPU_UTIL", "ALERTS"),
}
NAME = re.compile(r"\b((?:vllm:|llm:|gateway_|kube_|DCGM_|ALERTS)[a-zA-Z0-9_:]*)")


def panels() -> list[dict[str, Any]]:
    return [p for p in DASHBOARD["panels"] if p["type"] != "row"]


def queries() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]
    for one in DASHBOARD["annotations"]["list"]:
        if "expr" in one:
            yield one["expr"]


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from walk(one)


def test_there_is_one_dashboard() -> None:
    assert [p.name for p in FILES] == ["llm-service.json"]
    assert DASHBOARD["uid"] == "gameday-llm" and len(DASHBOARD["uid"]) <= 40
    assert "id" not in DASHBOARD  # or importing it would overwrite another
    assert DASHBOARD["schemaVersion"] >= 36


def test_grafana_s_own_models_hold_all_of_it() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="grafana-foundation-sdk is absent")
    read = models.Dashboard.from_json(DASHBOARD)
    assert read.title == DASHBOARD["title"] and len(read.panels) == len(DASHBOARD["panels"])


def test_panels_lie_side_by_side() -> None:
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_data_source_is_the_variable_s() -> None:
    (chosen,) = (v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    assert (chosen["name"], chosen["query"]) == ("datasource", "prometheus")
    sources = [one["datasource"] for one in walk(DASHBOARD) if isinstance(one.get("datasource"), dict)]
    assert len(sources) > 30
    assert all(OURS[s["type"]] == s["uid"] for s in sources)


def test_only_variables_that_exist_are_used() -> None:
    known = {v["name"] for v in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    used = set(re.findall(r"\$\{?([a-zA-Z_]+)", json.dumps(DASHBOARD)))
    assert used == known


def test_every_panel_is_explained_and_asks_something() -> None:
    for panel in panels():
        assert panel["title"] and panel["description"] and panel["targets"], panel["title"]
        refs = [t["refId"] for t in panel["targets"]]
        assert len(refs) == len(set(refs)), panel["title"]
        assert panel["fieldConfig"]["defaults"]["noValue"] == "no data"  # never a green nothing


def test_what_must_be_seen_is_there() -> None:
    asked = "\n".join(queries())
    for name in ("vllm:time_to_first_token_seconds_bucket", "gateway_time_to_first_token_seconds_bucket"):
        for p in ("0.5", "0.95", "0.99"):
            assert f"histogram_quantile({p}, sum by (le) (rate({name}" in asked
    for name in (
        *("gateway_requests_total", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
        *("kube_deployment_status_replicas_ready", "gateway_ejections_total", "DCGM_FI_DEV_XID_ERRORS"),
    ):
        assert name in asked


def test_game_days_are_marked() -> None:
    """By the tag that notifications put on their annotations."""
    (marks,) = (a for a in DASHBOARD["annotations"]["list"] if a["name"] == "Game days")
    assert marks["enable"] and marks["target"] == {
        "limit": 100, "matchAny": False, "tags": ["gameday"], "type": "tags",
    }  # fmt: skip


def test_prometheus_accepts_every_query(tmp_path: Path) -> None:
    filled = [q.replace("$__rate_interval", "1m").replace("$namespace", ".*") for q in queries()]
    assert len(filled) > 30 and not any("$" in q for q in filled)
    promtool.check(tmp_path, filled)


def exported() -> set[str]:
    """The names that the reference stack really exports, and those that our rules record."""
    gateway = Gateway()
    gateway.requests.of("200", "a").inc()
    gateway.ejections.of("a").inc()
    gateway.endpoints.of("used").set(1)
    text = Engine("m").registry.render() + gateway.registry.render()
    names = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
    rules = [r for p in promtool.RULES for g in yaml.safe_load(p.read_text())["groups"] for r in g["rules"]]
    return names | {r["record"] for r in rules if "record" in r}


def test_what_is_asked_for_exists() -> None:
    """In the dashboard and in the rules, by vLLM's current names."""
    known = exported() | ELSEWHERE
    rules = [r for p in promtool.RULES for g in yaml.safe_load(p.read_text())["groups"] for r in g["rules"]]
    asked = {name for q in (*queries(), *(r["expr"] for r in rules)) for name in NAME.findall(q)}
    assert len(asked) > 30
    assert asked <= known, asked - known


def stack() -> list[dict[str, str]]:
    """Every series of the reference stack after some work, counters growing, with the labels of a scrape."""
    engine, gateway = Engine("m"), Gateway()
    for observe in (engine.ttft, engine.itl, engine.e2e, gateway.ttft.observe, gateway.duration.observe):
        observe(0.3)
    for code in ("200", "503"):
        gateway.requests.of(code, "a").inc()
    gateway.ejections.of("llm/m-1").inc()
    gateway.endpoints.of("used").set(6)
    lines = [line for e in (engine, gateway) for line in e.registry.render().splitlines() if line[:1] not in ("", "#")]
    scraped = [re.fullmatch(r"([^{ ]+)(?:\{(.*)\})? (\S+)", line) for line in lines]
    made = []
    for name, labels, value in (m.groups() for m in scraped if m):
        # A label that a scrape also sets is renamed, as Prometheus does it.
        own = re.sub(r"\bpod=", "exported_pod=", f"{labels}," if labels else "")
        growing = re.search(r"_(total|bucket|count|sum)$", name)
        values = f"0+{float(value) * 6:g}x480" if growing else f"{float(value):g}x480"
        made.append({"series": f'{name}{{{own}namespace="llm",pod="p"}}', "values": values})
    others = (
        *(
            f'kube_deployment_{what}{{namespace="llm",deployment="m"}}'
            for what in ("status_replicas_ready", "spec_replicas")
        ),
        *(f'kube_node_status_{what}{{node="n",resource="nvidia_com_gpu"}}' for what in ("capacity", "allocatable")),
        *(f'DCGM_FI_DEV_{what}{{Hostname="n",gpu="0"}}' for what in ("XID_ERRORS", "GPU_UTIL")),
        'ALERTS{alertname="A",alertstate="firing",severity="page",namespace="llm"}',
    )
    return made + [{"series": one, "values": "8x480"} for one in others]


def test_every_panel_has_data_on_the_reference_stack(tmp_path: Path) -> None:
    """Asked of promtool, which is told to expect nothing and complains of every query that has an answer."""
    filled = [q.replace("$__rate_interval", "1m").replace("$namespace", "llm") for q in queries()]
    asked = [{"expr": q, "eval_time": "2h", "exp_samples": []} for q in filled]
    done = promtool.test_rules(tmp_path, {"interval": "15s", "input_series": stack(), "promql_expr_test": asked})
    told = done.stdout + done.stderr
    silent = [q for q in filled if f"expr: {json.dumps(q)}" not in told]
    assert not silent, told[:2000]
    assert "NaN" not in told and ", err: " not in told, told[:2000]
