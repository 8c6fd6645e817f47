"""What experiments are written with: the `Run` that the `experiment` fixture gives, and what it comes to.

The pytest plugin imports this on the first use of a fixture, so that other tests do not pay for it.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import yaml

from faults import Fault, Zone
from faults.act import by_hand
from gameday import activities, arena as arena_, own, settings as settings_
from gameday.errors import ExperimentError, GamedayError, MissingCapability, TargetError
from gameday.gating import Held
from gameday.model import Counts, Finding, Judgement, Verdict
from gameday.objectives import Objective, Objectives
from gameday.preflight import Preflight
from gameday.run import Arena, Session, Spec
from gameday.toolkit import execute
from gameday.trials import pool
from loadgen.traffic import Traffic
from reports import as_json, console, html, junit, markdown, verdicts
from reports.live import Live
from reports.notify import Notify, tell

OPENED = pytest.StashKey[arena_.Opened]()
LIVE = pytest.StashKey[Live]()
RAN = pytest.StashKey[set[str]]()  # names of this session's experiments: each has a directory
JUDGED = pytest.StashKey[list[Judgement]]()  # of an item: empty until it ran; of the config: all


@dataclass(frozen=True, slots=True)
class Result:
    """What an experiment came to, for the test's own assert."""

    judgement: Judgement

    @property
    def passed(self) -> bool:
        return self.judgement.passed

    @property
    def story(self) -> str:
        return console.story(self.judgement)


class Run:
    """Call it once with the experiment; its verdict becomes the test's outcome, whatever the test asserts."""

    def __init__(self, item: pytest.Item, options: dict[str, Any]) -> None:
        self._item, self._options = item, options
        item.stash[JUDGED] = []

    def __call__(
        self,
        *,
        traffic: Traffic,
        before: Sequence[Objective],
        fault: Fault,
        during: Sequence[Objective] = (),
        after: Sequence[Objective] = (),
    ) -> Result:
        """Run it (`--trials` times) and return the worst result."""
        name = name_of(self._item)
        if self._item.stash[JUDGED]:
            told = not_begun(name, "the test called `experiment` twice: one experiment per test")
            remember(self._item, told)
            self._item.stash[JUDGED] = [told]
            return Result(told)
        spec = Spec(name, traffic, fault, Objectives(tuple(before), tuple(during), tuple(after)))
        judged = self._run(spec.name, lambda _: spec)
        worst = max(judged, key=lambda one: one.verdict.rank)
        self._item.stash[JUDGED] = [worst]
        return Result(worst)

    def own(self, path: Path) -> None:
        """A team's own Chaos Toolkit experiment."""

        def checked(arena: Arena) -> Spec:
            theirs, spec = own.load(path)
            activities.check(theirs, path.name, namespaces=arena.settings.allow_namespaces)
            return spec

        judged = self._run(name_of(self._item), checked)
        self._item.stash[JUDGED] = [max(judged, key=lambda one: one.verdict.rank)]

    def _run(self, name: str, spec_for: Callable[[Arena], Spec]) -> list[Judgement]:
        judged: list[Judgement] = []
        try:
            arena = opened(self._item.config, self._options).arena
            spec = spec_for(arena)
            if arena.settings.dry_run:
                with Uncaptured(self._item.config):
                    dry_run(arena, spec)
                pytest.skip("dry run: manifests validated, nothing applied")
            ran = self._item.config.stash.setdefault(RAN, set())
            if spec.name in ran:
                raise ExperimentError(f"Two experiments are called {spec.name}, whose records would mix: rename one.")
            ran.add(spec.name)
            asked = arena.settings.trials
            while len(judged) < asked and not self._item.session.shouldstop:
                judged.append(self._trial(arena, spec, len(judged) + 1))
            if asked > 1:
                with Uncaptured(self._item.config):
                    arena.say(f"{spec.name}: {pool(judged, asked).story}")
            if len(judged) < asked:
                told = not_begun(spec.name, f"{len(judged)} of {asked} trials ran", Verdict.INCONCLUSIVE)
                remember(self._item, told)
                judged.append(told)
            return judged
        except GamedayError as wrong:
            if isinstance(wrong, MissingCapability) and not judged and wrong.name in self._allowed():
                pytest.skip(f"{wrong.name} is missing, which --allow-missing accepts: {wrong}")
            told = not_begun(name, str(wrong))
            remember(self._item, told)
            return [*judged, told]

    def _allowed(self) -> tuple[str, ...]:
        """Capabilities that may be missing, by whatever setting; by the options alone before there is an arena."""
        if OPENED in self._item.config.stash:
            return self._item.config.stash[OPENED].arena.settings.allow_missing
        return self._options.get("allow_missing") or ()

    def _trial(self, arena: Arena, spec: Spec, trial: int) -> Judgement:
        session = Session(arena, spec, trial)
        config = self._item.config
        with Uncaptured(config), config.stash[LIVE]:
            try:
                execute(session, spec.name.replace("_", " "), arena.seed)
            finally:
                if session.interrupted is not None:
                    self._item.session.shouldstop = "interrupted: healed and stopped"
            judgement = session.conclude()
        if judgement is not None:
            remember(self._item, judgement)
        assert judgement is not None, "a session that ran has a plan, or raised"
        return judgement


def run_own(item: pytest.Item, options: dict[str, Any]) -> None:
    """Run a collected `*.chaos.yaml|json`."""
    Run(item, options).own(item.path)


def opened(config: pytest.Config, options: dict[str, Any]) -> arena_.Opened:
    """The session's arena; a sandbox is started on its first use."""
    if OPENED not in config.stash:
        live = config.stash[LIVE] = Live()
        with Uncaptured(config):
            config.stash[OPENED] = arena_.open_arena(options, say=live.say, progress=live.update)
    return config.stash[OPENED]


class Uncaptured:
    """Progress goes to the terminal, not into pytest's capture."""

    def __init__(self, config: pytest.Config) -> None:
        self._manager: Any = config.pluginmanager.getplugin("capturemanager")

    def __enter__(self) -> None:
        if self._manager:
            self._manager.suspend_global_capture(in_=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._manager:
            self._manager.resume_global_capture()


def draw_zone(item: pytest.Item, options: dict[str, Any]) -> Zone:
    """`--zone`, else a zone that holds ready targets, drawn by the seed. User errors are one sentence."""
    try:
        arena = opened(item.config, options).arena
        settings = arena.settings
        if settings.zone:
            return Zone(settings.zone)
        pods = arena.cluster.pods(labels=settings.selector) if settings.selector else ()
        zones = sorted({pod.zone for pod in pods if pod.ready and pod.zone})
        if not zones:
            raise TargetError(
                f"No ready pod of {settings.selector!r} lies in a labelled zone: give --zone, or label the nodes."
            )
        return Zone(random.Random(arena.seed).choice(zones))  # noqa: S311 - reproducible on purpose
    except GamedayError as wrong:
        remember(item, not_begun(name_of(item), str(wrong)))
        pytest.fail(str(wrong), pytrace=False)


def name_of(item: pytest.Item) -> str:
    """`zone_outage` of `test_zone_outage`; what is unsafe in a path is replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", item.name.removeprefix("test_")).strip("._-")[:100] or "experiment"


def not_begun(name: str, text: str, verdict: Verdict = Verdict.ERROR) -> Judgement:
    """The judgement of an experiment, or of a trial, that could not begin."""
    finding = Finding("run", verdicts.BEGUN, verdict, None, None, "", evidence=text)
    return Judgement(name, verdict, (finding,), None, Counts(), 0, "", f"pytest experiments -k {name}")


def directory_of(judgement: Judgement, root: Path) -> Path:
    """Where its record is: every trial has a directory of its own."""
    found = verdicts.entries(root) if root.is_dir() else ()
    return next((e.dir for e in found if e.judgement == judgement), root / judgement.experiment)


def remember(item: pytest.Item, judgement: Judgement) -> None:
    item.config.stash.setdefault(JUDGED, []).append(judgement)


def dry_run(arena: Arena, spec: Spec) -> None:
    """Print what would be applied, and let the server validate it (dryRun=All)."""
    session = Session(arena, spec)
    plan, objects = session.rehearse()
    arena.say(f"dry run: {plan.facts.title}")
    for manifest in objects:
        for line in ("---", *yaml.safe_dump(manifest, sort_keys=False).splitlines()):
            arena.say(line)
    for act in plan.acts:
        if told := by_hand(act):
            arena.say(f"change: {told}")
    Preflight(arena.cluster, arena.prometheus, arena.settings).demand_for(plan)
    for entry in plan.undos:
        arena.say(f"undo: {entry.command()}")
    session.tape.close()


def summarise(
    config: pytest.Config, options: dict[str, Any], write_line: Callable[[str], None], held: Held | None = None
) -> None:
    """The verdict table, the run's own files, the CI job's page, and word to whoever is to be told.

    What cannot be written is said, and changes neither verdict nor exit code.
    """
    judged = config.stash.get(JUDGED, [])
    with Uncaptured(config):
        console.show(judged)
    if held is not None:
        for line in held.story.splitlines():
            write_line(line)
    arena = config.stash[OPENED].arena if OPENED in config.stash else None
    writers: list[Callable[[], Path | None]] = [lambda: step_summary(judged, held)]
    if arena is not None:
        root = arena.root
        writers += [lambda: verdicts.keep(root, judged), lambda: html.write_index(root)]
        writers += [lambda: junit.write(root), lambda: as_json.write(root)]
    for write in writers:
        try:
            if path := write():
                write_line(f"report: {path}")
        except (OSError, GamedayError) as wrong:
            write_line(f"report: NOT WRITTEN: {wrong}")
    regressed = held.regressed if held else ()
    closed = held.closed if held and all(one.passed for one in judged) else ""  # else the verdicts say it
    root = arena.root if arena else Path("runs")
    for delivery in tell(_notify(arena, options), root, judged, regressed=regressed, closed=closed):
        write_line(delivery.line)


def step_summary(judged: Sequence[Judgement], held: Held | None) -> Path | None:
    """What GitHub shows on the job's page, where there is one."""
    given = os.environ.get("GITHUB_STEP_SUMMARY")
    if not given:
        return None
    path = Path(given)
    with path.open("a", encoding="utf-8") as file:
        file.write(markdown.summary(judged) + "\n" + (held.markdown + "\n" if held else ""))
    return path


def _notify(arena: Arena | None, options: dict[str, Any]) -> Notify:
    """Whom to tell; people also want to hear of a game day that could not begin."""
    if arena is not None:
        return replace(arena.settings.notify, cluster=arena.settings.notify.cluster or arena.cluster.name)
    try:
        return settings_.load(options).notify
    except GamedayError:
        return Notify()
