"""The control plane against transcripts of a real one: all that is required passes, and what differs is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORACLE = ROOT.parent / "shared" / "oracle" / "oracle.py"
# Scenarios that differ, and the sentence with which the sandbox says so.
REFUSED = {
    "crd-cel-rules": "CEL rules are not supported",
    "crd-invalid": "CEL rules are not supported",
}


@pytest.mark.skipif(not ORACLE.exists(), reason="the oracle's transcripts do not lie beside this checkout")
def test_the_control_plane_answers_as_a_real_one() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: `gameday up --bare` makes namespaces")
    command = [sys.executable, str(ROOT / "scripts" / "oracle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    for block in ("\n" + done.stdout).split("\nFAIL  ")[1:]:
        name = block.split()[0]
        assert name in REFUSED, f"{name} differs, and nobody said that it may:\n{block[:4000]}"
        assert REFUSED[name] in block, f"{name} differs in silence:\n{block[:4000]}"
