"""A process that delays, loses, meters, doubles and spoils the packets that leave a network namespace by one device.

It works without netem: an nft rule forwards the device's outgoing IPv4 packets into a veth pair, whose other end is
read here; what goes on is written to the device again, with a mark that the rule lets pass. Needs the netdev egress
hook (Linux 5.16). Incoming packets and ARP are left alone, as with a qdisc at the root.

It says "ready" on stdout, or one line that says why not, and ends on SIGTERM; what waits in it then is sent at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence

import orjson

from sandbox.chaos import nft
from sandbox.chaos.traffic import Rule, Shape
from sandbox.node import linux
from sandbox.node.netlink import Netlink

MARK = 0x6764
TABLE = "netdev gameday_shape"
_IN, _OUT = "gdshape0", "gdshape1"
_REMOVE = f"add table {TABLE}\ndelete table {TABLE}\n"
_ETH_P_IP = 0x0800
_BUFFER = 8 << 20  # bytes that may wait to be read
_AT_ONCE = 64  # packets read before those that are due are sent
_FRAME = 65_600
_SIOCETHTOOL = 0x8946
_OFFLOADS = (0x17, 0x19, 0x1F, 0x24)  # ETHTOOL_STXCSUM, SSG, STSO, SGSO: what is read must be packets as on a wire


def dump(rules: Sequence[Rule]) -> str:
    return orjson.dumps([rule.dump() for rule in rules]).decode()


def script(rules: Sequence[Rule], device: str) -> str:
    """The nft commands that hand packets over."""
    networks = sorted({network for rule in rules for network, _ in rule.to or ()})
    everything = any(rule.to is None for rule in rules) or "0.0.0.0/0" in networks
    match = "ether type ip" if everything else f"ip daddr {{ {', '.join(networks)} }}"
    return (
        f"{_REMOVE}table {TABLE} {{\n  chain egress {{\n"
        f'    type filter hook egress device "{device}" priority 0; policy accept;\n'
        f'    meta mark {MARK:#x} accept\n    {match} fwd to "{_IN}"\n  }}\n}}\n'
    )


def main(argv: list[str]) -> int:
    """`argv`: the rules (JSON), the device. Runs in the namespace of the device."""
    rules, device = [Rule.load(raw) for raw in orjson.loads(argv[0])], argv[1]
    stop_r, stop_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(stop_w, b"x"))
    signal.set_wakeup_fd(-1)
    try:
        with _diverted(rules, device) as (source, sink):
            _say("ready")
            gc.disable()
            _shape(Shape(rules), source, sink, stop_r)
    except (OSError, nft.NftFailed) as failed:
        _say(f"packets of {device} cannot be shaped: {failed}")
        return 1
    return 0


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, line.replace("\n", " ").encode() + b"\n")


@contextlib.contextmanager
def _diverted(rules: Sequence[Rule], device: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Packets come out of the first socket instead of `device`, and leave by the second. OSError, `NftFailed`."""
    with Netlink() as net:
        net.delete(_IN)
        net.pair(_IN, _OUT)
        for name in (_IN, _OUT):
            _no_offloads(name)
            net.up(name)
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as source,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sink,
    ):
        try:
            source.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:  # an ordinary user's: as much as the machine allows
            source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        source.setblocking(False)
        source.bind((_OUT, _ETH_P_IP))
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        sink.bind((device, 0))
        nft.run(script(rules, device))
        try:
            yield source, sink
        finally:
            nft.run(_REMOVE)
            with Netlink() as net:
                net.delete(_IN)


_SO_RCVBUFFORCE = 33


def _no_offloads(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in _OFFLOADS:
            value = bytearray(struct.pack("II", command, 0))
            address = linux.address_of(value)
            with contextlib.suppress(OSError):  # an offload that the device does not have
                fcntl.ioctl(sock, _SIOCETHTOOL, struct.pack("16sP", name.encode(), address))


def _shape(shape: Shape, source: socket.socket, sink: socket.socket, stop: int) -> None:
    linux.precise_timers()
    while True:
        due = shape.next()
        timeout = None if due is None else max(0.0, due - time.monotonic())
        readable, _, _ = select.select([source.fileno(), stop], [], [], timeout)  # in µs, where epoll has ms
        now = time.monotonic()
        if source.fileno() in readable:
            for _ in range(_AT_ONCE):
                try:
                    shape.take(now, source.recv(_FRAME))
                except BlockingIOError:
                    break
                except OSError:
                    return  # the device has gone, and the pod with it
        stopped = stop in readable
        for frame in shape.ready(float("inf") if stopped else now):
            with contextlib.suppress(OSError):  # as a full or absent device drops it
                sink.send(frame)
        if stopped:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
