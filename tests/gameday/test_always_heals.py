"""Whatever happens in whatever step, under the real chaoslib: heal and finish run, and nothing is injected after it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faults import PodKill
from gameday import toolkit
from gameday.errors import ClusterError, LoadError, MissingCapability, RecordError
from gameday.objectives import Objectives, Success
from gameday.spec import Spec
from gameday.toolkit import STEPS, execute
from loadgen.traffic import Chat

SPEC = Spec("drill", Chat(per_second=1), PodKill(lasting=60), Objectives((Success(0.9),)))
NAMES = [name for name, _ in STEPS]


class Drill:
    """A session that notes which steps ran, and in which `at` something happens."""

    def __init__(self, tmp_path: Path, at: str, happens: Callable[[], None]) -> None:
        self.dir, self.spec = tmp_path / "drill", SPEC
        self.interrupted: int | None = None
        self.judgeable, self.untouched = True, True
        self.allow_missing: tuple[str, ...] = ()
        self.ran: list[str] = []
        self.told: list[str] = []
        self.stopping = threading.Event()
        self.tape = SimpleNamespace(stopping=self.stopping, broken="")
        self._at, self._happens = at, happens

    def __getattr__(self, name: str) -> Any:
        if name not in (*NAMES, "finish"):
            raise AttributeError(name)

        def step() -> None:
            if self.stopped and name not in ("heal", "finish"):
                return
            self.ran.append(name)
            if name == self._at and self.ran.count(name) == 1:
                self._happens()

        return step

    @property
    def stopped(self) -> bool:
        return self.stopping.is_set()

    def stop(self, level: str, text: str) -> None:
        self.told.append(text)
        self.stopping.set()

    def interrupt(self, number: int) -> None:
        self.interrupted = number
        self.stop("error", "interrupted")


def healed(drill: Drill, at: str) -> None:
    """Nothing but the end came after the step in which it happened, and the end came."""
    after = drill.ran[drill.ran.index(at) + 1 :]
    assert set(after) <= {"heal", "finish"}, drill.ran
    assert "heal" in drill.ran and drill.ran.count("finish") >= 1
    assert toolkit._session is None


@pytest.mark.parametrize("at", NAMES)
@pytest.mark.parametrize(
    "wrong", [ClusterError("gone"), LoadError("a worker was lost"), RecordError("the disk is full")]
)
def test_an_error_of_ours_in_any_step_heals(at: str, wrong: Exception, tmp_path: Path) -> None:
    def happens() -> None:
        raise wrong

    drill = Drill(tmp_path, at, happens)
    execute(drill, "drill", 7)  # type: ignore[arg-type]
    healed(drill, at)
    assert str(wrong) in drill.told


@pytest.mark.parametrize("at", NAMES)
@pytest.mark.parametrize("wrong", [ZeroDivisionError("a bug"), OSError(28, "No space left on device"), SystemExit(3)])
def test_a_bug_in_any_step_heals_and_is_shown(at: str, wrong: BaseException, tmp_path: Path) -> None:
    def happens() -> None:
        raise wrong

    drill = Drill(tmp_path, at, happens)
    with pytest.raises(type(wrong)):
        execute(drill, "drill", 7)  # type: ignore[arg-type]
    healed(drill, at)


@pytest.mark.parametrize("at", NAMES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_any_step_heals(at: str, number: signal.Signals, tmp_path: Path) -> None:
    def happens() -> None:
        os.kill(os.getpid(), number)
        assert drill.stopping.wait(timeout=10), "nobody heard the signal"

    drill = Drill(tmp_path, at, happens)
    before = signal.getsignal(number)
    execute(drill, "drill", 7)  # type: ignore[arg-type]
    healed(drill, at)
    assert drill.interrupted == number
    assert signal.getsignal(number) is before, "the handler is given back"


def test_a_disk_that_is_full_at_the_end_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    drill = Drill(tmp_path, "during", lambda: None)
    monkeypatch.setattr(toolkit, "_write", full)
    execute(drill, "drill", 7)  # type: ignore[arg-type]
    assert "No space left" in drill.tape.broken, "which makes the verdict ERROR"


def test_a_missing_capability_is_a_skip_only_where_nothing_is_left(tmp_path: Path) -> None:
    """A prober whose image cannot be pulled, and that cannot be deleted either, ended in a skip and exit code 0."""

    def happens() -> None:
        raise MissingCapability("probers", "the image cannot be pulled")

    for untouched in (True, False):
        drill = Drill(tmp_path / str(untouched), "prepare", happens)
        drill.allow_missing, drill.untouched = ("probers",), untouched
        if untouched:
            with pytest.raises(MissingCapability, match="cannot be pulled"):
                execute(drill, "drill", 7)  # type: ignore[arg-type]
        else:
            execute(drill, "drill", 7)  # type: ignore[arg-type]
        healed(drill, "prepare")
        assert "the image cannot be pulled" in drill.told, "it is judged, as an error"
