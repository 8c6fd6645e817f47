"""What a fault is made of: a pure plan of acts, each with its proofs and its undo.

A fault is a frozen dataclass. `plan(view)` is a pure function of the cluster's topology: it chooses the
targets, writes the manifests, and says how each act is proven and undone. Nothing here touches a cluster;
`faults.act` does, and `faults.undo` takes back.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gameday.cluster import CORDONED as CORDONED, Node, Obj, Pod, Workload
from gameday.errors import TargetError
from gameday.kinds import JOBS, Kind
from gameday.model import FaultFacts

MANAGED = "app.kubernetes.io/managed-by"
RUN = "gameday.dev/run"
EXPIRES = "gameday.dev/expires"
ROLE = "gameday.dev/role"
ROLLED = "gameday.dev/rolled-out-by"  # annotation on a pod template that we changed

OURS = f"{MANAGED}=gameday"

NAME_MAX = 63  # of a Job, whose pods bear its name as a label
MARGIN = 30.0  # seconds by which a resource's own end outlives the heal that we intend


@dataclass(frozen=True, slots=True)
class Zone:
    name: str

    def __str__(self) -> str:
        return self.name


def name_for(token: str, what: str) -> str:
    """A name that Kubernetes takes for every kind (DNS label, at most 63), however a pod or zone is called."""
    wanted = f"gd-{token}-{what}".rstrip("-")
    safe = re.sub(r"[^a-z0-9-]+", "-", wanted.lower()).strip("-")
    if safe == wanted and len(safe) <= NAME_MAX:
        return wanted
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:8]  # what was cut off or replaced must still tell them apart
    return f"{safe[: NAME_MAX - 9].rstrip('-')}-{digest}"


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
    workloads: tuple[Workload, ...] = ()  # the namespace's Deployments
    model: str = ""  # its name, for a generation that proves something
    job_image: str = "busybox:1.36"  # of the Jobs that act on a node: any with a shell

    def draw(self) -> random.Random:
        """The one source of chance; the same seed draws the same targets."""
        return random.Random(self.seed)  # noqa: S311 - reproducible on purpose

    @property
    def ready(self) -> tuple[Pod, ...]:
        return tuple(sorted((pod for pod in self.engines if pod.ready), key=lambda pod: pod.name))

    def name(self, what: str) -> str:
        """A globally unique name: Chaos Mesh derives chain names from it (facts/chaos-mesh.md)."""
        return name_for(self.token, what)

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


@dataclass(frozen=True, slots=True)
class Mute:
    """The pods take requests and do not answer them in time, while others do; until the heal, or until the service
    restarts or removes them, which is what is hoped for.

    `ask` "health": not even `health` is answered (GET). "generate": `health` is, a generation of one token is not.
    """

    pods: tuple[str, ...]  # "ns/pod"
    ask: Literal["health", "generate"]
    health: str = "/health"
    generate: str = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Cordoned:
    """The watch sees the nodes unschedulable, and at least one pod end whose eviction was accepted."""

    nodes: tuple[str, ...]
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Newborn:
    """The watch sees a new pod of the Deployment `owner`, made after the harm began.

    `lasting`: until the heal, or somebody else (GitOps) has taken the update back. A bad version is meant to be.
    """

    owner: str
    lasting: bool = False


Seeable = Cut | Dead | Mute  # by the probers
Proof = Cut | Dead | Detected | Mute | Cordoned | Newborn


# ── undos: data, one JSON line each, written before the harm ────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Undo:
    """How one act is taken back, by anyone who can read this line. Safe to repeat.

    `verb` "delete": the object `kind`/`name` is deleted (and waited for until it is gone).
    "uncordon": spec.unschedulable is lifted from node `name`, if it still has `uid` and our mark `value`.
    "allocatable": node `name` (if it still has `uid`) gets `value` of `resource` back, where it offers `ours`.
    "template": Deployment `name` (if it still has `uid`) loses what we put into its pod template. `value` is JSON:
    our `token` there and, where we changed an image, the `container`, our `image` and what it `was`.
    "rollback": the rollbacks of the Chaos Toolkit experiment `value` are run, in their order.
    `stage` "heal" is undone when the fault ends; "clean" when the experiment does (our probers).
    """

    verb: Literal["delete", "uncordon", "allocatable", "template", "rollback"]
    what: str
    name: str
    kind: str = ""
    namespace: str = ""
    uid: str = ""
    resource: str = ""
    value: str = ""
    ours: str = ""  # what the act wrote; "" where that need not be known
    stage: Literal["heal", "clean"] = "heal"
    running: tuple[str, ...] = ()  # pods whose containers must run again before the next undo

    def command(self) -> str:
        """The same by hand, for the message that asks for it."""
        if self.verb == "rollback":
            return f"run the rollbacks of {self.name!r} yourself"
        if self.verb == "uncordon":
            return f"kubectl uncordon {self.name}"
        if self.verb == "allocatable":
            return (
                f"kubectl patch node {self.name} --subresource=status --type=merge "
                f'-p \'{{"status":{{"allocatable":{{"{self.resource}":"{self.value}"}}}}}}\''
            )
        if self.verb == "template":
            return f"kubectl -n {self.namespace} rollout undo deployment {self.name}"
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

    nodes: tuple[tuple[str, str], ...]  # (name, uid)
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
    """Run a Job until it has succeeded, is ready, or has a pod that found its node; `proof` is looked for after that.

    `harms`: it is itself the fault, so that the clock of the recovery starts with it.
    """

    what: str
    manifest: Obj
    proof: Proof | None = None
    within: float = 30.0
    until: Literal["succeeded", "ready", "active"] = "succeeded"
    harms: bool = False


@dataclass(frozen=True, slots=True)
class Evict:
    """Ask for the eviction of each pod, as long as a disruption budget refuses it; then wait until all are gone.

    Being refused until the end is an answer, not an error: the objectives judge it. Of all of them, it is no effect.
    """

    pods: tuple[tuple[str, str], ...]  # ("ns/pod", uid)
    within: float
    proof: Proof | None = None
    what: str = "evict"
    every: float = 1.0  # seconds between two requests for the same pod


@dataclass(frozen=True, slots=True)
class Roll:
    """Merge `template` (strategic) into the pod template of a Deployment."""

    name: str
    namespace: str
    uid: str
    template: Obj
    proof: Proof | None = None
    within: float = 30.0
    what: str = "rollout"


@dataclass(frozen=True, slots=True)
class Call:
    """Run activity `number` of the method of a team's own Chaos Toolkit experiment (its canonical JSON)."""

    what: str
    experiment: str
    number: int
    action: bool  # False: a probe, which harms nobody


Act = Apply | Cordon | Allocatable | Job | Evict | Roll | Call


def harmful(act: Act) -> bool:
    """Whether users may feel it: the recovery's clock starts with the first such act."""
    return (
        isinstance(act, Apply | Evict | Roll)
        or (isinstance(act, Job) and act.harms)
        or (isinstance(act, Call) and act.action)
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """All that one fault will do, fixed before it does anything."""

    facts: FaultFacts
    acts: tuple[Act, ...]
    undos: tuple[Undo, ...]  # in the order in which they are undone
    rebalance: tuple[str, ...] = ()  # Deployments to restart after the heal, so that they spread again
    in_turn: int = 0  # > 0: a strategy or budgets see to it that only so many of the pods are away at the same time
    settles: tuple[str, ...] = ()  # Deployments whose rollout must end after the heal
    avoid: tuple[str, ...] = ()  # nodes that may vanish: probers go elsewhere if they can
    cuts: str = ""  # the zone whose border the probers watch; "" for none
    needs: tuple[str, ...] = ()  # chaos resources (plurals) that must be served
    cluster_wide: bool = False  # touches nodes: takes the cluster-wide lock as well
    resets: tuple[str, ...] = ()  # nodes that are reset, with all that runs on them, of whichever namespace


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


def bites(pods: Sequence[Pod]) -> float:
    """Seconds until a chaos resource on these pods must act: the controller goes through its records one by one."""
    return 10.0 + 0.2 * len(pods)


def stops(pods: Sequence[Pod], lasting: float) -> float:
    """… a pod-failure, whose change of image stops the containers with their pod's own grace period.

    Not much longer than it lasts: what has not acted by then acts no more.
    """
    return min(bites(pods) + max([30, *(pod.grace for pod in pods)]) + 5, max(45.0, lasting))


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


def visible(pods: Sequence[Pod]) -> tuple[str, ...]:
    """Those ("ns/pod") whose death can be seen from outside: only what took connections can be seen to take none."""
    return tuple(sorted(pod.key for pod in pods if pod.ready and pod.ip and pod.ports and not pod.host_network))


def unseen(pods: Sequence[Pod], seen: tuple[str, ...]) -> tuple[str, ...]:
    """What a fault's fidelity must say of the others, which it hits as well."""
    names = sorted(pod.name for pod in pods if pod.key not in seen)
    if not names:
        return ()
    told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (f"Not seen from outside: the end of {told} (not ready, or no TCP port of its own).",)


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


def pinned_to(node: str) -> Obj:
    """The affinity of a pod that fits this node only.

    By its name: the label kubernetes.io/hostname is what the machine calls itself, often another name (AWS: a node
    `ip-10-0-0-1.ec2.internal`, its label `ip-10-0-0-1`).
    """
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


def pinned_job(
    view: View,
    what: str,
    node: str,
    script: str,
    *,
    env: Mapping[str, str],
    seconds: int,
    paths: Mapping[str, str] | None = None,
    host_pids: bool = False,
    ready: Sequence[str] = (),
) -> tuple[Obj, Undo]:
    """A privileged Job of one shell script, once, on one node, with a deadline of its own; and its undo.

    `paths`: of the host → in the container. `ready`: the command by which it tells that its work is in force.
    """
    volumes = [{"name": f"v{n}", "hostPath": {"path": path}} for n, path in enumerate(paths or {})]
    mounts = [{"name": f"v{n}", "mountPath": path} for n, path in enumerate((paths or {}).values())]
    container: Obj = {
        "name": "agent",
        "image": view.job_image,
        "command": ["sh", "-c", script],
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "securityContext": {"privileged": True},
    }
    if mounts:
        container["volumeMounts"] = mounts
    if ready:
        container["readinessProbe"] = {"exec": {"command": list(ready)}, "periodSeconds": 1}
    pod: Obj = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 10,
        "affinity": pinned_to(node),
        "tolerations": [{"operator": "Exists"}],
        "containers": [container],
    }
    if volumes:
        pod["volumes"] = volumes
    if host_pids:
        pod["hostPID"] = True
    metadata = view.metadata(what)
    spec = {
        "backoffLimit": 0,
        "activeDeadlineSeconds": seconds,
        "ttlSecondsAfterFinished": 600,
        "template": {"metadata": {"labels": dict(view.labels)}, "spec": pod},
    }
    manifest = {"apiVersion": JOBS.api_version, "kind": JOBS.kind, "metadata": metadata, "spec": spec}
    return manifest, delete(JOBS, metadata, what)


def check_replaced(pods: Sequence[Pod], *, what: str) -> None:
    """Refuse to delete pods that nothing would bring back."""
    if bare := sorted(pod.name for pod in pods if not pod.owner):
        raise TargetError(f"{what}: {', '.join(bare[:4])} belong to no controller, so nothing would bring them back.")


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
