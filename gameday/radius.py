"""The blast radius, checked on the finished plan: what it would hit, and what it must not.

`faults.base.check_radius` looks at the engines while a fault is planned; here everything else is looked at, for every
fault alike: namespaces and selectors, zones and nodes, protected labels, disruption budgets, and what the harness
itself stands on (Prometheus, its gateway, the load generator, Chaos Mesh). What may not be read is told, not assumed.

Raises `TargetError`; nothing is changed.
"""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from faults.act import manifests
from faults.base import Plan, View
from gameday.cluster import Cluster, Obj, Pod, Refused, to_pod
from gameday.errors import TargetError
from gameday.kinds import BY_KIND, ENDPOINTSLICES, NODES, PDBS, PODS
from gameday.settings import Settings

CHOOSES = ("pods", "labelSelectors", "expressionSelectors", "nodes", "nodeSelectors", "fieldSelectors")
PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True)
class Radius:
    """What a plan hits: pods by key, nodes by name."""

    pods: frozenset[str]
    nodes: frozenset[str]

    @classmethod
    def of(cls, plan: Plan) -> Radius:
        return cls(frozenset(plan.facts.pods), frozenset(plan.facts.nodes))

    @classmethod
    def at_once(cls, plan: Plan) -> Radius:
        """What is away at the same time."""
        if not plan.in_turn:
            return cls.of(plan)
        return cls(frozenset(sorted(plan.facts.pods)[: plan.in_turn]), frozenset())

    def holds(self, pod: Pod) -> bool:
        return pod.key in self.pods or pod.node in self.nodes


def check(plan: Plan, view: View, settings: Settings, cluster: Cluster) -> tuple[str, ...]:
    """Raise `TargetError` for the first thing that is wrong; returns what could not be looked at, in words."""
    for _, manifest in manifests(plan.acts):
        _selects(manifest, settings.allow_namespaces)
    radius = Radius.of(plan)
    unseen = []
    if not view.expendable:
        _shares(radius, plan, view, settings)
        if not settings.overrule_pdbs and not plan.in_turn:  # what goes in turn heeds them by itself
            try:
                budgets = cluster.list(PDBS, view.namespace)
            except Refused as refused:
                unseen.append(f"PodDisruptionBudgets cannot be seen: {refused}")
            else:
                _budgets(radius, view, budgets)
    _protected(radius, view, cluster, settings.protected)
    unseen += _bystanders(plan, settings, cluster)
    return (*unseen, *_own_ground(radius, view, settings, cluster))


def busy_without(plan: Plan, view: View, busy: float) -> tuple[float, int, int]:
    """(how busy the average engine left would be, engines hit, engines ready), when it is `busy` with all of them."""
    at_once = Radius.at_once(plan)
    hit = sum(at_once.holds(pod) for pod in view.ready)
    left = len(view.ready) - hit
    return (busy * len(view.ready) / left if left else math.inf), hit, len(view.ready)


# ── selectors and shares ────────────────────────────────────────────────────────────────────────


def _selects(manifest: Obj, allowed: tuple[str, ...]) -> None:
    """Chaos resources select by name, in namespaces that are allowed; what is left empty would mean everything."""
    if BY_KIND[manifest["kind"]].group != "chaos-mesh.org":
        return
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    for selector in _selectors(manifest["spec"]):
        namespaces = set(selector.get("namespaces") or ()) | set(selector.get("pods") or ())
        if not selector.get("namespaces") or not any(selector.get(key) for key in CHOOSES):
            raise TargetError(f"{name} has an empty selector, which would mean every pod: it must name its targets.")
        if outside := sorted(namespaces - set(allowed)):
            raise TargetError(
                f"{name} reaches into {', '.join(outside)}, which is not in allow_namespaces ({', '.join(allowed)})."
            )


def _selectors(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield spec.get("selector") or {}
    if target := spec.get("target"):
        yield target.get("selector") or {} if isinstance(target, Mapping) else {}


def _shares(radius: Radius, plan: Plan, view: View, settings: Settings) -> None:
    zones = {pod.zone for pod in view.ready if pod.zone}
    at_once = Radius.at_once(plan)
    lost = zones - {pod.zone for pod in view.ready if not at_once.holds(pod)}
    if zones and len(lost) / len(zones) > settings.max_zones:
        raise TargetError(
            f"{plan.facts.title}: {len(lost)} of {len(zones)} zones would lose every engine, more than the allowed "
            f"{settings.max_zones:.0%}: choose another target or raise max_zones."
        )
    if view.nodes and len(radius.nodes) / len(view.nodes) > settings.max_nodes:
        raise TargetError(
            f"{plan.facts.title}: it would hit {len(radius.nodes)} of {len(view.nodes)} nodes, more than the allowed "
            f"{settings.max_nodes:.0%}: choose another target or raise max_nodes."
        )


# ── who must not be hit ─────────────────────────────────────────────────────────────────────────


def _bears(labels: Mapping[str, str] | None, label: str) -> bool:
    key, _, value = label.partition("=")
    found = (labels or {}).get(key)
    return found is not None and value in ("", found)


def _protected(radius: Radius, view: View, cluster: Cluster, label: str) -> None:
    names = [pod.key for pod in view.pods if radius.holds(pod) and _bears(pod.labels, label)]
    if radius.nodes:
        nodes = (node["metadata"] for node in cluster.list(NODES))
        names += [
            f"node {meta['name']}"
            for meta in nodes
            if meta["name"] in radius.nodes and _bears(meta.get("labels"), label)
        ]
    _refuse_protected(names, label)


def _refuse_protected(names: Iterable[str], label: str) -> None:
    if found := sorted(names):
        raise TargetError(f"{', '.join(found[:4])} must not be hit: the label {label} protects it.")


def _bystanders(plan: Plan, settings: Settings, cluster: Cluster) -> Iterator[str]:
    """A reset ends the pods of every namespace. Those that belong to the node (DaemonSets', static ones) come back."""
    for node in plan.resets:
        try:
            found = cluster.list(PODS, fields=f"spec.nodeName={node}")
        except Refused as refused:
            if refused.code != 403:
                raise
            yield f"whose pods of other namespaces end with {node} cannot be seen: {refused}"
            continue
        pods = [pod for obj in found if (pod := to_pod(obj, {})).phase not in ("Succeeded", "Failed")]
        _refuse_protected((pod.key for pod in pods if _bears(pod.labels, settings.protected)), settings.protected)
        movable = [pod for pod in pods if not pod.owner.startswith(("DaemonSet/", "Node/"))]
        if others := sorted(pod.key for pod in movable if pod.namespace not in settings.allow_namespaces):
            raise TargetError(
                f"{plan.facts.title}: it would end {', '.join(others[:4])} as well, outside allow_namespaces "
                f"({', '.join(settings.allow_namespaces)}): choose another --seed, or allow these too."
            )


def _budgets(radius: Radius, view: View, budgets: Iterable[Obj]) -> None:
    """A budget's minAvailable says how many it takes to carry the load; maxUnavailable only limits who may evict.

    Either way, a budget that is not met before anything was done means that something is wrong already.
    """
    for budget in budgets:
        name, spec, status = budget["metadata"]["name"], budget["spec"], budget.get("status") or {}
        pods = [pod for pod in view.pods if _matches(spec.get("selector") or {}, pod.labels)]
        hit = [pod for pod in pods if pod.ready and radius.holds(pod)]
        if not hit:
            continue
        healthy, desired = status.get("currentHealthy", 0), status.get("desiredHealthy", 0)
        if healthy < desired:
            raise TargetError(
                f"PodDisruptionBudget {name} is not met as it is ({healthy} healthy of {desired}): wait until it is."
            )
        if "minAvailable" in spec and healthy - len(hit) < desired:
            raise TargetError(
                f"PodDisruptionBudget {name} wants {desired} pods; {healthy - len(hit)} of {healthy} would be left, "
                "too few to carry the load. Choose a smaller target, or set overrule_pdbs if that is the test."
            )


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A label selector as Kubernetes has it."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for one in selector.get("matchExpressions") or []:
        found, values = labels.get(one["key"]), one.get("values") or []
        met = {
            "In": found is not None and found in values,
            "NotIn": found is None or found not in values,
            "Exists": found is not None,
            "DoesNotExist": found is None,
        }
        if not met.get(one["operator"], False):
            return False
    return True


# ── what the harness stands on ──────────────────────────────────────────────────────────────────


def _own_ground(radius: Radius, view: View, settings: Settings, cluster: Cluster) -> Iterator[str]:
    for what, url in (("Prometheus", settings.prometheus), ("the gateway that the load goes through", settings.target)):
        try:
            _refuse_if_all(radius, what, _behind(url, view, cluster, settings.in_cluster))
        except Refused as refused:
            yield f"whether {what} ({url}) lies inside the blast radius cannot be seen: {refused}"
    if settings.in_cluster:
        try:
            _refuse_if_all(radius, "the load generator", _ourselves(cluster, view))
        except Refused as refused:
            yield f"whether the load generator lies inside the blast radius cannot be seen: {refused}"
    meshed = [pod for pod in view.pods if pod.labels.get(PART_OF) == "chaos-mesh"]
    _refuse_if_all(radius, "Chaos Mesh", meshed)
    if settings.chaos_namespace and radius.nodes:
        labels = f"{COMPONENT}=controller-manager"
        try:
            found = cluster.list(PODS, settings.chaos_namespace, labels=labels)
        except Refused as refused:
            yield f"whether Chaos Mesh lies inside the blast radius cannot be seen: {refused}"
        else:
            _refuse_if_all(radius, "Chaos Mesh's controller", [to_pod(obj, {}) for obj in found])


def _refuse_if_all(radius: Radius, what: str, pods: Iterable[Pod]) -> None:
    """What has a pod elsewhere goes on; what has none is lost with the fault, and our eyes with it."""
    found = list(pods)
    if found and all(radius.holds(pod) for pod in found):
        names = ", ".join(sorted(pod.key for pod in found)[:3])
        raise TargetError(f"{what} lies inside the blast radius ({names}): it would be lost with what it is to watch.")


def _behind(url: str, view: View, cluster: Cluster, in_cluster: bool) -> list[Pod]:
    """The pods that answer at a URL: a pod's own address, or a Service's ready endpoints. None: outside the cluster."""
    host = urlsplit(url).hostname
    if host is None:
        return []
    try:
        ipaddress.ip_address(host)
    except ValueError:
        parts = host.split(".")
        if parts[2:3] != ["svc"] and not (in_cluster and 1 <= len(parts) <= 2):
            return []  # a name of the world outside
        namespace = parts[1] if len(parts) > 1 else view.namespace
        return _endpoints(parts[0], namespace, view, cluster)
    return [pod for pod in view.pods if pod.ip == host]


def _endpoints(service: str, namespace: str, view: View, cluster: Cluster) -> list[Pod]:
    known = {pod.key: pod for pod in view.pods}
    found = []
    for piece in cluster.list(ENDPOINTSLICES, namespace, labels=f"kubernetes.io/service-name={service}"):
        for endpoint in piece.get("endpoints") or []:
            name = (endpoint.get("targetRef") or {}).get("name")
            if name is None or (endpoint.get("conditions") or {}).get("ready") is False:
                continue
            if pod := known.get(f"{namespace}/{name}"):
                found.append(pod)
            elif obj := cluster.find(PODS, name, namespace):
                found.append(to_pod(obj, {}))
    return found


def _ourselves(cluster: Cluster, view: View) -> list[Pod]:
    """Our own pod, where we run in the cluster."""
    name = os.environ.get("POD_NAME") or socket.gethostname()
    namespace = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else view.namespace
    obj = cluster.find(PODS, name, namespace)
    return [to_pod(obj, {})] if obj else []
