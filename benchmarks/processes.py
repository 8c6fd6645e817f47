"""What a sandbox's processes are, and what they cost."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        found |= fresh
        fresh = {child for one in fresh for child in _children(one)} - found
    return found


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def cost(pids: set[int]) -> tuple[float, float]:
    """(CPU seconds so far, MiB as proportional shares)."""
    cpu = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / _TICKS
    return cpu, sum(memory(pids).values())


def memory(pids: set[int]) -> dict[str, float]:
    """MiB as proportional shares, by kind of process: "kubelet", "pod engine", "control"."""
    found: defaultdict[str, float] = defaultdict(float)
    for pid in pids:
        with contextlib.suppress(OSError, StopIteration):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            share = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1024
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            words = title.removeprefix("gameday: ").split() or ["?"]
            found[f"pod {words[-1]}" if words[0] == "pod" else Path(words[0]).name] += share
    return dict(found)
