"""The story reads as STYLE.md's example, aligned, and never hides what is not PASS."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from gameday.model import Counts, Finding, Judgement, Phase, Recovery, Verdict
from reports import console, words

FINDINGS = (
    Finding(Phase.BEFORE, "success ≥ 99.9 %", Verdict.PASS, 0.9997, 0.999, "share"),
    Finding(Phase.DURING, "success ≥ 99 %", Verdict.PASS, 0.9961, 0.99, "share"),
    Finding(
        Phase.DURING, "first token p95 ≤ 2.5 s", Verdict.FAIL, 3.10, 2.5, "s", 3.05, 3.15, 900,
        "worst 14:02:11–14:02:40",
    ),
    Finding(
        Phase.AFTER, "recovers within 2 min", Verdict.PASS, 72.4, 120, "s", 72.38, 72.42, 900,
        "noticed 9 s · moved 50 s · loaded 70 s · steady 72.4 s",
    ),
    Finding("run", "fault healed", Verdict.PASS, 4, 4, "count", evidence="recovered in the control plane"),
    Finding("run", "cluster clean", Verdict.PASS, None, None, "", evidence="nothing of ours is left"),
)  # fmt: skip
RECOVERY = Recovery(
    72.4, 72.38, 72.42, {"noticed": 9.0, "moved": 50.0, "loaded": 70.0, "steady": 72.4},
    story="noticed 9 s · moved 50 s · loaded 70 s · steady 72.4 s",
)  # fmt: skip
JUDGEMENT = Judgement(
    "zone_outage", Verdict.FAIL, FINDINGS, RECOVERY, Counts(1000, 990, 8, 0, 2), 7419, "http://10.0.0.1",
    "pytest experiments -k zone_outage --seed 7419",
)  # fmt: skip

EXAMPLE = """\
PASS  before  success ≥ 99.9 %          99.97 %
PASS  during  success ≥ 99 %            99.61 %
FAIL  during  first token p95 ≤ 2.5 s   3.10 s ± 0.05   worst 14:02:11–14:02:40
PASS  after   recovers within 2 min     72.4 s ± 0.02   (noticed 9 s · moved 41 s · loaded 20 s · steady 2.4 s)
healed 4/4, verified clean · reproduce: pytest experiments -k zone_outage --seed 7419"""


def with_finding(finding: Finding, verdict: Verdict) -> Judgement:
    return replace(JUDGEMENT, verdict=verdict, findings=(*FINDINGS[:2], finding))


def test_story_is_the_example() -> None:
    assert console.story(JUDGEMENT) == EXAMPLE


def test_unsound_run_is_in_the_story_and_columns_stay_aligned() -> None:
    unsound = Finding("run", "fault proven", Verdict.INCONCLUSIVE, None, None, "", evidence="never seen to act")
    lines = console.story(with_finding(unsound, Verdict.INCONCLUSIVE)).splitlines()
    assert lines[2] == "INCONCLUSIVE  run     fault proven       no data   never seen to act"
    assert lines[0] == "PASS          before  success ≥ 99.9 %   99.97 %"


def test_sound_run_is_left_out_of_the_story() -> None:
    assert "cluster clean" not in console.story(JUDGEMENT)


@pytest.mark.parametrize(
    ("name", "said"), [("fault healed", "NOT HEALED: node-b1 is cordoned"), ("cluster clean", "NOT CLEAN: node-b1 is")]
)
def test_last_line_shouts_when_something_is_left(name: str, said: str) -> None:
    left = Finding("run", name, Verdict.ERROR, None, None, "", evidence="node-b1 is cordoned")
    assert said in console.story(with_finding(left, Verdict.ERROR)).splitlines()[-1]


def test_last_line_claims_nothing_that_was_not_judged() -> None:
    last = console.story(replace(JUDGEMENT, findings=FINDINGS[:2])).splitlines()[-1]
    assert "clean" not in last.split("·")[0]
    assert last.startswith("whether it was healed is not known")


def test_recovery_by_the_heal_is_told() -> None:
    story = "recovered only by the heal · noticed 9 s · steady 72.4 s"
    finding = replace(FINDINGS[3], status=Verdict.FAIL, evidence=f"recovered only by the heal; {story}")
    told = console.story(
        replace(
            JUDGEMENT,
            findings=(finding,),
            recovery=replace(RECOVERY, story=story, stages={"noticed": 9.0, "steady": 72.4}),
        )
    )
    assert told.splitlines()[0].endswith("(noticed 9 s · steady 63 s)  recovered only by the heal")


def test_stages_after_the_recovery_are_told_apart() -> None:
    early = replace(RECOVERY, seconds=3.0, stages={"noticed": 1.0, "steady": 3.0, "loaded": 40.0})
    assert words.say_steps(early) == "noticed 1 s · steady 2 s; later loaded at 40 s"


@pytest.mark.parametrize(("status", "whole"), [(Verdict.PASS, False), (Verdict.FAIL, True)])
def test_evidence_is_cut_only_where_all_is_well(status: Verdict, whole: bool) -> None:
    evidence = "ready: " + ", ".join(f"llm/engine-{i}" for i in range(40))
    told = console.story(with_finding(Finding(Phase.AFTER, "ready", status, 40, 6, "count", evidence=evidence), status))
    assert (evidence in told) is whole
    assert ("…" in told) is not whole


def test_no_outage_has_no_steps_to_the_recovery() -> None:
    none = replace(RECOVERY, seconds=0.0, stages={"steady": 0.0, "loaded": 9.0}, story="no outage seen · steady 0 ms")
    told = console.story(replace(JUDGEMENT, findings=(replace(FINDINGS[3], evidence=none.story),), recovery=none))
    assert told.splitlines()[0].endswith("(later loaded at 9 s)  no outage seen")


def test_evidence_cannot_draw_on_the_terminal() -> None:
    evil = Finding(
        Phase.DURING, "x", Verdict.FAIL, 1, 0, "count", evidence="\x1b[2J\x1b]0;t\x07up\nPASS  all\u202efine"
    )
    told = console.story(with_finding(evil, Verdict.FAIL))
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert len(told.splitlines()) == 4


def test_no_colour_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    console.show([JUDGEMENT], out)
    assert "\x1b" not in out.getvalue()
    assert EXAMPLE in out.getvalue()
    assert "during: first token p95 ≤ 2.5 s · was 3.10 s ± 0.05" in out.getvalue()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    out = Terminal()
    console.show([JUDGEMENT], out)
    assert ("\x1b[1;31m" in out.getvalue()) is coloured


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_ran_is_said() -> None:
    out = io.StringIO()
    console.show([], out)
    assert "no experiment ran" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (None, "s", "no data"),
        (float("nan"), "share", "no data"),
        (0.25, "s", "250 ms"),
        (72.41, "s", "72.4 s"),
        (0.9997, "share", "99.97 %"),
        (0.5, "share", "50.0 %"),
        (1234.0, "count", "1,234"),
        (12.5, "1/s", "12.50 /s"),
    ],
)
def test_quantities(value: float | None, unit: str, said: str) -> None:
    assert words.quantity(value, unit) == said


@pytest.mark.parametrize(
    ("value", "low", "high", "unit", "said"),
    [
        (72.4, 72.38, 72.42, "s", "± 0.02"),
        (3.17, 3.14, 3.35, "s", "(3.14–3.35)"),
        (0.25, 0.239, 0.264, "s", "(239–264)"),
        (0.0, 0.0, 0.02, "s", "(0–20)"),
        (5.0, 5.0, 5.0, "count", ""),
        (5.0, None, 6.0, "s", ""),
    ],
)
def test_intervals(value: float, low: float | None, high: float | None, unit: str, said: str) -> None:
    assert words.interval(value, low, high, unit) == said


def test_unaccounted_requests_show() -> None:
    assert " = " in words.counts(Counts(10, 8, 1, 0, 1))
    assert " ≠ " in words.counts(Counts(10, 8, 1, 0, 0))
