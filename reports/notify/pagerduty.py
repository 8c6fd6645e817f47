"""PagerDuty: an incident per experiment and cluster, by Events API v2.

FAIL and ERROR trigger it; the next PASS resolves it (PagerDuty ignores a resolve without an incident, so that no
state is kept between runs); INCONCLUSIVE says nothing either way and leaves it as it is.
Source: https://developer.pagerduty.com/docs/events-api-v2/overview/
"""

from __future__ import annotations

import hashlib
from typing import Any

from gameday.model import Verdict
from reports import words
from reports.notify.news import Item, News, cut, figures
from reports.notify.post import Post
from reports.notify.secret import Revealed, Secret

SUMMARY, KEY = 1024, 255  # characters that PagerDuty takes
SEVERITY = {Verdict.FAIL: "error", Verdict.ERROR: "critical"}


def posts(secret: Secret, url: str, news: News) -> list[Post]:
    """An event for every experiment that passed, failed or died. Raises `Unusable`."""
    key = secret.read()
    address = Revealed(url, "pagerduty_url")
    events = ((item, event(item, news)) for item in news.items if item.verdict is not Verdict.INCONCLUSIVE)
    return [
        Post(
            f"PagerDuty: {item.name}",
            address,
            {"routing_key": key.value, **said},
            "incident triggered" if said["event_action"] == "trigger" else "incident resolved, if there was one",
            repeatable=True,
        )
        for item, said in events
    ]


def event(item: Item, news: News) -> dict[str, Any]:
    """The event without its routing key."""
    dedup = dedup_key(news.key(item.name))
    if item.verdict is Verdict.PASS:
        return {"event_action": "resolve", "dedup_key": dedup}
    summary = f"{item.verdict} {item.name} on {news.cluster}: {item.why}"
    links = [{"href": item.link, "text": "Report"}] if item.link else []
    return {
        "event_action": "trigger",
        "dedup_key": dedup,
        "client": "gameday",
        "links": links,
        "payload": {
            "summary": cut(words.one_line(summary), SUMMARY),
            "source": news.cluster,
            "severity": SEVERITY[item.verdict],
            "component": item.name,
            "group": news.namespace or news.cluster,
            "class": "game day",
            "custom_details": {"run": news.run, **figures(item)},
        },
    }


def dedup_key(key: str) -> str:
    """The key as it is, or a digest of it where it is too long."""
    return key if len(key) <= KEY else f"gameday/{hashlib.sha256(key.encode()).hexdigest()}"
