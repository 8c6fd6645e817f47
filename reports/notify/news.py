"""What there is to tell of a run, the same for every vendor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gameday.errors import RecordError
from gameday.model import Judgement, Verdict
from gameday.record import plain
from reports import verdicts, words
from reports.verdicts import Entry

UNKNOWN = "an unnamed cluster"


@dataclass(frozen=True, slots=True)
class Item:
    """One experiment: the worst of its judgements, and where its report is published ("" where it is not)."""

    judgement: Judgement
    link: str

    @property
    def name(self) -> str:
        return self.judgement.experiment

    @property
    def verdict(self) -> Verdict:
        return self.judgement.verdict

    @property
    def why(self) -> str:
        return "; ".join(words.reasons(self.judgement))


@dataclass(frozen=True, slots=True)
class News:
    run: str
    cluster: str
    namespace: str
    items: tuple[Item, ...]
    entries: tuple[Entry, ...]
    link: str  # the run's index page
    regressed: tuple[str, ...] = ()  # what got slower than in earlier runs beyond their noise, in words
    closed: str = ""  # why the gate let the run not through, where that is neither a verdict's doing nor a regression's

    @property
    def verdict(self) -> Verdict:
        """The worst; a game day without any experiment is an ERROR, for nobody can have wanted it."""
        return Verdict.worst(i.verdict for i in self.items) if self.items else Verdict.ERROR

    @property
    def headline(self) -> str:
        tally = words.tally(i.verdict for i in self.items) or "no experiment ran"
        slower = f" · {len(self.regressed)} REGRESSED" if self.regressed else ""
        closed = " · gate CLOSED" if self.closed else ""
        return words.one_line(f"Game day on {self.cluster}: {tally}{slower}{closed}")

    def key(self, experiment: str) -> str:
        """The same for an experiment on a cluster in every run, whatever machine it runs on."""
        return f"gameday/{self.cluster}/{experiment}"


def gather(
    run_root: Path,
    judgements: Sequence[Judgement],
    *,
    cluster: str,
    report_url: str,
    regressed: Sequence[str] = (),
    closed: str = "",
) -> News:
    """`judgements` speak; the run directory adds the cluster, and may be missing (an experiment that never began)."""
    try:
        entries = verdicts.entries(run_root)
    except RecordError:
        entries = ()
    run = run_root.resolve().name
    base = f"{report_url.rstrip('/')}/{quote(run)}" if report_url else ""
    trials: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        trials[judgement.experiment].append(judgement)
    worst = [max(of, key=lambda j: j.verdict.rank) for of in trials.values()]
    items = tuple(Item(j, _link(base, j, entries)) for j in worst)
    known = next((e.about for e in entries if "cluster" in e.about), {})
    name = cluster or re.split(r", Kubernetes\b", known.get("cluster", ""))[0] or UNKNOWN
    link = f"{base}/index.html" if base else ""
    return News(run, name, known.get("namespace", ""), items, entries, link, tuple(regressed), closed)


def _link(base: str, judgement: Judgement, entries: Sequence[Entry]) -> str:
    """To the report of this very judgement: a trial has a directory of its own."""
    reported = [e for e in entries if e.reported and e.judgement.experiment == judgement.experiment]
    reported.sort(key=lambda e: e.judgement != judgement)
    return f"{base}/{quote(reported[0].name)}/report.html" if base and reported else ""


def cut(text: str, most: int) -> str:
    """At most so many characters; what is left out is shown as an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def figures(item: Item) -> dict[str, Any]:
    """An experiment's result as JSON values; durations in seconds."""
    judgement, recovery = item.judgement, item.judgement.recovery
    return {
        "experiment": item.name,
        "verdict": str(item.verdict),
        "reasons": list(words.reasons(judgement)),
        "recovery": recovery and plain({"seconds": recovery.seconds, "low": recovery.low, "high": recovery.high}),
        "counts": plain(judgement.counts),
        "seed": judgement.seed,
        "target": judgement.target,
        "reproduce": judgement.reproduce,
        "report": item.link,
    }
