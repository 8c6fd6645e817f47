"""Preflight and rights: each thing that a cluster may lack is found before anything begins, and named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from faults.base import Act, Apply, Call, Job, Plan
from gameday import clock, preflight as preflight_
from gameday.cli import main
from gameday.cluster import Cluster, Obj, Refused
from gameday.errors import ClusterError, MissingCapability, SettingsError, TargetError
from gameday.kinds import (
    BY_KIND,
    CRDS,
    DEPLOYMENTS,
    JOBS,
    NAMESPACES,
    NETWORKPOLICIES,
    PODCHAOS,
    PODS,
    SERVICEACCOUNTS,
    Kind,
)
from gameday.model import FaultFacts
from gameday.preflight import Preflight
from gameday.rbac import RIGHTS, manifests, show
from gameday.settings import Settings, load
from gameday.witness import Witness
from probes.reach import prober
from sandbox.chaos.controller import crds

RBAC = "rbac.authorization.k8s.io"
ROLES = {
    kind: Kind(RBAC, "v1", f"{kind.lower()}s", kind, namespaced=not kind.startswith("Cluster"))
    for kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
}
FACTS = FaultFacts("test", "a test", one_shot=False, lasting=60, pods=("llm/p",))


def settings(**more: Any) -> Settings:
    return load({"namespace": "llm", "selector": "app=x", **more})


@pytest.fixture(scope="module")
def chaotic(kubeconfig: Path) -> Cluster:
    """The control plane with Chaos Mesh's kinds."""
    cluster = Cluster.connect(context="gameday-sandbox", kubeconfig=kubeconfig, namespace="llm")
    for crd in crds():
        cluster.create(CRDS, crd)
    clock.wait_until(lambda: "podchaos" in cluster.served("chaos-mesh.org/v1alpha1"), within=20, what="podchaos served")
    return cluster


@pytest.fixture
def stranger(chaotic: Cluster, kubeconfig: Path, tmp_path: Path) -> Iterator[Cluster]:
    """We, under the printed role and nothing else."""
    made = [obj for _, obj in manifests("llm", chaos_namespace="chaos-mesh")]
    chaotic.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "chaos-mesh"}})
    for obj in made:
        chaotic.create({**ROLES, **BY_KIND}[obj["kind"]], obj)
    answer = chaotic.call(
        "POST",
        SERVICEACCOUNTS.path("llm", "gameday", "token"),
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}},
    )
    config = yaml.safe_load(kubeconfig.read_text())
    config["users"][0]["user"] = {"token": answer["status"]["token"]}
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    yield Cluster.connect(context="gameday-sandbox", kubeconfig=path, namespace="llm")
    for obj in made:
        chaotic.delete({**ROLES, **BY_KIND}[obj["kind"]], obj["metadata"]["name"], obj["metadata"].get("namespace"))
    chaotic.delete(NAMESPACES, "chaos-mesh")
    clock.wait_until(lambda: chaotic.find(NAMESPACES, "chaos-mesh") is None, within=20, what="the namespace gone")


# ── rights ──────────────────────────────────────────────────────────────────────────────────────


def test_the_printed_role_is_enough_and_each_right_counts(stranger: Cluster, chaotic: Cluster) -> None:
    flight = Preflight(stranger, None, settings())
    assert flight._rights().endswith("granted")
    assert "granted" in flight._node_rights().detail
    for right in RIGHTS:
        kind, name = ("ClusterRole", "gameday-llm") if right.where == "cluster" else ("Role", "gameday-llm")
        where = {"target": "llm", "default": "default", "chaos": "chaos-mesh"}.get(right.where)
        name = "gameday" if right.where == "target" else name
        if right.where == "chaos":
            continue
        role = chaotic.get(ROLES[kind], name, where)
        kept = [rule for rule in role["rules"] if rule["resources"] != [right.resource]]
        chaotic.patch(ROLES[kind], name, {"rules": kept}, where)
        everywhere = {
            v for r in RIGHTS if r.where == "cluster" != right.where and r.kind is right.kind for v in r.verbs
        }
        absent = [verb for verb in right.verbs if right.sub or verb not in everywhere]
        with pytest.raises(ClusterError, match=f"{', '.join(absent)} {right.resource}"):
            flight._demand_rights([right])
        chaotic.patch(ROLES[kind], name, {"rules": role["rules"]}, where)
    assert flight._rights().endswith("granted")


def test_a_teams_mess_can_be_seen_under_the_printed_role(stranger: Cluster, chaotic: Cluster) -> None:
    metadata = {"name": "delay", "namespace": "llm"}
    policy = {"metadata": metadata, "spec": {"podSelector": {}}}
    chaotic.create(NETWORKPOLICIES, {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", **policy})
    nobody: Any = SimpleNamespace()
    text = json.dumps({"title": "Theirs", "method": [{"name": "x", "type": "action"}]})
    plan = Plan(FACTS, (Call("1. x", text, 0, True),), ())
    looked = [Witness(plan, nobody, nobody, nobody, one, ("llm",))._snapshot() for one in (stranger, chaotic)]
    assert looked[0] == looked[1] and looked[0]["NetworkPolicy llm/delay"] == "there"
    chaotic.delete(NETWORKPOLICIES, "delay", "llm")


def test_pods_only_leaves_out_what_touches_nodes(stranger: Cluster, chaotic: Cluster) -> None:
    printed = list(yaml.safe_load_all(show("llm", pods_only=True)))
    for obj in printed:
        if obj["kind"] in ("Role", "ClusterRole"):
            meta = obj["metadata"]
            chaotic.patch(ROLES[obj["kind"]], meta["name"], {"rules": obj["rules"]}, meta.get("namespace"))
    assert not stranger.can("patch", BY_KIND["Node"])
    flight = Preflight(stranger, None, settings())
    assert flight._rights().endswith("granted")
    told = flight._node_rights()
    assert told.ok and "pod faults only" in told.detail
    flight.demand_for(Plan(FACTS, (), ()))
    with pytest.raises(ClusterError, match="patch nodes"):
        flight.demand_for(Plan(FACTS, (), (), cluster_wide=True))


def test_the_role_grants_nothing_that_is_not_in_the_table() -> None:
    for pods_only in (True, False):
        for obj in yaml.safe_load_all(show("llm", pods_only=pods_only, chaos_namespace="chaos-mesh")):
            assert "*" not in json.dumps(obj)
            for rule in obj.get("rules", ()):
                assert not {"secrets", "pods/exec", "impersonate", "escalate", "bind"} & {
                    *rule["resources"],
                    *rule["verbs"],
                }
                assert rule.get("resourceNames") or rule["resources"] != ["deployments"] or "patch" in rule["verbs"]
    wide = [right for right in RIGHTS if right.where == "cluster" and right.kind.plural != "nodes"]
    assert [(right.kind.plural, right.verbs, right.only_for) for right in wide] == [("pods", ("list",), "crash")], (
        "cluster-wide is only what has no namespace, and the look at whom a node crash would hit besides"
    )


def test_the_namespace_default_gets_one_role_with_all_its_rights() -> None:
    """Two Roles of one name in one namespace: the second would have replaced the first."""
    printed = list(yaml.safe_load_all(show("default")))
    names = [(obj["kind"], obj["metadata"]["name"], obj["metadata"].get("namespace")) for obj in printed]
    assert len(set(names)) == len(names)
    (role,) = [obj for obj in printed if obj["kind"] == "Role"]
    assert len([rule for rule in role["rules"] if rule["resources"] == ["events"]]) == 2
    assert any(rule["resources"] == ["pods"] for rule in role["rules"])


def test_a_group_of_people_can_be_bound() -> None:
    printed = list(yaml.safe_load_all(show("llm", group="sre")))
    assert not any(obj["kind"] == "ServiceAccount" for obj in printed)
    bound = [obj["subjects"] for obj in printed if obj["kind"].endswith("Binding")]
    assert bound and all(subjects == [{"kind": "Group", "apiGroup": RBAC, "name": "sre"}] for subjects in bound)


@pytest.mark.parametrize("name", ["Llm", "a\nkind: ClusterRole", "-x", "x" * 64])
def test_a_namespace_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be a namespace"):
        show(name)
    done = CliRunner().invoke(main, ["rbac", "--namespace", name])
    assert done.exit_code == 2 and "Traceback" not in done.output


# ── Chaos Mesh, as it is installed ──────────────────────────────────────────────────────────────


def controller(image: str = "ghcr.io/chaos-mesh/chaos-mesh:v2.7.2", available: int = 3, **env: str) -> Obj:
    container = {"name": "chaos-mesh", "image": image, "env": [{"name": k, "value": v} for k, v in env.items()]}
    labels = {"app": "chaos"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "chaos-controller-manager", "namespace": "chaos-mesh"},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
        "status": {"availableReplicas": available},
    }


class Answers:
    """A cluster with one Deployment and one namespace in it; `annotations` are the namespace's."""

    name, namespace = "staging", "llm"

    def __init__(self, deployment: Obj | None, annotations: dict[str, str] | None = None) -> None:
        self._found = {
            DEPLOYMENTS: deployment,
            NAMESPACES: {"metadata": {"name": "llm", "annotations": annotations}, "status": {"phase": "Active"}},
        }

    def served(self, _: str) -> frozenset[str]:
        return frozenset({"podchaos", "networkchaos"})

    def find(self, kind: Kind, *_: Any) -> Obj | None:
        return self._found[kind]


def chaos_check(deployment: Obj | None, annotations: dict[str, str] | None = None) -> str:
    cluster: Any = Answers(deployment, annotations)
    return Preflight(cluster, None, settings(chaos_namespace="chaos-mesh"))._chaos()


def test_how_chaos_mesh_is_installed_is_told() -> None:
    assert chaos_check(controller()) == "2.7.2, cluster-wide"
    ours = controller(CLUSTER_SCOPED="false", TARGET_NAMESPACE="llm")
    assert chaos_check(ours) == "2.7.2, namespace llm only"
    filters = controller(ENABLE_FILTER_NAMESPACE="true")
    assert "filters namespaces" in chaos_check(filters, {"chaos-mesh.org/inject": "enabled"})
    assert "untried" in chaos_check(controller("ghcr.io/chaos-mesh/chaos-mesh:v2.5.1"))
    assert "of unknown version" in chaos_check(controller("registry.internal/chaos-mesh:latest"))


@pytest.mark.parametrize(
    ("deployment", "told"),
    [
        (None, "correct chaos_namespace"),
        (controller(available=0), "no available replica"),
        (controller(CLUSTER_SCOPED="false", TARGET_NAMESPACE="other"), "installed for namespace 'other' alone"),
        (
            controller(ENABLE_FILTER_NAMESPACE="true"),
            "kubectl annotate namespace llm chaos-mesh.org/inject=enabled",
        ),
    ],
)
def test_an_installation_that_would_not_inject_is_refused(deployment: Obj | None, told: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(told)):
        chaos_check(deployment, {"chaos-mesh.org/inject": "disabled"})


def test_the_installation_is_read_under_the_printed_role(stranger: Cluster, chaotic: Cluster) -> None:
    flight = Preflight(stranger, None, settings(chaos_namespace="chaos-mesh"))
    with pytest.raises(ClusterError, match="There is no deployment"):
        flight._chaos()
    chaotic.create(DEPLOYMENTS, controller())  # of no replicas, as nothing runs here
    with pytest.raises(ClusterError, match="no available replica"):
        flight._chaos()
    with pytest.raises(ClusterError, match="The right to get deployments chaos-controller-manager in kube-system"):
        Preflight(stranger, None, settings(chaos_namespace="kube-system"))._chaos()


def test_without_the_kinds_it_is_a_missing_capability(cluster: Cluster) -> None:
    class Bare(Answers):
        def served(self, _: str) -> frozenset[str]:
            return frozenset({"podchaos"})

    bare: Any = Bare(None)
    with pytest.raises(MissingCapability, match="no networkchaos") as told:
        Preflight(bare, None, settings())._chaos()
    assert told.value.name == "chaos-mesh"


def test_a_target_that_does_not_name_its_pods_is_told_before_the_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault was done first, and then nobody knew whom the load had reached."""
    answers = SimpleNamespace(ttft=0.1, pod=None, via=None)
    monkeypatch.setattr(preflight_, "one_token", lambda *_, **__: answers)
    nobody: Any = None
    flight = Preflight(nobody, None, settings(target="http://127.0.0.1:1", model="m"))
    with pytest.raises(TargetError, match=r'no header x-served-by.* set served_by .* or to ""'):
        flight._generation()
    for address in ("10.0.0.7", "10.0.0.7:8000", "[fd00::7]:8000", "fd00::7"):  # as inference gateways have it
        answers.pod = address
        with pytest.raises(TargetError, match="names an address"):
            flight._generation()
    for name in ("engine-0", "llm/engine-7d9c-x2", "10-0-0-7.pod", "dead-beef"):
        answers.pod = name
        assert "answers" in flight._generation()
    answers.pod = None
    answers.via = "gateway-1"
    assert "answers" in flight._generation()
    answers.via = None
    assert "answers" in Preflight(nobody, None, settings(target="http://127.0.0.1:1", served_by=""))._generation()


# ── what the server would refuse ────────────────────────────────────────────────────────────────

POD_SECURITY = (
    'pods "gd-doctor" is forbidden: violates PodSecurity "restricted:latest": privileged (container "signal" must not '
    "set securityContext.privileged=true)"
)


class Refuses:
    """Refuses dry runs of one kind, as an admission plugin does, and remembers all that it was asked."""

    name, namespace = "staging", "llm"

    def __init__(self, kind: Kind, message: str) -> None:
        self._kind, self._message = kind, message
        self.asked: list[Obj] = []

    def served(self, _: str) -> frozenset[str]:
        return frozenset({"podchaos", "networkchaos"})

    def can(self, *_: Any) -> bool:
        return True

    def create(self, kind: Kind, obj: Obj, *, dry_run: bool = False) -> Obj:
        assert dry_run, "a preflight changes nothing"
        self.asked.append(obj)
        if kind == self._kind:
            raise Refused(403, "Forbidden", self._message)
        return obj


def test_webhooks_of_chaos_mesh_that_refuse_are_told() -> None:
    cluster: Any = Refuses(PODCHAOS, 'failed calling webhook "vpodchaos.kb.io": connection refused')
    with pytest.raises(ClusterError, match="The server would refuse PodChaos gd-doctor in llm: failed calling webhook"):
        Preflight(cluster, None, settings())._chaos_admitted()


def test_a_namespace_that_takes_no_probers_is_a_missing_capability() -> None:
    cluster: Any = Refuses(PODS, "exceeded quota: pods, requested: pods=1, used: pods=10, limited: pods=10")
    with pytest.raises(MissingCapability, match="exceeded quota") as told:
        Preflight(cluster, None, settings())._probers_admitted()
    assert told.value.name == "probers"


def test_a_quota_that_leaves_no_room_for_probers_is_found_by_the_server_itself(chaotic: Cluster) -> None:
    quotas = Kind("", "v1", "resourcequotas", "ResourceQuota")
    metadata = {"name": "full", "namespace": "llm"}
    flight = Preflight(chaotic, None, settings())
    assert "passes" in flight._probers_admitted()
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": {"pods": "0"}}}
    chaotic.create(quotas, quota)
    try:
        clock.wait_until(lambda: refuses(flight), within=20, what="a quota in force")
    finally:
        chaotic.delete(quotas, "full", "llm")
    asks = {"limits.cpu": "100", "limits.memory": "100Gi", "requests.cpu": "100", "requests.memory": "100Gi"}
    chaotic.create(quotas, quota | {"spec": {"hard": asks}})
    try:
        assert "passes" in flight._probers_admitted(), "probers say all that such a quota asks for"
    finally:
        chaotic.delete(quotas, "full", "llm")


def refuses(flight: Preflight) -> bool:
    try:
        flight._probers_admitted()
    except MissingCapability as told:
        return "exceeded quota" in str(told)
    return False


def test_a_signal_job_that_pod_security_would_refuse_is_found_by_its_pod() -> None:
    """Pod Security only warns of Jobs: without this, the fault would begin, and its signal never come."""
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "signal", "image": "busybox"}]}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "gd-x", "namespace": "llm"}}
    acts: tuple[Act, ...] = (Job("signal", job | {"spec": {"template": template}}),)
    cluster: Any = Refuses(PODS, POD_SECURITY)
    with pytest.raises(ClusterError, match=r"would refuse Pod gd-x in llm: .*PodSecurity"):
        Preflight(cluster, None, settings()).demand_for(Plan(FACTS, acts, ()))
    assert [one["kind"] for one in cluster.asked] == ["Job", "Pod"]
    willing: Any = Refuses(JOBS, "no jobs here")
    with pytest.raises(ClusterError, match="no jobs here"):
        Preflight(willing, None, settings()).demand_for(Plan(FACTS, acts, ()))


def test_every_manifest_of_a_plan_is_tried_before_the_harm(chaotic: Cluster) -> None:
    manifest = {
        "apiVersion": PODCHAOS.api_version,
        "kind": "PodChaos",
        "metadata": {"name": "gd-x", "namespace": "llm"},
        "spec": {"action": "pod-kill", "mode": "some", "selector": {"namespaces": ["llm"]}},
    }
    flight = Preflight(chaotic, None, settings())
    with pytest.raises(ClusterError, match="would refuse PodChaos gd-x"):
        flight.demand_for(Plan(FACTS, (Apply("pod-kill", PODCHAOS, manifest, 1),), ()))
    good = manifest | {"spec": {"action": "pod-kill", "mode": "all", "selector": {"namespaces": ["llm"]}}}
    flight.demand_for(Plan(FACTS, (Apply("pod-kill", PODCHAOS, good, 1),), ()))
    assert chaotic.find(PODCHAOS, "gd-x", "llm") is None, "a dry run"


def test_a_prober_fits_pod_security_restricted() -> None:
    """The profile's rules, as the Pod Security Standards list them, and a quota that asks for requests and limits."""
    pod = prober("llm", "gd-x-prober-a", {}, "python:3.12-alpine", 60, "a", (("10.0.0.1", 80),))
    spec = pod["spec"]
    (container,) = spec["containers"]
    security = container["securityContext"]
    assert not spec.get("hostNetwork") and not spec.get("hostPID") and not spec.get("volumes")
    assert security["allowPrivilegeEscalation"] is False and "privileged" not in security
    assert security["runAsNonRoot"] is True and security["runAsUser"] != 0
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    resources = container["resources"]
    assert set(resources["limits"]) == set(resources["requests"]) == {"cpu", "memory"}
    assert spec["automountServiceAccountToken"] is False and spec["activeDeadlineSeconds"] > 0


# ── the namespace ───────────────────────────────────────────────────────────────────────────────


def test_namespaces_that_may_not_be_hit(chaotic: Cluster) -> None:
    with pytest.raises(TargetError, match="not in allow_namespaces"):
        Preflight(chaotic, None, settings(namespace="kube-system"))._namespace()
    with pytest.raises(TargetError, match="selector is empty"):
        Preflight(chaotic, None, settings(selector=" "))._namespace()
    with pytest.raises(TargetError, match="There is no namespace 'lmm'"):
        Preflight(chaotic, None, settings(namespace="lmm", allow_namespaces=("lmm",)))._namespace()
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    chaotic.patch(NAMESPACES, "llm", {"metadata": {"labels": labels}})
    assert Preflight(chaotic, None, settings())._namespace() == "llm, Pod Security restricted"


def test_doctor_is_a_table_that_says_what_to_do(kubeconfig: Path, chaotic: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(kubeconfig.read_text())
    config["contexts"][0]["name"] = "staging"
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    given = ["doctor", "--context", "staging", "--kubeconfig", str(path), "--namespace", "llm", "--selector", "app=x"]
    done = CliRunner().invoke(main, given, env={"COLUMNS": "200"})
    assert done.exit_code == 1, done.output
    for word in ("what to do", "API server", "WRONG", "set --prometheus and prometheus_token_file"):
        assert word in done.output
    found = json.loads(CliRunner().invoke(main, [*given, "--json"]).output)
    by_name = {check["name"]: check for check in found}
    assert by_name["rights"]["ok"] and not by_name["targets"]["ok"] and by_name["targets"]["todo"]
    assert by_name["Prometheus"]["missing"] == "prometheus"


def test_a_target_of_a_ca_of_ones_own_is_asked_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The advice was an option that pytest does not have."""
    given: list[Any] = []

    def asked(*_: Any, **more: Any) -> Any:
        given.append(more["ca_file"])
        return SimpleNamespace(ttft=0.1, pod="p", via=None)

    monkeypatch.setattr(preflight_, "one_token", asked)
    nobody: Any = None
    Preflight(nobody, None, settings(target="https://127.0.0.1:1", ca_file=tmp_path / "ca.crt"))._generation()
    assert given == [tmp_path / "ca.crt"]
