"""The chaos controller against what Chaos Mesh's own did in the same scenarios (2.8 line, on Kubernetes 1.36)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import chaos_scenarios
import pytest
from chaos_world import world

from sandbox.chaos import webhooks

RECORDED = json.loads(chaos_scenarios.RECORDED.read_text())


@pytest.mark.parametrize("name", chaos_scenarios.SCENARIOS)
def test_the_controller_does_as_chaos_meshs_own(tmp_path: Path, name: str) -> None:
    async def main() -> list[chaos_scenarios.Obj]:
        async with world(tmp_path, webhooks.admit) as one:
            return await chaos_scenarios.play(one.api, name)

    seen = json.loads(json.dumps(asyncio.run(main())))
    for ours, theirs in zip(seen, RECORDED[name], strict=True):
        assert ours == theirs
