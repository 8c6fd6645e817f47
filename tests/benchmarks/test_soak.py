"""The soak sees what is left: one planted trace each, on an API that is played."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import soak
from sandbox.client import NETWORKCHAOS, NODES, PODCHAOS, PODNETWORKCHAOS, PODS, STRESSCHAOS, Kind, Obj

RULES = {"iptables": [{"direction": "input"}]}
READY = {"conditions": [{"type": "Ready", "status": "True"}]}


def named(name: str, **more: Any) -> Obj:
    return {"metadata": {"name": name}, "spec": {}, "status": READY, **more}


class Played:
    def __init__(self, **changes: list[Obj]) -> None:
        self.held: dict[Kind, list[Obj]] = {
            NODES: [named(f"n{i}") for i in range(6)],
            PODS: [named(f"p{i}") for i in range(21)],
            PODNETWORKCHAOS: [named("r", spec={"iptables": []})],
            **{{k.plural: k for k in (NODES, PODS, PODCHAOS, NETWORKCHAOS, STRESSCHAOS, PODNETWORKCHAOS)}[name]: objects
               for name, objects in changes.items()},
        }  # fmt: skip

    async def list(self, kind: Kind, *_: object, **__: object) -> tuple[list[Obj], str]:
        return self.held.get(kind, []), "1"


def nodes(**spec: object) -> list[Obj]:
    """Six, of which n3 is special."""
    return [named(f"n{i}", spec=spec if i == 3 else {}) for i in range(6)]


def trouble(served: str = "", **changes: list[Obj]) -> str:
    class Served(soak.Soak):
        async def _unserved(self) -> str:
            return served

    api: Any = Played(**changes)
    nothing: Any = None
    return asyncio.run(Served(api, nothing, nothing, random.Random(1)).trouble())


def test_nothing_is_left() -> None:
    assert trouble() == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"podchaos": [named("x")]}, "PodChaos x is still there"),
        ({"networkchaos": [named("x")]}, "NetworkChaos x is still there"),
        (
            {"podnetworkchaos": [named("r", spec=RULES)]},
            "PodNetworkChaos r still has rules",
        ),
        ({"nodes": [named(f"n{i}") for i in range(5)]}, "5 nodes"),
        ({"nodes": nodes(taints=[{"key": "k"}])}, "not fit: n3"),
        ({"nodes": nodes(unschedulable=True)}, "not fit: n3"),
        ({"pods": [named(f"p{i}", status=READY if i else {}) for i in range(21)]}, "not ready: p0"),
        ({"pods": [named(f"p{i}") for i in range(22)]}, "22 pods"),
        ({"pods": [named("p0", metadata={"name": "p0", "deletionTimestamp": "t"})]}, "not ready: p0"),
    ],
)
def test_a_trace_is_found(changes: dict[str, list[Obj]], said: str) -> None:
    assert said in trouble(**changes)


def test_a_service_that_fails_is_a_trace() -> None:
    assert trouble("a request was answered 503") == "a request was answered 503"


def test_every_fault_is_drawn_with_its_own_targets() -> None:
    made = {name: draw() for name, draw in soak.faults(random.Random(1), ["n1", "n2"]).items()}
    assert {fault.kind for fault in made.values()} == {PODCHAOS, NETWORKCHAOS, STRESSCHAOS, None}
    for fault in made.values():
        assert fault.kind is None or fault.spec["selector"]["namespaces"] == ["llm"], "never an empty selection"
