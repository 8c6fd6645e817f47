"""Objectives of drains, rollouts and lost nodes, each with its planted violation."""

from __future__ import annotations

from dataclasses import replace

from planted import FAULT, HARM, UNDO, Plant

from gameday.model import Event, EvictionMark, Finding, NodeMark, Phase, PodMark, Verdict
from gameday.objectives import Drained, NeverFewer, NodesReady, Objective, Replaced
from gameday.objectives.base import objective_from_json

PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE


def during(objective: Objective, *events: Event, pods: tuple[str, ...] = ("llm/engine-b",)) -> Finding:
    plant = Plant(extra=events, fault=replace(FAULT, pods=pods))
    return objective.judge(plant.build(), Phase.DURING)


def pod(t: float, name: str, stage: str, owner: str = "engine") -> PodMark:
    return PodMark(t, f"llm/{name}", f"uid-{name}", stage, f"node-{name[-1]}", name[-1], owner)  # type: ignore[arg-type]


def eviction(t: float, name: str, answer: str) -> EvictionMark:
    return EvictionMark(t, f"llm/{name}", answer, "budget")  # type: ignore[arg-type]


GONE = (pod(HARM + 2, "engine-b", "terminating"), pod(HARM + 6, "engine-b", "gone"))
BORN = (pod(HARM + 2, "engine-x", "created"), pod(HARM + 9, "engine-x", "ready"))


def test_drained_needs_every_eviction_accepted_and_every_pod_gone_in_time() -> None:
    refused, accepted = eviction(HARM + 1, "engine-b", "refused"), eviction(HARM + 2, "engine-b", "accepted")
    found = during(Drained(within=10, refused_at_least=1), refused, accepted, *GONE)
    assert found.status is PASS and found.observed == 6 and "1 refused by the budget" in found.evidence
    assert during(Drained(within=5), accepted, *GONE).status is FAIL
    assert during(Drained(refused_at_least=1), accepted, *GONE).status is FAIL, "no budget protected anything"
    assert during(Drained(), accepted, GONE[0]).status is FAIL, "it never ended"
    blocked = during(Drained(), refused)
    assert blocked.status is FAIL and "not drained: llm/engine-b: budget" in blocked.evidence
    assert during(Drained(), *GONE).status is INCONCLUSIVE, "nobody asked"
    late = eviction(UNDO + 5, "engine-b", "accepted")
    assert during(Drained(), late, *GONE).status is INCONCLUSIVE


def test_a_drain_of_two_is_drained_when_both_are() -> None:
    both = ("llm/engine-b", "llm/engine-c")
    asked = (eviction(HARM + 1, "engine-b", "accepted"), eviction(HARM + 1, "engine-c", "accepted"))
    assert during(Drained(), *asked, *GONE, pods=both).status is FAIL
    assert during(Drained(), *asked, *GONE, pod(HARM + 8, "engine-c", "gone"), pods=both).observed == 8


def test_replaced_needs_as_many_new_ready_pods_as_have_left() -> None:
    found = during(Replaced(within=10), *GONE, *BORN)
    assert found.status is PASS and found.observed == 9
    assert during(Replaced(within=8), *GONE, *BORN).status is FAIL
    assert during(Replaced(), *GONE, BORN[0]).status is FAIL, "never ready"
    assert during(Replaced(), *BORN).status is FAIL, "the old one never left"
    unready = pod(HARM + 20, "engine-x", "unready")
    assert during(Replaced(), *GONE, *BORN, unready).status is FAIL, "not ready any more when the phase ends"
    theirs = "ReplicaSet/gateway"
    other = (pod(HARM + 2, "gateway-x", "created", theirs), pod(HARM + 3, "gateway-x", "ready", theirs))
    assert during(Replaced(), *GONE, *other).status is FAIL, "somebody else's new pod"
    assert during(Replaced(owner="nobody"), *GONE, *BORN).status is INCONCLUSIVE


def test_what_a_statefulset_has_replaced_has_the_same_name() -> None:
    again = tuple(replace(one, pod="llm/engine-b", uid="uid-2") for one in BORN)
    assert during(Replaced(within=10), *GONE, *again).observed == 9
    assert during(Replaced(), *GONE, again[0]).status is FAIL, "never ready"
    came_back = pod(HARM + 9, "engine-b", "ready")
    assert during(Replaced(), pod(HARM + 2, "engine-b", "unready"), came_back).status is FAIL, "it is the same pod"


def test_never_fewer_looks_at_every_instant_and_not_only_at_the_end() -> None:
    dip = (pod(HARM + 3, "engine-b", "unready"), pod(HARM + 4, "engine-b", "ready"))
    assert during(NeverFewer(than=3)).status is PASS
    found = during(NeverFewer(than=3), *dip)
    assert found.status is FAIL and found.observed == 2 and "3 s into the phase" in found.evidence
    assert during(NeverFewer(than=2), *dip).status is PASS
    assert during(NeverFewer(than=1, owner="nobody")).status is FAIL


def test_nodes_ready_counts_what_the_watch_last_said() -> None:
    ready = [NodeMark(90.0, f"node-{zone}", "ready", zone) for zone in "abc"]
    down, up = NodeMark(HARM + 4, "node-b", "not ready", "b"), NodeMark(HARM + 9, "node-b", "ready", "b")
    assert during(NodesReady(3), *ready).status is PASS
    assert during(NodesReady(3), *ready, down).status is FAIL
    assert during(NodesReady(3), *ready, down, up).status is PASS
    assert during(NodesReady(3), *ready, NodeMark(HARM + 4, "node-b", "gone", "b")).status is FAIL


def test_they_survive_their_json() -> None:
    for objective in (Drained(10, 1), Replaced(5.0, "engine"), NeverFewer(3), NodesReady(6)):
        assert objective_from_json(objective.to_json()) == objective
