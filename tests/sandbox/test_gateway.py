"""The gateway between real processes that are broken on purpose."""

from __future__ import annotations

import asyncio
import re
import signal
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from llm_world import (
    Fault,
    Process,
    Slices,
    answers_500,
    ask,
    bad_server,
    black_hole,
    endpoint,
    ends_early,
    engine,
    gateway,
    never_answers,
    resets,
    resets_midway,
    slices,
    stalls,
    stream,
    until,
)

from sandbox.images.gateway import main


async def _metric(session: aiohttp.ClientSession, front: Process, name: str, **labels: str) -> float:
    async with session.get(front.url + "/metrics") as answer:
        text = await answer.text()
    total = 0.0
    for found in re.finditer(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE):
        if all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
            total += float(found[2])
    return total


async def _engines(stack: AsyncExitStack, count: int, *args: str) -> tuple[list[Process], list[dict[str, Any]]]:
    made = list(await asyncio.gather(*(stack.enter_async_context(engine(*args)) for _ in range(count))))
    return made, [endpoint(one.host, f"engine-{index}", "abc"[index % 3]) for index, one in enumerate(made)]


async def _front(
    stack: AsyncExitStack, tmp_path: Path, endpoints: list[dict[str, Any]], *args: str
) -> tuple[Slices, Process, aiohttp.ClientSession]:
    world = await stack.enter_async_context(slices(*endpoints))
    front = await stack.enter_async_context(gateway(world, tmp_path / "account", *args))
    session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)))
    return world, front, session


def test_streams_and_whole_answers_are_spread_over_the_ready_engines(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            _, endpoints = await _engines(stack, 3)
            _, front, session = await _front(stack, tmp_path, endpoints)
            answers = await asyncio.gather(*(stream(session, front.url, max_tokens=6) for _ in range(12)))
            assert all(answer.done and answer.ended and answer.tokens == 6 for answer in answers)
            assert set(Counter(answer.served_by for answer in answers).values()) == {4}
            assert {(answer.served_by, answer.zone) for answer in answers} == {
                ("engine-0", "a"), ("engine-1", "b"), ("engine-2", "c")
            }  # fmt: skip
            async with session.post(front.url + "/v1/chat/completions", json=ask(stream=False)) as whole:
                assert whole.status == 200 and whole.headers["x-served-by"].startswith("engine-")
                assert (await whole.json())["usage"]["completion_tokens"] == 8
            async with session.post(front.url + "/v1/chat/completions", json=ask(model="x")) as unknown:
                assert unknown.status == 404 and (await unknown.json())["error"]["code"] == 404
            assert await _metric(session, front, "gateway_requests_total", code="200") == 13
            assert await _metric(session, front, "gateway_requests_total", code="404") == 1
            assert await _metric(session, front, "gateway_time_to_first_token_seconds_count") == 14
            assert await _metric(session, front, "gateway_retries_total") == 0

    asyncio.run(story())


@pytest.mark.parametrize("fault", [never_answers, resets, answers_500])
def test_a_fault_before_the_first_byte_is_retried_elsewhere(fault: Fault, tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            _, endpoints = await _engines(stack, 1)
            bad = endpoint(await stack.enter_async_context(bad_server(fault)), "bad", "b")
            _, front, session = await _front(
                stack, tmp_path, [*endpoints, bad], "--first-byte-timeout", "0.4", "--eject-seconds", "30"
            )
            for _ in range(3):
                answers = await asyncio.gather(*(stream(session, front.url) for _ in range(4)))
                assert [(answer.done, answer.served_by) for answer in answers] == [(True, "engine-0")] * 4
            assert await _metric(session, front, "gateway_retries_total") >= 2
            assert await _metric(session, front, "gateway_ejections_total", pod="bad") == 1
            assert await _metric(session, front, "gateway_endpoints", state="ejected") == 1

    asyncio.run(story())


def test_a_black_hole_costs_the_connect_timeout_and_is_left_out(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            _, endpoints = await _engines(stack, 1)
            hole = endpoint(stack.enter_context(black_hole()), "hole", "b")
            _, front, session = await _front(stack, tmp_path, [*endpoints, hole])
            began = asyncio.get_running_loop().time()
            answers = await asyncio.gather(*(stream(session, front.url, max_tokens=1) for _ in range(4)))
            assert all(answer.done and answer.served_by == "engine-0" for answer in answers)
            assert 0.3 <= asyncio.get_running_loop().time() - began < 2.5
            assert await _metric(session, front, "gateway_ejections_total", pod="hole") == 1

    asyncio.run(story())


@pytest.mark.parametrize("fault", [ends_early, resets_midway, stalls])
def test_a_stream_that_breaks_midway_is_broken_for_the_client_too(fault: Fault, tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            bad = endpoint(await stack.enter_async_context(bad_server(fault)), "bad", "b")
            _, front, session = await _front(stack, tmp_path, [bad], "--stall-timeout", "0.5")
            answer = await asyncio.wait_for(stream(session, front.url), 5)
            assert answer.status == 200 and answer.served_by == "bad" and answer.tokens == 2
            assert not answer.ended and not answer.done and answer.error
            assert await _metric(session, front, "gateway_requests_total", code="599", zone="b") == 1

    asyncio.run(story())


def test_kill_9_breaks_its_streams_and_no_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            engines, endpoints = await _engines(stack, 2)
            _, front, session = await _front(stack, tmp_path, endpoints)
            seen: Counter[int] = Counter()
            running = [
                asyncio.create_task(stream(session, front.url, lambda answer: seen.update([id(answer)]), max_tokens=60))
                for _ in range(6)
            ]
            await until(lambda: len(seen) == 6)  # all have begun: none can be retried
            engines[0].kill()
            answers = await asyncio.gather(*running)
            assert sorted((answer.served_by, answer.ended, answer.done) for answer in answers) == [
                *[("engine-0", False, False)] * 3,
                *[("engine-1", True, True)] * 3,
            ]
            later = await asyncio.gather(*(stream(session, front.url) for _ in range(10)))
            assert all(answer.done and answer.served_by == "engine-1" for answer in later)

    asyncio.run(story())


async def _running(session: aiohttp.ClientSession, engines: list[Process], count: int) -> bool:
    for one in engines:
        async with session.get(one.url + "/metrics") as answer:
            if f'vllm:num_requests_running{{model_name="my-llama32",engine="0"}} {count}' not in await answer.text():
                return False
    return True


def test_a_paused_engine_is_ejected_and_comes_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            engines, endpoints = await _engines(stack, 2)
            _, front, session = await _front(
                stack, tmp_path, endpoints, "--first-byte-timeout", "0.3", "--eject-seconds", "0.2"
            )
            await asyncio.gather(*(stream(session, front.url) for _ in range(4)))  # connections to be reused
            engines[0].kill(signal.SIGSTOP)
            for _ in range(3):
                answers = await asyncio.gather(*(stream(session, front.url) for _ in range(4)))
                assert all(answer.done and answer.served_by == "engine-1" for answer in answers)
            assert await _metric(session, front, "gateway_endpoints", state="ejected") == 1
            engines[0].kill(signal.SIGCONT)

            async def back() -> bool:
                return (await stream(session, front.url)).served_by == "engine-0"

            await until(back)

    asyncio.run(story())


def test_what_waits_for_an_unreachable_engine_goes_elsewhere_long_before_its_timeout(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            engines, endpoints = await _engines(stack, 2)
            _, front, session = await _front(
                stack, tmp_path, endpoints, "--first-byte-timeout", "30", "--eject-seconds", "60"
            )
            await asyncio.gather(*(stream(session, front.url) for _ in range(8)))  # connections to be reused
            engines[0].kill(signal.SIGSTOP)
            began = asyncio.get_running_loop().time()
            answers = await asyncio.gather(*(stream(session, front.url, max_tokens=1) for _ in range(8)))
            assert all(answer.done and answer.served_by == "engine-1" for answer in answers)
            assert asyncio.get_running_loop().time() - began < 10
            assert await _metric(session, front, "gateway_ejections_total", pod="engine-0") == 1
            assert await _metric(session, front, "gateway_retries_total") == 4

    asyncio.run(story())


def test_an_engine_that_says_it_is_healthy_but_makes_no_token_is_left_out_ever_longer(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            _, endpoints = await _engines(stack, 1)
            zombie = endpoint(await stack.enter_async_context(bad_server(never_answers, healthy=True)), "zombie", "b")
            _, front, session = await _front(
                stack, tmp_path, [*endpoints, zombie], "--first-byte-timeout", "0.4", "--eject-seconds", "0.1"
            )

            async def thrice_out() -> bool:
                answers = await asyncio.gather(*(stream(session, front.url, max_tokens=1) for _ in range(4)))
                assert all(answer.done and answer.served_by == "engine-0" for answer in answers)
                return await _metric(session, front, "gateway_ejections_total", pod="zombie") >= 3

            await until(thrice_out)

    asyncio.run(story())


def test_outside_a_pod_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main([]) == 1
    assert "KUBERNETES_SERVICE_HOST is not set" in capsys.readouterr().out
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("GAMEDAY_ACCOUNT_DIR", str(tmp_path))
    assert main([]) == 1
    assert "No service-account token" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--service", "my-llama32"])
    assert ended.value.code == 2


def test_a_slow_engine_that_is_healthy_is_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            _, endpoints = await _engines(stack, 1, "--prefill-ms", "900")
            _, front, session = await _front(stack, tmp_path, endpoints, "--first-byte-timeout", "5")
            assert (await stream(session, front.url, max_tokens=1)).done
            assert await _metric(session, front, "gateway_ejections_total") == 0
            assert await _metric(session, front, "gateway_retries_total") == 0

    asyncio.run(story())


def test_the_only_engine_s_own_error_is_passed_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            bad = endpoint(await stack.enter_async_context(bad_server(answers_500)), "bad", "b")
            _, front, session = await _front(stack, tmp_path, [bad])
            async with session.post(front.url + "/v1/chat/completions", json=ask()) as answer:
                assert answer.status == 500 and await answer.text() == "oops"
                assert answer.headers["x-served-by"] == "bad"

    asyncio.run(story())


def test_all_ejected_means_all_are_used(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            engines, endpoints = await _engines(stack, 2)
            _, front, session = await _front(
                stack, tmp_path, endpoints, "--first-byte-timeout", "0.3", "--eject-seconds", "60"
            )
            for one in engines:
                one.kill(signal.SIGSTOP)
            failed = await asyncio.gather(*(stream(session, front.url) for _ in range(4)))
            assert {answer.status for answer in failed} == {504}
            assert await _metric(session, front, "gateway_endpoints", state="ejected") == 2
            for one in engines:
                one.kill(signal.SIGCONT)
            answers = await asyncio.gather(*(stream(session, front.url) for _ in range(4)))
            assert all(answer.done for answer in answers)

    asyncio.run(story())


def test_endpoints_follow_the_slices_and_outlive_the_api_server(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            _, endpoints = await _engines(stack, 2)
            world, front, session = await _front(stack, tmp_path, endpoints[:1])
            await until(lambda: bool(world.watching))
            await world.set(endpoints[1])

            async def moved() -> bool:
                return (await stream(session, front.url)).served_by == "engine-1"

            await until(moved)
            world.up = False
            for watch in world.watching:
                watch.force_close()
                assert watch._req is not None and watch._req.transport is not None
                watch._req.transport.close()
            assert (await stream(session, front.url)).served_by == "engine-1"
            world.up = True
            await world.set(endpoint(endpoints[1]["addresses"][0], "engine-1", "b", ready=False, serving=False))

            async def none_left() -> bool:
                return (await stream(session, front.url)).status == 503

            await until(none_left)

    asyncio.run(story())


def test_sigterm_cuts_no_stream_and_refuses_readiness_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            _, endpoints = await _engines(stack, 1)
            _, front, session = await _front(stack, tmp_path, endpoints)
            started = asyncio.Event()
            running = asyncio.create_task(
                stream(session, front.url, lambda _: started.set(), max_tokens=100, ignore_eos=True)
            )
            await started.wait()
            front.kill(signal.SIGTERM)

            async def unready() -> bool:
                async with session.get(front.url + "/healthz") as answer:
                    return answer.status == 503

            await until(unready)
            late = await stream(session, front.url, max_tokens=1)  # before the load balancer has noticed
            assert late.done
            answer = await running
            assert answer.done and answer.ended and answer.tokens == 100
            assert await front.exit_code() == 0

    asyncio.run(story())


def test_without_retry_and_ejection_the_client_sees_every_fault(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            engines, endpoints = await _engines(stack, 2)
            _, front, session = await _front(stack, tmp_path, endpoints, "--no-retry", "--no-ejection")
            engines[0].kill()
            await engines[0].exit_code()
            answers = [await stream(session, front.url, max_tokens=1) for _ in range(30)]
            codes = Counter(answer.status for answer in answers)
            assert codes[502] >= 5 and codes[200] >= 5 and codes[502] + codes[200] == 30
            assert {answer.served_by for answer in answers if answer.status == 502} == {"engine-0"}

    asyncio.run(story())


def test_a_client_that_leaves_frees_the_engine(tmp_path: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            engines, endpoints = await _engines(stack, 1)
            _, front, session = await _front(stack, tmp_path, endpoints)
            async with session.post(front.url + "/v1/chat/completions", json=ask(max_tokens=4000)) as answer:
                await answer.content.readline()
            await until(lambda: _running(session, engines, 0))
            assert await _metric(session, front, "gateway_requests_total", code="499") == 1

    asyncio.run(story())
