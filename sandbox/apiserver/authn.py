"""Who calls: static bearer tokens and service-account tokens (signed here, HMAC)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import orjson

from sandbox.client import Obj

ANONYMOUS_USER = "system:anonymous"


@dataclass(frozen=True, slots=True)
class Identity:
    user: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())

    @property
    def master(self) -> bool:
        return "system:masters" in self.groups

    @property
    def authenticated(self) -> Identity:
        if "system:authenticated" in self.groups or self.user == ANONYMOUS_USER:
            return self
        return Identity(self.user, (*self.groups, "system:authenticated"), self.uid, self.extra)


ANONYMOUS = Identity(ANONYMOUS_USER, ("system:unauthenticated",))
MASTER = Identity("kubernetes-admin", ("system:masters", "system:authenticated"))


def service_account(namespace: str, name: str, uid: str = "", extra: Obj | None = None) -> Identity:
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
    more = tuple((key, tuple(values)) for key, values in (extra or {}).items())
    return Identity(f"system:serviceaccount:{namespace}:{name}", groups, uid, more)


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Tokens:
    """Static tokens, and JWTs (HS256: nobody but this server has to verify them) for service accounts.

    `alive(namespace, name, uid, bound)` says whether the account and the object that a token is bound to
    still exist.
    """

    def __init__(self, static: Mapping[str, Identity], alive: Callable[[Obj], bool]) -> None:
        self._static = {token: identity.authenticated for token, identity in static.items()}
        self._secret = secrets.token_bytes(32)
        self._alive = alive

    def identify(self, token: str) -> Identity | None:
        if known := self._static.get(token):
            return known
        claims = self._claims(token)
        if claims is None or claims["exp"] < time.time() or not self._alive(claims):
            return None
        mine = claims["kubernetes.io"]
        extra = {"authentication.kubernetes.io/credential-id": [f"JTI={claims['jti']}"]}
        if pod := mine.get("pod"):
            extra["authentication.kubernetes.io/pod-name"] = [pod["name"]]
            extra["authentication.kubernetes.io/pod-uid"] = [pod["uid"]]
        account = mine["serviceaccount"]
        return service_account(mine["namespace"], account["name"], account["uid"], extra)

    def _claims(self, token: str) -> Obj | None:
        parts = token.split(".")
        if len(parts) != 3:
            return None
        try:
            if not hmac.compare_digest(self._sign(f"{parts[0]}.{parts[1]}"), _decode(parts[2])):
                return None
            return orjson.loads(_decode(parts[1]))  # type: ignore[no-any-return]
        except ValueError:  # not base64, not JSON
            return None

    def _sign(self, text: str) -> bytes:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).digest()

    def issue(self, claims: Obj) -> str:
        head = _encode(orjson.dumps({"alg": "HS256", "typ": "JWT"}))
        signed = f"{head}.{_encode(orjson.dumps(claims))}"
        return f"{signed}.{_encode(self._sign(signed))}"
