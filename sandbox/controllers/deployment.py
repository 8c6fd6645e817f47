"""Deployments: rolling update, re-creation, pause, rollback, revision history, conditions.

Follows kube-controller-manager 1.36 (pkg/controller/deployment); the arithmetic is in `rollout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.client import DEPLOYMENTS, PODS, REPLICASETS, ApiError, EventType, Key, Obj
from sandbox.controllers.objects import (
    POD_TEMPLATE_HASH,
    condition,
    conditions,
    controller,
    controller_ref,
    created,
    deleting,
    digest,
    finished,
    generation,
    name,
    namespace,
    notes,
    plain,
    present,
    seconds_since,
    selects_nothing,
    stamp,
    uid,
    without,
)
from sandbox.controllers.replicaset import claim
from sandbox.controllers.rollout import Bounds, Size, bounds, new_size, proportional, shrink_old
from sandbox.controllers.work import Controller, observed

REVISION = "deployment.kubernetes.io/revision"
HISTORY = "deployment.kubernetes.io/revision-history"
DESIRED = "deployment.kubernetes.io/desired-replicas"
MOST = "deployment.kubernetes.io/max-replicas"
_NOT_COPIED = {
    "kubectl.kubernetes.io/last-applied-configuration",
    "deprecated.deployment.rollback.to",
    REVISION,
    HISTORY,
    DESIRED,
    MOST,
}
_NO_DEADLINE = 2**31 - 1


def limits(deployment: Obj) -> Bounds:
    rolling = (deployment["spec"].get("strategy") or {}).get("rollingUpdate") or {}
    return bounds(
        wanted(deployment), strategy(deployment), rolling.get("maxSurge", "25%"), rolling.get("maxUnavailable", "25%")
    )


def strategy(deployment: Obj) -> str:
    return str((deployment["spec"].get("strategy") or {}).get("type") or "RollingUpdate")


def wanted(obj: Obj) -> int:
    replicas = obj["spec"].get("replicas")
    return 1 if replicas is None else int(replicas)


def revision(rs: Obj) -> int:
    text = notes(rs).get(REVISION, "0")
    return int(text) if text.isdigit() else 0


def _status(rs: Obj | None, field: str) -> int:
    return int(((rs or {}).get("status") or {}).get(field) or 0)


def same_template(one: Obj, other: Obj) -> bool:
    """Whether two pod templates differ in nothing but the hash label."""

    def bare(template: Obj) -> Any:
        meta = template.get("metadata") or {}
        kept = without(meta.get("labels") or {}, POD_TEMPLATE_HASH)
        return plain({**template, "metadata": {"labels": kept, "annotations": meta.get("annotations")}})

    return bool(bare(one) == bare(other))


def annotated(deployment: Obj, rs: Obj | None, number: int) -> dict[str, str]:
    """The annotations of the new ReplicaSet at revision `number`; `rs` is it, if it exists already."""
    have = dict(notes(rs)) if rs else {}
    have.update({k: v for k, v in notes(deployment).items() if k not in _NOT_COPIED})
    before = have.get(REVISION)
    if before is None or int(before or 0) < number:
        if before:
            have[HISTORY] = f"{have[HISTORY]},{before}" if have.get(HISTORY) else before
        have[REVISION] = str(number)
    if rs is None:
        have |= {DESIRED: str(wanted(deployment)), MOST: str(limits(deployment).most)}
    return have


# -- status


def with_condition(held: Sequence[Obj], fresh: Obj) -> list[Obj]:
    """Conditions with one set: the same status and reason change nothing, the same status keeps its time."""
    current = next((c for c in held if c["type"] == fresh["type"]), None)
    if current and current["status"] == fresh["status"] and current["reason"] == fresh["reason"]:
        return list(held)
    if current and current["status"] == fresh["status"]:
        fresh = {**fresh, "lastTransitionTime": current.get("lastTransitionTime")}
    return [*(c for c in held if c["type"] != fresh["type"]), fresh]


def make_condition(type: str, status: str, reason: str, message: str) -> Obj:
    at = stamp()
    return {
        "type": type,
        "status": status,
        "lastUpdateTime": at,
        "lastTransitionTime": at,
        "reason": reason,
        "message": message,
    }


@dataclass(frozen=True, slots=True)
class Family:
    """A Deployment's ReplicaSets: the one of the current template, if any, and the others."""

    new: Obj | None
    old: tuple[Obj, ...]

    @property
    def all(self) -> tuple[Obj, ...]:
        return (*self.old, self.new) if self.new else self.old

    @property
    def active_old(self) -> tuple[Obj, ...]:
        return tuple(rs for rs in self.old if wanted(rs) > 0)


def counted(deployment: Obj, family: Family) -> Obj:
    """Status with fresh counts and the Available condition; other conditions as they are."""
    limit = limits(deployment)
    available = sum(_status(rs, "availableReplicas") for rs in family.all)
    total = sum(wanted(rs) for rs in family.all)
    if available >= limit.least_available:
        fresh = make_condition("Available", "True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    else:
        fresh = make_condition(
            "Available", "False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability."
        )
    status = present({
        "replicas": sum(_status(rs, "replicas") for rs in family.all),
        "updatedReplicas": _status(family.new, "replicas"),
        "readyReplicas": sum(_status(rs, "readyReplicas") for rs in family.all),
        "availableReplicas": available,
        "unavailableReplicas": max(0, total - available),
        "collisionCount": _status(deployment, "collisionCount"),
    })  # fmt: skip
    status["observedGeneration"] = generation(deployment)
    status["terminatingReplicas"] = sum(_status(rs, "terminatingReplicas") for rs in family.all)
    status["conditions"] = with_condition(conditions(deployment), fresh)
    return status


def is_complete(deployment: Obj, status: Obj) -> bool:
    replicas = wanted(deployment)
    return all(
        int(status.get(f) or 0) == replicas for f in ("updatedReplicas", "replicas", "availableReplicas")
    ) and int(status.get("observedGeneration") or 0) >= generation(deployment)


def progressed(old: Obj, new: Obj) -> bool:
    def gain(field: str) -> int:
        return int(new.get(field) or 0) - int(old.get(field) or 0)

    fewer_old = gain("replicas") - gain("updatedReplicas") < 0
    return fewer_old or any(gain(f) > 0 for f in ("updatedReplicas", "readyReplicas", "availableReplicas"))


def deadline(deployment: Obj) -> int | None:
    seconds = deployment["spec"].get("progressDeadlineSeconds")
    return None if seconds is None or seconds == _NO_DEADLINE else int(seconds)


def timed_out(deployment: Obj, status: Obj) -> bool:
    found = next((c for c in status["conditions"] if c["type"] == "Progressing"), None)
    limit = deadline(deployment)
    if found is None or limit is None or found["reason"] == "NewReplicaSetAvailable":
        return False
    return found["reason"] == "ProgressDeadlineExceeded" or seconds_since(found.get("lastUpdateTime")) > limit


def judged(deployment: Obj, family: Family) -> Obj:
    """Status of a rollout: counts, Available, Progressing, ReplicaFailure."""
    old = deployment.get("status") or {}
    status = counted(deployment, family)
    held = status["conditions"]
    progressing = next((c for c in held if c["type"] == "Progressing"), None)
    subject = f'ReplicaSet "{name(family.new)}"' if family.new else f'Deployment "{name(deployment)}"'
    settled = (
        status.get("replicas") == status.get("updatedReplicas")
        and progressing is not None
        and progressing["reason"] == "NewReplicaSetAvailable"
    )
    if deadline(deployment) is None:
        held = [c for c in held if c["type"] != "Progressing"]
    elif not settled:
        held = _progress(deployment, old, status, held, progressing, subject)
    failure = next((c for rs in family.all for c in conditions(rs) if c["type"] == "ReplicaFailure"), None)
    held = [c for c in held if c["type"] != "ReplicaFailure"] if failure is None else with_condition(
        held, make_condition("ReplicaFailure", "True", failure["reason"], failure["message"])
    )  # fmt: skip
    return {**status, "conditions": held}


def _progress(
    deployment: Obj, old: Obj, status: Obj, held: list[Obj], progressing: Obj | None, subject: str
) -> list[Obj]:
    if is_complete(deployment, status):
        message = f"{subject} has successfully progressed."
        return with_condition(held, make_condition("Progressing", "True", "NewReplicaSetAvailable", message))
    if progressed(old, status):
        fresh = make_condition("Progressing", "True", "ReplicaSetUpdated", f"{subject} is progressing.")
        if progressing is not None and progressing["status"] == "True":
            fresh["lastTransitionTime"] = progressing.get("lastTransitionTime")
        return [*(c for c in held if c["type"] != "Progressing"), fresh]
    if timed_out(deployment, status):
        message = f"{subject} has timed out progressing."
        return with_condition(held, make_condition("Progressing", "False", "ProgressDeadlineExceeded", message))
    return held


# -- the controller


class Deployments(Controller):
    name = "deployment"
    workers = 4

    def setup(self) -> None:
        self.deployments = self.watch_own(DEPLOYMENTS)
        self.sets = self.watch_owned(REPLICASETS, DEPLOYMENTS)
        self.pods = self.shared.caches.of(PODS)
        self.pods.subscribe(self._pod_gone)

    def _pod_gone(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        """Recreate waits for the last old pod to end."""
        ref = controller(pod)
        if type != "DELETED" or ref is None or ref.get("kind") != "ReplicaSet":
            return
        rs = self.sets.objects.get((namespace(pod), ref["name"]))
        owner = controller(rs) if rs else None
        if owner is not None:
            self.queue.add((namespace(pod), owner["name"]))

    async def reconcile(self, key: Key) -> None:
        deployment = self.deployments.objects.get(key)
        if deployment is None or selects_nothing(deployment["spec"].get("selector")):
            return
        family = self._family(deployment, await self._claimed(deployment))
        if deleting(deployment):
            await self._report(deployment, counted(deployment, family))
            return
        deployment = await self._check_paused(deployment)
        if deployment["spec"].get("paused") or self._scaled_outside(deployment, family):
            await self._scale_only(deployment, family)
        elif strategy(deployment) == "Recreate":
            await self._recreate(deployment, family)
        else:
            await self._roll(deployment, family)

    async def _claimed(self, deployment: Obj) -> list[Obj]:
        space = namespace(deployment)
        found = [
            rs
            for rs in (*self.sets.by("controller", uid(deployment)), *self.sets.by("controller", ""))
            if namespace(rs) == space
        ]
        return await claim(self.shared, deployment, DEPLOYMENTS, deployment["spec"]["selector"], REPLICASETS, found)

    @staticmethod
    def _family(deployment: Obj, sets: Sequence[Obj]) -> Family:
        ordered = sorted(sets, key=lambda rs: (created(rs), name(rs)))
        template = deployment["spec"]["template"]
        new = next((rs for rs in ordered if same_template(rs["spec"]["template"], template)), None)
        return Family(new, tuple(rs for rs in ordered if rs is not new))

    async def _check_paused(self, deployment: Obj) -> Obj:
        held = condition(deployment, "Progressing")
        if deadline(deployment) is None or (held and held["reason"] == "ProgressDeadlineExceeded"):
            return deployment
        noted = held is not None and held["reason"] == "DeploymentPaused"
        paused = bool(deployment["spec"].get("paused"))
        if paused == noted:
            return deployment
        fresh = (
            make_condition("Progressing", "Unknown", "DeploymentPaused", "Deployment is paused")
            if paused
            else make_condition("Progressing", "Unknown", "DeploymentResumed", "Deployment is resumed")
        )
        status = {**(deployment.get("status") or {}), "conditions": with_condition(conditions(deployment), fresh)}
        return await self.shared.status(DEPLOYMENTS, deployment, status)

    @staticmethod
    def _scaled_outside(deployment: Obj, family: Family) -> bool:
        return any(
            wanted(rs) > 0 and notes(rs).get(DESIRED, str(wanted(deployment))) != str(wanted(deployment))
            for rs in family.all
        )

    # -- the ReplicaSet of the current template

    async def _with_new(self, deployment: Obj, family: Family, *, make: bool) -> tuple[Obj, Family]:
        """Give the new ReplicaSet its revision, creating it if wanted."""
        number = max((revision(rs) for rs in family.old), default=0) + 1
        if family.new is None and not make:
            return deployment, family
        if family.new is None:
            deployment, family = await self._create_new(deployment, family, number)
        else:
            have = annotated(deployment, family.new, number)
            patience = deployment["spec"].get("minReadySeconds") or 0
            if have != notes(family.new) or patience != (family.new["spec"].get("minReadySeconds") or 0):
                patch = {"metadata": {"annotations": have}, "spec": {"minReadySeconds": patience}}
                family = Family(await self.shared.patch(REPLICASETS, family.new, patch), family.old)
        assert family.new is not None
        return await self._set_revision(deployment, str(max(revision(family.new), number))), family

    async def _create_new(self, deployment: Obj, family: Family, number: int) -> tuple[Obj, Family]:
        template = deployment["spec"]["template"]
        mark = digest(template, _status(deployment, "collisionCount"))
        meta = template.get("metadata") or {}
        tags = {**(meta.get("labels") or {}), POD_TEMPLATE_HASH: mark}
        selector = deployment["spec"]["selector"]
        total = sum(wanted(rs) for rs in family.old)
        size = new_size(limits(deployment), strategy(deployment), 0, total)
        rs: Obj = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": f"{name(deployment)}-{mark}",
                "namespace": namespace(deployment),
                "labels": tags,
                "annotations": annotated(deployment, None, number),
                "ownerReferences": [controller_ref(deployment, DEPLOYMENTS)],
            },
            "spec": {
                "replicas": size,
                "selector": {
                    **selector,
                    "matchLabels": {**(selector.get("matchLabels") or {}), POD_TEMPLATE_HASH: mark},
                },
                "template": {**template, "metadata": {**meta, "labels": tags}},
            },
        }
        if deployment["spec"].get("minReadySeconds"):
            rs["spec"]["minReadySeconds"] = deployment["spec"]["minReadySeconds"]
        try:
            made = await self.shared.create(REPLICASETS, rs)
        except ApiError as error:
            if error.code == 409 and error.reason == "AlreadyExists":
                await self._collided(deployment, rs)
            raise
        if size:
            self._scaled_event(deployment, made, 0, size)
        if deadline(deployment) is not None:
            message = f'Created new replica set "{name(made)}"'
            fresh = make_condition("Progressing", "True", "NewReplicaSetCreated", message)
            status = {**(deployment.get("status") or {}), "conditions": with_condition(conditions(deployment), fresh)}
            deployment = {**deployment, "status": status}  # written with the revision
        return deployment, Family(made, family.old)

    async def _collided(self, deployment: Obj, rs: Obj) -> None:
        """Another object has the name this template hashes to: take the next hash, unless the cache is just late."""
        taken = await self.shared.api.get(REPLICASETS, name(rs), namespace(rs))
        ref = controller(taken)
        if ref and ref["uid"] == uid(deployment) and same_template(taken["spec"]["template"], rs["spec"]["template"]):
            self.sets.observe(taken)
            return
        status = deployment.get("status") or {}
        await self.shared.status(
            DEPLOYMENTS, deployment, {**status, "collisionCount": _status(deployment, "collisionCount") + 1}
        )

    async def _set_revision(self, deployment: Obj, number: str) -> Obj:
        """Note the revision along with the status: by a plain update the generation would rise."""
        if notes(deployment).get(REVISION) == number:
            return deployment
        meta = {**deployment["metadata"], "annotations": {**notes(deployment), REVISION: number}}
        return await self.shared.status(DEPLOYMENTS, {**deployment, "metadata": meta}, deployment.get("status") or {})

    # -- scaling

    async def _resize(self, deployment: Obj, rs: Obj, size: int) -> Obj:
        """Set a ReplicaSet's size and note the bounds it was set under."""
        desired, most = str(wanted(deployment)), str(limits(deployment).most)
        have = notes(rs)
        if wanted(rs) == size and have.get(DESIRED) == desired and have.get(MOST) == most:
            return rs
        patch: Obj = {"metadata": {"annotations": {DESIRED: desired, MOST: most}}, "spec": {"replicas": size}}
        patch["metadata"]["resourceVersion"] = rs["metadata"]["resourceVersion"]
        resized = await self.shared.patch(REPLICASETS, rs, patch)
        if wanted(rs) != size:
            self._scaled_event(deployment, rs, wanted(rs), size)
        return resized

    def _scaled_event(self, deployment: Obj, rs: Obj, before: int, after: int) -> None:
        way = "up" if after > before else "down"
        message = f"Scaled {way} replica set {name(rs)} from {before} to {after}"
        self.record(deployment, DEPLOYMENTS, "Normal", "ScalingReplicaSet", message)

    async def _scale_only(self, deployment: Obj, family: Family) -> None:
        """Follow spec.replicas without rolling anything out."""
        deployment, family = await self._with_new(deployment, family, make=False)
        await self._scale(deployment, family)
        await self._refreshed(deployment, rollout=False)

    async def _scale(self, deployment: Obj, family: Family) -> None:
        only = _active_or_latest(family)
        if only is not None:
            await self._resize(deployment, only, wanted(deployment))
            return
        if _saturated(deployment, family.new):
            for rs in family.active_old:
                await self._resize(deployment, rs, 0)
            return
        if strategy(deployment) != "RollingUpdate":
            return
        sizes = proportional(limits(deployment), [_size(rs) for rs in family.all], _status(deployment, "replicas"))
        for rs in family.all:
            if name(rs) in sizes:
                await self._resize(deployment, rs, sizes[name(rs)])

    # -- strategies

    async def _roll(self, deployment: Obj, family: Family) -> None:
        deployment, family = await self._with_new(deployment, family, make=True)
        new = family.new
        assert new is not None
        limit = limits(deployment)
        total = sum(wanted(rs) for rs in family.all)
        size = wanted(deployment) if wanted(new) > wanted(deployment) else new_size(
            limit, "RollingUpdate", wanted(new), total
        )  # fmt: skip
        if size != wanted(new):
            await self._resize(deployment, new, size)
        elif sizes := shrink_old(limit, _size(new), [_size(rs) for rs in family.active_old]):
            for rs in family.active_old:
                if name(rs) in sizes:
                    await self._resize(deployment, rs, sizes[name(rs)])
        else:
            await self._clean_up(deployment, family)
        await self._refreshed(deployment, rollout=True)

    async def _recreate(self, deployment: Obj, family: Family) -> None:
        deployment, family = await self._with_new(deployment, family, make=False)
        if family.active_old:
            for rs in family.active_old:
                await self._resize(deployment, rs, 0)
        elif not self._old_pods_run(deployment, family):
            deployment, family = await self._with_new(deployment, family, make=True)
            assert family.new is not None
            await self._resize(deployment, family.new, wanted(deployment))
            await self._clean_up(deployment, family)
        await self._refreshed(deployment, rollout=True)

    def _old_pods_run(self, deployment: Obj, family: Family) -> bool:
        return any(not finished(pod) for rs in family.old for pod in self.pods.by("controller", uid(rs)))

    async def _clean_up(self, deployment: Obj, family: Family) -> None:
        """Keep no more emptied ReplicaSets than the revision history asks for."""
        keep = deployment["spec"].get("revisionHistoryLimit")
        if keep is None or not is_complete(deployment, deployment.get("status") or {}):
            return
        idle = sorted((rs for rs in family.old if not deleting(rs)), key=lambda rs: (revision(rs), created(rs)))
        for rs in idle[: max(0, len(idle) - int(keep))]:
            if wanted(rs) == 0 and _status(rs, "replicas") == 0 and observed(rs):
                await self.shared.delete(REPLICASETS, rs, propagation="Background")

    # -- status

    async def _refreshed(self, deployment: Obj, *, rollout: bool) -> None:
        """Write the status that follows from the ReplicaSets as they are now."""
        mine = [rs for rs in self.sets.by("controller", uid(deployment)) if namespace(rs) == namespace(deployment)]
        family = self._family(deployment, mine)
        status = judged(deployment, family) if rollout else counted(deployment, family)
        await self._report(deployment, status)
        if rollout:
            self._watch_deadline(deployment, status)

    async def _report(self, deployment: Obj, status: Obj) -> None:
        if status != (deployment.get("status") or {}):
            await self.shared.status(DEPLOYMENTS, deployment, status)

    def _watch_deadline(self, deployment: Obj, status: Obj) -> None:
        limit = deadline(deployment)
        found = next((c for c in status["conditions"] if c["type"] == "Progressing"), None)
        if limit is None or found is None or is_complete(deployment, status):
            return
        if found["reason"] in ("ProgressDeadlineExceeded", "NewReplicaSetAvailable"):
            return
        left = limit - seconds_since(found.get("lastUpdateTime"))
        self.queue.add_after((namespace(deployment), name(deployment)), max(left, 0) + 1)


def _size(rs: Obj) -> Size:
    most = notes(rs).get(MOST, "")
    return Size(
        name=name(rs),
        replicas=wanted(rs),
        available=_status(rs, "availableReplicas"),
        created=created(rs),
        most=int(most) if most.isdigit() else 0,
    )


def _active_or_latest(family: Family) -> Obj | None:
    """The only ReplicaSet to scale: the one active, or the newest when none is."""
    active = [rs for rs in family.all if wanted(rs) > 0]
    if not active:
        return family.new or (family.old[-1] if family.old else None)
    return active[0] if len(active) == 1 else None


def _saturated(deployment: Obj, rs: Obj | None) -> bool:
    if rs is None:
        return False
    desired = notes(rs).get(DESIRED, "")
    size = wanted(deployment)
    return wanted(rs) == size and desired == str(size) and _status(rs, "availableReplicas") == size
