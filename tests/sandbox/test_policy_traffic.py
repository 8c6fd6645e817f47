"""NetworkPolicies between real pods on real machines, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dnslib
import pytest
from chaos_world import NS, World, condition_of, on
from nodes_world import PYTHON, host_pids, printed, sandbox

from sandbox.client import NAMESPACES, NETWORKCHAOS, NETWORKPOLICIES, PODS, SERVICES, ApiError, Obj
from sandbox.node import firewall, linux
from sandbox.node.network import PodNet
from sandbox.node.pod import Pod
from sandbox.node.resolver import CLUSTER_DNS
from sandbox.node.volumes import Place
from sandbox.options import COMPRESSED
from sandbox.up import Running

OTHER = "other"  # the namespace of pod c
HOMES = {"a": (NS, "node-a-1"), "b": (NS, "node-a-2"), "c": (OTHER, "node-a-1"), "d": (NS, "node-a-1")}
EVERY = {one + other for one in "abcd" for other in "abcd" if one != other}  # who may reach whom
PATIENCE = 0.4  # seconds for a connection; what is refused is dropped, and takes all of it

# Echoes on ports 8000 and 9000, by TCP and UDP.
ECHO = """
import selectors, socket
ready = selectors.DefaultSelector()
for port in (8000, 9000):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        sock = socket.socket(socket.AF_INET, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(('0.0.0.0', port))
        if kind == socket.SOCK_STREAM: sock.listen(128)
        ready.register(sock, selectors.EVENT_READ, kind)
while True:
    for key, _ in ready.select():
        sock = key.fileobj
        if key.data == socket.SOCK_DGRAM:
            data, peer = sock.recvfrom(100)
            sock.sendto(data, peer)
        elif key.data == socket.SOCK_STREAM:
            ready.register(sock.accept()[0], selectors.EVENT_READ, None)
        elif data := sock.recv(100):
            sock.sendall(data)
        else:
            ready.unregister(sock)
            sock.close()
"""


@dataclass(frozen=True, slots=True)
class Hand:
    """A hand in a pod's network namespace."""

    name: str
    address: str
    fd: int

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        made: list[socket.socket] = []

        def work() -> None:
            linux.setns(self.fd, linux.CLONE_NEWNET)
            made.append(socket.socket(socket.AF_INET, kind, protocol))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        made[0].settimeout(PATIENCE)
        return made[0]

    def reaches(self, address: str, port: int = 8000, *, udp: bool = False) -> bool:
        with self.socket(socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as sock:
            try:
                sock.connect((address, port))
                sock.sendall(b"?")
                return sock.recv(10) == b"?"
            except OSError:
                return False

    def resolves(self, name: str) -> bool:
        with self.socket(socket.SOCK_DGRAM) as sock:
            sock.connect((CLUSTER_DNS, 53))
            try:
                sock.send(dnslib.DNSRecord.question(name).pack())
                return bool(dnslib.DNSRecord.parse(sock.recv(512)).rr)
            except OSError:
                return False


@dataclass(frozen=True, slots=True)
class Cast:
    """The world, and the pods in it."""

    world: World
    hands: dict[str, Hand]

    def __getitem__(self, name: str) -> Hand:
        return self.hands[name]

    def pairs(self, port: int = 8000, *, udp: bool = False) -> set[str]:
        """Who reaches whom."""
        asked = sorted(EVERY)
        with ThreadPoolExecutor(len(asked)) as pool:
            found = pool.map(lambda pair: self[pair[0]].reaches(self[pair[1]].address, port, udp=udp), asked)
            return {pair for pair, ok in zip(asked, found, strict=True) if ok}

    async def settles(self, expected: set[str], port: int = 8000, *, udp: bool = False) -> None:
        seen: list[set[str]] = []

        async def probe() -> bool:
            seen[:] = [await asyncio.to_thread(self.pairs, port, udp=udp)]
            return seen[0] == expected

        try:
            await self.world.until("who reaches whom", probe)
        except AssertionError as late:
            raise AssertionError(f"{late}: {sorted(seen[0] ^ expected)} differ") from None

    async def eventually(self, what: str, look: Callable[[], bool]) -> None:
        async def probe() -> bool:
            return await asyncio.to_thread(look)

        await self.world.until(what, probe)

    @contextlib.asynccontextmanager
    async def policy(self, name: str = "p", namespace: str = NS, **spec: Any) -> AsyncIterator[None]:
        api = self.world.api
        body: Obj = {"podSelector": {}, **spec}
        await api.create(NETWORKPOLICIES, {"metadata": {"name": name}, "spec": body}, namespace)
        try:
            yield
        finally:
            with contextlib.suppress(ApiError):
                await api.delete(NETWORKPOLICIES, name, namespace)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("policy"), nodes_per_zone=2) as made:
        yield made


@pytest.fixture(scope="module")
def hands(running: Running) -> Iterator[dict[str, Hand]]:
    """Pods a and d on the first machine, b on the second, all of namespace default; c on the first, of another."""
    found: dict[str, Hand] = {}

    async def begin(one: World) -> None:
        await one.api.create(NAMESPACES, {"metadata": {"name": OTHER, "labels": {"team": "x"}}})
        for name, (namespace, node) in HOMES.items():
            found[name] = await enter(one, name, namespace, node)

    on(running, begin)
    yield found
    for hand in found.values():
        os.close(hand.fd)
    gc.collect()


async def enter(one: World, name: str, namespace: str, node: str) -> Hand:
    mark = f"hand-{secrets.token_hex(8)}"
    ports = [{"name": "http", "containerPort": 9000 if name == "b" else 8000}]
    container: Obj = {"name": "echo", "image": PYTHON, "args": ["python3", "-c", ECHO, mark], "ports": ports}
    container["readinessProbe"] = {"tcpSocket": {"port": 8000}, "periodSeconds": 1}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 1}
    await one.api.create(PODS, {"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}, namespace)

    async def ready() -> Obj | None:
        pod = await one.api.get(PODS, name, namespace)
        return pod if condition_of(pod, "Ready") == "True" else None

    pod = await one.until(f"{name} is Ready", ready)
    (pid,) = host_pids(mark)
    return Hand(name, pod["status"]["podIP"], os.open(f"/proc/{pid}/ns/net", os.O_RDONLY))


def play(running: Running, hands: dict[str, Hand], test: Callable[[Cast], Awaitable[None]]) -> None:
    """Without policies before; without policies after, and then everybody reaches everybody again."""

    async def main(one: World) -> None:
        cast = Cast(one, hands)
        await cast.settles(EVERY)
        await test(cast)
        await cast.settles(EVERY)

    on(running, main)


def app(*names: str) -> Obj:
    return {"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": list(names)}]}}


def but(*receivers: str) -> set[str]:
    """All pairs but those towards `receivers`."""
    return {pair for pair in EVERY if pair[1] not in receivers}


def test_a_default_deny_lets_nobody_in_but_the_machine(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        async with cast.policy():
            await cast.settles(but("a", "b", "d"))
            await cast.settles(but("a", "b", "d"), udp=True)
            probed = await enter(cast.world, "probed", NS, "node-a-1")  # Ready: its kubelet probes it
            os.close(probed.fd)
            await cast.world.delete(PODS, "probed")

    play(running, hands, test)


def test_rules_add_up_and_name_pods_by_label_and_namespace(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        team = {"namespaceSelector": {"matchLabels": {"team": "x"}}}
        async with cast.policy(), cast.policy("labels", **app("a", "b"), ingress=[{"from": [app("d")]}]):
            await cast.settles(but("a", "b", "d") | {"da", "db"})
            async with cast.policy("spaces", **app("a"), ingress=[{"from": [team]}]):
                await cast.settles(but("a", "b", "d") | {"da", "db", "ca"})
            both = {**team, **app("nobody")}
            async with cast.policy("both", **app("a", "b"), ingress=[{"from": [both]}]):
                await cast.settles(but("a", "b", "d") | {"da", "db"})
                await relabel(cast, PODS, "c", {"app": "nobody"}, OTHER)
                await cast.settles(but("a", "b", "d") | {"da", "db", "ca", "cb"})
                await relabel(cast, NAMESPACES, OTHER, {"team": "y"})
                await cast.settles(but("a", "b", "d") | {"da", "db"})
        await relabel(cast, PODS, "c", {"app": "c"}, OTHER)
        await relabel(cast, NAMESPACES, OTHER, {"team": "x"})

    play(running, hands, test)


async def relabel(cast: Cast, kind: Any, name: str, labels: Obj, namespace: str | None = None) -> None:
    await cast.world.api.patch(kind, name, {"metadata": {"labels": labels}}, namespace)


def test_a_pod_that_no_longer_fits_is_free_again(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        async with cast.policy(**app("a")):
            await cast.settles(but("a"))
            await relabel(cast, PODS, "a", {"app": "free"}, NS)
            await cast.settles(EVERY)
            await relabel(cast, PODS, "a", {"app": "a"}, NS)
            await cast.settles(but("a"))

    play(running, hands, test)


@pytest.mark.parametrize(
    ("ports", "on_8000", "on_9000", "by_udp"),
    [
        ([{"port": 8000}], "abd", "", ""),
        ([{"port": 8000, "protocol": "UDP"}], "", "", "abd"),
        ([{"port": 7990, "endPort": 8010}, {"port": 9000}], "abd", "abd", ""),
        ([{"port": "http"}], "ad", "b", ""),  # b calls another number so
        ([{"protocol": "UDP"}], "", "", "abd"),
    ],
)
def test_ports(
    running: Running, hands: dict[str, Hand], ports: list[Obj], on_8000: str, on_9000: str, by_udp: str
) -> None:
    async def test(cast: Cast) -> None:
        async with cast.policy(ingress=[{"ports": ports}]):
            for port, udp, open_ in ((8000, False, on_8000), (9000, False, on_9000), (8000, True, by_udp)):
                await cast.settles(but(*(set("abd") - set(open_))), port, udp=udp)

    play(running, hands, test)


def arrives(sender: Hand, receiver: Hand, port: int) -> bool:
    """Does an SCTP INIT get there? By raw packets: the kernel may not speak SCTP itself."""
    init = struct.pack("!HHII", 7000, port, 0, 0) + struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65535, 1, 1, 1)
    raw = socket.SOCK_RAW, socket.IPPROTO_SCTP
    with receiver.socket(*raw) as listener, sender.socket(*raw) as sock:
        sock.sendto(init, (receiver.address, 0))
        try:
            while packet := listener.recv(200):
                if packet.endswith(init):
                    return True
        except TimeoutError:
            pass
        return False


def test_sctp_is_a_protocol_of_its_own(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        a, b = cast["a"], cast["b"]
        await cast.eventually("SCTP flows", lambda: arrives(a, b, 8000) and arrives(a, b, 8001))
        async with cast.policy(**app("b"), ingress=[{"ports": [{"port": 8000, "protocol": "SCTP"}]}]):
            await cast.settles(but("b"))
            assert arrives(a, b, 8000) and not arrives(a, b, 8001)

    play(running, hands, test)


KUBE_DNS = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}


def test_egress_is_refused_dns_included(running: Running, hands: dict[str, Hand]) -> None:
    """Rules meet the endpoints behind cluster IPs: those of DNS, and those of Services."""
    name = "kubernetes.default.svc.cluster.local"

    async def test(cast: Cast) -> None:
        ports = [{"port": 80, "targetPort": 8000}]
        service = {"metadata": {"name": "b"}, "spec": {"selector": {"app": "b"}, "ports": ports}}
        virtual = (await cast.world.api.create(SERVICES, service, NS))["spec"]["clusterIP"]
        await cast.eventually("the Service works", lambda: cast["a"].reaches(virtual, 80))
        out = {pair for pair in EVERY if pair[0] != "a"}
        async with cast.policy(**app("a"), policyTypes=["Egress"]):
            await cast.settles(out)
            assert not cast["a"].resolves(name) and not cast["a"].reaches(virtual, 80)
            assert cast["d"].resolves(name)
            dns = [{"port": 53, "protocol": "UDP"}, {"port": 53}]
            async with cast.policy(
                "dns", **app("a"), policyTypes=["Egress"], egress=[{"to": [KUBE_DNS], "ports": dns}]
            ):
                await cast.eventually("names are resolved", lambda: cast["a"].resolves(name))
                assert not cast["a"].reaches(virtual, 80)
            async with cast.policy("b", **app("a"), policyTypes=["Egress"], egress=[{"to": [app("b")]}]):
                await cast.settles(out | {"ab"})
                assert cast["a"].reaches(virtual, 80) and not cast["a"].resolves(name)
            cluster_ip = [{"ipBlock": {"cidr": f"{virtual}/32"}}]
            async with cast.policy("vip", **app("a"), policyTypes=["Egress"], egress=[{"to": cluster_ip}]):
                await cast.settles(out)
                assert not cast["a"].reaches(virtual, 80), "a cluster IP is no peer"
        await cast.world.api.delete(SERVICES, "b", NS)

    play(running, hands, test)


def test_blocks_of_addresses_with_holes(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        block = {"cidr": "10.244.0.0/16", "except": [f"{cast['b'].address}/32"]}
        async with cast.policy(**app("a", "d"), ingress=[{"from": [{"ipBlock": block}]}]):
            await cast.settles(EVERY - {"ba", "bd"})
        async with cast.policy(**app("a"), policyTypes=["Egress"], egress=[{"to": [{"ipBlock": block}]}]):
            await cast.settles(EVERY - {"ab"})

    play(running, hands, test)


def test_a_pod_reaches_itself_also_through_its_service(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        ports = [{"port": 80, "targetPort": 8000}]
        service = {"metadata": {"name": "own"}, "spec": {"selector": {"app": "a"}, "ports": ports}}
        virtual = (await cast.world.api.create(SERVICES, service, NS))["spec"]["clusterIP"]
        await cast.eventually("the Service works", lambda: cast["a"].reaches(virtual, 80))
        async with cast.policy(policyTypes=["Ingress", "Egress"]):
            await cast.settles(set())
            assert cast["a"].reaches(virtual, 80) and cast["a"].reaches(cast["a"].address)
            assert not cast["d"].reaches(virtual, 80)
        await cast.world.api.delete(SERVICES, "own", NS)

    play(running, hands, test)


def test_established_connections_are_left_alone(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        with cast["a"].socket() as before:
            before.connect((cast["b"].address, 8000))
            async with cast.policy(policyTypes=["Ingress", "Egress"]):
                await cast.settles(set())
                before.sendall(b"still")
                assert before.recv(10) == b"still"

    play(running, hands, test)


def test_a_policy_and_a_partition_are_healed_each_by_itself(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        one, deny = cast.world, but("a")
        cut = EVERY - {"ab", "ba"}
        async with cast.policy(**app("a")):
            await one.partition("cut", "a", "b", "both")
            await one.injected(NETWORKCHAOS, "cut")
            await cast.settles(cut & deny)
            await one.delete(NETWORKCHAOS, "cut")  # gone once it is recovered
            await cast.settles(deny)
            await one.partition("again", "a", "b", "both")
            await one.injected(NETWORKCHAOS, "again")
            await cast.settles(cut & deny)
        await cast.settles(cut)
        await one.delete(NETWORKCHAOS, "again")

    play(running, hands, test)


FIRST = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 8000), timeout=0.4).close()
    print('reached')
except OSError as error: print(type(error).__name__)
"""


async def said(running: Running, cast: Cast, name: str, target: str) -> list[str]:
    """What the first things that run in a pod (an init container, a container) find."""
    args = ["python3", "-c", FIRST, cast[target].address]
    containers = [{"name": "init", "image": PYTHON, "args": args}], [{"name": "main", "image": PYTHON, "args": args}]
    spec = {
        "nodeName": "node-a-1",
        "restartPolicy": "Never",
        "initContainers": containers[0],
        "containers": containers[1],
    }
    await cast.world.api.create(PODS, {"metadata": {"name": name, "labels": {"app": "late"}}, "spec": spec}, NS)

    async def over() -> bool:
        return (await cast.world.api.get(PODS, name, NS))["status"].get("phase") in ("Succeeded", "Failed")

    await cast.world.until(f"{name} is over", over)
    found = [(await printed(running, name, container)).strip() for container in ("init", "main")]
    await cast.world.delete(PODS, name)
    return found


def test_a_pod_that_starts_later_is_covered_from_its_first_packet(running: Running, hands: dict[str, Hand]) -> None:
    async def test(cast: Cast) -> None:
        assert await said(running, cast, "free", "d") == ["reached"] * 2
        async with cast.policy(**app("late", "a"), policyTypes=["Egress"]):
            await cast.settles({pair for pair in EVERY if pair[0] != "a"})
            for number in range(3):
                assert await said(running, cast, f"late-{number}", "d") == ["TimeoutError"] * 2

    play(running, hands, test)


def test_a_machine_that_boots_again_enforces_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its rules went with its network; they are there before its pods run."""

    async def test(one: World) -> None:
        victim = await enter(one, "a", NS, "node-a-1")
        asker = await enter(one, "b", NS, "node-a-2")
        cast = Cast(one, {"a": victim, "b": asker})
        async with cast.policy(**app("a")):
            await cast.eventually("a is denied", lambda: not asker.reaches(victim.address))
            Place(Path(running_.state_dir) / "nodes" / "node-a-1").sysrq.write_text("b")

            async def again() -> str:
                pod = await one.api.get(PODS, "a", NS)
                (status,) = pod["status"]["containerStatuses"]
                fresh = status["restartCount"] and condition_of(pod, "Ready") == "True"
                return str(pod["status"]["podIP"]) if fresh else ""

            address = await one.until("a runs again", again)
            assert not asker.reaches(address)
        await cast.eventually("a is free", lambda: asker.reaches(address))
        for hand in (victim, asker):
            os.close(hand.fd)

    with sandbox(tmp_path_factory.mktemp("reboot"), nodes_per_zone=2) as running_:
        on(running_, test)


# — what goes wrong —


def test_what_is_no_policy_is_refused(running: Running) -> None:
    async def test(one: World) -> None:
        rule = {"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}
        policy = {"metadata": {"name": "bad"}, "spec": {"podSelector": {}, "ingress": [rule]}}
        with pytest.raises(ApiError, match="must be a valid CIDR") as refused:
            await one.api.create(NETWORKPOLICIES, policy, NS)
        assert refused.value.code == 422

    on(running, test)


def test_a_pod_waits_until_it_is_known_what_holds_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either there are no policies, or they are in force; an API that is silent says neither."""

    async def main() -> None:
        made: Any = firewall.Firewall(None, list)  # type: ignore[arg-type]
        monkeypatch.setattr(firewall, "_PATIENCE_SECONDS", 0.01)
        with pytest.raises(firewall.NotCovered, match="not in force"):
            await made.cover("uid")
        made._policies.synced.set()
        await made.cover("uid")
        made._policies.objects = {("default", "p"): {}}
        with pytest.raises(firewall.NotCovered):
            await made.cover("uid")

    asyncio.run(main())


def test_nothing_of_a_pod_runs_before_its_rules_are_in_force(tmp_path: Path) -> None:
    """Its volumes come next, then its containers; it tells why it waits, and tries again."""
    done: list[str] = []
    covers = iter([firewall.NotCovered("not yet"), None])

    async def cover(uid: str) -> None:
        done.append(f"cover {uid}")
        if why := next(covers):
            raise why

    async def prepare() -> None:
        done.append("volumes")

    async def main() -> None:
        agent: Any = SimpleNamespace(
            place=Place(tmp_path), api=None, clocks=COMPRESSED, address="10.245.0.2",
            networks=SimpleNamespace(create=lambda: PodNet(-1, "10.244.1.2", "gd0")),
            machine=SimpleNamespace(group=None), firewall=SimpleNamespace(cover=cover),
            recorder=SimpleNamespace(record=lambda about, kind, reason, message, container: done.append(message)),
        )  # fmt: skip
        one = Pod(agent, {"metadata": {"uid": "u", "name": "n", "namespace": NS}, "spec": {"containers": []}})
        one.volumes = SimpleNamespace(prepare=prepare)  # type: ignore[assignment]
        assert await one._set_up()

    asyncio.run(main())
    assert done == ["cover u", "not yet", "cover u", "volumes"]
