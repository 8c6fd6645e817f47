"""The Node object of a machine: what it has, and what it says of its health."""

from __future__ import annotations

import platform
import uuid
from typing import TYPE_CHECKING

from sandbox.client import Obj
from sandbox.node import network
from sandbox.node.status import now

if TYPE_CHECKING:
    from sandbox.node.agent import Machine

VERSION = "v1.36.0+gameday"
MEMORY_BYTES = 32 * 2**30
ALLOCATABLE = {"cpu": "8", "memory": f"{MEMORY_BYTES >> 30}Gi", "ephemeral-storage": "100Gi", "pods": "50"}
FEATURES = ("ExtendWebSocketsToKubelet",)  # exec comes as a WebSocket, not as SPDY (kube-apiserver 1.36 asks for this)
_CONDITIONS = (
    ("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
    ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
)


def gpu_uuids(node: str, count: int) -> list[str]:
    """The machine's devices, with the same names after every start of a machine of that name."""
    return [f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{node}/{number}')}" for number in range(count)]


def conditions() -> list[Obj]:
    moment = now()
    return [
        {"type": type_, "status": status, "reason": reason, "message": message, "lastHeartbeatTime": moment}
        | {"lastTransitionTime": moment}
        for type_, status, reason, message in _CONDITIONS
    ]


def node(machine: Machine, address: str) -> Obj:
    """The object to register."""
    resources = {**ALLOCATABLE, "nvidia.com/gpu": str(machine.gpus)}
    labels = {
        "kubernetes.io/hostname": machine.name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "node.kubernetes.io/instance-type": "gpu-sandbox",
        "topology.kubernetes.io/zone": machine.zone,
        "topology.kubernetes.io/region": "sandbox",
    }
    if machine.gpus:
        labels["nvidia.com/gpu.present"] = "true"
    cidr = network.pod_cidr(machine.index)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": machine.name, "labels": labels},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr], "providerID": f"gameday://{machine.zone}/{machine.name}"},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": machine.name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": network.KUBELET_PORT}},
            "nodeInfo": _info(machine.name),
            "declaredFeatures": list(FEATURES),
            "conditions": conditions(),
        },
    }


def _info(name: str) -> Obj:
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, name)
    return {
        "machineID": identity.hex,
        "systemUUID": str(identity),
        "bootID": str(uuid.uuid4()),
        "kernelVersion": platform.release(),
        "osImage": "gameday sandbox",
        "containerRuntimeVersion": "gameday://0.1",
        "kubeletVersion": VERSION,
        "kubeProxyVersion": "",
        "operatingSystem": "linux",
        "architecture": "amd64",
    }


def correction(current: Obj) -> Obj | None:
    """A patch of our own conditions, if the API shows others; what others report stays theirs."""
    shown = {c["type"]: c["status"] for c in (current.get("status") or {}).get("conditions") or []}
    wrong = [c for c in conditions() if shown.get(c["type"]) != c["status"]]
    return {"status": {"conditions": wrong}} if wrong else None
