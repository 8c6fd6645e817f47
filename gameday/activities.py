"""A team's own Chaos Toolkit experiment: read, checked, and its activities run one at a time under our stop.

With `gameday.toolkit` the only importer of `chaoslib`. Its runner is not used here: of what it gets wrong
(facts/peers.md) nothing may decide a verdict. So each activity runs in a thread of its own (a signal ends our
waiting, never their code in the middle), a raising action is told, a probe that returns None or NaN is no word, and
pauses are ours. What the file says of secrets must be where they are, never what they are.
"""

from __future__ import annotations

import copy
import json
import math
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from chaoslib import substitute
from chaoslib.activity import execute_activity
from chaoslib.configuration import load_configuration
from chaoslib.exceptions import ChaosException
from chaoslib.experiment import ensure_experiment_is_valid
from chaoslib.hypothesis import within_tolerance
from chaoslib.secret import load_secrets

from gameday import clock, reaches
from gameday.censor import censored, remember
from gameday.errors import ExperimentError, GamedayError
from gameday.login import set_default_kubeconfig

EXTENSION = "gameday"  # the block under `extensions` that is ours
GRACE = 3.0  # seconds that an activity under way gets to end when we are stopped
LONGEST = 600.0  # seconds until an activity counts as hung
_FROM_ELSEWHERE = ("env", "vault")

_entering = threading.Lock()
_entered: dict[str, str] = {}  # the environment of this process's activities
_begun: set[Running] = set()  # those that have not ended


class Unreadable(GamedayError):
    """A probe or action gave no word that could be held against anything."""


class OutOfTolerance(GamedayError):
    """A probe said a value that the experiment does not tolerate."""


@dataclass(frozen=True, slots=True)
class Activity:
    """One activity of the method, the rollbacks, the hypothesis, or of the proofs."""

    name: str
    action: bool
    plain: Mapping[str, Any]  # as chaoslib takes it, pauses taken out
    pauses: tuple[Any, Any] = (0, 0)  # seconds before and after, maybe by "${name}"

    @property
    def judged(self) -> bool:
        return "tolerance" in self.plain


@dataclass(frozen=True, slots=True)
class Own:
    """A team's experiment. `text` is its canonical JSON: whoever has it can do and undo all of it."""

    text: str
    title: str
    method: tuple[Activity, ...]
    rollbacks: tuple[Activity, ...]
    hypothesis: tuple[Activity, ...]
    proofs: tuple[Activity, ...]  # probes that show the effect while it lasts
    extension: Mapping[str, Any]

    @property
    def plain(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def pausing(self) -> float:
        """Seconds that its pauses take, as far as they are written as numbers."""
        return sum(float(p) for one in self.method for p in one.pauses if isinstance(p, int | float))


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> dict[str, Any]:
    """The file as it is. Raises `ExperimentError` with the place."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as wrong:
        raise ExperimentError(f"{path} cannot be read: {wrong.strerror}.") from wrong
    except json.JSONDecodeError as wrong:
        raise ExperimentError(f"{path}:{wrong.lineno}:{wrong.colno}: not JSON: {wrong.msg}.") from wrong
    except yaml.MarkedYAMLError as wrong:
        mark = wrong.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ExperimentError(f"{place}: not YAML: {wrong.problem}.") from wrong
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        raise ExperimentError(f"{path}: not YAML: {' '.join(str(wrong).split())}.") from wrong
    except RecursionError as wrong:
        raise ExperimentError(f"{path} is nested too deeply.") from wrong
    if not isinstance(found, dict):
        raise ExperimentError(f"{path}: a Chaos Toolkit experiment is a mapping, not a {type(found).__name__}.")
    return found


def parse(plain: Mapping[str, Any], place: str) -> Own:
    """Its parts, checked as far as no code of theirs is needed. Raises `ExperimentError` with the place."""
    try:
        text = json.dumps(plain, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as wrong:
        raise ExperimentError(f"{place}: {wrong}.") from wrong
    _no_secrets(plain.get("secrets") or {}, f"{place}: secrets")
    if plain.get("controls"):
        raise ExperimentError(f"{place}: controls: gameday does not run them; its own stop conditions are in settings.")
    named = _by_name(plain.get("method")) | _by_name(plain.get("rollbacks"))
    hypothesis = plain.get("steady-state-hypothesis") or {}
    if not isinstance(hypothesis, dict):
        raise ExperimentError(f"{place}: steady-state-hypothesis must be a mapping.")
    named |= _by_name(hypothesis.get("probes"))
    extension = _extension(plain, place)
    own = Own(
        text=text,
        title=str(plain.get("title") or place),
        method=_activities(plain.get("method"), f"{place}: method", named),
        rollbacks=_activities(plain.get("rollbacks"), f"{place}: rollbacks", named),
        hypothesis=_activities(hypothesis.get("probes"), f"{place}: steady-state-hypothesis.probes", named),
        proofs=_activities(extension.get("proof"), f"{place}: extensions[{EXTENSION}].proof", named),
        extension=extension,
    )
    if not any(one.action for one in own.method):
        raise ExperimentError(f"{place}: method has no action: nothing would be broken.")
    for one in (*own.hypothesis, *own.proofs):
        if not one.judged:
            raise ExperimentError(f"{place}: probe {one.name!r} has no tolerance: whatever it said would be good.")
    return own


def of_text(text: str) -> Own:
    return parse(json.loads(text), "the experiment")


def _no_secrets(found: Any, place: str) -> None:
    """Every leaf names where its secret is; the ledger and the record hold the experiment as it is."""
    if isinstance(found, dict) and found.get("type") in _FROM_ELSEWHERE:
        return
    if not isinstance(found, dict):
        raise ExperimentError(f"{place}: a secret must not be written here: write {{type: env, key: VARIABLE}}.")
    for key, value in found.items():
        _no_secrets(value, f"{place}.{key}")


def _extension(plain: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    blocks = plain.get("extensions") or []
    if not isinstance(blocks, list):
        raise ExperimentError(f"{place}: extensions must be a list of mappings with a name.")
    found = [one for one in blocks if isinstance(one, dict) and one.get("name") == EXTENSION]
    if len(found) > 1:
        raise ExperimentError(f"{place}: extensions has more than one block {EXTENSION!r}.")
    extension = {key: value for key, value in (found[0] if found else {}).items() if key != "name"}
    if unknown := sorted(set(extension) - {"traffic", "lasting", "objectives", "proof"}):
        raise ExperimentError(
            f"{place}: extensions[{EXTENSION}].{unknown[0]}: there is no such key; "
            "there are lasting, objectives, proof, traffic."
        )
    return extension


def _by_name(found: Any) -> dict[str, Any]:
    """What `ref` may name; what is wrong with them is said when they are read."""
    some = found if isinstance(found, list) else []
    return {one["name"]: one for one in some if isinstance(one, dict) and isinstance(one.get("name"), str)}


def _activities(found: Any, place: str, named: Mapping[str, Any]) -> tuple[Activity, ...]:
    if found is None:
        return ()
    if not isinstance(found, list):
        raise ExperimentError(f"{place} must be a list.")
    return tuple(_activity(one, f"{place}[{number}]", named) for number, one in enumerate(found))


def _activity(found: Any, place: str, named: Mapping[str, Any]) -> Activity:
    if isinstance(found, str):
        found = {"ref": found}
    if isinstance(found, dict) and "ref" in found:
        if not isinstance(found["ref"], str) or found["ref"] not in named:
            raise ExperimentError(f"{place}: there is no activity {found['ref']!r}.")
        found = named[found["ref"]]
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("name"), str)
        or found.get("type") not in ("action", "probe")
    ):
        raise ExperimentError(f"{place}: an activity has a name and the type action or probe.")
    if found.get("background"):
        raise ExperimentError(f"{place}: background activities cannot be waited for: make it an ordinary one.")
    pauses = found.get("pauses") or {}
    if not isinstance(pauses, dict):
        raise ExperimentError(f"{place}: pauses are a mapping: {{before: 1, after: 2}}, in seconds.")
    plain = {key: value for key, value in found.items() if key not in ("pauses", "background")}
    return Activity(
        str(found["name"]), found["type"] == "action", plain, (pauses.get("before") or 0, pauses.get("after") or 0)
    )


def check(own: Own, place: str, *, namespaces: Sequence[str] | None) -> None:
    """What `chaos validate` checks (it imports their modules), and where its actions may reach (None: anywhere).

    Raises `ExperimentError`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # chaoslib's, of a process' mapping of arguments
            ensure_experiment_is_valid(own.plain)
    except (ChaosException, TypeError, KeyError, AttributeError) as wrong:
        raise ExperimentError(f"{place} is not a valid experiment: {' '.join(str(wrong).split())}") from wrong
    try:
        known = load_configuration(own.plain.get("configuration") or {})
    except ChaosException as wrong:
        if namespaces is not None:
            raise ExperimentError(f"{place}: {' '.join(str(wrong).split())}.") from wrong
        known = {}  # it is only looked at, where it will not run
    for one in (*own.method, *own.rollbacks):
        provider = substitute(dict(one.plain.get("provider") or {}), known, {})
        reaches.check(f"{place}: {one.name!r}", one.action, provider, namespaces)


# ── running ─────────────────────────────────────────────────────────────────────────────────────


class Running:
    """One activity under way, in a thread of its own."""

    def __init__(self, own: Own, one: Activity, environment: Mapping[str, str]) -> None:
        self.name = one.name
        self._own, self._one, self._environment = own, one, dict(environment)
        self._over = threading.Event()
        self._wrong = ""
        self._output: Any = None
        try:
            enter(self._environment)
        except Unreadable as wrong:
            self._wrong = str(wrong)
            self._over.set()
            return
        _begun.add(self)
        try:
            threading.Thread(target=self._work, name=f"activity-{one.name}", daemon=True).start()
        except RuntimeError:  # the interpreter is on its way out: rollbacks still run, in the thread that is left
            self._work()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    @property
    def acts(self) -> bool:
        return self._one.action

    def wait(self, within: float, stop: threading.Event | None = None) -> bool:
        """Whether it ended; when `stop` is set, it gets no more than `GRACE`."""
        end = clock.now() + within
        while not self._over.wait(0.05) and clock.now() < end:
            if stop is not None and stop.is_set():
                return self._over.wait(GRACE)
        return self._over.is_set()

    def result(self) -> Any:
        """What it returned. Raises `Unreadable` when it raised, in whatever way."""
        if not self._over.is_set():
            raise Unreadable(f"{self.name!r} has not ended: whatever it does, it may do after the heal")
        if self._wrong:
            raise Unreadable(f"{self.name!r} raised: {self._wrong}")
        return self._output

    def _work(self) -> None:
        try:
            plain = self._own.plain
            configuration, secrets = _given(plain)
            _remember_all(secrets)
            context = self._environment.get("KUBERNETES_CONTEXT")
            for group in [secrets, *(one for one in secrets.values() if isinstance(one, dict))]:
                if context and group.get("KUBERNETES_CONTEXT", context) != context:
                    raise ExperimentError(f"its secrets name context {group['KUBERNETES_CONTEXT']}, not {context}")
            activity = copy.deepcopy(dict(self._one.plain))
            run = execute_activity(plain, activity, configuration, secrets, None)
            self._output = run.get("output")
            if run.get("status") != "succeeded":
                self._wrong = words(*(run.get("exception") or [run.get("status")]))
            elif self._one.action:
                self._wrong = _refusal(activity["provider"].get("type"), self._output)
        except BaseException as wrong:  # noqa: BLE001 - their code; SystemExit and all: it must be told, never swallowed
            self._wrong = words(*[f"{type(wrong).__name__}: {wrong}"])
        finally:
            self._over.set()
            _begun.discard(self)


def _refusal(provider: str, output: Any) -> str:
    """How a command, or a server, says that it has not done it, which chaoslib takes for an answer like any other.

    A rollback that failed would otherwise count as done.
    """
    status = output.get("status") if isinstance(output, Mapping) else None
    if provider == "process" and status:
        return words(f"exit code {status}", output.get("stderr"))
    if provider == "http" and isinstance(status, int) and status >= 400:
        return words(f"HTTP status {status}")
    return ""


def run(
    own: Own,
    one: Activity,
    environment: Mapping[str, str],
    stop: threading.Event | None = None,
    *,
    within: float | None = None,
) -> Any:
    """Run it to its end, its pauses around it; with `within` (seconds) at once, and no longer than that.

    Raises `Unreadable` when it raised, hung, or was stopped.
    """
    before, after = (0.0, 0.0) if within is not None else (_seconds(own, value, one.name) for value in one.pauses)
    if stop is not None and before and not clock.pause(before, stop):
        raise Unreadable(f"stopped before {one.name!r}")
    running = Running(own, one, environment)
    running.wait(LONGEST if within is None else within, stop)
    output = running.result()
    if stop is not None and after:
        clock.pause(after, stop)
    return output


def probe(
    own: Own,
    one: Activity,
    environment: Mapping[str, str],
    stop: threading.Event | None = None,
    *,
    within: float | None = None,
) -> str:
    """Run it (as `run` does) and hold what it says against its tolerance; returns it in words.

    Raises `Unreadable` for no word (it raised; None; NaN; what its tolerance cannot be held against) and
    `OutOfTolerance`.
    """
    value = run(own, one, environment, stop, within=within)
    told = f"{one.name}: {words(*[value])}"
    if not one.judged:
        return told
    if value is None or not _finite(value):
        raise Unreadable(f"{one.name!r} returned {value}, which says nothing")
    tolerance = copy.deepcopy(one.plain["tolerance"])
    try:
        configuration, secrets = _given(own.plain)
        if isinstance(tolerance, str):
            tolerance = substitute(tolerance, configuration, secrets)
        good = within_tolerance(tolerance, value, configuration=configuration, secrets=secrets)
    except Exception as wrong:
        raise Unreadable(f"{told} cannot be held against its tolerance ({type(wrong).__name__})") from wrong
    if good is None:
        raise Unreadable(f"{told}: its tolerance {tolerance!r} is of no known kind")
    if good is not True:
        raise OutOfTolerance(f"{told}, not within {tolerance!r}")
    return told


class Rollbacks:
    """The rollbacks of an experiment, one after the other, looked at as often as you like."""

    def __init__(self, text: str, environment: Mapping[str, str]) -> None:
        self._own, self._environment = of_text(text), environment
        self._waiting = list(self._own.rollbacks)
        self._running: Running | None = None
        self._failed: list[str] = []

    def look(self) -> tuple[str | None, str]:
        """(words when all of them ran, what failed once all of them ran)."""
        while True:
            if self._running is None:
                if not self._waiting:
                    return f"{len(self._own.rollbacks)} rollback(s) done", "; ".join(self._failed)
                self._running = Running(self._own, self._waiting.pop(0), self._environment)
            if not self._running.wait(0.05):
                return None, ""
            try:
                self._running.result()
            except Unreadable as wrong:
                self._failed.append(f"rollback {wrong}")
            self._running = None


def _given(plain: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration, secrets) that an experiment takes from where it says, now."""
    configuration = load_configuration(plain.get("configuration") or {})
    return configuration, load_secrets(plain.get("secrets") or {}, configuration)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_finite(one) for one in value.values())
    return all(_finite(one) for one in value) if isinstance(value, list | tuple) else True


def _seconds(own: Own, value: Any, name: str) -> float:
    try:
        found = substitute(value, load_configuration(own.plain.get("configuration") or {}), {})
        return max(0.0, float(found))
    except (TypeError, ValueError, ChaosException) as wrong:
        raise Unreadable(f"the pause of {name!r} is not a number of seconds: {value!r}") from wrong


def words(*parts: Any) -> str:
    """Somebody's values on one line: short, and without secrets."""
    text = " ".join(str(part) for part in parts if part is not None)
    return censored(" ".join(text.split()))[-300:]


def _remember_all(secrets: Any) -> None:
    for key, value in secrets.items() if isinstance(secrets, Mapping) else ():
        if isinstance(value, str) and key != "KUBERNETES_CONTEXT":  # a name, which errors may tell
            remember(value)
        elif not isinstance(value, str):
            _remember_all(value)


def enter(environment: Mapping[str, str]) -> None:
    """Whose cluster it is, for the whole process: chaosk8s and kubectl take it from here, and from nowhere else.

    Set for good, and by nobody's thread: an activity that was left behind, and ended in the middle of a rollback,
    would otherwise take the cluster from under it. Raises `Unreadable` where such a one still speaks to another.
    """
    with _entering:
        if _entered and _entered != environment and _begun:
            names = ", ".join(sorted(repr(one.name) for one in tuple(_begun)))
            raise Unreadable(f"{names} still runs, on another cluster: begin a new process")
        for key in _entered.keys() - environment.keys():
            os.environ.pop(key, None)
        os.environ.update(environment)
        if "KUBECONFIG" in environment:
            set_default_kubeconfig(environment["KUBECONFIG"])
        _entered.clear()
        _entered.update(environment)


def under_way() -> tuple[str, ...]:
    """Actions of this process that nobody waits for any more and that have not ended: they may still do harm."""
    return tuple(sorted(one.name for one in tuple(_begun) if one.acts))
