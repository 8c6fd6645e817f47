"""A sandbox without a stack for the tests of machines and pods, and what they all do with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sandbox import prometheus
from sandbox.client import EVENTS, PODS, ApiError, EventType, HttpApi, Informer, Obj
from sandbox.options import Options
from sandbox.up import Running, down, up

PYTHON, PAUSE = "python:3.12-alpine", "gcr.io/google-containers/pause:latest"

# A web server that says how it was made, and that ends 0 a moment after SIGTERM.
SERVER = """
import http.server, os, signal, sys, threading, time
linger = float(os.environ.get('LINGER', '0'))
broken = {'flag': False}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/break': broken['flag'] = True
        if self.path == '/mend': broken['flag'] = False
        if self.path == '/env': body = '\\n'.join(f'{k}={v}' for k, v in os.environ.items()).encode()
        else: body = b'ok'
        self.send_response(503 if broken['flag'] and self.path.startswith('/health') else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(('0.0.0.0', 8000), Handler)
def end(*_):
    print('stopping', flush=True)
    time.sleep(linger)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print('serving', flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
while True: signal.pause()
"""


def require_root_and_prometheus() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: pods are processes in namespaces")
    if shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        pytest.skip("needs nft (package nftables)")
    try:
        prometheus.find_binary(Options())
    except prometheus.Missing as missing:
        pytest.skip(str(missing))


@contextlib.contextmanager
def sandbox(state: Path, **changes: Any) -> Iterator[Running]:
    """One node in one zone, no stack, unless told otherwise."""
    require_root_and_prometheus()
    chosen = {"stack": "none", "zones": ("a",), "nodes_per_zone": 1, "parent": os.getpid(), **changes}
    running = up(Options(state_dir=state, **chosen), lambda line: None)
    try:
        yield running
    finally:
        down(state)


def pod(name: str, container: Obj | None = None, **spec: Any) -> Obj:
    """A pod of one container `web`; without more, the server above."""
    web: Obj = {"name": "web", "image": PYTHON, "args": ["python3", "-c", SERVER]} | (container or {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"containers": [web], "nodeName": "node-a-1", **spec},
    }


READINESS = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1, "failureThreshold": 2}
LIVENESS = {"httpGet": {"path": "/health/live", "port": 8000}, "periodSeconds": 1, "failureThreshold": 2}


@dataclass(slots=True)
class Seen:
    """One state of the pod, as a watcher saw it."""

    at: float
    type: EventType
    object: Obj

    @property
    def status(self) -> Obj:
        found: Obj = self.object.get("status") or {}
        return found

    @property
    def web(self) -> Obj:
        statuses: list[Obj] = self.status.get("containerStatuses") or [{}]
        return statuses[0]

    @property
    def restarts(self) -> int:
        return int(self.web.get("restartCount", 0))

    @property
    def waiting(self) -> str:
        return str(((self.web.get("state") or {}).get("waiting") or {}).get("reason", ""))

    @property
    def running(self) -> bool:
        return "running" in (self.web.get("state") or {})

    @property
    def ended(self) -> Obj | None:
        found: Obj | None = (self.web.get("state") or {}).get("terminated")
        return found

    @property
    def last(self) -> Obj | None:
        found: Obj | None = (self.web.get("lastState") or {}).get("terminated")
        return found

    def condition(self, type_: str) -> Obj:
        found: Obj = next((c for c in self.status.get("conditions") or [] if c["type"] == type_), {})
        return found

    @property
    def ready(self) -> bool:
        return self.condition("Ready").get("status") == "True"


@dataclass(slots=True)
class Life:
    """Everything that a watcher saw of one pod, and the means to act on it."""

    api: HttpApi
    name: str
    seen: list[Seen] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, type_: EventType, obj: Obj, _: Obj | None) -> None:
        if obj["metadata"]["name"] == self.name:
            self.seen.append(Seen(time.monotonic(), type_, obj))
            self._news.set()

    async def until(self, what: Callable[[Seen], object], within: float = 10.0, *, since: int = 0) -> Seen:
        """The first state from `since` on that is so."""
        looked = since
        try:
            async with asyncio.timeout(within):
                while True:
                    while looked < len(self.seen):
                        if what(self.seen[looked]):
                            return self.seen[looked]
                        looked += 1
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            last = self.seen[-1].object.get("status") if self.seen else None
            raise AssertionError(f"not seen of pod {self.name} within {within} s; last status: {last}") from None

    async def gone(self, within: float = 10.0) -> Seen:
        return await self.until(lambda s: s.type == "DELETED", within)

    async def events(self, reason: str = "") -> list[Obj]:
        found, _ = await self.api.list(EVENTS, "default")
        return [e for e in found if e["involvedObject"]["name"] == self.name and reason in ("", e.get("reason"))]

    async def patch(self, change: Obj) -> None:
        await self.api.patch(PODS, self.name, change, "default", type="strategic")

    async def set_image(self, image: str) -> None:
        await self.patch({"spec": {"containers": [{"name": "web", "image": image}]}})

    async def delete(self, grace: int | None = None) -> None:
        await self.api.delete(PODS, self.name, "default", grace=grace)


async def eventually(look: Callable[[], Coroutine[Any, Any, Any]], within: float = 5.0) -> Any:
    """The first true answer of `look`."""
    deadline = time.monotonic() + within
    while not (found := await look()):
        assert time.monotonic() < deadline, f"not so within {within} s"
        await asyncio.sleep(0.05)
    return found


def until(what: Callable[[], Any], within: float = 30.0) -> Any:
    """The first true answer of `what`, of tests that have no event loop."""
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline, f"not so within {within} s"
        time.sleep(0.1)
    return found


@contextlib.asynccontextmanager
async def api_of(running: Running) -> AsyncIterator[HttpApi]:
    state = Path(running.state_dir)
    token, ca = (state / "token").read_text().strip(), (state / "ca.crt").read_text()
    async with HttpApi(running.api_url, token, ca) as api:
        yield api


@contextlib.asynccontextmanager
async def living(running: Running, manifest: Obj) -> AsyncIterator[Life]:
    """Create the pod and watch it; forced away at the end."""
    name = manifest["metadata"]["name"]
    async with api_of(running) as api:
        life = Life(api, name)
        async with Informer(api, PODS, "default", on_event=life.note).running():
            await api.create(PODS, manifest)
            try:
                yield life
            finally:
                with contextlib.suppress(ApiError):
                    await api.delete(PODS, name, "default", grace=0)


async def printed(running: Running, name: str, container: str = "") -> str:
    """What the pod (or one of its containers) has written."""
    query = f"?container={container}" if container else ""
    token = (Path(running.state_dir) / "token").read_text().strip()
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
        session.get(f"{running.api_url}/api/v1/namespaces/default/pods/{name}/log{query}", ssl=False) as answer,
    ):
        return await answer.text()


def host_pids(title: str) -> list[int]:
    """Live processes whose command line contains `title`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and title in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                found.append(int(entry.name))
    return found
