"""Reply records on disk: one JSON object per line, absent fields left out; read while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from gameday.errors import LoadError
from gameday.model import Heartbeat, LoadEnd, Outcome, Reply


def replies_path(out: Path, worker: int) -> Path:
    return out / f"replies.{worker}.jsonl"


def load_path(out: Path, worker: int) -> Path:
    return out / f"load.{worker}.jsonl"


class Writer:
    """Appends lines; what `add` got is on its way to the file after the next `flush`."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644)
        self._lines: list[bytes] = []

    def add(self, line: bytes) -> None:
        self._lines.append(line)

    def flush(self) -> None:
        if not self._lines:
            return
        data = b"".join(self._lines)
        self._lines.clear()
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        self.flush()
        os.close(self._fd)


def event_line(event: Heartbeat | LoadEnd) -> bytes:
    plain = {"kind": event.kind, **{name: getattr(event, name) for name in event.__dataclass_fields__}}
    return orjson.dumps(plain, option=orjson.OPT_APPEND_NEWLINE)


def reply_of(data: dict[str, object]) -> Reply:
    """Raises KeyError, TypeError or ValueError for what is not a reply."""
    fields = dict(data)
    fields["outcome"] = Outcome(str(data["outcome"]))
    fields["itl"] = tuple(data.get("itl") or ())  # type: ignore[arg-type]
    return Reply(**fields)  # type: ignore[arg-type]


def event_of(data: dict[str, object]) -> Heartbeat | LoadEnd:
    fields: dict[str, Any] = {k: v for k, v in data.items() if k != "kind"}
    kinds: dict[object, type[Heartbeat] | type[LoadEnd]] = {"heartbeat": Heartbeat, "load_end": LoadEnd}
    return kinds[data["kind"]](**fields)


class Follower:
    """Reads a file that grows, whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._rest = b""
        self._line = 0

    def lines(self) -> Iterator[dict[str, object]]:
        """What came since the last call. Raises LoadError, with the line, for what is not a JSON object."""
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
        while data := os.read(self._fd, 1 << 20):
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._line += 1
                yield self._parse(line)

    def _parse(self, line: bytes) -> dict[str, object]:
        try:
            data = orjson.loads(line)
        except orjson.JSONDecodeError as e:
            raise LoadError(f"{self._path}, line {self._line}: not JSON: {e}") from e
        if not isinstance(data, dict):
            raise LoadError(f"{self._path}, line {self._line}: not a record")
        return data

    def replies(self) -> Iterator[Reply]:
        for data in self.lines():
            try:
                yield reply_of(data)
            except (KeyError, TypeError, ValueError) as e:
                raise LoadError(f"{self._path}, line {self._line}: not a reply: {e}") from e

    def events(self) -> Iterator[Heartbeat | LoadEnd]:
        for data in self.lines():
            try:
                yield event_of(data)
            except (KeyError, TypeError) as e:
                raise LoadError(f"{self._path}, line {self._line}: not a heartbeat or account: {e}") from e

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
