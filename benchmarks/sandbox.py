"""Figures of the sandbox. `python benchmarks/sandbox.py [life|api] [--times N]`; without a word: both.

life  how long up and down take, and what the whole sandbox costs when idle. Up: 3 zones, 6 nodes, 6 engines and
      3 gateways Ready, Prometheus scraping all of them (targets: up ≤ 10 s, down ≤ 3 s; a real cluster of three nodes
      on the same machine, idle: 7–10 % of a core, 0.6–0.8 GiB).
api   GETs per second over TLS, and how long a change takes to reach a watcher (targets: ≥ 400 GET/s, p50 ≤ 10 ms).

The client shares the machine's cores with the server, and is counted in what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: it has a loadgen.py

from benchmarks.processes import cost, family  # noqa: E402
from sandbox.client import CONFIGMAPS, HttpApi  # noqa: E402
from sandbox.options import BARE, Options  # noqa: E402
from sandbox.up import Running, down, up  # noqa: E402

IDLE_SECONDS = 10.0
GET_SECONDS = 5.0
CONNECTIONS = 8
CHANGES = 300


@contextlib.contextmanager
def sandbox(**options: object) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        binary = os.environ.get("PROMETHEUS_BIN", "prometheus")
        try:
            yield up(Options(state_dir=state, prometheus_bin=binary, parent=os.getpid(), **options), lambda _: None)  # type: ignore[arg-type]
        finally:
            down(state)


def once() -> tuple[float, float, float, float]:
    """Seconds up, share of one core when idle, MiB, seconds down."""
    begun = time.monotonic()
    with sandbox() as running:
        ready = time.monotonic()
        time.sleep(3)
        pids, since = family(running.pid), time.monotonic()
        spent, _ = cost(pids)
        time.sleep(IDLE_SECONDS)
        later, memory = cost(pids)
        idle = (later - spent) / (time.monotonic() - since)
        ending = time.monotonic()
        down(Path(running.state_dir))
        ended = time.monotonic()
    return ready - begun, idle, memory, ended - ending


async def gets(running: Running) -> float:
    """GETs of one object per second, over `CONNECTIONS` connections."""
    async with _api(running) as api:
        counts = [0] * CONNECTIONS
        until = time.monotonic() + GET_SECONDS

        async def ask(index: int) -> None:
            while time.monotonic() < until:
                await api.get(CONFIGMAPS, "kube-root-ca.crt", "default")
                counts[index] += 1

        await asyncio.gather(*(ask(index) for index in range(CONNECTIONS)))
    return sum(counts) / GET_SECONDS


async def lags(running: Running) -> list[float]:
    """Milliseconds from the sending of a change to its arrival at a watcher, one change at a time."""
    async with _api(running) as writer, _api(running) as reader:
        made = await writer.create(CONFIGMAPS, {"metadata": {"name": "lag"}, "data": {"n": "-1"}}, "default")
        arrived: dict[str, float] = {}
        news = asyncio.Event()

        async def watch() -> None:
            since = made["metadata"]["resourceVersion"]
            async for event in reader.watch(CONFIGMAPS, "default", since=since, fields="metadata.name=lag"):
                arrived[event.object["data"]["n"]] = time.monotonic()
                news.set()

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.2)
        found = []
        for number in range(CHANGES):
            news.clear()
            sent = time.monotonic()
            await writer.patch(CONFIGMAPS, "lag", {"data": {"n": str(number)}}, "default")
            await asyncio.wait_for(news.wait(), 5)
            found.append(1000 * (arrived[str(number)] - sent))
        watching.cancel()
        await asyncio.wait({watching})
    return found


def _api(running: Running) -> HttpApi:
    state = Path(running.state_dir)
    return HttpApi(running.api_url, (state / "token").read_text().strip(), (state / "ca.crt").read_text())


def show(name: str, values: Sequence[float], form: str = ".2f") -> None:
    print(f"{name:<32}{statistics.median(values):8{form}}   worst of {len(values)}: {max(values):{form}}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Figures of the sandbox.")
    parser.add_argument("what", nargs="?", choices=("life", "api"))
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args(argv)
    if args.what != "api":
        names = ("up, s", "idle, share of a core", "memory (PSS), MiB", "down, s")
        for name, values in zip(names, zip(*(once() for _ in range(args.times)), strict=True), strict=True):
            show(name, values)
    if args.what != "life":
        with sandbox(bare=True, clocks=BARE) as running:
            rates = [asyncio.run(gets(running)) for _ in range(args.times)]
            print(f"{'GETs per second':<32}{statistics.median(rates):8.0f}   worst of {len(rates)}: {min(rates):.0f}")
            delays = sorted(asyncio.run(lags(running)))
            p99 = delays[int(0.99 * len(delays))]
            print(f"{'change → watcher, ms':<32}{statistics.median(delays):8.2f}   p99 of {len(delays)}: {p99:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
