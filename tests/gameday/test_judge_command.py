"""`gameday judge DIR`: the same bytes again, offline; what was edited or cut short is refused with the place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planted import FAULT, HARM, Plant, between
from test_record import ASKED, write

from gameday import cli, record
from gameday.judge import judge
from gameday.model import Verdict

ROOT = Path(__file__).parents[2]


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A run that failed (its steady state was not sound), sealed and judged as the harness leaves it."""
    run = Plant(between(HARM + 0.2, HARM + 2), poisson=10, fault=FAULT).build()
    directory = write(tmp_path / "run-1" / "zone_outage", run)
    record.seal(directory)
    record.write_verdict(directory, judge(*record.load(directory)))
    return directory


def gameday(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    line = [sys.executable, "-m", "gameday.cli", *map(str, command)]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_same_bytes_again(judged: Path) -> None:
    before = (judged / "verdict.json").read_bytes()
    done = gameday("judge", judged.parent)
    verdict = record.read_verdict(judged).verdict
    assert done.returncode == (0 if verdict is Verdict.PASS else 1), done.stderr
    assert verdict.value in done.stdout and "zone_outage" in done.stdout
    assert done.stderr == ""
    assert (judged / "verdict.json").read_bytes() == before


def test_a_verdict_that_was_edited_is_told_and_written_anew(judged: Path) -> None:
    path = judged / "verdict.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"samples": 1', b'"samples": 9', 1))
    done = gameday("judge", judged)
    assert "is not what the record comes to" in done.stderr and str(path) in done.stderr
    assert path.read_bytes() == before


def test_an_edited_reply_is_refused_with_the_place(judged: Path) -> None:
    path = judged / "replies.0.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"refused"', b'"ok"', 1))
    done = gameday("judge", judged)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(path) in done.stderr and "changed after" in done.stderr


def test_a_truncated_file_is_refused_with_the_place(judged: Path) -> None:
    path = judged / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    done = gameday("judge", judged.parent)
    assert done.returncode == 2 and str(path) in done.stderr and "bytes" in done.stderr


def test_a_run_that_was_never_sealed_is_refused(judged: Path) -> None:
    (judged / "seal.json").unlink()
    done = gameday("judge", judged)
    assert done.returncode == 2 and "did not end properly" in done.stderr


def test_a_trial_that_was_asked_for_and_is_not_there_is_no_pass(judged: Path) -> None:
    """Whole directories can get lost, too: what was asked for is in every record."""
    run = Plant(between(HARM + 0.2, HARM + 0.6), poisson=10, fault=replace(FAULT, one_shot=True)).build()
    root = judged.parent.with_name("run-2")
    for trial in (1, 2):
        about = replace(run.about, trial=trial, settings={"trials": "2"})
        directory = write(root / ("zone_outage" if trial == 1 else "zone_outage.2"), replace(run, about=about))
        record.seal(directory)
    done = gameday("judge", root)
    assert done.returncode == 0 and "2 of 2" in done.stdout, done.stdout + done.stderr
    shutil.rmtree(root / "zone_outage.2")
    done = gameday("judge", root)
    assert done.returncode == 1 and "1 of 2" in done.stdout, done.stdout + done.stderr


def test_objectives_recorded_are_those_that_are_judged(judged: Path) -> None:
    _, objectives = record.load(judged)
    assert objectives == ASKED


@pytest.mark.parametrize("command", ["judge", "report", "gate"])
def test_what_cannot_be_written_is_said_in_a_sentence(
    judged: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artefacts on a disk that may only be read, a job page that is none: tracebacks."""
    (judged / "verdict.json").touch()
    (judged / "verdict.json.part").mkdir()
    (judged / "report.html").mkdir()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    done = gameday(command, judged.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("gameday: ") and "cannot be used: Is a directory" in done.stderr


def test_whoever_has_no_name_may_stop_a_game_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container a uid often has no name, and `gameday stop` ended in a traceback before it had said stop."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert cli._who() == f"uid {os.getuid()}"
