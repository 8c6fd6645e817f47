"""Times as the API writes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def now() -> str:
    return at(0)


def at(seconds: float) -> str:
    """The time `seconds` from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
