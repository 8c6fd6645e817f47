"""Real clients against the API server: the `kubernetes` package, kubectl, and the pod log's way to a kubelet."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from apiserver_world import ADMIN, Cluster, pod, run
from kubernetes import client, config, watch


@contextmanager
def control_plane(state: Path) -> Iterator[str]:
    """`python -m sandbox.controlplane` without controllers; yields its kubeconfig's path."""
    command = [sys.executable, "-m", "sandbox.controlplane", "--state-dir", str(state), "--no-controllers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("https://127.0.0.1:")
            yield str(state / "kubeconfig")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 0


def test_the_kubernetes_client(tmp_path: Path) -> None:
    with control_plane(tmp_path) as kubeconfig:
        assert Path(kubeconfig).stat().st_mode & 0o077 == 0
        loaded = config.new_client_from_config(kubeconfig)
        core = client.CoreV1Api(loaded)
        assert {"default", "kube-system"} <= {item.metadata.name for item in core.list_namespace().items}
        made = core.create_namespaced_pod("default", {"apiVersion": "v1", "kind": "Pod", **pod("p")})
        assert made.spec.termination_grace_period_seconds == 30
        assert made.status.phase == "Pending"
        first = next(iter(watch.Watch().stream(core.list_namespaced_pod, "default", timeout_seconds=5)))
        assert (first["type"], first["object"].metadata.name) == ("ADDED", "p")
        core.patch_namespaced_pod("p", "default", {"metadata": {"labels": {"x": "y"}}})
        assert len(core.list_pod_for_all_namespaces(label_selector="x=y").items) == 1
        with pytest.raises(client.ApiException) as caught:
            core.read_namespaced_pod("nope", "default")
        assert caught.value.status == 404
        core.delete_namespaced_pod("p", "default")
        assert core.list_namespaced_pod("default").items == []
        loaded.close()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_kubectl(tmp_path: Path) -> None:
    manifest = tmp_path / "deployment.yaml"
    manifest.write_text(
        """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: main, image: "registry.example/app:1"}]}
"""
    )
    with control_plane(tmp_path / "state") as kubeconfig:
        environment = {"KUBECONFIG": kubeconfig, "HOME": str(tmp_path), "PATH": os.environ["PATH"]}

        def called(*args: str) -> subprocess.CompletedProcess[str]:
            command = ["kubectl", *args]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)

        def kubectl(*args: str) -> str:
            done = called(*args)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert kubectl("apply", "-f", str(manifest)) == "deployment.apps/web created\n"
        assert kubectl("apply", "-f", str(manifest)) == "deployment.apps/web unchanged\n"
        assert "registry.example/app:1" in kubectl("get", "deploy", "-o", "wide")
        assert kubectl("scale", "deploy/web", "--replicas=3") == "deployment.apps/web scaled\n"
        assert kubectl("get", "deploy", "web", "-o", "jsonpath={.spec.replicas}") == "3"
        assert "Replicas:               3 desired" in kubectl("describe", "deploy", "web")
        manifest.write_text(manifest.read_text().replace("image:", "imagee:"))
        refused = called("apply", "-f", str(manifest))
        assert 'unknown field "spec.template.spec.containers[0].imagee"' in refused.stderr
        # What follows sends protobuf.
        assert kubectl("create", "configmap", "c", "--from-literal=a=b") == "configmap/c created\n"
        assert kubectl("get", "configmap", "c", "-o", "jsonpath={.data.a}") == "b"
        assert kubectl("create", "deployment", "d", "--image=x:1", "--replicas=0") == "deployment.apps/d created\n"
        assert kubectl("get", "deploy", "d", "-o", "jsonpath={.spec.replicas}") == "0"
        scaled = kubectl("autoscale", "deployment", "d", "--max=3", "--cpu-percent=70")  # autoscaling/v1
        assert scaled == "horizontalpodautoscaler.autoscaling/d autoscaled\n"
        path = "jsonpath={.spec.metrics[0].resource.target.averageUtilization}"
        assert kubectl("get", "hpa", "d", "-o", path) == "70"
        assert kubectl("auth", "can-i", "delete", "pods") == "yes\n"
        assert called("auth", "can-i", "delete", "pods", "--as=jane").stdout == "no\n"
        assert kubectl("delete", "deploy", "web").startswith('deployment.apps "web" deleted')


def test_logs_come_from_the_kubelet_of_the_node(tmp_path: Path) -> None:
    asked: list[str] = []

    async def logs(request: web.Request) -> web.StreamResponse:
        asked.append(request.path_qs)
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"first\n")
        if request.query.get("follow") == "true":
            await asyncio.sleep(0.05)
            await answer.write(b"second\n")
        return answer

    async def test(one: Cluster) -> None:
        app = web.Application()
        app.router.add_get("/containerLogs/{tail:.*}", logs)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        await one.raw("POST", "/api/v1/nodes", json={"metadata": {"name": "n1"}, "status": status})
        await one.raw("POST", "/api/v1/namespaces/default/pods", json=pod("p", nodeName="n1"))
        path = one.url + "/api/v1/namespaces/default/pods/p/log"
        headers = {"Authorization": f"Bearer {ADMIN}"}
        async with one.session.get(path + "?follow=true&tailLines=5", headers=headers) as answer:
            assert (answer.status, await answer.text()) == (200, "first\nsecond\n")
        assert asked == ["/containerLogs/default/p/main?follow=true&tailLines=5"]
        async with one.session.get(path + "?container=nope", headers=headers) as answer:
            assert answer.status == 400
            assert "container nope is not valid for pod p" in (await answer.json())["message"]
        await runner.cleanup()
        async with one.session.get(path, headers=headers) as answer:
            assert answer.status == 500

    run(tmp_path, test)


def test_protobuf_that_is_not_understood_is_an_error(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        headers = {"Content-Type": "application/vnd.kubernetes.protobuf"}
        envelope = b"k8s\x00\x0a\x11\x0a\x02v1\x12\x0bConfigMapXY"
        for body in (b"nonsense", envelope, envelope + b"\x12\xff"):
            code, answer = await one.raw("POST", "/api/v1/namespaces/default/configmaps", data=body, headers=headers)
            assert (code, answer["reason"]) == (415, "UnsupportedMediaType")
            assert "does not understand this protobuf body" in answer["message"]

    run(tmp_path, test)


def test_the_type_table_is_that_of_the_kubernetes_package() -> None:
    from sandbox.apiserver import typegen  # noqa: PLC0415  (its imports take a second)

    assert client.__version__.startswith("37."), "regenerate types.json and raise this number"
    assert typegen.TARGET.read_bytes() == typegen.generate()
