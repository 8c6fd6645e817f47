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
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _NEWROUTE = 16, 17, 20, 21, 24
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 10, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_GATEWAY = 5
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

    def bridge(self, name: str) -> None:
        info = _attr(_IFLA_LINKINFO, _attr(_INFO_KIND, b"bridge"))
        self._ask(_NEWLINK, _link() + _name(name) + info, _CREATE | _EXCL)

    def veth(self, name: str, master: str, peer: str, peer_netns: int, peer_mac: str) -> None:
        """A pair: `name` here, up and in the bridge `master`; `peer` in the namespace of the fd `peer_netns`."""
        other = _link() + _name(peer) + _attr(_IFLA_NET_NS_FD, struct.pack("=I", peer_netns))
        other += _attr(_IFLA_ADDRESS, _mac(peer_mac))
        info = _attr(_INFO_KIND, b"veth") + _attr(_INFO_DATA | _NLA_NESTED, _attr(_VETH_PEER | _NLA_NESTED, other))
        body = _link(up=True) + _name(name) + _attr(_IFLA_MASTER, struct.pack("=I", socket.if_nametoindex(master)))
        self._ask(_NEWLINK, body + _attr(_IFLA_LINKINFO | _NLA_NESTED, info), _CREATE | _EXCL)

    def delete(self, name: str) -> None:
        """Remove a link; one that is not there is fine (it goes with its peer's namespace)."""
        try:
            index = socket.if_nametoindex(name)
            self._ask(_DELLINK, _link(index))
        except OSError as gone:
            if gone.errno not in (errno.ENODEV, errno.ENXIO, errno.EINVAL):
                raise

    def address(self, name: str, cidr: str) -> None:
        """Give `name` an IPv4 address; one that it has is fine."""
        self._change(_NEWADDR, name, cidr, _CREATE | _EXCL, errno.EEXIST)

    def remove_address(self, name: str, cidr: str) -> None:
        self._change(_DELADDR, name, cidr, 0, errno.EADDRNOTAVAIL)

    def _change(self, kind: int, name: str, cidr: str, flags: int, fine: int) -> None:
        interface = ipaddress.ip_interface(cidr)
        packed = interface.ip.packed
        body = struct.pack("=BBBBI", socket.AF_INET, interface.network.prefixlen, 0, 0, socket.if_nametoindex(name))
        try:
            self._ask(kind, body + _attr(_IFA_LOCAL, packed) + _attr(_IFA_ADDRESS, packed), flags)
        except OSError as known:
            if known.errno != fine:
                raise

    def default_route(self, gateway: str) -> None:
        route = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 4, 0, 1, 0)  # table main, proto static
        self._ask(_NEWROUTE, route + _attr(_RTA_GATEWAY, socket.inet_aton(gateway)), _CREATE | _EXCL)
