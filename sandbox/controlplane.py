"""The sandbox's control plane: API server and controllers in one asyncio process.

`serve` is what the sandbox starts; `python -m sandbox.controlplane --port P --state-dir D` runs it alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import uvloop

from sandbox.apiserver import ApiServer, Identity, TlsFiles, make_tls
from sandbox.apiserver.core import Webhooks
from sandbox.kubeconfig import write_kubeconfig
from sandbox.options import CLOCKS, REAL, Clocks

ADMIN = Identity("kubernetes-admin", ("system:masters",))


async def serve(
    sockets: Sequence[socket.socket],
    *,
    tls: TlsFiles,
    tokens: Mapping[str, Identity],
    clocks: Clocks,
    zones: Sequence[str] = (),
    controllers: bool = True,
    metrics: bool = False,
    prometheus: str = "",
    webhooks: Webhooks | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve the API on bound sockets and run the controllers, until cancelled.

    `ready` is called once requests are answered. `zones` is of no interest to this control plane. `metrics`: nodes
    have kubelets to ask what is used; `prometheus`: where autoscalers find other metrics;
    `webhooks`: what custom objects meet on their way in.
    """
    server = ApiServer(tokens, clocks, metrics=metrics, prometheus=prometheus, webhooks=webhooks)
    async with server.listening(sockets, tls):
        if ready:
            ready()
        if not controllers:
            await asyncio.Event().wait()
        all_controllers = importlib.import_module("sandbox.controllers")  # late: the API must not wait for them
        await all_controllers.run(server.direct(), clocks, root_ca=tls.ca.read_text(), metrics=server.metrics)


def _write_token(path: Path, token: str) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(token + "\n")


async def _main(args: argparse.Namespace) -> None:
    state: Path = args.state_dir
    tls = make_tls(state)
    sock = socket.create_server(("127.0.0.1", args.port))
    url = f"https://127.0.0.1:{sock.getsockname()[1]}"
    token = secrets.token_urlsafe(32)
    _write_token(state / "token", token)
    write_kubeconfig(state / "kubeconfig", url, tls.ca, token)
    clocks = CLOCKS[args.clocks]
    if args.node_monitor_grace is not None:
        clocks = replace(clocks, node_monitor_grace=args.node_monitor_grace)
    if args.node_monitor_period is not None:
        clocks = replace(clocks, node_monitor_period=args.node_monitor_period)
    task = asyncio.create_task(
        serve(
            [sock],
            tls=tls,
            tokens={token: ADMIN},
            clocks=clocks,
            controllers=not args.no_controllers,
            ready=lambda: print(url, flush=True),
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sandbox.controlplane", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0: a free one")
    parser.add_argument("--state-dir", type=Path, required=True, help="where kubeconfig, token and ca.crt are written")
    parser.add_argument("--clocks", choices=sorted(CLOCKS), default=REAL.name)
    parser.add_argument("--node-monitor-grace", type=float, help="seconds")
    parser.add_argument("--node-monitor-period", type=float, help="seconds")
    parser.add_argument("--no-controllers", action="store_true", help="only the API server")
    args = parser.parse_args(argv)
    try:
        uvloop.run(_main(args))
    except OSError as error:
        print(f"control plane: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
