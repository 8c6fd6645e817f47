"""Who is told, as it is configured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gameday.errors import SettingsError
from reports.notify.secret import Secret, is_url

PAGERDUTY = "https://events.pagerduty.com/v2/enqueue"
"""The service region US; the EU's is https://events.eu.pagerduty.com/v2/enqueue."""


@dataclass(frozen=True, slots=True)
class Notify:
    """Every channel is off until it is named. A secret comes from a `_file` or from the variable named by `_env`.

    `cluster` is what messages and dedup keys call the cluster ("" takes it from the record; name it, so that an
    experiment that never began closes and opens the same incident). `report_url` is where the runs directory is
    published: messages then link to `<report_url>/<run>/<experiment>/report.html`. `within` bounds all deliveries
    together, in seconds. Raises `SettingsError` where it contradicts itself.
    """

    slack_webhook_file: Path | None = None
    slack_webhook_env: str = ""
    slack_quiet: bool = False  # say nothing of a run in which everything passed
    pagerduty_key_file: Path | None = None
    pagerduty_key_env: str = ""
    pagerduty_url: str = PAGERDUTY
    webhook_url_file: Path | None = None
    webhook_url_env: str = ""
    grafana_url: str = ""
    grafana_token_file: Path | None = None
    grafana_token_env: str = ""
    grafana_dashboard: str = ""  # UID of the only dashboard to mark; "" marks all that show the tag "gameday"
    cluster: str = ""
    report_url: str = ""
    within: float = 20.0
    attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("slack_webhook", "pagerduty_key", "webhook_url", "grafana_token"):
            if getattr(self, f"{name}_file") is not None and getattr(self, f"{name}_env"):
                raise SettingsError(f"{name}_file and {name}_env are both set: name one place")
        for name in ("grafana_url", "pagerduty_url", "report_url"):
            _check_url(name, getattr(self, name))
        if bool(self.grafana_url) != bool(self.grafana_token):
            raise SettingsError("Grafana needs both grafana_url and a grafana_token_file (or grafana_token_env)")
        if not 0 < self.within < math.inf or self.attempts < 1:
            raise SettingsError(f"within must be above 0 s and attempts above 0, not {self.within} and {self.attempts}")

    @property
    def slack(self) -> Secret:
        return Secret(self.slack_webhook_file, self.slack_webhook_env)

    @property
    def pagerduty(self) -> Secret:
        return Secret(self.pagerduty_key_file, self.pagerduty_key_env)

    @property
    def webhook(self) -> Secret:
        return Secret(self.webhook_url_file, self.webhook_url_env)

    @property
    def grafana_token(self) -> Secret:
        return Secret(self.grafana_token_file, self.grafana_token_env)


def _check_url(name: str, value: str) -> None:
    """Addresses that are no secret must hold none; the message does not repeat the value, for it may."""
    if not value:
        return
    if not is_url(value):
        raise SettingsError(f"{name} is not a URL: write https://HOST")
    if urlsplit(value).username or urlsplit(value).password:
        raise SettingsError(f"{name} holds a user name or password: secrets belong into a file or the environment")
