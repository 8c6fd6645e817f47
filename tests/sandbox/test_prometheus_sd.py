"""Prometheus' own Kubernetes discovery on a live sandbox, and the HTTP discovery that stands in for it.

Debian's Prometheus is built without Kubernetes discovery: PROMETHEUS_BIN names one that has it, else these are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes_world import PYTHON, api_of, eventually, pod, sandbox, until

from sandbox import discovery, prometheus
from sandbox.client import NODES, PODS, SERVICES, HttpApi, Obj
from sandbox.options import Options
from sandbox.up import Running

ROLES = ("pod", "node", "service", "endpoints", "endpointslice")
SERVICE: Obj = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8000}]},
}


def config(kubeconfig: str) -> str:
    # Targets with the same labels are one to Prometheus: containers without a port differ by their name only.
    apart = {"source_labels": ["__meta_kubernetes_pod_container_name"], "target_label": "container"}
    jobs = [
        {
            "job_name": role,
            "kubernetes_sd_configs": [
                {"role": role, "kubeconfig_file": kubeconfig, "attach_metadata": {"node": role != "service"}}
            ],
            "relabel_configs": [apart],
        }
        for role in ROLES
    ]
    return yaml.safe_dump({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs})


@pytest.fixture
def discovering(tmp_path: Path) -> Iterator[tuple[Running, str]]:
    """A sandbox, and the URL of a Prometheus that discovers its objects."""
    with sandbox(tmp_path / "state") as running:
        file = tmp_path / "prometheus.yml"
        file.write_text(config(running.kubeconfig))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        binary = prometheus.find_binary(Options())
        command = [str(binary), f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        log = tmp_path / "log"
        with log.open("w") as said:
            process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=said, stderr=said)
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: process.poll() is not None or answers(f"{url}/-/ready"))
            if process.poll() is not None:
                text = log.read_text()
                assert "kubernetes" in text, text
                pytest.skip(f"{binary} is built without Kubernetes discovery: name one that has it with PROMETHEUS_BIN")
            yield running, url
        finally:
            process.terminate()
            process.wait(20)


def answers(url: str) -> Any:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read() or b" "
    return None


def discovered(url: str, role: str) -> list[dict[str, str]]:
    """The labels of a role's targets before relabelling; only what Kubernetes says and the address."""
    active = json.loads(answers(f"{url}/api/v1/targets?state=active") or b'{"data": {"activeTargets": []}}')
    found = [one["discoveredLabels"] for one in active["data"]["activeTargets"] if one["scrapePool"] == role]
    return [{k: v for k, v in one.items() if k == "__address__" or k.startswith("__meta_kubernetes_")} for one in found]


def flat(groups: list[Obj]) -> list[dict[str, str]]:
    return [{"__address__": address, **group["labels"]} for group in groups for address in group["targets"]]


def key(labels: dict[str, str]) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in labels.items() if value)


async def stand_in(api: HttpApi) -> list[dict[str, str]]:
    """What the HTTP discovery makes of the same pods."""
    (pods, _), (nodes, _) = await api.list(PODS), await api.list(NODES)
    by_name = {node["metadata"]["name"]: node for node in nodes}
    return [one for p in pods for one in flat(discovery.targets(p, by_name.get(p["spec"].get("nodeName", ""))))]


def test_prometheus_discovers_over_the_kubernetes_api(discovering: tuple[Running, str]) -> None:
    running, url = discovering

    async def ready(api: HttpApi) -> bool:
        status = (await api.get(PODS, "web", "default")).get("status") or {}
        return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or [])

    async def both(api: HttpApi) -> tuple[list[Any], list[Any]]:
        theirs, ours = await asyncio.to_thread(discovered, url, "pod"), await stand_in(api)
        return sorted(map(key, theirs)), sorted(map(key, ours))

    async def settled(api: HttpApi) -> bool:
        theirs, ours = await both(api)
        return len(ours) == 3 and theirs == ours

    async def check() -> None:
        async with api_of(running) as api:
            web = pod("web", {"ports": [{"containerPort": 8000, "name": "http"}]}, initContainers=[INIT])
            web["spec"]["containers"].append({"name": "side-car", "image": "gcr.io/google-containers/pause:latest"})
            web["metadata"]["labels"] = {"app": "web", "example.com/odd-name": "x"}
            web["metadata"]["annotations"] = {"prometheus.io/scrape": "true"}
            await api.create(SERVICES, SERVICE, "default")
            await api.create(PODS, web)
            await eventually(lambda: ready(api), 30)
            with contextlib.suppress(AssertionError):  # what differs says more
                await eventually(lambda: settled(api), 15)
            theirs, ours = await both(api)
            assert len(ours) == 3 and theirs == ours

    asyncio.run(check())
    meta = "__meta_kubernetes_"
    (node,) = until(lambda: discovered(url, "node"))
    assert node[f"{meta}node_name"] == "node-a-1" and node["__address__"].endswith(":10250")
    assert node[f"{meta}node_label_topology_kubernetes_io_zone"] == "a"
    services = {one[f"{meta}service_name"]: one for one in until(lambda: discovered(url, "service"))}
    assert services["web"]["__address__"] == "web.default.svc:80" and "kubernetes" in services
    for role, prefix in (("endpoints", "endpoint"), ("endpointslice", "endpointslice_endpoint_conditions")):
        (found,) = until(
            lambda role=role: [
                one for one in discovered(url, role)
                if one.get(f"{meta}service_name") == "web" and one.get(f"{meta}pod_container_name") == "web"
            ]
        )  # fmt: skip
        assert found[f"{meta}{prefix}_ready"] == "true" and found["__address__"].endswith(":8000")


def test_a_pod_that_goes_is_a_target_no_more(discovering: tuple[Running, str]) -> None:
    running, url = discovering

    async def seen(wanted: int) -> bool:
        return len(await asyncio.to_thread(discovered, url, "pod")) == wanted

    async def check() -> None:
        async with api_of(running) as api:
            await api.create(PODS, pod("web"))
            await eventually(lambda: seen(1), 30)
            await api.delete(PODS, "web", "default", grace=0)
            await eventually(lambda: seen(0), 30)

    asyncio.run(check())


INIT: Obj = {"name": "first", "image": PYTHON, "args": ["true"]}
