"""One game day at a time: a Lease per namespace, and a cluster-wide one for node and zone faults.

The Lease names the run; it is renewed from a thread. Whoever loses it must heal and stop (`lost`).
An expired Lease may be taken over only when its run's ledger is healed; and whoever has taken one looks for ledgers
again, since a run that could not heal gives its Lease back and leaves its ledger.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gameday import clock
from gameday.cluster import Cluster, Obj, Refused
from gameday.errors import ClusterError, LockError
from gameday.kinds import CONFIGMAPS, LEASES

NAME = "gameday"
UNDER_TEST = "gameday.dev/namespace"  # annotation: the namespace under test, where its ledger lies
CLUSTER_WIDE = ("gameday-cluster", "default")  # every cluster has that namespace
LASTS = 20.0  # seconds without renewal until others may take it over
RENEW = 4.0
OBSERVE = 1.5 * RENEW  # seconds for which an expired Lease must not move: its holder's clock may differ from ours


@dataclass(frozen=True, slots=True)
class Holder:
    name: str
    since: datetime | None
    until: datetime

    @property
    def live(self) -> bool:
        return datetime.now(UTC) < self.until

    def __str__(self) -> str:
        since = f" since {self.since.astimezone():%H:%M:%S}" if self.since else ""
        return f"Game day {self.name!r}{since}"


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _show(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def holder_of(lease: Obj) -> Holder:
    spec = lease.get("spec", {})
    renewed = _time(spec.get("renewTime")) or datetime.fromtimestamp(0, UTC)
    lasts = timedelta(seconds=spec.get("leaseDurationSeconds") or LASTS)
    return Holder(spec.get("holderIdentity") or "", _time(spec.get("acquireTime")), renewed + lasts)


def live_holder(cluster: Cluster) -> Holder | None:
    """Who holds the namespace's lock right now."""
    lease = cluster.find(LEASES, NAME, cluster.namespace)
    holder = holder_of(lease) if lease else None
    return holder if holder and holder.name and holder.live else None


def wait_until_dead(cluster: Cluster, say: Callable[[str], None]) -> None:
    """Return once nobody holds the namespace's lock; after a `kill -9` that takes until the Lease runs out.

    Raises `LockError` as soon as the holder shows that it lives, by renewing it.
    """
    lease = cluster.find(LEASES, NAME, cluster.namespace)
    if lease is None or not (holder := holder_of(lease)).name:
        return
    left = max(OBSERVE, min(LASTS + RENEW, (holder.until - datetime.now(UTC)).total_seconds()))
    if holder.live:
        say(f"{holder} holds the lock; its Lease runs out in {left:.0f} s, unless it is renewed")
    if _moves(cluster, NAME, cluster.namespace, lease, left):
        raise LockError(f"{holder} is still at work here: `gameday stop` ends it, and it heals by itself.")


def _moves(cluster: Cluster, name: str, namespace: str, lease: Obj, within: float) -> bool:
    """Whether anybody renews or takes this Lease in the next seconds."""
    until = clock.now() + within
    while clock.now() < until:
        clock.pause(min(0.25, within))
        seen = cluster.find(LEASES, name, namespace)
        if seen is None:
            return False
        if seen.get("spec", {}).get("renewTime") != lease.get("spec", {}).get("renewTime"):
            return bool(holder_of(seen).name)
    return False


def remove_dead(cluster: Cluster, *, cluster_wide: bool = True) -> int:
    """Delete the expired leases of game days on this namespace; returns how many there were.

    The cluster-wide one guards the nodes against game days on other namespaces until all is healed.
    Raises `LockError` where a holder that was taken for dead wakes up at this instant.
    """
    count = 0
    for name, namespace in ((NAME, cluster.namespace), *((CLUSTER_WIDE,) if cluster_wide else ())):
        lease = cluster.find(LEASES, name, namespace)
        ours = lease is not None and (lease["metadata"].get("annotations") or {}).get(UNDER_TEST) == cluster.namespace
        if lease is not None and ours and not holder_of(lease).live:
            try:
                count += cluster.delete(LEASES, name, namespace, version=lease["metadata"]["resourceVersion"])
            except Refused as refused:
                if refused.code != 409:
                    raise
                raise LockError(f"{holder_of(lease)} is still at work here: `gameday stop` ends it.") from refused
    return count


def _ledgers(cluster: Cluster, namespace: str) -> list[str]:
    found = cluster.list(CONFIGMAPS, namespace, labels="app.kubernetes.io/managed-by=gameday,gameday.dev/role=ledger")
    return sorted(obj["metadata"]["name"] for obj in found)


class Lock:
    """Held from `acquire` to `release`; `lost` is set when it could not be renewed in time."""

    def __init__(self, cluster: Cluster, holder: str, labels: dict[str, str], *, cluster_wide: bool) -> None:
        self._cluster, self.holder, self._labels = cluster, holder, labels
        self._leases = [(NAME, cluster.namespace)] + ([CLUSTER_WIDE] if cluster_wide else [])
        self._held: list[tuple[str, str]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = threading.Event()

    def manifests(self) -> tuple[Obj, ...]:
        """The Leases as they would be taken now."""
        return tuple(self._lease(name, namespace) for name, namespace in self._leases)

    def _lease(self, name: str, namespace: str) -> Obj:
        now = _show(datetime.now(UTC))
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": self._labels,
                "annotations": {UNDER_TEST: self._cluster.namespace},
            },
            "spec": {
                "holderIdentity": self.holder,
                "leaseDurationSeconds": int(LASTS),
                "acquireTime": now,
                "renewTime": now,
            },
        }

    def acquire(self, on_lost: Callable[[str], None]) -> None:
        """Take all leases or none; `on_lost` is told why when one is lost later.

        Raises `LockError` naming who holds one and since when."""
        try:
            for name, namespace in self._leases:
                self._take(name, namespace)
                self._held.append((name, namespace))
            if ledgers := _ledgers(self._cluster, self._cluster.namespace):
                raise LockError(
                    f"{', '.join(ledgers)} in {self._cluster.namespace} tells of faults that an earlier run left "
                    "behind: run `gameday heal` first."
                )
        except (ClusterError, LockError):
            self.release()
            raise
        self._thread = threading.Thread(target=self._renew, args=(on_lost,), name="lease", daemon=True)
        self._thread.start()

    def _take(self, name: str, namespace: str) -> None:
        lease = self._lease(name, namespace)
        old = self._cluster.find(LEASES, name, namespace)
        try:
            if old is None:
                self._cluster.create(LEASES, lease)
                return
            self._check_free(old, name, namespace)
            lease["metadata"] = {**old["metadata"], **lease["metadata"]}
            self._cluster.replace(LEASES, lease)
        except Refused as refused:
            if refused.code == 409:  # another one was quicker
                raise LockError(
                    f"Another game day took the lock {namespace}/{name} just now: try again later."
                ) from refused
            raise

    def _check_free(self, lease: Obj, name: str, namespace: str) -> None:
        holder = holder_of(lease)
        if not holder.name:
            return
        if holder.live or _moves(self._cluster, name, namespace, lease, OBSERVE):
            raise LockError(f"{holder} holds the lock in {namespace}: wait for it, or end it (`gameday stop`).")
        # Ledgers lie in the namespace that was under test, whichever lease has expired.
        namespace = (lease["metadata"].get("annotations") or {}).get(UNDER_TEST, namespace)
        if _ledgers(self._cluster, namespace):
            raise LockError(f"{holder} died and left faults behind in {namespace}: run `gameday heal` first.")

    def _renew(self, on_lost: Callable[[str], None]) -> None:
        good = clock.now()
        why = ""
        while not why and not self._stop.wait(RENEW):
            try:
                for name, namespace in self._held:
                    self._renew_one(name, namespace)
                good = clock.now()
            except LockError as lost:
                why = str(lost)
            except ClusterError as wrong:
                if clock.now() - good > LASTS - RENEW:
                    why = f"the lock could not be renewed for {clock.now() - good:.0f} s ({wrong})"
        if why:
            self.lost.set()
            on_lost(why)

    def _renew_one(self, name: str, namespace: str) -> None:
        lease = self._cluster.find(LEASES, name, namespace)
        if lease is None or holder_of(lease).name != self.holder:
            now = f"{holder_of(lease).name!r} holds it" if lease else "it is gone"
            raise LockError(f"the lock {namespace}/{name} was lost: {now}")
        self._cluster.patch(LEASES, name, {"spec": {"renewTime": _show(datetime.now(UTC))}}, namespace)

    def fence(self) -> None:
        """Renew every lease now. Raises `LockError` where one is not ours any more, and `ClusterError`."""
        for name, namespace in self._held:
            self._renew_one(name, namespace)

    def release(self, *, healed: bool = True) -> None:
        """Give every lease back, if it is still ours.

        Not `healed`: the cluster-wide one stays, as one whose holder died. Our ledger, which game days on other
        namespaces do not look for, is what they are then sent to.
        """
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=5)
        for name, namespace in self._held:
            lease = self._cluster.find(LEASES, name, namespace)
            if lease is None or holder_of(lease).name != self.holder:
                continue
            if healed or (name, namespace) != CLUSTER_WIDE:
                self._cluster.delete(LEASES, name, namespace)
            else:
                self._cluster.patch(
                    LEASES, name, {"spec": {"renewTime": _show(datetime.fromtimestamp(0, UTC))}}, namespace
                )
        self._held.clear()
