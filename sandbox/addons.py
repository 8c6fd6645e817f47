"""The sandbox's actors that only speak to the API: chaos controller, node repair, DNS, discovery, load balancer."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
import uvloop

from sandbox import dns, prometheus, repair
from sandbox.chaos import controller
from sandbox.client import SERVICES, ApiError, HttpApi
from sandbox.discovery import Discovery
from sandbox.node.network import API_URL, DNS_ADDRESS, DNS_PORT, OUTSIDE
from sandbox.options import Clocks
from sandbox.relay import Endpoints, Relay

log = logging.getLogger(__name__)

NAMESPACE, SERVICE = "llm", "gateway"


@dataclass(frozen=True, slots=True)
class Config:
    token: str
    ca: str
    clocks: Clocks

    def dump(self) -> str:
        return orjson.dumps(self).decode()

    @staticmethod
    def load(text: str) -> Config:
        fields = orjson.loads(text)
        return Config(fields["token"], fields["ca"], Clocks(**fields["clocks"]))


async def _announce(api: HttpApi, port: int) -> None:
    """Tell where the load balancer listens, as a cloud's controller does."""
    status = {"loadBalancer": {"ingress": [{"ip": "127.0.0.1", "ports": [{"port": port, "protocol": "TCP"}]}]}}
    while True:
        try:
            await api.patch(SERVICES, SERVICE, {"status": status}, NAMESPACE, sub="status")
            return
        except ApiError as early:
            log.debug("load balancer status: %s", early)
            await asyncio.sleep(1)


async def _run(config: Config, target: socket.socket, prometheus_sock: socket.socket) -> None:
    async with HttpApi(API_URL, config.token, config.ca, user_agent="gameday-addons") as api:
        endpoints = Endpoints(api, NAMESPACE, SERVICE)
        work: list[Coroutine[Any, Any, None]] = [
            controller.run(api),  # its definitions are installed by the supervisor
            repair.run(api, config.clocks),
            dns.Server(api).serve(DNS_ADDRESS, DNS_PORT),
            Discovery(api).serve("127.0.0.1", prometheus.DISCOVERY_PORT),
            endpoints.run(),
            Relay(lambda: endpoints.ready, OUTSIDE).serve(target),
            Relay(lambda: [("127.0.0.1", prometheus.PORT)]).serve(prometheus_sock),
            _announce(api, target.getsockname()[1]),
        ]
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item)


def main(argv: list[str]) -> int:
    """The addons' process. `argv[0]` is a `Config`; the kept descriptors are the target's and Prometheus' sockets."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    target, prometheus_sock = (socket.socket(fileno=int(fd)) for fd in os.environ["GAMEDAY_FDS"].split(","))
    uvloop.run(_run(Config.load(argv[0]), target, prometheus_sock))
    return 1
