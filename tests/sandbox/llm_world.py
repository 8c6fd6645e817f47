"""Engines and gateways as real processes on 127.0.0.x, and an API server that knows nothing but EndpointSlices.

Failing servers are here too: one that never accepts, one that resets, one that stalls, one that ends early.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

ROOT = Path(__file__).resolve().parents[2]
SLICES = "/apis/discovery.k8s.io/v1/namespaces/llm/endpointslices"
_hosts = iter(range(2, 250))


def new_host() -> str:
    """A loopback address that no other test of this process has used."""
    return f"127.77.{os.getpid() % 200 + 1}.{next(_hosts)}"


async def until(what: Callable[[], bool | Awaitable[bool]], within: float = 10.0) -> None:
    """Wait until it holds; AssertionError after `within` seconds."""
    deadline = asyncio.get_running_loop().time() + within
    while True:
        found = what()
        if found if isinstance(found, bool) else await found:
            return
        assert asyncio.get_running_loop().time() < deadline, f"not within {within} s"
        await asyncio.sleep(0.02)


@dataclass
class Process:
    popen: asyncio.subprocess.Process
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)

    async def exit_code(self, within: float = 10.0) -> int:
        return await asyncio.wait_for(self.popen.wait(), within)


@contextlib.asynccontextmanager
async def program(
    module: str, args: Sequence[str], host: str, port: int, health: str, env: dict[str, str] | None = None
) -> AsyncIterator[Process]:
    """Run a module of sandbox.images until left; entered when `health` answers 200."""
    popen = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"sandbox.images.{module}", "--host", host, "--port", str(port), *args),
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=asyncio.subprocess.DEVNULL,
    )
    process = Process(popen, host, port)
    try:
        async with aiohttp.ClientSession() as session:

            async def up() -> bool:
                assert popen.returncode is None, f"{module} ended with {popen.returncode}"
                try:
                    async with session.get(process.url + health) as answer:
                        return answer.status == 200
                except aiohttp.ClientError:
                    return False

            await until(up)
        yield process
    finally:
        if popen.returncode is None:
            popen.send_signal(signal.SIGCONT)
            popen.kill()
        await popen.wait()


def engine(*args: str, host: str = "") -> contextlib.AbstractAsyncContextManager[Process]:
    return program("engine", ["--load-seconds", "0", *args], host or new_host(), 8000, "/health")


@dataclass
class Slices:
    """One EndpointSlice, served by list and watch."""

    url: str = ""
    endpoints: list[dict[str, Any]] = field(default_factory=list)
    version: int = 1
    up: bool = True
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    watching: set[web.StreamResponse] = field(default_factory=set)

    def object(self) -> dict[str, Any]:
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "my-llama32-x", "namespace": "llm", "resourceVersion": str(self.version)},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
            "endpoints": self.endpoints,
        }

    async def set(self, *endpoints: dict[str, Any]) -> None:
        async with self.changed:
            self.endpoints, self.version = list(endpoints), self.version + 1
            self.changed.notify_all()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if not self.up:
            raise web.HTTPServiceUnavailable
        assert request.headers["Authorization"] == "Bearer pod-token"
        assert request.query["labelSelector"] == "kubernetes.io/service-name=my-llama32"
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": [self.object()]})
        response = web.StreamResponse()
        await response.prepare(request)
        self.watching.add(response)
        known = int(request.query["resourceVersion"])
        while True:
            async with self.changed:
                while self.version <= known:
                    await self.changed.wait()
                known = self.version
            await response.write(orjson.dumps({"type": "MODIFIED", "object": self.object()}) + b"\n")


@contextlib.asynccontextmanager
async def slices(*endpoints: dict[str, Any]) -> AsyncIterator[Slices]:
    world = Slices(endpoints=list(endpoints))
    app = web.Application()
    app.router.add_get(SLICES, world._serve)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    sock = socket.create_server((new_host(), 0))
    await web.SockSite(runner, sock).start()
    host, port = sock.getsockname()
    world.url = f"http://{host}:{port}"
    try:
        yield world
    finally:
        await runner.cleanup()


def endpoint(host: str, pod: str, zone: str, *, ready: bool = True, serving: bool = True) -> dict[str, Any]:
    return {
        "addresses": [host],
        "conditions": {"ready": ready, "serving": serving, "terminating": False},
        "zone": zone,
        "nodeName": f"node-{zone}-1",
        "targetRef": {"kind": "Pod", "namespace": "llm", "name": pod, "uid": f"uid-{pod}"},
    }


def _write_account(account: Path) -> None:
    account.mkdir(exist_ok=True)
    (account / "token").write_text("pod-token")


@contextlib.asynccontextmanager
async def gateway(world: Slices, account: Path, *args: str) -> AsyncIterator[Process]:
    _write_account(account)
    env = {"GAMEDAY_API_URL": world.url, "GAMEDAY_ACCOUNT_DIR": str(account), "HOSTNAME": "gateway-0"}
    async with program("gateway", ["--drain-seconds", "0.3", *args], new_host(), 8080, "/healthz", env) as process:
        yield process


def ask(**more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "Tell me a story"}]
    return {"model": "my-llama32", "messages": messages, "max_tokens": 8, "stream": True} | more


@dataclass
class Answer:
    """What a client saw of one stream, down to the framing."""

    status: int = 0
    served_by: str = ""
    zone: str = ""
    events: list[bytes] = field(default_factory=list)
    ended: bool = False  # the body's proper end, [DONE] or not
    error: str = ""

    @property
    def done(self) -> bool:
        return bool(self.events) and self.events[-1] == b"[DONE]"

    @property
    def tokens(self) -> int:
        chunks = [orjson.loads(event) for event in self.events if event != b"[DONE]"]
        return sum(1 for chunk in chunks for choice in chunk["choices"] if choice["delta"].get("content"))


async def stream(
    session: aiohttp.ClientSession, url: str, on_event: Callable[[Answer], None] | None = None, **more: object
) -> Answer:
    """One chat completion, read to its end or its breaking."""
    answer = Answer()
    try:
        async with session.post(url + "/v1/chat/completions", json=ask(**more)) as response:
            answer.status = response.status
            answer.served_by = response.headers.get("x-served-by", "")
            answer.zone = response.headers.get("x-served-zone", "")
            async for line in response.content:
                if line.startswith(b"data: "):
                    answer.events.append(line[6:].strip())
                    if on_event:
                        on_event(answer)
            answer.ended = True
    except (aiohttp.ClientError, TimeoutError) as broken:
        answer.error = f"{type(broken).__name__}: {broken}"
    return answer


Fault = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def bad_server(fault: Fault, *, healthy: bool = False) -> AsyncIterator[str]:
    """A server on port 8000 of its own address that treats every request with `fault`; yields the address.

    `healthy`: all but GET, which is answered with 200, as by an engine whose GPU is dead while its server lives.
    """
    host = new_host()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"(?i)content-length: *(\d+)", head)
            length = int(found[1]) if found else 0
            await reader.readexactly(length)
            if healthy and head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
            else:
                await fault(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, host, 8000)
    try:
        yield host
    finally:
        server.close()


@contextlib.contextmanager
def black_hole() -> Any:
    """An address whose port 8000 never completes a handshake; yields it."""
    host = new_host()
    listener = socket.socket()
    listener.bind((host, 8000))
    listener.listen(0)
    full = []
    for _ in range(3):  # fill the accept queue: further SYNs are dropped
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((host, 8000))
        full.append(sock)
    try:
        yield host
    finally:
        for sock in (*full, listener):
            sock.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":" la"},"finish_reason":null}]}\n\n'


async def never_answers(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def resets(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def ends_early(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(TOKEN) * 2)
    await writer.drain()


async def resets_midway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(TOKEN) * 2)
    await asyncio.sleep(0.1)
    await resets(reader, writer)


async def stalls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(TOKEN) * 2)
    await reader.read()


async def answers_500(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops")
    await writer.drain()
