"""Preflight: everything that must be so before a fault may be thought of. `gameday doctor` shows the same checks.

Each check returns its finding in words or raises the `GamedayError` that says what to do. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gameday.cluster import Cluster
from gameday.errors import ClusterError, GamedayError, HealError, MissingCapability, PrometheusError, TargetError
from gameday.ledger import leftovers, strays
from gameday.lock import live_holder
from gameday.rbac import RIGHTS
from gameday.settings import Settings
from loadgen.check import one_token
from probes.prometheus import Prometheus

CHAOS = "chaos-mesh.org/v1alpha1"
CHAOS_KINDS = ("networkchaos", "podchaos")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str
    missing: str = ""  # the capability that `--allow-missing` takes, when that is what failed


class Preflight:
    """The checks against one cluster, by these settings."""

    def __init__(self, cluster: Cluster, prometheus: Prometheus | None, settings: Settings) -> None:
        self._cluster, self._prometheus, self._settings = cluster, prometheus, settings

    def checks(self) -> tuple[tuple[str, Callable[[], str]], ...]:
        return (
            ("API server", self._api),
            ("namespace", self._namespace),
            ("rights", self._rights),
            ("Chaos Mesh", self._chaos),
            ("nothing left over", self._leftovers),
            ("targets", self._targets),
            ("Prometheus", self._prometheus_data),
            ("one-token generation", self._generation),
        )

    def run(self) -> Iterator[Check]:
        """All checks, for people; a dead API server makes the rest pointless."""
        for name, check in self.checks():
            try:
                yield Check(name, True, check())
            except MissingCapability as missing:
                yield Check(name, False, str(missing), missing.name)
            except GamedayError as wrong:
                yield Check(name, False, str(wrong))
                if name == "API server":
                    return

    def demand(self) -> None:
        """Raise the first thing that is wrong."""
        for _, check in self.checks():
            check()

    # ── checks ──────────────────────────────────────────────────────────────────────────────

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
        return name

    def _rights(self) -> str:
        places = {"target": self._settings.namespace, "default": "default", "cluster": None}
        missing = [
            f"{verb} {right.kind.plural}{'/' + right.sub if right.sub else ''}"
            for right in RIGHTS
            for verb in right.verbs
            if not self._cluster.can(verb, right.kind, places[right.where], right.sub)
        ]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ClusterError(
                f"These rights are missing: {', '.join(missing[:4])}{more}: "
                f"apply what `gameday rbac --namespace {self._settings.namespace}` prints."
            )
        return f"{sum(len(right.verbs) for right in RIGHTS)} granted"

    def _chaos(self) -> str:
        served = self._cluster.served(CHAOS)
        missing = [kind for kind in CHAOS_KINDS if kind not in served]
        if missing:
            raise MissingCapability(
                "chaos-mesh",
                f"Chaos Mesh is not installed here (no {', '.join(missing)} in {CHAOS}): install it first.",
            )
        return f"{CHAOS}: {', '.join(CHAOS_KINDS)}"

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
        )
        return f"{self._settings.target} answers, first token after {(reply.ttft or 0) * 1000:.0f} ms"
