"""Liveness, readiness and startup probes with kubelet's counting (kubernetes pkg/kubelet/prober/worker.go)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from sandbox.client import Obj

ProbeKind = Literal["startup", "liveness", "readiness"]
_HEAD = 10_240  # bytes of an answer that are looked at


@dataclass(frozen=True, slots=True)
class Outcome:
    ok: bool
    message: str = ""


Exec = Callable[[list[str], float], Awaitable[Outcome]]


def port_number(container: Obj, port: int | str) -> int | None:
    """A probe's port: a number, or the name of one of the container's ports."""
    if isinstance(port, int):
        return port
    for named in container.get("ports") or []:
        if named.get("name") == port:
            return int(named["containerPort"])
    return int(port) if port.isdigit() else None


async def check(probe: Obj, container: Obj, ip: str, run: Exec) -> Outcome:
    """Probe once, within the probe's timeout."""
    timeout = float(probe.get("timeoutSeconds") or 1)
    if action := probe.get("httpGet"):
        return await http_get(action, container, ip, timeout, probe=True)
    if action := probe.get("tcpSocket"):
        port = port_number(container, action["port"])
        return await _tcp(action.get("host") or ip, port, timeout)
    if action := probe.get("exec"):
        return await run(list(action["command"]), timeout)
    return Outcome(False, f"the sandbox has no {next(iter(probe.keys() - _NUMBERS), 'such')} probes")


_NUMBERS = {
    "initialDelaySeconds",
    "timeoutSeconds",
    "periodSeconds",
    "successThreshold",
    "failureThreshold",
    "terminationGracePeriodSeconds",
}


async def _tcp(host: str, port: int | None, within: float) -> Outcome:
    if port is None:
        return Outcome(False, "the probe names a port that the container does not have")
    try:
        async with asyncio.timeout(within):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return Outcome(False, f"dial tcp {host}:{port}: i/o timeout")
    except OSError as refused:
        return Outcome(False, f"dial tcp {host}:{port}: connect: {_words(refused)}")
    writer.close()
    return Outcome(True)


async def http_get(action: Obj, container: Obj, ip: str, within: float, *, probe: bool = False) -> Outcome:
    """One GET on a new connection, as probes and lifecycle hooks do; 200–399 is success."""
    host = action.get("host") or ip
    port = port_number(container, action.get("port", 80))
    path = action.get("path") or "/"
    path = path if path.startswith("/") else f"/{path}"
    url = f"http://{host}:{port}{path}"
    if port is None:
        return Outcome(False, f"the container has no port named {action.get('port')!r}")
    if (action.get("scheme") or "HTTP").upper() != "HTTP":
        return Outcome(False, "the sandbox probes by HTTP only, not HTTPS")
    headers = {"Host": f"{host}:{port}", "User-Agent": "kube-probe/1.36" if probe else "kube-lifecycle/1.36"}
    headers |= {"Accept": "*/*", "Connection": "close"}
    headers |= {item["name"]: item["value"] for item in action.get("httpHeaders") or []}
    head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(within):
            reader, writer = await asyncio.open_connection(host, port, limit=_HEAD)
            writer.write(head.encode())
            line = await reader.readline()
    except TimeoutError:
        why = "context deadline exceeded" + (" (Client.Timeout exceeded while awaiting headers)" if writer else "")
        return Outcome(False, f'Get "{url}": {why}')
    except (OSError, ValueError) as refused:
        what = f"dial tcp {host}:{port}: connect: {_words(refused)}" if writer is None else _words(refused)
        return Outcome(False, f'Get "{url}": {what}')
    finally:
        if writer:
            writer.close()
    code = [*line.split(None, 2), b"", b""][1].decode()
    if not code.isdigit():
        return Outcome(False, f'Get "{url}": EOF')
    return Outcome(code[0] in "23", f"HTTP probe failed with statuscode: {code}")


def _words(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if "refused" in str(error).lower() or getattr(error, "errno", None) == 111:
        return "connection refused"
    return text.lower()


@dataclass(slots=True)
class Subject:
    """The container start that is being probed."""

    id: str
    since: float  # monotonic


class Worker:
    """One probe of one container, for the life of its pod."""

    def __init__(
        self,
        kind: ProbeKind,
        spec: Obj,
        *,
        subject: Callable[[], Subject | None],
        allowed: Callable[[], bool],
        try_once: Callable[[], Awaitable[Outcome]],
        on_failure: Callable[[str], None],
        on_result: Callable[[bool], None],
    ) -> None:
        """`subject` is the running container (None: none runs); `allowed` whether this kind may probe now."""
        self.kind, self.spec = kind, spec
        self._subject, self._allowed, self._try = subject, allowed, try_once
        self._on_failure, self._on_result = on_failure, on_result
        self._nudge = asyncio.Event()
        self._held = False
        self._last: bool | None = None
        self._run = 0  # not reset by a restart, as in kubelet: see facts/kubelet.md §2
        self.passed: bool | None = None
        self.reset()

    def reset(self) -> None:
        """A container starts: nothing is known of it; it is taken for alive, but not for ready."""
        self._held = False
        self.passed = {"startup": None, "liveness": True, "readiness": False}[self.kind]
        self.trigger()

    def trigger(self) -> None:
        """Probe now, not at the next period."""
        self._nudge.set()

    async def run(self) -> None:
        period = float(self.spec.get("periodSeconds") or 10)
        while True:
            await self._tick()
            self._nudge.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period * random.uniform(0.995, 1.0)):  # noqa: S311 – no two in lockstep
                    await self._nudge.wait()

    async def _tick(self) -> None:
        subject = self._subject()
        if subject is None or self._held or not self._allowed():
            return
        wait = subject.since + float(self.spec.get("initialDelaySeconds") or 0) - time.monotonic()
        if wait > 0:
            self._later(wait)
            return
        outcome = await self._try()
        now = self._subject()
        if now is None or now.id != subject.id:
            self._count(outcome)
            return
        if not outcome.ok:
            self._on_failure(outcome.message)
        if self._count(outcome) >= self._threshold(outcome.ok):
            self._set(outcome.ok)
            if not outcome.ok and self.kind != "readiness":
                self._held, self._run = True, 0

    def _later(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._nudge.set)

    def _count(self, outcome: Outcome) -> int:
        self._run = self._run + 1 if outcome.ok == self._last else 1
        self._last = outcome.ok
        return self._run

    def _threshold(self, ok: bool) -> int:
        return int(self.spec.get("successThreshold") or 1) if ok else int(self.spec.get("failureThreshold") or 3)

    def _set(self, passed: bool) -> None:
        changed, self.passed = passed != self.passed, passed
        if changed:
            self._on_result(passed)
