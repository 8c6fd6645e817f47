"""docs/ci.md: what it tells people to copy is valid, and holds no secret."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import promtool
import yaml

from reports.notify import Notify

TEXT = (promtool.ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_github_workflow_heals_and_keeps_everything_whatever_happens() -> None:
    workflow: dict[Any, Any] = yaml.safe_load(blocks("yaml")[0])
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    assert workflow["concurrency"]["cancel-in-progress"] is False
    names = [step.get("uses", step.get("name", "")).split("@")[0] for step in steps]
    assert names.index("Game day") < names.index("Gate")
    always = [step for step in steps if step.get("if") == "always()"]
    assert any("gameday down" in step.get("run", "") for step in always)
    assert {"actions/cache/save", "actions/upload-artifact"} <= {s.get("uses", "").split("@")[0] for s in always}
    for name, value in job["env"].items():
        assert name.startswith("GAMEDAY_") or value == f"${{{{ secrets.{name} }}}}"


def test_the_gitlab_job_heals_and_keeps_everything_whatever_happens() -> None:
    (job,) = yaml.safe_load(blocks("yaml")[1]).values()
    assert "gameday gate" in job["script"][1] and "gameday down" in job["after_script"][0]
    assert job["artifacts"]["when"] == job["cache"]["when"] == "always"
    assert job["resource_group"] and job["interruptible"] is False


def test_the_newest_run_is_gated_and_the_oldest_go(tmp_path: Path) -> None:
    for day in range(1, 33):
        (tmp_path / "runs" / f"202611{day:02}-090000-7419").mkdir(parents=True)

    def sh(command: str) -> str:
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    newest = re.findall(r'gate ("\$\(.*?\)")', TEXT)
    assert len(newest) == 2
    for one in newest:
        assert sh(f"echo {one}").strip() == "runs/20261132-090000-7419/"
    (prune, again) = re.findall(r"(ls -d runs/\*/ \| head .*)", TEXT)
    assert prune == again
    sh(prune)
    left = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(left) == 30 and left[0] == "20261103-090000-7419"


def test_the_settings_are_those_that_exist() -> None:
    (written,) = blocks("toml")
    told = tomllib.loads(written.replace("# pagerduty_url", "pagerduty_url"))["notify"]
    given: dict[str, Any] = {k: Path(v) if k.endswith("_file") else v for k, v in told.items()}
    config = Notify(**given)
    assert config.slack and config.pagerduty and config.webhook and config.grafana_token


def test_the_operator_s_rules_hold_all_groups() -> None:
    (script,) = blocks("sh")
    shown = script.replace("| kubectl apply --namespace monitoring -f -", "")
    done = subprocess.run(["sh", "-ec", shown], cwd=promtool.ROOT, capture_output=True, text=True, check=True)
    made = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert {one["metadata"]["name"] for one in made} == {f"llm-{p.stem}" for p in promtool.RULES}
    assert all(one["kind"] == "PrometheusRule" and one["spec"]["groups"] for one in made)


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (promtool.ROOT / "docs" / link).exists(), link
