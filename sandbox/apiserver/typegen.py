"""Makes `types.json` out of the models of the `kubernetes` client package: `python -m sandbox.apiserver.typegen`.

Run it when that package is raised to a new release; nothing imports it.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

from kubernetes.client import models
from pydantic import BaseModel

from sandbox.apiserver.resources import BUILTIN, Resource

TARGET = Path(__file__).with_name("types.json")
_PREFIX = re.compile(
    r"^(Core|Events|Discovery|Authentication|Rbac|Apiextensions|Storage|Networking|Policy|Autoscaling|Batch|Apps)?"
    r"V\d(?:(?:alpha|beta)\d)?(?=[A-Z])"
)
_INT64 = frozenset(
    {
        "generation",
        "observedGeneration",
        "deletionGracePeriodSeconds",
        "terminationGracePeriodSeconds",
        "activeDeadlineSeconds",
        "tolerationSeconds",
        "expirationSeconds",
        "runAsUser",
        "runAsGroup",
        "fsGroup",
        "gracePeriodSeconds",
        "revision",
        "remainingItemCount",
        "supplementalGroups",
        "seconds",
        "templateGeneration",
        "startingDeadlineSeconds",
        "sizeBytes",
        "capacity",
        "uid",
        "gid",
        "user",
        "defaultUser",
    }
)
# What the models show as plain strings, or as anything.
_QUANTITY_MAPS = frozenset(
    {
        "limits",
        "requests",
        "capacity",
        "allocatable",
        "hard",
        "used",
        "default",
        "defaultRequest",
        "max",
        "min",
        "maxLimitRequestRatio",
        "overhead",
        "allocatedResources",
    }
)
_QUANTITIES = frozenset(
    {
        ("ResourceFieldSelector", "divisor"),
        ("EmptyDirVolumeSource", "sizeLimit"),
        ("MetricTarget", "averageValue"),
        ("MetricTarget", "value"),
        ("MetricValueStatus", "averageValue"),
        ("MetricValueStatus", "value"),
        ("HPAScalingRules", "tolerance"),
        ("NodeAllocatableOverheadResources", "perContainer"),
        ("NodeAllocatableOverheadResources", "perPod"),
        ("NodeAllocatableMappedResources", "quantity"),
    }
)
_INT_OR_STRING = frozenset({"maxUnavailable", "maxSurge", "minAvailable", "targetPort"})
_PORT_OR_NAME = frozenset({"HTTPGetAction", "TCPSocketAction", "NetworkPolicyPort"})
_MICRO_TIMES = frozenset({"acquireTime", "renewTime", "eventTime", "lastObservedTime"})
_SCALARS = (
    ("Str", "string"),
    ("str", "string"),
    ("Bool", "bool"),
    ("bool", "bool"),
    ("Float", "float64"),
    ("float", "float64"),
    ("datetime", "time"),
    ("bytes", "bytes"),
)
_MORE = {
    "policy/v1/Eviction": "V1Eviction",
    "v1/Binding": "V1Binding",
    "authentication.k8s.io/v1/TokenRequest": "AuthenticationV1TokenRequest",
    "autoscaling/v1/Scale": "V1Scale",
    "v1/DeleteOptions": "V1DeleteOptions",
}


class Generator:
    def __init__(self) -> None:
        self.types: dict[str, dict[str, str]] = {}
        self._names: dict[type[BaseModel], str] = {}

    def add(self, model: type[BaseModel]) -> str:
        """The name of a model's type, which is added with all that it consists of."""
        if model in self._names:
            return self._names[model]
        name = _PREFIX.sub("", model.__name__)
        if name == "IntOrString":
            return "intstr"
        if name in self.types:  # two groups have a type of this name
            name = model.__name__
        self._names[model] = name
        self.types[name] = {"": "any"} if name == "JSONSchemaProps" else {}
        if not self.types[name]:
            for field, info in model.model_fields.items():
                key = (info.alias or info.serialization_alias or field).lstrip("_")
                self.types[name][key] = self._special(name, key, self._type(info.annotation, key))
        return name

    @staticmethod
    def _special(name: str, key: str, found: str) -> str:
        if key in _QUANTITY_MAPS and found in ("{}string", "{}any"):
            return "{}quantity"
        if (name, key) in _QUANTITIES:
            return "quantity"
        if key in _INT_OR_STRING or (key == "port" and name in _PORT_OR_NAME):
            return "intstr"
        if key in _MICRO_TIMES:
            return "microtime"
        if (name, key) == ("Secret", "data"):
            return "{}bytes"
        return "any" if (name, key) == ("ObjectMeta", "managedFields") else found

    def _type(self, annotation: Any, key: str) -> str:
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            return self._type(args[0], key)
        if origin is list:
            return "[]" + self._type(args[0], key)
        if origin is dict:
            return "{}" + self._type(args[1], key)
        if args:  # a union: of one type and None, or of several that nobody can tell apart
            rest = [arg for arg in args if arg is not type(None)]
            return self._type(rest[0], key) if len(rest) == 1 else "any"
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            return self.add(annotation)
        return _scalar(getattr(annotation, "__name__", str(annotation)), key)


def _scalar(name: str, key: str) -> str:
    if "Int" in name or name == "int":
        return "int64" if key in _INT64 else "int32"
    return next((type for part, type in _SCALARS if part in name), "any")


def _model_names(res: Resource) -> list[str]:
    version = res.version.capitalize()
    group = {"events.k8s.io": "Events", "discovery.k8s.io": "Discovery", "": "Core"}.get(res.group, "")
    names = [f"{version}{res.kind}", f"{group}{version}{res.kind}"]
    return names[::-1] if res.kind == "Event" else names


def generate() -> bytes:
    known: dict[str, type[BaseModel]] = dict(inspect.getmembers(models, inspect.isclass))
    generator = Generator()
    kinds = {}
    for res in BUILTIN:
        found = next((known[name] for name in _model_names(res) if name in known), None)
        if found is not None:
            kinds[f"{res.api_version}/{res.kind}"] = generator.add(found)
    for key, name in _MORE.items():
        kinds[key] = generator.add(known[name])
    table = {"kinds": kinds, "types": dict(sorted(generator.types.items()))}
    return json.dumps(table, indent=0, separators=(",", ":")).encode() + b"\n"


if __name__ == "__main__":
    TARGET.write_bytes(generate())
    sys.exit(0)
