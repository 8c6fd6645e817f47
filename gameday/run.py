"""One experiment from preflight to verdict: the only orchestrator.

`Session` owns the life of an experiment (DESIGN 2). Its steps are called in order by `gameday.toolkit`, through
chaoslib; each may be skipped once something went wrong, except `heal` and `finish`, which always run. Everything
that happens is recorded, and only the record is judged.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from faults import undo as undoing
from faults.act import NotInjected, manifests, perform
from faults.base import EXPIRES, MANAGED, RUN, Apply, Cut, Dead, Detected, Fault, Job, Plan, Undo, View
from gameday import clock, record
from gameday.clock import Epoch, Instant
from gameday.cluster import Cluster
from gameday.errors import (
    ClusterError,
    ExperimentError,
    GamedayError,
    HealError,
    LoadError,
    LockError,
    MissingCapability,
    RecordError,
)
from gameday.judge import judge
from gameday.kinds import DEPLOYMENTS, PODS
from gameday.ledger import Ledger, strays
from gameday.lock import Lock
from gameday.model import (
    About,
    Event,
    FaultMark,
    Judgement,
    NodeMark,
    Note,
    Phase,
    PhaseMark,
    Reply,
    Sample,
    Step,
    Timeline,
)
from gameday.objectives import Objective, Objectives, Recovers, override
from gameday.preflight import CHAOS, Preflight
from gameday.settings import Settings
from gameday.units import show_duration
from loadgen import launch, plan as load_plan
from loadgen.traffic import Traffic
from probes.kube import Watcher
from probes.prometheus import TIMEOUT, Prometheus, Sampler
from probes.reach import EVERY, LOST, Reach, Seen
from reports import html
from reports.live import Progress

PACKAGES = (
    "gameday",
    "locust",
    "chaostoolkit-lib",
    "chaostoolkit-kubernetes",
    "kubernetes",
    "prometheus-api-client",
)  # whose versions a record names
SCRAPES = 4  # a judged window holds at least so many scrape intervals
GONE_WITHIN = 10.0  # seconds after the undo until the effect must be seen to be gone
WARM_UP = 2.0  # seconds of load before the steady state is looked at (connections, caches)
WATCH_SILENT = 20.0  # seconds without a sign of life from a watch until it is called blind
DRAIN = 4.0  # seconds that requests under way get at the end
RECENT = 3.0  # seconds that live figures look back
HEALS = 2  # attempts; what is not undone then is for `gameday heal`, and the verdict says so
REBALANCE_WITHIN = 120.0  # seconds for a rollout restart


@dataclass(frozen=True, slots=True)
class Spec:
    """What an experiment asks for."""

    name: str
    traffic: Traffic
    fault: Fault
    objectives: Objectives

    @property
    def recovers(self) -> Recovers | None:
        found = [one for _, one in self.objectives.items() if isinstance(one, Recovers)]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Arena:
    """Where experiments run: a cluster, its Prometheus, the settings, and where records go."""

    cluster: Cluster
    prometheus: Prometheus
    settings: Settings
    run_id: str
    root: Path  # runs/<run-id>
    seed: int
    sandbox: bool
    objectives_from: str
    reproduce: Callable[[str], str]  # experiment → command
    progress: Callable[[Progress], None]
    say: Callable[[str], None]


class Session:
    """One experiment on one arena."""

    def __init__(self, arena: Arena, spec: Spec, trial: int = 1) -> None:
        self._arena, self._trial = arena, trial
        self._cluster, self._settings = arena.cluster, arena.settings
        chosen = arena.settings.objectives.get(spec.name, {})
        self.spec = replace(spec, objectives=override(spec.objectives, chosen)) if chosen else spec
        self._overridden = bool(chosen)
        self.dir = arena.root / (spec.name if trial == 1 else f"{spec.name}.{trial}")
        self._token = f"{secrets.token_hex(3)}"
        self._epoch = Epoch.read()
        self._stop = threading.Event()  # set: no further waiting, heal
        self._lock_guard = threading.Lock()
        self._events: list[Event] = []
        self._samples: list[Sample] = []
        self._replies: list[Reply] = []
        self._recent: deque[Reply] = deque()
        self._in_flight = self._silent = 0
        self._recorder: record.Recorder | None = None
        self._plan: Plan | None = None
        self._about: About | None = None
        self._probers: tuple[Undo, ...] = ()
        self._reported: set[str] = set()  # nodes whose Xid a detector has reported
        self._lock: Lock | None = None
        self._ledger: Ledger | None = None
        self._reach: Reach | None = None
        self._watcher: Watcher | None = None
        self._sampler: Sampler | None = None
        self._load: launch.Load | None = None
        self._phase = "prepare"
        self._phase_ends: Instant = clock.now()
        self._harm: Instant | None = None
        self._undone: list[Undo] = []
        self._healed = self._finished = False
        self._heals = 0
        self._gone: frozenset[str] = frozenset()
        self._breached = False  # a stop condition ended the fault, and nothing else is wrong
        self._record_broken = ""
        self._signalled = 0.0  # when the signal Job ran: detections count from then on
        self.interrupted: int | None = None
        self._baseline = 0.0
        self.judgement: Judgement | None = None

    # ── the record ──────────────────────────────────────────────────────────────────────────

    def emit(self, event: Event) -> None:
        """Record it. Never raises: a full disk must not keep us from healing; it makes the verdict ERROR."""
        with self._lock_guard:
            self._events.append(event)
            try:
                if self._recorder:
                    self._recorder.event(event)
            except (OSError, RecordError) as wrong:
                self._record_broken = self._record_broken or str(wrong)

    def _emit_sample(self, sample: Sample) -> None:
        with self._lock_guard:
            self._samples.append(sample)
            try:
                if self._recorder:
                    self._recorder.sample(sample)
            except (OSError, RecordError) as wrong:
                self._record_broken = self._record_broken or str(wrong)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a console that is gone (EPIPE, EIO, closed)
            self._arena.say(line)

    def note(self, level: str, text: str) -> None:
        self.emit(Note(clock.now(), level, text))  # type: ignore[arg-type]
        if level != "info":
            self._say(f"{level}: {text}")

    def _mark(self, step: Step, ok: bool, what: str = "", detail: str = "", **more: Any) -> None:
        self.emit(FaultMark(more.pop("t", clock.now()), step, ok, what, detail, **more))

    def stop(self, level: str, text: str) -> None:
        """End what is going on: heal, and judge with this note. May be called from any thread.

        The first reason counts, but an error is always noted.
        """
        first = not self._stop.is_set()
        self._breached = level == "fail" and (first or self._breached)
        self._stop.set()
        if first or level == "error":
            self.note(level, text)

    def interrupt(self, number: int) -> None:
        """A signal arrived: stop, heal without waiting for anybody to be ready, and start nothing more."""
        self.interrupted = number
        self.stop("error", f"interrupted by {signal.Signals(number).name}: healing")

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    # ── prepare ─────────────────────────────────────────────────────────────────────────────

    def expected(self) -> float:
        """Seconds that the experiment takes at most, for people."""
        hold = self._hold
        rto = self.spec.recovers.within if self.spec.recovers else hold
        return WARM_UP + self._settings.steady + self.spec.fault.lasting + hold + rto + 15

    @property
    def _hold(self) -> float:
        return self.spec.recovers.hold if self.spec.recovers else self._settings.hold

    def check_spec(self) -> None:
        """Contradictions of the experiment with itself; needs no cluster."""
        _labels(self._settings.selector)
        spec, scrape = self.spec, self._settings.scrape_interval
        if not any(isinstance(one, Objective) for _, one in spec.objectives.items()):
            raise ExperimentError(f"{spec.name} asks nothing of the service: give it objectives.")
        if not spec.objectives.before:
            raise ExperimentError(f"{spec.name} has no steady state: put objectives into before=[…].")
        wanted = spec.recovers.within + spec.recovers.hold if spec.recovers else 0.0
        if spec.fault.lasting < wanted:
            raise ExperimentError(
                f"{spec.name}: the fault lasts {show_duration(spec.fault.lasting)}, less than RTO + hold "
                f"({show_duration(wanted)}): recovery could not be told from our heal."
            )
        for what, length in (("steady", self._settings.steady), ("lasting", spec.fault.lasting), ("hold", self._hold)):
            if length < SCRAPES * scrape:
                raise ExperimentError(
                    f"{spec.name}: {what} = {show_duration(length)} is shorter than {SCRAPES} scrape intervals "
                    f"({show_duration(SCRAPES * scrape)}): Prometheus could not confirm anything."
                )

    def prepare(self) -> None:
        """Preflight, plan, lock, ledger, probers, load: nothing is harmed yet."""
        self.check_spec()
        self._open_record()
        Preflight(self._cluster, self._arena.prometheus, self._settings).demand()
        view = self.view()
        self._plan = plan = self.spec.fault.plan(view)
        self._demand(plan.needs)
        self._write_run()
        self._say(f"{plan.facts.title} · expected to take up to {show_duration(round(self.expected()))}")
        holder = f"{self._arena.run_id}/{self.spec.name}"
        self._lock = Lock(self._cluster, holder, dict(view.labels), cluster_wide=plan.cluster_wide)
        self._lock.acquire(on_lost=lambda: self.stop("error", "the lock was lost to another game day"))
        self._ledger = Ledger(self._cluster, self.dir / "ledger.jsonl", view.name("ledger"), dict(view.labels))
        self._probers = tuple(
            Undo("delete", "prober", name, kind=PODS.kind, namespace=view.namespace, stage="clean")
            for name, _ in view.probers
        )
        self._ledger.write((*plan.undos, *self._probers))
        self._mark(Step.LEDGER, True, detail=f"{len(plan.undos) + len(self._probers)} undos written")
        for what, manifest in manifests(plan.acts):
            self._save(what, manifest)
        self._watcher = Watcher(self._cluster, _labels(view.selector), self._settings.service, self.emit)
        self._watcher.start()
        lasts = self.expected() + 2 * self._settings.heal_within + 60
        self._reach = Reach(self._cluster, view, self._settings.prober_image, lasts)
        self._reach.start(plan, lambda pod: self._save(pod["metadata"]["name"], pod))
        self._start_load()
        self._sampler = Sampler(
            self._arena.prometheus,
            self.spec.objectives.queries(),
            self._settings.scrape_interval,
            self._emit_sample,
        )
        self._sampler.start()

    def _open_record(self) -> None:
        try:
            recorder = record.Recorder(self.dir)
        except OSError as wrong:
            raise RecordError(f"{self.dir} cannot be written: {wrong.strerror}; choose another --runs-dir.") from wrong
        with self._lock_guard:
            self._recorder = recorder
            for event in self._events:  # what came before there was a record
                recorder.event(event)

    def view(self) -> View:
        """The cluster as the fault may see it, now."""
        settings, nodes = self._settings, self._cluster.nodes()
        zones = {node.name: node.zone for node in nodes}
        pods = [pod for pod in self._cluster.pods(zones=zones) if pod.labels.get(MANAGED) != "gameday"]
        engines = {pod.uid for pod in self._cluster.pods(labels=settings.selector, zones=zones)}
        usable = sorted({node.zone for node in nodes if node.ready and not node.unschedulable})
        expires = int(self._epoch.wall + self.expected() + 600)
        return View(
            namespace=settings.namespace,
            selector=settings.selector,
            engines=tuple(pod for pod in pods if pod.uid in engines),
            pods=tuple(pods),
            nodes=nodes,
            token=self._token,
            probers=tuple((f"gd-{self._token}-prober{'-' + zone if zone else ''}", zone) for zone in usable),
            labels={MANAGED: "gameday", RUN: self._arena.run_id, EXPIRES: str(expires)},
            seed=self._arena.seed + self._trial - 1,
            max_share=settings.max_share,
            expendable=settings.expendable,
            allow_node_replacement=settings.allow_node_replacement,
            sandbox=self._arena.sandbox,
        )

    def _demand(self, needs: tuple[str, ...]) -> None:
        if missing := set(needs) - self._cluster.served(CHAOS):
            raise MissingCapability("chaos-mesh", f"This fault needs {', '.join(sorted(missing))}, not served here.")

    def _write_run(self) -> None:
        settings, arena = self._settings, self._arena
        self._about = about = About(
            run=arena.run_id,
            experiment=self.spec.name,
            seed=arena.seed,
            trial=self._trial,
            epoch_wall=self._epoch.wall,
            epoch_mono=self._epoch.mono,
            cluster=f"{self._cluster.name}, Kubernetes {self._cluster.version()}",
            sandbox=arena.sandbox,
            clocks=settings.clocks,
            namespace=settings.namespace,
            target=settings.target,
            prometheus=settings.prometheus,
            scrape_interval=settings.scrape_interval,
            objectives_from=arena.objectives_from if self._overridden else "experiment",
            reproduce=arena.reproduce(self.spec.name),
            command=tuple(sys.argv),
            versions=_versions(),
            settings={key: str(value) for key, value in settings.model_dump(exclude={"objectives"}).items()},
        )
        assert self._plan is not None, "the plan is made first"
        record.write_run(self.dir, about, self._plan.facts, self.spec.objectives, self.spec.traffic.to_json())

    def _save(self, what: str, manifest: Mapping[str, Any]) -> None:
        folder = self.dir / "manifests"
        folder.mkdir(exist_ok=True)
        (folder / f"{what}.yaml").write_text(yaml.safe_dump(dict(manifest), sort_keys=False))

    def _start_load(self) -> None:
        settings = self._settings
        # The plan must outlast everything that may take its time: the heal, and the rebalancing.
        longest = self.expected() + 2 * self._settings.heal_within + REBALANCE_WITHIN + 60
        plan = load_plan.make(self.spec.traffic, self._arena.seed + self._trial - 1, longest)
        plan.write(self.dir / "plan.json")
        self._load = launch.start(
            self.dir / "plan.json",
            target=settings.target,
            model=settings.model,
            out=self.dir,
            workers=settings.load_workers,
            served_by=settings.served_by,
            served_zone=settings.served_zone,
            served_via=settings.served_via,
            api_key_file=settings.api_key_file,
        )

    # ── before ──────────────────────────────────────────────────────────────────────────────

    def before(self) -> None:
        """The steady state must hold for a whole window; otherwise nothing is injected."""
        assert self._load is not None, "prepared"
        self._load.begin(clock.now() + 0.2)
        self._enter("warm-up", WARM_UP)
        self._tick(WARM_UP)
        self._enter(Phase.BEFORE, self._settings.steady)
        self._tick(self._settings.steady)
        if self.stopped:
            return
        now = clock.now()
        seen = self._timeline(PhaseMark(now, Phase.BEFORE, "end"))
        findings = [objective.judge(seen, Phase.BEFORE) for objective in self.spec.objectives.before]
        self._baseline = sum(pod.ready for pod in self._watcher.engines()) if self._watcher else 0
        if missed := [one for one in findings if one.status.rank > 0]:
            told = "; ".join(f"{one.objective}: {_observed(one.observed)} {one.evidence}".strip() for one in missed)
            self.emit(PhaseMark(now, Phase.BEFORE, "end"))
            self.stop("inconclusive", f"the steady state was not reached, nothing was injected ({told})")

    def _timeline(self, *more: Event) -> Timeline:
        """What is known so far, as the judge will see it."""
        assert self._plan is not None
        assert self._about is not None, "planned"
        with self._lock_guard:
            return record.timeline(self._about, self._plan.facts, self._replies, self._samples, [*self._events, *more])

    def _enter(self, phase: Phase | str, lasting: float) -> None:
        self._phase, self._phase_ends = str(phase), clock.now() + lasting
        if isinstance(phase, Phase):
            self.emit(PhaseMark(clock.now(), phase, "start"))

    def _leave(self, phase: Phase) -> None:
        self.emit(PhaseMark(clock.now(), phase, "end"))

    # ── inject ──────────────────────────────────────────────────────────────────────────────

    def inject(self) -> None:
        """All acts in order, each with its control proof and the proof of its effect."""
        assert self._plan is not None and self._watcher is not None and self._reach is not None
        if self.stopped or not self._still_valid(self._plan):
            return
        self._reach.settle()
        for act in self._plan.acts:
            if self._stop.is_set():
                return
            if isinstance(act, Job):
                self._signalled = clock.now()
            if isinstance(act, Apply) and self._harm is None:
                self._leave(Phase.BEFORE)
                self._watcher.aim(frozenset(self._plan.facts.pods))
                self._harm = clock.now()
                self._mark(Step.APPLY, True, act.what, t=self._harm)
                self._enter(Phase.DURING, self._plan.facts.lasting)
            try:
                told = perform(self._cluster, act, self._stop)
            except (NotInjected, ClusterError) as wrong:
                self._mark(Step.INJECTED, False, act.what, str(wrong))
                self.stop("inconclusive", f"{act.what} was not injected: {wrong}")
                return
            self._mark(Step.INJECTED, True, act.what, told)
            if isinstance(act, Apply) and act.proof and not self._prove(act):
                return

    def _still_valid(self, plan: Plan) -> bool:
        """The cluster is still as it was planned for: the same targets, the same other side."""
        try:
            now = self.spec.fault.plan(self.view())
        except GamedayError as wrong:
            self.stop("inconclusive", f"the cluster changed between the plan and the injection: {wrong}")
            return False
        if now.acts != plan.acts:
            changed = sorted(set(now.facts.pods) ^ set(plan.facts.pods)) or ["the pods or nodes beside the targets"]
            what = ", ".join(changed[:4])
            self.stop("inconclusive", f"the cluster changed between the plan and the injection: {what}")
            return False
        return True

    def _prove(self, act: Apply) -> bool:
        """Wait for the independent proof that the act bites."""
        assert self._reach is not None and isinstance(act.proof, Cut | Dead)
        if act.what == "pod-kill" and isinstance(act.proof, Dead):
            self._gone |= frozenset(act.proof.pods)
        until, seen = clock.now() + act.within, self._look(act)
        while not seen.settled and clock.now() < until and not self.stopped:
            self._tick(EVERY / 2)
            seen = self._look(act)
        if not seen.settled:
            self._mark(Step.EFFECT, False, act.what, seen.detail)
            self.stop("inconclusive", f"{act.what} was injected, but its effect was not seen: {seen.detail}")
            return False
        since = max(seen.before, self._harm or 0.0)
        self._mark(Step.EFFECT, True, act.what, seen.detail, t=max(seen.since, since), since=since)
        return True

    def _look(self, act: Apply) -> Seen:
        assert self._reach is not None and isinstance(act.proof, Cut | Dead)
        return self._reach.look(act.proof, self._gone)

    # ── during ──────────────────────────────────────────────────────────────────────────────

    def during(self) -> None:
        """Load goes on until the fault has lasted; its proof and the stop conditions are looked at all the time."""
        assert self._plan is not None
        if self.stopped or self._harm is None:
            return
        self._tick(self._harm + self._plan.facts.lasting - clock.now(), watch_fault=True)

    def _tick(self, seconds: float, *, watch_fault: bool = False, until: Callable[[], bool] | None = None) -> None:
        """Let time pass, following the load and everything that could end the experiment early."""
        end = clock.now() + seconds
        lost: dict[str, int] = {}
        shown = 0.0
        while (left := end - clock.now()) > 0 and not self.stopped:
            clock.pause(min(EVERY, left), self._stop)
            self._follow_load()
            self._check_alive()
            if watch_fault:
                self._check_fault(lost)
            if clock.now() - shown >= 1:
                shown = clock.now()
                self._arena.progress(self._progress())
            if until is not None and until():
                return

    def _follow_load(self) -> None:
        if self._load is None:
            return
        tail = self._load.poll()
        self._in_flight, self._silent = tail.in_flight, tail.silent
        self._replies.extend(tail.replies)
        self._recent.extend(tail.replies)
        horizon = clock.now() - max(RECENT, self._settings.stop_after, self._hold) - 5
        while self._recent and self._recent[0].t_end < horizon:
            self._recent.popleft()

    def _check_alive(self) -> None:
        """Stop conditions (DESIGN 2): each heals at once."""
        if self._load is not None and not self._load.alive():
            self.stop("inconclusive", "a load worker was lost")
        limit = 2 * self._settings.scrape_interval + TIMEOUT  # a question may be under way for TIMEOUT
        if self._sampler is not None and self._sampler.blind_for() > limit:
            why = self._sampler.last_error or "no answer"
            self.stop("inconclusive", f"Prometheus has been blind for {self._sampler.blind_for():.1f} s ({why})")
        if self._watcher is not None and (blind := self._watcher.blind(WATCH_SILENT)):
            self.stop("inconclusive", f"Kubernetes cannot be seen: {blind}")
        if self._harm is not None and not self._healed:
            share = self._share(self._settings.stop_after)
            if share is not None and share < self._settings.stop_below:
                self.stop(
                    "fail",
                    f"success fell to {share:.1%} over {show_duration(self._settings.stop_after)}, "
                    f"below the stop condition of {self._settings.stop_below:.0%}",
                )

    def _share(self, window: float) -> float | None:
        """Success share by completion over the last `window` seconds; None before the fault is that old.

        Requests that hang count as bad already.
        """
        since = clock.now() - window
        if self._harm is None or self._harm > since:
            return None
        some = [reply for reply in self._recent if reply.t_end >= since and reply.counted]
        total = len(some) + self._silent
        return sum(reply.ok for reply in some) / total if total else 0.0

    def _check_fault(self, lost: dict[str, int]) -> None:
        """A lasting effect must be seen until the heal; detectors' reports are noted when they come."""
        assert self._plan is not None and self._reach is not None
        lasting = any(getattr(getattr(act, "proof", None), "lasting", False) for act in self._plan.acts)
        if lasting and (silent := self._reach.silent(EVERY * LOST * 3)):
            self.stop("inconclusive", f"the prober in zone {silent[0]} fell silent, so that the fault cannot be seen")
        for act in self._plan.acts:
            proof = getattr(act, "proof", None)
            if isinstance(act, Apply) and isinstance(proof, Cut | Dead) and proof.lasting:
                seen = self._look(act)
                lost[act.what] = 0 if seen.holds else lost.get(act.what, 0) + 1
                if lost[act.what] > LOST:
                    self._mark(Step.EFFECT, False, act.what, seen.detail)
                    self.stop("inconclusive", f"the effect of {act.what} was lost before the heal: {seen.detail}")
            if isinstance(act, Job) and isinstance(proof, Detected):
                self._check_detected(proof)

    def _check_detected(self, proof: Detected) -> None:
        if self._watcher is None or proof.node in self._reported:
            return
        found = self._watcher.detection(proof.node, proof.xid, self._signalled)
        if found is not None:
            self._reported.add(proof.node)
            self.emit(NodeMark(found.t, proof.node, "detected", "", found.text))
            self._mark(Step.EFFECT, True, "signal", found.text)

    def _progress(self) -> Progress:
        now = clock.now()
        some = [reply for reply in self._recent if reply.t_end >= now - RECENT and reply.counted]
        ttfts = sorted(reply.ttft for reply in some if reply.ttft is not None)
        broken = []
        if self._harm is not None and not self._healed and self._plan is not None:
            broken.append(self._plan.facts.title)
        if self._watcher is not None and self._baseline:
            ready = sum(pod.ready for pod in self._watcher.engines())
            if ready < self._baseline:
                broken.append(f"{self._baseline - ready:.0f} of {self._baseline:.0f} replicas not ready")
        return Progress(
            experiment=self.spec.name,
            phase=self._phase,
            left_seconds=max(0.0, self._phase_ends - now),
            per_second=len(some) / RECENT,
            success=sum(reply.ok for reply in some) / len(some) if some else None,
            ttft_p95=ttfts[min(len(ttfts) - 1, math.floor(0.95 * len(ttfts)))] if ttfts else None,
            broken=tuple(broken),
            in_flight=self._in_flight,
        )

    # ── heal ────────────────────────────────────────────────────────────────────────────────

    def heal(self) -> None:
        """Undo everything of stage "heal", in the plan's order, and see that it is undone. Safe to repeat."""
        if self._ledger is None or self._plan is None or self._healed or self._heals >= HEALS:
            return
        self._heals += 1
        one_shot = self._plan.facts.one_shot
        if self._harm is not None and not self._undone:
            self._demand_detection()
        if self._harm is not None and not self._undone:
            if not one_shot:
                self._mark(Step.UNDO, True)
            self._leave(Phase.DURING)
        self._phase, self._phase_ends = "heal", clock.now() + self._settings.heal_within
        until = clock.now() + 2 * self._settings.heal_within  # for all of them together
        failed = False
        for entry in self._plan.undos:
            if entry not in self._undone:
                failed |= not self._undo(entry, min(self._settings.heal_within, max(2.0, until - clock.now())))
        self._healed = not failed
        if self._harm is not None:
            self._see_gone()
            self._mark(Step.HEALED, not failed, detail=f"{len(self._undone)} of {len(self._plan.undos)} undone")

    def _demand_detection(self) -> None:
        """A signal that no detector has reported until the heal proved nothing."""
        assert self._plan is not None
        for act in self._plan.acts:
            if isinstance(act, Job) and isinstance(act.proof, Detected) and act.proof.node not in self._reported:
                self._check_detected(act.proof)
                if act.proof.node not in self._reported:
                    told = f"no detector reported Xid {act.proof.xid} on {act.proof.node}"
                    self._mark(Step.EFFECT, False, "signal", told)

    def _undo(self, entry: Undo, within: float) -> bool:
        assert self._ledger is not None
        try:
            told = undoing.undo(self._cluster, entry, within=within)
            if entry.running and self.interrupted is None:
                with contextlib.suppress(clock.Waited):  # judged by objectives, not by the heal
                    what = "containers run again"
                    run = partial(undoing.containers_run, self._cluster, entry.running)
                    clock.wait_until(run, within=within, what=what)
                if paused := undoing.still_paused(self._cluster, entry.running):
                    raise HealError(f"{', '.join(paused)} still have the pause image: delete these pods.")
            self._ledger.done(entry)
        except (HealError, ClusterError) as wrong:
            self._mark(Step.RECOVERED, False, entry.what, str(wrong))
            self.note("error", str(wrong))
            return False
        self._undone.append(entry)
        self._mark(Step.RECOVERED, True, entry.what, told)
        return True

    def _see_gone(self) -> None:
        """The effect must be seen to be gone, not only called so."""
        assert self._plan is not None and self._reach is not None
        for act in self._plan.acts:
            proof = getattr(act, "proof", None)
            if not isinstance(act, Apply) or not isinstance(proof, Cut):
                continue
            until, seen = clock.now() + GONE_WITHIN, self._reach.look_gone(proof, self._ready_keys())
            while not seen.settled and clock.now() < until:
                clock.pause(EVERY / 2)
                seen = self._reach.look_gone(proof, self._ready_keys())
            self._mark(Step.GONE, seen.settled, act.what, seen.detail)
        if not any(isinstance(getattr(act, "proof", None), Cut) for act in self._plan.acts):
            fresh = strays(self._cluster, self._arena.run_id)
            kinds = [one for one in fresh if one.kind not in ("Pod", "Job")]
            told = ", ".join(one.name for one in kinds) or "no chaos resource is left"
            self._mark(Step.GONE, not kinds, self._plan.facts.name, told)

    def _ready_keys(self) -> frozenset[str]:
        return self._watcher.ready_keys() if self._watcher else frozenset()

    # ── after ───────────────────────────────────────────────────────────────────────────────

    def after(self) -> None:
        """Load goes on until the service has been back for the hold time, or the window ends."""
        if self._breached and self._healed and self.interrupted is None:
            self._stop.clear()  # the fault was cut short; whether the service comes back is worth knowing all the same
        if self._stop.is_set() or self._harm is None or self._plan is None:
            return
        hold = self._hold
        rto = self.spec.recovers.within if self.spec.recovers else hold
        self._enter(Phase.AFTER, hold + rto + 1)
        if self._plan.rebalance:
            self._rebalance(self._plan.rebalance)
        began = clock.now()
        self._tick(hold + rto + 1, until=lambda: clock.now() - began >= hold + 1 and self._is_back(hold))
        self._leave(Phase.AFTER)

    def _is_back(self, hold: float) -> bool:
        since = clock.now() - hold
        some = [reply for reply in self._recent if reply.t_intended >= since and reply.counted]
        ready = sum(pod.ready for pod in self._watcher.engines()) if self._watcher else 0
        wanted = self.spec.recovers.at_least if self.spec.recovers else 0.99
        return bool(some) and sum(r.ok for r in some) / len(some) >= wanted and ready >= self._baseline

    def _rebalance(self, deployments: tuple[str, ...]) -> None:
        """The named rebalancing step: restart the Deployments, so that the scheduler spreads them again."""
        namespace = self._settings.namespace
        self.note("info", f"rebalancing: rollout restart of {', '.join(deployments)}")
        stamp = {"kubectl.kubernetes.io/restartedAt": f"gameday-{self._token}"}
        patch = {"spec": {"template": {"metadata": {"annotations": stamp}}}}
        for name in deployments:
            self._cluster.patch(DEPLOYMENTS, name, patch, namespace, type="strategic")
        self._phase, self._phase_ends = "rebalance", clock.now() + REBALANCE_WITHIN
        looked = [0.0]

        def rolled_out() -> bool:
            if clock.now() - looked[0] < 0.5:
                return False
            looked[0] = clock.now()
            return all(_rolled_out(self._cluster.get(DEPLOYMENTS, name, namespace)) for name in deployments)

        begun = clock.now()
        self._tick(REBALANCE_WITHIN, until=rolled_out)
        took = clock.now() - begun
        if took >= REBALANCE_WITHIN:
            self.note("fail", f"the rebalancing rollout did not end within {show_duration(REBALANCE_WITHIN)}")
        else:
            self.note("info", f"rebalancing took {took:.1f} s")
        self._phase, self._phase_ends = str(Phase.AFTER), clock.now() + self._hold

    # ── finish ──────────────────────────────────────────────────────────────────────────────

    def finish(self) -> None:
        """Stop the load, take away everything of ours, judge, report. Runs however the experiment went."""
        if self._finished:
            return
        self._finished = True
        self._phase, self._phase_ends = "finish", clock.now() + DRAIN
        try:
            self._end_load()
            if self._sampler:
                self._sampler.stop()
        finally:
            try:
                self._clean()
            finally:
                if self._watcher:
                    self._watcher.stop()
                with self._lock_guard:
                    recorder, self._recorder = self._recorder, None
                if recorder is not None:
                    recorder.close()

    @property
    def allow_missing(self) -> tuple[str, ...]:
        return self._settings.allow_missing

    @property
    def judgeable(self) -> bool:
        """Whether it came so far that there is a record to judge."""
        return self._plan is not None

    def conclude(self) -> Judgement | None:
        """Seal the record, judge it as anyone can do again, and write the report."""
        if self._plan is None:
            return None
        if self._record_broken:
            raise RecordError(
                f"{self.dir}: the record could not be written ({self._record_broken}), so nothing is judged."
            )
        record.seal(self.dir)
        timeline, objectives = record.load(self.dir)
        self.judgement = judge(timeline, objectives)
        record.write_verdict(self.dir, self.judgement)
        html.write(self.dir)
        return self.judgement

    def _end_load(self) -> None:
        if self._load is None:
            return
        try:
            self._load.stop(within=DRAIN)
        except LoadError as wrong:
            self.note("inconclusive", str(wrong))
        self._follow_load()
        self._load = None

    def _clean(self) -> None:
        """What is only ours: probers, ledger, lock. Then look whether anything is left."""
        if self._reach:
            self._reach.stop()
        if self._lock is None:
            return
        left: list[str] = []
        try:
            if self._ledger is not None:
                left += self._clean_ledger(self._ledger)
            left += [f"{one.kind} {one.name}" for one in strays(self._cluster, self._arena.run_id)]
        except (ClusterError, LockError) as wrong:
            left.append(str(wrong))
        try:
            self._lock.release()
        except ClusterError as wrong:
            left.append(f"the lock ({wrong})")
        detail = ", ".join(left) or "nothing of ours is left"
        self._mark(Step.CLEAN, not left, detail=detail)

    def _clean_ledger(self, ledger: Ledger) -> list[str]:
        for entry in self._probers:  # all at once, then each is waited for
            self._cluster.delete(PODS, entry.name, entry.namespace, grace=1)
        for entry in self._probers:
            try:
                undoing.undo(self._cluster, entry, within=self._settings.heal_within)
                ledger.done(entry)
            except HealError as wrong:
                return [str(wrong)]
        if not self._healed:
            return ["the ledger, since not everything is undone: run `gameday heal`"]
        ledger.close()
        return []


def _labels(selector: str) -> dict[str, str]:
    """An equality selector as a mapping; other operators are refused plainly."""
    found = {}
    for part in selector.split(","):
        key, sep, value = part.partition("=")
        if not sep or "!" in key or not key.strip():
            raise ExperimentError(f"The selector {selector!r} must be of the form key=value[,key=value].")
        found[key.strip()] = value.lstrip("=").strip()
    return found


def _observed(value: float | None) -> str:
    return "not measurable" if value is None else f"{value:.4g}"


def _rolled_out(deployment: Mapping[str, Any]) -> bool:
    """As `kubectl rollout status` sees it."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
        and status.get("updatedReplicas", 0) == wanted
        and status.get("replicas", 0) == wanted
        and status.get("availableReplicas", 0) == wanted
    )


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
