"""Tell people, and their tools, how a game day went.

    for delivery in tell(config, run_root, judgements):
        print(delivery.line)

Telling never changes a verdict: what cannot be delivered is a `Delivery` that says so. Addresses and tokens come from
files or named environment variables and go nowhere but to the server they belong to: they are in no message, record,
log or exception. All deliveries run side by side, and all of them end within `Notify.within` seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gameday.model import Judgement
from reports.notify import grafana, pagerduty, slack, webhook
from reports.notify.news import News, gather
from reports.notify.post import Delivery as Delivery, Post, deliver
from reports.notify.secret import Unusable
from reports.notify.settings import Notify as Notify


def tell(
    config: Notify, run_root: Path, judgements: Sequence[Judgement], *, regressed: Sequence[str] = (), closed: str = ""
) -> tuple[Delivery, ...]:
    """Deliver to everyone that `config` names, and say how it went; () where it names nobody.

    Of several judgements of one experiment (trials) the worst counts. `regressed`: what closed the gate though its
    verdict is PASS, `closed`: why else it is closed, in words; Slack and the webhook hear of both. Raises
    nothing that depends on the network, on secrets or on the run directory.
    """
    where = {"cluster": config.cluster, "report_url": config.report_url}
    news = gather(run_root, judgements, **where, regressed=regressed, closed=closed)
    made: list[Post | Delivery] = []
    for to, make in _channels(config, news):
        try:
            made += make()
        except Unusable as wrong:
            made.append(Delivery(to, False, str(wrong), 0))
    posts = [one for one in made if isinstance(one, Post)]
    sent = iter(deliver(posts, within=config.within, attempts=config.attempts))
    return tuple(one if isinstance(one, Delivery) else next(sent) for one in made)


def _channels(config: Notify, news: News) -> Iterator[tuple[str, Callable[[], Sequence[Post | Delivery]]]]:
    """Who is told, and what makes the posts for them."""
    passed = bool(news.items) and all(i.judgement.passed for i in news.items)
    everything_passed = passed and not news.regressed and not news.closed
    if config.slack and not (config.slack_quiet and everything_passed):
        yield "Slack", lambda: slack.posts(config.slack, news)
    if config.pagerduty:
        yield "PagerDuty", lambda: pagerduty.posts(config.pagerduty, config.pagerduty_url, news)
    if config.webhook:
        yield "webhook", lambda: webhook.posts(config.webhook, news)
    if config.grafana_url:
        yield "Grafana", lambda: grafana.posts(config.grafana_token, config.grafana_url, config.grafana_dashboard, news)
