"""One HTTP POST, bounded: no redirect is followed, no answer is trusted, no secret is shown.

A redirect would carry the secret to another server. What a server answers may repeat what it was sent, so that only
its status is told. aiohttp is used because it logs no addresses (urllib3 does, at DEBUG).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from reports.notify.secret import Revealed

ANSWER_WITHIN = 6.0  # seconds for one attempt
PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
LONGEST_PAUSE = 5.0  # whatever Retry-After asks for
USER_AGENT = "gameday"


@dataclass(frozen=True, slots=True)
class Delivery:
    """How telling someone went. `detail` holds no secret."""

    to: str  # "Slack", "PagerDuty: zone_outage", …
    ok: bool
    detail: str
    attempts: int = 1

    @property
    def line(self) -> str:
        tries = f" ({self.attempts} attempts)" if self.attempts > 1 else ""
        return f"{'told' if self.ok else 'NOT TOLD'}  {self.to}  {self.detail}{tries}"


@dataclass(frozen=True, slots=True)
class Post:
    """What is sent to whom. `repeatable`: the receiver knows a message that comes twice (a key is in it)."""

    to: str
    url: Revealed
    body: Mapping[str, Any] = field(repr=False)  # PagerDuty wants its key in it
    said: str  # what a delivery did, "incident triggered"
    repeatable: bool
    bearer: Revealed | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Try:
    """One attempt. `again`: another may go better, and does no harm."""

    ok: bool
    detail: str
    again: bool = False
    pause: float = 0.0


def deliver(posts: Sequence[Post], *, within: float, attempts: int) -> tuple[Delivery, ...]:
    """Send all of them side by side; every one has its `Delivery` after `within` seconds at the latest.

    In a thread of its own: neither a loop that is running already nor a name server that hangs can stand in the way.
    """
    if not posts:
        return ()
    done: dict[int, Delivery] = {}

    def work() -> None:
        asyncio.run(_all(posts, attempts, done, within))

    thread = threading.Thread(target=work, name="gameday-notify", daemon=True)
    thread.start()
    thread.join(within + 1.0)
    late = f"no answer within {within:g} s"
    return tuple(done.get(i) or Delivery(post.to, False, late) for i, post in enumerate(posts))


async def _all(posts: Sequence[Post], attempts: int, done: dict[int, Delivery], within: float) -> None:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:

        async def one(i: int, post: Post) -> None:
            done[i] = await _send(session, post, attempts)

        tasks = [asyncio.create_task(one(i, post)) for i, post in enumerate(posts)]
        _, late = await asyncio.wait(tasks, timeout=within)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send(session: aiohttp.ClientSession, post: Post, attempts: int) -> Delivery:
    pause, seen, number = PAUSE, _Try(False, "was not tried"), 0
    for number in range(1, attempts + 1):
        seen = await _attempt(session, post)
        if seen.ok or not seen.again or number == attempts:
            break
        await asyncio.sleep(min(LONGEST_PAUSE, max(pause, seen.pause)))
        pause *= 2
    return Delivery(post.to, seen.ok, post.said if seen.ok else seen.detail, number)


async def _attempt(session: aiohttp.ClientSession, post: Post) -> _Try:
    headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT, **post.headers}
    if post.bearer is not None:
        headers["Authorization"] = f"Bearer {post.bearer.value}"
    try:
        async with session.post(
            post.url.value,
            data=json.dumps(post.body, allow_nan=False).encode(),
            headers=headers,
            allow_redirects=False,
            proxy=_proxy(post.url.value),
            timeout=aiohttp.ClientTimeout(total=ANSWER_WITHIN),
        ) as answer:
            return _read(answer, post.repeatable)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return _failed(error, post)


def _failed(error: Exception, post: Post) -> _Try:
    """In our words: an error's own message may hold the address."""
    if isinstance(error, aiohttp.ClientSSLError):
        return _Try(False, "its certificate is not trusted, or it does not speak TLS")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return _Try(False, f"the proxy refuses to reach it ({error.status})")
    if isinstance(error, aiohttp.ClientConnectorError):
        return _Try(False, "cannot be reached: check the address and the network", again=True)
    if isinstance(error, TimeoutError):
        return _Try(False, f"did not answer within {ANSWER_WITHIN:g} s", again=post.repeatable)
    if isinstance(error, ValueError):
        return _Try(False, f"{post.url.place} does not hold an address that can be used")
    return _Try(False, f"broke the connection off ({type(error).__name__})", again=post.repeatable)


def _proxy(url: str) -> str | None:
    """As the environment has it. (aiohttp's `trust_env` would also read .netrc, whose entries fight our token.)"""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme, "")
    usable = proxy.startswith(("http://", "https://")) and not proxy_bypass(parts.netloc.rpartition("@")[2])
    return proxy if usable else None


def _read(answer: aiohttp.ClientResponse, repeatable: bool) -> _Try:
    status = answer.status
    if 200 <= status < 300:
        return _Try(True, "")
    if 300 <= status < 400:
        return _Try(False, f"answered {status} and points elsewhere, which is not followed: name the final address")
    said = f"answered {status} {_phrase(status)}".rstrip()
    if status in (401, 403, 404, 410):
        said += ": the address or the token is wrong, or was revoked"
    again = status in (429, 503) or (repeatable and status >= 500)
    return _Try(False, said, again, _pause(answer.headers.get("Retry-After", "")))


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""


def _pause(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() and len(retry_after) < 6 else 0.0
