"""Traffic control of one pod, as its PodNetworkChaos asks for it (`tcs`). Pure.

Chaos Mesh's arrangement: rules without a filter are passed one after the other by every packet; then a packet goes
through the rules of one filter, whose set of addresses holds its destination (the last one, where several do).
Source: chaos-mesh pkg/chaosdaemon/tc_server.go. Rates are bytes per second, in steps of 1024.
"""

from __future__ import annotations

import heapq
import random
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_network
from typing import Any

from sandbox.chaos import gotime
from sandbox.chaos.podnetwork import NET, NET_PORT, SET
from sandbox.client import Obj

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?bps)", re.IGNORECASE)
_STEPS = {"bps": 1, "kbps": 1024, "mbps": 1024**2, "gbps": 1024**3, "tbps": 1024**4}


class Unsupported(Exception):
    """The spec asks for what cannot be done; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class Chance:
    """Something that happens to a share of packets; `correlation` with what happened to the one before."""

    share: float  # 0–1
    correlation: float = 0.0  # 0–1


@dataclass(frozen=True, slots=True)
class Netem:
    """What netem does; seconds."""

    delay: float = 0.0
    jitter: float = 0.0
    correlation: float = 0.0
    loss: Chance | None = None
    duplicate: Chance | None = None
    corrupt: Chance | None = None
    reorder: Chance | None = None
    gap: int = 0  # with reorder: every so manyth packet is a candidate to go at once


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket (tbf): bytes per second, bytes that may go at once, bytes that may wait."""

    rate: float
    burst: float
    limit: float


@dataclass(frozen=True, slots=True)
class Rule:
    """`to` None: all IPv4 packets; else those to a network, and there to a port unless it is 0."""

    kind: Netem | Bucket
    to: tuple[tuple[str, int], ...] | None = None

    def dump(self) -> Obj:
        return {"to": self.to, "bucket": isinstance(self.kind, Bucket), "kind": self.kind}

    @staticmethod
    def load(raw: Obj) -> Rule:
        to = None if raw["to"] is None else tuple((str(network), int(port)) for network, port in raw["to"])
        fields: dict[str, Any] = {
            name: Chance(**value) if isinstance(value, dict) else value for name, value in raw["kind"].items()
        }
        return Rule(Bucket(**fields), to) if raw["bucket"] else Rule(Netem(**fields), to)


def rules(spec: Mapping[str, Any]) -> dict[str, list[Rule]]:
    """The rules of a PodNetworkChaos by device. Raises `Unsupported`."""
    sets = {entry["name"]: entry for entry in spec.get("ipsets") or []}
    found: dict[str, list[Rule]] = {}
    for tc in spec.get("tcs") or []:
        rule = Rule(_kind(tc), _networks(tc["ipset"], sets) if tc.get("ipset") else None)
        found.setdefault(tc.get("device") or "eth0", []).append(rule)
    return found


def _kind(tc: Obj) -> Netem | Bucket:
    if tc["type"] == "bandwidth":
        asked = tc.get("bandwidth")
        if not asked:
            raise Unsupported("the action is bandwidth, but the spec has no bandwidth block")
        if asked.get("peakrate"):
            raise Unsupported("the sandbox's token bucket has no peakrate")
        return Bucket(rate(asked["rate"]), float(asked["buffer"]), float(asked["limit"]))
    if tc["type"] != "netem":
        raise Unsupported(f"traffic control {tc['type']!r} is unknown")
    if tc.get("rate"):
        raise Unsupported("the sandbox has no rate within netem: use the action bandwidth")
    known = {name: tc[name] for name in ("delay", "loss", "duplicate", "corrupt") if tc.get(name)}
    if not known:
        raise Unsupported("the spec has no block that says what to do to packets (delay, loss, duplicate, corrupt)")
    delay = known.get("delay") or {}
    reorder = delay.get("reorder") or {}
    return Netem(
        delay=gotime.seconds(delay.get("latency") or "0s"),
        jitter=gotime.seconds(delay.get("jitter") or "0s"),
        correlation=_percent(delay.get("correlation")),
        loss=_chance(known, "loss"),
        duplicate=_chance(known, "duplicate"),
        corrupt=_chance(known, "corrupt"),
        reorder=_chance({"reorder": reorder}, "reorder") if reorder else None,
        gap=int(reorder.get("gap") or 0),
    )


def _chance(block: Mapping[str, Obj], name: str) -> Chance | None:
    asked = block.get(name)
    return Chance(_percent(asked[name]), _percent(asked.get("correlation"))) if asked else None


def _percent(text: str | None) -> float:
    try:
        share = float(text or 0) / 100
    except ValueError:
        raise Unsupported(f"{text!r} is no percentage") from None
    if not 0 <= share <= 1:
        raise Unsupported(f"{text!r} is no percentage from 0 to 100")
    return share


def rate(text: str) -> float:
    """ "1mbps" in bytes per second: Chaos Mesh's bps are bytes."""
    found = _RATE.fullmatch(text.strip())
    if not found:
        raise Unsupported(f"{text!r} is no rate such as 1mbps (bps, kbps, mbps, gbps, tbps; bytes per second)")
    return float(found[1]) * _STEPS[found[2].lower()]


def _networks(name: str, sets: Mapping[str, Obj]) -> tuple[tuple[str, int], ...]:
    if name not in sets:
        raise Unsupported(f"set {name} is not defined")
    entry = sets[name]
    if entry["ipsetType"] == SET:
        return tuple(pair for inner in entry.get("setNames") or () for pair in _networks(inner, sets))
    if entry["ipsetType"] == NET:
        pairs = [(cidr, 0) for cidr in entry.get("cidrs") or ()]
    elif entry["ipsetType"] == NET_PORT:
        pairs = [(pair["cidr"], int(pair["port"])) for pair in entry.get("cidrAndPorts") or ()]
    else:
        raise Unsupported(f"set {name} has the unknown type {entry['ipsetType']!r}")
    return tuple((cidr, port) for cidr, port in pairs if ip_network(cidr, strict=False).version == 4)


# — what happens to packets —

_ETHERNET = 14  # bytes before the IP header
_WITH_PORTS = (6, 17, 33, 132)  # TCP, UDP, DCCP, SCTP: the destination port is the transport header's second word
_REMEMBERED = 4096  # destinations whose rules are looked up once


@dataclass(slots=True)
class _Dice:
    """Draws with netem's correlation (net/sched/sch_netem.c get_crandom)."""

    random: Callable[[], float]
    last: float = 0.0

    def draw(self, correlation: float) -> float:
        value = self.random()
        self.last = value * (1 - correlation) + self.last * correlation
        return self.last


class _Link:
    """One rule at work: when a packet that reaches it at `now` goes on; none, one or two copies."""

    def __init__(self, rule: Rule, rng: random.Random) -> None:
        self._kind, self._rng = rule.kind, rng
        self._dice = {name: _Dice(rng.random) for name in ("delay", "loss", "duplicate", "corrupt", "reorder")}
        self._tokens, self._at, self._count = (rule.kind.burst if isinstance(rule.kind, Bucket) else 0.0), 0.0, 0

    def through(self, now: float, frame: bytes) -> list[tuple[float, bytes]]:
        if isinstance(self._kind, Bucket):
            return self._metered(self._kind, now, frame)
        kind = self._kind
        if self._hit("loss", kind.loss):
            return []
        copies = 2 if self._hit("duplicate", kind.duplicate) else 1
        if self._hit("corrupt", kind.corrupt):
            spoilt = bytearray(frame)
            spoilt[self._rng.randrange(_ETHERNET, len(frame))] ^= 1 << self._rng.randrange(8)
            frame = bytes(spoilt)
        due = now + self._delay(kind)
        return [(due, frame)] * copies

    def _delay(self, kind: Netem) -> float:
        if kind.reorder:
            self._count += 1
            if self._count >= kind.gap and self._hit("reorder", kind.reorder):
                self._count = 0
                return 0.0
        if not kind.jitter:
            return kind.delay
        return max(0.0, kind.delay + (2 * self._dice["delay"].draw(kind.correlation) - 1) * kind.jitter)

    def _hit(self, name: str, chance: Chance | None) -> bool:
        return chance is not None and self._dice[name].draw(chance.correlation) < chance.share

    def _metered(self, bucket: Bucket, now: float, frame: bytes) -> list[tuple[float, bytes]]:
        """Tokens below zero are bytes that wait."""
        self._tokens = min(bucket.burst, self._tokens + bucket.rate * (now - self._at))
        self._at = now
        left = self._tokens - len(frame)
        if -left > bucket.limit:
            return []
        self._tokens = left
        return [(now if left >= 0 else now - left / bucket.rate, frame)]


@dataclass(slots=True)
class Shape:
    """All rules of one device at work on its packets (Ethernet frames that hold IPv4)."""

    rules: Sequence[Rule]
    rng: random.Random = field(default_factory=random.Random)  # which packet is lost is no secret
    _queue: list[tuple[float, int, bytes]] = field(default_factory=list)
    _number: int = 0
    _everyone: list[_Link] = field(init=False)
    _filtered: list[tuple[list[tuple[IPv4Network, int]], list[_Link]]] = field(init=False)
    _known: dict[tuple[bytes, int], list[_Link]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._everyone = [_Link(rule, self.rng) for rule in self.rules if rule.to is None]
        by_filter: dict[tuple[tuple[str, int], ...], list[_Link]] = {}
        for rule in self.rules:
            if rule.to is not None:
                by_filter.setdefault(rule.to, []).append(_Link(rule, self.rng))
        self._filtered = [
            ([(IPv4Network(network, strict=False), port) for network, port in to], links)
            for to, links in by_filter.items()
        ]

    def take(self, now: float, frame: bytes) -> None:
        """A packet has come: it goes on when it may."""
        moments = [(now, frame)]
        for link in self._path(frame):
            moments = [after for at, one in moments for after in link.through(at, one)]
        for due, one in moments:
            self._number += 1
            heapq.heappush(self._queue, (due, self._number, one))

    def ready(self, now: float) -> list[bytes]:
        """What goes on by now, in order."""
        found = []
        while self._queue and self._queue[0][0] <= now:
            found.append(heapq.heappop(self._queue)[2])
        return found

    def next(self) -> float | None:
        """When the next packet goes on."""
        return self._queue[0][0] if self._queue else None

    def _path(self, frame: bytes) -> list[_Link]:
        header = (frame[_ETHERNET] & 15) * 4
        port = 0
        if frame[_ETHERNET + 9] in _WITH_PORTS and len(frame) >= _ETHERNET + header + 4:
            (port,) = struct.unpack_from("!H", frame, _ETHERNET + header + 2)
        key = frame[_ETHERNET + 16 : _ETHERNET + 20], port
        path = self._known.get(key)
        if path is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            path = self._known[key] = self._look_up(*key)
        return path

    def _look_up(self, address: bytes, port: int) -> list[_Link]:
        number = int.from_bytes(address, "big")
        chosen: list[_Link] = []
        for networks, links in self._filtered:
            if any(_holds(network, number) and only in (0, port) for network, only in networks):
                chosen = links
        return self._everyone + chosen


def _holds(network: IPv4Network, address: int) -> bool:
    return address & int(network.netmask) == int(network.network_address)
