"""The figures on recovery time that we claim hold on a small sample (the benchmark takes hundreds)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import calibration


@pytest.mark.parametrize(("share", "runs"), [(1.0, 25), (1 / 6, 25), (2 / 3, 25)])
def test_intervals_cover_planted_outages(share: float, runs: int) -> None:
    rng = random.Random(20)
    found = calibration.figures("sample", [calibration.draw(rng, share, 0.0) for _ in range(runs)])
    assert found.covered >= (runs - 1) / runs, found.missed
    if share == 1.0:
        assert found.error_p99 <= 0.05


def test_the_naive_definition_does_not_cover_partial_outages() -> None:
    rng = random.Random(20)
    found = calibration.figures("sample", [calibration.draw(rng, 1 / 3, 0.0) for _ in range(25)])
    assert found.naive_covered < 0.7 < found.covered
