"""Zones fail: cut off (grey), or gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from faults.base import (
    Act,
    Apply,
    Cordon,
    Cut,
    Dead,
    Plan,
    Undo,
    View,
    Zone,
    bites,
    chaos,
    check_radius,
    check_replaced,
    delete,
    duration,
    selector_of,
    stops,
    unseen,
    visible,
)
from gameday.cluster import Obj, Pod
from gameday.errors import TargetError
from gameday.kinds import NETWORKCHAOS, PODCHAOS
from gameday.model import FaultFacts

OUTLIVES = 15.0  # seconds by which the partition's own end outlives the pod-failure's (DESIGN 6)


@dataclass(frozen=True, slots=True)
class ZonePartition:
    """The zone's pods and all others of the namespace lose each other; every probe stays green."""

    zone: Zone
    lasting: float

    @property
    def one_shot(self) -> bool:
        return False

    def plan(self, view: View) -> Plan:
        inside, outside = _sides(view, self.zone)
        check_radius(view, inside, what=f"The partition of zone {self.zone}")
        act, undo = _partition(view, self.zone, inside, outside, self.lasting)
        return Plan(
            facts=FaultFacts(
                name="zone partition",
                title=f"zone {self.zone} is cut off: {len(inside)} pods lose the other {len(outside)}",
                one_shot=False,
                lasting=self.lasting,
                pods=tuple(sorted(pod.key for pod in inside)),
                zone=self.zone.name,
                fidelity=(
                    "Real: packets between the zone's pods and the namespace's others are dropped, at once.",
                    "Not cut: kubelet probes, the API server, clients outside the cluster, host-network pods.",
                ),
            ),
            acts=(act,),
            undos=(undo,),
            cuts=self.zone.name,
            needs=(NETWORKCHAOS.plural,),
        )


@dataclass(frozen=True, slots=True)
class ZoneOutage:
    """The zone is gone: its nodes take nothing new, its pods are cut off, then killed or failed.

    `replacements="none"` fails the pods in place (pod-failure: nothing is rescheduled); "elsewhere" kills
    them with grace 0, so that their controllers start others in the zones that are left. Kubernetes does not
    rebalance by itself: with `rebalance` the Deployments are restarted after the heal.
    """

    zone: Zone
    lasting: float
    replacements: Literal["none", "elsewhere"] = "none"
    rebalance: bool = True

    @property
    def one_shot(self) -> bool:
        return False

    def plan(self, view: View) -> Plan:
        inside, outside = _sides(view, self.zone)
        check_radius(view, inside, what=f"The outage of zone {self.zone}")
        if self.replacements == "elsewhere":
            check_replaced(inside, what=f"The outage of zone {self.zone}")
        nodes = tuple(node for node in view.nodes if node.zone == self.zone.name)
        fresh = tuple(node for node in nodes if not node.unschedulable)  # never uncordon what others cordoned
        names = tuple(sorted(pod.key for pod in inside))
        acts: list[Act] = [Cordon(tuple((node.name, node.uid) for node in fresh), view.token)] if fresh else []
        undos: list[Undo] = []
        if outside:
            cut, uncut = _partition(view, self.zone, inside, outside, self.lasting)
            acts.append(cut)
            undos.append(uncut)
        seen = visible(inside)
        if not any(pod.key in seen for pod in view.engines):
            raise TargetError(
                f"No pod of {view.selector!r} in zone {self.zone} is ready and declares a TCP port: "
                "its death could not be seen from outside."
            )
        kill, unkill = self._end_pods(view, inside, names, seen)
        acts.append(kill)
        undos.insert(0, unkill)
        undos += [
            Undo(verb="uncordon", what="cordon", name=node.name, uid=node.uid, value=view.token) for node in fresh
        ]
        gone = "killed with grace 0" if self.replacements == "elsewhere" else "failed in place"
        rebalance = self.replacements == "elsewhere" and self.rebalance
        return Plan(
            facts=FaultFacts(
                name="zone outage",
                title=f"zone {self.zone} is gone: {len(inside)} pods on {len(nodes)} nodes cut off and {gone}",
                one_shot=False,
                lasting=self.lasting,
                pods=names,
                nodes=tuple(sorted(node.name for node in nodes)),
                zone=self.zone.name,
                fidelity=(
                    f"Real: nodes cordoned, packets dropped, pods {gone}.",
                    "Emulated: kubelets and machines of the zone stay up, so the node controller sees healthy nodes.",
                    *unseen(inside, seen),
                ),
            ),
            acts=tuple(acts),
            undos=tuple(undos),
            rebalance=_deployments(view, inside) if rebalance else (),
            cuts=self.zone.name if outside else "",
            needs=(NETWORKCHAOS.plural, PODCHAOS.plural),
            cluster_wide=True,
        )

    def _end_pods(
        self, view: View, inside: tuple[Pod, ...], names: tuple[str, ...], seen: tuple[str, ...]
    ) -> tuple[Apply, Undo]:
        elsewhere = self.replacements == "elsewhere"
        what = "pod-kill" if elsewhere else "pod-failure"
        metadata = view.metadata(what)
        spec: Obj = {
            "action": what,
            "mode": "all",
            "selector": selector_of(view.namespace, inside),
            "duration": duration(self.lasting),
        }
        if elsewhere:
            spec["gracePeriod"] = 0
        proof = Dead(seen, zone=self.zone.name, lasting=not elsewhere)
        within = bites(inside) if elsewhere else stops(inside, self.lasting)
        act = Apply(what, PODCHAOS, chaos(PODCHAOS, metadata, spec), len(inside), proof, within=within)
        return act, delete(PODCHAOS, metadata, what, running=() if elsewhere else names)


def _sides(view: View, zone: Zone) -> tuple[tuple[Pod, ...], tuple[Pod, ...]]:
    """The namespace's running pods inside and outside the zone (Chaos Mesh never injects host-network pods)."""
    known = sorted({node.zone for node in view.nodes if node.zone})
    if zone.name not in known:
        raise TargetError(f"No node is in zone {zone.name!r}; the zones are: {', '.join(known) or 'none labelled'}.")
    running = [pod for pod in view.pods if pod.phase == "Running" and not pod.terminating]
    if stubborn := [pod.name for pod in running if pod.host_network and pod in view.engines]:
        raise TargetError(
            f"{', '.join(stubborn)} use the host's network, which Chaos Mesh never injects: no zone fault."
        )
    running = [pod for pod in running if not pod.host_network]
    inside = tuple(pod for pod in running if pod.zone == zone.name)
    if not any(pod in view.engines for pod in inside):
        raise TargetError(f"Zone {zone.name} holds no pod of {view.selector!r}: its loss would show nothing.")
    return inside, tuple(pod for pod in running if pod.zone != zone.name)


def _partition(
    view: View, zone: Zone, inside: tuple[Pod, ...], outside: tuple[Pod, ...], lasting: float
) -> tuple[Apply, Undo]:
    if not outside:
        raise TargetError(f"All pods are in zone {zone.name}: there is nothing to cut it off from.")
    metadata = view.metadata("partition")
    probers_in = tuple(name for name, where in view.probers if where == zone.name)
    probers_out = tuple(name for name, where in view.probers if where != zone.name)
    spec = {
        "action": "partition",
        "mode": "all",
        "direction": "both",
        "selector": selector_of(view.namespace, inside, probers_in),
        "target": {"mode": "all", "selector": selector_of(view.namespace, outside, probers_out)},
        "duration": duration(lasting + OUTLIVES),
    }
    manifest = chaos(NETWORKCHAOS, metadata, spec)
    records = len(inside) + len(outside) + len(view.probers)
    act = Apply("partition", NETWORKCHAOS, manifest, records, Cut(zone.name), within=bites((*inside, *outside)))
    return act, delete(NETWORKCHAOS, metadata, "partition")


def _deployments(view: View, pods: tuple[Pod, ...]) -> tuple[str, ...]:
    """Deployments that lost pods, by their ReplicaSets (`NAME-HASH`); those of Argo Rollouts belong to none."""
    known = {one.name for one in view.workloads}
    owners = {pod.owner.removeprefix("ReplicaSet/") for pod in pods if pod.owner.startswith("ReplicaSet/")}
    return tuple(sorted({name for owner in owners if (name := owner.rsplit("-", 1)[0]) in known}))
