"""Stages: a sandbox of this test session's own, and ways to run `pytest experiments` on it as a user does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox.node import linux
from sandbox.options import Options
from sandbox.up import Running, down, up

ROOT = Path(__file__).parents[2]


def missing() -> str:
    """Why no sandbox can run here, "" when it can."""
    for tool in ("nft", "ip"):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    if not (shutil.which("prometheus") or Path(os.environ.get("PROMETHEUS_BIN", "")).is_file()):
        return "there is no Prometheus binary"
    return ""


def need_sandbox() -> None:
    """Skipping is for laptops; in CI a missing sandbox is a failure, or the suite would be green without its heart."""
    why = missing()
    if why and os.environ.get("CI"):
        pytest.fail(f"the end-to-end tests cannot run: {why}", pytrace=False)
    if why:
        pytest.skip(why)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What came of a run of `pytest experiments`."""

    code: int
    out: str
    root: Path  # the run directory

    def verdict(self, experiment: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / experiment / "verdict.json").read_text())
        return found


@dataclass(frozen=True, slots=True)
class Stage:
    """A sandbox, and ways to run experiments on it."""

    running: Running
    tmp: Path

    @property
    def env(self) -> dict[str, str]:
        # What pytest sets for itself must not reach the pytest that is under test.
        own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "GAMEDAY_", "COV_"))}
        return {**own, "GAMEDAY_STATE_DIR": self.running.state_dir, "NO_COLOR": "1", "COLUMNS": "160"}

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--runs-dir", str(self.tmp / "runs")]
        return subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env={**self.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], within: float = 200) -> Rehearsal:
        try:
            out, _ = process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, _ = process.communicate(timeout=60)
            pytest.fail(f"the rehearsal did not end within {within} s:\n{out}")
        roots = sorted((self.tmp / "runs").glob("*"), key=lambda path: path.stat().st_mtime)
        return Rehearsal(process.returncode, out, roots[-1] if roots else self.tmp)

    def rehearse(self, *arguments: str) -> Rehearsal:
        return self.finish(self.start(*arguments))

    def gameday(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gameday.cli", *arguments],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def raised(tmp: Path, stack: str) -> Iterator[Stage]:
    need_sandbox()
    told: list[str] = []
    prometheus = os.environ.get("PROMETHEUS_BIN", "prometheus")
    options = Options(stack=stack, state_dir=tmp / "state", prometheus_bin=prometheus, parent=os.getpid())  # type: ignore[arg-type]
    running = up(options, told.append)
    try:
        yield Stage(running, tmp)
    finally:
        down(tmp / "state")
        assert linux.start_ticks(running.pid) != running.start_ticks, "the supervisor outlived `down`"


class Lines:
    """Follows a process's output, so that a test can wait for a word."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.text = ""
        self._process = process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.text += line

    def rest(self, within: float) -> str:
        self._process.wait(timeout=within)
        self._thread.join(timeout=10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return self.text
