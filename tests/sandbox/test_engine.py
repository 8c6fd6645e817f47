"""The engine: its scheduler as logic, its server as a process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given, strategies as st
from llm_world import ask, engine, new_host, program, stream, until

from sandbox.images import openai
from sandbox.images.batching import Cost, Finish, Limits, Scheduler, Seq
from sandbox.images.engine import main
from sandbox.images.metrics import Registry

COST = Cost(step=0.01, per_sequence=0.0, prefill=0.01, per_prefill_token=0.0)


class Log:
    """Sequences by name, and what came out of them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.out: list[str] = []

    def add(self, name: str, prompt: int = 16, tokens: int = 4, text: str = "", size: int = 16) -> Seq:
        hashes = [hash((text, at)) for at in range(prompt // size)] if text else []
        seq = Seq(prompt, hashes, tokens, tokens + 1, self._emit(name))
        self.scheduler.add(seq, self.now)
        return seq

    def _emit(self, name: str) -> Callable[[Finish | None], None]:
        return lambda finish: self.out.append(f"{name}{'!' if finish else ''}")

    def step(self) -> float:
        step = self.scheduler.plan(self.now)
        assert step is not None
        self.now += step.seconds
        self.scheduler.complete(step, self.now)
        return step.seconds

    def run(self, most: int = 10_000) -> int:
        steps = 0
        while self.scheduler.busy:
            self.step()
            steps += 1
            assert steps < most, "does not end"
        return steps


def test_sequences_are_batched_and_each_step_gives_each_one_token() -> None:
    log = Log(Scheduler(Limits(), COST))
    log.add("a", tokens=3)
    log.add("b", tokens=3)
    assert log.step() == pytest.approx(0.02)  # both prefills in one step
    assert log.step() == pytest.approx(0.01)
    log.add("c", tokens=2)  # joins a running batch
    log.run()
    assert log.out == ["a", "b", "a", "b", "a!", "b!", "c", "c!"]


def test_more_than_max_num_seqs_wait_first_come_first_served() -> None:
    log = Log(Scheduler(Limits(max_num_seqs=2), COST))
    for name in "abc":
        log.add(name, tokens=2)
    log.step()
    assert (len(log.scheduler.running), len(log.scheduler.waiting)) == (2, 1)
    log.run()
    assert log.out == ["a", "b", "a!", "b!", "c", "c!"]


def test_a_long_prompt_is_prefilled_in_pieces_beside_running_decodes() -> None:
    log = Log(Scheduler(Limits(max_num_batched_tokens=64), COST))
    log.add("a", tokens=6)
    log.step()
    log.add("long", prompt=150, tokens=1)
    log.run()
    assert log.out == ["a", "a", "a", "a", "long!", "a", "a!"]  # 63 + 63 + 24 tokens, one decode in each step


def test_a_step_of_a_larger_batch_takes_longer() -> None:
    def step(count: int) -> float:
        log = Log(Scheduler(Limits(), Cost(step=0.01, per_sequence=0.001, prefill=0.0, per_prefill_token=0.0)))
        for index in range(count):
            log.add(str(index))
        log.step()
        return log.step()

    assert step(1) == pytest.approx(0.011) and step(30) == pytest.approx(0.04)


def test_a_repeated_prompt_is_found_in_the_prefix_cache() -> None:
    cost = Cost(step=0.01, per_sequence=0.0, prefill=0.0, per_prefill_token=0.001)
    log = Log(Scheduler(Limits(), cost))
    log.add("a", prompt=100, tokens=1, text="same")
    assert log.step() == pytest.approx(0.11)
    seq = log.add("b", prompt=100, tokens=1, text="same")
    assert log.step() == pytest.approx(0.014)  # 96 of 100 tokens are there
    assert (seq.cached, log.scheduler.prefix_queries, log.scheduler.prefix_hits) == (96, 200, 96)


def test_when_blocks_run_out_the_youngest_is_preempted_and_computed_again() -> None:
    log = Log(Scheduler(Limits(blocks=4, block_size=4, max_model_len=16), COST))
    log.add("a", prompt=7, tokens=6)
    log.add("b", prompt=7, tokens=6)
    log.run()
    assert log.scheduler.preemptions >= 1
    assert log.out.count("a") == log.out.count("b") == 5 and {"a!", "b!"} <= set(log.out)
    assert log.out.index("a!") < log.out.index("b!")
    assert log.scheduler.pool.usage == 0


def test_an_aborted_sequence_gives_its_blocks_back_wherever_it_is() -> None:
    log = Log(Scheduler(Limits(max_num_seqs=1), COST))
    running, waiting = log.add("a"), log.add("b")
    step = log.scheduler.plan(0)
    assert step and log.scheduler.pool.usage > 0
    assert log.scheduler.abort(running) and log.scheduler.abort(waiting)
    log.scheduler.complete(step, 1)  # the step that was under way
    assert log.out == [] and log.scheduler.pool.usage == 0 and not log.scheduler.busy
    assert not log.scheduler.abort(running)


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 40), st.sampled_from("xyz"), st.booleans()),
        min_size=1,
        max_size=25,
    ),
    st.integers(16, 40),
)
def test_every_sequence_gets_exactly_its_tokens_and_every_block_comes_back(
    wanted: list[tuple[int, int, str, bool]], blocks: int
) -> None:
    log = Log(Scheduler(Limits(4, 32, blocks, 8, 100), COST))
    kept = []
    for index, (prompt, tokens, text, aborted) in enumerate(wanted):
        seq = log.add(f"{index}:", prompt, tokens, text, size=8)
        if aborted:
            log.step()
            log.scheduler.abort(seq)
        else:
            kept.append((f"{index}:", tokens))
    log.run()
    for name, tokens in kept:
        assert log.out.count(name) + log.out.count(name + "!") == tokens
    assert log.scheduler.pool.usage == 0 and log.scheduler.pool.free == blocks


def _ask(**more: object) -> bytes:
    return orjson.dumps(ask(**more))


@pytest.mark.parametrize(
    ("raw", "code", "words"),
    [
        (b"{", 400, "valid JSON"),
        (b"[]", 400, "JSON object"),
        (_ask(model="gpt"), 404, "The model `gpt` does not exist."),
        (_ask(messages=[]), 400, "non-empty"),
        (_ask(messages=[{"content": "x"}]), 400, "role"),
        (_ask(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "text parts"),
        (_ask(max_tokens=0), 400, "at least 1"),
        (_ask(max_tokens="8"), 400, "whole number"),
        (_ask(stream="yes"), 400, "true or false"),
        (_ask(temperature=3), 400, "between 0 and 2"),
        (_ask(stream=False, stream_options={"include_usage": True}), 400, "stream=True"),
        (_ask(n=2), 400, "n must be 1"),
        (_ask(stop=["x"]), 400, "not supported"),
    ],
)
def test_malformed_requests_are_refused(raw: bytes, code: int, words: str) -> None:
    with pytest.raises(openai.Refused, match=re.escape(words)) as refused:
        openai.parse("chat", raw, "my-llama32")
    assert refused.value.code == code
    assert orjson.loads(refused.value.body())["error"]["code"] == code


@pytest.mark.parametrize("args", [["--max-num-seqs", "0"], ["--max-model-len", "99999"], ["--nonsense"]])
def test_bad_arguments_end_with_a_sentence(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_histogram_is_cumulative_with_its_edge_inside() -> None:
    registry = Registry()
    series = registry.histograms("h", "About.", (0.5, 1.0), "a").of('x"')
    for value in (0.5, 0.7, 2.0):
        series.observe(value)
    assert registry.render().splitlines() == [
        "# HELP h About.",
        "# TYPE h histogram",
        'h_bucket{a="x\\"",le="0.5"} 1',
        'h_bucket{a="x\\"",le="1.0"} 2',
        'h_bucket{a="x\\"",le="+Inf"} 3',
        'h_count{a="x\\""} 3',
        'h_sum{a="x\\""} 3.2',
    ]


async def _session_story(story: Callable[[aiohttp.ClientSession, Any], Any], *args: str) -> None:
    async with engine(*args) as process, aiohttp.ClientSession() as session:
        await story(session, process)


def test_a_stream_has_role_content_reason_usage_and_done() -> None:
    async def story(session: aiohttp.ClientSession, process: Any) -> None:
        answer = await stream(session, process.url, max_tokens=5, stream_options={"include_usage": True})
        first, *middle, last, usage = [orjson.loads(event) for event in answer.events[:-1]]
        assert answer.done and answer.ended
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
        assert last["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5
        assert {chunk["object"] for chunk in (first, *middle, last, usage)} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in (*middle, last))
        async with session.post(process.url + "/v1/chat/completions", json=ask(max_tokens=5, stream=False)) as whole:
            assert (await whole.json())["choices"][0]["message"]["content"] == text  # the same prompt, the same text
        async with session.post(
            process.url + "/v1/chat/completions", json=ask(max_tokens=5, stream=False, seed=1)
        ) as other:
            assert (await other.json())["choices"][0]["message"]["content"] != text
        natural = await stream(session, process.url, max_tokens=500)
        assert orjson.loads(natural.events[-2])["choices"][0]["finish_reason"] == "stop"
        async with session.post(process.url + "/v1/completions", json={"prompt": "x", "max_tokens": 3}) as plain:
            assert (await plain.json())["usage"] == {"prompt_tokens": 1, "total_tokens": 4, "completion_tokens": 3}
        async with session.get(process.url + "/v1/models") as models:
            assert (await models.json())["data"][0]["id"] == "my-llama32"
        async with session.post(process.url + "/v1/chat/completions", json=ask(max_tokens=9000)) as long:
            assert long.status == 400 and "maximum context length is 8192" in await long.text()

    asyncio.run(_session_story(story, "--itl-ms", "3", "--mean-tokens", "20"))


def test_first_token_and_pace_are_as_set_and_so_are_the_metrics() -> None:
    async def story(session: aiohttp.ClientSession, process: Any) -> None:
        times: list[float] = []
        began = time.monotonic()
        await stream(session, process.url, lambda _: times.append(time.monotonic() - began), max_tokens=20)
        gaps = sorted(after - before for before, after in itertools.pairwise(times[1:-2]))
        assert 0.02 <= times[1] < 2
        assert 0.015 <= gaps[len(gaps) // 2] < 0.2
        async with session.get(process.url + "/metrics") as answer:
            text = await answer.text()
        where = 'model_name="my-llama32",engine="0"'
        assert f"vllm:time_to_first_token_seconds_count{{{where}}} 1\n" in text
        assert f"vllm:inter_token_latency_seconds_count{{{where}}} 19\n" in text
        assert f"vllm:generation_tokens_total{{{where}}} 20\n" in text
        assert f'vllm:inter_token_latency_seconds_bucket{{{where},le="0.01"}} 0\n' in text
        assert f'vllm:request_success_total{{{where},finished_reason="length"}} 1\n' in text
        assert f"vllm:kv_cache_usage_perc{{{where}}} 0.0\n" in text

    asyncio.run(_session_story(story, "--itl-ms", "20"))


def test_the_port_opens_only_when_the_model_is_loaded() -> None:
    async def story() -> None:
        began = time.monotonic()
        async with program("engine", [], new_host(), 8000, "/health", {"GAMEDAY_MODEL_LOAD_SECONDS": "0.8"}):
            assert time.monotonic() - began >= 0.8

    asyncio.run(story())


def test_sigterm_while_loading_ends_at_once() -> None:
    async def story() -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-m", "sandbox.images.engine", "--load-seconds", "60", "--host", new_host()),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        assert b"loading" in await asyncio.wait_for(process.stdout.readline(), 10)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 5) == 0

    asyncio.run(story())


def test_sigterm_finishes_running_streams_and_refuses_new_requests() -> None:
    async def story(session: aiohttp.ClientSession, process: Any) -> None:
        begun = asyncio.Event()
        running = asyncio.create_task(stream(session, process.url, lambda _: begun.set(), max_tokens=60))
        await begun.wait()
        process.kill(signal.SIGTERM)

        async def unhealthy() -> bool:
            async with session.get(process.url + "/health") as answer:
                return answer.status == 503

        await until(unhealthy)
        assert (await stream(session, process.url)).status == 503
        answer = await running
        assert answer.done and answer.tokens == 60
        assert await process.exit_code() == 0

    asyncio.run(_session_story(story, "--shutdown-timeout", "30"))


def test_sigterm_cuts_running_streams_off_after_the_shutdown_timeout() -> None:
    async def story(session: aiohttp.ClientSession, process: Any) -> None:
        begun = asyncio.Event()
        running = asyncio.create_task(stream(session, process.url, lambda _: begun.set(), max_tokens=4000))
        whole = asyncio.create_task(stream(session, process.url, max_tokens=4000, stream=False))
        await begun.wait()
        process.kill(signal.SIGTERM)
        assert await process.exit_code(5) == 0
        answer = await running
        assert answer.status == 200 and answer.tokens and not answer.ended and answer.error
        assert (await whole).error

    asyncio.run(_session_story(story))  # vLLM's default: 0 s


def test_a_client_that_leaves_aborts_its_sequence() -> None:
    async def story(session: aiohttp.ClientSession, process: Any) -> None:
        async with session.post(process.url + "/v1/chat/completions", json=ask(max_tokens=4000)) as answer:
            await answer.content.readline()

        async def aborted() -> bool:
            async with session.get(process.url + "/metrics") as metrics:
                text = await metrics.text()
            return (
                'vllm:num_requests_running{model_name="my-llama32",engine="0"} 0' in text
                and 'finished_reason="abort"} 1' in text
            )

        await until(aborted)

    asyncio.run(_session_story(story))


# ── its two processes ───────────────────────────────────────────────────────────────────────────


def core_of(pid: int) -> int:
    """The engine's core process, by vLLM's name for it."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid):
                assert "VLLM::EngineCore" in (entry / "cmdline").read_text()
                return int(entry.name)
    raise AssertionError("the engine has no core process")


def test_a_stopped_core_leaves_health_green_and_generates_nothing() -> None:
    """A zombie engine (vllm #39863): what only a generation can tell."""

    async def scenario() -> None:
        async with engine() as process, aiohttp.ClientSession() as session:
            core = core_of(process.popen.pid)
            os.kill(core, signal.SIGSTOP)
            try:
                async with session.get(process.url + "/health") as answer:
                    assert answer.status == 200
                hung = asyncio.create_task(stream(session, process.url))
                assert not (await asyncio.wait({hung}, timeout=0.5))[0]
            finally:
                os.kill(core, signal.SIGCONT)
            assert (await hung).done, "it goes on where it was"

    asyncio.run(scenario())


def test_an_engine_whose_core_dies_ends() -> None:
    async def scenario() -> None:
        async with engine() as process, aiohttp.ClientSession() as session:
            os.kill(core_of(process.popen.pid), signal.SIGKILL)
            assert not (await stream(session, process.url)).done
            assert await process.exit_code() == 1

    asyncio.run(scenario())
