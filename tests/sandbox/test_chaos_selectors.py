"""Chaos Mesh's selectors and modes."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from sandbox.chaos import gotime
from sandbox.chaos.selectors import CannotSelect, containers, draw, namespaces, select
from sandbox.client import Obj


def pod(name: str, namespace: str = "llm", node: str = "n1", phase: str = "Running", **labels: str) -> Obj:
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": labels, "annotations": {"note": name}},
        "spec": {"nodeName": node, "containers": [{"name": "main"}, {"name": "side"}]},
        "status": {"phase": phase},
    }


PODS = [
    pod("a", app="web", tier="x"),
    pod("b", app="web", node="n2"),
    pod("c", app="db", node="n3", phase="Pending"),
    pod("d", namespace="other", app="web"),
]
NODES = [
    {"metadata": {"name": f"n{number}", "labels": {"zone": "ab"[number % 2], "n": str(number)}}} for number in (1, 2, 3)
]


def names(**selector: Any) -> str:
    return "".join(found["metadata"]["name"] for found in select(selector, "llm", PODS, NODES))


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, "abc"),
        ({"namespaces": ["other"]}, "d"),
        ({"namespaces": ["llm", "other"], "labelSelectors": {"app": "web"}}, "abd"),
        ({"labelSelectors": {"app": "web", "tier": "x"}}, "a"),
        ({"annotationSelectors": {"note": "b"}}, "b"),
        ({"expressionSelectors": [{"key": "tier", "operator": "Exists"}]}, "a"),
        ({"expressionSelectors": [{"key": "tier", "operator": "DoesNotExist"}]}, "bc"),
        ({"expressionSelectors": [{"key": "app", "operator": "In", "values": ["db"]}]}, "c"),
        ({"expressionSelectors": [{"key": "tier", "operator": "NotIn", "values": ["x"]}]}, "bc"),
        ({"fieldSelectors": {"metadata.name": "b"}}, "b"),
        ({"fieldSelectors": {"spec.nodeName": "n1", "status.phase": "Running"}}, "a"),
        ({"nodes": ["n1"]}, "a"),
        ({"nodeSelectors": {"zone": "b"}}, "ac"),
        ({"nodeSelectors": {"zone": "b", "n": "3"}}, "c"),
        ({"nodes": ["n2"], "nodeSelectors": {"n": "3"}}, "bc"),
        ({"nodeSelectors": {"zone": "nowhere"}}, ""),
        ({"podPhaseSelectors": ["Running"]}, "ab"),
        ({"podPhaseSelectors": ["!Running"]}, "c"),
        ({"pods": {"other": ["d", "gone"], "llm": ["c"]}, "labelSelectors": {"app": "none"}}, "cd"),
    ],
)
def test_select(selector: Obj, expected: str) -> None:
    assert names(**selector) == expected


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"physicalMachines": {}}, "does not know the selector 'physicalMachines'"),
        ({"fieldSelectors": {"spec.color": "red"}}, "field label not supported: spec.color"),
        ({"nodes": ["n9"]}, 'nodes "n9" not found'),
        ({"podPhaseSelectors": ["Walking"]}, "phase 'Walking' is unknown"),
        ({"expressionSelectors": [{"key": "a", "operator": "Gt", "values": ["1"]}]}, "'Gt' is not a valid"),
        ({"expressionSelectors": [{"key": "a", "operator": "In"}]}, "In needs values"),
        ({"expressionSelectors": [{"key": "a", "operator": "Exists", "values": ["1"]}]}, "takes no values"),
    ],
)
def test_select_refuses_what_it_does_not_know(selector: Obj, message: str) -> None:
    with pytest.raises(CannotSelect, match=message):
        names(**selector)


def test_namespaces_come_from_pods_then_namespaces_then_the_experiment() -> None:
    assert namespaces({"pods": {"b": [], "a": []}, "namespaces": ["c"]}, "own") == ["a", "b"]
    assert namespaces({"namespaces": ["c", "c"]}, "own") == ["c"]
    assert namespaces({}, "own") == ["own"]


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**32))
def test_draw_counts(count: int, value: int, seed: int) -> None:
    pods = [pod(str(number)) for number in range(count)]
    rng = random.Random(seed)
    assert draw(pods, "all", None, rng) == pods
    assert len(draw(pods, "one", None, rng)) == 1
    assert len(draw(pods, "fixed", str(value), rng)) == min(value, count)
    assert len(draw(pods, "fixed-percent", str(value), rng)) == math.ceil(count * value / 100)
    drawn = draw(pods, "random-max-percent", str(value), rng)
    assert len(drawn) <= math.ceil(count * value / 100)
    assert [entry for entry in pods if entry in drawn] == drawn, "no pod twice"


def test_random_max_percent_draws_none_and_its_maximum_at_times() -> None:
    pods = [pod(str(number)) for number in range(4)]
    counts = {len(draw(pods, "random-max-percent", "50", random.Random(seed))) for seed in range(500)}
    assert counts == {0, 1, 2}


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("fixed", None),
        ("fixed", "x"),
        ("fixed", "0"),
        ("fixed", "-1"),
        ("fixed-percent", "0"),
        ("fixed-percent", "101"),
        ("random-max-percent", "0"),
        ("random-max-percent", "-5"),
        ("some", "1"),
    ],
)
def test_draw_refuses(mode: str, value: str | None) -> None:
    with pytest.raises(CannotSelect):
        draw(PODS, mode, value, random.Random(1))


def test_draw_from_nothing_is_refused() -> None:
    with pytest.raises(CannotSelect, match="no pod is selected"):
        draw([], "all", None, random.Random(1))


def test_containers() -> None:
    assert containers(PODS[0], None) == ["main"]
    assert containers(PODS[0], ["side", "main", "gone"]) == ["main", "side"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30s", 30), ("1h30m", 5400), ("300ms", 0.3), ("-1.5s", -1.5), ("0", 0), ("1m0.5s", 60.5), ("10us", 1e-5)],
)
def test_go_durations(text: str, expected: float) -> None:
    assert gotime.seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "5", "s", "1d", "1 s", "1s2", "--1s"])
def test_go_durations_refuse(text: str) -> None:
    with pytest.raises(ValueError, match="invalid duration"):
        gotime.seconds(text)
