"""One container of a pod, from start to start: pulling, starting, probing, killing, backing off.

The sequences are kubelet's: facts/kubelet.md §2 (crash), §4 (changed image), §5 (failed probes).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sandbox.client import Obj
from sandbox.controllers.objects import milli
from sandbox.node import cgroups, images, logs, probes, security
from sandbox.node.cgroups import Group
from sandbox.node.security import Security
from sandbox.node.status import ContainerView, go_duration, now
from sandbox.node.volumes import NotReady, expand
from sandbox.node.zygote import Spawn, StartError

if TYPE_CHECKING:
    from sandbox.node.pod import Pod

Wish = Literal["stop", "changed", "liveness", "startup"]
_MINIMUM_GRACE = 2.0  # seconds; kubelet's minimumGracePeriodInSeconds
_KEPT_LOGS = 2  # container starts: the running one and the previous


@dataclass(slots=True)
class BackOff:
    """Restart delays by container *and image* (kuberuntime GetBackoffKey), client-go's flowcontrol.Backoff."""

    first: float
    most: float
    _entries: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)  # delay, last update

    def remaining(self, key: tuple[str, str], since: float) -> tuple[float, float]:
        """(seconds still to wait, the whole delay) of a container that ended at `since`."""
        delay, updated = self._entries.get(key, (0.0, since))
        if since - updated > 2 * self.most:
            return 0.0, 0.0
        return since + delay - time.monotonic(), delay

    def next(self, key: tuple[str, str], since: float) -> None:
        delay, updated = self._entries.get(key, (0.0, since))
        fresh = delay == 0 or since - updated > 2 * self.most
        self._entries[key] = (self.first if fresh else min(2 * delay, self.most), time.monotonic())


class Container:
    """Runs one container until its pod stops or its restart policy ends it."""

    def __init__(self, pod: Pod, spec: Obj, *, init: bool) -> None:
        self.pod, self.name, self._init = pod, str(spec["name"]), init
        waiting = "PodInitializing" if pod.spec.get("initContainers") else "ContainerCreating"
        self.view = ContainerView(self.name, spec["image"], {"waiting": {"reason": waiting}})
        self._attempt = 0
        self._lost = False  # it ran when its machine went down, and has not been started since
        self._since = 0.0
        self._spec_running: Obj = spec
        self._process: str | None = None
        self._group: Group | None = None  # of the running start
        self.entered: tuple[str, ...] = ()  # the directories of control groups that its processes are in
        self._dead_at: float | None = None
        self._wish: Wish | None = None
        self._entries = itertools.count()
        self._wished = asyncio.Event()
        self._logs: dict[int, logs.LogWriter] = {}
        self._workers = [] if init else self._probe_workers(spec)

    @property
    def spec(self) -> Obj:
        """The wanted spec, as the API shows it now."""
        found: Obj = self.pod.container_spec(self.name, init=self._init)
        return found

    def resume(self, known: Obj) -> None:
        """It ran before this machine went down, as its status still says: what became of it is not known."""
        view, restarts = self.view, int(known.get("restartCount", 0))
        view.restarts, self._attempt, self._lost = restarts, restarts + 1, True
        view.image, view.image_id, view.container_id = known["image"], known.get("imageID", ""), known["containerID"]
        state, last = known.get("state") or {}, known.get("lastState") or {}
        lost = {"exitCode": 255, "reason": "Unknown", "finishedAt": now(), "containerID": known["containerID"]}
        lost["startedAt"] = (state.get("running") or {}).get("startedAt")
        view.state = {"terminated": state.get("terminated") or last.get("terminated", lost)}
        view.last_state = last

    # — what the pod tells it —

    def wish(self, what: Wish) -> None:
        if self._wish != "stop":
            self._wish = what
            self._wished.set()

    def spec_changed(self) -> None:
        if self.view.running and self.spec["image"] != self._spec_running["image"]:
            self.wish("changed")
        elif "waiting" in self.view.state:
            self._wished.set()  # a new image may start at once, whatever the back-off of the old

    def kill_now(self) -> None:
        """SIGKILL the process, as a fault does: the agent will find it dead."""
        if self._process:
            self.pod.agent.zygote.kill(self._process, signal.SIGKILL)

    def nudge_probes(self) -> None:
        """kubelet probes again at once after each status change, until a container is ready."""
        for worker in self._workers:
            if self.view.running and (
                (worker.kind == "readiness" and not self.view.ready)
                or (worker.kind == "startup" and not self.view.started)
            ):
                worker.trigger()

    # — its life —

    async def run(self) -> None:
        """Start and restart until told to stop, or until the restart policy lets it rest."""
        async with _running(worker.run() for worker in self._workers):
            await self._cycle()

    async def _cycle(self) -> None:
        ended: float | None = None
        if self._lost and not self._restarts(self.view.state["terminated"]["exitCode"]):
            return
        while not self.pod.stopping:
            self._wished.clear()
            self._wish = None
            spec = self.spec
            if not await self._backed_off(spec, ended) or not await self._pulled(spec):
                continue
            if not await self._start(spec):
                ended = self._dead_at
                if not self._restarts(128):
                    return
                continue
            before = self._dead_at
            why, code = await self._until_over()
            ended = self._dead_at if why is None else before
            if why == "stop" or not self._restarts(code, why):
                return

    def _restarts(self, code: int, why: Wish | None = None) -> bool:
        policy = self.pod.spec.get("restartPolicy", "Always")
        if why == "changed":
            return True
        if self._init:
            return code != 0 and policy != "Never"
        return policy == "Always" or (policy == "OnFailure" and code != 0)

    async def _backed_off(self, spec: Obj, ended: float | None) -> bool:
        """Sit out CrashLoopBackOff; False: something changed meanwhile."""
        if ended is None:
            return True
        key = (self.name, str(spec["image"]))
        back_off = self.pod.back_off
        meta = self.pod.obj["metadata"]
        while True:
            left, delay = back_off.remaining(key, ended)
            if left <= 0:
                back_off.next(key, ended)
                return True
            where = f"container={self.name} pod={meta['name']}_{meta['namespace']}({meta['uid']})"
            message = f"back-off {go_duration(delay)} restarting failed {where}"
            self.pod.event(
                "Warning", "BackOff", message.replace("back-off", "Back-off", 1).split(" pod=")[0], self.name
            )
            self._wait_state("CrashLoopBackOff", message)
            # Looked at only when the pod is next synchronised, so restarts come later than the delay says.
            look = back_off.first * random.uniform(1, 1.5)  # noqa: S311
            if await self._interrupted(look):
                return False

    async def _pulled(self, spec: Obj) -> bool:
        """Have the image; False: told to stop, or the spec changed."""
        name, policy, delay = spec["image"], spec.get("imagePullPolicy", "IfNotPresent"), 0.0
        while True:
            found = images.find(self.pod.agent.images, name)
            if found and (name in self.pod.agent.pulled and policy != "Always"):
                self._note(
                    "Pulled", f'Container image "{name}" already present on machine and can be accessed by the pod'
                )
                return True
            if policy == "Never":
                self._wait_state(
                    "ErrImageNeverPull", f'Container image "{name}" is not present with pull policy of Never'
                )
                self._fail("ErrImageNeverPull", f"Error: ErrImageNeverPull: image {name} is not present")
                if await self._interrupted(self.pod.agent.clocks.back_off_first):
                    return False
                continue
            self._note("Pulling", f'Pulling image "{name}"')
            if found:
                if await self._interrupted(found.pull_seconds):
                    return False
                self.pod.agent.pulled.add(name)
                took = f"{round(found.pull_seconds * 1000)}ms"
                self._note("Pulled", f'Successfully pulled image "{name}" in {took} ({took} including waiting).')
                return True
            delay = min(max(delay * 2, self.pod.agent.clocks.back_off_first), self.pod.agent.clocks.back_off_max)
            if not await self._pull_failed(name, delay):
                return False

    async def _pull_failed(self, name: str, delay: float) -> bool:
        missing = f'failed to pull and unpack image "{name}": failed to resolve reference "{name}": {name}: not found'
        missing += " (the sandbox runs the images named in sandbox/images.toml)"
        self._fail("Failed", f'Failed to pull image "{name}": {missing}')
        self._fail("Failed", "Error: ErrImagePull")
        self._wait_state("ErrImagePull", missing)
        if await self._interrupted(min(1.0, delay / 2)):
            return False
        self._note("BackOff", f'Back-off pulling image "{name}"')
        self._fail("Failed", "Error: ImagePullBackOff")
        self._wait_state("ImagePullBackOff", f'Back-off pulling image "{name}": ErrImagePull: {missing}')
        return not await self._interrupted(delay)

    async def _start(self, spec: Obj) -> bool:
        """Make the process; False: it could not be made, which counts as a start and a death."""
        if postponed := (spec.get("lifecycle") or {}).get("postStart"):
            self._wait_state(
                "CreateContainerConfigError", f"the sandbox has no postStart hooks ({next(iter(postponed))})"
            )
            await self._interrupted(self.pod.agent.clocks.back_off_max)
            return False
        number = self._attempt
        writer = logs.LogWriter(self.log_path(number))
        try:
            order, netns = await self._order(spec, number)
            await self.pod.agent.zygote.spawn(order, writer.write_fd, writer.write_fd, netns)
        except NotReady as reason:
            writer.close()
            self._fail("Failed", f"Error: {reason}")
            self._wait_state("CreateContainerConfigError", str(reason))
            await self._interrupted(self.pod.agent.clocks.back_off_first)
            return False
        except StartError as failed:
            writer.close()
            await self._start_failed(spec, str(failed))
            return False
        writer.started()
        self._keep_log(number, writer)
        self._running_now(spec, order.id)
        return True

    async def _order(self, spec: Obj, number: int) -> tuple[Spawn, int]:
        meta = self.pod.obj["metadata"]
        env = await self.pod.environment(spec)
        command = [expand(word, env) for word in spec.get("command") or []]
        args = [expand(word, env) for word in spec.get("args") or []]
        image = images.find(self.pod.agent.images, spec["image"])
        assert image is not None, "pulled before"
        call, argv = image.process(command, args)
        order = Spawn(
            id=f"{meta['uid']}/{self.name}/{number}",
            title=f"pod {meta['namespace']}/{meta['name']} {self.name}",
            argv=argv,
            call=call,
            env=env,
            cwd=spec.get("workingDir") or "/",
            netns=True,
            isolated=True,
            host_pids=bool(self.pod.spec.get("hostPID")),
            hostname=self.pod.spec.get("hostname") or meta["name"],
            mounts=(*self.pod.name_files(), *self.pod.volumes.mounts(spec)),
            cgroups=self._limited(spec, number),
            oom_score_adj=self.pod.oom_score(spec),
            security=self._security(spec),
        )
        return order, self.pod.net_fd

    def _security(self, spec: Obj) -> Security:
        """Raises `NotReady` with kubelet's words."""
        try:
            found = security.of(self.pod.spec, spec)
        except security.Refused as refused:
            raise NotReady(str(refused)) from refused
        if security.mapped(found.user, found.group, Path("/proc/self/uid_map").read_text()):
            return found
        return replace(found, user=0, group=0, groups=())

    def _limited(self, spec: Obj, number: int) -> tuple[str, ...]:
        """A control group of its own for this start; empty where the machine has none."""
        self._release_group()
        if self.pod.group is None:
            return ()
        limits = {name: milli(value) for name, value in ((spec.get("resources") or {}).get("limits") or {}).items()}
        group = self.pod.group.child(f"{self.name}.{number}")
        wanted = cgroups.container_limits(limits)
        self._group = group.make(wanted, leaf=True)
        self.entered = group.entered(wanted)
        return self.entered

    def _release_group(self) -> None:
        if self._group:
            self._group.remove()  # one that is busy goes with its pod's
            self._group, self.entered = None, ()

    def _running_now(self, spec: Obj, process: str) -> None:
        self._process, self._since, self._spec_running = process, time.monotonic(), spec
        self._enter(spec, process)
        view = self.view
        view.state = {"running": {"startedAt": now()}}
        kinds = {worker.kind for worker in self._workers}
        for worker in self._workers:
            worker.reset()
        view.started = "startup" not in kinds
        view.ready = view.started and "readiness" not in kinds and not self._init
        for what in self.pod.unenforced(spec):
            self._note("NotEnforced", f"{what} is not enforced by the sandbox")
        self._note("Created", "Container created")
        self._note("Started", "Container started")
        self.pod.changed()

    def _enter(self, spec: Obj, process: str) -> None:
        """A start, successful or not: the former termination becomes the last state."""
        view = self.view
        if "terminated" in view.state:
            view.last_state = view.state
        view.restarts = self._attempt
        self._attempt += 1
        view.image = spec["image"]
        view.image_id = f"{spec['image'].split(':')[0]}@sha256:{hashlib.sha256(spec['image'].encode()).hexdigest()}"
        view.container_id = f"containerd://{hashlib.sha256(process.encode()).hexdigest()}"

    async def _start_failed(self, spec: Obj, why: str) -> None:
        self._enter(spec, f"{self.pod.uid}/{self.name}/{self._attempt}")
        message = (
            f"failed to create containerd task: failed to create shim task: OCI runtime create failed: {why}: unknown"
        )
        self._fail("Failed", f"Error: {message}")
        ended: Obj = {"exitCode": 128, "reason": "StartError", "message": message, "startedAt": "1970-01-01T00:00:00Z"}
        ended |= {"finishedAt": now(), "containerID": self.view.container_id}
        self.view.ready = self.view.started = False
        self._dead_at = time.monotonic()
        self.view.last_state = {"terminated": ended}
        self._wait_state("RunContainerError", message)
        await self.pod.posted()

    # — its end —

    async def _until_over(self) -> tuple[Wish | None, int]:
        """Wait for the process's end, or end it on request: (the request or None, exit code)."""
        assert self._process is not None
        over = asyncio.ensure_future(self.pod.agent.zygote.exited(self._process))
        while not over.done() and self._wish is None:
            self._wished.clear()
            await _first(over, self._wished)
        if self._wish is not None:
            await self._kill(self._wish, over)
        else:
            await asyncio.sleep(self.pod.agent.until_relist())  # a death is seen at the next look, not at once
        code = await over
        why: Wish | None = self._wish
        self._ended(code)
        if why == "stop" and self.pod.any_running:
            self.pod.changed()  # the last one's end is reported with the pod's
        if why is None:
            self.pod.changed()
            await self.pod.posted()  # the death is reported before the restart
        return why, code

    def _ended(self, code: int) -> None:
        assert self._process is not None
        self.pod.agent.zygote.forget(self._process)
        self._process = None
        self._dead_at = time.monotonic()
        exit_code = code if code >= 0 else 128 - code
        started = self.view.state["running"]["startedAt"]
        reason = "Error" if exit_code else "Completed"
        if exit_code and self._group and self._group.oom_kills():
            reason = "OOMKilled"
        self._release_group()
        ended: Obj = {"exitCode": exit_code, "reason": reason}
        ended |= {"startedAt": started, "finishedAt": now(), "containerID": self.view.container_id}
        self.view.state = {"terminated": ended}
        self.view.ready = self.view.started = False

    async def _kill(self, why: Wish, over: asyncio.Future[int]) -> None:
        reasons = {
            "stop": f"Stopping container {self.name}",
            "changed": f"Container {self.name} definition changed, will be restarted",
            "liveness": f"Container {self.name} failed liveness probe, will be restarted",
            "startup": f"Container {self.name} failed startup probe, will be restarted",
        }
        self._note("Killing", reasons[why])
        began = time.monotonic()
        if hook := (self._spec_running.get("lifecycle") or {}).get("preStop"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._grace(why))):
                    await self._pre_stop(hook, over)
        assert self._process is not None
        self.pod.agent.zygote.kill(self._process, self._stop_signal())
        asked = time.monotonic()
        while not over.done():
            deadline = max(began + self._grace(why), asked + _MINIMUM_GRACE)
            if (left := deadline - time.monotonic()) <= 0:
                self.pod.agent.zygote.kill(self._process, signal.SIGKILL)
                await over
                return
            self.pod.grace_changed.clear()
            await _first(over, self.pod.grace_changed, within=left)
            why = self._wish or why  # the pod may be deleted while a probe's victim still stops

    def _stop_signal(self) -> signal.Signals:
        name = (self._spec_running.get("lifecycle") or {}).get("stopSignal")
        return signal.Signals[name] if name else signal.SIGTERM

    def _grace(self, why: Wish) -> float:
        if why == "stop":
            return self.pod.grace
        own = (self._spec_running.get(f"{why}Probe") or {}).get("terminationGracePeriodSeconds")
        return float(own if own is not None else self.pod.spec.get("terminationGracePeriodSeconds", 30))

    async def _pre_stop(self, hook: Obj, over: asyncio.Future[int]) -> None:
        if sleep := hook.get("sleep"):
            await _first(over, within=float(sleep["seconds"]))
        elif action := hook.get("httpGet"):
            outcome = await probes.http_get(action, self._spec_running, self.pod.ip, self.pod.grace)
            if not outcome.ok:
                self._fail("FailedPreStopHook", f"PreStopHook failed: {outcome.message}")
        elif action := hook.get("exec"):
            outcome = await self.exec(list(action["command"]), max(_MINIMUM_GRACE, self.pod.grace))
            if not outcome.ok:
                self._fail("FailedPreStopHook", f"PreStopHook failed: {outcome.message}")

    async def entry(self, argv: Sequence[str]) -> Spawn | None:
        """A process to make in the container; None: it does not run."""
        process = self._process
        if process is None:
            return None
        image = images.find(self.pod.agent.images, self._spec_running["image"])
        assert image is not None, "it runs"
        _, command = images.Image(image.name, exec=image.exec or "python").process(argv, [])
        return Spawn(
            id=f"exec/{next(self._entries)}/{process}",
            title="exec",
            argv=command,
            env=await self.pod.environment(self._spec_running),
            cwd=self._spec_running.get("workingDir") or "/",
            join=process,
            cgroups=self.entered,
            stdin=True,
            security=self._security(self._spec_running),
        )

    async def exec(self, argv: list[str], within: float) -> probes.Outcome:
        """Run a command in the container; its exit code is the outcome."""
        order = await self.entry(argv)
        if order is None:
            return probes.Outcome(False, "the container does not run")
        return await self.pod.agent.run_once(replace(order, stdin=False), within)

    # — probes —

    def _probe_workers(self, spec: Obj) -> list[probes.Worker]:
        kinds: tuple[probes.ProbeKind, ...] = ("startup", "liveness", "readiness")
        return [self._worker(kind, probe) for kind in kinds if (probe := spec.get(f"{kind}Probe"))]

    def _worker(self, kind: probes.ProbeKind, probe: Obj) -> probes.Worker:
        def subject() -> probes.Subject | None:
            return probes.Subject(self._process, self._since) if self._process and self.view.running else None

        def allowed() -> bool:
            if kind == "startup":
                return not self.view.started and not self.pod.stopping
            return self.view.started and (kind == "readiness" or not self.pod.stopping)

        def try_once() -> Awaitable[probes.Outcome]:
            return probes.check(probe, self._spec_running, self.pod.ip, self.exec)

        def failed(message: str) -> None:
            self._fail("Unhealthy", f"{kind.capitalize()} probe failed: {message}")

        def result(passed: bool) -> None:
            self._probed(kind, passed)

        return probes.Worker(
            kind, probe, subject=subject, allowed=allowed, try_once=try_once, on_failure=failed, on_result=result
        )

    def _probed(self, kind: probes.ProbeKind, passed: bool) -> None:
        if kind != "readiness" and not passed:
            self.wish("liveness" if kind == "liveness" else "startup")
            return
        if kind == "startup":
            self.view.started = True
            for worker in self._workers:
                worker.trigger()
        readiness = [worker for worker in self._workers if worker.kind == "readiness"]
        self.view.ready = self.view.started and all(worker.passed for worker in readiness)
        self.pod.changed()

    # — small things —

    def _wait_state(self, reason: str, message: str) -> None:
        if "terminated" in self.view.state:
            self.view.last_state = self.view.state
        self.view.state = {"waiting": {"reason": reason, "message": message}}
        self.pod.changed()

    async def _interrupted(self, seconds: float) -> bool:
        """Wait; True: told to stop, or the image changed."""
        image = self.spec["image"]
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self.pod.stopping:
            self._wished.clear()
            await _first(None, self._wished, within=left)
            if self.spec["image"] != image:
                return True
        return self.pod.stopping

    def log_path(self, number: int) -> Path:
        return self.pod.directory / "logs" / f"{self.name}.{number}.log"

    def log_source(self, *, previous: bool) -> logs.Source:
        """The log of the running (or last) start, or of the one before. Raises `logs.NotThere`."""
        number = self._attempt - (2 if previous else 1)
        meta = self.pod.obj["metadata"]
        if number < 0:
            where = f'in pod "{meta["name"]}"'
            if previous:
                raise logs.NotThere(f'previous terminated container "{self.name}" {where} not found')
            waiting = self.view.state.get("waiting") or {}
            why = waiting.get("message") or waiting.get("reason", "ContainerCreating")
            raise logs.NotThere(f'container "{self.name}" {where} is waiting to start: {why}')
        if not self.log_path(number).exists():
            raise logs.NotThere(f"the log of start {number + 1} of container {self.name} is not kept")
        writer = self._logs.get(number)
        return logs.Source(self.log_path(number), writer.done if writer else None)

    def _keep_log(self, number: int, writer: logs.LogWriter) -> None:
        self._logs[number] = writer
        old = number - _KEPT_LOGS
        self._logs.pop(old, None)
        self.log_path(old).unlink(missing_ok=True)

    def _note(self, reason: str, message: str) -> None:
        self.pod.event("Normal", reason, message, self.name)

    def _fail(self, reason: str, message: str) -> None:
        self.pod.event("Warning", reason, message, self.name)


@contextlib.asynccontextmanager
async def _running(work: object) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(item) for item in work]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(over: asyncio.Future[int] | None, *events: asyncio.Event, within: float | None = None) -> None:
    """Until the process is over, or one of the events is set, or the time is."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    everything: list[asyncio.Future[Any]] = [*waits, *([over] if over is not None else [])]
    await asyncio.wait(everything, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
