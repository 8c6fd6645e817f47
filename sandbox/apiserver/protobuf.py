"""Protobuf bodies, as kubectl sends them from its typed clients (`create`, `auth can-i`, `drain`).

Decodes the kinds below into the JSON that the rest of the server works with; a field or kind that is not in the
table is an error. Field numbers: the `generated.proto` files of k8s.io/api and k8s.io/apimachinery (they never
change once given). Answers are JSON, which those clients take as well.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from sandbox.apiserver import types
from sandbox.client import ApiError, Obj

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"

# Type → "number field" pairs; the fields' types are those of the type table.
_NUMBERS: dict[str, str] = {
    "ObjectMeta": "1 name 2 generateName 3 namespace 4 selfLink 5 uid 6 resourceVersion 7 generation "
    "8 creationTimestamp 9 deletionTimestamp 10 deletionGracePeriodSeconds 11 labels 12 annotations "
    "13 ownerReferences 14 finalizers",
    "OwnerReference": "1 kind 3 name 4 uid 5 apiVersion 6 controller 7 blockOwnerDeletion",
    "LabelSelector": "1 matchLabels 2 matchExpressions",
    "LabelSelectorRequirement": "1 key 2 operator 3 values",
    "DeleteOptions": "1 gracePeriodSeconds 2 preconditions 3 orphanDependents 4 propagationPolicy 5 dryRun",
    "Preconditions": "1 uid 2 resourceVersion",
    "Eviction": "1 metadata 2 deleteOptions",
    "Namespace": "1 metadata 2 spec 3 status",
    "NamespaceSpec": "1 finalizers",
    "NamespaceStatus": "1 phase",
    "ConfigMap": "1 metadata 2 data 3 binaryData 4 immutable",
    "Secret": "1 metadata 2 data 3 type 4 stringData 5 immutable",
    "ServiceAccount": "1 metadata 2 secrets 3 imagePullSecrets 4 automountServiceAccountToken",
    "LocalObjectReference": "1 name",
    "TokenRequest": "1 metadata 2 spec 3 status",
    "TokenRequestSpec": "1 audiences 3 boundObjectRef 4 expirationSeconds",
    "TokenRequestStatus": "1 token 2 expirationTimestamp",
    "BoundObjectReference": "1 kind 2 apiVersion 3 name 4 uid",
    "Role": "1 metadata 2 rules",
    "ClusterRole": "1 metadata 2 rules 3 aggregationRule",
    "PolicyRule": "1 verbs 2 apiGroups 3 resources 4 resourceNames 5 nonResourceURLs",
    "RoleBinding": "1 metadata 2 subjects 3 roleRef",
    "ClusterRoleBinding": "1 metadata 2 subjects 3 roleRef",
    "Subject": "1 kind 2 apiGroup 3 name 4 namespace",
    "RoleRef": "1 apiGroup 2 kind 3 name",
    "SelfSubjectAccessReview": "1 metadata 2 spec 3 status",
    "SelfSubjectAccessReviewSpec": "1 resourceAttributes 2 nonResourceAttributes",
    "SelfSubjectRulesReview": "1 metadata 2 spec 3 status",
    "SelfSubjectRulesReviewSpec": "1 namespace",
    "SubjectRulesReviewStatus": "3 incomplete 4 evaluationError",
    "SubjectAccessReviewStatus": "1 allowed 2 reason 3 evaluationError 4 denied",
    "SelfSubjectReview": "1 metadata 2 status",
    "SelfSubjectReviewStatus": "1 userInfo",
    "UserInfo": "1 username 2 uid 3 groups",
    "ResourceAttributes": "1 namespace 2 verb 3 group 4 version 5 resource 6 subresource 7 name",
    "NonResourceAttributes": "1 path 2 verb",
    "Deployment": "1 metadata 2 spec 3 status",
    "DeploymentSpec": "1 replicas 2 selector 3 template 4 strategy 5 minReadySeconds 6 revisionHistoryLimit 7 paused "
    "9 progressDeadlineSeconds",
    "DeploymentStrategy": "1 type 2 rollingUpdate",
    "RollingUpdateDeployment": "1 maxUnavailable 2 maxSurge",
    "DeploymentStatus": "1 observedGeneration 2 replicas 3 updatedReplicas 4 availableReplicas 5 unavailableReplicas "
    "7 readyReplicas",
    "PodTemplateSpec": "1 metadata 2 spec",
    "PodSpec": "2 containers 3 restartPolicy 4 terminationGracePeriodSeconds 5 activeDeadlineSeconds 6 dnsPolicy "
    "7 nodeSelector 8 serviceAccountName 9 serviceAccount 10 nodeName 11 hostNetwork 12 hostPID 13 hostIPC "
    "14 securityContext 15 imagePullSecrets 16 hostname 17 subdomain 19 schedulerName 21 automountServiceAccountToken "
    "24 priorityClassName 25 priority 27 shareProcessNamespace 29 runtimeClassName 30 enableServiceLinks "
    "31 preemptionPolicy 35 setHostnameAsFQDN",
    "PodSecurityContext": "2 runAsUser 3 runAsNonRoot 5 fsGroup 6 runAsGroup",
    "Container": "1 name 2 image 3 command 4 args 5 workingDir 6 ports 7 env 8 resources 13 terminationMessagePath "
    "14 imagePullPolicy 16 stdin 17 stdinOnce 18 tty 20 terminationMessagePolicy",
    "ContainerPort": "1 name 2 hostPort 3 containerPort 4 protocol 5 hostIP",
    "EnvVar": "1 name 2 value",
    "ResourceRequirements": "1 limits 2 requests",
    "Job": "1 metadata 2 spec 3 status",
    "JobSpec": "1 parallelism 2 completions 3 activeDeadlineSeconds 4 selector 5 manualSelector 6 template "
    "7 backoffLimit 8 ttlSecondsAfterFinished 9 completionMode 10 suspend",
    "JobStatus": "4 active 5 succeeded 6 failed 7 completedIndexes",
    "PodDisruptionBudget": "1 metadata 2 spec 3 status",
    "PodDisruptionBudgetSpec": "1 minAvailable 2 selector 3 maxUnavailable 4 unhealthyPodEvictionPolicy",
    "PodDisruptionBudgetStatus": "1 observedGeneration 2 disruptedPods 3 disruptionsAllowed 4 currentHealthy "
    "5 desiredHealthy 6 expectedPods",
    "V1HorizontalPodAutoscaler": "1 metadata 2 spec 3 status",
    "V1HorizontalPodAutoscalerSpec": "1 scaleTargetRef 2 minReplicas 3 maxReplicas 4 targetCPUUtilizationPercentage",
    "V1HorizontalPodAutoscalerStatus": "1 observedGeneration 3 currentReplicas 4 desiredReplicas",
    "V1CrossVersionObjectReference": "1 kind 2 name 3 apiVersion",
    "PriorityClass": "1 metadata 2 value 3 globalDefault 4 description 5 preemptionPolicy",
    "Service": "1 metadata 2 spec 3 status",
    "ServiceSpec": "1 ports 2 selector 3 clusterIP 4 type 5 externalIPs 7 sessionAffinity 8 loadBalancerIP "
    "10 externalName 11 externalTrafficPolicy 12 healthCheckNodePort 13 publishNotReadyAddresses",
    "ServicePort": "1 name 2 protocol 3 port 4 targetPort 5 nodePort 6 appProtocol",
    "ServiceStatus": "1 loadBalancer",
    "LoadBalancerStatus": "",
}


class _Broken(Exception):
    """Not protobuf, or more than the table knows."""


def _fields(name: str) -> dict[int, str]:
    words = _NUMBERS[name].split()
    return {int(number): word for number, word in zip(words[::2], words[1::2], strict=True)}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise _Broken("unexpected end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _entries(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers with their value: a number, or the bytes of what has a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise _Broken("unexpected end")
            yield tag >> 3, data[at : at + length]
            at += length
        else:
            raise _Broken(f"wire type {tag & 7}")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _intstr(raw: bytes) -> str | int:
    found = dict(_entries(raw))
    text, number = found.get(3, b""), found.get(2, 0)
    return text.decode() if found.get(1) and isinstance(text, bytes) else int(number)


def _quantity(raw: bytes) -> str:
    return next((value.decode() for _, value in _entries(raw) if isinstance(value, bytes)), "0")


def _number(type: str, raw: int) -> bool | int:
    if type == "bool":
        return bool(raw)
    if type not in ("int32", "int64"):
        raise _Broken(f"a number where {type} belongs")
    return _signed(raw)


def _value(type: str, raw: int | bytes) -> Any:
    """One value; None for what Go's JSON leaves out."""
    if isinstance(raw, int):
        return _number(type, raw)
    decoder = _DECODERS.get(type)
    return decoder(raw) if decoder else _message(type, raw)


def _time(raw: bytes) -> str | None:
    seconds = dict(_entries(raw)).get(1)
    if not isinstance(seconds, int):
        return None
    return datetime.fromtimestamp(_signed(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "string": lambda raw: raw.decode() or None,
    "bytes": lambda raw: base64.b64encode(raw).decode(),
    "quantity": _quantity,
    "intstr": _intstr,
    "time": _time,
    "microtime": _time,
}


def _message(type: str, data: bytes) -> Obj:
    if type not in _NUMBERS:
        raise _Broken(f"type {type}")
    numbers, kinds = _fields(type), types.fields_of(type)
    result: Obj = {}
    for number, raw in _entries(data):
        name = numbers.get(number)
        if name is None:
            raise _Broken(f"field {number} of {type}")
        kind = kinds[name]
        if kind.startswith("[]"):
            item = _value(kind[2:], raw)
            result.setdefault(name, []).append("" if item is None else item)
        elif kind.startswith("{}"):
            if not isinstance(raw, bytes):
                raise _Broken(f"field {number} of {type}")
            entry = dict(_entries(raw))
            key, value = entry.get(1, b""), entry.get(2, b"")
            if not isinstance(key, bytes):
                raise _Broken(f"a key of {name}")
            item = _value(kind[2:], value)
            result.setdefault(name, {})[key.decode()] = "" if item is None else item
        elif (value := _value(kind, raw)) is not None:
            result[name] = value
    return result


def decode(body: bytes) -> Obj:
    """The object in a protobuf body. Raises ApiError(415) for what cannot be decoded."""
    try:
        return _decode(body)
    except (_Broken, UnicodeDecodeError) as broken:
        text = (
            f"the sandbox's API server does not understand this protobuf body ({broken}); send it as JSON, for example "
            "with kubectl create -f"
        )
        raise ApiError(415, "UnsupportedMediaType", text) from broken


def _decode(body: bytes) -> Obj:
    if not body.startswith(_MAGIC):
        raise _Broken("no magic")
    wrapper = dict(_entries(body[len(_MAGIC) :]))
    meta, raw = wrapper.get(1, b""), wrapper.get(2, b"")
    if not isinstance(meta, bytes) or not isinstance(raw, bytes):
        raise _Broken("no envelope")
    named = dict(_entries(meta))
    version, kind = (value.decode() if isinstance(value := named.get(n, b""), bytes) else "" for n in (1, 2))
    type = types.type_of(version, kind)
    if type is None:
        raise _Broken(f"{version} {kind}")
    return {"apiVersion": version, "kind": kind, **_message(type, raw)}
