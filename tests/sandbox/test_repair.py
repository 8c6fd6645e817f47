"""Node auto repair against an API that keeps objects, grants evictions within a budget and lets pods go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from sandbox.client import EVENTS, NODES, PODS, ApiError, Kind, Obj, PatchType, WatchEvent
from sandbox.options import COMPRESSED, REAL
from sandbox.repair import CONDITION, Repair, broken_since, run, suspended, to_drain

FAST = replace(COMPRESSED, repair_wait=0.4, repair_poll=0.02)
STAMP = "2026-01-01T00:00:00Z"
STAMPED = 1767225600.0


def node(name: str, *, ready: str = "True", gpu: str = "True") -> Obj:
    conditions = [
        {"type": "Ready", "status": ready, "lastTransitionTime": STAMP},
        {"type": CONDITION, "status": gpu, "reason": "NvidiaXID79Error", "lastTransitionTime": STAMP},
    ]
    meta = {"name": name, "uid": f"uid-{name}", "creationTimestamp": STAMP}
    return {"metadata": meta, "spec": {}, "status": {"conditions": conditions}}


def pod(name: str, on: str, owner: str = "ReplicaSet", phase: str = "Running") -> Obj:
    meta = {"name": name, "namespace": "llm", "uid": f"uid-{name}", "ownerReferences": [{"kind": owner}]}
    return {"metadata": meta, "spec": {"nodeName": on}, "status": {"phase": phase}}


@dataclass
class World:
    """An `Api` over dictionaries. `evictable` says which pods' evictions are granted."""

    nodes: dict[str, Obj]
    pods: dict[str, Obj] = field(default_factory=dict)
    evictable: Callable[[str], bool] = lambda _: True
    stuck: bool = False  # deleted pods stay, as on a dead machine
    log: list[str] = field(default_factory=list)
    broken: int = 0  # calls that still fail

    async def list(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Obj], str]:
        if self.broken:
            self.broken -= 1
            raise ApiError(503, "ServiceUnavailable", "not now")
        if kind is NODES:
            return list(self.nodes.values()), "1"
        assert kind is PODS and fields.startswith("spec.nodeName=")
        wanted = fields.partition("=")[2]
        return [one for one in self.pods.values() if one["spec"]["nodeName"] == wanted], "1"

    async def create(self, kind: Kind, obj: Obj, namespace: str | None = None) -> Obj:
        assert kind is EVENTS and namespace == "default" and obj["involvedObject"]["kind"] == "Node"
        self.log.append(f"{obj['involvedObject']['name']} {obj['reason']}")
        return obj

    async def patch(
        self, kind: Kind, name: str, patch: Obj | Sequence[Obj], namespace: str | None = None,
        *, sub: str | None = None, type: PatchType = "merge",
    ) -> Obj:  # fmt: skip
        if name not in self.nodes:
            raise ApiError(404, "NotFound", f"no node {name}")
        assert isinstance(patch, dict)
        self.nodes[name]["spec"] |= patch["spec"]
        self.log.append(f"{name} patched {patch['spec']}")
        return self.nodes[name]

    async def post(self, kind: Kind, name: str, sub: str, body: Obj, namespace: str | None = None) -> Obj:
        assert sub == "eviction" and body["kind"] == "Eviction"
        if not self.evictable(name):
            raise ApiError(429, "TooManyRequests", "the disruption budget allows no eviction")
        self.log.append(f"{name} evicted")
        del self.pods[name]
        return {}

    async def delete(
        self, kind: Kind, name: str, namespace: str | None = None,
        *, grace: int | None = None, propagation: str | None = None, uid: str | None = None,
    ) -> Obj:  # fmt: skip
        self.log.append(f"{name} deleted")
        if kind is NODES:
            assert uid == self.nodes[name]["metadata"]["uid"]
            return self.nodes.pop(name)
        if self.stuck:
            self.pods[name]["metadata"]["deletionTimestamp"] = STAMP
            return self.pods[name]
        return self.pods.pop(name)

    async def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
        raise NotImplementedError

    async def update(self, kind: Kind, obj: Obj, *, sub: str | None = None) -> Obj:
        raise NotImplementedError

    def watch(
        self, kind: Kind, namespace: str | None = None, *, since: str, labels: str = "", fields: str = ""
    ) -> AsyncIterator[WatchEvent]:
        raise NotImplementedError


def _world(count: int, **nodes: Obj) -> World:
    return World({f"n{index}": node(f"n{index}") for index in range(count)} | nodes)


async def _until(what: Callable[[], bool], within: float = 5.0) -> None:
    deadline = asyncio.get_running_loop().time() + within
    while not what():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within} s"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def _repairing(world: World) -> AsyncIterator[None]:
    task = asyncio.create_task(run(world, FAST))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_a_broken_node_is_cordoned_drained_and_deleted_in_this_order() -> None:
    async def story() -> None:
        world = _world(5, bad=node("bad", gpu="False"))
        world.pods = {"p1": pod("p1", "bad"), "d1": pod("d1", "bad", "DaemonSet"), "p2": pod("p2", "n1")}
        async with _repairing(world):
            await _until(lambda: "bad" not in world.nodes)
        assert world.log == [
            "bad NodeRepairStarted",
            "bad patched {'unschedulable': True}",
            "bad NodeRepairCordoned",
            "p1 evicted",
            "bad NodeRepairDrained",
            "bad NodeRepairDeleting",
            "bad deleted",
        ]
        assert set(world.pods) == {"d1", "p2"}

    asyncio.run(story())


def test_nothing_happens_before_the_wait_is_over() -> None:
    async def due(age: float) -> list[str]:
        world = _world(5, bad=node("bad", gpu="False"))
        return [one["metadata"]["name"] for one in await Repair(world, REAL, lambda: STAMPED + age).due()]

    assert asyncio.run(due(599)) == []
    assert asyncio.run(due(600)) == ["bad"]


def test_a_node_is_repaired_once_however_often_it_is_seen() -> None:
    async def story() -> None:
        repair = Repair(_world(5, bad=node("bad", gpu="False")), FAST)
        assert len(await repair.due()) == 1
        assert await repair.due() == []

    asyncio.run(story())


def test_other_conditions_are_left_alone() -> None:
    async def story() -> None:
        assert await Repair(_world(5, bad=node("bad", ready="Unknown")), FAST).due() == []

    asyncio.run(story())


def test_a_disruption_budget_is_honoured_until_the_deadline_then_pods_are_deleted() -> None:
    async def story() -> None:
        world = _world(5, bad=node("bad", gpu="False"))
        world.pods, world.evictable = {"p1": pod("p1", "bad")}, lambda _: False
        began = asyncio.get_running_loop().time()
        async with _repairing(world):
            await _until(lambda: "bad" not in world.nodes)
        assert asyncio.get_running_loop().time() - began >= FAST.repair_wait * 1.5
        assert "p1 evicted" not in world.log
        assert world.log.index("p1 deleted") < world.log.index("bad deleted")

    asyncio.run(story())


def test_pods_that_never_go_do_not_keep_the_node() -> None:
    async def story() -> None:
        world = _world(5, bad=node("bad", gpu="False"))
        world.pods, world.evictable, world.stuck = {"p1": pod("p1", "bad")}, lambda _: False, True
        async with _repairing(world):
            await _until(lambda: "bad" not in world.nodes)
        assert world.log.count("p1 deleted") == 1

    asyncio.run(story())


def test_an_api_server_that_fails_delays_a_repair_only() -> None:
    async def story() -> None:
        world = _world(5, bad=node("bad", gpu="False"))
        world.pods, world.broken = {"p1": pod("p1", "bad")}, 2
        async with _repairing(world):
            await _until(lambda: "bad" in world.nodes and world.nodes["bad"]["spec"].get("unschedulable") is True)
            world.broken = 2
            await _until(lambda: "bad" not in world.nodes)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("sick", "all_", "stops"),
    [(1, 6, False), (2, 6, True), (1, 3, False), (2, 10, False), (3, 10, True), (1, 1, False)],
)
def test_repair_is_suspended_above_a_fifth_and_more_than_one(sick: int, all_: int, stops: bool) -> None:
    nodes = [node(f"n{index}", ready="Unknown" if index < sick else "True") for index in range(all_)]
    assert suspended(nodes) is stops


def test_a_suspension_is_told_once_and_ends_with_its_cause() -> None:
    async def story() -> None:
        world = _world(4, bad=node("bad", gpu="False"), down=node("down", ready="Unknown"))
        async with _repairing(world):
            await _until(lambda: "bad NodeRepairSuspended" in world.log)
            await asyncio.sleep(FAST.repair_poll * 5)
            assert world.log == ["bad NodeRepairSuspended"]
            world.nodes["down"] = node("down")
            await _until(lambda: "bad" not in world.nodes)

    asyncio.run(story())


def test_what_a_drain_leaves() -> None:
    mirror = pod("m", "n")
    mirror["metadata"]["annotations"] = {"kubernetes.io/config.mirror": "x"}
    pods = [pod("a", "n"), pod("d", "n", "DaemonSet"), pod("s", "n", "Job", "Succeeded"), mirror]
    assert [one["metadata"]["name"] for one in to_drain(pods)] == ["a"]


def test_since_when_a_node_is_broken() -> None:
    assert broken_since(node("a")) is None
    assert broken_since(node("a", gpu="Unknown")) is None
    assert broken_since(node("a", gpu="False")) == STAMPED
    assert broken_since({"metadata": {"name": "new"}, "spec": {}}) is None
