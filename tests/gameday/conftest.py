"""A real control plane (the sandbox's, without nodes) for tests of what speaks to a cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gameday import clock
from gameday.cluster import Cluster, ClusterError
from gameday.kinds import NAMESPACES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    state = tmp_path_factory.mktemp("control-plane")
    command = [sys.executable, "-m", "sandbox.controlplane", "--port", "0", "--state-dir", str(state)]
    with (state / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    path = state / "kubeconfig"
    try:
        told = state / "log"
        clock.wait_until(
            lambda: "https://" in told.read_text() or process.poll() is not None, within=20, what="its URL"
        )
        assert process.poll() is None, told.read_text()
        cluster = Cluster.connect(context="gameday-sandbox", kubeconfig=path, namespace="llm")
        clock.wait_until(lambda: _answers(cluster), within=20, what="an answering API server")
        cluster.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}})
        yield path
    finally:
        process.terminate()
        process.wait(timeout=10)


def _answers(cluster: Cluster) -> bool:
    try:
        return bool(cluster.version())
    except ClusterError:
        return False


@pytest.fixture
def cluster(kubeconfig: Path) -> Cluster:
    return Cluster.connect(context="gameday-sandbox", kubeconfig=kubeconfig, namespace="llm")
