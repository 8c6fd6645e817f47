"""The API's error answers: `sandbox.client.ApiError` with the real server's words, and Status bodies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from sandbox.client import ApiError, Obj


@dataclass(frozen=True, slots=True)
class Cause:
    """One field that is wrong: `reason` is the machine word (FieldValueInvalid, …)."""

    reason: str
    message: str
    field: str

    @property
    def body(self) -> Obj:
        return {"reason": self.reason, "message": self.message, "field": self.field}


class Bare(ApiError):
    """An error whose `details` are there, but empty, as those of the generic handlers are."""


class Undecodable(ApiError):
    """The body does not fit the kind's type: 400, or 422 when a patch made it so."""

    def __init__(self, version: str, kind: str, why: str, actual: str = "") -> None:
        super().__init__(
            400, "BadRequest", f'{actual or kind} in version "{version}" cannot be handled as a {kind}: {why}'
        )
        self.why = why

    def in_patch(self, obj: Obj) -> ApiError:
        shown = orjson.dumps(orjson.dumps(obj, option=orjson.OPT_SORT_KEYS).decode()).decode()
        return invalid("", "", "", [Cause("FieldValueInvalid", f"Invalid value: {shown}: {self.why}", "patch")])


def status_body(error: ApiError) -> Obj:
    """The Status object of an error."""
    body: Obj = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": str(error),
    }
    if error.reason:
        body["reason"] = error.reason
    if error.details or isinstance(error, Bare):
        body["details"] = error.details
    body["code"] = error.code
    return body


def _details(group: str, kind: str, name: str = "") -> Obj:
    details: Obj = {}
    if name:
        details["name"] = name
    if group:
        details["group"] = group
    if kind:
        details["kind"] = kind
    return details


def qualified(group: str, word: str) -> str:
    return f"{word}.{group}" if group else word


def not_found(group: str, plural: str, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{qualified(group, plural)} "{name}" not found', _details(group, plural, name))


def no_such_path() -> ApiError:
    return Bare(404, "NotFound", "the server could not find the requested resource")


def already_exists(group: str, plural: str, name: str) -> ApiError:
    details = _details(group, plural, name)
    return ApiError(409, "AlreadyExists", f'{qualified(group, plural)} "{name}" already exists', details)


def conflict(group: str, plural: str, name: str, why: str) -> ApiError:
    text = f'Operation cannot be fulfilled on {qualified(group, plural)} "{name}": {why}'
    return ApiError(409, "Conflict", text, _details(group, plural, name))


def stale(group: str, plural: str, name: str) -> ApiError:
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return conflict(group, plural, name, why)


def forbidden(group: str, plural: str, name: str, why: str) -> ApiError:
    subject = (
        f"{qualified(group, plural)} is forbidden"
        if not name
        else (f'{qualified(group, plural)} "{name}" is forbidden')
    )
    return ApiError(403, "Forbidden", f"{subject}: {why}", _details(group, plural, name))


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def invalid(group: str, kind: str, name: str, causes: Sequence[Cause]) -> ApiError:
    """422; one cause is quoted as it is, several as a list."""
    distinct = dict.fromkeys(f"{cause.field}: {cause.message}" for cause in causes)
    listed = ", ".join(distinct)
    text = listed if len(distinct) == 1 else f"[{listed}]"
    details = _details(group, kind, name)
    details["causes"] = [cause.body for cause in causes]
    return ApiError(422, "Invalid", f'{qualified(group, kind)} "{name}" is invalid: {text}', details)


def internal(message: str) -> ApiError:
    """500 as Go's bare errors end up: no reason."""
    return ApiError(500, "", message)


def expired(message: str) -> ApiError:
    return ApiError(410, "Expired", message)


def method_not_allowed() -> ApiError:
    return Bare(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")


def unauthorized() -> ApiError:
    return ApiError(401, "Unauthorized", "Unauthorized")
