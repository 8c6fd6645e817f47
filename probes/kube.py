"""What the Kubernetes watches show: pods, endpoints, nodes, Events, chaos records, as marks on the one clock."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from faults.act import records
from faults.base import MANAGED
from gameday import clock
from gameday.cluster import Cluster, Node, Obj, Pod, Watched, to_node, to_pod
from gameday.kinds import ENDPOINTSLICES, EVENTS, NETWORKCHAOS, NODES, PODCHAOS, PODS, Kind
from gameday.model import EndpointMark, Event, KubeEvent, NodeMark, PodMark, RecordMark
from probes.reach import Seen

DEFAULT = "default"  # where Events about nodes live


@dataclass(frozen=True, slots=True)
class Detection:
    """A detector's word about a node's Xid, with the instant at which it reached us."""

    node: str
    text: str
    t: float


CATCH_UP = 5.0  # seconds in which a watch may still deliver what a list shows already


def _odd(shown: Mapping[str, Pod] | Mapping[str, Node], fresh: Mapping[str, Pod] | Mapping[str, Node]) -> str:
    """The name of one that is in only one of the two, or not as ready in both."""
    for uid in shown.keys() ^ fresh.keys():
        return (shown.get(uid) or fresh[uid]).name
    return next((one.name for uid, one in fresh.items() if one.ready != shown[uid].ready), "")


class Watcher:
    """Runs one thread per kind; `emit` gets every mark (it must be thread-safe)."""

    def __init__(
        self, cluster: Cluster, selector: Mapping[str, str], service: str, emit: Callable[[Event], None]
    ) -> None:
        self._cluster, self._selector, self._service, self._emit = cluster, selector, service, emit
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._zones: dict[str, str] = {}
        self._pods: dict[str, Pod] = {}  # by uid
        self._ending: dict[str, float] = {}  # uid → when it was seen to be deleted
        self._born: dict[str, float] = {}  # uid → when the watch first saw it; pods that were there are not in it
        self._nodes: dict[str, Node] = {}  # by uid
        self._endpoints: dict[tuple[str, str], EndpointMark] = {}  # (Service, pod)
        self._slices: dict[str, dict[str, EndpointMark]] = {}  # slice → pod: a Service may have several
        self._owners: dict[str, float] = {}  # owner of pods → when its first pod was seen
        self._records: dict[tuple[str, str], str] = {}
        self._events: set[tuple[str, int]] = set()
        self._targets: frozenset[str] = frozenset()
        self._aimed = False
        self._late: set[str] = set()  # uids of pods that were made after the aim
        self._alive: dict[str, float] = {}  # watch → when it last proved to live
        self._listed: set[str] = set()  # watches whose first list is in
        self.broken = ""  # what a handler could not read: from then on this watch is no witness
        self.detections: list[Detection] = []

    def start(self, chaos: bool = True) -> None:
        self._zones = self._cluster.zones_of_nodes()
        namespace = self._cluster.namespace
        watches: list[tuple[Kind, str | None, Callable[[Watched, bool], None]]] = [
            (NODES, None, self._on_node),
            (PODS, namespace, self._on_pod),
            (ENDPOINTSLICES, namespace, self._on_slice),
            (EVENTS, namespace, self._on_event),
            (EVENTS, DEFAULT, self._on_event),
        ]
        if chaos:
            watches += [(PODCHAOS, namespace, self._on_chaos), (NETWORKCHAOS, namespace, self._on_chaos)]
        for kind, where, handler in watches:
            name = f"{kind.plural} in {where}" if where else kind.plural
            self._alive[name] = clock.now()
            threading.Thread(
                target=self._cluster.watch,
                args=(kind, where, self._guarded(name, handler), self._stop),
                kwargs={"on_alive": partial(self._lives, name)},
                name=f"watch-{name}",
                daemon=True,
            ).start()

    def _lives(self, name: str) -> None:
        self._alive[name] = clock.now()
        self._listed.add(name)

    def blind(self, longer_than: float) -> str:
        """Why a watch cannot be trusted, "" when all can."""
        if self.broken:
            return self.broken
        now = clock.now()
        silent = [name for name, last in self._alive.items() if now - last > longer_than]
        return f"no word from the watch of {', '.join(silent)} for {longer_than:.0f} s" if silent else ""

    def differs(self, within: float = CATCH_UP) -> str:
        """In which way the watches show another cluster than a fresh list does; "" when they agree, within a bound.

        A watch that went blind shortly before the end has not been silent for long enough to be noticed.
        """
        told = ""

        def agree() -> bool:
            nonlocal told
            nodes = {node.uid: node for node in self._cluster.nodes()}
            zones = {node.name: node.zone for node in nodes.values()}
            pods = {p.uid: p for p in self._cluster.pods(zones=zones) if p.labels.get(MANAGED) != "gameday"}
            with self._lock:
                odd = _odd(self._pods, pods) or _odd(self._nodes, nodes)
            told = odd and f"{odd} is not as the watch last showed it"
            return not told

        with suppress(clock.Waited):
            clock.wait_until(agree, within=within, what="the watches to agree with the cluster")
        return told

    def stop(self) -> None:
        self._stop.set()

    def aim(self, targets: frozenset[str]) -> None:
        """From now on these pods are targets; pods created later are not covered by the fault."""
        with self._lock:
            self._targets, self._aimed = targets, True
            self._late.clear()

    def engines(self) -> tuple[Pod, ...]:
        """The selected pods as the watch last saw them."""
        with self._lock:
            return tuple(pod for pod in self._pods.values() if self._selected(pod))

    def nodes(self) -> tuple[Node, ...]:
        """The nodes as the watch last saw them."""
        with self._lock:
            return tuple(self._nodes.values())

    def ready_at(self) -> frozenset[tuple[str, str]]:
        """ "ns/pod" and address of every pod that is Ready now."""
        with self._lock:
            return frozenset((pod.key, pod.ip) for pod in self._pods.values() if pod.ready)

    def exist(self, keys: Iterable[str]) -> bool:
        """Whether any of these pods ("ns/pod") is still there; not another one of its name, as StatefulSets make."""
        with self._lock:
            return bool({pod.key for uid, pod in self._pods.items() if uid not in self._late} & set(keys))

    def drained(self, nodes: Iterable[str], evicted: Collection[str], since: float) -> Seen:
        """Whether the nodes are cordoned and one of these pods (uids), whose eviction was accepted since, had to go."""
        with self._lock:
            open_ = sorted(set(nodes) - {node.name for node in self._nodes.values() if node.unschedulable})
            going = sorted(at for uid, at in self._ending.items() if at >= since and uid in evicted)
        told = f"{', '.join(open_)} still schedulable" if open_ else "the watch sees the node(s) cordoned"
        told += f", {len(going)} evicted pod(s) ending" if evicted else ", but no eviction was accepted"
        acts = bool(going) and not open_
        return Seen(acts, acts, going[0] if going else clock.now(), since, told)

    def newborn(self, deployment: str, since: float) -> Seen:
        """Whether a pod of the Deployment has been born since then, of a ReplicaSet that is as young.

        One of the former ReplicaSet is born whenever an autoscaler, or a death, asks for it: that is no rollout.
        """
        with self._lock:
            born = sorted(
                (at, self._pods[uid].name)
                for uid, at in self._born.items()
                if at >= since
                and uid in self._pods
                and deployment_of(owner := self._pods[uid].owner) == deployment
                and self._owners[owner] >= since
            )
        if not born:
            return Seen(False, False, 0, 0, f"no new pod of Deployment {deployment} was seen")
        return Seen(
            True, True, born[0][0], since, f"{len(born)} new pod(s) of Deployment {deployment}, {born[0][1]} first"
        )

    def _guarded(self, name: str, handler: Callable[[Watched, bool], None]) -> Callable[[Watched], None]:
        """`handler(event, fresh)`: `fresh` is False for what the first list brought, which is older than we are."""

        def run(event: Watched) -> None:
            if self._stop.is_set():
                return
            with self._lock:
                try:
                    handler(event, name in self._listed)
                except (KeyError, TypeError, ValueError, AttributeError) as wrong:
                    self.broken = f"the watch of {name} met an object that it cannot read ({wrong!r})"

        return run

    def _selected(self, pod: Pod) -> bool:
        return all(pod.labels.get(key) == value for key, value in self._selector.items())

    # ── pods ────────────────────────────────────────────────────────────────────────────────

    def _on_pod(self, event: Watched, fresh: bool) -> None:
        pod = to_pod(event.object, self._zones)
        old = self._pods.get(pod.uid)
        if pod.labels.get(MANAGED) == "gameday":
            return
        if event.type == "DELETED":
            self._pods.pop(pod.uid, None)
            self._ending.setdefault(pod.uid, clock.now())  # without a grace period nothing else is seen
            self._mark(pod, "gone")
            return
        self._pods[pod.uid] = pod
        if old is None:
            self._owners.setdefault(pod.owner, clock.now())
            if fresh:
                self._born[pod.uid] = clock.now()
            if self._aimed:
                self._late.add(pod.uid)
            self._mark(pod, "created" if fresh else "exists")
            if pod.ready:
                self._mark(pod, "ready")
            return
        if pod.node and not old.node:
            self._mark(pod, "scheduled")
        if pod.phase == "Running" and old.phase != "Running":
            self._mark(pod, "started")
        if pod.restarts > old.restarts:
            self._mark(pod, "restarted", f"restart {pod.restarts}")
        if pod.terminating and not old.terminating:
            self._ending[pod.uid] = clock.now()
            self._mark(pod, "terminating")
        elif pod.ready != old.ready and not pod.terminating:
            self._mark(pod, "ready" if pod.ready else "unready", pod.waiting)

    def _mark(self, pod: Pod, stage: str, detail: str = "") -> None:
        target = pod.key in self._targets and pod.uid not in self._late
        owner = self._service if self._selected(pod) else pod.owner
        self._emit(
            PodMark(
                t=clock.now(),
                pod=pod.key,
                uid=pod.uid,
                stage=stage,  # type: ignore[arg-type]
                node=pod.node,
                zone=pod.zone,
                owner=owner,
                target=target,
                covered=target or not (self._aimed and stage == "created"),
                detail=detail,
            )
        )

    # ── endpoints ───────────────────────────────────────────────────────────────────────────

    def _on_slice(self, event: Watched, fresh: bool) -> None:
        """A Service has several slices where it has many pods, two address families, or ports that differ."""
        service = event.object["metadata"].get("labels", {}).get("kubernetes.io/service-name", "")
        name = event.object["metadata"]["name"]
        endpoints = [] if event.type == "DELETED" else event.object.get("endpoints") or []
        was = self._slices.get(name, {})
        made = (self._endpoint(service, endpoint) for endpoint in endpoints if "targetRef" in endpoint)
        self._slices[name] = now = {mark.pod: mark for mark in made}
        if event.type == "DELETED":
            del self._slices[name]
        for pod in (*now, *(pod for pod in was if pod not in now)):
            self._rotation(service, pod)

    def _rotation(self, service: str, pod: str) -> None:
        """Emit what changed of a pod in a Service: it is ready where any slice says so, and out when none has it."""
        found = [one[pod] for one in self._slices.values() if pod in one and one[pod].service == service]
        key, old = (service, pod), self._endpoints.get((service, pod))
        if not found:
            if old is not None:
                del self._endpoints[key]
                target = pod in self._targets
                self._emit(
                    EndpointMark(clock.now(), service, pod, False, False, present=False, zone=old.zone, target=target)
                )
            return
        mark = max(found, key=lambda one: (one.ready, one.serving, not one.terminating))
        if old is None or (old.ready, old.serving, old.terminating) != (mark.ready, mark.serving, mark.terminating):
            self._endpoints[key] = mark
            self._emit(replace(mark, t=clock.now(), target=pod in self._targets))

    def _endpoint(self, service: str, endpoint: Obj) -> EndpointMark:
        conditions = endpoint.get("conditions", {})
        pod = f"{endpoint['targetRef'].get('namespace', self._cluster.namespace)}/{endpoint['targetRef']['name']}"
        return EndpointMark(
            t=clock.now(),
            service=service,
            pod=pod,
            ready=bool(conditions.get("ready")),
            serving=bool(conditions.get("serving", conditions.get("ready"))),
            terminating=bool(conditions.get("terminating")),
            zone=endpoint.get("zone") or self._zones.get(endpoint.get("nodeName") or "", ""),
            target=pod in self._targets,
        )

    # ── nodes ───────────────────────────────────────────────────────────────────────────────

    def _on_node(self, event: Watched, fresh: bool) -> None:
        node = to_node(event.object)
        old = self._nodes.get(node.uid)
        self._zones[node.name] = node.zone
        if event.type == "DELETED":
            self._nodes.pop(node.uid, None)
            self._node(node, "gone")
            return
        self._nodes[node.uid] = node
        if old is None:
            self._node(node, "created" if fresh else "exists")
            if node.ready:
                self._node(node, "ready")
            return
        if node.ready != old.ready:
            self._node(node, "ready" if node.ready else "not ready", node.conditions.get("Ready", ("", ""))[1])
        if node.unschedulable != old.unschedulable:
            ours = "by gameday" if node.cordoned_by or old.cordoned_by else ""
            self._node(node, "cordoned" if node.unschedulable else "uncordoned", ours)
        for type, state in node.conditions.items():
            if (
                type != "Ready"
                and old.conditions.get(type) != state
                and (type in old.conditions or state[0] == "False")
            ):
                self._node(node, f"condition {type}={state[0]}", state[1])
                self._detect(node.name, f"condition {type}={state[0]} {state[1]}")

    def _node(self, node: Node, what: str, detail: str = "") -> None:
        self._emit(NodeMark(clock.now(), node.name, what, node.zone, detail))

    def _detect(self, node: str, text: str) -> None:
        self.detections.append(Detection(node, text, clock.now()))

    # ── Events and chaos records ────────────────────────────────────────────────────────────

    def _on_event(self, event: Watched, fresh: bool) -> None:
        obj = event.object
        key = (obj["metadata"]["uid"], obj.get("count") or (obj.get("series") or {}).get("count") or 1)
        if event.type == "DELETED" or key in self._events:
            return
        self._events.add(key)
        if not fresh:
            return
        about = obj.get("involvedObject") or obj.get("regarding") or {}
        name = f"{about.get('kind', '')}/{about.get('name', '')}"
        message = obj.get("message") or obj.get("note") or ""
        self._emit(KubeEvent(clock.now(), obj.get("type", ""), obj.get("reason", ""), name, message))
        if about.get("kind") == "Node":
            self._detect(about.get("name", ""), f"event {obj.get('reason', '')} {message}")

    def _on_chaos(self, event: Watched, fresh: bool) -> None:
        obj = event.object
        resource = f"{obj['kind']}/{obj['metadata']['name']}"
        for record in records(obj):
            key = (resource, record.id)
            if self._records.get(key) != record.phase:
                self._records[key] = record.phase
                self._emit(RecordMark(clock.now(), resource, record.id, record.phase, record.message))
        if event.type == "DELETED":
            self._emit(RecordMark(clock.now(), resource, "", "deleted"))

    def detection(self, node: str, xid: int, since: float) -> Detection | None:
        """The first report of this Xid on this node after `since`."""
        with self._lock:
            for found in self.detections:
                if found.node == node and found.t >= since and names_xid(found.text, xid):
                    return found
        return None


def deployment_of(owner: str) -> str:
    """The Deployment of a pod's owner, by its ReplicaSet's name (`NAME-HASH`); "" for another owner."""
    return owner.removeprefix("ReplicaSet/").rpartition("-")[0] if owner.startswith("ReplicaSet/") else ""


def names_xid(text: str, xid: int) -> bool:
    """Whether a condition's or an Event's words name this Xid (and not a longer number that begins with it)."""
    flat = text.lower().replace(" ", "").replace("_", "")
    return re.search(rf"xid{xid}(?!\d)", flat) is not None
