"""A node's kernel log: following it, and reading NVIDIA's Xid lines in it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

# Line grammar and examples: facts/gpu-and-dr.md.
_XID = re.compile(
    r"NVRM: Xid \((?:PCI:)?(?P<pci>[0-9a-fA-F:.]+)\): (?P<code>\d+)"
    r"(?:, pid=(?P<pid>[^,]*))?(?:, name=(?P<name>[^,]*))?, (?P<message>.*)$"
)


@dataclass(frozen=True, slots=True)
class Xid:
    pci: str
    code: int
    message: str


def xid(line: str) -> Xid | None:
    """The Xid that a kernel-log line reports, if it does."""
    found = _XID.search(line)
    return Xid(found["pci"].lower(), int(found["code"]), found["message"]) if found else None


class Tail:
    """Follows a log file by its name: over its creation, truncation and replacement.

    What the file holds at the start is read only if it was written within the last `lookback` seconds.
    """

    def __init__(self, path: Path, *, lookback: float, poll: float = 0.25) -> None:
        self._path, self._poll = path, poll
        self._inode, self._at, self._rest = 0, 0, b""
        try:
            state = path.stat()
        except FileNotFoundError:
            return
        if time.time() - state.st_mtime > lookback:
            self._inode, self._at = state.st_ino, state.st_size

    def new_lines(self) -> list[str]:
        """The lines completed since the last call."""
        try:
            state = self._path.stat()
        except FileNotFoundError:
            return []
        if state.st_ino != self._inode or state.st_size < self._at:
            self._inode, self._at, self._rest = state.st_ino, 0, b""
        if state.st_size == self._at:
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read(state.st_size - self._at)
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    async def lines(self) -> AsyncIterator[str]:
        """Every line, until cancelled."""
        while True:
            for line in self.new_lines():
                yield line
            await asyncio.sleep(self._poll)
