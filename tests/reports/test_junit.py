"""JUnit and Markdown: what is not PASS is never green, and never skipped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import synthetic
from click.testing import CliRunner
from test_console import JUDGEMENT

from gameday import record
from gameday.cli import main
from gameday.model import Counts, Finding, Judgement, Verdict
from reports import as_json, html, junit, markdown, verdicts
from reports.gate import gate
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


def unbegun(name: str, verdict: Verdict = Verdict.ERROR) -> Judgement:
    finding = Finding("run", verdicts.BEGUN, verdict, None, None, "", evidence="no rights to create podchaos")
    return Judgement(name, verdict, (finding,), None, Counts(), 0, "", f"pytest experiments -k {name}")


def test_what_could_not_begin_is_in_every_report(run_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "20261124-090000-7419"
    ran = shutil.copytree(run_root / "zone_outage", root / "zone_outage")
    (ran / "plan.json").write_text("{}")
    record.seal(ran)
    judged = [unbegun("pod_kill"), unbegun("zone_outage"), unbegun("gpu_xid", Verdict.INCONCLUSIVE)]
    for _ in range(2):  # safe to repeat
        verdicts.keep(root, judged)
    assert [e.name for e in verdicts.entries(root)] == ["zone_outage", "pod_kill", "zone_outage.not_begun"]
    cases = {c.get("name"): c for c in ElementTree.parse(junit.write(root)).iter("testcase")}
    assert cases["zone_outage"].find("error") is None
    for name in ("pod_kill", "zone_outage.not_begun"):
        error = cases[name].find("error")
        assert error is not None and "no rights" in (error.get("message") or "")
    page = html.write_index(root).read_text(encoding="utf-8")
    assert "2 ERROR · 1 PASS" in page and "pod_kill (no report)" in page
    document = json.loads(as_json.write(root).read_text(encoding="utf-8"))
    assert document["verdict"] == "ERROR"
    assert [(e["name"], e["verdict"]) for e in document["experiments"]][1] == ("pod_kill", "ERROR")
    assert document["experiments"][0]["recovery"]["seconds"] > 0 and document["experiments"][0]["counts"]["planned"] > 0
    held = gate(root, [], by=0.1, last=3)
    assert not held.passed and "ERROR  pod_kill" in held.story
    done = CliRunner().invoke(main, ["judge", str(root)])
    assert done.exit_code == 1 and "no rights to create podchaos" in done.output


def test_a_trial_that_never_ran_is_an_error(run_root: Path, tmp_path: Path) -> None:
    shutil.copytree(run_root / "zone_outage", tmp_path / "zone_outage")
    path = tmp_path / "zone_outage" / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    run["about"]["settings"]["trials"] = "3"
    path.write_text(json.dumps(run))
    suite = ElementTree.parse(junit.write(tmp_path)).getroot()
    assert (suite.get("tests"), suite.get("errors")) == ("2", "1")
    document = as_json.summary(tmp_path)
    assert document["verdict"] == "INCONCLUSIVE"
    assert (document["trials"][0]["passed"], document["trials"][0]["of"]) == (1, 3)
    (error,) = suite.iter("error")
    assert (error.get("type"), error.get("message")) == ("INCONCLUSIVE", "2 of 3 trials never ran")


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
