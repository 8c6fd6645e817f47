"""Delay, loss and bandwidth between real network namespaces, over real sockets, without netem."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from chaos_world import ADDRESSES, EVERY, NS, Net, World, chosen, play, records, with_pods

from sandbox.chaos import podnetwork, shaper, traffic
from sandbox.chaos.traffic import Bucket, Chance, Netem, Rule, Shape, Unsupported, rate
from sandbox.client import NETWORKCHAOS, PODNETWORKCHAOS, PODS, Obj

LATE = 0.080  # seconds: what we ask for; nothing here takes that long by itself


def seconds(made: Net, source: str, target: str, within: float = 2.0) -> float | None:
    """How long a datagram takes; None: it does not arrive."""
    with made.socket(source) as sender, made.socket(target) as receiver:
        receiver.settimeout(within)
        receiver.bind((ADDRESSES[target], 0))
        sent = time.monotonic()
        try:
            sender.sendto(b"ping", receiver.getsockname())
            receiver.recv(16)
        except TimeoutError:
            return None
        return time.monotonic() - sent


def late(made: Net, by: float = LATE) -> set[str]:
    """Which ways take at least `by`; the others arrive, and sooner. The least of three counts: the machine is busy."""
    found = set()
    for pair in EVERY:
        took = [seconds(made, pair[0], pair[1]) for _ in range(3)]
        assert None not in took
        if min(one for one in took if one is not None) >= by:
            found.add(pair)
    return found


async def control(one: World, name: str, action: str, source: str, target: str | None = None, **more: Any) -> None:
    spec: Obj = {"action": action, "mode": "all", "selector": chosen(source), **more}
    if target:
        spec["target"] = {"mode": "all", "selector": chosen(target)}
    await one.chaos(NETWORKCHAOS, name, spec)
    await one.injected(NETWORKCHAOS, name)


DELAY = {"latency": f"{LATE * 1000:.0f}ms"}


@pytest.mark.parametrize(
    ("direction", "target", "slow"),
    [
        ("to", None, {"ab", "ac"}),
        ("to", "b", {"ab"}),
        ("from", "b", {"ba"}),
        ("both", "b", {"ab", "ba"}),
    ],
)
def test_delay_in_its_direction_and_recovery(direction: str, target: str | None, slow: set[str]) -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "slow", "delay", "a", target, direction=direction, delay=DELAY)
        assert late(made) == slow
        await one.delete(NETWORKCHAOS, "slow")
        assert late(made) == set()
        assert [made.table(name) for name in ADDRESSES] == ["", "", ""], "no rule is left"
        assert all("gdshape" not in made.run(name, "ip", "link") for name in ADDRESSES), "no device is left"

    with_pods(test)


def test_two_delays_overlap_and_one_remains() -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "all", "delay", "a", delay=DELAY)
        await control(one, "some", "delay", "a", "b", delay=DELAY)
        assert late(made) == {"ab", "ac"}
        assert late(made, 2 * LATE) == {"ab"}, "both act on what both choose"
        await one.delete(NETWORKCHAOS, "all")
        assert late(made) == {"ab"}
        await one.delete(NETWORKCHAOS, "some")
        assert late(made) == set()

    with_pods(test)


def test_a_delay_and_a_partition_share_a_pod() -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "slow", "delay", "a", "b", delay=DELAY)
        await one.partition("cut", "a", "c", "to")
        await one.injected(NETWORKCHAOS, "cut")
        assert seconds(made, "c", "a") is not None
        assert not made.udp("a", "c", ADDRESSES["c"])
        assert (seconds(made, "a", "b") or 0) >= LATE
        await one.delete(NETWORKCHAOS, "slow")
        assert not made.udp("a", "c", ADDRESSES["c"]), "the cut stays"
        await one.delete(NETWORKCHAOS, "cut")

    with_pods(test)


def test_delay_to_external_targets() -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "slow", "delay", "a", delay=DELAY, externalTargets=["10.9.0.4", "10.9.0.3:9"])
        assert late(made) == {"ac"}, "b is late on port 9 only"

    with_pods(test)


def test_established_connections_are_delayed_both_ways_of_a_round_trip() -> None:
    async def test(one: World, made: Net) -> None:
        with made.socket("b", socket.SOCK_STREAM) as listener, made.socket("a", socket.SOCK_STREAM) as client:
            listener.bind((ADDRESSES["b"], 8000))
            listener.listen()
            client.connect((ADDRESSES["b"], 8000))
            server, _ = listener.accept()
            with server:
                server.settimeout(5)
                client.settimeout(5)
                await control(one, "slow", "delay", "a", "b", direction="both", delay=DELAY)
                sent = time.monotonic()
                client.sendall(b"x")
                assert server.recv(1) == b"x"
                server.sendall(b"y")
                assert client.recv(1) == b"y"
                assert time.monotonic() - sent >= 2 * LATE

    with_pods(test)


def test_much_data_goes_whole_through_a_delay() -> None:
    """Segments larger than a frame are cut, and their checksums are right."""

    async def test(one: World, made: Net) -> None:
        await control(one, "slow", "delay", "a", "b", delay={"latency": "5ms"})
        data = random.Random(1).randbytes(3_000_000)
        assert await asyncio.to_thread(transfer, made, data) == data

    with_pods(test)


def transfer(made: Net, data: bytes) -> bytes:
    """Send from a to b over TCP; what b gets."""
    with made.socket("b", socket.SOCK_STREAM) as listener, made.socket("a", socket.SOCK_STREAM) as client:
        listener.settimeout(20)
        client.settimeout(20)
        listener.bind((ADDRESSES["b"], 8001))
        listener.listen()
        client.connect((ADDRESSES["b"], 8001))
        server, _ = listener.accept()

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        with server:
            server.settimeout(20)
            parts = []
            while chunk := server.recv(1 << 20):
                parts.append(chunk)
        sender.join()
        return b"".join(parts)


def arrived(made: Net, count: int) -> int:
    """Of so many datagrams from a to b, how many arrive."""
    with made.socket("a") as sender, made.socket("b") as receiver:
        receiver.bind((ADDRESSES["b"], 0))
        got = 0
        for _ in range(count):
            sender.sendto(b"x", receiver.getsockname())
            receiver.settimeout(0.02)
            try:
                got += len(receiver.recv(16))
            except TimeoutError:
                continue
        receiver.settimeout(0.5)
        try:
            while True:
                got += len(receiver.recv(16))
        except TimeoutError:
            return got


def test_loss_loses_its_share() -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "lossy", "loss", "a", "b", loss={"loss": "50"})
        assert 20 <= arrived(made, 100) <= 80
        await one.delete(NETWORKCHAOS, "lossy")
        assert arrived(made, 50) == 50
        await control(one, "total", "loss", "a", loss={"loss": "100"})
        assert arrived(made, 20) == 0

    with_pods(test)


def test_bandwidth_meters() -> None:
    async def test(one: World, made: Net) -> None:
        data = b"x" * 300_000
        await control(
            one, "narrow", "bandwidth", "a", bandwidth={"rate": "200kbps", "limit": 100_000, "buffer": 10_000}
        )
        began = time.monotonic()
        assert await asyncio.to_thread(transfer, made, data) == data
        took = time.monotonic() - began
        assert took >= (len(data) - 10_000) / (200 * 1024), "bytes per second, not bits"
        await one.delete(NETWORKCHAOS, "narrow")

    with_pods(test)


def test_a_shaper_that_dies_is_replaced() -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "slow", "delay", "a", "b", delay=DELAY)
        (pid,) = [int(found) for found in shapers()]
        os.kill(pid, signal.SIGKILL)

        async def back() -> bool:
            took = seconds(made, "a", "b", within=0.3)
            return took is not None and took >= LATE and shapers() != [str(pid)]

        await one.until("packets are late again", back)
        await one.delete(NETWORKCHAOS, "slow")
        assert late(made) == set()

    with_pods(test)


def shapers() -> list[str]:
    """Children of this process that shape."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in children if b"sandbox.chaos.shaper" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_what_the_daemon_cannot_do_is_a_failed_record() -> None:
    async def test(one: World, made: Net) -> None:
        spec: Obj = {"action": "delay", "mode": "all", "selector": chosen("a")}
        await one.chaos(NETWORKCHAOS, "nothing", spec)
        found = await one.noted(NETWORKCHAOS, "nothing", "has no block that says what to do")
        assert records(found)[0]["phase"] == "Not Injected/Wait"
        peak = {"rate": "1mbps", "limit": 1000, "buffer": 1000, "peakrate": 5}
        await one.chaos(
            NETWORKCHAOS, "peak", {**spec, "action": "bandwidth", "selector": chosen("b"), "bandwidth": peak}
        )
        await one.noted(NETWORKCHAOS, "peak", "no peakrate")
        other = {**spec, "selector": chosen("c"), "delay": DELAY, "device": "eth7"}
        await one.chaos(NETWORKCHAOS, "other", other)
        await one.noted(NETWORKCHAOS, "other", "pods have eth0 only, not eth7")

    with_pods(test)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"direction": "from", "delay": DELAY}, "need a target"),
        ({"direction": "both", "delay": DELAY, "externalTargets": ["10.9.0.9"]}, "need a target"),
        (
            {
                "direction": "from",
                "delay": DELAY,
                "externalTargets": ["10.9.0.9"],
                "target": {"mode": "all", "selector": chosen("b")},
            },
            "external targets go with",
        ),
    ],
)
def test_directions_that_the_webhook_refuses(more: Obj, why: str) -> None:
    async def main(one: World) -> None:
        await one.pod("a", ip="10.9.0.2")
        await one.chaos(NETWORKCHAOS, "wrong", {"action": "delay", "mode": "all", "selector": chosen("a"), **more})
        await one.told("wrong", why)

    play(main)


def test_the_other_sides_record_is_injected_without_doing_anything() -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "slow", "delay", "a", "b", delay=DELAY)
        found = await one.api.get(NETWORKCHAOS, "slow", NS)
        assert {record["selectorKey"] for record in records(found)} == {".", ".Target"}
        assert [entry["metadata"]["name"] for entry in (await one.api.list(PODNETWORKCHAOS, NS))[0]] == ["a"]

    with_pods(test)


def test_a_replaced_pod_is_not_delayed_again() -> None:
    async def test(one: World, made: Net) -> None:
        await control(one, "slow", "delay", "a", delay=DELAY)
        await one.api.delete(PODS, "a", NS, grace=0)
        await one.gone(PODS, "a")
        new = await one.pod("a", ip=ADDRESSES["a"])
        made.uids[new["metadata"]["uid"]] = made.fds["c"]
        assert (seconds(made, "c", "b") or 1) < LATE, "no re-injection"
        await one.delete(NETWORKCHAOS, "slow")

    with_pods(test)


# — pure —


def frame(to: str = "10.0.0.1", size: int = 100, port: int = 80) -> bytes:
    """An Ethernet frame with a UDP packet."""
    ip = b"\x45" + bytes(8) + b"\x11" + bytes(2) + socket.inet_aton("10.0.0.9") + socket.inet_aton(to)
    return (bytes(12) + b"\x08\x00" + ip + bytes(2) + port.to_bytes(2, "big")).ljust(size, b"\0")


def through(*rules: Rule, frames: list[bytes], gap: float = 0.0, seed: int = 1) -> list[float]:
    """When frames that come `gap` apart from 0 on go on."""
    shape = Shape(rules, random.Random(seed))
    for number, one in enumerate(frames):
        shape.take(number * gap, one)
    moments = []
    while (due := shape.next()) is not None:
        moments += [due] * len(shape.ready(due))
    return moments


def test_delays_add_up_and_the_last_filter_wins() -> None:
    to = (("10.0.0.0/8", 0),)
    narrow = (("10.0.0.1/32", 0),)
    rules = (Rule(Netem(delay=1)), Rule(Netem(delay=2)), Rule(Netem(delay=10), to), Rule(Netem(delay=20), narrow))
    assert through(*rules, frames=[frame("10.0.0.1"), frame("10.0.0.2"), frame("11.0.0.1")]) == [3, 13, 23]
    assert through(Rule(Netem(delay=1), (("10.0.0.1/32", 443),)), frames=[frame(port=80), frame(port=443)]) == [0, 1]


def test_a_bucket_lets_a_burst_go_then_meters_then_drops() -> None:
    rule = Rule(Bucket(rate=100, burst=200, limit=250))
    assert through(rule, frames=[frame()] * 6) == [0, 0, 1, 2], "the fifth would wait for longer than the limit"
    assert through(rule, frames=[frame()] * 6, gap=1) == [0, 1, 2, 3, 4, 5]


def test_shares() -> None:
    assert 400 < len(through(Rule(Netem(loss=Chance(0.5))), frames=[frame()] * 1000)) < 600
    assert len(through(Rule(Netem(duplicate=Chance(1))), frames=[frame()] * 3)) == 6
    early = through(Rule(Netem(delay=1, reorder=Chance(1.0), gap=3)), frames=[frame()] * 6)
    assert early == [0, 0, 1, 1, 1, 1], "every third goes at once"
    spread = through(Rule(Netem(delay=1, jitter=0.5)), frames=[frame()] * 200)
    assert 0.5 <= min(spread) < 0.7 and 1.3 < max(spread) <= 1.5


def test_a_spoilt_packet_differs_in_one_bit_behind_its_ethernet_header() -> None:
    shape = Shape([Rule(Netem(corrupt=Chance(1)))], random.Random(3))
    shape.take(0, frame())
    (spoilt,) = shape.ready(0)
    wrong = [
        (position, old ^ new) for position, (old, new) in enumerate(zip(frame(), spoilt, strict=True)) if old != new
    ]
    assert len(wrong) == 1 and wrong[0][0] >= 14 and wrong[0][1].bit_count() == 1


def test_rates_are_bytes() -> None:
    assert [rate("1bps"), rate("2 kbps"), rate("1Mbps"), rate("0.5gbps")] == [1, 2048, 1024**2, 0.5 * 1024**3]
    for wrong in ("1", "1mb", "fast"):
        with pytest.raises(Unsupported, match="no rate"):
            rate(wrong)


def test_rules_survive_the_way_to_the_shaper() -> None:
    found = [Rule(Netem(0.1, loss=Chance(0.5, 0.1)), (("10.0.0.0/8", 80),)), Rule(Bucket(1, 2, 3))]

    assert [Rule.load(raw) for raw in orjson.loads(shaper.dump(found))] == found
    assert "ip daddr { 10.0.0.0/8 } fwd" in shaper.script(found[:1], "eth0")
    assert "ether type ip fwd" in shaper.script(found, "eth0")


def test_percentages_are_checked() -> None:
    for wrong in ("a lot", "101", "-1"):
        with pytest.raises(Unsupported, match="no percentage"):
            traffic.rules({"tcs": [{"type": "netem", "source": "x/y", "loss": {"loss": wrong}}]})


def test_entries_of_each_direction() -> None:
    spec: Obj = {"action": "bandwidth", "direction": "both", "bandwidth": {"rate": "1bps", "limit": 1, "buffer": 1}}
    ids, addresses = {".": ["x/a"], ".Target": ["x/b"]}, {"x/a": "10.0.0.1", "x/b": "10.0.0.2"}
    here = podnetwork.control("x/name", spec, ids, addresses, "x/a")
    there = podnetwork.control("x/name", spec, ids, addresses, "x/b")
    assert [tc["ipset"] for tc in (*here["tcs"], *there["tcs"])] == ["name_set_batgt", "name_set_basrc"]
    assert podnetwork.control("x/name", {**spec, "direction": "to"}, ids, addresses, "x/b") == {}
