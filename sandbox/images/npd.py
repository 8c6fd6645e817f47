"""node-problem-detector: turns lines of its node's kernel log into node conditions and Events.

Rules come in node-problem-detector's own format (a system-log-monitor configuration): a `permanent` rule sets a
condition, a `temporary` one makes an Event; a pattern must match to the end of the line. One addition: a condition
may name its healthy `status` ("False" when absent, as upstream has it fixed), because EKS's
AcceleratedHardwareReady is True while all is well. As upstream, a condition once set stays until the detector is
started anew and finds nothing within `lookback`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import aiohttp
import orjson

from sandbox.client import EVENTS, NODES, Api, ApiError, Obj
from sandbox.images import incluster
from sandbox.images.kernlog import Tail
from sandbox.images.process import run, say, stop_event

HEARTBEAT_SECONDS = 300.0
WAITING_EVENTS = 1000  # kept while the API server cannot be reached; older ones are lost


class BadRules(Exception):
    """The configuration cannot be used; one sentence."""


@dataclass(frozen=True, slots=True)
class Condition:
    type: str
    status: Literal["True", "False"]
    reason: str
    message: str
    since: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    reason: str
    pattern: re.Pattern[str]
    condition: str | None  # None: a temporary problem


@dataclass(frozen=True, slots=True)
class Rules:
    source: str
    log: Path
    lookback: float  # seconds
    conditions: tuple[Condition, ...]
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """An Event to be made."""

    severity: Literal["Normal", "Warning"]
    reason: str
    message: str
    at: str


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_rules(raw: bytes) -> Rules:
    """Parse a configuration. Raises BadRules."""
    try:
        body = orjson.loads(raw)
        conditions = tuple(
            Condition(entry["type"], entry.get("status", "False"), entry["reason"], entry["message"])
            for entry in body.get("conditions") or []
        )
        rules = tuple(_rule(entry, {condition.type for condition in conditions}) for entry in body["rules"])
        return Rules(body["source"], Path(body["logPath"]), _seconds(body.get("lookback", "0")), conditions, rules)
    except orjson.JSONDecodeError as bad:
        raise BadRules(f"The rules are not valid JSON: {bad}.") from bad
    except (KeyError, TypeError, AttributeError) as bad:
        raise BadRules(f"The rules lack a field or have one of the wrong type: {bad}.") from bad


def _rule(entry: dict[str, Any], conditions: set[str]) -> Rule:
    kind, condition = entry["type"], entry.get("condition")
    if kind not in ("temporary", "permanent"):
        raise BadRules(f"A rule's type must be temporary or permanent, not {kind!r}.")
    if kind == "permanent" and condition not in conditions:
        raise BadRules(f"The rule {entry['reason']} sets the condition {condition!r}, which is not declared.")
    try:
        pattern = re.compile(f"(?:{entry['pattern']})\\Z")
    except re.error as bad:
        raise BadRules(f"The pattern of {entry['reason']} is no regular expression: {bad}.") from bad
    return Rule(entry["reason"], pattern, condition if kind == "permanent" else None)


def _seconds(text: str) -> float:
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not parts:
        raise BadRules(f"lookback must be a duration such as 5m, not {text!r}.")
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return hours * 3600.0 + minutes * 60.0 + seconds


class Monitor:
    """What the rules make of the log: the conditions as they are now, and the Events to be made."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        at = now()
        self.conditions = {
            entry.type: Condition(entry.type, entry.status, entry.reason, entry.message, at)
            for entry in rules.conditions
        }

    def read(self, line: str) -> list[Problem]:
        """Book one line; returns the Events it calls for."""
        made = []
        for rule in self._rules.rules:
            found = rule.pattern.search(line)
            if not found:
                continue
            text = found.group()
            if rule.condition is None:
                made.append(Problem("Warning", rule.reason, text, now()))
            elif self._set(rule.condition, rule.reason, text):
                made.append(Problem("Warning", rule.reason, f"Node condition {rule.condition} is now: {text}", now()))
        return made

    def _set(self, type_: str, reason: str, message: str) -> bool:
        healthy = next(entry.status for entry in self._rules.conditions if entry.type == type_)
        known = self.conditions[type_]
        if known.status != healthy and known.reason == reason:
            return False
        since = now() if known.status == healthy else known.since
        self.conditions[type_] = Condition(type_, "False" if healthy == "True" else "True", reason, message, since)
        return True


class Reporter:
    """Brings conditions and Events to the API server; keeps them while it cannot be reached."""

    def __init__(self, monitor: Monitor, node: str, source: str) -> None:
        self._monitor, self._node, self._source = monitor, node, source
        self._events: deque[Problem] = deque(maxlen=WAITING_EVENTS)
        self._known: dict[tuple[str, str], Obj] = {}  # Events made, so that the same again only counts up
        self._reported: dict[str, Condition] = {}
        self._beat = 0.0
        self.wake = asyncio.Event()

    def add(self, problems: Sequence[Problem]) -> None:
        self._events.extend(problems)
        self.wake.set()

    async def run(self, api: Api) -> None:
        """Report until cancelled, at once when something is new and every heartbeat."""
        while True:
            self.wake.clear()
            try:
                await self.report(api)
            except (ApiError, aiohttp.ClientError, OSError) as lost:
                say(f"cannot report: {lost}")
                await asyncio.sleep(1)
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), HEARTBEAT_SECONDS)

    async def report(self, api: Api) -> None:
        """Bring what is due. Raises ApiError or aiohttp's errors; what was not brought stays due."""
        conditions = self._monitor.conditions
        if conditions != self._reported or time.monotonic() - self._beat >= HEARTBEAT_SECONDS:
            await api.patch(NODES, self._node, self._patch(), sub="status", type="strategic")
            self._reported, self._beat = dict(conditions), time.monotonic()
        while self._events:
            await self._event(api, self._events[0])
            self._events.popleft()

    def _patch(self) -> Obj:
        beat = now()
        return {
            "status": {
                "conditions": [
                    {
                        "type": entry.type,
                        "status": entry.status,
                        "reason": entry.reason,
                        "message": entry.message,
                        "lastHeartbeatTime": beat,
                        "lastTransitionTime": entry.since,
                    }
                    for entry in self._monitor.conditions.values()
                ]
            }
        }

    async def _event(self, api: Api, problem: Problem) -> None:
        key = (problem.reason, problem.message)
        if known := self._known.get(key):
            again = {"count": known["count"] + 1, "lastTimestamp": problem.at}
            try:
                await api.patch(EVENTS, known["metadata"]["name"], again, "default")
                known["count"] += 1
                return
            except ApiError as gone:
                if not gone.not_found:
                    raise
        event: Obj = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{self._node}.{time.time_ns():x}", "namespace": "default"},
            # kubectl describe looks for a node's Events by this uid
            "involvedObject": {"kind": "Node", "name": self._node, "uid": self._node},
            "type": problem.severity,
            "reason": problem.reason,
            "message": problem.message,
            "source": {"component": self._source, "host": self._node},
            "reportingComponent": self._source,
            "reportingInstance": self._node,
            "count": 1,
            "firstTimestamp": problem.at,
            "lastTimestamp": problem.at,
        }
        await api.create(EVENTS, event, "default")
        self._known[key] = event


async def _connected(reporter: Reporter) -> None:
    while True:
        async with incluster.connect("node-problem-detector") as api:
            reporting = asyncio.create_task(reporter.run(api))
            renewal = asyncio.create_task(incluster.token_changed())
            try:
                done, _ = await asyncio.wait({reporting, renewal}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                reporting.cancel()
                renewal.cancel()


@asynccontextmanager
async def _tasks(*work: asyncio.Task[None]) -> AsyncIterator[tuple[asyncio.Task[None], ...]]:
    try:
        yield work
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def _watch(rules: Rules, node: str) -> int:
    stop = stop_event()
    monitor = Monitor(rules)
    reporter = Reporter(monitor, node, rules.source)

    async def read() -> None:
        async for line in Tail(rules.log, lookback=rules.lookback).lines():
            if problems := monitor.read(line):
                say(f"{', '.join(problem.reason for problem in problems)}: {line}")
                reporter.add(problems)

    say(f"watching {rules.log} of {node} with {len(rules.rules)} rules")
    work = (asyncio.create_task(read()), asyncio.create_task(_connected(reporter)))
    async with _tasks(*work):
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({*work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    return 0


def main(argv: Sequence[str]) -> int:
    """Watch one node's kernel log until SIGTERM. Returns the exit code; SystemExit(2) for bad arguments."""
    parser = argparse.ArgumentParser(prog="node-problem-detector", description=__doc__)
    parser.add_argument("--config.system-log-monitor", dest="rules", type=Path, required=True, metavar="FILE")
    parser.add_argument("--node", default=os.environ.get("NODE_NAME"), help="default: $NODE_NAME")
    args = parser.parse_args(list(argv))
    if not args.node:
        parser.error("--node or NODE_NAME must name the node")
    try:
        return run(_watch(read_rules(args.rules.read_bytes()), args.node))
    except OSError as unreadable:
        say(f"error: cannot read {args.rules}: {unreadable.strerror}")
    except (BadRules, incluster.NotInCluster) as bad:
        say(f"error: {bad}")
    return 1


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
