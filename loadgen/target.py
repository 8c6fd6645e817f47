"""Whom to ask: the endpoint's URL, the model's name, what goes into every request's head."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from gameday.errors import LoadError


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible endpoint. `base` is the path before `/v1/…`."""

    scheme: str
    host: str
    port: int
    base: str
    model: str
    served_by: str = "x-served-by"
    served_zone: str = "x-served-zone"
    served_via: str = "x-gateway"
    headers: Mapping[str, str] = field(default_factory=dict)
    api_key: str = field(default="", repr=False)
    ca_file: str | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.base}"

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    def head(self, api: str) -> bytes:
        """The request's head up to its Content-Length value."""
        path = f"{self.base}/v1/{'completions' if api == 'completions' else 'chat/completions'}"
        lines = {
            "Host": self.authority,
            "Content-Type": "application/json",
            "Accept": "text/event-stream, application/json",
            "User-Agent": "gameday",
            **({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}),
        }
        given = {name.lower() for name in self.headers}
        lines = {name: value for name, value in lines.items() if name.lower() not in given} | dict(self.headers)
        text = f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        return text.encode("latin-1") + b"Content-Length: "

    def tls(self) -> ssl.SSLContext | None:
        """Raises LoadError when the CA file is not there or not one."""
        if self.scheme == "http":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as e:
            raise LoadError(f"the CA file {self.ca_file} cannot be used: {e}") from e
        context.set_alpn_protocols(["http/1.1"])
        return context


_PATH = re.compile(r"[!-~]*")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_OURS = {"content-length", "transfer-encoding", "connection", "expect", "accept-encoding", "upgrade"}


def _check_header(name: str, value: str) -> None:
    if not _TOKEN.fullmatch(name):
        raise LoadError(f"{name!r} is not a header's name")
    if name.lower() in _OURS:
        raise LoadError(f"the header {name} is the load generator's own")
    if any(c in value for c in "\r\n\0"):
        raise LoadError(f"the header {name} must not contain a line break")
    try:
        value.encode("latin-1")
    except UnicodeEncodeError:
        raise LoadError(f"the header {name} has characters that HTTP cannot carry") from None


def parse(
    url: str,
    model: str,
    *,
    served_by: str = "x-served-by",
    served_zone: str = "x-served-zone",
    served_via: str = "x-gateway",
    headers: Mapping[str, str] | None = None,
    api_key: str = "",
    ca_file: str | None = None,
) -> Target:
    """`http[s]://host[:port][/path][/v1]`. Raises LoadError for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise LoadError(f"the target {url!r} is not a URL: {e}") from e
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadError(f"the target {url!r} is not a URL like http://gateway.example:8000")
    if parts.username or parts.query or parts.fragment:
        raise LoadError(f"the target {url!r} must not carry a user, a query or a fragment; give an API key by file")
    if not _PATH.fullmatch(parts.path) or not parts.hostname.isascii():
        raise LoadError(
            f"the target {url!r} must be plain ASCII without spaces: percent-encode its path, punycode its name"
        )
    for name, value in (headers or {}).items():
        _check_header(name, value)
    if not model:
        raise LoadError("the load needs the name of a model")
    base = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Target(
        parts.scheme,
        parts.hostname,
        port or (443 if parts.scheme == "https" else 80),
        base,
        model,
        served_by.lower(),
        served_zone.lower(),
        served_via.lower(),
        dict(headers or {}),
        api_key,
        ca_file,
    )


def read_key(file: Path | None, env: str | None = None) -> str:
    """An API key from a file or from the environment; "" when neither is named, LoadError when it is not there."""
    if file is not None:
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise LoadError(f"the API key file {file} cannot be read: {e}") from e
        if not key or any(c.isspace() for c in key):
            raise LoadError(f"the API key file {file} does not hold one key")
        return key
    if env is not None:
        key = os.environ.get(env, "").strip()
        if not key:
            raise LoadError(f"the environment has no API key in {env}")
        return key
    return ""
