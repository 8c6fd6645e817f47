"""What NetworkPolicies let in and out of a pod. Pure.

Policies only ever allow, and add up: a pod is isolated in a direction once any policy of its namespace selects it for
that direction, and then only what some rule allows may begin. Replies, and a pod's own node, are no matter of rules.
Source: the reference of networking.k8s.io/v1 and the concept page (kubernetes.io, Network Policies).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, collapse_addresses, ip_network

from sandbox.client import Obj
from sandbox.controllers.objects import matches

Labels = Mapping[str, str]
Networks = tuple[IPv4Network, ...]  # none overlaps another
Ports = tuple[str, int, int]  # protocol (TCP, UDP, SCTP), first and last number

EVERYBODY: Networks = (IPv4Network("0.0.0.0/0"),)
_LAST = 65535


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod as the policies see it."""

    namespace: str
    labels: Labels
    address: str
    ports: frozenset[tuple[str, str, int]] = frozenset()  # protocol, name, number


@dataclass(frozen=True, slots=True)
class Allow:
    """These networks, on these ports; `None`: on all, and by any protocol."""

    networks: Networks
    ports: tuple[Ports, ...] | None


Rules = tuple[Allow, ...]


@dataclass(frozen=True, slots=True)
class Isolation:
    """What a pod may hear and reach; `None`: it is not isolated in that direction."""

    ingress: Rules | None = None
    egress: Rules | None = None


def peer(pod: Obj, address: str = "") -> Peer | None:
    """A pod object; None when it has no IPv4 address of its own (any more). `address` may be known before a status."""
    status, spec, meta = pod.get("status") or {}, pod["spec"], pod["metadata"]
    address = address or status.get("podIP") or ""
    if not _ipv4(address) or spec.get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
        return None
    ports = frozenset(
        (port.get("protocol") or "TCP", port["name"], int(port["containerPort"]))
        for container in spec["containers"]
        for port in container.get("ports") or ()
        if port.get("name")
    )
    return Peer(meta["namespace"], meta.get("labels") or {}, address, ports)


def _ipv4(text: str) -> bool:
    try:
        return bool(IPv4Address(text))
    except ValueError:
        return False


def isolation(pod: Peer, policies: Iterable[Obj], pods: Sequence[Peer], namespaces: Mapping[str, Labels]) -> Isolation:
    """What `policies` make of `pod` among `pods`; `namespaces` are their labels."""
    ingress: list[Allow] | None = None
    egress: list[Allow] | None = None
    for policy in policies:
        spec, own = policy["spec"], policy["metadata"]["namespace"]
        if own != pod.namespace or not matches(spec.get("podSelector") or {}, pod.labels):
            continue
        types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
        if "Ingress" in types:
            ingress = ingress or []
            for rule in spec.get("ingress") or ():
                networks = _networks(rule.get("from"), own, pods, namespaces)
                ingress.append(Allow(networks, _ports(rule.get("ports"), pod)))
        if "Egress" in types:
            egress = egress or []
            for rule in spec.get("egress") or ():
                egress += _outwards(rule.get("ports"), _networks(rule.get("to"), own, pods, namespaces), pods)
    return Isolation(_effective(ingress), _effective(egress))


def _effective(rules: list[Allow] | None) -> Rules | None:
    """Without the rules that allow nothing, and without repetition."""
    if rules is None:
        return None
    return tuple(dict.fromkeys(rule for rule in rules if rule.networks and rule.ports != ()))


def _outwards(entries: Sequence[Obj] | None, networks: Networks, pods: Sequence[Peer]) -> list[Allow]:
    """A name of a port means what the pod at the other end calls so: each such pod by its own number."""
    named = [entry for entry in entries or () if isinstance(entry.get("port"), str)]
    numbered = [entry for entry in entries or () if not isinstance(entry.get("port"), str)]
    found = [Allow(networks, _ports(numbered, None))] if numbered or not entries else []
    by_ports: dict[tuple[Ports, ...], list[IPv4Network]] = {}
    for other in pods if named else ():
        address = IPv4Network(other.address)
        if any(address.subnet_of(network) for network in networks):
            by_ports.setdefault(_ports(named, other) or (), []).append(address)
    return found + [Allow(_collapsed(members), ports) for ports, members in by_ports.items()]


def _ports(entries: Sequence[Obj] | None, pod: Peer | None) -> tuple[Ports, ...] | None:
    """The ranges that `entries` name, in order; names are those of `pod`."""
    if not entries:
        return None
    ranges: list[Ports] = []
    for entry in entries:
        protocol, port = entry.get("protocol") or "TCP", entry.get("port")
        if port is None:
            ranges.append((protocol, 0, _LAST))
        elif isinstance(port, int):
            ranges.append((protocol, port, entry.get("endPort") or port))
        elif pod:
            ranges += [
                (protocol, number, number) for kind, name, number in pod.ports if (kind, name) == (protocol, port)
            ]
    merged: list[Ports] = []
    for protocol, first, last in sorted(ranges):
        if merged and merged[-1][0] == protocol and first <= merged[-1][2] + 1:
            merged[-1] = (protocol, merged[-1][1], max(last, merged[-1][2]))
        else:
            merged.append((protocol, first, last))
    return tuple(merged)


def _networks(
    peers: Sequence[Obj] | None, own: str, pods: Sequence[Peer], namespaces: Mapping[str, Labels]
) -> Networks:
    if not peers:
        return EVERYBODY
    found: list[IPv4Network] = []
    for one in peers:
        if block := one.get("ipBlock"):
            found += _block(block)
        else:
            found += [IPv4Network(pod.address) for pod in pods if _selected(one, own, pod, namespaces)]
    return _collapsed(found)


def _selected(one: Obj, own: str, pod: Peer, namespaces: Mapping[str, Labels]) -> bool:
    """A selector that is absent selects everything of what the other leaves; without one of namespaces, `own`."""
    there = one.get("namespaceSelector")
    home = pod.namespace == own if there is None else matches(there, namespaces.get(pod.namespace, {}))
    return home and matches(one.get("podSelector") or {}, pod.labels)


def _block(block: Obj) -> list[IPv4Network]:
    """IPv6 networks hold nobody of this network."""
    whole = network(block["cidr"])
    left = [whole] if isinstance(whole, IPv4Network) else []
    for cidr in block.get("except") or ():
        out = network(cidr)
        if isinstance(out, IPv4Network):
            left = [rest for part in left for rest in _without(part, out)]
    return left


def _without(part: IPv4Network, out: IPv4Network) -> list[IPv4Network]:
    if not part.overlaps(out):
        return [part]
    return [] if part.subnet_of(out) else list(part.address_exclude(out))


def network(cidr: str) -> IPv4Network | IPv6Network:
    """As the API reads it: host bits may be set, numbers may begin with zeros. Raises `ValueError`."""
    return ip_network(cidr if ":" in cidr else re.sub(r"\b0+(?=\d)", "", cidr), strict=False)


def _collapsed(networks: Iterable[IPv4Network]) -> Networks:
    return tuple(collapse_addresses(networks))
