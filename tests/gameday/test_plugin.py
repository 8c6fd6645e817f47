"""The plugin turns verdicts into outcomes; only PASS is green. Each test is a pytest of its own, without a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]

PLANNED = """
from types import SimpleNamespace

import pytest
import gameday.experiment as plugin
from reports.notify import Notify
from gameday.model import Counts, Finding, Judgement, Verdict

class Settings:
    dry_run, trials, zone, allow_missing = False, 1, None, ("chaos-mesh",)
    notify = Notify()

class Arena:
    settings, seed, say, cluster = Settings(), 7, print, SimpleNamespace(name="nowhere")
    root = __import__("pathlib").Path("nowhere")

class Opened:
    arena = Arena()
    def close(self): pass

def opened(config, options):
    config.stash[plugin.OPENED] = Opened()
    return Opened()

def trial(self, arena, spec, number):
    name = "zone_outage"
    verdict = Verdict(self._item.get_closest_marker("planned").args[0])
    finding = Finding("during", "success ≥ 99 %", verdict, 0.5, 0.99, "share")
    again = "pytest experiments -k x --seed 7"
    return Judgement(name, verdict, (finding,), None, Counts(10, 5, 5, 0, 0), 7, "t", again)

plugin.opened, plugin.Run._trial = opened, trial

def pytest_configure(config):
    config.addinivalue_line("markers", "planned(verdict): the judgement that the run comes to")
"""
BODY = """
import pytest
from faults import PodKill
from gameday.objectives import Success
from loadgen.traffic import Chat

def run(experiment):
    return experiment(traffic=Chat(per_second=1), before=[Success(at_least=0.9)], fault=PodKill(lasting=60))
"""


def pytest_of(tmp_path: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(PLANNED)
    (tmp_path / "test_it.py").write_text(BODY + tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "gameday.plugin", "-q", "--junitxml=junit.xml", *options]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("verdict", "code", "element", "word"),
    [
        ("PASS", 0, None, "1 passed"),
        ("FAIL", 1, "failure", "1 failed"),
        ("ERROR", 1, "error", "1 error"),
        ("INCONCLUSIVE", 1, "error", "1 inconclusive"),
    ],
)
def test_the_verdict_is_the_outcome(tmp_path: Path, verdict: str, code: int, element: str | None, word: str) -> None:
    # The test itself asserts nothing: the plugin decides.
    done = pytest_of(tmp_path, f"@pytest.mark.planned('{verdict}')\ndef test_zone_outage(experiment): run(experiment)")
    assert done.returncode == code, done.stdout + done.stderr
    assert word in done.stdout
    (case,) = ElementTree.parse(tmp_path / "junit.xml").iter("testcase")
    found = [child for child in case if child.tag in ("failure", "error", "skipped")]
    assert [child.tag for child in found] == ([element] if element else [])
    if verdict == "INCONCLUSIVE":
        assert found[0].get("type") == "INCONCLUSIVE"
    properties = {one.get("name"): one.get("value") for one in case.iter("property")}
    assert properties["verdict"] == verdict and properties["planned"] == "10"


def test_the_story_is_shown_not_a_traceback(tmp_path: Path) -> None:
    tests = """
@pytest.mark.planned('FAIL')
def test_zone_outage(experiment):
    verdict = run(experiment)
    assert verdict.passed, verdict.story
"""
    done = pytest_of(tmp_path, tests)
    assert "success ≥ 99 %" in done.stdout and "--seed 7" in done.stdout
    assert "Traceback" not in done.stdout and "AssertionError" not in done.stdout


def test_swallowing_a_bad_verdict_does_not_make_it_green(tmp_path: Path) -> None:
    tests = """
@pytest.mark.planned('INCONCLUSIVE')
def test_zone_outage(experiment):
    try:
        assert run(experiment).passed
    except AssertionError:
        pass
"""
    assert pytest_of(tmp_path, tests).returncode == 1


def test_an_experiment_that_never_ran_is_an_error(tmp_path: Path) -> None:
    done = pytest_of(tmp_path, "def test_zone_outage(experiment): pass")
    assert done.returncode == 1
    assert "1 error" in done.stdout and "never ran it" in done.stdout


def test_a_bug_in_the_test_keeps_its_traceback(tmp_path: Path) -> None:
    tests = "@pytest.mark.planned('PASS')\ndef test_zone_outage(experiment):\n    run(experiment)\n    1 / 0"
    done = pytest_of(tmp_path, tests)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout


def test_a_failing_assert_of_the_test_turns_a_pass(tmp_path: Path) -> None:
    tests = "@pytest.mark.planned('PASS')\ndef test_zone_outage(experiment):\n    run(experiment)\n    assert 1 == 2"
    assert pytest_of(tmp_path, tests).returncode == 1


def test_collection_touches_no_cluster(tmp_path: Path) -> None:
    tests = "@pytest.mark.planned('PASS')\ndef test_zone_outage(experiment): run(experiment)"
    done = pytest_of(tmp_path, tests, "--collect-only", "--context", "nowhere", "--kubeconfig", "/nonexistent")
    assert done.returncode == 0, done.stdout


def test_parallel_runs_are_refused(tmp_path: Path) -> None:
    tests = "@pytest.mark.planned('PASS')\ndef test_zone_outage(experiment): run(experiment)"
    done = pytest_of(tmp_path, tests, "-p", "xdist", "-n", "2")
    assert done.returncode == 1 and "cannot run in parallel" in done.stdout and "1 error" in done.stdout


def test_a_teams_experiment_is_not_run_in_parallel_either(tmp_path: Path) -> None:
    """It asks for no fixture, which is where parallel runs were refused: under -n it ran, beside the others."""
    action = {"type": "action", "name": "x", "provider": {"type": "process", "path": "touch", "arguments": "ran"}}
    (tmp_path / "night.chaos.json").write_text(json.dumps({"title": "Night", "method": [action]}))
    done = pytest_of(tmp_path, "def test_nothing(): pass", "-p", "xdist", "-n", "2")
    assert done.returncode == 1 and "cannot run in parallel" in done.stdout, done.stdout
    assert "1 passed" in done.stdout and "1 error" in done.stdout, done.stdout


def test_two_experiments_with_one_bad_are_not_green(tmp_path: Path) -> None:
    tests = """
@pytest.mark.planned('PASS')
def test_one(experiment): run(experiment)
@pytest.mark.planned('INCONCLUSIVE')
def test_two(experiment): run(experiment)
"""
    done = pytest_of(tmp_path, tests)
    assert done.returncode == 1 and "1 passed" in done.stdout and "1 inconclusive" in done.stdout


TRIALS = """
import pytest
from gameday import experiment
from gameday.errors import MissingCapability

@pytest.fixture(autouse=True)
def three_trials(monkeypatch, request):
    planned = experiment.Run._trial
    monkeypatch.setattr("conftest.Settings.trials", 3)

    def trial(self, arena, spec, number):
        if number > 1 and request.node.name == "test_missing":
            raise MissingCapability("chaos-mesh", "it was uninstalled")
        if number > 1 and request.node.name == "test_stopped":
            self._item.session.shouldstop = "somebody else wants to stop"
        return planned(self, arena, spec, number)

    monkeypatch.setattr(experiment.Run, "_trial", trial)
"""


def test_three_trials_are_told_as_three_of_three(tmp_path: Path) -> None:
    done = pytest_of(tmp_path, TRIALS + "@pytest.mark.planned('PASS')\ndef test_all(experiment): run(experiment)", "-s")
    assert done.returncode == 0 and "3 of 3" in done.stdout, done.stdout + done.stderr


def test_a_capability_that_goes_missing_between_trials_is_no_skip(tmp_path: Path) -> None:
    """--allow-missing excuses an experiment that could not begin, not one that lost its second trial."""
    done = pytest_of(tmp_path, TRIALS + "@pytest.mark.planned('PASS')\ndef test_missing(experiment): run(experiment)")
    assert done.returncode == 1 and "1 error" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_fewer_trials_than_were_asked_for_are_inconclusive(tmp_path: Path) -> None:
    tests = TRIALS + "@pytest.mark.planned('PASS')\ndef test_stopped(experiment): run(experiment)"
    done = pytest_of(tmp_path, tests, "-s")
    assert done.returncode != 0 and "2 of 3" in done.stdout, done.stdout + done.stderr


def test_two_experiments_of_one_name_are_refused(tmp_path: Path) -> None:
    """The second would have been recorded into the sealed directory of the first."""
    tests = """
class TestOne:
    @pytest.mark.planned('PASS')
    def test_zone_outage(self, experiment): run(experiment)

class TestTwo:
    @pytest.mark.planned('PASS')
    def test_zone_outage(self, experiment): run(experiment)
"""
    done = pytest_of(tmp_path, tests)
    assert done.returncode == 1 and "1 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "rename one" in done.stdout
