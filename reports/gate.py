"""The release gate: may this run go out, by its verdicts and held against the runs before it?

Every verdict is judged anew from its sealed record, never taken from a file that anyone can edit. What is compared
is the upper end of the recovery time and the first-token p95 while the fault lasted. Only like is compared with like
(`Like`), and only runs that passed set the bar. Their noise is measured, from the spread of their own values.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import orjson

from gameday import record
from gameday.errors import RecordError
from gameday.judge import judge
from gameday.model import Judgement, Phase, Timeline, Verdict
from gameday.objectives import FirstToken, Objectives, Recovers
from reports import verdicts, words
from reports.markdown import escape

NEED = 3
"""Baselines without which no noise can be told."""
RESOLUTION = {"recovery": 0.1, "first token": 0.01}
"""Growth in seconds that we cannot tell from none: twice our own error at p99 (DESIGN 11: 50 ms, 5 ms)."""
CERTAINTY = 0.95  # a run like the baselines lies below the noise's upper end so often


@dataclass(frozen=True, slots=True)
class Like:
    """What must be equal for two measurements to be compared. `plan` is the digest of every arrival."""

    experiment: str
    seed: int
    plan: str
    clocks: str
    cluster: str
    namespace: str
    fault: str
    recovers: str


@dataclass(frozen=True, slots=True)
class Noise:
    """The baselines' values (seconds): their median, and the value that another run like them stays below."""

    centre: float
    top: float
    runs: int


@dataclass(frozen=True, slots=True)
class Compared:
    """One measure of one experiment, held against its baselines; seconds. FAIL is a regression."""

    experiment: str
    what: str
    status: Verdict
    observed: float | None
    noise: Noise | None
    evidence: str

    @property
    def row(self) -> tuple[str, ...]:
        status = "REGRESSED" if self.status is Verdict.FAIL else str(self.status)
        return status, self.experiment, self.what, words.quantity(self.observed, "s"), self.evidence


@dataclass(frozen=True, slots=True)
class Gate:
    """The decision. `strict`: what could not be compared closes it, too."""

    run: str
    judgements: tuple[Judgement, ...]
    findings: tuple[Compared, ...]
    notes: tuple[str, ...] = ()
    strict: bool = False
    missing: tuple[str, ...] = ()  # trials that were asked for and never ran, in words

    @property
    def passed(self) -> bool:
        sound = bool(self.judgements) and all(j.passed for j in self.judgements) and not self.missing
        return sound and not self.regressed and not (self.strict and self.unknown)

    @property
    def regressed(self) -> tuple[Compared, ...]:
        return tuple(f for f in self.findings if f.status is Verdict.FAIL)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What could not be compared, in words."""
        found = (f for f in self.findings if f.status is Verdict.INCONCLUSIVE)
        return (*(f"{f.experiment}: {f.what}: {f.evidence}" for f in found), *self.notes)

    @property
    def story(self) -> str:
        """Every verdict (with its reasons where it is not PASS), every comparison, then the decision."""
        return "\n".join([*self._lines(), self._decision()])

    def _lines(self) -> list[str]:
        judged = [(str(j.verdict), j.experiment, "; ".join(words.reasons(j))) for j in self.judgements]
        compared = [f.row for f in sorted(self.findings, key=lambda f: -f.status.rank)]
        absent = (f"{Verdict.INCONCLUSIVE}  {told}" for told in self.missing)
        return [*_aligned(judged), *absent, *_aligned(compared), *(f"NOTE  {note}" for note in self.notes)]

    @property
    def markdown(self) -> str:
        """For CI job pages: the decision, and what it rests on."""
        return "\n".join([f"### {escape(self._decision())}", "", *(f"- {escape(line)}" for line in self._lines()), ""])

    def _decision(self) -> str:
        verdicts_ = words.tally(j.verdict for j in self.judgements) or "no experiment"
        compared = sum(f.status is not Verdict.INCONCLUSIVE for f in self.findings)
        told = [verdicts_, *self.missing, f"{len(self.regressed)} of {compared} compared regressed"]
        if self.unknown:
            told.append(f"{len(self.unknown)} not compared{', which is asked for' if self.strict else ''}")
        return f"gate {'open' if self.passed else 'CLOSED'}: {' · '.join(told)}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def gate(
    current: Path, baselines: Sequence[Path], *, by: float, last: int, need: int = NEED, strict: bool = False
) -> Gate:
    """Hold the run `current` against the `last` like runs that passed among `baselines`.

    `baselines` are runs or directories of runs; those that did not begin before `current` are left out. A measure
    regressed when it lies more than the share `by` of the baselines' median above their noise. Fewer than `need`
    baselines are INCONCLUSIVE, which closes the gate only when `strict`. Raises `RecordError` for records that are
    missing, cut short or edited, of `current` and of every baseline that would count.
    """
    _check(by, last, need)
    now = _measured(current)
    past = sorted(_runs(baselines, current), key=began, reverse=True)
    findings: list[Compared] = []
    for one in now:
        if one.like is not None and one.judgement.passed:
            findings += _compare(one, _baselines(one.like, past, last), by, need)
    absent = tuple(_absent(verdicts.entries(current)))
    return Gate(current.name, tuple(one.judgement for one in now), tuple(findings), _notes(now, past), strict, absent)


def _absent(entries: Sequence[verdicts.Entry]) -> Iterator[str]:
    """Trials without a record, in words: of five that were asked for, the one that ran says little."""
    for pooled in verdicts.trials(entries):
        if pooled.missing:
            yield f"{pooled.experiment}: {pooled.missing} of {pooled.of} trials never ran"


def history(current: Path) -> tuple[Path, ...]:
    """The runs beside `current` that began before it, the newest first: what a directory of runs remembers."""
    return tuple(sorted(_runs([current.resolve().parent], current), key=began, reverse=True))


def began(run_root: Path) -> float:
    """Wall time (Unix seconds) at which the run's first experiment began; 0 where nothing says so."""
    return min((t for e in verdicts.entries(run_root) if (t := _seconds(e.about.get("epoch_wall")))), default=0.0)


def _check(by: float, last: int, need: int) -> None:
    if not 0 <= by < math.inf:
        raise RecordError(f"a regression is a growth by a share of 0 or more (0.1 for 10 %), not {by}")
    if need < 2 or last < need:
        raise RecordError(
            f"noise takes at least 2 baselines, and no more than are asked for: need {need} of the last {last}"
        )


def _seconds(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


# ── one run ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Measured:
    """An experiment of a run, judged anew. `like` None: it died before it had a record."""

    judgement: Judgement  # by the name of its directory, which tells trials apart
    experiment: str
    like: Like | None
    values: tuple[tuple[str, float | None], ...] = ()


def _measured(run_root: Path) -> tuple[_Measured, ...]:
    found = tuple(_current(entry) for entry in verdicts.entries(run_root))
    if not found:
        raise RecordError(f"{run_root} holds no experiment: there is nothing to let through")
    return found


def _current(entry: verdicts.Entry) -> _Measured:
    """One that died, or could not begin, has no seal, and is an ERROR as in every report."""
    directory = entry.dir
    if not (directory / record.SEAL).exists() and not entry.judgement.passed:
        return _Measured(_named(entry.judgement, entry), entry.about.get("experiment", entry.name), None)
    timeline, objectives = record.load(directory)
    judgement = judge(timeline, objectives)
    if record.verdict_json(judgement) != _written(directory / "verdict.json"):
        raise RecordError(
            f"{directory / 'verdict.json'} is not what its record says (edited, or judged by another version): "
            f"`gameday judge {directory}` judges it anew"
        )
    like = _like(_json(directory / verdicts.RUN), directory, objectives)
    values = tuple(_values(timeline, objectives, judgement))
    return _Measured(_named(judgement, entry), like.experiment, like, values)


def _named(judgement: Judgement, entry: verdicts.Entry) -> Judgement:
    return replace(judgement, experiment=entry.name)


def _written(path: Path) -> dict[str, Any]:
    """The verdict as JSON values, as `verdict_json` gives it."""
    return record.verdict_json(record.read_verdict(path.parent))


def _values(timeline: Timeline, objectives: Objectives, judgement: Judgement) -> Iterator[tuple[str, float | None]]:
    """What is compared, seconds; None: not measurable, infinite: never."""
    if judgement.recovery is not None:
        yield "recovery", judgement.recovery.high
    asked = [o for o in objectives.during if isinstance(o, FirstToken) and o.p95 is not None]
    for one in asked or [FirstToken(p95=1.0)]:
        seen = one.judge(timeline, Phase.DURING)
        of = "".join(f", {word}" for word in (one.cls, one.zone and f"zone {one.zone}") if word)
        yield f"first token p95{of}", math.inf if seen.observed is None and seen.samples else seen.observed


def _like(run: dict[str, Any], directory: Path, objectives: Objectives) -> Like:
    about, fault = run["about"], run["fault"]
    recovers = [replace(o, within=1.0) for o in objectives.after if isinstance(o, Recovers)]  # the limit may move
    return Like(
        experiment=about["experiment"],
        seed=about["seed"],
        plan=_plan(directory),
        clocks=about["clocks"],
        cluster=about["cluster"].split(", Kubernetes")[0],  # a new version is what a gate should see
        namespace=about["namespace"],
        fault=f"{fault['name']} {fault.get('zone', '')} {fault['lasting']:g} s",
        recovers=repr(recovers),
    )


def _plan(directory: Path) -> str:
    sealed = _json(directory / record.SEAL)
    try:
        return str(sealed["plan.json"]["sha256"])
    except (KeyError, TypeError) as error:
        raise RecordError(f"{directory / record.SEAL} holds no plan.json: its load is not known") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise RecordError(f"{path} cannot be read") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path}: a JSON object is expected")
    return value


# ── the past ────────────────────────────────────────────────────────────────────────────────────


def _runs(places: Sequence[Path], current: Path) -> Iterator[Path]:
    """The runs at or directly below the places that began before `current`, each once."""
    until, seen = began(current), {current.resolve()}
    for place in places:
        if not place.is_dir():
            raise RecordError(f"{place} is neither a run nor a directory of runs")
        for root in [place] if verdicts.entries(place) else sorted(d for d in place.iterdir() if d.is_dir()):
            if root.resolve() not in seen and 0 < began(root) < until:
                seen.add(root.resolve())
                yield root


@dataclass(frozen=True, slots=True)
class _Past:
    values: tuple[dict[str, float | None], ...]
    left_out: tuple[str, ...]  # like runs that did not pass, by name and verdict
    unlike: Counter[str]  # runs of the experiment that cannot be compared: by what, how many

    @property
    def said(self) -> str:
        """What was not compared, and why; "" where nothing was left aside."""
        left = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        other = ", ".join(f"{n} of another {what}" for what, n in self.unlike.most_common())
        return left + (f"; not compared: {other}" if other else "")


_DIFFERS = {"recovers": "question to Recovers", "plan": "load", "clocks": "set of clocks"}


def _difference(one: Like, other: Like) -> str:
    """The first thing in which they differ, in words; "" where they are alike."""
    name = next((f.name for f in fields(Like) if getattr(one, f.name) != getattr(other, f.name)), "")
    return _DIFFERS.get(name, name)


def _baselines(like: Like, past: Sequence[Path], last: int) -> _Past:
    """The newest `last` like experiments that passed."""
    values: list[dict[str, float | None]] = []
    left_out: list[str] = []
    unlike: Counter[str] = Counter()
    for root in past:
        for entry in verdicts.entries(root):
            if len(values) == last:
                return _Past(tuple(values), tuple(left_out), unlike)
            if entry.about.get("experiment") != like.experiment:
                continue
            if entry.about.get("seed") != str(like.seed):
                unlike["seed"] += 1
                continue
            if not (entry.dir / record.SEAL).exists():
                left_out.append(f"{root.name} died")
                continue
            timeline, objectives = record.load(entry.dir)
            if differs := _difference(like, _like(_json(entry.dir / verdicts.RUN), entry.dir, objectives)):
                unlike[differs] += 1
                continue
            judgement = judge(timeline, objectives)
            if judgement.passed:
                values.append(dict(_values(timeline, objectives, judgement)))
            else:
                left_out.append(f"{root.name} {judgement.verdict}")
    return _Past(tuple(values), tuple(left_out), unlike)


def _compare(one: _Measured, past: _Past, by: float, need: int) -> Iterator[Compared]:
    for what, observed in one.values:
        known = [v for values in past.values if (v := values.get(what)) is not None and math.isfinite(v)]
        status, noise, said = _held(what, observed, known, by, need)
        yield Compared(one.judgement.experiment, what, status, observed, noise, said + past.said)


def _held(
    what: str, observed: float | None, known: Sequence[float], by: float, need: int
) -> tuple[Verdict, Noise | None, str]:
    if len(known) < need:
        return Verdict.INCONCLUSIVE, None, f"{len(known)} like runs that passed are too few to tell noise from growth"
    noise = measure(known)
    if observed is None:
        return Verdict.INCONCLUSIVE, noise, "was not measured"
    beyond = observed - noise.top
    resolution = next(least for name, least in RESOLUTION.items() if what.startswith(name))
    grown = beyond > max(by * noise.centre, resolution)
    told = f"{noise.runs} runs before: median {words.fine_duration(noise.centre)}"
    told += f", noise up to {words.fine_duration(noise.top)}"
    if beyond > 0:
        more = "without end" if math.isinf(beyond) else words.fine_duration(beyond)
        told += f"; beyond it by {more} ({'more' if grown else 'not more'} than {by:.0%} and our own resolution)"
    return (Verdict.FAIL if grown else Verdict.PASS), noise, told


def measure(values: Sequence[float]) -> Noise:
    """The noise in `values`: where one more of the same kind lies with 95 % certainty, and no less than was seen.

    The upper limit of a one-sided prediction interval, mean + t·s·√(1 + 1/n): few baselines make it wide.
    """
    n = len(values)
    spread = statistics.stdev(values)
    top = statistics.fmean(values) + student(n - 1) * spread * math.sqrt(1 + 1 / n)
    return Noise(statistics.median(values), max(top, *values), n)


def student(df: int, p: float = CERTAINTY) -> float:
    """The p-quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 1 % (Cornish–Fisher)."""
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    if df == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = statistics.NormalDist().inv_cdf(p)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3


def _notes(now: Sequence[_Measured], past: Sequence[Path]) -> tuple[str, ...]:
    """What the newest run before had and this one has not: a gate must not open because something was not tried."""
    if not past:
        return ()
    mine = {one.experiment for one in now}
    theirs = {entry.about.get("experiment", entry.name) for entry in verdicts.entries(past[0])}
    return tuple(f"{name} was in {past[0].name} and is not in this run" for name in sorted(theirs - mine))
