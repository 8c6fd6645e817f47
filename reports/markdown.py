"""A summary for CI job pages, in GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gameday.model import Judgement, Verdict
from reports import words
from reports.console import healed, story

_SIGNS = {Verdict.PASS: "✅", Verdict.INCONCLUSIVE: "⚠️", Verdict.FAIL: "❌", Verdict.ERROR: "🛑"}


def summary(judgements: Sequence[Judgement]) -> str:
    """A table of all verdicts, then the story of each that is not PASS."""
    tally = words.tally(j.verdict for j in judgements) or "no experiment ran"
    lines = [
        f"## Game day: {tally}",
        "",
        "| verdict | experiment | recovery | ok / failed | why |",
        "|---|---|---|---|---|",
        *(_row(j) for j in judgements),
        "",
    ]
    for judgement in judgements:
        if not judgement.passed:
            lines += [f"<details><summary>{escape(judgement.experiment)}</summary>", "", _fenced(story(judgement)), ""]
            lines += ["</details>", ""]
    return "\n".join(lines)


def _row(judgement: Judgement) -> str:
    recovery = words.recovered(judgement.recovery) if judgement.recovery else "–"
    why = "<br>".join(escape(r) for r in words.reasons(judgement)) or escape(healed(judgement))
    sign = _SIGNS[judgement.verdict]
    counts = f"{judgement.counts.ok:,} / {judgement.counts.failed:,}"
    return f"| {sign} {judgement.verdict} | {escape(judgement.experiment)} | {recovery} | {counts} | {why} |"


def escape(text: str) -> str:
    """Text that stays text inside a table cell."""
    plain = words.one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#@!])", lambda found: f"&#{ord(found[0])};", plain)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
