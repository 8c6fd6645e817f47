"""An LLM inference engine that behaves like vLLM's OpenAI server, without a model.

Real: the HTTP and SSE traffic, the two processes (`core`) and their signals, queueing, batching and KV-cache
book-keeping.
Emulated: the time a GPU would take (`batching.Cost`) and the text. As in vLLM the port opens only once the model
is loaded, a stream's headers go out before its first token, and a client that leaves aborts its sequence.

SIGTERM: /health answers 503, new requests are refused with 503, running ones have `--shutdown-timeout` seconds to
finish and are cut off then; the process ends with 0. The default is vLLM's own since 0.18: 0, so nothing finishes
(https://github.com/vllm-project/vllm/pull/36666).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import orjson
from aiohttp import web

from sandbox.images import core, openai
from sandbox.images.batching import Cost, Finish, Limits, Scheduler, Seq, Step
from sandbox.images.core import Core, CoreDied
from sandbox.images.metrics import (
    CONTENT_TYPE,
    ITL_BUCKETS,
    LENGTH_BUCKETS,
    REQUEST_BUCKETS,
    TTFT_BUCKETS,
    Registry,
)
from sandbox.images.process import env_seconds, run, say, serving, stop_event

SLOW_CLIENT_BYTES = 1 << 20  # unread output after which a client is given up
LATE_STEPS = 2  # a step that ends this many steps late (a paused process) starts a new time line


class Numbers:
    """vLLM's metrics, by its current names (facts/loadgen.md)."""

    def __init__(self, model: str) -> None:
        registry = self.registry = Registry()
        where, value = ("model_name", "engine"), (model, "0")

        def gauge(name: str, about: str) -> Callable[[float], None]:
            return registry.values("gauge", f"vllm:{name}", about, *where).of(*value).set

        def counter(name: str, about: str) -> Callable[[float], None]:
            return registry.values("counter", f"vllm:{name}_total", about, *where).of(*value).inc

        def set_counter(name: str, about: str) -> Callable[[float], None]:
            return registry.values("counter", f"vllm:{name}_total", about, *where).of(*value).set

        def histogram(name: str, about: str, edges: Sequence[float] = REQUEST_BUCKETS) -> Callable[[float], None]:
            return registry.histograms(f"vllm:{name}", about, edges, *where).of(*value).observe

        self.running = gauge("num_requests_running", "Number of requests in model execution batches.")
        self.waiting = gauge("num_requests_waiting", "Number of requests waiting to be processed.")
        self.kv_usage = gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self.preemptions = set_counter("num_preemptions", "Cumulative number of preemptions from the engine.")
        self.prefix_queries = set_counter("prefix_cache_queries", "Prefix cache queries, in queried tokens.")
        self.prefix_hits = set_counter("prefix_cache_hits", "Prefix cache hits, in cached tokens.")
        self.prompt_tokens = counter("prompt_tokens", "Number of prefill tokens processed.")
        self.generation_tokens = counter("generation_tokens", "Number of generation tokens processed.")
        success = registry.values(
            "counter", "vllm:request_success_total", "Count of successfully processed requests.", *where,
            "finished_reason",
        )  # fmt: skip
        self.finished = {reason: success.of(*value, reason) for reason in ("stop", "length", "abort")}
        self.ttft = histogram("time_to_first_token_seconds", "Time to first token in seconds.", TTFT_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Inter-token latency in seconds.", ITL_BUCKETS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Time per output token in seconds per request.", ITL_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "End to end request latency in seconds.")
        self.queue = histogram("request_queue_time_seconds", "Time spent in the WAITING phase.")
        self.inference = histogram("request_inference_time_seconds", "Time spent in the RUNNING phase.")
        self.prefill = histogram("request_prefill_time_seconds", "Time spent in the PREFILL phase.")
        self.decode = histogram("request_decode_time_seconds", "Time spent in the DECODE phase.")
        self.prompt_length = histogram("request_prompt_tokens", "Number of prefill tokens.", LENGTH_BUCKETS)
        self.output_length = histogram("request_generation_tokens", "Number of generation tokens.", LENGTH_BUCKETS)

    def ended(self, seq: Seq) -> None:
        assert seq.finish is not None
        self.finished[seq.finish].inc()
        self.e2e(seq.last_token - seq.arrived)
        self.queue(seq.scheduled - seq.arrived)
        self.inference(seq.last_token - seq.scheduled)
        self.prefill(seq.first_token - seq.scheduled)
        self.decode(seq.last_token - seq.first_token)
        self.prompt_length(seq.prompt_tokens)
        self.output_length(seq.generated)
        if seq.generated > 1:
            self.tpot((seq.last_token - seq.first_token) / (seq.generated - 1))


@dataclass(frozen=True, slots=True)
class Config:
    model: str
    host: str
    port: int
    load_seconds: float
    shutdown_timeout: float
    mean_tokens: int
    keep_alive: float
    limits: Limits
    cost: Cost


class Engine:
    def __init__(self, config: Config, core: Core) -> None:
        self._config, self._core, self._clock = config, core, time.monotonic
        self._scheduler = Scheduler(config.limits, config.cost)
        self._numbers = Numbers(config.model)
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._started = int(time.time())
        self._answering_now: set[asyncio.Task[object]] = set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ping", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answering("chat"))
        app.router.add_post("/v1/completions", self._answering("text"))
        return app

    async def steps(self) -> None:
        """The engine's heart: one step after the other while there is work. Runs until cancelled."""
        due = self._clock()
        while True:
            step = self._scheduler.plan(now := self._clock())
            if step is None:
                self._work.clear()
                await self._work.wait()
                due = self._clock()
                continue
            due = max(due, now - LATE_STEPS * step.seconds) + step.seconds
            await self._core.until(due)
            self._complete(step)

    async def drain(self, within: float) -> int:
        """Refuse what is new, let what runs finish; returns how many were cut off after `within` seconds."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), within)
        rest = list(self._answering_now)
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)
        return len(rest)

    def _complete(self, step: Step) -> None:
        now, numbers = self._clock(), self._numbers
        before = [(seq, seq.generated, seq.last_token) for seq, _ in step.work]
        for seq in self._scheduler.complete(step, now):
            numbers.ended(seq)
        made = 0
        for seq, generated, last in before:
            if seq.generated == generated:
                continue
            made += 1
            if generated:
                numbers.itl(now - last)
            else:
                numbers.ttft(now - seq.arrived)
        numbers.generation_tokens(made)
        numbers.prompt_tokens(step.prefill_tokens)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self._draining else 200)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "gameday-sandbox"})

    async def _metrics(self, _: web.Request) -> web.Response:
        numbers, scheduler = self._numbers, self._scheduler
        numbers.running(len(scheduler.running))
        numbers.waiting(len(scheduler.waiting))
        numbers.kv_usage(scheduler.pool.usage)
        numbers.preemptions(scheduler.preemptions)
        numbers.prefix_queries(scheduler.prefix_queries)
        numbers.prefix_hits(scheduler.prefix_hits)
        return web.Response(body=numbers.registry.render().encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: web.Request) -> web.Response:
        model = self._config.model
        card = {
            "id": model,
            "object": "model",
            "created": self._started,
            "owned_by": "vllm",
            "root": model,
            "parent": None,
            "max_model_len": self._config.limits.max_model_len,
        }
        return _json(orjson.dumps({"object": "list", "data": [card]}))

    def _answering(self, kind: Literal["chat", "text"]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                if self._draining:
                    raise openai.Refused("The engine is shutting down.", 503)
                raw = await request.read()
                ask = openai.parse(kind, raw, self._config.model)
                reply = Reply(ask, self._config.model, self._ident(), request.transport if ask.stream else None)
                seq = self._sequence(ask, reply)
            except openai.Refused as refused:
                response = _json(refused.body(), refused.code)
                if self._draining:
                    response.force_close()
                return response
            return await self._generate(request, seq, reply)

        return answer

    async def _generate(self, request: web.Request, seq: Seq, reply: Reply) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._answering_now.add(task)
        self._idle.clear()
        try:
            if reply.stream:
                return await self._stream(request, seq, reply)
            self._submit(seq)
            await reply.done
            response = _json(reply.whole(seq))
            await response.prepare(request)
            await response.write_eof()
            return response
        finally:
            if self._scheduler.abort(seq):
                self._numbers.finished["abort"].inc()
            self._answering_now.discard(task)
            if not self._answering_now:
                self._idle.set()

    async def _stream(self, request: web.Request, seq: Seq, reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        if self._draining:
            response.force_close()
        await response.prepare(request)
        await response.write(b"")  # the headers, before there is a token
        self._submit(seq)
        await reply.done
        await response.write_eof(reply.tail(seq))
        return response

    def _submit(self, seq: Seq) -> None:
        self._scheduler.add(seq, self._clock())
        self._work.set()

    def _sequence(self, ask: openai.Ask, reply: Reply) -> Seq:
        limits, prompt = self._config.limits, ask.prompt_tokens
        asked = ask.max_tokens if ask.max_tokens is not None else limits.max_model_len - prompt
        if prompt + max(asked, 1) > limits.max_model_len:
            raise openai.Refused(
                f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
                f"{prompt + max(asked, 1)} tokens ({prompt} in the messages, {max(asked, 1)} in the completion). "
                "Please reduce the length of the messages or completion.",
                param="max_tokens",
            )
        natural = max(ask.min_tokens, reply.words.natural_length(self._config.mean_tokens))
        return Seq(
            prompt_tokens=prompt,
            prompt_hashes=ask.hashes(limits.block_size),
            max_tokens=asked,
            ends_after=asked + 1 if ask.ignore_eos else natural,
            emit=reply.token,
        )

    def _ident(self) -> str:
        return os.urandom(16).hex()


class Reply:
    """Where a sequence's tokens go: straight onto the wire, or into one body at the end."""

    def __init__(self, ask: openai.Ask, model: str, ident: str, transport: asyncio.WriteTransport | None) -> None:
        self.words = ask.words()
        self.stream = ask.stream
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer = openai.Writer(ask, model, ident, int(time.time()))
        self._transport = transport
        self._first = self._writer.role() if ask.stream else b""
        self._last = b""
        self._text: list[bytes] = []

    def token(self, finish: Finish | None) -> None:
        """Called by the scheduler for every token. One write per token, as a real server flushes each."""
        word = self.words.next()
        if not self.stream:
            self._text.append(word)
        else:
            data = self._first + self._writer.token(word, finish)
            self._first = b""
            if finish:
                self._last = data  # leaves together with usage and [DONE]
            else:
                self._write(data)
        if finish and not self.done.done():
            self.done.set_result(None)

    def tail(self, seq: Seq) -> bytes:
        return self._last + self._writer.end(seq.generated)

    def whole(self, seq: Seq) -> bytes:
        assert seq.finish is not None
        return self._writer.whole(b"".join(self._text).decode(), seq.finish, seq.generated)

    def _write(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return  # the handler is about to be cancelled
        if transport.get_write_buffer_size() > SLOW_CLIENT_BYTES:
            transport.abort()
            return
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _config(argv: Sequence[str]) -> Config:
    cost, limits = Cost(), Limits()
    parser = argparse.ArgumentParser(prog="engine", description=__doc__)
    parser.add_argument("--model", "--served-model-name", default="my-llama32")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104 - inside a pod
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--load-seconds", type=float, default=None, help="default: $GAMEDAY_MODEL_LOAD_SECONDS, or 0")
    parser.add_argument("--shutdown-timeout", type=float, default=0.0, help="seconds for running requests to finish")
    parser.add_argument("--max-num-seqs", type=int, default=limits.max_num_seqs)
    parser.add_argument("--max-num-batched-tokens", type=int, default=limits.max_num_batched_tokens)
    parser.add_argument("--max-model-len", type=int, default=limits.max_model_len)
    parser.add_argument("--num-gpu-blocks", type=int, default=limits.blocks)
    parser.add_argument("--block-size", type=int, default=limits.block_size)
    parser.add_argument("--itl-ms", type=float, default=cost.step * 1e3, help="a decode step of a batch of one")
    parser.add_argument("--itl-ms-per-seq", type=float, default=cost.per_sequence * 1e3)
    parser.add_argument("--prefill-ms", type=float, default=cost.prefill * 1e3, help="added to a step with prefill")
    parser.add_argument("--prefill-ms-per-token", type=float, default=cost.per_prefill_token * 1e3)
    parser.add_argument("--mean-tokens", type=int, default=128, help="natural length of an answer")
    parser.add_argument("--keep-alive", type=float, default=5.0, help="seconds an idle connection is kept (vLLM: 5)")
    args = parser.parse_args(argv)
    if min(args.max_num_seqs, args.max_num_batched_tokens, args.num_gpu_blocks, args.block_size, args.mean_tokens) < 1:
        parser.error("sizes must be at least 1")
    if not 1 < args.max_model_len <= args.num_gpu_blocks * args.block_size:
        parser.error("--max-model-len must fit into the KV cache (--num-gpu-blocks x --block-size)")
    load = args.load_seconds
    return Config(
        model=args.model,
        host=args.host,
        port=args.port,
        load_seconds=env_seconds("GAMEDAY_MODEL_LOAD_SECONDS", 0.0) if load is None else load,
        shutdown_timeout=args.shutdown_timeout,
        mean_tokens=args.mean_tokens,
        keep_alive=args.keep_alive,
        limits=Limits(
            args.max_num_seqs, args.max_num_batched_tokens, args.num_gpu_blocks, args.block_size, args.max_model_len
        ),
        cost=Cost(args.itl_ms / 1e3, args.itl_ms_per_seq / 1e3, args.prefill_ms / 1e3, args.prefill_ms_per_token / 1e3),
    )


async def _serve(config: Config, pipe: socket.socket) -> int:
    stop = stop_event()
    say(f"INFO: loading model {config.model}")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), config.load_seconds)
    if stop.is_set():
        say("INFO: stopped while loading")
        return 0
    say(f"INFO: model loading took {config.load_seconds:.2f} s")
    engine = Engine(config, Core(pipe))
    steps = asyncio.create_task(engine.steps())
    try:
        async with serving(engine.app(), config.host, config.port, config.keep_alive):
            say(f"INFO: serving {config.model} on {config.host}:{config.port}")
            await asyncio.wait({asyncio.create_task(stop.wait()), steps}, return_when=asyncio.FIRST_COMPLETED)
            if steps.done():
                try:
                    steps.result()  # a bug in the engine loop must end the process
                except CoreDied as died:
                    say(f"ERROR: engine dead: {died}")
                    return 1
            say(f"INFO: shutting down, running requests have {config.shutdown_timeout:g} s")
            cut = await engine.drain(config.shutdown_timeout)
    finally:
        steps.cancel()
    say(f"INFO: shut down, {cut} requests aborted")
    return 0


def main(argv: Sequence[str]) -> int:
    """Run one engine until SIGTERM. Returns the exit code; SystemExit(2) for bad arguments."""
    config = _config(list(argv))
    return run(_serve(config, core.start()))


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
