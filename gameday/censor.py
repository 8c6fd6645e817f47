"""What must never be told: bearer tokens, passwords in URLs, and every secret that somebody has named to us."""

from __future__ import annotations

import re

SHORTEST = 6  # a shorter "secret" would censor ordinary words
_SECRET = re.compile(
    r"""(?ix)
    (?P<before> bearer\s+ | (?:token|password|secret|api[-_]?key)["']?\s*[:=]\s*["']? ) [A-Za-z0-9._~+/=-]{8,}
    | (?<=://) [^/@\s"']+ (?=@)
    """
)
_known: set[str] = set()


def remember(secret: str) -> None:
    """From now on this value is never told."""
    if len(secret) >= SHORTEST:
        _known.add(secret)


def censored(text: str) -> str:
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _SECRET.sub(lambda found: (found["before"] or "") + "***", text)
