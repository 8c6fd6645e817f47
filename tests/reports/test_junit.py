"""JUnit and Markdown: what is not PASS is never green, and never skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import synthetic
from test_console import JUDGEMENT

from gameday.model import Verdict
from reports import junit, markdown
from reports.verdicts import Entry


def case(verdict: Verdict) -> ElementTree.Element:
    entry = Entry(Path("runs/r1/zone_outage"), replace(JUDGEMENT, verdict=verdict), {})
    found = junit.suites([entry], "r1").find(".//testcase")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("verdict", "tag"), [(Verdict.FAIL, "failure"), (Verdict.INCONCLUSIVE, "error"), (Verdict.ERROR, "error")]
)
def test_what_is_not_pass_fails(verdict: Verdict, tag: str) -> None:
    made = case(verdict)
    (bad,) = (e for e in made if e.tag in ("failure", "error", "skipped"))
    assert bad.tag == tag
    assert bad.get("type") == verdict
    assert "first token p95" in (bad.get("message") or "")


def test_pass_is_pass() -> None:
    assert [e.tag for e in case(Verdict.PASS)] == ["properties", "system-out"]


def test_properties() -> None:
    found = {p.get("name"): p.get("value") for p in case(Verdict.FAIL).iter("property")}
    assert found["recovery_seconds"] == "72.4000"
    assert found["recovery_low"] == "72.3800"
    assert found["recovery_high"] == "72.4200"
    assert (found["planned"], found["ok"], found["failed"], found["censored"]) == ("1000", "990", "8", "2")
    assert found["run_dir"] == "runs/r1/zone_outage"
    assert found["seed"] == "7419"


def test_a_run_on_disk(run_root: Path) -> None:
    root = ElementTree.parse(junit.write(run_root)).getroot()
    assert (root.get("tests"), root.get("errors"), root.get("failures"), root.get("skipped")) == ("3", "1", "0", "0")
    (error,) = root.iter("error")
    assert "verdict.json is missing" in (error.get("message") or "")
    seconds = {c.get("name"): float(c.get("time") or 0) for c in root.iter("testcase")}
    assert seconds["zone_outage"] == pytest.approx(104)


def test_an_experiment_that_died_before_its_run_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pod_kill").mkdir()
    (tmp_path / "pod_kill" / "events.jsonl").touch()
    root = ElementTree.parse(junit.write(tmp_path)).getroot()
    assert [c.get("name") for c in root.iter("testcase")] == ["pod_kill"]
    assert root.get("errors") == "1"


def test_nothing_ran_is_an_error() -> None:
    root = junit.suites([], "r1")
    assert (root.get("tests"), root.get("errors")) == ("1", "1")


def test_control_characters_do_not_spoil_the_xml() -> None:
    entry = Entry(Path("r"), replace(JUDGEMENT, target="\x00\x1b[2J\ud800 <&>"), {})
    text = ElementTree.tostring(junit.suites([entry], "r"))
    assert b"&lt;&amp;&gt;" in text
    ElementTree.fromstring(text)


def test_markdown_table_and_story() -> None:
    text = markdown.summary([JUDGEMENT])
    assert text.startswith("## Game day: 1 FAIL\n")
    assert "| ❌ FAIL | zone&#95;outage | 72.4 s ± 0.02 | 990 / 8 | during: first token p95" in text
    assert "healed 4/4, verified clean" in text
    assert "no experiment ran" in markdown.summary([])


def test_markdown_cells_hold_hostile_text() -> None:
    evil = synthetic.EVIL + " | a | `b` @someone [x](y)"
    findings = (replace(JUDGEMENT.findings[2], evidence=evil + "\n| new | row |"),)
    row = markdown.summary([replace(JUDGEMENT, findings=findings)]).splitlines()[4]
    assert row.count("|") == 6
    for sign in ("<script", "`", "@", "["):
        assert sign not in row.replace("<br>", "")


def test_markdown_fence_outlasts_the_text() -> None:
    findings = (replace(JUDGEMENT.findings[2], evidence="``` out"),)
    assert "\n````\n" in markdown.summary([replace(JUDGEMENT, findings=findings)])
