"""The controllers and the scheduler of the sandbox's control plane.

They see a Kubernetes API and nothing else (`sandbox.client.Api`), so they run against any server. Each is a
level-triggered reconcile function over shared caches; the arithmetic is in pure functions beside it.
"""

from __future__ import annotations

import asyncio

from sandbox.client import Api
from sandbox.controllers.autoscaler import Autoscalers
from sandbox.controllers.catalog import Catalog
from sandbox.controllers.claims import Claims
from sandbox.controllers.collector import GarbageCollector
from sandbox.controllers.cronjob import CronJobs
from sandbox.controllers.daemonset import DaemonSets
from sandbox.controllers.deployment import Deployments
from sandbox.controllers.disruption import DisruptionBudgets
from sandbox.controllers.endpoints import EndpointSlices, LegacyEndpoints
from sandbox.controllers.job import JobPods, Jobs
from sandbox.controllers.namespaces import RootCertificates, ServiceAccounts, Termination
from sandbox.controllers.nodes import NodeLifecycle, PodCollector, TaintEviction
from sandbox.controllers.quotas import ResourceQuotas
from sandbox.controllers.replicaset import ReplicaSets
from sandbox.controllers.scheduler import Scheduler
from sandbox.controllers.statefulset import StatefulSets
from sandbox.controllers.work import Caches, Controller, Recorder, Shared
from sandbox.metrics import Metrics
from sandbox.options import Clocks

_CONTROLLERS: tuple[type[Controller], ...] = (
    ServiceAccounts,
    Scheduler,
    ReplicaSets,
    Deployments,
    EndpointSlices,
    LegacyEndpoints,
    DisruptionBudgets,
    TaintEviction,
    StatefulSets,
    DaemonSets,
    JobPods,
    CronJobs,
    Claims,
)


async def run(api: Api, clocks: Clocks, *, root_ca: str = "", metrics: Metrics | None = None) -> None:
    """Run all controllers and the scheduler until cancelled.

    `root_ca`: what pods get as `ca.crt` (PEM). `metrics`: what autoscalers go by; None: there are none.
    """
    async with asyncio.TaskGroup() as group:
        recorder = Recorder(api)
        shared = Shared(api, Caches(api, group), recorder)
        catalog = Catalog(api, shared.caches)
        controllers = [make(shared) for make in _CONTROLLERS]
        controllers += [GarbageCollector(shared, catalog), Termination(shared, catalog, clocks)]
        controllers += [NodeLifecycle(shared, clocks), PodCollector(shared, clocks), Jobs(shared, clocks)]
        controllers.append(ResourceQuotas(shared, catalog))
        controllers.append(Autoscalers(shared, clocks, metrics))
        if root_ca:
            controllers.append(RootCertificates(shared, root_ca))
        await catalog.start()
        group.create_task(recorder.run(), name="events")
        for one in controllers:
            group.create_task(one.run(), name=one.name)
