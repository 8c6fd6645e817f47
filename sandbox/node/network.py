"""The fabric: one bridge in a network namespace of its own, without a route out; one namespace per pod on it."""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.node.linux import in_netns, new_netns
from sandbox.node.netlink import Netlink

BRIDGE = "gd0"
GATEWAY = "10.244.0.1"
API_PORT = 6443
API_URL = f"https://{GATEWAY}:{API_PORT}"
POD_BITS = 16
KUBELET_PORT = 10250


def build_fabric() -> None:
    """Inside a fresh network namespace: loopback, the bridge and its address."""
    _no_ipv6()
    with Netlink() as net:
        net.up("lo")
        net.bridge(BRIDGE)
        net.address(BRIDGE, f"{GATEWAY}/{POD_BITS}")
        net.up(BRIDGE)
    # With br_netfilter loaded, bridged packets would walk through the host's iptables chains.
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/bridge/bridge-nf-call-iptables").write_text("0")


def node_address(index: int) -> str:
    return f"10.245.{index // 250}.{index % 250 + 1}"


def pod_cidr(index: int) -> str:
    return f"10.244.{index}.0/24"


def add_node_address(index: int) -> None:
    with Netlink() as net:
        net.address(BRIDGE, f"{node_address(index)}/32")


def _no_ipv6() -> None:
    # Duplicate address detection would delay and chatter; nothing here speaks IPv6.
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")


@dataclass(slots=True)
class PodNet:
    """A pod's network namespace; it outlives its containers, as a pause container's does."""

    fd: int
    ip: str
    veth: str

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class PodNetworks:
    """Makes pod networks for one node, each with the next address of the node's /24."""

    index: int
    _next: itertools.count[int] = field(default_factory=itertools.count)

    def create(self) -> PodNet:
        """A namespace with `lo` and `eth0`. Call from a process in the fabric; takes 1–5 ms."""
        number = next(self._next)
        host = 2 + number % 250
        ip = f"10.244.{self.index}.{host}"
        veth = f"gd{self.index}.{number}"
        fd = new_netns()
        with Netlink() as net:
            # The MAC follows the address (as CNI's bridge plugin does), so that no neighbour table goes stale.
            net.veth(veth, BRIDGE, "eth0", fd, f"0a:58:0a:f4:{self.index:02x}:{host:02x}")
        with in_netns(fd):
            _no_ipv6()
            with Netlink() as net:
                net.up("lo")
                net.address("eth0", f"{ip}/{POD_BITS}")
                net.up("eth0")
                net.default_route(GATEWAY)
        return PodNet(fd, ip, veth)

    def destroy(self, pod: PodNet) -> None:
        """Cut the pod off at once, even if a process lingers in the namespace."""
        with Netlink() as net:
            net.delete(pod.veth)
        pod.close()
