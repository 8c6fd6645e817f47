"""The pytest plugin: `experiment` and `zone` fixtures, and a verdict that becomes the test's outcome.

A verdict is a property of the run, not of the test's assert: FAIL fails the test, INCONCLUSIVE and ERROR have
their own status word, and a test that asked for `experiment` and never ran it is an ERROR. Collection touches
no cluster and starts no sandbox.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from _pytest.junitxml import xml_key

from faults import Fault, Zone
from faults.act import manifests
from gameday import arena as arena_
from gameday.errors import GamedayError, MissingCapability, TargetError
from gameday.kinds import BY_KIND
from gameday.model import Counts, Finding, Judgement, Verdict
from gameday.objectives import Objective, Objectives
from gameday.run import Session, Spec
from gameday.toolkit import execute
from loadgen.traffic import Traffic
from reports import console, html, junit, markdown
from reports.live import Live

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--context", {"help": "kubeconfig context of the cluster (never implied; without it: the sandbox)"}),
    ("--kubeconfig", {"help": "kubeconfig file (default: $KUBECONFIG, ~/.kube/config)"}),
    ("--in-cluster", {"action": "store_true", "default": None, "help": "use the pod's own service account"}),
    ("--namespace", {"help": "namespace under test"}),
    ("--selector", {"help": "labels of the engines, as key=value[,key=value]"}),
    ("--zone", {"help": "zone to break (default: drawn by the seed)"}),
    ("--target", {"help": "URL that users send requests to"}),
    ("--prometheus", {"help": "URL of Prometheus"}),
    ("--seed", {"type": int, "help": "the one seed: targets, load"}),
    ("--trials", {"type": int, "help": "repeat each experiment K times; the worst verdict counts"}),
    ("--runs-dir", {"help": "where run directories go (default: runs)"}),
    ("--dry-run", {"action": "store_true", "default": None, "help": "print and validate manifests, apply nothing"}),
    ("--allow-missing", {"action": "append", "help": "skip, instead of failing, where this capability is missing"}),
)
KEYS = tuple(name.lstrip("-").replace("-", "_") for name, _ in OPTIONS)

_judgement = pytest.StashKey[list[Judgement]]()
_arena = pytest.StashKey["arena_.Opened"]()
_live = pytest.StashKey[Live]()
_all = pytest.StashKey[list[Judgement]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gameday", "game days: experiments on a Kubernetes cluster")
    for name, more in OPTIONS:
        group.addoption(name, dest=f"gameday_{name.lstrip('-').replace('-', '_')}", **more)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_all] = []


def options_of(config: pytest.Config) -> dict[str, Any]:
    found = {key: config.getoption(f"gameday_{key}") for key in KEYS}
    if found["allow_missing"]:
        found["allow_missing"] = tuple(found["allow_missing"])
    return found


def _uses(item: pytest.Item) -> bool:
    return "experiment" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse what would break experiments: parallel runs, reruns, timeouts by thread."""
    if not any(_uses(item) for item in items):
        return
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("Experiments cannot run in parallel (-n): one game day at a time.")
    if getattr(config.option, "reruns", None):
        raise pytest.UsageError("Experiments are not rerun until green (--reruns): use --trials for repetition.")
    timeout = getattr(config.option, "timeout", None) or config.inicfg.get("timeout")
    if timeout and getattr(config.option, "timeout_method", None) != "signal":
        raise pytest.UsageError("With experiments, pytest-timeout needs --timeout-method=signal, so that they heal.")


# ── fixtures ────────────────────────────────────────────────────────────────────────────────────


def _opened(config: pytest.Config) -> arena_.Opened:
    """The session's arena; a sandbox is started on its first use."""
    if _arena not in config.stash:
        live = config.stash[_live] = Live()
        with _uncaptured(config):
            config.stash[_arena] = arena_.open_arena(options_of(config), say=live.say, progress=live.update)
    return config.stash[_arena]


class _uncaptured:  # noqa: N801 - a context manager that reads like a word
    """Progress goes to the terminal, not into pytest's capture."""

    def __init__(self, config: pytest.Config) -> None:
        self._manager = config.pluginmanager.getplugin("capturemanager")

    def __enter__(self) -> None:
        if self._manager:
            self._manager.suspend_global_capture(in_=True)

    def __exit__(self, *_: object) -> None:
        if self._manager:
            self._manager.resume_global_capture()


@pytest.fixture
def zone(request: pytest.FixtureRequest) -> Zone:
    """The zone to break: `--zone`, else one that holds targets, drawn by the seed."""
    opened = _checked(request, lambda: _opened(request.config))
    settings, cluster = opened.arena.settings, opened.arena.cluster

    def draw() -> Zone:
        if settings.zone:
            return Zone(settings.zone)
        pods = cluster.pods(labels=settings.selector) if settings.selector else ()
        zones = sorted({pod.zone for pod in pods if pod.ready and pod.zone})
        if not zones:
            raise TargetError(
                f"No ready pod of {settings.selector!r} lies in a labelled zone: give --zone, or label the nodes."
            )
        return Zone(random.Random(opened.arena.seed).choice(zones))  # noqa: S311

    found: Zone = _checked(request, draw)
    return found


def _checked(request: pytest.FixtureRequest, act: Callable[[], Any]) -> Any:
    """User errors in set-up are one sentence, never a traceback."""
    try:
        return act()
    except GamedayError as wrong:
        _remember(request.node, _error(_name(request.node), str(wrong)))
        pytest.fail(str(wrong), pytrace=False)


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
    """What the `experiment` fixture gives: call it once with the experiment, get the judgement."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def __call__(
        self,
        *,
        traffic: Traffic,
        before: Sequence[Objective],
        fault: Fault,
        during: Sequence[Objective] = (),
        after: Sequence[Objective] = (),
    ) -> Result:
        """Run it (`--trials` times) and return the worst judgement; its verdict decides the test's outcome."""
        name = _name(self._item)
        spec = Spec(name, traffic, fault, Objectives(tuple(before), tuple(during), tuple(after)))
        config = self._item.config
        try:
            opened = _opened(config)
            arena = opened.arena
            if arena.settings.dry_run:
                with _uncaptured(config):
                    dry_run(arena, spec)
                pytest.skip("dry run: manifests validated, nothing applied")
            judged = [self._trial(opened, spec, trial) for trial in range(1, arena.settings.trials + 1)]
        except MissingCapability as missing:
            if missing.name in (_allowed(config)):
                pytest.skip(f"{missing.name} is missing, which --allow-missing accepts: {missing}")
            judged = [_error(name, str(missing))]
        except GamedayError as wrong:
            judged = [_error(name, str(wrong))]
        worst = max(judged, key=lambda one: one.verdict.rank)
        for one in judged:
            config.stash[_all].append(one)
        self._item.stash[_judgement] = [worst]
        return Result(worst)

    def _trial(self, opened: arena_.Opened, spec: Spec, trial: int) -> Judgement:
        session = Session(opened.arena, spec, trial)
        config = self._item.config
        title = (self._item.function.__module__ if hasattr(self._item, "function") else spec.name).rsplit(".", 1)[-1]
        with _uncaptured(config), config.stash[_live]:
            received = execute(session, f"{spec.name} ({title})", opened.arena.seed)
            judgement = session.conclude()
        if received is not None:
            self._item.session.shouldstop = "interrupted: healed and stopped"
        assert judgement is not None, "a session that ran has a plan, or raised"
        return judgement


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> Run:
    """Runs one experiment (call it exactly once)."""
    request.node.stash[_judgement] = []
    return Run(request.node)


def _allowed(config: pytest.Config) -> tuple[str, ...]:
    return tuple(config.getoption("gameday_allow_missing") or ())


def _name(item: pytest.Item) -> str:
    """`zone_outage` of `test_zone_outage`; what is unsafe in a path is replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", item.name.removeprefix("test_")).strip("._") or "experiment"


def _error(name: str, text: str) -> Judgement:
    """The judgement of an experiment that could not begin."""
    finding = Finding("run", "experiment could begin", Verdict.ERROR, None, None, "", evidence=text)
    return Judgement(name, Verdict.ERROR, (finding,), None, Counts(), 0, "", f"pytest experiments -k {name}")


def _remember(item: pytest.Item, judgement: Judgement) -> None:
    item.config.stash[_all].append(judgement)
    item.stash[_judgement] = [judgement]


def dry_run(arena: Any, spec: Spec) -> None:
    """Print what would be applied, and let the server validate it (dryRun=All)."""
    session = Session(arena, spec)
    session.check_spec()
    plan = spec.fault.plan(session.view())
    arena.say(f"dry run: {plan.facts.title}")
    for _, manifest in manifests(plan.acts):
        arena.say("---\n" + yaml.safe_dump(manifest, sort_keys=False))
        arena.cluster.create(BY_KIND[manifest["kind"]], manifest, dry_run=True)
    for entry in plan.undos:
        arena.say(f"undo: {entry.command()}")


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when != "call" or not _uses(item) or report.outcome == "skipped":
        return report
    judged = item.stash.get(_judgement, [])
    if not judged:
        if call.excinfo is None:
            _remember(item, _error(_name(item), "the test asked for `experiment` and never ran it"))
            judged = item.stash[_judgement]
        else:
            return report  # an ordinary failure of the test itself, with its traceback
    judgement = judged[0]
    asserted = call.excinfo is not None and not call.excinfo.errisinstance(AssertionError)
    if asserted:
        return report  # a bug in the test: its traceback says more than the verdict
    report.gameday = judgement.verdict.value  # type: ignore[attr-defined]
    report.user_properties.extend(_properties(judgement, item.config))
    if judgement.passed and call.excinfo is None:
        report.outcome = "passed"
        return report
    if not judgement.passed:
        report.outcome = "failed"
        report.longrepr = console.story(judgement)
    return report


def _properties(judgement: Judgement, config: pytest.Config) -> list[tuple[str, object]]:
    recovery, counts = judgement.recovery, judgement.counts
    found: list[tuple[str, object]] = [("verdict", judgement.verdict.value), ("seed", judgement.seed)]
    if recovery is not None and recovery.seconds is not None:
        found += [("recovery_seconds", recovery.seconds)]
        found += [("recovery_low", recovery.low), ("recovery_high", recovery.high)]
    found += [(name, getattr(counts, name)) for name in ("planned", "ok", "failed", "shed", "censored")]
    if _arena in config.stash:
        found.append(("run_dir", str(config.stash[_arena].arena.root / judgement.experiment)))
    return found


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    verdict = getattr(report, "gameday", "")
    if verdict == Verdict.INCONCLUSIVE.value:
        return "inconclusive", "I", "INCONCLUSIVE"
    if verdict == Verdict.ERROR.value:
        return "error", "E", "ERROR"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In pytest's own JUnit file, INCONCLUSIVE and ERROR are <error type=…>, never <failure> or <skipped>."""
    verdict = getattr(report, "gameday", "")
    if verdict not in (Verdict.INCONCLUSIVE.value, Verdict.ERROR.value) or _xml is None:
        return
    reporter = _xml.node_reporter(report)

    def as_error(failed: pytest.TestReport) -> None:
        element = ElementTree.Element("error", type=verdict, message=f"verdict {verdict}")
        element.text = str(failed.longrepr)
        reporter.append(element)

    reporter.append_failure = as_error


_xml: Any = None  # pytest's JUnit writer, when --junitxml is given


def pytest_sessionstart(session: pytest.Session) -> None:
    global _xml  # noqa: PLW0603 - pytest_runtest_logreport is not given the config
    _xml = session.config.stash.get(xml_key, None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    judged = config.stash.get(_all, [])
    if not judged:
        return
    terminalreporter.section("game day")
    with _uncaptured(config):
        console.show(judged)
    if _arena in config.stash:
        root = config.stash[_arena].arena.root
        for path in _summaries(root, judged):
            terminalreporter.write_line(f"report: {path}")


def _summaries(root: Path, judged: list[Judgement]) -> list[Path]:
    """The run's own files; a run that never began has none."""
    if not root.is_dir():
        return []
    markdown.append_step_summary(judged)
    return [html.write_index(root), junit.write(root)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A green exit needs verdicts: nothing else may end as passed."""
    judged = session.config.stash.get(_all, [])
    if exitstatus == pytest.ExitCode.OK and any(not one.passed for one in judged):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    if _arena in config.stash:
        config.stash[_arena].close()
        del config.stash[_arena]
