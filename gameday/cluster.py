"""The cluster under test, through the Kubernetes API. With `gameday.login` the only importer of `kubernetes`.

The official client carries the requests; objects stay plain JSON (`Obj`), since chaos resources have no types
there and the typed client refuses whole lists for one odd object. What other modules work with are the frozen
`Pod` and `Node`. Every call is bounded in time. What a real API server does now and then is ridden out:
throttling (429 with Retry-After), credentials that expired (401), a restart (no connection for `PATIENCE`).

Errors: `ClusterError` in one sentence; `Refused` carries the API's own Status.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import urllib3
from kubernetes.client.exceptions import ApiException

from gameday import clock
from gameday.censor import censored
from gameday.errors import ClusterError
from gameday.kinds import DEPLOYMENTS, NODES, PODS, REVIEWS, Kind
from gameday.login import Login, kubeconfig as kubeconfig_

Obj = dict[str, Any]
Objs = list[Obj]
CORDONED = "gameday.dev/cordoned-by"  # annotation on a node
ZONE_LABEL = "topology.kubernetes.io/zone"

CALL_TIMEOUT = 10.0  # seconds for one request; a heal must not hang on a dead API server
PATIENCE = 4.0  # seconds that an API server which has answered before gets to come back, or to stop throttling us
QUIET = 3.0  # seconds without a byte after which a stream is taken up anew (so that its thread sees a stop)
_PATCH = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}


class Refused(ClusterError):
    """The API answered with an error Status; `code` is HTTP's, `reason` Kubernetes' word."""

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.retry_after = retry_after  # seconds that the server asks us to wait, None where it does not


class Unreachable(ClusterError):
    """No answer from the API server (connection, TLS, timeout). `never_sent`: it cannot have acted on the request."""

    def __init__(self, message: str, *, never_sent: bool = False, slow: bool = False) -> None:
        super().__init__(message)
        self.never_sent = never_sent
        self.slow = slow  # it timed out: waiting longer is not the way


class Quiet(ClusterError):
    """A stream said nothing for `QUIET` seconds."""


@dataclass(frozen=True, slots=True)
class Pod:
    name: str
    namespace: str
    uid: str
    node: str
    zone: str  # of its node; "" where the node has none
    ip: str
    phase: str
    ready: bool
    terminating: bool
    labels: Mapping[str, str]
    gpus: int
    host_network: bool
    ports: tuple[int, ...]  # TCP, that of the main container's service first
    restarts: int
    owner: str  # "ReplicaSet/my-llama32-6d4f", "" for a bare pod
    container: str  # its main one
    waiting: str  # the reason for which a container waits, "" when none does
    grace: int = 30  # seconds that it asks for to end gracefully

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    uid: str
    zone: str
    ready: bool
    unschedulable: bool
    gpus: int  # allocatable
    cordoned_by: str = ""  # our mark, "" when somebody else cordoned it
    conditions: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # type → (status, reason)
    boot: str = ""  # its bootID: another one after each start of the machine
    taints: tuple[tuple[str, str], ...] = ()  # (key, effect) that keep pods away, but for Kubernetes' own and GPUs'


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment."""

    name: str
    namespace: str
    uid: str
    replicas: int
    max_unavailable: int  # pods that its strategy takes away at once
    images: Mapping[str, str]  # container → image, the main one first


@dataclass(frozen=True, slots=True)
class Watched:
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Obj


class Cluster:
    """One named cluster. Thread-safe: urllib3's pool carries every thread's requests."""

    def __init__(self, login: Login, namespace: str) -> None:
        self._login = login
        self.name = login.name
        self.namespace = namespace
        self._answered = False  # once: from then on, an absence is a restart

    @classmethod
    def connect(
        cls, *, context: str | None, kubeconfig: Path | None = None, in_cluster: bool = False, namespace: str
    ) -> Cluster:
        """Connect to the cluster that the user named; nothing is ever implied by a current-context."""
        if in_cluster:
            return cls(Login(context="", in_cluster=True), namespace)
        if not context:
            raise ClusterError("No cluster is named: give --context NAME, --in-cluster or GAMEDAY_CONTEXT.")
        files = kubeconfig_(str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG", ""), context)
        return cls(Login(context=context, files=files), namespace)

    def environment(self) -> dict[str, str]:
        """Variables by which other programs reach this cluster. Raises `ClusterError` where they would not."""
        return self._login.environment()

    # ── requests ────────────────────────────────────────────────────────────────────────────

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content: str = "application/json",
        timeout: float | tuple[float, float] = CALL_TIMEOUT,
    ) -> Any:
        """The raw answer, once the server neither throttles us nor takes our credentials for expired."""
        until = clock.now() + PATIENCE
        api = self._login.api
        renewed = False
        while True:
            try:
                raw = self._once(api, method, path, query, body, content, timeout)
            except Refused as refused:
                if refused.code == 401 and not renewed and self._login.renew(api):
                    api, renewed = self._login.api, True
                    continue
                # An eviction's 429 is a PodDisruptionBudget's word, not throttling.
                wait = None if path.endswith("/eviction") else refused.retry_after
                if refused.code not in (429, 503) or wait is None or clock.now() + wait > until:
                    raise
                clock.pause(wait)
                continue
            self._answered = True
            return raw

    def _once(
        self,
        api: Any,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: object,
        content: str,
        timeout: float | tuple[float, float],
    ) -> Any:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content
        request = api.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            answer = api.call_api(*request, _request_timeout=timeout)
        except ApiException as refused:
            if not refused.status:  # the client's word for a TLS connection that broke: nobody answered
                why = censored(str(refused.reason or "the TLS connection broke"))
                raise Unreachable(f"The API server of {self.name!r} does not answer: {why}") from refused
            raise _refused(refused.status, refused.body or refused.reason or "", refused.headers) from refused
        except (urllib3.exceptions.HTTPError, OSError) as lost:
            cause = getattr(lost, "reason", None) or lost
            raise Unreachable(
                f"The API server of {self.name!r} does not answer: {censored(_root(lost))}",
                never_sent=isinstance(cause, urllib3.exceptions.NewConnectionError | ConnectionRefusedError),
                slow=isinstance(cause, urllib3.exceptions.TimeoutError | TimeoutError)
                and not isinstance(cause, urllib3.exceptions.NewConnectionError),
            ) from lost
        raw = answer.response
        if raw.status >= 400:
            raise _refused(raw.status, raw.read(), raw.headers)
        return raw

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content: str = "application/json",
        timeout: float = CALL_TIMEOUT,
    ) -> Obj:
        """One request and its JSON. A restart of the API server is waited out where the request may be repeated:
        it was never sent, or it says the same twice."""
        again = method in ("GET", "DELETE") or content == _PATCH["merge"]
        until = clock.now() + PATIENCE
        while True:
            try:
                return self._json(method, path, query, body, content, timeout)
            except Unreachable as lost:
                if not self._answered or lost.slow or not (again or lost.never_sent) or clock.now() >= until:
                    raise
                clock.pause(0.2)

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: object,
        content: str,
        timeout: float,
    ) -> Obj:
        raw = self._send(method, path, query=query, body=body, content=content, timeout=timeout)
        try:
            return json.loads(raw.read() or b"{}")  # type: ignore[no-any-return]
        except (urllib3.exceptions.HTTPError, OSError) as lost:
            raise Unreachable(f"The API server of {self.name!r} broke off its answer: {lost}") from lost
        except json.JSONDecodeError as wrong:
            raise ClusterError(f"{self.name!r} does not answer like a Kubernetes API (not JSON at {path})") from wrong

    def version(self) -> str:
        return str(self.call("GET", "/version", timeout=5).get("gitVersion", "unknown"))

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> Obj:
        return self.call("GET", kind.path(namespace, name))

    def find(self, kind: Kind, name: str, namespace: str | None = None) -> Obj | None:
        """The object, or None where there is none."""
        try:
            return self.get(kind, name, namespace)
        except Refused as refused:
            if refused.code == 404:
                return None
            raise

    def list(self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = "") -> Objs:
        return self._list(kind, namespace, labels, fields)[0]

    def _list(self, kind: Kind, namespace: str | None, labels: str, fields: str) -> tuple[Objs, str]:
        found = self.call("GET", kind.path(namespace), query=_selectors(labels, fields))
        items = found.get("items") or []
        for item in items:  # lists leave these out of their items
            item.setdefault("kind", kind.kind)
            item.setdefault("apiVersion", kind.api_version)
        return items, found.get("metadata", {}).get("resourceVersion", "")

    def create(self, kind: Kind, obj: Obj, *, dry_run: bool = False) -> Obj:
        query = {"dryRun": "All", "fieldValidation": "Strict"} if dry_run else None
        return self.call("POST", kind.path(obj["metadata"].get("namespace")), body=obj, query=query)

    def replace(self, kind: Kind, obj: Obj) -> Obj:
        meta = obj["metadata"]
        return self.call("PUT", kind.path(meta.get("namespace"), meta["name"]), body=obj)

    def patch(
        self,
        kind: Kind,
        name: str,
        patch: Obj | Sequence[Obj],
        namespace: str | None = None,
        *,
        sub: str | None = None,
        type: Literal["merge", "strategic", "json"] = "merge",
    ) -> Obj:
        return self.call("PATCH", kind.path(namespace, name, sub), body=patch, content=_PATCH[type])

    def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str | None = None,
        *,
        grace: int | None = None,
        uid: str = "",
        version: str = "",
    ) -> bool:
        """Delete in the background; False when it was not there.

        `uid`, `version`: of the object that is meant; another one is `Refused` with code 409.
        """
        options: Obj = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if wanted := {key: value for key, value in (("uid", uid), ("resourceVersion", version)) if value}:
            options["preconditions"] = wanted
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        try:
            self.call("DELETE", kind.path(namespace, name), body=options)
        except Refused as refused:
            if refused.code == 404:
                return False
            raise
        return True

    def evict(self, pod: str, namespace: str, *, uid: str) -> None:
        """Ask for its eviction; `Refused` with 429 while a PodDisruptionBudget forbids it, 409 for another `uid`."""
        metadata = {"name": pod, "namespace": namespace}
        eviction: Obj = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        eviction["deleteOptions"] = {"preconditions": {"uid": uid}}
        self.call("POST", PODS.path(namespace, pod, "eviction"), body=eviction)

    def can(self, verb: str, kind: Kind, namespace: str | None = None, sub: str = "", name: str = "") -> bool:
        """Whether we may, by SelfSubjectAccessReview."""
        attributes = {"verb": verb, "group": kind.group, "resource": kind.plural, "namespace": namespace or ""}
        attributes |= {key: value for key, value in (("subresource", sub), ("name", name)) if value}
        review = {
            "apiVersion": REVIEWS.api_version,
            "kind": REVIEWS.kind,
            "spec": {"resourceAttributes": attributes},
        }
        return bool(self.call("POST", REVIEWS.path(), body=review).get("status", {}).get("allowed"))

    def served(self, group_version: str) -> frozenset[str]:
        """The plurals that the API serves in "group/version"; empty where it does not know it."""
        return frozenset(kind.plural for kind in self.kinds(group_version))

    def kinds(self, group_version: str) -> tuple[Kind, ...]:
        """What the API serves in "group/version", subresources among it; nothing where it does not know it."""
        try:
            found = self.call("GET", f"/apis/{group_version}")
        except Refused as refused:
            if refused.code == 404:
                return ()
            raise
        group, _, version = group_version.rpartition("/")
        return tuple(
            Kind(group, version, one["name"], one.get("kind", ""), one.get("namespaced") is True)
            for one in found.get("resources", [])
        )

    # ── what is there ───────────────────────────────────────────────────────────────────────

    def nodes(self) -> tuple[Node, ...]:
        return tuple(to_node(obj) for obj in self.list(NODES))

    def zones_of_nodes(self) -> dict[str, str]:
        return {node.name: node.zone for node in self.nodes()}

    def pods(
        self, *, labels: str = "", namespace: str | None = None, zones: Mapping[str, str] | None = None
    ) -> tuple[Pod, ...]:
        """Pods of the namespace; `zones` (node → zone) saves a look-up."""
        zones = self.zones_of_nodes() if zones is None else zones
        return tuple(to_pod(obj, zones) for obj in self.list(PODS, namespace or self.namespace, labels=labels))

    def workloads(self) -> tuple[Workload, ...]:
        """The Deployments of the namespace."""
        return tuple(to_workload(obj) for obj in self.list(DEPLOYMENTS, self.namespace))

    # ── streams ─────────────────────────────────────────────────────────────────────────────

    def watch(
        self,
        kind: Kind,
        namespace: str | None,
        on_event: Callable[[Watched], None],
        stop: threading.Event,
        *,
        labels: str = "",
        on_alive: Callable[[], None] = lambda: None,
    ) -> None:
        """List, then watch, until `stop`; lists again after 410 and lost connections. Blocks: run in a thread.

        What was listed arrives as ADDED; what vanished while the watch was down arrives as DELETED. `on_alive` is
        called after each list and each watch request that ended well, every 5 s or so.
        """
        known: dict[str, Obj] = {}
        while not stop.is_set():
            try:
                items, version = self._list(kind, namespace, labels, "")
                for event in _differences(known, items):
                    on_event(event)
                on_alive()
                while not stop.is_set():
                    version = self._follow(kind, namespace, labels, version, known, on_event, stop)
                    on_alive()
            except ClusterError:
                stop.wait(0.5)  # whoever needs freshness looks at the time of the last event

    def _follow(
        self,
        kind: Kind,
        namespace: str | None,
        labels: str,
        since: str,
        known: dict[str, Obj],
        on_event: Callable[[Watched], None],
        stop: threading.Event,
    ) -> str:
        """One watch request; returns the version at which the next one goes on."""
        query = {"watch": "1", "resourceVersion": since, "timeoutSeconds": "5", **_selectors(labels, "")}
        raw = self._send("GET", kind.path(namespace), query=query, timeout=(5, QUIET))
        try:
            for line in _lines(raw, stop):
                found = _event(line)
                since = found["object"]["metadata"]["resourceVersion"]
                if found["type"] == "BOOKMARK":
                    continue
                event = Watched(found["type"], found["object"])
                _remember(known, event)
                on_event(event)
        except Quiet:
            pass  # nothing changed for a while: a chance to see `stop`
        finally:
            raw.close()
        return since

    def log(self, pod: str, namespace: str, *, lines: int = 20) -> str:
        """The end of a pod's log, "" where there is none (yet)."""
        try:
            raw = self._send("GET", PODS.path(namespace, pod, "log"), query={"tailLines": str(lines)})
            return bytes(raw.read() or b"").decode(errors="replace").strip()
        except Refused as refused:
            if refused.code in (400, 404):
                return ""
            raise

    def logs(self, pod: str, namespace: str, stop: threading.Event, *, container: str | None = None) -> Iterator[str]:
        """Lines of a pod's log as they are written, until it ends or `stop`.

        Raises `Quiet` after `QUIET` seconds without a line, `Unreachable` when the connection breaks.
        """
        query = {"follow": "true"} | ({"container": container} if container else {})
        raw = self._send("GET", PODS.path(namespace, pod, "log"), query=query, timeout=(5, QUIET))
        try:
            yield from _lines(raw, stop)
        finally:
            raw.close()


def to_node(obj: Obj) -> Node:
    status = obj.get("status", {})
    conditions = {c["type"]: (c.get("status", ""), c.get("reason", "")) for c in status.get("conditions") or []}
    return Node(
        name=obj["metadata"]["name"],
        uid=obj["metadata"]["uid"],
        zone=obj["metadata"].get("labels", {}).get(ZONE_LABEL, ""),
        ready=conditions.get("Ready", ("", ""))[0] == "True",
        unschedulable=bool(obj.get("spec", {}).get("unschedulable")),
        cordoned_by=(obj["metadata"].get("annotations") or {}).get(CORDONED, ""),
        gpus=int(status.get("allocatable", {}).get("nvidia.com/gpu", 0)),
        conditions=conditions,
        boot=(status.get("nodeInfo") or {}).get("bootID", ""),
        taints=tuple(
            (one["key"], one["effect"])
            for one in obj.get("spec", {}).get("taints") or []
            if one.get("effect") != "PreferNoSchedule"
            and not one["key"].startswith("node.kubernetes.io/")
            and one["key"] != "nvidia.com/gpu"
        ),
    )


def to_pod(obj: Obj, zones: Mapping[str, str]) -> Pod:
    meta, spec, status = obj["metadata"], obj.get("spec", {}), obj.get("status", {})
    containers = _main_first(meta, spec)
    conditions = {c["type"]: c.get("status") for c in status.get("conditions") or []}
    statuses = status.get("containerStatuses") or []
    owners = meta.get("ownerReferences") or []
    waiting = [s["state"]["waiting"].get("reason", "") for s in statuses if "waiting" in (s.get("state") or {})]
    return Pod(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        node=spec.get("nodeName") or "",
        zone=zones.get(spec.get("nodeName") or "", ""),
        ip=status.get("podIP", ""),
        phase=status.get("phase", ""),
        ready=conditions.get("Ready") == "True" and "deletionTimestamp" not in meta,
        terminating="deletionTimestamp" in meta,
        labels=meta.get("labels") or {},
        gpus=sum(_gpus(c) for c in containers),
        host_network=bool(spec.get("hostNetwork")),
        ports=tuple(dict.fromkeys(port for c in containers for port in _ports(c))),
        restarts=sum(s.get("restartCount", 0) for s in statuses),
        owner=f"{owners[0]['kind']}/{owners[0]['name']}" if owners else "",
        container=containers[0]["name"] if containers else "",
        waiting=waiting[0] if waiting else "",
        grace=int(spec.get("terminationGracePeriodSeconds", 30)),
    )


MAIN = "kubectl.kubernetes.io/default-container"  # annotation; Istio writes it when it puts its own container first


def _main_first(meta: Obj, spec: Obj) -> Objs:
    """The containers, first the one that a fault of the engine is about: it has the GPUs, or is the default one."""
    named = (meta.get("annotations") or {}).get(MAIN)
    containers: Objs = spec.get("containers") or []
    return sorted(containers, key=lambda c: (_gpus(c) == 0, c["name"] != named))


def _gpus(container: Obj) -> int:
    return int(((container.get("resources") or {}).get("limits") or {}).get("nvidia.com/gpu", 0))


def _ports(container: Obj) -> tuple[int, ...]:
    """The TCP ports that it declares, first the one that is probed; the probed ones where it declares none.

    To declare them is optional. A mesh moves probes to a port of its own, which nobody declares.
    """
    tcp = [port for port in container.get("ports") or [] if port.get("protocol", "TCP") == "TCP"]
    declared: dict[int, str] = {port["containerPort"]: port.get("name", "") for port in tcp}
    by_name = {name: number for number, name in declared.items() if name}
    probes = (container.get(f"{kind}Probe") or {} for kind in ("readiness", "liveness", "startup"))
    asked = [probe[how].get("port") for probe in probes for how in ("httpGet", "tcpSocket", "grpc") if how in probe]
    probed = [port for one in asked if isinstance(port := by_name.get(one, one), int)]
    return (*(port for port in probed if port in declared or not declared), *declared)


def to_workload(obj: Obj) -> Workload:
    meta, spec = obj["metadata"], obj["spec"]
    replicas, strategy = int(spec.get("replicas", 1)), spec.get("strategy") or {}
    allowed = (strategy.get("rollingUpdate") or {}).get("maxUnavailable", "25%")
    if strategy.get("type") == "Recreate":
        allowed = replicas
    elif isinstance(allowed, str):
        allowed = replicas * int(allowed.rstrip("%")) // 100
    containers = _main_first(spec["template"].get("metadata") or {}, spec["template"]["spec"])
    images = {container["name"]: container.get("image", "") for container in containers}
    return Workload(meta["name"], meta["namespace"], meta["uid"], replicas, min(replicas, int(allowed)), images)


def _remember(known: dict[str, Obj], event: Watched) -> None:
    uid = event.object["metadata"]["uid"]
    if event.type == "DELETED":
        known.pop(uid, None)
    else:
        known[uid] = event.object


def _differences(known: dict[str, Obj], items: Objs) -> Iterator[Watched]:
    """What changed between what we knew and a fresh list; `known` is brought up to date."""
    fresh = {item["metadata"]["uid"]: item for item in items}
    for uid in [uid for uid in known if uid not in fresh]:
        yield Watched("DELETED", known.pop(uid))
    for uid, item in fresh.items():
        old = known.get(uid)
        if old is None or old["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
            known[uid] = item
            yield Watched("MODIFIED" if old else "ADDED", item)


def _lines(raw: Any, stop: threading.Event) -> Iterator[str]:
    rest = b""
    try:
        for chunk in raw.stream(amt=None, decode_content=False):
            rest += chunk
            *lines, rest = rest.split(b"\n")
            for line in lines:
                if line:
                    yield line.decode(errors="replace")
            if stop.is_set():
                return
    except (urllib3.exceptions.ReadTimeoutError, TimeoutError) as quiet:
        raise Quiet(f"no word for {QUIET:.0f} s") from quiet
    except (urllib3.exceptions.HTTPError, OSError) as lost:
        raise Unreachable(f"The stream from the API server broke: {lost}") from lost


def _event(line: str) -> Obj:
    """One event of a watch. Raises `Refused` for an ERROR, `ClusterError` for what is none (a proxy's page)."""
    try:
        found: Obj = json.loads(line)
        if found["type"] == "ERROR":
            status = found["object"]
            raise Refused(status.get("code", 500), status.get("reason", ""), status.get("message", ""))
        _ = found["object"]["metadata"]["resourceVersion"]
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise ClusterError(f"a watch brought what is no event: {line[:80]!r}") from wrong
    return found


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return ({"labelSelector": labels} if labels else {}) | ({"fieldSelector": fields} if fields else {})


def _refused(code: int, body: str | bytes, headers: Mapping[str, str] | None = None) -> ClusterError:
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        status = json.loads(text)
    except json.JSONDecodeError:
        status = {}
    if not isinstance(status, dict):
        status = {}
    message = status.get("message") or " ".join(text.split())[:200] or f"HTTP {code}"
    if code == 401:
        message = "the API server does not know these credentials (401): log in again, or name another --kubeconfig"
    return Refused(code, status.get("reason", ""), message, _retry_after(headers))


def _retry_after(headers: Mapping[str, str] | None) -> float | None:
    """Kubernetes writes whole seconds; a date, which proxies may write, is not worth a clock comparison."""
    try:
        return max(0.0, float((headers or {}).get("Retry-After", "")))
    except ValueError:
        return None


def _root(error: BaseException) -> str:
    """The innermost cause in words: `Connection refused`, not five lines of urllib3."""
    reason = getattr(error, "reason", None) or error
    text = str(getattr(reason, "args", [reason])[-1] if getattr(reason, "args", None) else reason)
    return text.split(": ", 1)[-1] if "object at 0x" in text else text
