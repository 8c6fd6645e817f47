"""Stressors of CPU and memory: what a StressChaos asks for, and the process that does it inside the container.

Differences to Chaos Mesh, on the safe side: percentages of memory are of the container's limit (there: of the
machine's memory, which here is that of everything else as well), so without a limit they are refused, as is what would
take most of the machine's free memory. `stressngStressors` and `options` are refused; Chaos Mesh drops the former
silently (facts/chaos-mesh.md).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from sandbox.node import linux

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[KMGT]?i?B?)", re.IGNORECASE)
_STEPS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SLICE = 0.1  # seconds in which a CPU worker works its share
_SHARE_OF_MACHINE = 0.5  # of its available memory, at most


class Refused(Exception):
    """This stress is not made; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class Stress:
    """Workers that each burn `cpu_load` (0–1) of a core, and workers that each hold `memory_bytes`."""

    cpu_workers: int = 0
    cpu_load: float = 1.0
    memory_workers: int = 0
    memory_bytes: int = 0
    oom_score_adj: int = 0

    def dump(self) -> str:
        return orjson.dumps(asdict(self)).decode()


def parse(spec: Mapping[str, Any], limit_bytes: int | None, available_bytes: int) -> Stress:
    """What `spec` (a StressChaos's) asks for in a container with that memory limit. Raises `Refused`."""
    if spec.get("stressngStressors"):
        raise Refused("the sandbox has no stress-ng; and Chaos Mesh ignores stressngStressors, yet says Injected")
    asked = spec.get("stressors") or {}
    cpu, memory = asked.get("cpu") or {}, asked.get("memory") or {}
    if cpu.get("options") or memory.get("options"):
        raise Refused("the sandbox has no stress-ng, so no options of it")
    load = cpu.get("load")
    workers = int(memory.get("workers") or 0)
    size = _bytes(memory.get("size") or "100%", limit_bytes) if workers else 0
    if limit_bytes is None and size * workers > _SHARE_OF_MACHINE * available_bytes:
        raise Refused(
            f"{workers} x {size >> 20} MiB without a memory limit would take most of the machine's free memory, "
            "on which everything else of the sandbox runs"
        )
    return Stress(
        int(cpu.get("workers") or 0), (100 if load is None else int(load)) / 100, workers, size,
        int(memory.get("oomScoreAdj") or 0),
    )  # fmt: skip


def _bytes(text: str, limit: int | None) -> int:
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise Refused(f"{text!r} is no size such as 256MB or 50%")
    if found[2] != "%":
        return int(float(found[1]) * _STEPS[found[2].lower().rstrip("ib")])
    if limit is None:
        raise Refused(f"{text} is of the container's memory limit here, and it has none: give it one, or a size")
    return int(float(found[1]) / 100 * limit)


def available_bytes() -> int:
    """Memory that the machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def main(argv: list[str]) -> int:
    """`argv[0]`: a `Stress`. Says "ready" on stdout, or why not; ends, with its workers, on SIGTERM."""
    stress = Stress(**orjson.loads(argv[0]))
    try:
        Path("/proc/self/oom_score_adj").write_text(str(stress.oom_score_adj))
    except PermissionError:
        _say(f"oomScoreAdj {stress.oom_score_adj} needs CAP_SYS_RESOURCE, which this machine does not give")
        return 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    workers = {_worker(lambda: _burn(stress.cpu_load)) for _ in range(stress.cpu_workers)}
    workers |= {_worker(lambda: _hold(stress.memory_bytes)) for _ in range(stress.memory_workers)}

    def end(*_: object) -> None:
        """With the workers seen off: left to the container's first process, they would stay as zombies."""
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    _say("ready")
    while True:
        with contextlib.suppress(ChildProcessError):
            workers.discard(os.wait()[0])  # a worker that the kernel kills for memory is not replaced
            continue
        signal.pause()


def _say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def _worker(work: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            linux.die_with_parent()
            work()
        finally:
            os._exit(1)
    return pid


def _burn(load: float) -> None:
    while True:
        begin = time.monotonic()
        while time.monotonic() - begin < load * _SLICE:
            pass
        time.sleep(max(0.0, _SLICE - (time.monotonic() - begin)))


# In an interpreter of its own: a fork of the machine's process would weigh some 40 MB more in the kernel's choice.
_HOLD = """# chaos stressor
import mmap, signal, sys
size = int(sys.argv[1])
held = mmap.mmap(-1, max(size, 1))
for start in range(0, size, mmap.PAGESIZE):
    held[start] = 1
while True:
    signal.pause()
"""


def _hold(size: int) -> None:
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _HOLD, str(size)])  # noqa: S606
