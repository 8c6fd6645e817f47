"""The node agent: what a kubelet is to the API. It registers its machine, keeps it alive, runs its pods."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from aiohttp import web

from sandbox.chaos import calls, daemon
from sandbox.chaos.shaping import CannotShape
from sandbox.client import LEASES, NODES, PODS, ApiError, EventType, HttpApi, Informer, Obj
from sandbox.node import exec as exec_, images, kernel_log, latency, logs, network, node_status, services, usage
from sandbox.node.cgroups import Group
from sandbox.node.container import Container
from sandbox.node.events import Recorder
from sandbox.node.firewall import Firewall
from sandbox.node.network import API_URL, KUBELET_PORT, PodNetworks
from sandbox.node.pod import GPU, Pod
from sandbox.node.probes import Outcome
from sandbox.node.status import now
from sandbox.node.stressors import Stressors
from sandbox.node.volumes import Place
from sandbox.node.zygote import Spawn, StartError, ZygoteClient
from sandbox.options import Clocks

log = logging.getLogger(__name__)

_LEASE_NAMESPACE = "kube-node-lease"
_SERVICES_SECONDS = 5.0  # that pods wait for Services to be translated
_RETRY = 0.3  # seconds between tries to reach the API


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as its provider orders it."""

    name: str
    index: int  # 1–250, never reused in a sandbox: its pods' addresses come from it
    zone: str
    gpus: int
    root: str
    token: str
    ca: str
    clocks: Clocks
    group: Group | None = None  # its control group; None: limits cannot be enforced
    serving: Sequence[str] = ()  # certificate and key with which the kubelet serves TLS; (): without
    zone_latency: float = 0.0  # seconds, one way, to machines of other zones

    def dump(self) -> str:
        return orjson.dumps(self).decode()

    @staticmethod
    def load(text: str) -> Machine:
        fields = orjson.loads(text)
        group = Group(**fields["group"]) if fields["group"] else None
        return Machine(**{**fields, "clocks": Clocks(**fields["clocks"]), "group": group})


@dataclass(slots=True)
class Gpus:
    """The machine's devices, and which pod has which."""

    devices: list[str]
    taken: dict[str, str] = field(default_factory=dict)  # device → pod uid

    def allocate(self, pod: Pod) -> str | None:
        """Give the pod's containers their devices; otherwise say why not."""
        for container in (*(pod.spec.get("initContainers") or []), *pod.spec["containers"]):
            wanted = int(((container.get("resources") or {}).get("limits") or {}).get(GPU) or 0)
            free = [device for device in self.devices if device not in self.taken]
            if wanted > len(free):
                self.release(pod.uid)
                return (
                    f"Allocate failed due to requested number of devices unavailable for {GPU}. "
                    f"Requested: {wanted}, Available: {len(free)}, which is unexpected"
                )
            if wanted:
                pod.gpus[container["name"]] = free[:wanted]
                self.taken |= dict.fromkeys(free[:wanted], pod.uid)
        return None

    def release(self, uid: str) -> None:
        self.taken = {device: owner for device, owner in self.taken.items() if owner != uid}


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process of the machine's own."""

    zygote: ZygoteClient
    id: str

    async def wait(self) -> int:
        return await self.zygote.exited(self.id)

    def terminate(self) -> None:
        self.zygote.kill(self.id, signal.SIGTERM)

    def kill(self) -> None:
        self.zygote.kill(self.id, signal.SIGKILL)


class Agent:
    """One machine's kubelet, inside its asyncio loop."""

    def __init__(self, machine: Machine, api: HttpApi, zygote: ZygoteClient) -> None:
        self.machine, self.api, self.zygote = machine, api, zygote
        self.name, self.clocks = machine.name, machine.clocks
        self.place = Place(Path(machine.root))
        self.address = network.node_address(machine.index)
        self.images = images.load()
        self.pulled: set[str] = set()
        self.networks = PodNetworks(machine.index, self.place.root / "addresses")
        self.recorder = Recorder(api, machine.name)
        self.gpus = Gpus(node_status.gpu_uuids(machine.name, machine.gpus))
        self.env = {
            "GAMEDAY_MODEL_LOAD_SECONDS": f"{machine.clocks.model_load:g}",
        }
        self.proxy = services.Proxy(api)
        self.firewall = Firewall(api, lambda: [(pod.obj, pod.ip) for pod in self._pods.values() if pod.ip])
        self._pods: dict[str, Pod] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._shapers = 0

    # — what its pods ask of it —

    def until_relist(self) -> float:
        """Seconds until kubelet's next look at its containers (PLEG)."""
        period = self.clocks.pleg_period
        return period - time.monotonic() % period

    def netns_of(self, uid: str) -> int | None:
        """An open descriptor of a pod's network namespace, for the chaos daemon; it stays ours."""
        pod = self._pods.get(uid)
        return pod.netns() if pod else None

    def drop(self, group: Group) -> None:
        """Remove a control group, which may be busy for a moment after its last process is gone."""

        async def insist() -> None:
            while not group.remove():  # noqa: ASYNC110 – the kernel does not tell
                await asyncio.sleep(0.05)

        self._spawn(insist())

    async def shape(self, netns: int, argv: Sequence[str], out: int) -> Spawned:
        """Start a traffic shaper in a network namespace; it reports on `out`."""
        self._shapers += 1
        order = Spawn(
            id=f"shaper/{self._shapers}",
            title="chaos shaper",
            call="sandbox.chaos.shaper:main",
            argv=tuple(argv),
            env={"PATH": os.environ.get("PATH", os.defpath)},
            netns=True,
        )
        try:
            await self.zygote.spawn(order, out, 2, netns)
        except StartError as failed:
            raise CannotShape(str(failed)) from failed
        return Spawned(self.zygote, order.id)

    def release(self, pod: Pod) -> None:
        self.gpus.release(pod.uid)

    async def run_once(self, order: Spawn, within: float) -> Outcome:
        """Run a command in a container; its exit code and output are the outcome."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            try:
                await self.zygote.spawn(order, write, write)
            except StartError as failed:
                return Outcome(False, str(failed))
            try:
                async with asyncio.timeout(within):
                    code = await self.zygote.exited(order.id)
            except TimeoutError:
                self.zygote.kill(order.id, signal.SIGKILL, group=True)
                return Outcome(False, f"command timed out: {' '.join(order.argv)} after {within:g}s")
            finally:
                self.zygote.forget(order.id)
            with contextlib.suppress(BlockingIOError):
                return Outcome(code == 0, os.read(read, 10_000).decode(errors="replace"))
            return Outcome(code == 0, f"exit code {code}")
        finally:
            os.close(read)
            os.close(write)

    # — pods —

    def on_pod(self, kind: EventType, obj: Obj, _: Obj | None) -> None:
        uid = obj["metadata"]["uid"]
        known = self._pods.get(uid)
        if kind == "DELETED":
            if known:
                known.removed()
        elif known:
            known.update(obj)
            self.firewall.touch()
        elif (obj.get("status") or {}).get("phase") not in ("Succeeded", "Failed") or _deleted(obj):
            self._spawn(self._run_pod(obj))

    async def _run_pod(self, obj: Obj) -> None:
        pod = Pod(self, obj)
        self._pods[pod.uid] = pod
        try:
            if _deleted(obj):
                pod.update(obj)
            elif lacking := _unsupported(obj["spec"]):
                await self._reject(obj, "Unsupported", f"the sandbox's nodes have no {lacking}")
                return
            elif refused := self.gpus.allocate(pod):
                await self._reject(obj, "UnexpectedAdmissionError", refused)
                return
            await pod.run()
        finally:
            del self._pods[pod.uid]
            self.firewall.touch()
            self.recorder.forget(pod.uid)

    async def _reject(self, obj: Obj, reason: str, why: str) -> None:
        self.recorder.record(obj, "Warning", reason, why)
        status = {"phase": "Failed", "reason": reason, "message": f"Pod was rejected: {why}"}
        meta = obj["metadata"]
        await self._insist(
            lambda: self.api.patch(PODS, meta["name"], {"status": status}, meta["namespace"], sub="status")
        )

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of %s broke", self.name, exc_info=error)

    async def _insist(self, call: Callable[[], Awaitable[Obj]]) -> Obj | None:
        """Try until the API answers; what it refuses is logged, and None."""
        while True:
            try:
                return await call()
            except ApiError as refused:
                if refused.code < 500 and refused.code != 429:
                    log.warning("refused: %s", refused)
                    return None
            except (aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.debug("API not reached: %s", lost)
            await asyncio.sleep(_RETRY)

    # — the node —

    async def register(self) -> None:
        """Create the Node, or take over the one of that name, with what this machine has."""
        node = node_status.node(self.machine, self.address)
        try_once = self.api.create
        while True:
            try:
                await try_once(NODES, node)
                break
            except ApiError as refused:
                if refused.conflict:
                    await self._insist(lambda: self.api.patch(NODES, self.name, {"metadata": node["metadata"]}))
                    break
                log.warning("registration: %s", refused)
            except (aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.debug("registration: %s", lost)
            await asyncio.sleep(_RETRY)
        await self._insist(
            lambda: self.api.patch(NODES, self.name, {"status": node["status"]}, sub="status", type="strategic")
        )
        ready = node["status"]["conditions"][-1]
        about = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": self.name, "uid": self.name}}
        self.recorder.record(about, "Normal", "Starting", "Starting kubelet.")
        self.recorder.record(about, "Normal", "NodeReady", f"Node {self.name} status is now: {ready['reason']}")

    async def keep_lease(self) -> None:
        """Renew the node's Lease, by whose age the control plane tells a dead node."""
        spec: Obj = {"holderIdentity": self.name, "leaseDurationSeconds": max(1, round(4 * self.clocks.lease_renew))}
        lease: Obj = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        lease["metadata"] = {"name": self.name, "namespace": _LEASE_NAMESPACE}
        while True:
            try:
                renewed = {"renewTime": logs.stamp()}
                try:
                    await self.api.patch(LEASES, self.name, {"spec": {**spec, **renewed}}, _LEASE_NAMESPACE)
                except ApiError as error:
                    if not error.not_found:
                        raise
                    await self.api.create(LEASES, {**lease, "spec": {**spec, **renewed}})
                await asyncio.sleep(self.clocks.lease_renew)
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as lost:
                log.debug("lease: %s", lost)
                await asyncio.sleep(min(_RETRY, self.clocks.lease_renew))

    async def keep_status(self) -> None:
        """Correct the node's conditions when the API shows others than ours (Unknown, after a silence)."""
        own = Informer(self.api, NODES, fields=f"metadata.name={self.name}")
        async with own.running():
            while True:
                await asyncio.sleep(self.clocks.node_status)
                node = own.get(self.name)
                patch = node_status.correction(node) if node else None
                if patch is None:
                    continue
                try:
                    await self.api.patch(NODES, self.name, patch, sub="status", type="strategic")
                except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as lost:
                    log.debug("node status: %s", lost)

    # — logs and exec —

    async def container_log(self, request: web.Request) -> web.StreamResponse:
        """GET /containerLogs/{namespace}/{pod}/{container}, as kubelets serve it."""
        found = self._container(request)
        if isinstance(found, web.Response):
            return found
        try:
            source = found.log_source(previous=request.query.get("previous") in ("true", "1"))
        except logs.NotThere as reason:
            return web.Response(status=400, text=str(reason))
        return await logs.answer(request, source)

    async def container_exec(self, request: web.Request) -> web.StreamResponse:
        """GET /exec/{namespace}/{pod}/{container}, upgraded to a WebSocket."""
        found = self._container(request)
        return found if isinstance(found, web.Response) else await exec_.serve(request, found, self.zygote)

    async def resource_metrics(self, _: web.Request) -> web.Response:
        """GET /metrics/resource: what the containers and the machine use, as kubelets serve it."""
        containers: dict[usage.Where, int] = {}
        for process, pid in self.zygote.pids.items():
            uid, _slash, rest = process.partition("/")
            if pod := self._pods.get(uid):
                meta = pod.obj["metadata"]
                containers[meta["namespace"], meta["name"], rest.rpartition("/")[0]] = pid
        return web.Response(text=usage.render(*usage.read(containers)))

    def _container(self, request: web.Request) -> Container | web.Response:
        """The container that a request names, or the answer that there is none."""
        namespace, name, container = (request.match_info[part] for part in ("namespace", "pod", "container"))
        for pod in reversed(self._pods.values()):  # a forced deletion may leave an older one of that name for a while
            meta = pod.obj["metadata"]
            if (meta["namespace"], meta["name"]) == (namespace, name) and (found := pod.container(container)):
                return found
        return web.Response(status=404, text=f'pod "{namespace}/{name}" has no container "{container}" on this node')

    async def run(self) -> None:
        """Until cancelled, or until the machine's first process is gone."""
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self.container_log)
        app.router.add_get("/exec/{namespace}/{pod}/{container}", self.container_exec)
        app.router.add_get("/metrics/resource", self.resource_metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, self.address, KUBELET_PORT, ssl_context=_serving(self.machine)).start()
        stressors = web.AppRunner(Stressors(self.zygote, self._container).app(), access_log=None, shutdown_timeout=0)
        await stressors.setup()
        await web.TCPSite(stressors, self.address, calls.PORT).start()
        self.zygote.start()
        await self.register()
        self._spawn(self.proxy.run())
        self._spawn(self.firewall.run())
        with contextlib.suppress(TimeoutError):  # what hinders it is logged, again and again
            async with asyncio.timeout(_SERVICES_SECONDS):
                await self.proxy.synced.wait()
        pods = Informer(self.api, PODS, fields=f"spec.nodeName={self.name}", on_event=self.on_pod)
        self._spawn(pods.run())
        self._spawn(self.recorder.run())
        self._spawn(self.keep_lease())
        self._spawn(self.keep_status())
        if self.machine.zone_latency:
            self._spawn(latency.run(self.api, self.machine.zone, self.machine.zone_latency, self.shape))
        self._spawn(kernel_log.run(self.place, self.name))
        self._spawn(daemon.run(self.api, self.name, self.netns_of, self.shape))
        await self.zygote.lost.wait()


def _unsupported(spec: Obj) -> str:  # noqa: PLR0911 – a list
    """What the pod asks for that would otherwise be ignored; "" when nothing."""
    for name in ("hostNetwork", "hostIPC"):
        if spec.get(name):
            return name
    for container in spec.get("initContainers") or []:
        if container.get("restartPolicy"):
            return f"sidecar containers (initContainer {container['name']} has a restartPolicy)"
    if spec.get("ephemeralContainers"):
        return "ephemeral containers"
    if spec.get("shareProcessNamespace"):
        return "process namespaces shared by a pod's containers (shareProcessNamespace)"
    if (spec.get("securityContext") or {}).get("sysctls"):
        return "sysctls of a pod"
    for name in ("runtimeClassName", "resourceClaims"):
        if spec.get(name):
            return name
    for container in (*(spec.get("initContainers") or []), *spec["containers"]):
        if any(port.get("hostPort") for port in container.get("ports") or []):
            return f"ports of the machine for pods (hostPort of container {container['name']})"
        if container.get("volumeDevices"):
            return f"block devices (volumeDevices of container {container['name']})"
    return ""


def _serving(machine: Machine) -> ssl.SSLContext | None:
    if not machine.serving:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*machine.serving)
    return context


def _deleted(obj: Obj) -> bool:
    return "deletionTimestamp" in obj["metadata"]


async def _serve(machine: Machine, zygote: socket.socket) -> None:
    async with HttpApi(API_URL, machine.token, machine.ca, user_agent=f"kubelet {now()}") as api:
        await Agent(machine, api, ZygoteClient(zygote)).run()


def main(machine: str, zygote: socket.socket) -> int:
    """The agent's process; `zygote` leads to the machine's first process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvloop.run(_serve(Machine.load(machine), zygote))
    return 1
