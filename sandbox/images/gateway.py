"""The stack's front door: a streaming reverse proxy over the ready engines.

Endpoints come from the Service's EndpointSlices through the Kubernetes API, and are kept when it cannot be reached.
A request that fails before its first byte is retried once on another endpoint (bounded by a retry budget); an
answer that breaks later breaks the client's answer too: it is never ended as if it were whole. Failing endpoints
are ejected (`balancer`), and what still waits for a first byte from them goes elsewhere.

SIGTERM: /healthz answers 503 for `--drain-seconds`, then the port closes, what is in flight is finished, and the
process ends with 0.

A stream's headers are held back until its first token is there, so that a retry is still possible.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from sandbox.client import ENDPOINTSLICES, Informer
from sandbox.images import incluster
from sandbox.images.balancer import Balancer, Budget, Endpoint, Place, Policy, places
from sandbox.images.metrics import CONTENT_TYPE, REQUEST_BUCKETS, TTFT_BUCKETS, Registry
from sandbox.images.process import run, say, serving, stop_event
from sandbox.images.upstream import Broken, Connection, Exchange, Pool

HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "host", "content-length", "expect"}
)
SLOW_CLIENT_BYTES = 1 << 20
CLIENT_LEFT, BROKEN_OFF = "499", "599"  # codes in gateway_requests_total: no status was, or the one sent is not true


@dataclass(frozen=True, slots=True)
class Config:
    namespace: str
    service: str
    host: str
    port: int
    name: str
    connect_timeout: float
    first_byte_timeout: float
    suspect_after: float  # seconds without a first byte, then the engine is asked for /health
    health_timeout: float
    token_timeout: float  # what a whole (unstreamed) answer may take per token on top
    stall_timeout: float
    retry: bool
    policy: Policy
    drain_seconds: float
    keep_alive: float


@dataclass(frozen=True, slots=True)
class Call:
    """A client's request, ready to be sent (more than once) to an engine."""

    head: bytes
    body: bytes
    patience: float  # seconds until the first byte of the answer's body

    def to(self, place: Place) -> bytes:
        return self.head + f"Host: {place.host}:{place.port}\r\n\r\n".encode() + self.body


class Numbers:
    def __init__(self) -> None:
        registry = self.registry = Registry()
        self.requests = registry.values(
            "counter",
            "gateway_requests_total",
            "Requests by status (499: client left, 599: broken off after the first byte) and zone of the engine.",
            *("code", "zone"),
        )
        self.duration = registry.histograms(
            "gateway_request_duration_seconds", "Time from a request to the end of its answer.", REQUEST_BUCKETS
        ).of()
        self.ttft = registry.histograms(
            "gateway_time_to_first_token_seconds", "Time from a request to its first byte.", TTFT_BUCKETS
        ).of()
        self.retries = registry.values("counter", "gateway_retries_total", "Second attempts.").of()
        self.ejections = registry.values("counter", "gateway_ejections_total", "Endpoints taken out.", "pod")
        self.in_flight = registry.values("gauge", "gateway_in_flight", "Requests being answered.").of()
        self.endpoints = registry.values("gauge", "gateway_endpoints", "Known endpoints by state.", "state")


class Gateway:
    def __init__(self, config: Config) -> None:
        self._config = config
        self.numbers = Numbers()
        self._budget = Budget()
        self.balancer = Balancer(config.policy, self._pool, self._healthy, self._changed)
        self._draining = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("GET", "/v1/{path:.*}", self._proxy)
        app.router.add_route("POST", "/v1/{path:.*}", self._proxy)
        return app

    def drain(self) -> None:
        self._draining = True

    async def idle(self) -> None:
        """Returns once nothing is in flight."""
        await self._idle.wait()

    async def _healthz(self, _: web.Request) -> web.Response:
        if self._draining:
            return web.Response(status=503, text="draining\n")
        return web.Response(text="ok\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        states = [endpoint.ejected for endpoint in self.balancer.endpoints]
        self.numbers.endpoints.of("ejected").set(sum(states))
        self.numbers.endpoints.of("used").set(len(states) - sum(states))
        self.numbers.in_flight.set(self._running)
        return web.Response(body=self.numbers.registry.render().encode(), headers={"Content-Type": CONTENT_TYPE})

    def _pool(self, place: Place) -> Pool:
        return Pool(
            place.host,
            place.port,
            connect_timeout=self._config.connect_timeout,
            idle_seconds=self._config.keep_alive,
        )

    def _changed(self, endpoint: Endpoint) -> None:
        pod = endpoint.place.pod
        say(f"{'ejected' if endpoint.ejected else 'readmitted'} {pod}")
        if not endpoint.ejected:
            return
        self.numbers.ejections.of(pod).inc()
        for connection in list(endpoint.waiting):
            if self._config.retry and self._spend():
                connection.break_off("ejected")

    async def _healthy(self, endpoint: Endpoint) -> bool:
        try:
            connection = await endpoint.pool.take(fresh=True)
            exchange = connection.send(Call(b"GET /health HTTP/1.1\r\n", b"", 0).to(endpoint.place))
            try:
                async with asyncio.timeout(self._config.health_timeout):
                    await exchange.done
            finally:
                connection.close()
        except (Broken, TimeoutError):
            return False
        return exchange.status == 200

    async def _proxy(self, request: web.Request) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._running += 1
        self._idle.clear()
        code, zone = CLIENT_LEFT, "none"
        try:
            call = self._call(request, await request.read())
            self._budget.earn()
            response, code, zone = await self._answer(request, call, began)
            return response
        finally:
            self.numbers.requests.of(code, zone).inc()
            self.numbers.duration.observe(loop.time() - began)
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _answer(self, request: web.Request, call: Call, began: float) -> tuple[web.StreamResponse, str, str]:
        """Try, and once more if that is allowed. Returns the response with its code and zone for the metrics."""
        tried: list[Endpoint] = []
        trouble, code = "no engine is ready", 503
        while endpoint := self.balancer.pick(tried):
            endpoint.in_flight += 1
            try:
                connection, exchange = await self._attempt(endpoint, call, last=bool(tried))
                if exchange.status < 500:
                    self.balancer.succeeded(endpoint)
                else:
                    self.balancer.failed(endpoint)
                    if self._may_retry([*tried, endpoint]):
                        connection.break_off("given_up")
                        tried.append(endpoint)
                        continue
                self.numbers.ttft.observe(asyncio.get_running_loop().time() - began)
                return await self._forward(request, endpoint, connection, exchange)
            except Broken as broken:
                tried.append(endpoint)
                if broken.cause == "ejected":  # not this request's fault, and its retry is paid for
                    continue
                self.balancer.failed(endpoint, broken.cause)
                trouble, code = (
                    f"engine {endpoint.place.pod}: {broken.cause}",
                    504 if "timeout" in broken.cause else 502,
                )
                if not self._may_retry(tried):
                    break
            finally:
                endpoint.in_flight -= 1
        last = tried[-1].place if tried else None
        return self._refusal(code, trouble, last), str(code), (last.zone or "none") if last else "none"

    def _may_retry(self, tried: Sequence[Endpoint]) -> bool:
        return self._config.retry and len(tried) == 1 and self.balancer.pick(tried) is not None and self._spend()

    def _spend(self) -> bool:
        if not self._budget.spend():
            return False
        self.numbers.retries.inc()
        return True

    async def _attempt(self, endpoint: Endpoint, call: Call, *, last: bool) -> tuple[Connection, Exchange]:
        """Send a request; returns when the first byte of the answer's body is there. Raises Broken."""
        connection = await endpoint.pool.take()
        try:
            return connection, await self._first_byte(endpoint, connection, call, last=last)
        except Broken as broken:
            if not (broken.stale and self._config.retry):
                raise
        connection = await endpoint.pool.take(fresh=True)
        return connection, await self._first_byte(endpoint, connection, call, last=last)

    async def _first_byte(self, endpoint: Endpoint, connection: Connection, call: Call, *, last: bool) -> Exchange:
        exchange = connection.send(call.to(endpoint.place))
        if not last:
            endpoint.waiting.add(connection)
        try:
            await asyncio.wait((exchange.first,), timeout=min(call.patience, self._config.suspect_after))
            if not exchange.first.done():
                self.balancer.suspect(endpoint)
                await asyncio.wait((exchange.first,), timeout=call.patience - self._config.suspect_after)
            if not exchange.first.done():
                connection.break_off("first_byte_timeout")
            exchange.first.result()
        except asyncio.CancelledError:
            connection.break_off("given_up")
            raise
        finally:
            endpoint.waiting.discard(connection)
        return exchange

    async def _forward(
        self, request: web.Request, endpoint: Endpoint, connection: Connection, exchange: Exchange
    ) -> tuple[web.StreamResponse, str, str]:
        response = web.StreamResponse(status=exchange.status)
        for name, value in exchange.headers:
            if name.lower() not in HOP_BY_HOP:
                response.headers.add(name, value)
        self._sign(response, endpoint.place)
        if exchange.length is None:
            response.enable_chunked_encoding()
        else:
            response.content_length = exchange.length
        zone = endpoint.place.zone or "none"
        try:
            await response.prepare(request)
            await response.write(b"")  # the headers; the body goes straight onto the transport
            exchange.forward(_Pipe(request.transport, chunked=exchange.length is None))
            await self._to_the_end(connection, exchange)
        except Broken as broken:
            self.balancer.failed(endpoint, broken.cause)
            say(f"broken off: {endpoint.place.pod}: {broken.cause}")
            if request.transport:
                request.transport.close()  # flushes what had come, and ends the body short of its end
            return response, BROKEN_OFF, zone
        except (asyncio.CancelledError, ConnectionError):
            connection.break_off("given_up")  # the client left: the engine need not go on
            raise
        endpoint.pool.give_back(connection)
        await response.write_eof()
        return response, str(exchange.status), zone

    async def _to_the_end(self, connection: Connection, exchange: Exchange) -> None:
        """Wait for the proper end of an answer; one without a byte for too long is broken off. Raises Broken."""
        loop, limit = asyncio.get_running_loop(), self._config.stall_timeout
        while not exchange.done.done():
            left = exchange.touched + limit - loop.time()
            if left <= 0:
                connection.break_off("stall")
                break
            await asyncio.wait((exchange.done,), timeout=left)
        exchange.done.result()

    def _call(self, request: web.Request, body: bytes) -> Call:
        lines = [f"{request.method} {request.raw_path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        if body or request.method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        head = "".join(line + "\r\n" for line in lines).encode("utf-8", "surrogateescape")
        return Call(head, body, self._config.first_byte_timeout + self._config.token_timeout * _unstreamed(body))

    def _sign(self, response: web.StreamResponse, place: Place | None) -> None:
        response.headers["x-served-by"] = place.pod if place else "none"
        response.headers["x-served-zone"] = (place.zone or "none") if place else "none"
        response.headers["x-gateway"] = self._config.name
        if self._draining:
            response.force_close()

    def _refusal(self, code: int, trouble: str, last: Place | None) -> web.Response:
        error = {"message": f"{trouble}", "type": "GatewayError", "param": None, "code": code}
        response = web.Response(body=orjson.dumps({"error": error}), status=code, content_type="application/json")
        self._sign(response, last)
        return response


class _Pipe:
    """Writes body bytes to a client, framed as the response announced."""

    def __init__(self, transport: asyncio.WriteTransport | None, *, chunked: bool) -> None:
        self._transport, self._chunked = transport, chunked

    def __call__(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return  # the handler is about to be cancelled
        if transport.get_write_buffer_size() > SLOW_CLIENT_BYTES:
            transport.abort()
            return
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)


def _unstreamed(body: bytes) -> int:
    """How many tokens come before the first byte: all of them, unless the answer is streamed."""
    try:
        asked: Any = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError:
        return 0
    if not isinstance(asked, dict) or asked.get("stream"):
        return 0
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
    return limit if isinstance(limit, int) and 0 < limit < 1 << 20 else 1024


async def _follow(config: Config, balancer: Balancer, known: asyncio.Event) -> None:
    """Keep the balancer's endpoints current until cancelled; what is known stays while the API is unreachable."""
    labels = f"kubernetes.io/service-name={config.service}"

    def changed(*_: object) -> None:
        if informer.synced.is_set():
            balancer.update(places(informer.objects.values()))

    while True:
        async with incluster.connect("gameday-gateway") as api:
            informer = Informer(api, ENDPOINTSLICES, config.namespace, labels=labels, on_event=changed)
            async with informer.running():
                changed()
                known.set()
                await incluster.token_changed()


async def _serve(config: Config) -> int:
    stop = stop_event()
    gateway = Gateway(config)
    known = asyncio.Event()
    following = asyncio.create_task(_follow(config, gateway.balancer, known))
    try:
        await _first_of(following, known, stop)
        if stop.is_set():
            return 0
        async with serving(gateway.app(), config.host, config.port, keep_alive=75.0) as close_port:
            say(f"serving {config.namespace}/{config.service} on {config.host}:{config.port}")
            await _first_of(following, stop)
            say("draining")
            gateway.drain()
            await asyncio.sleep(config.drain_seconds)
            await close_port()
            await gateway.idle()
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
    say("drained")
    return 0


async def _first_of(following: asyncio.Task[None], *events: asyncio.Event) -> None:
    """Wait for one of the events; what ends `following` (a missing token) ends this too."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait({following, *waits}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
    finally:
        for wait in waits:
            wait.cancel()


def _config(argv: Sequence[str]) -> Config:
    policy = Policy()
    parser = argparse.ArgumentParser(prog="gateway", description=__doc__)
    parser.add_argument("--service", default="llm/my-llama32", help="namespace/name of the engines' Service")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104 - inside a pod
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--connect-timeout", type=float, default=0.3, help="seconds")
    parser.add_argument("--first-byte-timeout", type=float, default=1.0, help="seconds until a stream's first token")
    parser.add_argument(
        "--suspect-after", type=float, default=0.3, help="seconds, then the engine is asked for /health"
    )
    parser.add_argument("--health-timeout", type=float, default=0.5, help="seconds for that, and for re-admission")
    parser.add_argument("--token-timeout", type=float, default=0.1, help="more seconds per token of a whole answer")
    parser.add_argument("--stall-timeout", type=float, default=2.0, help="seconds without a byte inside an answer")
    parser.add_argument("--no-retry", action="store_true")
    parser.add_argument("--no-ejection", action="store_true")
    parser.add_argument("--eject-after", type=int, default=policy.failures, help="failures in a row")
    parser.add_argument("--eject-seconds", type=float, default=policy.base, help="before the first look, then doubled")
    parser.add_argument("--eject-seconds-max", type=float, default=policy.most)
    parser.add_argument("--drain-seconds", type=float, default=2.0, help="still accepting after SIGTERM")
    parser.add_argument("--keep-alive", type=float, default=4.0, help="idle engine connections; below the engine's own")
    args = parser.parse_args(argv)
    namespace, slash, service = args.service.partition("/")
    if not (namespace and slash and service):
        parser.error("--service must be namespace/name")
    return Config(
        namespace=namespace,
        service=service,
        host=args.host,
        port=args.port,
        name=os.environ.get("HOSTNAME", "gateway"),
        connect_timeout=args.connect_timeout,
        first_byte_timeout=args.first_byte_timeout,
        suspect_after=args.suspect_after,
        health_timeout=args.health_timeout,
        token_timeout=args.token_timeout,
        stall_timeout=args.stall_timeout,
        retry=not args.no_retry,
        policy=Policy(not args.no_ejection, args.eject_after, args.eject_seconds, args.eject_seconds_max),
        drain_seconds=args.drain_seconds,
        keep_alive=args.keep_alive,
    )


def main(argv: Sequence[str]) -> int:
    """Run one gateway until SIGTERM. Returns the exit code; SystemExit(2) for bad arguments."""
    try:
        return run(_serve(_config(list(argv))))
    except incluster.NotInCluster as missing:
        say(f"error: {missing}")
        return 1


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
