"""Nodes fail, or are taken out of service: a crash without warning, and the drain before maintenance."""

from __future__ import annotations

from dataclasses import dataclass

from faults.base import (
    Cordon,
    Cordoned,
    Dead,
    Evict,
    Job,
    Plan,
    Undo,
    View,
    check_radius,
    check_replaced,
    pinned_job,
    unseen,
    visible,
)
from gameday.cluster import Node, Pod
from gameday.errors import TargetError
from gameday.model import FaultFacts

BOOTS = 60.0  # seconds for the Job to be scheduled and started, its image pulled, until nothing answers any more

# Once: with restartPolicy Never and backoffLimit 0 neither kubelet nor Job controller start it again after the reset.
CRASH = """\
echo "resetting this machine"
sleep 1
echo b > /sysrq-trigger
sleep 60
echo "the machine did not reset"
exit 1
"""


@dataclass(frozen=True, slots=True)
class NodeCrash:
    """One node that runs an engine, drawn by the seed, is reset at once: nothing is closed, nobody is told.

    A Job pinned to the node writes `b` to its /proc/sysrq-trigger. The machine boots again by itself; whether its
    pods are moved before that is what the node controller's clocks decide. One shot: a reset has no undo.
    """

    lasting: float

    @property
    def one_shot(self) -> bool:
        return True

    def plan(self, view: View) -> Plan:
        if not view.sandbox and not view.allow_node_replacement:
            raise TargetError(
                "A node crash resets the machine, which cannot be undone and after which it may be replaced: "
                "give --allow-node-replacement if that is meant."
            )
        (node,) = nodes_with_engines(view)
        hit = pods_on(view, node)
        check_radius(view, hit, what=f"The crash of {node.name}")
        job, undo = pinned_job(
            view,
            "node-crash",
            node.name,
            CRASH,
            env={},
            seconds=120,
            paths={"/proc/sysrq-trigger": "/sysrq-trigger"},
        )
        seen = visible(hit)
        return Plan(
            facts=FaultFacts(
                name="node crash",
                title=f"{node.name} is reset without warning: {len(hit)} pod(s) end with it",
                one_shot=True,
                lasting=self.lasting,
                pods=tuple(sorted(pod.key for pod in hit)),
                nodes=(node.name,),
                zone=node.zone,
                fidelity=(
                    "Real: kernel, kubelet and pods end at the same instant and close nothing; connections hang; the "
                    "machine boots again by itself.",
                    "Not covered: a machine that never comes back, lost disks.",
                    *unseen(hit, seen),
                ),
            ),
            acts=(Job("node-crash", job, Dead(seen), within=BOOTS, until="active", harms=True),),
            undos=(undo,),
            avoid=(node.name,),
            cluster_wide=True,
            resets=(node.name,),
        )


@dataclass(frozen=True, slots=True)
class NodeDrain:
    """`count` nodes that run engines, drawn by the seed, are drained at once, as before maintenance.

    They are cordoned, then their pods are evicted through the Eviction API, so that disruption budgets are honoured:
    what they refuse (429) is asked for again, as `kubectl drain` does, until `lasting` is over. DaemonSet pods stay.
    The undo uncordons.
    """

    lasting: float
    count: int = 1

    @property
    def one_shot(self) -> bool:
        return False

    def plan(self, view: View) -> Plan:
        nodes = nodes_with_engines(view, self.count)
        names = tuple(node.name for node in nodes)
        what = f"The drain of {', '.join(names)}"
        hit = [pod for node in nodes for pod in pods_on(view, node) if not pod.owner.startswith("DaemonSet/")]
        if not hit:
            raise TargetError(f"{what} would move nobody: only DaemonSets' pods run there, which stay.")
        check_replaced(hit, what=what)
        check_radius(view, tuple(hit), what=what)
        evict = Evict(tuple(sorted((pod.key, pod.uid) for pod in hit)), within=self.lasting, proof=Cordoned(names))
        return Plan(
            facts=FaultFacts(
                name="node drain",
                title=f"{', '.join(names)} drained: {len(hit)} pod(s) evicted as disruption budgets allow",
                one_shot=False,
                lasting=self.lasting,
                pods=tuple(sorted(pod.key for pod in hit)),
                nodes=names,
                fidelity=(
                    "Real: nodes are cordoned and their pods of this namespace evicted through the Eviction API; "
                    "disruption budgets may refuse.",
                    "Left out: DaemonSet pods, pods of other namespaces.",
                ),
            ),
            acts=(Cordon(tuple((node.name, node.uid) for node in nodes), view.token), evict),
            undos=tuple(
                Undo(verb="uncordon", what="cordon", name=node.name, uid=node.uid, value=view.token) for node in nodes
            ),
            avoid=names,
            in_turn=len(hit),  # at most: budgets only make it fewer
            cluster_wide=True,
        )


def nodes_with_engines(view: View, count: int = 1) -> tuple[Node, ...]:
    """`count` ready nodes that run ready engines and are not cordoned, drawn by the seed."""
    holders = {pod.node for pod in view.ready}
    nodes = sorted(
        (node for node in view.nodes if node.name in holders and node.ready and not node.unschedulable),
        key=lambda node: node.name,
    )
    if count < 1 or len(nodes) < count:
        raise TargetError(
            f"{len(nodes)} schedulable node(s) run ready pods of {view.selector!r}; the fault wants {count}."
        )
    return tuple(sorted(view.draw().sample(nodes, count), key=lambda node: node.name))


def pods_on(view: View, node: Node) -> tuple[Pod, ...]:
    return tuple(pod for pod in view.pods if pod.node == node.name and pod.phase == "Running" and not pod.terminating)
