"""A PodNetworkChaos as one nftables table. Pure.

Packets are dropped, never rejected, in the input and output hooks of the pod's namespace, without regard to
connection state: established connections are hit too, and their clients hang. The table is exchanged in one
transaction (Chaos Mesh flushes and rebuilds, with a brief gap).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sandbox.chaos.podnetwork import NET, NET_PORT, SET
from sandbox.client import Obj

TABLE = "inet gameday_chaos"
DEVICE = "eth0"
_DEVICE = re.compile(r"[A-Za-z0-9_.@-]{1,15}")
_REMOVE = f"add table {TABLE}\ndelete table {TABLE}\n"  # add first: deleting what is not there is an error


class Unsupported(Exception):
    """The spec asks for what the sandbox's daemon cannot do; the text is one sentence."""


def script(spec: Mapping[str, Any]) -> str:
    """nft commands that make the namespace's chaos table exactly what `spec` says; no rules: no table.

    Raises `Unsupported`.
    """
    rules = spec.get("iptables") or []
    if not rules:
        return _REMOVE
    sets = _by_name(spec.get("ipsets") or [])
    _by_name(rules)
    declared, lines = _declarations(sets.values())
    chains: dict[str, list[str]] = {"input": [], "output": []}
    for rule in rules:
        if rule["direction"] not in chains:
            raise Unsupported(f"direction {rule['direction']!r} of chain {rule['name']} is unknown")
        chains[rule["direction"]] += _drops(rule, sets, declared)
    for hook, drops in chains.items():
        body = "".join(f"    {drop}\n" for drop in drops)
        lines.append(f"  chain {hook} {{\n    type filter hook {hook} priority -10; policy accept;\n{body}  }}\n")
    return f"{_REMOVE}table {TABLE} {{\n{''.join(lines)}}}\n"


def _by_name(entries: Iterable[Obj]) -> dict[str, Obj]:
    """Names come from the NetworkChaos's name alone: two of one name (in two namespaces) would share sets.

    For both directions Chaos Mesh (2.8) lists the same sets twice.
    """
    named: dict[str, Obj] = {}
    for entry in entries:
        if entry["name"] in named and entry != named[entry["name"]]:
            sources = sorted({entry["source"], named[entry["name"]]["source"]})
            raise Unsupported(f"{' and '.join(sources)} both make {entry['name']}: names must be unique")
        named[entry["name"]] = entry
    return named


def _declarations(sets: Iterable[Obj]) -> tuple[dict[tuple[str, int], str], list[str]]:
    """(set name, IP version) → the nft set's name, and the lines that declare them."""
    declared: dict[tuple[str, int], str] = {}
    lines = []
    for number, entry in enumerate(entry for entry in sets if entry["ipsetType"] != SET):
        for version, elements in _elements(entry).items():
            name = declared[entry["name"], version] = f"s{number}v{version}"
            address = "ipv4_addr" if version == 4 else "ipv6_addr"
            kind = address if entry["ipsetType"] == NET else f"{address} . inet_service"
            body = f"type {kind}; flags interval; auto-merge; elements = {{ {', '.join(elements)} }}"
            lines.append(f"  set {name} {{ {body} }}\n")
    return declared, lines


def _elements(entry: Obj) -> dict[int, list[str]]:
    elements: dict[int, list[str]] = {}
    if entry["ipsetType"] == NET:
        pairs = [(cidr, "") for cidr in entry.get("cidrs") or ()]
    elif entry["ipsetType"] == NET_PORT:
        pairs = [(pair["cidr"], f" . {int(pair['port'])}") for pair in entry.get("cidrAndPorts") or ()]
    else:
        raise Unsupported(f"set {entry['name']} has the unknown type {entry['ipsetType']!r}")
    for cidr, port in dict.fromkeys(pairs):
        try:
            network = ipaddress.ip_network(cidr, strict=False)
        except ValueError:
            raise Unsupported(f"set {entry['name']} holds {cidr!r}, which is no network") from None
        # nft has no interval for everything, but for its halves
        parts = [network] if network.prefixlen else list(network.subnets(prefixlen_diff=1))
        elements.setdefault(network.version, []).extend(f"{part}{port}" for part in parts)
    return elements


def _drops(rule: Obj, sets: Mapping[str, Obj], declared: Mapping[tuple[str, int], str]) -> list[str]:
    """The rule's lines: without sets everything is dropped, with sets what any of them holds."""
    device = rule.get("device") or DEVICE
    if not _DEVICE.fullmatch(device):
        raise Unsupported(f"device {device!r} is no interface name")
    way, interface = ("saddr", "iifname") if rule["direction"] == "input" else ("daddr", "oifname")
    if not rule.get("ipsets"):
        return [f'{interface} "{device}" drop']
    lines = []
    for entry in _flat(rule["ipsets"], sets):
        for version, family in ((4, "ip"), (6, "ip6")):
            if name := declared.get((entry["name"], version)):
                port = " . th dport" if entry["ipsetType"] == NET_PORT else ""
                lines.append(f'{interface} "{device}" {family} {way}{port} @{name} drop')
    return lines


def _flat(names: Sequence[str], sets: Mapping[str, Obj]) -> list[Obj]:
    """The sets behind `names`, sets of sets resolved one level deep, as Chaos Mesh makes them."""
    found = []
    for name in names:
        if name not in sets:
            raise Unsupported(f"set {name} is not defined")
        entry = sets[name]
        found += [sets[inner] for inner in entry.get("setNames") or ()] if entry["ipsetType"] == SET else [entry]
    return found
