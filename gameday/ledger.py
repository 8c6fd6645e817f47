"""The ledger: every undo, written before the harm, on this disk and in the cluster.

Locally `ledger.jsonl` (one line per entry, fsynced); in the cluster one ConfigMap per run, labelled and owned
by nobody, one key per entry, and the key `BEGUN` from right before the first harm. An entry is removed when its undo is
verified; the ConfigMap goes last. Whoever can read the ConfigMap can heal: `heal` needs nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from faults.base import OURS, ROLE, RUN, Undo
from faults.undo import NOT_BEGUN, pods_of, still_paused, undo
from gameday import clock
from gameday.cluster import Cluster, Obj, Refused
from gameday.errors import ClusterError, HealError, RecordError
from gameday.kinds import BY_KIND, CONFIGMAPS
from gameday.lock import remove_dead, wait_until_dead

_UNDO: TypeAdapter[Undo] = TypeAdapter(Undo)
LEDGERS = f"{OURS},{ROLE}=ledger"
BEGUN = "begun"  # key of the ConfigMap: without it nothing was harmed, and rollbacks would roll back nothing of ours


class Ledger:
    """One experiment's undos. Not thread-safe: the orchestrator alone writes it."""

    def __init__(self, cluster: Cluster, path: Path, name: str, labels: dict[str, str]) -> None:
        self._cluster, self._path, self._name = cluster, path, name
        self._labels = labels | {ROLE: "ledger"}
        self._keys: dict[Undo, str] = {}

    def write(self, undos: Sequence[Undo]) -> None:
        """Write all entries, here and there; only after this returns may anything be harmed."""
        self.plan(undos)
        try:
            with self._path.open("a") as file:
                for entry, key in self._keys.items():
                    file.write(json.dumps({"key": key, **asdict(entry)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as wrong:
            raise RecordError(f"{self._path} cannot be written: {wrong.strerror}; nothing was harmed.") from wrong
        self._cluster.create(CONFIGMAPS, self.manifest())

    def plan(self, undos: Sequence[Undo]) -> None:
        """What will be written; nothing is yet."""
        self._keys = {entry: f"{number:03d}" for number, entry in enumerate(undos)}

    def manifest(self) -> Obj:
        """The ConfigMap."""
        data = {key: json.dumps(asdict(entry)) for entry, key in self._keys.items()}
        metadata = {"name": self._name, "namespace": self._cluster.namespace, "labels": self._labels}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}

    def fence(self, *, begins: bool) -> None:
        """Whether every undo is still written in the cluster; `begins`: the harm comes next, which is written first.

        Raises `RecordError` where somebody has healed meanwhile (we may have slept), and `ClusterError`.
        """
        where = CONFIGMAPS, self._name
        try:
            if begins:
                change = {"data": {BEGUN: str(int(clock.Epoch.read().wall))}}
                found = self._cluster.patch(*where, change, self._cluster.namespace)
            else:
                found = self._cluster.get(*where, self._cluster.namespace)
        except Refused as refused:
            if refused.code != 404:
                raise
            found = {}
        if missing := set(self._keys.values()) - set(found.get("data") or {}):
            raise RecordError(
                f"{len(missing)} of {len(self._keys)} undos are not in the ledger {self._name} any more "
                "(did somebody run `gameday heal`?): nothing was harmed."
            )

    def done(self, entry: Undo) -> None:
        """The undo is verified: strike it out, in the cluster first (the local line only informs)."""
        key = self._keys[entry]
        self._cluster.patch(CONFIGMAPS, self._name, {"data": {key: None}}, self._cluster.namespace)
        with suppress(OSError), self._path.open("a") as file:  # a full disk must not stop the next undo
            file.write(json.dumps({"key": key, "done": True}) + "\n")

    def close(self) -> None:
        self._cluster.delete(CONFIGMAPS, self._name, self._cluster.namespace)


@dataclass(frozen=True, slots=True)
class Left:
    """What an earlier run left behind."""

    run: str
    ledger: str  # the ConfigMap
    entries: tuple[tuple[str, Undo], ...]  # (key, undo), in the order of undoing
    begun: bool = True  # whether the harm was about to begin


def leftovers(cluster: Cluster, run: str | None = None) -> tuple[Left, ...]:
    """Ledgers in the cluster's namespace, oldest first. Raises `HealError` for one that cannot be read."""
    selector = f"{LEDGERS},{RUN}={run}" if run else LEDGERS
    found = sorted(
        cluster.list(CONFIGMAPS, cluster.namespace, labels=selector),
        key=lambda o: str(o["metadata"]["creationTimestamp"]),
    )
    return tuple(_left(obj) for obj in found)


def _left(obj: dict[str, Any]) -> Left:
    name, data = obj["metadata"]["name"], dict(obj.get("data") or {})
    begun = data.pop(BEGUN, None) is not None
    try:
        entries = tuple((key, _UNDO.validate_json(text)) for key, text in sorted(data.items()))
    except ValidationError as wrong:
        first = wrong.errors()[0]
        raise HealError(
            f"ConfigMap {name} is not a ledger of this version ({first['loc']}: {first['msg']})."
        ) from wrong
    return Left(obj["metadata"].get("labels", {}).get(RUN, ""), name, entries, begun)


def strays(cluster: Cluster, run: str | None = None) -> tuple[Undo, ...]:
    """Objects that a run made and that no ledger speaks of any more, as undos.

    Every object of a run names the run; the first label alone may be on others, such as the pod in which gameday runs.
    """
    selector = f"{OURS},{RUN}={run}" if run else f"{OURS},{RUN}"
    found = []
    for kind in ("PodChaos", "NetworkChaos", "StressChaos", "Job", "Pod"):
        group = BY_KIND[kind].group
        if group == "chaos-mesh.org" and BY_KIND[kind].plural not in cluster.served(BY_KIND[kind].api_version):
            continue
        for obj in cluster.list(BY_KIND[kind], cluster.namespace, labels=selector):
            meta = obj["metadata"]
            if not (meta.get("ownerReferences") or []):  # a Job's pod goes with its Job
                found.append(Undo("delete", "stray", meta["name"], kind=kind, namespace=meta["namespace"]))
    return tuple(found)


def heal(cluster: Cluster, *, run: str | None = None, within: float = 60.0, say: Callable[[str], None]) -> int:
    """Undo what is left of earlier runs; returns how many undos were done. Idempotent.

    Refuses (`LockError`) while the run that left it is at work; one that was killed is waited for until its Lease
    runs out. Tries everything even when one undo fails, then raises one `HealError` that lists what is left.
    """
    wait_until_dead(cluster, say)
    remove_dead(
        cluster, cluster_wide=False
    )  # first: a run that only slept finds its Lease gone when it wakes, and harms nothing
    failed: list[str] = []
    count = 0
    for left in leftovers(cluster, run):
        broken = False
        for key, entry in left.entries:
            try:
                begun = left.begun or entry.verb != "rollback"
                say(f"{left.run}: {undo(cluster, entry, within=within) if begun else NOT_BEGUN}")
                _see_running(cluster, entry, within)
                cluster.patch(CONFIGMAPS, left.ledger, {"data": {key: None}}, cluster.namespace)
                count += 1
            except (HealError, ClusterError) as wrong:
                failed.append(str(wrong))
                broken = True
        if not broken:
            cluster.delete(CONFIGMAPS, left.ledger, cluster.namespace)
    for entry in strays(cluster, run):
        try:
            say(f"stray: {undo(cluster, entry, within=within)}")
            count += 1
        except (HealError, ClusterError) as wrong:
            failed.append(str(wrong))
    if failed:
        raise HealError("Not everything could be undone:\n  " + "\n  ".join(failed))
    if run is None or not leftovers(cluster):  # another run's cordons may be in a ledger still
        remove_dead(cluster)
    return count


def _see_running(cluster: Cluster, entry: Undo, within: float) -> None:
    """A pod-failure is over when no pod has the pause image any more, whatever the control plane calls it."""

    def paused() -> tuple[str, ...]:
        return still_paused(pods_of(cluster, entry.running))

    try:
        clock.wait_until(lambda: not paused(), within=within, what="the pods' own images")
    except clock.Waited as late:
        raise HealError(f"{', '.join(paused())} still have the pause image: delete these pods.") from late
