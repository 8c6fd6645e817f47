"""Addresses of the API: /api/v1/namespaces/N/pods/P/log and the like."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.apiserver import errors


@dataclass(frozen=True, slots=True)
class Address:
    group: str
    version: str
    plural: str
    namespace: str | None = None
    name: str = ""
    sub: str = ""


def parse(path: str) -> Address | None:
    """None: not a resource's path."""
    parts = [part for part in path.split("/") if part]
    if len(parts) >= 3 and parts[0] == "api":
        group, version, rest = "", parts[1], parts[2:]
    elif len(parts) >= 4 and parts[0] == "apis":
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    namespace = None
    if len(rest) >= 3 and rest[0] == "namespaces" and not (group == "" and rest[2] in ("status", "finalize")):
        namespace, rest = rest[1], rest[2:]
    if len(rest) > 3:
        return None
    return Address(group, version, rest[0], namespace, *rest[1:])


_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}


def verb(method: str, address: Address, *, watch: bool) -> str:
    """The verb of a request, as authorization and discovery name it. Raises ApiError(405)."""
    if method in ("GET", "HEAD"):
        return "get" if address.name else "watch" if watch else "list"
    if method == "DELETE" and not address.sub:
        return "delete" if address.name else "deletecollection"
    found = _VERBS.get(method)
    one = bool(address.name)
    if found is None or (found != "create" and not one) or (found == "create" and one and not address.sub):
        raise errors.method_not_allowed()
    return found
