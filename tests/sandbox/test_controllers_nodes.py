"""Nodes and endpoints without an API: readiness to taints, zones, patience, who gets traffic; queues and caches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandbox.client import PODS, ApiError, EventType, Obj, WatchEvent
from sandbox.controllers import daemonset
from sandbox.controllers.catalog import custom_kinds
from sandbox.controllers.endpoints import endpoint, port_number, ports_of, serves, subsets
from sandbox.controllers.namespaces import remaining_conditions
from sandbox.controllers.nodes import (
    NOT_READY,
    UNREACHABLE,
    Bucket,
    eviction_rate,
    no_schedule,
    patience,
    tainted,
    unknown_conditions,
    zone_state,
)
from sandbox.controllers.work import Cache, Queue, slow_start


def node(ready: str = "True", taints: list[Obj] | None = None, **conditions: str) -> Obj:
    found = {**({"Ready": ready} if ready else {}), **conditions}
    return {
        "metadata": {"name": "n1", "labels": {}, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"taints": taints or []},
        "status": {"conditions": [{"type": t, "status": s} for t, s in found.items()]},
    }


def pod(name: str = "p", *, ready: bool = True, ip: str = "10.0.0.1", version: int = 1, **how: Any) -> Obj:
    meta: Obj = {"name": name, "namespace": "n", "uid": how.get("uid", name), "resourceVersion": str(version)}
    if how.get("deleting"):
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    status: Obj = {"phase": how.get("phase", "Running"), "conditions": [
        {"type": "Ready", "status": "True" if ready else "False"}]}  # fmt: skip
    if ip:
        status["podIP"] = ip
    spec = {"nodeName": "n1", "containers": how.get("containers", []), "tolerations": how.get("tolerations", [])}
    return {"metadata": meta, "spec": spec, "status": status}


# -- taints


def test_conditions_become_no_schedule_taints() -> None:
    assert no_schedule(node()) == set()
    assert no_schedule(node("False")) == {NOT_READY}
    assert no_schedule(node("Unknown", MemoryPressure="Unknown")) == {UNREACHABLE}
    assert no_schedule(node(MemoryPressure="True")) == {"node.kubernetes.io/memory-pressure"}
    assert no_schedule(node(NetworkUnavailable="True")) == {"node.kubernetes.io/network-unavailable"}


def test_a_node_that_never_reported_keeps_its_registration_taint() -> None:
    assert no_schedule(node("", [{"key": NOT_READY, "effect": "NoSchedule"}])) == {NOT_READY}


def test_only_managed_taints_are_touched() -> None:
    own = {"key": "gpu", "effect": "NoSchedule"}
    lasting = {"key": UNREACHABLE, "effect": "NoExecute"}
    stale = {"key": UNREACHABLE, "effect": "NoSchedule"}
    fresh = tainted(node(taints=[own, lasting, stale]), {NOT_READY}, {NOT_READY, UNREACHABLE}, "NoSchedule")
    assert fresh[:2] == [own, lasting]
    assert [(t["key"], t["effect"]) for t in fresh[2:]] == [(NOT_READY, "NoSchedule")]


def test_a_silent_node_is_unknown_in_every_watched_way() -> None:
    fresh = {c["type"]: (c["status"], c["reason"]) for c in unknown_conditions(node(DiskPressure="False"))}
    assert fresh["Ready"] == fresh["DiskPressure"] == ("Unknown", "NodeStatusUnknown")
    assert fresh["MemoryPressure"] == ("Unknown", "NodeStatusNeverUpdated")


@pytest.mark.parametrize(
    ("ready", "lost", "state"),
    [(3, 0, "Normal"), (1, 2, "Normal"), (2, 3, "Partial"), (3, 3, "Normal"), (0, 1, "Full"), (0, 0, "Normal")],
)
def test_zone_state(ready: int, lost: int, state: str) -> None:
    assert zone_state([True] * ready + [False] * lost) == state


def test_eviction_rates() -> None:
    assert eviction_rate("Normal", 5, 0.1) == eviction_rate("Full", 5, 0.1) == 0.1
    assert eviction_rate("Partial", 50, 0.1) == 0.0
    assert eviction_rate("Partial", 51, 0.1) == 0.01


def test_one_eviction_at_once_then_at_the_rate() -> None:
    bucket = Bucket(0.1)
    assert bucket.take(100.0)
    assert not bucket.take(105.0)
    assert bucket.wait() == pytest.approx(5.0)
    assert bucket.take(110.0)
    assert not Bucket(0.0).take(100.0)


def test_patience() -> None:
    lost = node(taints=[{"key": UNREACHABLE, "effect": "NoExecute"}, {"key": "x", "effect": "NoSchedule"}])
    some = {"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute"}
    assert patience(node(), pod()) is None
    assert patience(lost, pod()) == 0.0
    assert patience(lost, pod(tolerations=[some])) is None
    assert patience(lost, pod(tolerations=[{**some, "tolerationSeconds": 300}])) == 300.0
    assert patience(lost, pod(tolerations=[{**some, "tolerationSeconds": 300}, {"operator": "Exists"}])) == 300.0


# -- endpoints


def service(**spec: Any) -> Obj:
    return {"metadata": {"name": "s", "namespace": "n"}, "spec": {"ports": [{"port": 80, "targetPort": 8080}], **spec}}


@pytest.mark.parametrize(
    ("one", "conditions"),
    [
        (pod(), (True, True, False)),
        (pod(ready=False), (False, False, False)),
        (pod(deleting=True), (False, True, True)),
        (pod(ready=False, deleting=True), (False, False, True)),
    ],
)
def test_endpoint_conditions(one: Obj, conditions: tuple[bool, bool, bool]) -> None:
    found = endpoint(service(), one, "a")["conditions"]
    assert (found["ready"], found["serving"], found["terminating"]) == conditions


def test_endpoint_says_where_it_is() -> None:
    found = endpoint(service(), pod(), "a")
    assert (found["nodeName"], found["zone"], found["addresses"]) == ("n1", "a", ["10.0.0.1"])
    assert found["targetRef"] == {"kind": "Pod", "namespace": "n", "name": "p", "uid": "p"}


def test_who_is_in_a_slice_at_all() -> None:
    assert serves(pod(ready=False))
    assert not serves(pod(ip=""))
    assert not serves(pod(phase="Failed"))


def test_named_ports() -> None:
    one = pod(containers=[{"name": "c", "ports": [{"name": "http", "containerPort": 9000}]}])
    assert port_number({"port": 80, "targetPort": "http"}, one) == 9000
    assert port_number({"port": 80, "targetPort": "none"}, one) is None
    assert ports_of(service(), one) == (("", "TCP", 8080),)


def test_legacy_endpoints_drop_terminating_pods() -> None:
    found = subsets(service(), [pod("a"), pod("b", ready=False, ip="10.0.0.2"), pod("c", deleting=True)])
    assert [a["ip"] for a in found[0]["addresses"]] == ["10.0.0.1"]
    assert [a["ip"] for a in found[0]["notReadyAddresses"]] == ["10.0.0.2"]


# -- daemons, definitions, namespaces


def test_daemon_pods_are_pinned_and_tolerate_what_ails_nodes() -> None:
    spec = daemonset.pinned({"containers": []}, "n1")
    assert daemonset.target({"spec": spec}) == "n1"
    owner: Obj = {"spec": {"template": {"spec": {}}}}
    cordon = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
    assert daemonset.admits(owner, node(taints=[cordon])) == (True, True)
    assert daemonset.admits(owner, node(taints=[{"key": UNREACHABLE, "effect": "NoExecute"}])) == (True, True)
    assert daemonset.admits(owner, node(taints=[{"key": "gpu", "effect": "NoSchedule"}])) == (False, True)
    assert daemonset.admits(owner, node(taints=[{"key": "gpu", "effect": "NoExecute"}])) == (False, False)


def test_a_definition_is_followed_in_its_stored_version() -> None:
    spec = {"group": "g", "scope": "Namespaced", "names": {"plural": "ws", "kind": "W"}, "versions": [
        {"name": "v1beta1", "served": True}, {"name": "v1", "served": True, "storage": True}]}  # fmt: skip
    (kind,) = custom_kinds({"spec": spec})
    assert (kind.path("n"), kind.kind) == ("/apis/g/v1/namespaces/n/ws", "W")


def test_what_holds_a_namespace_up() -> None:
    held = pod()
    held["metadata"]["finalizers"] = ["x/y"]
    made = {c["type"]: c for c in remaining_conditions({PODS: [held]}, [])}
    assert made["NamespaceContentRemaining"]["message"] == (
        "Some resources are remaining: pods. has 1 resource instances"
    )
    assert made["NamespaceFinalizersRemaining"]["status"] == "True"
    assert {c["status"] for c in remaining_conditions({}, [])} == {"False"}


# -- the machinery


class Silent:
    """An API on which nothing ever happens: caches are fed by hand."""

    async def list(self, *_: object, **__: object) -> tuple[list[Obj], str]:
        return [], "1"

    async def watch(self, *_: object, **__: object) -> AsyncIterator[WatchEvent]:
        await asyncio.Event().wait()
        yield WatchEvent("ADDED", {})


def cache() -> tuple[Cache, list[tuple[EventType, str]]]:
    held = Cache(Silent(), PODS, {"node": lambda p: (p["spec"]["nodeName"],)})  # type: ignore[arg-type]
    seen: list[tuple[EventType, str]] = []
    held.subscribe(lambda type, obj, old: seen.append((type, obj["metadata"]["resourceVersion"])))
    return held, seen


def test_a_cache_learns_from_answers_and_ignores_older_news() -> None:
    async def scene() -> None:
        held, seen = cache()
        held.observe(pod(version=5))
        held._apply("ADDED", pod(version=3))
        assert seen == [("ADDED", "5")]
        assert held.by("node", "n1") == [held.objects["n", "p"]]
        held._apply("MODIFIED", pod(version=6, ready=False))
        assert [p["metadata"]["resourceVersion"] for p in held.by("node", "n1")] == ["6"]

    asyncio.run(scene())


def test_the_dead_do_not_come_back() -> None:
    async def scene() -> None:
        held, seen = cache()
        held.observe(pod(version=5))
        held._apply("DELETED", pod(version=7))
        held.observe(pod(version=6))
        held._apply("MODIFIED", pod(version=6))
        assert not held.objects
        assert held.by("node", "n1") == []
        held._apply("ADDED", pod(version=9, uid="reborn"))
        assert seen[-1] == ("ADDED", "9")

    asyncio.run(scene())


def test_what_we_deleted_stays_terminating_whatever_comes_late() -> None:
    async def scene() -> None:
        held, _ = cache()
        one = held.observe(pod(version=5))
        held.doom(one)
        assert "deletionTimestamp" in held.objects["n", "p"]["metadata"]
        held._apply("MODIFIED", pod(version=6))
        assert "deletionTimestamp" in held.objects["n", "p"]["metadata"]

    asyncio.run(scene())


def test_a_queue_holds_a_key_once_and_never_hands_it_out_twice_at_a_time() -> None:
    async def scene() -> None:
        queue = Queue()
        queue.add(("n", "a"))
        queue.add(("n", "a"))
        assert await queue.get() == ("n", "a")
        queue.add(("n", "a"))
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.done(("n", "a"), ok=True)
        assert await asyncio.wait_for(waiting, 1) == ("n", "a")
        queue.close()

    asyncio.run(scene())


def test_a_failed_key_comes_back_by_itself() -> None:
    async def scene() -> None:
        queue = Queue()
        queue.add(("n", "a"))
        for _ in range(3):
            key = await asyncio.wait_for(queue.get(), 1)
            queue.done(key, ok=False)
        queue.close()

    asyncio.run(scene())


def test_of_two_delays_the_shorter_counts() -> None:
    async def scene() -> None:
        queue = Queue()
        queue.add_after(("n", "a"), 60)
        queue.add_after(("n", "a"), 0.01)
        queue.add_after(("n", "a"), 60)
        assert await asyncio.wait_for(queue.get(), 1) == ("n", "a")
        queue.close()

    asyncio.run(scene())


def test_slow_start_stops_at_the_first_failing_batch() -> None:
    async def scene() -> None:
        calls = 0

        async def refuse() -> None:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise ApiError(403, "Forbidden", "quota")

        with pytest.raises(ApiError):
            await slow_start(100, refuse)
        assert calls == 7  # batches of 1, 2, 4

    asyncio.run(scene())
