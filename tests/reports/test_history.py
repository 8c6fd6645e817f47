"""The trend: the runs beside a run, oldest first, none of the future, none without its verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import synthetic
from test_console import JUDGEMENT

from gameday import record
from gameday.model import Verdict
from reports import history, html


def run(base: Path, day: int, verdict: Verdict, seconds: float) -> Path:
    root = base / f"run-{9 - day}"  # names say nothing of the order
    recovery = (
        replace(JUDGEMENT.recovery, seconds=seconds, low=seconds - 1, high=seconds + 1) if JUDGEMENT.recovery else None
    )
    about = replace(synthetic.ABOUT, epoch_wall=synthetic.ABOUT.epoch_wall + 86400 * day)
    record.write_run(root / "zone_outage", about, synthetic.FAULT, synthetic.OBJECTIVES, {})
    record.write_verdict(root / "zone_outage", replace(JUDGEMENT, verdict=verdict, recovery=recovery))
    return root


def test_the_past_is_shown_oldest_first(tmp_path: Path) -> None:
    roots = [
        run(tmp_path, d, v, s) for d, v, s in ((0, Verdict.PASS, 10), (1, Verdict.FAIL, 40), (2, Verdict.PASS, 12))
    ]
    (roots[0] / "zone_outage" / "report.html").touch()
    (trend,) = history.trends(roots[1])
    assert [d.verdict for d in trend.dots] == [Verdict.PASS, Verdict.FAIL]
    assert trend.dots[1].y < trend.dots[0].y  # the slower recovery is higher up
    assert trend.dots[1].high < trend.dots[1].y < trend.dots[1].low
    assert [d.link for d in trend.dots] == ["../run-9/zone_outage/report.html", ""]
    assert trend.said == "2 runs: 1 FAIL · 1 PASS"
    assert "run-9: PASS, 10.0 s" in html.write_index(roots[1]).read_text(encoding="utf-8")


def test_a_run_that_died_is_in_the_trend(tmp_path: Path) -> None:
    roots = [run(tmp_path, d, Verdict.PASS, 10) for d in range(3)]
    (roots[1] / "zone_outage" / "verdict.json").unlink()
    (trend,) = history.trends(roots[2])
    assert [d.verdict for d in trend.dots] == [Verdict.PASS, Verdict.ERROR, Verdict.PASS]


def test_a_run_alone_has_no_trend(tmp_path: Path) -> None:
    assert history.trends(run(tmp_path, 0, Verdict.PASS, 10)) == ()
