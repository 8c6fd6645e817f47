"""Taking the fault back: every undo of stage "heal", in the plan's order, verified, and struck from the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

from faults import undo as undoing
from faults.base import Undo
from gameday import clock
from gameday.cluster import Cluster
from gameday.errors import ClusterError, HealError
from gameday.ledger import Ledger
from gameday.model import Step
from gameday.tape import Tape


class Healer:
    """The undos of one experiment; `heal` may be repeated, and does only what is not done yet."""

    def __init__(self, cluster: Cluster, ledger: Ledger, undos: Sequence[Undo], tape: Tape, within: float) -> None:
        self._cluster, self._ledger, self._tape, self._within = cluster, ledger, tape, within
        self._undos = tuple(undos)
        self._undone: list[Undo] = []

    @property
    def begun(self) -> bool:
        return bool(self._undone)

    @property
    def told(self) -> str:
        return f"{len(self._undone)} of {len(self._undos)} undone"

    def heal(self) -> bool:
        """Whether everything is undone."""
        until = clock.now() + 2 * self._within  # for all of them together
        failed = False
        for entry in self._undos:
            if entry not in self._undone:
                failed |= not self._undo(entry, min(self._within, max(2.0, until - clock.now())))
        return not failed

    def _undo(self, entry: Undo, within: float) -> bool:
        try:
            told = undoing.undo(self._cluster, entry, within=within)
            if entry.running and self._tape.interrupted is None:
                with contextlib.suppress(clock.Waited):  # judged by objectives, not by the heal
                    run = partial(undoing.containers_run, self._cluster, entry.running)
                    clock.wait_until(run, within=within, what="containers run again")
                if paused := undoing.still_paused(self._cluster, entry.running):
                    raise HealError(f"{', '.join(paused)} still have the pause image: delete these pods.")
            self._ledger.done(entry)
        except (HealError, ClusterError) as wrong:
            self._tape.mark(Step.RECOVERED, False, entry.what, str(wrong))
            self._tape.note("error", str(wrong))
            return False
        self._undone.append(entry)
        self._tape.mark(Step.RECOVERED, True, entry.what, told)
        return True
