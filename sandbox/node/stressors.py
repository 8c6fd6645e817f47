"""The chaos daemon's calls for stress, served at its port on each machine: start in a container, stop.

Chaos Mesh's controller calls its daemons directly, too (gRPC; here HTTP): a daemon that does not answer is a failed
operation, and whoever stresses through it cannot be recovered until it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Callable
from dataclasses import replace

import orjson
from aiohttp import web

from sandbox.chaos import stress
from sandbox.chaos.shaping import started
from sandbox.client import Obj
from sandbox.controllers.objects import milli
from sandbox.node.container import Container
from sandbox.node.zygote import StartError, ZygoteClient

_END_SECONDS = 2.0  # for a stressor to see its workers off


class Stressors:
    """What stresses containers of this machine."""

    def __init__(self, zygote: ZygoteClient, container_of: Callable[[web.Request], Container | web.Response]) -> None:
        self._zygote, self._container_of = zygote, container_of
        self._numbers = itertools.count(1)
        self._running: dict[str, str] = {}  # path of the request → process

    def app(self) -> web.Application:
        made = web.Application()
        made.router.add_post("/stress/{key}/{namespace}/{pod}/{container}", self._start)
        made.router.add_delete("/stress/{key}/{namespace}/{pod}/{container}", self._stop)
        return made

    async def _start(self, request: web.Request) -> web.Response:
        """Body: the spec of a StressChaos. Answers 200, also when it runs already; else a sentence."""
        if self._zygote.running(self._running.get(request.path, "")):
            return web.json_response({})
        found = self._container_of(request)
        if isinstance(found, web.Response):
            return found
        spec: Obj = orjson.loads(await request.read())
        try:
            self._running[request.path] = await self._stress(found, spec)
        except (stress.Refused, StartError) as refused:
            return web.Response(status=400, text=str(refused))
        return web.json_response({})

    async def _stress(self, container: Container, spec: Obj) -> str:
        """The process, at work."""
        order = await container.entry(["stress"])
        if order is None:
            raise stress.Refused(f"container {container.name} is not running")
        if container.pod.group is None:
            raise stress.Refused("this sandbox cannot write control groups: stress would fall on everything else")
        limit = ((container.spec.get("resources") or {}).get("limits") or {}).get("memory")
        wanted = stress.parse(spec, None if limit is None else milli(limit) // 1000, stress.available_bytes())
        name = f"stress/{next(self._numbers)}"
        order = replace(
            order,
            id=name,
            title="chaos stressor",
            call="sandbox.chaos.stress:main",
            argv=(wanted.dump(),),
            stdin=False,
            security=None,
        )
        _, said = await started(lambda write: self._zygote.spawn(order, write, 2))
        if said != "ready":
            await self._end(name)
            raise stress.Refused(said or "the stressor did not start")
        return name

    async def _stop(self, request: web.Request) -> web.Response:
        """One that has ended, or that never was, is fine."""
        if name := self._running.pop(request.path, None):
            await self._end(name)
        return web.json_response({})

    async def _end(self, name: str) -> None:
        if self._zygote.running(name):
            self._zygote.kill(name, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await self._zygote.exited(name)
        if self._zygote.running(name):  # out of CPU, or of memory
            self._zygote.kill(name, signal.SIGKILL, group=True)
            await self._zygote.exited(name)
        self._zygote.forget(name)
