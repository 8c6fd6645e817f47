"""The network between pods, over real sockets: Services, cluster DNS, and machines that fall silent."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import dnslib
import pytest
from nodes_world import PYTHON, Life, api_of, eventually, living, pod, printed, sandbox

from sandbox import dns
from sandbox.chaos.traffic import Netem, Rule
from sandbox.client import ENDPOINTSLICES, NODES, SERVICES, HttpApi, Obj
from sandbox.node import latency, resolver
from sandbox.node.services import Port, addresses, ports, script, variables
from sandbox.up import Running

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("state") / "s", nodes_per_zone=2) as found:
        yield found


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


# Says who it is to whoever connects, once per line that it gets.
WHO = """
import os, socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for _ in self.rfile:
            self.wfile.write((os.environ['HOSTNAME'] + ' ' + self.client_address[0] + '\\n').encode())
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(('0.0.0.0', 8000), Handler).serve_forever()
"""
READY = {"tcpSocket": {"port": 8000}, "periodSeconds": 1, "failureThreshold": 1}


def who(name: str, node: str = "node-a-1", **labels: str) -> Obj:
    made = pod(name, {"args": ["python3", "-c", WHO], "readinessProbe": READY}, nodeName=node)
    made["metadata"]["labels"] = labels
    made["spec"]["terminationGracePeriodSeconds"] = 1
    return made


def client(name: str, code: str, node: str = "node-a-1") -> Obj:
    args = ["python3", "-u", "-c", f"import socket, sys, time\n{code}"]
    return pod(name, {"image": PYTHON, "args": args}, nodeName=node, restartPolicy="Never")


async def said(running: Running, manifest: Obj) -> list[str]:
    """What a pod that runs once has printed."""
    async with living(running, manifest) as life:
        await life.until(lambda s: s.status.get("phase") in ("Succeeded", "Failed"), within=20)
        return (await printed(running, life.name)).splitlines()


@asynccontextmanager
async def service(
    running: Running, name: str, selector: Obj | None, port: int = 80, **spec: object
) -> AsyncIterator[str]:
    """A Service, and its cluster IP."""
    body: Obj = {"selector": selector, "ports": [{"port": port, "targetPort": 8000}], **spec}
    async with api_of(running) as api:
        made = await api.create(SERVICES, {"metadata": {"name": name, "namespace": "default"}, "spec": body}, "default")
        try:
            yield made["spec"]["clusterIP"]
        finally:
            await api.delete(SERVICES, name, "default")


async def endpoints(api: HttpApi, name: str) -> list[str]:
    slices, _ = await api.list(ENDPOINTSLICES, "default", labels=f"kubernetes.io/service-name={name}")
    return [address for address, _ in addresses(slices, "")]


async def settled(api: HttpApi, name: str, count: int) -> bool:
    async def look() -> bool:
        return len(await endpoints(api, name)) == count

    return bool(await eventually(look, within=10))


@asynccontextmanager
async def pods(running: Running, manifests: Sequence[Obj]) -> AsyncIterator[list[Life]]:
    async with AsyncExitStack() as stack:
        lives = [await stack.enter_async_context(living(running, manifest)) for manifest in manifests]
        for life in lives:
            await life.until(lambda s: s.ready)
        yield lives


ASK = """
def ask(host, port, patience=2):
    with socket.create_connection((host, port), timeout=patience) as sock:
        sock.sendall(b'\\n')
        return sock.recv(100).decode().strip()
"""


def test_a_service_spreads_connections_over_its_endpoints_and_follows_them(running: Running) -> None:
    async def scenario() -> None:
        members = [who("who-1", app="who"), who("who-2", "node-a-2", app="who")]
        async with service(running, "who", {"app": "who"}) as address, pods(running, members) as (first, second):
            await settled(first.api, "who", 2)
            lines = await said(running, client("asker", f"{ASK}\nfor _ in range(60): print(ask('{address}', 80))"))
            assert {line.split()[0] for line in lines} == {"who-1", "who-2"}
            asker = {line.split()[1] for line in lines}
            assert len(asker) == 1 and asker.pop().startswith("10.244.1."), "endpoints see the pod's own address"
            await second.delete()
            await settled(first.api, "who", 1)
            lines = await said(running, client("again", f"{ASK}\nfor _ in range(30): print(ask('{address}', 80))"))
            assert {line.split()[0] for line in lines} == {"who-1"}

    asyncio.run(scenario())


def test_a_service_without_endpoints_refuses(running: Running) -> None:
    async def scenario() -> None:
        async with service(running, "empty", {"app": "nobody"}) as address:
            code = f"{ASK}\ntry: print(ask('{address}', 80))\nexcept OSError as error: print(type(error).__name__)"
            assert await said(running, client("refused", code)) == ["ConnectionRefusedError"]

    asyncio.run(scenario())


def test_a_pod_reaches_itself_through_its_service(running: Running) -> None:
    async def scenario() -> None:
        async with service(running, "own", {"app": "own"}) as address:
            code = f"{WHO.replace('.serve_forever()', '')}"
            code = code.replace("socketserver.ThreadingTCPServer((", "server = socketserver.ThreadingTCPServer((")
            code += f"""
import socket, threading, time
threading.Thread(target=server.serve_forever, daemon=True).start()
end = time.monotonic() + 10
while time.monotonic() < end:
    try:
        with socket.create_connection(('{address}', 80), timeout=1) as sock:
            sock.sendall(b'\\n')
            print(sock.recv(100).decode().split()[0], flush=True)
        break
    except OSError:
        time.sleep(0.05)
time.sleep(60)
"""
            manifest = pod("own", {"args": ["python3", "-c", code]})
            manifest["metadata"]["labels"] = {"app": "own"}
            async with living(running, manifest) as life:
                await life.until(lambda s: s.ready)

                async def reached() -> bool:
                    return "own" in await printed(running, "own")

                assert await eventually(reached, within=10)

    asyncio.run(scenario())


def test_names_of_services_and_of_headless_endpoints(running: Running) -> None:
    async def scenario() -> None:
        member = who("named-0", app="named")
        member["spec"] |= {"hostname": "named-0", "subdomain": "bare"}
        async with (
            service(running, "named", {"app": "named"}) as address,
            service(running, "bare", {"app": "named"}, port=8000, clusterIP="None"),
            pods(running, [member]) as (life,),
        ):
            await settled(life.api, "named", 1)
            await settled(life.api, "bare", 1)
            own = life.seen[-1].status["podIP"]
            code = """
def look(name):
    try: print(socket.gethostbyname(name))
    except OSError as error: print(error.errno == socket.EAI_NONAME)
for name in ('named', 'named.default', 'named.default.svc.cluster.local', 'bare', 'named-0.bare'): look(name)
for name in ('kubernetes', 'nobody', 'example.com'): look(name)
with socket.create_connection(('named.default.svc', 80), timeout=2) as sock: print(sock.getpeername()[0])
"""
            lines = await said(running, client("resolver", code))
            assert lines == [address] * 3 + [own] * 2 + ["10.96.0.1", "True", "True", address]

    asyncio.run(scenario())


def test_the_api_is_reached_by_its_service(running: Running) -> None:
    async def scenario() -> None:
        code = """
import os, ssl
directory = '/var/run/secrets/kubernetes.io/serviceaccount'
context = ssl.create_default_context(cafile=directory + '/ca.crt')
where = (os.environ['KUBERNETES_SERVICE_HOST'], int(os.environ['KUBERNETES_SERVICE_PORT']))
with context.wrap_socket(socket.create_connection(where, timeout=5), server_hostname='kubernetes.default.svc') as sock:
    print(sock.version(), *where)
"""
        assert await said(running, client("api", code)) == ["TLSv1.3 10.96.0.1 443"]

    asyncio.run(scenario())


# Connects, says so, and tells what becomes of the connection: silence, an end, or a reset.
HOLD = """
sock = socket.create_connection((sys.argv[1], 8000), timeout=5)
print('connected', flush=True)
sock.settimeout(float(sys.argv[2]))
try: print('ended' if sock.recv(1) == b'' else 'data')
except TimeoutError: print('silent')
except OSError: print('reset')
"""


def holder(name: str, address: str, patience: float) -> Obj:
    made = client(name, HOLD)
    made["spec"]["containers"][0]["args"] += [address, str(patience)]
    return made


async def connected(running: Running, life: Life) -> None:
    async def look() -> bool:
        return "connected" in await printed(running, life.name)

    assert await eventually(look, within=10)


async def outcome(running: Running, life: Life) -> str:
    await life.until(lambda s: s.status.get("phase") in ("Succeeded", "Failed"), within=20)
    return (await printed(running, life.name)).splitlines()[-1]


def test_a_pod_that_is_killed_is_heard_of(running: Running) -> None:
    """The opposite of the next one: a dead process's kernel ends its connections."""

    async def scenario() -> None:
        async with (
            pods(running, [who("killed", "node-a-2")]) as (victim,),
            living(running, holder("hears", victim.seen[-1].status["podIP"], 15)) as life,
        ):
            await connected(running, life)
            await victim.delete(grace=0)
            assert await outcome(running, life) in ("ended", "reset")

    asyncio.run(scenario())


def test_a_machine_that_loses_power_falls_silent(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No FIN, no RST, no ICMP: open connections hang, new ones time out."""

    async def scenario(running: Running) -> None:
        async with pods(running, [who("lost", "node-a-2")]) as (victim,):
            address = victim.seen[-1].status["podIP"]
            async with living(running, holder("waits", address, 5)) as life:
                await connected(running, life)
                await victim.api.delete(NODES, "node-a-2")  # the provider takes the machine away
                assert await outcome(running, life) == "silent"
            code = f"{ASK}\ntry: print(ask('{address}', 8000, 4))\nexcept OSError as error: print(type(error).__name__)"
            assert await said(running, client("late", code)) == ["TimeoutError"]

    with sandbox(tmp_path_factory.mktemp("state") / "s", nodes_per_zone=2) as found:
        asyncio.run(scenario(found))


def test_a_pod_that_is_gone_from_a_living_machine_is_unreachable(running: Running) -> None:
    """As on CNI's bridge: its machine finds no neighbour of that address, and says so."""

    async def scenario() -> None:
        code = f"{ASK}\ntry: print(ask('10.244.2.251', 8000, 9))\nexcept OSError as error: print(error.errno)"
        assert await said(running, client("nobody", code)) == ["113"]

    asyncio.run(scenario())


# — pure —


def slice_of(service: str, *states: Obj, port: int = 8000, name: str = "") -> Obj:
    made = [{"addresses": [f"10.244.1.{number}"], "conditions": state} for number, state in enumerate(states, 2)]
    labels = {"kubernetes.io/service-name": service}
    meta = {"name": f"{service}-x", "namespace": "default", "labels": labels}
    return {"metadata": meta, "endpoints": made, "ports": [{"name": name, "port": port}]}


ON, OFF = {"ready": True}, {"ready": False, "serving": False}
ENDING = {"ready": False, "serving": True, "terminating": True}


def test_endpoints_that_get_connections() -> None:
    assert addresses([slice_of("s", ON, OFF, ENDING)], "") == [("10.244.1.2", 8000)]
    assert addresses([slice_of("s", OFF, ENDING)], "") == [("10.244.1.3", 8000)], "rather than none"
    assert addresses([slice_of("s", OFF)], "") == []
    assert addresses([slice_of("s", ON, name="http")], "") == [], "ports go by name"
    assert addresses([{**slice_of("s", ON), "endpoints": None, "ports": None}], "") == []


def svc(name: str, address: str, **spec: object) -> Obj:
    meta = {"name": name, "namespace": "default"}
    return {"metadata": meta, "spec": {"clusterIP": address, "ports": [{"port": 80}], **spec}}


def test_ports_of_services() -> None:
    found = ports([svc("s", "10.96.0.7", sessionAffinity="ClientIP"), svc("bare", "None")], [slice_of("s", ON)])
    assert found == [Port("10.96.0.7", "tcp", 80, (("10.244.1.2", 8000),), sticky=True)]
    text = script([*found, Port("10.96.0.8", "udp", 53, ())])
    assert "10.96.0.7 . tcp . 80 : goto s0" in text and "{ 10.96.0.8 . udp . 53 } reject" in text
    assert "jhash" in script([Port("10.96.0.7", "tcp", 80, (("10.1.1.1", 1), ("10.1.1.2", 1)), sticky=True)])


def test_environment_of_services() -> None:
    master = {**svc("kubernetes", "10.96.0.1"), "metadata": {"name": "kubernetes", "namespace": "default"}}
    mine = svc("my-db", "10.96.0.9", ports=[{"port": 5432, "name": "sql"}])
    assert variables([master, mine], "elsewhere").keys() & {"MY_DB_SERVICE_HOST", "KUBERNETES_SERVICE_HOST"} == {
        "KUBERNETES_SERVICE_HOST"
    }
    found = variables([master, mine], "default")
    assert found["MY_DB_SERVICE_PORT_SQL"] == "5432" and found["MY_DB_PORT"] == "tcp://10.96.0.9:5432"


def ask(name: str, kind: str = "A", services_: Sequence[Obj] = (), slices: Sequence[Obj] = ()) -> dnslib.DNSRecord:
    return dns.answer(dnslib.DNSRecord.question(name, kind), dns.names(services_, slices))


def test_dns_answers() -> None:
    cluster = [
        svc("web", "10.96.0.7", ports=[{"port": 80, "name": "http"}]),
        svc("bare", "None"),
        {
            "metadata": {"name": "away", "namespace": "default"},
            "spec": {"type": "ExternalName", "externalName": "x.org"},
        },
    ]
    slices = [slice_of("bare", ON, OFF, name="sql", port=5432)]

    def look(name: str, kind: str = "A") -> tuple[int, list[str]]:
        reply = ask(name, kind, cluster, slices)
        return reply.header.rcode, [str(rr.rdata) for rr in reply.rr]

    assert look("web.default.svc.cluster.local") == (0, ["10.96.0.7"])
    assert look("WEB.default.svc.cluster.local") == (0, ["10.96.0.7"])
    assert look("web.default.svc.cluster.local", "AAAA") == (0, []), "it exists, but has none"
    assert look("bare.default.svc.cluster.local") == (0, ["10.244.1.2"]), "ready ones only"
    assert look("10-244-1-2.bare.default.svc.cluster.local") == (0, ["10.244.1.2"])
    assert look("_http._tcp.web.default.svc.cluster.local", "SRV") == (0, ["0 100 80 web.default.svc.cluster.local."])
    assert look("_sql._tcp.bare.default.svc.cluster.local", "SRV")[1] == [
        "0 100 5432 10-244-1-2.bare.default.svc.cluster.local."
    ]
    assert look("away.default.svc.cluster.local") == (0, ["x.org."])
    assert look("default.svc.cluster.local") == (0, []) and look("nobody.default.svc.cluster.local") == (3, [])
    assert look("example.com") == (3, [])


def test_resolver_files() -> None:
    assert resolver.resolv_conf({}, "llm") == (
        "search llm.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
    )
    config = {"nameservers": ["10.0.0.1"], "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}]}
    own = resolver.resolv_conf({"dnsPolicy": "None", "dnsConfig": config}, "llm")
    assert own == "search a.b\nnameserver 10.0.0.1\noptions ndots:2\n"
    assert resolver.resolv_conf({"dnsPolicy": "Default"}, "llm") == "nameserver 127.0.0.1\n"
    aliases = [{"ip": "10.1.1.1", "hostnames": ["db", "db.example"]}]
    shown = resolver.hosts({"hostAliases": aliases, "subdomain": "bare"}, "web-0", "llm", "10.244.1.2")
    assert "10.1.1.1\tdb\tdb.example" in shown and "10.244.1.2\tweb-0.bare.llm.svc.cluster.local\tweb-0" in shown


# — latency between zones —

RTT = f"{ASK}\nfor _ in range(3):\n    t = time.monotonic(); ask(sys.argv[1], 8000); print(time.monotonic() - t)"


def test_zones_are_as_far_from_each_other_as_asked(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two round trips (connect, ask) at twice 30 ms each to the other zone; none of that within a zone."""

    async def scenario(running: Running) -> None:
        members = [who("near", "node-a-2"), who("far", "node-b-1")]
        async with pods(running, members) as (near, far):
            took = {}
            for life in (near, far):
                asker = client(f"to-{life.name}", RTT)
                asker["spec"]["containers"][0]["args"].append(life.seen[-1].status["podIP"])
                took[life.name] = min(map(float, await said(running, asker)))
            assert took["far"] >= 0.120 > took["near"]

    with sandbox(
        tmp_path_factory.mktemp("state") / "s", nodes_per_zone=2, zones=("a", "b"), zone_latency_ms=30
    ) as found:
        asyncio.run(scenario(found))


def test_latency_is_towards_other_zones_only() -> None:
    def node(name: str, zone: str, index: int) -> Obj:
        status = {
            "addresses": [{"type": "InternalIP", "address": f"10.245.0.{index}"}, {"type": "Hostname", "address": name}]
        }
        meta = {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}
        return {"metadata": meta, "spec": {"podCIDRs": [f"10.244.{index}.0/24"]}, "status": status}

    (rule,) = latency.rules([node("a", "a", 1), node("b", "b", 2)], "a", 0.01)
    assert rule == Rule(Netem(delay=0.01), (("10.244.2.0/24", 0), ("10.245.0.2/32", 0)))
    assert latency.rules([node("a", "a", 1)], "a", 0.01) == []
