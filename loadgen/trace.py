"""Traces of real use: CSV rows of time, context tokens, generated tokens."""

from __future__ import annotations

import csv
import re
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
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
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


_WHEN = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:?\d\d)?")


def _time(cell: str, where: str) -> float:
    """Seconds. The traces of 2023 write seven decimals (not every Python takes them), those of 2024 a zone."""
    found = _WHEN.fullmatch(cell.strip())
    try:
        if found is None:
            raise ValueError
        at = datetime.fromisoformat(found[1]).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise LoadError(f"{where}: {cell!r} is not a timestamp like 2023-11-16 18:17:03.9799600") from None
    zone = (found[3] or "Z").replace(":", "")
    ahead = 0 if zone == "Z" else int(zone[:3]) * 3600 + int(zone[0] + zone[3:]) * 60
    return at - ahead + float(found[2] or 0)


def _count(cell: str, where: str) -> int:
    text = cell.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise LoadError(f"{where}: {cell!r} is not a token count")
    return int(text)
