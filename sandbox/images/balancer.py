"""Which engine a request goes to: the ready endpoints, least in flight first, the failing ones left out.

An endpoint that cannot be connected to, or is asked for /health on suspicion and does not answer, is ejected at once,
one that fails otherwise after two failures in a row. An ejected endpoint is asked for /health, first after `base`
seconds, then after ever doubled waits, and comes back when it answers. When all are ejected all are used ("panic"):
a detector that sees only faults is not believed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field

from sandbox.client import Obj
from sandbox.images.upstream import Cause, Connection, Pool

AT_ONCE: frozenset[Cause] = frozenset({"refused", "connect_timeout"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where an endpoint is, as its EndpointSlice says."""

    uid: str
    pod: str
    zone: str
    host: str
    port: int
    node: str = ""


@dataclass(slots=True, eq=False)
class Endpoint:
    place: Place
    pool: Pool
    in_flight: int = 0
    failures: int = 0  # in a row
    ejected: bool = False
    answered: float = 0.0  # when an answer last began, seconds of the loop's clock
    wait: float = 0.0  # before the next look at an ejected endpoint
    waiting: set[Connection] = field(default_factory=set)  # first attempts that have no byte yet
    looking: asyncio.Task[None] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Policy:
    eject: bool = True
    failures: int = 2
    base: float = 0.5
    most: float = 8.0


class Budget:
    """Retries as a share of requests (after Finagle): each request earns `share` of a retry, up to `most`."""

    def __init__(self, share: float = 0.2, most: float = 50.0) -> None:
        self._share, self._most = share, most
        self._left = most

    def earn(self) -> None:
        self._left = min(self._most, self._left + self._share)

    def spend(self) -> bool:
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Balancer:
    """`healthy(endpoint)` asks an endpoint; `on_change(endpoint)` is told of every ejection and re-admission."""

    def __init__(
        self,
        policy: Policy,
        open_pool: Callable[[Place], Pool],
        healthy: Callable[[Endpoint], Awaitable[bool]],
        on_change: Callable[[Endpoint], None],
        draw: random.Random | None = None,
    ) -> None:
        self._policy, self._open_pool = policy, open_pool
        self._healthy, self._on_change = healthy, on_change
        self._draw = draw or random.Random()  # noqa: S311 - spreads load
        self._all: dict[Place, Endpoint] = {}

    @property
    def endpoints(self) -> Collection[Endpoint]:
        return self._all.values()

    def update(self, places: Iterable[Place]) -> None:
        """These are the endpoints from now on; known ones keep their history."""
        wanted = set(places)
        for place in [place for place in self._all if place not in wanted]:
            gone = self._all.pop(place)
            gone.pool.close()
            if gone.looking:
                gone.looking.cancel()
        for place in wanted:
            if place not in self._all:
                self._all[place] = Endpoint(place, self._open_pool(place))

    def pick(self, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """The endpoint for a request that has failed on `tried`.

        A second attempt goes where an answer began last: while half of the endpoints have just become unreachable
        and are not ejected yet, those are likely to be among the idle ones.
        """
        untried = [endpoint for endpoint in self._all.values() if endpoint not in tried]
        choice = [endpoint for endpoint in untried if not endpoint.ejected]
        if not choice and all(endpoint.ejected for endpoint in self._all.values()):
            choice = untried or list(self._all.values())
        if not choice:
            return None
        if tried:
            return max(choice, key=lambda endpoint: (endpoint.answered, self._draw.random()))
        return min(choice, key=lambda endpoint: (endpoint.in_flight, self._draw.random()))

    def succeeded(self, endpoint: Endpoint) -> None:
        """An answer has begun."""
        endpoint.failures = 0
        endpoint.answered = asyncio.get_running_loop().time()
        if not endpoint.ejected:
            endpoint.wait = 0.0

    def failed(self, endpoint: Endpoint, cause: Cause | None = None) -> None:
        """Book a failure; `cause` is None for an answer of 5xx."""
        endpoint.failures += 1
        if endpoint.failures >= self._policy.failures or cause in AT_ONCE:
            self._eject(endpoint)

    def suspect(self, endpoint: Endpoint) -> None:
        """An answer is late: ask for /health now, and eject the endpoint if that is not answered."""
        if self._policy.eject and not endpoint.looking and self._known(endpoint):
            endpoint.looking = asyncio.create_task(self._check(endpoint))

    def _known(self, endpoint: Endpoint) -> bool:
        return self._all.get(endpoint.place) is endpoint

    def _eject(self, endpoint: Endpoint) -> None:
        if not self._policy.eject or endpoint.ejected or not self._known(endpoint):
            return
        endpoint.ejected = True
        endpoint.pool.close()
        if endpoint.looking:
            endpoint.looking.cancel()
        endpoint.looking = asyncio.create_task(self._look(endpoint))
        self._on_change(endpoint)

    async def _check(self, endpoint: Endpoint) -> None:
        healthy = await self._healthy(endpoint)
        endpoint.looking = None
        if not healthy:
            self._eject(endpoint)

    async def _look(self, endpoint: Endpoint) -> None:
        while endpoint.ejected:
            endpoint.wait = min(max(self._policy.base, endpoint.wait * 2), self._policy.most)
            await asyncio.sleep(endpoint.wait)
            if await self._healthy(endpoint):
                endpoint.ejected, endpoint.failures, endpoint.looking = False, 0, None
                self._on_change(endpoint)


def places(slices: Iterable[Obj]) -> list[Place]:
    """The endpoints to use: all ready ones, or where there is none those that still serve (as kube-proxy does)."""
    ready: dict[str, Place] = {}
    serving: dict[str, Place] = {}
    for piece in slices:
        ports = piece.get("ports") or []
        if not ports:
            continue
        for endpoint in piece.get("endpoints") or []:
            conditions = endpoint.get("conditions") or {}
            target = endpoint.get("targetRef") or {}
            host = endpoint["addresses"][0]
            place = Place(
                uid=target.get("uid", ""),
                pod=target.get("name", host),
                zone=endpoint.get("zone", ""),
                host=host,
                port=ports[0]["port"],
                node=endpoint.get("nodeName", ""),
            )
            if conditions.get("ready") is not False:  # absent means ready
                ready[host] = place
            elif conditions.get("serving"):
                serving[host] = place
    return list((ready or serving).values())
