"""HorizontalPodAutoscalers on CPU and memory (kubelets) and on gauges that Prometheus has, such as a queue's length.

The arithmetic is in `scaling`; conditions and their words are kube-controller-manager's (pkg/controller/podautoscaler).
`Pods` metrics are looked up as Prometheus' adapter does: the gauge of that name with labels `namespace` and `pod`;
`External` ones as all series of that name with the HPA's namespace. A metric that cannot be had scales nothing down.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.client import DEPLOYMENTS, HPAS, PODS, REPLICASETS, STATEFULSETS, EventType, Key, Kind, Obj
from sandbox.controllers import scaling
from sandbox.controllers.objects import (
    condition,
    conditions,
    deleting,
    finished,
    generation,
    is_true,
    key,
    labels,
    matches,
    milli,
    moment,
    name,
    namespace,
    now,
    stamp,
)
from sandbox.controllers.work import Controller, Shared
from sandbox.metrics import Metrics, Unavailable, total
from sandbox.options import REAL, Clocks

_SYNC = 15.0  # seconds at real clocks
_CPU_INITIALIZATION = 300.0  # a pod's start: its CPU use says nothing of its load until it is ready
_READINESS_DELAY = 30.0
_TARGETS = {"Deployment": DEPLOYMENTS, "ReplicaSet": REPLICASETS, "StatefulSet": STATEFULSETS}
_FAILED = {
    "Resource": "FailedGetResourceMetric",
    "ContainerResource": "FailedGetContainerResourceMetric",
    "Pods": "FailedGetPodsMetric",
    "Object": "FailedGetObjectMetric",
    "External": "FailedGetExternalMetric",
}
Conditions = dict[str, tuple[str, str, str]]


class NoMetric(Exception):
    """Why a metric cannot be had; `reason` is the condition's."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one metric asks for: replicas, its name for events, its current value for the status."""

    replicas: int
    name: str
    status: Obj


def bounded(current: int, least: int, most: int) -> tuple[int, str]:
    """(wanted replicas, why they differ or ""); zero means that autoscaling is off."""
    if current == 0:
        return 0, ""
    if current > most:
        return most, "Current number of replicas above Spec.MaxReplicas"
    if current < least:
        return least, "Current number of replicas below Spec.MinReplicas"
    return current, ""


def rules(behavior: Obj | None, window: float) -> tuple[scaling.Rules | None, scaling.Rules]:
    """(up, down) as `spec.behavior` has them; its own seconds are not compressed. None up: there is no behavior."""
    default = scaling.Rules(window, (scaling.Policy("Percent", 100, 15.0),))
    if behavior is None:
        return None, default

    def one(found: Obj, window: float) -> scaling.Rules:
        policies = tuple(scaling.Policy(p["type"], p["value"], p["periodSeconds"]) for p in found.get("policies") or ())
        seconds = found.get("stabilizationWindowSeconds")
        return scaling.Rules(window if seconds is None else float(seconds), policies, found.get("selectPolicy", "Max"))

    return one(behavior["scaleUp"], 0.0), one(behavior["scaleDown"], window)


def requests(pods: Sequence[Obj], resource: str, percent_of: str) -> dict[str, float]:
    """What each pod requests, in cores or bytes. Raises `NoMetric` where a container requests nothing."""
    found = {}
    for pod in pods:
        sums = 0.0
        for container in pod["spec"]["containers"]:
            asked = ((container.get("resources") or {}).get("requests") or {}).get(resource)
            if asked is None:
                text = f"missing request for {resource} in container {container['name']} of Pod {name(pod)}"
                raise NoMetric("FailedGetResourceMetric", f"failed to get {resource} {percent_of}: {text}")
            sums += milli(asked) / 1000
        found[name(pod)] = sums
    return found


class Autoscalers(Controller):
    name = "horizontal-pod-autoscaler"
    source = "horizontal-pod-autoscaler"

    def __init__(self, shared: Shared, clocks: Clocks, metrics: Metrics | None = None) -> None:
        self._pace = clocks.lease_renew / REAL.lease_renew
        self._metrics = metrics
        self._histories: dict[Key, scaling.History] = {}
        super().__init__(shared)

    def setup(self) -> None:
        self.autoscalers = self.watch_own(HPAS)
        self.pods = self.shared.caches.of(PODS)
        for kind in _TARGETS.values():
            self.shared.caches.of(kind).subscribe(self._target_changed)

    def _target_changed(self, type: EventType, target: Obj, old: Obj | None) -> None:
        if old is not None and old["spec"].get("replicas") == target["spec"].get("replicas"):
            return
        for hpa in self.autoscalers.by("namespace", namespace(target)):
            if hpa["spec"]["scaleTargetRef"]["name"] == name(target):
                self.queue.add(key(hpa))

    async def reconcile(self, key: Key) -> None:
        hpa = self.autoscalers.objects.get(key)
        if hpa is None or deleting(hpa):
            self._histories.pop(key, None)
            return
        self.queue.add_after(key, _SYNC * self._pace)
        ref = hpa["spec"]["scaleTargetRef"]
        kind = _TARGETS.get(ref["kind"])
        target = self.shared.caches.of(kind).get(ref["name"], key[0]) if kind is not None else None
        if kind is None or target is None:
            why = f'{ref["kind"].lower()}s "{ref["name"]}" not found'
            text = f"the HPA controller was unable to get the target's current scale: {why}"
            await self._report(hpa, {"AbleToScale": ("False", "FailedGetScale", text)}, 0, 0)
            self.record(hpa, HPAS, "Warning", "FailedGetScale", text)
            return
        await self._follow(hpa, kind, target)

    async def _follow(self, hpa: Obj, kind: Kind, target: Obj) -> None:
        current = int(target["spec"].get("replicas", 1))
        least, most = int(hpa["spec"].get("minReplicas") or 1), int(hpa["spec"]["maxReplicas"])
        wanted, why = bounded(current, least, most)
        got = "the HPA controller was able to get the target's current scale"
        found: Conditions = {"AbleToScale": ("True", "SucceededGetScale", got)}
        values: list[Obj] | None = None
        if current == 0:
            text = "scaling is disabled since the replica count of the target is zero"
            found["ScalingActive"] = ("False", "ScalingDisabled", text)
        elif not why:
            try:
                best, values = await self._proposed(hpa, target, current)
            except NoMetric as missing:
                text = f"the HPA was unable to compute the replica count: {missing}"
                found["ScalingActive"] = ("False", missing.reason, text)
                self.record(hpa, HPAS, "Warning", missing.reason, str(missing))
            else:
                text = f"the HPA was able to successfully calculate a replica count from {best.name}"
                found["ScalingActive"] = ("True", "ValidMetricFound", text)
                step = self._step(hpa, current, best.replicas, least, most)
                wanted, found = step.replicas, {**found, **step.conditions}
                why = f"{best.name} above target" if wanted > current else "All metrics below target"
        if wanted != current:
            await self._scale(hpa, kind, target, wanted, why)
            text = f"the HPA controller was able to update the target scale to {wanted}"
            found["AbleToScale"] = ("True", "SucceededRescale", text)
        await self._report(hpa, found, current, wanted, values, rescaled=wanted != current)

    def _step(self, hpa: Obj, current: int, wanted: int, least: int, most: int) -> scaling.Step:
        history = self._histories.setdefault(key(hpa), scaling.History())
        at = time.monotonic()
        up, down = rules(hpa["spec"].get("behavior"), scaling.DOWN_WINDOW * self._pace)
        history.trim(at, 3600.0)
        if not history.recommended:
            history.recommended.append((at, current))  # so that nothing shrinks before a whole window has been seen
        return scaling.step(current, wanted, least, most, at, history, up, down)

    async def _scale(self, hpa: Obj, kind: Kind, target: Obj, wanted: int, why: str) -> None:
        change = wanted - int(target["spec"].get("replicas", 1))
        await self.shared.patch(kind, target, {"spec": {"replicas": wanted}})
        self._histories.setdefault(key(hpa), scaling.History()).changes.append((time.monotonic(), change))
        self.record(hpa, HPAS, "Normal", "SuccessfulRescale", f"New size: {wanted}; reason: {why}")

    # -- metrics

    async def _proposed(self, hpa: Obj, target: Obj, current: int) -> tuple[Proposal, list[Obj]]:
        """The highest proposal of all metrics, and their values. Raises `NoMetric`."""
        proposals, values, missed = [], [], None
        for metric in hpa["spec"].get("metrics") or ():
            try:
                proposals.append(await self._propose(metric, target, current))
                values.append(proposals[-1].status)
            except NoMetric as missing:
                missed = missed or missing
                values.append({"type": ""})  # in its place, so that the others keep theirs
        best = max(proposals, key=lambda proposal: proposal.replicas, default=None)
        if best is None or (missed and best.replicas < current):
            raise missed or NoMetric("InvalidMetricSourceType", "no metrics are given")
        return best, values

    async def _propose(self, metric: Obj, target: Obj, current: int) -> Proposal:
        kind = metric["type"]
        selector = target["spec"].get("selector")
        found = self.pods.by("namespace", namespace(target))
        pods = [pod for pod in found if matches(selector, labels(pod)) and not deleting(pod) and not finished(pod)]
        match kind:
            case "Resource":
                return await self._by_resource(metric["resource"], pods, current)
            case "Pods":
                return await self._by_gauge(metric["pods"], pods, current)
            case "External":
                return await self._by_external(metric["external"], pods, current)
            case _:
                raise NoMetric(
                    _FAILED.get(kind, "InvalidMetricSourceType"), f"the sandbox has no metrics of type {kind}"
                )

    async def _by_resource(self, source: Obj, pods: list[Obj], current: int) -> Proposal:
        resource, target = source["name"], source["target"]
        percent = target.get("averageUtilization") if target["type"] == "Utilization" else None
        what = "utilization" if percent is not None else "usage"
        failed = f"failed to get {resource} {what}: "
        if resource not in ("cpu", "memory"):
            raise NoMetric("FailedGetResourceMetric", f"{failed}the sandbox's nodes measure cpu and memory only")
        if self._metrics is None:
            cause = (
                "unable to fetch metrics from resource metrics API: the server could not find the requested resource"
            )
            text = f"{failed}unable to get metrics for resource {resource}: {cause} (get pods.metrics.k8s.io)"
            raise NoMetric("FailedGetResourceMetric", text)
        snapshot = await self._metrics.usage()
        asked = requests(pods, resource, what) if percent is not None else {}
        used = {}
        for pod in pods:
            if containers := snapshot.of_pod(namespace(pod), name(pod)):
                used[name(pod)] = total(list(containers.values()), resource)
        seen = self._sorted(pods, used, resource, snapshot.window)
        if not seen.ready:
            text = f"{failed}did not receive metrics for targeted pods (pods might be unready)"
            raise NoMetric("FailedGetResourceMetric", text)
        average = sum(seen.ready.values()) / len(seen.ready)
        shown: Obj = {"averageValue": _quantity(average if resource == "cpu" else round(average))}
        if percent is not None:
            replicas = scaling.by_utilization(current, seen, asked, percent)
            shares = 100 * sum(seen.ready.values()) / sum(asked[pod] for pod in seen.ready)
            shown["averageUtilization"] = int(shares)
            title = f"{resource} resource utilization (percentage of request)"
        else:
            replicas = scaling.by_average(current, seen, milli(target["averageValue"]) / 1000)
            title = f"{resource} resource"
        return Proposal(replicas, title, {"type": "Resource", "resource": {"name": resource, "current": shown}})

    async def _by_gauge(self, source: Obj, pods: list[Obj], current: int) -> Proposal:
        metric, match = _named(source["metric"], "FailedGetPodsMetric")
        space = namespace(pods[0]) if pods else ""
        try:
            found = await self._prometheus().by_pod(space, metric, match)
        except Unavailable as lost:
            raise NoMetric("FailedGetPodsMetric", f"unable to get metric {metric}: {lost}") from lost
        seen = self._sorted(pods, {pod: value for pod, value in found.items() if pod in set(map(name, pods))}, "", 0)
        if not seen.ready:
            raise NoMetric("FailedGetPodsMetric", f"unable to get metric {metric}: no metrics of the targeted pods")
        replicas = scaling.by_average(current, seen, milli(source["target"]["averageValue"]) / 1000)
        shown = {"averageValue": _quantity(sum(seen.ready.values()) / len(seen.ready))}
        status = {"type": "Pods", "pods": {"metric": source["metric"], "current": shown}}
        return Proposal(replicas, f"pods metric {metric}", status)

    async def _by_external(self, source: Obj, pods: list[Obj], current: int) -> Proposal:
        metric, match = _named(source["metric"], "FailedGetExternalMetric")
        space = namespace(pods[0]) if pods else ""
        try:
            amount = sum(await self._prometheus().external(space, metric, match))
        except Unavailable as lost:
            raise NoMetric(
                "FailedGetExternalMetric", f"unable to get external metric {space}/{metric}: {lost}"
            ) from lost
        target = source["target"]
        ready = sum(is_true(pod, "Ready") for pod in pods)
        if target.get("averageValue"):
            wanted = milli(target["averageValue"]) / 1000
            replicas = scaling.by_ratio(current, amount / (wanted * current), current)
            shown = {"averageValue": _quantity(amount / current)}
        else:
            replicas = scaling.by_ratio(current, amount / (milli(target["value"]) / 1000), ready)
            shown = {"value": _quantity(amount)}
        title = f"external metric {metric}({source['metric'].get('selector')})"
        return Proposal(
            replicas, title, {"type": "External", "external": {"metric": source["metric"], "current": shown}}
        )

    def _prometheus(self) -> Metrics:
        if self._metrics is None:
            raise Unavailable("no metrics API is served")
        return self._metrics

    def _sorted(self, pods: list[Obj], values: dict[str, float], resource: str, window: float) -> scaling.Pods:
        unready = {name(pod) for pod in pods if self._is_unready(pod, resource, window)}
        missing = {name(pod) for pod in pods if name(pod) not in values} - unready
        return scaling.Pods({pod: value for pod, value in values.items() if pod not in unready}, unready, missing)

    def _is_unready(self, pod: Obj, resource: str, window: float) -> bool:
        """Whether a pod is still starting: of CPU, what it uses meanwhile is no measure of its load."""
        if (pod.get("status") or {}).get("phase") == "Pending":
            return True
        if resource != "cpu":
            return False
        found, started = condition(pod, "Ready"), pod["status"].get("startTime")
        if found is None or not started:
            return True
        since = (now() - moment(found["lastTransitionTime"])).total_seconds()
        age = (now() - moment(started)).total_seconds()
        if age < _CPU_INITIALIZATION * self._pace:
            return found["status"] != "True" or since < window
        late = age - since  # from the start to its last change of readiness
        return found["status"] != "True" and late < _READINESS_DELAY * self._pace

    async def _report(
        self,
        hpa: Obj,
        found: Conditions,
        current: int,
        wanted: int,
        values: list[Obj] | None = None,
        *,
        rescaled: bool = False,
    ) -> None:
        held = {c["type"]: c for c in conditions(hpa)}
        for type, (status, reason, message) in found.items():
            old = held.get(type) or {}
            since = old["lastTransitionTime"] if old.get("status") == status else stamp()
            held[type] = {"type": type, "status": status, "reason": reason, "message": message,
                          "lastTransitionTime": since}  # fmt: skip
        fresh = {
            **(hpa.get("status") or {}),
            "observedGeneration": generation(hpa),
            "currentReplicas": current,
            "desiredReplicas": wanted,
            "conditions": list(held.values()),
        }
        if values is not None:
            fresh["currentMetrics"] = values
        if rescaled:
            fresh["lastScaleTime"] = stamp()
        if fresh != hpa.get("status"):
            await self.shared.status(HPAS, hpa, fresh)


def _quantity(value: float) -> str:
    """In thousandths, where whole ones do not do."""
    thousandths = round(value * 1000)
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)


def _named(metric: Obj, reason: str) -> tuple[str, dict[str, str]]:
    selector = metric.get("selector") or {}
    if selector.get("matchExpressions"):
        raise NoMetric(reason, "the sandbox selects metrics by matchLabels only")
    return metric["name"], selector.get("matchLabels") or {}
