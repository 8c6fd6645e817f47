"""The pytest plugin: `experiment` and `zone` fixtures, and a verdict that becomes the test's outcome.

A verdict is a property of the run, not of the test's assert: FAIL fails the test, INCONCLUSIVE and ERROR have
their own status word, and a test that asked for `experiment` and never ran it is an ERROR. Collection touches
no cluster and starts no sandbox. Everything heavy is imported by the fixtures, on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from _pytest.junitxml import xml_key

from gameday.collect import ChaosFile, collects

if TYPE_CHECKING:
    from faults import Zone
    from gameday.experiment import Run
    from gameday.model import Judgement

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
    ("--allow-node-replacement", {"action": "store_true", "default": None, "help": "faults may get nodes replaced"}),
    ("--allow-missing", {"action": "append", "help": "skip, instead of failing, where this capability is missing"}),
)

GATE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--gate", {"action": "store_true", "help": "fail, too, on what got slower than in the runs beside this one"}),
    ("--baseline", {"action": "append", "help": "… than in this run, or directory of runs (may be repeated)"}),
    ("--gate-by", {"type": float, "default": 0.1, "help": "growth beyond the noise that is allowed (default: 0.1)"}),
    ("--gate-last", {"type": int, "default": 10, "help": "how many earlier runs count (default: 10)"}),
    ("--gate-strict", {"action": "store_true", "help": "fail, too, where nothing can be compared"}),
)

PARALLEL = "Experiments cannot run in parallel (-n): one game day at a time."


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gameday", "game days: experiments on a Kubernetes cluster")
    for name, more in (*OPTIONS, *GATE):
        group.addoption(name, dest=f"gameday_{_key(name)}", **more)


def pytest_configure(config: pytest.Config) -> None:
    """A gate that cannot be asked is refused before anything is broken, not after."""
    if not config.getoption("gameday_gate_by") >= 0 or config.getoption("gameday_gate_last") < 3:
        raise pytest.UsageError("--gate-by is a share of 0 or more (0.1 for 10 %), --gate-last 3 runs or more.")
    for one in config.getoption("gameday_baseline") or ():
        if not Path(one).is_dir():
            raise pytest.UsageError(f"--baseline {one} is neither a run nor a directory of runs.")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """`*.chaos.yaml|json`: a team's own Chaos Toolkit experiments."""
    return ChaosFile.from_parent(parent, path=file_path) if collects(file_path) else None


def _key(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def options_of(config: pytest.Config) -> dict[str, Any]:
    found = {_key(name): config.getoption(f"gameday_{_key(name)}") for name, _ in OPTIONS}
    if found["allow_missing"]:
        found["allow_missing"] = tuple(found["allow_missing"])
    return found


def _uses(item: pytest.Item) -> bool:
    return "experiment" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse what would break experiments: reruns, timeouts by thread (`experiment` itself refuses parallel runs)."""
    if not any(_uses(item) for item in items):
        return
    if _set(config, "reruns"):
        raise pytest.UsageError("Experiments are not rerun until green (--reruns): use --trials for repetition.")
    if _set(config, "timeout") and _set(config, "timeout_method") != "signal":
        raise pytest.UsageError("With experiments, pytest-timeout needs --timeout-method=signal, so that they heal.")


def _set(config: pytest.Config, name: str) -> Any:
    """An option or ini value of another plugin, None where that plugin is not there."""
    if given := getattr(config.option, name, None):
        return given
    try:
        return config.getini(name)
    except (KeyError, ValueError):
        return None


def refuse_parallel(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist, which hides -n from its workers
        pytest.fail(PARALLEL, pytrace=False)


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> Run:
    """Runs one experiment (call it exactly once)."""
    refuse_parallel(request.config)
    run: Run = _heavy().Run(request.node, options_of(request.config))
    return run


@pytest.fixture
def zone(request: pytest.FixtureRequest) -> Zone:
    """The zone to break: `--zone`, else one that holds targets, drawn by the seed."""
    found: Zone = _heavy().draw_zone(request.node, options_of(request.config))
    return found


def _heavy() -> Any:
    return import_module("gameday.experiment")


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when != "call" or not _uses(item) or report.outcome == "skipped":
        return report
    heavy = _heavy()
    judged: list[Judgement] = item.stash.get(heavy.JUDGED, [])
    if not judged:
        if call.excinfo is not None:
            return report  # an ordinary failure of the test itself, with its traceback
        judged = [heavy.not_begun(heavy.name_of(item), "the test asked for `experiment` and never ran it")]
        heavy.remember(item, judged[0])
    if call.excinfo is not None and not call.excinfo.errisinstance(AssertionError):
        return report  # a bug in the test: its traceback says more than the verdict
    (judgement,) = judged
    report.gameday = judgement.verdict.value  # type: ignore[attr-defined]
    item.user_properties.extend(_properties(judgement, item.config))  # the JUnit writer reads them at teardown
    if not judgement.passed:
        report.outcome = "failed"
        report.longrepr = heavy.Result(judgement).story
    return report


def _properties(judgement: Judgement, config: pytest.Config) -> list[tuple[str, object]]:
    recovery, counts = judgement.recovery, judgement.counts
    found: list[tuple[str, object]] = [("verdict", judgement.verdict.value), ("seed", judgement.seed)]
    if recovery is not None and recovery.seconds is not None:
        found += [("recovery_seconds", recovery.seconds)]
        found += [("recovery_low", recovery.low), ("recovery_high", recovery.high)]
    found += [(name, getattr(counts, name)) for name in ("planned", "ok", "failed", "shed", "censored")]
    heavy = _heavy()
    if heavy.OPENED in config.stash:
        root = config.stash[heavy.OPENED].arena.root
        found.append(("run_dir", str(heavy.directory_of(judgement, root))))
    return found


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    verdict = getattr(report, "gameday", "")
    if verdict == "INCONCLUSIVE":
        return "inconclusive", "I", "INCONCLUSIVE"
    if verdict == "ERROR":
        return "error", "E", "ERROR"
    return None


_xml: Any = None  # pytest's JUnit writer, when --junitxml is given


def pytest_sessionstart(session: pytest.Session) -> None:
    global _xml  # noqa: PLW0603 - pytest_runtest_logreport is not given the config
    _xml = session.config.stash.get(xml_key, None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In pytest's own JUnit file, INCONCLUSIVE and ERROR are <error type=…>, never <failure> or <skipped>."""
    verdict = getattr(report, "gameday", "")
    if verdict not in ("INCONCLUSIVE", "ERROR") or _xml is None:
        return
    reporter = _xml.node_reporter(report)

    def as_error(failed: pytest.TestReport) -> None:
        element = ElementTree.Element("error", type=verdict, message=f"verdict {verdict}")
        element.text = str(failed.longrepr)
        reporter.append(element)

    reporter.append_failure = as_error


HELD = pytest.StashKey[Any]()  # what the gate came to, where one was asked for

# ── the end of the session ──────────────────────────────────────────────────────────────────────


def _judged(config: pytest.Config) -> list[Judgement]:
    found: list[Judgement] = config.stash.get(_heavy().JUDGED, []) if _loaded() else []
    return found


def _loaded() -> bool:
    return "gameday.experiment" in sys.modules


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    held = config.stash.get(HELD, None)
    if _judged(config):
        terminalreporter.section("game day")
        _heavy().summarise(config, options_of(config), terminalreporter.write_line, held)
    elif held is not None:
        terminalreporter.write_line(held.story)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A green exit needs verdicts: nothing else may end as passed."""
    config = session.config
    if exitstatus == pytest.ExitCode.OK and any(not one.passed for one in _judged(config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.option.collectonly or config.getoption("gameday_dry_run") or hasattr(config, "workerinput"):
        return
    gating = import_module("gameday.gating")
    if wanted := gating.asked(config):
        held = config.stash[HELD] = gating.hold(_root(config), wanted)
        if not held.passed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _root(config: pytest.Config) -> Path | None:
    """The run's directory; None where none was begun."""
    if not _loaded() or _heavy().OPENED not in config.stash:
        return None
    root: Path = config.stash[_heavy().OPENED].arena.root
    return root


def pytest_unconfigure(config: pytest.Config) -> None:
    if _loaded() and _heavy().OPENED in config.stash:
        config.stash[_heavy().OPENED].close()
        del config.stash[_heavy().OPENED]
