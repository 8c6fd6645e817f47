"""Who may do what."""

from __future__ import annotations

from sandbox.apiserver.authn import Identity
from sandbox.apiserver.core import Core
from sandbox.apiserver.resources import Resource


class Rules:
    def __init__(self, core: Core) -> None:
        self._core = core

    def check(self, user: Identity, verb: str, res: Resource, namespace: str | None, name: str, sub: str) -> None:
        """Raises ApiError(403)."""

    def check_path(self, user: Identity, verb: str, path: str) -> None:
        """Raises ApiError(403)."""

    def check_impersonation(self, user: Identity, name: str, groups: tuple[str, ...]) -> None:
        """Raises ApiError(403)."""
