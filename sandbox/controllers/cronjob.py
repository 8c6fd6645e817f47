"""CronJobs: a Job at each of their times. Follows kube-controller-manager 1.36 (pkg/controller/cronjob)."""

from __future__ import annotations

from datetime import datetime, timedelta

from sandbox.client import JOBS, ApiError, EventType, Key, Obj
from sandbox.controllers import cron
from sandbox.controllers.catalog import CRONJOBS
from sandbox.controllers.objects import (
    condition,
    controlled_by,
    controller,
    controller_ref,
    created,
    deleting,
    is_true,
    moment,
    name,
    namespace,
    now,
    present,
    stamp,
    uid,
)
from sandbox.controllers.work import Controller

_TIME = "batch.kubernetes.io/cronjob-scheduled-timestamp"


def due(schedule: cron.Schedule, spec: Obj, last: str, at: datetime) -> datetime | None:
    """The latest time that was missed since `last`, unless its starting deadline is over too."""
    since = moment(last)
    deadline = spec.get("startingDeadlineSeconds")
    if deadline is not None:
        since = max(since, at - timedelta(seconds=deadline))
    return schedule.latest(since, at, spec.get("timeZone") or "")


def ended(job: Obj) -> str:
    """ "Complete" or "Failed" of a finished Job, else ""."""
    return next((kind for kind in ("Complete", "Failed") if is_true(job, kind)), "")


def job_of(cronjob: Obj, at: datetime) -> Obj:
    """The Job of one time: its name says which, so that no time has two."""
    template = cronjob["spec"]["jobTemplate"]
    meta = template.get("metadata") or {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{name(cronjob)}-{int(at.timestamp()) // 60}",
            "namespace": namespace(cronjob),
            "labels": dict(meta.get("labels") or {}),
            "annotations": {**(meta.get("annotations") or {}), _TIME: stamp(at)},
            "ownerReferences": [controller_ref(cronjob, CRONJOBS)],
        },
        "spec": template["spec"],
    }


class CronJobs(Controller):
    name = "cronjob"
    source = "cronjob-controller"

    def setup(self) -> None:
        self.cronjobs = self.watch_own(CRONJOBS)
        self.jobs = self.shared.caches.of(JOBS)
        self.jobs.subscribe(self._job_changed)

    def _job_changed(self, type: EventType, job: Obj, old: Obj | None) -> None:
        ref = controller(job)
        if ref is not None and ref.get("kind") == "CronJob":
            self.queue.add((namespace(job), ref["name"]))

    async def reconcile(self, key: Key) -> None:
        cronjob = self.cronjobs.objects.get(key)
        if cronjob is None or deleting(cronjob):
            return
        jobs = [job for job in self.jobs.by("namespace", key[0]) if controlled_by(job, cronjob)]
        await self._tidy(cronjob, jobs)
        status = await self._start(key, cronjob, [job for job in jobs if not ended(job)])
        held = cronjob.get("status") or {}
        active = [job for job in self.jobs.by("namespace", key[0]) if controlled_by(job, cronjob) and not ended(job)]
        refs = [{"kind": "Job", "apiVersion": "batch/v1", "namespace": key[0], "name": name(job), "uid": uid(job),
                 "resourceVersion": job["metadata"]["resourceVersion"]} for job in active]  # fmt: skip
        if [ref["uid"] for ref in refs] == [ref["uid"] for ref in held.get("active") or ()]:
            refs = held.get("active") or []
        times = [(condition(job, "Complete") or {})["lastTransitionTime"] for job in jobs if is_true(job, "Complete")]
        fresh = present({**held, **status, "active": refs or None, "lastSuccessfulTime": max(
            [*times, *filter(None, (held.get("lastSuccessfulTime"),))], default=None)})  # fmt: skip
        if fresh != held:
            await self.shared.status(CRONJOBS, cronjob, fresh)

    async def _start(self, key: Key, cronjob: Obj, active: list[Obj]) -> Obj:
        """Make the Job that is due, if any, and come back at the next time. What changes of the status."""
        spec = cronjob["spec"]
        if spec.get("suspend"):
            return {}
        schedule, at = cron.parse(spec["schedule"]), now()
        last = (cronjob.get("status") or {}).get("lastScheduleTime") or created(cronjob)
        if following := schedule.next(at, spec.get("timeZone") or ""):
            self.queue.add_after(key, (following - at).total_seconds() + 0.1)
        when = due(schedule, spec, last, at)
        if when is None:
            return {}
        if active and spec.get("concurrencyPolicy") == "Forbid":
            text = "Not starting job because prior execution is running and concurrency policy is Forbid"
            self.record(cronjob, CRONJOBS, "Normal", "JobAlreadyActive", text)
            return {}
        if active and spec.get("concurrencyPolicy") == "Replace":
            for job in active:
                await self._delete(cronjob, job)
        try:
            job = await self.shared.create(JOBS, job_of(cronjob, when))
        except ApiError as there:
            if there.reason != "AlreadyExists":
                raise
        else:
            self.record(cronjob, CRONJOBS, "Normal", "SuccessfulCreate", f"Created job {name(job)}")
        return {"lastScheduleTime": stamp(when)}

    async def _tidy(self, cronjob: Obj, jobs: list[Obj]) -> None:
        """Keep as many finished Jobs as the limits say, the newest."""
        spec = cronjob["spec"]
        for kind, limit in (("Complete", "successfulJobsHistoryLimit"), ("Failed", "failedJobsHistoryLimit")):
            done = sorted((job for job in jobs if ended(job) == kind and not deleting(job)), key=created)
            most = spec.get(limit)
            for job in done[: len(done) - most] if most is not None else ():
                await self._delete(cronjob, job)

    async def _delete(self, cronjob: Obj, job: Obj) -> None:
        await self.shared.delete(JOBS, job, propagation="Background")
        self.record(cronjob, CRONJOBS, "Normal", "SuccessfulDelete", f"Deleted job {name(job)}")
