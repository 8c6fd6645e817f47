"""The network: the fabric is the region's router, without a route out; a machine is a namespace on it, a pod one on its
machine.

    pod eth0 10.244.N.x/32 ── machine (10.244.N.1, 10.245.0.n) ── eth0 ── bridge gd0 in the fabric (10.245.0.1)

Every packet of a pod is routed by its machine, also to a neighbour, so that Services can be translated there
(`services`), and a machine's one link is all that has to be cut for it to fall silent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.node import linux
from sandbox.node.linux import in_netns, new_netns
from sandbox.node.netlink import Netlink

BRIDGE = "gd0"
UPLINK = "eth0"
POD_BRIDGE = "cni0"  # has no ports: what is sent to a pod that is gone finds no neighbour, as on CNI's bridge
ROUTER = "10.245.0.1"
NODE_BITS = 16
GATEWAY = "10.244.0.1"  # the API server's own address
API_PORT = 6443
API_URL = f"https://{GATEWAY}:{API_PORT}"
DNS_ADDRESS, DNS_PORT = "10.244.0.10", 53  # of no machine, as the API server's
OUTSIDE = "203.0.113.1"  # where the clients of the load balancer seem to be: neither pod nor machine
KUBELET_PORT = 10250


def build_fabric() -> None:
    """Inside a fresh network namespace: loopback, the bridge, its addresses, and forwarding between its ports."""
    _no_ipv6()
    _forward()
    with Netlink() as net:
        net.up("lo")
        net.bridge(BRIDGE, "0a:58:0a:f5:00:01")
        net.address(BRIDGE, f"{ROUTER}/{NODE_BITS}")
        for address in (GATEWAY, DNS_ADDRESS, OUTSIDE):
            net.address(BRIDGE, f"{address}/32")
        net.up(BRIDGE)
    # With br_netfilter loaded, bridged packets would walk through the host's iptables chains.
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/bridge/bridge-nf-call-iptables").write_text("0")


def node_address(index: int) -> str:
    return f"10.245.{index // 250}.{index % 250 + 1}"


def pod_cidr(index: int) -> str:
    return f"10.244.{index}.0/24"


def pod_gateway(index: int) -> str:
    """The machine's address towards its pods, from which the kubelet probes them."""
    return f"10.244.{index}.1"


def _node_mac(index: int) -> str:
    high, low = divmod(index, 250)
    return f"0a:58:0a:f5:{high:02x}:{low + 1:02x}"


def join_fabric(index: int) -> None:
    """Move this process (of one thread) from the fabric into a namespace of its own: a machine's, wired to it."""
    fabric = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    linux.unshare(linux.CLONE_NEWNET)
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    address, mac = node_address(index), _node_mac(index)
    with in_netns(fabric), Netlink() as net:
        net.delete(f"n{index}")  # of an earlier life of this machine
        net.veth(f"n{index}", UPLINK, own, mac, master=BRIDGE)
        # Permanent: what is sent to a machine that is off vanishes; no router tells the sender that it is gone.
        net.neighbour(BRIDGE, address, mac)
        net.route(pod_cidr(index), BRIDGE, via=address)
    _no_ipv6()
    _forward()
    with Netlink() as net:
        net.up("lo")
        net.address(UPLINK, f"{address}/{NODE_BITS}")
        net.up(UPLINK)
        net.route("0.0.0.0/0", UPLINK, via=ROUTER)
        net.bridge(POD_BRIDGE, f"0a:58:0a:f4:{index:02x}:01")
        net.address(POD_BRIDGE, f"{pod_gateway(index)}/24")
        net.up(POD_BRIDGE)
    os.close(fabric)
    os.close(own)


def fall_silent() -> None:
    """Cut this machine's link: nothing that ends on it from now on is heard of."""
    with Netlink() as net:
        net.down(UPLINK)


def _no_ipv6() -> None:
    # Duplicate address detection would delay and chatter; nothing here speaks IPv6.
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")


def _forward() -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for scope in ("all", "default"):  # packets leave by the interface by which they came; that is no detour
        Path(f"/proc/sys/net/ipv4/conf/{scope}/send_redirects").write_text("0")


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
    """Makes pod networks for one machine, each with the next address of the machine's /24."""

    index: int
    memory: Path  # a file: a machine that boots again does not give the addresses out anew
    _next: itertools.count[int] = field(init=False)

    def __post_init__(self) -> None:
        self._next = itertools.count(int(self.memory.read_text()) if self.memory.exists() else 0)

    def create(self) -> PodNet:
        """A namespace with `lo` and `eth0`. Call from a process of the machine; takes 1–5 ms."""
        number = next(self._next)
        self.memory.write_text(str(number + 1))
        host = 2 + number % 250
        ip, gateway = f"10.244.{self.index}.{host}", pod_gateway(self.index)
        veth = f"gd{number}"
        fd = new_netns()
        with Netlink() as net:
            # The MAC follows the address (as CNI's bridge plugin does), so that no neighbour table goes stale.
            net.veth(veth, "eth0", fd, f"0a:58:0a:f4:{self.index:02x}:{host:02x}")
            net.route(f"{ip}/32", veth, source=gateway)
        with in_netns(fd):
            _no_ipv6()
            with Netlink() as net:
                net.up("lo")
                net.address("eth0", f"{ip}/32")
                net.up("eth0")
                net.route(f"{gateway}/32", "eth0")
                net.route("0.0.0.0/0", "eth0", via=gateway)
        return PodNet(fd, ip, veth)

    def destroy(self, pod: PodNet) -> None:
        """Cut the pod off at once, even if a process lingers in the namespace."""
        with Netlink() as net:
            net.delete(pod.veth)
        pod.close()
