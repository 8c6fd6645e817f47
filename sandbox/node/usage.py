"""What the machine and its containers use, as kubelets serve it under /metrics/resource.

CPU time is that of the live processes and of the children they have waited for; memory is their proportional share
(PSS), since a container's processes share most of theirs with the sandbox's other processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

Where = tuple[str, str, str]  # namespace, pod, container


@dataclass(slots=True)
class Used:
    cpu: float = 0.0  # seconds
    memory: int = 0  # bytes

    def add(self, pid: int) -> None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self.cpu += sum(map(int, fields[11:15])) / _TICKS  # utime, stime, cutime, cstime
        self.memory += _memory(pid)


def _memory(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def _spaces() -> Iterator[tuple[int, int]]:
    """Every process of the machine, with the process namespace it is in."""
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry), os.stat(f"/proc/{entry}/ns/pid").st_ino  # noqa: PTH116 – a magic link, not a path


def read(containers: Mapping[Where, int]) -> tuple[Used, dict[Where, Used]]:
    """(the machine, each container) by the containers' first processes. What ends meanwhile is left out."""
    spaces: dict[int, Where] = {}
    for where, pid in containers.items():
        with contextlib.suppress(OSError):
            spaces[os.stat(f"/proc/{pid}/ns/pid").st_ino] = where  # noqa: PTH116
    machine, found = Used(), {where: Used() for where in spaces.values()}
    for pid, space in _spaces():
        one = Used()
        with contextlib.suppress(OSError):
            one.add(pid)
            for sums in (machine, found.get(spaces.get(space, ("", "", "")))):
                if sums is not None:
                    sums.cpu += one.cpu
                    sums.memory += one.memory
    return machine, found


def render(machine: Used, containers: Mapping[Where, Used]) -> str:
    """Prometheus' text format."""
    lines = ["# TYPE container_cpu_usage_seconds_total counter", "# TYPE container_memory_working_set_bytes gauge"]
    for (namespace, pod, container), used in sorted(containers.items()):
        labels = f'{{container="{container}",namespace="{namespace}",pod="{pod}"}}'
        lines.append(f"container_cpu_usage_seconds_total{labels} {used.cpu:.2f}")
        lines.append(f"container_memory_working_set_bytes{labels} {used.memory}")
    lines += ["# TYPE node_cpu_usage_seconds_total counter", f"node_cpu_usage_seconds_total {machine.cpu:.2f}"]
    lines += ["# TYPE node_memory_working_set_bytes gauge", f"node_memory_working_set_bytes {machine.memory}", ""]
    return "\n".join(lines)
