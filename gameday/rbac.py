"""The rights that the harness needs, in one table: what `gameday rbac` prints and what the preflight asks for.

Least privilege: everything is a Role in the namespace under test, but for what has no namespace (nodes), the list of
all pods (to see which of other namespaces a node crash would end), what Kubernetes keeps in `default` (Events about
nodes, and the one place for a cluster-wide Lease), and, if named, a look at Chaos Mesh's controller. Rights with
`only_for="nodes"` are for zone and node faults, the one with `only_for="crash"` is not demanded (a node crash warns
without it), those with `only_for="own"` are for a team's own experiments (to see what they leave behind);
`--pods-only` leaves all of them out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from gameday.cluster import Obj
from gameday.errors import SettingsError
from gameday.kinds import (
    CONFIGMAPS,
    DEPLOYMENTS,
    ENDPOINTSLICES,
    EVENTS,
    HPAS,
    JOBS,
    LEASES,
    NAMESPACES,
    NETWORKCHAOS,
    NETWORKPOLICIES,
    NODES,
    PDBS,
    PODCHAOS,
    PODS,
    STATEFULSETS,
    STRESSCHAOS,
    Kind,
)

READ = ("get", "list", "watch")
WRITE = (*READ, "create", "patch", "delete")
NAME = "gameday"
CONTROLLER = "chaos-controller-manager"  # the Deployment of Chaos Mesh's chart
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Right:
    kind: Kind
    verbs: tuple[str, ...]
    where: str  # "target": the namespace under test; "default"; "cluster"; "chaos": where Chaos Mesh runs
    why: str
    sub: str = ""
    name: str = ""  # of one object alone
    only_for: str = ""  # "nodes": zone and node faults; "crash": node crashes; "own": a team's own experiments

    @property
    def resource(self) -> str:
        return self.kind.plural + (f"/{self.sub}" if self.sub else "")


LEFT = "what a team's own experiment leaves behind"
# Of Chaos Mesh 2.6 to 2.8, besides the three that gameday itself knows: what a team's experiment may leave behind.
OTHER_CHAOS = (
    ("awschaos", "AWSChaos"),
    ("azurechaos", "AzureChaos"),
    ("blockchaos", "BlockChaos"),
    ("dnschaos", "DNSChaos"),
    ("gcpchaos", "GCPChaos"),
    ("httpchaos", "HTTPChaos"),
    ("iochaos", "IOChaos"),
    ("jvmchaos", "JVMChaos"),
    ("kernelchaos", "KernelChaos"),
    ("physicalmachinechaos", "PhysicalMachineChaos"),
    ("schedules", "Schedule"),
    ("statuschecks", "StatusCheck"),
    ("timechaos", "TimeChaos"),
    ("workflownodes", "WorkflowNode"),
    ("workflows", "Workflow"),
)

RIGHTS: tuple[Right, ...] = (
    Right(NAMESPACES, ("get",), "target", "does it exist, may chaos be injected into it"),
    Right(PODS, WRITE, "target", "see the targets, run probers"),
    Right(PODS, ("get",), "target", "read the probers' logs", sub="log"),
    Right(
        PODS, ("create",), "target", "drain a node; replace pods in which a stuck fault left something", sub="eviction"
    ),
    Right(PDBS, ("list",), "target", "how many pods it takes to carry the load"),
    Right(CONFIGMAPS, WRITE, "target", "the ledger of undos, the stop that anyone may ask for"),
    Right(LEASES, (*WRITE, "update"), "target", "the lock"),
    Right(EVENTS, READ, "target", "the record"),
    Right(ENDPOINTSLICES, READ, "target", "who is in rotation"),
    Right(DEPLOYMENTS, ("get", "list", "patch"), "target", "rolling updates, and the restart that rebalances"),
    Right(JOBS, WRITE, "target", "Jobs that write a kernel-log line, reset a node, stop processes"),
    Right(PODCHAOS, WRITE, "target", "pod faults (Chaos Mesh's webhook asks for create as well)"),
    Right(NETWORKCHAOS, WRITE, "target", "partitions"),
    Right(STRESSCHAOS, (*READ, "delete"), "target", "look for leftovers"),
    *(
        Right(Kind(PODCHAOS.group, PODCHAOS.version, plural, kind), ("list",), "target", LEFT, only_for="own")
        for plural, kind in OTHER_CHAOS
    ),
    Right(STATEFULSETS, ("list",), "target", LEFT, only_for="own"),
    Right(NETWORKPOLICIES, ("list",), "target", LEFT, only_for="own"),
    Right(HPAS, ("list",), "target", "whose replicas are an autoscaler's doing, not an experiment's", only_for="own"),
    Right(EVENTS, READ, "default", "what detectors report about nodes"),
    Right(LEASES, (*WRITE, "update"), "default", "the cluster-wide lock of node and zone faults", only_for="nodes"),
    Right(DEPLOYMENTS, ("get",), "chaos", "its version and how it is installed", name=CONTROLLER),
    Right(PODS, ("list",), "chaos", "does it lie inside the blast radius"),
    Right(PODS, ("list",), "cluster", "whose pods of other namespaces end with a node", only_for="crash"),
    Right(NODES, READ, "cluster", "zones, who is ready"),
    Right(NODES, ("patch",), "cluster", "cordons", only_for="nodes"),
    Right(NODES, ("get", "patch"), "cluster", "GPUs out of allocatable", sub="status", only_for="nodes"),
)


def place(right: Right, namespace: str, chaos_namespace: str = "") -> str | None:
    """The namespace in which a right is needed; None for the whole cluster."""
    return {"target": namespace, "default": "default", "chaos": chaos_namespace, "cluster": None}[right.where]


def _rule(right: Right) -> Obj:
    rule: Obj = {"apiGroups": [right.kind.group], "resources": [right.resource], "verbs": list(right.verbs)}
    return rule | ({"resourceNames": [right.name]} if right.name else {})


def manifests(
    namespace: str, *, pods_only: bool = False, chaos_namespace: str = "", group: str = ""
) -> Iterator[tuple[tuple[Right, ...], Obj]]:
    """(the rights in it, manifest) for each: Roles and a ClusterRole with their bindings.

    They are bound to a ServiceAccount `gameday` in `namespace`, or to `group` (people who come by a kubeconfig).
    """
    api = "rbac.authorization.k8s.io/v1"
    subject: Obj = {"kind": "ServiceAccount", "name": NAME, "namespace": namespace}
    if group:
        subject = {"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": group}
    else:
        metadata: Obj = {"name": NAME, "namespace": namespace}
        yield (), {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
    wanted = [
        right for right in RIGHTS if not (pods_only and right.only_for) and (right.where != "chaos" or chaos_namespace)
    ]
    places = list(dict.fromkeys(place(right, namespace, chaos_namespace) for right in wanted))
    for where in places:
        here = tuple(right for right in wanted if place(right, namespace, chaos_namespace) == where)
        kind = "Role" if where is not None else "ClusterRole"
        # Two installations that test two namespaces must not overwrite each other's role in a shared place.
        metadata = {"name": NAME if where == namespace else f"{NAME}-{namespace}"}
        metadata |= {"namespace": where} if where is not None else {}
        yield here, {"apiVersion": api, "kind": kind, "metadata": metadata, "rules": [_rule(right) for right in here]}
        yield (
            (),
            {
                "apiVersion": api,
                "kind": f"{kind}Binding",
                "metadata": dict(metadata),
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": metadata["name"]},
                "subjects": [subject],
            },
        )


def show(namespace: str, *, pods_only: bool = False, chaos_namespace: str = "", group: str = "") -> str:
    """The manifests as one YAML stream, to be piped into `kubectl apply -f -`; each rule with its reason."""
    for name in (namespace, chaos_namespace):
        if name and not _LABEL.fullmatch(name):
            raise SettingsError(f"{name!r} cannot be a namespace: small letters, digits and hyphens, 63 at most.")
    parts = []
    for rights, obj in manifests(namespace, pods_only=pods_only, chaos_namespace=chaos_namespace, group=group):
        why = "".join(f"# {right.resource}: {', '.join(right.verbs)}: {right.why}\n" for right in rights)
        parts.append(why + yaml.safe_dump(obj, sort_keys=False))
    return "---\n".join(parts)


def missing(names: Sequence[tuple[str, Right, str | None]]) -> str:
    """`verb, verb resource in namespace; …`: each resource once."""
    verbs: dict[tuple[str, str | None], list[str]] = {}
    for verb, right, where in names:
        verbs.setdefault((right.resource, where), []).append(verb)
    told = [
        f"{', '.join(dict.fromkeys(found))} {what}" + (f" in {where}" if where else "")
        for (what, where), found in verbs.items()
    ]
    return "; ".join(told[:6]) + (f"; and {len(told) - 6} more" if len(told) > 6 else "")
