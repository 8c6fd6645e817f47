"""Validation of built-in kinds, in the real server's words (pkg/apis/*/validation, 1.36)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any
from zoneinfo import available_timezones

from sandbox.apiserver import errors
from sandbox.apiserver.errors import Cause
from sandbox.apiserver.policies import network_policy
from sandbox.apiserver.resources import Resource
from sandbox.apiserver.rules import (
    CONFIG_KEY,
    duplicate,
    forbidden,
    full,
    invalid,
    label,
    label_selector,
    labels,
    metadata,
    missing,
    qualified_name,
    required,
    unsupported,
)
from sandbox.apiserver.selectors import from_object
from sandbox.client import Obj
from sandbox.controllers import cron

# -- quantities


_SCALES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9,
    "T": Decimal(10) ** 12,
    "P": Decimal(10) ** 15,
    "E": Decimal(10) ** 18,
    "Ki": Decimal(2) ** 10,
    "Mi": Decimal(2) ** 20,
    "Gi": Decimal(2) ** 30,
    "Ti": Decimal(2) ** 40,
    "Pi": Decimal(2) ** 50,
    "Ei": Decimal(2) ** 60,
}


def quantity(text: str) -> Decimal:
    """The number a quantity stands for."""
    found = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?\d+)?)([a-zA-Z]*)", text)
    return Decimal(found[1]) * _SCALES[found[2]] if found else Decimal(0)


# -- pods


def _one_of(obj: Obj, key: str, field: str, allowed: Sequence[str]) -> list[Cause]:
    value = obj.get(key)
    return [] if value is None or value in allowed else [unsupported(f"{field}.{key}", value, allowed)]


def _between(value: Any, field: str, low: int = 1, high: int = 65535) -> list[Cause]:
    ok = isinstance(value, int) and low <= value <= high
    return [] if ok else [invalid(field, value, f"must be between {low} and {high}, inclusive")]


def _port_or_name(value: Any, field: str) -> list[Cause]:
    if isinstance(value, int):
        return _between(value, field)
    return [] if value else [invalid(field, value, "must be at least one letter or number (a-z, 0-9)")]


_PROTOCOLS = ("SCTP", "TCP", "UDP")
_PULL = ("Always", "IfNotPresent", "Never")
_EXTENDED_WHY = "Limit must be set for non overcommitable resources"


def _resources(container: Obj, field: str) -> list[Cause]:
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    at = f"{field}.resources"
    causes = []
    for part, values in (("limits", limits), ("requests", requests)):
        for name, value in values.items():
            amount = quantity(value)
            if amount < 0:
                causes.append(invalid(f"{at}.{part}[{name}]", value, "must be greater than or equal to 0"))
            if "/" in name and amount != amount.to_integral_value():
                causes.append(invalid(f"{at}.{part}[{name}]", value, "must be an integer"))
    for name, value in requests.items():
        extended = "/" in name
        if name in limits:
            if extended and quantity(value) != quantity(limits[name]):
                causes.append(invalid(f"{at}.requests", value, f"must be equal to {name} limit of {limits[name]}"))
            elif quantity(value) > quantity(limits[name]):
                why = f"must be less than or equal to {name} limit of {limits[name]}"
                causes.append(invalid(f"{at}.requests", value, why))
        elif extended:
            causes.append(required(f"{at}.limits", _EXTENDED_WHY))
    return causes


def _probe(probe: Obj | None, field: str) -> list[Cause]:
    if probe is None:
        return []
    handlers = [key for key in ("exec", "httpGet", "tcpSocket", "grpc") if probe.get(key) is not None]
    if not handlers:
        return [required(field, "must specify a handler type")]
    causes = [forbidden(f"{field}.{key}", "may not specify more than 1 handler type") for key in handlers[1:]]
    for key in ("httpGet", "tcpSocket"):
        if key in handlers:
            causes += _port_or_name(probe[key].get("port"), f"{field}.{key}.port")
    for key in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if probe.get(key, 0) < 0:
            causes.append(invalid(f"{field}.{key}", probe[key], "must be greater than or equal to 0"))
    if not field.endswith("readinessProbe") and probe.get("successThreshold", 1) != 1:
        causes.append(invalid(f"{field}.successThreshold", probe["successThreshold"], "must be 1"))
    return causes


def _env(container: Obj, field: str) -> list[Cause]:
    causes = []
    for i, env in enumerate(container.get("env") or []):
        at, name = f"{field}.env[{i}]", env.get("name") or ""
        if not name:
            causes.append(required(f"{at}.name"))
        elif not full(r"[ -<>-~]+", name):
            why = "a valid environment variable name must consist only of printable ASCII characters other than '='"
            causes.append(invalid(f"{at}.name", name, why))
        if env.get("value") and env.get("valueFrom"):
            why = "may not be specified when `value` is not empty"
            causes.append(invalid(f"{at}.valueFrom", "", why))
    return causes


def _ports(container: Obj, field: str) -> list[Cause]:
    causes = []
    for i, port in enumerate(container.get("ports") or []):
        at = f"{field}.ports[{i}]"
        if not port.get("containerPort"):
            causes.append(required(f"{at}.containerPort"))
        else:
            causes += _between(port["containerPort"], f"{at}.containerPort")
        if port.get("hostPort"):
            causes += _between(port["hostPort"], f"{at}.hostPort")
        causes += _one_of(port, "protocol", at, _PROTOCOLS)
    return causes


def _container(container: Obj, field: str, volumes: set[str]) -> list[Cause]:
    causes = []
    name = container.get("name")
    if not name:
        causes.append(required(f"{field}.name"))
    else:
        causes += [invalid(f"{field}.name", name, why) for why in label(name)]
    image = container.get("image")
    if not image:
        causes.append(required(f"{field}.image"))
    elif image != image.strip():
        causes.append(invalid(f"{field}.image", image, "must not have leading or trailing whitespace"))
    causes += _one_of(container, "imagePullPolicy", field, _PULL)
    causes += _ports(container, field) + _env(container, field) + _resources(container, field)
    paths: set[str] = set()
    for i, mount in enumerate(container.get("volumeMounts") or []):
        at = f"{field}.volumeMounts[{i}]"
        if not mount.get("name"):
            causes.append(required(f"{at}.name"))
        elif mount["name"] not in volumes:
            causes.append(missing(f"{at}.name", mount["name"]))
        if not mount.get("mountPath"):
            causes.append(required(f"{at}.mountPath"))
        elif mount["mountPath"] in paths:
            causes.append(invalid(f"{at}.mountPath", mount["mountPath"], "must be unique"))
        paths.add(mount.get("mountPath", ""))
    for key in ("livenessProbe", "readinessProbe", "startupProbe"):
        causes += _probe(container.get(key), f"{field}.{key}")
    return causes


def _toleration(tol: Obj, field: str) -> list[Cause]:
    causes = []
    operator, value, effect = tol.get("operator") or "Equal", tol.get("value") or "", tol.get("effect")
    if tol.get("key"):
        causes += [invalid(f"{field}.key", tol["key"], why) for why in qualified_name(tol["key"])]
    elif operator != "Exists":
        causes.append(
            invalid(
                f"{field}.operator",
                operator,
                'operator must be Exists when `key` is empty, which means "match all values and all keys"',
            )
        )
    if tol.get("tolerationSeconds") is not None and effect != "NoExecute":
        causes.append(
            invalid(f"{field}.effect", effect or "", "effect must be 'NoExecute' when `tolerationSeconds` is set")
        )
    if operator not in ("Equal", "Exists"):
        causes.append(unsupported(f"{field}.operator", operator, ("Equal", "Exists")))
    elif operator == "Exists" and value:
        causes.append(invalid(f"{field}.operator", value, "value must be empty when `operator` is 'Exists'"))
    if effect and effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
        causes.append(unsupported(f"{field}.effect", effect, ("NoSchedule", "PreferNoSchedule", "NoExecute")))
    return causes


def _spread(spec: Obj, field: str) -> list[Cause]:
    causes = []
    for i, entry in enumerate(spec.get("topologySpreadConstraints") or []):
        at = f"{field}.topologySpreadConstraints[{i}]"
        if entry.get("maxSkew", 0) <= 0:
            causes.append(invalid(f"{at}.maxSkew", entry.get("maxSkew", 0), "must be greater than 0"))
        if not entry.get("topologyKey"):
            causes.append(required(f"{at}.topologyKey", "can not be empty"))
        causes += _one_of(entry, "whenUnsatisfiable", at, ("DoNotSchedule", "ScheduleAnyway"))
    return causes


def _volumes(spec: Obj, field: str) -> tuple[set[str], list[Cause]]:
    causes, seen = [], set()
    for i, volume in enumerate(spec.get("volumes") or []):
        at, name = f"{field}.volumes[{i}]", volume.get("name") or ""
        if not name:
            causes.append(required(f"{at}.name"))
        elif name in seen:
            causes.append(duplicate(f"{at}.name", name))
        else:
            causes += [invalid(f"{at}.name", name, why) for why in label(name)]
        sources = [key for key in volume if key != "name"]
        causes += [forbidden(f"{at}.{key}", "may not specify more than 1 volume type") for key in sources[1:]]
        seen.add(name)
    return seen, causes


def pod_spec(spec: Obj, field: str) -> list[Cause]:
    volumes, causes = _volumes(spec, field)
    if not spec.get("containers"):
        causes.append(required(f"{field}.containers"))
    seen: set[str] = set()
    for key in ("initContainers", "containers"):
        for i, container in enumerate(spec.get(key) or []):
            at = f"{field}.{key}[{i}]"
            causes += _container(container, at, volumes)
            name = container.get("name")
            if name and name in seen:
                causes.append(duplicate(f"{at}.name", name))
            seen.add(name or "")
    causes += _one_of(spec, "restartPolicy", field, ("Always", "OnFailure", "Never"))
    causes += _one_of(spec, "dnsPolicy", field, ("ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"))
    for i, tol in enumerate(spec.get("tolerations") or []):
        causes += _toleration(tol, f"{field}.tolerations[{i}]")
    return causes + _spread(spec, field)


def _pod(obj: Obj) -> list[Cause]:
    return pod_spec(obj["spec"], "spec")


# -- workloads


def _count(spec: Obj, key: str, field: str = "spec") -> list[Cause]:
    value = spec.get(key)
    if isinstance(value, int) and value < 0:
        return [invalid(f"{field}.{key}", value, "must be greater than or equal to 0")]
    return []


def _selector(spec: Obj, field: str = "spec.selector") -> list[Cause]:
    selector = spec.get("selector")
    if selector is None:
        return [required(field)]
    causes = label_selector(selector, field)
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        why = "empty selector is invalid for "
        causes.append(invalid(field, {}, why + "deployment"))
    return causes


def _template(spec: Obj, policies: Sequence[str] = ("Always",)) -> list[Cause]:
    template = spec.get("template") or {}
    pod = template.get("spec") or {}
    causes = []
    have = (template.get("metadata") or {}).get("labels")
    selector = spec.get("selector")
    try:
        found = from_object(selector)
        matches = found is not None and found.matches(have)
    except KeyError:  # an operator that does not exist, reported with the selector
        matches = True
    if not matches:
        causes.append(invalid("spec.template.metadata.labels", have, "`selector` does not match template `labels`"))
    causes += labels(have, "spec.template.labels")
    causes += pod_spec(pod, "spec.template.spec")
    policy = pod.get("restartPolicy")
    if policy not in policies and policy in ("Always", "OnFailure", "Never"):
        causes.append(unsupported("spec.template.spec.restartPolicy", policy, policies))
    return causes


_PERCENT_WHY = (
    "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for "
    "validation is '[0-9]+%')"
)


def int_or_percent(value: Any, field: str) -> list[Cause]:
    if value is None:
        return []
    if isinstance(value, int):
        return [] if value >= 0 else [invalid(field, value, "must be greater than or equal to 0")]
    if not full(r"[0-9]+%", value):
        return [invalid(field, value, _PERCENT_WHY)]
    return [invalid(field, value, "must not be greater than 100%")] if int(value[:-1]) > 100 else []


def _is_zero(value: Any) -> bool:
    return value in (0, "0%")


def _rolling(rolling: Obj, field: str) -> list[Cause]:
    unavailable, surge = rolling.get("maxUnavailable"), rolling.get("maxSurge")
    causes = int_or_percent(unavailable, f"{field}.maxUnavailable")
    if not (isinstance(surge, str) and full(r"[0-9]+%", surge)):  # a surge may exceed 100 %
        causes += int_or_percent(surge, f"{field}.maxSurge")
    if _is_zero(unavailable) and _is_zero(surge):
        causes.append(invalid(f"{field}.maxUnavailable", unavailable, "may not be 0 when `maxSurge` is 0"))
    return causes


def _deployment(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    strategy = spec.get("strategy") or {}
    causes = _count(spec, "replicas") + _selector(spec) + _template(spec)
    rolling = strategy.get("rollingUpdate")
    match strategy.get("type"):
        case "Recreate":
            if rolling is not None:
                why = "may not be specified when strategy `type` is 'Recreate'"
                causes.append(forbidden("spec.strategy.rollingUpdate", why))
        case "RollingUpdate":
            causes += _rolling(rolling or {}, "spec.strategy.rollingUpdate")
        case other:
            causes.append(unsupported("spec.strategy.type", other, ("Recreate", "RollingUpdate")))
    for key in ("minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"):
        causes += _count(spec, key)
    deadline = spec.get("progressDeadlineSeconds")
    if deadline is not None and deadline <= spec.get("minReadySeconds", 0):
        causes.append(invalid("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds"))
    return causes


def _replicaset(obj: Obj) -> list[Cause]:
    return _count(obj["spec"], "replicas") + _selector(obj["spec"]) + _template(obj["spec"])


def _with_claims(spec: Obj) -> Obj:
    """A StatefulSet's spec with the volumes that its claim templates become; they win over others of their name."""
    names = [(claim.get("metadata") or {}).get("name") or "" for claim in spec.get("volumeClaimTemplates") or []]
    if not names:
        return spec
    pod = spec["template"].get("spec") or {}
    claims = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in dict.fromkeys(names)]
    others = [volume for volume in pod.get("volumes") or [] if volume.get("name") not in names]
    return {**spec, "template": {**spec["template"], "spec": {**pod, "volumes": claims + others}}}


def _statefulset(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    causes = _one_of(spec, "podManagementPolicy", "spec", ("OrderedReady", "Parallel"))
    causes += _one_of(spec.get("updateStrategy") or {}, "type", "spec.updateStrategy", ("OnDelete", "RollingUpdate"))
    return causes + _count(spec, "replicas") + _selector(spec) + _template(_with_claims(spec))


def _daemonset(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    causes = _one_of(spec.get("updateStrategy") or {}, "type", "spec.updateStrategy", ("OnDelete", "RollingUpdate"))
    return causes + _selector(spec) + _template(spec)


def _job(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    pod = spec["template"].get("spec") or {}
    causes = []
    for key in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        causes += _count(spec, key)
    causes += pod_spec(pod, "spec.template.spec")
    if pod.get("restartPolicy") == "Always":
        causes.append(required("spec.template.spec.restartPolicy", 'valid values: "OnFailure", "Never"'))
    return causes + _one_of(spec, "completionMode", "spec", ("Indexed", "NonIndexed"))


# -- other kinds


def _schedule(spec: Obj) -> list[Cause]:
    text, zone = spec.get("schedule"), spec.get("timeZone")
    if not text:
        return [required("spec.schedule")]
    causes = []
    try:
        cron.parse(text)
    except ValueError as wrong:
        causes.append(invalid("spec.schedule", text, str(wrong)))
    if zone is not None and zone not in available_timezones():
        causes.append(invalid("spec.timeZone", zone, f"unknown time zone {zone}"))
    return causes


def _cronjob(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    causes = _schedule(spec)
    causes += _one_of(spec, "concurrencyPolicy", "spec", ("Allow", "Forbid", "Replace"))
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    causes += pod_spec(pod, "spec.jobTemplate.spec.template.spec")
    if pod.get("restartPolicy") == "Always":
        causes.append(
            required("spec.jobTemplate.spec.template.spec.restartPolicy", 'valid values: "OnFailure", "Never"')
        )
    return causes


def _service(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    types = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
    causes = []
    ports = spec.get("ports") or []
    if not ports and spec.get("clusterIP") != "None" and spec.get("type") != "ExternalName":
        causes.append(required("spec.ports"))
    seen = set()
    for i, port in enumerate(ports):
        at = f"spec.ports[{i}]"
        if not port.get("name") and len(ports) > 1:
            causes.append(required(f"{at}.name"))
        causes += _between(port.get("port", 0), f"{at}.port")
        causes += _one_of(port, "protocol", at, _PROTOCOLS)
        target = port.get("targetPort")
        causes += _port_or_name(0 if target is None else target, f"{at}.targetPort")
        if port.get("name") and port["name"] in seen:
            causes.append(duplicate(f"{at}.name", port["name"]))
        seen.add(port.get("name"))
    causes += _one_of(spec, "sessionAffinity", "spec", ("ClientIP", "None"))
    return causes + _one_of(spec, "type", "spec", types)


def _keys(obj: Obj) -> list[Cause]:
    causes = []
    for part in ("data", "binaryData"):
        for key in obj.get(part) or {}:
            if not full(CONFIG_KEY, key) or key in (".", ".."):
                why = (
                    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or "
                    f"'KEY_NAME',  or 'key-name', regex used for validation is '{CONFIG_KEY}')"
                )
                causes.append(invalid(f"{part}[{key}]", key, why))
    return causes


def _pdb(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    causes = []
    least, most = spec.get("minAvailable"), spec.get("maxUnavailable")
    if least is not None and most is not None:
        shown = {
            "MinAvailable": least,
            "Selector": spec.get("selector"),
            "MaxUnavailable": most,
            "UnhealthyPodEvictionPolicy": spec.get("unhealthyPodEvictionPolicy"),
        }
        causes.append(invalid("spec", shown, "minAvailable and maxUnavailable cannot be both set"))
    causes += int_or_percent(least, "spec.minAvailable") + int_or_percent(most, "spec.maxUnavailable")
    return causes + _one_of(spec, "unhealthyPodEvictionPolicy", "spec", ("AlwaysAllow", "IfHealthyBudget"))


def _hpa(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    causes = []
    least, most = spec.get("minReplicas", 1), spec.get("maxReplicas", 0)
    if least < 1:
        causes.append(invalid("spec.minReplicas", least, "must be greater than or equal to 1"))
    if most < 1:
        causes.append(invalid("spec.maxReplicas", most, "must be greater than 0"))
    elif most < least:
        causes.append(invalid("spec.maxReplicas", most, "must be greater than or equal to `minReplicas`"))
    ref = spec.get("scaleTargetRef") or {}
    if ref.get("kind") and not ref.get("apiVersion"):
        causes.append(invalid("spec.scaleTargetRef.apiVersion", "", "apiVersion must specify API group"))
    return causes + [required(f"spec.scaleTargetRef.{key}") for key in ("kind", "name") if not ref.get(key)]


def _lease(obj: Obj) -> list[Cause]:
    spec = obj.get("spec") or {}
    causes = []
    duration = spec.get("leaseDurationSeconds")
    if duration is not None and duration <= 0:
        causes.append(invalid("spec.leaseDurationSeconds", duration, "must be greater than 0"))
    return causes + _count(spec, "leaseTransitions")


def _priority(obj: Obj) -> list[Cause]:
    value = obj.get("value", 0)
    if value > 10**9 and not obj["metadata"].get("name", "").startswith("system-"):
        why = "maximum allowed value of a user defined priority is 1000000000"
        return [forbidden("value", why)]
    return []


def _binding(obj: Obj) -> list[Cause]:
    ref = obj.get("roleRef") or {}
    causes = []
    if ref.get("apiGroup", "rbac.authorization.k8s.io") != "rbac.authorization.k8s.io":
        causes.append(unsupported("roleRef.apiGroup", ref.get("apiGroup", ""), ("rbac.authorization.k8s.io",)))
    kinds = ("Role", "ClusterRole") if obj["kind"] == "RoleBinding" else ("ClusterRole",)
    if ref.get("kind") not in kinds:
        causes.append(unsupported("roleRef.kind", ref.get("kind", ""), kinds))
    if not ref.get("name"):
        causes.append(required("roleRef.name"))
    for i, subject in enumerate(obj.get("subjects") or []):
        if subject.get("kind") not in ("ServiceAccount", "User", "Group"):
            known = ("ServiceAccount", "User", "Group")
            causes.append(unsupported(f"subjects[{i}].kind", subject.get("kind", ""), known))
        if not subject.get("name"):
            causes.append(required(f"subjects[{i}].name"))
        if subject.get("kind") == "ServiceAccount" and not subject.get("namespace"):
            causes.append(required(f"subjects[{i}].namespace"))
    return causes


def _node(obj: Obj) -> list[Cause]:
    causes = []
    seen = set()
    for i, taint in enumerate((obj.get("spec") or {}).get("taints") or []):
        at = f"metadata.taints[{i}]"  # so the real server names it
        causes += [invalid(f"{at}.key", taint.get("key", ""), why) for why in qualified_name(taint.get("key", ""))]
        effect = taint.get("effect")
        if not effect:
            causes.append(required(f"{at}.effect"))
        elif effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
            causes.append(unsupported(f"{at}.effect", effect, ("NoSchedule", "PreferNoSchedule", "NoExecute")))
        if (taint.get("key"), effect) in seen:
            causes.append(duplicate(at, taint))
        seen.add((taint.get("key"), effect))
    return causes


def _endpointslice(obj: Obj) -> list[Cause]:
    types = ("FQDN", "IPv4", "IPv6")
    kind = obj.get("addressType")
    causes = [required("addressType")] if not kind else _one_of(obj, "addressType", "", types)
    for i, endpoint in enumerate(obj.get("endpoints") or []):
        if not endpoint.get("addresses"):
            causes.append(required(f"endpoints[{i}].addresses", "must contain at least 1 address"))
    return causes


def _endpoints(obj: Obj) -> list[Cause]:
    causes = []
    for i, subset in enumerate(obj.get("subsets") or []):
        at = f"subsets[{i}]"
        for key in ("addresses", "notReadyAddresses"):
            missing_ip = [j for j, address in enumerate(subset.get(key) or []) if not address.get("ip")]
            causes += [required(f"{at}.{key}[{j}].ip") for j in missing_ip]
        for j, port in enumerate(subset.get("ports") or []):
            causes += _between(port.get("port", 0), f"{at}.ports[{j}].port")
    return causes


def _event(obj: Obj) -> list[Cause]:
    about, space = (obj.get("involvedObject") or {}).get("namespace", ""), obj["metadata"].get("namespace", "")
    if about != space and (about or space != "default"):  # what has no namespace is told of in `default`
        return [invalid("involvedObject.namespace", about, "does not match event.namespace")]
    return []


_KINDS: dict[str, Callable[[Obj], list[Cause]]] = {
    "Pod": _pod,
    "Deployment": _deployment,
    "ReplicaSet": _replicaset,
    "StatefulSet": _statefulset,
    "DaemonSet": _daemonset,
    "Job": _job,
    "CronJob": _cronjob,
    "Service": _service,
    "ConfigMap": _keys,
    "Secret": _keys,
    "PodDisruptionBudget": _pdb,
    "HorizontalPodAutoscaler": _hpa,
    "Lease": _lease,
    "PriorityClass": _priority,
    "RoleBinding": _binding,
    "ClusterRoleBinding": _binding,
    "Node": _node,
    "EndpointSlice": _endpointslice,
    "Endpoints": _endpoints,
    "Event": _event,
    "NetworkPolicy": network_policy,
}


def _raise(res: Resource, obj: Obj, causes: Sequence[Cause]) -> None:
    if causes:
        raise errors.invalid(res.group, res.kind, obj["metadata"].get("name") or "", causes)


def _of_kind(res: Resource, obj: Obj) -> list[Cause]:
    check = None if res.custom else _KINDS.get(res.kind)
    return check(obj) if check else []


def check_create(res: Resource, obj: Obj, extra: Sequence[Cause] = ()) -> None:
    """Raises ApiError(422). `extra` are findings of the caller's (a custom resource's schema)."""
    if res.alias == "events" and not obj.get("eventTime"):  # the newer version of events wants one
        raise errors.invalid("", res.kind, obj["metadata"].get("name") or "", [required("eventTime")])
    _raise(res, obj, [*metadata(res, obj["metadata"]), *_of_kind(res, obj), *extra])


# -- updates


def _frozen(new: Obj, old: Obj, path: str) -> list[Cause]:
    have, had = _dig(new, path), _dig(old, path)
    return [] if have == had else [invalid(path, have, "field is immutable")]


def _dig(obj: Any, path: str) -> Any:
    for key in path.split("."):
        obj = obj.get(key) if isinstance(obj, dict) else None
    return obj


def _pod_update(new: Obj, old: Obj) -> list[Cause]:
    """Only images, tolerations added and deadlines may change."""

    def fixed(spec: Obj) -> Obj:
        spec = {
            key: value
            for key, value in spec.items()
            if key not in ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "schedulingGates")
        }
        for key in ("containers", "initContainers"):
            if key in spec:
                spec[key] = [{k: v for k, v in c.items() if k not in ("image", "resources")} for c in spec[key]]
        return spec

    causes = []
    if fixed(new["spec"]) != fixed(old["spec"]):
        why = (
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
            "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
            "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
        )
        causes.append(forbidden("spec", why))
    return causes


_STATEFULSET_FREE = (
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
)


def _statefulset_update(new: Obj, old: Obj) -> list[Cause]:
    def fixed(obj: Obj) -> Obj:
        return {key: value for key, value in obj["spec"].items() if key not in _STATEFULSET_FREE}

    if fixed(new) == fixed(old):
        return []
    named = [f"'{name}'" for name in _STATEFULSET_FREE]
    why = f"updates to statefulset spec for fields other than {', '.join(named[:-1])} and {named[-1]} are forbidden"
    return [forbidden("spec", why)]


def _job_update(new: Obj, old: Obj) -> list[Cause]:
    causes = [*_frozen(new, old, "spec.completions"), *_frozen(new, old, "spec.selector")]
    if not (old["spec"].get("suspend") and not (old.get("status") or {}).get("startTime")):
        causes += _frozen(new, old, "spec.template")
    return causes


def _immutable_data(new: Obj, old: Obj) -> list[Cause]:
    causes = []
    if new["kind"] == "Secret" and new.get("type") != old.get("type"):
        causes.append(invalid("type", new.get("type"), "field is immutable"))
    if old.get("immutable"):
        why = "field is immutable when `immutable` is set"
        causes += [forbidden(key, why) for key in ("data", "binaryData") if new.get(key) != old.get(key)]
        if not new.get("immutable"):
            causes.append(forbidden("immutable", why))
    return causes


def _service_update(new: Obj, old: Obj) -> list[Cause]:
    had, have = old["spec"].get("clusterIPs") or [], new["spec"].get("clusterIPs") or []
    same = new["spec"].get("type") == old["spec"].get("type") or "ExternalName" not in (
        new["spec"].get("type"),
        old["spec"].get("type"),
    )
    if had and same and have != had:
        return [invalid("spec.clusterIPs[0]", have, "may not change once set")]
    return []


def _role_ref(new: Obj, old: Obj) -> list[Cause]:
    if new.get("roleRef") == old.get("roleRef"):
        return []
    return [invalid("roleRef", new.get("roleRef"), "cannot change roleRef")]


_UPDATES: dict[str, Callable[[Obj, Obj], list[Cause]]] = {
    "Pod": _pod_update,
    "Deployment": lambda new, old: _frozen(new, old, "spec.selector"),
    "ReplicaSet": lambda new, old: _frozen(new, old, "spec.selector"),
    "DaemonSet": lambda new, old: _frozen(new, old, "spec.selector"),
    "StatefulSet": _statefulset_update,
    "Job": _job_update,
    "Secret": _immutable_data,
    "ConfigMap": _immutable_data,
    "Service": _service_update,
    "RoleBinding": _role_ref,
    "ClusterRoleBinding": _role_ref,
}


def check_update(res: Resource, new: Obj, old: Obj, sub: str, extra: Sequence[Cause] = ()) -> None:
    """Raises ApiError(422)."""
    meta, before = new["metadata"], old["metadata"]
    causes = metadata(res, meta)
    if res.custom is None and not sub:
        causes *= 4  # the real server looks at metadata four times, and lists what it finds as often
    if before.get("deletionTimestamp"):
        added = [entry for entry in meta.get("finalizers") or [] if entry not in (before.get("finalizers") or [])]
        if added:
            shown = ", ".join(f'"{entry}"' for entry in added)
            why = (
                "no new finalizers can be added if the object is being deleted, found new finalizers "
                f"[]string{{{shown}}}"
            )
            cause = forbidden("metadata.finalizers", why)
            causes += [cause] if res.custom else [cause, cause]  # the real server finds it twice
    if not sub and res.custom is None:
        causes += _of_kind(res, new)
        if check := _UPDATES.get(res.kind):
            causes += check(new, old)
    _raise(res, new, [*causes, *extra])
