"""A secret, read when it is needed, shown never."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from gameday.errors import GamedayError


class Unusable(GamedayError):
    """A secret or an address that cannot be used; the message names where it should come from, never what is there."""


@dataclass(frozen=True, slots=True)
class Secret:
    """Where a secret is: a file, or an environment variable. Falsy where neither is named."""

    file: Path | None = None
    variable: str = ""

    def __bool__(self) -> bool:
        return self.file is not None or bool(self.variable)

    @property
    def place(self) -> str:
        return f"the file {self.file}" if self.file is not None else f"the environment variable {self.variable}"

    def read(self) -> Revealed:
        """The value, without the white space around it. Raises `Unusable` naming the place."""
        value = (os.environ.get(self.variable, "") if self.file is None else _read(self.file)).strip()
        if not value:
            raise Unusable(f"{self.place} is empty or not set")
        if not value.isascii() or not value.isprintable() or " " in value:
            raise Unusable(f"{self.place} does not hold one word of plain characters")
        return Revealed(value, self.place)

    def read_url(self) -> Revealed:
        """The same for an address. Raises `Unusable` where it is not http or https."""
        found = self.read()
        if not is_url(found.value):
            raise Unusable(f"{self.place} does not hold an http or https address")
        return found


@dataclass(frozen=True, slots=True)
class Revealed:
    """A value that must not be shown: neither `repr` nor `str` have it."""

    value: str = field(repr=False)
    place: str


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Unusable(f"the file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:  # its message has the bytes
        raise Unusable(f"the file {path} is not text") from None


def is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
