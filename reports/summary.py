"""What happened, in a few plain sentences: for the reader who has twenty seconds. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gameday.clock import Epoch
from gameday.model import Finding, Judgement, Phase, Recovery, Timeline, Verdict
from reports import view, words
from reports.console import healed


def sentences(timeline: Timeline, judgement: Judgement, on: view.Axis) -> tuple[str, ...]:
    """What was broken, what users felt, when it was good again, what was put right."""
    return tuple(_sentences(timeline, judgement, on))


def _sentences(timeline: Timeline, judgement: Judgement, on: view.Axis) -> Iterator[str]:
    if on.fault is None:
        yield "Nothing was broken: no fault was injected."
    else:
        epoch = Epoch(timeline.about.epoch_wall, timeline.about.epoch_mono)
        lasted = "" if timeline.fault.one_shot else f", for {words.plain_duration(on.fault.end - on.fault.start)}"
        yield f"At {epoch.show(on.zero)}{lasted}: {timeline.fault.title}."
    phases = {f.phase: f for f in view.figures(timeline, on)}
    if during := phases.get(Phase.DURING):
        yield _felt(during, phases.get(Phase.BEFORE))
    if judgement.recovery is not None and on.fault is not None:
        yield _recovery(judgement)
    said = healed(judgement)
    yield f"{said[0].upper()}{said[1:]}."


def _felt(during: view.PhaseFigures, before: view.PhaseFigures | None) -> str:
    counted = during.good + during.broken + during.failed
    if not counted:
        return "No request was counted meanwhile."
    bad = during.broken + during.failed
    told = f"{bad:,} of {counted:,} requests failed" if bad else f"all {counted:,} requests went well"
    told = f"Meanwhile {told}"
    if during.broken:
        told += f", {during.broken:,} of them in mid-stream"
    told += f"; {_first_token(during.p95)}"
    return f"{told}, {words.quantity(before.p95, 's')} before." if before and before.p95 is not None else f"{told}."


def _first_token(p95: float | None) -> str:
    if p95 == math.inf:
        return "one in twenty or more never got a first token (p95)"
    return f"the first token took {words.quantity(p95, 's')} (p95)"


def _recovery(judgement: Judgement) -> str:
    recovery = judgement.recovery
    assert recovery is not None, "asked for only where there is one"
    finding = next((f for f in judgement.findings if words.is_recovery(f)), None)
    allowed = f", {words.plain_duration(finding.limit)} allowed" if finding and finding.limit is not None else ""
    if recovery.seconds is None:
        return f"The service was not seen to come back{allowed}."
    kept = finding is None or finding.status is Verdict.PASS
    if recovery.seconds == 0:
        return f"No outage was seen{_least(recovery)}{allowed}." if kept else f"No outage was measured{allowed}."
    told = f"The service was back after {words.recovered(recovery)}{allowed}"
    return f"{told}." if kept else f"{told}{_why(finding)}."


def _why(finding: Finding | None) -> str:
    """What the judge had to say beside the figure: "recovered only by the heal"."""
    said = words.one_line(finding.evidence).split(";")[0].split(" · ")[0] if finding else ""
    return f" ({said})" if said and not said[-1:].isdigit() and not said.endswith((" s", " ms", " min")) else ""


def _least(recovery: Recovery) -> str:
    """How short an outage would have been missed."""
    return f" (a shorter one than {words.fine_duration(recovery.high)} would go unseen)" if recovery.high else ""
