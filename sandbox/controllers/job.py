"""Jobs: pods that run to completion, counted exactly once.

Follows kube-controller-manager 1.36 (pkg/controller/job): a finished pod keeps a finalizer until the Job's status
has counted it. Jobs with ttlSecondsAfterFinished are deleted when their time has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sandbox.client import JOBS, PODS, ApiError, EventType, Key, Obj
from sandbox.controllers.objects import (
    condition,
    conditions,
    controller,
    deleting,
    finalizers,
    finished,
    is_true,
    key,
    name,
    namespace,
    node_of,
    notes,
    phase,
    pod_from,
    present,
    ready,
    seconds_since,
    stamp,
    uid,
)
from sandbox.controllers.work import Controller, Shared, each, namespace_ends
from sandbox.options import Clocks

_TRACKING = "batch.kubernetes.io/job-tracking"
_INDEX = "batch.kubernetes.io/job-completion-index"
_BACK_OFF_MAX = 60  # times the first pause: 10 minutes at real clocks


@dataclass(frozen=True, slots=True)
class Tally:
    """What is known of a Job's pods."""

    active: int
    succeeded: int
    failed: int


def wanted_active(spec: Obj, tally: Tally) -> int:
    """How many pods should run now."""
    parallelism = int(spec.get("parallelism", 1))
    if spec.get("completions") is None:
        return min(tally.active, parallelism) if tally.succeeded else parallelism
    return min(parallelism, max(0, int(spec["completions"]) - tally.succeeded))


def outcome(job: Obj, tally: Tally, restarts: int) -> tuple[str, str, str] | None:
    """(Complete or Failed, reason, message), or None while it goes on."""
    spec = job["spec"]
    limit = int(spec.get("backoffLimit", 6))
    if tally.failed > limit or (restarts >= limit if limit else restarts > 0):
        return "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    deadline, started = spec.get("activeDeadlineSeconds"), (job.get("status") or {}).get("startTime")
    if deadline is not None and started and not spec.get("suspend") and seconds_since(started) >= deadline:
        return "Failed", "DeadlineExceeded", "Job was active longer than specified deadline"
    completions = spec.get("completions")
    done = tally.succeeded >= completions if completions is not None else tally.succeeded > 0 and tally.active == 0
    return ("Complete", "CompletionsReached", "Reached expected number of succeeded pods") if done else None


def ranges(numbers: Iterable[int]) -> str:
    """Indexes as Jobs write them: 1,3-5,7."""
    spans: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a},{b}" for a, b in spans)


def parse_ranges(text: str) -> set[int]:
    found: set[int] = set()
    for span in filter(None, text.split(",")):
        low, _, high = span.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return found


def index_of(pod: Obj) -> int | None:
    text = notes(pod).get(_INDEX, "")
    return int(text) if text.isdigit() else None


def failed(pod: Obj) -> bool:
    """A pod being deleted before it succeeded counts as failed."""
    return phase(pod) == "Failed" or (deleting(pod) and phase(pod) != "Succeeded")


def with_condition(held: Sequence[Obj], type: str, status: str, reason: str, message: str) -> list[Obj]:
    old = next((c for c in held if c["type"] == type), None)
    if old is not None and (old["status"], old["reason"], old["message"]) == (status, reason, message):
        return list(held)
    at = stamp()
    fresh = {
        "type": type,
        "status": status,
        "lastProbeTime": at,
        "lastTransitionTime": at,
        "reason": reason,
        "message": message,
    }
    return [*(c for c in held if c["type"] != type), fresh]


def over(job: Obj) -> bool:
    return is_true(job, "Complete") or is_true(job, "Failed")


class Jobs(Controller):
    name = "job"

    def __init__(self, shared: Shared, clocks: Clocks) -> None:
        self._pause = clocks.back_off_first
        self._failures: dict[str, tuple[int, float]] = {}  # job's uid → failures in a row, when the last was seen
        super().__init__(shared)

    def setup(self) -> None:
        self.jobs = self.watch_own(JOBS)
        self.pods = self.watch_owned(PODS, JOBS)

    async def reconcile(self, key: Key) -> None:
        job = self.jobs.objects.get(key)
        if job is None or deleting(job):
            return
        if over(job):
            self._failures.pop(uid(job), None)
            await self._release(self._pods(job))
            await self._expire(key, job)
            return
        job = await self._count(job)
        tally = self._tally(job)
        verdict = outcome(job, tally, self._restarts(job))
        if verdict is not None:
            await self._finish(job, *verdict)
            return
        status = dict(job.get("status") or {})
        status.setdefault("startTime", stamp())
        job = await self._suspension(job, status)
        if not job["spec"].get("suspend"):
            await self._run(key, job, self._tally(job))
        await self._report(key, {})

    # -- counting

    def _pods(self, job: Obj) -> list[Obj]:
        return [pod for pod in self.pods.by("controller", uid(job)) if namespace(pod) == namespace(job)]

    async def _count(self, job: Obj) -> Obj:
        """Count finished pods: note them, let them go, add them up."""
        status = job.get("status") or {}
        noted = status.get("uncountedTerminatedPods") or {}
        known = {*noted.get("succeeded", ()), *noted.get("failed", ())}
        fresh = [p for p in self._pods(job) if _TRACKING in finalizers(p) and uid(p) not in known]
        won = [uid(p) for p in fresh if phase(p) == "Succeeded"]
        lost = [uid(p) for p in fresh if failed(p)]
        if lost:
            count, _ = self._failures.get(uid(job), (0, 0.0))
            self._failures[uid(job)] = (count + len(lost), asyncio.get_running_loop().time())
        elif won:
            self._failures.pop(uid(job), None)
        if won or lost:
            noted = present({
                "succeeded": [*noted.get("succeeded", ()), *won],
                "failed": [*noted.get("failed", ()), *lost],
            })  # fmt: skip
            job = await self.shared.status(JOBS, job, {**status, "uncountedTerminatedPods": noted})
        if not noted:
            return job
        marked = {*noted.get("succeeded", ()), *noted.get("failed", ())}
        await self._release([pod for pod in self._pods(job) if uid(pod) in marked])
        status = dict(job.get("status") or {})
        for field in ("succeeded", "failed"):
            if total := int(status.get(field) or 0) + len(noted.get(field, ())):
                status[field] = total
        if job["spec"].get("completionMode") == "Indexed":
            self._count_indexes(job, status, noted.get("succeeded", ()))
        return await self.shared.status(JOBS, job, {**status, "uncountedTerminatedPods": {}})

    def _count_indexes(self, job: Obj, status: Obj, won: Sequence[str]) -> None:
        done = parse_ranges(status.get("completedIndexes") or "")
        done |= {i for pod in self._pods(job) if uid(pod) in won and (i := index_of(pod)) is not None}
        status |= {"succeeded": len(done), "completedIndexes": ranges(done)}

    async def _release(self, pods: Sequence[Obj]) -> None:
        await each([release(self.shared, pod) for pod in pods if _TRACKING in finalizers(pod) and _ended(pod)])

    def _active(self, job: Obj) -> list[Obj]:
        return [pod for pod in self._pods(job) if not finished(pod) and not deleting(pod)]

    def _tally(self, job: Obj) -> Tally:
        status = job.get("status") or {}
        return Tally(len(self._active(job)), int(status.get("succeeded") or 0), int(status.get("failed") or 0))

    def _restarts(self, job: Obj) -> int:
        if job["spec"]["template"]["spec"].get("restartPolicy") != "OnFailure":
            return 0
        return sum(
            int(one.get("restartCount") or 0)
            for pod in self._active(job)
            for one in (pod.get("status") or {}).get("containerStatuses") or ()
        )

    # -- acting

    async def _suspension(self, job: Obj, status: Obj) -> Obj:
        suspended, noted = bool(job["spec"].get("suspend")), is_true(job, "Suspended")
        if suspended:
            await each([self._delete(job, pod) for pod in self._active(job)])
        if suspended != noted:
            reason, text = ("JobSuspended", "Job suspended") if suspended else ("JobResumed", "Job resumed")
            held = with_condition(conditions(job), "Suspended", "True" if suspended else "False", reason, text)
            status = {**status, "conditions": held, "startTime": stamp()}
            self.record(job, JOBS, "Normal", reason.removeprefix("Job"), text)
        if suspended:
            status.pop("startTime", None)
        if status != (job.get("status") or {}):
            return await self.shared.status(JOBS, job, status)
        return job

    async def _run(self, key: Key, job: Obj, tally: Tally) -> None:
        wanted = wanted_active(job["spec"], tally)
        if tally.active > wanted:
            running = sorted(self._active(job), key=lambda pod: (ready(pod), bool(node_of(pod))))
            await each([self._delete(job, pod) for pod in running[: tally.active - wanted]])
        elif tally.active < wanted:
            pause = self._pause_left(job)
            if pause > 0:
                self.queue.add_after(key, pause)
            else:
                await each([self._create(job, index) for index in self._indexes(job, wanted - tally.active)])
        deadline, started = job["spec"].get("activeDeadlineSeconds"), (job.get("status") or {}).get("startTime")
        if deadline is not None and started:
            self.queue.add_after(key, max(0.01, deadline - seconds_since(started)))

    def _pause_left(self, job: Obj) -> float:
        count, last = self._failures.get(uid(job), (0, 0.0))
        if not count:
            return 0.0
        pause = self._pause * min(2.0 ** (count - 1), _BACK_OFF_MAX)
        return pause - (asyncio.get_running_loop().time() - last)

    def _indexes(self, job: Obj, count: int) -> Sequence[int | None]:
        if job["spec"].get("completionMode") != "Indexed":
            return [None] * count
        taken = {index_of(pod) for pod in self._active(job)}
        taken |= parse_ranges((job.get("status") or {}).get("completedIndexes") or "")
        return [i for i in range(int(job["spec"]["completions"])) if i not in taken][:count]

    async def _create(self, job: Obj, index: int | None) -> None:
        pod = pod_from(job["spec"]["template"], job, JOBS)
        meta = pod["metadata"]
        meta["finalizers"] = [*meta.get("finalizers", ()), _TRACKING]
        if index is not None:
            meta["generateName"] = f"{name(job)}-{index}-"
            meta["annotations"] = {**meta.get("annotations", {}), _INDEX: str(index)}
            meta["labels"] = {**meta.get("labels", {}), _INDEX: str(index)}
            pod["spec"]["hostname"] = f"{name(job)}-{index}"
            pod["spec"]["containers"] = [_with_index(one) for one in pod["spec"]["containers"]]
        try:
            made = await self.shared.create(PODS, pod)
        except ApiError as error:
            if not namespace_ends(error):
                self.record(job, JOBS, "Warning", "FailedCreate", f"Error creating: {error}")
                raise
            return
        self.record(job, JOBS, "Normal", "SuccessfulCreate", f"Created pod: {name(made)}")

    async def _delete(self, job: Obj, pod: Obj) -> None:
        await self.shared.delete(PODS, pod)
        self.record(job, JOBS, "Normal", "SuccessfulDelete", f"Deleted pod: {name(pod)}")

    async def _finish(self, job: Obj, type: str, reason: str, message: str) -> None:
        """First say that it will end so, then, with all pods gone, that it has."""
        early = "SuccessCriteriaMet" if type == "Complete" else "FailureTarget"
        held = with_condition(conditions(job), early, "True", reason, message)
        status: Obj = {"conditions": held}
        await each([self._delete(job, pod) for pod in self._active(job)])
        if not any(not finished(pod) for pod in self._pods(job)):
            status["conditions"] = with_condition(held, type, "True", reason, message)
            if type == "Complete":
                status["completionTime"] = stamp()
                self.record(job, JOBS, "Normal", "Completed", "Job completed")
            else:
                self.record(job, JOBS, "Warning", reason, message)
        await self._report(key(job), status)

    async def _report(self, at: Key, changes: Obj) -> None:
        job = self.jobs.objects.get(at)
        if job is None:
            return
        running = self._active(job)
        status = {**(job.get("status") or {}), **changes}
        status.setdefault("uncountedTerminatedPods", {})
        status.pop("active", None)
        if running:
            status["active"] = len(running)
        status["ready"] = sum(ready(pod) for pod in running)
        status["terminating"] = sum(deleting(pod) and not finished(pod) for pod in self._pods(job))
        if status != job.get("status"):
            await self.shared.status(JOBS, job, status)

    async def _expire(self, at: Key, job: Obj) -> None:
        seconds = job["spec"].get("ttlSecondsAfterFinished")
        ended = condition(job, "Complete") if is_true(job, "Complete") else condition(job, "Failed")
        if seconds is None or ended is None:
            return
        left = float(seconds) - seconds_since(ended.get("lastTransitionTime"))
        if left > 0:
            self.queue.add_after(at, left)
        else:
            await self.shared.delete(JOBS, job, propagation="Foreground")


def _ended(pod: Obj) -> bool:
    return finished(pod) or deleting(pod)


def _with_index(container: Obj) -> Obj:
    value = {"fieldRef": {"fieldPath": f"metadata.labels['{_INDEX}']"}}
    rest = [one for one in container.get("env") or () if one["name"] != "JOB_COMPLETION_INDEX"]
    return {**container, "env": [*rest, {"name": "JOB_COMPLETION_INDEX", "valueFrom": value}]}


async def release(shared: Shared, pod: Obj) -> None:
    """Take the tracking finalizer off a pod."""
    rest = [one for one in finalizers(pod) if one != _TRACKING]
    version = pod["metadata"]["resourceVersion"]
    try:
        await shared.patch(PODS, pod, {"metadata": {"finalizers": rest or None, "resourceVersion": version}})
    except ApiError as error:
        if not error.not_found:
            raise


class JobPods(Controller):
    """Releases tracked pods whose Job is gone or disowned them."""

    name = "job-pods"

    def setup(self) -> None:
        self.jobs, self.pods = self.shared.caches.of(JOBS), self.shared.caches.of(PODS)
        self.jobs.subscribe(self._job_changed)
        self.pods.subscribe(self._pod_changed)

    def _job_changed(self, type: EventType, job: Obj, old: Obj | None) -> None:
        if type == "DELETED":
            for pod in self.pods.by("controller", uid(job)):
                self.queue.add(key(pod))

    def _pod_changed(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        if type != "DELETED" and _TRACKING in finalizers(pod) and not self._has_job(pod):
            self.queue.add(key(pod))

    def _has_job(self, pod: Obj) -> bool:
        ref = controller(pod)
        job = self.jobs.get(ref["name"], namespace(pod)) if ref is not None else None
        return ref is not None and job is not None and uid(job) == ref["uid"]

    async def reconcile(self, key: Key) -> None:
        pod = self.pods.objects.get(key)
        if pod is None or _TRACKING not in finalizers(pod) or self._has_job(pod):
            return
        ref = controller(pod)
        if ref is not None:  # the cache of jobs may only be late
            try:
                job = await self.shared.api.get(JOBS, ref["name"], key[0])
            except ApiError as error:
                if not error.not_found:
                    raise
            else:
                if uid(job) == ref["uid"]:
                    return
        await release(self.shared, pod)
