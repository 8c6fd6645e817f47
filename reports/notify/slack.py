"""Slack: one message per run, by an incoming webhook (https://api.slack.com/messaging/webhooks)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gameday.model import Verdict
from reports import words
from reports.console import story
from reports.notify.news import Item, News, cut
from reports.notify.post import Post
from reports.notify.secret import Secret

SIGNS = {
    Verdict.PASS: ":white_check_mark:",
    Verdict.INCONCLUSIVE: ":warning:",
    Verdict.FAIL: ":x:",
    Verdict.ERROR: ":octagonal_sign:",
}
# Slack refuses a message beyond these (https://api.slack.com/reference/block-kit/blocks).
HEADER, SECTION, BLOCKS = 150, 3000, 50
TOLD = BLOCKS - 5  # blocks left for experiments


def posts(secret: Secret, news: News) -> list[Post]:
    """Raises `Unusable`."""
    return [Post("Slack", secret.read_url(), body(news), "message sent", repeatable=False)]


def body(news: News) -> dict[str, Any]:
    """The worst experiments first; those that passed share one line."""
    ordered = sorted(news.items, key=lambda i: -i.verdict.rank)
    bad = [i for i in ordered if not i.judgement.passed]
    good = [i for i in ordered if i.judgement.passed]
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": cut(news.headline, HEADER)}}
    ]
    blocks += [_section(_bad(item)) for item in bad[:TOLD]]
    if len(bad) > TOLD:
        blocks.append(_section(f"… and {len(bad) - TOLD} more"))
    if news.regressed:
        slower = "\n".join(f"• {escape(words.one_line(one))}" for one in news.regressed)
        blocks.append(_section(f":chart_with_upwards_trend: *REGRESSED*\n{slower}"))
    if news.closed:
        blocks.append(_section(f":lock: {escape(words.one_line(news.closed))}"))
    if good:
        blocks.append(_section("\n".join(_good(item) for item in good)))
    blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": cut(" · ".join(_foot(news)), SECTION)}]})
    return {"text": cut(escape(news.headline), SECTION), "blocks": blocks}


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": cut(text, SECTION)}}


def _bad(item: Item) -> str:
    """Cut before it is fenced, so that the fence stays whole."""
    told = escape(story(item.judgement))
    head = f"{_title(item)}\n{escape(cut(item.why, 500))}"
    return f"{head}\n```{cut(told, SECTION - len(head) - 10)}```"


def _good(item: Item) -> str:
    recovery = item.judgement.recovery
    return f"{_title(item)}{f' · back after {words.recovered(recovery)}' if recovery else ''}"


def _title(item: Item) -> str:
    name = escape(words.one_line(item.name)).replace("|", "¦").replace("*", "∗")
    shown = f"<{item.link}|{name}>" if item.link else name
    return f"{SIGNS[item.verdict]} *{item.verdict}* {shown}"


def _foot(news: News) -> Iterator[str]:
    yield f"<{news.link}|{escape(news.run)}>" if news.link else escape(news.run)
    if news.items:
        yield f"seed {news.items[0].judgement.seed}"
        yield f"target {escape(news.items[0].judgement.target)}"


def escape(text: str) -> str:
    """Text that stays text: no mention, link or fence (https://api.slack.com/reference/surfaces/formatting#escaping)."""
    return text.replace("```", "'''").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
