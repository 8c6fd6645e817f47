"""Start, find and stop a sandbox: `up`, `find`, `down`.

A sandbox is one supervisor process and what it forked into namespaces of their own; the kernel ends all of it with
the supervisor. Its state directory says where it is; `sandbox.json` there is a `Running`.

Errors: `SandboxError`, one sentence; nothing is left behind then.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import orjson

from sandbox import prometheus
from sandbox.kubeconfig import CONTEXT as CONTEXT
from sandbox.node import cgroups, linux
from sandbox.options import CLOCKS, STACKS, Clocks, Options, default_state_dir

_ROOT = Path(__file__).resolve().parent.parent
_DOWN_SECONDS = 3.0  # for the supervisor to end by itself; then it is killed, which ends everything as well
# What a sandbox writes to its state directory. Only these names are ever removed from there.
_OURS = (
    "ca.crt",
    cgroups.RECORD,
    "kubeconfig",
    "lock",
    "logs",
    "nodes",
    "plane",
    "prometheus",
    "sandbox.json",
    "server.crt",
    "server.key",
    "supervisor.json",
    "token",
)


class SandboxError(Exception):
    """The sandbox cannot be had; the text is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Running:
    """A sandbox that runs: what the harness needs to use it."""

    pid: int  # the supervisor
    state_dir: str
    kubeconfig: str
    context: str
    api_url: str
    prometheus_url: str  # "" with `bare`
    target_url: str  # "" with `bare`
    namespace: str
    selector: str
    model: str
    gateway_selector: str
    clocks: str
    stack: str
    expendable: bool  # limits on blast radius may be lifted
    zone_latency_ms: float  # one way
    not_enforced: str  # what this machine does not let the sandbox enforce, and why; "": nothing
    started: float  # epoch seconds
    start_ticks: int  # of `pid`: tells it from a later process of the same number

    @property
    def alive(self) -> bool:
        return linux.start_ticks(self.pid) == self.start_ticks

    @staticmethod
    def read(file: Path) -> Running | None:
        try:
            found: Mapping[str, Any] = orjson.loads(file.read_bytes())
            return Running(**{field.name: found[field.name] for field in fields(Running)})
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
            return None


def find(state_dir: Path) -> Running | None:
    """The live sandbox of a state directory."""
    running = Running.read(state_dir / "sandbox.json")
    return running if running and running.alive else None


def up(options: Options, say: Callable[[str], None]) -> Running:
    """Start a sandbox and wait until it is of use: stack Ready, Prometheus scraping. Raises `SandboxError`.

    `say` gets a line of progress now and then. Interrupted (Ctrl-C), it takes down what it began.
    """
    _check(options)
    state = options.state_dir
    if running := find(state):
        raise SandboxError(f"a sandbox is up already (pid {running.pid}, {state}): use it, or end it with gameday down")
    if starting := _supervisor(state):
        raise SandboxError(f"a sandbox is starting or ending already (pid {starting[0]}, {state}): wait for it")
    down(state)  # what a crash has left
    log = _make_state(state)
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "sandbox.supervisor", str(write)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write,),
            start_new_session=True,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *_python_path()])},
        )
    finally:
        os.close(write)
        os.close(log)
    try:
        process.communicate(dump(options))
        return _follow(read, state, say)
    except BaseException:  # whatever it is: what was begun is taken down
        down(state)
        raise
    finally:
        os.close(read)
        process.wait()


def _python_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _make_state(state: Path) -> int:
    try:
        (state / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(state / "logs" / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as refused:
        raise SandboxError(f"the state directory {state} cannot be written: {refused.strerror}") from refused


def _check(options: Options) -> None:
    """What can be known beforehand."""
    if not sys.platform.startswith("linux"):
        raise SandboxError("the sandbox needs Linux: its pods are processes in namespaces")
    if options.stack not in STACKS:
        raise SandboxError(f"there is no stack {options.stack!r}: choose one of {', '.join(STACKS)}")
    if len(set(options.zones)) != len(options.zones) or not options.zones:
        raise SandboxError(f"zones must be named, and each once, not {', '.join(options.zones) or 'none'}")
    if not 1 <= options.nodes_per_zone * len(options.zones) <= 60:
        raise SandboxError("a sandbox has 1 to 60 nodes: choose nodes_per_zone and zones accordingly")
    if os.geteuid() != 0 and not _user_namespaces():
        raise SandboxError("the sandbox needs root, or user namespaces, which this machine refuses to ordinary users")
    if options.control_plane is not None:
        from sandbox import binaries  # noqa: PLC0415  (late: it needs half of the API server)

        try:
            binaries.find(options.control_plane)
        except binaries.Missing as missing:
            raise SandboxError(str(missing)) from missing
    if not 0 <= options.zone_latency_ms <= 1000:
        raise SandboxError(f"the latency between zones is 0 to 1000 ms, not {options.zone_latency_ms:g}")
    if options.bare:
        return
    if shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        raise SandboxError("nft is not installed, and partitions are made with it: install the package nftables")
    try:
        prometheus.find_binary(options)
    except prometheus.Missing as missing:
        raise SandboxError(str(missing)) from missing


def _user_namespaces() -> bool:
    """Whether a process of ours may make a user namespace; tried, for there is no other way to know."""
    probe = "from sandbox.node import linux; linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNET)"
    tried = subprocess.run([sys.executable, "-c", probe], cwd=_ROOT, stderr=subprocess.DEVNULL, check=False)
    return tried.returncode == 0


def _follow(read: int, state: Path, say: Callable[[str], None]) -> Running:
    """Read the supervisor's reports until it is ready or gives up."""
    with os.fdopen(os.dup(read), "rb") as reports:
        for line in reports:
            report = orjson.loads(line)
            if "say" in report:
                say(report["say"])
            elif "error" in report:
                raise SandboxError(report["error"])
            else:
                return Running(**report["ready"])
    raise SandboxError(f"the sandbox's supervisor died while starting: {last_words(state / 'logs' / 'supervisor.log')}")


def last_words(log: Path) -> str:
    """The last line of a log, for an error's sentence."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it left no message"


def down(state_dir: Path) -> bool:
    """End the sandbox of a state directory and remove its state; False when there was none. Safe to repeat."""
    found = _supervisor(state_dir)
    if found:
        _end(*found)
    clear(state_dir)
    return found is not None


def clear(state_dir: Path) -> None:
    """Remove what sandboxes write to their state directory, and the directory if nothing else is in it."""
    cgroups.sweep(state_dir)
    for name in _OURS:
        path = state_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        state_dir.rmdir()


def _supervisor(state_dir: Path) -> tuple[int, int] | None:
    """(pid, start time) of a live supervisor, also of one that is still starting."""
    try:
        noted = orjson.loads((state_dir / "supervisor.json").read_bytes())
        pid, ticks = int(noted["pid"]), int(noted["start_ticks"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    return (pid, ticks) if linux.start_ticks(pid) == ticks else None


def _end(pid: int, ticks: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if linux.start_ticks(pid) != ticks:
            return
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not _ended(handle, _DOWN_SECONDS):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            _ended(handle, _DOWN_SECONDS)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def _ended(handle: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def dump(options: Options) -> bytes:
    return orjson.dumps({**asdict(options), "state_dir": str(options.state_dir)})


def load(raw: bytes) -> Options:
    found = orjson.loads(raw)
    found |= {
        "clocks": Clocks(**found["clocks"]),
        "state_dir": Path(found["state_dir"]),
        "zones": tuple(found["zones"]),
    }
    return Options(**found)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sandbox.up up|down|status`."""
    parser = argparse.ArgumentParser(prog="sandbox.up", description="Start, stop or show the sandbox.")
    parser.add_argument("what", choices=("up", "down", "status"))
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    parser.add_argument("--stack", choices=STACKS, default="reference")
    parser.add_argument("--clocks", choices=sorted(CLOCKS), default=None)
    parser.add_argument("--bare", action="store_true", help="the control plane alone")
    parser.add_argument("--control-plane", nargs="?", const="", metavar="DIR", help="real binaries, not our own")
    args = parser.parse_args(argv)
    if args.what == "down":
        print("down" if down(args.state_dir) else "there was no sandbox")
        return 0
    if args.what == "status":
        running = find(args.state_dir)
        print(orjson.dumps(running, option=orjson.OPT_INDENT_2).decode() if running else "there is no sandbox")
        return 0 if running else 1
    clocks = CLOCKS[args.clocks or ("bare" if args.bare else "compressed")]
    chosen = {"stack": args.stack, "clocks": clocks, "bare": args.bare, "control_plane": args.control_plane}
    options = replace(Options(), state_dir=args.state_dir, **chosen)
    try:
        running = up(options, lambda line: print(line, flush=True))
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was begun has been taken down", file=sys.stderr)
        return 130
    print(f"export KUBECONFIG={running.kubeconfig}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
