"""Grafana: the fault's window as a region annotation, by the HTTP API (Grafana 8 and later).

Source: https://grafana.com/docs/grafana/latest/developers/http_api/annotations/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gameday.clock import Epoch
from gameday.model import FaultMark, Step
from reports.notify.news import News
from reports.notify.post import Delivery, Post
from reports.notify.secret import Revealed, Secret, Unusable
from reports.verdicts import RUN, Entry

TAG = "gameday"
_END = (Step.GONE.value, Step.HEALED.value, Step.UNDO.value)  # the first of these that is known ends the window


@dataclass(frozen=True, slots=True)
class Region:
    """The window of a fault, Unix seconds."""

    start: float
    end: float
    title: str


def posts(secret: Secret, url: str, dashboard: str, news: News) -> list[Post | Delivery]:
    """An annotation for every experiment whose fault was injected, or why there is none. Raises `Unusable`."""
    token = secret.read()
    address = Revealed(f"{url.rstrip('/')}/api/annotations", "grafana_url")
    found: list[Post | Delivery] = []
    for entry in news.entries:
        to = f"Grafana: {entry.name}"
        try:
            seen = region(entry)
        except Unusable as wrong:
            found.append(Delivery(to, False, str(wrong), 0))
            continue
        if seen is not None:
            body = annotation(entry, seen, dashboard)
            found.append(Post(to, address, body, "fault window marked", repeatable=False, bearer=token))
    return found


def annotation(entry: Entry, seen: Region, dashboard: str) -> dict[str, Any]:
    judgement = entry.judgement
    text = f"{seen.title or entry.name}: {judgement.verdict} (seed {judgement.seed})"
    body: dict[str, Any] = {
        "time": round(seen.start * 1000),
        "timeEnd": round(seen.end * 1000),
        "tags": [TAG, judgement.experiment, str(judgement.verdict)],
        "text": escape(text),
    }
    return {**body, "dashboardUID": dashboard} if dashboard else body


def escape(text: str) -> str:
    """Grafana shows annotations as HTML (which it cleans); ours are text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def region(entry: Entry) -> Region | None:
    """From the first harm until the fault was seen to be gone; of a one-shot, until the service was back.

    None where nothing was injected. Raises `Unusable` where the record cannot be read.
    """
    try:
        marks = list(_marks(entry.dir))
        epoch = Epoch(float(entry.about["epoch_wall"]), float(entry.about["epoch_mono"]))
        title = str(orjson.loads((entry.dir / RUN).read_bytes())["fault"]["title"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Unusable(f"{entry.dir} does not say when its fault was injected") from error
    harm = min((t for step, t in marks if step == Step.APPLY), default=None)
    if harm is None:
        return None
    ends = [max(t for step, t in marks if step == last) for last in _END if any(step == last for step, _ in marks)]
    back = entry.judgement.recovery.t_back if entry.judgement.recovery else None
    end = ends[0] if ends else back if back is not None else max(t for _, t in marks)
    return Region(epoch.to_wall(harm), epoch.to_wall(max(harm, end)), title)


def _marks(directory: Path) -> Iterator[tuple[str, float]]:
    """Step and instant of every fault mark; a last line that a crash cut short is left out."""
    path = directory / "events.jsonl"
    if not path.is_file():
        return  # it died before its first event
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        event = orjson.loads(line)
        if event["kind"] == FaultMark.kind:
            yield event["step"], float(event["t"])
