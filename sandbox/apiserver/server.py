"""Puts the parts together: an API server on given sockets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from sandbox.apiserver import bootstrap, subresources, usage
from sandbox.apiserver.authn import Identity, Tokens
from sandbox.apiserver.core import Core, Webhooks
from sandbox.apiserver.direct import DirectApi
from sandbox.apiserver.http import Handler
from sandbox.apiserver.rbac import Rules
from sandbox.apiserver.tls import TlsFiles
from sandbox.metrics import Metrics
from sandbox.options import COMPRESSED, Clocks

SHUTDOWN_SECONDS = 0.2  # watches never end by themselves


class ApiServer:
    """The API without its sockets. `direct()` is an in-process client with all rights."""

    def __init__(
        self,
        tokens: Mapping[str, Identity],
        clocks: Clocks = COMPRESSED,
        *,
        metrics: bool = False,
        prometheus: str = "",
        webhooks: Webhooks | None = None,
    ) -> None:
        """`metrics`: serve metrics.k8s.io from the kubelets. `prometheus`: its URL, for autoscalers; "": none.

        `webhooks`: what custom objects meet on their way in.
        """
        self.core = Core(clocks, webhooks)
        self.metrics = Metrics(lambda: usage.kubelets(self.core), prometheus) if metrics else None
        self._resources = usage.ResourceMetrics(self.core, self.metrics) if self.metrics else None
        self.tokens = Tokens(tokens, lambda claims: subresources.token_alive(self.core, claims))
        self.rules = Rules(self.core)
        bootstrap.objects(self.core)

    def direct(self) -> DirectApi:
        return DirectApi(self.core, self.tokens)

    @asynccontextmanager
    async def listening(self, sockets: Sequence[socket.socket], tls: TlsFiles) -> AsyncIterator[None]:
        """Serve HTTPS on sockets that are bound already, while the context lasts."""
        bootstrap.root_certificate(self.core, tls.ca_pem)
        handler = Handler(self.core, self.tokens, self.rules, self._resources)
        server = web.Server(handler, access_log=None, keepalive_timeout=300)
        runner = web.ServerRunner(server, shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        context = tls.context()
        for sock in sockets:
            await web.SockSite(runner, sock, ssl_context=context, backlog=512).start()
        try:
            yield
        finally:
            await runner.cleanup()
