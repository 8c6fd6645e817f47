"""A pod's status as a kubelet reports it; pure functions of what the agent knows.

Order and content of conditions, phases and container states follow facts/kubelet.md §0–§6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from sandbox.client import Obj

Phase = Literal["Pending", "Running", "Succeeded", "Failed"]
OWN_CONDITIONS = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")


def now() -> str:
    """Now, as the API writes seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def go_duration(seconds: float) -> str:
    """Whole seconds as Go prints a duration: 10s, 1m20s, 5m0s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


@dataclass(slots=True)
class ContainerView:
    """One container as the agent knows it; `state` and `last_state` in the API's shape."""

    name: str
    image: str
    state: Obj
    last_state: Obj = field(default_factory=dict)
    restarts: int = 0
    ready: bool = False
    started: bool = False
    image_id: str = ""
    container_id: str = ""

    @property
    def running(self) -> bool:
        return "running" in self.state

    @property
    def ended(self) -> Obj | None:
        """The final or, while it waits for a restart, the last termination."""
        found: Obj | None = self.state.get("terminated") or self.last_state.get("terminated")
        return found

    def report(self, spec: Obj) -> Obj:
        status: Obj = {
            "name": self.name,
            "state": self.state,
            "lastState": self.last_state,
            "ready": self.ready,
            "restartCount": self.restarts,
            "image": self.image,
            "imageID": self.image_id,
        }
        if self.container_id:
            status["containerID"] = self.container_id
        status["started"] = self.started
        if requests := (spec.get("resources") or {}).get("requests"):
            status["allocatedResources"] = requests
        if resources := spec.get("resources"):
            status["resources"] = resources
        if mounts := spec.get("volumeMounts"):
            status["volumeMounts"] = [_mount(mount) for mount in mounts]
        return status


def _mount(mount: Obj) -> Obj:
    shown: Obj = {"name": mount["name"], "mountPath": mount["mountPath"]}
    if mount.get("readOnly"):
        shown |= {"readOnly": True, "recursiveReadOnly": "Disabled"}
    return shown


@dataclass(slots=True)
class PodView:
    """One pod as the agent knows it."""

    containers: list[ContainerView]
    init: list[ContainerView]
    start_time: str
    host_ip: str
    sandbox: bool = False  # its network exists
    pod_ip: str | None = None
    failure: tuple[str, str] | None = None  # reason and message, when the pod as a whole was failed
    over: bool = False  # terminated by a deletion, or finished: no container will start again


def phase(view: PodView, restart_policy: str) -> Phase:  # noqa: PLR0911 – a table
    """kubelet's getPhase."""
    if view.failure:
        return "Failed"
    if view.over:
        return _terminal(view)
    failed_init = [c for c in view.init if (c.state.get("terminated") or {}).get("exitCode")]
    if failed_init and restart_policy == "Never":
        return "Failed"
    if any((c.state.get("terminated") or {}).get("exitCode", 1) != 0 for c in view.init):
        return "Pending"
    if any("waiting" in c.state and not c.last_state for c in view.containers):
        return "Pending"
    if any(c.running for c in view.containers) or restart_policy == "Always":
        return "Running"
    codes = [ended["exitCode"] for c in view.containers if (ended := c.ended)]
    if not any(codes):
        return "Succeeded"
    return "Failed" if restart_policy == "Never" else "Running"


def _terminal(view: PodView) -> Phase:
    codes = [ended["exitCode"] for c in (*view.init, *view.containers) if (ended := c.ended)]
    ran = [c.ended for c in view.containers]
    return "Succeeded" if all(ran) and not any(codes) else "Failed"


@dataclass(frozen=True, slots=True)
class _Condition:
    type: str
    status: bool
    reason: str = ""
    message: str = ""


def _conditions(pod: Obj, view: PodView, now_in: Phase) -> list[_Condition]:
    over = now_in in ("Succeeded", "Failed")
    unready = [c.name for c in view.containers if not c.ready]
    waiting = [c.name for c in view.init if (c.state.get("terminated") or {}).get("exitCode", 1) != 0]
    done = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(now_in, "")
    ready: tuple[bool, str, str]
    if over:
        ready = (False, done, "")
    elif unready:
        ready = (False, "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
    else:
        ready = (True, "", "")
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or []]
    held = {c["type"]: c["status"] for c in pod.get("status", {}).get("conditions") or []}
    missing = [gate for gate in gates if held.get(gate) != "True"]
    gated = ready
    if ready[0] and missing:
        gated = (
            False,
            "ReadinessGatesNotReady",
            f"corresponding condition of pod readiness gate {missing[0]!r} is not True",
        )
    initialized = _Condition("Initialized", True, "PodCompleted" if now_in == "Succeeded" else "")
    if waiting and not over:
        message = f"containers with incomplete status: [{' '.join(waiting)}]"
        initialized = _Condition("Initialized", False, "ContainersNotInitialized", message)
    return [
        _Condition("PodReadyToStartContainers", view.sandbox and not over),
        initialized,
        _Condition("Ready", *gated),
        _Condition("ContainersReady", *ready),
        _Condition("PodScheduled", True),
    ]


def report(pod: Obj, view: PodView) -> Obj:
    """The whole status to write for `pod`, whose current object tells of times and others' conditions."""
    spec, meta, old = pod["spec"], pod["metadata"], pod.get("status") or {}
    is_in = phase(view, spec.get("restartPolicy", "Always"))
    before: Mapping[str, Obj] = {c["type"]: c for c in old.get("conditions") or []}
    generation = meta.get("generation")
    written: list[Obj] = [c for kind, c in before.items() if kind not in OWN_CONDITIONS]
    for condition in _conditions(pod, view, is_in):
        was = before.get(condition.type)
        value = "True" if condition.status else "False"
        entry: Obj = {"type": condition.type, "status": value, "lastProbeTime": None}
        same = was is not None and was["status"] == value
        entry["lastTransitionTime"] = was["lastTransitionTime"] if same and was else now()
        if condition.reason:
            entry["reason"] = condition.reason
        if condition.message:
            entry["message"] = condition.message
        if generation is not None:
            entry["observedGeneration"] = generation
        written.append(entry)
    status: Obj = {"phase": is_in, "conditions": written, "hostIP": view.host_ip, "hostIPs": [{"ip": view.host_ip}]}
    if view.failure:
        status["reason"], status["message"] = view.failure
    if view.pod_ip:
        status |= {"podIP": view.pod_ip, "podIPs": [{"ip": view.pod_ip}]}
    status["startTime"] = view.start_time
    if generation is not None:
        status["observedGeneration"] = generation
    if view.init:
        status["initContainerStatuses"] = _reports(view.init, spec.get("initContainers") or [])
    status["containerStatuses"] = _reports(view.containers, spec["containers"])
    status["qosClass"] = old.get("qosClass") or qos_class(spec)
    return status


def _reports(views: Sequence[ContainerView], specs: Sequence[Obj]) -> list[Obj]:
    by_name = {spec["name"]: spec for spec in specs}
    return [view.report(by_name.get(view.name, {})) for view in sorted(views, key=lambda view: view.name)]


def qos_class(spec: Obj) -> str:
    """Guaranteed, Burstable or BestEffort, by cpu and memory alone."""
    some, equal = False, True
    for container in (*(spec.get("initContainers") or []), *spec["containers"]):
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        for name in ("cpu", "memory"):
            some |= name in limits or name in requests
            equal &= name in limits and requests.get(name, limits[name]) == limits[name]
    return ("Guaranteed" if equal else "Burstable") if some else "BestEffort"


def same(ours: Obj, theirs: Obj) -> bool:
    """Whether the API already shows what we would write (absent, null and empty are the same)."""
    return _bare(ours) == _bare({name: theirs.get(name) for name in ours})


def _bare(value: object) -> object:
    if isinstance(value, dict):
        return {k: bare for k, v in value.items() if (bare := _bare(v)) not in (None, {}, [], "")}
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return value
