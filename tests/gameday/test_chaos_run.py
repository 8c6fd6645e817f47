"""Our experiment.json under plain `chaos run`: whatever cannot begin must not exit 0, as chaos does by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults import PodKill
from gameday.objectives import NothingLeftBehind, Objectives, Success
from gameday.spec import Spec
from gameday.toolkit import experiment_json
from loadgen.traffic import Chat

ROOT = Path(__file__).parents[2]


def chaos(tmp_path: Path, experiment: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(experiment))
    own = {key: value for key, value in os.environ.items() if not key.startswith(("GAMEDAY_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-m", "chaostoolkit", "--no-version-check", "run", str(path)],
        cwd=tmp_path,
        env={**own, "PYTHONPATH": str(ROOT), "GAMEDAY_STATE_DIR": str(tmp_path / "state"), **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def written() -> dict[str, Any]:
    objectives = Objectives((Success(at_least=0.99),), (), (NothingLeftBehind(),))
    return experiment_json(Spec("kill", Chat(per_second=5), PodKill(lasting=60), objectives), "Kill", 7)


def test_without_a_named_cluster_it_fails(tmp_path: Path, written: dict[str, Any]) -> None:
    done = chaos(tmp_path, written)
    assert (
        done.returncode == 1
        and "ERROR: the experiment could not begin: `chaos run` needs a named cluster" in done.stdout
    )


def test_with_a_spec_that_is_not_ours_it_fails(tmp_path: Path, written: dict[str, Any]) -> None:
    written["method"][0]["provider"]["arguments"]["spec"]["fault"] = {"type": "Earthquake"}
    done = chaos(tmp_path, written, GAMEDAY_CONTEXT="staging", KUBECONFIG=str(tmp_path / "none"))
    assert done.returncode == 1 and "ERROR: the experiment could not begin: " in done.stdout


def test_without_a_sandbox_that_is_up_it_fails(tmp_path: Path, written: dict[str, Any]) -> None:
    done = chaos(tmp_path, written, GAMEDAY_CONTEXT="gameday-sandbox")
    assert done.returncode == 1 and "No sandbox is up" in done.stdout


ON_THE_WAY_OUT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from gameday import toolkit

def wrong(): raise RuntimeError("the record is torn")
session = SimpleNamespace(dir=Path("drill"), heal=lambda: None, finish=lambda: None, conclude=lambda: None)
setattr(session, sys.argv[1], wrong)
toolkit._stand_alone(session)
"""


@pytest.mark.parametrize("step", ["heal", "finish", "conclude"])
@pytest.mark.parametrize("console", [True, False])
def test_where_nothing_was_judged_it_fails(tmp_path: Path, step: str, console: bool) -> None:
    """What raises on the way out left chaos' exit code as it was, 0; so did a console that was closed meanwhile."""
    heard, mouth = os.pipe()
    os.close(heard)
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_WAY_OUT, step],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE if console else mouth,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(mouth)
    assert done.returncode == 1 and (not console or "ERROR: the record is torn" in done.stdout), done.stderr
