"""What people write about when to stop and when not to start, as values: thresholds on PromQL, freeze windows.

Pure: parsed and compared here, asked elsewhere.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_THRESHOLD = re.compile(
    r"(?P<query>.+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<limit>[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*", re.S
)
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_WEEKLY = re.compile(r"(\w{3}) (\d\d):(\d\d) ?- ?(\w{3}) (\d\d):(\d\d)")


@dataclass(frozen=True, slots=True)
class Threshold:
    """A PromQL expression and the limit beyond which it must not go: `histogram_quantile(…) > 2.5`.

    The comparison is ours, not Prometheus's: there it would answer nothing both when all is well and when the metric
    is missing, and a missing metric must never look like a good one.
    """

    query: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Raises `ValueError` where the text does not end in a comparison with a number."""
        found = _THRESHOLD.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"{text!r} must end in a comparison with a number, as in 'sum(up) < 3'")
        return cls(found["query"], found["sign"], float(found["limit"]))

    def broken_by(self, value: float) -> bool:
        return _COMPARE[self.sign](value, self.limit)

    def __str__(self) -> str:
        return f"{self.query} {self.sign} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Freeze:
    """A time in which nothing may be broken: every week, or once. Local time of the harness."""

    text: str
    first: datetime | None = None  # once: from … up to …
    last: datetime | None = None
    weekly: tuple[timedelta, timedelta] | None = None  # from Monday 0:00; the end may lie in the next week

    @classmethod
    def parse(cls, text: str) -> Freeze:
        """`Fri 16:00-Mon 08:00` or `2026-12-20..2027-01-03` (both days included). Raises `ValueError`."""
        if found := _WEEKLY.fullmatch(text.strip()):
            begin, end = _in_week(*found.groups()[:3]), _in_week(*found.groups()[3:])
            return cls(text, weekly=(begin, end if end > begin else end + timedelta(days=7)))
        first, sep, last = text.partition("..")
        if not sep:
            raise ValueError(f"{text!r} must read 'Fri 16:00-Mon 08:00' or '2026-12-20..2027-01-03'")
        begun, ended = datetime.fromisoformat(first.strip()), datetime.fromisoformat(last.strip())
        if ended < begun:
            raise ValueError(f"{text!r} ends before it begins")
        whole_day = len(last.strip()) == len("2026-12-20")
        return cls(text, begun, ended + timedelta(days=1) if whole_day else ended)

    def covers(self, begin: datetime, end: datetime) -> bool:
        """Whether any of the time from `begin` to `end` (naive local times) lies in it."""
        if self.first is not None and self.last is not None:
            return begin < self.last and end > self.first
        assert self.weekly is not None
        monday = datetime(begin.year, begin.month, begin.day) - timedelta(days=begin.weekday())
        # Last week's window may reach into this one.
        return any(
            begin < monday + shift + self.weekly[1] and end > monday + shift + self.weekly[0]
            for shift in (timedelta(days=-7), timedelta(), timedelta(days=7))
        )


def _in_week(day: str, hour: str, minute: str) -> timedelta:
    if day not in _DAYS or int(hour) > 24 or int(minute) > 59:
        raise ValueError(f"{day} {hour}:{minute} is not a time of the week: write {_DAYS[0]} 08:00")
    return timedelta(days=_DAYS.index(day), hours=int(hour), minutes=int(minute))
