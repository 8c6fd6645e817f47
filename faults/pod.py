"""Pods end: killed without grace, as a crash of the process or its node would, or asked to stop."""

from __future__ import annotations

from dataclasses import dataclass

from faults.base import Apply, Dead, Plan, View, chaos, check_radius, check_replaced, delete, duration, selector_of
from gameday.errors import TargetError
from gameday.kinds import PODCHAOS
from gameday.model import FaultFacts


@dataclass(frozen=True, slots=True)
class PodKill:
    """`count` ready engine pods, drawn by the seed, are deleted with grace 0: no preStop, no drain.

    One shot: there is nothing to heal. `lasting` is how long the service is watched (≥ RTO + hold).
    """

    lasting: float
    count: int = 1

    @property
    def one_shot(self) -> bool:
        return True

    def plan(self, view: View) -> Plan:
        if len(view.ready) < self.count:
            raise TargetError(f"{self.count} pods should be killed, but only {len(view.ready)} are ready.")
        hit = tuple(view.draw().sample(view.ready, self.count))
        check_radius(view, hit, what="The pod kill")
        check_replaced(hit, what="The pod kill")
        metadata = view.metadata("pod-kill")
        names = tuple(sorted(pod.key for pod in hit))
        manifest = chaos(
            PODCHAOS,
            metadata,
            {
                "action": "pod-kill",
                "mode": "all",
                "gracePeriod": 0,
                "selector": selector_of(view.namespace, hit),
                "duration": duration(self.lasting),
            },
        )
        return Plan(
            facts=FaultFacts(
                name="pod kill",
                title=f"{', '.join(pod.name for pod in hit)} killed without grace",
                one_shot=True,
                lasting=self.lasting,
                pods=names,
                nodes=tuple(sorted({pod.node for pod in hit})),
                fidelity=("Real: the pod is deleted with grace 0, its processes get SIGKILL, its streams break.",),
            ),
            acts=(Apply("pod-kill", PODCHAOS, manifest, records=len(hit), proof=Dead(names)),),
            undos=(delete(PODCHAOS, metadata, "pod-kill"),),
            needs=(PODCHAOS.plural,),
        )


@dataclass(frozen=True, slots=True)
class PodStop:
    """One ready engine pod, drawn by the seed, is asked to stop with the grace that its own spec gives it.

    What a rollout, a drain or a scale-down does all day: preStop runs, SIGTERM comes, streams may end. One shot.
    """

    lasting: float

    @property
    def one_shot(self) -> bool:
        return True

    def plan(self, view: View) -> Plan:
        if not view.ready:
            raise TargetError(f"No ready pod matches {view.selector!r} in {view.namespace}: nothing can be stopped.")
        pod = view.draw().choice(view.ready)
        check_radius(view, (pod,), what="The pod stop")
        check_replaced((pod,), what="The pod stop")
        metadata = view.metadata("pod-stop")
        spec = {
            "action": "pod-kill",
            "mode": "all",
            "gracePeriod": pod.grace,
            "selector": selector_of(view.namespace, (pod,)),
            "duration": duration(self.lasting),
        }
        # It may take its whole grace to end, and must not answer afterwards.
        act = Apply("pod-stop", PODCHAOS, chaos(PODCHAOS, metadata, spec), 1, Dead((pod.key,)), within=pod.grace + 10.0)
        return Plan(
            facts=FaultFacts(
                name="pod stop",
                title=f"{pod.name} is asked to stop and has {pod.grace} s to do so",
                one_shot=True,
                lasting=self.lasting,
                pods=(pod.key,),
                nodes=(pod.node,),
                fidelity=("Real: the pod is deleted with its own grace period, as a rollout or a drain does.",),
            ),
            acts=(act,),
            undos=(delete(PODCHAOS, metadata, "pod-stop"),),
            needs=(PODCHAOS.plural,),
        )
