"""What a sandbox is made of: its clocks, its machines, its ports, where it keeps its state."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args


@dataclass(frozen=True, slots=True)
class Clocks:
    """Every delay of Kubernetes and its add-ons that an experiment waits for, in seconds.

    `REAL` holds the true defaults; `COMPRESSED` keeps their order and proportion, so that a rehearsal
    takes minutes instead of hours. Reports say which was used.
    """

    name: str
    lease_renew: float  # kubelet's node Lease
    node_status: float  # kubelet's node status
    node_monitor_period: float  # node lifecycle controller's look
    node_monitor_grace: float  # silence until a node is Unknown
    toleration_seconds: int  # not-ready/unreachable:NoExecute, set at admission
    eviction_per_second: float  # nodes per second and zone that are tainted NoExecute
    back_off_first: float  # CrashLoopBackOff
    back_off_max: float
    pleg_period: float  # kubelet notices a dead container
    repair_wait: float  # node auto repair: accelerator condition → replacement
    repair_poll: float
    machine_boot: float  # a replacement machine, from order to kubelet start
    machine_reboot: float  # the same machine after a reset: firmware, kernel, services, until its kubelet starts
    model_load: float  # an engine's weights and compilation
    scrape_interval: float  # Prometheus


# Sources: facts/kubelet.md, facts/gpu-and-dr.md (kubelet and controller manager 1.36; EKS node auto repair).
REAL = Clocks(
    name="real",
    lease_renew=10,
    node_status=10,
    node_monitor_period=5,
    node_monitor_grace=50,
    toleration_seconds=300,
    eviction_per_second=0.1,
    back_off_first=10,
    back_off_max=300,
    pleg_period=1,
    repair_wait=600,
    repair_poll=30,
    machine_boot=60,
    machine_reboot=90,
    model_load=120,
    scrape_interval=15,
)
COMPRESSED = Clocks(
    name="compressed",
    lease_renew=1,
    node_status=1,
    node_monitor_period=0.5,
    node_monitor_grace=4,
    toleration_seconds=6,
    eviction_per_second=1,
    back_off_first=1,
    back_off_max=30,
    pleg_period=0.2,
    repair_wait=10,
    repair_poll=1,
    machine_boot=2,
    machine_reboot=6,
    model_load=3,
    scrape_interval=1,
)
# A control plane alone is there to be compared with a recorded one: true defaults, but for the loss of a node, which
# the recording had shortened (its README).
BARE = replace(REAL, name="bare", node_monitor_grace=8, node_monitor_period=1)
CLOCKS = {clocks.name: clocks for clocks in (REAL, COMPRESSED, BARE)}


def default_state_dir() -> Path:
    """`$GAMEDAY_STATE_DIR`, else a directory of this user's under /run or the temporary directory."""
    if named := os.environ.get("GAMEDAY_STATE_DIR"):
        return Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "gameday"
    return Path("/run/gameday") if os.geteuid() == 0 else Path(f"/tmp/gameday-{os.geteuid()}")  # noqa: S108


Stack = Literal["reference", "fragile", "careless", "none"]
STACKS: tuple[str, ...] = get_args(Stack)


@dataclass(frozen=True, slots=True)
class Options:
    """One sandbox. Ports are on 127.0.0.1; 0 asks the kernel for a free one."""

    stack: Stack = "reference"
    clocks: Clocks = COMPRESSED
    zones: tuple[str, ...] = ("a", "b", "c")
    nodes_per_zone: int = 2
    gpus_per_node: int = 2
    zone_latency_ms: float = 0.0  # one way, between machines of different zones
    bare: bool = False  # control plane only: no nodes, stack, Prometheus
    control_plane: str | None = None  # directory of the real one's binaries, "": $KUBEBUILDER_ASSETS; None: our own
    api_port: int = 0
    prometheus_port: int = 0
    target_port: int = 0
    prometheus_bin: str = "prometheus"
    state_dir: Path = field(default_factory=default_state_dir)
    parent: int | None = None  # live no longer than this process; None: until `gameday down`
