"""The judge of everything under deploy/prometheus: Prometheus's own promtool."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy" / "prometheus").glob("*.yaml"))
UNPACKED = Path(__file__).parents[2] / ".tools/prometheus/usr/bin"  # where `make test` unpacks Debian's package


def binary() -> str:
    beside = Path(os.environ.get("PROMETHEUS_BIN", "")).parent
    found = shutil.which("promtool") or shutil.which("promtool", path=f"{beside}{os.pathsep}{UNPACKED}")
    if found is None:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary(), *map(str, command)], capture_output=True, text=True, check=False, timeout=120)


def check(tmp_path: Path, queries: list[str]) -> None:
    """Does Prometheus parse all of them?"""
    path = tmp_path / "queries.yaml"
    rules = [{"record": f"q:{i}", "expr": query} for i, query in enumerate(queries)]
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = run("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(queries)} rules found" in done.stdout


def test_rules(tmp_path: Path, *tests: dict[str, Any], every: str = "1m") -> subprocess.CompletedProcess[str]:
    """Run unit tests over all rules, evaluated `every` so often."""
    path = tmp_path / "tests.yaml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(p) for p in RULES], "evaluation_interval": every, "tests": tests})
    )
    return run("test", "rules", path)


test_rules.__test__ = False  # type: ignore[attr-defined]
