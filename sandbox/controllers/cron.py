"""Schedules in cron's five fields, with names, lists, ranges, steps and the usual @words. Pure.

Source: crontab(5) and the parser of Kubernetes' controller (github.com/robfig/cron v3, ParseStandard).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

_MONTH_NAMES = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAY_NAMES = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS = {name: number for number, name in enumerate(_MONTH_NAMES, 1)}
_DAYS = {name: number for number, name in enumerate(_DAY_NAMES)}
_WORDS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_Bounds = tuple[int, int, dict[str, int]]  # least, most, names
_BOUNDS: tuple[_Bounds, ...] = ((0, 59, {}), (0, 23, {}), (1, 31, {}), (1, 12, _MONTHS), (0, 6, _DAYS))
_MISSED_DAYS = 400  # no time missed longer ago is made up for
_YEARS = 5  # without a match for so long, there is none (30 February)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The minutes, hours, days, months and week days that match; `any_*`: the field was a star."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    any_day: bool
    any_weekday: bool

    def next(self, after: datetime, zone: str = "") -> datetime | None:
        """The first time after `after` (aware), in UTC; wall-clock times that a zone skips are left out."""
        place = ZoneInfo(zone) if zone else UTC
        wall = after.astimezone(place).replace(second=0, microsecond=0, tzinfo=None) + timedelta(minutes=1)
        end = wall + timedelta(days=366 * _YEARS)
        while wall < end:
            if wall.month not in self.months or not self._day(wall):
                wall = (wall + timedelta(days=1)).replace(hour=0, minute=0)
            elif wall.hour not in self.hours:
                wall = (wall + timedelta(hours=1)).replace(minute=0)
            elif wall.minute not in self.minutes:
                wall += timedelta(minutes=1)
            else:
                found = wall.replace(tzinfo=place).astimezone(UTC)
                if found > after and found.astimezone(place).replace(tzinfo=None) == wall:
                    return found
                wall += timedelta(minutes=1)
        return None

    def _day(self, wall: datetime) -> bool:
        day, weekday = wall.day in self.days, wall.isoweekday() % 7 in self.weekdays
        return day and weekday if self.any_day or self.any_weekday else day or weekday

    def latest(self, since: datetime, until: datetime, zone: str = "") -> datetime | None:
        """The last time in (since, until], if any."""
        found = None
        at = self.next(max(since, until - timedelta(days=_MISSED_DAYS)), zone)
        while at is not None and at <= until:
            found, at = at, self.next(at, zone)
        return found


def parse(text: str) -> Schedule:
    """Raises ValueError with a sentence."""
    if text.startswith("@"):
        if text not in _WORDS:
            raise ValueError(f"unrecognized descriptor: {text}")
        text = _WORDS[text]
    fields = text.split()
    if len(fields) != 5:
        raise ValueError(f"expected exactly 5 fields, found {len(fields)}: [{' '.join(fields)}]")
    sets = [_field(field, low, high, names) for field, (low, high, names) in zip(fields, _BOUNDS, strict=True)]
    minutes, hours, days, months, weekdays = sets
    return Schedule(minutes, hours, days, months, weekdays, fields[2][0] in "*?", fields[4][0] in "*?")


def _field(text: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    return frozenset(number for part in text.split(",") for number in _range(part, low, high, names))


def _range(part: str, low: int, high: int, names: dict[str, int]) -> range:
    span, slash, step_text = part.partition("/")
    step = _number(step_text, {}, part) if slash else 1
    if step == 0:
        raise ValueError(f"step of range should be a positive number: {part}")
    if span in ("*", "?"):
        return range(low, high + 1, step)
    first, dash, last = span.partition("-")
    begin = _number(first, names, part)
    end = _number(last, names, part) if dash else high if slash else begin
    if begin < low:
        raise ValueError(f"beginning of range ({begin}) below minimum ({low}): {part}")
    if end > high:
        raise ValueError(f"end of range ({end}) above maximum ({high}): {part}")
    if begin > end:
        raise ValueError(f"beginning of range ({begin}) beyond end of range ({end}): {part}")
    return range(begin, end + 1, step)


def _number(text: str, names: dict[str, int], part: str) -> int:
    if text.lower() in names:
        return names[text.lower()]
    if not text.isdigit():
        raise ValueError(f"failed to parse int from {text}: {part}")
    return int(text)
