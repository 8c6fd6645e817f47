"""The chaos controller against what Chaos Mesh's own did in the same scenarios (2.8 line, on Kubernetes 1.36)."""

from __future__ import annotations

import asyncio
import json

import chaos_scenarios
import pytest
from chaos_scenarios import Obj
from chaos_world import world

from sandbox.chaos import webhooks

RECORDED = json.loads(chaos_scenarios.RECORDED.read_text())


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Obj] | BaseException]:
    """What each scenario shows here, or why it broke off; they mostly wait, so all at once."""

    async def main() -> list[list[Obj] | BaseException]:
        async with world(tmp_path_factory.mktemp("oracle"), webhooks.admit) as one:
            plays = (chaos_scenarios.play(one.api, name) for name in chaos_scenarios.SCENARIOS)
            return await asyncio.gather(*plays, return_exceptions=True)

    return dict(zip(chaos_scenarios.SCENARIOS, asyncio.run(main()), strict=True))


@pytest.mark.parametrize("name", chaos_scenarios.SCENARIOS)
def test_the_controller_does_as_chaos_meshs_own(played: dict[str, list[Obj] | BaseException], name: str) -> None:
    seen = played[name]
    if isinstance(seen, BaseException):
        raise seen
    for ours, theirs in zip(json.loads(json.dumps(seen)), RECORDED[name], strict=True):
        assert ours == theirs
