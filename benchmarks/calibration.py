"""How true is the measured recovery time? Planted outages of known length, hundreds of them.

    python benchmarks/calibration.py                    # arrivals drawn from a planted truth: fast, thousands of runs
    python benchmarks/calibration.py --real 8           # 8 minutes of a real server that fails, and real clients
    python benchmarks/calibration.py --real 8 --seed 2 --into DIR    # … added to what other chunks left in DIR
    python benchmarks/calibration.py --recorded DIR     # … all of it, measured (again: by the rules of this version)

The truth of a planted outage is when a request *sent then* would be good. Reported: the error of the point (p50, p99)
and how often the interval covers the truth, for total outages and for those of a share of the requests; beside them
the naive definition ("from the first bad to the first good after the last bad") on the same requests.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

sys.path.insert(0, str(Path(__file__).parent.parent))

from gameday import clock, record, recovery
from gameday.judge import fit
from gameday.model import (
    About,
    Event,
    FaultFacts,
    FaultMark,
    Heartbeat,
    Outcome,
    Phase,
    PhaseMark,
    Reply,
    Step,
    Timeline,
    Verdict,
)
from gameday.objectives import Recovers
from loadgen import launch, plan as load_plan
from loadgen.traffic import Deadlines, Fresh, Stream, Traffic, fixed

SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3)
HOLD = 5.0
KNOWN = ((0.0, 0.0), (0.3, 1.0))  # seconds around F: known exactly, or within what a slow proof leaves open


@dataclass(frozen=True, slots=True)
class Planted:
    """One outage: `begin` and `end` are the truth, `apply` and `proof` what the harness knew of its beginning."""

    begin: float
    end: float
    apply: float
    proof: float
    share: float  # of the requests that it hits
    first_token: float | None = None  # the limit, when the outage is one of latency
    blur: float = 0.0  # seconds by which the truth is uncertain (both ends together)

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
    fit: bool = True  # the load generator was, by the judge's own rule; else such a run is INCONCLUSIVE

    @property
    def error(self) -> float:
        return math.inf if self.point is None else abs(self.point - self.planted.seconds)

    @property
    def covers(self) -> bool:
        """Whether the interval holds the truth, which lies anywhere within its blur."""
        if self.low is None or self.high is None:
            return False
        return self.low - self.planted.blur / 2 <= self.planted.seconds <= self.high + self.planted.blur / 2


ABOUT = About(
    run="calibration", experiment="planted", seed=0, trial=1, epoch_wall=0.0, epoch_mono=0.0, cluster="", sandbox=True,
    clocks="", namespace="", target="", prometheus="", scrape_interval=1.0, objectives_from="", reproduce="",
    command=(),
)  # fmt: skip


def timeline(
    planted: Planted, replies: Iterable[Reply], start: float, end: float, beats: Iterable[Heartbeat] = ()
) -> Timeline:
    """What the harness would have recorded of it: a one-shot fault, and observation until `end`."""
    events: list[Event] = [
        PhaseMark(start, Phase.BEFORE, "start"),
        PhaseMark(planted.apply, Phase.BEFORE, "end"),
        FaultMark(planted.apply, Step.APPLY, True),
        PhaseMark(planted.apply, Phase.DURING, "start"),
        FaultMark(planted.proof, Step.EFFECT, True),
        PhaseMark(end, Phase.DURING, "end"),
        *beats,
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
    early, late = rng.choice(KNOWN)
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


# ── a real server, real clients ─────────────────────────────────────────────────────────────────

PAUSE = HOLD + 1.5  # seconds of good service after every outage
BEFORE = 5.0  # seconds of good service before it that are looked at
BLURRED = "truth blurred"
LATE = 0.2  # seconds of a first token that are bad in mode `slow`
KINDS = (("dark", 6), ("hang", 6), ("error", 1), ("error", 2), ("error", 3), ("error", 4), ("slow", 6), ("slow", 2))
CLIENTS: tuple[tuple[float, Fresh], ...] = (
    (20.0, "never"),
    (60.0, "always"),
    (100.0, "never"),
    (150.0, "alternate"),
)  # requests/s; fresh connections


def schedule(rng: random.Random, start: float, length: float) -> list[dict[str, Any]]:
    """Outages of 0.2–30 s, one after the other, in all kinds."""
    found: list[dict[str, Any]] = []
    t = start + 3.0
    while True:
        mode, bad = KINDS[(len(found) + rng.randrange(len(KINDS))) % len(KINDS)]
        seconds = math.exp(rng.uniform(math.log(0.2), math.log(30)))
        if t + seconds + PAUSE > start + length:
            return found
        found.append({"begin": t, "end": t + seconds, "mode": mode, "bad": bad})
        t += seconds + PAUSE + rng.random()


@dataclass(frozen=True, slots=True)
class Session:
    """What one server and one load generator left: raw, so that it can be measured again by better rules."""

    per_second: float
    fresh: str
    seed: int
    client: int
    planted: tuple[dict[str, Any], ...]  # as `planted_server.py` wrote them
    replies: tuple[Reply, ...]
    beats: tuple[Heartbeat, ...]

    def write(self, path: Path) -> None:
        head = {"per_second": self.per_second, "fresh": self.fresh, "seed": self.seed, "client": self.client}
        lines = [
            head,
            *({"planted": one} for one in self.planted),
            *({"beat": record.plain(one)} for one in self.beats),
            *({"reply": record.plain(one)} for one in self.replies),
        ]
        part = path.with_name(path.name + ".part")  # a chunk that was cut off leaves no half session
        with gzip.open(part, "wb", compresslevel=3) as file:
            file.writelines(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Session:
        with gzip.open(path, "rb") as file:
            head, *lines = (orjson.loads(line) for line in file)
        return cls(
            **head,
            planted=tuple(one["planted"] for one in lines if "planted" in one),
            replies=tuple(record.build(Reply, one["reply"], str(path)) for one in lines if "reply" in one),
            beats=tuple(record.build(Heartbeat, one["beat"], str(path)) for one in lines if "beat" in one),
        )


def session(seed: int, client: int, length: float) -> Session:
    """One server and one load generator for `length` seconds."""
    per_second, fresh = CLIENTS[client]
    rng = random.Random(f"{seed}/{client}")
    main = Stream(name="chat", per_second=per_second, prompt=fixed(4), output=fixed(1), fresh=fresh)
    canary = Stream(
        name="canary", per_second=50, prompt=fixed(4), output=fixed(1), arrivals="constant", fresh="alternate"
    )
    traffic = Traffic(streams=(main, canary), deadlines=Deadlines(connect=1.0, first_token=1.0, total=2.0))
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        begin = time.monotonic() + 5.0
        (out / "schedule.json").write_text(json.dumps(schedule(rng, begin, length)))
        load_plan.make(traffic, rng.randrange(1 << 30), length).write(out / "plan.json")
        command = [sys.executable, str(Path(__file__).with_name("planted_server.py"))]
        server = subprocess.Popen(
            [*command, str(out / "schedule.json"), str(out / "truth.jsonl")],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        load = None
        try:
            assert server.stdout is not None
            target = f"http://127.0.0.1:{int(server.stdout.readline())}"
            load = launch.start(out / "plan.json", target=target, model="planted", out=out)
            load.begin(begin)
            clock.pause(begin + length - clock.now())
            load.stop(within=3.0)
            tail = load.poll()
        finally:
            if load is not None:
                load.kill()
            server.kill()
            server.wait()
        planted = tuple(json.loads(line) for line in (out / "truth.jsonl").read_text().splitlines())
    replies = tuple(sorted(tail.replies, key=lambda r: r.t_intended))
    return Session(per_second, fresh, seed, client, planted, replies, tail.beats)


BLUR = 0.03  # seconds by which the truth itself may be uncertain


def measured(one: Session) -> dict[str, list[Result]]:
    """Every planted outage, measured on its own; those whose truth is blurred, since the server was late, apart."""
    rng = random.Random(f"{one.seed}/{one.client}/what the harness knew")
    found: dict[str, list[Result]] = {}
    for outage in one.planted:
        share = outage["bad"] / 6
        (begin, begun), (end, ended) = outage["begin"], outage["end"]
        early, late = rng.choice(KNOWN)
        apply, proof = begin - rng.uniform(0, early), begun + rng.uniform(0, late)
        limit = LATE if outage["mode"] == "slow" else None
        blur = (begun - begin) + (ended - end)
        planted = Planted((begin + begun) / 2, (end + ended) / 2, apply, proof, share, limit, blur)
        run = timeline(planted, one.replies, apply - BEFORE, ended + PAUSE - 0.5, one.beats)
        name = f"{outage['mode']} {share:.2f}" if share < 1 else f"{outage['mode']}, total"
        is_fit = fit(run).status is Verdict.PASS
        found.setdefault(name if blur <= BLUR else BLURRED, []).append(replace(measure(planted, run), fit=is_fit))
    return found


def real(minutes: float, seed: int, into: Path) -> None:
    """All kinds of clients at once, for some minutes; what they leave goes into the directory."""
    into.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        jobs = [pool.submit(session, seed, i, minutes * 60) for i in range(len(CLIENTS))]
        for i, job in enumerate(jobs):
            job.result().write(into / f"session.{seed}.{i}.jsonl.gz")


def recorded(into: Path) -> dict[str, list[Result]]:
    """All outages of all chunks that were recorded there."""
    found: dict[str, list[Result]] = {}
    for path in sorted(into.glob("session.*.jsonl.gz")):
        for name, results in measured(Session.read(path)).items():
            found.setdefault(name, []).extend(results)
    return dict(sorted(found.items()))


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
    print(f"{'outage':28} {'runs':>5} {'error p50':>10} {'p99':>9} {'width p50':>10} {'covered':>8} {'naive':>7}")
    for f in all_figures:
        print(
            f"{f.name:28} {f.runs:5} {f.error_p50 * 1000:7.1f} ms {f.error_p99 * 1000:6.1f} ms "
            f"{f.width_p50 * 1000:7.1f} ms {f.covered:8.2%} {f.naive_covered:7.1%}"
        )
        for missed in f.missed:
            print(f"    missed: {missed}")


TOTALS = ("dark, total", "hang, total", "error, total", "slow, total", "total")  # whose error must be ≤ 50 ms at p99


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=400, help="drawn outages of each kind (shares: half of it)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--real", type=float, metavar="MINUTES", help="a real server that fails, and real clients")
    parser.add_argument("--into", type=Path, metavar="DIR", help="with --real: add what was recorded to this directory")
    parser.add_argument("--recorded", type=Path, metavar="DIR", help="the figures of all that was recorded there")
    options = parser.parse_args()
    if options.real:
        with tempfile.TemporaryDirectory() as name:
            into = options.into or Path(name)
            real(options.real, options.seed, into)
            results = recorded(into)
    else:
        results = recorded(options.recorded) if options.recorded else drawn(options.runs, options.seed)
    return report(results, options.json)


def report(results: Mapping[str, Sequence[Result]], into: Path | None = None) -> int:
    """Print the figures; 0 when the targets are kept, by everything that a judge would not have refused to judge."""
    found = [figures(name, some) for name, some in results.items() if some]
    show(found)
    if into:
        into.write_text(json.dumps([{s: getattr(f, s) for s in Figures.__slots__} for f in found], indent=2))
    judged = {name: some for name, some in results.items() if name != BLURRED}
    totals = [r for name in TOTALS for r in judged.get(name, ())]
    if not totals:
        print("too few outages for a figure: run it for longer")
        return 1
    every = [r for some in judged.values() for r in some]
    whole, everything = figures("all total ones", totals), figures("all", every)
    show([whole, everything])
    if strained := [r for r in every if not r.fit]:
        # These count above as well: the interval must cover what a judge refuses to judge, too.
        show([figures("of these, generator not fit", strained)])
    kept = whole.error_p99 <= 0.05 and everything.covered >= 0.99
    print("targets kept" if kept else "targets missed: error ≤ 50 ms at p99 (total), covered ≥ 99 % (all)")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
