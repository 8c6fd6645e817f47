"""Where a pod may run and where it should: the scheduler's filters and scores, without any I/O.

Order, messages and arithmetic of kube-scheduler 1.36's default plugins: NodeUnschedulable, NodeName,
TaintToleration, NodeAffinity, NodePorts, NodeResourcesFit (LeastAllocated), BalancedAllocation,
PodTopologySpread (with the system's default constraints), InterPodAffinity.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sandbox.client import Obj
from sandbox.controllers.objects import (
    HOSTNAME,
    ZONE,
    deleting,
    labels,
    matches,
    milli,
    name,
    namespace,
    node_matches,
    taints,
    term_matches,
    tolerates,
    untolerated,
)

_POD_CPU, _POD_MEMORY = 100, 200 * 2**20 * 1000  # what a pod without requests is taken to use when scoring (milli)
_UNSCHEDULABLE = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
_DEFAULT_SPREAD = (
    {"maxSkew": 3, "topologyKey": HOSTNAME, "whenUnsatisfiable": "ScheduleAnyway"},
    {"maxSkew": 5, "topologyKey": ZONE, "whenUnsatisfiable": "ScheduleAnyway"},
)

Resources = dict[str, int]  # resource name → milli units


def requests(pod: Obj) -> Resources:
    """What a pod reserves: the larger of its containers together and any init container, plus overhead."""
    spec = pod["spec"]
    total: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    for container in spec.get("initContainers") or ():
        one = _asks(container)
        if container.get("restartPolicy") == "Always":
            total.update(one)
        else:
            for resource, amount in one.items():
                peak[resource] = max(peak[resource], amount + total[resource])
    for container in spec["containers"]:
        total.update(_asks(container))
    for resource, amount in peak.items():
        total[resource] = max(total[resource], amount)
    for resource, quantity in (spec.get("overhead") or {}).items():
        total[resource] += milli(quantity)
    return {resource: amount for resource, amount in total.items() if amount}


def _asks(container: Obj) -> Resources:
    resources = container.get("resources") or {}
    asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {resource: milli(quantity) for resource, quantity in asked.items()}


@dataclass(slots=True)
class NodeState:
    """A node with the pods that hold its resources."""

    node: Obj
    pods: list[Obj] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    scored: Counter[str] = field(default_factory=Counter)  # cpu and memory with the defaults for empty requests
    allocatable: Resources = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name(self.node)

    def add(self, pod: Obj) -> None:
        asked = requests(pod)
        self.pods.append(pod)
        self.used.update(asked)
        self.scored["cpu"] += asked.get("cpu") or _POD_CPU
        self.scored["memory"] += asked.get("memory") or _POD_MEMORY

    def without(self, pods: Sequence[Obj]) -> NodeState:
        gone = {id(pod) for pod in pods}
        return state_of(self.node, [pod for pod in self.pods if id(pod) not in gone])


def state_of(node: Obj, pods: Iterable[Obj]) -> NodeState:
    allocatable = (node.get("status") or {}).get("allocatable") or {}
    state = NodeState(node, allocatable={resource: milli(amount) for resource, amount in allocatable.items()})
    for pod in pods:
        state.add(pod)
    return state


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node is no place for a pod; `final` when removing other pods could not change it."""

    reasons: tuple[str, ...]
    final: bool


Filter = Callable[[Obj, NodeState], Refusal | None]


def by_unschedulable(pod: Obj, state: NodeState) -> Refusal | None:
    if not (state.node.get("spec") or {}).get("unschedulable"):
        return None
    if any(tolerates(t, _UNSCHEDULABLE) for t in pod["spec"].get("tolerations") or ()):
        return None
    return Refusal(("node(s) were unschedulable",), final=True)


def by_taints(pod: Obj, state: NodeState) -> Refusal | None:
    held = pod["spec"].get("tolerations") or ()
    if untolerated(taints(state.node), held, ("NoSchedule", "NoExecute")) is None:
        return None
    return Refusal(("node(s) had untolerated taint(s)",), final=True)


def by_affinity(pod: Obj, state: NodeState) -> Refusal | None:
    if node_matches(pod["spec"], state.node):
        return None
    return Refusal(("node(s) didn't match Pod's node affinity/selector",), final=True)


def host_ports(pod: Obj) -> set[tuple[str, int]]:
    return {
        (port.get("protocol") or "TCP", port["hostPort"])
        for container in pod["spec"]["containers"]
        for port in container.get("ports") or ()
        if port.get("hostPort")
    }


def by_ports(pod: Obj, state: NodeState) -> Refusal | None:
    wanted = host_ports(pod)
    if not wanted or not any(wanted & host_ports(other) for other in state.pods):
        return None
    return Refusal(("node(s) didn't have free ports for the requested pod ports",), final=False)


def by_resources(pod: Obj, state: NodeState) -> Refusal | None:
    reasons, final = [], False
    if len(state.pods) + 1 > state.allocatable.get("pods", 0) // 1000:
        reasons.append("Too many pods")
    for resource, asked in requests(pod).items():
        whole = state.allocatable.get(resource, 0)
        if asked > whole - state.used[resource]:
            reasons.append(f"Insufficient {resource}")
            final = final or asked > whole
    return Refusal(tuple(reasons), final) if reasons else None


# -- topology spread


@dataclass(frozen=True, slots=True)
class Spread:
    """One topology spread constraint with its selector completed for the pod at hand."""

    skew: int
    key: str
    selector: Obj | None
    hard: bool
    domains: int
    honour_affinity: bool
    honour_taints: bool


def spread_of(pod: Obj, defaults: Obj | None = None) -> list[Spread]:
    """A pod's constraints; without any, the system's defaults over the selector of its workload, if known."""
    own = pod["spec"].get("topologySpreadConstraints")
    if own:
        return [_spread(pod, one, one.get("labelSelector")) for one in own]
    return [_spread(pod, one, defaults) for one in _DEFAULT_SPREAD] if defaults else []


def _spread(pod: Obj, one: Obj, selector: Obj | None) -> Spread:
    keys = one.get("matchLabelKeys") or ()
    if keys and selector is not None:
        more = {k: labels(pod)[k] for k in keys if k in labels(pod)}
        selector = {**selector, "matchLabels": {**(selector.get("matchLabels") or {}), **more}}
    return Spread(
        skew=int(one["maxSkew"]),
        key=one["topologyKey"],
        selector=selector,
        hard=one["whenUnsatisfiable"] == "DoNotSchedule",
        domains=int(one.get("minDomains") or 1),
        honour_affinity=one.get("nodeAffinityPolicy", "Honor") == "Honor",
        honour_taints=one.get("nodeTaintsPolicy", "Ignore") == "Honor",
    )


def _counts(pod: Obj, spread: Spread, states: Sequence[NodeState]) -> dict[str, int]:
    """Matching pods in each eligible domain; terminating pods do not count."""
    found: dict[str, int] = {}
    for state in states:
        domain = labels(state.node).get(spread.key)
        if domain is None or not _eligible(pod, spread, state):
            continue
        found[domain] = found.get(domain, 0) + sum(
            namespace(other) == namespace(pod) and not deleting(other) and matches(spread.selector, labels(other))
            for other in state.pods
        )
    return found


def _eligible(pod: Obj, spread: Spread, state: NodeState) -> bool:
    if spread.honour_affinity and not node_matches(pod["spec"], state.node):
        return False
    held = pod["spec"].get("tolerations") or ()
    return not spread.honour_taints or untolerated(taints(state.node), held, ("NoSchedule", "NoExecute")) is None


def spread_filter(pod: Obj, states: Sequence[NodeState]) -> Filter:
    hard = [one for one in spread_of(pod) if one.hard]
    tables = [(one, _counts(pod, one, [s for s in states if _has_keys(s, hard)])) for one in hard]

    def check(pod: Obj, state: NodeState) -> Refusal | None:
        for one, counts in tables:
            domain = labels(state.node).get(one.key)
            if domain is None:
                text = "node(s) didn't match pod topology spread constraints (missing required label)"
                return Refusal((text,), final=True)
            least = min(counts.values(), default=0) if len(counts) >= one.domains else 0
            itself = int(matches(one.selector, labels(pod)))
            if counts.get(domain, 0) + itself - least > one.skew:
                return Refusal(("node(s) didn't match pod topology spread constraints",), final=False)
        return None

    return check


def _has_keys(state: NodeState, spreads: Sequence[Spread]) -> bool:
    return all(one.key in labels(state.node) for one in spreads)


def spread_scores(
    pod: Obj, feasible: Sequence[NodeState], states: Sequence[NodeState], defaults: Obj | None
) -> dict[str, int]:
    """0…100 per node, higher where fewer of the pod's kind are; empty when nothing is to be spread."""
    soft = [one for one in spread_of(pod, defaults) if not one.hard]
    if not soft:
        return {}
    own = bool(pod["spec"].get("topologySpreadConstraints"))
    raw: dict[str, float] = {}
    for state in feasible:
        if not own or _has_keys(state, soft):
            raw[state.name] = 0.0
    for one in soft:
        domains = {labels(s.node)[one.key] for s in feasible if s.name in raw and one.key in labels(s.node)}
        weight = math.log((len(raw) if one.key == HOSTNAME else len(domains)) + 2)
        counts = _counts(pod, one, [s for s in states if not own or _has_keys(s, soft)])
        for state in feasible:
            domain = labels(state.node).get(one.key)
            if state.name in raw and domain is not None:
                raw[state.name] += counts.get(domain, 0) * weight + one.skew - 1
    return _flipped({node: round(value) for node, value in raw.items()}, feasible)


def _flipped(raw: Mapping[str, int], feasible: Sequence[NodeState]) -> dict[str, int]:
    if not raw:
        return {}
    most, least = max(raw.values()), min(raw.values())
    return {
        state.name: (100 * (most + least - raw[state.name]) // most if most else 100) if state.name in raw else 0
        for state in feasible
    }


# -- affinity between pods


def _terms(pod: Obj, which: str, how: str) -> list[Obj]:
    affinity = (pod["spec"].get("affinity") or {}).get(which) or {}
    return affinity.get(how) or []


_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def _term_selects(term: Obj, owner: Obj, other: Obj) -> bool:
    """Whether an affinity term of pod `owner` means pod `other`. Namespace selectors mean every namespace here
    only when empty, as the API defines; labels of namespaces are not looked at."""
    spaces = term.get("namespaces") or ([] if term.get("namespaceSelector") is not None else [namespace(owner)])
    everywhere = term.get("namespaceSelector") == {}
    return (everywhere or namespace(other) in spaces) and matches(term.get("labelSelector"), labels(other))


def _domains(term: Obj, owner: Obj, states: Sequence[NodeState]) -> set[str]:
    """The domains of a term's topology that hold a pod it selects."""
    return {
        labels(state.node)[term["topologyKey"]]
        for state in states
        if term["topologyKey"] in labels(state.node) and any(_term_selects(term, owner, other) for other in state.pods)
    }


def pod_affinity_filter(pod: Obj, states: Sequence[NodeState]) -> Filter:
    near = [(term, _domains(term, pod, states)) for term in _terms(pod, "podAffinity", _REQUIRED)]
    apart = [(term, _domains(term, pod, states)) for term in _terms(pod, "podAntiAffinity", _REQUIRED)]
    kept_off: defaultdict[str, set[str]] = defaultdict(set)
    for state in states:
        for other in state.pods:
            for term in _terms(other, "podAntiAffinity", _REQUIRED):
                if _term_selects(term, other, pod) and term["topologyKey"] in labels(state.node):
                    kept_off[term["topologyKey"]].add(labels(state.node)[term["topologyKey"]])
    # The first of a group that wants to be together may go anywhere.
    alone = all(not domains and _term_selects(term, pod, pod) for term, domains in near)

    def check(pod: Obj, state: NodeState) -> Refusal | None:
        have = labels(state.node)
        if any(have.get(t["topologyKey"]) not in d for t, d in near) and not (
            alone and all(t["topologyKey"] in have for t, _ in near)
        ):
            return Refusal(("node(s) didn't match pod affinity rules",), final=True)
        if any(have.get(t["topologyKey"]) in d for t, d in apart):
            return Refusal(("node(s) didn't match pod anti-affinity rules",), final=False)
        if any(have.get(k) in domains for k, domains in kept_off.items()):
            return Refusal(("node(s) didn't satisfy existing pods anti-affinity rules",), final=False)
        return None

    return check


def pod_affinity_scores(pod: Obj, feasible: Sequence[NodeState], states: Sequence[NodeState]) -> dict[str, int]:
    wishes = [
        (sign * int(wish["weight"]), wish["podAffinityTerm"])
        for which, sign in (("podAffinity", 1), ("podAntiAffinity", -1))
        for wish in _terms(pod, which, _PREFERRED)
    ]
    if not wishes:
        return {}
    raw: Counter[str] = Counter()
    for weight, term in wishes:
        found: Counter[str] = Counter()
        for state in states:
            domain = labels(state.node).get(term["topologyKey"])
            if domain is not None:
                found[domain] += sum(_term_selects(term, pod, other) for other in state.pods)
        for state in feasible:
            raw[state.name] += weight * found[labels(state.node).get(term["topologyKey"], "")]
    return _stretched({state.name: raw[state.name] for state in feasible})


def _stretched(raw: Mapping[str, int]) -> dict[str, int]:
    least, most = min(raw.values()), max(raw.values())
    return {node: 100 * (value - least) // (most - least) if most > least else 0 for node, value in raw.items()}


# -- the decision


def feasible(pod: Obj, states: Sequence[NodeState]) -> tuple[list[NodeState], dict[str, Refusal]]:
    """The nodes that pass every filter, and why the others do not: the first filter to refuse speaks."""
    filters: list[Filter] = [by_unschedulable, by_taints, by_affinity, by_ports, by_resources]
    filters += [spread_filter(pod, states), pod_affinity_filter(pod, states)]
    good, refused = [], {}
    for state in states:
        for check in filters:
            refusal = check(pod, state)
            if refusal is not None:
                refused[state.name] = refusal
                break
        else:
            good.append(state)
    return good, refused


def best(pod: Obj, good: Sequence[NodeState], states: Sequence[NodeState], defaults: Obj | None = None) -> NodeState:
    """The node with the highest score; of equals the emptiest, then the first by name."""
    spread = spread_scores(pod, good, states, defaults)
    together = pod_affinity_scores(pod, good, states)
    liked = _node_affinity_scores(pod, good)
    spurned = _taint_scores(pod, good)

    def score(state: NodeState) -> int:
        node = state.name
        return (
            _least_allocated(pod, state)
            + _balanced(pod, state)
            + 2 * spread.get(node, 0)
            + 2 * together.get(node, 0)
            + 2 * liked.get(node, 0)
            + 3 * spurned.get(node, 0)
        )

    return min(good, key=lambda state: (-score(state), len(state.pods), state.name))


def _shares(pod: Obj, state: NodeState) -> list[float]:
    asked = requests(pod)
    shares = []
    for resource, default in (("cpu", _POD_CPU), ("memory", _POD_MEMORY)):
        whole = state.allocatable.get(resource, 0)
        if whole:
            shares.append(min(1.0, (state.scored[resource] + (asked.get(resource) or default)) / whole))
    return shares


def _least_allocated(pod: Obj, state: NodeState) -> int:
    shares = _shares(pod, state)
    return int(sum(100 * (1 - share) for share in shares) / len(shares)) if shares else 0


def _balanced(pod: Obj, state: NodeState) -> int:
    shares = _shares(pod, state)
    return int(100 * (1 - abs(shares[0] - shares[1]) / 2)) if len(shares) == 2 else 100


def _node_affinity_scores(pod: Obj, good: Sequence[NodeState]) -> dict[str, int]:
    wishes = _terms(pod, "nodeAffinity", _PREFERRED)
    raw = {s.name: sum(int(w["weight"]) for w in wishes if term_matches(w["preference"], s.node)) for s in good}
    most = max(raw.values(), default=0)
    return {node: 100 * value // most for node, value in raw.items()} if most else {}


def _taint_scores(pod: Obj, good: Sequence[NodeState]) -> dict[str, int]:
    held = pod["spec"].get("tolerations") or ()
    raw = {
        s.name: sum(
            t.get("effect") == "PreferNoSchedule" and not any(tolerates(h, t) for h in held) for t in taints(s.node)
        )
        for s in good
    }
    most = max(raw.values(), default=0)
    return {node: 100 - 100 * value // most if most else 100 for node, value in raw.items()}


# -- preemption and the words of a refusal


def priority(pod: Obj) -> int:
    return int(pod["spec"].get("priority") or 0)


def preempt(
    pod: Obj, states: Sequence[NodeState], refused: Mapping[str, Refusal], guarded: Callable[[Obj], bool]
) -> tuple[NodeState, list[Obj]] | None:
    """The node where the fewest and least important pods must go to make room, and those pods.

    `guarded(pod)` tells whether a disruption budget forbids evicting it: such pods are taken last.
    """
    options = []
    for state in states:
        if state.name in refused and not refused[state.name].final:
            gone = _victims_on(pod, state, states, guarded)
            if gone:
                broken = sum(guarded(victim) for victim in gone)
                ranks = [priority(victim) for victim in gone]
                options.append((broken, max(ranks), sum(ranks), len(gone), state.name, state, gone))
    if not options:
        return None
    *_, state, gone = min(options, key=lambda option: option[:5])
    return state, gone


def _victims_on(pod: Obj, state: NodeState, states: Sequence[NodeState], guarded: Callable[[Obj], bool]) -> list[Obj]:
    lesser = [other for other in state.pods if priority(other) < priority(pod)]
    if not lesser or not _fits_without(pod, state, states, lesser):
        return []
    gone = list(lesser)
    for spared in sorted(lesser, key=lambda o: (guarded(o), priority(o)), reverse=True):
        fewer = [other for other in gone if other is not spared]
        if _fits_without(pod, state, states, fewer):
            gone = fewer
    return gone


def _fits_without(pod: Obj, state: NodeState, states: Sequence[NodeState], gone: Sequence[Obj]) -> bool:
    trial = state.without(gone)
    others = [trial if other is state else other for other in states]
    return any(good is trial for good in feasible(pod, others)[0])


def explain(pod: Obj, refused: Mapping[str, Refusal]) -> str:
    """The message of FailedScheduling, in the scheduler's words."""
    if not refused:
        return "no nodes available to schedule pods"
    count = len(refused)
    if pod["spec"].get("preemptionPolicy") == "Never":
        preemption = "not eligible due to preemptionPolicy=Never."
    else:
        preemption = _tally(count, (
            "Preemption is not helpful for scheduling" if r.final else "No preemption victims found for incoming pod"
            for r in refused.values()
        ))  # fmt: skip
    reasons = _tally(count, (reason for refusal in refused.values() for reason in refusal.reasons))
    return f"{reasons} no new claims to deallocate, preemption: {preemption}"


def explain_all(count: int, why: str) -> str:
    """The message where something keeps a pod from every node alike."""
    nodes = f"0/{count} nodes are available"
    helpless = f"{count} Preemption is not helpful for scheduling"
    return f"{nodes}: {why}. no new claims to deallocate, preemption: {nodes}: {helpless}."


def _tally(count: int, reasons: Iterable[str]) -> str:
    found = sorted(f"{times} {reason}" for reason, times in Counter(reasons).items())
    return f"0/{count} nodes are available: {', '.join(found)}."
