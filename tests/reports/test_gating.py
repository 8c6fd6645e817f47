"""`pytest --gate`: exit code by verdicts and by regression. Each test is a pytest of its own, without a cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_gate import NOISE, run

from gameday import record
from gameday.experiment import directory_of
from gameday.gating import Asked, Held, hold

ROOT = Path(__file__).parents[2]

PLANNED = """
import pathlib
import gameday.experiment as experiment
from gameday import record

class Settings:
    dry_run, trials, zone, allow_missing = False, 1, None, ()
    notify = __import__("reports.notify", fromlist=["Notify"]).Notify()

class Cluster:
    name = "sandbox"

class Arena:
    settings, seed, cluster = Settings(), 7419, Cluster()
    root = pathlib.Path({root!r})

class Opened:
    arena = Arena()
    def close(self): pass

def opened(config, options):
    config.stash[experiment.OPENED] = Opened()
    return Opened()

def trial(self, arena, spec, number):
    judged = record.read_verdict(arena.root / "zone_outage")
    experiment.remember(self._item, judged)
    return judged

experiment.opened, experiment.Run._trial = opened, trial
"""
TEST = """
from faults import PodKill
from gameday.objectives import Success
from loadgen.traffic import Chat

def test_zone_outage(experiment):
    experiment(traffic=Chat(per_second=1), before=[Success(at_least=0.9)], fault=PodKill(lasting=60))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four usual runs, one a day, then day 9 as usual; day 10 slower by half; day 11 under another seed."""
    base = tmp_path_factory.mktemp("runs")
    for day, slower in enumerate(NOISE[:4]):
        run(base / "past", day, slower=slower)
    run(base / "usual", 9, slower=1.02)
    run(base / "slow", 10, slower=1.5)
    run(base / "other", 11, slower=1.5, seed=8)
    run(base / "failed", 12, failing=True)
    return base


def pytest_of(
    tmp_path: Path, root: Path, *options: str, test: str = TEST, **env: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(PLANNED.format(root=str(root)))
    (tmp_path / "test_it.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "gameday.plugin", "-q", *options]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **env}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_noise_goes_through(tmp_path: Path, runs: Path) -> None:
    done = pytest_of(tmp_path, runs / "usual/run-9", "--baseline", str(runs / "past"), "--gate-strict")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate open: 1 PASS · 0 of 2 compared regressed" in done.stdout


def test_a_regression_is_not_green_though_every_test_passed(tmp_path: Path, runs: Path) -> None:
    page = tmp_path / "summary.md"
    more = {"GITHUB_STEP_SUMMARY": str(page)}
    done = pytest_of(tmp_path, runs / "slow/run-10", "--baseline", str(runs / "past"), **more)
    assert done.returncode == 1, done.stdout
    assert "1 passed" in done.stdout and "gate CLOSED" in done.stdout
    assert "REGRESSED  zone_outage  first token p95" in done.stdout
    assert "gate CLOSED" in page.read_text(encoding="utf-8")


def test_the_properties_name_the_trial_s_own_directory(runs: Path, tmp_path: Path) -> None:
    root = shutil.copytree(runs / "usual" / "run-9", tmp_path / "run-9")
    shutil.copytree(runs / "failed" / "run-12" / "zone_outage", root / "zone_outage.2")
    for name in ("zone_outage", "zone_outage.2"):
        assert directory_of(record.read_verdict(root / name), root) == root / name
    never = replace(record.read_verdict(root / "zone_outage"), experiment="pod_kill")
    assert directory_of(never, root) == root / "pod_kill"


def test_no_gate_is_asked_for_so_none_is_held(tmp_path: Path, runs: Path) -> None:
    done = pytest_of(tmp_path, runs / "slow/run-10")
    assert done.returncode == 0 and "gate" not in done.stdout.replace("gateway", "")


def test_the_runs_beside_it_are_the_history(tmp_path: Path, runs: Path) -> None:
    run(runs / "past", 13, slower=1.5)
    done = pytest_of(tmp_path, runs / "past/run-13", "--gate")
    assert done.returncode == 1 and "REGRESSED" in done.stdout, done.stdout


def test_another_seed_is_not_compared_and_said(tmp_path: Path, runs: Path) -> None:
    asked = ("--baseline", str(runs / "past"))
    done = pytest_of(tmp_path, runs / "other/run-11", *asked)
    assert done.returncode == 0
    assert "0 like runs that passed are too few" in done.stdout and "not compared: 4 of another seed" in done.stdout
    assert pytest_of(tmp_path, runs / "other/run-11", *asked, "--gate-strict").returncode == 1


def test_a_bad_verdict_stays_bad(tmp_path: Path, runs: Path) -> None:
    done = pytest_of(tmp_path, runs / "failed/run-12", "--baseline", str(runs / "past"))
    assert done.returncode == 1 and "gate CLOSED" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--baseline", "nowhere"), "--baseline nowhere is neither a run nor a directory of runs"),
        (("--gate", "--gate-by", "-1"), "--gate-by is a share of 0 or more"),
        (("--gate", "--gate-by", "nan"), "--gate-by is a share of 0 or more"),
        (("--gate", "--gate-last", "2"), "--gate-last 3 runs or more"),
    ],
)
def test_a_gate_that_cannot_be_held_is_refused_at_once(
    tmp_path: Path, runs: Path, options: tuple[str, ...], said: str
) -> None:
    done = pytest_of(tmp_path, runs / "usual/run-9", *options)
    assert done.returncode == 4 and said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_baseline_closes_it(tmp_path: Path, runs: Path) -> None:
    harmed = run(tmp_path / "harmed", 5)
    (harmed / "zone_outage" / "events.jsonl").write_text("")
    done = pytest_of(tmp_path, runs / "usual/run-9", "--baseline", str(runs / "past"), "--baseline", str(harmed))
    assert done.returncode == 1
    assert "gate CLOSED" in done.stdout and "events.jsonl" in done.stdout and "Traceback" not in done.stdout


def test_where_no_experiment_ran_there_is_nothing_to_let_through(tmp_path: Path, runs: Path) -> None:
    done = pytest_of(tmp_path, runs / "usual/run-9", "--gate", test="def test_nothing(): pass")
    assert done.returncode == 1 and "nothing to let through" in done.stdout


def test_a_report_that_cannot_be_written_is_said_and_changes_nothing(tmp_path: Path, runs: Path) -> None:
    done = pytest_of(tmp_path, runs / "usual/run-9", GITHUB_STEP_SUMMARY=str(tmp_path / "no" / "such.md"))
    assert done.returncode == 0, done.stdout
    assert "report: NOT WRITTEN: " in done.stdout and "index.html" in done.stdout


def test_why_a_gate_is_closed_is_known_where_nothing_regressed(tmp_path: Path) -> None:
    """So that it can be told: a green Slack beside a red pytest is worse than none."""
    root = run(tmp_path, 1)
    assert hold(root, Asked((), 0.1, 10, strict=False)).closed == ""
    strict = hold(root, Asked((), 0.1, 10, strict=True))
    assert not strict.passed and strict.closed.startswith("gate CLOSED: ") and "not compared" in strict.closed
    (root / "zone_outage" / "events.jsonl").write_text("")
    assert "was changed after" in hold(root, Asked((), 0.1, 10, strict=False)).closed
    assert Held(False, "gate CLOSED: 1 regressed", regressed=("recovery",)).closed == ""
