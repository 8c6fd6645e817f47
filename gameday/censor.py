"""What must never be told: bearer tokens, and passwords in URLs. For whatever text others gave us to print."""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"""(?ix)
    (?P<before> bearer\s+ | (?:token|password|secret|api[-_]?key)["']?\s*[:=]\s*["']? ) [A-Za-z0-9._~+/=-]{8,}
    | (?<=://) [^/@\s"']+ (?=@)
    """
)


def censored(text: str) -> str:
    return _SECRET.sub(lambda found: (found["before"] or "") + "***", text)
