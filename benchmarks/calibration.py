"""How true is the measured recovery time? Planted outages of known length, hundreds of them.

    python benchmarks/calibration.py                    # arrivals drawn from a planted truth: fast, thousands of runs
    python benchmarks/calibration.py --real 8           # 8 minutes of a real server that fails, and real clients

The truth of a planted outage is when a request *sent then* would be good. Reported: the error of the point (p50, p99)
and how often the interval covers the truth, for total outages and for those of a share of the requests; beside them
the naive definition ("from the first bad to the first good after the last bad") on the same requests.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gameday import recovery
from gameday.model import (
    About,
    Event,
    FaultFacts,
    FaultMark,
    Outcome,
    Phase,
    PhaseMark,
    Reply,
    Step,
    Timeline,
)
from gameday.objectives import Recovers

SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3)
HOLD = 5.0


@dataclass(frozen=True, slots=True)
class Planted:
    """One outage: `begin` and `end` are the truth, `apply` and `proof` what the harness knew of its beginning."""

    begin: float
    end: float
    apply: float
    proof: float
    share: float  # of the requests that it hits
    first_token: float | None = None  # the limit, when the outage is one of latency

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Result:
    """One outage, measured: truth, point and interval, seconds; the naive point and interval beside."""

    planted: Planted
    point: float | None
    low: float | None
    high: float | None
    naive: float | None
    naive_covers: bool

    @property
    def error(self) -> float:
        return math.inf if self.point is None else abs(self.point - self.planted.seconds)

    @property
    def covers(self) -> bool:
        return self.low is not None and self.high is not None and self.low <= self.planted.seconds <= self.high


ABOUT = About(
    run="calibration", experiment="planted", seed=0, trial=1, epoch_wall=0.0, epoch_mono=0.0, cluster="", sandbox=True,
    clocks="", namespace="", target="", prometheus="", scrape_interval=1.0, objectives_from="", reproduce="",
    command=(),
)  # fmt: skip


def timeline(planted: Planted, replies: Iterable[Reply], start: float, end: float) -> Timeline:
    """What the harness would have recorded of it: a one-shot fault, and observation until `end`."""
    events: list[Event] = [
        PhaseMark(start, Phase.BEFORE, "start"),
        PhaseMark(planted.apply, Phase.BEFORE, "end"),
        FaultMark(planted.apply, Step.APPLY, True),
        PhaseMark(planted.apply, Phase.DURING, "start"),
        FaultMark(planted.proof, Step.EFFECT, True),
        PhaseMark(end, Phase.DURING, "end"),
    ]
    fault = FaultFacts("planted", "planted outage", one_shot=True, lasting=end - planted.begin, pods=())
    inside = tuple(r for r in replies if start <= r.t_intended < end)
    return Timeline(ABOUT, fault, inside, (), tuple(sorted(events, key=lambda e: e.t)))


def measure(planted: Planted, run: Timeline) -> Result:
    asked = Recovers(within=60.0, hold=HOLD, first_token=planted.first_token)
    found = recovery.measure(run, asked)
    some = [(r.t_intended, asked.good(r)) for r in run.replies if r.counted and r.t_intended >= planted.apply]
    bad = [t for t, good in some if not good]
    back = next((t for t, good in some if good and bad and t > bad[-1]), None)
    naive = None if back is None else back - bad[0]
    covers = back is not None and bad[-1] <= planted.end <= back
    return Result(planted, found.seconds, found.low, found.high, naive, covers)


# ── drawn from the truth ────────────────────────────────────────────────────────────────────────


def draw(rng: random.Random, share: float, background: float) -> Result:
    """One outage of 0.2–30 s under 20–200 requests/s (Poisson) and a canary of 50/s."""
    seconds = math.exp(rng.uniform(math.log(0.2), math.log(30)))
    begin = 5.0 + rng.random()
    early, late = rng.choice([(0.0, 0.0), (0.3, 1.0)])  # F known exactly, or within what a slow proof leaves open
    planted = Planted(begin, begin + seconds, begin - rng.uniform(0, early), begin + rng.uniform(0, late), share)
    end = planted.end + HOLD + 1.5
    replies = list(_drawn_replies(rng, planted, end, rng.uniform(20, 200), background))
    return measure(planted, timeline(planted, replies, 0.0, end))


def _drawn_replies(
    rng: random.Random, planted: Planted, end: float, per_second: float, background: float
) -> Iterator[Reply]:
    phase = rng.random() * 0.02
    times = [phase + i / 50 for i in range(int(end * 50))]
    t = rng.expovariate(per_second)
    while t < end:
        times.append(t)
        t += rng.expovariate(per_second)
    for seq, t in enumerate(sorted(times)):
        hit = planted.begin <= t < planted.end and rng.random() < planted.share
        bad = hit or rng.random() < background
        took = rng.uniform(0.001, 0.01)
        outcome = Outcome.REFUSED if bad else Outcome.OK
        yield Reply(0, seq, "canary", t, t + took, outcome, t_start=t, t_first=None if bad else t + took)


def drawn(runs: int, seed: int) -> dict[str, list[Result]]:
    rng = random.Random(seed)
    return {
        "total": [draw(rng, 1.0, 0.0) for _ in range(runs)],
        **{f"share {s:.2f}": [draw(rng, s, 0.0) for _ in range(runs // 2)] for s in SHARES},
        "total, 0.1 % noise": [draw(rng, 1.0, 0.001) for _ in range(runs // 2)],
        "share 0.33, 0.1 % noise": [draw(rng, 1 / 3, 0.001) for _ in range(runs // 2)],
    }


# ── the figures ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Figures:
    name: str
    runs: int
    error_p50: float
    error_p99: float
    width_p50: float  # of the interval
    covered: float
    naive_covered: float
    missed: tuple[str, ...] = field(default=())


def figures(name: str, results: Sequence[Result]) -> Figures:
    errors = sorted(r.error for r in results)
    widths = sorted(r.high - r.low for r in results if r.high is not None and r.low is not None)
    missed = [r for r in results if not r.covers]
    return Figures(
        name,
        len(results),
        errors[len(errors) // 2],
        errors[min(len(errors) - 1, math.ceil(0.99 * len(errors)) - 1)],
        widths[len(widths) // 2] if widths else math.nan,
        1 - len(missed) / len(results),
        sum(r.naive_covers for r in results) / len(results),
        tuple(f"{r.planted.seconds:.3f} not in [{r.low}, {r.high}]" for r in missed[:5]),
    )


def show(all_figures: Iterable[Figures]) -> None:
    print(f"{'outage':26} {'runs':>5} {'error p50':>10} {'p99':>9} {'width p50':>10} {'covered':>8} {'naive':>7}")
    for f in all_figures:
        print(
            f"{f.name:26} {f.runs:5} {f.error_p50 * 1000:7.1f} ms {f.error_p99 * 1000:6.1f} ms "
            f"{f.width_p50 * 1000:7.1f} ms {f.covered:8.2%} {f.naive_covered:7.1%}"
        )
        for missed in f.missed:
            print(f"    missed: {missed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=400, help="drawn outages of each kind (shares: half of it)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    found = [figures(name, results) for name, results in drawn(options.runs, options.seed).items()]
    show(found)
    if options.json:
        options.json.write_text(json.dumps([{s: getattr(f, s) for s in Figures.__slots__} for f in found], indent=2))
    total = found[0]
    kept = total.error_p99 <= 0.05 and all(f.covered >= 0.99 for f in found)
    print("targets kept" if kept else "targets missed: error ≤ 50 ms at p99 (total), covered ≥ 99 % (all)")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
