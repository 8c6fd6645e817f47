"""Thresholds and freeze windows: what they mean, and what is refused."""

from __future__ import annotations

from datetime import datetime

import pytest

from gameday.conditions import Freeze, Threshold
from gameday.errors import SettingsError
from gameday.settings import load


@pytest.mark.parametrize(
    ("text", "bad", "good"),
    [
        ("sum(up) < 3", 2.0, 3.0),
        ("histogram_quantile(0.95, sum by (le) (rate(x_bucket[1m]))) > 2.5", 2.6, 2.5),
        ('max(queue{zone="a>b"}) >= 1e2', 100, 99.9),
        ("rate(errors[1m]) / rate(all[1m]) <= 0", 0, 0.1),
    ],
)
def test_a_threshold_is_compared_here(text: str, bad: float, good: float) -> None:
    found = Threshold.parse(text)
    assert found.broken_by(bad) and not found.broken_by(good)
    assert found.query == text.rsplit(found.sign, 1)[0].strip()


def test_a_query_without_a_limit_is_refused_by_the_settings() -> None:
    with pytest.raises(SettingsError, match=r"stop_when.*must end in a comparison with a number"):
        load({"stop_when": ("up == bool 0",)})


@pytest.mark.parametrize("matchers", ['a="b"} or vector(1) #', "severity", 'a="b" b="c"', 'a="b\n"'])
def test_matchers_that_are_none_are_refused(matchers: str) -> None:
    with pytest.raises(SettingsError, match="label matchers"):
        load({"stop_alerts": matchers})


def test_matchers_are_taken() -> None:
    assert load({"stop_alerts": 'severity="critical", team=~"llm|gpu"'}).stop_alerts


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


# 2026-11-27 is a Friday.
@pytest.mark.parametrize(
    ("begin", "end", "frozen"),
    [
        ("2026-11-27T15:00", "2026-11-27T15:59", False),
        ("2026-11-27T15:50", "2026-11-27T16:10", True),  # it would still run
        ("2026-11-28T12:00", "2026-11-28T12:10", True),
        ("2026-11-30T07:59", "2026-11-30T08:10", True),  # Monday: last week's window
        ("2026-11-30T08:00", "2026-11-30T08:10", False),
    ],
)
def test_a_weekly_freeze_reaches_over_the_weekend(begin: str, end: str, frozen: bool) -> None:
    assert Freeze.parse("Fri 16:00-Mon 08:00").covers(at(begin), at(end)) is frozen


def test_a_freeze_of_days_includes_the_last() -> None:
    frozen = Freeze.parse("2026-12-20..2027-01-03")
    assert frozen.covers(at("2027-01-03T23:00"), at("2027-01-03T23:10"))
    assert not frozen.covers(at("2027-01-04T00:00"), at("2027-01-04T00:10"))
    assert not frozen.covers(at("2026-12-19T23:00"), at("2026-12-19T23:59"))


@pytest.mark.parametrize("text", ["always", "Fri 16:00-Fool 08:00", "2027-01-03..2026-12-20", "Mon 25:00-Tue 08:00"])
def test_a_freeze_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must read|not a time|before it begins|isoformat"):
        Freeze.parse(text)
