"""A container's securityContext: what of it a process sandbox can enforce, and how. Pure, but for `apply`.

Enforced: user, group, supplementary groups, runAsNonRoot, capabilities, privileged, allowPrivilegeEscalation,
readOnlyRootFilesystem, fsGroup (by `volumes`). The rest is named in an Event ("NotEnforced"), never passed over.
Source: kubernetes pkg/securitycontext, containerd's default capabilities.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.client import Obj
from sandbox.node import linux

CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip  # by number
DEFAULT = frozenset(
    ("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
     "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE")
)  # fmt: skip
_UNENFORCED = ("seccompProfile", "seLinuxOptions", "appArmorProfile", "windowsOptions")


class Refused(Exception):
    """The container must not be created; the text is kubelet's."""


@dataclass(frozen=True, slots=True)
class Security:
    """What a container's processes may. `capabilities` None: all."""

    user: int = 0
    group: int = 0
    groups: tuple[int, ...] = ()
    capabilities: tuple[str, ...] | None = tuple(sorted(DEFAULT))
    no_new_privileges: bool = False
    read_only: bool = False

    @staticmethod
    def load(raw: Mapping[str, Any]) -> Security:
        caps = raw["capabilities"]
        return Security(
            **{**raw, "groups": tuple(raw["groups"]), "capabilities": None if caps is None else tuple(caps)}
        )


def of(pod: Obj, container: Obj) -> Security:
    """From the specs of a pod and one of its containers. Raises `Refused`."""
    whole, own = pod.get("securityContext") or {}, container.get("securityContext") or {}

    def asked(name: str) -> Any:
        return own[name] if own.get(name) is not None else whole.get(name)

    user, group = int(asked("runAsUser") or 0), int(asked("runAsGroup") or 0)
    if asked("runAsNonRoot") and user == 0:
        what = (
            "image will run as root" if asked("runAsUser") is None else "container's runAsUser breaks non-root policy"
        )
        raise Refused(f"container has runAsNonRoot and {what}")
    groups = {int(one) for one in whole.get("supplementalGroups") or []}
    if whole.get("fsGroup") is not None:
        groups.add(int(whole["fsGroup"]))
    return Security(
        user, group, tuple(sorted(groups)), _capabilities(own), own.get("allowPrivilegeEscalation") is False,
        bool(own.get("readOnlyRootFilesystem")),
    )  # fmt: skip


def _capabilities(own: Obj) -> tuple[str, ...] | None:
    if own.get("privileged"):
        return None
    change = own.get("capabilities") or {}
    drop = {name.upper().removeprefix("CAP_") for name in change.get("drop") or []}
    add = {name.upper().removeprefix("CAP_") for name in change.get("add") or []}
    if unknown := (add | drop) - {*CAPABILITIES, "ALL"}:
        raise Refused(f"unknown capability to add or drop: {', '.join(sorted(unknown))}")
    if "ALL" in add:
        return None if not drop else tuple(sorted(set(CAPABILITIES) - drop))
    kept = frozenset() if "ALL" in drop else DEFAULT - drop
    return tuple(sorted(kept | add))


def unenforced(pod: Obj, container: Obj) -> list[str]:
    """What the container asks for that this sandbox does not do."""
    whole, own = pod.get("securityContext") or {}, container.get("securityContext") or {}
    found = [name for name in _UNENFORCED if own.get(name) or whole.get(name)]
    if own.get("procMount") not in (None, "Default"):
        found.append("procMount")
    for volume in pod.get("volumes") or []:
        kept = volume.get("emptyDir") or {}
        found += [f"{name} of volume {volume['name']}" for name in ("sizeLimit", "medium") if kept.get(name)]
    limits = (container.get("resources") or {}).get("limits") or {}
    found += [f"{name} limit" for name in limits if name == "ephemeral-storage" or name.startswith("hugepages-")]
    return found


def mapped(user: int, group: int, uid_map: str) -> bool:
    """Whether this machine has such users (/proc/self/uid_map): a sandbox of an ordinary user has one only."""
    spans = [tuple(map(int, line.split())) for line in uid_map.splitlines()]
    return all(any(first <= number < first + count for first, _, count in spans) for number in (user, group))


# — in the process —


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_VERSION_3 = 0x20080522


def apply(security: Security) -> None:
    """Become what `security` says, for good: the last step before the container's own code. OSError."""
    allowed = set(CAPABILITIES if security.capabilities is None else security.capabilities)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    if security.capabilities is not None:
        for number in range(last + 1):
            if number >= len(CAPABILITIES) or CAPABILITIES[number] not in allowed:
                linux.drop_bounding(number)
    if security.user or security.group or security.groups:
        os.setgroups(security.groups)
        os.setresgid(security.group, security.group, security.group)
        os.setresuid(security.user, security.user, security.user)
    if security.capabilities is not None and not security.user:
        _limit({number for number, name in enumerate(CAPABILITIES) if name in allowed and number <= last})
    if security.no_new_privileges:
        linux.no_new_privileges()


def _limit(numbers: set[int]) -> None:
    """Keep these of the capabilities that this process has; what it has not it does not get."""
    held = _held()
    words = [sum(1 << (number - base) for number in numbers if base <= number < base + 32) for base in (0, 32)]
    data = (_Data * 2)(*(_Data(word & own, word & own, 0) for word, own in zip(words, held, strict=True)))
    linux.capset(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(data))


def _held() -> tuple[int, int]:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            value = int(line.split()[1], 16)
            return value & 0xFFFFFFFF, value >> 32
    return 0, 0
