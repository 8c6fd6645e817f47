"""Figures of the sandbox: how long up and down take, what it costs when idle. `python benchmarks/sandbox.py [TIMES]`

Up: 3 zones, 6 nodes, 6 engines and 3 gateways Ready, Prometheus scraping all of them (the target is ≤ 10 s).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: it has a loadgen.py

from sandbox.options import Options  # noqa: E402
from sandbox.up import down, up  # noqa: E402

IDLE_SECONDS = 10.0


def busy() -> float:
    """CPU seconds that this machine has spent not idle, over all cores."""
    with Path("/proc/stat").open() as file:
        user, nice, system, _, _, irq, soft, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def once(state: Path) -> tuple[float, float, float]:
    """Seconds up, share of one core when idle, seconds down."""
    begun = time.monotonic()
    up(Options(state_dir=state, prometheus_bin=os.environ.get("PROMETHEUS_BIN", "prometheus")), lambda _: None)
    ready = time.monotonic()
    time.sleep(2)
    spent, since = busy(), time.monotonic()
    time.sleep(IDLE_SECONDS)
    idle = (busy() - spent) / (time.monotonic() - since)
    ending = time.monotonic()
    down(state)
    return ready - begun, idle, time.monotonic() - ending


if __name__ == "__main__":
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        runs = [once(Path(folder) / "state") for _ in range(times)]
    for name, values in zip(("up, s", "idle, share of a core", "down, s"), zip(*runs, strict=True), strict=True):
        print(f"{name:<24}{statistics.median(values):6.2f}   worst of {times}: {max(values):.2f}")
