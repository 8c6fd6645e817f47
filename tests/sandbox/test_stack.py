"""The manifests: valid for the real API's types, and fitting together."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import yaml
from kubernetes import client
from llm_world import ROOT

STACK = ROOT / "sandbox" / "stack"
Doc = dict[str, Any]


def documents(stack: str) -> list[Doc]:
    return [doc for path in sorted((STACK / stack).glob("*.yaml")) for doc in yaml.safe_load_all(path.read_text())]


def of(stack: str, kind: str, name: str = "") -> list[Doc]:
    return [doc for doc in documents(stack) if doc["kind"] == kind and name in ("", doc["metadata"]["name"])]


def workloads(stack: str) -> list[Doc]:
    return of(stack, "Deployment") + of(stack, "DaemonSet")


def containers(stack: str) -> Iterator[tuple[Doc, Doc]]:
    for doc in workloads(stack):
        for container in doc["spec"]["template"]["spec"]["containers"]:
            yield doc, container


both = pytest.mark.parametrize("stack", ["reference", "fragile", "careless"])


@both
def test_every_field_is_one_of_the_real_api(stack: str) -> None:
    for doc in documents(stack):
        read = _through_the_client(doc)
        assert read == doc, f"{doc['kind']} {doc['metadata']['name']}"


def _through_the_client(doc: Doc) -> object:
    """What the official client's models, made from the API's schema, keep of a manifest. ValueError for a bad value."""
    api = client.ApiClient()
    kept: object = api.sanitize_for_serialization(
        api.deserialize(json.dumps(doc), f"V1{doc['kind']}", "application/json")
    )
    return kept


def test_a_misspelt_field_or_a_bad_value_would_be_noticed() -> None:
    (doc,) = of("reference", "Deployment", "gateway")
    doc["spec"]["template"]["spec"]["terminationGraceSeconds"] = 3
    assert _through_the_client(doc) != doc
    doc["spec"]["replicas"] = "three"
    with pytest.raises(ValueError, match="replicas"):
        _through_the_client(doc)


@both
def test_selectors_services_budgets_accounts_and_volumes_fit(stack: str) -> None:
    namespaces = {doc["metadata"]["name"] for doc in of(stack, "Namespace")} | {"kube-system"}
    for doc in workloads(stack):
        meta, pod = doc["metadata"], doc["spec"]["template"]
        assert meta["namespace"] in namespaces
        assert doc["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        for spread in pod["spec"].get("topologySpreadConstraints", []):
            assert spread["labelSelector"]["matchLabels"] == doc["spec"]["selector"]["matchLabels"]
        if account := pod["spec"].get("serviceAccountName"):
            assert any(
                found["metadata"]["namespace"] == meta["namespace"] for found in of(stack, "ServiceAccount", account)
            )
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert probe not in container or container[probe]["httpGet"]["port"] in ports
        for volume in volumes.values():
            assert "configMap" not in volume or of(stack, "ConfigMap", volume["configMap"]["name"])
    for service in of(stack, "Service"):
        (target,) = [one for one in workloads(stack) if one["spec"]["template"]["metadata"]["labels"].items()
                     >= service["spec"]["selector"].items()]  # fmt: skip
        (container,) = target["spec"]["template"]["spec"]["containers"]
        assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    for role in of(stack, "RoleBinding") + of(stack, "ClusterRoleBinding"):
        assert of(stack, role["roleRef"]["kind"], role["roleRef"]["name"])
        for subject in role["subjects"]:
            assert any(
                account["metadata"]["namespace"] == subject["namespace"]
                for account in of(stack, "ServiceAccount", subject["name"])
            )


@both
def test_every_image_is_known_and_its_program_takes_the_arguments(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tomllib.loads((ROOT / "sandbox" / "images.toml").read_text())["images"]
    monkeypatch.setenv("NODE_NAME", "node-a-1")
    for _, container in containers(stack):
        module, _, function = images[container["image"]]["entrypoint"].partition(":")
        program = importlib.import_module(module)
        with monkeypatch.context() as patch:
            reached: list[object] = []
            patch.setattr(program, "run", _notes(reached))
            if module.endswith("engine"):
                patch.setattr(program.core, "start", lambda: None)  # a second process
            if module.endswith("npd"):
                patch.setattr(program.Path, "read_bytes", lambda _: _rules(stack))
            assert getattr(program, function)(container.get("args", [])) == 0
        assert len(reached) == 1, module


def _notes(reached: list[object]) -> Callable[[Coroutine[object, object, int]], int]:
    def instead_of_run(work: Coroutine[object, object, int]) -> int:
        work.close()
        reached.append(work)
        return 0

    return instead_of_run


def _rules(stack: str) -> bytes:
    (config,) = of(stack, "ConfigMap")
    return str(config["data"]["kernel-monitor.json"]).encode()


@both
def test_scrapes_are_announced_on_a_port_that_is_there(stack: str) -> None:
    announced = 0
    for doc, container in containers(stack):
        notes = doc["spec"]["template"]["metadata"].get("annotations", {})
        if notes.get("prometheus.io/scrape") == "true":
            announced += 1
            assert int(notes["prometheus.io/port"]) in {port["containerPort"] for port in container["ports"]}
            assert notes["prometheus.io/path"] == "/metrics"
    assert announced == 3  # engine, gateway, dcgm-exporter


@both
def test_the_contract_of_the_two_deployments(stack: str) -> None:
    (engine,), (gateway,) = of(stack, "Deployment", "my-llama32"), of(stack, "Deployment", "gateway")
    for doc in (engine, gateway):
        (container,) = doc["spec"]["template"]["spec"]["containers"]
        assert (container["readinessProbe"]["periodSeconds"], container["readinessProbe"]["failureThreshold"]) == (1, 2)
    limits = engine["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert limits["limits"]["nvidia.com/gpu"] == limits["requests"]["nvidia.com/gpu"] == "1"
    (front,) = of(stack, "Service", "gateway")
    assert front["spec"]["type"] == "LoadBalancer" and front["spec"]["ports"][0]["port"] == 80


def test_the_reference_survives_a_zone_and_the_fragile_one_cannot() -> None:
    for name, replicas in (("my-llama32", 6), ("gateway", 3)):
        (doc,) = of("reference", "Deployment", name)
        pod = doc["spec"]["template"]["spec"]
        assert doc["spec"]["replicas"] == replicas
        assert [spread["topologyKey"] for spread in pod["topologySpreadConstraints"]] == [
            "topology.kubernetes.io/zone", "kubernetes.io/hostname"
        ]  # fmt: skip
        assert pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] < pod["terminationGracePeriodSeconds"]
        assert of("reference", "PodDisruptionBudget", name)[0]["spec"]["maxUnavailable"] == 1
    assert not of("fragile", "PodDisruptionBudget")
    for doc in of("fragile", "Deployment"):
        pod = doc["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == {"topology.kubernetes.io/zone": "a"} and "topologySpreadConstraints" not in pod
    (gateway,) = of("fragile", "Deployment", "gateway")
    assert gateway["spec"]["replicas"] == 1
    assert {"--no-retry", "--no-ejection"} <= set(gateway["spec"]["template"]["spec"]["containers"][0]["args"])


def test_the_careless_one_is_as_large_and_lacks_what_makes_operations_harmless() -> None:
    (care,), (engine,) = of("reference", "Deployment", "my-llama32"), of("careless", "Deployment", "my-llama32")
    assert engine["spec"]["replicas"] == care["spec"]["replicas"]
    pod, careful = engine["spec"]["template"]["spec"], care["spec"]["template"]["spec"]
    assert pod["topologySpreadConstraints"] == careful["topologySpreadConstraints"]
    assert engine["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": "100%"}
    assert pod["terminationGracePeriodSeconds"] == 1
    assert not {"lifecycle", "livenessProbe"} & set(pod["containers"][0]), "no stream may end, nobody restarts"
    assert of("careless", "PodDisruptionBudget", "my-llama32")[0]["spec"]["maxUnavailable"] == 0


def test_all_stacks_have_the_same_detectors() -> None:
    for path in ("00-namespaces.yaml", "10-node-problem-detector.yaml", "11-dcgm-exporter.yaml"):
        for stack in ("fragile", "careless"):
            assert (STACK / "reference" / path).read_text() == (STACK / stack / path).read_text()


def test_every_rule_names_the_xid_of_its_pattern() -> None:
    rules = json.loads(_rules("reference"))["rules"]
    codes = [(rule, re.search(r": (\d+), ", rule["pattern"])) for rule in rules if rule["reason"].startswith("Nvidia")]
    assert len(codes) >= 30
    for rule, code in codes:
        assert code
        suffix = "Error" if rule["type"] == "permanent" else "Warning"
        assert rule["reason"] == f"NvidiaXID{code[1]}{suffix}"
