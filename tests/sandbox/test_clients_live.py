"""Real clients on a live sandbox: the `kubernetes` package, chaostoolkit-kubernetes, kubectl."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaosk8s.deployment import actions as deployment_actions, probes as deployment_probes
from chaosk8s.node import actions as node_actions, probes as node_probes
from chaosk8s.pod import actions as pod_actions, probes as pod_probes
from chaoslib.exceptions import ActivityFailed
from kubernetes import client, config, dynamic, watch
from nodes_world import PYTHON, READINESS, SERVER, sandbox, until

from sandbox.up import Running

# The package leaves its connection pools to the collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
WEB: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web", "namespace": "default"},
    "spec": {
        "replicas": 3,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {
                "terminationGracePeriodSeconds": 2,
                "containers": [
                    {"name": "web", "image": PYTHON, "args": ["python3", "-c", SERVER], "readinessProbe": READINESS}
                ],
            },
        },
    },
}
BUDGET = {
    "apiVersion": "policy/v1",
    "kind": "PodDisruptionBudget",
    "metadata": {"name": "web", "namespace": "default"},
    "spec": {"minAvailable": 2, "selector": {"matchLabels": {"app": "web"}}},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("clients") / "state", zones=("a", "b"), nodes_per_zone=1) as one:
        yield one


@pytest.fixture
def api(running: Running) -> Iterator[client.ApiClient]:
    """With `web` of three ready pods, and nothing cordoned; and so afterwards."""
    loaded = config.new_client_from_config(running.kubeconfig)
    apps, core = client.AppsV1Api(loaded), client.CoreV1Api(loaded)
    apps.create_namespaced_deployment("default", WEB)
    client.PolicyV1Api(loaded).create_namespaced_pod_disruption_budget("default", BUDGET)
    until(lambda: (apps.read_namespaced_deployment("web", "default").status.ready_replicas or 0) == 3)
    yield loaded
    client.PolicyV1Api(loaded).delete_namespaced_pod_disruption_budget("web", "default")
    apps.delete_namespaced_deployment("web", "default", grace_period_seconds=0)
    for node in core.list_node().items:
        core.patch_node(node.metadata.name, {"spec": {"unschedulable": None}})
    until(lambda: not core.list_namespaced_pod("default").items)
    loaded.close()


def pods(api: client.ApiClient) -> list[Any]:
    found: list[Any] = client.CoreV1Api(api).list_namespaced_pod("default", label_selector="app=web").items
    return found


# -- the kubernetes package


def test_the_typed_client_sees_and_changes(api: client.ApiClient) -> None:
    core, apps = client.CoreV1Api(api), client.AppsV1Api(api)
    assert {node.metadata.name for node in core.list_node().items} == {"node-a-1", "node-b-1"}
    victim = pods(api)[0].metadata
    core.delete_namespaced_pod(victim.name, "default", grace_period_seconds=0)
    until(lambda: victim.uid not in {p.metadata.uid for p in pods(api)} and len(pods(api)) == 3)
    assert apps.read_namespaced_deployment_scale("web", "default").spec.replicas == 3
    apps.patch_namespaced_deployment_scale("web", "default", {"spec": {"replicas": 1}})
    until(lambda: len(pods(api)) == 1)
    assert "serving" in core.read_namespaced_pod_log(pods(api)[0].metadata.name, "default")


def test_the_dynamic_client_finds_kinds_by_discovery(api: client.ApiClient) -> None:
    found = dynamic.DynamicClient(api)
    deployments = found.resources.get(api_version="apps/v1", kind="Deployment")
    assert deployments.get(name="web", namespace="default").spec.replicas == 3
    chaos = found.resources.get(api_version="chaos-mesh.org/v1alpha1", kind="PodChaos")
    assert chaos.namespaced and chaos.get(namespace="default").items == []
    with pytest.raises(dynamic.exceptions.ResourceNotFoundError):
        found.resources.get(api_version="example.dev/v1", kind="Nothing")


def test_a_watch_goes_on_where_another_broke_off(api: client.ApiClient) -> None:
    core = client.CoreV1Api(api)
    since = core.list_namespaced_config_map("default").metadata.resource_version
    for name in ("one", "two", "three"):
        core.create_namespaced_config_map("default", {"metadata": {"name": name}})
    seen, first = [], watch.Watch()
    for event in first.stream(core.list_namespaced_config_map, "default", resource_version=since, timeout_seconds=5):
        seen.append(event["object"].metadata.name)
        since = event["object"].metadata.resource_version
        break
    for event in watch.Watch().stream(
        core.list_namespaced_config_map, "default", resource_version=since, timeout_seconds=5
    ):
        seen.append(event["object"].metadata.name)
        if len(seen) == 3:
            break
    assert seen == ["one", "two", "three"]
    for name in seen:
        core.delete_namespaced_config_map(name, "default")
    with pytest.raises(client.ApiException) as caught:
        future = str(int(since) + 10**6)
        list(
            watch.Watch().stream(core.list_namespaced_config_map, "default", resource_version=future, timeout_seconds=2)
        )
    assert caught.value.status == 504 and "Too large resource version" in str(caught.value.body)


# -- chaostoolkit-kubernetes


@pytest.fixture
def toolkit(running: Running, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("KUBECONFIG", running.kubeconfig)
    monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", running.kubeconfig)
    return {"KUBERNETES_CONTEXT": running.context}


def test_chaostoolkit_probes_and_acts_on_pods(api: client.ApiClient, toolkit: dict[str, str]) -> None:
    assert pod_probes.count_pods("app=web", secrets=toolkit) == 3
    assert pod_probes.pods_in_phase("app=web", secrets=toolkit)
    ready = [{"type": "Ready", "status": "True"}]
    assert pod_probes.pods_in_conditions("app=web", ready, secrets=toolkit)
    assert pod_probes.all_pods_healthy(secrets=toolkit)
    logs = pod_probes.read_pod_logs(label_selector="app=web", secrets=toolkit)
    assert len(logs) == 3 and all("serving" in text for text in logs.values())
    ran = pod_actions.exec_in_pods(
        ["sh", "-c", "echo $((6 * 7)); exit 3"], "app=web", container_name="web", all=True, secrets=toolkit
    )
    assert [(one["stdout"], str(one["exit_code"])) for one in ran] == [("42\n", "3")] * 3
    before = {p.metadata.uid for p in pods(api)}
    pod_actions.terminate_pods("app=web", qty=1, grace_period=0, secrets=toolkit)
    until(lambda: len({p.metadata.uid for p in pods(api)} & before) == 2)
    with pytest.raises(ActivityFailed):
        pod_probes.pods_in_phase("app=web", phase="Failed", secrets=toolkit)


def test_chaostoolkit_probes_and_acts_on_deployments(api: client.ApiClient, toolkit: dict[str, str]) -> None:
    assert deployment_probes.deployment_available_and_healthy("web", secrets=toolkit)
    assert deployment_probes.deployment_fully_available("web", secrets=toolkit)
    deployment_actions.scale_deployment("web", 4, secrets=toolkit)
    until(lambda: len(pods(api)) == 4)
    before = {p.metadata.uid for p in pods(api)}
    deployment_actions.rollout_deployment("web", secrets=toolkit)
    until(lambda: not before & {p.metadata.uid for p in pods(api)}, 60)


def test_chaostoolkit_cordons_and_drains_nodes(api: client.ApiClient, toolkit: dict[str, str]) -> None:
    assert len(node_probes.get_nodes(secrets=toolkit)["items"]) == 2
    assert node_probes.all_nodes_must_be_ready_to_schedule(secrets=toolkit)
    assert node_probes.nodes_must_be_healthy(secrets=toolkit)
    node_actions.cordon_node("node-b-1", secrets=toolkit)
    core = client.CoreV1Api(api)
    assert core.read_node("node-b-1").spec.unschedulable
    core.delete_collection_namespaced_pod("default", label_selector="app=web", grace_period_seconds=0)
    until(lambda: [p for p in pods(api) if p.spec.node_name] and {p.spec.node_name for p in pods(api)} == {"node-a-1"})
    node_actions.uncordon_node("node-b-1", secrets=toolkit)
    until(lambda: client.AppsV1Api(api).read_namespaced_deployment("web", "default").status.ready_replicas == 3)
    # Two must stay: the budget lets one of three go at a time, and chaostoolkit does not try again.
    with pytest.raises(ActivityFailed, match="violate the pod's disruption budget"):
        node_actions.drain_nodes("node-a-1", secrets=toolkit, timeout=20)
    client.PolicyV1Api(api).patch_namespaced_pod_disruption_budget("web", "default", {"spec": {"minAvailable": 0}})
    until(lambda: client.AppsV1Api(api).read_namespaced_deployment("web", "default").status.ready_replicas == 3)
    node_actions.drain_nodes("node-a-1", secrets=toolkit, timeout=20)
    until(lambda: {p.spec.node_name for p in pods(api)} == {"node-b-1"})


# -- kubectl


class Kubectl:
    def __init__(self, running: Running, home: Path) -> None:
        self.env = {"KUBECONFIG": running.kubeconfig, "HOME": str(home), "PATH": os.environ["PATH"]}

    def run(self, *args: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", "-n", "default", *args]
        return subprocess.run(
            command, env=self.env, input=given, capture_output=True, text=True, timeout=60, check=False
        )

    def __call__(self, *args: str, given: str | None = None) -> str:
        done = self.run(*args, given=given)
        assert done.returncode == 0, f"kubectl {' '.join(args)}: {done.stderr}"
        return done.stdout


@pytest.fixture
def kubectl(running: Running, tmp_path: Path) -> Kubectl:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    return Kubectl(running, tmp_path)


def test_kubectl_shows(api: client.ApiClient, kubectl: Kubectl) -> None:
    wide = kubectl("get", "pods", "-o", "wide")
    assert re.search(r"^web-\S+ +1/1 +Running +0 +\S+ +10\.244\.\d+\.\d+ +node-[ab]-1", wide, re.M), wide
    assert json.loads(kubectl("get", "deploy", "web", "-o", "json"))["status"]["readyReplicas"] == 3
    assert yaml.safe_load(kubectl("get", "deploy", "web", "-o", "yaml"))["spec"]["replicas"] == 3
    assert re.search(r"^web +3/3 +3 +3 ", kubectl("get", "deploy"), re.M)
    nodes = kubectl("get", "nodes")
    assert re.search(r"^node-a-1 +Ready ", nodes, re.M), nodes
    name = pods(api)[0].metadata.name
    told = kubectl("describe", "pod", name)
    assert "Readiness:" in told and "Successfully assigned default/" in told and "Container started" in told, told
    assert "NewReplicaSetAvailable" in kubectl("describe", "deploy", "web")
    assert "KubeletReady" in kubectl("describe", "node", "node-a-1")
    assert "serving" in kubectl("logs", name)
    assert kubectl("exec", name, "--", "sh", "-c", "echo $((6 * 7))") == "42\n"
    failed = kubectl.run("exec", name, "--", "sh", "-c", "exit 7")
    assert failed.returncode == 7
    assert kubectl("exec", "-i", name, "--", "cat", given="through\n") == "through\n"
    assert kubectl("auth", "can-i", "create", "pods") == "yes\n"
    assert kubectl.run("auth", "can-i", "create", "pods", "--as=jane").stdout == "no\n"
    assert "node-a-1" in until(lambda: kubectl.run("top", "nodes").stdout)
    assert name in kubectl("top", "pods")
    assert "podchaos" in kubectl("api-resources")
    assert "replicas" in kubectl("explain", "deployment.spec")


def test_kubectl_watches_and_follows(api: client.ApiClient, kubectl: Kubectl) -> None:
    name = pods(api)[0].metadata.name
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": kubectl.env}
    following = subprocess.Popen(["kubectl", "-n", "default", "logs", "-f", name], **pipes)
    watching = subprocess.Popen(["kubectl", "-n", "default", "get", "pods", "-w", "--no-headers"], **pipes)
    assert following.stdout and watching.stdout
    assert following.stdout.readline() == "serving\n"
    assert watching.stdout.readline().startswith("web-")
    assert kubectl("delete", "pod", name).startswith(f'pod "{name}" deleted')
    assert following.stdout.read() == "stopping\n", "what it says last, then the end"
    assert following.wait(20) == 0
    seen = ""
    while "Terminating" not in seen or "Pending" not in seen:
        line = watching.stdout.readline()
        assert line, seen
        seen += line
    watching.terminate()
    watching.wait(10)
    following.stdout.close()
    watching.stdout.close()


def test_kubectl_applies_patches_and_rolls(api: client.ApiClient, kubectl: Kubectl, tmp_path: Path) -> None:
    manifest = tmp_path / "web.yaml"
    changed = json.loads(json.dumps(WEB))
    changed["metadata"]["labels"] = {"tier": "front"}
    changed["spec"]["replicas"] = 2
    manifest.write_text(yaml.safe_dump(changed))
    assert "web configured" in kubectl("apply", "-f", str(manifest))
    assert "web unchanged" in kubectl("apply", "-f", str(manifest))
    assert "(server dry run)" in kubectl("apply", "-f", str(manifest), "--dry-run=server")
    assert "successfully rolled out" in kubectl("rollout", "status", "deploy/web", "--timeout=30s")
    kubectl("scale", "deploy/web", "--replicas=3")
    kubectl("wait", "deploy/web", "--for=condition=Available", "--timeout=30s")
    kubectl("wait", "pod", "-l", "app=web", "--for=condition=Ready", "--timeout=30s")
    env = {"spec": {"template": {"spec": {"containers": [{"name": "web", "env": [{"name": "X", "value": "1"}]}]}}}}
    assert "patched" in kubectl("patch", "deploy", "web", "-p", json.dumps(env))
    assert "successfully rolled out" in kubectl("rollout", "status", "deploy/web", "--timeout=60s")
    assert "restarted" in kubectl("rollout", "restart", "deploy/web")
    assert "successfully rolled out" in kubectl("rollout", "status", "deploy/web", "--timeout=60s")
    assert len(re.findall(r"^\d+ ", kubectl("rollout", "history", "deploy/web"), re.M)) == 3
    assert "rolled back" in kubectl("rollout", "undo", "deploy/web", "--to-revision=1")
    assert "successfully rolled out" in kubectl("rollout", "status", "deploy/web", "--timeout=60s")
    containers = client.AppsV1Api(api).read_namespaced_deployment("web", "default").spec.template.spec.containers
    assert not containers[0].env
    refused = kubectl.run("apply", "--server-side", "--field-manager=other", "-f", str(manifest))
    assert refused.returncode != 0 and "conflict" in refused.stderr and ".spec.replicas" in refused.stderr
    taken = kubectl("apply", "--server-side", "--field-manager=other", "--force-conflicts", "-f", str(manifest))
    assert "web serverside-applied" in taken
    assert "deleted" in kubectl("delete", "pdb", "web")
    kubectl("apply", "-f", "-", given=yaml.safe_dump(BUDGET))


def test_kubectl_drains(api: client.ApiClient, kubectl: Kubectl) -> None:
    assert kubectl("cordon", "node-b-1") == "node/node-b-1 cordoned\n"
    assert "Ready,SchedulingDisabled" in kubectl("get", "node", "node-b-1")
    assert kubectl("uncordon", "node-b-1") == "node/node-b-1 uncordoned\n"
    # It tries again until the budget lets the next one go, and no more than one of three is ever down.
    told = kubectl("drain", "node-a-1", "--ignore-daemonsets", "--timeout=50s")
    assert "node/node-a-1 drained" in told
    until(lambda: {p.spec.node_name for p in pods(api)} == {"node-b-1"})
    assert kubectl("uncordon", "node-a-1") == "node/node-a-1 uncordoned\n"
