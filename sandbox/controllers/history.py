"""Revisions of StatefulSets and DaemonSets, kept as ControllerRevision objects."""

from __future__ import annotations

from collections.abc import Collection

from sandbox.client import CONTROLLERREVISIONS, ApiError, Kind, Obj
from sandbox.controllers.objects import (
    REVISION_HASH,
    controller_ref,
    created,
    digest,
    labels,
    name,
    namespace,
    plain,
    uid,
)
from sandbox.controllers.work import Shared


def data_of(owner: Obj) -> Obj:
    return {"spec": {"template": {**owner["spec"]["template"], "$patch": "replace"}}}


def revision(obj: Obj) -> int:
    return int(obj.get("revision") or 0)


def revisions(shared: Shared, owner: Obj) -> list[Obj]:
    """Oldest first."""
    held = shared.caches.of(CONTROLLERREVISIONS).by("controller", uid(owner))
    return sorted(held, key=lambda one: (revision(one), created(one), name(one)))


async def current(shared: Shared, owner: Obj, kind: Kind, *, full_hash: bool) -> Obj:
    """The revision of the owner's template, made or moved to the front if need be.

    `full_hash`: the label holds the revision's whole name, as StatefulSets have it.
    """
    known = revisions(shared, owner)
    newest = revision(known[-1]) if known else 0
    data = data_of(owner)
    for one in reversed(known):
        if plain(one.get("data")) == plain(data):
            if revision(one) == newest:
                return one
            return await shared.patch(CONTROLLERREVISIONS, one, {"revision": newest + 1})
    mark = digest(data, (owner.get("status") or {}).get("collisionCount") or 0)
    title = f"{name(owner)}-{mark}"
    template = owner["spec"]["template"].get("metadata") or {}
    body: Obj = {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": title,
            "namespace": namespace(owner),
            "labels": {**(template.get("labels") or {}), REVISION_HASH: title if full_hash else mark},
            "ownerReferences": [controller_ref(owner, kind)],
        },
        "data": data,
        "revision": newest + 1,
    }
    try:
        return await shared.create(CONTROLLERREVISIONS, body)
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
        return shared.caches.of(CONTROLLERREVISIONS).observe(
            await shared.api.get(CONTROLLERREVISIONS, title, namespace(owner))
        )


def hash_of(one: Obj) -> str:
    return labels(one).get(REVISION_HASH, "")


async def truncate(shared: Shared, owner: Obj, used: Collection[str]) -> None:
    """Delete the oldest revisions beyond the limit that no pod has."""
    limit = owner["spec"].get("revisionHistoryLimit")
    idle = [one for one in revisions(shared, owner) if hash_of(one) not in used]
    for one in idle[: max(0, len(idle) - (10 if limit is None else int(limit)))]:
        await shared.delete(CONTROLLERREVISIONS, one)
