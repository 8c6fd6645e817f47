"""One experiment from preflight to verdict: the only orchestrator.

`Session` owns the life of an experiment (DESIGN 2). Its steps are called in order by `gameday.toolkit`, through
chaoslib; each may be skipped once something went wrong, except `heal` and `finish`, which always run. Everything
that happens is recorded (`gameday.tape`), and only the record is judged.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from faults.act import NotInjected, manifests, perform
from faults.base import EXPIRES, MANAGED, RUN, Act, Job, Plan, Undo, View, harmful, name_for
from faults.chaostoolkit import ChaosToolkit
from gameday import activities, clock, finish, leave, radius, record
from gameday.activities import OutOfTolerance
from gameday.censor import censored
from gameday.clock import Epoch, Instant
from gameday.cluster import Obj
from gameday.effects import Effects, lasting
from gameday.errors import ClusterError, ExperimentError, GamedayError, LockError, RecordError, TargetError
from gameday.flow import DRAIN, RECENT, Flow
from gameday.guard import Guard
from gameday.halt import Ear
from gameday.heal import Healer
from gameday.judge import judge
from gameday.kinds import DEPLOYMENTS, PODS
from gameday.ledger import Ledger
from gameday.lock import Lock
from gameday.model import About, FaultMark, Judgement, Phase, PhaseMark, Step
from gameday.objectives import override
from gameday.preflight import Preflight
from gameday.spec import WARM_UP, Arena as Arena, Spec as Spec, labels_of
from gameday.tape import Level, Tape
from gameday.units import show_duration
from gameday.witness import Witness
from probes.kube import Watcher
from probes.prometheus import Sampler
from probes.reach import EVERY, Reach
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
HEALS = 2  # attempts; what is not undone then is for `gameday heal`, and the verdict says so
LONGEST = 60.0  # seconds after its time until whatever has an end of its own has ended by itself
REBALANCE_WITHIN = 120.0  # seconds for a rollout, at least


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
        self.tape = Tape(arena.say, arena.progress)
        self._flow = Flow(keep=max(RECENT, self._settings.stop_after, spec.hold(self._settings)))
        self._plan: Plan | None = None
        self._before: View | None = None  # the cluster as the plan was made for it
        self._about: About | None = None
        self._probers: tuple[Undo, ...] = ()
        self._holder = f"{arena.run_id}/{self.dir.name}"  # of the lock
        self._lock: Lock | None = None
        self._ledger: Ledger | None = None
        self._healer: Healer | None = None
        self._reach: Reach | None = None
        self._watcher: Watcher | None = None
        self._sampler: Sampler | None = None
        self._guard: Guard | None = None
        self._effects: Effects | None = None
        self._phase = "prepare"
        self._phase_ends: Instant = clock.now()
        self._harm: Instant | None = None
        self._healed = self._finished = False
        self._heals = 0
        self._baseline = 0.0
        self.judgement: Judgement | None = None

    # ── the stop ────────────────────────────────────────────────────────────────────────────

    def stop(self, level: Level, text: str) -> None:
        self.tape.stop(level, text)

    def interrupt(self, number: int) -> None:
        self.tape.interrupt(number)

    @property
    def interrupted(self) -> int | None:
        return self.tape.interrupted

    @property
    def stopped(self) -> bool:
        return self.tape.stopped

    # ── prepare ─────────────────────────────────────────────────────────────────────────────

    def check_spec(self) -> None:
        """Contradictions of the experiment with itself; needs no cluster."""
        self.spec.check(self._settings)

    def prepare(self) -> None:
        """Preflight, plan, lock, ledger, probers, load: nothing is harmed yet."""
        self.check_spec()
        if acting := activities.under_way():
            told = f"The action {acting[0]!r} of an earlier experiment still runs, and may do anything"
            raise ExperimentError(f"{told}: begin a new process.")
        self.tape.open(self.dir)
        expected = self.spec.expected(self._settings)
        preflight = Preflight(self._cluster, self._arena.prometheus, self._settings, expected)
        preflight.demand()
        view = self.view()
        plan = self.spec.fault.plan(view)
        unseen = radius.check(plan, view, self._settings, self._cluster)
        preflight.demand_for(plan)
        self._before = view
        self._plan = plan = replace(plan, facts=replace(plan.facts, watched=lasting(plan)))
        self._write_run()
        for one in unseen:
            self.tape.note("warning", one)
        self.tape.say(f"{plan.facts.title} · expected to take up to {show_duration(round(expected))}")
        self._lock = Lock(self._cluster, self._holder, dict(view.labels), cluster_wide=plan.cluster_wide)
        self._lock.acquire(on_lost=lambda why: self.stop("error", why))
        self._write_ledger(plan, view)
        for what, manifest in manifests(plan.acts):
            self._save(what, manifest)
        self._watcher = Watcher(self._cluster, labels_of(view.selector), self._settings.service, self.tape.emit)
        self._watcher.start()
        self._reach = Reach(self._cluster, view, self._settings.prober_image, self._lasts)
        within = max(30.0, 2 * self._settings.heal_within)  # a node that has not pulled the image yet
        self._reach.start(plan, lambda pod: self._save(pod["metadata"]["name"], pod), within, self.tape.stopping)
        parts = plan, self._reach, self._watcher, self.tape
        foreign = isinstance(self.spec.fault, ChaosToolkit)
        where = self._cluster, self._settings.allow_namespaces
        self._effects = Witness(*parts, *where) if foreign else Effects(*parts)
        # The load's plan must outlast everything that may take its time: the heal, and the rebalancing.
        seed = self._arena.seed + self._trial - 1
        self._flow.start(self.spec.traffic, seed, self._lasts + self._rolls_within, self._settings, self.dir)
        self._sampler = Sampler(
            self._arena.prometheus,
            self.spec.objectives.queries(),
            self._settings.scrape_interval,
            self.tape.sample,
        )
        self._sampler.start()
        ear = Ear(
            self._cluster, self._holder, self._settings.stop_file, lambda why: self.tape.stop("fail", why, over=True)
        )
        prometheus = self._arena.prometheus
        self._guard = Guard(self._settings, self.tape, self._flow, self._sampler, self._watcher, prometheus, ear)
        self.tape.say(self._guard.armed)
        self._guard.start()

    def rehearse(self) -> tuple[Plan, list[Obj]]:
        """Everything that would be created, in the order of its creation; nothing is. Raises what `prepare` would."""
        self.check_spec()
        leave.ask(self._settings, self.spec.expected(self._settings), self._arena.prometheus)
        view = self.view()
        plan = self.spec.fault.plan(view)
        for one in radius.check(plan, view, self._settings, self._cluster):
            self.tape.note("warning", one)
        lock = Lock(self._cluster, self._holder, dict(view.labels), cluster_wide=plan.cluster_wide)
        ledger = self._make_ledger(view)
        ledger.plan((*plan.undos, *self._undos_of_probers(view)))
        reach = Reach(self._cluster, view, self._settings.prober_image, self._lasts)
        acts = [manifest for _, manifest in manifests(plan.acts)]
        return plan, [*lock.manifests(), ledger.manifest(), *reach.manifests(plan), *acts]

    @property
    def _lasts(self) -> float:
        """Seconds that probers are there at most, should nobody come back for them."""
        return self.spec.expected(self._settings) + 2 * self._settings.heal_within + 60

    def _make_ledger(self, view: View) -> Ledger:
        return Ledger(self._cluster, self.dir / "ledger.jsonl", view.name("ledger"), dict(view.labels))

    def _undos_of_probers(self, view: View) -> tuple[Undo, ...]:
        return tuple(
            Undo("delete", "prober", name, kind=PODS.kind, namespace=view.namespace, stage="clean")
            for name, _ in view.probers
        )

    def _write_ledger(self, plan: Plan, view: View) -> None:
        """Every undo, before anything of ours exists."""
        self._ledger = self._make_ledger(view)
        self._probers = self._undos_of_probers(view)
        self._ledger.write((*plan.undos, *self._probers))
        self._healer = Healer(self._cluster, self._ledger, plan.undos, self.tape, self._settings.heal_within)
        self.tape.mark(Step.LEDGER, True, detail=f"{len(plan.undos) + len(self._probers)} undos written")

    def view(self) -> View:
        """The cluster as the fault may see it, now."""
        settings, nodes = self._settings, self._cluster.nodes()
        zones = {node.name: node.zone for node in nodes}
        pods = [pod for pod in self._cluster.pods(zones=zones) if pod.labels.get(MANAGED) != "gameday"]
        engines = {pod.uid for pod in self._cluster.pods(labels=settings.selector, zones=zones)}
        usable = sorted({node.zone for node in nodes if node.ready and not node.unschedulable})
        expires = int(self._epoch.wall + self.spec.expected(settings) + 600)
        return View(
            namespace=settings.namespace,
            selector=settings.selector,
            engines=tuple(pod for pod in pods if pod.uid in engines),
            pods=tuple(pods),
            nodes=nodes,
            token=self._token,
            probers=tuple((name_for(self._token, f"prober-{zone}"), zone) for zone in usable),
            labels={MANAGED: "gameday", RUN: self._arena.run_id, EXPIRES: str(expires)},
            seed=self._arena.seed + self._trial - 1,
            max_share=settings.max_share,
            expendable=settings.expendable,
            allow_node_replacement=settings.allow_node_replacement,
            sandbox=self._arena.sandbox,
            workloads=self._cluster.workloads(),
            model=settings.model,
            job_image=settings.job_image,
        )

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
            reproduce=again(arena.reproduce(self.spec.name), self._trial),
            command=tuple(censored(word) for word in sys.argv),
            versions=_versions(),
            settings={key: str(value) for key, value in settings.model_dump(exclude={"objectives"}).items()},
        )
        assert self._plan is not None, "the plan is made first"
        record.write_run(self.dir, about, self._plan.facts, self.spec.objectives, self.spec.traffic.to_json())

    def _save(self, what: str, manifest: Mapping[str, Any]) -> None:
        folder = self.dir / "manifests"
        folder.mkdir(exist_ok=True)
        (folder / f"{what}.yaml").write_text(yaml.safe_dump(dict(manifest), sort_keys=False))

    # ── before ──────────────────────────────────────────────────────────────────────────────

    def before(self) -> None:
        """The steady state must hold for a whole window; otherwise nothing is injected."""
        self._flow.begin(clock.now() + 0.2)
        self._enter("warm-up", WARM_UP)
        self._tick(WARM_UP)
        self._enter(Phase.BEFORE, self._settings.steady)
        self._tick(self._settings.steady)
        if self.stopped:
            return
        assert self._plan is not None and self._about is not None and self._watcher is not None, "prepared"
        now = clock.now()
        self._flow.follow()
        end = PhaseMark(now, Phase.BEFORE, "end")
        seen = self.tape.timeline(self._about, self._plan.facts, self._flow.replies, end)
        findings = [objective.judge(seen, Phase.BEFORE) for objective in self.spec.objectives.before]
        self._baseline = sum(pod.ready for pod in self._watcher.engines())
        if missed := [one for one in findings if one.status.rank > 0]:
            told = "; ".join(f"{one.objective}: {_observed(one.observed)} {one.evidence}".strip() for one in missed)
            self.tape.emit(end)
            self.stop("inconclusive", f"the steady state was not reached, nothing was injected ({told})")

    def _enter(self, phase: Phase | str, lasting: float) -> None:
        self._phase, self._phase_ends = str(phase), clock.now() + lasting
        if isinstance(phase, Phase):
            self.tape.phase(phase, "start")

    # ── inject ──────────────────────────────────────────────────────────────────────────────

    def inject(self) -> None:
        """All acts in order, each with its control proof and the proof of its effect."""
        assert self._plan is not None and self._effects is not None
        if self.stopped or not self._still_valid(self._plan) or not self._may_begin(self._plan):
            return
        if not self._effects.ready() or not self._effects.provable():
            return
        for number, act in enumerate(self._plan.acts):
            if self.tape.stopping.is_set():
                return
            begins = harmful(act) and self._harm is None
            if (number == 0 or begins) and not self._still_ours(begins):
                return
            if isinstance(act, Job):
                self._effects.signalled = clock.now()
            if begins:
                self._begin_harm(act, self._plan)
            try:
                told = perform(self._cluster, act, self.tape.stopping, self.tape.emit)
            except (NotInjected, ClusterError) as wrong:
                self.tape.mark(Step.INJECTED, False, act.what, str(wrong))
                self.stop("inconclusive", f"{act.what} was not injected: {wrong}")
                return
            except OutOfTolerance as wrong:  # a probe among a team's actions: it fails, and the fault goes its way
                told = str(wrong)
                self.tape.note("fail", told)
            self.tape.mark(Step.INJECTED, True, act.what, told)
            if harmful(act) and getattr(act, "proof", None) and not self._effects.prove(act, self._harm or 0.0):
                return
        if self._harm is not None:
            self._effects.prove_all(self._harm)

    def _still_ours(self, begins: bool) -> bool:
        """Lock and ledger are still there: a machine that slept may wake up after somebody has healed."""
        assert self._lock is not None and self._ledger is not None, "prepared"
        try:
            self._lock.fence()
            self._ledger.fence(begins=begins)
        except (LockError, RecordError) as wrong:
            self.stop("error", str(wrong))
            return False
        except ClusterError as wrong:
            self.stop("inconclusive", f"nothing was injected, since lock and ledger could not be looked at: {wrong}")
            return False
        return True

    def _begin_harm(self, act: Act, plan: Plan) -> None:
        assert self._watcher is not None and self._guard is not None
        self.tape.phase(Phase.BEFORE, "end")
        self._watcher.aim(frozenset(plan.facts.pods))
        self._harm = self._guard.harm = clock.now()
        self.tape.mark(Step.APPLY, True, act.what, t=self._harm)
        self._enter(Phase.DURING, plan.facts.lasting)

    def _still_valid(self, plan: Plan) -> bool:
        """The cluster is still as it was planned for: the same targets, the same other side, the same way back."""
        try:
            now = self.spec.fault.plan(self._as_planned(plan, self.view()))
        except GamedayError as wrong:
            self.stop("inconclusive", f"the cluster changed between the plan and the injection: {wrong}")
            return False
        aimed = set(now.facts.pods) ^ set(plan.facts.pods)
        if now.acts != plan.acts or now.undos != plan.undos or aimed:
            beside = "the pods or nodes beside the targets"
            if now.acts == plan.acts:  # the ledger's undos would restore what is not there any more
                stale = sorted({entry.name for entry in set(now.undos) ^ set(plan.undos)})
                beside = f"what the undo would restore ({', '.join(stale[:4])})"
            what = ", ".join(sorted(aimed)[:4]) or beside
            self.stop("inconclusive", f"the cluster changed between the plan and the injection: {what}")
            return False
        return True

    def _as_planned(self, plan: Plan, view: View) -> View:
        """`view` without the pods that have come, or become ready, since the plan was made: they are beside the fault.

        An autoscaler adds some because our load begins. They count where the fault is about all pods that there are: of
        the namespace (a cut), or of its nodes.
        """
        if self._before is None or plan.cuts:
            return view
        known = {pod.uid for pod in self._before.pods}
        if plan.cluster_wide and any(p.uid not in known for p in view.pods if p.node in plan.facts.nodes):
            return view
        ready = {pod.uid for pod in self._before.ready}
        engines = tuple(pod for pod in view.engines if pod.uid in ready)
        return replace(view, engines=engines, pods=tuple(pod for pod in view.pods if pod.uid in known))

    def _may_begin(self, plan: Plan) -> bool:
        """Still no incident is open, and the engines that are left can carry the load that flows now."""
        settings = self._settings
        try:
            leave.ask(settings, self.spec.expected(settings), self._arena.prometheus)
        except TargetError as wrong:
            self.stop("inconclusive", f"nothing was injected: {wrong}")
            return False
        if met := self._stops_already():
            self.stop("inconclusive", f"nothing was injected: {met}")
            return False
        if not settings.utilisation:
            return True
        busy = self._arena.prometheus.sample("utilisation", settings.utilisation)
        self.tape.sample(busy)
        if busy.value is None:
            self.stop("inconclusive", f"nothing was injected: how busy the engines are is not known ({busy.error})")
            return False
        then, hit, ready = radius.busy_without(plan, self.view(), busy.value)
        if then > settings.max_utilisation:
            self.stop(
                "inconclusive",
                f"nothing was injected: the rest could not carry the load. The engines are {busy.value:.0%} busy; "
                f"without {hit} of {ready} of them it would be {then:.0%}, more than max_utilisation",
            )
        return then <= settings.max_utilisation

    def _stops_already(self) -> str:
        """The stop condition that would end the fault at once, though it is none of its doing; "" for none."""
        for one in self._settings.thresholds:
            seen = self._arena.prometheus.sample(f"stop: {one}", one.query)
            self.tape.sample(seen)
            if seen.value is None:
                return f"whether the stop condition {one} is met is not known ({seen.error})"
            if one.broken_by(seen.value):
                return f"the stop condition {one} is met already: {seen.value:.4g}"
        ready = sum(pod.ready for pod in self._watcher.engines()) if self._watcher else 0
        if ready < self._settings.stop_replicas:
            return f"only {ready} replicas are ready, the stop condition is {self._settings.stop_replicas}"
        return ""

    # ── during ──────────────────────────────────────────────────────────────────────────────

    def during(self) -> None:
        """Load goes on until the fault has lasted; its proof and the stop conditions are looked at all the time."""
        assert self._plan is not None
        if self.stopped or self._harm is None:
            return
        self._tick(self._harm + self._plan.facts.lasting - clock.now(), watch_fault=True)

    def _tick(self, seconds: float, *, watch_fault: bool = False, until: Callable[[], bool] | None = None) -> None:
        """Let time pass until the stop; `watch_fault`: the effect must be seen all the while."""
        end = clock.now() + seconds
        shown = 0.0
        while (left := end - clock.now()) > 0 and not self.stopped:
            clock.pause(min(EVERY, left), self.tape.stopping)
            if watch_fault and self._effects is not None:
                self._effects.watch()
            if clock.now() - shown >= 1:
                shown = clock.now()
                self.tape.voice.progress(self._progress())
            if until is not None and until():
                return

    def _progress(self) -> Progress:
        figures = self._flow.figures()
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
            left_seconds=max(0.0, self._phase_ends - clock.now()),
            per_second=figures.per_second,
            success=figures.success,
            ttft_p95=figures.ttft_p95,
            broken=tuple(broken),
            in_flight=figures.in_flight,
        )

    # ── heal ────────────────────────────────────────────────────────────────────────────────

    def heal(self) -> None:
        """Undo everything of stage "heal", and see that it is undone. Safe to repeat."""
        if self._healer is None or self._plan is None or self._healed or self._heals >= HEALS:
            return
        self._heals += 1
        if self._harm is not None and not self._healer.begun:
            if self._effects is not None:
                self._look_last(self._effects)
            if not self._plan.facts.one_shot:
                self.tape.mark(Step.UNDO, True)
            self.tape.phase(Phase.DURING, "end")
        self._phase, self._phase_ends = "heal", clock.now() + self._settings.heal_within
        ends = self._harm + self._plan.facts.lasting + LONGEST if self._harm is not None else 0.0
        self._healed = self._healer.heal(until=ends, harmed=self._harm is not None)
        if self._healed and self._guard is not None:
            self._guard.harm = None  # not before: the fault is in force until it is undone
        if self._harm is not None:
            if self._effects is not None:
                try:
                    self._effects.see_gone(self._cluster, self._arena.run_id)
                except ClusterError as wrong:
                    self.tape.mark(Step.GONE, False, self._plan.facts.name, str(wrong))
            self.tape.mark(Step.HEALED, self._healed, detail=self._healer.told)

    def _look_last(self, effects: Effects) -> None:
        """What still acts, right before the undo. Whatever happens while we look, it must not keep us from undoing."""
        for look in (effects.last_look, effects.demand_detection, effects.tell_uncovered):
            try:
                look()
            except Exception as wrong:  # noqa: BLE001 - a bug in a look included
                told = str(wrong) if isinstance(wrong, GamedayError) else repr(wrong)
                self.tape.note("inconclusive", f"whether the fault still acted right before the heal: {told}")

    # ── after ───────────────────────────────────────────────────────────────────────────────

    def after(self) -> None:
        """Load goes on until the service has been back for the hold time, or the window ends."""
        if self.tape.breached and self._healed and self.interrupted is None:
            self.tape.resume()
        if self.stopped or self._harm is None or self._plan is None:
            return
        hold, rto = self.spec.hold(self._settings), self.spec.rto(self._settings)
        self._enter(Phase.AFTER, hold + rto + 1)
        if self._plan.rebalance:
            self._rebalance(self._plan.rebalance)
        if self._plan.settles:
            self._settle(self._plan.settles, "rollback")
        began = clock.now()
        self._tick(hold + rto + 1, until=lambda: clock.now() - began >= hold + 1 and self._is_back(hold))
        if self._effects is not None:
            self._effects.look_after()
        self.tape.phase(Phase.AFTER, "end")

    def _is_back(self, hold: float) -> bool:
        good = self._flow.good_since(clock.now() - hold)
        ready = sum(pod.ready for pod in self._watcher.engines()) if self._watcher else 0
        wanted = self.spec.recovers.at_least if self.spec.recovers else 0.99
        return good is not None and good >= wanted and ready >= self._baseline

    def _rebalance(self, deployments: tuple[str, ...]) -> None:
        """The named rebalancing step: restart the Deployments, so that the scheduler spreads them again."""
        namespace = self._settings.namespace
        self.tape.note("info", f"rebalancing: rollout restart of {', '.join(deployments)}")
        stamp = {"kubectl.kubernetes.io/restartedAt": f"gameday-{self._token}"}
        patch = {"spec": {"template": {"metadata": {"annotations": stamp}}}}
        for name in deployments:
            self._cluster.patch(DEPLOYMENTS, name, patch, namespace, type="strategic")
        self._settle(deployments, "rebalance")

    @property
    def _rolls_within(self) -> float:
        """Seconds for a rollout of ours: the way back of an update may take as long as the way there."""
        return max(REBALANCE_WITHIN, 2 * self._plan.facts.lasting if self._plan and self._plan.settles else 0.0)

    def _settle(self, deployments: tuple[str, ...], what: str) -> None:
        """Wait until these Deployments have rolled out."""
        namespace = self._settings.namespace
        within = self._rolls_within
        self._phase, self._phase_ends = what, clock.now() + within
        looked = [0.0]

        def rolled_out() -> bool:
            if clock.now() - looked[0] < 0.5:
                return False
            looked[0] = clock.now()
            return all(_rolled_out(self._cluster.get(DEPLOYMENTS, name, namespace)) for name in deployments)

        begun = clock.now()
        self._tick(within, until=rolled_out)
        took = clock.now() - begun
        if took >= within:
            self.tape.note("fail", f"the {what} did not end within {show_duration(within)}")
        else:
            self.tape.note("info", f"the {what} took {took:.1f} s")
        self._phase, self._phase_ends = str(Phase.AFTER), clock.now() + self.spec.hold(self._settings)

    # ── finish ──────────────────────────────────────────────────────────────────────────────

    def finish(self) -> None:
        """Stop the load, take away everything of ours, judge, report. Runs however the experiment went."""
        if self._finished:
            return
        self._finished = True
        self._phase, self._phase_ends = "finish", clock.now() + DRAIN
        try:
            if self._guard:
                self._guard.stop()
            if wrong := self._flow.end(hurried=self.interrupted is not None):
                self.tape.note("inconclusive", wrong)
            if self._sampler:
                self._sampler.stop()
            if self._effects and self._harm is not None:
                self._effects.see_back(self._settings.heal_within)
            self._compare_watches()
        finally:
            try:
                self._clean()
            finally:
                if self._watcher:
                    self._watcher.stop()
                self.tape.close()

    def _compare_watches(self) -> None:
        if self._watcher is None or self._harm is None or self.interrupted is not None:
            return
        try:
            wrong = self._watcher.differs()
        except ClusterError as unseen:
            wrong = str(unseen)
        if wrong:
            self.tape.note("inconclusive", f"Kubernetes cannot be seen: {wrong}")

    def _clean(self) -> None:
        if self._reach:
            self._reach.stop()
        if self._lock is not None:
            finish.clean(
                self._cluster,
                self.tape,
                lock=self._lock,
                ledger=self._ledger,
                probers=self._probers,
                healed=self._healed,
                run=self._arena.run_id,
                within=self._settings.heal_within,
            )

    @property
    def allow_missing(self) -> tuple[str, ...]:
        return self._settings.allow_missing

    @property
    def untouched(self) -> bool:
        """Nothing was harmed, and nothing of ours is left, which somebody looked for if there was anything."""
        looks = [one.ok for one in self.tape.events if isinstance(one, FaultMark) and one.step is Step.CLEAN]
        return self._harm is None and (looks[-1] if looks else self._lock is None)

    @property
    def judgeable(self) -> bool:
        """Whether it came so far that there is a record to judge."""
        return self._plan is not None

    def conclude(self) -> Judgement | None:
        """Seal the record, judge it as anyone can do again, and write the report."""
        if self._plan is None:
            return None
        if self.tape.broken:
            raise RecordError(
                f"{self.dir}: the record could not be written ({self.tape.broken}), so nothing is judged."
            )
        record.seal(self.dir)
        timeline, objectives = record.load(self.dir)
        self.judgement = judge(timeline, objectives)
        record.write_verdict(self.dir, self.judgement)
        html.write(self.dir)
        return self.judgement


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


def again(command: str, trial: int) -> str:
    """The command that repeats a trial: a later one's load comes from seed and number, so it takes those before."""
    return command if trial == 1 else f"{command} --trials {trial}"
