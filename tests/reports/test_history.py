"""The trend: the runs beside a run, oldest first, none of the future, none without its verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import synthetic
from test_console import JUDGEMENT

from gameday import record
from gameday.model import Recovery, Verdict
from reports import history, html, verdicts, words


def run(base: Path, day: int, verdict: Verdict, seconds: float, *, trial: int = 1, trials: int = 1) -> Path:
    root = base / f"run-{9 - day}"  # names say nothing of the order
    recovery = (
        replace(JUDGEMENT.recovery, seconds=seconds, low=seconds - 1, high=seconds + 1) if JUDGEMENT.recovery else None
    )
    about = replace(
        synthetic.ABOUT,
        epoch_wall=synthetic.ABOUT.epoch_wall + 86400 * day,
        trial=trial,
        settings={"trials": f"{trials}"},
    )
    directory = root / ("zone_outage" if trial == 1 else f"zone_outage.{trial}")
    record.write_run(directory, about, synthetic.FAULT, synthetic.OBJECTIVES, {})
    record.write_verdict(directory, replace(JUDGEMENT, verdict=verdict, recovery=recovery))
    return root


def recovery_of(root: Path) -> history.Trend:
    return next(t for t in history.trends(root) if t.what == "recovery")


def test_the_past_is_shown_oldest_first(tmp_path: Path) -> None:
    roots = [
        run(tmp_path, d, v, s) for d, v, s in ((0, Verdict.PASS, 10), (1, Verdict.FAIL, 40), (2, Verdict.PASS, 12))
    ]
    (roots[0] / "zone_outage" / "report.html").touch()
    trend = recovery_of(roots[1])
    assert [d.verdict for d in trend.dots] == [Verdict.PASS, Verdict.FAIL]
    assert trend.dots[1].y < trend.dots[0].y  # the slower recovery is higher up
    assert trend.dots[1].high < trend.dots[1].y < trend.dots[1].low
    assert [d.link for d in trend.dots] == ["../run-9/zone_outage/report.html", ""]
    assert trend.said == "now 40.0 s; before 10.0 s · 2 runs: 1 FAIL · 1 PASS"
    assert "run-9: PASS, 10.0 s" in html.write_index(roots[1]).read_text(encoding="utf-8")


def test_a_run_that_died_is_in_the_trend(tmp_path: Path) -> None:
    roots = [run(tmp_path, d, Verdict.PASS, 10) for d in range(3)]
    (roots[1] / "zone_outage" / "verdict.json").unlink()
    trend = recovery_of(roots[2])
    assert [d.verdict for d in trend.dots] == [Verdict.PASS, Verdict.ERROR, Verdict.PASS]


def test_a_run_alone_has_no_trend(tmp_path: Path) -> None:
    assert history.trends(run(tmp_path, 0, Verdict.PASS, 10)) == ()


def test_the_first_token_has_a_trend_of_its_own(tmp_path: Path) -> None:
    for day in range(2):
        run(tmp_path, day, Verdict.PASS, 10)
    (_, tokens) = history.trends(tmp_path / "run-8")
    assert tokens.what.startswith("first token p95")
    asked = next(f for f in JUDGEMENT.findings if f.phase == "during" and f.objective.startswith("first token"))
    assert words.observed(asked) in tokens.dots[0].said


def test_what_was_never_back_is_no_zero(tmp_path: Path) -> None:
    roots = [run(tmp_path, day, Verdict.PASS, 10) for day in range(2)]
    never = replace(JUDGEMENT, verdict=Verdict.FAIL, recovery=Recovery(None, None, None))
    record.write_verdict(roots[1] / "zone_outage", never)
    usual, missing = recovery_of(roots[1]).dots
    assert missing.y < usual.y and missing.y == missing.low == missing.high
    assert "not seen" in missing.said


def test_of_trials_the_worst_verdict_and_the_slowest_recovery_count(tmp_path: Path) -> None:
    run(tmp_path, 0, Verdict.PASS, 10)
    root = run(tmp_path, 1, Verdict.PASS, 30, trials=2)
    run(tmp_path, 1, Verdict.FAIL, 20, trial=2, trials=2)
    _, now = recovery_of(root).dots
    assert now.verdict is Verdict.FAIL and "30.0 s" in now.said and "the slowest of 2 trials" in now.said
    page = html.write_index(root).read_text(encoding="utf-8")
    assert "Trials of zone_outage: 1 of 2 passed" in page
    assert "The slowest recovery took 30.0 s" in page


def test_a_trial_that_never_came_back_is_the_slowest(tmp_path: Path) -> None:
    """It counted as none at all, and the picture showed the quick one."""
    run(tmp_path, 0, Verdict.PASS, 10)
    root = run(tmp_path, 1, Verdict.PASS, 12, trials=2)
    run(tmp_path, 1, Verdict.FAIL, 20, trial=2, trials=2)
    never = replace(JUDGEMENT, verdict=Verdict.FAIL, recovery=Recovery(None, None, None))
    record.write_verdict(root / "zone_outage.2", never)
    usual, now = recovery_of(root).dots
    assert "not seen" in now.said and now.y < usual.y


def test_a_run_whose_time_is_no_number_has_no_place_in_the_past(tmp_path: Path) -> None:
    roots = [run(tmp_path, day, Verdict.PASS, 10) for day in range(2)]
    path = roots[0] / "zone_outage" / "run.json"
    path.write_text(path.read_text().replace(str(synthetic.ABOUT.epoch_wall), '"then"'))
    assert '"then"' in path.read_text() and history.trends(roots[1]) == ()


def test_a_trial_that_never_ran_is_counted(tmp_path: Path) -> None:
    root = run(tmp_path, 0, Verdict.PASS, 10, trials=3)
    page = html.write_index(root).read_text(encoding="utf-8")
    assert "Trials of zone_outage: 1 of 3 passed" in page
    (pooled,) = verdicts.trials(verdicts.entries(root))
    assert pooled.verdict is Verdict.INCONCLUSIVE
    assert '<h1><span class="verdict INCONCLUSIVE">' in page and "1 PASS · 2 trials never ran" in page


def test_a_single_trial_is_not_pooled(tmp_path: Path) -> None:
    assert verdicts.trials(verdicts.entries(run(tmp_path, 0, Verdict.PASS, 10))) == ()
