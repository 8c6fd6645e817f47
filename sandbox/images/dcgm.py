"""dcgm-exporter: GPU telemetry under DCGM's metric names.

Emulated, for there is no GPU: Xids come from the node's kernel log (DCGM hears them from the driver), utilisation is
the share of looks at which the engine on that GPU had a batch, memory and temperature follow from it. As with the
real exporter the Xid gauge is absent until a GPU's first Xid and then keeps the last code; a GPU that has fallen off
the bus (79) has no other gauges any more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from sandbox.client import NODES, PODS, Api, ApiError, Obj
from sandbox.images import incluster
from sandbox.images.kernlog import Tail, Xid, xid
from sandbox.images.metrics import CONTENT_TYPE, Family, Registry, Value
from sandbox.images.process import run, say, serving, stop_event

FRAMEBUFFER_MIB = 24576
LOADED_SHARE = 0.9  # of the memory, as vLLM claims by default
IDLE_CELSIUS, BUSY_CELSIUS = 34, 71
SMOOTHING = 0.3  # of a new look in the utilisation
FIRST_BUS = 0x05
OFF_THE_BUS = 79
_RUNNING = re.compile(rb"^vllm:num_requests_running\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    node: str

    @property
    def bus(self) -> str:
        return f"00000000:{FIRST_BUS + self.index:02X}:00.0"

    @property
    def labels(self) -> tuple[str, ...]:
        ident = uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.node}/{self.index}")
        return (str(self.index), f"GPU-{ident}", self.bus, f"nvidia{self.index}", "gameday sandbox GPU", self.node)


class Numbers:
    LABELS = ("gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname")

    def __init__(self) -> None:
        registry = self.registry = Registry()
        self.temperature = registry.values("gauge", "DCGM_FI_DEV_GPU_TEMP", "GPU temperature (in C).", *self.LABELS)
        self.utilisation = registry.values("gauge", "DCGM_FI_DEV_GPU_UTIL", "GPU utilization (in %).", *self.LABELS)
        self.free = registry.values("gauge", "DCGM_FI_DEV_FB_FREE", "Framebuffer memory free (in MiB).", *self.LABELS)
        self.used = registry.values("gauge", "DCGM_FI_DEV_FB_USED", "Framebuffer memory used (in MiB).", *self.LABELS)
        self.xids = registry.values(
            "gauge",
            "DCGM_FI_DEV_XID_ERRORS",
            "Value of the last XID error encountered.",
            *(*self.LABELS, "err_code", "err_msg"),
        )


class Exporter:
    def __init__(self, node: str, gpus: int) -> None:
        self.numbers = Numbers()
        self._gpus = [Gpu(index, node) for index in range(gpus)]
        self._busy = [0.0] * gpus
        self._lost: set[int] = set()
        self._latched: dict[int, tuple[str, ...]] = {}
        for gpu in self._gpus:
            self.look(gpu.index, loaded=False, batch=False)

    @property
    def gpus(self) -> int:
        return len(self._gpus)

    def hit(self, error: Xid) -> None:
        """Latch an Xid on the GPU with that bus number; an unknown bus counts as the first GPU's."""
        parts = error.pci.split(":")
        buses = {FIRST_BUS + gpu.index: gpu for gpu in self._gpus}
        gpu = buses.get(int(parts[1], 16) if len(parts) > 1 and parts[1] else FIRST_BUS, self._gpus[0])
        if old := self._latched.get(gpu.index):
            self.numbers.xids.drop(*old)
        series = self._latched[gpu.index] = (*gpu.labels, str(error.code), error.message)
        self.numbers.xids.of(*series).set(error.code)
        if error.code == OFF_THE_BUS:
            self._lost.add(gpu.index)
            for family in self._gauges():
                family.drop(*gpu.labels)

    def look(self, index: int, *, loaded: bool, batch: bool) -> None:
        """Book what the GPU's engine was seen to do: has it a model, has it a batch?"""
        if index in self._lost:
            return
        busy = self._busy[index] = self._busy[index] * (1 - SMOOTHING) + SMOOTHING * batch
        used = round(FRAMEBUFFER_MIB * LOADED_SHARE) if loaded else 0
        values = (round(IDLE_CELSIUS + busy * (BUSY_CELSIUS - IDLE_CELSIUS)), round(100 * busy))
        for family, value in zip(self._gauges(), (*values, FRAMEBUFFER_MIB - used, used), strict=True):
            family.of(*self._gpus[index].labels).set(value)

    def app(self) -> web.Application:
        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=self.numbers.registry.render().encode(), headers={"Content-Type": CONTENT_TYPE})

        async def health(_: web.Request) -> web.Response:
            return web.Response(text="KO" if len(self._lost) == self.gpus else "OK")

        app = web.Application()
        app.router.add_get("/metrics", metrics)
        app.router.add_get("/health", health)
        return app

    def _gauges(self) -> tuple[Family[Value], ...]:
        numbers = self.numbers
        return numbers.temperature, numbers.utilisation, numbers.free, numbers.used


async def follow_log(exporter: Exporter, log: Path, lookback: float) -> None:
    """Latch every Xid of the kernel log, until cancelled."""
    async for line in Tail(log, lookback=lookback).lines():
        if error := xid(line):
            say(f"Xid {error.code} on {error.pci}: {error.message}")
            exporter.hit(error)


async def follow_engines(exporter: Exporter, api: Api, node: str, every: float) -> None:
    """Look at the engines on this node's GPUs, until cancelled."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as session:
        while True:
            try:
                pods, _ = await api.list(PODS, fields=f"spec.nodeName={node}")
            except (ApiError, aiohttp.ClientError, OSError) as lost:
                say(f"cannot list the pods of {node}: {lost}")
                pods = []
            users = [pod for pod in sorted(pods, key=_age) for _ in range(_gpus_of(pod))][: exporter.gpus]
            batches = await asyncio.gather(*(_batch(session, pod) for pod in users))
            for index in range(exporter.gpus):
                batch = batches[index] if index < len(batches) else None
                exporter.look(index, loaded=batch is not None, batch=bool(batch))
            await asyncio.sleep(every)


async def _batch(session: aiohttp.ClientSession, pod: Obj) -> float | None:
    """How many sequences the pod's engine is working on; None: nothing is loaded."""
    address = pod.get("status", {}).get("podIP")
    port = (pod["metadata"].get("annotations") or {}).get("prometheus.io/port")
    if not address or not port:
        return None
    try:
        async with session.get(f"http://{address}:{port}/metrics") as answer:
            found = _RUNNING.search(await answer.read())
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    return float(found.group(1)) if found else None


def _gpus_of(pod: Obj) -> int:
    if pod.get("status", {}).get("phase") != "Running":
        return 0
    containers = pod["spec"].get("containers") or []
    limits = [(container.get("resources") or {}).get("limits") or {} for container in containers]
    return sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)


def _age(pod: Obj) -> tuple[str, str]:
    return pod.get("status", {}).get("startTime") or "", pod["metadata"]["uid"]


async def _count(api: Api, node: str) -> int:
    """How many GPUs the node has; 0: cannot be known yet."""
    try:
        status = (await api.get(NODES, node)).get("status") or {}
    except (ApiError, aiohttp.ClientError, OSError) as lost:
        say(f"cannot read node {node}: {lost}")
        return 0
    return int((status.get("capacity") or {}).get("nvidia.com/gpu", 0))


@asynccontextmanager
async def _background(*work: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def _export(args: argparse.Namespace) -> int:
    stop = asyncio.create_task(stop_event().wait())
    async with incluster.connect("dcgm-exporter") as api:
        gpus = args.gpus or await _count(api, args.node)
        while not gpus and not stop.done():
            await asyncio.wait({stop}, timeout=1)
            gpus = await _count(api, args.node)
        if stop.done():
            return 0
        exporter = Exporter(args.node, gpus)
        async with serving(exporter.app(), args.host, args.port, keep_alive=75.0):
            say(f"exporting {gpus} GPUs of {args.node} on {args.host}:{args.port}")
            log = asyncio.create_task(follow_log(exporter, args.log, args.lookback))
            engines = asyncio.create_task(follow_engines(exporter, api, args.node, args.every))
            async with _background(log, engines):
                done, _ = await asyncio.wait({stop, log, engines}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
    return 0


def main(argv: Sequence[str]) -> int:
    """Export one node's GPUs until SIGTERM. Returns the exit code; SystemExit(2) for bad arguments."""
    parser = argparse.ArgumentParser(prog="dcgm-exporter", description=__doc__)
    parser.add_argument("--node", default=os.environ.get("NODE_NAME"), help="default: $NODE_NAME")
    parser.add_argument("--gpus", type=int, default=0, help="default: the node's nvidia.com/gpu capacity")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104 - inside a pod
    parser.add_argument("--port", type=int, default=9400)
    parser.add_argument("--log", type=Path, default=Path("/var/log/kern.log"))
    parser.add_argument("--lookback", type=float, default=300.0, help="seconds of old log that count at the start")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks at the engines")
    args = parser.parse_args(list(argv))
    if not args.node:
        parser.error("--node or NODE_NAME must name the node")
    try:
        return run(_export(args))
    except incluster.NotInCluster as missing:
        say(f"error: {missing}")
        return 1


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
