"""Control groups of version 1 and 2: CPU quotas and memory limits of containers, enforced by the kernel.

The sandbox has one group per hierarchy, `gameday-<hash of the state directory>`, with a group per machine, pod and
container start below. Groups outlive every process, so their place is written down before the first is made:
`sweep` removes them after `down`, after a crash, and before the next `up`.

Errors: `Unavailable`, one sentence that says why limits cannot be enforced here.
Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst, kubelet's cm/helpers_linux.go (quota and period).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

REFUSE = "GAMEDAY_WITHOUT_CGROUPS"  # set: make none, as on a machine that lets us write none
RECORD = "cgroups.json"  # in the state directory: the directories to sweep
CONTROLLERS = ("cpu", "memory")
_PERIOD = 100_000  # µs of CFS; kubelet's default
_LEAST_QUOTA = 1_000  # µs; the kernel takes no less
_SWEEP_SECONDS = 2.0  # for processes that are being killed to be gone
_PROCS = "cgroup.procs"


class Unavailable(Exception):
    """No limits here; the text says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use; None: as much as there is."""

    cpu_milli: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One control group: a directory per controller (version 1), or the same one for both (version 2)."""

    version: int
    cpu: str
    memory: str

    @property
    def directories(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.cpu, self.memory)))

    def entered(self, limits: Limits) -> tuple[str, ...]:
        """Where a container's processes go. Without a CPU limit they stay out of version 1's cpu hierarchy: there all
        pods together would weigh as much as one process of the host's."""
        return (self.memory,) if self.version == 1 and limits.cpu_milli is None else self.directories

    def child(self, name: str) -> Group:
        return Group(self.version, f"{self.cpu}/{name}", f"{self.memory}/{name}")

    def make(self, limits: Limits = Limits(), *, leaf: bool = False) -> Group:
        """Create it (its parent is there), with its limits; a `leaf` holds processes, others hold groups. OSError."""
        for directory in self.directories:
            Path(directory).mkdir(exist_ok=True)
        if self.version == 2 and not leaf:
            _write(self.cpu, "cgroup.subtree_control", "+cpu +memory")
        if limits.cpu_milli is not None:
            quota = max(_LEAST_QUOTA, limits.cpu_milli * _PERIOD // 1000)
            if self.version == 2:
                _write(self.cpu, "cpu.max", f"{quota} {_PERIOD}")
            else:
                _write(self.cpu, "cpu.cfs_period_us", str(_PERIOD))
                _write(self.cpu, "cpu.cfs_quota_us", str(quota))
        if limits.memory_bytes is not None:
            if self.version == 2:
                _write(self.memory, "memory.max", str(limits.memory_bytes))
                if leaf:
                    _write(self.memory, "memory.oom.group", "1")  # as kubelets since 1.28: all of the container dies
            else:
                _write(self.memory, "memory.limit_in_bytes", str(limits.memory_bytes))
            # No swap, as on a node: a limit that swaps is no limit. Absent where the kernel does not count swap.
            with contextlib.suppress(OSError):
                if self.version == 2:
                    _write(self.memory, "memory.swap.max", "0")
                else:
                    _write(self.memory, "memory.memsw.limit_in_bytes", str(limits.memory_bytes))
        return self

    def oom_kills(self) -> int:
        """How many processes in it the kernel has killed for memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        try:
            lines = Path(self.memory, name).read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def remove(self) -> bool:
        """Take it and all below away; False when some process is still in it."""
        results = [_remove(Path(directory)) for directory in self.directories]  # all of them, whatever the first says
        return all(results)


def enter(directories: tuple[str, ...]) -> None:
    """Move the calling process there. OSError."""
    for directory in directories:
        _write(directory, _PROCS, "0")


def _write(directory: str, name: str, value: str) -> None:
    Path(directory, name).write_text(value)


def _remove(directory: Path) -> bool:
    if not directory.is_dir():
        return True
    for child in directory.iterdir():
        if child.is_dir() and not _remove(child):
            return False
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as busy:
        if busy.errno != errno.EBUSY:
            raise
        return False
    return True


# — where the sandbox's group lies —


def base_name(state: Path) -> str:
    return "gameday-" + hashlib.sha1(str(state.resolve()).encode(), usedforsecurity=False).hexdigest()[:12]


def roots(mountinfo: str, own: str) -> Group:
    """The groups under which ours may be made: where this process is (v1), or the top (v2). Raises `Unavailable`.

    `mountinfo` and `own` are the texts of /proc/self/mountinfo and /proc/self/cgroup.
    """
    found: dict[str, str] = {}
    unified = ""
    member = dict(_memberships(own))
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, place = left.split()[3:5]
        fstype, _, options = right.split(" ", 2)
        if fstype == "cgroup2":
            unified = unified or place
        elif fstype == "cgroup":
            for controller in set(options.split(",")) & set(CONTROLLERS):
                inside = os.path.relpath(member.get(controller, "/"), root)
                # outside of what is mounted here: then the mount's own top
                found[controller] = place if inside in (".", "..") or inside.startswith("../") else f"{place}/{inside}"
    if set(found) >= set(CONTROLLERS):
        return Group(1, found["cpu"], found["memory"])
    if unified:
        try:
            offered = Path(unified, "cgroup.controllers").read_text().split()
        except OSError as unreadable:
            raise Unavailable(f"{unified} cannot be read ({unreadable.strerror})") from unreadable
        if set(offered) >= set(CONTROLLERS):
            return Group(2, unified, unified)
    raise Unavailable("this machine mounts no control groups for cpu and memory")


def _memberships(own: str) -> list[tuple[str, str]]:
    rows = [line.split(":", 2) for line in own.splitlines()]
    return [(controller, path) for _, controllers, path in rows for controller in controllers.split(",")]


def create(state: Path) -> Group:
    """The sandbox's own group, empty. Raises `Unavailable`."""
    if os.environ.get(REFUSE):
        raise Unavailable(f"{REFUSE} is set")
    top = roots(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    base = top.child(base_name(state))
    (state / RECORD).write_bytes(orjson.dumps(base.directories))
    if not base.remove():
        raise Unavailable(f"{base.memory} of an earlier sandbox still holds processes")
    try:
        if top.version == 2:
            enabled = Path(top.cpu, "cgroup.subtree_control").read_text().split()
            if not set(enabled) >= set(CONTROLLERS):
                _write(top.cpu, "cgroup.subtree_control", "+cpu +memory")
        base.make()
        if top.version == 2:
            _write(base.cpu, "cpu.weight", "10000")  # all pods together: not as one process of the host's
        return base
    except OSError as refused:
        with contextlib.suppress(OSError):
            base.remove()
        raise Unavailable(f"{refused.filename or base.memory} cannot be written ({refused.strerror})") from refused


def sweep(state: Path) -> None:
    """Remove what the sandbox of a state directory has left. Safe to repeat, and when there is nothing."""
    try:
        directories: list[str] = orjson.loads((state / RECORD).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return
    ours = base_name(state)
    deadline = time.monotonic() + _SWEEP_SECONDS
    left = [Path(directory) for directory in directories if Path(directory).name == ours]
    while left := [directory for directory in left if not _swept(directory)]:
        if time.monotonic() > deadline:
            return  # the next `up` tries again, and says so if it cannot
        time.sleep(0.01)


def _swept(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return _remove(directory)
    return False


def container_limits(limits: Mapping[str, int]) -> Limits:
    """From a container's `limits` in thousandths of their unit (cores, bytes)."""
    memory = limits.get("memory")
    return Limits(limits.get("cpu"), None if memory is None else memory // 1000)


def oom_score(qos: str, requested_bytes: int, capacity_bytes: int) -> int:
    """oom_score_adj as kubelets set it (pkg/kubelet/qos/policy.go): the more asked for, the later to die."""
    if qos == "Guaranteed":
        return -997
    if qos == "BestEffort":
        return 1000
    return min(max(1000 - 1000 * requested_bytes // capacity_bytes, 3), 999)
