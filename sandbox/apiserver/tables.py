"""Tables: what `kubectl get` prints, column by column as pkg/printers/internalversion has them (1.36)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from sandbox.apiserver import conversion
from sandbox.apiserver.core import Page
from sandbox.apiserver.resources import Resource
from sandbox.apiserver.subresources import selector_text
from sandbox.client import Obj

Cells = list[Any]
NONE, UNKNOWN = "<none>", "<unknown>"


def _col(name: str, type: str = "string", priority: int = 0, format: str = "", description: str = "") -> Obj:
    return {"name": name, "type": type, "format": format, "description": description or name, "priority": priority}


def _columns(text: str) -> list[Obj]:
    """`Name,Data,!Wide,Count:integer`: ! marks what only `-o wide` shows."""
    found = []
    for entry in text.split(","):
        name, _, type = entry.lstrip("!").partition(":")
        format = "name" if name == "Name" else ""
        found.append(_col(name, type or "string", int(entry.startswith("!")), format))
    return found


# -- ages


def _parse(when: str) -> datetime:
    return datetime.fromisoformat(when.replace("Z", "+00:00"))


# Up to so many seconds a duration is written in this unit, with the next smaller one beside it or not.
_UNITS: tuple[tuple[int, int, str, int, str], ...] = (
    (120, 1, "s", 0, ""),
    (600, 60, "m", 1, "s"),
    (3 * 3600, 60, "m", 0, ""),
    (8 * 3600, 3600, "h", 60, "m"),
    (48 * 3600, 3600, "h", 0, ""),
    (8 * 86400, 86400, "d", 3600, "h"),
    (730 * 86400, 86400, "d", 0, ""),
    (2**62, 365 * 86400, "y", 86400, "d"),
)


def human(seconds: float) -> str:
    """A duration as kubectl writes it: 5s, 3m20s, 2d3h."""
    total = max(int(seconds), 0)
    _, unit, word, small, small_word = next(entry for entry in _UNITS if total < entry[0])
    rest = total % unit // small if small else 0
    return f"{total // unit}{word}" + (f"{rest}{small_word}" if rest else "")


def age(when: str | None) -> str:
    return human((datetime.now(UTC) - _parse(when)).total_seconds()) if when else UNKNOWN


def _age(obj: Obj) -> str:
    return age(obj["metadata"].get("creationTimestamp"))


# -- pods


def _restarts(statuses: Sequence[Obj]) -> str:
    count = sum(status.get("restartCount", 0) for status in statuses)
    ended = [
        last["finishedAt"]
        for status in statuses
        if (last := (status.get("lastState") or {}).get("terminated")) and last.get("finishedAt")
    ]
    return f"{count} ({age(max(ended))} ago)" if count and ended else str(count)


def _waiting_reason(statuses: Sequence[Obj]) -> tuple[str, bool]:
    """The reason of the first container (kubectl looks backwards) that does not run, and whether any runs."""
    reason, running = "", False
    for status in reversed(statuses):
        state = status.get("state") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated")
        if waiting.get("reason"):
            reason = waiting["reason"]
        elif ended is not None:
            signal = ended.get("signal")
            fallback = f"Signal:{signal}" if signal else f"ExitCode:{ended.get('exitCode', 0)}"
            reason = ended.get("reason") or fallback
        elif status.get("ready") and "running" in state:
            running = True
    return reason, running


def _init_reason(pod: Obj) -> str:
    statuses = pod["status"].get("initContainerStatuses") or []
    total = len(pod["spec"].get("initContainers") or [])
    for i, status in enumerate(statuses):
        state = status.get("state") or {}
        ended, waiting = state.get("terminated"), state.get("waiting") or {}
        if ended is not None and ended.get("exitCode", 0) == 0:
            continue
        if ended is not None:
            return "Init:" + (ended.get("reason") or f"ExitCode:{ended.get('exitCode')}")
        if waiting.get("reason") not in (None, "PodInitializing"):
            return f"Init:{waiting['reason']}"
        return f"Init:{i}/{total}"
    return ""


def pod_status(pod: Obj) -> str:
    """The STATUS cell."""
    status = pod.get("status") or {}
    statuses = status.get("containerStatuses") or []
    reason: str = status.get("reason") or status.get("phase") or ""
    if any(c.get("reason") == "SchedulingGated" for c in status.get("conditions") or []):
        reason = "SchedulingGated"
    if init := _init_reason(pod):
        reason = init
    else:
        why, running = _waiting_reason(statuses)
        reason = why or reason
        if reason == "Completed" and running:
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or [])
            reason = "Running" if ready else "NotReady"
    if pod["metadata"].get("deletionTimestamp"):
        return "Unknown" if status.get("reason") == "NodeLost" else "Terminating"
    return reason


def _gates(pod: Obj) -> str:
    gates = pod["spec"].get("readinessGates") or []
    if not gates:
        return NONE
    conditions = {c["type"]: c["status"] for c in (pod.get("status") or {}).get("conditions") or []}
    return f"{sum(conditions.get(gate['conditionType']) == 'True' for gate in gates)}/{len(gates)}"


def _pod(pod: Obj) -> Cells:
    status = pod.get("status") or {}
    statuses = status.get("containerStatuses") or []
    ready = sum(bool(entry.get("ready")) and "running" in (entry.get("state") or {}) for entry in statuses)
    return [
        pod["metadata"]["name"],
        f"{ready}/{len(pod['spec']['containers'])}",
        pod_status(pod),
        _restarts([*(status.get("initContainerStatuses") or []), *statuses]),
        _age(pod),
        status.get("podIP") or NONE,
        pod["spec"].get("nodeName") or NONE,
        status.get("nominatedNodeName") or NONE,
        _gates(pod),
    ]


# -- other kinds


def _node(node: Obj) -> Cells:
    meta, status = node["metadata"], node.get("status") or {}
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or []}
    state = {"True": "Ready"}.get(conditions["Ready"], "NotReady") if "Ready" in conditions else "Unknown"
    if (node.get("spec") or {}).get("unschedulable"):
        state += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    roles = sorted(key[len(prefix) :] for key in meta.get("labels") or {} if key.startswith(prefix) and key != prefix)
    addresses = {entry["type"]: entry["address"] for entry in reversed(status.get("addresses") or [])}
    info = status.get("nodeInfo") or {}
    return [
        meta["name"],
        state,
        ",".join(roles) or NONE,
        _age(node),
        info.get("kubeletVersion", ""),
        addresses.get("InternalIP", NONE),
        addresses.get("ExternalIP", NONE),
        info.get("osImage") or UNKNOWN,
        info.get("kernelVersion") or UNKNOWN,
        info.get("containerRuntimeVersion") or UNKNOWN,
    ]


def _external_ip(service: Obj) -> str:
    spec = service["spec"]
    given = list(spec.get("externalIPs") or [])
    match spec.get("type"):
        case "ExternalName":
            return spec.get("externalName") or NONE
        case "LoadBalancer":
            ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
            given += [entry.get("ip") or entry.get("hostname", "") for entry in ingress]
            return ",".join(given) or "<pending>"
    return ",".join(given) or NONE


def _service(service: Obj) -> Cells:
    spec = service["spec"]
    ports = [
        f"{port['port']}{':' + str(port['nodePort']) if port.get('nodePort') else ''}/{port.get('protocol', 'TCP')}"
        for port in spec.get("ports") or []
    ]
    return [
        service["metadata"]["name"],
        spec.get("type"),
        spec.get("clusterIP") or NONE,
        _external_ip(service),
        ",".join(ports) or NONE,
        _age(service),
        _labels(spec.get("selector")),
    ]


def _labels(labels: Obj | None) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted((labels or {}).items())) or NONE


def _containers(template: Obj) -> list[str]:
    containers = (template.get("spec") or {}).get("containers") or []
    return [",".join(c["name"] for c in containers), ",".join(c.get("image", "") for c in containers)]


def _deployment(obj: Obj) -> Cells:
    spec, status = obj["spec"], obj.get("status") or {}
    return [
        obj["metadata"]["name"],
        f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 0)}",
        status.get("updatedReplicas", 0),
        status.get("availableReplicas", 0),
        _age(obj),
        *_containers(spec["template"]),
        selector_text(spec.get("selector")) or NONE,
    ]


def _replicaset(obj: Obj) -> Cells:
    spec, status = obj["spec"], obj.get("status") or {}
    return [
        obj["metadata"]["name"],
        spec.get("replicas", 0),
        status.get("replicas", 0),
        status.get("readyReplicas", 0),
        _age(obj),
        *_containers(spec["template"]),
        selector_text(spec.get("selector")) or NONE,
    ]


def _statefulset(obj: Obj) -> Cells:
    spec, status = obj["spec"], obj.get("status") or {}
    ready = f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 0)}"
    return [obj["metadata"]["name"], ready, _age(obj), *_containers(spec["template"])]


def _daemonset(obj: Obj) -> Cells:
    spec, status = obj["spec"], obj.get("status") or {}
    counts = (
        "desiredNumberScheduled",
        "currentNumberScheduled",
        "numberReady",
        "updatedNumberScheduled",
        "numberAvailable",
    )
    return [
        obj["metadata"]["name"],
        *(status.get(key, 0) for key in counts),
        _labels((spec["template"].get("spec") or {}).get("nodeSelector")),
        _age(obj),
        *_containers(spec["template"]),
        selector_text(spec.get("selector")) or NONE,
    ]


def _job(obj: Obj) -> Cells:
    spec, status = obj["spec"], obj.get("status") or {}
    done = status.get("succeeded", 0)
    wanted, parallel = spec.get("completions"), spec.get("parallelism") or 0
    progress = f"{done}/{wanted}" if wanted is not None else f"{done}/1 of {parallel}" if parallel > 1 else f"{done}/1"
    conditions = {c["type"] for c in status.get("conditions") or [] if c["status"] == "True"}
    names = {
        "Complete": "Complete",
        "Failed": "Failed",
        "Suspended": "Suspended",
        "SuccessCriteriaMet": "SuccessCriteriaMet",
        "FailureTarget": "FailureTarget",
    }
    state = next((text for type, text in names.items() if type in conditions), "Running")
    if obj["metadata"].get("deletionTimestamp"):
        state = "Terminating"
    duration = ""
    if status.get("startTime"):
        end = _parse(status["completionTime"]) if status.get("completionTime") else datetime.now(UTC)
        duration = human((end - _parse(status["startTime"])).total_seconds())
    return [
        obj["metadata"]["name"],
        state,
        progress,
        duration,
        _age(obj),
        *_containers(spec["template"]),
        selector_text(spec.get("selector")) or NONE,
    ]


def _pdb(obj: Obj) -> Cells:
    spec = obj["spec"]
    return [
        obj["metadata"]["name"],
        str(spec.get("minAvailable", "N/A")),
        str(spec.get("maxUnavailable", "N/A")),
        (obj.get("status") or {}).get("disruptionsAllowed", 0),
        _age(obj),
    ]


def _event(event: Obj) -> Cells:
    about, source = event.get("involvedObject") or {}, event.get("source") or {}
    series = event.get("series") or {}
    first = event.get("firstTimestamp") or event.get("eventTime")
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or first
    count = event.get("count") or series.get("count") or 1
    seen = f"{age(last)} (x{count} over {age(first)})" if count > 1 and first else age(last)
    origin = ", ".join(filter(None, (source.get("component") or event.get("reportingComponent"), source.get("host"))))
    return [
        seen,
        event.get("type", ""),
        event.get("reason", ""),
        f"{about.get('kind', '').lower()}/{about.get('name', '')}",
        about.get("fieldPath", ""),
        origin,
        (event.get("message") or "").strip(),
        age(first),
        count,
        event["metadata"]["name"],
    ]


def _endpoints_text(obj: Obj) -> str:
    found = []
    for subset in obj.get("subsets") or []:
        for address in subset.get("addresses") or []:
            found += [f"{address['ip']}:{port['port']}" for port in subset.get("ports") or []] or [address["ip"]]
    return ",".join(found[:3]) + (f" + {len(found) - 3} more..." if len(found) > 3 else "") if found else NONE


def _slice(obj: Obj) -> Cells:
    ports = [str(port.get("port", "*")) for port in obj.get("ports") or []]
    addresses = [address for endpoint in obj.get("endpoints") or [] for address in endpoint.get("addresses") or []]
    shown = ",".join(addresses[:3]) + (f" + {len(addresses) - 3} more..." if len(addresses) > 3 else "")
    return [
        obj["metadata"]["name"],
        obj.get("addressType"),
        ",".join(ports) or "<unset>",
        shown or "<unset>",
        _age(obj),
    ]


def _hpa_metric(obj: Obj) -> str:
    """What each metric is, and what it shall be: `cpu: 80%/50%`, `9/3`."""
    current = (obj.get("status") or {}).get("currentMetrics") or []
    found = []
    for i, metric in enumerate(obj["spec"].get("metrics") or []):
        source = metric["type"][0].lower() + metric["type"][1:]
        part = metric.get(source) or {}
        have = ((current[i].get(source) or {}).get("current") or {}) if i < len(current) else {}
        target = part.get("target") or {}
        title = f"{part['name']}: " if "name" in part else ""
        if "averageUtilization" in target:
            now = f"{have['averageUtilization']}%" if "averageUtilization" in have else UNKNOWN
            found.append(f"{title}{now}/{target['averageUtilization']}%")
            continue
        key = "averageValue" if target.get("averageValue") else "value"
        average = " (avg)" if source == "external" and key == "averageValue" else ""
        found.append(f"{title}{have.get(key, UNKNOWN)}/{target.get(key)}{average}")
    return ", ".join(found) or NONE


def _hpa(obj: Obj) -> Cells:
    spec, ref = obj["spec"], obj["spec"]["scaleTargetRef"]
    return [
        obj["metadata"]["name"],
        f"{ref['kind']}/{ref['name']}",
        _hpa_metric(obj),
        str(spec.get("minReplicas", "<unset>")),
        spec["maxReplicas"],
        (obj.get("status") or {}).get("currentReplicas", 0),
        _age(obj),
    ]


def _binding(obj: Obj) -> Cells:
    def names(kind: str) -> str:
        chosen = [subject for subject in obj.get("subjects") or [] if subject["kind"] == kind]
        return ", ".join((f"{s['namespace']}/" if s.get("namespace") else "") + s["name"] for s in chosen)

    ref = obj["roleRef"]
    return [
        obj["metadata"]["name"],
        f"{ref['kind']}/{ref['name']}",
        _age(obj),
        names("User"),
        names("Group"),
        names("ServiceAccount"),
    ]


def _cronjob(obj: Obj) -> Cells:
    spec, status = obj["spec"], obj.get("status") or {}
    last = age(status["lastScheduleTime"]) if status.get("lastScheduleTime") else NONE
    template = spec["jobTemplate"]["spec"]["template"]
    return [
        obj["metadata"]["name"],
        spec.get("schedule"),
        spec.get("timeZone") or NONE,
        str(bool(spec.get("suspend"))),
        len(status.get("active") or []),
        last,
        _age(obj),
        *_containers(template),
        NONE,
    ]


Printer = tuple[list[Obj], Callable[[Obj], Cells]]
_WORKLOAD = ",!Containers,!Images,!Selector"


def _name_age(obj: Obj) -> Cells:
    return [obj["metadata"]["name"], _age(obj)]


def _printers() -> dict[str, Printer]:
    def add(columns: str, cells: Callable[[Obj], Cells]) -> Printer:
        return _columns(columns), cells

    def counted(*keys: str) -> Callable[[Obj], int]:
        return lambda obj: sum(len(obj.get(key) or {}) for key in keys)

    data, secrets = counted("data", "binaryData"), counted("data")
    bindings = "Name,Role,Age,!Users,!Groups,!ServiceAccounts"
    return {
        "pods": add("Name,Ready,Status,Restarts,Age,!IP,!Node,!Nominated Node,!Readiness Gates", _pod),
        "nodes": add(
            "Name,Status,Roles,Age,Version,!Internal-IP,!External-IP,!OS-Image,!Kernel-Version,!Container-Runtime",
            _node,
        ),
        "services": add("Name,Type,Cluster-IP,External-IP,Port(s),Age,!Selector", _service),
        "configmaps": add("Name,Data,Age", lambda o: [o["metadata"]["name"], data(o), _age(o)]),
        "secrets": add("Name,Type,Data,Age", lambda o: [o["metadata"]["name"], o.get("type"), secrets(o), _age(o)]),
        "namespaces": add(
            "Name,Status,Age", lambda o: [o["metadata"]["name"], (o.get("status") or {}).get("phase", ""), _age(o)]
        ),
        "events": add("Last Seen,Type,Reason,Object,!Subobject,!Source,Message,!First Seen,!Count,!Name", _event),
        "endpoints": add("Name,Endpoints,Age", lambda o: [o["metadata"]["name"], _endpoints_text(o), _age(o)]),
        "deployments.apps": add("Name,Ready,Up-to-date,Available,Age" + _WORKLOAD, _deployment),
        "replicasets.apps": add("Name,Desired:integer,Current:integer,Ready:integer,Age" + _WORKLOAD, _replicaset),
        "statefulsets.apps": add("Name,Ready,Age,!Containers,!Images", _statefulset),
        "daemonsets.apps": add(
            "Name,Desired:integer,Current:integer,Ready:integer,Up-to-date:integer,"
            "Available:integer,Node Selector,Age" + _WORKLOAD,
            _daemonset,
        ),
        "controllerrevisions.apps": add(
            "Name,Controller,Revision,Age",
            lambda o: [o["metadata"]["name"], _controller(o), o.get("revision", 0), _age(o)],
        ),
        "jobs.batch": add("Name,Status,Completions,Duration,Age" + _WORKLOAD, _job),
        "cronjobs.batch": add("Name,Schedule,Timezone,Suspend,Active:integer,Last Schedule,Age" + _WORKLOAD, _cronjob),
        "poddisruptionbudgets.policy": add("Name,Min Available,Max Unavailable,Allowed Disruptions:integer,Age", _pdb),
        "leases.coordination.k8s.io": add(
            "Name,Holder,Age",
            lambda o: [o["metadata"]["name"], (o.get("spec") or {}).get("holderIdentity") or "", _age(o)],
        ),
        "priorityclasses.scheduling.k8s.io": add(
            "Name,Value:integer,Global-Default:boolean,Age,PreemptionPolicy",
            lambda o: [
                o["metadata"]["name"],
                o.get("value", 0),
                bool(o.get("globalDefault")),
                _age(o),
                o.get("preemptionPolicy"),
            ],
        ),
        "endpointslices.discovery.k8s.io": add("Name,AddressType,Ports,Endpoints,Age", _slice),
        "horizontalpodautoscalers.autoscaling": add("Name,Reference,Targets,MinPods,MaxPods,Replicas,Age", _hpa),
        "rolebindings.rbac.authorization.k8s.io": add(bindings, _binding),
        "clusterrolebindings.rbac.authorization.k8s.io": add(bindings, _binding),
        "networkpolicies.networking.k8s.io": add(
            "Name,Pod-Selector,Age",
            lambda o: [o["metadata"]["name"], selector_text((o.get("spec") or {}).get("podSelector")) or NONE, _age(o)],
        ),
        "customresourcedefinitions.apiextensions.k8s.io": (
            [_col("Name", format="name"), _col("Created At", "date")],
            lambda o: [o["metadata"]["name"], o["metadata"]["creationTimestamp"]],
        ),
        "roles.rbac.authorization.k8s.io": (
            [_col("Name", format="name"), _col("Created At", "date")],
            lambda o: [o["metadata"]["name"], o["metadata"]["creationTimestamp"]],
        ),
        "clusterroles.rbac.authorization.k8s.io": (
            [_col("Name", format="name"), _col("Created At", "date")],
            lambda o: [o["metadata"]["name"], o["metadata"]["creationTimestamp"]],
        ),
    }


def _controller(obj: Obj) -> str:
    owners = [o for o in obj["metadata"].get("ownerReferences") or [] if o.get("controller")]
    return f"{owners[0]['kind'].lower()}/{owners[0]['name']}" if owners else NONE


_PRINTERS = _printers()
_DEFAULT: Printer = (_columns("Name,Age"), _name_age)


# -- custom resources


_STEP = re.compile(r"""\.([\w\0-]+)|\[(\d+|\*)\]|\[\?\(@\.(\w+)\s*==\s*["']([^"']*)["']\)\]|\[['"]([^'"]+)['"]\]""")


def json_path(obj: Any, path: str) -> Any:
    """The simple JSONPath that printer columns use: .a.b[0], .a[?(@.type=="x")].b, .a['x.y']."""
    values = [obj]
    for part in _STEP.findall(path.replace("\\.", "\0")):
        values = list(_step(values, part))
    return values[0] if values else None


def _step(values: list[Any], part: tuple[str, ...]) -> list[Any]:
    field, index, key, wanted, quoted = part
    found: list[Any] = []
    for value in values:
        if (name := field or quoted) and isinstance(value, dict):
            name = name.replace("\0", ".")
            found += [value[name]] if name in value else []
        elif index == "*" and isinstance(value, list):
            found += value
        elif index and isinstance(value, list):
            found += value[int(index) : int(index) + 1]
        elif key and isinstance(value, list):
            found += [item for item in value if isinstance(item, dict) and str(item.get(key)) == wanted]
    return found


def _custom(columns: Sequence[Obj]) -> Printer:
    if not columns:
        definitions = [_col("Name", format="name"), _col("Age", "date")]
        return definitions, lambda obj: [obj["metadata"]["name"], _age(obj)]
    definitions = [_col("Name", format="name")]
    definitions += [
        _col(col["name"], col["type"], col.get("priority", 0), col.get("format", ""), col.get("description", ""))
        for col in columns
    ]

    def cells(obj: Obj) -> Cells:
        found: Cells = [obj["metadata"]["name"]]
        for col in columns:
            value = json_path(obj, col["jsonPath"])
            if value is not None and col["type"] == "date":
                value = age(str(value))
            elif value is not None and col["type"] == "string" and not isinstance(value, str):
                value = str(value).lower() if isinstance(value, bool) else str(value)
            found.append(value)
        return found

    return definitions, cells


# -- rendering


def _metadata_only(obj: Obj) -> Obj:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def _embedded(res: Resource, obj: Obj, include: str) -> Obj | None:
    match include:
        case "None":
            return None
        case "Object":
            return conversion.from_storage(res, obj)
        case _:
            return _metadata_only(obj)


def render(res: Resource, page: Page, version: str, include: str, *, columns: bool = True) -> Obj:
    """A Table of `meta.k8s.io/VERSION`; `include` is None, Metadata or Object."""
    definitions, cells = _custom(res.custom.columns) if res.custom else _PRINTERS.get(res.key, _DEFAULT)
    meta: Obj = {"resourceVersion": str(page.version)}
    if page.cont:
        meta["continue"] = page.cont
    if page.remaining is not None:
        meta["remainingItemCount"] = page.remaining
    rows = []
    for stored in page.items:
        row: Obj = {"cells": cells(stored.obj)}
        row["object"] = _embedded(res, stored.obj, include)
        rows.append(row)
    return {
        "kind": "Table",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": meta,
        "columnDefinitions": definitions if columns else [],
        "rows": rows,
    }


def partial(obj: Obj) -> Obj:
    return _metadata_only(obj)


def partial_list(page: Page) -> Obj:
    meta: Obj = {"resourceVersion": str(page.version)}
    if page.cont:
        meta["continue"] = page.cont
    return {
        "kind": "PartialObjectMetadataList",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta,
        "items": [_metadata_only(stored.obj) for stored in page.items],
    }
