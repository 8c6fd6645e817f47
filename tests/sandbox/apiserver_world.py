"""An API server over real HTTPS for tests, and the objects that they put into it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sandbox.apiserver import ApiServer, Identity, TlsFiles, make_tls
from sandbox.apiserver.core import Webhooks
from sandbox.client import ApiError, HttpApi, Kind, Obj
from sandbox.options import REAL

ADMIN, JANE = "admin-token", "jane-token"
TOKENS = {ADMIN: Identity("kubernetes-admin", ("system:masters",)), JANE: Identity("jane")}
WIDGETS = Kind("example.dev", "v1", "widgets", "Widget")


@dataclass(frozen=True, slots=True)
class Cluster:
    server: ApiServer
    url: str
    tls: TlsFiles
    api: HttpApi
    session: aiohttp.ClientSession

    async def raw(self, method: str, path: str, token: str = ADMIN, **more: Any) -> tuple[int, Any]:
        """Status and decoded body of any request."""
        headers = {"Authorization": f"Bearer {token}", **more.pop("headers", {})}
        async with self.session.request(method, self.url + path, headers=headers, **more) as answer:
            return answer.status, await answer.json(content_type=None)


@contextlib.asynccontextmanager
async def cluster(directory: Path, webhooks: Webhooks | None = None) -> AsyncIterator[Cluster]:
    tls = make_tls(directory)
    server = ApiServer(TOKENS, replace(REAL, toleration_seconds=7), webhooks=webhooks)
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"https://127.0.0.1:{sock.getsockname()[1]}"
    trust = ssl.create_default_context(cadata=tls.ca_pem)
    async with (
        server.listening([sock], tls),
        HttpApi(url, ADMIN, tls.ca_pem) as api,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session,
    ):
        yield Cluster(server, url, tls, api, session)


def run(directory: Path, test: Callable[[Cluster], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), cluster(directory) as one:
            await test(one)

    asyncio.run(main())


def pod(name: str, **spec: Any) -> Obj:
    containers = [{"name": "main", "image": "registry.example/app:1"}]
    return {"metadata": {"name": name, "labels": {"app": "web"}}, "spec": {"containers": containers, **spec}}


def configmap(name: str, labels: Obj | None = None, **data: str) -> Obj:
    return {"metadata": {"name": name, "labels": labels or {}}, "data": data}


def crd(schema: Obj | None = None, **version: Any) -> Obj:
    spec = {
        "type": "object",
        "required": ["mode"],
        "properties": {
            "mode": {"type": "string", "enum": ["one", "all"]},
            "size": {"type": "integer", "minimum": 1, "default": 3},
        },
    }
    properties = {"spec": schema or spec, "status": {"type": "object", "properties": {"phase": {"type": "string"}}}}
    root = {"type": "object", "properties": properties}
    return {
        "metadata": {"name": "widgets.example.dev"},
        "spec": {
            "group": "example.dev",
            "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [
                {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": root}, **version}
            ],
        },
    }


async def refused(attempt: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await attempt
    return caught.value
