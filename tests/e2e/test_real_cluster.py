"""Someone else's cluster: the sandbox, reached as a stranger reaches a cluster.

A kubeconfig with a context of its own, a ServiceAccount with exactly the rights that `gameday rbac` prints, settings
for everything, and nothing that a sandbox would tell of itself (its state directory is elsewhere).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage import ROOT, Rehearsal, Stage, raised
from test_rehearsal import assert_clean, cluster_of

from gameday.cluster import Obj
from gameday.kinds import EVENTS, NAMESPACES, PODS, Kind

RBAC = "rbac.authorization.k8s.io"
KINDS = {
    "ServiceAccount": Kind("", "v1", "serviceaccounts", "ServiceAccount"),
    "Role": Kind(RBAC, "v1", "roles", "Role"),
    "RoleBinding": Kind(RBAC, "v1", "rolebindings", "RoleBinding"),
    "ClusterRole": Kind(RBAC, "v1", "clusterroles", "ClusterRole", namespaced=False),
    "ClusterRoleBinding": Kind(RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
}


@dataclass(frozen=True, slots=True)
class Foreign:
    """A cluster of which we know a kubeconfig and what its owners told us."""

    stage: Stage
    token: str
    kubeconfig: Path
    rules: tuple[Obj, ...]  # what `gameday rbac` printed

    @property
    def env(self) -> dict[str, str]:
        running = self.stage.running
        return {
            "GAMEDAY_STATE_DIR": str(self.stage.tmp / "no-sandbox-here"),
            "GAMEDAY_KUBECONFIG": str(self.kubeconfig),
            "GAMEDAY_CONTEXT": "staging",
            "GAMEDAY_NAMESPACE": "llm",
            "GAMEDAY_ALLOW_NAMESPACES": '["llm"]',
            "GAMEDAY_SELECTOR": running.selector,
            "GAMEDAY_SERVICE": running.selector.partition("=")[2],
            "GAMEDAY_TARGET": running.target_url,
            "GAMEDAY_MODEL": running.model,
            "GAMEDAY_PROMETHEUS": running.prometheus_url,
            "GAMEDAY_SCRAPE_INTERVAL": "1",
            "GAMEDAY_STEADY": "10",
            "GAMEDAY_HOLD": "8",
            "GAMEDAY_HEAL_WITHIN": "30",
        }

    def rehearse(self, *arguments: str, env: Mapping[str, str] | None = None) -> Rehearsal:
        return self.stage.finish(self.stage.start(*arguments, env={**self.env, **(env or {})}))

    def gameday(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gameday.cli", *arguments],
            cwd=ROOT,
            env={**self.stage.env, **self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def allow(self, kind: str, name: str, rules: list[Obj]) -> None:
        namespace = "llm" if kind == "Role" else None
        cluster_of(self.stage).patch(KINDS[kind], name, {"rules": rules}, namespace)

    def rules_of(self, kind: str, name: str) -> list[Obj]:
        found = next(one for one in self.rules if one["kind"] == kind and one["metadata"]["name"] == name)
        return list(found["rules"])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    for stage in raised(tmp_path_factory.mktemp("foreign"), "reference"):
        admin = cluster_of(stage)
        printed = stage.gameday("rbac", "--namespace", "llm").stdout
        rules = tuple(yaml.safe_load_all(printed))
        for obj in rules:
            admin.create(KINDS[obj["kind"]], obj)
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200}}
        path = KINDS["ServiceAccount"].path("llm", "gameday", "token")
        token = admin.call("POST", path, body=body)["status"]["token"]
        config: Any = yaml.safe_load(Path(stage.running.kubeconfig).read_text())
        user = {"name": "night", "user": {"token": token}}
        context = {"name": "staging", "context": {"cluster": config["clusters"][0]["name"], "user": "night"}}
        kubeconfig = stage.tmp / "config"
        kubeconfig.write_text(yaml.safe_dump(config | {"users": [user], "contexts": [context], "current-context": ""}))
        kubeconfig.chmod(0o600)
        yield Foreign(stage, token, kubeconfig, rules)


def test_the_role_is_not_an_admins(foreign: Foreign) -> None:
    """Otherwise the rest of this file would prove nothing."""
    doctor = foreign.gameday("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(doctor.stdout)}
    assert doctor.returncode == 0 and all(check["ok"] for check in checks.values()), doctor.stdout
    assert "granted" in checks["rights"]["detail"] and "granted" in checks["rights over nodes"]["detail"]
    assert "*" not in json.dumps(foreign.rules)


def test_a_zone_outage_under_the_printed_role(foreign: Foreign) -> None:
    """Everything that an experiment does: cordons, both locks, chaos, probers, a rollout, and no trace of the token."""
    planted = {
        "GAMEDAY_API_KEY_FILE": "planted-api-key-91c4",
        "GAMEDAY_PROMETHEUS_TOKEN_FILE": "planted-prom-token-3a77",
    }
    for name, secret in planted.items():
        (foreign.stage.tmp / name).write_text(secret + "\n")
    files = {name: str(foreign.stage.tmp / name) for name in planted}
    junit = f"--junitxml={foreign.stage.tmp}/j.xml"
    done = foreign.rehearse("experiments", "-k", "zone_outage", "--seed", "7", junit, env=files)
    verdict = done.verdict("zone_outage")
    # On a busy machine the load generator is rightly called unfit; nothing else may be short of PASS.
    short = [one["objective"] for one in verdict["findings"] if one["status"] != "PASS"]
    assert set(short) <= {"load generator fit"} and verdict["recovery"]["high"] <= 12, done.out
    assert done.code == (1 if short else 0), done.out
    run = json.loads((done.root / "zone_outage" / "run.json").read_text())["about"]
    assert run["sandbox"] is False and run["cluster"].startswith("staging, Kubernetes")
    assert "looks like a port-forward" in done.out
    assert_clean(foreign.stage)
    written = [path for path in done.root.rglob("*") if path.is_file()]
    assert len(written) > 10
    for secret in (foreign.token, *planted.values()):
        assert secret not in done.out
        for path in [*written, foreign.stage.tmp / "j.xml"]:
            assert secret.encode() not in path.read_bytes(), f"{path} holds a secret"


@pytest.mark.parametrize(
    ("kind", "name", "resource", "verb", "told"),
    [
        ("Role", "gameday", "podchaos", "create", "create podchaos in llm"),
        pytest.param("Role", "gameday", "pods/log", "get", "get pods/log in llm", marks=pytest.mark.thorough),
        pytest.param("Role", "gameday", "configmaps", "patch", "patch configmaps in llm", marks=pytest.mark.thorough),
        pytest.param("ClusterRole", "gameday-llm", "nodes", "watch", "watch nodes", marks=pytest.mark.thorough),
        ("ClusterRole", "gameday-llm", "nodes", "patch", "patch nodes"),
    ],
)
def test_a_right_taken_away_is_named(
    foreign: Foreign, kind: str, name: str, resource: str, verb: str, told: str
) -> None:
    rules = foreign.rules_of(kind, name)
    fewer = [
        rule | {"verbs": [one for one in rule["verbs"] if one != verb]} if rule["resources"] == [resource] else rule
        for rule in rules
    ]
    assert fewer != rules
    foreign.allow(kind, name, fewer)
    try:
        done = foreign.rehearse("experiments", "-k", "zone_outage")
        assert done.code == 1 and "1 error" in done.out, done.out
        said = " ".join(done.out.split())
        assert f"rights are missing: {told}" in said and "gameday rbac --namespace llm" in said, done.out
        doctor = foreign.gameday("doctor")
        assert (doctor.returncode == 1) is (verb != "patch" or kind == "Role")
        assert told in " ".join(doctor.stdout.split())
    finally:
        foreign.allow(kind, name, rules)
    assert_clean(foreign.stage)


@pytest.mark.thorough
def test_nothing_goes_by_default(foreign: Foreign) -> None:
    for key in ("NAMESPACE", "ALLOW_NAMESPACES", "SELECTOR", "TARGET", "PROMETHEUS"):
        env = {name: value for name, value in foreign.env.items() if name != f"GAMEDAY_{key}"}
        process = foreign.stage.start("experiments", "-k", "pod_kill", env=env)
        done = foreign.stage.finish(process)
        assert done.code == 1 and f"nothing goes by default: set {key.lower()}" in " ".join(done.out.split()), done.out
    done = foreign.rehearse("experiments", "-k", "pod_kill", env={"GAMEDAY_EXPENDABLE": "true"})
    assert done.code == 1 and "expendable is for the sandbox only" in done.out
    process = subprocess.run(
        [sys.executable, "-m", "gameday.cli", "heal", "--context", "staging", "--kubeconfig", str(foreign.kubeconfig)],
        cwd=ROOT,
        env=foreign.stage.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 2 and "--namespace" in process.stderr


def test_a_namespace_that_is_not_there(foreign: Foreign) -> None:
    done = foreign.rehearse("experiments", "-k", "pod_kill", "--namespace", "prod")
    assert done.code == 1 and "not in allow_namespaces" in done.out
    assert cluster_of(foreign.stage).find(NAMESPACES, "prod") is None
    assert cluster_of(foreign.stage).list(PODS, "prod") == [] == cluster_of(foreign.stage).list(EVENTS, "prod")
