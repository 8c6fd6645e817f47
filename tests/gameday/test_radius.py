"""The blast radius: one planted violation for each thing that must not be hit, and the same plan allowed without it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from faults import NodeCrash, NodeDrain, PodKill, Xid, Zone, ZoneOutage, ZonePartition
from faults.base import Apply, Evict, Fault, Plan, Roll, View
from gameday import radius
from gameday.cluster import Node, Obj, Pod, Refused
from gameday.errors import TargetError
from gameday.kinds import ENDPOINTSLICES, NODES, PDBS, PODS, Kind
from gameday.settings import Settings, load

PROTECTED = str(Settings.model_fields["protected"].default)

OUTAGE = ZoneOutage(Zone("a"), lasting=60)


def pod(name: str, zone: str, app: str = "engine", **more: Any) -> Pod:
    made = Pod(
        name=name,
        namespace="llm",
        uid=f"uid-{name}",
        node=f"node-{zone}",
        zone=zone,
        ip=f"10.244.0.{sum(name.encode()) % 250}",
        phase="Running",
        ready=True,
        terminating=False,
        labels={"app": app},
        gpus=1,
        host_network=False,
        ports=(8000,),
        restarts=0,
        owner=f"ReplicaSet/{app}-5d4f",
        container=app,
        waiting="",
    )
    return replace(made, **more)


class Fake:
    """The reads that a check makes, answered from a table; a missing entry is a 403."""

    def __init__(self, **objects: list[Obj]) -> None:
        self.objects = {"nodes": NODE_OBJECTS, "poddisruptionbudgets": [], **objects}

    def list(self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = "") -> list[Obj]:
        if kind.plural not in self.objects:
            raise Refused(403, "Forbidden", f"{kind.plural} is forbidden")
        return self.objects[kind.plural]

    def find(self, kind: Kind, name: str, namespace: str | None = None) -> Obj | None:
        return next((one for one in self.list(kind) if one["metadata"]["name"] == name), None)


NODE_OBJECTS: list[Obj] = [{"metadata": {"name": f"node-{zone}", "labels": {}}} for zone in "abc"]


def view(*more: Pod, zones: str = "abc", **changes: Any) -> View:
    pods = tuple(pod(f"engine-{zone}{number}", zone) for zone in zones for number in range(2))
    gates = tuple(pod(f"gate-{zone}", zone, "gateway") for zone in zones)
    made = View(
        namespace="llm",
        selector="app=engine",
        engines=pods,
        pods=(*pods, *gates, *more),
        nodes=tuple(Node(f"node-{zone}", f"uid-{zone}", zone, True, False, 2) for zone in zones),
        token="t1",
        probers=(),
        labels={},
        seed=7,
        max_share=1.0,
        expendable=False,
        allow_node_replacement=False,
        sandbox=True,
    )
    return replace(made, **changes)


def check(
    fault: Fault | Plan, seen: View | None = None, cluster: Fake | None = None, **settings: Any
) -> tuple[str, ...]:
    seen = seen or view()
    plan = fault if isinstance(fault, Plan) else fault.plan(seen)
    given: Settings = load({"selector": "app=engine"} | settings)
    return radius.check(plan, seen, given, cluster or Fake())  # type: ignore[arg-type]


def refused(told: str, *given: Any, **settings: Any) -> None:
    with pytest.raises(TargetError, match=told):
        check(*given, **settings)


@pytest.mark.parametrize(
    "fault", [PodKill(lasting=20), OUTAGE, ZonePartition(Zone("a"), lasting=60), Xid(79, lasting=60)]
)
def test_an_ordinary_fault_may_begin(fault: Fault) -> None:
    assert check(fault) == ()


# ── selectors ───────────────────────────────────────────────────────────────────────────────────


def with_selector(selector: Mapping[str, Any], *, target: bool = False) -> Plan:
    """A partition of which one selector was tampered with."""
    plan = ZonePartition(Zone("a"), lasting=60).plan(view())
    (act,) = plan.acts
    assert isinstance(act, Apply)
    manifest = copy.deepcopy(act.manifest)
    if target:
        manifest["spec"]["target"]["selector"] = dict(selector)
    else:
        manifest["spec"]["selector"] = dict(selector)
    return replace(plan, acts=(replace(act, manifest=manifest),))


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize(
    "selector", [{}, {"namespaces": ["llm"]}, {"namespaces": ["llm"], "pods": {}}, {"pods": {"llm": ["x"]}}]
)
def test_an_empty_selector_is_refused(selector: Mapping[str, Any], target: bool) -> None:
    refused("empty selector", with_selector(selector, target=target))


def test_a_namespace_that_is_not_allowed_is_refused() -> None:
    refused("reaches into kube-system", with_selector({"namespaces": ["llm"], "pods": {"kube-system": ["dns"]}}))
    refused("reaches into other", with_selector({"namespaces": ["other"], "labelSelectors": {"a": "b"}}, target=True))


# ── shares ──────────────────────────────────────────────────────────────────────────────────────


def test_more_zones_than_allowed_are_refused() -> None:
    refused("1 of 3 zones would lose every engine", OUTAGE, max_zones=0.3)


def test_more_nodes_than_allowed_are_refused() -> None:
    refused("would hit 1 of 3 nodes", Xid(79, lasting=60), max_nodes=0.3)


def test_an_expendable_stack_may_lose_them() -> None:
    assert check(OUTAGE, view(expendable=True), max_zones=0.3, max_nodes=0.3) == ()


# ── protected ───────────────────────────────────────────────────────────────────────────────────


def test_a_protected_pod_is_never_hit() -> None:
    vip = {"app": "engine", "gameday.dev/protected": "true"}
    refused("llm/vip must not be hit", OUTAGE, view(pod("vip", "a", "other", labels=vip)))
    assert check(OUTAGE, view(pod("vip", "b", "other", labels=vip))) == ()
    assert check(OUTAGE, view(pod("vip", "a", "other", labels={"gameday.dev/protected": "false"}))) == ()


def test_a_protected_node_is_never_hit_not_even_on_an_expendable_stack() -> None:
    nodes = [{"metadata": {"name": "node-a", "labels": {"tier": "gold"}}}]
    refused("node node-a must not be hit", OUTAGE, view(expendable=True), Fake(nodes=nodes), protected="tier")
    assert check(OUTAGE, view(), Fake(nodes=nodes), protected="tier=silver") == ()


# ── budgets and capacity ────────────────────────────────────────────────────────────────────────


def budget(healthy: int, desired: int, **spec: Any) -> Fake:
    selector = {"matchExpressions": [{"key": "app", "operator": "In", "values": ["engine"]}]}
    status = {"currentHealthy": healthy, "desiredHealthy": desired}
    return Fake(
        poddisruptionbudgets=[
            {"metadata": {"name": "engines"}, "spec": {"selector": selector, **spec}, "status": status}
        ]
    )


def test_a_budget_that_the_rest_would_not_meet_is_heeded() -> None:
    refused("engines wants 5 pods; 4 of 6 would be left", OUTAGE, view(), budget(6, 5, minAvailable=5))
    assert check(OUTAGE, view(), budget(6, 4, minAvailable=4)) == ()
    assert check(OUTAGE, view(), budget(6, 5, minAvailable=5), overrule_pdbs=True) == ()


def test_a_budget_on_evictions_does_not_forbid_an_outage() -> None:
    assert check(OUTAGE, view(), budget(6, 5, maxUnavailable=1)) == ()


def test_a_budget_that_is_not_met_before_anything_was_done_is_heeded() -> None:
    refused(r"not met as it is \(4 healthy of 5\)", OUTAGE, view(), budget(4, 5, maxUnavailable=1))


def test_budgets_that_may_not_be_read_are_told_not_assumed() -> None:
    fake = Fake()
    del fake.objects["poddisruptionbudgets"]
    assert check(OUTAGE, view(), fake) == ("PodDisruptionBudgets cannot be seen: poddisruptionbudgets is forbidden",)


def test_how_busy_the_rest_would_be() -> None:
    seen = view()
    then, hit, ready = radius.busy_without(OUTAGE.plan(seen), seen, 0.7)
    assert (round(then, 3), hit, ready) == (1.05, 2, 6)
    alone = view(zones="a", expendable=True)
    everything = replace(PodKill(lasting=20).plan(alone))
    facts = replace(everything.facts, pods=tuple(one.key for one in alone.pods))
    assert radius.busy_without(replace(everything, facts=facts), alone, 0.1)[0] == float("inf")


# ── what the harness stands on ──────────────────────────────────────────────────────────────────


def behind(*names: str, ready: bool = True) -> Fake:
    endpoints = [{"targetRef": {"name": name}, "conditions": {"ready": ready}} for name in names]
    return Fake(endpointslices=[{"metadata": {"name": "s"}, "endpoints": endpoints}])


def test_a_prometheus_inside_is_refused() -> None:
    seen = view(pod("prometheus-0", "a", "prometheus"))
    url = "http://prometheus.llm.svc:9090"
    refused(
        r"Prometheus lies inside the blast radius \(llm/prometheus-0\)",
        OUTAGE,
        seen,
        behind("prometheus-0"),
        prometheus=url,
    )
    assert check(OUTAGE, view(pod("prometheus-0", "b")), behind("prometheus-0"), prometheus=url) == ()


def test_a_gateway_of_which_something_is_left_may_be_hit() -> None:
    url = "http://gateway.llm.svc:8080"
    assert check(OUTAGE, view(), behind("gate-a", "gate-b", "gate-c"), target=url) == ()
    refused("the gateway that the load goes through lies inside", OUTAGE, view(), behind("gate-a"), target=url)


def test_a_pod_address_is_followed() -> None:
    address = pod("gate-a", "a", "gateway").ip
    refused(r"lies inside the blast radius \(llm/gate-a\)", OUTAGE, view(), target=f"http://{address}:8000")


def test_what_is_outside_the_cluster_or_may_not_be_read() -> None:
    assert check(OUTAGE, target="https://llm.example.com", prometheus="http://127.0.0.1:9090") == ()
    assert check(OUTAGE, target="http://localhost:8080", prometheus="https://prometheus.example:9090") == ()
    (told,) = check(OUTAGE, prometheus="http://prometheus.monitoring.svc.cluster.local:9090")
    assert "cannot be seen: endpointslices is forbidden" in told


def test_a_load_generator_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "gameday-nightly")
    own = {"metadata": {"name": "gameday-nightly", "namespace": "llm", "uid": "u"}, "spec": {"nodeName": "node-a"}}
    refused("the load generator lies inside", OUTAGE, view(), Fake(pods=[own]), in_cluster=True)
    own["spec"] = {"nodeName": "node-b"}
    assert check(OUTAGE, view(), Fake(pods=[own]), in_cluster=True) == ()


def test_chaos_mesh_inside_is_refused() -> None:
    label = {"app.kubernetes.io/part-of": "chaos-mesh"}
    refused("Chaos Mesh lies inside", OUTAGE, view(pod("chaos-daemon", "a", labels=label)))
    manager = {"metadata": {"name": "ccm", "namespace": "chaos", "uid": "u"}, "spec": {"nodeName": "node-a"}}
    refused("Chaos Mesh's controller lies inside", OUTAGE, view(), Fake(pods=[manager]), chaos_namespace="chaos")
    other = {"metadata": {"name": "ccm2", "namespace": "chaos", "uid": "v"}, "spec": {"nodeName": "node-b"}}
    assert check(OUTAGE, view(), Fake(pods=[manager, other]), chaos_namespace="chaos") == ()


def test_the_kinds_are_those_that_are_read() -> None:
    """The fake answers by plural; a renamed kind would make every check above pass for nothing."""
    assert [kind.plural for kind in (NODES, PDBS, ENDPOINTSLICES, PODS)] == [
        "nodes",
        "poddisruptionbudgets",
        "endpointslices",
        "pods",
    ]


# ── pods of other namespaces ────────────────────────────────────────────────────────────────────

CRASH = NodeCrash(lasting=60)


class Everywhere(Fake):
    """Pods of all namespaces, asked for by their node."""

    def list(self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = "") -> list[Obj]:
        found = super().list(kind, namespace, labels=labels, fields=fields)
        if kind is not PODS or not fields:
            return found
        assert namespace is None, "a reset knows no namespace"
        return [one for one in found if fields == f"spec.nodeName={one['spec']['nodeName']}"]


def neighbour(namespace: str = "shop", owner: str = "ReplicaSet", phase: str = "Running", **labels: str) -> Obj:
    (node,) = CRASH.plan(view()).facts.nodes
    metadata = {"name": "cart-1", "namespace": namespace, "uid": "u", "labels": labels}
    owners = [{"kind": owner, "name": "cart"}] if owner else []
    return {"metadata": metadata | {"ownerReferences": owners}, "spec": {"nodeName": node}, "status": {"phase": phase}}


@pytest.mark.parametrize("owner", ["ReplicaSet", "StatefulSet", ""])
def test_a_node_crash_that_ends_pods_of_other_namespaces_is_refused(owner: str) -> None:
    cluster = Everywhere(pods=[neighbour(owner=owner)])
    refused("it would end shop/cart-1 as well, outside allow_namespaces", CRASH, view(), cluster)
    assert check(CRASH, view(), cluster, allow_namespaces=("llm", "shop")) == ()
    drain = NodeDrain(lasting=60).plan(view())
    assert check(drain, view(), Everywhere(pods=[neighbour()])) == (), "a drain evicts nobody of another namespace"


def test_what_belongs_to_the_node_or_has_ended_may_be_on_a_node_that_crashes() -> None:
    there = [neighbour(owner="DaemonSet"), neighbour(owner="Node"), neighbour(phase="Succeeded"), neighbour("llm")]
    assert check(CRASH, view(), Everywhere(pods=there)) == ()
    elsewhere = neighbour()
    elsewhere["spec"]["nodeName"] = "another"
    assert check(CRASH, view(), Everywhere(pods=[elsewhere])) == ()


@pytest.mark.parametrize("owner", ["ReplicaSet", "DaemonSet"])
def test_a_protected_pod_of_another_namespace_is_not_crashed(owner: str) -> None:
    shielded = neighbour(owner=owner, **{PROTECTED.partition("=")[0]: "true"})
    refused("shop/cart-1 must not be hit", CRASH, view(), Everywhere(pods=[shielded]), allow_namespaces=("llm", "shop"))


def test_pods_of_other_namespaces_that_may_not_be_seen_are_told_before_a_crash() -> None:
    (told,) = check(CRASH, view(), Everywhere())
    assert "whose pods of other namespaces end with node-" in told and "pods is forbidden" in told


# ── what goes by turns ──────────────────────────────────────────────────────────────────────────


def in_turns(act: Any, in_turn: int) -> tuple[Plan, View]:
    """All six engines, `in_turn` at a time."""
    seen = view()
    facts = replace(PodKill(lasting=60).plan(seen).facts, pods=tuple(one.key for one in seen.ready))
    return Plan(facts, (act,), (), in_turn=in_turn), seen


ROLL = Roll("engine", "llm", "uid", {})


def test_a_rollout_hits_all_but_never_at_once() -> None:
    plan, seen = in_turns(ROLL, 1)
    assert check(plan, seen, budget(6, 5, minAvailable=5), max_zones=0.3) == ()
    assert radius.busy_without(plan, seen, 0.6)[0] == pytest.approx(0.72)
    at_once, seen = in_turns(ROLL, 6)
    refused("3 of 3 zones would lose every engine", at_once, seen)


def test_evictions_ask_the_budget_themselves() -> None:
    evict = Evict(tuple((one.key, one.uid) for one in view().ready), within=60)
    plan, seen = in_turns(evict, 1)
    assert check(plan, seen, budget(6, 5, minAvailable=5)) == ()


def test_what_is_protected_is_not_hit_in_its_turn_either() -> None:
    plan, seen = in_turns(ROLL, 1)
    last = max(plan.facts.pods)
    pods = tuple(replace(one, labels={"tier": "gold"}) if one.key == last else one for one in seen.pods)
    refused(f"{last} must not be hit", plan, replace(seen, pods=pods), protected="tier")
