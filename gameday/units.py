"""Units: durations are float seconds; these functions let experiments say the unit they mean."""

from __future__ import annotations

Seconds = float


def seconds(value: float) -> Seconds:
    return float(value)


def minutes(value: float) -> Seconds:
    return float(value) * 60


def millis(value: float) -> Seconds:
    return float(value) / 1000


def show_duration(value: Seconds) -> str:
    """A duration as people read it: `380 ms`, `12.4 s`, `2 min`, `2 min 5 s`."""
    if value < 0:
        return f"−{show_duration(-value)}"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s" if value % 1 else f"{value:.0f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"


def show_share(value: float) -> str:
    """A share as a percentage, its digits as many as its distance from 100 % deserves; less never reads as 100 %."""
    digits = 2 if value > 0.9 else 1
    while value < 1 and digits < 9 and f"{value * 100:.{digits}f}" == f"{100:.{digits}f}":
        digits += 1
    return f"{value * 100:.{digits}f} %"
