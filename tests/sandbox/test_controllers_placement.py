"""Scheduling without an API: filters and their words, spreading, balance, preemption."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox.client import Obj
from sandbox.controllers.objects import milli, scaled, tolerates
from sandbox.controllers.placement import NodeState, best, explain, feasible, preempt, requests, state_of

ZONE, HOST = "topology.kubernetes.io/zone", "kubernetes.io/hostname"


def node(name: str, zone: str = "", *, taints: list[Obj] | None = None, labels: Obj | None = None, **room: Any) -> Obj:
    tags = {HOST: name, **({ZONE: zone} if zone else {}), **(labels or {})}
    return {
        "metadata": {"name": name, "labels": tags},
        "spec": {"taints": taints or []},
        "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110", **room}},
    }


def pod(name: str, labels: Obj | None = None, asks: Obj | None = None, **spec: Any) -> Obj:
    container: Obj = {"name": "main", "image": "x", "resources": {"requests": asks or {}}}
    return {
        "metadata": {"name": name, "namespace": "n", "uid": name, "labels": labels or {}},
        "spec": {"containers": [container], **spec},
    }


def spread(key: str, when: str, skew: int = 1, app: str = "a") -> list[Obj]:
    selector = {"matchLabels": {"app": app}}
    return [{"maxSkew": skew, "topologyKey": key, "whenUnsatisfiable": when, "labelSelector": selector}]


def placed(pods: int, states: list[NodeState], **spec: Any) -> list[str]:
    """The nodes that `pods` equal pods get one after another; "" for refused ones."""
    found = []
    for i in range(pods):
        one = pod(f"p{i}", {"app": "a"}, **spec)
        good, _ = feasible(one, states)
        if not good:
            found.append("")
            continue
        chosen = best(one, good, states)
        chosen.add(one)
        found.append(chosen.name)
    return found


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1", 1000), ("100m", 100), ("1Ki", 1024000), ("1.5", 1500), ("0.0001", 1), ("1e3", 1000000), ("2k", 2000000)],
)
def test_quantities(text: str, amount: int) -> None:
    assert milli(text) == amount


def test_no_quantity() -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        milli("lots")


def test_percentages_round_as_asked() -> None:
    assert (scaled("25%", 3, up=True), scaled("25%", 3, up=False), scaled(2, 3, up=True)) == (1, 0, 2)


def test_requests_count_init_containers_and_limits() -> None:
    one = pod("p", asks={"cpu": "500m"})
    one["spec"]["containers"].append({"name": "gpu", "resources": {"limits": {"nvidia.com/gpu": 1}}})
    one["spec"]["initContainers"] = [{"name": "i", "resources": {"requests": {"cpu": "2"}}}]
    assert requests(one) == {"cpu": 2000, "nvidia.com/gpu": 1000}


def test_the_words_of_a_refusal() -> None:
    states = [
        state_of(node("a", taints=[{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]), ()),
        state_of(node("b", pods="0", cpu="2"), ()),
        state_of(node("c", labels={"x": "y"}), ()),
    ]
    states[2].node["spec"]["unschedulable"] = True
    one = pod("p", asks={"cpu": "3"})
    good, refused = feasible(one, states)
    assert not good
    assert explain(one, refused) == (
        "0/3 nodes are available: 1 Insufficient cpu, 1 Too many pods, 1 node(s) had untolerated taint(s), "
        "1 node(s) were unschedulable. no new claims to deallocate, preemption: 0/3 nodes are available: "
        "3 Preemption is not helpful for scheduling."
    )
    assert explain(one, {}) == "no nodes available to schedule pods"


def test_gpus_are_counted() -> None:
    rich = node("a")
    rich["status"]["allocatable"]["nvidia.com/gpu"] = "2"
    states = [state_of(rich, ()), state_of(node("b"), ())]
    assert placed(3, states, containers=[{"name": "c", "resources": {"limits": {"nvidia.com/gpu": 1}}}]) == [
        "a",
        "a",
        "",
    ]


def test_six_engines_over_three_zones() -> None:
    """Two nodes in each of three zones, ScheduleAnyway: two replicas per zone, one per node."""
    states = [state_of(node(f"node-{z}-{i}", z), ()) for z in "abc" for i in (1, 2)]
    constraints = spread(ZONE, "ScheduleAnyway") + spread(HOST, "ScheduleAnyway")
    assert sorted(placed(6, states, topologySpreadConstraints=constraints)) == sorted(s.name for s in states)


def test_schedule_anyway_gives_in_when_a_zone_is_full() -> None:
    states = [state_of(node("a", "za"), ()), state_of(node("b", "zb", pods="1"), ())]
    got = placed(5, states, topologySpreadConstraints=spread(ZONE, "ScheduleAnyway"))
    assert sorted(got) == ["a", "a", "a", "a", "b"]


def test_do_not_schedule_keeps_the_skew() -> None:
    states = [state_of(node("a", "za"), ()), state_of(node("b", "zb", pods="2"), ())]
    got = placed(6, states, topologySpreadConstraints=spread(ZONE, "DoNotSchedule"))
    assert sorted(got) == ["", "a", "a", "a", "b", "b"]


def test_terminating_pods_do_not_count_for_the_skew() -> None:
    gone = pod("old", {"app": "a"})
    gone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    states = [state_of(node("a", "za"), [gone]), state_of(node("b", "zb", pods="0"), ())]
    assert placed(1, states, topologySpreadConstraints=spread(ZONE, "DoNotSchedule")) == ["a"]


def test_missing_topology_label() -> None:
    one = pod("p", {"app": "a"}, topologySpreadConstraints=spread("no.such/key", "DoNotSchedule"))
    _, refused = feasible(one, [state_of(node("a"), ())])
    assert refused["a"].final
    assert "missing required label" in refused["a"].reasons[0]


def test_load_is_balanced_without_constraints() -> None:
    states = [state_of(node(n), ()) for n in "abc"]
    assert sorted(placed(6, states, containers=[{"name": "c", "resources": {"requests": {"cpu": "1"}}}])) == [*"aabbcc"]


def test_anti_affinity_keeps_apart_both_ways() -> None:
    term = {"topologyKey": HOST, "labelSelector": {"matchLabels": {"app": "a"}}}
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    states = [state_of(node(n), ()) for n in "ab"]
    assert placed(3, states, affinity=apart) == ["a", "b", ""]
    plain = pod("plain", {"app": "a"})
    _, refused = feasible(plain, states)
    assert refused["a"].reasons == ("node(s) didn't satisfy existing pods anti-affinity rules",)


def test_affinity_lets_the_first_of_a_group_in() -> None:
    term = {"topologyKey": ZONE, "labelSelector": {"matchLabels": {"app": "a"}}}
    together = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    states = [state_of(node("a", "za"), ()), state_of(node("b", "zb"), ())]
    assert len(set(placed(3, states, affinity=together))) == 1


def test_host_ports_collide() -> None:
    ports = [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 80}]}]
    states = [state_of(node(n), ()) for n in "ab"]
    assert placed(3, states, containers=ports) == ["a", "b", ""]


def test_preferred_node_affinity() -> None:
    wish = {"weight": 100, "preference": {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}}
    liked = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}}
    states = [state_of(node("a"), ()), state_of(node("b", labels={"disk": "ssd"}), ())]
    assert placed(1, states, affinity=liked) == ["b"]


def test_preemption_takes_the_least_important_and_no_more() -> None:
    half: Obj = {"cpu": "2"}
    cheap, dear = pod("cheap", asks=half, priority=10), pod("dear", asks=half, priority=1000)
    states = [state_of(node("a"), [cheap, dear])]
    vip = pod("vip", asks=half, priority=1000)
    _, refused = feasible(vip, states)
    found = preempt(vip, states, refused, lambda pod: False)
    assert found is not None
    assert [gone["metadata"]["name"] for gone in found[1]] == ["cheap"]
    assert preempt(pod("meek", asks=half, priority=5), states, refused, lambda pod: False) is None


@pytest.mark.parametrize(
    ("toleration", "fits"),
    [
        ({"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}, True),
        ({"key": "gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "gpu", "value": "no"}, False),
        ({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "cpu", "operator": "Exists"}, False),
    ],
)
def test_tolerations(toleration: Obj, fits: bool) -> None:
    assert tolerates(toleration, {"key": "gpu", "value": "yes", "effect": "NoSchedule"}) is fits
