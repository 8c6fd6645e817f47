"""Which container of a pod is the engine, and where it listens: real pods have sidecars, and declare what they like."""

from __future__ import annotations

from typing import Any

from gameday.cluster import MAIN, Obj, to_pod, to_workload

PROXY: Obj = {"name": "istio-proxy", "image": "proxyv2", "ports": [{"containerPort": 15090, "name": "http-envoy-prom"}]}
GPU: Obj = {"limits": {"nvidia.com/gpu": "1"}}


def made(*containers: Obj, annotations: dict[str, str] | None = None) -> Any:
    meta = {"name": "engine-0", "namespace": "llm", "uid": "u", "annotations": annotations}
    return to_pod({"metadata": meta, "spec": {"containers": list(containers)}}, {})


def test_a_sidecar_that_stands_first_is_not_the_engine() -> None:
    """Xid 13 killed Istio's proxy, whose end the probers took for the engine's."""
    engine = {"name": "vllm", "resources": GPU, "ports": [{"containerPort": 8000}]}
    pod = made(PROXY, engine)
    assert (pod.container, pod.ports[0], pod.gpus) == ("vllm", 8000, 1)
    plain = {"name": "vllm", "ports": [{"containerPort": 8000}]}
    assert made(PROXY, plain, annotations={MAIN: "vllm"}).container == "vllm"
    assert made(plain, PROXY).container == "vllm"


def test_a_port_that_only_a_probe_names_is_a_port() -> None:
    """containerPort is optional; without it no death could be proven."""
    probe = {"httpGet": {"path": "/health", "port": 8000}}
    assert made({"name": "vllm", "readinessProbe": probe}).ports == (8000,)
    assert made({"name": "vllm", "startupProbe": {"tcpSocket": {"port": 8001}}}).ports == (8001,)
    assert made({"name": "vllm", "readinessProbe": {"exec": {"command": ["true"]}}}).ports == ()


def test_the_port_that_is_probed_comes_first_unless_a_mesh_has_moved_the_probe() -> None:
    ports = [{"containerPort": 9090, "name": "metrics"}, {"containerPort": 8000, "name": "http"}]
    by_name = {"name": "vllm", "ports": ports, "readinessProbe": {"httpGet": {"port": "http"}}}
    assert made(by_name).ports == (8000, 9090)
    moved = {"name": "vllm", "ports": ports[1:], "readinessProbe": {"httpGet": {"port": 15020}}}
    assert made(PROXY, moved, annotations={MAIN: "vllm"}).ports == (8000, 15090)
    udp = {"name": "vllm", "ports": [{"containerPort": 53, "protocol": "UDP"}]}
    assert made(udp).ports == ()


def test_an_update_changes_the_engines_image_and_not_a_sidecars() -> None:
    engine = {"name": "vllm", "image": "vllm:1", "resources": GPU}
    template = {"metadata": {}, "spec": {"containers": [PROXY, engine]}}
    meta = {"name": "engine", "namespace": "llm", "uid": "u"}
    found = to_workload({"metadata": meta, "spec": {"replicas": 2, "template": template}})
    assert next(iter(found.images.items())) == ("vllm", "vllm:1")
