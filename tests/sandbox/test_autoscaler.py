"""Autoscaling: the arithmetic of kube-controller-manager, what kubelets say, and a queue's length on a live sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from nodes_world import PYTHON, api_of, eventually, require_root_and_prometheus, sandbox

from sandbox.apiserver.tables import _hpa_metric
from sandbox.client import DEPLOYMENTS, HPAS, PODS, HttpApi, Obj
from sandbox.controllers import scaling
from sandbox.controllers.autoscaler import NoMetric, requests, rules
from sandbox.controllers.scaling import History, Pods, Policy, Rules
from sandbox.metrics import Look, Unavailable, Usage, _series, between, parse


@pytest.mark.parametrize(
    ("current", "pods", "target", "wanted"),
    [
        (2, Pods({"a": 10, "b": 10}), 5, 4),
        (2, Pods({"a": 5.4, "b": 5.4}), 5, 2),  # within the tolerance of 10 %
        (4, Pods({"a": 1, "b": 1, "c": 1, "d": 1}), 5, 1),
        (2, Pods({"a": 10}, missing=frozenset("b")), 5, 2),  # the missing one at 0: 10/2 = 5, just right
        (2, Pods({"a": 30}, missing=frozenset("b")), 5, 6),
        (2, Pods({"a": 1}, missing=frozenset("b")), 5, 2),  # the missing one at its target: no shrinking to 1
        (3, Pods({"a": 10}, unready=frozenset("bc")), 5, 3),  # two are starting already
        (3, Pods({"a": 1}, unready=frozenset("bc")), 5, 1),  # what is starting is no reason to keep
    ],
)
def test_replicas_for_an_average(current: int, pods: Pods, target: float, wanted: int) -> None:
    assert scaling.by_average(current, pods, target) == wanted


def test_replicas_for_a_utilization() -> None:
    asked = {"a": 1.0, "b": 1.0, "c": 2.0}
    assert scaling.by_utilization(2, Pods({"a": 1.0, "b": 1.0}), asked, 50) == 4
    assert scaling.by_utilization(2, Pods({"a": 0.5, "b": 0.52}), asked, 50) == 2
    assert scaling.by_utilization(3, Pods({"a": 0.1, "b": 0.1}, missing=frozenset("c")), asked, 50) == 3
    assert scaling.by_utilization(3, Pods({"a": 2.0, "b": 2.0}, unready=frozenset("c")), asked, 50) == 6


def step(current: int, wanted: int, history: History | None = None, **more: object) -> tuple[int, str, str]:
    known: dict[str, object] = {"least": 1, "most": 100, "now": 1000.0, "up": None, "down": Rules(300, ()), **more}
    if history is None:
        history = History([(0.0, current)])
    found = scaling.step(current, wanted, history=history, **known)  # type: ignore[arg-type]
    return found.replicas, found.conditions["AbleToScale"][1], found.conditions["ScalingLimited"][1]


def test_growth_is_at_most_twofold_and_within_bounds() -> None:
    assert step(3, 5) == (5, "ReadyForNewScale", "DesiredWithinRange")
    assert step(3, 50) == (6, "ReadyForNewScale", "ScaleUpLimit")
    assert step(1, 50) == (4, "ReadyForNewScale", "ScaleUpLimit")
    assert step(3, 50, most=5) == (5, "ReadyForNewScale", "TooManyReplicas")
    assert step(3, 1, least=2) == (2, "ReadyForNewScale", "TooFewReplicas")


def test_shrinking_waits_for_a_whole_window() -> None:
    assert step(6, 2, History([(800.0, 5)])) == (5, "ScaleDownStabilized", "DesiredWithinRange")
    assert step(6, 2, History([(600.0, 5)])) == (2, "ReadyForNewScale", "DesiredWithinRange")


def test_behavior_limits_the_pace() -> None:
    up = Rules(0, (Policy("Pods", 2, 60), Policy("Percent", 10, 60)))
    assert step(10, 50, up=up)[0] == 12
    assert step(10, 50, History([(0, 10)], [(990.0, 2)]), up=up)[0] == 10  # used up by the growth of 10 s ago
    assert step(10, 50, up=Rules(0, up.policies, "Min"))[0] == 11
    assert step(10, 50, up=Rules(0, up.policies, "Disabled"))[0] == 10
    down = Rules(0, (Policy("Pods", 3, 60),))
    assert step(10, 1, up=up, down=down) == (7, "ReadyForNewScale", "ScaleDownLimit")
    held = History([(0.0, 10), (980.0, 11)])
    assert step(10, 50, held, up=Rules(30, (Policy("Pods", 99, 60),)))[:2] == (11, "ScaleUpStabilized")


def test_rules_of_a_spec() -> None:
    assert rules(None, 30.0) == (None, Rules(30.0, (Policy("Percent", 100, 15.0),)))
    one = {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 5}], "selectPolicy": "Min"}
    up, down = rules({"scaleUp": {**one, "stabilizationWindowSeconds": 7}, "scaleDown": one}, 30.0)
    assert up == Rules(7.0, (Policy("Pods", 1, 5),), "Min") and down == Rules(30.0, (Policy("Pods", 1, 5),), "Min")


def test_a_share_of_nothing_is_an_error() -> None:
    pods = [{"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "resources": {"requests": {}}}]}}]
    with pytest.raises(NoMetric, match="missing request for cpu in container c of Pod p"):
        requests(pods, "cpu", "utilization")


def test_kubelets_words() -> None:
    text = """# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container="c",namespace="n",pod="p"} 12.50
container_memory_working_set_bytes{container="c",namespace="n",pod="p"} 1024
node_cpu_usage_seconds_total 90.0 1700000000000
node_memory_working_set_bytes 4096
unknown_thing 1
"""
    cpu, memory = parse("x", text)
    assert cpu == {("n", "p", "c"): 12.5, ("", "x", ""): 90.0} and memory[("n", "p", "c")] == 1024
    later = Look(12.0, {("n", "p", "c"): 13.5, ("", "x", ""): 80.0, ("n", "q", "c"): 1.0}, memory)
    snapshot = between(Look(10.0, cpu, memory), later)
    assert snapshot.of_pod("n", "p") == {"c": Usage(0.5, 1024)}
    assert set(snapshot.usage) == {("n", "p", "c")}, "what began anew, or is new, has no rate yet"


def test_a_metric_that_is_no_gauge_is_refused() -> None:
    assert (
        _series("n", "vllm:num_requests_waiting", {"a": 'x"y'}) == 'vllm:num_requests_waiting{namespace="n",a="x\\"y"}'
    )
    with pytest.raises(Unavailable, match="is cumulative"):
        _series("n", "vllm:request_success_total", {})
    with pytest.raises(Unavailable, match="not a name"):
        _series("n", "up or vector(1)", {})


@pytest.mark.parametrize(
    ("metric", "current", "cell"),
    [
        (
            {"type": "Resource", "resource": {"name": "cpu", "target": {"averageUtilization": 50}}},
            {
                "type": "Resource",
                "resource": {"name": "cpu", "current": {"averageUtilization": 80, "averageValue": "8m"}},
            },
            "cpu: 80%/50%",
        ),
        (
            {"type": "Resource", "resource": {"name": "memory", "target": {"averageValue": "1Gi"}}},
            {"type": "Resource", "resource": {"name": "memory", "current": {"averageValue": "2Gi"}}},
            "memory: 2Gi/1Gi",
        ),
        (
            {"type": "Pods", "pods": {"metric": {"name": "q"}, "target": {"averageValue": "3"}}},
            {"type": "Pods", "pods": {"metric": {"name": "q"}, "current": {"averageValue": "9"}}},
            "9/3",
        ),
        (
            {"type": "External", "external": {"metric": {"name": "q"}, "target": {"averageValue": "3"}}},
            {"type": "External", "external": {"metric": {"name": "q"}, "current": {"averageValue": "9"}}},
            "9/3 (avg)",
        ),
        (
            {"type": "External", "external": {"metric": {"name": "q"}, "target": {"value": "3"}}},
            {"type": ""},
            "<unknown>/3",
        ),
    ],
)
def test_the_cell_that_kubectl_shows(metric: Obj, current: Obj, cell: str) -> None:
    assert _hpa_metric({"spec": {"metrics": [metric]}, "status": {"currentMetrics": [current]}}) == cell


# -- on a live sandbox

BURN = "import sys, time\nprint('burning', flush=True)\nwhile True: pass\n"
QUEUE = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'waiting_requests 9\\n'
        self.send_response(200)
        self.send_header('Content-Type', 'text/plain; version=0.0.4')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(('0.0.0.0', 8000), Handler).serve_forever()
"""


def deployment(name: str, code: str, **more: object) -> Obj:
    container: Obj = {"name": "main", "image": PYTHON, "args": ["python3", "-c", code]}
    container["resources"] = {"requests": {"cpu": "100m", "memory": "16Mi"}}
    notes = {"prometheus.io/scrape": "true", "prometheus.io/port": "8000"} if more.get("scraped") else {}
    template = {"metadata": {"labels": {"app": name}, "annotations": notes}, "spec": {"containers": [container]}}
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": template}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }


def autoscaler(name: str, metric: Obj, most: int = 3) -> Obj:
    ref = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"scaleTargetRef": ref, "minReplicas": 1, "maxReplicas": most, "metrics": [metric]},
    }


CPU: Obj = {
    "type": "Resource",
    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}},
}
WAITING: Obj = {
    "type": "Pods",
    "pods": {"metric": {"name": "waiting_requests"}, "target": {"type": "AverageValue", "averageValue": "3"}},
}


def test_a_busy_cpu_and_a_long_queue_grow_their_deployments(tmp_path: Path) -> None:
    """Nothing is scaled on a metric that is not there; `kubectl top` shows what the autoscaler saw."""
    require_root_and_prometheus()
    metric = {**WAITING, "pods": {**WAITING["pods"], "metric": {"name": "no_such_gauge"}}}

    async def scene(api: HttpApi, kubeconfig: str) -> None:
        for name, code, scraped, wanted in (
            ("burn", BURN, False, CPU),
            ("queue", QUEUE, True, WAITING),
            ("blind", QUEUE, True, metric),
        ):
            await api.create(DEPLOYMENTS, deployment(name, code, scraped=scraped))
            await api.create(HPAS, autoscaler(name, wanted))

        async def grown(name: str) -> bool:
            return bool((await api.get(DEPLOYMENTS, name, "default"))["spec"]["replicas"] == 3)

        for name in ("burn", "queue"):
            await eventually(lambda name=name: grown(name), 30)  # type: ignore[misc]
            status = (await api.get(HPAS, name, "default"))["status"]
            found = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
            assert found["ScalingActive"] == ("True", "ValidMetricFound"), status
        queue = (await api.get(HPAS, "queue", "default"))["status"]["currentMetrics"][0]["pods"]
        assert queue["current"]["averageValue"] == "9"
        blind = (await api.get(HPAS, "blind", "default"))["status"]
        reasons = {c["type"]: c["reason"] for c in blind["conditions"]}
        assert reasons["ScalingActive"] == "FailedGetPodsMetric" and blind["desiredReplicas"] == 1
        assert api._session is not None
        url = f"{api._server}/apis/metrics.k8s.io/v1beta1/namespaces/default/pods?labelSelector=app=burn"

        async def seen() -> list[Obj]:
            async with api._session.get(url) as answer:  # type: ignore[union-attr]
                body = json.loads(await answer.text())
            assert body["kind"] == "PodMetricsList", body
            return [item for item in body["items"] if int(item["containers"][0]["usage"]["cpu"][:-1]) > 10**8]

        assert await eventually(seen, 10), "at least 0.1 cores"
        if shutil.which("kubectl"):
            env = {"KUBECONFIG": kubeconfig, "HOME": str(tmp_path), "PATH": os.environ["PATH"]}

            def top(*args: str) -> str:
                done = subprocess.run(["kubectl", "top", *args], env=env, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                return done.stdout

            assert "node-a-1" in await asyncio.to_thread(top, "nodes")
            assert "burn-" in await asyncio.to_thread(top, "pods", "-n", "default", "--containers")
        pods, _ = await api.list(PODS, "default", labels="app=blind")
        assert len(pods) == 1

    with sandbox(tmp_path / "state") as running:

        async def main() -> None:
            async with api_of(running) as api:
                await scene(api, running.kubeconfig)

        asyncio.run(main())
