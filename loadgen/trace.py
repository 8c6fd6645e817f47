"""Traces of real use: CSV rows of time, context tokens, generated tokens."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from gameday.errors import LoadError

COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True, slots=True)
class Row:
    """`t` in seconds since the trace's first row."""

    t: float
    context: int
    generated: int


def read(path: Path) -> tuple[Row, ...]:
    """All rows in order of time. Raises LoadError with the line's number for a malformed one."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return _rows(path, file)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise LoadError(f"the trace {path} cannot be read: {e}") from e


def _rows(path: Path, file: TextIO) -> tuple[Row, ...]:
    lines = csv.reader(file)
    head = next(lines, [])
    if [h.strip() for h in head] != COLUMNS:
        raise LoadError(f"{path}, line 1: a trace has the columns {','.join(COLUMNS)}, not {','.join(head)[:80]}")
    rows: list[Row] = []
    first: float | None = None
    for cells in lines:
        where = f"{path}, line {lines.line_num}"
        if not cells:
            continue
        if len(cells) != len(COLUMNS):
            raise LoadError(f"{where}: 3 columns expected, found {len(cells)}")
        at = _time(cells[0], where)
        first = at if first is None else first
        rows.append(Row(at - first, _count(cells[1], where), _count(cells[2], where)))
    if not rows:
        raise LoadError(f"the trace {path} has no rows")
    rows.sort(key=lambda r: r.t)
    start = rows[0].t
    return tuple(Row(r.t - start, r.context, r.generated) for r in rows)


def _time(cell: str, where: str) -> float:
    """Seconds; the traces write seven decimals, which fromisoformat does not take on every Python."""
    whole, dot, part = cell.strip().partition(".")
    try:
        return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + (float(f"0.{part}") if dot else 0.0)
    except ValueError:
        raise LoadError(f"{where}: {cell!r} is not a timestamp like 2023-11-16 18:17:03.9799600") from None


def _count(cell: str, where: str) -> int:
    text = cell.strip()
    if not (text.isascii() and text.isdigit()):
        raise LoadError(f"{where}: {cell!r} is not a token count")
    return int(text)
