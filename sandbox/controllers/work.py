"""The machinery all controllers share: caches, work queues, the loop that reconciles, the event recorder.

A `Cache` is an informer with indexes that also learns from the answers to our own writes, so that a
reconcile never acts on a state older than its own last action (what client-go's expectations are for).
A `Controller` owns a queue of (namespace, name) keys and a level-triggered `reconcile(key)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from sandbox.client import EVENTS, PODS, Api, ApiError, EventType, Informer, Key, Kind, Obj, PatchType
from sandbox.controllers.objects import (
    controller,
    deleting,
    generation,
    key,
    micro_stamp,
    name,
    namespace,
    node_of,
    stamp,
    uid,
    version,
)

log = logging.getLogger(__name__)

Handler = Callable[[EventType, Obj, Obj | None], None]
Indexer = Callable[[Obj], Iterable[str]]
TRANSPORT = (aiohttp.ClientError, OSError, TimeoutError)
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)

_REMEMBERED = 4096  # of what is gone or was said: far more than can be in flight on a watch


class Cache(Informer):
    """An informer of one kind with indexes, handlers and write-through."""

    def __init__(self, api: Api, kind: Kind, indexers: Mapping[str, Indexer] | None = None) -> None:
        super().__init__(api, kind)
        self.kind = kind
        self._indexers = {"namespace": lambda o: (namespace(o),), **(indexers or {})}
        self._index: dict[str, dict[str, dict[Key, Obj]]] = {which: {} for which in self._indexers}
        self._handlers: list[Handler] = []
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._doomed: set[str] = set()

    def subscribe(self, handler: Handler) -> None:
        """Call for every change from now on, and once as ADDED for every object already here."""
        self._handlers.append(handler)
        for obj in list(self.objects.values()):
            handler("ADDED", obj, None)

    def by(self, index: str, value: str) -> list[Obj]:
        return list(self._index[index].get(value, {}).values())

    def observe(self, obj: Obj) -> Obj:
        """Learn from the answer to a write of our own."""
        if "metadata" in obj and obj["metadata"].get("uid"):
            self._apply("MODIFIED" if key(obj) in self.objects else "ADDED", obj)
        return obj

    def doom(self, obj: Obj) -> None:
        """We had this deleted: show it as terminating from now on, whatever older news is still under way."""
        held = self.objects.get(key(obj))
        if held is None or uid(held) != uid(obj):
            return
        self._doomed.add(uid(obj))
        if not deleting(held):
            self._drop(key(obj), held)
            marked = _marked(held)
            self._place(marked)
            self._tell("MODIFIED", marked, held)

    def _apply(self, type: EventType, obj: Obj) -> None:
        identity, at = uid(obj), key(obj)
        old = self.objects.get(at)
        if type == "DELETED":
            self._bury(identity)
            if old is None or uid(old) != identity:
                return
            self._drop(at, old)
            self._tell("DELETED", obj, old)
            return
        if identity in self._gone:
            return
        if old is not None and uid(old) != identity:  # replaced while we did not look
            self._bury(uid(old))
            self._drop(at, old)
            self._tell("DELETED", old, old)
            old = None
        if old is not None:
            if version(obj) <= version(old):
                return
            self._drop(at, old)
        if identity in self._doomed and not deleting(obj):
            obj = _marked(obj)
        self._place(obj)
        self._tell("ADDED" if old is None else "MODIFIED", obj, old)

    def _place(self, obj: Obj) -> None:
        at = key(obj)
        self.objects[at] = obj
        for which, indexer in self._indexers.items():
            for value in indexer(obj):
                self._index[which].setdefault(value, {})[at] = obj

    def _tell(self, type: EventType, obj: Obj, old: Obj | None) -> None:
        for handler in self._handlers:
            handler(type, obj, old)

    def _bury(self, identity: str) -> None:
        self._gone[identity] = None
        self._doomed.discard(identity)
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def _drop(self, at: Key, obj: Obj) -> None:
        self.objects.pop(at, None)
        for which, indexer in self._indexers.items():
            for value in indexer(obj):
                held = self._index[which].get(value)
                if held is not None:
                    held.pop(at, None)
                    if not held:
                        del self._index[which][value]


def _marked(obj: Obj) -> Obj:
    return {**obj, "metadata": {**obj["metadata"], "deletionTimestamp": stamp()}}


def _controller_uid(obj: Obj) -> Iterable[str]:
    ref = controller(obj)
    return (ref["uid"],) if ref else ("",)


class Caches:
    """One cache per kind, shared by all controllers, started when first asked for."""

    def __init__(self, api: Api, group: asyncio.TaskGroup) -> None:
        self._api, self._group = api, group
        self._held: dict[Kind, Cache] = {}
        self._tasks: dict[Kind, asyncio.Task[None]] = {}

    def of(self, kind: Kind) -> Cache:
        if kind not in self._held:
            indexers: dict[str, Indexer] = {"controller": _controller_uid}
            if kind == PODS:
                indexers["node"] = lambda pod: (node_of(pod),)
            self._held[kind] = Cache(self._api, kind, indexers)
            self._tasks[kind] = self._group.create_task(self._held[kind].run(), name=f"cache of {kind.plural}")
        return self._held[kind]

    def drop(self, kind: Kind) -> None:
        """Stop following a kind that is no longer served."""
        self._held.pop(kind, None)
        if task := self._tasks.pop(kind, None):
            task.cancel()

    def all(self) -> list[Cache]:
        return list(self._held.values())

    async def synced(self) -> None:
        for cache in self.all():
            await cache.synced.wait()


class Queue:
    """Keys waiting to be reconciled: each at most once, never two at a time, failures with growing delay."""

    _FIRST, _MAX = 0.005, 10.0  # seconds; client-go's start, capped so that a sandbox heals quickly

    def __init__(self) -> None:
        self._ready: OrderedDict[Key, None] = OrderedDict()
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()

    def add(self, key: Key) -> None:
        if key in self._busy:
            self._again.add(key)
            return
        self._ready[key] = None
        self._wake.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Add later; of several pending delays the earliest counts."""
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        held = self._timers.get(key)
        if held is not None:
            if held.when() <= loop.time() + seconds:
                return
            held.cancel()
        self._timers[key] = loop.call_later(seconds, self._due, key)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> Key:
        while not self._ready:
            self._wake.clear()
            await self._wake.wait()
        key, _ = self._ready.popitem(last=False)
        self._busy.add(key)
        return key

    def done(self, key: Key, *, ok: bool) -> None:
        self._busy.discard(key)
        if ok:
            self._failures.pop(key, None)
        else:
            count = self._failures[key] = self._failures.get(key, 0) + 1
            self.add_after(key, min(self._FIRST * 2 ** (count - 1), self._MAX))
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()


@dataclass(frozen=True, slots=True)
class Shared:
    """What every controller works with."""

    api: Api
    caches: Caches
    recorder: Recorder

    # Writes go through here so that the caches know their outcome at once.

    async def create(self, kind: Kind, obj: Obj) -> Obj:
        return self.caches.of(kind).observe(await self.api.create(kind, obj, namespace(obj) or None))

    async def update(self, kind: Kind, obj: Obj, *, sub: str | None = None) -> Obj:
        return self.caches.of(kind).observe(await self.api.update(kind, obj, sub=sub))

    async def status(self, kind: Kind, obj: Obj, status: Obj) -> Obj:
        """Replace an object's status; a newer version on the server is a conflict."""
        return await self.update(kind, {**obj, "status": status}, sub="status")

    async def patch(
        self, kind: Kind, obj: Obj, patch: Obj, *, sub: str | None = None, type: PatchType = "merge"
    ) -> Obj:
        """Patch that very object (its uid is a precondition)."""
        body = {**patch, "metadata": {**patch.get("metadata", {}), "uid": uid(obj)}}
        done = await self.api.patch(kind, name(obj), body, namespace(obj) or None, sub=sub, type=type)
        return self.caches.of(kind).observe(done)

    async def delete(self, kind: Kind, obj: Obj, *, grace: int | None = None, propagation: str | None = None) -> None:
        """Delete that very object; one already gone is fine."""
        try:
            await self.api.delete(
                kind, name(obj), namespace(obj) or None, grace=grace, propagation=propagation, uid=uid(obj)
            )
        except ApiError as error:
            if not error.not_found and not error.conflict:
                raise
        self.caches.of(kind).doom(obj)


class Controller:
    """A named queue and a reconcile function."""

    name = "controller"
    source = ""  # how it signs events; default: NAME-controller
    workers = 2

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.queue = Queue()
        self.setup()

    def setup(self) -> None:
        """Subscribe to caches; runs before they are filled."""

    async def reconcile(self, key: Key) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        """Run until cancelled."""
        await self.shared.caches.synced()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.workers):
                    group.create_task(self._work(), name=self.name)
                await self.background(group)
        finally:
            self.queue.close()

    async def background(self, group: asyncio.TaskGroup) -> None:
        """Start what a controller does besides its queue."""

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            ok = False
            try:
                await self.reconcile(key)
                ok = True
            except ApiError as error:
                if not error.conflict:
                    log.info("%s %s/%s: %s", self.name, *key, error)
            except TRANSPORT as error:
                log.warning("%s %s/%s: %r", self.name, *key, error)
            except MALFORMED:
                # An object no controller can make sense of must not stop the others from being served.
                log.exception("%s cannot handle %s/%s", self.name, *key)
            finally:
                self.queue.done(key, ok=ok)

    def record(self, obj: Obj, kind: Kind, type: str, reason: str, message: str) -> None:
        self.shared.recorder.record(obj, kind, type, reason, message, source=self.source or f"{self.name}-controller")

    def watch_owned(self, owned: Kind, owner: Kind) -> Cache:
        """Enqueue the controlling `owner` of every `owned` object that changes."""

        def changed(type: EventType, obj: Obj, old: Obj | None) -> None:
            for seen in (obj, old):
                ref = controller(seen) if seen else None
                if ref and ref.get("kind") == owner.kind:
                    self.queue.add((namespace(obj), ref["name"]))

        cache = self.shared.caches.of(owned)
        cache.subscribe(changed)
        return cache

    def watch_own(self, kind: Kind) -> Cache:
        """Enqueue every object of the controller's own kind."""
        cache = self.shared.caches.of(kind)
        cache.subscribe(lambda type, obj, old: self.queue.add(key(obj)))
        return cache


_BURST, _REFILL = 25, 300.0  # client-go's spam filter: events per source and object, seconds per further one


class Recorder:
    """Writes Events in the background; a repeated one is counted up, a flood is cut off."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._queue: asyncio.Queue[tuple[str, Obj]] = asyncio.Queue()
        self._seen: OrderedDict[tuple[str, ...], tuple[str, int]] = OrderedDict()
        self._tokens: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()

    def record(self, obj: Obj, kind: Kind, type: str, reason: str, message: str, *, source: str) -> None:
        """An Event in the style of core/v1."""
        at = stamp()
        self._put(obj, kind, type, reason, message, source, {
            "source": {"component": source},
            "reportingComponent": source,
            "reportingInstance": "",
            "count": 1,
            "firstTimestamp": at,
            "lastTimestamp": at,
        })  # fmt: skip

    def note(self, obj: Obj, kind: Kind, type: str, reason: str, message: str, *, source: str, action: str) -> None:
        """An Event in the style of events.k8s.io, as the scheduler writes them."""
        self._put(obj, kind, type, reason, message, source, {
            "source": {},
            "reportingComponent": source,
            "reportingInstance": f"{source}-sandbox",
            "action": action,
            "eventTime": micro_stamp(),
            "firstTimestamp": None,
            "lastTimestamp": None,
        })  # fmt: skip

    def _put(self, obj: Obj, kind: Kind, type: str, reason: str, message: str, source: str, fields: Obj) -> None:
        if not self._allowed((source, uid(obj))):
            return
        space = namespace(obj) or "default"
        about = {
            "kind": kind.kind,
            "apiVersion": kind.api_version,
            "name": name(obj),
            "uid": uid(obj),
            "resourceVersion": obj["metadata"].get("resourceVersion", ""),
        }
        if namespace(obj):
            about["namespace"] = space
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name(obj)}.{time.time_ns():x}", "namespace": space},
            "involvedObject": about,
            "type": type,
            "reason": reason,
            "message": message,
            **fields,
        }
        self._queue.put_nowait((source, event))

    def _allowed(self, bucket: tuple[str, str]) -> bool:
        at = time.monotonic()
        tokens, last = self._tokens.pop(bucket, (float(_BURST), at))
        tokens = min(_BURST, tokens + (at - last) / _REFILL)
        self._tokens[bucket] = (tokens - 1 if tokens >= 1 else tokens, at)
        if len(self._tokens) > _REMEMBERED:
            self._tokens.popitem(last=False)
        return tokens >= 1

    async def run(self) -> None:
        """Run until cancelled. A lost event is logged and no more, as in the real recorder."""
        while True:
            source, event = await self._queue.get()
            try:
                await self._write(source, event)
            except (ApiError, *TRANSPORT) as error:
                log.debug("event %s not written: %s", event["metadata"]["name"], error)

    async def _write(self, source: str, event: Obj) -> None:
        about = event["involvedObject"]
        alike = (source, about["uid"], event["type"], event["reason"], event["message"])
        space = event["metadata"]["namespace"]
        if alike in self._seen:
            known, count = self._seen[alike]
            patch: Obj = {"count": count + 1, "lastTimestamp": stamp()}
            if "eventTime" in event:
                patch = {"series": {"count": count + 1, "lastObservedTime": micro_stamp()}}
            with contextlib.suppress(ApiError):
                await self._api.patch(EVENTS, known, patch, space)
                self._seen[alike] = (known, count + 1)
                return
        await self._api.create(EVENTS, event, space)
        self._seen[alike] = (event["metadata"]["name"], 1)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)


async def slow_start(count: int, act: Callable[[], Awaitable[object]]) -> int:
    """Act `count` times in batches of 1, 2, 4, …; stop at the first batch with a failure, raise its ApiError."""
    done, size = 0, 1
    while done < count:
        batch = min(size, count - done)
        results = await asyncio.gather(*(act() for _ in range(batch)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        done += batch
        size *= 2
    return done


async def each(jobs: Sequence[Awaitable[object]]) -> None:
    """Await all; the first error is raised after all have ended."""
    for result in await asyncio.gather(*jobs, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def namespace_ends(error: ApiError) -> bool:
    """Whether a creation was refused because its namespace is terminating, which is nothing to complain about."""
    return any(cause.get("reason") == "NamespaceTerminating" for cause in error.details.get("causes") or ())


def observed(obj: Obj) -> bool:
    return int((obj.get("status") or {}).get("observedGeneration") or 0) >= generation(obj)
