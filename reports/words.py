"""How figures are said, the same in every report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from gameday.model import Counts, Finding, Judgement, Recovery, Verdict
from gameday.units import show_duration, show_share

MISSING = "no data"
NEVER = "never"

_PLURAL_UNITS = {"count": "", "1/s": " /s", "tokens/s": " tokens/s"}


def quantity(value: float | None, unit: str) -> str:
    """A value in its unit as people read it; `no data` where there is none, `never` for an infinite wait."""
    if value == math.inf and unit == "s":
        return NEVER
    if value is None or not math.isfinite(value):
        return MISSING
    if unit == "share":
        return show_share(value)
    if unit == "s":
        return fine_duration(value)
    tail = _PLURAL_UNITS.get(unit, f" {unit}" if unit else "")
    return f"{value:,.0f}{tail}" if value == round(value) else f"{value:,.2f}{tail}"


def fine_duration(value: float) -> str:
    """A measured duration: two decimals below ten seconds, one below two minutes."""
    if value < 0:
        return f"−{fine_duration(-value)}"
    if 1 <= value < 10:
        return f"{value:.2f} s"
    if 10 <= value < 120:
        return f"{value:.1f} s"
    return show_duration(value)


def plain_duration(value: float) -> str:
    """A duration for running text: whole seconds where tenths say nothing."""
    return f"{value:.0f} s" if 10 <= value < 120 else show_duration(round(value, 1) if value >= 1 else value)


def interval(value: float, low: float | None, high: float | None, unit: str) -> str:
    """`± 0.05` where the interval is even, `(71.9–73.0)` where it is not, "" where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    below, above = value - low, high - value
    half = (high - low) / 2
    if half <= 0:
        return ""
    scale, digits = _scale(value, half, unit)
    if abs(below - above) <= 0.1 * half + 10**-digits / scale:
        return f"± {half * scale:.{digits}f}"
    return f"({low * scale:.{digits}f}–{high * scale:.{digits}f})"


def _scale(value: float, half: float, unit: str) -> tuple[float, int]:
    """Factor and decimals in which an interval is written beside its value."""
    if unit == "share":
        return 100, 2
    if unit == "s" and abs(value) < 1:
        return 1000, 0
    whole = unit != "s" and value == round(value)
    return 1, 0 if whole or half >= 10 else 1 if half >= 1 else 2


def observed(finding: Finding) -> str:
    """`3.10 s ± 0.05`"""
    said = quantity(finding.observed, finding.unit)
    if finding.observed is None and finding.status is Verdict.FAIL and finding.unit == "s":
        return NEVER  # waited for in vain: a record cannot hold infinity
    if finding.observed is None or said in (MISSING, NEVER):
        return said
    spread = interval(finding.observed, finding.low, finding.high, finding.unit)
    return f"{said} {spread}".rstrip()


def limit(finding: Finding) -> str:
    """The limit as it was written down; `–` where there is none."""
    if finding.limit is None:
        return "–"
    return plain_duration(finding.limit) if finding.unit == "s" else quantity(finding.limit, finding.unit)


def is_recovery(finding: Finding) -> bool:
    return finding.objective.lower().startswith(("recover", "fails over"))


def recovered(recovery: Recovery) -> str:
    """`72.4 s ± 0.02`; `not seen` where there was none."""
    if recovery.seconds is None:
        return "not seen"
    spread = interval(recovery.seconds, recovery.low, recovery.high, "s")
    return f"{fine_duration(recovery.seconds)} {spread}".rstrip()


def steps(stages: Mapping[str, float]) -> tuple[tuple[str, float, float], ...]:
    """Stages (seconds after F) as (name, begin, end), each beginning where the one before it ended."""
    done: list[tuple[str, float, float]] = []
    begin = 0.0
    for name, end in sorted(stages.items(), key=lambda item: item[1]):
        done.append((name, begin, max(begin, end)))
        begin = max(begin, end)
    return tuple(done)


def say_steps(recovery: Recovery) -> str:
    """`noticed 9 s · moved 41 s · loaded 20 s`: how long each stage up to the recovery took after the one before it.

    Stages that came after the service was back (replacements that nobody waited for) are told apart.
    """
    until = math.inf if recovery.seconds is None else max(recovery.seconds, recovery.stages.get("steady", 0.0))
    told = steps({name: after for name, after in recovery.stages.items() if after > 0})
    within = " · ".join(f"{name} {plain_duration(end - begin)}" for name, begin, end in told if end <= until)
    later = " · ".join(f"{name} at {plain_duration(end)}" for name, _, end in told if end > until)
    return "; ".join(p for p in (within, f"later {later}" if later else "") if p)


MEANING = {
    Verdict.PASS: "The fault was proven, the load was real, every objective held, and nothing is left behind.",
    Verdict.INCONCLUSIVE: "No result, neither good nor bad: what a verdict rests on was missing.",
    Verdict.FAIL: "An objective was missed.",
    Verdict.ERROR: "It could not begin, or something could not be undone: look at it now.",
}

SPOKEN = frozenset({"run went wrong", "stop condition", "run could not see"})
"""Objectives of findings that stem from a note made while the run went on: the cause, not its consequences."""


def reasons(judgement: Judgement) -> tuple[str, ...]:
    """Why it is not PASS: the findings that decide, the worst first.

    Where the run itself was not sound, only that decides; what was said aloud while it ran comes first.
    """
    bad = [f for f in judgement.findings if f.status is not Verdict.PASS]
    unsound = [f for f in bad if f.phase == "run"]
    if judgement.verdict is not Verdict.FAIL:
        bad = unsound or bad
    bad.sort(key=lambda f: (-f.status.rank, f.objective not in SPOKEN))
    said = tuple(f"{f.phase}: {f.objective} · {because(f)}" for f in bad)
    if not said and not judgement.passed:
        return ("no finding says why",)
    return said


def because(finding: Finding) -> str:
    """What was seen, and the evidence."""
    seen = observed(finding)
    parts = [] if seen == MISSING and finding.evidence else [f"was {seen}" if seen not in (MISSING, NEVER) else seen]
    if finding.evidence:
        parts.append(one_line(finding.evidence))
    return " · ".join(parts)


def one_line(text: str) -> str:
    """The text without line breaks or control characters, so that it cannot draw on a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def counts(value: Counts) -> str:
    """`1,200 planned = 1,170 ok + 28 failed + 0 shed + 2 censored`, or ≠ where requests are unaccounted for."""
    total = value.ok + value.failed + value.shed + value.censored
    sign = "=" if total == value.planned else "≠"
    return (
        f"{value.planned:,} planned {sign} {value.ok:,} ok + {value.failed:,} failed"
        f" + {value.shed:,} shed + {value.censored:,} censored"
    )


def tally(verdicts: Iterable[Verdict]) -> str:
    """`3 PASS · 1 FAIL`, the worst first."""
    seen = list(verdicts)
    return " · ".join(f"{seen.count(v)} {v}" for v in sorted(set(seen), key=lambda v: -v.rank))
