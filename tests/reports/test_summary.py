"""The four sentences, what Prometheus answered, alerts, and reports of hours: nothing is said that was not seen."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import synthetic

from gameday.model import FaultMark, Judgement, Phase, Reply, Sample, Timeline, Verdict
from gameday.units import show_share
from reports import html, series, summary, view


def told(made: Timeline) -> str:
    judgement = synthetic.judged(made)
    return " ".join(summary.sentences(made, judgement, view.axis(made, judgement)))


def test_a_pass_is_told() -> None:
    text = told(synthetic.timeline())
    assert text.startswith("At ") and ", for 40 s: zone b is gone: 2 engines and 1 gateway on 2 nodes." in text
    assert "requests failed, " in text and " of them in mid-stream; the first token took " in text
    assert "The service was back after " in text and ", 20 s allowed." in text
    assert text.endswith("Healed, verified clean.")


def test_a_recovery_by_the_heal_is_not_told_as_one() -> None:
    text = told(synthetic.broken())
    assert "(recovered only by the heal)." in text
    assert "one in twenty or more never got a first token (p95), 250 ms before." in text


def test_what_never_came_is_no_missing_data() -> None:
    made = synthetic.broken()
    page = html.render(made, synthetic.judged(made))
    assert re.search(r"first token p95 ≤ 1.5 s</strong></td><td[^>]*>never</td>", page)


def test_something_left_is_shouted() -> None:
    assert "NOT CLEAN: NetworkChaos/gd-7419-cut is left" in told(synthetic.dirty())


def test_no_fault_is_no_outage() -> None:
    made = synthetic.timeline()
    untouched = replace(made, events=tuple(e for e in made.events if not isinstance(e, FaultMark)))
    text = told(untouched)
    assert text.startswith("Nothing was broken: no fault was injected.")
    assert "back after" not in text and "No outage" not in text


def test_no_outage_says_what_would_have_gone_unseen() -> None:
    made = synthetic.timeline()
    whole = tuple(_well(r) for r in made.replies)
    text = told(synthetic.accounted(replace(made, replies=whole)))
    assert "all " in text and "requests went well" in text
    assert "No outage was seen (a shorter one than " in text and " would go unseen), 20 s allowed." in text


def _well(reply: Reply) -> Reply:
    """The request as it would have ended without the fault."""
    if reply.ok or not reply.counted:
        return reply
    return replace(
        reply, outcome=synthetic.Outcome.OK, t_first=reply.t_intended + 0.02, t_headers=reply.t_intended + 0.01,
        t_end=reply.t_intended + 0.03, status=200, finish_reason="stop", got_done=True,
        pod=f"llm/{synthetic.engine('a', 0)}", zone="a", detail="",
    )  # fmt: skip


# ── Prometheus ──────────────────────────────────────────────────────────────────────────────────


def drawn(made: Timeline) -> tuple[series.Series, ...]:
    judgement = synthetic.judged(made)
    return series.series(made, judgement.findings, view.axis(made, judgement))


def test_a_series_has_its_limit_where_it_was_asked_for() -> None:
    (engines,) = drawn(synthetic.timeline())
    assert (engines.name, engines.samples, engines.missing) == ("engines up", 100, ())
    (limit,) = engines.limits
    assert (limit.start, limit.end, limit.value) == (0.0, 40.0, 1.0)


def test_where_prometheus_did_not_answer_the_line_breaks() -> None:
    (engines,) = drawn(synthetic.blind())
    assert len(engines.missing) == 9 and engines.error == "timeout after 3 s"
    lost = [x for x, y in engines.points if math.isnan(y)]
    assert lost == list(engines.missing) and min(lost) > 10 and max(lost) < 20


def test_no_peak_is_lost_among_many_samples() -> None:
    made = synthetic.timeline()
    many = [Sample(synthetic.START + i / 100, "q", "busy", 99.0 if i == 5001 else i % 7) for i in range(10_000)]
    many[7000] = replace(many[7000], value=None, error="no data")
    (busy,) = drawn(replace(made, samples=tuple(many)))
    assert busy.thinned and len(busy.points) <= 1.5 * series.POINTS
    assert max(busy.values) == 99.0 and min(busy.values) == 0.0
    assert len(busy.missing) == 1 and any(math.isnan(y) for _, y in busy.points)
    assert [x for x, _ in busy.points] == sorted(x for x, _ in busy.points)


# ── alerts ──────────────────────────────────────────────────────────────────────────────────────


def alerts(*samples: tuple[float, str, str, float]) -> list[tuple[float, str, bool]]:
    made = synthetic.timeline()
    some = tuple(Sample(synthetic.F + t, query, name, value) for t, query, name, value in samples)
    made = replace(made, samples=some)
    judgement = synthetic.judgement()
    found = view.marks(made, view.axis(made, judgement))
    return [(m.x, m.what, m.ok) for m in found if m.lane == "alerts"]


def test_an_alert_seen_by_two_questions_is_one_mark() -> None:
    assert alerts(
        (4.0, "count(ALERTS…)", "alert Down", 0.0), (5.0, "count(ALERTS…)", "alert Down", 1.0),
        (5.3, "ALERTS{…}", "alert Down", 1.0),
        (9.0, "count(ALERTS…)", "alert Down", 0.0), (9.3, "ALERTS{…}", "alert Down", 0.0),
    ) == [(5.0, "alert Down fires", False), (9.0, "alert Down is resolved", True)]  # fmt: skip


def test_one_that_fired_before_is_told_so() -> None:
    before = synthetic.START - synthetic.F
    assert alerts((before, "ALERTS{…}", "alert Watchdog", 1.0)) == [
        (before, "alert Watchdog was firing already", False)
    ]


# ── hours ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hours", [0.01, 0.1, 1, 8, 48])
def test_a_run_of_hours_is_drawn_in_so_many_bins_at_most(hours: float) -> None:
    on = view.Axis(0.0, "", -60.0, hours * 3600 - 60.0, (), None, None)
    assert hours * 3600 / on.bin <= view.BINS or on.bin == view.WIDTHS[-1]
    made = synthetic.timeline()
    stretch = hours * 36
    moved = tuple(replace(r, t_intended=(r.t_intended - synthetic.START) * stretch) for r in made.replies)
    on = replace(on, start=0.0, end=hours * 3600)
    bins = view.rates(replace(made, replies=moved), on)
    assert sum(sum(row) for row in bins.rows.values()) * bins.width == pytest.approx(len(moved))


@pytest.mark.parametrize(
    ("share", "said"), [(1.0, "100.00 %"), (0.99996, "99.996 %"), (0.9999999, "99.99999 %"), (0.5, "50.0 %")]
)
def test_less_than_all_never_reads_100_percent(share: float, said: str) -> None:
    assert show_share(share) == said


def test_phases_are_called_by_name() -> None:
    judgement: Judgement = synthetic.judgement()
    assert judgement.verdict is Verdict.PASS
    assert [p.name for p in view.axis(synthetic.timeline(), judgement).phases] == list(Phase)
