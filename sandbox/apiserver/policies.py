"""Validation of NetworkPolicies, in the real server's words (pkg/apis/networking/validation)."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Any

from sandbox.apiserver.errors import Cause
from sandbox.apiserver.rules import forbidden, full, invalid, label_selector, required, unsupported
from sandbox.client import Obj
from sandbox.node.policy import network

_PROTOCOLS = ("TCP", "UDP", "SCTP")
_TYPES = ("Ingress", "Egress")
_NO_NETWORK = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"


def network_policy(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    causes = label_selector(spec.get("podSelector") or {}, "spec.podSelector")
    for way, peers in (("ingress", "from"), ("egress", "to")):
        for i, rule in enumerate(spec.get(way) or ()):
            at = f"spec.{way}[{i}]"
            for j, port in enumerate(rule.get("ports") or ()):
                causes += _port(port, f"{at}.ports[{j}]")
            for j, peer in enumerate(rule.get(peers) or ()):
                causes += _peer(peer, f"{at}.{peers}[{j}]")
    types = spec.get("policyTypes") or []
    if len(types) > len(_TYPES):
        return [*causes, invalid("spec.policyTypes", types, "may not specify more than two policyTypes")]
    return causes + [
        unsupported(f"spec.policyTypes[{i}]", one, _TYPES) for i, one in enumerate(types) if one not in _TYPES
    ]


def _port(entry: Obj, field: str) -> list[Cause]:
    causes = []
    protocol, port, last = entry.get("protocol"), entry.get("port"), entry.get("endPort")
    if protocol is not None and protocol not in _PROTOCOLS:
        causes.append(unsupported(f"{field}.protocol", protocol, _PROTOCOLS))
    if port is None:
        if last is not None:
            causes.append(invalid(f"{field}.endPort", last, "may not be specified when `port` is not specified"))
    elif isinstance(port, int):
        causes += _number(port, f"{field}.port")
        if last is not None:
            if last < port:
                causes.append(invalid(f"{field}.endPort", port, "must be greater than or equal to `port`"))
            causes += _number(last, f"{field}.endPort")
    else:
        if last is not None:
            causes.append(invalid(f"{field}.endPort", last, "may not be specified when `port` is non-numeric"))
        causes += [invalid(f"{field}.port", port, why) for why in _name(port)]
    return causes


def _number(value: Any, field: str) -> list[Cause]:
    return [] if 1 <= value <= 65535 else [invalid(field, value, "must be between 1 and 65535, inclusive")]


def _name(text: str) -> list[str]:
    whys = (
        ("must be no more than 15 characters", len(text) <= 15),
        ("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)", full(r"[-a-z0-9]+", text)),
        ("must contain at least one letter (a-z)", any("a" <= char <= "z" for char in text)),
        ("must not contain consecutive hyphens", "--" not in text),
        ("must not begin or end with a hyphen", not text.startswith("-") and not text.endswith("-")),
    )
    return [why for why, ok in whys if not ok]


def _peer(peer: Obj, field: str) -> list[Cause]:
    causes = []
    selectors = [key for key in ("podSelector", "namespaceSelector") if peer.get(key) is not None]
    for key in selectors:
        causes += label_selector(peer[key], f"{field}.{key}")
    block = peer.get("ipBlock")
    if block is not None:
        causes += _block(block, f"{field}.ipBlock")
        if selectors:
            causes.append(forbidden(field, "may not specify both ipBlock and another peer"))
    elif not selectors:
        causes.append(required(field, "must specify a peer"))
    return causes


def _block(block: Obj, field: str) -> list[Cause]:
    if not block.get("cidr"):
        return [required(f"{field}.cidr")]
    if (whole := _network(block["cidr"])) is None:
        return [invalid(f"{field}.cidr", block["cidr"], _NO_NETWORK)]
    causes: list[Cause] = []
    for i, cidr in enumerate(block.get("except") or ()):
        at = f"{field}.except[{i}]"
        if (part := _network(cidr)) is None:
            return [*causes, invalid(at, cidr, _NO_NETWORK)]
        inside = part.version == whole.version and part.network_address in whole
        if not inside or whole.prefixlen >= part.prefixlen:
            causes.append(invalid(at, cidr, "must be a strict subset of `cidr`"))
    return causes


def _network(cidr: str) -> IPv4Network | IPv6Network | None:
    try:
        return network(cidr) if "/" in cidr else None
    except ValueError:
        return None
