"""The controllers and the scheduler of the sandbox's control plane.

They see a Kubernetes API and nothing else (`sandbox.client.Api`), so they run against any server. Each is a
level-triggered reconcile function over shared caches; the arithmetic is in pure functions beside it.
"""

from __future__ import annotations

import asyncio

from sandbox.client import Api
from sandbox.controllers.deployment import Deployments
from sandbox.controllers.disruption import DisruptionBudgets
from sandbox.controllers.endpoints import EndpointSlices, LegacyEndpoints
from sandbox.controllers.namespaces import RootCertificates, ServiceAccounts
from sandbox.controllers.replicaset import ReplicaSets
from sandbox.controllers.scheduler import Scheduler
from sandbox.controllers.work import Caches, Controller, Recorder, Shared
from sandbox.options import Clocks

_CONTROLLERS: tuple[type[Controller], ...] = (
    ServiceAccounts,
    RootCertificates,
    Scheduler,
    ReplicaSets,
    Deployments,
    EndpointSlices,
    LegacyEndpoints,
    DisruptionBudgets,
)


async def run(api: Api, clocks: Clocks) -> None:
    """Run all controllers and the scheduler until cancelled."""
    async with asyncio.TaskGroup() as group:
        recorder = Recorder(api)
        shared = Shared(api, Caches(api, group), recorder)
        controllers = [make(shared) for make in _CONTROLLERS]
        group.create_task(recorder.run(), name="events")
        for one in controllers:
            group.create_task(one.run(), name=one.name)
