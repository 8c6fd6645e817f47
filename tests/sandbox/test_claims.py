"""Claims on a cluster without storage: pods wait and say why; a claim in use is not deleted."""

from __future__ import annotations

import asyncio

from test_controllers_live import control_plane as control_plane, until, world

from sandbox.client import EVENTS, PODS, Obj
from sandbox.controllers.catalog import CLAIMS
from sandbox.controllers.claims import unbound


def pod(*claims: str) -> Obj:
    volumes = [{"name": f"v{i}", "persistentVolumeClaim": {"claimName": claim}} for i, claim in enumerate(claims)]
    return {"metadata": {"name": "p", "namespace": "n"}, "spec": {"volumes": [*volumes, {"name": "e", "emptyDir": {}}]}}


def claim(phase: str, **meta: str) -> Obj:
    return {"metadata": {"name": "c", **meta}, "status": {"phase": phase}}


def test_what_keeps_a_pod_waiting() -> None:
    held = {("n", "bound"): claim("Bound"), ("n", "pending"): claim("Pending")}
    assert unbound(pod(), held) == unbound(pod("bound"), held) == ""
    assert unbound(pod("bound", "pending"), held) == "pod has unbound immediate PersistentVolumeClaims"
    assert unbound(pod("pending", "none"), held) == 'persistentvolumeclaim "none" not found'
    gone = {("n", "c"): claim("Bound", deletionTimestamp="t")}
    assert unbound(pod("c"), gone) == 'persistentvolumeclaim "c" is being deleted'


def test_a_pod_waits_for_its_claim_and_the_claim_for_its_pod(control_plane: tuple[str, str, str]) -> None:
    async def scene() -> None:
        async with world(control_plane, "claims") as w:
            await w.add_nodes("a")
            volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]
            containers = [{"name": "main", "image": "x"}]
            await w.make(PODS, "p", containers=containers, volumes=volumes)

            async def said() -> str:
                found = (await w.api.get(PODS, "p", w.space))["status"].get("conditions") or []
                return next((c.get("message", "") for c in found if c["type"] == "PodScheduled"), "")

            await until(said, lambda text: 'persistentvolumeclaim "data" not found' in text, "that there is none")
            wanted = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
            await w.make(CLAIMS, "data", **wanted)
            await until(said, lambda text: "unbound immediate PersistentVolumeClaims" in text, "that it is unbound")

            async def events() -> list[str]:
                return [e["reason"] for e in (await w.api.list(EVENTS, w.space))[0]]

            await until(events, lambda found: "FailedBinding" in found, "an event of the claim")
            await w.api.delete(CLAIMS, "data", w.space)
            assert "deletionTimestamp" in (await w.api.get(CLAIMS, "data", w.space))["metadata"], "a pod uses it"
            await w.api.delete(PODS, "p", w.space, grace=0)

            async def claims() -> list[Obj]:
                return (await w.api.list(CLAIMS, w.space))[0]

            await until(claims, lambda found: not found, "the claim gone after its pod")

    asyncio.run(scene())
