"""Plays the real control plane's binaries over the sandbox's own API server and controllers.

Each takes the command line of the binary whose name it has, refuses flags that this binary does not have, and is
found where that is told to be: so everything around the binaries is tested without them, but not the binaries.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sandbox import controllers
from sandbox.apiserver import ApiServer, Identity, TlsFiles
from sandbox.client import HttpApi
from sandbox.options import REAL

ROOT = Path(__file__).parents[2]
# Of the flags that the real ones know, those that matter here (kubernetes.io and etcd.io, command line references).
FLAGS = {
    "etcd": "data-dir listen-client-urls advertise-client-urls listen-peer-urls initial-advertise-peer-urls "
    "initial-cluster unsafe-no-fsync log-level name",
    "kube-apiserver": "etcd-servers bind-address secure-port advertise-address tls-cert-file tls-private-key-file "
    "client-ca-file token-auth-file authorization-mode service-cluster-ip-range service-account-issuer "
    "service-account-key-file service-account-signing-key-file kubelet-preferred-address-types "
    "default-not-ready-toleration-seconds default-unreachable-toleration-seconds allow-privileged",
    "kube-controller-manager": "kubeconfig leader-elect bind-address service-account-private-key-file root-ca-file "
    "node-monitor-period node-monitor-grace-period node-eviction-rate",
    "kube-scheduler": "kubeconfig leader-elect bind-address",
}


def write(directory: Path) -> None:
    """Put the four into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in FLAGS:
        script = directory / name
        script.write_text(f'#!/bin/sh\nexport PYTHONPATH={ROOT}\nexec {sys.executable} -P {__file__} {name} "$@"\n')
        script.chmod(0o755)


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def text(path: str) -> str:
    return Path(path).read_text()


def rows(path: str) -> list[list[str]]:
    return list(csv.reader(text(path).splitlines()))


def etcd(args: argparse.Namespace) -> None:
    Path(args.data_dir).mkdir(parents=True)
    server = socket.create_server(address(args.listen_client_urls))
    while True:
        server.accept()[0].close()


async def connected(where: tuple[str, int]) -> None:
    """As the real one, wait a while for etcd."""
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection(*where)
            except ConnectionRefusedError:
                await asyncio.sleep(0.1)
                continue
            writer.close()
            return


async def apiserver(args: argparse.Namespace) -> None:
    await connected(address(args.etcd_servers))
    tokens = {token: Identity(user, tuple(groups.split(","))) for token, user, _, groups in rows(args.token_auth_file)}
    assert "BEGIN EC PRIVATE KEY" in text(args.service_account_signing_key_file)
    assert "BEGIN PUBLIC KEY" in text(args.service_account_key_file)
    server = ApiServer(tokens, replace(REAL, toleration_seconds=int(args.default_not_ready_toleration_seconds)))
    server.core.kubelet_scheme = "https"  # the real one knows no other
    listening = socket.create_server((args.bind_address, int(args.secure_port)))
    files = TlsFiles(*(Path(path) for path in (args.client_ca_file, args.tls_cert_file, args.tls_private_key_file)))
    async with server.listening([listening], files):
        await asyncio.Event().wait()


async def controller_manager(args: argparse.Namespace) -> None:
    found: Any = yaml.safe_load(text(args.kubeconfig))
    cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
    ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
    assert ca == text(args.root_ca_file)
    seconds = {key: int(getattr(args, key).removesuffix("ms")) / 1000
               for key in ("node_monitor_period", "node_monitor_grace_period")}  # fmt: skip
    clocks = replace(
        REAL,
        node_monitor_period=seconds["node_monitor_period"],
        node_monitor_grace=seconds["node_monitor_grace_period"],
        eviction_per_second=float(args.node_eviction_rate),
    )
    async with HttpApi(cluster["server"], user["token"], ca) as api:
        await controllers.run(api, clocks, root_ca=ca)


async def scheduler(args: argparse.Namespace) -> None:
    """The sandbox's controllers have theirs; this one only stays."""
    assert text(args.kubeconfig)
    await asyncio.Event().wait()


def main(name: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    for flag in FLAGS[name].split():
        parser.add_argument(f"--{flag}", nargs="?")
    args = parser.parse_args(argv)
    if name == "etcd":
        etcd(args)
    play = {"kube-apiserver": apiserver, "kube-controller-manager": controller_manager, "kube-scheduler": scheduler}
    asyncio.run(play[name](args))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
