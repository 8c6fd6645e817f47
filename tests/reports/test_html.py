"""The report: self-contained, honest about what it leaves out, and nothing in it can break out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic

from gameday import record
from gameday.errors import RecordError
from gameday.model import EvictionMark, FaultMark, Outcome, Sample, Timeline, Verdict
from reports import html, view, words

CHARTS = ("latency", "recovery", "rates", "shares", "pods", "marks", "prometheus-0")


class Page(HTMLParser):
    """Elements with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._inside):
            self.said.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.fixture(scope="module")
def page(run_root: Path) -> Page:
    return Page(html.write(run_root / "zone_outage").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(run_root: Path) -> Page:
    return Page(html.write(run_root / "hostile").read_text(encoding="utf-8"))


def test_nothing_remote(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or value == "../index.html", (tag, name, value)


def test_only_our_scripts_may_run(page: Page) -> None:
    (policy,) = (a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    scripts = re.search(r"script-src ([^;]*);", policy)
    assert scripts is not None
    assert all(source.startswith("'sha256-") for source in scripts[1].split())


def test_no_name_or_error_breaks_out(page: Page, hostile: Page) -> None:
    for tag in ("script", "img", "figure", "body", "h1"):
        assert hostile.count(tag) == page.count(tag), tag
    assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]
    assert synthetic.EVIL in hostile.text


def test_verdict_and_story_come_first(page: Page) -> None:
    text = page.text
    recovery = synthetic.judgement().recovery
    assert recovery is not None
    recovered = words.recovered(recovery)
    places = [text.index(s) for s in ("PASS", "zone b is gone", recovered, "Findings", "Timeline", "Reproduce")]
    assert places == sorted(places)


def test_every_chart_has_words_and_a_table(page: Page) -> None:
    ids = [a["id"] for t, a in page.elements if t == "div" and (a.get("id") or "").startswith("chart-")]
    assert ids == [f"chart-{n}" for n in CHARTS]
    for name in (i.removeprefix("chart-") for i in ids if i):
        assert f"said-{name}" in {a.get("id") for _, a in page.elements}
    assert page.text.count(" as a table") == len(ids)


def test_what_the_reader_needs_is_there(page: Page) -> None:
    for wanted in (
        "kind: NetworkChaos",
        "Emulated: the nodes' machines go on running",
        "6,886 planned = 6,759 ok + 109 failed + 0 shed + 18 censored",
        "pytest experiments -k zone_outage --seed 7419",
        "2.47.0",
        "healed, verified clean",
        "sum(up{job='engine'})",
    ):
        assert wanted in page.text, wanted


def test_the_file_is_small_enough_to_mail(run_root: Path, page: Page) -> None:
    assert (run_root / "zone_outage" / "report.html").stat().st_size < 2_500_000


def test_a_report_does_not_break_the_seal(run_root: Path) -> None:
    html.write(run_root / "zone_outage")
    record.check_seal(run_root / "zone_outage")


def test_an_edited_record_is_refused(tmp_path: Path) -> None:
    run = synthetic.write(tmp_path / "zone_outage", synthetic.timeline())
    (run / "events.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RecordError, match=r"events\.jsonl"):
        html.write(run)


def test_a_run_that_died_is_an_error(run_root: Path) -> None:
    text = Page(html.write(run_root / "gpu_xid").read_text(encoding="utf-8")).text
    assert text.index("ERROR") < text.index("Findings")
    assert "verdict.json is missing" in text


def test_the_index_lists_what_died_and_links_reports(run_root: Path, page: Page, hostile: Page) -> None:
    html.write(run_root / "gpu_xid")
    index = Page(html.write_index(run_root).read_text(encoding="utf-8"))
    links = {a.get("href") for t, a in index.elements if t == "a"}
    assert {"zone_outage/report.html", "hostile/report.html", "gpu_xid/report.html"} <= links
    assert "1 ERROR · 2 PASS" in index.text
    assert index.count("script") == 0


def test_an_empty_run_is_not_green(tmp_path: Path) -> None:
    text = Page(html.write_index(tmp_path).read_text(encoding="utf-8")).text
    assert "INCONCLUSIVE" in text
    assert "no experiment ran" in text


def test_a_record_of_nothing_is_still_a_page() -> None:
    made = synthetic.timeline()
    empty = Timeline(made.about, made.fault, (), (), ())
    text = Page(html.render(empty, synthetic.judged(empty))).text
    assert "INCONCLUSIVE" in text or "ERROR" in text
    assert "the fault was never applied" in text


# ── what is drawn ───────────────────────────────────────────────────────────────────────────────


def test_every_bad_request_is_drawn_and_the_good_are_counted() -> None:
    made = synthetic.timeline()
    on = view.axis(made, synthetic.judgement())
    points = view.points(made, on)
    bad = sum(not r.ok for r in made.replies)
    assert sum(p.group is not view.Group.GOOD for p in points.drawn) == bad
    assert points.one_in == 2
    assert sum(p.group is view.Group.GOOD for p in points.drawn) == points.good_drawn < points.good_total
    slowest = max(r.ttft or 0 for r in made.replies if r.ok)
    assert max(p.y for p in points.drawn if p.group is view.Group.GOOD) == pytest.approx(slowest, abs=1e-3)


def test_a_long_total_outage_stays_readable_and_says_what_it_leaves_out() -> None:
    made = synthetic.timeline()
    down = [
        replace(
            r, outcome=Outcome.CONNECT_TIMEOUT, t_first=None, seq=r.seq + 10_000 * i, detail="connect: timed out " * 9
        )
        for i in range(3)
        for r in made.replies
    ]
    out = replace(made, replies=tuple(down))
    page = html.render(out, synthetic.judgement())
    assert len(page) < 2_500_000
    assert f"Of {len(down):,} others {math.ceil(len(down) / 4):,} are drawn" in page
    assert "failed (1 in 4 drawn)" in page


def test_rates_count_every_request_once() -> None:
    made = synthetic.timeline()
    bins = view.rates(made, view.axis(made, synthetic.judgement()))
    assert sum(sum(row) for row in bins.rows.values()) * bins.width == pytest.approx(len(made.replies))


def test_shares_of_a_bin_add_up() -> None:
    made = synthetic.timeline()
    bins = view.zone_shares(made, view.axis(made, synthetic.judgement()))
    sums = [sum(row[i] for row in bins.rows.values()) for i in range(len(bins.left))]
    assert all(s == pytest.approx(1) or s == 0 for s in sums)


def test_lanes_follow_the_pods() -> None:
    made = synthetic.timeline()
    lanes = {lane.pod: lane for lane in view.lanes(made, view.axis(made, synthetic.judgement()))}
    lost = lanes[synthetic.LOST[0]]
    assert [s.state for s in lost.stays] == [view.State.READY, view.State.UNREADY, view.State.TERMINATING]
    assert lost.target
    assert lost.stays[-1].end == pytest.approx(9.0)
    new = lanes["llm/my-llama32-7d9c5b6f4-n0w11"]
    assert [s.state for s in new.stays][-2:] == [view.State.LOADING, view.State.READY]
    assert not new.target


def test_phases_count_as_the_objectives_do() -> None:
    made = synthetic.timeline()
    judgement = synthetic.judgement()
    figures = {f.phase: f for f in view.figures(made, view.axis(made, judgement))}
    for finding in judgement.findings:
        if finding.objective.startswith("success") and finding.observed is not None:
            f = figures[finding.phase]
            assert f.good / (f.good + f.broken + f.failed) == pytest.approx(finding.observed)


def test_repeated_looks_at_the_effect_are_folded_but_its_loss_is_kept() -> None:
    made = synthetic.timeline()
    lost = synthetic.F + 20.5
    events = [replace(e, ok=False) if isinstance(e, FaultMark) and e.t == lost else e for e in made.events]
    looks = [m for m in view.fault_marks(replace(made, events=tuple(events))) if m.step == "effect"]
    assert len(looks) < 12
    assert [m.ok for m in looks if m.what == "partition"] == [True, False, True, True]


def test_alerts_are_marks_where_they_change() -> None:
    made = synthetic.timeline()
    values = [0.0] * 35 + [1.0] * 20 + [0.0] * 10
    samples = tuple(Sample(synthetic.START + i, "ALERTS", "alert EngineDown", v) for i, v in enumerate(values))
    found = view.marks(replace(made, samples=samples), view.axis(made, synthetic.judgement()))
    assert [(m.x, m.what) for m in found if m.lane == "alerts"] == [
        (5.0, "alert EngineDown fires"),
        (25.0, "alert EngineDown is resolved"),
    ]


def test_evictions_are_marks_with_the_budgets_word() -> None:
    made = synthetic.timeline()
    asked = EvictionMark(synthetic.F + 1, "llm/engine-b", "refused", "Cannot evict pod")
    found = view.marks(replace(made, events=(*made.events, asked)), view.axis(made, synthetic.judgement()))
    assert [(m.lane, m.ok) for m in found if m.what == "eviction of llm/engine-b refused Cannot evict pod"] == [
        ("events", False)
    ]


def test_failing_verdict_leads_with_its_reasons() -> None:
    made = synthetic.timeline()
    judgement = synthetic.judgement()
    worse = [
        replace(f, status=Verdict.FAIL, evidence="worst 14:02") if f.objective.startswith("first token") else f
        for f in judgement.findings
    ]
    text = Page(html.render(made, replace(judgement, verdict=Verdict.FAIL, findings=tuple(worse)))).text
    assert text.index("during: first token p95 ≤ 1.5 s · was 1.09 s ± 0.13 · worst 14:02") < text.index("Findings")


def test_the_charts_data_is_json(run_root: Path, hostile: Page) -> None:
    text = (run_root / "hostile" / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.S)
    assert found is not None
    assert set(json.loads(found[1])["roots"]) == set(CHARTS)
