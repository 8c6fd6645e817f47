"""The records of an experiment's targets (`status.experiment.containerRecords`) and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sandbox.client import Obj

NOT_INJECTED = "Not Injected"
APPLYING = "Not Injected/Wait"
INJECTED = "Injected"
RECOVERING = "Injected/Wait"
RUN, STOP = "Run", "Stop"
EVENTS_KEPT = 10  # of each record, the newest
PAUSE = "experiment.chaos-mesh.org/pause"

Operation = Literal["Apply", "Recover"]


def now() -> str:
    """The time as Kubernetes writes it: UTC, one second's resolution."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(slots=True)
class Record:
    """One target: where it stands in Not Injected → …/Wait → Injected → …/Wait → Not Injected."""

    id: str  # namespace/pod or namespace/pod/container
    key: str  # selectorKey: "." or ".Target"
    phase: str = NOT_INJECTED
    injected: int = 0
    recovered: int = 0
    events: list[Obj] = field(default_factory=list)

    @classmethod
    def of(cls, raw: Obj) -> Record:
        counts = raw.get("injectedCount", 0), raw.get("recoveredCount", 0)
        return cls(raw["id"], raw["selectorKey"], raw["phase"], *counts, list(raw.get("events") or ()))

    @property
    def json(self) -> Obj:
        raw: Obj = {"id": self.id, "selectorKey": self.key, "phase": self.phase}
        raw |= {"injectedCount": self.injected, "recoveredCount": self.recovered}
        return raw | ({"events": self.events} if self.events else {})

    @property
    def pod(self) -> tuple[str, str]:
        """(namespace, name)"""
        namespace, name = self.id.split("/")[:2]
        return namespace, name

    @property
    def container(self) -> str:
        return self.id.split("/")[2]

    def wants(self, desired: str) -> Operation | None:
        """The next operation on the way to `desired`.

        The cycle goes one way only: a record in "Not Injected/Wait" must apply before it can recover.
        """
        if self.phase == (INJECTED if desired == RUN else NOT_INJECTED):
            return None
        return "Apply" if self.phase.startswith(NOT_INJECTED) else "Recover"

    def note(self, operation: Operation, failure: str | None = None) -> None:
        event: Obj = {"type": "Failed" if failure else "Succeeded", "operation": operation, "timestamp": now()}
        if failure:
            event["message"] = failure
        self.events = [*self.events, event][-EVENTS_KEPT:]


def paused(experiment: Obj) -> bool:
    return (experiment["metadata"].get("annotations") or {}).get(PAUSE) == "true"


def conditions(experiment: Obj, records: Sequence[Record]) -> list[Obj]:
    """The four conditions. `AllRecovered` also holds before anything was injected, as in Chaos Mesh."""
    states = {
        "Selected": bool(records),
        "AllInjected": bool(records) and all(record.phase == INJECTED for record in records),
        "AllRecovered": bool(records) and all(record.phase == NOT_INJECTED for record in records),
        "Paused": paused(experiment),
    }
    return [{"type": kind, "status": "True" if holds else "False"} for kind, holds in states.items()]
