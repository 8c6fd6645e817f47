"""Any other receiver: one JSON document per run, to an address that is itself the secret."""

from __future__ import annotations

from typing import Any

from reports.notify.news import News, figures
from reports.notify.post import Post
from reports.notify.secret import Secret

VERSION = 1
"""Of the document; it grows when a field changes its meaning or goes."""


def posts(secret: Secret, news: News) -> list[Post]:
    """`Idempotency-Key` is the same when a message is sent again. Raises `Unusable`."""
    key = {"Idempotency-Key": f"gameday-{news.run}"} if news.run.isascii() and news.run.isprintable() else {}
    return [Post("webhook", secret.read_url(), body(news), "message sent", repeatable=True, headers=key)]


def body(news: News) -> dict[str, Any]:
    return {
        "version": VERSION,
        "run": news.run,
        "cluster": news.cluster,
        "namespace": news.namespace,
        "verdict": str(news.verdict),
        "headline": news.headline,
        "report": news.link,
        "regressed": list(news.regressed),
        "closed": news.closed,
        "experiments": [figures(item) for item in news.items],
    }
