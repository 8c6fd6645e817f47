"""What a NetworkChaos asks of one pod, as entries of the pod's PodNetworkChaos. Pure functions.

Chaos Mesh's own shape: address sets (`ipsets`) and drop rules (`iptables`) with the `source` "namespace/name" of
their NetworkChaos, so that several can share a pod and each takes away its own. Names of sets and chains derive
from the NetworkChaos's *name* only, as in Chaos Mesh (source: facts/chaos-mesh.md).
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from sandbox.client import Obj

Spec = Mapping[str, Any]
Direction = Literal["input", "output"]
NET, NET_PORT, SET = "hash:net", "hash:net,port", "list:set"
LISTS = ("ipsets", "iptables", "tcs")
PARAMETERS = ("delay", "loss", "duplicate", "corrupt", "rate", "bandwidth")


class BadTarget(Exception):
    """`externalTargets` names something that cannot be resolved; the text is one sentence."""


def partition(source: str, spec: Spec, ids: Mapping[str, Sequence[str]], addresses: Mapping[str, str], pod: str) -> Obj:
    """The entries of partition `spec` for the pod with record id `pod`, in PodNetworkChaos's shape.

    `ids` maps the selector key ("." or ".Target") to the records' ids, `addresses` an id to the pod's IP. A pod on
    both sides gets both parts. With no target and no `externalTargets` the rule has no set: it drops everything.
    """
    direction, name = spec.get("direction", "to"), source.partition("/")[2]
    ipsets: list[Obj] = []
    iptables: list[Obj] = []

    def drop(hook: Direction, peers: Sequence[str], external: Sequence[str], postfix: str, device: str | None) -> None:
        sets = _sets(name, source, [addresses[peer] for peer in peers if peer in addresses], external, postfix)
        everything = not peers and not external
        rule: Obj = {"name": _chain(hook, name), "direction": hook, "source": source}
        if not everything:
            rule["ipsets"] = [_compress(name, 27, f"set_{postfix}")]
        if device:
            rule["device"] = device
        iptables.append(rule)
        if not everything:
            ipsets.extend(sets)  # for both directions twice the same, as Chaos Mesh has it

    sources, targets = ids.get(".", ()), ids.get(".Target", ())
    external = list(spec.get("externalTargets") or ())
    if pod in sources:
        if direction in ("to", "both"):
            drop("output", targets, external, "tgt", spec.get("device"))
        if direction in ("from", "both"):
            drop("input", targets, external, "tgt", spec.get("device"))
    if pod in targets:
        if direction in ("from", "both"):
            drop("output", sources, (), "src", spec.get("targetDevice"))
        if direction in ("to", "both"):
            drop("input", sources, (), "src", spec.get("targetDevice"))
    return {"ipsets": ipsets, "iptables": iptables}


def control(source: str, spec: Spec, ids: Mapping[str, Sequence[str]], addresses: Mapping[str, str], pod: str) -> Obj:
    """The entries of any other NetworkChaos for the pod with record id `pod`; empty where nothing is done on it.

    Traffic is controlled where it leaves: at the source towards the targets ("to"), at the targets towards the source
    ("from"). With no target and no `externalTargets` there is no filter: everything that leaves the source.
    """
    direction, name = spec.get("direction", "to"), source.partition("/")[2]
    kind = "bandwidth" if spec["action"] == "bandwidth" else "netem"
    ipsets: list[Obj] = []
    tcs: list[Obj] = []

    def leaving(peers: Sequence[str], external: Sequence[str], postfix: str, device: str | None) -> None:
        tc: Obj = {"type": kind, "source": source, **{part: spec[part] for part in PARAMETERS if spec.get(part)}}
        if device:
            tc["device"] = device
        if peers or external:
            sets = _sets(name, source, [addresses[peer] for peer in peers if peer in addresses], external, postfix)
            ipsets.extend(sets)
            tc["ipset"] = sets[-1]["name"]
        tcs.append(tc)

    if pod in ids.get(".", ()) and direction in ("to", "both"):
        external = list(spec.get("externalTargets") or ())
        leaving(ids.get(".Target", ()), external, f"{kind[:2]}tgt", spec.get("device"))
    if pod in ids.get(".Target", ()) and direction in ("from", "both"):
        leaving(ids.get(".", ()), (), f"{kind[:2]}src", spec.get("targetDevice"))
    return {"ipsets": ipsets, "tcs": tcs} if tcs else {}


def replaced(spec: Spec, source: str, entries: Spec) -> Obj:
    """`spec` with everything of `source` exchanged for `entries` (`{}` takes it away)."""
    merged = {}
    for part in LISTS:
        others = [entry for entry in spec.get(part) or () if entry["source"] != source]
        if kept := others + list(entries.get(part) or ()):
            merged[part] = kept
    return merged


def _sets(name: str, source: str, pods: Iterable[str], external: Iterable[str], postfix: str) -> list[Obj]:
    """A set of networks, a set of networks with ports, and the set of both; empty ones too, as Chaos Mesh does."""
    nets = [f"{address}/{128 if ':' in address else 32}" for address in pods]
    ports: list[Obj] = []
    for target in external:
        network, port = _external(target)
        if port is None:
            nets.append(network)
        else:
            ports.append({"cidr": network, "port": port})
    made: list[Obj] = [
        {"name": _compress(name, 27, f"net_{postfix}"), "ipsetType": NET, **({"cidrs": nets} if nets else {})},
        {"name": _compress(name, 27, f"netport_{postfix}"), "ipsetType": NET_PORT}
        | ({"cidrAndPorts": ports} if ports else {}),
    ]
    names = [entry["name"] for entry in made]
    together = {"name": _compress(name, 27, f"set_{postfix}"), "ipsetType": SET, "setNames": names}
    return [{**entry, "source": source} for entry in [*made, together]]


def _external(target: str) -> tuple[str, int | None]:
    """An address or network, optionally ":port" (IPv6 then in brackets)."""
    host, port = target, None
    if target.startswith("["):
        host, _, rest = target[1:].partition("]")
        port = rest.removeprefix(":") or None
    elif target.count(":") == 1:
        host, _, port = target.partition(":")
    try:
        network = str(ipaddress.ip_network(host, strict=False))
        number = None if port is None else int(port)
    except ValueError:
        raise BadTarget(
            f"external target {target!r} is no address or network; the sandbox has no names outside of it"
        ) from None
    if number is not None and not 0 < number < 65536:
        raise BadTarget(f"external target {target!r} has no valid port")
    return network, number


def _chain(hook: Direction, name: str) -> str:
    return f"INPUT/{_compress(name, 21)}" if hook == "input" else f"OUTPUT/{_compress(name, 20)}"


def _compress(name: str, limit: int, postfix: str = "") -> str:
    """`name_postfix`; of a longer name its first five characters and a hash of the others."""
    if len(name) < 6:
        return f"{name}_{postfix}"
    digest = hashlib.sha256(name[5:].encode()).hexdigest()
    return f"{name[:5]}_{digest[: limit - 7 - len(postfix)]}_{postfix}"
