"""Timelines with a planted truth: what the tests of the judge, and its calibration, are made of."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from gameday.model import (
    About,
    Event,
    FaultFacts,
    FaultMark,
    Heartbeat,
    LoadEnd,
    NodeMark,
    Outcome,
    Phase,
    PhaseMark,
    PodMark,
    Reply,
    Sample,
    Step,
    Timeline,
)
from gameday.record import timeline as ordered

ABOUT = About(
    run="r1",
    experiment="zone_outage",
    seed=7419,
    trial=1,
    epoch_wall=1_700_000_000.0,
    epoch_mono=0.0,
    cluster="sandbox 1.32",
    sandbox=True,
    clocks="compressed",
    namespace="llm",
    target="http://10.0.0.1:8000",
    prometheus="http://127.0.0.1:9090",
    scrape_interval=1.0,
    objectives_from="experiment",
    reproduce="pytest experiments -k zone_outage --seed 7419",
    command=("pytest",),
)
FAULT = FaultFacts(
    name="zone outage",
    title="zone b is gone",
    one_shot=False,
    lasting=30.0,
    pods=("llm/engine-b",),
    nodes=("node-b",),
    zone="b",
)
BEFORE, HARM, PROOF, UNDO, GONE, AFTER, END = 80.0, 100.0, 100.3, 130.0, 130.4, 130.5, 160.0


@dataclass
class Plant:
    """A run in which `bad(t)` says whether a request that is sent at t fails; change it, then `build()`."""

    bad: Callable[[float], bool] = lambda _t: False
    per_second: float = 50.0
    poisson: float = 0.0
    seed: int = 1
    until: float = END
    fault: FaultFacts = FAULT
    about: About = ABOUT
    pods: tuple[str, ...] = ("engine-a", "engine-b", "engine-c")
    ttft: Callable[[float], float] = lambda _t: 0.05
    extra: Sequence[Event] = ()
    samples: Sequence[Sample] = ()

    def replies(self) -> list[Reply]:
        rng = random.Random(self.seed)
        times = [BEFORE + i / self.per_second for i in range(int((self.until - BEFORE) * self.per_second))]
        t = BEFORE
        while self.poisson:
            t += rng.expovariate(self.poisson)
            if t >= self.until:
                break
            times.append(t)
        return [self._reply(seq, t) for seq, t in enumerate(sorted(times))]

    def _reply(self, seq: int, t: float) -> Reply:
        if self.bad(t):
            return Reply(0, seq, "canary", t, t + 0.002, Outcome.REFUSED, t_start=t)
        first = t + self.ttft(t)
        pod = self.pods[seq % len(self.pods)]
        zone = pod[-1]
        return Reply(
            0, seq, "canary", t, first + 0.02, Outcome.OK, t_start=t, t_first=first, itl=(0.02,), tokens=2,
            completion_tokens=2, got_done=True, finish_reason="stop", pod=pod, zone=zone, status=200,
        )  # fmt: skip

    def events(self) -> list[Event]:
        heal: list[Event] = [
            FaultMark(UNDO, Step.UNDO, True),
            *(FaultMark(GONE, s, True) for s in (Step.RECOVERED, Step.GONE, Step.HEALED)),
        ]
        return [
            PhaseMark(BEFORE, Phase.BEFORE, "start"),
            PhaseMark(HARM - 0.1, Phase.BEFORE, "end"),
            FaultMark(HARM - 0.05, Step.LEDGER, True),
            PhaseMark(HARM, Phase.DURING, "start"),
            FaultMark(HARM, Step.APPLY, True),
            FaultMark(HARM + 0.2, Step.INJECTED, True),
            FaultMark(PROOF, Step.EFFECT, True, "probe across the cut"),
            *([] if self.fault.one_shot else heal),
            PhaseMark(UNDO, Phase.DURING, "end"),
            PhaseMark(AFTER, Phase.AFTER, "start"),
            PhaseMark(self.until, Phase.AFTER, "end"),
            FaultMark(self.until + 1, Step.CLEAN, True),
            *(self.pods_and_nodes()),
            *(Heartbeat(BEFORE + s, 0, 5, 0, 0, 0, 0, 0.001, 0.01, 0.3) for s in range(int(self.until - BEFORE) + 2)),
            *self.extra,
        ]

    def pods_and_nodes(self) -> list[Event]:
        found: list[Event] = []
        for pod in self.pods:
            zone = pod[-1]
            found.append(NodeMark(BEFORE - 5, f"node-{zone}", "exists", zone))
            found.append(PodMark(BEFORE - 5, f"llm/{pod}", f"uid-{pod}", "exists", f"node-{zone}", zone, "engine"))
            found.append(PodMark(BEFORE - 4, f"llm/{pod}", f"uid-{pod}", "ready", f"node-{zone}", zone, "engine"))
        return found

    def build(self) -> Timeline:
        return run_of(self.replies(), self.events(), self.samples, self.fault, self.about)


def run_of(
    replies: Iterable[Reply],
    events: Iterable[Event],
    samples: Iterable[Sample] = (),
    fault: FaultFacts = FAULT,
    about: About = ABOUT,
) -> Timeline:
    """A timeline whose load workers' accounts match the requests."""
    replies = list(replies)
    return ordered(about, fault, replies, list(samples), [*events, *accounts(replies)])


def accounts(replies: Iterable[Reply], t: float = END + 2) -> list[LoadEnd]:
    by: dict[int, Counter[str]] = {}
    for r in replies:
        kind = {Outcome.OK: "ok", Outcome.CLIENT_SHED: "shed", Outcome.CENSORED: "censored"}.get(r.outcome, "failed")
        by.setdefault(r.worker, Counter())[kind] += 1
    return [
        LoadEnd(t, w, sum(n.values()), n["ok"], n["failed"], n["shed"], n["censored"], t) for w, n in sorted(by.items())
    ]


def without(timeline: Timeline, drop: Callable[[Event], bool]) -> Timeline:
    return replace(timeline, events=tuple(e for e in timeline.events if not drop(e)))


def between(start: float, end: float) -> Callable[[float], bool]:
    return lambda t: start <= t < end
