"""Preflight: everything that must be so before a fault may be thought of. `gameday doctor` shows the same checks.

Each check returns its finding in words or raises the `GamedayError` that says what is wrong. Nothing is changed:
what a server would refuse (Pod Security, quotas, Chaos Mesh's webhooks) is found out by dry runs on the server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from faults.act import manifests
from faults.base import Job, Plan
from gameday import leave
from gameday.cluster import Cluster, Obj, Refused
from gameday.errors import ClusterError, GamedayError, HealError, MissingCapability, PrometheusError, TargetError
from gameday.kinds import BY_KIND, DEPLOYMENTS, NAMESPACES, NETWORKCHAOS, PODCHAOS, PODS
from gameday.ledger import leftovers, strays
from gameday.lock import live_holder
from gameday.rbac import CONTROLLER, RIGHTS, Right, missing, place
from gameday.settings import Settings
from loadgen.check import one_token
from probes.prometheus import Prometheus
from probes.reach import prober

CHAOS = "chaos-mesh.org/v1alpha1"
CHAOS_KINDS = ("networkchaos", "podchaos")
CHAOS_VERSIONS = ("2.6", "2.7", "2.8")  # whose sources and CRDs this is written against
_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+(:\d+)?|\[?[0-9a-fA-F:]*:[0-9a-fA-F:]*:[0-9a-fA-F:.]*\]?(:\d+)?")
INJECT = "chaos-mesh.org/inject"  # annotation of a namespace into which chaos may go, where Chaos Mesh filters


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str
    todo: str = ""  # what to do when it is not ok
    missing: str = ""  # the capability that `--allow-missing` takes, when that is what failed


class Preflight:
    """The checks against one cluster, by these settings; `lasting`: seconds that what is to begin takes at most."""

    def __init__(
        self, cluster: Cluster, prometheus: Prometheus | None, settings: Settings, lasting: float = 0.0
    ) -> None:
        self._cluster, self._prometheus, self._settings, self._lasting = cluster, prometheus, settings, lasting

    def checks(self) -> tuple[tuple[str, Callable[[], str], str], ...]:
        """(name, check, what to do when it fails), in the order in which they make sense."""
        namespace = self._settings.namespace
        rbac = f"gameday rbac --namespace {namespace} | kubectl apply -f -"
        return (
            ("leave to begin", self._leave, "wait until it is over (docs/safety.md)"),
            ("API server", self._api, "look at the kubeconfig, the VPN, the proxy"),
            ("namespace", self._namespace, "name it by --namespace and in allow_namespaces, and annotate it"),
            ("rights", self._rights, rbac),
            ("Chaos Mesh", self._chaos, "helm install chaos-mesh (docs/real-cluster.md), or name its namespace"),
            ("chaos admitted", self._chaos_admitted, "look at the webhooks of Chaos Mesh, and at your rights"),
            ("probers admitted", self._probers_admitted, "set prober_image, or make room in the quota or policy"),
            ("nothing left over", self._leftovers, "gameday heal"),
            ("targets", self._targets, "set --selector to the engines' labels, and wait until they are ready"),
            ("Prometheus", self._prometheus_data, "set --prometheus and prometheus_token_file"),
            ("one-token generation", self._generation, "set --target, model and api_key_file"),
        )

    def run(self) -> Iterator[Check]:
        """All checks, for people; a dead API server makes the rest pointless."""
        for name, check, todo in self.checks():
            try:
                yield Check(name, True, check())
            except MissingCapability as absent:
                yield Check(name, False, str(absent), todo, absent.name)
            except GamedayError as wrong:
                yield Check(name, False, str(wrong), todo)
                if name == "API server":
                    return
        yield self._node_rights()

    def demand(self) -> None:
        """Raise the first thing that is wrong."""
        for _, check, _ in self.checks():
            check()

    def demand_for(self, plan: Plan) -> None:
        """What this plan needs besides: its chaos kinds, rights over nodes, and a server that takes its manifests."""
        if absent := set(plan.needs) - self._cluster.served(CHAOS):
            raise MissingCapability("chaos-mesh", f"This fault needs {', '.join(sorted(absent))}, not served here.")
        if plan.cluster_wide:
            self._demand_rights([right for right in RIGHTS if right.only_for == "nodes"])
        for _, manifest in manifests(plan.acts):
            self._admit(manifest)
        for act in plan.acts:
            if isinstance(act, Job):  # Pod Security only warns of Jobs; it is their pods that it refuses
                self._admit(_pod_of(act.manifest))

    # ── checks ──────────────────────────────────────────────────────────────────────────────

    def _leave(self) -> str:
        return leave.ask(self._settings, self._lasting, self._prometheus)

    def _api(self) -> str:
        return f"{self._cluster.name}, Kubernetes {self._cluster.version()}"

    def _namespace(self) -> str:
        name = self._settings.namespace
        if name not in self._settings.allow_namespaces:
            raise TargetError(
                f"Namespace {name!r} is not in allow_namespaces ({', '.join(self._settings.allow_namespaces)}): "
                "add it there if experiments may run in it."
            )
        if not self._settings.selector.strip():
            raise TargetError(
                "The selector is empty, which would mean every pod: set --selector, for example app=engine."
            )
        found = self._look_at_namespace(name)
        if found is None:
            return f"{name} (not readable: whether it exists is seen by its pods)"
        if found.get("status", {}).get("phase") == "Terminating":
            raise TargetError(f"Namespace {name!r} is being deleted: choose another.")
        level = (found["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "")
        return name + (f", Pod Security {level}" if level else "")

    def _look_at_namespace(self, name: str) -> Obj | None:
        try:
            found = self._cluster.find(NAMESPACES, name)
        except Refused as refused:
            if refused.code == 403:
                return None
            raise
        if found is None:
            raise TargetError(f"There is no namespace {name!r} in {self._cluster.name}: correct --namespace.")
        return found

    def _demand_rights(self, rights: list[Right]) -> int:
        namespace, count = self._settings.namespace, 0
        absent = []
        for right in rights:
            where = place(right, namespace, self._settings.chaos_namespace)
            for verb in right.verbs:
                count += 1
                if not self._cluster.can(verb, right.kind, where, right.sub, right.name):
                    absent.append((verb, right, where))
        if absent:
            raise ClusterError(
                f"These rights are missing: {missing(absent)}: "
                f"apply what `gameday rbac --namespace {namespace}` prints."
            )
        return count

    def _rights(self) -> str:
        wanted = [right for right in RIGHTS if not right.only_for and right.where != "chaos"]
        return f"{self._demand_rights(wanted)} granted"

    def _node_rights(self) -> Check:
        """No experiment on pods needs them, so their absence is told but not wrong."""
        name = "rights over nodes"
        try:
            count = self._demand_rights([right for right in RIGHTS if right.only_for == "nodes"])
        except ClusterError as wrong:
            return Check(name, True, f"pod faults only, zone and node faults will refuse to begin ({wrong})")
        return Check(name, True, f"{count} granted")

    def _chaos(self) -> str:
        served = self._cluster.served(CHAOS)
        absent = [kind for kind in CHAOS_KINDS if kind not in served]
        if absent:
            raise MissingCapability(
                "chaos-mesh",
                f"Chaos Mesh is not installed here (no {', '.join(absent)} in {CHAOS}): install it first.",
            )
        if not self._settings.chaos_namespace:
            return f"{CHAOS}: {', '.join(CHAOS_KINDS)} (set chaos_namespace to have its installation checked)"
        return self._chaos_installation(self._settings.chaos_namespace)

    def _chaos_installation(self, where: str) -> str:
        """The controller's own words: image, scope, filter (names of Chaos Mesh's chart)."""
        try:
            found = self._cluster.find(DEPLOYMENTS, CONTROLLER, where)
        except Refused as refused:
            if refused.code == 403:
                raise ClusterError(
                    f"The right to get deployments {CONTROLLER} in {where} is missing: unset chaos_namespace, or apply "
                    f"what `gameday rbac --namespace {self._settings.namespace} --chaos-namespace {where}` prints."
                ) from refused
            raise
        if found is None:
            raise ClusterError(f"There is no deployment {CONTROLLER} in {where!r}: correct chaos_namespace.")
        install = Installation.of(found)
        if not install.available:
            raise ClusterError(
                f"{CONTROLLER} in {where} has no available replica: no chaos would be injected or ended."
            )
        namespace = self._settings.namespace
        if install.only_in and install.only_in != namespace:
            raise ClusterError(
                f"Chaos Mesh is installed for namespace {install.only_in!r} alone (clusterScoped=false): "
                f"install it for {namespace!r}, or cluster-wide."
            )
        if install.filters and not self._annotated(namespace):
            raise ClusterError(
                f"Chaos Mesh filters namespaces (enableFilterNamespace), and {namespace} is not annotated: "
                f"kubectl annotate namespace {namespace} {INJECT}=enabled."
            )
        if install.version and not install.version.startswith(CHAOS_VERSIONS):
            return f"{install} (untried: written against {', '.join(CHAOS_VERSIONS)})"
        return str(install)

    def _annotated(self, namespace: str) -> bool:
        found = self._look_at_namespace(namespace)
        return found is not None and (found["metadata"].get("annotations") or {}).get(INJECT) == "enabled"

    def _admit(self, manifest: Obj) -> None:
        """A dry run on the server: schema, webhooks, Pod Security, quotas, policies. Raises `ClusterError`."""
        kind = manifest["kind"]
        try:
            self._cluster.create(BY_KIND[kind], manifest, dry_run=True)
        except Refused as refused:
            what = f"{kind} {manifest['metadata']['name']}"
            raise ClusterError(f"The server would refuse {what} in {self._settings.namespace}: {refused}") from refused

    def _chaos_admitted(self) -> str:
        """The webhooks answer, and ask for the same rights as we do."""
        namespace = self._settings.namespace
        selector = {"namespaces": [namespace], "pods": {namespace: ["nobody"]}, "podPhaseSelectors": ["Running"]}
        for kind, spec in (
            (PODCHAOS, {"action": "pod-kill"}),
            (NETWORKCHAOS, {"action": "partition", "direction": "both"}),
        ):
            metadata = {"name": "gd-doctor", "namespace": namespace}
            whole = {**spec, "mode": "all", "duration": "1s", "selector": selector}
            self._admit({"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": whole})
        return "a dry run of each kind passes"

    def _probers_admitted(self) -> str:
        image = self._settings.prober_image
        try:
            self._admit(prober(self._settings.namespace, "gd-doctor", {}, image, 60))
        except ClusterError as wrong:
            raise MissingCapability("probers", str(wrong)) from wrong
        return f"a dry run passes ({image})"

    def _leftovers(self) -> str:
        if holder := live_holder(self._cluster):
            return f"{holder} is at work"
        left = leftovers(self._cluster)
        loose = strays(self._cluster) if not left else ()
        if left or loose:
            names = [one.run for one in left] + [f"{one.kind} {one.name}" for one in loose]
            raise HealError(f"An earlier run left something behind ({', '.join(names[:4])}): run `gameday heal` first.")
        return "clean"

    def _targets(self) -> str:
        pods = self._cluster.pods(labels=self._settings.selector)
        ready = [pod for pod in pods if pod.ready]
        if not ready:
            raise TargetError(
                f"No ready pod matches {self._settings.selector!r} in {self._settings.namespace}: "
                f"{len(pods)} pods are there, none is ready."
            )
        zones = {pod.zone for pod in ready}
        return f"{len(ready)} of {len(pods)} pods ready in {len(zones)} zone(s)"

    def _prometheus_data(self) -> str:
        if self._prometheus is None:
            raise MissingCapability("prometheus", "No Prometheus is named: set --prometheus URL.")
        try:
            return f"{self._prometheus.targets_up():.0f} targets up"
        except PrometheusError as wrong:
            raise MissingCapability("prometheus", str(wrong)) from wrong

    def _generation(self) -> str:
        if not self._settings.target:
            raise TargetError("No target is named: set --target URL (where the users' requests go).")
        reply = one_token(
            self._settings.target,
            self._settings.model,
            served_by=self._settings.served_by,
            served_zone=self._settings.served_zone,
            served_via=self._settings.served_via,
            api_key_file=self._settings.api_key_file,
            ca_file=self._settings.ca_file,
        )
        if self._settings.served_by:
            self._demand_name(reply.pod or reply.via or "")
        return f"{self._settings.target} answers, first token after {(reply.ttft or 0) * 1000:.0f} ms"

    def _demand_name(self, told: str) -> None:
        """Raise where answers do not name their pod: the fault would be done, and nobody know whom the load reached."""
        header = f"header {self._settings.served_by}"
        wrong = "" if told else f"has no {header}"
        if _ADDRESS.fullmatch(told):
            wrong = f"names an address, {told}, in the {header}, and no pod"
        if wrong:
            raise TargetError(
                f"The answer of {self._settings.target} {wrong}: "
                'set served_by to a header that names the pod, or to "" where there is none.'
            )


@dataclass(frozen=True, slots=True)
class Installation:
    """How Chaos Mesh is installed, as its controller's Deployment says."""

    version: str  # "2.7.2", "" where the image has no such tag
    available: int  # replicas
    only_in: str  # the one namespace of a namespaced installation, "" for the whole cluster
    filters: bool  # only annotated namespaces

    @classmethod
    def of(cls, deployment: Obj) -> Installation:
        containers = deployment["spec"]["template"]["spec"].get("containers") or [{}]
        environment = {one["name"]: one.get("value", "") for one in containers[0].get("env") or []}
        tag = re.search(r":v?(\d+\.\d+\.\d+)", containers[0].get("image", ""))
        scoped = environment.get("CLUSTER_SCOPED", "true") != "false"
        return cls(
            version=tag[1] if tag else "",
            available=deployment.get("status", {}).get("availableReplicas") or 0,
            only_in="" if scoped else environment.get("TARGET_NAMESPACE", ""),
            filters=environment.get("ENABLE_FILTER_NAMESPACE") == "true",
        )

    def __str__(self) -> str:
        where = f"namespace {self.only_in} only" if self.only_in else "cluster-wide"
        return f"{self.version or 'of unknown version'}, {where}{', filters namespaces' if self.filters else ''}"


def _pod_of(job: Obj) -> Obj:
    """The pod that a Job would make."""
    template = job["spec"]["template"]
    metadata = {**template.get("metadata", {}), "name": job["metadata"]["name"]}
    metadata["namespace"] = job["metadata"]["namespace"]
    return {"apiVersion": PODS.api_version, "kind": PODS.kind, "metadata": metadata, "spec": template["spec"]}
