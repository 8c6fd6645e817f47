"""Put a stack's manifests into a cluster through its API, and wait until it serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp
import orjson
import yaml

from sandbox import client
from sandbox.client import DAEMONSETS, DEPLOYMENTS, NODES, PODS, Api, ApiError, Kind, Obj
from sandbox.node.network import API_PORT, DNS_ADDRESS, DNS_PORT, GATEWAY
from sandbox.node.resolver import CLUSTER_DNS
from sandbox.up import SandboxError, last_words

STACKS = Path(__file__).resolve().parent / "stack"
_POLL = 0.1  # seconds
_NODES_SECONDS = 30.0
_RBAC = "rbac.authorization.k8s.io"
KINDS = {kind.kind: kind for kind in vars(client).values() if isinstance(kind, Kind)} | {
    "Role": Kind(_RBAC, "v1", "roles", "Role"),
    "RoleBinding": Kind(_RBAC, "v1", "rolebindings", "RoleBinding"),
    "ClusterRole": Kind(_RBAC, "v1", "clusterroles", "ClusterRole", namespaced=False),
    "ClusterRoleBinding": Kind(_RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
}


def documents(stack: str) -> Iterator[Obj]:
    """A stack's objects, in the order of its files. Raises `SandboxError`."""
    files = sorted((STACKS / stack).glob("*.yaml"))
    if not files:
        raise SandboxError(f"the stack {stack!r} has no manifests in {STACKS / stack}")
    for file in files:
        yield from (document for document in yaml.load_all(file.read_text(), _Loader) if document)


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


async def apply(api: Api, document: Obj) -> None:
    """Create an object, or merge it into the one that is there. Raises `SandboxError` with the API's refusal."""
    kind = KINDS.get(document.get("kind", ""))
    if kind is None:
        raise SandboxError(f"the sandbox does not deploy objects of kind {document.get('kind')!r}")
    meta = document["metadata"]
    namespace = meta.get("namespace", "default") if kind.namespaced else None
    try:
        try:
            await api.create(kind, document, namespace)
        except ApiError as error:
            if not error.conflict:
                raise
            await api.patch(kind, meta["name"], document, namespace)
    except ApiError as refused:
        raise SandboxError(f"the API refuses {kind.kind} {meta['name']}: {refused}") from refused


async def cluster_services(api: Api) -> None:
    """What every cluster has beside its API: where the API server is, and the Service of the cluster's DNS."""
    api_port = {"name": "https", "port": API_PORT, "protocol": "TCP"}
    await _endpoints(api, "default", "kubernetes", GATEWAY, [api_port])
    ports: list[Obj] = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    ]
    service: Obj = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
        "spec": {"clusterIP": CLUSTER_DNS, "ports": ports},
    }
    await apply(api, service)
    await _endpoints(api, "kube-system", "kube-dns", DNS_ADDRESS, [{**port, "port": DNS_PORT} for port in ports])


async def _endpoints(api: Api, namespace: str, service: str, address: str, ports: Sequence[Obj]) -> None:
    slice_: Obj = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": service, "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": list(ports),
    }
    try:
        await api.create(client.ENDPOINTSLICES, slice_, namespace)
    except ApiError as there:  # a real API server tells of itself
        if not there.conflict:
            raise


async def stack(api: Api, name: str) -> None:
    for document in documents(name):
        await apply(api, document)


async def nodes_ready(api: Api, names: Sequence[str]) -> None:
    """Wait for all machines, lest the first take all pods. Raises `SandboxError`."""
    deadline = time.monotonic() + _NODES_SECONDS
    while True:
        nodes, _ = await api.list(NODES)
        missing = set(names) - {node["metadata"]["name"] for node in nodes if is_ready(node) and not _tainted(node)}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise SandboxError(f"after {_NODES_SECONDS:.0f} s these nodes are not Ready: {', '.join(sorted(missing))}")
        await asyncio.sleep(_POLL)


def is_ready(obj: Obj) -> bool:
    """Whether a pod or a node says so of itself."""
    conditions = (obj.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _tainted(node: Obj) -> bool:
    return any(t["key"].startswith("node.kubernetes.io/") for t in node["spec"].get("taints") or [])


async def ready(api: Api, stack_name: str, patience: float, state: Path) -> None:
    """Wait until every workload of the stack has all its pods Ready. Raises `SandboxError` with the reasons.

    `state` is the sandbox's state directory, where the pods' logs are.
    """
    deadline = time.monotonic() + patience
    workloads = [(KINDS[d["kind"]], d) for d in documents(stack_name) if d["kind"] in ("Deployment", "DaemonSet")]
    while True:
        late = [(kind, d) for kind, d in workloads if not await _complete(api, kind, d)]
        if not late:
            return
        if time.monotonic() > deadline:
            names = ", ".join(f"{d['kind']} {d['metadata']['name']}" for _, d in late)
            raise SandboxError(f"the stack is not ready after {patience:.0f} s: {names}; {await _reasons(api, state)}")
        await asyncio.sleep(_POLL)


async def _complete(api: Api, kind: Kind, document: Obj) -> bool:
    meta = document["metadata"]
    current = await api.get(kind, meta["name"], meta.get("namespace", "default"))
    status = current.get("status") or {}
    if status.get("observedGeneration") != current["metadata"].get("generation"):
        return False
    if kind is DEPLOYMENTS:
        return bool(status.get("readyReplicas", 0) == current["spec"].get("replicas", 1))
    assert kind is DAEMONSETS, "no other kind is asked for"
    return 0 < int(status.get("desiredNumberScheduled", 0)) == int(status.get("numberReady", 0))


async def _reasons(api: Api, state: Path) -> str:
    pods, _ = await api.list(PODS)
    late = [pod for pod in pods if not is_ready(pod)]
    return "; ".join(_reason(pod) + _last_line(pod, state) for pod in late) or "no pod was made"


def _last_line(pod: Obj, state: Path) -> str:
    logs = list(state.glob(f"nodes/*/pods/{pod['metadata']['uid']}/logs/*.log"))
    written = [log for log in logs if log.stat().st_size]
    if not written:
        return ""
    line = last_words(max(written, key=lambda log: log.stat().st_mtime)).partition(" ")[2]
    return f", last log line: {line}"


def _reason(pod: Obj) -> str:
    meta, status = pod["metadata"], pod.get("status") or {}
    name = f"{meta['namespace']}/{meta['name']}"
    for container in status.get("containerStatuses") or []:
        if waiting := container["state"].get("waiting"):
            last = (container.get("lastState") or {}).get("terminated") or {}
            code = f", last exit code {last['exitCode']}" if last else ""
            return f"{name}: {waiting.get('reason')}{code} ({waiting.get('message', 'no message')})"
    for condition in status.get("conditions") or []:
        if condition["status"] == "False" and condition.get("message"):
            return f"{name}: {condition['message']}"
    return f"{name}: {status.get('phase', 'unknown')}"


async def scraped(api: Api, url: str, patience: float) -> None:
    """Wait until Prometheus has scraped every Ready pod that asks for it. Raises `SandboxError`."""
    deadline = time.monotonic() + patience
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            pods, _ = await api.list(PODS)
            wanted = {p["metadata"]["name"] for p in pods if _asks(p) and is_ready(p)}
            missing = wanted - await _up(session, url)
            if not missing:
                return
            if time.monotonic() > deadline:
                raise SandboxError(f"Prometheus does not scrape {', '.join(sorted(missing))} after {patience:.0f} s")
            await asyncio.sleep(_POLL)


def _asks(pod: Obj) -> bool:
    return (pod["metadata"].get("annotations") or {}).get("prometheus.io/scrape") == "true"


async def _up(session: aiohttp.ClientSession, url: str) -> set[str]:
    try:
        async with session.get(f"{url}/api/v1/query", params={"query": "up == 1"}) as answer:
            found = orjson.loads(await answer.read())
    except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError):
        return set()
    return {series["metric"].get("pod", "") for series in (found.get("data") or {}).get("result") or []}
