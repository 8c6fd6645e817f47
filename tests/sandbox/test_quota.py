"""ResourceQuotas and LimitRanges: the arithmetic, and what is refused. The oracle has the words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from apiserver_world import Cluster, pod, run

from sandbox import quota

PODS, QUOTAS, RANGES = (f"/api/v1/namespaces/default/{name}" for name in ("pods", "resourcequotas", "limitranges"))


def asking(name: str, phase: str = "Running", init: dict[str, Any] | None = None, **requests: str) -> dict[str, Any]:
    made = pod(name)
    made["spec"]["containers"] = [{"name": f"c{i}", "resources": {"requests": requests}} for i in (1, 2)]
    if init:
        made["spec"]["initContainers"] = [{"name": "init", "resources": {"requests": init}}]
    return {**made, "status": {"phase": phase}}


def test_usage_is_of_all_containers_of_living_pods() -> None:
    pods = [asking("a", cpu="500m"), asking("b", cpu="1", init={"cpu": "5"}), asking("c", "Succeeded", cpu="9")]
    use = quota.used(["pods", "count/pods", "requests.cpu", "cpu", "limits.cpu"], lambda plural: pods)
    assert use == {"pods": 2000, "count/pods": 3000, "requests.cpu": 6000, "cpu": 6000, "limits.cpu": 0}


@pytest.mark.parametrize(
    ("thousandths", "like", "text"),
    [(500, "", "500m"), (2000, "", "2"), (0, "1Gi", "0"), (268_435_456_000, "1Gi", "256Mi"), (3_000_000, "4", "3k")],
)
def test_quantities_are_written_as_they_are_given(thousandths: int, like: str, text: str) -> None:
    assert quota.text(thousandths, like) == text


def test_only_what_is_wanted_can_exceed() -> None:
    hard, use = {"pods": "1", "requests.cpu": "2"}, {"pods": 1000, "requests.cpu": 2500}
    assert quota.exceeded("q", hard, use, {"pods": 0, "requests.cpu": 0}) == ""
    found = quota.exceeded("q", hard, use, {"pods": 1000, "requests.cpu": 100})
    assert found == (
        "exceeded quota: q, requested: pods=1,requests.cpu=100m, used: pods=1,requests.cpu=2500m, "
        "limited: pods=1,requests.cpu=2"
    )


def test_scarce_gpus_are_refused_by_a_quota(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        spec = {"hard": {"requests.nvidia.com/gpu": "1"}}
        code, _ = await one.raw("POST", QUOTAS, json={"metadata": {"name": "gpus"}, "spec": spec})
        assert code == 201
        gpu = {"limits": {"nvidia.com/gpu": "1"}}
        greedy = pod("p1", containers=[{"name": "m", "image": "x", "resources": gpu}])
        code, answer = await one.raw("POST", PODS, json=greedy)
        assert code == 201, answer
        code, answer = await one.raw("POST", PODS, json={**greedy, "metadata": {"name": "p2"}})
        assert code == 403 and "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1" in answer["message"]
        code, _ = await one.raw("POST", PODS, json=pod("p3"))
        assert code == 201, "it wants no GPU"

    run(tmp_path, test)


def test_what_is_not_enforced_is_refused(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        async def said(path: str, spec: dict[str, Any]) -> tuple[int, str]:
            code, answer = await one.raw("POST", path, json={"metadata": {"name": "n"}, "spec": spec})
            return code, answer.get("message", "")

        assert await said(QUOTAS, {"hard": {"requests.storage": "1Gi"}}) == (
            501,
            "the sandbox has no quota of requests.storage",
        )
        assert await said(QUOTAS, {"hard": {"pods": "1"}, "scopes": ["BestEffort"]}) == (
            501,
            "the sandbox has no scopes of quotas",
        )
        code, text = await said(RANGES, {"limits": [{"type": "Pod", "max": {"cpu": "1"}}]})
        assert code == 501 and "not of Pod" in text

    run(tmp_path, test)


def test_a_range_holds_requests_and_limits_and_their_ratio(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        limits = [
            {"type": "Container", "min": {"cpu": "100m"}, "max": {"cpu": "2"}, "maxLimitRequestRatio": {"cpu": "4"}}
        ]
        await one.raw("POST", RANGES, json={"metadata": {"name": "l"}, "spec": {"limits": limits}})

        async def said(**resources: dict[str, str]) -> tuple[int, str]:
            made = pod("p", containers=[{"name": "m", "image": "x", "resources": resources}])
            code, answer = await one.raw("POST", PODS + "?dryRun=All", json=made)
            return code, answer.get("message", "")

        assert (await said(requests={"cpu": "1"}, limits={"cpu": "2"}))[0] == 201
        assert "minimum cpu usage per Container is 100m, but request is 50m" in (await said(requests={"cpu": "50m"}))[1]
        code, text = await said(requests={"cpu": "100m"}, limits={"cpu": "3"})
        assert code == 403 and "[maximum cpu usage per Container is 2, but limit is 3, cpu max limit to request" in text

    run(tmp_path, test)
