"""The end: what is only ours goes, probers, ledger and lock; then a look whether anything is left."""

from __future__ import annotations

from collections.abc import Sequence

from faults import undo as undoing
from faults.base import Undo
from gameday import activities
from gameday.cluster import Cluster
from gameday.errors import ClusterError, HealError, LockError
from gameday.halt import clear
from gameday.kinds import PODS
from gameday.ledger import Ledger, strays
from gameday.lock import Lock
from gameday.model import Step
from gameday.tape import Tape


def clean(
    cluster: Cluster,
    tape: Tape,
    *,
    lock: Lock,
    ledger: Ledger | None,
    probers: Sequence[Undo],
    healed: bool,
    run: str,
    within: float,
) -> None:
    """Take all of it away and record what is left, if anything. The ledger stays unless everything is undone."""
    left: list[str] = []
    kept = ledger is not None
    try:
        if ledger is not None:
            left += _close(cluster, ledger, probers, healed, within)
            kept = bool(left)
        left += [f"{one.kind} {one.name}" for one in strays(cluster, run)]
        if stop := clear(cluster, lock.holder):
            left.append(stop)
    except (ClusterError, LockError) as wrong:
        left.append(str(wrong))
    left += [f"the action {name!r}, which still runs" for name in activities.under_way()]
    try:
        lock.release(healed=not kept)
    except ClusterError as wrong:
        left.append(f"the lock ({wrong})")
    tape.mark(Step.CLEAN, not left, detail=", ".join(left) or "nothing of ours is left")


def _close(cluster: Cluster, ledger: Ledger, probers: Sequence[Undo], healed: bool, within: float) -> list[str]:
    for entry in probers:  # all at once, then each is waited for
        cluster.delete(PODS, entry.name, entry.namespace, grace=1)
    for entry in probers:
        try:
            undoing.undo(cluster, entry, within=within)
            ledger.done(entry)
        except HealError as wrong:
            return [str(wrong)]
    if not healed:
        return ["the ledger, since not everything is undone: run `gameday heal`"]
    ledger.close()
    return []
