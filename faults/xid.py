"""GPU Xid errors: a signal that detectors see, and the effect that this Xid has on the workload.

Catalogue: facts/gpu-and-dr.md (NVIDIA's of 2025-10, EKS's node monitoring agent). Only Xids whose effect can
be made by Kubernetes means are offered; hangs are refused, since a stopped process is no hung GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from faults.base import (
    Act,
    Allocatable,
    Apply,
    Dead,
    Detected,
    Job,
    Plan,
    Undo,
    View,
    chaos,
    check_radius,
    delete,
    duration,
    pinned_to,
    selector_of,
    stops,
    unseen,
    visible,
)
from gameday.cluster import Node, Obj, Pod
from gameday.errors import ExperimentError, TargetError
from gameday.kinds import JOBS, PODCHAOS
from gameday.model import FaultFacts

GPU = "nvidia.com/gpu"
SIGNAL_SECONDS = 60  # the signal Job's own deadline


@dataclass(frozen=True, slots=True)
class Entry:
    """One Xid: its kernel-log text after the PCI address, its effect, and whether the node is to be replaced."""

    text: str
    effect: Literal["gpu gone", "container killed"]
    replaces_node: bool
    meaning: str


CATALOGUE: dict[int, Entry] = {
    13: Entry(
        "13, pid='<unknown>', name=<unknown>, Graphics SM Warp Exception on (GPC 9, TPC 1, SM 1): Out Of Range Address",
        "container killed",
        replaces_node=False,
        meaning="graphics engine exception (application fault)",
    ),
    79: Entry(
        "79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
        "gpu gone",
        replaces_node=True,
        meaning="GPU fallen off the bus",
    ),
}
HANGS = frozenset({46, 62, 109, 119, 120})


@dataclass(frozen=True, slots=True)
class Xid:
    """Xid `code` strikes one node that runs an engine on its GPUs, drawn by the seed.

    79 ends every process with GPUs on the node, keeps it from coming back, and takes the GPUs out of allocatable;
    13 kills the engine's container. The signal is a kernel-log line, written by a Job pinned to the node.
    """

    code: int
    lasting: float

    @property
    def one_shot(self) -> bool:
        return CATALOGUE[self.code].effect == "container killed"

    def __post_init__(self) -> None:
        if self.code in HANGS:
            raise ExperimentError(
                f"Xid {self.code} hangs the GPU, which Kubernetes means cannot imitate: choose 13 or 79."
            )
        if self.code not in CATALOGUE:
            raise ExperimentError(f"Xid {self.code} cannot be simulated; {sorted(CATALOGUE)} can.")

    def plan(self, view: View) -> Plan:
        entry = CATALOGUE[self.code]
        if entry.replaces_node and not view.sandbox and not view.allow_node_replacement:
            raise TargetError(
                f"Xid {self.code} makes node auto repair replace the node, which cannot be undone: "
                "give --allow-node-replacement if that is meant."
            )
        node = self._node(view)
        on_node = tuple(pod for pod in view.pods if pod.node == node.name and pod.gpus and pod.phase == "Running")
        engine = next(pod for pod in on_node if pod in view.ready)
        hit = on_node if entry.effect == "gpu gone" else (engine,)
        check_radius(view, hit, what=f"Xid {self.code} on {node.name}")
        seen = visible(hit)
        if not any(pod.key in seen for pod in view.ready):
            raise TargetError(
                f"No pod of {view.selector!r} on {node.name} declares a TCP port: "
                "its death could not be seen from outside."
            )
        signal = self._signal(view, node, entry)
        acts: list[Act] = [Job("signal", signal, Detected(node.name, self.code))]
        undos = [Undo("delete", "signal", signal["metadata"]["name"], kind=JOBS.kind, namespace=view.namespace)]
        effects = [_container_kill(view, pod, seen, self.lasting) for pod in hit]
        if entry.effect == "gpu gone":
            # A container that merely restarts would find a healthy GPU; a pod that merely fails would stop gracefully.
            effects.append(_pod_failure(view, hit, seen, self.lasting))
            acts.append(Allocatable(node.name, GPU, "0"))
            offered = str(node.gpus)
            undos.append(
                Undo("allocatable", "allocatable", node.name, uid=node.uid, resource=GPU, value=offered, ours="0")
            )
        acts += [act for act, _ in effects]
        undos[:0] = [undo for _, undo in reversed(effects)]
        return Plan(
            facts=FaultFacts(
                name=f"GPU Xid {self.code}",
                title=f"Xid {self.code}, {entry.meaning}, on {node.name}: {len(hit)} pod(s) lose their GPU",
                one_shot=self.one_shot,
                lasting=self.lasting,
                pods=tuple(sorted(pod.key for pod in hit)),
                nodes=(node.name,),
                zone=node.zone,
                fidelity=(
                    "Real: the kernel-log line reaches the node's detector; the processes that held the GPU end.",
                    "Emulated: no GPU failed; "
                    + (
                        "processes are killed, a pause image keeps them away, and allocatable is patched in the status "
                        "(on a real cluster the kubelet would post its own value again within seconds)."
                        if entry.effect == "gpu gone"
                        else "the container is killed as the driver would end its process."
                    ),
                    *unseen(hit, seen),
                ),
            ),
            acts=tuple(acts),
            undos=tuple(undos),
            avoid=(node.name,),
            needs=(PODCHAOS.plural,),
            cluster_wide=True,
        )

    def _node(self, view: View) -> Node:
        holders = {pod.node for pod in view.ready if pod.gpus}
        nodes = sorted((node for node in view.nodes if node.name in holders), key=lambda node: node.name)
        if not nodes:
            raise TargetError(f"No node runs a ready pod of {view.selector!r} with {GPU}: an Xid would hit nobody.")
        return view.draw().choice(nodes)

    def _signal(self, view: View, node: Node, entry: Entry) -> Obj:
        # journald strips a leading "NVRM:", hence "kernel: " before it (facts/gpu-and-dr.md).
        line = f"kernel: NVRM: Xid (PCI:0000:05:00): {entry.text}"
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": view.metadata(f"xid-{self.code}"),
            "spec": {
                "backoffLimit": 0,
                "activeDeadlineSeconds": SIGNAL_SECONDS,
                "ttlSecondsAfterFinished": 600,
                "template": {
                    "metadata": {"labels": dict(view.labels)},
                    "spec": {
                        "restartPolicy": "Never",
                        "affinity": pinned_to(node.name),
                        "tolerations": [{"operator": "Exists"}],
                        "containers": [
                            {
                                "name": "signal",
                                "image": view.job_image,
                                "command": ["sh", "-c", 'echo "$LINE" > /dev/kmsg'],
                                "env": [{"name": "LINE", "value": line}],
                                "securityContext": {"privileged": True},
                                "volumeMounts": [{"name": "kmsg", "mountPath": "/dev/kmsg"}],
                            }
                        ],
                        "volumes": [{"name": "kmsg", "hostPath": {"path": "/dev/kmsg"}}],
                    },
                },
            },
        }


def _pod_failure(view: View, hit: tuple[Pod, ...], seen: tuple[str, ...], lasting: float) -> tuple[Apply, Undo]:
    metadata = view.metadata("pod-failure")
    names = tuple(sorted(pod.key for pod in hit))
    spec = {
        "action": "pod-failure",
        "mode": "all",
        "selector": selector_of(view.namespace, hit),
        "duration": duration(lasting),
    }
    act = Apply(
        "pod-failure", PODCHAOS, chaos(PODCHAOS, metadata, spec), len(hit), Dead(seen), within=stops(hit, lasting)
    )
    return act, delete(PODCHAOS, metadata, "pod-failure", running=names)


def _container_kill(view: View, engine: Pod, seen: tuple[str, ...], lasting: float) -> tuple[Apply, Undo]:
    what = f"container-kill-{engine.name}"
    metadata = view.metadata(what)
    spec = {
        "action": "container-kill",
        "mode": "all",
        "containerNames": [engine.container],
        "selector": selector_of(view.namespace, (engine,)),
        "duration": duration(lasting),
    }
    proof = Dead((engine.key,)) if engine.key in seen else None
    act = Apply(what, PODCHAOS, chaos(PODCHAOS, metadata, spec), 1, proof)
    return act, delete(PODCHAOS, metadata, what)
