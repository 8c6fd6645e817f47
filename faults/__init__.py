"""What can go wrong: faults to put into experiments, each with its proof and its undo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from faults.base import Fault, Zone
from faults.chaostoolkit import ChaosToolkit
from faults.freeze import PodHang, ZombieEngine
from faults.node import NodeCrash, NodeDrain
from faults.pod import PodKill, PodStop
from faults.rollout import RollingUpdate
from faults.xid import Xid
from faults.zone import ZoneOutage, ZonePartition
from gameday.errors import ExperimentError

__all__ = [
    "ChaosToolkit",
    "Fault",
    "NodeCrash",
    "NodeDrain",
    "PodHang",
    "PodKill",
    "PodStop",
    "RollingUpdate",
    "Xid",
    "ZombieEngine",
    "Zone",
    "ZoneOutage",
    "ZonePartition",
    "from_json",
    "to_json",
]

KINDS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        ChaosToolkit,
        NodeCrash,
        NodeDrain,
        PodHang,
        PodKill,
        PodStop,
        RollingUpdate,
        Xid,
        ZombieEngine,
        ZoneOutage,
        ZonePartition,
    )
}


def to_json(fault: Fault) -> dict[str, Any]:
    """A JSON object that `from_json` turns back into an equal fault."""
    return {"type": type(fault).__name__, **asdict(fault)}  # type: ignore[call-overload]


def from_json(data: Mapping[str, Any]) -> Fault:
    kind = KINDS.get(str(data.get("type")))
    if kind is None:
        raise ExperimentError(f"There is no fault {data.get('type')!r}; there are {', '.join(sorted(KINDS))}.")
    try:
        given = {key: value for key, value in data.items() if key != "type"}
        fault: Fault = TypeAdapter(kind).validate_python(given)
        return fault
    except ValidationError as wrong:
        first = wrong.errors()[0]
        raise ExperimentError(f"{kind.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from wrong
