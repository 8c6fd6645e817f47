"""What pods and nodes use, from their kubelets; and what Prometheus knows of them: for `kubectl top` and autoscalers.

Taken when asked for, as a metrics server would take it in turn: a rate needs two looks, at least `SHORTEST` apart.

Errors: `Unavailable`, a sentence.
Sources: metrics.k8s.io/v1beta1 (k8s.io/metrics), kubelet's /metrics/resource, Prometheus HTTP API.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

SHORTEST = 0.5  # seconds between two looks: below, a rate would be of clock ticks
FRESH = 15.0  # seconds after which an earlier look is too old to take a rate from
_TIMEOUT = aiohttp.ClientTimeout(total=3)
_LINE = re.compile(r"^([a-z_]+)(?:\{([^}]*)\})? (\S+)")
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')

Where = tuple[str, str, str]  # namespace, pod, container; ("", node, ""): a node


class Unavailable(Exception):
    """There are no such metrics now."""


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU in cores, memory in bytes."""

    cpu: float
    memory: float


@dataclass(frozen=True, slots=True)
class Look:
    """One reading of all kubelets: CPU seconds and bytes, by container and node."""

    at: float
    cpu: Mapping[Where, float]
    memory: Mapping[Where, float]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Usage by container and by node, over the `window` seconds before `at` (epoch seconds)."""

    at: float
    window: float
    usage: Mapping[Where, Usage] = field(default_factory=dict)

    def of_pod(self, namespace: str, name: str) -> dict[str, Usage]:
        return {where[2]: used for where, used in self.usage.items() if where[:2] == (namespace, name) and where[2]}


def parse(node: str, text: str) -> tuple[dict[Where, float], dict[Where, float]]:
    """A kubelet's /metrics/resource: CPU seconds, bytes."""
    cpu: dict[Where, float] = {}
    memory: dict[Where, float] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if not found:
            continue
        name, labels, value = found[1], dict(_LABEL.findall(found[2] or "")), float(found[3])
        about, _, what = name.partition("_")
        if about == "container":
            where = (labels["namespace"], labels["pod"], labels["container"])
        elif about == "node":
            where = ("", node, "")
        else:
            continue
        if what == "cpu_usage_seconds_total":
            cpu[where] = value
        elif what == "memory_working_set_bytes":
            memory[where] = value
    return cpu, memory


def between(first: Look, last: Look) -> Snapshot:
    """What was used between two looks; what is not in both is left out, as is what started anew."""
    seconds = last.at - first.at
    usage = {
        where: Usage((cpu - first.cpu[where]) / seconds, last.memory[where])
        for where, cpu in last.cpu.items()
        if where in first.cpu and cpu >= first.cpu[where] and where in last.memory
    }
    return Snapshot(time.time(), seconds, usage)


class Metrics:
    """`kubelets()` gives the nodes there are: name → URL; `prometheus` is its URL, "" where there is none."""

    def __init__(self, kubelets: Callable[[], Mapping[str, str]], prometheus: str = "") -> None:
        self._kubelets, self._prometheus = kubelets, prometheus
        self._earlier: Look | None = None
        self._last: Look | None = None
        self._turn = asyncio.Lock()

    async def usage(self) -> Snapshot:
        """By container and node. What does not answer is left out."""
        async with self._turn, aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            now = time.monotonic()
            if self._last is None or now - self._last.at > FRESH:
                self._last = await self._look(session)
                await asyncio.sleep(SHORTEST)
            elif now - self._last.at < SHORTEST and self._earlier is not None:
                return between(self._earlier, self._last)
            else:
                await asyncio.sleep(max(0.0, self._last.at + SHORTEST - now))
            self._earlier, self._last = self._last, await self._look(session)
            return between(self._earlier, self._last)

    async def _look(self, session: aiohttp.ClientSession) -> Look:
        cpu: dict[Where, float] = {}
        memory: dict[Where, float] = {}
        nodes = self._kubelets()
        answers = await asyncio.gather(*(self._ask(session, url) for url in nodes.values()))
        for node, text in zip(nodes, answers, strict=True):
            for sums, found in zip((cpu, memory), parse(node, text), strict=True):
                sums.update(found)
        return Look(time.monotonic(), cpu, memory)

    @staticmethod
    async def _ask(session: aiohttp.ClientSession, url: str) -> str:
        try:
            async with session.get(f"{url}/metrics/resource", ssl=False) as answer:
                return await answer.text() if answer.status == 200 else ""
        except (aiohttp.ClientError, TimeoutError):
            return ""

    async def by_pod(self, namespace: str, metric: str, match: Mapping[str, str]) -> dict[str, float]:
        """A gauge of pods, by pod: as Prometheus' adapter for custom metrics gives it. Raises `Unavailable`."""
        rows = await self._query(f"sum by (pod) ({_series(namespace, metric, match)})")
        return {labels["pod"]: value for labels, value in rows if labels.get("pod")}

    async def external(self, namespace: str, metric: str, match: Mapping[str, str]) -> list[float]:
        """All series of a gauge in a namespace. Raises `Unavailable`."""
        return [value for _, value in await self._query(_series(namespace, metric, match))]

    async def _query(self, text: str) -> list[tuple[dict[str, str], float]]:
        if not self._prometheus:
            raise Unavailable("there is no Prometheus")
        try:
            async with (
                aiohttp.ClientSession(timeout=_TIMEOUT) as session,
                session.get(f"{self._prometheus}/api/v1/query", params={"query": text}) as answer,
            ):
                body = await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as lost:
            raise Unavailable(f"Prometheus does not answer: {lost}") from lost
        if body.get("status") != "success":
            raise Unavailable(f"Prometheus refuses {text}: {body.get('error')}")
        found = [(row["metric"], float(row["value"][1])) for row in body["data"]["result"]]
        if not found:
            raise Unavailable(f"Prometheus has no series of {text}")
        return [(labels, value) for labels, value in found if value == value]  # noqa: PLR0124  (NaN)


_CUMULATIVE = ("_total", "_bucket", "_count", "_sum")


def _series(namespace: str, metric: str, match: Mapping[str, str]) -> str:
    if metric.endswith(_CUMULATIVE):
        raise Unavailable(f"{metric} is cumulative, and the sandbox scales on gauges only")
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", metric):
        raise Unavailable(f"{metric!r} is not a name of a metric")
    terms = [("namespace", namespace), *match.items()]
    return metric + "{" + ",".join(f"{name}={_quoted(value)}" for name, value in terms) + "}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def total(used: Sequence[Usage], resource: str) -> float:
    """Cores or bytes, summed."""
    return sum(used_.cpu if resource == "cpu" else used_.memory for used_ in used)
