"""The real control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler as found in a directory.

`gameday up --control-plane DIR` starts these in place of the sandbox's own API server and controllers; nodes, chaos
agent, repair and stack only speak the Kubernetes API and stay as they are. All four run inside the fabric: etcd on its
loopback, the API server at the fabric's gateway, a relay between it and the port on the host's loopback.

Their flags are those of Kubernetes 1.33 to 1.36 (kubernetes.io, command line tools reference) and etcd 3.6.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sandbox.apiserver import Identity, TlsFiles
from sandbox.kubeconfig import write_kubeconfig
from sandbox.node.network import API_PORT, API_URL, GATEWAY
from sandbox.options import Clocks
from sandbox.relay import Relay

ASSETS = "KUBEBUILDER_ASSETS"  # where envtest and its users look for the binaries
NAMES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
SERVICE_RANGE = "10.96.0.0/16"
_ETCD = "http://127.0.0.1:2379"
_ETCD_PEERS = "http://127.0.0.1:2380"
_MASTERS = ("system:masters",)


class Missing(Exception):
    """There is no such control plane; the text is one sentence that says what to do."""


def find(directory: str) -> dict[str, Path]:
    """The four binaries of a directory ("": that of $KUBEBUILDER_ASSETS), by name. Raises `Missing`."""
    named = directory or os.environ.get(ASSETS, "")
    if not named:
        raise Missing(
            f"--control-plane names no directory, and ${ASSETS} is not set: name one that has {_listed(NAMES)}"
        )
    where = Path(named).expanduser().resolve()
    if not where.is_dir():
        raise Missing(f"{where}, meant to hold the control plane's binaries, is not a directory")
    found = {name: where / name for name in NAMES}
    lacking = [name for name, path in found.items() if not os.access(path, os.X_OK) or path.is_dir()]
    if lacking:
        raise Missing(
            f"{where} has no executable {_listed(lacking)}: a control plane needs {_listed(NAMES)} of one release of "
            "Kubernetes (etcd: 3.5.13 or newer)"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass(frozen=True, slots=True)
class Command:
    """One process of the control plane: its name and its whole command line."""

    name: str
    argv: tuple[str, ...]


def prepare(
    binaries: Mapping[str, Path], directory: Path, tls: TlsFiles, tokens: Mapping[str, Identity], clocks: Clocks
) -> list[Command]:
    """Write keys, tokens and kubeconfigs to `directory` (mode 0700); the commands, in the order of their start.

    Callers are known by static tokens, as on the sandbox's own control plane. `tokens` has an identity of group
    system:masters, as which the controller manager and the scheduler work.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    master = next(token for token, who in tokens.items() if who.master)
    _secret(directory / "tokens.csv", _csv(tokens))
    private, public = _keys()
    _secret(directory / "service-accounts.key", private)
    _secret(directory / "service-accounts.pub", public)
    kubeconfig = directory / "kubeconfig"
    write_kubeconfig(kubeconfig, API_URL, tls.ca, master)
    return [
        Command("etcd", (str(binaries["etcd"]), *_etcd(directory))),
        Command("kube-apiserver", (str(binaries["kube-apiserver"]), *_apiserver(directory, tls, clocks))),
        Command(
            "kube-controller-manager",
            (str(binaries["kube-controller-manager"]), *_controllers(directory, kubeconfig, tls, clocks)),
        ),
        Command("kube-scheduler", (str(binaries["kube-scheduler"]), *_scheduler(kubeconfig))),
    ]


def _secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text)


def _csv(tokens: Mapping[str, Identity]) -> str:
    """A token file: token, user, uid, "group,group"."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for token, who in tokens.items():
        rows.writerow([token, who.user, who.uid or who.user, ",".join(who.groups)])
    return text.getvalue()


def _keys() -> tuple[str, str]:
    """(private, public) PEM of the key that signs service accounts' tokens."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


def _etcd(directory: Path) -> list[str]:
    return [
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls={_ETCD}",
        f"--advertise-client-urls={_ETCD}",
        f"--listen-peer-urls={_ETCD_PEERS}",
        f"--initial-advertise-peer-urls={_ETCD_PEERS}",
        f"--initial-cluster=default={_ETCD_PEERS}",
        "--unsafe-no-fsync",  # what it stores ends with the sandbox
        "--log-level=warn",
    ]


def _apiserver(directory: Path, tls: TlsFiles, clocks: Clocks) -> list[str]:
    return [
        f"--etcd-servers={_ETCD}",
        f"--bind-address={GATEWAY}",
        f"--secure-port={API_PORT}",
        f"--advertise-address={GATEWAY}",
        f"--tls-cert-file={tls.cert}",
        f"--tls-private-key-file={tls.key}",
        f"--client-ca-file={tls.ca}",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={directory / 'service-accounts.pub'}",
        f"--service-account-signing-key-file={directory / 'service-accounts.key'}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--default-not-ready-toleration-seconds={clocks.toleration_seconds}",
        f"--default-unreachable-toleration-seconds={clocks.toleration_seconds}",
        "--allow-privileged=true",  # an Xid's Job writes to its node's kernel log
    ]


def _controllers(directory: Path, kubeconfig: Path, tls: TlsFiles, clocks: Clocks) -> list[str]:
    return [
        f"--kubeconfig={kubeconfig}",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
        f"--service-account-private-key-file={directory / 'service-accounts.key'}",
        f"--root-ca-file={tls.ca}",
        f"--node-monitor-period={_duration(clocks.node_monitor_period)}",
        f"--node-monitor-grace-period={_duration(clocks.node_monitor_grace)}",
        f"--node-eviction-rate={clocks.eviction_per_second:g}",
    ]


def _scheduler(kubeconfig: Path) -> list[str]:
    return [f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1"]


def _duration(seconds: float) -> str:
    """As Go reads durations."""
    return f"{round(seconds * 1000)}ms"


def relay(_: list[str]) -> int:
    """The process between the host's port and the API server; the kept descriptor is the listening socket."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sock = socket.socket(fileno=int(os.environ["GAMEDAY_FDS"]))
    uvloop.run(Relay(lambda: [(GATEWAY, API_PORT)]).serve(sock))
    return 1
