"""A pod's own way to the API server: environment and service-account files, as every in-cluster client has it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from sandbox.client import HttpApi

ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REREAD_SECONDS = 30.0


class NotInCluster(Exception):
    """The environment or the service account of a pod is missing."""


def server() -> str:
    """The API server's URL. `GAMEDAY_API_URL` overrides it (for tests outside a pod)."""
    if url := os.environ.get("GAMEDAY_API_URL"):
        return url
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise NotInCluster("KUBERNETES_SERVICE_HOST is not set: this program runs in a pod.")
    return f"https://{host}:{port}"


def account_dir() -> Path:
    return Path(os.environ.get("GAMEDAY_ACCOUNT_DIR", ACCOUNT_DIR))


def token() -> str:
    path = account_dir() / "token"
    try:
        return path.read_text().strip()
    except OSError as missing:
        raise NotInCluster(f"No service-account token at {path}: {missing.strerror}.") from missing


@contextlib.asynccontextmanager
async def connect(user_agent: str) -> AsyncIterator[HttpApi]:
    """An API client with the pod's rights. Raises NotInCluster."""
    ca = account_dir() / "ca.crt"
    async with HttpApi(server(), token(), ca.read_text() if ca.exists() else None, user_agent) as api:
        yield api


async def token_changed() -> None:
    """Returns when the kubelet has renewed the token: clients read it only once."""
    known = token()
    while True:
        await asyncio.sleep(REREAD_SECONDS)
        with contextlib.suppress(NotInCluster):  # seen while the file is being replaced
            if token() != known:
                return
