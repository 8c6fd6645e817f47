"""The rights that the harness needs, in one table: what `gameday rbac` prints and what the preflight asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from gameday.cluster import Obj
from gameday.kinds import (
    CONFIGMAPS,
    DEPLOYMENTS,
    ENDPOINTSLICES,
    EVENTS,
    JOBS,
    LEASES,
    NETWORKCHAOS,
    NODES,
    PODCHAOS,
    PODS,
    STRESSCHAOS,
    Kind,
)

WRITE = ("get", "list", "watch", "create", "patch", "delete")
NAME = "gameday"


@dataclass(frozen=True, slots=True)
class Right:
    kind: Kind
    verbs: tuple[str, ...]
    where: str  # "target": the namespace under test; "default"; "cluster"
    why: str
    sub: str = ""


RIGHTS: tuple[Right, ...] = (
    Right(PODS, WRITE, "target", "see the targets, run probers"),
    Right(PODS, ("get",), "target", "read the probers' logs", sub="log"),
    Right(CONFIGMAPS, WRITE, "target", "the ledger of undos"),
    Right(LEASES, (*WRITE, "update"), "target", "the lock"),
    Right(EVENTS, ("get", "list", "watch"), "target", "the record"),
    Right(ENDPOINTSLICES, ("get", "list", "watch"), "target", "who is in rotation"),
    Right(DEPLOYMENTS, ("get", "list", "patch"), "target", "the rollout restart that rebalances after a zone outage"),
    Right(JOBS, WRITE, "target", "the Job that writes a kernel-log line"),
    Right(PODCHAOS, WRITE, "target", "pod faults"),
    Right(NETWORKCHAOS, WRITE, "target", "partitions"),
    Right(STRESSCHAOS, ("get", "list", "watch", "delete"), "target", "look for leftovers"),
    Right(LEASES, (*WRITE, "update"), "default", "the cluster-wide lock of node and zone faults"),
    Right(EVENTS, ("get", "list", "watch"), "default", "what detectors report about nodes"),
    Right(NODES, ("get", "list", "watch", "patch"), "cluster", "zones, cordons"),
    Right(NODES, ("get", "patch"), "cluster", "GPUs out of allocatable", sub="status"),
)


def _rules(rights: Sequence[Right]) -> list[Obj]:
    return [
        {
            "apiGroups": [right.kind.group],
            "resources": [right.kind.plural + (f"/{right.sub}" if right.sub else "")],
            "verbs": list(right.verbs),
        }
        for right in rights
    ]


def manifests(namespace: str) -> list[Obj]:
    """Role and ClusterRole with their bindings for a ServiceAccount `gameday` in `namespace`."""
    api = "rbac.authorization.k8s.io/v1"
    subject = {"kind": "ServiceAccount", "name": NAME, "namespace": namespace}
    found: list[Obj] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME, "namespace": namespace}}
    ]
    for where, kind in ((namespace, "Role"), ("default", "Role"), ("", "ClusterRole")):
        place = "cluster" if not where else "target" if where == namespace else "default"
        metadata = {"name": NAME} | ({"namespace": where} if where else {})
        rules = _rules([right for right in RIGHTS if right.where == place])
        found.append({"apiVersion": api, "kind": kind, "metadata": metadata, "rules": rules})
        found.append(
            {
                "apiVersion": api,
                "kind": f"{kind}Binding",
                "metadata": dict(metadata),
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": NAME},
                "subjects": [subject],
            }
        )
    return found


def show(namespace: str) -> str:
    """The manifests as one YAML stream, to be piped into `kubectl apply -f -`."""
    return yaml.safe_dump_all(manifests(namespace), sort_keys=False)
