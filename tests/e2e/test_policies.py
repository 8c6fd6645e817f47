"""A namespace that denies by default: as docs/real-cluster.md says, probers that may not reach prove nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from stage import Stage
from test_own import unfit
from test_rehearsal import SHORT, assert_clean, cluster_of, wait_for_six_engines, written

from gameday.kinds import NETWORKPOLICIES

ENGINES, GATEWAYS = {"app": "my-llama32"}, {"app": "gateway"}
DENY: dict[str, Any] = {"podSelector": {}}
# The zone outage of the experiments, without what the pods' places before it decide.
OUTAGE = (
    SHORT
    + """
def test_outage(experiment, zone):
    experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999)],
        fault=ZoneOutage(zone, lasting=20, replacements="elsewhere"),
        during=[Success(at_least=0.9)],
        after=[Recovers(within=12, hold=5), NothingLeftBehind()],
    )
"""
)


def let_in(to: Mapping[str, str], *peers: Mapping[str, str]) -> dict[str, Any]:
    """Without peers: everybody, the load balancer among them."""
    rule = {"from": [{"podSelector": {"matchLabels": labels}} for labels in peers]} if peers else {}
    return {"podSelector": {"matchLabels": to}, "ingress": [rule]}


def engines(stage: Stage) -> set[str]:
    return {pod.uid for pod in cluster_of(stage).pods(labels="app=my-llama32")}


@contextmanager
def policies(stage: Stage, **specs: dict[str, Any]) -> Iterator[None]:
    cluster = cluster_of(stage)
    try:
        for name, spec in specs.items():
            meta = {"name": name, "namespace": cluster.namespace}
            cluster.create(NETWORKPOLICIES, {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                                             "metadata": meta, "spec": spec})  # fmt: skip
        yield
    finally:
        for name in specs:
            cluster.delete(NETWORKPOLICIES, name, cluster.namespace)


@pytest.mark.thorough
def test_a_zone_outage_under_a_default_deny(reference: Stage) -> None:
    """Green only with the rule for the probers; the service itself works, or the first run would fail for that."""
    service = {"deny": DENY, "gateways": let_in(GATEWAYS), "engines": let_in(ENGINES, GATEWAYS)}
    outage = (written(reference, "test_outage.py", OUTAGE), "--seed", "7")
    with policies(reference, **service):
        before = engines(reference)
        blind = reference.rehearse(*outage)
        assert blind.code == 1, blind.out
        told = blind.verdict("outage")
        assert told["verdict"] == "INCONCLUSIVE", blind.out
        assert "nothing was injected" in json.dumps(told) and "no prober could reach" in json.dumps(told), blind.out
        assert engines(reference) == before, "nobody was hurt for nothing"
        assert_clean(reference)
        with policies(reference, probers=let_in(ENGINES, {"gameday.dev/role": "prober"})):
            seeing = reference.rehearse(*outage)
            assert seeing.code == 0 or unfit(seeing, "outage"), seeing.out
            proven = next(one for one in seeing.verdict("outage")["findings"] if one["objective"] == "fault proven")
            assert proven["status"] == "PASS"
    wait_for_six_engines(cluster_of(reference))
    assert_clean(reference)


@pytest.mark.thorough
def test_a_default_deny_without_any_rule_is_refused_before_the_fault(reference: Stage) -> None:
    """Not even the load balancer is let in: the preflight's one token is not answered, and nothing is injected."""
    with policies(reference, deny=DENY):
        done = reference.rehearse("experiments", "-k", "zone_outage", "--seed", "7")
    assert done.code == 1 and "1 error" in done.out and "during" not in done.out, done.out
    assert_clean(reference)
