"""Container logs: what a container writes, line by line with its time, in one file per container start."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
from aiohttp import web

_LINE = 16_384  # bytes; longer lines are split, as container runtimes do
_FOLLOW_PERIOD = 0.1  # seconds


def stamp() -> str:
    """Now, as the API writes microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class LogWriter:
    """Copies a pipe into a log file; `done` is set when every writer has closed the pipe."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        read, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read, False)
        self._read_fd = read
        self._rest = b""
        self.done = asyncio.Event()
        asyncio.get_running_loop().add_reader(read, self._copy)

    def _copy(self) -> None:
        try:
            chunk = os.read(self._read_fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self.close()
            return
        now = stamp().encode()
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LINE:
            lines.append(self._rest)
            self._rest = b""
        if lines:
            self._file.write(b"".join(b"%s %s\n" % (now, line) for line in lines))

    def started(self) -> None:
        """The writers have their copy: give up ours, so that their end is seen."""
        os.close(self.write_fd)
        self.write_fd = -1

    def close(self) -> None:
        if self.done.is_set():
            return
        asyncio.get_running_loop().remove_reader(self._read_fd)
        os.close(self._read_fd)
        if self.write_fd >= 0:
            self.started()
        if self._rest:
            self._file.write(b"%s %s\n" % (stamp().encode(), self._rest))
        self._file.close()
        self.done.set()


@dataclass(frozen=True, slots=True)
class Source:
    """A container start's log: its file, and whether more may come."""

    path: Path
    live: asyncio.Event | None  # set when the writer is done; None: finished


class NotThere(Exception):
    """No such pod, container or log: the sentence that kubectl shows."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options of a log request (core/v1 PodLogOptions)."""

    follow: bool = False
    previous: bool = False
    timestamps: bool = False
    tail: int | None = None
    limit_bytes: int | None = None
    since: str | None = None  # RFC 3339

    @staticmethod
    def parse(query: dict[str, str]) -> Wanted:
        """Raises ValueError with a sentence."""

        def number(name: str) -> int | None:
            if name not in query:
                return None
            if not query[name].isdigit():
                raise ValueError(f"{name} must be a whole number of at least 0, not {query[name]!r}")
            return int(query[name])

        since = query.get("sinceTime")
        if (seconds := number("sinceSeconds")) is not None:
            since = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
        if since:
            since = (
                datetime.fromisoformat(since.replace("Z", "+00:00")).astimezone(UTC).isoformat(timespec="microseconds")
            )

        def flag(name: str) -> bool:
            return query.get(name, "").lower() in ("true", "1")

        return Wanted(
            flag("follow"), flag("previous"), flag("timestamps"), number("tailLines"), number("limitBytes"), since
        )


async def read(source: Source, wanted: Wanted) -> AsyncIterator[bytes]:
    """The log in pieces of whole lines; with `follow` until the container's writers are gone."""
    left = wanted.limit_bytes
    with source.path.open("rb") as file:
        lines = file.readlines()
        if wanted.since:
            lines = [line for line in lines if line[:26].decode() >= wanted.since[:26]]
        if wanted.tail is not None:
            lines = lines[len(lines) - min(wanted.tail, len(lines)) :]
        while True:
            piece = b"".join(line if wanted.timestamps else line.partition(b" ")[2] for line in lines)
            if left is not None:
                piece, left = piece[:left], left - len(piece)
            if piece:
                yield piece
            if left is not None and left <= 0:
                return
            ended = source.live is None or source.live.is_set()
            lines = file.readlines()
            if lines:
                continue
            if ended or not wanted.follow:
                return
            with contextlib.suppress(TimeoutError):
                assert source.live is not None
                await asyncio.wait_for(source.live.wait(), _FOLLOW_PERIOD)


async def answer(request: web.Request, source: Source) -> web.StreamResponse:
    """Serve one log over HTTP."""
    try:
        wanted = Wanted.parse(dict(request.query))
    except ValueError as bad:
        raise web.HTTPBadRequest(text=str(bad)) from bad
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    with contextlib.suppress(ConnectionError):  # the reader has gone
        await response.prepare(request)
        async for piece in read(source, wanted):
            await response.write(piece)
        await response.write_eof()
    return response


def problem(status: int, message: str) -> web.Response:
    """An error as the API's clients understand it."""
    reason = {400: "BadRequest", 404: "NotFound"}.get(status, "InternalError")
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason}
    return web.Response(status=status, body=orjson.dumps({**body, "code": status}), content_type="application/json")
