"""A node's chaos daemon dies with a partition in force: the harness's undo notices, explains and releases it.

The control plane, the chaos controller and the network namespaces are real; the daemon is killed, and stays away.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from apiserver_world import ADMIN, cluster
from chaos_world import NS, Net, World, net, node

from faults.base import Undo
from faults.undo import undo
from gameday.cluster import Cluster
from gameday.errors import HealError
from sandbox.chaos import controller
from sandbox.client import NETWORKCHAOS, PODS, ApiError, Obj
from sandbox.kubeconfig import CONTEXT, write_kubeconfig

ADDRESSES = {"a": "10.9.0.2", "b": "10.9.0.3"}
CUT = Undo("delete", "partition", "cut", kind="NetworkChaos", namespace=NS)
OWNER = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "u1", "controller": True}

Test = Callable[[World, Cluster], Awaitable[None]]


def with_a_cut(test: Test, *, owned: bool = True, daemon_dies: bool = True, controller_dies: bool = False) -> None:
    """Pods a and b cut from each other; then, unless told otherwise, the daemon of their node is gone."""

    async def main() -> None:
        with tempfile.TemporaryDirectory() as name, net(**ADDRESSES) as made:
            directory = Path(name)
            async with asyncio.timeout(60), cluster(directory) as one:
                await controller.install_crds(one.api)
                chaos = asyncio.create_task(controller.run(one.api))
                world = World(one.api, chaos)
                kubelet = asyncio.create_task(_bury(world))
                try:
                    async with contextlib.AsyncExitStack() as daemons:
                        await daemons.enter_async_context(node(world, made))
                        await _cut(world, made, owned)
                        if daemon_dies:
                            await daemons.aclose()
                        if controller_dies:
                            chaos.cancel()
                        path = directory / "kubeconfig"
                        write_kubeconfig(path, one.url, one.tls.ca, ADMIN)
                        await test(world, Cluster.connect(context=CONTEXT, kubeconfig=path, namespace=NS))
                finally:
                    for task in (chaos, kubelet):
                        task.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await task

    asyncio.run(main())


async def _cut(world: World, made: Net, owned: bool) -> None:
    for name, address in ADDRESSES.items():
        pod = await world.pod(name, ip=address)
        made.uids[pod["metadata"]["uid"]] = made.fds[name]
        if owned:
            await world.api.patch(PODS, name, {"metadata": {"ownerReferences": [OWNER]}}, NS)
    await world.partition("cut", "a", "b", "both")
    await world.injected(NETWORKCHAOS, "cut")


async def _bury(one: World) -> None:
    """What a kubelet does for a pod that was asked to end."""
    while True:
        for pod in (await one.api.list(PODS, NS))[0]:
            if "deletionTimestamp" in pod["metadata"]:
                with contextlib.suppress(ApiError):
                    await one.api.delete(PODS, pod["metadata"]["name"], NS, grace=0)
        await asyncio.sleep(0.05)


async def names(one: World) -> list[str]:
    return sorted(pod["metadata"]["name"] for pod in (await one.api.list(PODS, NS))[0])


def test_a_stuck_finalizer_is_released_and_the_pods_with_residue_are_replaced() -> None:
    async def test(one: World, cluster: Cluster) -> None:
        told = await asyncio.to_thread(undo, cluster, CUT, within=18)
        assert "its finalizer was stuck" in told and "daemon on node n1 does not answer" in told
        assert "pods replaced: default/a, default/b" in told
        assert await names(one) == []  # a ReplicaSet, were there one, would have made others, without residue
        await one.gone(NETWORKCHAOS, "cut")

    with_a_cut(test)


def test_a_pod_that_nothing_would_replace_is_not_deleted_but_named() -> None:
    async def test(one: World, cluster: Cluster) -> None:
        with pytest.raises(HealError, match=r"default/a may still carry .*kubectl -n default delete pod a"):
            await asyncio.to_thread(undo, cluster, CUT, within=18)
        assert await names(one) == ["a", "b"]
        stuck: Obj = await one.api.get(NETWORKCHAOS, "cut", NS)
        assert stuck["metadata"]["finalizers"], "not hidden either: the resource stays until somebody looks"

    with_a_cut(test, owned=False)


def test_while_the_controller_is_down_nothing_is_replaced_nor_released() -> None:
    async def test(one: World, cluster: Cluster) -> None:
        with pytest.raises(HealError, match=r"controller gives no word.*delete pod a; .*patch networkchaos cut"):
            await asyncio.to_thread(undo, cluster, CUT, within=3)
        assert await names(one) == ["a", "b"]
        stuck: Obj = await one.api.get(NETWORKCHAOS, "cut", NS)
        assert stuck["metadata"]["finalizers"]

    with_a_cut(test, daemon_dies=False, controller_dies=True)


def test_a_recovery_that_comes_by_itself_is_waited_for() -> None:
    """The finalizer is left alone, and no pod is lost, while Chaos Mesh recovers."""

    async def test(one: World, cluster: Cluster) -> None:
        told = await asyncio.to_thread(undo, cluster, CUT, within=18)
        assert told == "NetworkChaos cut is gone"
        assert await names(one) == ["a", "b"]

    with_a_cut(test, daemon_dies=False)
