from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import synthetic


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two experiments that were judged, one of them with hostile names, and one that died."""
    root = tmp_path_factory.mktemp("runs") / "20261124-090000-7419"
    synthetic.write(root / "zone_outage", synthetic.timeline())
    synthetic.write(root / "hostile", synthetic.timeline(evil=True))
    dead = synthetic.write(root / "gpu_xid", synthetic.timeline())
    (dead / "verdict.json").unlink()
    (dead / "seal.json").unlink()
    return root
