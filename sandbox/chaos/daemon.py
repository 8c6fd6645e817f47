"""The chaos daemon on a node: what a PodNetworkChaos asks, as one nftables table in the pod's network namespace.

Real Chaos Mesh uses ipset and iptables there; the effect is the same: packets are dropped in the pod's own input
and output, established connections included, and nothing is reset. One transaction replaces the whole table.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sandbox.chaos.podnetwork import NET, NET_PORT, SET
from sandbox.client import PODNETWORKCHAOS, PODS, Api, ApiError, EventType, Informer, Key, Obj
from sandbox.node.linux import in_netns

log = logging.getLogger(__name__)

TABLE = "inet gameday_chaos"
NFT_SECONDS = 5.0


class Refused(Exception):
    """The pod's rules cannot be had; the text goes into `status.failedMessage`."""


def ruleset(spec: Mapping[str, Any]) -> str:
    """The nft script that puts `spec` in force, in one transaction; with no rules it only takes the table away."""
    if spec.get("tcs"):
        raise Refused("the sandbox has no traffic shaping (delay, loss, bandwidth)")
    clear = f"table {TABLE} {{}}\ndelete table {TABLE}\n"
    rules = spec.get("iptables") or ()
    if not rules:
        return clear
    sets = {entry["name"]: entry for entry in spec.get("ipsets") or ()}
    lines = [f"table {TABLE} {{"]
    for hook in ("input", "output"):
        lines.append(f"  chain {hook} {{ type filter hook {hook} priority 0; policy accept;")
        for rule in rules:
            if rule["direction"] == hook:
                lines += [f"    {match} drop" for match in _matches(rule, sets, hook)]
        lines.append("  }")
    return clear + "\n".join([*lines, "}\n"])


def _matches(rule: Mapping[str, Any], sets: Mapping[str, Obj], hook: str) -> Iterator[str]:
    interface = "iifname" if hook == "input" else "oifname"
    # The loopback of the pod is its own business; Chaos Mesh's rules are on eth0.
    device = f'{interface} "{rule["device"]}"' if rule.get("device") else f'{interface} != "lo"'
    if rule.get("ipsets") is None:
        yield device
        return
    for name in rule["ipsets"]:
        yield from (f"{device} {match}" for match in _of_set(sets, name, hook))


def _of_set(sets: Mapping[str, Obj], name: str, hook: str) -> Iterator[str]:
    side, port = ("saddr", "sport") if hook == "input" else ("daddr", "dport")
    entry = sets.get(name)
    if entry is None:
        raise Refused(f"the address set {name!r} is not there")
    kind = entry.get("ipsetType", NET)
    if kind == SET:
        for other in entry.get("setNames") or ():
            yield from _of_set(sets, other, hook)
    elif kind == NET:
        for family, addresses in _families(entry.get("cidrs") or ()):
            yield f"{family} {side} {{ {', '.join(addresses)} }}"
    elif kind == NET_PORT:
        for one in entry.get("cidrAndPorts") or ():
            yield f"{_family(one['cidr'])} {side} {one['cidr']} th {port} {int(one['port'])}"
    else:
        raise Refused(f"address sets of type {kind!r} are unknown")


def _family(cidr: str) -> str:
    return "ip6" if ":" in cidr else "ip"


def _families(cidrs: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    for family in ("ip", "ip6"):
        if found := sorted({cidr for cidr in cidrs if _family(cidr) == family}):
            yield family, found


def enforce(netns: int, script: str) -> None:
    """Run the script inside the namespace. Blocks; must not run in a thread that others share meanwhile."""
    with in_netns(netns):
        done = subprocess.run(
            ["nft", "-f", "-"], input=script, capture_output=True, text=True, timeout=NFT_SECONDS, check=False
        )
    if done.returncode:
        raise Refused(f"nft: {' '.join(done.stderr.split())[:300]}")


class Daemon:
    """Keeps the pods of one node as their PodNetworkChaos say."""

    def __init__(self, api: Api, node: str, netns_of: Callable[[str], int | None]) -> None:
        self._api, self._netns_of = api, netns_of
        self._pods = Informer(api, PODS, fields=f"spec.nodeName={node}", on_event=self._changed)
        self._chaos = Informer(api, PODNETWORKCHAOS, on_event=self._changed)
        self._due: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._done: dict[Key, tuple[str, str]] = {}  # what is in force: (pod's uid, script)
        # setns is the thread's: one thread of our own, so that nobody else's socket lands in a pod's namespace.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chaos-daemon")

    def _changed(self, type: EventType, new: Obj, old: Obj | None) -> None:
        self._queue((new["metadata"].get("namespace", ""), new["metadata"]["name"]))

    def _queue(self, key: Key) -> None:
        if key not in self._queued:
            self._queued.add(key)
            self._due.put_nowait(key)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pods.run())
            group.create_task(self._chaos.run())
            group.create_task(self._work())

    async def _work(self) -> None:
        await self._pods.synced.wait()
        await self._chaos.synced.wait()
        while True:
            key = await self._due.get()
            self._queued.discard(key)
            try:
                await self._reconcile(key)
            except (ApiError, OSError) as wrong:
                log.info("%s/%s: %s; again in a second", *key, wrong)
                asyncio.get_running_loop().call_later(1, self._queue, key)

    async def _reconcile(self, key: Key) -> None:
        pod, chaos = self._pods.objects.get(key), self._chaos.objects.get(key)
        if pod is None:
            self._done.pop(key, None)  # its namespace ends with it
            return
        uid = pod["metadata"]["uid"]
        failed = ""
        try:
            await self._enforce(key, uid, (chaos or {}).get("spec") or {})
        except Refused as refused:
            failed = str(refused)
        if chaos is not None:
            await self._tell(chaos, failed)

    async def _enforce(self, key: Key, uid: str, spec: Mapping[str, Any]) -> None:
        script = ruleset(spec)
        if self._done.get(key) == (uid, script) or (key not in self._done and not spec.get("iptables")):
            return
        netns = self._netns_of(uid)
        if netns is None:
            if spec.get("iptables"):
                raise Refused("the pod has no network namespace yet")
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, enforce, netns, script)
        self._done[key] = (uid, script)

    async def _tell(self, chaos: Obj, failed: str) -> None:
        meta, status = chaos["metadata"], chaos.get("status") or {}
        wanted = {"observedGeneration": meta.get("generation", 0), "failedMessage": failed}
        if {name: status.get(name, type(value)()) for name, value in wanted.items()} != wanted:
            await self._api.patch(
                PODNETWORKCHAOS, meta["name"], {"status": wanted}, meta.get("namespace"), sub="status"
            )


async def run(api: Api, node_name: str, netns_of: Callable[[str], int | None]) -> None:
    """Serve one node until cancelled. `netns_of` gives an open descriptor by pod UID; it stays the caller's."""
    await Daemon(api, node_name, netns_of).run()
