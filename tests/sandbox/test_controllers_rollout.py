"""The arithmetic of rollouts, of scaling down, of disruption budgets, of jobs and StatefulSets."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, strategies as st

from sandbox.client import Obj
from sandbox.controllers import statefulset
from sandbox.controllers.deployment import annotated, same_template, with_condition
from sandbox.controllers.disruption import Budget, NoScale, budget
from sandbox.controllers.job import Tally, outcome, parse_ranges, ranges, wanted_active
from sandbox.controllers.objects import digest, stamp
from sandbox.controllers.replicaset import victims
from sandbox.controllers.rollout import Bounds, Size, bounds, new_size, proportional, shrink_old

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def pod(name: str, **how: Any) -> Obj:
    """A running, ready pod; `how` overrides: node, phase, ready, age (s), ready_for (s), restarts, cost, labels."""
    ready_for = how.get("ready_for", how.get("age", 600))
    return {
        "metadata": {
            "name": name,
            "namespace": "n",
            "uid": name,
            "labels": how.get("labels", {}),
            "annotations": {"controller.kubernetes.io/pod-deletion-cost": str(how["cost"])} if "cost" in how else {},
            "creationTimestamp": stamp(NOW - timedelta(seconds=how.get("age", 600))),
            **({"deletionTimestamp": stamp(NOW)} if how.get("deleting") else {}),
        },
        "spec": {"nodeName": how.get("node", "n1"), "containers": []},
        "status": {
            "phase": how.get("phase", "Running"),
            "conditions": [{
                "type": "Ready",
                "status": "True" if how.get("ready", True) else "False",
                "lastTransitionTime": stamp(NOW - timedelta(seconds=ready_for)),
            }],
            "containerStatuses": [{"restartCount": how.get("restarts", 0)}],
        },
    }  # fmt: skip


# -- rolling update


@pytest.mark.parametrize(
    ("replicas", "surge", "unavailable", "most", "least"),
    [
        (4, "25%", "25%", 5, 3),
        (3, "25%", "25%", 4, 3),  # surge rounds up, unavailable down
        (1, 0, 0, 1, 0),  # both zero would never move
        (10, "0%", "5%", 10, 9),
        (2, 1, 5, 3, 0),  # no more than all can be unavailable
        (0, "25%", "25%", 0, -0),
    ],
)
def test_bounds(replicas: int, surge: int | str, unavailable: int | str, most: int, least: int) -> None:
    limit = bounds(replicas, "RollingUpdate", surge, unavailable)
    assert (limit.most, limit.least_available) == (most, least)


def test_recreate_has_no_bounds_to_stretch() -> None:
    assert bounds(4, "Recreate", "25%", "25%") == Bounds(4, 0, 0)


def test_first_step_of_the_oracle_rollout() -> None:
    """maxSurge 1, maxUnavailable 1 over 4 ready pods: 3 old and 2 new at the first standstill."""
    limit = bounds(4, "RollingUpdate", 1, 1)
    assert new_size(limit, "RollingUpdate", 0, 4) == 1
    old = Size("old", 4, 4)
    assert shrink_old(limit, Size("new", 1, 0), [old]) == {"old": 3}
    assert new_size(limit, "RollingUpdate", 1, 4) == 2
    assert shrink_old(limit, Size("new", 2, 0), [Size("old", 3, 3)]) == {}


def test_unhealthy_old_pods_go_first_and_for_free() -> None:
    limit = bounds(4, "RollingUpdate", 1, 0)
    assert shrink_old(limit, Size("new", 1, 0), [Size("old", 4, 3)]) == {}
    assert shrink_old(limit, Size("new", 1, 1), [Size("old", 4, 3)]) == {"old": 3}


@given(
    replicas=st.integers(1, 12),
    surge=st.one_of(st.integers(0, 4), st.sampled_from(["0%", "25%", "50%", "100%"])),
    unavailable=st.one_of(st.integers(0, 4), st.sampled_from(["0%", "25%", "50%", "100%"])),
    ready_order=st.lists(st.integers(0, 3), max_size=60),
)
def test_a_rollout_stays_within_its_bounds_and_ends(
    replicas: int, surge: int | str, unavailable: int | str, ready_order: list[int]
) -> None:
    limit = bounds(replicas, "RollingUpdate", surge, unavailable)
    old, new = Size("old", replicas, replicas), Size("new", 0, 0)
    pace = iter([*ready_order, *[1] * 200])
    for _ in range(200):
        size = new_size(limit, "RollingUpdate", new.replicas, new.replicas + old.replicas)
        if size != new.replicas:
            new = Size("new", size, new.available)
        elif fewer := shrink_old(limit, new, [old]):
            old = Size("old", fewer["old"], min(old.available, fewer["old"]))
        else:
            new = Size("new", new.replicas, min(new.replicas, new.available + next(pace)))
        assert old.replicas + new.replicas <= limit.most
        assert old.available + new.available >= limit.least_available
        if new.available == replicas and old.replicas == 0:
            return
    pytest.fail("the rollout never ended")


@given(sizes=st.lists(st.integers(0, 10), min_size=2, max_size=5), wanted=st.integers(0, 20), surge=st.integers(0, 3))
def test_scaling_during_a_rollout_shares_out_everything(sizes: list[int], wanted: int, surge: int) -> None:
    sets = [Size(f"s{i}", n, created=str(i)) for i, n in enumerate(sizes)]
    result = proportional(Bounds(wanted, surge, 0), sets, sum(sizes))
    assert all(size >= 0 for size in result.values())
    if any(sizes):
        allowed = wanted + surge if wanted else 0
        if allowed >= sum(sizes):
            assert sum(result.values()) == allowed
        else:  # like the real controller, it may take a second look to shrink many small sets
            assert allowed <= sum(result.values()) <= sum(sizes)


def test_proportional_scaling_keeps_the_proportion() -> None:
    sets = [Size("big", 8, created="1", most=13), Size("small", 5, created="2", most=13)]
    assert proportional(Bounds(20, 6, 0), sets, 13) == {"big": 16, "small": 10}


def test_revision_annotations_remember_a_rollback() -> None:
    deployment: Obj = {"metadata": {"name": "d", "annotations": {"x": "y", "deployment.kubernetes.io/revision": "2"}},
                       "spec": {"replicas": 1}}  # fmt: skip
    fresh = annotated(deployment, None, 1)
    assert fresh == {
        "x": "y",
        "deployment.kubernetes.io/revision": "1",
        "deployment.kubernetes.io/desired-replicas": "1",
        "deployment.kubernetes.io/max-replicas": "2",
    }
    back = annotated(deployment, {"metadata": {"annotations": fresh}}, 3)
    assert back["deployment.kubernetes.io/revision"] == "3"
    assert back["deployment.kubernetes.io/revision-history"] == "1"


def test_templates_differ_by_more_than_the_hash_label() -> None:
    one: Obj = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"image": "x"}]}}
    hashed: Obj = {**one, "metadata": {"labels": {"a": "b", "pod-template-hash": "z"}, "creationTimestamp": None}}
    other: Obj = {**one, "spec": {"containers": [{"image": "y"}]}}
    assert same_template(one, hashed)
    assert not same_template(one, other)
    assert digest(one) != digest(other)
    assert set(digest(one)) <= set("bcdfghjklmnpqrstvwxz2456789")


def test_a_condition_keeps_its_time_while_its_status_stands() -> None:
    first = {"type": "A", "status": "True", "reason": "r", "lastTransitionTime": "t1"}
    same = with_condition([first], {**first, "lastTransitionTime": "t2"})
    assert same == [first]
    renamed = with_condition([first], {**first, "reason": "s", "lastTransitionTime": "t2"})
    assert renamed[0]["lastTransitionTime"] == "t1"
    flipped = with_condition([first], {**first, "status": "False", "lastTransitionTime": "t2"})
    assert flipped[0]["lastTransitionTime"] == "t2"


# -- whom a ReplicaSet lets go


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pod("a", node=""), pod("b")),  # not yet assigned
        (pod("a", phase="Pending", ready=False), pod("b", ready=False)),
        (pod("a", ready=False), pod("b")),
        (pod("a", cost=-5), pod("b", ready_for=1)),
        (pod("a", ready_for=10), pod("b", ready_for=1000)),  # ready for less long
        (pod("a", restarts=3), pod("b")),
        (pod("a", age=10, ready_for=5), pod("b", age=1000, ready_for=5)),
    ],
)
def test_victim_order(first: Obj, second: Obj) -> None:
    assert victims([second, first], 1, Counter(), NOW) == [first]
    assert victims([first, second], 1, Counter(), NOW) == [first]


def test_victims_come_from_the_crowded_node() -> None:
    pods = [pod("a", node="n1"), pod("b", node="n2"), pod("c", node="n2")]
    assert victims(pods, 1, Counter({"n1": 1, "n2": 2}), NOW)[0]["spec"]["nodeName"] == "n2"


# -- disruption budgets


@pytest.mark.parametrize(
    ("spec", "ready", "found"),
    [
        ({"minAvailable": 2}, 0, Budget(0, 0, 2, 5)),
        ({"minAvailable": 2}, 3, Budget(1, 3, 2, 5)),
        ({"minAvailable": 7}, 5, Budget(0, 5, 7, 5)),
        ({"minAvailable": "50%"}, 5, Budget(2, 5, 3, 5)),
        ({"minAvailable": 0}, 0, Budget(0, 0, 0, 5)),
        ({"maxUnavailable": 1}, 5, Budget(1, 5, 4, 5)),
        ({"maxUnavailable": "30%"}, 5, Budget(2, 5, 3, 5)),
        ({"maxUnavailable": 0}, 5, Budget(0, 5, 5, 5)),
    ],
)
def test_budget(spec: Obj, ready: int, found: Budget) -> None:
    pods = [pod(f"p{i}", ready=i < ready) for i in range(5)]
    assert budget(spec, pods, set(), lambda: 5) == found


def test_budget_counts_no_terminating_nor_just_evicted_pod() -> None:
    pods = [pod("a", deleting=True), pod("b"), pod("c")]
    assert budget({"minAvailable": 1}, pods, {"b"}, lambda: 3).healthy == 1


def test_bare_pods_have_no_scale() -> None:
    assert budget({"maxUnavailable": 1}, [pod("a"), pod("b")], set(), lambda: 0) == Budget(0, 2, 0, 0)

    def no_scale() -> int:
        raise NoScale("jobs.batch does not implement the scale subresource")

    with pytest.raises(NoScale):
        budget({"minAvailable": "50%"}, [pod("a")], set(), no_scale)


# -- jobs


def test_job_parallelism() -> None:
    assert wanted_active({"parallelism": 3, "completions": 5}, Tally(0, 0, 0)) == 3
    assert wanted_active({"parallelism": 3, "completions": 5}, Tally(1, 4, 0)) == 1
    assert wanted_active({"parallelism": 2}, Tally(2, 0, 1)) == 2
    assert wanted_active({"parallelism": 2}, Tally(1, 1, 0)) == 1  # a work queue starts nothing after a success


def test_job_outcome() -> None:
    job: Obj = {"metadata": {}, "spec": {"completions": 2, "backoffLimit": 1}}
    assert outcome(job, Tally(1, 1, 1), 0) is None
    assert (outcome(job, Tally(0, 2, 1), 0) or ("",))[0] == "Complete"
    assert (outcome(job, Tally(0, 1, 2), 0) or ("", ""))[:2] == ("Failed", "BackoffLimitExceeded")
    late: Obj = {**job, "status": {"startTime": "2020-01-01T00:00:00Z"}}
    late["spec"] = {**job["spec"], "activeDeadlineSeconds": 5}
    assert (outcome(late, Tally(1, 0, 0), 0) or ("", ""))[1] == "DeadlineExceeded"


@given(st.sets(st.integers(0, 50)))
def test_index_ranges_round_trip(numbers: set[int]) -> None:
    assert parse_ranges(ranges(numbers)) == numbers


def test_index_ranges_are_short() -> None:
    assert ranges([0, 1, 3, 4, 5, 7]) == "0,1,3-5,7"


# -- StatefulSets


def stateful(replicas: int = 3, **spec: Any) -> Obj:
    return {"metadata": {"name": "db", "generation": 1}, "spec": {"replicas": replicas, **spec}}


def member(at: int, *, ready: bool = True, revision: str = "new", **how: Any) -> tuple[int, Obj]:
    return at, pod(f"db-{at}", ready=ready, labels={"controller-revision-hash": revision}, **how)


def test_statefulset_grows_one_by_one() -> None:
    step = statefulset.Step
    assert statefulset.steps(stateful(), {}, "new") == [step("create", 0)]
    assert statefulset.steps(stateful(), dict([member(0, ready=False)]), "new") == []
    assert statefulset.steps(stateful(), dict([member(0)]), "new") == [step("create", 1)]
    assert statefulset.steps(stateful(), dict([member(0), member(2)]), "new") == [step("create", 1)]
    parallel = stateful(podManagementPolicy="Parallel")
    assert len(statefulset.steps(parallel, {}, "new")) == 3


def test_statefulset_waits_for_a_terminating_pod() -> None:
    assert statefulset.steps(stateful(), dict([member(0), member(1, deleting=True)]), "new") == []


def test_statefulset_shrinks_and_updates_from_the_highest() -> None:
    step = statefulset.Step
    three = dict([member(0), member(1), member(2)])
    assert statefulset.steps(stateful(1), three, "new") == [step("delete", 2)]
    old = dict([member(0, revision="old"), member(1, revision="old"), member(2)])
    assert statefulset.steps(stateful(), old, "new") == [step("delete", 1)]
    kept = stateful(updateStrategy={"type": "RollingUpdate", "rollingUpdate": {"partition": 2}})
    assert statefulset.steps(kept, old, "new") == []
    assert statefulset.steps(stateful(updateStrategy={"type": "OnDelete"}), old, "new") == []
