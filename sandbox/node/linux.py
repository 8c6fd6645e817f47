"""The few Linux calls that Python's standard library does not offer (yet): namespaces, mounts, prctl.

Errors: `OSError` with the call's errno.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
ROOT = 0  # not a namespace: `namespaces` gives a process's root directory under it

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_TIMERSLACK = 29
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    done = _libc.mount(
        source.encode(), target.encode(), fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(done, f"mount {source} on {target}")


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Get `sig` when the *thread* that forked this process ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent dies, in place of the host's PID 1, which may not reap them."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def oom_score_adj(score: int) -> None:
    """How soon the kernel picks this process when memory runs out (-1000 … 1000). As low as may be: without
    CAP_SYS_RESOURCE it cannot be lowered."""
    with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write(str(score))


def precise_timers() -> None:
    """Wake this thread when it asks to be woken, not up to 50 µs later."""
    _check(_libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0), "prctl(PR_SET_TIMERSLACK)")


def address_of(buffer: bytearray) -> int:
    """Where a buffer lies, for an ioctl that is given a pointer; the buffer must outlive the call."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def drop_bounding(capability: int) -> None:
    """Never to be had again, whatever this process executes."""
    _check(_libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0), "prctl(PR_CAPBSET_DROP)")


def no_new_privileges() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def capset(header: object, data: object) -> None:
    _check(_libc.capset(header, data), "capset")


def sethostname(name: str) -> None:
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), "sethostname")


@contextmanager
def in_netns(fd: int) -> Iterator[None]:
    """This thread inside the network namespace `fd`. Never await inside."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(here, CLONE_NEWNET)
    finally:
        os.close(here)


def new_netns() -> int:
    """An anonymous network namespace; it lives as long as the returned fd and the processes in it."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            setns(here, CLONE_NEWNET)
    finally:
        os.close(here)


def fork(pidns: int | None = None, *, new_pidns: bool = False) -> int:
    """`os.fork`, with the child (a plain child of ours) in the process namespace `pidns`, or PID 1 of a new one."""
    if pidns is None and not new_pidns:
        return os.fork()
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    if pidns is None:
        unshare(CLONE_NEWPID)
    else:
        setns(pidns, CLONE_NEWPID)
    try:
        pid = os.fork()
    except OSError:
        setns(own, CLONE_NEWPID)
        raise
    if pid:  # the child must not: it cannot go back up
        setns(own, CLONE_NEWPID)
    os.close(own)
    return pid


def namespaces(pid: int) -> dict[int, int]:
    """Open namespaces and the root directory of another process, to be entered in this order: kind → fd."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
    kinds = {"pid": CLONE_NEWPID, "net": CLONE_NEWNET, "ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS, "mnt": CLONE_NEWNS}
    found = {kind: os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name, kind in kinds.items()}
    return {**found, ROOT: root}


def start_ticks(pid: int) -> int | None:
    """When `pid` was started (clock ticks since boot): with the pid, a name that is never reused. None: gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 – Path adds nothing here
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])
