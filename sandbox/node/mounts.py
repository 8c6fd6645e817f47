"""What a container sees of the file system: the host's, read-only, with its own /proc, /run and /tmp, and its volumes.

Other than in a real container, nothing else can be written to (EROFS): there is no layer to keep it in.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox.node.linux import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    mount,
)
from sandbox.node.security import Security

# A remount must not loosen them.
_FLAGS = {"nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC, "noatime": 1 << 10, "nodiratime": 1 << 11}
_FLAGS["relatime"] = 1 << 21
_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Mount:
    """Bind `source` (a file or directory of the machine) onto `target` in the container."""

    source: str
    target: str
    read_only: bool = False


def private_tree() -> None:
    """In a fresh mount namespace: nothing mounted from here on is seen outside."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def proc() -> None:
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)


def apply(mounts: Sequence[Mount], may: Security | None = None) -> None:
    """Arrange a container's tree; call in its mount and process namespaces, as their first process."""
    # Sources are opened first: /run and /tmp, where they may lie, are about to be covered.
    opened = [(os.open(item.source, os.O_PATH | os.O_CLOEXEC), item) for item in mounts]
    covered: set[int] = set()  # devices of the tmpfs that we mounted
    for hidden in ("/run", "/tmp"):  # noqa: S108
        if not _needed(hidden):
            _tmpfs(Path(hidden), covered, "mode=1777")
    _tmpfs(Path("/dev/shm"), covered, "mode=1777")  # noqa: S108
    if any(not Path("/", *Path(item.target).parts[1:2]).exists() for item in mounts):
        _new_root(covered)
    if may and may.user:
        _open_ways(covered)
    kept = {"/run", "/tmp", "/dev/shm"} if not (may and may.read_only) else set()  # noqa: S108
    for fd, item in opened:
        target = os.path.realpath(item.target)
        directory = os.path.isdir(f"/proc/self/fd/{fd}")  # noqa: PTH112 – a magic link, not a path
        _make_target(Path(target), covered, directory=directory)
        mount(f"/proc/self/fd/{fd}", target, flags=MS_BIND)
        if item.read_only:
            mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
        kept.add(target)
        os.close(fd)
    proc()
    _freeze(kept)
    if Path("/proc/sysrq-trigger").exists():  # it is the host's own: a pod may crash its machine, never ours
        mount("/dev/null", "/proc/sysrq-trigger", flags=MS_BIND)


def _freeze(kept: set[str]) -> None:
    """Make read-only what is not the container's own: its root is the host's, and must not be changed."""
    keep = ("/proc", *kept)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        place, options = fields[4].encode().decode("unicode_escape"), fields[5].split(",")
        if "ro" in options or any(place == own or place.startswith(f"{own}/") for own in keep):
            continue
        flags = sum(flag for name, flag in _FLAGS.items() if name in options)
        # Another mount lies over it; or it is locked for the user namespace of an ordinary user, who owns none of it.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            mount("none", place, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | flags)


def _open_ways(covered: set[int]) -> None:
    """Let any user come to the interpreter and the code: directories on the way that are closed show their entries."""
    for needed in _used():
        for place in reversed(needed.parents):
            if place.exists() and not place.stat().st_mode & 1:
                _show(place, place, covered)


def _needed(place: str) -> bool:
    """Whether the code that a container runs, or its interpreter, lies under `place`."""
    return any(path.is_relative_to(place) for path in _used())


def _used() -> list[Path]:
    used = [_ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve()]
    return used + [Path(entry) for entry in sys.path if entry]


def _tmpfs(where: Path, covered: set[int], options: str = "mode=755") -> None:
    mount("tmpfs", str(where), "tmpfs", MS_NOSUID | MS_NODEV, f"{options},size=64m")
    covered.add(where.stat().st_dev)


def _make_target(target: Path, covered: set[int], *, directory: bool) -> None:
    """Create the mount point, without touching the host's file system."""
    if target.exists():
        return
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if parent.stat().st_dev not in covered:
        _show(parent, parent, covered)
    if directory:
        target.mkdir(parents=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def _new_root(covered: set[int]) -> None:
    """A root on which new top-level directories can be made."""
    place = Path("/mnt")
    _show(Path("/"), place, covered)
    os.chroot(place)
    os.chdir("/")


def _show(source: Path, where: Path, covered: set[int]) -> None:
    """Cover `where` with a tmpfs that shows the entries of `source`, so that names can be added to it."""
    entries = list(os.scandir(source))
    handle = os.open(source, os.O_PATH | os.O_CLOEXEC)
    _tmpfs(where, covered)
    for entry in entries:
        here = where / entry.name
        if entry.is_symlink():
            here.symlink_to(os.readlink(f"/proc/self/fd/{handle}/{entry.name}"))  # noqa: PTH115
            continue
        if entry.is_dir():
            here.mkdir()
        else:
            here.touch()
        if source / entry.name != where:
            mount(f"/proc/self/fd/{handle}/{entry.name}", str(here), flags=MS_BIND | MS_REC)
    os.close(handle)
