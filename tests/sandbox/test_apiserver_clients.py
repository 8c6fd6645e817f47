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


class Kubectl:
    def __init__(self, kubeconfig: str, home: Path) -> None:
        self._environment = {"KUBECONFIG": kubeconfig, "HOME": str(home), "PATH": os.environ["PATH"]}

    def called(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", *args], env=self._environment, capture_output=True, text=True, timeout=20, check=False
        )

    def __call__(self, *args: str) -> str:
        done = self.called(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, what: str, path: str) -> str:
        return self("get", *what.split("/"), "-o", f"jsonpath={{{path}}}")


needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")


@needs_kubectl
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
        kubectl = Kubectl(kubeconfig, tmp_path)
        assert kubectl("apply", "-f", str(manifest)) == "deployment.apps/web created\n"
        assert kubectl("apply", "-f", str(manifest)) == "deployment.apps/web unchanged\n"
        assert "registry.example/app:1" in kubectl("get", "deploy", "-o", "wide")
        assert kubectl("scale", "deploy/web", "--replicas=3") == "deployment.apps/web scaled\n"
        assert kubectl("get", "deploy", "web", "-o", "jsonpath={.spec.replicas}") == "3"
        assert "Replicas:               3 desired" in kubectl("describe", "deploy", "web")
        manifest.write_text(manifest.read_text().replace("image:", "imagee:"))
        refused = kubectl.called("apply", "-f", str(manifest))
        assert 'unknown field "spec.template.spec.containers[0].imagee"' in refused.stderr
        assert kubectl("auth", "can-i", "delete", "pods") == "yes\n"
        assert kubectl.called("auth", "can-i", "delete", "pods", "--as=jane").stdout == "no\n"
        assert kubectl("delete", "deploy", "web").startswith('deployment.apps "web" deleted')


# Commands that send protobuf, what they print, and a field of what they made.
TYPED = [
    ("create namespace n", "namespace/n created", "ns/n", ".status.phase", "Active"),
    ("create configmap c --from-literal=a=b", "configmap/c created", "cm/c", ".data.a", "b"),
    ("create secret generic s --from-literal=a=b", "secret/s created", "secret/s", ".data.a", "Yg=="),
    ("create serviceaccount sa", "serviceaccount/sa created", "sa/sa", ".metadata.name", "sa"),
    ("create deployment d --image=x:1 --replicas=0", "deployment.apps/d created", "deploy/d", ".spec.replicas", "0"),
    ("create quota q --hard=pods=5,services=10", "resourcequota/q created", "quota/q", ".spec.hard.pods", "5"),
    ("create cronjob cj --image=x:1 --schedule=@hourly -- date", "cronjob.batch/cj created", "cj/cj",
     ".spec.jobTemplate.spec.template.spec.containers[0].command[0]", "date"),
    ("create job j --image=x:1", "job.batch/j created", "job/j", ".spec.template.spec.restartPolicy", "Never"),
    ("create job from --from=cronjob/cj", "job.batch/from created", "job/from",
     ".metadata.ownerReferences[0].kind", "CronJob"),
    ("create poddisruptionbudget b --selector=app=d --min-available=50%", "poddisruptionbudget.policy/b created",
     "pdb/b", ".spec.minAvailable", "50%"),
    ("create priorityclass high --value=1000 --preemption-policy=Never",
     "priorityclass.scheduling.k8s.io/high created", "pc/high", ".value", "1000"),
    ("create role r --verb=get,list --resource=pods,deployments.apps", "role.rbac.authorization.k8s.io/r created",
     "role/r", ".rules[1].apiGroups[0]", "apps"),
    ("create clusterrole cr --verb=get --non-resource-url=/metrics",
     "clusterrole.rbac.authorization.k8s.io/cr created", "clusterrole/cr", ".rules[0].nonResourceURLs[0]", "/metrics"),
    ("create rolebinding rb --role=r --serviceaccount=default:sa", "rolebinding.rbac.authorization.k8s.io/rb created",
     "rolebinding/rb", ".subjects[0].namespace", "default"),
    ("create service clusterip svc --tcp=80:8080", "service/svc created", "svc/svc", ".spec.ports[0].targetPort",
     "8080"),
    ("create service nodeport np --tcp=80 --node-port=30080", "service/np created", "svc/np", ".spec.ports[0].nodePort",
     "30080"),
    ("autoscale deployment d --max=3 --cpu-percent=70", "horizontalpodautoscaler.autoscaling/d autoscaled", "hpa/d",
     ".spec.metrics[0].resource.target.averageUtilization", "70"),
    ("run p --image=x:1 --env=A=b --labels=app=p --port=80", "pod/p created", "pod/p",
     ".spec.containers[0].env[0].value", "b"),
    ("expose pod p --name=exposed --port=80", "service/exposed exposed", "svc/exposed", ".spec.selector.app", "p"),
    ("expose deployment d --port=80 --target-port=http", "service/d exposed", "svc/d", ".spec.ports[0].targetPort",
     "http"),
    ("set image deployment/d x=x:2", "deployment.apps/d image updated", "deploy/d",
     ".spec.template.spec.containers[0].image", "x:2"),
    ("set resources deployment/d --limits=memory=1Gi", "deployment.apps/d resource requirements updated", "deploy/d",
     ".spec.template.spec.containers[0].resources.limits.memory", "1Gi"),
    ("set env deployment/d A=b", "deployment.apps/d env updated", "deploy/d",
     ".spec.template.spec.containers[0].env[0].value", "b"),
    ("label pod p tier=web", "pod/p labeled", "pod/p", ".metadata.labels.tier", "web"),
    ("annotate pod p note=x", "pod/p annotated", "pod/p", ".metadata.annotations.note", "x"),
    ("rollout restart deployment/d", "deployment.apps/d restarted", "deploy/d", ".spec.replicas", "0"),
]  # fmt: skip


@needs_kubectl
def test_kubectls_typed_commands(tmp_path: Path) -> None:
    with control_plane(tmp_path / "state") as kubeconfig:
        kubectl = Kubectl(kubeconfig, tmp_path)
        for command, printed, what, path, value in TYPED:
            assert kubectl(*command.split()) == f"{printed}\n"
            assert kubectl.field(what, path) == value, command
        assert kubectl("create", "token", "sa", "--duration=1h").count(".") == 2
        if "--cpu=" in kubectl("autoscale", "--help"):  # from 1.34
            kubectl("create", "deployment", "e", "--image=x:1")
            kubectl("autoscale", "deployment", "e", "--max=3", "--cpu=500m", "--memory=60%")
            assert kubectl.field("hpa/e", ".spec.metrics[*].resource.target.type") == "AverageValue Utilization"


@needs_kubectl
def test_kubectl_drains_a_node(tmp_path: Path) -> None:
    with control_plane(tmp_path / "state") as kubeconfig:
        kubectl = Kubectl(kubeconfig, tmp_path)
        node = tmp_path / "node.yaml"
        node.write_text("apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n")
        kubectl("create", "-f", str(node))
        kubectl("run", "p", "--image=x:1", '--overrides={"spec":{"nodeName":"n1"}}')
        assert kubectl("cordon", "n1") == "node/n1 cordoned\n"
        assert kubectl.field("node/n1", ".spec.unschedulable") == "true"
        assert kubectl("drain", "n1", "--force", "--grace-period=0", "--timeout=15s").endswith("node/n1 drained\n")
        assert kubectl("get", "pods", "-o", "name") == ""
        assert kubectl("uncordon", "n1") == "node/n1 uncordoned\n"


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
