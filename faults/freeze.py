"""Processes stop: a pod that hangs, and an engine that says it is healthy and generates nothing.

A stopped process (SIGSTOP) keeps its sockets, its memory and its GPU, and does nothing: what a deadlock, a driver
that hangs or a stuck collective looks like from outside. A privileged Job pinned to the node, which shares the
node's processes, stops them and lets them go on when its time is over, when it is deleted, or at its deadline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from faults.base import Job, Mute, Plan, View, check_radius, pinned_job
from gameday.cluster import Pod
from gameday.errors import ExperimentError, TargetError
from gameday.model import FaultFacts

HOLDS = 30.0  # seconds by which the Job holds them stopped beyond the heal that we intend

# Processes are found by the /etc/hosts that kubelet mounts into every container of a pod (from …/pods/<uid>/…),
# whatever the runtime and the cgroup driver; by their command line where only some are meant. The host's own processes
# see the pods' volumes as well, as mount points: what counts is where a mount comes *from*, and never the host's own
# mount namespace. What is started later is never touched.
ITS_HOSTS = "^[0-9]+ [0-9]+ [0-9:]+ [^ ]*/pods/$POD_UID/[^ ]* /etc/hosts "
FREEZE = f"""\
host=$(readlink /proc/1/ns/mnt)
stopped=
resume() {{ for p in $stopped; do kill -CONT "$p" 2>/dev/null; done; }}
trap 'resume; exit 0' TERM INT
for d in /proc/[0-9]*; do
  p=${{d#/proc/}}
  [ "$(readlink "$d/ns/mnt")" != "$host" ] || continue
  grep -Eq "{ITS_HOSTS}" "$d/mountinfo" 2>/dev/null || continue
  tr '\\0' ' ' < "$d/cmdline" 2>/dev/null | grep -Eq "$PATTERN" && stopped="$stopped $p"
done
if [ -z "$stopped" ]; then echo "no process of pod $POD_NAME matches $PATTERN"; exit 1; fi
for p in $stopped; do kill -STOP "$p"; done
echo "stopped:$stopped"
touch /tmp/stopped
sleep "$SECONDS_HELD" & wait $!
resume
"""


@dataclass(frozen=True, slots=True)
class PodHang:
    """One ready engine pod, drawn by the seed, hangs: all its processes stop. It takes connections, answers none.

    What is under test: readiness takes it out of rotation, liveness restarts it, and users hardly notice.
    """

    lasting: float
    health: str = "/health"  # the path by whose silence the hang is proven

    @property
    def one_shot(self) -> bool:
        return False

    def plan(self, view: View) -> Plan:
        pod = _engine(view)
        return _plan(
            view,
            pod,
            self.lasting,
            name="pod hang",
            title=f"{pod.name} hangs: all its processes are stopped",
            pattern=".",
            proof=Mute((pod.key,), "health", health=self.health),
            fidelity=(
                "Real: the processes are stopped (SIGSTOP) on their node; connections are taken and never answered; "
                "a container that is restarted runs again.",
                "Emulated: nothing is wrong with GPU or driver.",
            ),
        )


@dataclass(frozen=True, slots=True)
class ZombieEngine:
    """The core of one ready engine, drawn by the seed, stops; its API process goes on and says that all is well.

    `process` (an extended regular expression) finds the core by its command line: vLLM's title by default, SGLang's
    as well. What is under test: whoever notices that /health answers and generation does not.
    """

    lasting: float
    process: str = "EngineCore|sglang::scheduler"
    health: str = "/health"
    generate: str = "/v1/completions"

    @property
    def one_shot(self) -> bool:
        return False

    def __post_init__(self) -> None:
        try:
            re.compile(self.process)
        except re.error as wrong:
            raise ExperimentError(f"{self.process!r} is no regular expression: {wrong}.") from wrong
        if not self.process:
            raise ExperimentError("A zombie engine needs the name of the process that is to stop.")

    def plan(self, view: View) -> Plan:
        pod = _engine(view)
        return _plan(
            view,
            pod,
            self.lasting,
            name="zombie engine",
            title=f"{pod.name} says that it is healthy and generates nothing",
            pattern=self.process,
            proof=Mute((pod.key,), "generate", health=self.health, generate=self.generate),
            fidelity=(
                "Real: the engine's core process is stopped (SIGSTOP) on its node; the API process answers /health.",
                "Emulated: nothing is wrong with GPU or driver; the core goes on after the heal, where a dead GPU "
                "would not.",
            ),
        )


def _engine(view: View) -> Pod:
    usable = [pod for pod in view.ready if not pod.host_network and pod.ports]
    if not usable:
        raise TargetError(f"No ready pod of {view.selector!r} has a port and a network of its own: nothing can hang.")
    return view.draw().choice(usable)


def _plan(
    view: View, pod: Pod, lasting: float, *, name: str, title: str, pattern: str, proof: Mute, fidelity: tuple[str, ...]
) -> Plan:
    check_radius(view, (pod,), what=f"The {name}")
    held = int(lasting + HOLDS)
    job, undo = pinned_job(
        view,
        name.replace(" ", "-"),
        pod.node,
        FREEZE,
        env={"POD_UID": pod.uid, "POD_NAME": pod.name, "PATTERN": pattern, "SECONDS_HELD": str(held)},
        seconds=held + 60,
        host_pids=True,
        ready=["test", "-e", "/tmp/stopped"],  # noqa: S108 - inside the Job's own container
    )
    return Plan(
        facts=FaultFacts(
            name=name,
            title=title,
            one_shot=False,
            lasting=lasting,
            pods=(pod.key,),
            nodes=(pod.node,),
            zone=pod.zone,
            fidelity=fidelity,
        ),
        acts=(Job(name.replace(" ", "-"), job, proof, within=60, until="ready", harms=True),),
        undos=(undo,),
    )
