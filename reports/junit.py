"""JUnit XML: a test case per experiment. FAIL is <failure>, INCONCLUSIVE and ERROR are <error>, none is skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from gameday.model import Counts, Verdict
from gameday.trials import Trials
from reports import verdicts, words
from reports.console import story
from reports.verdicts import Entry

JUNIT = "junit.xml"
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(run_root: Path) -> Path:
    """Write `run_root/junit.xml`; RecordError where there is no run."""
    path = run_root / JUNIT
    ElementTree(suites(verdicts.entries(run_root), run_root.name)).write(path, encoding="utf-8", xml_declaration=True)
    return path


def suites(entries: Sequence[Entry], name: str) -> Element:
    """The document. A run without any experiment holds one error, for an empty suite is green to most readers."""
    cases = [_case(entry) for entry in entries] or [_nothing_ran()]
    cases += [_missing(t) for t in verdicts.trials(entries) if t.missing]
    totals = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": "0",
        "time": f"{sum(entry.seconds or 0.0 for entry in entries):.3f}",
    }
    root = Element("testsuites", {"name": "gameday", **totals})
    suite = SubElement(root, "testsuite", {"name": clean(name), **totals})
    suite.extend(cases)
    indent(root)
    return root


def _case(entry: Entry) -> Element:
    judgement = entry.judgement
    case = Element("testcase", classname="experiments", name=clean(entry.name), time=f"{entry.seconds or 0.0:.3f}")
    listed = SubElement(case, "properties")
    for name, value in properties(entry):
        SubElement(listed, "property", name=name, value=clean(value))
    if judgement.verdict is not Verdict.PASS:
        tag = "failure" if judgement.verdict is Verdict.FAIL else "error"
        why = "; ".join(words.reasons(judgement))
        SubElement(case, tag, type=str(judgement.verdict), message=clean(why)).text = clean(story(judgement))
    SubElement(case, "system-out").text = clean(story(judgement))
    return case


def properties(entry: Entry) -> Iterator[tuple[str, str]]:
    """What a CI system may want to plot; durations in seconds, absent where nothing was measured."""
    judgement = entry.judgement
    yield "verdict", str(judgement.verdict)
    recovery = judgement.recovery
    if recovery is not None:
        for name, value in (("seconds", recovery.seconds), ("low", recovery.low), ("high", recovery.high)):
            if value is not None:
                yield f"recovery_{name}", f"{value:.4f}"
    for field in fields(Counts):
        yield field.name, str(getattr(judgement.counts, field.name))
    yield "run_dir", str(entry.dir)
    yield "seed", str(judgement.seed)
    yield "target", judgement.target
    yield "reproduce", judgement.reproduce


def _nothing_ran() -> Element:
    case = Element("testcase", classname="experiments", name="any experiment", time="0.000")
    SubElement(case, "error", type=str(Verdict.ERROR), message="no experiment ran")
    return case


def _missing(trials: Trials) -> Element:
    """Trials that were asked for and never ran."""
    case = Element("testcase", classname="experiments", name=f"{clean(trials.experiment)}: all trials", time="0.000")
    message = f"{trials.missing} of {trials.of} trials never ran"
    SubElement(case, "error", type=str(Verdict.INCONCLUSIVE), message=message)
    return case


def clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _ILLEGAL.sub("\ufffd", text)
