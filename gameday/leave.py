"""Leave to begin: no stop file, change freeze or open incident. Asked before all else, and again before the harm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import urllib3

from gameday.errors import TargetError
from gameday.settings import Settings
from probes.prometheus import Prometheus

WITHIN = 10.0  # seconds for the answer; none is no leave


def ask(settings: Settings, lasting: float, prometheus: Prometheus | None = None, now: datetime | None = None) -> str:
    """Raise `TargetError` where experiments that last so long may not begin now; returns what was asked, in words."""
    if settings.stop_file.exists():
        raise TargetError(f"The stop file {settings.stop_file} is there: remove it when experiments may run again.")
    begin = now or datetime.now()
    for freeze in settings.freezes:
        if freeze.covers(begin, begin + timedelta(seconds=lasting)):
            raise TargetError(f"A change freeze is on or would begin meanwhile ({freeze.text}): run it another time.")
    asked = [f"{len(settings.freezes)} freeze window(s)"] if settings.freezes else []
    if settings.incident_command:
        _command(settings.incident_command)
        asked.append(settings.incident_command[0])
    if settings.incident_url:
        _url(settings)
        asked.append(settings.incident_url)
    if settings.stop_alerts and prometheus is not None:
        _alerts(settings, prometheus)
        asked.append("alerts")
    return ", ".join(asked) or "nothing is to be asked (freeze, incident_command, incident_url)"


def _command(command: tuple[str, ...]) -> None:
    """Exit code 0 is leave; its first line says why not."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WITHIN, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as late:
        raise TargetError(f"incident_command {command[0]} gave no answer within {WITHIN:.0f} s: no leave.") from late
    except OSError as wrong:
        raise TargetError(f"incident_command {command[0]} cannot be run: {wrong.strerror}.") from wrong
    if done.returncode:
        told = (done.stdout.strip() or done.stderr.strip() or "no reason given").splitlines()[0]
        raise TargetError(f"{command[0]} gives no leave (exit code {done.returncode}): {told}")


def _url(settings: Settings) -> None:
    headers = {"Accept": "application/json"}
    if settings.incident_token_file:
        try:
            headers["Authorization"] = f"Bearer {settings.incident_token_file.read_text().strip()}"
        except OSError as wrong:
            name = settings.incident_token_file
            raise TargetError(f"incident_token_file {name} cannot be read: {wrong.strerror}.") from wrong
    try:
        with urllib3.PoolManager(timeout=urllib3.Timeout(total=WITHIN), retries=False) as pool:
            answer = pool.request("GET", settings.incident_url, headers=headers, redirect=False)
            status, body = answer.status, answer.data
    except urllib3.exceptions.HTTPError as lost:
        raise TargetError(f"incident_url {settings.incident_url} does not answer: no leave.") from lost
    if status == 204:
        return
    if status != 200:
        raise TargetError(f"incident_url {settings.incident_url} answers {status}: no leave.")
    try:
        count = _open(json.loads(body))
    except ValueError as wrong:
        raise TargetError(f"incident_url {settings.incident_url} answers what lists no incidents: no leave.") from wrong
    if count:
        raise TargetError(f"{count} incident(s) are open ({settings.incident_url}): run it another time.")


def _open(answer: Any) -> int:
    """How many there are in a list, or in an object's lists (`[]`, `{"incidents": []}`). `ValueError`: no list."""
    if isinstance(answer, list):
        return len(answer)
    lists = [value for value in answer.values() if isinstance(value, list)] if isinstance(answer, Mapping) else []
    if not lists:
        raise ValueError("no list")
    return sum(len(one) for one in lists)


def _alerts(settings: Settings, prometheus: Prometheus) -> None:
    """An alert that would stop the experiment keeps it from beginning."""
    seen = prometheus.firing(settings.stop_alerts, settings.expected_alerts)
    if seen.value is None:
        raise TargetError(f"Prometheus does not say which alerts fire ({seen.error}): no leave.")
    if seen.value:
        raise TargetError(f"Alerts fire already ({seen.raw}): wait until they are resolved.")
