"""What a fault is made of: a pure plan of acts, each with its proofs and its undo.

A fault is a frozen dataclass. `plan(view)` is a pure function of the cluster's topology: it chooses the
targets, writes the manifests, and says how each act is proven and undone. Nothing here touches a cluster;
`faults.act` does, and `faults.undo` takes back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gameday.cluster import CORDONED as CORDONED, Node, Obj, Pod
from gameday.errors import TargetError
from gameday.kinds import Kind
from gameday.model import FaultFacts

MANAGED = "app.kubernetes.io/managed-by"
RUN = "gameday.dev/run"
EXPIRES = "gameday.dev/expires"
ROLE = "gameday.dev/role"

OURS = f"{MANAGED}=gameday"

MARGIN = 30.0  # seconds by which a resource's own end outlives the heal that we intend


@dataclass(frozen=True, slots=True)
class Zone:
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class View:
    """The cluster at one instant, as a fault may see it."""

    namespace: str
    selector: str
    engines: tuple[Pod, ...]  # pods that the selector selects
    pods: tuple[Pod, ...]  # all pods of the namespace, ours excluded
    nodes: tuple[Node, ...]
    token: str  # makes names unique: of this run and trial
    probers: tuple[tuple[str, str], ...]  # (name, zone) of our prober pods, which a cut includes
    labels: Mapping[str, str]  # for every object that we make
    seed: int
    max_share: float
    expendable: bool
    allow_node_replacement: bool
    sandbox: bool

    def draw(self) -> random.Random:
        """The one source of chance; the same seed draws the same targets."""
        return random.Random(self.seed)  # noqa: S311 - reproducible on purpose

    @property
    def ready(self) -> tuple[Pod, ...]:
        return tuple(sorted((pod for pod in self.engines if pod.ready), key=lambda pod: pod.name))

    def name(self, what: str) -> str:
        """A globally unique name: Chaos Mesh derives chain names from it (facts/chaos-mesh.md)."""
        return f"gd-{self.token}-{what}"

    def metadata(self, what: str) -> Obj:
        return {"name": self.name(what), "namespace": self.namespace, "labels": dict(self.labels)}


# ── proofs of the effect ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Cut:
    """Probes across the zone's border fail while pairs on one side of it succeed."""

    zone: str
    lasting: bool = True


@dataclass(frozen=True, slots=True)
class Dead:
    """Nothing answers at the pods' addresses any more, while other pods answer."""

    pods: tuple[str, ...]  # "ns/pod"
    zone: str = ""  # only probers of this zone can see them (the others are cut off); "" = all
    lasting: bool = False  # False: a process once gone does not come back under its address


@dataclass(frozen=True, slots=True)
class Detected:
    """A detector on the node has reported the Xid: a condition or an Event with its code."""

    node: str
    xid: int
    lasting: bool = False


Proof = Cut | Dead | Detected


# ── undos: data, one JSON line each, written before the harm ────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Undo:
    """How one act is taken back, by anyone who can read this line. Safe to repeat.

    `verb` "delete": the object `kind`/`name` is deleted (and waited for until it is gone).
    "uncordon": spec.unschedulable is lifted from node `name`, if it still has `uid` and our mark `value`.
    "allocatable": node `name` (if it still has `uid`) gets `value` of `resource` back.
    `stage` "heal" is undone when the fault ends; "clean" when the experiment does (our probers).
    """

    verb: Literal["delete", "uncordon", "allocatable"]
    what: str
    name: str
    kind: str = ""
    namespace: str = ""
    uid: str = ""
    resource: str = ""
    value: str = ""
    stage: Literal["heal", "clean"] = "heal"
    running: tuple[str, ...] = ()  # pods whose containers must run again before the next undo

    def command(self) -> str:
        """The same by hand, for the message that asks for it."""
        if self.verb == "uncordon":
            return f"kubectl uncordon {self.name}"
        if self.verb == "allocatable":
            return (
                f"kubectl patch node {self.name} --subresource=status --type=merge "
                f'-p \'{{"status":{{"allocatable":{{"{self.resource}":"{self.value}"}}}}}}\''
            )
        return f"kubectl -n {self.namespace} delete {self.kind.lower()} {self.name}"


# ── acts ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Apply:
    """Create a chaos resource. Injected = all of exactly `records` records are."""

    what: str
    kind: Kind
    manifest: Obj
    records: int
    proof: Proof | None = None
    within: float = 10.0  # seconds until both proofs must be there


@dataclass(frozen=True, slots=True)
class Cordon:
    """Mark nodes unschedulable. Harmless to whoever runs already."""

    nodes: tuple[str, ...]
    token: str  # of this run: written on the node, so that nobody else's cordon is ever lifted
    what: str = "cordon"


@dataclass(frozen=True, slots=True)
class Allocatable:
    """Patch what the node offers to the scheduler (its status)."""

    node: str
    resource: str
    value: str
    what: str = "allocatable"


@dataclass(frozen=True, slots=True)
class Job:
    """Run a Job to its end; `proof` is looked for after it."""

    what: str
    manifest: Obj
    proof: Proof | None = None
    within: float = 30.0


Act = Apply | Cordon | Allocatable | Job


@dataclass(frozen=True, slots=True)
class Plan:
    """All that one fault will do, fixed before it does anything."""

    facts: FaultFacts
    acts: tuple[Act, ...]
    undos: tuple[Undo, ...]  # in the order in which they are undone
    rebalance: tuple[str, ...] = ()  # Deployments to restart after the heal, so that they spread again
    avoid: tuple[str, ...] = ()  # nodes that may vanish: probers go elsewhere if they can
    cuts: str = ""  # the zone whose border the probers watch; "" for none
    needs: tuple[str, ...] = ()  # chaos resources (plurals) that must be served
    cluster_wide: bool = False  # touches nodes: takes the cluster-wide lock as well


class Fault(Protocol):
    """A fault chosen by an experiment."""

    @property
    def lasting(self) -> float: ...

    @property
    def one_shot(self) -> bool: ...

    def plan(self, view: View) -> Plan:
        """Choose targets and write everything down. Raises `TargetError` when the blast radius forbids it."""
        ...


# ── shared pieces ───────────────────────────────────────────────────────────────────────────────


def duration(lasting: float, margin: float = MARGIN) -> str:
    """The server-side end of a chaos resource: it outlives our heal, but never by long."""
    return f"{math.ceil(lasting + margin)}s"


def selector_of(namespace: str, pods: tuple[Pod, ...], also: tuple[str, ...] = ()) -> Obj:
    """An explicit selection of named pods (`also`: our probers): never empty, never "everything"."""
    if not pods:
        raise TargetError("The fault would select no pod: check the selector and that its pods are ready.")
    return {
        "namespaces": [namespace],
        "pods": {namespace: sorted([*(pod.name for pod in pods), *also])},
        "podPhaseSelectors": ["Running"],
    }


def chaos(kind: Kind, metadata: Obj, spec: Mapping[str, Any]) -> Obj:
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": dict(spec)}


def delete(kind: Kind, metadata: Mapping[str, Any], what: str, running: tuple[str, ...] = ()) -> Undo:
    return Undo(
        verb="delete",
        what=what,
        kind=kind.kind,
        name=metadata["name"],
        namespace=metadata["namespace"],
        running=running,
    )


def check_radius(view: View, hit: tuple[Pod, ...], *, what: str) -> None:
    """Refuse a fault that takes more than the allowed share of the ready engines, or the last healthy zone."""
    if not view.ready:
        raise TargetError(f"No ready pod matches {view.selector!r} in {view.namespace}: nothing can be tested.")
    if view.expendable:
        return
    lost = [pod for pod in view.ready if pod in hit]
    share = len(lost) / len(view.ready)
    if share > view.max_share:
        raise TargetError(
            f"{what} would hit {len(lost)} of {len(view.ready)} ready replicas ({share:.0%}), more than the allowed "
            f"{view.max_share:.0%}: choose another target or raise max_share."
        )
    zones = {pod.zone for pod in view.ready}
    left = {pod.zone for pod in view.ready if pod not in hit}
    if not left:
        raise TargetError(
            f"{what} would leave no healthy zone (of {', '.join(sorted(zones))}): nothing could take over."
        )
