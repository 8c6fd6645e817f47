"""Objects in memory, one monotonic resourceVersion, and a log of changes that watches read.

Stored objects are never altered in place: a change replaces them. Whoever wants to keep or edit one
copies it (`Stored.copy`). `raw` is the JSON as served, encoded once per change.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import orjson

from sandbox.client import Obj

Key = tuple[str, str]  # (namespace or "", name)
ChangeType = Literal["ADDED", "MODIFIED", "DELETED"]
LOG_LENGTH = 5000  # changes kept per resource for watches that resume; older ones get 410


@dataclass(frozen=True, slots=True)
class Stored:
    obj: Obj
    raw: bytes
    version: int

    def copy(self) -> Obj:
        return orjson.loads(self.raw)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Change:
    version: int
    type: ChangeType
    new: Stored  # for DELETED: the last state, with the deletion's resourceVersion
    old: Stored | None


class Subscription:
    """A watch's queue: everything after its start, in order."""

    def __init__(self, key: str, backlog: list[Change]) -> None:
        self.key = key
        self.ended = False
        self._queue = deque(backlog)
        self._wake = asyncio.Event()
        if backlog:
            self._wake.set()

    def push(self, change: Change) -> None:
        """A reader that falls too far behind is cut off; it may resume from the log, or gets 410 there."""
        if self.ended:
            return
        self._queue.append(change)
        self._wake.set()
        self.ended = len(self._queue) >= LOG_LENGTH

    def end(self) -> None:
        """No more will come (the resource is no longer served)."""
        self.ended = True
        self._wake.set()

    async def take(self) -> list[Change]:
        """Wait for changes and take all that are there; empty once ended."""
        await self._wake.wait()
        taken = list(self._queue)
        self._queue.clear()
        if not self.ended:
            self._wake.clear()
        return taken


class Compacted(Exception):
    """The changes since the version asked for are no longer known; `oldest` is the first that is."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"changes before {oldest} are gone")
        self.oldest = oldest


class Store:
    def __init__(self) -> None:
        self.version = 1
        self._tables: dict[str, dict[Key, Stored]] = {}
        self._logs: dict[str, deque[Change]] = {}
        self._forgotten: dict[str, int] = {}  # newest version no longer in the log
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._hooks: dict[str, list[Callable[[Change], None]]] = {}

    def on_change(self, key: str, hook: Callable[[Change], None]) -> None:
        self._hooks.setdefault(key, []).append(hook)

    def table(self, key: str) -> dict[Key, Stored]:
        return self._tables.setdefault(key, {})

    def keys(self) -> list[str]:
        return list(self._tables)

    def get(self, key: str, namespace: str, name: str) -> Stored | None:
        return self.table(key).get((namespace, name))

    def list(self, key: str, namespace: str | None = None) -> Iterator[Stored]:
        """Objects in the order of namespace and name, as etcd has them."""
        table = self.table(key)
        for place in sorted(table):
            if namespace is None or place[0] == namespace:
                yield table[place]

    def put(self, key: str, obj: Obj) -> Stored:
        """Write `obj` (which the store then owns) under the next version."""
        place = _place(obj)
        table = self.table(key)
        old = table.get(place)
        stored = self._stamp(obj)
        table[place] = stored
        self._record(key, Change(stored.version, "MODIFIED" if old else "ADDED", stored, old))
        return stored

    def remove(self, key: str, obj: Obj) -> Stored:
        """Remove the object of that name; returns its last state with the deletion's version."""
        old = self.table(key).pop(_place(obj))
        stored = self._stamp(old.obj)
        self._record(key, Change(stored.version, "DELETED", stored, old))
        return stored

    def _stamp(self, obj: Obj) -> Stored:
        self.version += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        return Stored(obj, orjson.dumps(obj), self.version)

    def _record(self, key: str, change: Change) -> None:
        log = self._logs.setdefault(key, deque())
        log.append(change)
        if len(log) > LOG_LENGTH:
            self._forgotten[key] = log.popleft().version
        for subscription in self._subscriptions.get(key, ()):
            subscription.push(change)
        for hook in self._hooks.get(key, ()):
            hook(change)

    def subscribe(self, key: str, since: int) -> Subscription:
        """Everything after `since`. Raises `Compacted`."""
        forgotten = self._forgotten.get(key, 1)
        if since < forgotten:
            raise Compacted(forgotten + 1)
        backlog = [change for change in self._logs.get(key, ()) if change.version > since]
        subscription = Subscription(key, backlog)
        self._subscriptions.setdefault(key, set()).add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.get(subscription.key, set()).discard(subscription)

    def begin(self, key: str) -> None:
        """The resource is served from now on: its history starts here."""
        if key not in self._logs:
            self._forgotten[key] = self.version

    def end_subscriptions(self, key: str) -> None:
        for subscription in self._subscriptions.get(key, ()):
            subscription.end()


def _place(obj: Obj) -> Key:
    meta = obj["metadata"]
    return meta.get("namespace", ""), meta["name"]
