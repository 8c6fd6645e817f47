"""Zone faults on namespaces as they are: many pods in a zone, some that nobody can see from outside."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_plans import pod, view

from faults import NodeCrash, Xid, Zone, ZoneOutage, ZonePartition
from faults.base import Apply, Cut, Dead, Fault, Plan, View
from gameday.cluster import Pod
from gameday.errors import TargetError
from probes.reach import MAX_TARGETS, Reach, Seen, _Track

ZONES = "ab"  # with two, a prober has nobody but its own zone's pods and the other's


def crowded(*more: Pod) -> View:
    engines = tuple(pod(f"engine-{zone}{number:02}", zone) for zone in ZONES for number in range(20))
    gateways = tuple(pod(f"gateway-{zone}", zone, engine=False) for zone in ZONES)
    made = view((*engines, *gateways, *more))
    return replace(made, probers=tuple((f"gd-abc123-prober-{zone}", zone) for zone in ZONES))


class Watched:
    """The probers of a plan, with the targets that they would get; `rounds` feeds what they see."""

    def __init__(self, plan: Plan, seen: View) -> None:
        self.reach = Reach(None, seen, "image", 60)  # type: ignore[arg-type]
        self.targets = self.reach._targets(plan)
        self.number = 0
        for zone in ZONES:
            self.reach._tracks[zone] = _Track(zone, self.targets)
        self.rounds(set())
        self.reach.settle()

    def rounds(self, down: set[tuple[str, str]]) -> None:
        """`down`: (prober's zone, "ns/pod") pairs that fail, for three rounds."""
        for _ in range(3):
            self.number += 1
            for zone, track in self.reach._tracks.items():
                bits = "".join("0" if (zone, target.key) in down else "1" for target in self.targets)
                self.reach._take(track, json.dumps({"n": self.number, "up": bits}))

    def across(self) -> set[tuple[str, str]]:
        return {(zone, target.key) for zone in ZONES for target in self.targets if target.zone != zone}

    def to(self, *pods: str) -> set[tuple[str, str]]:
        return {(zone, key) for zone in ZONES for key in pods}

    def look(self, plan: Plan, kind: type[Cut] | type[Dead]) -> Seen:
        proofs = [getattr(act, "proof", None) for act in plan.acts]
        return self.reach.look(next(proof for proof in proofs if isinstance(proof, kind)))


def dead(plan: Plan) -> Dead:
    return next(act.proof for act in plan.acts if isinstance(act, Apply) and isinstance(act.proof, Dead))


@pytest.mark.parametrize("replacements", ["none", "elsewhere"])
def test_an_outage_of_more_pods_than_a_prober_usually_looks_at_can_be_proven(replacements: str) -> None:
    """Only 16 pods were looked at, all of them in the zone: some never seen, and nothing left as a control."""
    seen = crowded()
    plan = ZoneOutage(Zone("a"), lasting=25, replacements=replacements).plan(seen)  # type: ignore[arg-type]
    watched = Watched(plan, seen)
    assert len(dead(plan).pods) == 21 > MAX_TARGETS
    watched.rounds(watched.across())
    assert watched.look(plan, Cut).settled and not watched.look(plan, Dead).holds
    watched.rounds(watched.across() | watched.to(*dead(plan).pods))
    assert watched.look(plan, Dead).settled
    watched.rounds(watched.across() | watched.to(*dead(plan).pods[:-1]))
    assert not watched.look(plan, Dead).holds, "one of the 21 still answers"


def test_a_crowded_zone_leaves_targets_on_the_other_side_of_a_cut() -> None:
    seen = crowded()
    plan = ZonePartition(Zone("a"), lasting=25).plan(seen)
    watched = Watched(plan, seen)
    assert {target.zone for target in watched.targets} == set(ZONES) and len(watched.targets) <= MAX_TARGETS
    one_way = {(zone, key) for zone, key in watched.across() if zone == "b"}
    watched.rounds(one_way)
    assert not watched.look(plan, Cut).holds, "the zone's own prober still reaches the other side"
    watched.rounds(watched.across())
    assert watched.look(plan, Cut).settled


def test_a_crash_of_a_crowded_node_leaves_others_as_controls() -> None:
    seen = replace(crowded(), max_share=1.0)
    plan = NodeCrash(lasting=30).plan(seen)
    (act,) = plan.acts
    watched = Watched(plan, seen)
    hit = plan.facts.pods
    watched.rounds(watched.to(*hit))
    assert len(hit) == 21 and watched.reach.look(act.proof).settled  # type: ignore[union-attr,arg-type]
    watched.rounds(watched.to(*(target.key for target in watched.targets)))
    assert not watched.reach.look(act.proof).holds, "everything is down"  # type: ignore[union-attr,arg-type]


UNSEEN = (
    replace(pod("worker-a", "a", engine=False), ports=()),
    pod("loading-a", "a", engine=False, ready=False),
)


def test_an_outage_hits_pods_that_cannot_be_seen_and_is_proven_by_those_that_can() -> None:
    """One pod without a TCP port, or not ready, and no outage of its zone could ever pass."""
    seen = view((*view().pods, *UNSEEN))
    plan = ZoneOutage(Zone("a"), lasting=25).plan(seen)
    hidden = {one.key for one in UNSEEN}
    assert hidden <= set(plan.facts.pods) and not hidden & set(dead(plan).pods)
    kill = plan.acts[-1]
    assert isinstance(kill, Apply) and kill.records == len(plan.facts.pods) == 5
    assert {"worker-a", "loading-a"} <= set(kill.manifest["spec"]["selector"]["pods"]["llm"])
    assert plan.undos[0].running == plan.facts.pods, "all of them must run again"
    assert "loading-a, worker-a" in plan.facts.fidelity[-1], "and the report says which nobody saw"
    assert set(dead(plan).pods) <= {target.key for target in Reach(None, seen, "image", 60)._targets(plan)}  # type: ignore[arg-type]


def blind(one: Pod) -> Pod:
    return replace(one, ports=()) if one.zone == "a" and one.labels["app"] == "engine" else one


@pytest.mark.parametrize("replacements", ["none", "elsewhere"])
def test_an_outage_whose_engines_nobody_could_see_die_is_refused(replacements: str) -> None:
    """A gateway that falls silent says nothing about the engines."""
    fault: Fault = ZoneOutage(Zone("a"), lasting=25, replacements=replacements)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="declares a TCP port"):
        fault.plan(view(tuple(blind(one) for one in view().pods)))


def test_an_xid_beside_a_pod_that_still_loads_can_be_proven() -> None:
    """Of all GPU pods on the node, one that nobody could see before kept the whole fault from ever being proven."""
    loading = tuple(pod(f"loading-{zone}", zone, ready=False) for zone in "abc")
    plan = Xid(79, lasting=30).plan(view((*view().pods, *loading)))
    (hidden,) = (one for one in loading if one.key in plan.facts.pods)
    by_name = {act.what: act for act in plan.acts if isinstance(act, Apply)}
    assert by_name[f"container-kill-{hidden.name}"].proof is None, "it is killed all the same"
    failure = by_name["pod-failure"]
    assert failure.records == len(plan.facts.pods) == 3 and isinstance(failure.proof, Dead)
    assert set(failure.proof.pods) == set(plan.facts.pods) - {hidden.key}
    assert all(act.proof for what, act in by_name.items() if hidden.name not in what)
    assert hidden.name in plan.facts.fidelity[-1]


@pytest.mark.parametrize("code", [13, 79])
def test_an_xid_that_nobody_could_see_strike_is_refused(code: int) -> None:
    portless = tuple(replace(one, ports=()) if one.gpus else one for one in view().pods)
    with pytest.raises(TargetError, match="declares a TCP port"):
        Xid(code, lasting=30).plan(view(portless))
