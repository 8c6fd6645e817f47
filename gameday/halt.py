"""`gameday stop`: whoever may write a ConfigMap into the namespace can end the game day there, from any machine.

A stop names the run that it is meant for, so that an old one ends nothing new. Without access to the cluster, a file
(`stop_file`) on the harness's machine does the same, and keeps others from starting while it is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from faults.base import MANAGED, OURS, ROLE
from gameday import clock
from gameday.cluster import Cluster, Watched
from gameday.errors import ClusterError, HealError, LockError
from gameday.kinds import CONFIGMAPS
from gameday.lock import live_holder

NAME = "gameday-stop"
STOPS = f"{OURS},{ROLE}=stop"


def request(cluster: Cluster, reason: str, *, within: float, say: Callable[[str], None]) -> float:
    """End the game day that is at work in the namespace; returns the seconds until it had healed and left.

    Raises `LockError` when there is none, `HealError` when it has not left within `within` seconds.
    """
    holder = live_holder(cluster)
    if holder is None:
        raise LockError(f"No game day is at work in {cluster.namespace}; what one left behind goes by `gameday heal`.")
    begun = clock.now()
    metadata = {"name": NAME, "namespace": cluster.namespace, "labels": {MANAGED: "gameday", ROLE: "stop"}}
    data = {"holder": holder.name, "reason": reason}
    cluster.delete(CONFIGMAPS, NAME, cluster.namespace)  # an old one, meant for another run
    cluster.create(CONFIGMAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    say(f"{holder} is told to stop")

    def left() -> bool:
        now = live_holder(cluster)
        return now is None or now.name != holder.name

    try:
        clock.wait_until(left, within=within, every=0.25, what=f"{holder} healed and left")
    except clock.Waited as late:
        raise HealError(f"{late}: look at its console, and run `gameday heal` once its Lease has run out.") from late
    return clock.now() - begun


class Ear:
    """Listens for a stop that is meant for `holder`."""

    def __init__(self, cluster: Cluster, holder: str, file: Path, on_stop: Callable[[str], None]) -> None:
        self._cluster, self._holder, self._file, self._on_stop = cluster, holder, file, on_stop
        self._end = threading.Event()

    def start(self) -> None:
        threading.Thread(
            target=self._cluster.watch,
            args=(CONFIGMAPS, self._cluster.namespace, self._hear, self._end),
            kwargs={"labels": STOPS},
            name="watch-stop",
            daemon=True,
        ).start()

    def stop(self) -> None:
        self._end.set()

    def _hear(self, event: Watched) -> None:
        data = event.object.get("data") or {}
        if event.type != "DELETED" and data.get("holder") == self._holder:
            self._on_stop(f"stopped by `gameday stop`: {data.get('reason') or 'no reason given'}")

    def look(self) -> None:
        """At the file; the cluster is heard by itself."""
        if self._file.exists():
            self._on_stop(f"stopped by the file {self._file}")


def clear(cluster: Cluster, holder: str) -> str:
    """Take away the stop that was meant for `holder`; returns what is left of ours, "" when nothing is."""
    try:
        found = cluster.find(CONFIGMAPS, NAME, cluster.namespace)
        if found is not None and (found.get("data") or {}).get("holder") == holder:
            cluster.delete(CONFIGMAPS, NAME, cluster.namespace)
    except ClusterError as wrong:
        return f"ConfigMap {NAME} ({wrong})"
    return ""


def clear_dead(cluster: Cluster) -> None:
    """Take away a stop that nobody will hear any more, since the run that it was meant for is dead."""
    holder = live_holder(cluster)
    found = cluster.find(CONFIGMAPS, NAME, cluster.namespace)
    if found is not None and (holder is None or (found.get("data") or {}).get("holder") != holder.name):
        cluster.delete(CONFIGMAPS, NAME, cluster.namespace)
