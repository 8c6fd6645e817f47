"""docs/real-cluster.md, deploy/cronjob and deploy/ci: what people are told to copy is valid, and exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import promtool
import pytest
import yaml

from gameday import arena, own
from gameday.activities import parse
from gameday.cli import main
from gameday.plugin import pytest_addoption
from gameday.rbac import NAME, show
from gameday.settings import ONLY_BY_HAND, Settings

ROOT = promtool.ROOT
DOC = (ROOT / "docs" / "real-cluster.md").read_text(encoding="utf-8")
CRON = list(yaml.safe_load_all((ROOT / "deploy" / "cronjob" / "gameday.yaml").read_text()))
GITHUB: dict[Any, Any] = yaml.safe_load((ROOT / "deploy" / "ci" / "github.yml").read_text())
GITLAB: dict[Any, Any] = yaml.safe_load((ROOT / "deploy" / "ci" / "gitlab.yml").read_text())
PYTEST_OWN = {"-k", "-p", "--junitxml", "-q", "-x"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def check_command(line: str) -> None:
    """`gameday …` and `pytest …` as we have them: the subcommand and every option exist."""
    words = shlex.split(line.split(" | ", maxsplit=1)[0], comments=True)
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[:1] == ["gameday"]:
        command = main.commands[words[1]]
        known = {name for one in command.params if isinstance(one, click.Option) for name in one.opts}
        given = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert given <= known, f"{line}: {given - known}"
    elif words[:1] == ["pytest"]:
        given = {word.split("=")[0] for word in words[1:] if word.startswith("-")}
        assert given <= _options() | PYTEST_OWN, line


def _options() -> set[str]:
    """What the plugin adds to pytest."""
    found: set[str] = set()

    class Parser:
        def getgroup(self, *_: Any) -> Parser:
            return self

        def addoption(self, name: str, **_: Any) -> None:
            found.add(name)

    parser: Any = Parser()
    pytest_addoption(parser)
    return found


def commands() -> list[str]:
    found = re.findall(r"^    ((?:gameday|pytest|GAMEDAY_).*)$", DOC, re.MULTILINE)
    found += re.findall(r"`((?:gameday|pytest) [^`]+)`", DOC)
    steps = [line for step in GITHUB["jobs"]["gameday"]["steps"] for line in step.get("run", "").splitlines()]
    found += [line for line in steps if line.startswith(("gameday", "pytest"))]
    (job,) = GITLAB.values()
    found += [line for line in [*job["script"], *job["after_script"]] if line.startswith(("gameday", "pytest"))]
    pod = CRON[2]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    found += [shlex.join(one["command"]) for one in [*pod["initContainers"], *pod["containers"]]]
    return found


def test_every_command_exists_with_its_options() -> None:
    found = commands()
    assert len(found) > 15
    for line in found:
        check_command(line)
    with pytest.raises(AssertionError):
        check_command("gameday doctor --colour")


def settings_named(names: dict[str, Any]) -> set[str]:
    keys = {name.removeprefix("GAMEDAY_").lower() for name in names if name.startswith("GAMEDAY_")}
    assert keys <= set(Settings.model_fields), keys - set(Settings.model_fields)
    return keys


def test_the_jobs_name_everything_that_a_real_cluster_asks_for() -> None:
    (job,) = GITLAB.values()
    for names in (GITHUB["env"], job["variables"]):
        assert settings_named(names) >= {*arena.EXPLICIT, "context"}
        assert names["GAMEDAY_NAMESPACE"] in json.loads(names["GAMEDAY_ALLOW_NAMESPACES"])
    written = tomllib.loads(CRON[0]["data"]["gameday.toml"])
    assert set(written) >= set(arena.EXPLICIT) and not set(written) & set(ONLY_BY_HAND)
    Settings(**written)
    for text in blocks("toml"):
        assert set(tomllib.loads(text)) <= set(Settings.model_fields)
        Settings(**tomllib.loads(text))


def test_the_jobs_heal_whatever_happens_and_one_at_a_time() -> None:
    steps = GITHUB["jobs"]["gameday"]["steps"]
    always = [step for step in steps if step.get("if") == "always()"]
    assert any(step.get("run") == "gameday heal" for step in always)
    assert GITHUB["concurrency"]["cancel-in-progress"] is False
    (job,) = GITLAB.values()
    assert job["after_script"] == ["gameday heal"] and job["resource_group"] and job["interruptible"] is False
    spec = CRON[2]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["command"] == ["gameday", "heal"]
    assert pod["terminationGracePeriodSeconds"] >= 120, "SIGTERM heals before it exits"


def test_no_secret_stands_in_a_job() -> None:
    texts = [path.read_text() for path in [*ROOT.glob("deploy/ci/*.yml"), *ROOT.glob("deploy/cronjob/*")]]
    for text in texts:
        for found in re.findall(r"\$\{\{ (.*?) \}\}", text):
            assert found.startswith(("secrets.", "github.")), found
        assert not re.search(r"(?i)(token|password|api_key)\s*[:=]\s*['\"]?[A-Za-z0-9]{8,}", text)
    kubeconfig = next(step for step in GITHUB["jobs"]["gameday"]["steps"] if step.get("name") == "Kubeconfig")
    assert "umask 077" in kubeconfig["run"] and "secrets." not in kubeconfig["run"], "never in a command line"


def test_the_cronjob_runs_as_whom_rbac_prints_and_is_restricted() -> None:
    pod = CRON[2]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    account = next(obj for obj in yaml.safe_load_all(show("llm")) if obj["kind"] == "ServiceAccount")
    assert pod["serviceAccountName"] == NAME == account["metadata"]["name"]
    assert {obj["metadata"]["namespace"] for obj in CRON} == {account["metadata"]["namespace"]}
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
    for one in [*pod["initContainers"], *pod["containers"]]:
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"name": "GAMEDAY_IN_CLUSTER", "value": "true"} in one["env"]
        assert any(mount["mountPath"] == "/game/gameday.toml" for mount in one["volumeMounts"])
    written = tomllib.loads(CRON[0]["data"]["gameday.toml"])
    assert written["zone"] != pod["nodeSelector"]["topology.kubernetes.io/zone"], "it must not break itself"
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert written["runs_dir"] in mounts


def test_the_image_copies_what_is_there_and_all_that_is_imported() -> None:
    text = (ROOT / "deploy" / "cronjob" / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    for name in copied:
        assert (ROOT / name).exists(), name
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= copied
    assert re.search(r"^USER 65534", text, re.MULTILINE)


def test_the_first_experiment_is_collected_and_fits_the_default_windows(tmp_path: Path) -> None:
    (text,) = blocks("python")
    (tmp_path / "test_pod_kill.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(
        "import gameday.experiment as e\nfrom gameday.settings import load\n"
        "from gameday.run import Spec\nfrom gameday.objectives import Objectives\n"
        "def call(self, *, traffic, before, fault, during, after):\n"
        "    asked = Objectives(tuple(before), tuple(during), tuple(after))\n"
        "    Spec('pod_kill', traffic, fault, asked).check(load({'selector': 'app=x'}))\n"
        "    open('checked', 'w').close()\n"
        "    class Done: passed, story = True, ''\n"
        "    return Done\n"
        "e.Run.__call__ = call\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gameday.plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (tmp_path / "checked").exists(), done.stdout
    assert "1 error" in done.stdout and "never ran it" in done.stdout, "a verdict is still what counts"


def test_what_is_shown_of_a_teams_own_experiment_is_read(tmp_path: Path) -> None:
    (text,) = (text for text in blocks("yaml") if "extensions" in text)
    slow = {"name": "requests are slow", "type": "probe", "tolerance": True, "provider": {"type": "python"}}
    method = [{"name": "slow", "type": "action", "provider": {"type": "process", "path": "true"}}, slow]
    plain = {"title": "x", "method": method, **yaml.safe_load(text)}
    assert parse(plain, "x").proofs[0].name == "requests are slow"
    path = tmp_path / "x.chaos.yaml"
    path.write_text(yaml.safe_dump(plain))
    _, spec = own.load(path)
    assert spec.fault.lasting == 120 and len(spec.objectives.items()) == 4


def test_kinds_nodes_have_zones() -> None:
    (text,) = (text for text in blocks("yaml") if "kind.x-k8s.io" in text)
    zones = [one.get("labels", {}).get("topology.kubernetes.io/zone") for one in yaml.safe_load(text)["nodes"]]
    assert len({zone for zone in zones if zone}) == 3


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", DOC):
        assert (ROOT / "docs" / link).resolve().exists(), link
