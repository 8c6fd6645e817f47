"""Enforces NetworkPolicies on one machine, by nftables where it forwards: it routes every packet of its pods.

There cluster IPs are translated already, so rules meet the addresses of endpoints; what the machine itself sends to its
pods (probes) and pods to it is never forwarded, hence never refused. What is not allowed is dropped. An established
connection is left alone, also by policies that come later. Chaos has tables in the pods' namespaces; nothing is shared.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack

from sandbox.chaos import nft
from sandbox.client import NAMESPACES, NETWORKPOLICIES, PODS, Api, EventType, Informer, Obj
from sandbox.node.network import DNS_ADDRESS, ROUTER
from sandbox.node.policy import EVERYBODY, Allow, Isolation, Peer, Rules, isolation, peer

log = logging.getLogger(__name__)

TABLE = "ip gameday_policies"
_REMOVE = f"add table {TABLE}\ndelete table {TABLE}\n"
_SETTLE_SECONDS = 0.01  # changes come in bursts; the last one counts
_RETRY_SECONDS = 0.5
_PATIENCE_SECONDS = 2.0
# The cluster's DNS is no pod here; policies meet it as the pods that it is elsewhere.
DNS = Peer("kube-system", {"k8s-app": "kube-dns"}, DNS_ADDRESS, frozenset({("UDP", "dns", 53), ("TCP", "dns-tcp", 53)}))


class NotCovered(Exception):
    """The policies are not in force for a pod; the text is one sentence."""


def script(isolated: Mapping[str, Isolation]) -> str:
    """nft commands that make the machine's table exactly what `isolated` (by the pods' addresses) says."""
    chains: dict[tuple[str, Rules], str] = {}
    ways: dict[str, list[str]] = {"saddr": [], "daddr": []}
    for address, found in sorted(isolated.items()):
        # What leaves the pod is held against the receiver, what arrives against the sender.
        for own, other, rules in (("saddr", "daddr", found.egress), ("daddr", "saddr", found.ingress)):
            if rules is not None:
                name = chains.setdefault((other, rules), f"p{len(chains)}")
                ways[own].append(f"{address} : jump {name}")
    if not chains:
        return _REMOVE
    bodies = ""
    for (way, rules), name in chains.items():
        allowed = "".join(f"    {line}\n" for rule in rules for line in _lines(way, rule))
        bodies += f"  chain {name} {{\n{allowed}    drop\n  }}\n"
    selves = ", ".join(f"{address} . {address}" for address in sorted(isolated))
    jumps = "".join(f"    ip {way} vmap {{ {', '.join(entries)} }}\n" for way, entries in ways.items() if entries)
    return (
        f"{_REMOVE}table {TABLE} {{\n{bodies}  chain forward {{\n"
        "    type filter hook forward priority 10; policy accept;\n"  # after what refuses Services without endpoints
        "    ct state established,related accept\n"
        f"    ip saddr {ROUTER} accept\n"  # Prometheus counts as a process of each machine's own
        f"    ip saddr . ip daddr {{ {selves} }} accept\n{jumps}  }}\n}}\n"
    )


def _lines(way: str, rule: Allow) -> list[str]:
    networks = ", ".join(map(str, rule.networks))
    match = "" if rule.networks == EVERYBODY else f"ip {way} {{ {networks} }} "
    if rule.ports is None:
        return [f"{match}return"]
    by_protocol: dict[str, list[str]] = {}
    for protocol, first, last in rule.ports:
        by_protocol.setdefault(protocol.lower(), []).append(f"{first}-{last}" if last > first else f"{first}")
    return [f"{match}meta l4proto {name} th dport {{ {', '.join(some)} }} return" for name, some in by_protocol.items()]


class Firewall:
    """Keeps this machine's rules as the API says. Runs in the machine's network namespace."""

    def __init__(self, api: Api, local: Callable[[], Iterable[tuple[Obj, str]]]) -> None:
        """`local` gives the machine's pods and their addresses, which it knows before anybody else."""
        self._local = local
        self._changed = asyncio.Event()
        self._policies = Informer(api, NETWORKPOLICIES, on_event=lambda *_: self._changed.set())
        # Followed from the first policy on: most sandboxes have none, and need not pay for it.
        self._pods = Informer(api, PODS, on_event=self._on_pod)
        self._namespaces = Informer(api, NAMESPACES, on_event=lambda *_: self._changed.set())
        self._applied: dict[str, Isolation] = {}
        self._covered: frozenset[str] = frozenset()  # uids of the pods that the rules in force know of
        self._news = asyncio.Condition()

    def _on_pod(self, kind: EventType, new: Obj, old: Obj | None) -> None:
        if kind == "DELETED" or old is None or peer(new) != peer(old):
            self._changed.set()

    def touch(self) -> None:
        """A pod of this machine changed."""
        self._changed.set()

    async def cover(self, uid: str) -> None:
        """Wait until the policies are in force for a pod that has an address. Raises `NotCovered`."""
        if self._policies.synced.is_set() and not self._policies.objects:
            return
        self._changed.set()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS), self._news:
                await self._news.wait_for(lambda: uid in self._covered)
        except TimeoutError:
            raise NotCovered("network policies of this pod are not in force yet") from None

    async def run(self) -> None:
        """Until cancelled."""
        netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            async with AsyncExitStack() as followed:
                await followed.enter_async_context(self._policies.running())
                following = False
                while True:
                    self._changed.clear()
                    if self._policies.objects and not following:
                        await followed.enter_async_context(self._pods.running())
                        await followed.enter_async_context(self._namespaces.running())
                        following = True
                    if not await self._apply(netns):
                        await asyncio.sleep(_RETRY_SECONDS)
                        continue
                    await self._changed.wait()
                    await asyncio.sleep(_SETTLE_SECONDS)
        finally:
            os.close(netns)

    async def _apply(self, netns: int) -> bool:
        local = {pod["metadata"]["uid"]: (pod, address) for pod, address in self._local()}
        wanted = self._isolated(local) if self._policies.objects else {}
        if wanted != self._applied:
            try:
                await nft.apply(netns, script(wanted))
            except nft.NftFailed as failed:
                log.error("network policies cannot be enforced: %s", failed)
                return False
            self._applied = wanted
        async with self._news:
            self._covered = frozenset(local)
            self._news.notify_all()
        return True

    def _isolated(self, local: Mapping[str, tuple[Obj, str]]) -> dict[str, Isolation]:
        elsewhere = [peer(pod) for pod in self._pods.objects.values() if pod["metadata"]["uid"] not in local]
        here = [found for pod, address in local.values() if (found := peer(pod, address))]
        everyone = [*here, *filter(None, elsewhere), DNS]
        namespaces = {name: obj["metadata"].get("labels") or {} for (_, name), obj in self._namespaces.objects.items()}
        policies = [policy for _, policy in sorted(self._policies.objects.items())]
        made = {pod.address: isolation(pod, policies, everyone, namespaces) for pod in here}
        return {address: one for address, one in made.items() if one != Isolation()}
