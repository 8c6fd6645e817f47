"""Partitions between real network namespaces, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from chaos_world import ADDRESSES, EVERY, NS, Net, World, net, node, placed, play, records, with_pods

from sandbox.chaos import rules
from sandbox.chaos.controller import CLEAN_FINALIZER, FINALIZER
from sandbox.client import NETWORKCHAOS, PODNETWORKCHAOS, PODS, Obj


def reach(made: Net) -> set[str]:
    """Which of a, b, c get datagrams through to which, as "ab"."""
    pairs = [(one, other) for one in ADDRESSES for other in ADDRESSES if one != other]
    return {one + other for one, other in pairs if made.udp(one, other, ADDRESSES[other])}


@pytest.mark.parametrize(
    ("direction", "target", "cut"),
    [
        ("to", "b", {"ab"}),
        ("from", "b", {"ba"}),
        ("both", "b", {"ab", "ba"}),
        ("to", None, {"ab", "ac"}),
        ("from", None, {"ba", "ca"}),
        ("both", None, {"ab", "ac", "ba", "ca"}),
    ],
)
def test_partition_cuts_its_direction_and_recovers(direction: str, target: str | None, cut: set[str]) -> None:
    async def test(one: World, made: Net) -> None:
        assert reach(made) == EVERY
        await one.partition("cut", "a", target, direction)
        await one.injected(NETWORKCHAOS, "cut")
        assert reach(made) == EVERY - cut
        await one.delete(NETWORKCHAOS, "cut")
        assert reach(made) == EVERY
        assert [made.table(name) for name in ADDRESSES] == ["", "", ""]

    with_pods(test)


def test_partition_is_in_force_on_both_sides() -> None:
    """Each side alone would cut, so that a failing daemon on one node does not open the cut."""

    async def test(one: World, made: Net) -> None:
        await one.partition("cut", "a", "b", "to")
        await one.injected(NETWORKCHAOS, "cut")
        assert f"ip daddr @s0v4 drop" in made.table("a")  # noqa: F541
        assert "ip saddr @s0v4 drop" in made.table("b")
        assert made.table("c") == ""

    with_pods(test)


def test_partition_by_external_targets() -> None:
    async def test(one: World, made: Net) -> None:
        await one.partition("cut", "a", None, "to", externalTargets=["10.9.0.4", "10.9.0.3:9"])
        await one.injected(NETWORKCHAOS, "cut")
        assert reach(made) == EVERY - {"ac"}, "b is cut off on port 9 only"
        with made.socket("a") as sender, pytest.raises(PermissionError):
            sender.sendto(b"x", ("10.9.0.3", 9))

    with_pods(test)


def test_two_partitions_on_one_pod_union() -> None:
    async def test(one: World, made: Net) -> None:
        await one.partition("first", "a", "b", "to")
        await one.partition("second", "a", "c", "both")
        await one.injected(NETWORKCHAOS, "first")
        await one.injected(NETWORKCHAOS, "second")
        assert reach(made) == EVERY - {"ab", "ac", "ca"}
        await one.delete(NETWORKCHAOS, "first")
        assert reach(made) == EVERY - {"ac", "ca"}
        await one.delete(NETWORKCHAOS, "second")
        assert reach(made) == EVERY

    with_pods(test)


def test_established_connection_hangs_and_resumes() -> None:
    async def test(one: World, made: Net) -> None:
        listener = made.socket("b", socket.SOCK_STREAM)
        client = made.socket("a", socket.SOCK_STREAM)
        listener.bind((ADDRESSES["b"], 8000))
        listener.listen()
        client.connect((ADDRESSES["b"], 8000))
        server, _ = listener.accept()
        server.settimeout(0.3)
        client.sendall(b"before")
        assert server.recv(16) == b"before"
        await one.partition("cut", "a", "b", "both")
        await one.injected(NETWORKCHAOS, "cut")
        client.sendall(b"during")  # no reset: the sender's kernel keeps trying
        with pytest.raises(TimeoutError):
            server.recv(16)
        await one.delete(NETWORKCHAOS, "cut")
        server.settimeout(10)  # TCP's back-off decides
        assert await asyncio.to_thread(server.recv, 16) == b"during"
        for end in (listener, client, server):
            end.close()

    with_pods(test)


def test_host_network_pod_is_never_injected_and_undeletable() -> None:
    async def test(one: World, made: Net) -> None:
        await one.pod("host", ip="10.9.0.9", hostNetwork=True)
        await one.partition("cut", "host", None, "to")
        found = await one.noted(NETWORKCHAOS, "cut", "hostNetwork")
        assert [record["phase"] for record in records(found)] == ["Not Injected/Wait"]
        assert found["status"]["experiment"]["desiredPhase"] == "Run"
        assert {event["operation"] for event in records(found)[0]["events"]} == {"Apply"}
        await one.api.delete(NETWORKCHAOS, "cut", NS)
        forced = {"metadata": {"annotations": {"chaos-mesh.chaos-mesh.org/cleanFinalizer": "forced"}}}
        await one.api.patch(NETWORKCHAOS, "cut", forced, NS)

        async def tried_again() -> bool:
            events = records(await one.api.get(NETWORKCHAOS, "cut", NS))[0]["events"]
            return len(events) > len(records(found)[0]["events"])

        await one.until("another failure after the deletion", tried_again)
        await one.api.patch(NETWORKCHAOS, "cut", {"metadata": {"finalizers": []}}, NS)
        await one.gone(NETWORKCHAOS, "cut")

    with_pods(test)


def test_same_name_in_two_namespaces_is_refused_not_mixed_up() -> None:
    entry = {"name": "OUTPUT/cut", "direction": "output", "ipsets": None}
    with pytest.raises(rules.Unsupported, match="one/cut and two/cut both make OUTPUT/cut"):
        rules.script({"iptables": [{**entry, "source": "one/cut"}, {**entry, "source": "two/cut"}]})


@pytest.mark.parametrize("device", ['eth0" accept; #', "", "x" * 16, "a b"])
def test_device_cannot_smuggle_commands(device: str) -> None:
    spec = {"iptables": [{"name": "n", "source": "s/n", "direction": "input", "device": device, "ipsets": None}]}
    if device == "":
        assert 'iifname "eth0" drop' in rules.script(spec)
    else:
        with pytest.raises(rules.Unsupported, match="no interface name"):
            rules.script(spec)


def test_pod_born_later_is_not_cut_and_a_gone_pod_counts_as_recovered() -> None:
    async def test(one: World, made: Net) -> None:
        await one.partition("cut", "a", "b", "to")
        await one.injected(NETWORKCHAOS, "cut")
        await one.api.delete(PODS, "b", NS, grace=0)
        later = await one.pod("b", ip=ADDRESSES["c"])
        made.uids[later["metadata"]["uid"]] = made.fds["c"]
        assert made.udp("a", "c", ADDRESSES["c"]), "no re-injection into a replacement"
        await one.delete(NETWORKCHAOS, "cut")
        assert made.table("a") == ""

    with_pods(test)


def test_zone_of_eight_pods_is_cut_within_a_second() -> None:
    async def main(one: World) -> None:
        names = {f"p{number}": f"10.9.0.{number + 2}" for number in range(8)}
        with net(**names) as made:
            for name, address in names.items():
                pod = await one.pod(name, ip=address, node=f"n{int(name[1:]) % 4}")
                made.uids[pod["metadata"]["uid"]] = made.fds[name]
            async with node(one, made, "n0"), node(one, made, "n1"), node(one, made, "n2"), node(one, made, "n3"):
                start = time.process_time()  # everything runs in this process; the machine's load is not ours
                zone = {"namespaces": [NS], "pods": {NS: sorted(names)[:4]}}
                rest = {"namespaces": [NS], "pods": {NS: sorted(names)[4:]}}
                spec = {"action": "partition", "mode": "all", "selector": zone, "direction": "both"}
                await one.chaos(NETWORKCHAOS, "zone", {**spec, "target": {"mode": "all", "selector": rest}})
                found = await one.injected(NETWORKCHAOS, "zone")
                took = time.process_time() - start
                assert len(records(found)) == 8
                assert not made.udp("p0", "p7", names["p7"])
                assert made.udp("p0", "p1", names["p1"])
                assert took <= 1.0

    play(main)


def test_daemon_restarted_realises_what_stands() -> None:
    async def test(one: World, made: Net) -> None:
        await one.partition("cut", "a", "b", "to")
        await one.injected(NETWORKCHAOS, "cut")
        made.run("a", "nft", "flush", "ruleset")
        async with node(one, made):

            async def back() -> bool:
                return "drop" in made.table("a")

            await one.until("the rules are back", back)

    with_pods(test)


def test_daemon_that_does_not_answer_is_reported() -> None:
    async def main(one: World) -> None:
        await one.pod("a", ip="10.9.0.2", node="dead")
        await one.partition("cut", "a", None, "to")
        found = await one.noted(NETWORKCHAOS, "cut", "the chaos daemon on node dead does not answer")
        assert records(found)[0]["phase"] == "Not Injected/Wait"

    play(main)


def test_a_cut_outlives_a_dead_daemon_and_cannot_be_deleted_until_it_is_back() -> None:
    """The object is stuck by its finalizer, with Failed/Recover records; force does not help (facts/chaos-mesh.md)."""

    async def main(one: World) -> None:
        async with placed(one, **ADDRESSES) as made:
            async with node(one, made):
                await one.partition("cut", "a", "b", "to")
                await one.injected(NETWORKCHAOS, "cut")
            await one.api.delete(NETWORKCHAOS, "cut", NS)
            await one.noted(NETWORKCHAOS, "cut", "the chaos daemon on node n1 does not answer")
            force = {"metadata": {"annotations": {CLEAN_FINALIZER: "forced"}}}
            before = records(await one.api.patch(NETWORKCHAOS, "cut", force, NS))

            async def again() -> Obj | None:
                now = await one.api.get(NETWORKCHAOS, "cut", NS)
                return now if len(records(now)[0]["events"]) > len(before[0]["events"]) else None

            found = await one.until("it fails again", again)
            assert {record["phase"] for record in records(found)} == {"Injected/Wait"}
            assert any(event["operation"] == "Recover" for event in records(found)[0]["events"])
            assert found["metadata"]["finalizers"] == [FINALIZER] and not made.udp("a", "b", ADDRESSES["b"])
            async with node(one, made):
                await one.gone(NETWORKCHAOS, "cut")
                assert made.udp("a", "b", ADDRESSES["b"])

    play(main)


def test_a_stuck_object_goes_when_its_finalizers_are_taken_away() -> None:
    async def main(one: World) -> None:
        await one.pod("a", ip="10.9.0.2", node="dead")
        await one.partition("cut", "a", None, "to")
        await one.noted(NETWORKCHAOS, "cut", "does not answer")
        await one.api.delete(NETWORKCHAOS, "cut", NS)
        assert (await one.api.get(NETWORKCHAOS, "cut", NS))["metadata"]["finalizers"] == [FINALIZER]
        await one.api.patch(NETWORKCHAOS, "cut", {"metadata": {"finalizers": []}}, NS)
        await one.gone(NETWORKCHAOS, "cut")

    play(main)


def test_podnetworkchaos_belongs_to_its_pod_and_is_emptied() -> None:
    async def test(one: World, made: Net) -> None:
        await one.partition("cut", "a", "b", "to")
        await one.injected(NETWORKCHAOS, "cut")
        found = await one.api.get(PODNETWORKCHAOS, "a", NS)
        pod = await one.api.get(PODS, "a", NS)
        assert [owner["uid"] for owner in found["metadata"]["ownerReferences"]] == [pod["metadata"]["uid"]]
        assert {entry["source"] for entry in found["spec"]["iptables"]} == {f"{NS}/cut"}
        assert found["status"]["observedGeneration"] == found["metadata"]["generation"]
        await one.delete(NETWORKCHAOS, "cut")
        emptied = await one.api.get(PODNETWORKCHAOS, "a", NS)
        assert emptied["spec"] == {}

    with_pods(test)
