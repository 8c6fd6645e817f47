"""StatefulSets: pods with names that stay, made and let go in order.

Follows kube-controller-manager 1.36 (pkg/controller/statefulset). The next action is decided by pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sandbox.client import PODS, STATEFULSETS, ApiError, Key, Obj
from sandbox.controllers import history
from sandbox.controllers.catalog import CLAIMS
from sandbox.controllers.objects import (
    REVISION_HASH,
    available_in,
    deleting,
    finished,
    generation,
    labels,
    name,
    namespace,
    now,
    pod_from,
    present,
    ready,
    selects_nothing,
    uid,
)
from sandbox.controllers.work import Controller, namespace_ends

_POD_NAME = "statefulset.kubernetes.io/pod-name"
_POD_INDEX = "apps.kubernetes.io/pod-index"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do for one ordinal."""

    what: Literal["create", "delete"]
    ordinal: int


def wanted(owner: Obj) -> int:
    replicas = owner["spec"].get("replicas")
    return 1 if replicas is None else int(replicas)


def first(owner: Obj) -> int:
    return int((owner["spec"].get("ordinals") or {}).get("start") or 0)


def ordinal(owner: Obj, pod: Obj) -> int | None:
    parent, _, number = name(pod).rpartition("-")
    return int(number) if parent == name(owner) and number.isdigit() else None


def healthy(owner: Obj, pod: Obj) -> bool:
    """Running, ready for minReadySeconds, not on its way out."""
    return not deleting(pod) and available_in(pod, int(owner["spec"].get("minReadySeconds") or 0), now()) == 0


def steps(owner: Obj, pods: Mapping[int, Obj], update: str) -> list[Step]:
    """What to do next. In order (OrderedReady) that is one thing at most, and nothing while a pod is under way."""
    parallel = owner["spec"].get("podManagementPolicy") == "Parallel"
    start = first(owner)
    todo: list[Step] = []
    for at in range(start, start + wanted(owner)):
        pod = pods.get(at)
        if pod is None:
            todo.append(Step("create", at))
        elif finished(pod) and not deleting(pod):
            todo.append(Step("delete", at))
        elif healthy(owner, pod) or parallel:
            continue
        elif not todo:
            return []  # wait for it
        if todo and not parallel:
            return todo
    for at in sorted((at for at in pods if not start <= at < start + wanted(owner)), reverse=True):
        if deleting(pods[at]):
            if not parallel:
                return todo
            continue
        todo.append(Step("delete", at))
        if not parallel:
            return todo
    return todo or _outdated(owner, pods, update)


def _outdated(owner: Obj, pods: Mapping[int, Obj], update: str) -> list[Step]:
    """The next pod of an old revision to replace: from the highest, each once the one before is healthy."""
    strategy = owner["spec"].get("updateStrategy") or {}
    if strategy.get("type", "RollingUpdate") != "RollingUpdate":
        return []
    lowest = first(owner) + int((strategy.get("rollingUpdate") or {}).get("partition") or 0)
    for at in sorted((at for at in pods if at >= lowest), reverse=True):
        if labels(pods[at]).get(REVISION_HASH) != update and not deleting(pods[at]):
            return [Step("delete", at)]
        if not healthy(owner, pods[at]):
            return []
    return []


def status_of(owner: Obj, pods: Sequence[Obj], current: str, update: str) -> Obj:
    least = int(owner["spec"].get("minReadySeconds") or 0)
    alive = [pod for pod in pods if not finished(pod)]

    def at(revision: str) -> int:
        return sum(labels(pod).get(REVISION_HASH) == revision and not deleting(pod) for pod in alive)

    counts = {
        "replicas": len(alive),
        "ready": sum(ready(pod) for pod in alive),
        "available": sum(available_in(pod, least, now()) == 0 for pod in alive),
    }
    strategy = (owner["spec"].get("updateStrategy") or {}).get("type", "RollingUpdate")
    done = at(update) == counts["replicas"] == counts["ready"] == wanted(owner)
    if current != update and strategy == "RollingUpdate" and done:
        current = update
    return {
        "observedGeneration": generation(owner),
        "replicas": counts["replicas"],
        **present({
            "readyReplicas": counts["ready"],
            "currentReplicas": at(current),
            "updatedReplicas": at(update),
        }),
        "currentRevision": current,
        "updateRevision": update,
        "collisionCount": int((owner.get("status") or {}).get("collisionCount") or 0),
        "availableReplicas": counts["available"],
    }  # fmt: skip


class StatefulSets(Controller):
    name = "statefulset"

    def setup(self) -> None:
        self.sets = self.watch_own(STATEFULSETS)
        self.pods = self.watch_owned(PODS, STATEFULSETS)

    async def reconcile(self, key: Key) -> None:
        owner = self.sets.objects.get(key)
        if owner is None or deleting(owner) or selects_nothing(owner["spec"].get("selector")):
            return
        newest = await history.current(self.shared, owner, STATEFULSETS, full_hash=True)
        update = history.hash_of(newest)
        current = (owner.get("status") or {}).get("currentRevision") or update
        pods = self._pods(owner)
        by_ordinal = {at: pod for pod in pods if (at := ordinal(owner, pod)) is not None}
        for step in steps(owner, by_ordinal, update):
            if step.what == "create":
                await self._create(owner, step.ordinal, current, update)
            else:
                await self._delete(owner, by_ordinal[step.ordinal])
        await self._report(key, current, update)
        used = {current, update, *(labels(pod).get(REVISION_HASH, "") for pod in pods)}
        await history.truncate(self.shared, owner, used)

    def _pods(self, owner: Obj) -> list[Obj]:
        return [pod for pod in self.pods.by("controller", uid(owner)) if namespace(pod) == namespace(owner)]

    async def _report(self, key: Key, current: str, update: str) -> None:
        owner = self.sets.objects.get(key)
        if owner is None:
            return
        pods = self._pods(owner)
        waits = [available_in(pod, int(owner["spec"].get("minReadySeconds") or 0), now()) for pod in pods]
        if left := [wait for wait in waits if wait]:
            self.queue.add_after(key, min(left))
        status = status_of(owner, pods, current, update)
        if status != owner.get("status"):
            await self.shared.status(STATEFULSETS, owner, status)

    async def _create(self, owner: Obj, at: int, current: str, update: str) -> None:
        partition = ((owner["spec"].get("updateStrategy") or {}).get("rollingUpdate") or {}).get("partition") or 0
        mark, template = update, owner["spec"]["template"]
        if at < first(owner) + int(partition) and current != update:
            old = next((r for r in history.revisions(self.shared, owner) if history.hash_of(r) == current), None)
            if old is not None:
                mark, template = current, old["data"]["spec"]["template"]
        title = f"{name(owner)}-{at}"
        pod = pod_from(template, owner, STATEFULSETS)
        pod["metadata"]["name"] = title
        pod["metadata"]["labels"] = {
            **pod["metadata"].get("labels", {}),
            REVISION_HASH: mark,
            _POD_NAME: title,
            _POD_INDEX: str(at),
        }
        pod["spec"] |= {"hostname": title, "subdomain": owner["spec"].get("serviceName") or ""}
        await self._claims(owner, pod, title)
        try:
            await self.shared.create(PODS, pod)
        except ApiError as error:
            if not namespace_ends(error):
                message = f"create Pod {title} in StatefulSet {name(owner)} failed error: {error}"
                self.record(owner, STATEFULSETS, "Warning", "FailedCreate", message)
                raise
            return
        message = f"Create Pod {title} in StatefulSet {name(owner)} successful"
        self.record(owner, STATEFULSETS, "Normal", "SuccessfulCreate", message)

    async def _claims(self, owner: Obj, pod: Obj, title: str) -> None:
        """A PersistentVolumeClaim per template and ordinal; it outlives the pod."""
        volumes = list(pod["spec"].get("volumes") or ())
        for template in owner["spec"].get("volumeClaimTemplates") or ():
            claim = f"{name(template)}-{title}"
            volumes = [v for v in volumes if v["name"] != name(template)]
            volumes.append({"name": name(template), "persistentVolumeClaim": {"claimName": claim}})
            body = {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {
                    "name": claim,
                    "namespace": namespace(owner),
                    "labels": (owner["spec"]["selector"].get("matchLabels") or {}),
                },
                "spec": template["spec"],
            }
            try:
                await self.shared.api.create(CLAIMS, body, namespace(owner))
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        if volumes:
            pod["spec"]["volumes"] = volumes

    async def _delete(self, owner: Obj, pod: Obj) -> None:
        await self.shared.delete(PODS, pod)
        message = f"Delete Pod {name(pod)} in StatefulSet {name(owner)} successful"
        self.record(owner, STATEFULSETS, "Normal", "SuccessfulDelete", message)
