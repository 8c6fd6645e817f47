"""The daemon's side of shapers: one process per pod whose traffic is controlled (`shaper`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from sandbox.chaos import shaper
from sandbox.chaos.traffic import Rule

T = TypeVar("T")
READY_SECONDS = 10.0  # for a shaper to be at work
END_SECONDS = 2.0  # for it to end by itself


class CannotShape(Exception):
    """The shaper is not at work; the text says why."""


class Process(Protocol):
    """A shaper that runs."""

    async def wait(self) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


# Starts shaper.main with these arguments in the network namespace of the first descriptor; its stdout is the second.
Launch = Callable[[int, Sequence[str], int], Awaitable[Process]]


class Shaping:
    """The traffic control of one namespace."""

    def __init__(self, launch: Launch, on_death: Callable[[], None]) -> None:
        self._launch, self._on_death = launch, on_death
        self._rules: Sequence[Rule] = ()
        self._process: Process | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def sound(self) -> bool:
        """Whether what was realised still is."""
        return not self._rules or self._process is not None

    async def realise(self, netns: int, rules: Sequence[Rule], device: str = "eth0") -> None:
        """Make the namespace's traffic control exactly `rules`; a change drops nothing but order. `CannotShape`."""
        if rules == self._rules and self.sound:
            return
        await self.end()
        if not rules:
            return
        process, said = await started(lambda write: self._launch(netns, [shaper.dump(rules), device], write))
        if said != "ready":
            process.kill()
            await process.wait()
            raise CannotShape(said or "the traffic shaper does not start")
        self._rules, self._process = rules, process
        self._watch = asyncio.create_task(self._mind(process))

    async def _mind(self, process: Process) -> None:
        await process.wait()
        self._process = None
        self._on_death()

    async def end(self) -> None:
        """Let traffic go as it will. Safe to repeat."""
        process, self._process, self._rules = self._process, None, ()
        if self._watch:
            self._watch.cancel()
            self._watch = None
        if process is None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def started(start: Callable[[int], Awaitable[T]]) -> tuple[T, str]:
    """(what `start` gave, the first line that it writes to the descriptor it was handed)."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        given = await start(write)
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    return given, await _line_of(read)


async def _line_of(fd: int) -> str:
    """The first line of what a process says, "" when it says nothing in time; closes the descriptor."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb"))
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS):
                return (await reader.readline()).decode(errors="replace").strip()
        return ""
    finally:
        transport.close()
