"""A soak of the sandbox: random faults in a row, each healed, each followed by a look that nothing is left of it.

    python benchmarks/soak.py [--faults 100] [--seed 1] [--within SECONDS]

After each fault: no chaos resource is left, no rule for a pod's network, no cordon, no taint; as many nodes, pods and
processes as before; every pod Ready; ten requests through the load balancer answered. What the sandbox refuses to do is
counted as refused, once per kind. The exit code is 1 at the first fault after which something was left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: it has a loadgen.py

import aiohttp  # noqa: E402

from benchmarks.processes import family, memory  # noqa: E402
from sandbox import deploy  # noqa: E402
from sandbox.client import (  # noqa: E402
    NETWORKCHAOS,
    NODES,
    PODCHAOS,
    PODNETWORKCHAOS,
    PODS,
    STRESSCHAOS,
    ApiError,
    HttpApi,
    Kind,
    Obj,
)
from sandbox.options import COMPRESSED, Options  # noqa: E402
from sandbox.up import Running, down, up  # noqa: E402

NAMESPACE, ENGINE, GATEWAY = "llm", "my-llama32", "gateway"
INJECTED_SECONDS = 15.0
HEALED_SECONDS = 60.0  # a machine's successor boots, its pods load their model
_POLL = 0.1


class Left(Exception):
    """Something of a fault is left; the text says what."""


class Refused(Exception):
    """The sandbox does not do this, and says so."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A chaos resource, or something done to a node."""

    name: str
    kind: Kind | None = None  # None: of the node named by `spec`
    spec: Obj = field(default_factory=dict)


def faults(rng: random.Random, nodes: Sequence[str]) -> dict[str, Callable[[], Fault]]:
    """Every fault there is, by name; each call draws its targets anew."""
    zones = ("a", "b", "c")

    def chosen(app: str, **labels: str) -> Obj:
        return {"namespaces": [NAMESPACE], "labelSelectors": {"app": app, **labels}, "podPhaseSelectors": ["Running"]}

    def app() -> str:
        return rng.choice((ENGINE, GATEWAY))

    def pod(action: str, **more: Any) -> Fault:
        spec = {"action": action, "mode": "one", "selector": chosen(app()), **more}
        return Fault(action, PODCHAOS, spec)

    def container() -> Fault:
        at = app()
        names = {ENGINE: "engine", GATEWAY: "gateway"}
        spec = {"action": "container-kill", "mode": "one", "selector": chosen(at), "containerNames": [names[at]]}
        return Fault("container-kill", PODCHAOS, spec)

    def net(action: str, **more: Any) -> Fault:
        zone = rng.choice(zones)
        selector = {**chosen(ENGINE), "nodeSelectors": {"topology.kubernetes.io/zone": zone}}
        spec: Obj = {"action": action, "mode": "all", "selector": selector, "duration": "60s", **more}
        spec |= {"direction": rng.choice(("to", "both")), "target": {"mode": "all", "selector": chosen(GATEWAY)}}
        return Fault(f"network {action}", NETWORKCHAOS, spec)

    def stress(name: str, **stressors: Any) -> Fault:
        spec = {"mode": "one", "selector": chosen(ENGINE), "duration": "60s", "stressors": stressors}
        return Fault(f"stress {name}", STRESSCHAOS, spec)

    def on_node(name: str) -> Fault:
        return Fault(name, None, {"node": rng.choice(nodes)})

    return {
        "pod-kill": lambda: pod("pod-kill", gracePeriod=0),
        "pod-failure": lambda: pod("pod-failure", duration="60s"),
        "container-kill": container,
        "partition": lambda: net("partition"),
        "delay": lambda: net("delay", delay={"latency": f"{rng.randint(20, 300)}ms", "jitter": "5ms"}),
        "loss": lambda: net("loss", loss={"loss": str(rng.randint(5, 60))}),
        "bandwidth": lambda: net("bandwidth", bandwidth={"rate": "1mbps", "limit": 20971520, "buffer": 10000}),
        "cpu": lambda: stress("cpu", cpu={"workers": 1, "load": 50}),
        "memory": lambda: stress("memory", memory={"workers": 1, "size": "32MB"}),
        "cordon and evict": lambda: on_node("cordon and evict"),
        "node deleted": lambda: on_node("node deleted"),
    }


@dataclass(slots=True)
class Soak:
    """One sandbox under one fault after another."""

    api: HttpApi
    running: Running
    session: aiohttp.ClientSession
    rng: random.Random
    processes: int = 0
    count: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    injected: list[float] = field(default_factory=list)
    healed: list[float] = field(default_factory=list)

    async def run(self, wanted: int, within: float) -> None:
        """Raises `Left`."""
        await self.until(self.trouble, HEALED_SECONDS, "before the first fault")
        self.processes = len(family(self.running.pid))
        deadline = time.monotonic() + within
        number = 0
        while number < wanted and time.monotonic() < deadline:
            nodes, _ = await self.api.list(NODES)
            choices = faults(self.rng, sorted(node["metadata"]["name"] for node in nodes))
            name = self.rng.choice([name for name in choices if name not in self.refused])
            fault = choices[name]()
            begun = time.monotonic()
            try:
                await (self.inject(fault, f"soak-{number}") if fault.kind else self.on_node(fault))
            except Refused as why:
                self.refused[name] = str(why)
                print(f"  – {fault.name}: refused: {why}", flush=True)
                await self.until(self.trouble, HEALED_SECONDS, f"the refusal of {fault.name}")
                continue
            number += 1
            healing = time.monotonic()
            await self.until(self.trouble, HEALED_SECONDS, f"fault {number}, {fault.name} {fault.spec}")
            self.healed.append(time.monotonic() - healing)
            self.count[name] += 1
            print(
                f"{number:4} {fault.name:<20} {healing - begun:5.1f} s, healed in {self.healed[-1]:.1f} s", flush=True
            )

    async def inject(self, fault: Fault, name: str) -> None:
        """Apply a chaos resource, let it act for a moment, delete it."""
        kind = fault.kind
        assert kind is not None
        body: Obj = {"apiVersion": kind.api_version, "kind": kind.kind, "spec": fault.spec}
        body["metadata"] = {"name": name, "namespace": NAMESPACE, "labels": {"app.kubernetes.io/managed-by": "soak"}}
        begun = time.monotonic()
        try:
            await self.api.create(kind, body)
        except ApiError as error:
            raise Refused(str(error)) from error
        why = await self._acts(kind, name)
        if why:
            await self.api.delete(kind, name, NAMESPACE)
            raise Refused(why)
        self.injected.append(time.monotonic() - begun)
        await asyncio.sleep(self.rng.uniform(0.2, 1.5))
        await self.api.delete(kind, name, NAMESPACE)

    async def _acts(self, kind: Kind, name: str) -> str:
        """Wait until all is injected: "", or why it never will be. Raises `Left`."""
        deadline = time.monotonic() + INJECTED_SECONDS
        while True:
            status = (await self.api.get(kind, name, NAMESPACE)).get("status") or {}
            if any(c["type"] == "AllInjected" and c["status"] == "True" for c in status.get("conditions") or []):
                return ""
            records = (status.get("experiment") or {}).get("containerRecords") or []
            said = [e["message"] for r in records for e in r.get("events") or [] if e["type"] == "Failed"]
            if lacking := [text for text in said if "sandbox" in text or "not support" in text]:
                return str(lacking[0])
            if time.monotonic() > deadline:
                raise Left(f"{kind.kind} {name} is not injected after {INJECTED_SECONDS:.0f} s: {said or status}")
            await asyncio.sleep(_POLL)

    async def on_node(self, fault: Fault) -> None:
        node = fault.spec["node"]
        if fault.name == "node deleted":
            await self.api.delete(NODES, node)
            await asyncio.sleep(COMPRESSED.machine_boot)
            return
        await self.api.patch(NODES, node, {"spec": {"unschedulable": True}})
        pods, _ = await self.api.list(PODS, NAMESPACE, fields=f"spec.nodeName={node}")
        for pod in pods:
            body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod["metadata"]["name"]}}
            with contextlib.suppress(ApiError):  # its budget does not let it go, or it has gone
                await self.api.post(PODS, pod["metadata"]["name"], "eviction", body, NAMESPACE)
        await asyncio.sleep(self.rng.uniform(0.5, 2))
        await self.api.patch(NODES, node, {"spec": {"unschedulable": None}})

    # -- what is left

    async def until(self, trouble: Callable[[], Awaitable[str]], within: float, after: str) -> None:
        deadline = time.monotonic() + within
        while why := await trouble():
            if time.monotonic() > deadline:
                raise Left(f"{within:.0f} s after {after}: {why}")
            await asyncio.sleep(_POLL)

    async def trouble(self) -> str:
        """What is not as it was; "" when all is."""
        for kind in (PODCHAOS, NETWORKCHAOS, STRESSCHAOS):
            found, _ = await self.api.list(kind)
            if found:
                return f"{kind.kind} {found[0]['metadata']['name']} is still there"
        rules, _ = await self.api.list(PODNETWORKCHAOS)
        if busy := [r["metadata"]["name"] for r in rules if any((r.get("spec") or {}).values())]:
            return f"PodNetworkChaos {busy[0]} still has rules"
        nodes, _ = await self.api.list(NODES)
        bad = [n["metadata"]["name"] for n in nodes if not _fit(n)]
        if bad or len(nodes) != 6:
            return f"{len(nodes)} nodes, not fit: {', '.join(bad) or 'none'}"
        pods, _ = await self.api.list(PODS)
        late = [p["metadata"]["name"] for p in pods if not deploy.is_ready(p) or "deletionTimestamp" in p["metadata"]]
        if late or len(pods) != 6 + 3 + 2 * 6:  # engines, gateways, two DaemonSets
            return f"{len(pods)} pods, not ready: {', '.join(late) or 'none'}"
        if self.processes and (now := len(family(self.running.pid))) != self.processes:
            return f"{now} processes, {self.processes} before"
        return await self._unserved()

    async def _unserved(self) -> str:
        question = {"model": ENGINE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        for _ in range(10):
            try:
                async with self.session.post(f"{self.running.target_url}/v1/chat/completions", json=question) as answer:
                    if answer.status != 200:
                        return f"a request was answered {answer.status}"
            except (aiohttp.ClientError, TimeoutError) as lost:
                return f"a request failed: {lost!r}"
        return ""


def _fit(node: Obj) -> bool:
    return deploy.is_ready(node) and not node["spec"].get("taints") and not node["spec"].get("unschedulable")


async def soak(running: Running, wanted: int, seed: int, within: float) -> int:
    state = Path(running.state_dir)
    token, ca = (state / "token").read_text().strip(), (state / "ca.crt").read_text()
    timeout = aiohttp.ClientTimeout(total=10)
    async with HttpApi(running.api_url, token, ca) as api, aiohttp.ClientSession(timeout=timeout) as session:
        one = Soak(api, running, session, random.Random(seed))
        before = memory(family(running.pid))
        try:
            await one.run(wanted, within)
            left = ""
        except Left as why:
            left = str(why)
        done = sum(one.count.values())
        print(f"{done} faults (seed {seed}): {', '.join(f'{n} × {name}' for name, n in one.count.most_common())}")
        for name, why in one.refused.items():
            print(f"refused: {name}: {why}")
        if one.injected:
            times = sorted(one.injected)
            print(f"apply → injected: median {times[len(times) // 2]:.2f} s, worst {times[-1]:.2f} s")
        after = memory(family(running.pid))
        print(f"memory: {sum(before.values()):.0f} MiB before, {sum(after.values()):.0f} MiB after")
        grown = sorted(after, key=lambda name: before.get(name, 0.0) - after[name])[:5]
        print("grew most:", ", ".join(f"{name} {before.get(name, 0.0):.0f} → {after[name]:.0f} MiB" for name in grown))
        print(f"LEFT BEHIND: {left}" if left else "nothing was left behind")
        return 1 if left or not done else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random faults in a row; nothing may be left of any.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within", type=float, default=3600.0, help="seconds after which no further fault begins")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        options = Options(
            state_dir=state, prometheus_bin=os.environ.get("PROMETHEUS_BIN", "prometheus"), parent=os.getpid()
        )
        try:
            return asyncio.run(soak(up(options, print), args.faults, args.seed, args.within))
        finally:
            down(state)


if __name__ == "__main__":
    sys.exit(main())
