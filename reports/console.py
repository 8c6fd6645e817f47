"""What the terminal shows: the story of one experiment and the table of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gameday.model import Finding, Judgement, Recovery, Verdict
from reports import words

STYLES = {
    Verdict.PASS: "bold green",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.FAIL: "bold red",
    Verdict.ERROR: "bold white on red",
}
ENOUGH = 120  # characters of evidence for a finding that nobody has to look into; the report has all of it
PLAIN_WIDTH = 140  # columns where there is no terminal to ask: CI logs scroll sideways better than they wrap


def story(judgement: Judgement) -> str:
    """One line per finding and how it was healed and can be repeated; plain text, aligned.

    Sound soundness findings (phase "run") are left out; the report has them.
    """
    shown = [f for f in judgement.findings if f.phase != "run" or f.status is not Verdict.PASS]
    rows = [(str(f.status), str(f.phase), f.objective, words.observed(f), _evidence(f, judgement)) for f in shown]
    lines = _aligned(rows) if rows else [f"{judgement.verdict}  nothing was judged"]
    return "\n".join([*lines, _last(judgement)])


def story_text(judgement: Judgement) -> Text:
    """`story`, its status words coloured."""
    text = Text(story(judgement))
    for verdict, style in STYLES.items():
        text.highlight_regex(rf"(?m)^{verdict}\b", style)
    return text


def _evidence(finding: Finding, judgement: Judgement) -> str:
    recovery = judgement.recovery
    said = words.one_line(finding.evidence)
    if words.is_recovery(finding) and recovery is not None and recovery.stages:
        said = _recovery_evidence(said, recovery)
    if finding.status is Verdict.PASS and len(said) > ENOUGH:
        return f"{said[:ENOUGH].rstrip()}…"
    return said


def _recovery_evidence(evidence: str, recovery: Recovery) -> str:
    """The stages as steps, and what else the recovery's story and the finding say."""
    why = evidence.replace(words.one_line(recovery.story), "").strip("; ")
    more = [part for part in recovery.story.split(" · ") if part.split(" ")[0] not in recovery.stages]
    said = "; ".join(p for p in (why, *(m for m in more if m != why)) if p)
    told = words.say_steps(recovery)
    return "  ".join(p for p in (f"({told})" if told else "", said) if p)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell or "") for cell in column) for column in zip_longest(*rows)]
    gaps = ("  ", "  ", "   ", "   ", "")
    return [
        "".join(f"{cell:<{width}}{gap}" for cell, width, gap in zip(row, widths, gaps, strict=True)).rstrip()
        for row in rows
    ]


def _last(judgement: Judgement) -> str:
    return f"{healed(judgement)} · reproduce: {words.one_line(judgement.reproduce)}"


def healed(judgement: Judgement) -> str:
    """`healed 4/4, verified clean`, as far as the findings know it."""
    told = {f.objective: f for f in judgement.findings if f.phase == "run"}
    parts = [said(told[name]) for name, said in (("fault healed", _undone), ("cluster clean", _clean)) if name in told]
    return ", ".join(parts) or "whether it was healed is not known"


def _undone(finding: Finding) -> str:
    if finding.status is not Verdict.PASS:
        return f"NOT HEALED: {words.one_line(finding.evidence)}"
    if finding.observed is not None and finding.limit is not None:
        return f"healed {finding.observed:.0f}/{finding.limit:.0f}"
    return "healed" if "recovered" in finding.evidence else words.one_line(finding.evidence)


def _clean(finding: Finding) -> str:
    return "verified clean" if finding.status is Verdict.PASS else f"NOT CLEAN: {words.one_line(finding.evidence)}"


def table(judgements: Iterable[Judgement]) -> Table:
    """All verdicts, with the measured recovery and the reasons of each that is not PASS."""
    shown = Table(title="Verdicts", title_justify="left", header_style="bold", pad_edge=False)
    shown.add_column("verdict", no_wrap=True)
    shown.add_column("experiment", no_wrap=True)
    shown.add_column("recovery", no_wrap=True)
    shown.add_column("ok / failed", justify="right", no_wrap=True)
    shown.add_column("why", ratio=1)
    for judgement in judgements:
        recovery = words.recovered(judgement.recovery) if judgement.recovery else "–"
        why = "\n".join(words.reasons(judgement)) or healed(judgement)
        shown.add_row(
            Text(judgement.verdict, style=STYLES[judgement.verdict]),
            Text(judgement.experiment),
            Text(recovery),
            Text(f"{judgement.counts.ok:,} / {judgement.counts.failed:,}"),
            Text(why),
        )
    return shown


def console(file: TextIO | None = None) -> Console:
    """A console that colours on terminals only, and there not under NO_COLOR; wide where there is no terminal."""
    made = Console(file=file, highlight=False, emoji=False, markup=False)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


def show(judgements: Sequence[Judgement], file: TextIO | None = None) -> None:
    """Print the stories of those that are not PASS, then the table of all."""
    out = console(file)
    for judgement in judgements:
        if not judgement.passed:
            out.print(Text(judgement.experiment, style="bold"))
            out.print(story_text(judgement), soft_wrap=True)
            out.print()
    out.print(table(judgements))
    out.print(Text(words.tally(j.verdict for j in judgements) or "no experiment ran"))
