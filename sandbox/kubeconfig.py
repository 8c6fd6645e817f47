"""Kubeconfig files, as every client of Kubernetes reads them."""

from __future__ import annotations

import base64
from pathlib import Path

import yaml

CONTEXT = "gameday-sandbox"


def write_kubeconfig(path: Path, url: str, ca: Path, token: str, namespace: str = "default") -> None:
    """A kubeconfig (mode 0600) with the CA inlined."""
    authority = base64.b64encode(ca.read_bytes()).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": CONTEXT,
        "clusters": [{"name": CONTEXT, "cluster": {"server": url, "certificate-authority-data": authority}}],
        "users": [{"name": CONTEXT, "user": {"token": token}}],
        "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": CONTEXT, "namespace": namespace}}],
    }
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
