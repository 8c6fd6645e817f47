"""Defaulting of the built-in kinds, as `pkg/apis/*/v1/defaults.go` of Kubernetes 1.36 does it.

`apply` is idempotent: it runs on every write. Defaults only fill what is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sandbox.apiserver.resources import Resource
from sandbox.client import Obj

if TYPE_CHECKING:
    from sandbox.apiserver.core import Core

Fill = Mapping[str, Any]


def apply(res: Resource, obj: Obj, core: Core) -> None:
    """Fill what is absent in `obj`, in place."""
    if res.custom is not None:
        core.custom.default(res, obj)
    elif rule := _RULES.get(res.kind):
        rule(obj)


def fill(obj: Obj, values: Fill) -> None:
    """Set what is absent (or null)."""
    for key, value in values.items():
        if obj.get(key) is None:
            obj[key] = value() if callable(value) else value


def _sub(obj: Obj, key: str) -> Obj:
    """The object at `key`, made if absent."""
    if obj.get(key) is None:
        obj[key] = {}
    return obj[key]  # type: ignore[no-any-return]


def image_tag(image: str) -> str:
    """The tag that decides about pulling; "" for a digest, latest if none is named."""
    if "@" in image:
        return ""
    last = image.rsplit("/", 1)[-1]
    return last.rsplit(":", 1)[1] if ":" in last else "latest"


_PROBE: Fill = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}


def _http_get(action: Obj | None) -> None:
    if action is not None:
        fill(action, {"path": "/", "scheme": "HTTP"})


def _probe(probe: Obj) -> None:
    fill(probe, _PROBE)
    _http_get(probe.get("httpGet"))
    if (grpc := probe.get("grpc")) is not None:
        fill(grpc, {"service": ""})


def _resources(container: Obj) -> None:
    resources = _sub(container, "resources")
    limits = resources.get("limits")
    for part in ("limits", "requests"):
        if values := resources.get(part):
            resources[part] = {name: quantity(value) for name, value in values.items()}
    # A limit is a request too; in templates the real server leaves this to the pod.
    if limits and container.pop("$pod", False):
        requests = _sub(resources, "requests")
        fill(requests, resources["limits"])
    container.pop("$pod", None)


def quantity(value: Any) -> Any:
    """Quantities are strings, whatever was sent."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _container(container: Obj, *, in_pod: bool, host_network: bool) -> None:
    if in_pod:
        container["$pod"] = True
    _resources(container)
    pull = "Always" if image_tag(container.get("image") or "") == "latest" else "IfNotPresent"
    fill(
        container,
        {
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
            "imagePullPolicy": pull,
        },
    )
    for port in container.get("ports") or []:
        fill(port, {"protocol": "TCP"})
        if host_network and "containerPort" in port:
            fill(port, {"hostPort": port["containerPort"]})
    for env in container.get("env") or []:
        if ref := (env.get("valueFrom") or {}).get("fieldRef"):
            fill(ref, {"apiVersion": "v1"})
        if ref := (env.get("valueFrom") or {}).get("resourceFieldRef"):
            fill(ref, {"divisor": "0"})
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(name) is not None:
            _probe(container[name])
    for hook in (container.get("lifecycle") or {}).values():
        if isinstance(hook, dict):
            _http_get(hook.get("httpGet"))


def _downward(items: list[Obj] | None) -> None:
    for item in items or []:
        if ref := item.get("fieldRef"):
            fill(ref, {"apiVersion": "v1"})


def _volume(volume: Obj) -> None:
    for kind in ("configMap", "secret", "downwardAPI", "projected"):
        if (source := volume.get(kind)) is not None:
            fill(source, {"defaultMode": 420})
    if (path := volume.get("hostPath")) is not None:
        fill(path, {"type": ""})
    _downward((volume.get("downwardAPI") or {}).get("items"))
    for source in (volume.get("projected") or {}).get("sources") or []:
        _downward((source.get("downwardAPI") or {}).get("items"))
        if (token := source.get("serviceAccountToken")) is not None:
            fill(token, {"expirationSeconds": 3600})
    if not set(volume) - {"name"}:
        volume["emptyDir"] = {}


def pod_spec(spec: Obj, *, in_pod: bool = False) -> None:
    for key in ("containers", "initContainers"):
        for container in spec.get(key) or []:
            _container(container, in_pod=in_pod, host_network=bool(spec.get("hostNetwork")))
    for volume in spec.get("volumes") or []:
        _volume(volume)
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account
    fill(
        spec,
        {
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst",
            "securityContext": dict,
            "schedulerName": "default-scheduler",
        },
    )
    if in_pod:
        fill(spec, {"enableServiceLinks": True})
    for constraint in spec.get("topologySpreadConstraints") or []:
        fill(constraint, {"whenUnsatisfiable": "DoNotSchedule"}) if not constraint.get("whenUnsatisfiable") else None


def _pod(obj: Obj) -> None:
    pod_spec(obj["spec"], in_pod=True)


def _template(spec: Obj) -> None:
    template = _sub(spec, "template")
    template.setdefault("metadata", {})
    pod_spec(_sub(template, "spec"))


def _deployment(obj: Obj) -> None:
    spec = obj["spec"]
    _template(spec)
    fill(spec, {"replicas": 1, "strategy": dict, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600})
    fill(spec["strategy"], {"type": "RollingUpdate"})
    if spec["strategy"]["type"] == "RollingUpdate":
        fill(_sub(spec["strategy"], "rollingUpdate"), {"maxUnavailable": "25%", "maxSurge": "25%"})


def _replicaset(obj: Obj) -> None:
    _template(obj["spec"])
    fill(obj["spec"], {"replicas": 1})


def _statefulset(obj: Obj) -> None:
    spec = obj["spec"]
    _template(spec)
    fill(
        spec,
        {
            "replicas": 1,
            "podManagementPolicy": "OrderedReady",
            "updateStrategy": dict,
            "revisionHistoryLimit": 10,
            "persistentVolumeClaimRetentionPolicy": dict,
        },
    )
    fill(spec["persistentVolumeClaimRetentionPolicy"], {"whenDeleted": "Retain", "whenScaled": "Retain"})
    fill(spec["updateStrategy"], {"type": "RollingUpdate"})
    if spec["updateStrategy"]["type"] == "RollingUpdate":
        fill(_sub(spec["updateStrategy"], "rollingUpdate"), {"partition": 0})
    for claim in spec.get("volumeClaimTemplates") or []:
        claim.setdefault("kind", "PersistentVolumeClaim")
        claim.setdefault("apiVersion", "v1")
        _claim(claim)


def _daemonset(obj: Obj) -> None:
    spec = obj["spec"]
    _template(spec)
    fill(spec, {"updateStrategy": dict, "revisionHistoryLimit": 10})
    fill(spec["updateStrategy"], {"type": "RollingUpdate"})
    if spec["updateStrategy"]["type"] == "RollingUpdate":
        fill(_sub(spec["updateStrategy"], "rollingUpdate"), {"maxUnavailable": 1, "maxSurge": 0})


def job_spec(spec: Obj) -> None:
    _template(spec)
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec["completions"] = spec["parallelism"] = 1
    fill(
        spec,
        {
            "parallelism": 1,
            "backoffLimit": 6 if spec.get("backoffLimitPerIndex") is None else 2**31 - 1,
            "completionMode": "NonIndexed",
            "suspend": False,
            "podReplacementPolicy": "Failed" if spec.get("podFailurePolicy") else "TerminatingOrFailed",
        },
    )


def _job(obj: Obj) -> None:
    job_spec(obj["spec"])
    fill(obj["spec"], {"manualSelector": False})


def _cronjob(obj: Obj) -> None:
    spec = obj["spec"]
    fill(
        spec,
        {
            "concurrencyPolicy": "Allow",
            "suspend": False,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 1,
            "jobTemplate": dict,
        },
    )
    spec["jobTemplate"].setdefault("metadata", {})
    # A template's own counts are left to the Job that is made of it.
    _template(_sub(spec["jobTemplate"], "spec"))


def _service(obj: Obj) -> None:
    spec = _sub(obj, "spec")
    fill(spec, {"type": "ClusterIP", "sessionAffinity": "None"})
    for port in spec.get("ports") or []:
        fill(port, {"protocol": "TCP"})
        if not port.get("targetPort"):
            port["targetPort"] = port.get("port")
    if spec["type"] != "ExternalName":
        fill(spec, {"internalTrafficPolicy": "Cluster"})
    if spec["type"] in ("NodePort", "LoadBalancer"):
        fill(spec, {"externalTrafficPolicy": "Cluster"})
    if spec["type"] == "LoadBalancer":
        fill(spec, {"allocateLoadBalancerNodePorts": True})
    if spec["sessionAffinity"] == "ClientIP":
        fill(_sub(_sub(spec, "sessionAffinityConfig"), "clientIP"), {"timeoutSeconds": 10800})


def _secret(obj: Obj) -> None:
    fill(obj, {"type": "Opaque"})


def _claim(obj: Obj) -> None:
    fill(_sub(obj, "spec"), {"volumeMode": "Filesystem"})
    fill(_sub(obj, "status"), {"phase": "Pending"})


def _namespace(obj: Obj) -> None:
    _sub(obj.setdefault("metadata", {}), "labels")["kubernetes.io/metadata.name"] = obj["metadata"].get("name", "")


def _ports(ports: list[Obj] | None) -> None:
    for port in ports or []:
        fill(port, {"protocol": "TCP"})


def _endpoints(obj: Obj) -> None:
    for subset in obj.get("subsets") or []:
        _ports(subset.get("ports"))


def _endpointslice(obj: Obj) -> None:
    for key in ("endpoints", "ports"):
        obj.setdefault(key, None)
    for port in obj.get("ports") or []:
        fill(port, {"name": "", "protocol": "TCP"})
    for endpoint in obj.get("endpoints") or []:
        endpoint.setdefault("conditions", {})


def _event(obj: Obj) -> None:
    for key in ("firstTimestamp", "lastTimestamp", "eventTime"):
        obj.setdefault(key, None)
    fill(obj, {"source": dict, "reportingComponent": "", "reportingInstance": ""})


_NODE_INFO = (
    "machineID",
    "systemUUID",
    "bootID",
    "kernelVersion",
    "osImage",
    "containerRuntimeVersion",
    "kubeletVersion",
    "kubeProxyVersion",
    "operatingSystem",
    "architecture",
)


def _node(obj: Obj) -> None:
    status = _sub(obj, "status")
    fill(_sub(_sub(status, "daemonEndpoints"), "kubeletEndpoint"), {"Port": 0})
    fill(_sub(status, "nodeInfo"), dict.fromkeys(_NODE_INFO, ""))


def _hpa(obj: Obj) -> None:
    spec = obj["spec"]
    fill(spec, {"minReplicas": 1})
    if not spec.get("metrics"):
        target = {"type": "Utilization", "averageUtilization": 80}
        spec["metrics"] = [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    behavior = spec.get("behavior")
    if behavior is None:
        return
    up: Fill = {
        "stabilizationWindowSeconds": 0,
        "selectPolicy": "Max",
        "policies": lambda: [
            {"type": "Pods", "value": 4, "periodSeconds": 15},
            {"type": "Percent", "value": 100, "periodSeconds": 15},
        ],
    }
    down: Fill = {
        "selectPolicy": "Max",
        "policies": lambda: [{"type": "Percent", "value": 100, "periodSeconds": 15}],
    }
    fill(_sub(behavior, "scaleUp"), up)
    fill(_sub(behavior, "scaleDown"), down)


def _binding(obj: Obj) -> None:
    group = obj.get("roleRef") or {}
    fill(group, {"apiGroup": "rbac.authorization.k8s.io"})
    for subject in obj.get("subjects") or []:
        if subject.get("kind") in ("User", "Group"):
            fill(subject, {"apiGroup": "rbac.authorization.k8s.io"})


def _priority(obj: Obj) -> None:
    fill(obj, {"preemptionPolicy": "PreemptLowerPriority"})


def _network_policy(obj: Obj) -> None:
    spec = _sub(obj, "spec")
    fill(spec, {"podSelector": dict})
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
    for rule in (spec.get("ingress") or []) + (spec.get("egress") or []):
        _ports(rule.get("ports"))


def _limit_range(obj: Obj) -> None:
    for item in (obj.get("spec") or {}).get("limits") or []:
        if item.get("type") != "Container":
            continue
        for part in ("default", "defaultRequest", "max", "min"):
            if values := item.get(part):
                item[part] = {name: quantity(value) for name, value in values.items()}
        default = item.get("default") or {}
        for name, value in (item.get("max") or {}).items():
            default.setdefault(name, value)
        request = item.get("defaultRequest") or {}
        for values in (default, item.get("min") or {}):
            for name, value in values.items():
                request.setdefault(name, value)
        if default:
            item["default"] = default
        if request:
            item["defaultRequest"] = request


def _crd(obj: Obj) -> None:
    spec = obj["spec"]
    names = _sub(spec, "names")
    if kind := names.get("kind"):
        fill(names, {"singular": kind.lower(), "listKind": f"{kind}List"})
    fill(spec, {"conversion": lambda: {"strategy": "None"}})


_RULES: dict[str, Callable[[Obj], None]] = {
    "Pod": _pod,
    "Deployment": _deployment,
    "ReplicaSet": _replicaset,
    "StatefulSet": _statefulset,
    "DaemonSet": _daemonset,
    "Job": _job,
    "CronJob": _cronjob,
    "Service": _service,
    "Secret": _secret,
    "Namespace": _namespace,
    "PersistentVolumeClaim": _claim,
    "Endpoints": _endpoints,
    "EndpointSlice": _endpointslice,
    "Event": _event,
    "Node": _node,
    "HorizontalPodAutoscaler": _hpa,
    "RoleBinding": _binding,
    "ClusterRoleBinding": _binding,
    "PriorityClass": _priority,
    "NetworkPolicy": _network_policy,
    "LimitRange": _limit_range,
    "CustomResourceDefinition": _crd,
}
