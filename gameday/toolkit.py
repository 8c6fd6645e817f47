"""Chaos Toolkit: an experiment as its JSON, executed by chaoslib. The only module that imports `chaoslib`.

The actions are the session's steps. chaoslib keeps the journal and calls the rollbacks; its status is never the
verdict (facts/peers.md lists where it is wrong), which comes from the record alone. The same JSON under plain
`chaos run` opens a session of its own, on the cluster that `GAMEDAY_CONTEXT` names.
"""

from __future__ import annotations

import atexit
import copy
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from chaoslib.exceptions import ActivityFailed, ChaosException, InvalidExperiment
from chaoslib.experiment import ensure_experiment_is_valid, run_experiment as chaos_run
from chaoslib.run import RunEventHandler
from chaoslib.types import Strategy

import faults
from gameday import activities, own
from gameday.censor import censored
from gameday.collect import SUFFIXES, collects
from gameday.errors import ExperimentError, GamedayError, MissingCapability
from gameday.objectives import Objectives
from gameday.run import Session, Spec
from loadgen.traffic import Traffic
from reports import console

STEPS = (
    ("prepare", "preflight, lock, ledger, probers, load"),
    ("before", "the steady state holds for a whole window"),
    ("inject", "inject the fault and prove its effect"),
    ("during", "load goes on while the fault lasts"),
    ("heal", "undo the fault and see that it is gone"),
    ("after", "load goes on until the service is back for good"),
)
ROLLBACKS = (("heal", "undo whatever is not undone yet"), ("finish", "take away everything that is ours"))

_session: Session | None = None
_crash: BaseException | None = None


# ── the experiment as JSON ──────────────────────────────────────────────────────────────────────


def spec_json(spec: Spec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "traffic": spec.traffic.to_json(),
        "fault": faults.to_json(spec.fault),
        "objectives": spec.objectives.to_json(),
    }


def spec_from_json(data: Mapping[str, Any]) -> Spec:
    try:
        return Spec(
            name=str(data["name"]),
            traffic=Traffic.from_json(data["traffic"]),
            fault=faults.from_json(data["fault"]),
            objectives=Objectives.from_json(data["objectives"]),
        )
    except KeyError as missing:
        raise ExperimentError(f"The experiment's spec has no {missing}.") from missing


def _activity(func: str, name: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    provider: dict[str, Any] = {"type": "python", "module": "gameday.toolkit", "func": func}
    if arguments:
        provider["arguments"] = dict(arguments)
    return {"type": "action", "name": name, "provider": provider}


def experiment_json(spec: Spec, title: str, seed: int) -> dict[str, Any]:
    """A Chaos Toolkit experiment, valid under `chaos validate`."""
    method = [_activity(func, name, {"spec": spec_json(spec)} if func == "prepare" else None) for func, name in STEPS]
    return {
        "version": "1.0.0",
        "title": title,
        "description": f"gameday's {spec.name}, seed {seed}; the verdict is in verdict.json, not in the journal.",
        "tags": ["gameday", spec.name],
        "configuration": {"gameday_context": {"type": "env", "key": "GAMEDAY_CONTEXT", "default": ""}},
        "method": method,
        "rollbacks": [_activity(func, name) for func, name in ROLLBACKS],
    }


# ── the actions ─────────────────────────────────────────────────────────────────────────────────


def _step(name: str) -> bool:
    """Run one step of the current session; what goes wrong is recorded before chaoslib hears of it."""
    global _crash  # noqa: PLW0603 - chaoslib calls module functions
    if _session is None:
        raise ActivityFailed("gameday has no session: the first action, prepare, must run before this one")
    if _crash is not None and name not in ("heal", "finish"):
        raise ActivityFailed("skipped, since an earlier step failed")
    try:
        getattr(_session, name)()
    except GamedayError as wrong:
        _crash = _crash or wrong
        _session.stop("error", str(wrong))
        raise ActivityFailed(str(wrong)) from wrong
    except BaseException as wrong:
        _crash = _crash or wrong
        _session.stop("error", f"{name} crashed: {wrong!r}")
        raise
    return not _session.stopped


def prepare(spec: Mapping[str, Any]) -> bool:
    global _session  # noqa: PLW0603
    if _session is None:
        from gameday import arena  # noqa: PLC0415 - only `chaos run` needs it

        try:
            _session = Session(arena.open_named().arena, spec_from_json(spec))
            _stand_alone(_session)
        except BaseException as wrong:
            # chaoslib takes it for one failed action among others, and chaos exits 0.
            told = str(wrong) if isinstance(wrong, GamedayError) else repr(wrong)
            atexit.register(_end, f"ERROR: the experiment could not begin: {censored(told)}")
            raise
    return _step("prepare")


def before() -> bool:
    return _step("before")


def inject() -> bool:
    return _step("inject")


def during() -> bool:
    return _step("during")


def heal() -> bool:
    return _step("heal")


def after() -> bool:
    return _step("after")


def finish() -> bool:
    return _step("finish")


# ── executing it ────────────────────────────────────────────────────────────────────────────────


class _Signals(RunEventHandler):  # type: ignore[misc]
    """SIGINT and SIGTERM set the session's stop, and nothing else: every wait sees it, heals, and ends in order.

    chaoslib's own handler raises inside whatever action runs, which swallows the exception and goes on to the
    next fault (facts/peers.md); so ours replaces it once chaoslib has installed its own. Python handlers run
    between any two bytecodes of the main thread, where taking a lock may deadlock: ours do nothing, and a thread
    is told through the wake-up descriptor.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def started(self, experiment: Any, journal: Any) -> None:
        self.install()

    def install(self) -> None:
        for number in self.NUMBERS:
            signal.signal(number, lambda *_: None)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Handle the signals ourselves while this is open."""
        ears, mouth = socket.socketpair()
        mouth.setblocking(False)
        old = {number: signal.getsignal(number) for number in self.NUMBERS}
        old_fd = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self.install()
        thread = threading.Thread(target=self._listen, args=(ears,), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old.items():
                signal.signal(number, handler)
            mouth.close()
            thread.join()
            ears.close()

    def _listen(self, ears: socket.socket) -> None:
        while data := ears.recv(16):
            for number in data:
                if number in self.NUMBERS:
                    self._session.interrupt(number)


class _Censored(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return censored(super().format(record))


class _Quiet(logging.FileHandler):
    """A log that a full disk does not turn into tracebacks on the console."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        pass


@contextmanager
def _log_to(directory: Path) -> Iterator[None]:
    """chaoslib's log belongs to the record, not to the console."""
    log = logging.getLogger("chaostoolkit")
    try:
        directory.mkdir(parents=True, exist_ok=False)
    except FileExistsError as twice:
        raise ExperimentError(f"{directory} exists: two experiments of one run need different names.") from twice
    except OSError as wrong:
        raise ExperimentError(f"{directory} cannot be made: {wrong.strerror}; choose another --runs-dir.") from wrong
    handler = _Quiet(directory / "chaostoolkit.log")
    handler.setFormatter(_Censored("%(asctime)s %(levelname)s %(message)s"))
    was = log.propagate, log.level
    log.addHandler(handler)
    log.propagate, log.level = False, logging.INFO
    try:
        yield
    finally:
        log.propagate, log.level = was
        log.removeHandler(handler)
        handler.close()


def _stand_alone(session: Session) -> None:
    """Under plain `chaos run` nobody heals after Ctrl-C or judges at the end: hear signals, and do both on the way out.

    chaos exits 0 for a failed experiment; so this ends the process with 1 unless the verdict is PASS.
    """
    stack = ExitStack()
    stack.enter_context(_Signals(session).heard())
    stack.enter_context(_log_to(session.dir))

    def conclude() -> None:
        judgement = None
        told = "ERROR: the experiment could not begin"
        try:
            try:
                session.heal()
            finally:
                session.finish()
            stack.close()
            judgement = session.conclude()
            told = console.story(judgement) if judgement else told
        except BaseException as wrong:  # noqa: BLE001 - on the way out an exception would leave the exit code 0
            told, judgement = f"ERROR: {censored(str(wrong) or repr(wrong))}", None
        if judgement is None or not judgement.passed:
            _end(told)
        print(told, flush=True)

    atexit.register(conclude)


def _end(told: str) -> None:
    """Leave with 1, whatever code chaos has chosen and whoever has closed the console."""
    try:
        print(told, flush=True)
    finally:
        os._exit(1)


def execute(session: Session, title: str, seed: int) -> None:
    """Run the session's experiment under chaoslib, in the main thread; heals and finishes whatever happens.

    Raises what went wrong (`GamedayError` as it
    was, anything else as the bug that it is) after healing.
    """
    global _session, _crash
    if threading.current_thread() is not threading.main_thread():
        raise ExperimentError("Experiments run in the main thread only (chaoslib handles signals there).")
    experiment = experiment_json(session.spec, title, seed)
    signals = _Signals(session)
    _session, _crash = session, None
    journal: Any = None
    try:
        with signals.heard(), _log_to(session.dir):
            try:
                # deepcopy: chaoslib changes what it is given
                journal = chaos_run(
                    copy.deepcopy(experiment),
                    settings={"runtime": {"rollbacks": {"strategy": "always"}}},
                    strategy=Strategy.SKIP,
                    event_handlers=[signals],
                )
            finally:
                # Independent of chaoslib: some of its failures skip the rollbacks.
                try:
                    session.heal()
                finally:
                    session.finish()
        crash = _crash
    finally:
        _session, _crash = None, None
    if session.dir.is_dir():
        try:
            _write(session.dir / "experiment.json", experiment)
            _write(session.dir / "journal.json", journal)
        except OSError as wrong:  # a full disk: nothing is judged, and that is said in one sentence
            session.tape.broken = session.tape.broken or str(wrong)
    _reraise(crash, session)


def _reraise(crash: BaseException | None, session: Session) -> None:
    """An error that is part of the record is judged with it; anything else is the caller's to show.

    What may be missing is only a skip where the experiment left the cluster as if it had never begun.
    """
    if isinstance(crash, MissingCapability) and crash.name in session.allow_missing and session.untouched:
        raise crash
    if crash is not None and not (session.judgeable and isinstance(crash, GamedayError)):
        raise crash


def validate(path: Path) -> str:
    """Check an experiment file as `chaos validate` does, ours or a team's own; returns its name.

    Raises `ExperimentError` with the place.
    """
    if collects(path):
        theirs, spec = own.load(path)
        activities.check(theirs, path.name, namespaces=None)
        return spec.name
    experiment = activities.read(path)
    try:
        ensure_experiment_is_valid(experiment)
        arguments = experiment["method"][0]["provider"]["arguments"]
        return spec_from_json(arguments["spec"]).name
    except (ValueError, InvalidExperiment, ChaosException) as wrong:
        raise ExperimentError(f"{path} is not a valid experiment: {wrong}") from wrong
    except (KeyError, IndexError, TypeError, AttributeError) as wrong:
        raise ExperimentError(
            f"{path} is a Chaos Toolkit experiment, but not one of gameday's: call it NAME{SUFFIXES[0]}."
        ) from wrong


def _write(path: Path, data: Any) -> None:
    path.write_text(censored(json.dumps(data, indent=2, default=str)) + os.linesep)
