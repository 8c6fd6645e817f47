"""One pod on this machine: its network and volumes, its containers, its status, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from sandbox.client import PODS, ApiError, Obj
from sandbox.controllers.objects import milli
from sandbox.node import cgroups, node_status, resolver, security, status
from sandbox.node.cgroups import Group
from sandbox.node.container import BackOff, Container
from sandbox.node.firewall import NotCovered
from sandbox.node.mounts import Mount
from sandbox.node.network import PodNet
from sandbox.node.services import variables
from sandbox.node.volumes import Base, NotReady, Volumes, environment

if TYPE_CHECKING:
    from sandbox.node.agent import Agent

log = logging.getLogger(__name__)

GPU = "nvidia.com/gpu"
KILL_ANNOTATION = "sandbox.gameday.dev/kill-containers"  # "<token>:<container,…>", once per token
_POST_PATIENCE = 1.0  # seconds that a restart waits for an API that does not answer
_SYNC_IN_STATUS_PERIODS = 6  # kubelet's syncFrequency (1 min) in periods of its node status (10 s)
_RETRY = 0.5  # seconds between tries to reach the API
_OWN_FIELDS = ("podIP", "podIPs", "initContainerStatuses", "reason", "message")


class Pod:
    """Runs one pod object until it is gone. The agent feeds it the object's changes."""

    def __init__(self, agent: Agent, obj: Obj) -> None:
        self.agent, self.obj = agent, obj
        self.uid: str = obj["metadata"]["uid"]
        self.directory: Path = agent.place.pod(self.uid)
        self.volumes = Volumes(agent.api, agent.place, obj)
        self.back_off = BackOff(agent.clocks.back_off_first, agent.clocks.back_off_max)
        self.gpus: dict[str, list[str]] = {}
        self.group: Group | None = None
        self.stopping = False
        self.grace = float(self.spec.get("terminationGracePeriodSeconds", 30))
        self.grace_changed = asyncio.Event()
        self._gone = False
        self._net: PodNet | None = None
        self._stop = asyncio.Event()
        self._killed_by = ""
        self._resumed = False
        self._version = self._posted = 0
        self._dirty = asyncio.Event()
        self._clean = asyncio.Condition()
        init = [Container(self, spec, init=True) for spec in self.spec.get("initContainers") or []]
        main = [Container(self, spec, init=False) for spec in self.spec["containers"]]
        self._init, self._main = init, main
        self.view = status.PodView([c.view for c in main], [c.view for c in init], status.now(), agent.address)
        self._resume(obj.get("status") or {})

    def _resume(self, known: Obj) -> None:
        """Take up a pod that ran here before the machine went down."""
        found = {one["name"]: one for one in known.get("containerStatuses") or [] if one.get("containerID")}
        if not found:
            return
        self._resumed = True
        self.view.start_time = known.get("startTime") or self.view.start_time
        self._killed_by = (self.obj["metadata"].get("annotations") or {}).get(KILL_ANNOTATION, "").partition(":")[0]
        for container in self._main:
            if container.name in found:
                container.resume(found[container.name])

    @property
    def spec(self) -> Obj:
        spec: Obj = self.obj["spec"]
        return spec

    @property
    def ip(self) -> str:
        return self._net.ip if self._net else ""

    @property
    def net_fd(self) -> int:
        if self._net is None:
            raise NotReady("the pod's network is gone")
        return self._net.fd

    def netns(self) -> int | None:
        return self._net.fd if self._net and self._net.fd >= 0 else None

    @property
    def any_running(self) -> bool:
        return any(view.running for view in (*self.view.containers, *self.view.init))

    def name_files(self) -> tuple[Mount, ...]:
        """The pod's /etc/hosts and /etc/resolv.conf."""
        self.directory.mkdir(parents=True, exist_ok=True)
        meta = self.obj["metadata"]
        hosts, resolv = self.directory / "hosts", self.directory / "resolv.conf"
        hosts.write_text(resolver.hosts(self.spec, meta["name"], meta["namespace"], self.ip))
        resolv.write_text(resolver.resolv_conf(self.spec, meta["namespace"]))
        return Mount(str(hosts), "/etc/hosts"), Mount(str(resolv), "/etc/resolv.conf")

    def container_spec(self, name: str, *, init: bool) -> Obj:
        specs: list[Obj] = self.spec["initContainers" if init else "containers"]
        return next(spec for spec in specs if spec["name"] == name)

    def container(self, name: str) -> Container | None:
        return next((c for c in (*self._main, *self._init) if c.name == name), None)

    # — what the API says —

    def update(self, obj: Obj) -> None:
        """The object changed."""
        self.obj = obj
        meta = obj["metadata"]
        if "deletionTimestamp" in meta:
            self._begin_stop(float(meta.get("deletionGracePeriodSeconds") or 0))
        else:
            for container in (*self._main, *self._init):
                container.spec_changed()
        self._kill_asked((meta.get("annotations") or {}).get(KILL_ANNOTATION, ""))
        self.changed(quiet=True)

    def removed(self) -> None:
        """The object is gone from the API (a forced deletion): stop what still runs."""
        self._gone = True
        self._begin_stop(float(self.obj["metadata"].get("deletionGracePeriodSeconds") or 0))

    def _begin_stop(self, grace: float) -> None:
        if not self.stopping or grace < self.grace:
            self.grace = grace
            self.grace_changed.set()
        self._stop.set()
        self._stop_containers()

    def _stop_containers(self) -> None:
        if not self.stopping:
            self.stopping = True
            for container in (*self._main, *self._init):
                container.wish("stop")

    async def _keep_deadline(self) -> None:
        """spec.activeDeadlineSeconds: the pod fails then, and its object stays."""
        if (seconds := self.spec.get("activeDeadlineSeconds")) is None:
            return
        await asyncio.sleep(float(seconds))
        if not self.stopping:
            message = "Pod was active on the node longer than the specified deadline"
            self.event("Normal", "DeadlineExceeded", message)
            self.view.failure = ("DeadlineExceeded", message)
            self._stop_containers()

    def _kill_asked(self, order: str) -> None:
        token, _, names = order.partition(":")
        if not token or token == self._killed_by:
            return
        self._killed_by = token
        for name in names.split(","):
            if container := self.container(name.strip()):
                container.kill_now()

    # — its life —

    async def run(self) -> None:
        """From admission to removal."""
        poster = asyncio.create_task(self._post_changes())
        deadline = asyncio.create_task(self._keep_deadline())
        try:
            if await self._set_up():
                await self._run_containers()
            self._finish()
            await self._report_end(poster)
            await self._stop.wait()
            await self._remove()
        finally:
            poster.cancel()
            deadline.cancel()
            self._tear_down()

    async def _set_up(self) -> bool:
        """Network and volumes; False: told to stop before they were there."""
        if self._resumed:
            self.changed()
            await self.posted()  # what was lost is told before it starts anew
            self.event("Normal", "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
        self._net = self.agent.networks.create()
        if self.agent.machine.group:
            self.group = self.agent.machine.group.child(self.uid).make()
        elif named := self._limited():
            self.event("Warning", "LimitsNotEnforced", f"{', '.join(named)}: this sandbox cannot write control groups")
        self.view.sandbox = True
        self.changed()
        while not self.stopping:
            try:
                await self.agent.firewall.cover(self.uid)  # no packet before that
                await self.volumes.prepare()
                return True
            except NotCovered as reason:
                self.event("Warning", "FailedCreatePodSandBox", str(reason))
            except NotReady as reason:
                self.event("Warning", "FailedMount", str(reason))
            except (aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.warning("volumes of %s: %s", self.obj["metadata"]["name"], lost)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY):
                    await self._stop.wait()
        return False

    def _limited(self) -> list[str]:
        """The limits that only a control group could enforce."""
        containers = (*(self.spec.get("initContainers") or []), *self.spec["containers"])
        limits = [(c["name"], name) for c in containers for name in (c.get("resources") or {}).get("limits") or {}]
        return [f"{name} limit of {container}" for container, name in limits if name in ("cpu", "memory")]

    def unenforced(self, container: Obj) -> list[str]:
        """What of the container's wishes this machine cannot grant."""
        found = security.unenforced(self.spec, container)
        user = security.of(self.spec, container)
        if not security.mapped(user.user, user.group, Path("/proc/self/uid_map").read_text()):
            found.append("runAsUser or runAsGroup (the sandbox of an ordinary user has one user only)")
        return found

    def oom_score(self, container: Obj) -> int:
        """The container's oom_score_adj."""
        asked = ((container.get("resources") or {}).get("requests") or {}).get("memory", 0)
        return cgroups.oom_score(status.qos_class(self.spec), milli(asked) // 1000, node_status.MEMORY_BYTES)

    async def _run_containers(self) -> None:
        renewals = [asyncio.create_task(work) for work in (self._renew_tokens(), self._refresh_volumes())]
        try:
            self.view.pod_ip = self.ip
            for container in self._init:
                if self.stopping:
                    return
                await container.run()
                if (container.view.state.get("terminated") or {}).get("exitCode", 1) != 0:
                    return
                container.view.ready = True
            for container in self._main:
                if "waiting" in container.view.state:
                    container.view.state = {"waiting": {"reason": "ContainerCreating"}}
            await asyncio.gather(*(container.run() for container in self._main))
        finally:
            for renewal in renewals:
                renewal.cancel()

    async def _renew_tokens(self) -> None:
        while self.volumes.token_until is not None:
            await asyncio.sleep(max(1.0, self.volumes.token_until - time.time()))
            with contextlib.suppress(NotReady, aiohttp.ClientError, OSError, TimeoutError):
                await self.volumes.prepare()

    async def _refresh_volumes(self) -> None:
        """What a ConfigMap or Secret says now reaches its volumes with the pod's next synchronisation."""
        while self.volumes.changeable:
            await asyncio.sleep(self.agent.clocks.node_status * _SYNC_IN_STATUS_PERIODS)
            with contextlib.suppress(NotReady, ApiError, aiohttp.ClientError, OSError, TimeoutError):
                await self.volumes.refresh()

    def _finish(self) -> None:
        self.stopping = True
        self.view.over = True
        self.view.sandbox = False
        for view in (*self.view.containers, *self.view.init):
            view.ready = view.started = False
        self.changed()

    async def _report_end(self, poster: asyncio.Task[None]) -> None:
        waiting = asyncio.create_task(self.posted(patience=None))
        await asyncio.wait({waiting, poster}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        self._tear_down()

    def _tear_down(self) -> None:
        if self._net:
            self.agent.networks.destroy(self._net)
            self._net = None
        if self.group:
            self.agent.drop(self.group)
            self.group = None
        self.agent.release(self)

    async def _remove(self) -> None:
        """The kubelet's own last deletion, which takes the object away."""
        meta = self.obj["metadata"]
        while not self._gone:
            try:
                await self.agent.api.delete(PODS, meta["name"], meta["namespace"], grace=0, uid=self.uid)
                break
            except ApiError as error:
                if error.not_found or error.conflict:
                    break
                log.warning("deleting %s: %s", meta["name"], error)
            except (aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.debug("deleting %s: %s", meta["name"], lost)
            await asyncio.sleep(_RETRY)
        shutil.rmtree(self.directory, ignore_errors=True)

    async def environment(self, container: Obj) -> dict[str, str]:
        """The environment of one of its containers. Raises `NotReady`."""
        links = "" if self.spec.get("enableServiceLinks") is False else self.obj["metadata"]["namespace"]
        services = variables(self.agent.proxy.services.objects.values(), links)
        base = Base(self.ip, self.agent.address, {**services, **self.agent.env})
        values = await environment(self.volumes, self.obj, container, base)
        if devices := self.gpus.get(container["name"]):
            values["NVIDIA_VISIBLE_DEVICES"] = ",".join(devices)
        return values

    # — its status —

    def changed(self, *, quiet: bool = False) -> None:
        """Something that the status shows changed: report it soon."""
        self._version += 1
        self._dirty.set()
        if not quiet:
            for container in self._main:
                container.nudge_probes()

    async def posted(self, patience: float | None = _POST_PATIENCE) -> None:
        """Wait until the API has the status as it is now, or patience ends."""
        wanted = self._version
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                async with self._clean:
                    await self._clean.wait_for(lambda: self._posted >= wanted)

    async def _post_changes(self) -> None:
        while not self._gone:
            await self._dirty.wait()
            self._dirty.clear()
            version = self._version
            try:
                await self._post()
            except ApiError as error:
                if error.not_found:
                    self.removed()
                    return
                if not error.conflict:
                    log.warning("status of %s refused: %s", self.obj["metadata"]["name"], error)
                await self._refetch()
                self._dirty.set()
                continue
            except (aiohttp.ClientError, OSError, TimeoutError):
                await asyncio.sleep(_RETRY)
                self._dirty.set()
                continue
            async with self._clean:
                self._posted = version
                self._clean.notify_all()

    async def _post(self) -> None:
        wanted = status.report(self.obj, self.view)
        meta, old = self.obj["metadata"], self.obj.get("status") or {}
        wanted |= {name: None for name in _OWN_FIELDS if name in old and name not in wanted}
        if status.same(wanted, old):
            return
        patch = {"metadata": {"uid": self.uid, "resourceVersion": meta["resourceVersion"]}, "status": wanted}
        self.obj = await self.agent.api.patch(PODS, meta["name"], patch, meta["namespace"], sub="status")

    async def _refetch(self) -> None:
        meta = self.obj["metadata"]
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ApiError):
            found = await self.agent.api.get(PODS, meta["name"], meta["namespace"])
            if found["metadata"]["uid"] == self.uid:
                self.update(found)
                return
            self.removed()
            return
        await asyncio.sleep(_RETRY)

    def event(self, type_: str, reason: str, message: str, container: str | None = None) -> None:
        self.agent.recorder.record(self.obj, type_, reason, message, container)
