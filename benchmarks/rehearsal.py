"""Figures of a rehearsal, from its record: `python benchmarks/rehearsal.py runs/<id>` (default: the newest).

Per experiment: apply → injected (control proof), apply → effect seen, undo → healed, the measured recovery, requests;
for one that was stopped (a breached condition, a signal) also the reason → healed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: it has a loadgen.py

from gameday import record  # noqa: E402
from gameday.model import FaultMark, Note, Step, Timeline  # noqa: E402


def first(timeline: Timeline, step: Step) -> float | None:
    """The step's first mark after the first harm; None where there is none."""
    marks = [e for e in timeline.events if isinstance(e, FaultMark) and e.step is step]
    harm = min((e.t for e in timeline.events if isinstance(e, FaultMark) and e.step is Step.APPLY), default=None)
    return min((e.t for e in marks if harm is None or e.t >= harm), default=None)


def stopped(timeline: Timeline) -> str:
    """Why it was stopped in mid-fault, and how long it took from then until it was healed; "" where it was not."""
    undo, healed = first(timeline, Step.UNDO), first(timeline, Step.HEALED)
    ends = undo if undo is not None else healed  # a one-shot fault has nothing to undo
    notes = [e for e in timeline.events if isinstance(e, Note) and e.level in ("fail", "inconclusive", "error")]
    why = next((note for note in notes if ends is not None and note.t <= ends), None)
    return f"\n{'':<16}{took(why.t, healed)} from: {why.text}" if why is not None else ""


def took(start: float | None, end: float | None) -> str:
    return "–" if start is None or end is None else f"{(end - start) * 1000:.0f} ms"


def main(root: Path) -> None:
    columns = f"{'experiment':<16}{'verdict':<14}{'injected':>10}{'effect':>10}{'healed':>10}"
    print(f"{root}\n{columns}   recovery (s)      ok / failed")
    for directory in sorted(path.parent for path in root.glob("*/verdict.json")):
        timeline, _ = record.load(directory)
        verdict = record.read_verdict(directory)
        apply = first(timeline, Step.APPLY)
        cells = [took(apply, first(timeline, step)) for step in (Step.INJECTED, Step.EFFECT)]
        cells.append(took(first(timeline, Step.UNDO), first(timeline, Step.HEALED)))
        back = verdict.recovery
        seen = "not seen"
        if back is not None and back.seconds is not None:
            seen = f"{back.seconds:.2f} ({back.low:.2f}–{back.high:.2f})"
        counts = f"{verdict.counts.ok} / {verdict.counts.failed}"
        print(
            f"{directory.name:<16}{verdict.verdict:<14}{''.join(f'{cell:>10}' for cell in cells)}   {seen:<18}{counts}"
            f"{stopped(timeline)}"
        )


if __name__ == "__main__":
    roots = sorted(Path("runs").glob("*/"))
    if len(sys.argv) < 2 and not roots:
        sys.exit("No run directory: run `make gameday` first, or name one.")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else roots[-1])
