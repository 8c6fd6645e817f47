"""The charts, made with Bokeh: one document whose charts share their x axis. No judging, no reading of files.

Colours are Okabe and Ito's, and nothing is told by colour alone: outcomes differ in marker, areas in hatching.
Text colours are set by report.js, which knows whether the page is dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.models import (
    BoxAnnotation,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    Label,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    Range1d,
    ResetTool,
    Span as Line,
    WheelPanTool,
)
from bokeh.plotting import figure

from gameday.model import Recovery
from gameday.units import show_duration
from reports import view, words
from reports.series import Series
from reports.view import Axis, Group, State

BLUE, SKY, GREEN, ORANGE, RED, PURPLE, YELLOW = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
)
GREY = "#8a8f98"

_MARKERS = {
    Group.GOOD: ("circle", BLUE, 4, 0.5),
    Group.BROKEN: ("triangle", ORANGE, 9, 0.95),
    Group.FAILED: ("x", RED, 8, 0.95),
    Group.UNCOUNTED: ("diamond", GREY, 7, 0.9),
}
_FILLS = {Group.GOOD: (BLUE, " "), Group.BROKEN: (ORANGE, "/"), Group.FAILED: (RED, "x"), Group.UNCOUNTED: (GREY, ".")}
_STATES = {
    State.PENDING: (GREY, "."),
    State.SCHEDULED: (SKY, " "),
    State.LOADING: (YELLOW, "/"),
    State.READY: (GREEN, " "),
    State.UNREADY: (RED, "x"),
    State.TERMINATING: (PURPLE, "\\"),
}
_ZONES = ((SKY, " "), (GREEN, "/"), (PURPLE, "\\"), (YELLOW, "."), (BLUE, "-"), (ORANGE, "|"))
_MARK_SHAPES = {
    "fault": "star",
    "chaos records": "diamond",
    "endpoints": "triangle",
    "nodes": "square",
    "events": "circle",
    "alerts": "inverted_triangle",
    "notes": "hex",
}

_LIMIT = {"line_color": PURPLE, "line_width": 2, "line_dash": "dashed"}
_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds; formatters in JavaScript would need eval

_NAMED = {RED: "bad", GREEN: "good"}  # how report.js finds texts whose colour depends on the page's
LEFT = 138  # pixels kept for labels at the left of every chart, so that their x axes line up

Plot = Any  # bokeh is untyped


def document(plots: Mapping[str, Plot]) -> tuple[dict[str, Any], dict[str, str], str]:
    """(documents as JSON, {chart's name: its model's id}, the document's id) for Bokeh.embed.embed_items."""
    made = Document()
    for plot in plots.values():
        made.add_root(plot)
    return {"run": made.to_json(deferred=False)}, {name: plot.id for name, plot in plots.items()}, "run"


def x_range(on: Axis) -> Range1d:
    pad = (on.end - on.start) * 0.01
    return Range1d(on.start - pad, on.end + pad, bounds=(on.start - pad, on.end + pad), min_interval=1)


def _plot(on: Axis, shared: Range1d, height: int, **more: Any) -> Plot:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=shared,
        tools="xpan,xbox_zoom",
        toolbar_location=None,
        output_backend="canvas",
        min_border_left=LEFT,
        min_border_right=14,
        **more,
    )
    plot.add_tools(ResetTool(), WheelPanTool(dimension="width"))
    plot.toolbar.active_drag = None
    plot.toolbar.active_scroll = None
    plot.xgrid.grid_line_alpha = 0.4
    plot.ygrid.grid_line_alpha = 0.4
    plot.outline_line_color = None
    plot.background_fill_alpha = 0
    plot.border_fill_alpha = 0
    plot.xaxis.axis_label = on.name
    plot.xaxis.axis_label_standoff = 2
    _shade(plot, on)
    return plot


def _shade(plot: Plot, on: Axis) -> None:
    """The fault's window, the phases' borders and R, on every chart alike."""
    if on.fault:
        plot.add_layout(
            BoxAnnotation(
                left=on.fault.start,
                right=on.fault.end,
                fill_color=RED,
                fill_alpha=0.13,
                line_color=RED,
                line_alpha=0.6,
                level="underlay",
                propagate_hover=True,
            )
        )
    for span in on.unsure:
        colour = RED if span.name == "F" else GREEN
        plot.add_layout(
            BoxAnnotation(left=span.start, right=span.end, fill_color=colour, fill_alpha=0.3, line_color=None)
        )
    for phase in on.phases[1:]:
        plot.add_layout(_upright(phase.start, GREY, "dotted"))
    if on.back is not None:
        plot.add_layout(_upright(on.back, GREEN, "dashed", width=2))


def _upright(x: float, colour: str, dash: str, width: float = 1) -> Line:
    return Line(location=x, dimension="height", line_color=colour, line_dash=dash, line_width=width, level="overlay")


def _name_phases(plot: Plot, on: Axis) -> None:
    """Phases, the fault and R by name, along the chart's upper edge."""
    top = plot.y_range.end
    for phase in on.phases:
        plot.add_layout(_caption(phase.start, top, phase.name, 0))
    if on.fault:
        plot.add_layout(_caption(on.fault.start, top, f"fault: {on.fault.name}"[:30], 1, colour=RED))
    if on.back is not None:
        late = on.back > on.start + 0.65 * (on.end - on.start)
        plot.add_layout(_caption(on.back, top, "R: service is back", 2, colour=GREEN, before=late))


def _caption(x: float, top: float, text: str, line: int, colour: str = "", *, before: bool = False) -> Label:
    made = Label(
        x=x,
        y=top,
        text=_plain(text),
        text_font_size="11px",
        x_offset=-4 if before else 4,
        text_align="right" if before else "left",
        y_offset=-2 - 14 * line,
        text_baseline="top",
        text_font_style="bold" if colour else "normal",
        name=_NAMED.get(colour, "themed"),
    )
    if colour:
        made.text_color = colour
    return made


def latency(points: view.Points, on: Axis, limits: Sequence[view.Span], shared: Range1d) -> Plot:
    """Every request: how long its user waited, from the intended send."""
    top = max([p.y for p in points.drawn] + [float(s.name) for s in limits] + [1.0]) * 6
    low = min([p.y for p in points.drawn] + [0.1]) * 0.7
    plot = _plot(on, shared, 330, y_axis_type="log", y_range=(low, top))
    items = []
    for kind in Group:
        chosen = [p for p in points.drawn if p.group is kind]
        if chosen:
            items.append(LegendItem(label=_called(kind, points), renderers=[_scatter(plot, kind, chosen)]))
    for span in limits:
        y = float(span.name)
        line = plot.line([span.start, span.end], [y, y], **_LIMIT)
        if span is limits[0]:
            items.append(LegendItem(label="first-token limit", renderers=[line]))
    plot.yaxis.ticker = FixedTicker(ticks=list(_TICKS), minor_ticks=[])
    plot.yaxis.major_label_overrides = {t: show_duration(t) for t in _TICKS}
    plot.yaxis.axis_label = "first token, or until it failed"
    plot.add_tools(
        _hover(
            [
                ("at", "@x{0.00} s"),
                ("waited", "@y{0.000} s"),
                ("ended", "@outcome"),
                ("class", "@cls"),
                ("pod", "@pod"),
                ("zone", "@zone"),
                ("detail", "@detail"),
            ],
            plot,
        )
    )
    _legend(plot, items)
    _name_phases(plot, on)
    return plot


def _called(kind: Group, points: view.Points) -> str:
    one_in = points.one_in if kind is Group.GOOD else points.bad_one_in
    return f"{kind} (1 in {one_in} drawn)" if one_in > 1 else str(kind)


def _scatter(plot: Plot, kind: Group, chosen: Sequence[view.Point]) -> Any:
    marker, colour, size, alpha = _MARKERS[kind]
    source = ColumnDataSource(
        {
            "x": np.array([p.x for p in chosen], dtype=np.float32),
            "y": np.array([p.y for p in chosen], dtype=np.float32),
            "outcome": [str(p.outcome) for p in chosen],
            "cls": [p.cls for p in chosen],
            "pod": [p.pod for p in chosen],
            "zone": [p.zone for p in chosen],
            "detail": [p.detail for p in chosen],
        }
    )
    edge = colour if kind in (Group.GOOD, Group.FAILED) else "#5b4300"
    width = 2.0 if kind is Group.FAILED else 0 if kind is Group.GOOD else 1
    return plot.scatter(
        "x",
        "y",
        source=source,
        marker=marker,
        size=size,
        fill_color=colour,
        fill_alpha=alpha,
        line_color=edge,
        line_alpha=alpha,
        line_width=width,
        name=str(kind),
    )


def rates(bins: view.Bins, on: Axis, shared: Range1d) -> Plot:
    """Goodput and errors, stacked: the height is what was asked for."""
    plot = _plot(on, shared, 210)
    fills = {str(g): fill for g, fill in _FILLS.items()}
    names = {str(Group.GOOD): "good (goodput)", str(Group.FAILED): "failed", str(Group.UNCOUNTED): "not counted"}
    _stack(plot, bins, fills, names)
    plot.yaxis.axis_label = "requests per second"
    plot.y_range.start = 0
    return plot


def shares(bins: view.Bins, on: Axis, shared: Range1d) -> Plot:
    """Which zone answered."""
    plot = _plot(on, shared, 190, y_range=(0, 1))
    zones = [z for z in bins.rows if z != view.NO_ANSWER]
    fills = {z: _ZONES[i % len(_ZONES)] for i, z in enumerate(zones)} | {view.NO_ANSWER: (GREY, "x")}
    _stack(plot, bins, fills, {z: f"zone {z}" for z in zones})
    plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    plot.yaxis.axis_label = "share of requests"
    return plot


def _stack(plot: Plot, bins: view.Bins, fills: Mapping[str, tuple[str, str]], names: Mapping[str, str]) -> None:
    bottom = np.zeros(len(bins.left))
    left = np.array(bins.left)
    items = []
    for name, row in bins.rows.items():
        colour, hatch = fills[name]
        height = np.array(row)
        drawn = height > 0
        data = {
            "left": left[drawn],
            "right": left[drawn] + bins.width,
            "bottom": bottom[drawn],
            "top": (bottom + height)[drawn],
            "value": height[drawn],
            "name": [names.get(name, name)] * int(drawn.sum()),
        }
        quads = plot.quad(
            left="left",
            right="right",
            bottom="bottom",
            top="top",
            source=ColumnDataSource(data),
            fill_color=colour,
            fill_alpha=0.85,
            line_color=None,
            hatch_pattern=hatch,
            hatch_color="black",
            hatch_alpha=0.28,
            name=f"area {name}",
            hatch_scale=7,
            hatch_weight=1,
        )
        items.append(LegendItem(label=_plain(names.get(name, name)), renderers=[quads]))
        bottom = bottom + height
    _legend(plot, items)
    plot.add_tools(_hover([("", "@name"), ("at", "@left{0.0} s"), ("value", "@value{0.00}")], plot))


def pods(lanes: Sequence[view.Lane], on: Axis, shared: Range1d) -> Plot:
    """Every pod a lane, its states as bars; ◆ are the fault's targets."""
    shown = list(reversed(lanes))
    plot = _plot(on, shared, 70 + 20 * len(shown), y_range=(-0.6, len(shown) - 0.4))
    items = []
    for state, (colour, hatch) in _STATES.items():
        stays = [(i, lane, s) for i, lane in enumerate(shown) for s in lane.stays if s.state is state]
        if not stays:
            continue
        data = {
            "y": [i for i, _, _ in stays],
            "left": [s.start for _, _, s in stays],
            "right": [s.end for _, _, s in stays],
            "pod": [lane.pod for _, lane, _ in stays],
            "node": [lane.node for _, lane, _ in stays],
            "state": [str(s.state) for _, _, s in stays],
            "for": [round(s.end - s.start, 2) for _, _, s in stays],
        }
        bars = plot.hbar(
            y="y",
            left="left",
            right="right",
            height=0.72,
            source=ColumnDataSource(data),
            fill_color=colour,
            line_color=None,
            fill_alpha=0.6 if state is State.READY else 0.95,
            hatch_pattern=hatch,
            hatch_color="black",
            hatch_alpha=0.5,
            hatch_scale=7,
            hatch_weight=1,
        )
        items.append(LegendItem(label=str(state), renderers=[bars]))
    _lanes_axis(plot, [lane.label for lane in shown])
    _legend(plot, items)
    plot.add_tools(
        _hover(
            [("pod", "@pod"), ("node", "@node"), ("state", "@state"), ("from", "@left{0.00} s"), ("for", "@for s")],
            plot,
        )
    )
    return plot


def _plain(text: str) -> str:
    """Without TeX's delimiters: the chart library would call for a typesetter that is not in the file."""
    return text.replace("$$", "$").replace("\\[", "[").replace("\\(", "(")


def _lanes_axis(plot: Plot, labels: Sequence[str]) -> None:
    plot.yaxis.ticker = FixedTicker(ticks=list(range(len(labels))))
    plot.yaxis.major_label_overrides = {i: _plain(label) for i, label in enumerate(labels)}
    plot.yaxis.minor_tick_line_color = None
    plot.ygrid.grid_line_color = None


def marks(found: Sequence[view.Mark], on: Axis, shared: Range1d) -> Plot:
    """What the cluster and the fault did, as marks; filled marks are bad news."""
    names = [lane for lane in reversed(view.MARK_LANES) if any(m.lane == lane for m in found)]
    plot = _plot(on, shared, 70 + 26 * len(names), y_range=(-0.6, len(names) - 0.4))
    for i, lane in enumerate(names):
        chosen = [m for m in found if m.lane == lane]
        data = {
            "x": [m.x for m in chosen],
            "y": [i] * len(chosen),
            "what": [m.what[:160] for m in chosen],
            "fill": [0.0 if m.ok else 0.9 for m in chosen],
        }
        plot.scatter(
            "x",
            "y",
            source=ColumnDataSource(data),
            marker=_MARK_SHAPES[lane],
            size=11,
            fill_color=RED,
            fill_alpha="fill",
            line_color=BLUE,
            line_width=1.5,
        )
    _lanes_axis(plot, names)
    plot.add_tools(_hover([("at", "@x{0.00} s"), ("what", "@what")], plot))
    return plot


def series(one: Series, on: Axis, shared: Range1d) -> Plot:
    """What Prometheus answered to one query; crosses where it had no answer."""
    values = [*one.values, *(limit.value for limit in one.limits)] or [0.0]
    low, high = min(*values, 0.0), max(*values, 0.0)
    room = (high - low or 1.0) * 0.15
    plot = _plot(on, shared, 150, y_range=(low - (room if low < 0 else room / 3), high + room))
    source = ColumnDataSource({"x": [x for x, _ in one.points], "y": np.array([y for _, y in one.points])})
    plot.line("x", "y", source=source, line_color=BLUE, line_width=1.5, name="good line")
    seen = plot.scatter("x", "y", source=source, size=4, fill_color=BLUE, line_color=None, name="good")
    items = [LegendItem(label="as sampled", renderers=[seen])]
    for limit in one.limits:
        line = plot.line([limit.start, limit.end], [limit.value] * 2, **_LIMIT)
        if limit is one.limits[0]:
            items.append(LegendItem(label="limit", renderers=[line]))
    if one.missing:
        lost = plot.scatter(list(one.missing), low, marker="x", size=9, line_color=RED, line_width=2)
        items.append(LegendItem(label="no answer", renderers=[lost]))
    plot.add_tools(HoverTool(renderers=[seen], tooltips=[("at", "@x{0.00} s"), ("value", "@y{0.0000}")], limit=2))
    _legend(plot, items)
    return plot


def waterfall(recovery: Recovery, limit: float | None, *, kept: bool) -> Plot:
    """From the fault to the recovery: each stage begins where the one before it ended; the last bar is R − F.

    `kept`: the recovery kept to what was allowed.
    """
    rows = list(reversed(words.steps(recovery.stages)))
    names = ["recovery", *(name for name, _, _ in rows)]
    end = max([e for _, _, e in rows] + [v for v in (recovery.high, recovery.seconds, limit) if v is not None] + [1.0])
    plot = figure(
        height=80 + 26 * len(names),
        sizing_mode="stretch_width",
        x_range=(0, end * 1.3),
        y_range=(-0.6, len(names) - 0.4),
        tools="",
        toolbar_location=None,
        min_border_left=LEFT,
        min_border_right=14,
    )
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_color = None
    plot.xaxis.axis_label = "seconds since the fault"
    data = {
        "y": list(range(1, len(names))),
        "left": [b for _, b, _ in rows],
        "right": [e for _, _, e in rows],
        "name": names[1:],
        "took": [round(e - b, 3) for _, b, e in rows],
        "said": [f"+{words.plain_duration(e - b)}" for _, b, e in rows],
    }
    source = ColumnDataSource(data)
    bars = plot.hbar(y="y", left="left", right="right", height=0.6, source=source, fill_color=SKY, line_color=BLUE)
    plot.text(
        x="right",
        y="y",
        text="said",
        source=source,
        x_offset=5,
        text_baseline="middle",
        text_font_size="11px",
        name="themed",
    )
    _total(plot, recovery, kept=kept)
    if limit is not None:
        plot.add_layout(_upright(limit, RED, "dashed", width=2))
        plot.add_layout(_caption(limit, len(names) - 0.4, f"RTO {words.plain_duration(limit)}", 0, colour=RED))
    _lanes_axis(plot, names)
    plot.add_tools(
        HoverTool(renderers=[bars], tooltips=[("stage", "@name"), ("until", "@right{0.00} s"), ("took", "@took s")])
    )
    return plot


def _total(plot: Plot, recovery: Recovery, *, kept: bool) -> None:
    if recovery.seconds is None:
        return
    plot.hbar(
        y=[0],
        left=[0],
        right=[recovery.seconds],
        height=0.6,
        fill_color=GREEN if kept else ORANGE,
        line_color=GREEN,
        hatch_pattern=" " if kept else "/",
        hatch_alpha=0.5,
    )
    reach = max(recovery.seconds, recovery.high or 0)
    if recovery.low is not None and recovery.high is not None:
        plot.segment([recovery.low], [0], [recovery.high], [0], line_color=GREY, line_width=3)
    plot.text(
        [reach],
        [0],
        [words.recovered(recovery)],
        x_offset=6,
        text_baseline="middle",
        text_font_size="12px",
        text_font_style="bold",
        name="themed",
    )


def _legend(plot: Plot, items: Sequence[LegendItem]) -> None:
    if not items:
        return
    legend = Legend(
        items=list(items),
        orientation="horizontal",
        location="left",
        click_policy="hide",
        label_text_font_size="11px",
        padding=2,
        margin=2,
        spacing=8,
        glyph_width=16,
        glyph_height=14,
        background_fill_alpha=0,
        border_line_color=None,
        ncols="auto",
    )
    plot.add_layout(legend, "above")


def _hover(tooltips: list[tuple[str, str]], plot: Plot) -> HoverTool:
    return HoverTool(tooltips=tooltips, renderers=list(plot.renderers), point_policy="follow_mouse", limit=3)
