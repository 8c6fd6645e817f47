"""Taking the fault back: every undo of stage "heal", in the plan's order, verified, and struck from the ledger.

In order, but not at any price: an undo that hangs is left behind after `PATIENCE` seconds and goes on beside the
next one, with its own deadline. While the API server does not answer it is tried again until the fault's own end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from faults import undo as undoing
from faults.base import Undo
from gameday import clock
from gameday.clock import Instant
from gameday.cluster import Cluster
from gameday.errors import ClusterError, HealError
from gameday.ledger import Ledger
from gameday.model import Step
from gameday.tape import Tape

PATIENCE = 4.0  # seconds for which the next undo waits for this one
HURRIED = 1.0  # … after a stop, when nothing waits until pods are Ready again either


class _Job:
    """One undo and, where its plan says so, the wait until the pods run again: both bounded by `within`.

    In a hurry nobody waits for Ready; but a pod with the pause image is not healed, whoever is in a hurry.
    """

    def __init__(self, cluster: Cluster, entry: Undo, within: float, until: Instant) -> None:
        self.entry, self._cluster, self._within = entry, cluster, within
        self.work = undoing.Work(cluster, entry, within, until)
        self._told: str | None = None
        self._undone_at = 0.0

    @property
    def legitimate(self) -> bool:
        """It only waits for pods, which the next undo is meant to wait for as well."""
        return self._told is not None

    def look(self, hurried: bool) -> str | None:
        """Words when it is done, None when not yet. Raises `HealError`, or a `ClusterError` that came too late."""
        if self._told is None:
            self._told, self._undone_at = self.work.look(), clock.now()
            if self._told is None:
                return None
        if not self.entry.running:
            return self._told
        over = clock.now() - self._undone_at >= self._within
        try:
            pods = undoing.pods_of(self._cluster, self.entry.running)
            paused = undoing.still_paused(pods)
            if not over and (paused or not (hurried or undoing.containers_run(pods))):
                return None  # whether they ever run is judged by objectives, not by the heal
        except ClusterError:
            if over:
                raise
            return None
        if paused:
            raise HealError(f"{', '.join(paused)} still have the pause image: delete these pods.")
        return self._told


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

    def heal(self, until: Instant = 0.0, *, harmed: bool = True) -> bool:
        """Undo all of it; whether everything is undone. `until`: when the fault ends by itself.

        `harmed` False: no act was done, so that a team's rollbacks have nothing to roll back.
        """
        waiting = [entry for entry in self._undos if entry not in self._undone]
        skipped = [entry for entry in waiting if entry.verb == "rollback" and not harmed]
        waiting = [entry for entry in waiting if entry not in skipped]
        jobs: list[_Job] = []
        failed = False in [self._strike(entry, lambda: undoing.NOT_BEGUN) for entry in skipped]
        while waiting or jobs:
            if waiting and not any(self._next_waits(job) for job in jobs):
                jobs.append(_Job(self._cluster, waiting.pop(0), self._within, until))
            for job in list(jobs):
                done = self._look(job)
                if done is not None:
                    jobs.remove(job)
                    failed |= not done
            if jobs:
                clock.pause(undoing.EVERY / 4)
        return not failed

    def _next_waits(self, job: _Job) -> bool:
        patience = HURRIED if self._tape.stopped else PATIENCE
        return job.legitimate or clock.now() - job.work.begun < patience

    def _look(self, job: _Job) -> bool | None:
        """Whether it is undone, None while it is under way."""
        return self._strike(job.entry, lambda: job.look(hurried=self._tape.stopped))

    def _strike(self, entry: Undo, look: Callable[[], str | None]) -> bool | None:
        """Strike it from the ledger once `look` has words for it."""
        try:
            told = look()
            if told is None:
                return None
            self._ledger.done(entry)
        except (HealError, ClusterError) as wrong:
            self._tape.mark(Step.RECOVERED, False, entry.what, str(wrong))
            self._tape.note("error", str(wrong))
            return False
        self._undone.append(entry)
        self._tape.mark(Step.RECOVERED, True, entry.what, told)
        return True
