"""One self-contained HTML file per experiment, and an index per run. Made from the run directory alone.

Nothing is loaded from anywhere: the chart library is inside, and a content security policy forbids the rest, by the
hashes of our own scripts, so that no text of a pod, a server or an error can run or fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gameday import record
from gameday.clock import Epoch
from gameday.model import Finding, Judgement, Note, Timeline, Verdict
from reports import charts, history, summary, verdicts, view, words
from reports.console import healed, story
from reports.series import CHARTS, TARGETS, Series, series

HERE = Path(__file__).parent
REPORT = "report.html"
INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A resource that was applied, as it was written."""

    name: str
    text: str


def write(run_dir: Path) -> Path:
    """Write `run_dir/report.html`; RecordError when the record is missing, cut short or edited.

    A record that was never sealed (its run died) is shown as far as it goes.
    """
    timeline, _ = record.load(run_dir, sealed=(run_dir / record.SEAL).exists())
    page = render(timeline, verdicts.read(run_dir), manifests(run_dir))
    path = run_dir / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def write_index(run_root: Path) -> Path:
    """Write `run_root/index.html`: every experiment of the run, also those that ended without a verdict."""
    found = verdicts.entries(run_root)
    trials = verdicts.trials(found)
    missing = sum(t.missing for t in trials)
    page = (
        _environment()
        .get_template("index.html.j2")
        .render(
            run=run_root.name,
            entries=found,
            trends=history.trends(run_root),
            trials=trials,
            tally=_tally(found, missing),
            worst=Verdict.worst([*(e.judgement.verdict for e in found), *(t.verdict for t in trials)]),
            about=found[0].about if found else {},
            healed=healed,
            csp=_csp(()),
        )
    )
    path = run_root / INDEX
    path.write_text(page, encoding="utf-8")
    return path


def _tally(found: Sequence[verdicts.Entry], missing: int) -> str:
    told = words.tally(e.judgement.verdict for e in found) or "no experiment ran"
    return f"{told} · {missing} trials never ran" if missing else told


def manifests(run_dir: Path) -> tuple[Manifest, ...]:
    return tuple(
        Manifest(path.name, path.read_text(encoding="utf-8", errors="replace"))
        for path in sorted((run_dir / "manifests").glob("*.yaml"))
    )


def render(timeline: Timeline, judgement: Judgement, applied: Sequence[Manifest] = ()) -> str:
    """The page."""
    on = view.axis(timeline, judgement)
    figures = _figures(timeline, judgement, on)
    docs, roots, docid = charts.document({f.id: f.plot for f in figures})
    epoch = Epoch(timeline.about.epoch_wall, timeline.about.epoch_mono)
    ours = (_bokeh(), _ours())
    findings, sound = _of_run(judgement.findings)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            about=timeline.about,
            fault=timeline.fault,
            verdict=judgement,
            findings=findings,
            sound=sound,
            reasons=words.reasons(judgement),
            happened=summary.sentences(timeline, judgement, on),
            story=story(judgement),
            healed=healed(judgement),
            rto=_rto(judgement),
            counts=words.counts(judgement.counts),
            on=on,
            when=_when(epoch, on),
            figures=figures,
            phase_figures=view.figures(timeline, on),
            worst=view.worst_second(timeline, on),
            queries=view.queries(timeline),
            fault_marks=view.fault_marks(timeline),
            notes=[n for n in timeline.events if isinstance(n, Note)],
            manifests=applied,
            data=_json({"docs": docs, "roots": roots, "docid": docid, "fault": _zoom(on)}),
            scripts=[Markup(s) for s in ours],  # noqa: S704 our own files, with nothing of the run in them
            csp=_csp(ours),
        )
    )


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its text alternative: `said` in a sentence, `columns` and `rows` in a table."""

    id: str
    title: str
    said: str
    plot: Any
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def _figures(timeline: Timeline, judgement: Judgement, on: view.Axis) -> tuple[Figure, ...]:
    shared = charts.x_range(on)
    made = [
        _latency_figure(timeline, judgement, on, shared),
        _waterfall_figure(judgement),
        _rates_figure(timeline, on, shared),
        _shares_figure(timeline, on, shared),
        _pods_figure(timeline, on, shared),
        _marks_figure(timeline, on, shared),
        *_series_figures(timeline, judgement, on, shared),
    ]
    return tuple(f for f in made if f is not None)


def _latency_figure(timeline: Timeline, judgement: Judgement, on: view.Axis, shared: Any) -> Figure:
    points = view.points(timeline, on)
    plot = charts.latency(points, on, view.latency_limits(judgement.findings, on), shared)
    figures = view.figures(timeline, on)
    said = "; ".join(
        f"{f.phase}: {f.requests:,} requests, {f.good:,} good, first token p95 {words.quantity(f.p95, 's')}"
        for f in figures
    )
    sampled = ""
    if points.one_in > 1:
        sampled = (
            f" Of {points.good_total:,} good requests {points.good_drawn:,} are drawn, among them the slowest of"
            f" every {_every(on)}."
        )
    if points.bad_one_in > 1:
        sampled += f" Of {points.bad_total:,} others {points.bad_drawn:,} are drawn."
    elif points.bad_total:
        others = f"all {points.bad_total:,} others" if points.bad_total > 1 else "the only other one"
        sampled += f" Drawn {'are' if points.bad_total > 1 else 'is'} {others}."
    return Figure(
        "latency",
        "Requests",
        f"Each mark is a request, at the instant it was meant to be sent. {said}.{sampled}",
        plot,
        ("phase", "requests", "good", "stream broken", "failed", "not counted", "first token p50", "p95"),
        tuple(
            (
                f.phase,
                f"{f.requests:,}",
                f"{f.good:,}",
                f"{f.broken:,}",
                f"{f.failed:,}",
                f"{f.uncounted:,}",
                words.quantity(f.p50, "s"),
                words.quantity(f.p95, "s"),
            )
            for f in figures
        ),
    )


def _every(on: view.Axis) -> str:
    return "half second" if on.bin == 0.5 else words.plain_duration(on.bin)


def _rates_figure(timeline: Timeline, on: view.Axis, shared: Any) -> Figure:
    worst = view.worst_second(timeline, on)
    said = (
        f"The worst second began at {worst.x:.0f} s ({worst.wall}): {worst.share:.0%} of its requests failed."
        if worst
        else "No request failed."
    )
    bins = view.rates(timeline, on)
    every = max(1, len(bins.left) // 40)
    rows = tuple(
        (
            f"{bins.left[i]:.1f}",
            *(f"{sum(row[i : i + every]) / len(row[i : i + every]):.1f}" for row in bins.rows.values()),
        )
        for i in range(0, len(bins.left), every)
    )
    return Figure(
        "rates",
        f"Goodput and errors, every {_every(on)}",
        said,
        charts.rates(bins, on, shared),
        ("from, s", *(f"{name} per s" for name in bins.rows)),
        rows,
    )


def _shares_figure(timeline: Timeline, on: view.Axis, shared: Any) -> Figure | None:
    bins = view.zone_shares(timeline, on)
    if not bins.rows:
        return None
    figures = view.figures(timeline, on)
    zones = tuple(bins.rows)
    said = "; ".join(
        f"{f.phase}: " + ", ".join(f"{z} {share:.0%}" for z, share in f.zones.items() if share >= 0.005)
        for f in figures
    )
    rows = tuple((f.phase, *(f"{f.zones.get(z, 0.0):.1%}" for z in zones)) for f in figures)
    return Figure(
        "shares", "Who answered, by zone", f"{said}.", charts.shares(bins, on, shared), ("phase", *zones), rows
    )


def _pods_figure(timeline: Timeline, on: view.Axis, shared: Any) -> Figure | None:
    found = view.lanes(timeline, on)
    if not found:
        return None
    shown = view.busiest(found)
    targets = [lane for lane in found if lane.target]
    said = f"{len(found)} pods, {len(targets)} of them targets of the fault (◆)."
    if len(shown) < len(found):
        said += f" {len(found) - len(shown)} that never changed are left out of the chart."
    rows = tuple(
        (
            lane.pod,
            lane.zone,
            lane.node,
            "yes" if lane.target else "",
            ", ".join(f"{s.state} {s.start:.1f} to {s.end:.1f}" for s in lane.stays),
        )
        for lane in found
    )
    columns = ("pod", "zone", "node", "target", "states, s")
    return Figure("pods", "Pods", said, charts.pods(shown, on, shared), columns, rows)


def _marks_figure(timeline: Timeline, on: view.Axis, shared: Any) -> Figure | None:
    found = view.marks(timeline, on)
    if not found:
        return None
    bad = sum(not m.ok for m in found)
    rows = tuple((f"{m.x:.2f}", m.lane, "" if m.ok else "yes", m.what) for m in found[:2000])
    said = f"{len(found)} events, {bad} of them warnings or failed steps (filled)."
    if len(found) > len(rows):
        said += f" The table shows the first {len(rows)}."
    plot = charts.marks(view.thin_marks(found, on), on, shared)
    return Figure("marks", "What happened", said, plot, ("at, s", "where", "warning", "what"), rows)


def _waterfall_figure(judgement: Judgement) -> Figure | None:
    recovery = judgement.recovery
    if recovery is None or not (recovery.seconds or any(recovery.stages.values())):
        return None
    limit = _rto(judgement)
    kept = all(f.status is Verdict.PASS for f in judgement.findings if words.is_recovery(f))
    said = f"Recovery: {words.recovered(recovery)}"
    if limit is not None:
        said += f", allowed {words.plain_duration(limit)}"
    rows = tuple(
        (name, f"{begin:.2f}", f"{end:.2f}", words.fine_duration(end - begin))
        for name, begin, end in words.steps(recovery.stages)
    )
    return Figure(
        "recovery",
        "Recovery, stage by stage",
        f"{said}. {recovery.story}".strip(),
        charts.waterfall(recovery, limit, kept=kept),
        ("stage", "from, s", "until, s", "took"),
        rows,
    )


def _series_figures(timeline: Timeline, judgement: Judgement, on: view.Axis, shared: Any) -> list[Figure]:
    """The first few series; "What Prometheus answered" lists all of them."""
    found = series(timeline, judgement.findings, on)
    return [_series_figure(f"prometheus-{i}", one, on, shared) for i, one in enumerate(found[:CHARTS])]


def _series_figure(name: str, one: Series, on: view.Axis, shared: Any) -> Figure:
    values = one.values
    said = f"Prometheus, {one.samples:,} samples"
    said += f" from {min(values):.4g} to {max(values):.4g}" if values else ", none with a value"
    if one.missing:
        said += f"; {len(one.missing):,} without an answer ({words.one_line(one.error) or 'no value'})"
    if one.thinned:
        said += "; drawn are the lowest and the highest of each stretch"
    every = max(1, len(one.points) // 40)
    rows = tuple((f"{x:.1f}", "no answer" if math.isnan(y) else f"{y:.4g}") for x, y in one.points[::every])
    title = "targets up, of all that Prometheus scrapes" if one.query == TARGETS else one.name
    return Figure(name, title, f"{said}.", charts.series(one, on, shared), ("at, s", "value"), rows)


def _of_run(findings: Sequence[Finding]) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """(what is wrong with the run itself and then the objectives, what is right with the run itself)."""
    sound = tuple(f for f in findings if f.phase == "run" and f.status is Verdict.PASS)
    rest = [f for f in findings if f not in sound]
    return tuple(sorted(rest, key=lambda f: f.phase != "run")), sound


def _rto(judgement: Judgement) -> float | None:
    """The allowed recovery time, seconds."""
    return next((f.limit for f in judgement.findings if words.is_recovery(f) and f.limit is not None), None)


def _zoom(on: view.Axis) -> Mapping[str, float]:
    """What the button "fault to recovery" shows; the whole fault where nothing came back."""
    if on.fault is None:
        return {"start": on.start, "end": on.end}
    until = on.fault.end if on.back is None else max(on.back, on.fault.start + 1)
    margin = max(3.0, 0.5 * (until - on.fault.start))
    return {"start": max(on.start, on.fault.start - margin), "end": min(on.end, until + margin)}


def _when(epoch: Epoch, on: view.Axis) -> str:
    began = datetime.fromtimestamp(epoch.to_wall(on.zero + on.start), UTC).astimezone()
    return f"{began:%Y-%m-%d %H:%M:%S %Z}"


def _json(data: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704 escaped


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = (HERE / "report.css").read_text(encoding="utf-8")
    made.globals.update(css=Markup(css), words=words)  # noqa: S704 our own file
    return made


@cache
def _bokeh() -> str:
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


@cache
def _ours() -> str:
    return (HERE / "report.js").read_text(encoding="utf-8")


def _csp(scripts: Sequence[str]) -> str:
    """Only these scripts, inline styles, and nothing from anywhere."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    scripts_from = hashes or "'none'"
    rest = "style-src 'unsafe-inline'; img-src data:; font-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {scripts_from}; {rest}"
