"""Whether a team's own experiment bites, when nobody but the team knows how.

Its effect is what is seen to change of the engines since its first action: one that goes, fails, restarts or leaves
the rotation, a node of theirs that leaves, a connection to one that worked and does not. Other pods and nodes change
by themselves all the time, which proves nothing. Where nothing of that kind is to be expected (latency, a DNS answer,
another service's pod), the experiment names probes as its proof. And what was there before the first action
must be there again at the end: new chaos resources of any kind, NetworkPolicies, cordons, taints, other replicas are a
mess left behind, in whichever of the allowed namespaces. What autoscalers do meanwhile is theirs: replicas that a
HorizontalPodAutoscaler sets, nodes that come, or that an autoscaler takes away.
"""

from __future__ import annotations

from collections.abc import Sequence

from faults.base import Call, Plan
from gameday import activities, clock
from gameday.activities import OutOfTolerance, Unreadable
from gameday.cluster import Cluster, Obj, Refused
from gameday.effects import GONE_WITHIN, Effects
from gameday.errors import ClusterError
from gameday.kinds import DEPLOYMENTS, HPAS, NETWORKPOLICIES, NODES, PODCHAOS, STATEFULSETS, Kind
from gameday.model import EndpointMark, Event, NodeMark, PodMark, Step
from gameday.tape import Tape
from probes.kube import Watcher
from probes.reach import EVERY, Reach

LAST_LOOK = 10.0  # seconds for all proofs right before the heal: meanwhile their fault is in force
SEEN_WITHIN = 15.0  # seconds after the method until its effect must be seen
EFFECT = "the method"
_ITS_OWN = ("podnetworkchaos", "podiochaos", "podhttpchaos", "physicalmachines")
_LEAVES = "being taken away by an autoscaler"
_AUTOSCALERS = ("ToBeDeletedByClusterAutoscaler", "karpenter.sh/")  # taints of nodes that they take away
_SOFT = ("node.kubernetes.io/", "DeletionCandidateOfClusterAutoscaler")  # … that come and go by themselves
_PODS = ("gone", "unready", "terminating", "restarted")
_NODES = ("gone", "not ready", "cordoned")


class Witness(Effects):
    """The effect of a `ChaosToolkit` fault, its hypothesis, and what it leaves behind."""

    def __init__(
        self, plan: Plan, reach: Reach, watcher: Watcher, tape: Tape, cluster: Cluster, namespaces: Sequence[str]
    ) -> None:
        super().__init__(plan, reach, watcher, tape)
        self._cluster, self._namespaces = cluster, tuple(namespaces)  # where it may leave something
        text = next(act.experiment for act in plan.acts if isinstance(act, Call))
        self._own = activities.of_text(text)
        self._before: dict[str, str] = {}
        self._proven = False
        self._engines: set[str] = set()  # "ns/pod" of each that was seen to be one
        self._nodes: set[str] = set()  # … and the nodes that they were seen on

    # ── before the harm ─────────────────────────────────────────────────────────────────────

    def ready(self) -> bool:
        """Their steady state holds, and how everything was is known."""
        for one in self._own.hypothesis:
            try:
                told = activities.probe(self._own, one, self._cluster.environment(), self._tape.stopping)
            except (Unreadable, OutOfTolerance) as wrong:
                why = f"the experiment's own steady state was not reached, nothing was injected ({wrong})"
                self._tape.stop("inconclusive", why)
                return False
            self._tape.note("info", f"steady state before: {told}")
        try:
            self._before = self._snapshot()
        except Refused as hidden:
            told = f"what the experiment could leave behind cannot be seen, nothing was injected ({hidden})"
            todo = f"grant what `gameday rbac` prints for {', '.join(self._namespaces)}, or allow fewer namespaces"
            self._tape.stop("inconclusive", f"{told}: {todo}")
            return False
        self._know_engines()
        return True

    def _know_engines(self) -> None:
        for pod in self._watcher.engines():
            self._engines.add(pod.key)
            self._nodes |= {pod.node} - {""}

    def _snapshot(self) -> dict[str, str]:
        """What an experiment could leave behind, in words: thing → how it is. Raises `Refused` for what is hidden."""
        found = {f"node {obj['metadata']['name']}": _of_node(obj) for obj in self._cluster.list(NODES)}
        chaos = [kind for kind in self._cluster.kinds(PODCHAOS.api_version) if _may_stay(kind)]
        for namespace in self._namespaces:
            for kind in (*chaos, NETWORKPOLICIES):
                found |= {_named(kind, obj): "there" for obj in self._cluster.list(kind, namespace)}
            scalers = self._cluster.list(HPAS, namespace)
            found |= {_named(HPAS, obj): _of_scaler(obj) for obj in scalers}
            scaled = {(ref["kind"], ref["name"]) for obj in scalers if (ref := obj["spec"].get("scaleTargetRef"))}
            for kind in (DEPLOYMENTS, STATEFULSETS):
                for obj in self._cluster.list(kind, namespace):
                    by = (kind.kind, obj["metadata"]["name"]) in scaled
                    found[_named(kind, obj)] = _of_workload(obj, by_autoscaler=by)
        return found

    # ── while it lasts ──────────────────────────────────────────────────────────────────────

    def prove_all(self, since: clock.Instant) -> bool:
        """Wait until it is seen to act; stop where it is not."""
        if self._own.proofs:
            self._proven = self._prove_by_probes()
            return self._proven
        until = clock.now() + SEEN_WITHIN
        while not (told := self._changed(since)) and clock.now() < until and not self._tape.stopped:
            clock.pause(EVERY, self._tape.stopping)
        if not told:
            told = "nothing was seen to change of the engines, their endpoints and nodes: "
            told += "name probes that show the effect (extensions, gameday, proof)"
            self._tape.mark(Step.EFFECT, False, EFFECT, told)
            self._tape.stop("inconclusive", f"the method ran, but {told}")
            return False
        self._tape.mark(Step.EFFECT, True, EFFECT, told, since=since)
        self._proven = True
        return True

    def _prove_by_probes(self, within: float | None = None) -> bool:
        told = []
        until = None if within is None else clock.now() + within
        for one in self._own.proofs:
            left = None if until is None else max(0.0, until - clock.now())
            try:
                environment = self._cluster.environment()
                told.append(activities.probe(self._own, one, environment, self._tape.stopping, within=left))
            except (Unreadable, OutOfTolerance) as wrong:
                self._tape.mark(Step.EFFECT, False, EFFECT, str(wrong))
                self._tape.stop("inconclusive", f"the method ran, but its proof does not show the effect: {wrong}")
                return False
        self._tape.mark(Step.EFFECT, True, EFFECT, "; ".join(told))
        return True

    def _changed(self, since: clock.Instant) -> str:
        self._know_engines()
        found = [told for event in tuple(self._tape.events) if event.t >= since and (told := self._change(event))]
        found += [f"{pair} fails" for pair in self._reach.broken() if pair.partition("→")[2] in self._engines]
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        return ", ".join(found[:4]) + more

    def _change(self, event: Event) -> str:
        if isinstance(event, PodMark) and event.pod in self._engines and event.stage in _PODS:
            return f"{event.pod} {event.stage}"
        if isinstance(event, EndpointMark) and event.pod in self._engines and not event.ready:
            return f"{event.pod} out of {event.service}"
        if isinstance(event, NodeMark) and event.node in self._nodes and event.what in _NODES:
            return f"{event.node} {event.what}"
        return ""

    def demand_detection(self) -> None:
        """Right before the heal: what the experiment names as proof must still hold."""
        if self._proven and self._own.proofs and not self._tape.stopped:
            self._proven = self._prove_by_probes(LAST_LOOK)

    # ── after it ────────────────────────────────────────────────────────────────────────────

    def see_gone(self, cluster: Cluster, run: str) -> None:
        """Everything is again as it was before the first action."""
        until = clock.now() + GONE_WITHIN
        told = "not looked at"
        while True:
            try:
                now = self._snapshot()
                told = ", ".join(_differences(self._before, now))
                if not told:
                    self._tape.mark(Step.GONE, True, EFFECT, "chaos resources, nodes and replicas are as before")
                    return
            except ClusterError as wrong:
                told = str(wrong)
            if clock.now() >= until:
                break
            clock.pause(0.5)
        self._tape.mark(Step.GONE, False, EFFECT, f"left behind: {told}")

    def look_after(self) -> None:
        for one in self._own.hypothesis:
            try:
                told = activities.probe(self._own, one, self._cluster.environment())
            except OutOfTolerance as wrong:
                self._tape.note("fail", f"the experiment's own steady state after: {wrong}")
            except Unreadable as wrong:
                self._tape.note("inconclusive", f"the experiment's own steady state after: {wrong}")
            else:
                self._tape.note("info", f"steady state after: {told}")


def _may_stay(kind: Kind) -> bool:
    """Whether it is a chaos resource that somebody makes, and not Chaos Mesh's own book-keeping."""
    return kind.namespaced and "/" not in kind.plural and kind.plural not in _ITS_OWN


def _named(kind: Kind, obj: Obj) -> str:
    return f"{kind.kind} {obj['metadata']['namespace']}/{obj['metadata']['name']}"


def _of_workload(obj: Obj, *, by_autoscaler: bool) -> str:
    replicas = obj["spec"].get("replicas", 1)
    if by_autoscaler and replicas:  # it leaves alone what somebody has scaled to none
        return "scaled by a HorizontalPodAutoscaler"
    return f"{replicas} replicas"


def _of_scaler(obj: Obj) -> str:
    return f"for {obj['spec'].get('minReplicas', 1)} to {obj['spec'].get('maxReplicas')} replicas"


def _of_node(obj: Obj) -> str:
    spec = obj.get("spec", {})
    # Taints of the node controller come and go with the node's health; they are not the experiment's to undo.
    taints = sorted(t["key"] for t in spec.get("taints") or [] if not t["key"].startswith(_SOFT))
    if any(key.startswith(_AUTOSCALERS) for key in taints):
        return _LEAVES
    cordoned = "cordoned" if spec.get("unschedulable") else "schedulable"
    return f"{cordoned}{', tainted ' + ', '.join(taints) if taints else ''}"


def _differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is there that was not, or is otherwise than it was. (Nodes that vanished are judged by objectives.)"""
    new = [f"{thing} is {how}" for thing, how in sorted(now.items()) if _otherwise(thing, before.get(thing), how)]
    kept = tuple(f"{kind.kind} " for kind in (DEPLOYMENTS, STATEFULSETS, HPAS, NETWORKPOLICIES))
    return new + [f"{thing} is gone" for thing in sorted(before) if thing.startswith(kept) and thing not in now]


def _otherwise(thing: str, was: str | None, how: str) -> bool:
    """Whether that is somebody's to undo. A new node may have taints of its own, but nobody cordons it by himself."""
    if thing.startswith("node ") and was is None:
        return how.startswith("cordoned")
    return _LEAVES not in (was, how) and was != how
