"""Which instants and which requests a phase is made of. Everything that judges starts here.

`before` is made of requests that ended before the fault; a stream that broke after it belongs to `during`,
whenever it was sent; `after` begins where its phase mark says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from gameday.model import FaultMark, Outcome, Phase, PhaseMark, Reply, Step, Timeline

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Window:
    """Instants from `start` (included) to `end` (excluded)."""

    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start

    def __contains__(self, t: float) -> bool:
        return self.start <= t < self.end


def of(timeline: Timeline, kind: type[T]) -> Iterator[T]:
    """The recorded events of one kind."""
    return (e for e in timeline.events if isinstance(e, kind))


def marks(timeline: Timeline, step: Step) -> list[FaultMark]:
    return sorted((m for m in of(timeline, FaultMark) if m.step is step), key=lambda m: m.t)


def first(timeline: Timeline, step: Step, *, ok_only: bool = False) -> float | None:
    return next((m.t for m in marks(timeline, step) if m.ok or not ok_only), None)


def fault_low(timeline: Timeline) -> float | None:
    """The instant before which the fault cannot have acted: the first harmful request was about to be sent."""
    return first(timeline, Step.APPLY)


def window(timeline: Timeline, phase: Phase) -> Window | None:
    """The phase from its first start mark to its last end mark; None when either is missing.

    `during` begins with the fault, wherever the orchestrator put its mark.
    """
    starts = [m.t for m in of(timeline, PhaseMark) if m.phase is phase and m.edge == "start"]
    ends = [m.t for m in of(timeline, PhaseMark) if m.phase is phase and m.edge == "end"]
    if not starts or not ends or max(ends) <= min(starts):
        return None
    start, end = min(starts), max(ends)
    harm = fault_low(timeline)
    if phase is Phase.DURING and harm is not None and harm < end:
        start = harm
    if phase is Phase.BEFORE and harm is not None and start < harm < end:
        end = harm
    return Window(start, end)


def requests(timeline: Timeline, phase: Phase, cls: str | None = None, zone: str | None = None) -> list[Reply]:
    """The phase's requests that say something about the service, in the order of their intended instants.

    A failed request whose zone we do not know may have been any zone's: it belongs to each.
    """
    span = window(timeline, phase)
    if span is None:
        return []
    harm = fault_low(timeline)
    some = (r for r in chosen(timeline, cls, zone) if _belongs(r, phase, span, harm))
    return sorted(some, key=lambda r: (r.t_intended, r.seq))


def chosen(timeline: Timeline, cls: str | None, zone: str | None = None) -> Iterator[Reply]:
    """All requests of a class and a zone that say something about the service, in whatever order they are recorded."""
    for r in timeline.replies:
        if counted(r) and (cls is None or r.cls == cls) and (zone is None or _in_zone(r, zone)):
            yield r


HANGING = 3.0  # seconds without a sign of life after which a request that we cut off is a failed one


def counted(reply: Reply) -> bool:
    """Whether it says anything about the service.

    One that we cut off at the end does not, unless it had been hanging: else a service that hangs when the load
    stops would take its failures with it.
    """
    if reply.outcome is Outcome.CENSORED and reply.t_start is not None:
        heard = reply.t_last_progress or reply.t_first or reply.t_intended
        return reply.t_end - heard >= HANGING
    return reply.counted


def _belongs(reply: Reply, phase: Phase, span: Window, harm: float | None) -> bool:
    if phase is Phase.BEFORE:
        return reply.t_intended in span and (harm is None or reply.t_end < harm)
    if phase is Phase.DURING and harm is not None and reply.t_intended < harm:
        return not reply.ok and reply.t_end >= harm
    return reply.t_intended in span


def _in_zone(reply: Reply, zone: str) -> bool:
    return reply.zone == zone or (reply.zone is None and not reply.ok)
