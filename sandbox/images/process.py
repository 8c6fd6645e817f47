"""What every image's process does alike: arguments, signals, a server that can be drained."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

import uvloop
from aiohttp import web


def say(line: str) -> None:
    """One line to the container's log."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run(work: Coroutine[object, object, int]) -> int:
    """Run an image's work to its end and return its exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def stop_event() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def serving(
    app: web.Application, host: str, port: int, keep_alive: float
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Serve until left; a client that goes away cancels its handler. OSError when the port is taken.

    Yields a function that closes the port and lets open connections be.
    """
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, keepalive_timeout=keep_alive, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        await site.start()

        async def close_port() -> None:
            if site in runner.sites:
                await site.stop()

        yield close_port
    finally:
        await runner.cleanup()


def env_seconds(name: str, default: float) -> float:
    """A duration in seconds from the environment. Raises SystemExit with one sentence when it is no number."""
    raw = os.environ.get(name, "")
    try:
        return float(raw) if raw else default
    except ValueError:
        raise SystemExit(f"{name} must be a number of seconds, not {raw!r}") from None
