"""Just enough rtnetlink to build bridges, veth pairs, addresses and routes.

One socket, one request, one acknowledgement, no event loop and no threads: a veth pair into another
namespace costs well under a millisecond, and it may be called between two `setns` of an asyncio process.

Errors: `OSError` with the kernel's errno. Sources: rtnetlink(7), linux/if_link.h.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from types import TracebackType

_NLMSG_ERROR = 2
_NEWLINK, _DELLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 16, 17, 20, 24, 28
_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 10, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_IFF_UP = 1
_NLA_NESTED = 0x8000


def _attr(kind: int, value: bytes) -> bytes:
    size = 4 + len(value)
    return struct.pack("=HH", size, kind) + value + bytes(-size % 4)


def _link(index: int = 0, *, up: bool = False) -> bytes:
    flag = _IFF_UP if up else 0
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flag, flag)


def _name(name: str) -> bytes:
    return _attr(_IFLA_IFNAME, name.encode() + b"\0")


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


class Netlink:
    """A route socket of the network namespace in which it is opened. A context manager."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sock.bind((0, 0))
        self._seq = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._sock.close()

    def _ask(self, kind: int, body: bytes, flags: int = 0) -> None:
        self._seq += 1
        head = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, self._seq, 0)
        self._sock.send(head + body)
        while True:
            answer = self._sock.recv(65536)
            _, answered, _, seq, _ = struct.unpack_from("=IHHII", answer)
            if answered == _NLMSG_ERROR and seq == self._seq:
                (code,) = struct.unpack_from("=i", answer, 16)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return

    def up(self, name: str) -> None:
        self._ask(_NEWLINK, _link(socket.if_nametoindex(name), up=True))

    def down(self, name: str) -> None:
        self._ask(_NEWLINK, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, _IFF_UP))

    def bridge(self, name: str, mac: str) -> None:
        """With a MAC of its own: otherwise it takes that of its least port, and changes it with its ports."""
        info = _attr(_IFLA_LINKINFO, _attr(_INFO_KIND, b"bridge"))
        self._ask(_NEWLINK, _link() + _name(name) + _attr(_IFLA_ADDRESS, _mac(mac)) + info, _CREATE | _EXCL)

    def veth(self, name: str, peer: str, peer_netns: int, peer_mac: str, *, master: str = "") -> None:
        """A pair: `name` here, up and in the bridge `master` if any; `peer` in the namespace of the fd `peer_netns`."""
        other = _link() + _name(peer) + _attr(_IFLA_NET_NS_FD, struct.pack("=I", peer_netns))
        other += _attr(_IFLA_ADDRESS, _mac(peer_mac))
        info = _attr(_INFO_KIND, b"veth") + _attr(_INFO_DATA | _NLA_NESTED, _attr(_VETH_PEER | _NLA_NESTED, other))
        body = _link(up=True) + _name(name)
        if master:
            body += _attr(_IFLA_MASTER, struct.pack("=I", socket.if_nametoindex(master)))
        self._ask(_NEWLINK, body + _attr(_IFLA_LINKINFO | _NLA_NESTED, info), _CREATE | _EXCL)

    def pair(self, name: str, peer: str) -> None:
        """Both ends of a veth pair here, down."""
        other = _link() + _name(peer)
        info = _attr(_INFO_KIND, b"veth") + _attr(_INFO_DATA | _NLA_NESTED, _attr(_VETH_PEER | _NLA_NESTED, other))
        self._ask(_NEWLINK, _link() + _name(name) + _attr(_IFLA_LINKINFO | _NLA_NESTED, info), _CREATE | _EXCL)

    def delete(self, name: str) -> None:
        """Remove a link; one that is not there is fine (it goes with its peer's namespace)."""
        try:
            index = socket.if_nametoindex(name)
        except OSError:  # its errno is not set before Python 3.12
            return
        try:
            self._ask(_DELLINK, _link(index))
        except OSError as gone:
            if gone.errno not in (errno.ENODEV, errno.ENXIO, errno.EINVAL):
                raise

    def address(self, name: str, cidr: str) -> None:
        """Give `name` an IPv4 address; one that it has is fine."""
        interface = ipaddress.ip_interface(cidr)
        packed = interface.ip.packed
        body = struct.pack("=BBBBI", socket.AF_INET, interface.network.prefixlen, 0, 0, socket.if_nametoindex(name))
        try:
            self._ask(_NEWADDR, body + _attr(_IFA_LOCAL, packed) + _attr(_IFA_ADDRESS, packed), _CREATE | _EXCL)
        except OSError as known:
            if known.errno != errno.EEXIST:
                raise

    def route(self, to: str, device: str, *, via: str = "", source: str = "") -> None:
        """Send `to` (CIDR) through `device`, by the router `via` or else directly; replaces one that is there."""
        network = ipaddress.ip_network(to)
        scope = _SCOPE_UNIVERSE if via else _SCOPE_LINK
        head = struct.pack("=BBBBBBBBI", socket.AF_INET, network.prefixlen, 0, 0, 254, 4, scope, 1, 0)  # main, static
        body = head + _attr(_RTA_OIF, struct.pack("=I", socket.if_nametoindex(device)))
        if network.prefixlen:
            body += _attr(_RTA_DST, network.network_address.packed)
        if via:
            body += _attr(_RTA_GATEWAY, socket.inet_aton(via))
        if source:
            body += _attr(_RTA_PREFSRC, socket.inet_aton(source))
        self._ask(_NEWROUTE, body, _CREATE | _REPLACE)

    def neighbour(self, device: str, address: str, mac: str) -> None:
        """Who has `address`, for good: it is never asked for."""
        index = socket.if_nametoindex(device)
        body = struct.pack("=BxxxiHBB", socket.AF_INET, index, _NUD_PERMANENT, 0, 0)
        body += _attr(_NDA_DST, socket.inet_aton(address)) + _attr(_NDA_LLADDR, _mac(mac))
        self._ask(_NEWNEIGH, body, _CREATE | _REPLACE)
