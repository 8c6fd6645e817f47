"""The verdict: a pure function of what was recorded. It fails closed.

First the run itself is judged (phase "run"): was the load what was planned, was the generator fit, was there a
steady state, did the fault act, was it healed? Only a sound run says anything about the service.
ERROR > anything; a run that is not sound is INCONCLUSIVE whatever its findings; else the worst finding counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from gameday import recovery
from gameday.model import (
    Counts,
    FaultMark,
    Finding,
    Heartbeat,
    Judgement,
    LoadEnd,
    Note,
    Outcome,
    Phase,
    PhaseMark,
    PodMark,
    Step,
    Timeline,
    Verdict,
)
from gameday.objectives import Objectives, Recovers
from gameday.objectives.base import where
from gameday.windows import Window, counted, first, marks, of, requests, window

PASS, FAIL, INCONCLUSIVE, ERROR = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR

RUN_QUEUE = 0.05  # share of a second that a load worker may wait for a CPU
DELAY = 0.010  # seconds of schedule delay (p99) that are still the service's latency and not ours
SATURATED_SHARE = 0.05  # of a phase's seconds; what they can hide is said in `fit`
SILENT = 3.0  # seconds without a heartbeat after which a worker is taken for lost
AIMED = 0.5  # of the answers that name a pod must come from pods that are watched; else the fault is diluted
LAST_LOOK = 3.0  # seconds before the heal within which a lasting effect must have been seen
FEWEST_REQUESTS = 50  # in every judged phase
QUIET, QUIET_SHARE = 5.0, 0.25  # seconds, and share of a phase, in which nothing may be sent (by chance: one in 10^5)


def judge(timeline: Timeline, objectives: Objectives) -> Judgement:
    """Hold every objective, and the run itself, against the timeline."""
    findings = tuple(_with_evidence(timeline, phase, o.judge(timeline, phase)) for phase, o in objectives.items())
    run = soundness(timeline, objectives, findings)
    asked = [o for _, o in objectives.items() if isinstance(o, Recovers)]
    measured = recovery.measure(timeline, asked[0]) if asked else None
    about = timeline.about
    return Judgement(
        about.experiment,
        verdict_of(run, findings),
        (*run, *findings),
        measured,
        counts(timeline),
        about.seed,
        about.target,
        about.reproduce,
    )


def _with_evidence(timeline: Timeline, phase: Phase, finding: Finding) -> Finding:
    """A finding that has nothing bad to show names at least the window in which it looked."""
    span = window(timeline, phase)
    if finding.evidence or span is None:
        return finding
    return replace(finding, evidence=f"{finding.samples} looked at, {where(timeline, span.start, span.end)}")


def verdict_of(run: Iterable[Finding], findings: Iterable[Finding]) -> Verdict:
    of_run, of_service = [f.status for f in run], [f.status for f in findings]
    if ERROR in of_run or ERROR in of_service:
        return ERROR
    if INCONCLUSIVE in of_run or not of_service:
        return INCONCLUSIVE
    return Verdict.worst(of_run + of_service)


def counts(timeline: Timeline) -> Counts:
    """What became of the load, by the requests' own records; `planned` by the workers' accounts."""
    by = Counter(_account(r.outcome) for r in timeline.replies)
    planned = sum(e.planned for e in of(timeline, LoadEnd))
    return Counts(planned, by["ok"], by["failed"], by["shed"], by["censored"])


def _account(outcome: Outcome) -> str:
    special = {Outcome.OK: "ok", Outcome.CLIENT_SHED: "shed", Outcome.CENSORED: "censored"}
    return special.get(outcome, "failed")


def soundness(timeline: Timeline, objectives: Objectives, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Findings about the run itself, in the order in which it went."""
    return (
        _load_conserved(timeline),
        _enough(timeline, objectives),
        fit(timeline),
        _aimed(timeline),
        _steady(timeline, findings),
        _cut_short(timeline) or _proven(timeline),
        _healed(timeline),
        _clean(timeline),
        *_notes(timeline),
    )


def _run(objective: str, status: Verdict, evidence: str, observed: float | None = None, **more: object) -> Finding:
    limit, unit, samples = more.get("limit"), more.get("unit", ""), more.get("samples", 0)
    assert limit is None or isinstance(limit, float)
    assert isinstance(unit, str) and isinstance(samples, int)
    return Finding("run", objective, status, observed, limit, unit, samples=samples, evidence=evidence)


def _load_conserved(timeline: Timeline) -> Finding:
    """planned = ok + failed + shed + censored, by each worker's account and by the records themselves."""
    title = "load as planned"
    ends: dict[int, list[LoadEnd]] = {}
    for e in of(timeline, LoadEnd):
        ends.setdefault(e.worker, []).append(e)
    recorded: dict[int, Counter[str]] = {}
    for r in timeline.replies:
        recorded.setdefault(r.worker, Counter())[_account(r.outcome)] += 1
    workers = ends.keys() | recorded.keys() | {h.worker for h in of(timeline, Heartbeat)}
    planned = sum(e.planned for some in ends.values() for e in some)
    troubles = [t for w in sorted(workers) if (t := _worker_trouble(w, ends.get(w, []), recorded.get(w, Counter())))]
    wanted = timeline.about.settings.get("load_workers", "")
    if wanted.isdigit() and int(wanted) != len(workers):
        troubles.append(f"{wanted} load workers were started, {len(workers)} left a record")
    twice = [seq for seq, n in Counter(r.seq for r in timeline.replies).items() if n > 1]
    if twice:
        troubles.append(f"request {min(twice)} is recorded more than once")
    if hole := _hole(timeline):
        troubles.append(hole)
    if not workers:
        troubles.append("no load worker left a record")
    if troubles:
        return _run(title, INCONCLUSIVE, "; ".join(troubles), float(len(timeline.replies)), limit=float(planned))
    return _run(
        title, PASS, f"{len(workers)} workers", float(planned), limit=float(planned), unit="count", samples=planned
    )


def _hole(timeline: Timeline) -> str:
    """A number of the plan that nobody accounts for, although it was due: a worker left no trace at all.

    Numbers follow the order of time. A hole counts when the next request was still due before any worker stopped.
    """
    stopped = min((e.t_stop for e in of(timeline, LoadEnd)), default=0.0)
    due = sorted((r.seq, r.t_intended) for r in timeline.replies)
    for (a, _), (b, t) in pairwise([(-1, 0.0), *due]):
        if b > a + 1 and t < stopped:
            return f"nobody accounts for request {a + 1}, although it was due"
    return ""


def _worker_trouble(worker: int, ends: list[LoadEnd], recorded: Counter[str]) -> str:
    if len(ends) != 1:
        return f"load worker {worker} was lost: it left {len(ends)} final accounts"
    e = ends[0]
    said = {"ok": e.ok, "failed": e.failed, "shed": e.shed, "censored": e.censored}
    if e.planned != sum(said.values()):
        return f"load worker {worker} planned {e.planned} requests and accounts for {sum(said.values())}"
    wrong = [f"{recorded[k]} {k} for {n}" for k, n in said.items() if recorded[k] != n]
    return f"load worker {worker}'s records do not match its account: {', '.join(wrong)}" if wrong else ""


def _enough(timeline: Timeline, objectives: Objectives) -> Finding:
    title = "enough load"
    judged = dict.fromkeys(phase for phase, _ in objectives.items() if phase not in _called_off(timeline))
    spans = {p: window(timeline, p) for p in judged}
    good = {p: sum(1 for r in timeline.replies if w and counted(r) and r.t_intended in w) for p, w in spans.items()}
    few = [f"{p.value}: {n} requests" for p, n in good.items() if n < FEWEST_REQUESTS]
    few += [f"{p.value}: no request for {gap:.0f} s" for p, w in spans.items() if w and (gap := _quiet(timeline, w))]
    shed = _shed_share(timeline)
    if few or shed > SHED_SHARE:
        told = few + ([f"{shed:.1%} of the requests were never sent"] if shed > SHED_SHARE else [])
        return _run(
            title,
            INCONCLUSIVE,
            "; ".join(told),
            float(min(good.values(), default=0)),
            limit=float(FEWEST_REQUESTS),
            unit="count",
        )
    if not judged:
        return _run(title, INCONCLUSIVE, "nothing was asked of the service")
    said = ", ".join(f"{p.value}: {n}" for p, n in good.items())
    return _run(title, PASS, said, float(min(good.values())), limit=float(FEWEST_REQUESTS), unit="count")


def _quiet(timeline: Timeline, span: Window) -> float:
    """The longest time in which nothing was sent, where it is too long: whatever the fault did then, nobody asked."""
    sent = sorted(
        r.t_intended for r in timeline.replies if r.outcome is not Outcome.CLIENT_SHED and r.t_intended in span
    )
    gap = max(b - a for a, b in pairwise([span.start, *sent, span.end]))
    return gap if gap > max(QUIET, QUIET_SHARE * span.length) else 0.0


SHED_SHARE = 0.01  # requests that we did not send although they were planned, in the judged phases


def _shed_share(timeline: Timeline) -> float:
    spans = [w for p in Phase if (w := window(timeline, p))]
    some = [r for r in timeline.replies if any(r.t_intended in w for w in spans)]
    return sum(r.outcome is Outcome.CLIENT_SHED for r in some) / len(some) if some else 0.0


def fit(timeline: Timeline) -> Finding:
    """The load generator kept its schedule in the judged phases, second by second.

    Single seconds of a busy machine are tolerated, one in twenty per phase: latency counts from the intended instant,
    so a late generator can only make the service look slower; and R is bounded by the true send times, so that it
    widens the recovery's interval instead of shifting it.
    """
    title = "load generator fit"
    beats: dict[int, list[Heartbeat]] = {}
    for h in of(timeline, Heartbeat):
        beats.setdefault(h.worker, []).append(h)
    if not beats:
        return _run(title, INCONCLUSIVE, "no heartbeat of a load worker")
    troubles, worst = [], 0.0
    for phase in Phase:
        span = window(timeline, phase)
        if span is None:
            continue
        for worker, some in sorted(beats.items()):
            inside = sorted((h for h in some if h.t in span), key=lambda h: h.t)
            edges = [span.start, *(h.t for h in inside), span.end]
            silent = max(b - a for a, b in pairwise(edges))
            if silent > SILENT:
                troubles.append(f"{phase.value}: no heartbeat of worker {worker} for {silent:.1f} s")
            bad = [h for h in inside if h.run_queue > RUN_QUEUE or h.delay_p99 > DELAY]
            part = len(bad) / len(inside) if inside else 0.0
            worst = max(worst, part)
            if len(bad) > max(1, SATURATED_SHARE * len(inside)):
                top = max(bad, key=lambda h: h.delay_p99)
                troubles.append(
                    f"{phase.value}: worker {worker} saturated in {len(bad)} of {len(inside)} s "
                    f"(delay up to {top.delay_p99 * 1000:.0f} ms, waited {max(h.run_queue for h in bad):.0%} for a CPU)"
                )
    return _run(
        title,
        INCONCLUSIVE if troubles else PASS,
        "; ".join(troubles),
        worst,
        limit=SATURATED_SHARE,
        unit="share",
        samples=sum(len(b) for b in beats.values()),
    )


def _aimed(timeline: Timeline) -> Finding:
    """The requests were served by the pods that are watched and broken, not by some other service.

    And some of them by those that are then broken: the death of a pod that sticky sessions, or a balancer of
    connections, left without a request shows nothing.
    """
    title = "load reaches the system under test"
    span = window(timeline, Phase.BEFORE)
    answers = [r for r in timeline.replies if r.ok and span and r.t_intended in span]
    named = [r for r in answers if r.pod or r.via]
    if not named and not timeline.about.settings.get("served_by", "x-served-by"):
        return _run(title, PASS, "not checked: served_by is empty, so that answers do not name their pod")
    if not named:
        return _run(title, INCONCLUSIVE, "no answer names the pod that served it: set served_by to a header that does")
    pods = {m.pod.rsplit("/", 1)[-1] for m in of(timeline, PodMark)}
    ours = sum(1 for r in named if any(n.rsplit("/", 1)[-1] in pods for n in (r.pod, r.via) if n))
    said = f"{ours} of {len(named)} answers before the fault came from pods of {timeline.about.namespace}"
    share = ours / len(named)
    status = PASS if share >= AIMED else INCONCLUSIVE
    hit = {pod.rsplit("/", 1)[-1] for pod in timeline.fault.pods}
    told = any(r.pod for r in named)  # where only gateways name themselves, nobody knows the engine
    if hit and told and not any(n.rsplit("/", 1)[-1] in hit for r in named for n in (r.pod, r.via) if n):
        status = INCONCLUSIVE
        said += ", and none from those that were broken: the load never reached them"
    return _run(title, status, said, share, limit=AIMED, unit="share", samples=len(answers))


def _steady(timeline: Timeline, findings: tuple[Finding, ...]) -> Finding:
    title = "steady state"
    if window(timeline, Phase.BEFORE) is None:
        return _run(title, INCONCLUSIVE, "the phase before the fault is not complete")
    missed = [f.objective for f in findings if f.phase is Phase.BEFORE and f.status is not PASS]
    if missed:
        return _run(title, INCONCLUSIVE, f"not reached: {', '.join(missed)}")
    if not requests(timeline, Phase.BEFORE):
        return _run(title, INCONCLUSIVE, "no request before the fault")
    needed = [p for p in (Phase.DURING, Phase.AFTER) if p not in _called_off(timeline)]
    absent = [p.value for p in needed if window(timeline, p) is None]
    if absent:
        return _run(title, INCONCLUSIVE, f"the run has no complete phase {' and '.join(absent)}")
    return _run(title, PASS, "held before the fault")


def _called_off(timeline: Timeline) -> frozenset[Phase]:
    """Phases that never began because a stop condition ended the run: their absence is the service's doing."""
    if not any(n.level == "fail" for n in of(timeline, Note)):
        return frozenset()
    begun = {m.phase for m in of(timeline, PhaseMark)}
    return frozenset({Phase.AFTER}) - begun


def _proven(timeline: Timeline) -> Finding:
    """The control plane says that it is injected, and someone else saw that it acts, until the heal."""
    title = "fault proven"
    harm, undo = first(timeline, Step.APPLY), first(timeline, Step.UNDO)
    if harm is None or first(timeline, Step.LEDGER, ok_only=True) is None:
        return _run(title, INCONCLUSIVE, "no harm was sent" if harm is None else "no undo was written before the harm")
    limit = undo if undo is not None and not timeline.fault.one_shot else float("inf")
    for step, what in ((Step.INJECTED, "injected by the control plane"), (Step.EFFECT, "seen to act")):
        some = [m for m in marks(timeline, step) if harm <= m.t <= limit]
        good = [m for m in some if m.ok]
        if not good:
            told = "; ".join(m.detail for m in some if m.detail)
            return _run(title, INCONCLUSIVE, f"not {what} before the heal{': ' + told if told else ''}")
        never = {m.what for m in some} - {m.what for m in good}
        if never:
            return _run(title, INCONCLUSIVE, f"{', '.join(sorted(never))}: never {what}")
        lost = _lost(some)
        if lost is not None and not timeline.fault.one_shot:
            return _run(title, INCONCLUSIVE, f"{lost.what or step.value} was lost before the heal: {lost.detail}")
    until = undo if undo is not None and not timeline.fault.one_shot else harm  # without a heal: see `_healed`
    if unseen := _unseen_at_last(timeline, until):
        told = f"nobody saw that {', '.join(unseen)} still acted right before the heal"
        return _run(title, INCONCLUSIVE, told)
    return _run(title, PASS, "injected, and seen to act")


def _unseen_at_last(timeline: Timeline, until: float) -> list[str]:
    """Parts whose effect lasts, and which nobody saw to act in the end."""
    looks = {m.what: m.t for m in marks(timeline, Step.EFFECT) if m.ok and m.t <= until}
    # A stop condition may end a fault before all of its parts were injected.
    cut_short = any(n.level == "fail" for n in of(timeline, Note))
    asked = [what for what in timeline.fault.watched if what in looks or not cut_short]
    return [what for what in asked if until - looks.get(what, -math.inf) > LAST_LOOK]


def _cut_short(timeline: Timeline) -> Finding | None:
    """A stop condition was met while the proof was awaited: what was done so far has hurt, which is all that counts."""
    harm = first(timeline, Step.APPLY)
    breach = next((n for n in of(timeline, Note) if n.level == "fail"), None)
    if harm is None or breach is None or breach.t < harm:
        return None
    said = [m for step in (Step.INJECTED, Step.EFFECT) for m in marks(timeline, step) if harm <= m.t <= breach.t]
    proven = {m.what for m in said if m.step is Step.EFFECT and m.ok}
    waiting = [m.what for m in said if m.step is Step.INJECTED and m.ok and m.what not in proven]
    if not waiting or not all(m.ok for m in said):
        return None
    return _run("fault proven", PASS, f"a stop condition was met before {', '.join(waiting)} was seen to act")


def _lost(some: list[FaultMark]) -> FaultMark | None:
    """The first look at which a part that had been proven was not there."""
    seen: set[str] = set()
    for m in some:
        if m.ok:
            seen.add(m.what)
        elif m.what in seen:
            return m
    return None


def _healed(timeline: Timeline) -> Finding:
    title = "fault healed"
    if first(timeline, Step.APPLY) is None:
        return _run(title, PASS, "no harm was sent")
    if timeline.fault.one_shot:
        failed = [m for s in (Step.RECOVERED, Step.GONE, Step.HEALED) for m in _latest(timeline, s) if not m.ok]
        if failed:
            return _run(title, ERROR, "; ".join(f"{m.step.value} {m.what}: {m.detail}" for m in failed))
        return _run(title, PASS, "it ends by itself")
    troubles = []
    if first(timeline, Step.UNDO) is None:
        troubles.append("no undo was sent")
    for step in (Step.RECOVERED, Step.GONE, Step.HEALED):
        latest = _latest(timeline, step)
        if not latest:
            troubles.append(f"never seen to be {step.value}")
        troubles += [f"{step.value} {m.what}: {m.detail or 'not ok'}" for m in latest if not m.ok]
    if troubles:
        return _run(title, ERROR, "; ".join(troubles))
    return _run(title, PASS, "recovered in the control plane, and seen to be gone")


def _latest(timeline: Timeline, step: Step) -> list[FaultMark]:
    """The last word on each part: a heal that worked the second time worked."""
    return list({m.what: m for m in marks(timeline, step)}.values())


def _clean(timeline: Timeline) -> Finding:
    title = "cluster clean"
    latest = _latest(timeline, Step.CLEAN)
    if not latest:
        return _run(title, ERROR, "nobody looked whether something of ours is left")
    left = [m.detail or m.what or "something of ours is left" for m in latest if not m.ok]
    return _run(title, ERROR if left else PASS, "; ".join(left) or "nothing of ours is left")


def _notes(timeline: Timeline) -> list[Finding]:
    status = {"error": ERROR, "fail": FAIL, "inconclusive": INCONCLUSIVE}
    title = {"error": "run went wrong", "fail": "stop condition", "inconclusive": "run could not see"}
    return [_run(title[n.level], status[n.level], n.text) for n in of(timeline, Note) if n.level in status]
