"""Who can reach whom: prober pods inside the cluster, created before the fault, looked at all the time.

One prober pod per zone opens TCP connections to a fixed list of pod addresses a few times a second and prints
one line per round. It also listens, so that probers can reach each other where the application has no pod on
the other side. The harness follows the logs: an effect is proven when the pairs that must fail fail and the
pairs that must work work, in `AGREE` rounds in a row.

Where a fault makes pods mute, the probers also ask them (and a few others, as controls) over HTTP: `?health` and
`?generate` (one token) stand beside the plain connection, whose kernel answers for a process that is stopped. Such a
round takes up to `ASK_PATIENCE`.

Instants are those of the line's arrival here (one clock); a round's result is at most `EVERY` + `PATIENCE` old.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from faults.base import ROLE, Cut, Dead, Mute, Plan, Seeable, View
from gameday import clock
from gameday.cluster import Cluster, Node, Obj, Pod, Quiet
from gameday.errors import ClusterError, MissingCapability
from gameday.kinds import PODS

EVERY = 0.2  # seconds between rounds
PATIENCE = 0.4  # seconds until a connection counts as failed
AGREE = 2  # rounds in a row that must agree before an effect is proven
LOST = 5  # rounds in a row without the effect until it counts as lost
ASK_PATIENCE = 1.0  # seconds until a request counts as not answered
CONTROLS = 2  # pods beside the targets that are looked at as well, in every zone
PORT = 7979  # where probers listen for each other
MAX_TARGETS = 16  # per prober, unless more deaths must be seen: enough to tell, few enough to be quiet

# Runs in the prober pod, on any Python ≥ 3.8 and nothing else; bounded by its own deadline.
SCRIPT = r"""
import json, select, signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as PID 1 there is no default
targets, every, patience, lasts = json.loads(sys.argv[1]), *map(float, sys.argv[2:5])
family = socket.AF_INET6 if ":" in sys.argv[6] else socket.AF_INET
asking = float(sys.argv[7])
listener = socket.socket(family, socket.SOCK_STREAM)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("", int(sys.argv[5]))); listener.listen(64); listener.setblocking(False)
end, number = time.monotonic() + lasts, 0
while time.monotonic() < end:
    begun = time.monotonic()
    waiting, up, results = {}, {}, []
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    for index, (host, port, *request) in enumerate(targets):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        up[index] = "0"
        try:
            sock.connect((host, port))
        except BlockingIOError:
            waiting[sock.fileno()] = (index, sock)
            poll.register(sock, select.POLLOUT)
            continue
        except OSError:
            pass
        else:
            up[index] = "0" if request else "1"  # nobody connects at once but to itself
        sock.close()
    while waiting:
        left = begun + (asking if any(targets[i][2:] for i, _ in waiting.values()) else patience) - time.monotonic()
        if left <= 0:
            break
        for fd, event in poll.poll(max(1, int(left * 1000))):
            if fd == listener.fileno():
                try:
                    listener.accept()[0].close()
                except OSError:
                    pass
                continue
            index, sock = waiting[fd]
            request = targets[index][2:]
            try:
                if event & select.POLLIN and request:
                    up[index] = "1" if sock.recv(64)[9:10] == b"2" else "0"
                elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    if request:
                        sock.send(request[0].encode())
                        poll.modify(fd, select.POLLIN)
                        continue
                    up[index] = "1" if time.monotonic() - begun < patience else "0"
            except OSError:
                pass
            del waiting[fd]
            poll.unregister(fd)
            sock.close()
    for index, sock in waiting.values():
        sock.close()
    number += 1
    print(json.dumps({"n": number, "up": "".join(up[i] for i in range(len(targets)))}), flush=True)
    while time.monotonic() < begun + every:
        left = begun + every - time.monotonic()
        if select.select([listener], [], [], max(0, left))[0]:
            try:
                listener.accept()[0].close()
            except OSError:
                pass
"""


@dataclass(frozen=True, slots=True)
class Target:
    key: str  # "ns/pod"
    zone: str
    ip: str
    port: int
    request: str = ""  # what is asked, beyond a connection

    @property
    def address(self) -> tuple[str, int] | tuple[str, int, str]:
        """As the prober's script takes it."""
        return (self.ip, self.port, self.request) if self.request else (self.ip, self.port)


@dataclass(slots=True)
class _Track:
    """One prober's view: per target how many rounds in a row it was (un)reachable, and since when."""

    zone: str
    targets: tuple[Target, ...]
    doomed: bool = False  # it runs on a node that is to be reset: its last word will be an old one
    rounds: int = 0
    last_line: float = 0.0
    up: dict[str, bool] = field(default_factory=dict)
    row: dict[str, int] = field(default_factory=dict)  # rounds in a row of the present state
    since: dict[str, float] = field(default_factory=dict)  # arrival of the first round of that row
    before: dict[str, float] = field(default_factory=dict)  # arrival of the last round before it

    def take(self, bits: str, at: float) -> None:
        for target, bit in zip(self.targets, bits, strict=True):
            up = bit == "1"
            if self.up.get(target.key) is up:
                self.row[target.key] += 1
            else:
                self.before[target.key] = self.last_line or at
                self.up[target.key], self.row[target.key], self.since[target.key] = up, 1, at
        self.rounds += 1
        self.last_line = at


@dataclass(frozen=True, slots=True)
class Seen:
    """What the probers say of a proof now. `since`/`before`: first round that showed it, last that did not."""

    holds: bool
    settled: bool  # for `AGREE` rounds
    since: float
    before: float
    detail: str


class Reach:
    """The probers of one experiment."""

    def __init__(self, cluster: Cluster, view: View, image: str, lasts: float) -> None:
        self._cluster, self._view, self._image, self._lasts = cluster, view, image, lasts
        self._tracks: dict[str, _Track] = {}
        self._usual: frozenset[tuple[str, str]] = frozenset()  # (prober's zone, target) that worked before the harm
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(
        self,
        plan: Plan,
        on_created: Callable[[Obj], None],
        within: float = 30.0,
        stop: threading.Event | None = None,
    ) -> None:
        """Create the probers, that of the cut zone first (later ones watch earlier ones), and let each look.

        Raises `MissingCapability("probers")` when they do not run here, `ClusterError` when `stop` is set meanwhile.
        """
        known: list[Target] = []
        for name, zone in self._order(plan):
            targets = (*self._targets(plan), *self._asks(plan), *known)
            pod = self._prober(name, zone, targets, plan)
            on_created(pod)
            self._cluster.create(PODS, pod)
            self._tracks[zone] = _Track(zone, targets)
            ip, node = self._wait(name, within, stop)
            self._tracks[zone].doomed = node in plan.resets
            known.append(Target(f"{self._view.namespace}/{name}", zone, ip, PORT))
            threading.Thread(target=self._follow, args=(name, self._tracks[zone]), name=name, daemon=True).start()
        tracks = self._tracks.values()
        try:
            clock.wait_until(
                lambda: all(t.rounds >= AGREE for t in tracks),
                within=within,
                what="the probers' first looks",
                stop=stop,
            )
        except clock.Waited as late:
            if stop is not None and stop.is_set():
                raise ClusterError(f"{late}.") from late
            raise MissingCapability("probers", f"{late}: their logs cannot be followed.") from late

    def manifests(self, plan: Plan) -> tuple[Obj, ...]:
        """The probers as `start` would create them, but for each other's addresses, which are not known yet."""
        targets = self._targets(plan)
        return tuple(self._prober(name, zone, targets, plan) for name, zone in self._order(plan))

    def _order(self, plan: Plan) -> list[tuple[str, str]]:
        return sorted(self._view.probers, key=lambda one: (one[1] != plan.cuts, one))

    def _prober(self, name: str, zone: str, targets: tuple[Target, ...], plan: Plan) -> Obj:
        addresses = tuple(target.address for target in targets)
        view = self._view
        made = prober(view.namespace, name, view.labels, self._image, self._lasts, zone, addresses, plan.avoid)
        made["spec"]["tolerations"] += _tolerated(view.nodes, zone)
        return made

    def stop(self) -> None:
        self._stop.set()

    def settle(self) -> None:
        """Remember which pairs work, right before the harm: only they can prove anything by failing."""
        with self._lock:
            self._usual = frozenset(
                (zone, key)
                for zone, track in self._tracks.items()
                for key, up in track.up.items()
                if up and track.row[key] >= AGREE
            )

    def _targets(self, plan: Plan) -> tuple[Target, ...]:
        """All pods whose death is to be seen, some others in every zone as controls, and more while there is room."""
        proofs = [proof for act in plan.acts if isinstance(proof := getattr(act, "proof", None), Dead)]
        dying = {key for proof in proofs for key in proof.pods}

        def order(pod: Pod) -> tuple[bool, bool, str]:
            return pod.key not in plan.facts.pods, pod not in self._view.engines, pod.name

        pods = sorted(self._view.pods, key=order)
        usable = [pod for pod in pods if pod.ready and pod.ip and pod.ports and not pod.host_network]
        chosen = [pod for pod in usable if pod.key in dying]
        others = [pod for pod in usable if pod.key not in dying]
        for zone in sorted({pod.zone for pod in others}):  # a target too many costs little, a side without any all
            chosen += [pod for pod in others if pod.zone == zone][:CONTROLS]
        more = [pod for pod in others if pod not in chosen]
        chosen += more[: max(0, MAX_TARGETS - len(chosen))]
        return tuple(Target(pod.key, pod.zone, pod.ip, pod.ports[0]) for pod in chosen)

    def _asks(self, plan: Plan) -> tuple[Target, ...]:
        """What is asked of the pods that will be mute, and of a few others that will not."""
        asks = [proof for act in plan.acts if isinstance(proof := getattr(act, "proof", None), Mute)]
        found = []
        for proof in asks:
            usable = [pod for pod in self._view.ready if pod.ip and pod.ports and not pod.host_network]
            others = [pod for pod in usable if pod.key not in proof.pods][:CONTROLS]
            for pod in [pod for pod in usable if pod.key in proof.pods] + others:
                address = f"{pod.ip}:{pod.ports[0]}"
                for ask, request in _requests(proof, address, self._view.model).items():
                    found.append(Target(f"{pod.key}?{ask}", pod.zone, pod.ip, pod.ports[0], request))
        return tuple(found)

    def _wait(self, name: str, within: float, stop: threading.Event | None = None) -> tuple[str, str]:
        """Its address and its node, once it runs."""
        found: Obj = {}
        node = ""

        def running() -> bool:
            nonlocal found, node
            seen = self._cluster.get(PODS, name, self._view.namespace)
            found, node = seen.get("status", {}), seen.get("spec", {}).get("nodeName", "")
            return found.get("phase") == "Running" and bool(found.get("podIP"))

        try:
            clock.wait_until(running, within=within, every=0.05, what=f"prober {name} running", stop=stop)
        except clock.Waited as late:
            if stop is not None and stop.is_set():  # a signal must not wait for an image that cannot be pulled
                raise ClusterError(f"{late}.") from late
            raise MissingCapability("probers", f"{late} ({_unready(found)}).") from late
        return str(found["podIP"]), node

    def _follow(self, name: str, track: _Track) -> None:
        while not self._stop.is_set():
            try:
                for line in self._cluster.logs(name, self._view.namespace, self._stop, container="prober"):
                    self._take(track, line)
            except Quiet:
                continue
            except ClusterError:
                pass  # a silent prober is noticed by the age of its last line
            self._stop.wait(0.2)

    def _take(self, track: _Track, line: str) -> None:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            return
        if found["n"] <= track.rounds:  # the log was taken up anew from its start
            return
        with self._lock:
            track.take(found["up"], clock.now())
            track.rounds = found["n"]

    def broken(self) -> tuple[str, ...]:
        """Pairs that worked before the harm and fail now, as `zone→pod`."""
        with self._lock:
            return tuple(
                f"{zone or 'prober'}→{key}"
                for zone, key in sorted(self._usual)
                if not self._tracks[zone].up.get(key, True) and self._tracks[zone].row[key] >= AGREE
            )

    # ── judgements ──────────────────────────────────────────────────────────────────────────

    def silent(self, longer_than: float) -> tuple[str, ...]:
        """Zones whose prober has said nothing for so long."""
        now = clock.now()
        return tuple(zone for zone, track in self._tracks.items() if now - track.last_line > longer_than)

    def look(self, proof: Seeable, gone: frozenset[str] = frozenset()) -> Seen:
        """Whether the proof holds now. `gone`: pods that are expected to be dead, no use as a control."""
        with self._lock:
            pairs = self._pairs(proof, gone)
            if why := _blind(proof, pairs):
                return Seen(False, False, 0, 0, why)
            return _judge(pairs, self._tracks)

    def blind(self, proof: Seeable) -> str:
        """Why the proof could never come, by what `settle` has seen to work; "" where it could."""
        with self._lock:
            return _blind(proof, self._pairs(proof, frozenset()))

    def look_gone(self, proof: Seeable, ready: frozenset[tuple[str, str]]) -> Seen:
        """Whether the effect is over: the pairs that had to fail work again, those whose pod is `ready` now.

        `ready`: pods ("ns/pod") with their addresses; what a StatefulSet has replaced keeps its name, and nothing
        answers at its old address ever again. Probers count as well; with no pair left, nothing was seen.
        """
        ours = {f"{self._view.namespace}/{name}" for name, _ in self._view.probers}
        with self._lock:
            pairs = self._pairs(proof, frozenset())
            ips = {(zone, target.key): target.ip for zone, track in self._tracks.items() for target in track.targets}
            again = tuple(p for p in pairs.must_fail if (_pod_of(p[1]), ips[p]) in ready or p[1] in ours)
            if not again:
                return Seen(False, False, 0, 0, "no pair is left that could show it")
            return _judge(_Pairs((), again), self._tracks)

    def _pairs(self, proof: Seeable, gone: frozenset[str]) -> _Pairs:
        sorted_: dict[str, list[tuple[str, str]]] = {"fail": [], "work": [], "all": []}
        for zone, track in self._tracks.items():
            for target in () if track.doomed else track.targets:
                if (zone, target.key) in self._usual and (role := _role(proof, zone, target, gone)):
                    sorted_[role].append((zone, target.key))
        return _Pairs(tuple(sorted_["fail"]), tuple(sorted_["work"]), tuple(sorted_["all"]))


def _blind(proof: Seeable, pairs: _Pairs) -> str:
    """Why these pairs, which worked before, cannot show it; "" where they can."""
    todo = "is there a NetworkPolicy in the way, or no TCP port of theirs that is declared or probed?"
    if isinstance(proof, Mute):
        asked = f"GET {proof.health}" if proof.ask == "health" else f"POST {proof.generate} for one token"
        todo = f"do they answer {asked} with 2xx within {ASK_PATIENCE:g} s, and do policies and meshes let probers ask?"
    if not pairs.must_fail:
        return f"no prober could reach the targets before: {todo}"
    if isinstance(proof, Dead | Mute) and (unseen := set(proof.pods) - {_pod_of(key) for _, key in pairs.must_fail}):
        return f"no prober could reach {', '.join(sorted(unseen))} before: {todo}"
    return "" if pairs.must_work else "no uncut pair is left as a control"


def _role(proof: Seeable, zone: str, target: Target, gone: frozenset[str]) -> Literal["fail", "work", "all"] | None:
    """What a prober in `zone` must see of a target: that it fails, or works (of "work" one is enough)."""
    pod, _, ask = target.key.partition("?")
    if isinstance(proof, Mute):
        if ask == proof.ask:
            return "fail" if pod in proof.pods else "work"
        return "all" if ask == "health" and pod in proof.pods else None  # it says that it is well
    if ask or target.key in gone:
        return "fail" if isinstance(proof, Dead) and target.key in proof.pods and proof.zone in ("", zone) else None
    if isinstance(proof, Cut):
        return "fail" if (zone == proof.zone) != (target.zone == proof.zone) else "work"
    if target.key in proof.pods:
        return "fail" if proof.zone in ("", zone) else None
    # Of a zone that is cut off, only the others' view of each other is a control.
    return "work" if not proof.zone or proof.zone not in (zone, target.zone) else None


def _pod_of(key: str) -> str:
    """ "ns/pod" of a target's key."""
    return key.partition("?")[0]


def _requests(proof: Mute, address: str, model: str) -> dict[str, str]:
    """What to send, by the name under which the answer is kept."""
    found = {"health": f"GET {proof.health} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"}
    if proof.ask == "generate":
        body = json.dumps({"model": model, "prompt": "1", "max_tokens": 1})
        found["generate"] = (
            f"POST {proof.generate} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
        )
    return found


def prober(
    namespace: str,
    name: str,
    labels: Mapping[str, str],
    image: str,
    lasts: float,
    zone: str = "",
    addresses: Sequence[tuple[str, int] | tuple[str, int, str]] = (),
    avoid: tuple[str, ...] = (),
) -> Obj:
    """The manifest of one prober: fits Pod Security `restricted`, and quotas that ask for requests and limits."""
    # A sidecar would take every connection itself, and nothing would ever fail.
    labels = dict(labels) | {ROLE: "prober", "sidecar.istio.io/inject": "false"}
    numbers = [str(EVERY), str(PATIENCE), str(lasts), str(PORT), "$(POD_IP)", str(ASK_PATIENCE)]
    selector = {"nodeSelector": {"topology.kubernetes.io/zone": zone}} if zone else {}
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}  # its family is ours
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": {"linkerd.io/inject": "disabled"},
        },
        "spec": {
            **selector,
            **_elsewhere(avoid),
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],  # where the engines are
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(lasts) + 30,  # its own end, should nobody come back for it
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "prober",
                    "image": image,
                    "env": [address],
                    "command": ["python3", "-u", "-c", SCRIPT, json.dumps(addresses), *numbers],
                    "resources": {
                        "requests": {"cpu": "20m", "memory": "32Mi"},
                        "limits": {"cpu": "500m", "memory": "64Mi"},
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "runAsNonRoot": True,
                        "runAsUser": 65534,
                        "capabilities": {"drop": ["ALL"]},
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                }
            ],
        },
    }


def _tolerated(nodes: tuple[Node, ...], zone: str) -> list[Obj]:
    """What a prober must tolerate to find a node in the zone, where all of them are tainted for somebody's own use."""
    usable = [node for node in nodes if node.ready and not node.unschedulable and (not zone or node.zone == zone)]
    fewest = min((node.taints for node in usable), key=len, default=())
    return [{"key": key, "operator": "Exists", "effect": effect} for key, effect in fewest]


def _elsewhere(avoid: tuple[str, ...]) -> Obj:
    """A wish, not a demand: where a zone has no other node, the prober takes that one."""
    if not avoid:
        return {}
    fields = [
        {"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in sorted(avoid)
    ]  # one value each
    wish = {"weight": 100, "preference": {"matchFields": fields}}
    return {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}}}


def _unready(status: Obj) -> str:
    """Why a pod does not run, as far as its status tells."""
    for one in status.get("conditions") or []:
        if one.get("type") == "PodScheduled" and one.get("status") == "False":
            return f"no node takes it: {one.get('message') or one.get('reason') or 'no reason given'}"
    waiting = [(one.get("state") or {}).get("waiting") or {} for one in status.get("containerStatuses") or []]
    told = "; ".join(f"{one['reason']} {one.get('message', '')}".strip() for one in waiting if one.get("reason"))
    return told or f"phase {status.get('phase')}: see its events; can prober_image be pulled here?"


@dataclass(frozen=True, slots=True)
class _Pairs:
    """(prober's zone, target) pairs."""

    must_fail: tuple[tuple[str, str], ...]
    must_work: tuple[tuple[str, str], ...]
    all_work: tuple[tuple[str, str], ...] = ()  # of these, every one


def _judge(pairs: _Pairs, tracks: Mapping[str, _Track]) -> Seen:
    """All that must fail fail; of what must work, at least one works from each prober that has such a pair.

    One control pair per prober is enough to show that the prober and the network live; an application pod may
    be down for reasons of its own.
    """
    fails = [(tracks[zone], key) for zone, key in pairs.must_fail]
    wrong = [f"{track.zone}→{key}" for track, key in fails if track.up.get(key, True)]
    controls: dict[str, list[tuple[_Track, str]]] = {}
    for zone, key in pairs.must_work:
        controls.setdefault(zone, []).append((tracks[zone], key))
    works: list[tuple[_Track, str]] = []
    for zone, found in controls.items():
        alive = [(track, key) for track, key in found if track.up.get(key, False)]
        if not alive:
            wrong.append(f"{zone} reaches nothing at all")
        works += alive if not pairs.must_fail else alive[:1]
    if not pairs.must_fail:  # "gone": every pair must work
        wrong += [f"{track.zone}↛{key}" for found in controls.values() for track, key in found if not track.up.get(key)]
    every = [(tracks[zone], key) for zone, key in pairs.all_work]
    wrong += [f"{track.zone}↛{key}" for track, key in every if not track.up.get(key)]
    used = fails + works + every
    settled = not wrong and all(track.row.get(key, 0) >= AGREE for track, key in used)
    since = max((track.since.get(key, 0.0) for track, key in fails or works), default=0.0)
    before = max((track.before.get(key, 0.0) for track, key in fails or works), default=0.0)
    if wrong:
        return Seen(False, False, since, before, f"{len(wrong)} pair(s) not as expected: {', '.join(wrong[:4])}")
    detail = f"{len(fails)} pair(s) fail, {len(works)} control pair(s) work" if fails else f"{len(works)} pair(s) work"
    return Seen(True, settled, since, before, detail)
