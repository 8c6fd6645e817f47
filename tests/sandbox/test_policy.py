"""What NetworkPolicies allow: tables, and every policy against a judge that looks at one packet at a time."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from sandbox.apiserver.policies import network_policy
from sandbox.client import Obj
from sandbox.node.firewall import DNS, script
from sandbox.node.network import ROUTER
from sandbox.node.policy import EVERYBODY, Allow, Isolation, Peer, Rules, isolation, network, peer

NAMESPACES = {"llm": {"team": "ml"}, "web": {"team": "web"}, "kube-system": {}}
WEB = frozenset({("TCP", "http", 8000), ("UDP", "http", 8001)})
ENGINE = Peer("llm", {"app": "engine", "zone": "a"}, "10.244.1.2", WEB)
GATEWAY = Peer("llm", {"app": "gateway"}, "10.244.2.2", frozenset({("TCP", "http", 9000)}))
STRANGER = Peer("web", {"app": "gateway"}, "10.244.3.2")
PODS = [ENGINE, GATEWAY, STRANGER, DNS]


def policy(selector: Obj | None = None, namespace: str = "llm", **spec: Any) -> Obj:
    return {
        "metadata": {"name": "p", "namespace": namespace},
        "spec": {"podSelector": selector or {}, **spec},
    }


def allowed(rules: Rules | None, address: str, port: int, protocol: str = "TCP") -> bool:
    if rules is None:
        return True
    return any(
        any(ip_address(address) in part for part in rule.networks)
        and (rule.ports is None or any(p == protocol and low <= port <= high for p, low, high in rule.ports))
        for rule in rules
    )


def of(*policies: Obj, pod: Peer = ENGINE) -> Isolation:
    return isolation(pod, policies, PODS, NAMESPACES)


def heard(*policies: Obj, port: int = 8000, protocol: str = "TCP") -> set[str]:
    """Which of the pods the engine hears."""
    names = {GATEWAY.address: "gateway", STRANGER.address: "stranger", "8.8.8.8": "world"}
    return {name for address, name in names.items() if allowed(of(*policies).ingress, address, port, protocol)}


EVERY = {"gateway", "stranger", "world"}
LABEL = {"matchLabels": {"app": "gateway"}}
WEB_TEAM = {"matchLabels": {"team": "web"}}
NOT_WEB = {"key": "team", "operator": "NotIn", "values": ["web"]}


def from_(*peers: Obj, ports: list[Obj] | None = None) -> Obj:
    return policy(ingress=[{"from": list(peers)} | ({"ports": ports} if ports else {})])


@pytest.mark.parametrize(
    ("policies", "who"),
    [
        ([], EVERY),
        ([policy()], set()),
        ([policy(ingress=[])], set()),
        ([policy(ingress=[{}])], EVERY),
        ([policy(ingress=[{"from": []}])], EVERY),
        ([policy(policyTypes=["Egress"])], EVERY),
        ([policy(policyTypes=["Egress"], ingress=[{"from": [{"podSelector": LABEL}]}])], EVERY),
        ([policy({"matchLabels": {"app": "other"}})], EVERY),
        ([policy(namespace="web")], EVERY),
        ([policy({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]})], set()),
        ([policy({"matchExpressions": [{"key": "zone", "operator": "DoesNotExist"}]})], EVERY),
        ([from_({"podSelector": LABEL})], {"gateway"}),
        ([from_({"podSelector": {}})], {"gateway"}),
        ([from_({"namespaceSelector": {}})], {"gateway", "stranger"}),
        ([from_({"namespaceSelector": WEB_TEAM})], {"stranger"}),
        ([from_({"namespaceSelector": WEB_TEAM, "podSelector": LABEL})], {"stranger"}),
        ([from_({"namespaceSelector": WEB_TEAM}, {"podSelector": LABEL})], EVERY - {"world"}),
        ([from_({"namespaceSelector": WEB_TEAM, "podSelector": {"matchLabels": {"a": "b"}}})], set()),
        ([from_({"namespaceSelector": {"matchExpressions": [NOT_WEB]}})], {"gateway"}),
        ([from_({"ipBlock": {"cidr": "0.0.0.0/0"}})], EVERY),
        ([from_({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.244.3.0/24"]}})], {"gateway", "world"}),
        ([from_({"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.3.0/24", "10.244.2.0/25"]}})], set()),
        ([from_({"ipBlock": {"cidr": "::/0"}})], set()),
        ([policy(), from_({"podSelector": LABEL})], {"gateway"}),
        ([from_({"podSelector": LABEL}), from_({"ipBlock": {"cidr": "8.8.8.0/24"}})], {"gateway", "world"}),
        ([policy(ingress=[{"ports": [{"port": 1}]}, {"from": [{"podSelector": LABEL}]}])], {"gateway"}),
    ],
)  # fmt: skip
def test_who_is_heard(policies: list[Obj], who: set[str]) -> None:
    assert heard(*policies) == who


@pytest.mark.parametrize(
    ("entry", "open_"),
    [
        ({"port": 8000}, {("TCP", 8000)}),
        ({"port": 8000, "protocol": "UDP"}, {("UDP", 8000)}),
        ({"port": 8000, "endPort": 8002}, {("TCP", 8000), ("TCP", 8001)}),
        ({"port": "http"}, {("TCP", 8000)}),
        ({"port": "http", "protocol": "UDP"}, {("UDP", 8001)}),
        ({"port": "none"}, set()),
        ({"protocol": "UDP"}, {("UDP", 8000), ("UDP", 8001), ("UDP", 9000), ("UDP", 22)}),
        ({"port": 8000, "protocol": "SCTP"}, {("SCTP", 8000)}),
    ],
)
def test_ports(entry: Obj, open_: set[tuple[str, int]]) -> None:
    """Names are those of the pod that hears: another pod's number of that name is not meant."""
    probed = {(kind, port) for kind in ("TCP", "UDP", "SCTP") for port in (22, 8000, 8001, 9000)}
    found = of(from_({"podSelector": LABEL}, ports=[entry])).ingress
    assert {(kind, port) for kind, port in probed if allowed(found, GATEWAY.address, port, kind)} == open_


def test_names_of_ports_outwards_are_those_of_each_receiver() -> None:
    for peers in ([], [{"namespaceSelector": {}}], [{"ipBlock": {"cidr": "10.244.0.0/16"}}]):
        found = of(policy(egress=[{"to": peers, "ports": [{"port": "http"}, {"port": 443}]}])).egress
        assert allowed(found, GATEWAY.address, 9000) and not allowed(found, GATEWAY.address, 8000)
        assert allowed(found, ENGINE.address, 8000) and not allowed(found, ENGINE.address, 9000)
        assert allowed(found, GATEWAY.address, 443) and not allowed(found, STRANGER.address, 8000)


def test_directions_are_isolated_each_by_itself() -> None:
    assert of(policy()) == Isolation(ingress=())
    assert of(policy(egress=[{}])) == Isolation((), (Allow(EVERYBODY, None),)), "egress rules mean both"
    assert of(policy(policyTypes=["Egress"])) == Isolation(egress=())
    assert of(policy(policyTypes=["Ingress", "Egress"])) == Isolation((), ())
    assert of(policy(policyTypes=["Ingress"], egress=[{}])) == Isolation(())


def test_the_clusters_dns_is_met_as_pods_of_kube_system() -> None:
    kube_dns = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}
    found = of(policy(egress=[{"to": [kube_dns], "ports": [{"protocol": "UDP", "port": 53}]}])).egress
    assert allowed(found, DNS.address, 53, "UDP") and not allowed(found, DNS.address, 53)
    assert not allowed(found, GATEWAY.address, 53, "UDP")


def test_pods_that_have_no_address_of_their_own_are_nobody() -> None:
    obj: Obj = {
        "metadata": {"namespace": "llm"},
        "spec": {"containers": [{"ports": [{"name": "a", "containerPort": 1}, {"containerPort": 2}]}, {}]},
        "status": {"podIP": "10.244.1.9"},
    }
    assert peer(obj) == Peer("llm", {}, "10.244.1.9", frozenset({("TCP", "a", 1)}))
    assert peer({**obj, "status": {}}, "10.244.1.8") == Peer("llm", {}, "10.244.1.8", frozenset({("TCP", "a", 1)}))
    assert peer({**obj, "status": {}}) is None and peer({**obj, "status": {"podIP": "fd00::1"}}) is None
    assert peer({**obj, "status": {"podIP": "999.1.1.1"}}) is None, "nor does it stop the machine's enforcement"
    assert peer({**obj, "status": {"podIP": "10.244.1.9", "phase": "Failed"}}) is None
    assert peer({**obj, "spec": {**obj["spec"], "hostNetwork": True}}) is None


# — every policy —

_PROTOCOLS = ["TCP", "UDP"]
_values = st.sampled_from(["a", "b"])
_labels = st.dictionaries(st.sampled_from(["x", "y"]), _values)
_expression = st.one_of(
    st.builds(lambda k, o, v: {"key": k, "operator": o, "values": v}, st.sampled_from(["x", "y"]),
              st.sampled_from(["In", "NotIn"]), st.lists(_values, min_size=1, max_size=2)),
    st.builds(lambda k, o: {"key": k, "operator": o}, st.sampled_from(["x", "y"]),
              st.sampled_from(["Exists", "DoesNotExist"])),
)  # fmt: skip
_selector = st.one_of(
    st.just({}),
    st.builds(lambda v: {"matchLabels": v}, _labels),
    st.builds(lambda v: {"matchExpressions": [v]}, _expression),
)
_cidr = st.builds(lambda n, bits: f"10.0.0.{n}/{bits}", st.integers(0, 15), st.integers(24, 32))
_peer = st.one_of(
    st.builds(lambda s: {"podSelector": s}, _selector),
    st.builds(lambda s: {"namespaceSelector": s}, _selector),
    st.builds(lambda s, n: {"podSelector": s, "namespaceSelector": n}, _selector, _selector),
    st.builds(lambda c, e: {"ipBlock": {"cidr": c, "except": e}}, _cidr, st.lists(_cidr, max_size=2)),
)
_port = st.one_of(
    st.builds(lambda n, p: {"port": n, "protocol": p}, st.sampled_from([1, 3, "p", "q"]), st.sampled_from(_PROTOCOLS)),
    st.builds(lambda n, m: {"port": n, "endPort": n + m, "protocol": "TCP"}, st.integers(1, 4), st.integers(0, 3)),
    st.just({"protocol": "UDP"}),
)  # fmt: skip


def _rules(key: str) -> st.SearchStrategy[list[Obj]]:
    rule = st.builds(
        lambda peers, ports: {key: peers, "ports": ports}, st.lists(_peer, max_size=2), st.lists(_port, max_size=2)
    )
    return st.lists(rule, max_size=2)


_policy = st.builds(
    lambda ns, sel, types, ing, eg: policy(
        sel, ns, ingress=ing, egress=eg, **({"policyTypes": types} if types else {})
    ),
    st.sampled_from(["n", "m"]),
    _selector,
    st.lists(st.sampled_from(["Ingress", "Egress"]), unique=True),
    _rules("from"),
    _rules("to"),
)
_pod = st.builds(
    lambda ns, labels, n, ports: Peer(ns, labels, f"10.0.0.{n}", frozenset(ports)),
    st.sampled_from(["n", "m"]),
    _labels,
    st.integers(0, 15),
    st.sets(st.tuples(st.sampled_from(["TCP", "UDP"]), st.sampled_from(["p", "q"]), st.integers(1, 5)), max_size=3),
)


def _fits(selector: Obj, labels: Any) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions", []):
        there = one["key"] in labels
        verdict = {
            "In": there and labels[one["key"]] in one.get("values", []),
            "NotIn": not there or labels[one["key"]] not in one.get("values", []),
            "Exists": there,
            "DoesNotExist": not there,
        }[one["operator"]]
        if not verdict:
            return False
    return True


def _judge(pod: Peer, other: Peer, policies: list[Obj], spaces: Any, way: str, protocol: str, port: int) -> bool:
    """May this one packet begin a connection? As the reference tells it, rule by rule."""
    ingress = way == "Ingress"
    receiver = pod if ingress else other
    isolated = False
    for one in policies:
        spec, own = one["spec"], one["metadata"]["namespace"]
        types = spec.get("policyTypes") or (["Ingress"] + (["Egress"] if spec["egress"] else []))
        if own != pod.namespace or way not in types or not _fits(spec["podSelector"], pod.labels):
            continue
        isolated = True
        for rule in spec["ingress" if ingress else "egress"]:
            peers, ports = rule["from" if ingress else "to"], rule["ports"]
            known = not peers
            for each in peers:
                if block := each.get("ipBlock"):
                    inside = [
                        ip_address(other.address) in ip_network(c, strict=False)
                        for c in (block["cidr"], *block["except"])
                    ]
                    known |= inside[0] and not any(inside[1:])
                elif "namespaceSelector" in each:
                    known |= _fits(each["namespaceSelector"], spaces[other.namespace]) and _fits(
                        each.get("podSelector", {}), other.labels
                    )
                else:
                    known |= other.namespace == own and _fits(each["podSelector"], other.labels)
            open_ = not ports
            for entry in ports:
                wanted = entry.get("port")
                if entry["protocol"] != protocol:
                    continue
                if isinstance(wanted, str):
                    open_ |= (protocol, wanted, port) in receiver.ports
                else:
                    open_ |= wanted is None or wanted <= port <= entry.get("endPort", wanted)
            if known and open_:
                return True
    return not isolated


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_policy, max_size=3),
    st.lists(_pod, min_size=2, max_size=5, unique_by=lambda pod: pod.address),
    st.fixed_dictionaries({"n": _labels, "m": _labels}),
)
def test_every_packet_fares_as_the_reference_says(policies: list[Obj], pods: list[Peer], spaces: Any) -> None:
    pod = pods[0]
    found = isolation(pod, policies, pods, spaces)
    for other in pods:
        for protocol in ("TCP", "UDP"):
            for port in range(1, 7):
                for way, rules in (("Ingress", found.ingress), ("Egress", found.egress)):
                    expected = _judge(pod, other, policies, spaces, way, protocol, port)
                    assert allowed(rules, other.address, port, protocol) == expected, (way, other, protocol, port)
    for rules in (found.ingress, found.egress):
        for rule in rules or ():  # as nft's sets demand
            parts = rule.networks
            assert not any(one.overlaps(two) for i, one in enumerate(parts) for two in parts[:i])


# — as nft commands —


def test_pods_of_one_kind_share_a_chain() -> None:
    deny = Isolation(ingress=())
    text = script({"10.244.1.2": deny, "10.244.1.3": deny, "10.244.1.4": Isolation((), ())})
    assert text.count("  chain p") == 2, "one against senders, one against receivers"
    assert "ip daddr vmap { 10.244.1.2 : jump p0, 10.244.1.3 : jump p0, 10.244.1.4 : jump p0 }" in text.replace(
        "p1", "p0"
    )


def test_without_isolated_pods_there_is_no_table() -> None:
    assert "chain" not in script({})


def test_rules_as_text() -> None:
    ports = (("TCP", 80, 90), ("TCP", 443, 443), ("UDP", 0, 65535))
    text = script({"10.244.1.2": Isolation(ingress=(Allow(EVERYBODY, ports), Allow((network("10.0.0.0/8"),), None)))})  # type: ignore[arg-type]
    assert (
        "    meta l4proto tcp th dport { 80-90, 443 } return\n    meta l4proto udp th dport { 0-65535 } return\n"
        in text
    )
    assert "    ip saddr { 10.0.0.0/8 } return\n    drop\n" in text
    assert f"ip saddr {ROUTER} accept" in text and "ct state established,related accept" in text


# — what the API refuses —


@pytest.mark.parametrize(
    ("spec", "field", "why"),
    [
        ({"policyTypes": ["Ingres"]}, "spec.policyTypes[0]", 'supported values: "Ingress", "Egress"'),
        ({"policyTypes": ["Ingress"] * 3}, "spec.policyTypes", "more than two"),
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt"}]}},
         "spec.podSelector.matchExpressions[0].operator", "not a valid selector operator"),
        ({"ingress": [{"from": [{}]}]}, "spec.ingress[0].from[0]", "must specify a peer"),
        ({"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]}, "spec.egress[0].to[0]",
         "may not specify both ipBlock and another peer"),
        ({"ingress": [{"from": [{"ipBlock": {}}]}]}, "spec.ingress[0].from[0].ipBlock.cidr", "Required"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.1"}}]}]}, "spec.ingress[0].from[0].ipBlock.cidr",
         "must be a valid CIDR"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}}]}]},
         "spec.ingress[0].from[0].ipBlock.except[0]", "strict subset"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["::/9"]}}]}]},
         "spec.ingress[0].from[0].ipBlock.except[0]", "strict subset"),
        ({"ingress": [{"ports": [{"protocol": "ICMP"}]}]}, "spec.ingress[0].ports[0].protocol", "SCTP"),
        ({"ingress": [{"ports": [{"port": 0}]}]}, "spec.ingress[0].ports[0].port", "between 1 and 65535"),
        ({"ingress": [{"ports": [{"port": "8--a"}]}]}, "spec.ingress[0].ports[0].port", "consecutive"),
        ({"ingress": [{"ports": [{"port": 9, "endPort": 8}]}]}, "spec.ingress[0].ports[0].endPort", "greater than or"),
        ({"ingress": [{"ports": [{"port": "a", "endPort": 8}]}]}, "spec.ingress[0].ports[0].endPort", "non-numeric"),
        ({"egress": [{"ports": [{"endPort": 8}]}]}, "spec.egress[0].ports[0].endPort", "not specified"),
    ],
)  # fmt: skip
def test_what_the_api_refuses(spec: Obj, field: str, why: str) -> None:
    (cause,) = network_policy({"spec": spec})
    assert cause.field == field and why in cause.message


def test_what_the_api_takes() -> None:
    block = {"cidr": "010.0.0.0/8", "except": ["10.1.2.3/32"]}
    ports = [{"port": 1, "endPort": 65535, "protocol": "SCTP"}, {"port": "http-2"}, {"protocol": "UDP"}, {}]
    assert not network_policy(policy(ingress=[{"from": [{"ipBlock": block}], "ports": ports}]))
    assert heard(from_({"ipBlock": {"cidr": "008.008.8.8/24"}})) == {"world"}, "numbers may begin with zeros"
