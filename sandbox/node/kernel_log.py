"""A machine's kernel log: what is written to its /dev/kmsg (a FIFO in containers) goes to /var/log/kern.log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from datetime import datetime

from sandbox.node.volumes import Place

_PRIORITY = re.compile(r"^<\d+>")
_MOST = 16_384  # bytes of one read; the kernel takes records of up to 1 KB


def make(place: Place) -> None:
    """The FIFOs (the machine provider reads `sysrq`) and the directory, before any container can mount them."""
    place.var_log.mkdir(parents=True, exist_ok=True)
    for fifo in (place.kmsg, place.sysrq):
        if not fifo.exists():
            os.mkfifo(fifo)
            fifo.chmod(0o622)
    (place.var_log / "kern.log").touch()


def line(node: str, message: str, *, boot: float = 0.0) -> str:
    """One record as syslog writes the kernel's."""
    up = time.clock_gettime(time.CLOCK_BOOTTIME) - boot
    moment = datetime.now().astimezone().strftime("%b %e %H:%M:%S")
    return f"{moment} {node} kernel: [{up:12.6f}] {_PRIORITY.sub('', message)}\n"


async def run(place: Place, node: str) -> None:
    """Copy until cancelled."""
    make(place)
    # Read and write: the FIFO must neither end when a writer leaves nor block the next one.
    fd = os.open(place.kmsg, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    log = os.open(place.var_log / "kern.log", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    rest = b""

    def copy() -> None:
        nonlocal rest
        with contextlib.suppress(BlockingIOError):
            *lines, rest = (rest + os.read(fd, _MOST)).split(b"\n")
            for raw in lines:
                if text := raw.decode(errors="replace").rstrip("\0 "):
                    os.write(log, line(node, text, boot=boot).encode())

    loop = asyncio.get_running_loop()
    loop.add_reader(fd, copy)
    try:
        await asyncio.Event().wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
        os.close(log)
