"""Validation of built-in kinds, in the real server's words."""

from __future__ import annotations

import re

from sandbox.apiserver import errors
from sandbox.apiserver.errors import Cause
from sandbox.apiserver.resources import Resource
from sandbox.client import Obj


def check_create(res: Resource, obj: Obj) -> None:
    """Raises ApiError(422)."""
    causes = _name(res, obj)
    if causes:
        raise errors.invalid(res.group, res.kind, obj["metadata"].get("name") or "", causes)


def check_update(res: Resource, new: Obj, old: Obj, sub: str) -> None:
    """Raises ApiError(422)."""
    meta, before = new["metadata"], old["metadata"]
    if before.get("deletionTimestamp"):
        added = [entry for entry in meta.get("finalizers") or [] if entry not in (before.get("finalizers") or [])]
        if added:
            shown = ", ".join(f'"{entry}"' for entry in added)
            message = (
                "Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers "
                f"[]string{{{shown}}}"
            )
            raise errors.invalid(res.group, res.kind, meta["name"],
                                 [Cause("FieldValueForbidden", message, "metadata.finalizers")])


def _name(res: Resource, obj: Obj) -> list[Cause]:
    name = obj["metadata"].get("name")
    if not name:
        return [Cause("FieldValueRequired", "Required value: name or generateName is required", "metadata.name")]
    if not re.fullmatch(r"[^/%]+", name):
        return [Cause("FieldValueInvalid", f'Invalid value: "{name}"', "metadata.name")]
    return []
