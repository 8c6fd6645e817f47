"""Whether the fault bites: the proofs of its effect, kept up until the heal, and seen to be gone after it."""

from __future__ import annotations

from faults.base import Act, Cordoned, Cut, Dead, Detected, Evict, Job, Mute, Newborn, Plan, Seeable
from gameday import clock
from gameday.cluster import Cluster, Node
from gameday.ledger import strays
from gameday.model import EvictionMark, NodeMark, PodMark, Step
from gameday.tape import Tape
from probes.kube import Watcher
from probes.reach import EVERY, LOST, Reach, Seen

SETTLES_WITHIN = 5.0  # seconds in which a prober that had missed a connection may still make it
SHOWN_WITHIN = 10.0  # seconds for the watches to show what an act that has ended did
GONE_WITHIN = 10.0  # seconds after the undo until the effect must be seen to be gone


def lasting(plan: Plan) -> tuple[str, ...]:
    """The acts whose effect lasts until the heal, or until the service itself ends it, by name."""
    return tuple(act.what for act in plan.acts if _lasts(getattr(act, "proof", None)))


def _lasts(proof: object) -> bool:
    return isinstance(proof, Mute) or (isinstance(proof, Cut | Dead | Newborn) and proof.lasting)


def _probed(act: Act) -> bool:
    """Whether it is for the probers to see that its effect lasts."""
    proof = getattr(act, "proof", None)
    return isinstance(proof, Seeable) and _lasts(proof)


class Effects:
    """The proofs of one plan's acts."""

    def __init__(self, plan: Plan, reach: Reach, watcher: Watcher, tape: Tape) -> None:
        self._plan, self._reach, self._watcher, self._tape = plan, reach, watcher, tape
        self._gone: frozenset[str] = frozenset()
        self._reported: set[str] = set()  # nodes whose Xid a detector has reported
        self._biting: dict[str, clock.Instant] = {}  # acts whose effect was proven → since when
        self._lost: dict[str, int] = {}  # act → looks in a row without its effect
        self._standing: tuple[Node, ...] = ()  # right before the harm
        self._back: set[str] = set()  # nodes that were reset, and are back
        self.signalled = 0.0  # when the signal Job ran: detections count from then on

    def ready(self) -> bool:
        """Right before the harm: whether it may be done (else the stop is set)."""
        self._standing = self._watcher.nodes() if self._plan.resets else ()
        if unseen := set(self._plan.resets) - {node.name for node in self._standing}:
            told = f"the watch does not show {', '.join(sorted(unseen))}, which is to be reset: nothing was injected"
            self._tape.stop("inconclusive", told)
        return not unseen

    def provable(self) -> bool:
        """Right before the harm, too: whether the probers could see it (else the stop is set). What nobody could prove
        is not done: it would hurt for nothing."""
        proofs = [proof for act in self._plan.acts if isinstance(proof := getattr(act, "proof", None), Seeable)]
        until = clock.now() + SETTLES_WITHIN
        self._reach.settle()
        while why := next((told for proof in proofs if (told := self._reach.blind(proof))), ""):
            if clock.now() > until:
                self._tape.stop("inconclusive", f"nothing was injected, since its effect could not be seen: {why}")
            if self._tape.stopped:
                return False
            clock.pause(EVERY, self._tape.stopping)
            self._reach.settle()
        return True

    def prove_all(self, since: clock.Instant) -> bool:
        """After the last act: the effect of all of them together, where the acts have no proofs of their own."""
        return True

    def look_after(self) -> None:
        """When the service is back, or never came back."""

    def look(self, act: Act, harm: clock.Instant = 0.0) -> Seen:
        """What can be seen of an act's effect now; `harm`: when the fault began."""
        proof = getattr(act, "proof", None)
        if isinstance(proof, Cordoned):
            assert isinstance(act, Evict), "a cordon alone harms nobody"
            return self._watcher.drained(proof.nodes, self._evicted(act, harm), harm)
        if isinstance(proof, Newborn):
            return self._watcher.newborn(proof.owner, harm)
        assert isinstance(proof, Cut | Dead | Mute), "the others are looked for elsewhere"
        return self._reach.look(proof, self._gone)

    def _still(self, act: Act) -> Seen:
        """What can be seen of an effect that was proven: a mute pod that the service restarted or removed was noticed,
        which is what is hoped for; one that merely answers again was let go by something else."""
        proof = getattr(act, "proof", None)
        if isinstance(proof, Mute):
            ends = ("restarted", "terminating", "gone")
            since = self._biting.get(act.what, clock.now())
            marks = (mark for mark in list(self._tape.events) if isinstance(mark, PodMark) and mark.t >= since)
            ended = {mark.pod: mark.stage for mark in marks if mark.pod in proof.pods and mark.stage in ends}
            if set(proof.pods) <= set(ended):
                told = ", ".join(f"{pod} {stage}" for pod, stage in sorted(ended.items()))
                return Seen(True, True, clock.now(), clock.now(), f"noticed by the service: {told}")
        return self.look(act, self._biting.get(act.what, 0.0))

    def _evicted(self, act: Evict, since: clock.Instant) -> frozenset[str]:
        """The pods, by uid, whose eviction was accepted since then."""
        marks = [mark for mark in list(self._tape.events) if isinstance(mark, EvictionMark) and mark.t >= since]
        accepted = {mark.pod for mark in marks if mark.answer == "accepted"}
        return frozenset(uid for key, uid in act.pods if key in accepted)

    def prove(self, act: Act, since: clock.Instant) -> bool:
        """Wait for the independent proof that the act, done at `since`, bites; stop where none comes."""
        proof, within = getattr(act, "proof", None), getattr(act, "within", SHOWN_WITHIN)
        if isinstance(act, Evict):
            within = SHOWN_WITHIN  # its own time is over: nobody is evicted any more
        if act.what == "pod-kill" and isinstance(proof, Dead):
            self._gone |= frozenset(proof.pods)
        until, seen = clock.now() + within, self.look(act, since)
        while not seen.settled and clock.now() < until and not self._tape.stopped:
            clock.pause(EVERY / 2, self._tape.stopping)
            seen = self.look(act, since)
        if not seen.settled and self._tape.stopped:
            return False  # by something else, which says so: that the effect was not seen yet is no word about it
        if not seen.settled:
            self._tape.mark(Step.EFFECT, False, act.what, seen.detail)
            self._tape.stop("inconclusive", f"{act.what} was injected, but its effect was not seen: {seen.detail}")
            return False
        since = max(seen.before, since)
        self._biting[act.what] = since
        self._tape.mark(Step.EFFECT, True, act.what, seen.detail, t=max(seen.since, since), since=since)
        return True

    def watch(self) -> None:
        """A lasting effect must be seen until the heal; detectors' reports are noted when they come."""
        if any(map(_probed, self._plan.acts)) and (silent := self._reach.silent(EVERY * LOST * 3)):
            why = f"the prober in zone {silent[0]} fell silent, so that the fault cannot be seen"
            self._tape.stop("inconclusive", why)
        for act in self._plan.acts:
            proof = getattr(act, "proof", None)
            if _lasts(proof):
                seen = self._still(act)
                self._lost[act.what] = 0 if seen.holds else self._lost.get(act.what, 0) + 1
                if self._lost[act.what] > LOST:
                    self._tape.mark(Step.EFFECT, False, act.what, seen.detail)
                    why = f"the effect of {act.what} was lost before the heal: {seen.detail}"
                    self._tape.stop("inconclusive", why)
            if isinstance(act, Job) and isinstance(proof, Detected):
                self._detected(proof)

    def last_look(self) -> None:
        """Right before the heal: what lasts must still be seen, or nobody knows for how long it acted."""
        for act in self._plan.acts:
            if act.what not in self._biting or act.what not in lasting(self._plan):
                continue
            until, seen = clock.now() + EVERY * LOST, self._still(act)
            while not seen.holds and clock.now() < until:
                clock.pause(EVERY / 2)
                seen = self._still(act)
            silent = _probed(act) and self._reach.silent(EVERY * LOST * 3)
            self._tape.mark(Step.EFFECT, seen.holds and not silent, act.what, seen.detail)

    def _detected(self, proof: Detected) -> bool:
        if proof.node in self._reported:
            return True
        found = self._watcher.detection(proof.node, proof.xid, self.signalled)
        if found is None:
            return False
        self._reported.add(proof.node)
        self._tape.emit(NodeMark(found.t, proof.node, "detected", "", found.text))
        self._tape.mark(Step.EFFECT, True, "signal", found.text)
        return True

    def demand_detection(self) -> None:
        """A signal that no detector has reported until the heal proved nothing."""
        for act in self._plan.acts:
            proof = getattr(act, "proof", None)
            if isinstance(act, Job) and isinstance(proof, Detected) and not self._detected(proof):
                self._tape.mark(Step.EFFECT, False, "signal", f"no detector reported Xid {proof.xid} on {proof.node}")

    def tell_uncovered(self) -> None:
        """Pods born in the broken zone after the injection are not broken: Chaos Mesh chooses its targets once."""
        zone, marks = self._plan.facts.zone, [mark for mark in list(self._tape.events) if isinstance(mark, PodMark)]
        uncovered = {mark.uid for mark in marks if mark.stage == "created" and not mark.covered}
        born = sorted({mark.pod for mark in marks if mark.uid in uncovered and mark.zone == zone})
        if zone and self._plan.cuts and born:
            names = ", ".join(born)
            self._tape.note("warning", f"born in zone {zone} after the injection, and so not cut off: {names}")

    def see_gone(self, cluster: Cluster, run: str) -> None:
        """The effect must be seen to be gone, not only called so."""
        proofs = [(act.what, getattr(act, "proof", None)) for act in self._plan.acts]
        seeable = [(what, proof) for what, proof in proofs if isinstance(proof, Cut | Mute)]
        for what, proof in seeable:
            if isinstance(proof, Mute) and not self._watcher.exist(proof.pods):
                self._tape.mark(Step.GONE, True, what, "the pods that were mute are gone")
                continue
            until, seen = clock.now() + GONE_WITHIN, self._reach.look_gone(proof, self._watcher.ready_at())
            while not seen.settled and clock.now() < until:
                clock.pause(EVERY / 2)
                seen = self._reach.look_gone(proof, self._watcher.ready_at())
            self._tape.mark(Step.GONE, seen.settled, what, seen.detail)
        if not seeable:
            kinds = [one for one in strays(cluster, run) if one.kind not in ("Pod", "Job")]
            told = ", ".join(one.name for one in kinds) or "no chaos resource is left"
            self._tape.mark(Step.GONE, not kinds, self._plan.facts.name, told)
        self._look_back()

    def see_back(self, within: float) -> None:
        """In the end: the nodes that were reset must be back, or they are a mess left behind."""
        began = clock.now()
        while not self._look_back():
            if clock.now() - began > (within if self._tape.interrupted is None else min(within, GONE_WITHIN)):
                break
            clock.pause(EVERY)
        for name in sorted(set(self._plan.resets) - self._back):
            told = f"{self._away(name)} {clock.now() - began:.0f} s after all else (heal_within says how long it may)"
            self._tape.mark(Step.GONE, False, name, told)

    def _look_back(self) -> bool:
        """Note each node that is back; whether all are."""
        for name in sorted(set(self._plan.resets) - self._back):
            if not self._away(name):
                self._back.add(name)
                self._tape.mark(Step.GONE, True, name, f"{name} has booted again, or another has taken its place")
        return self._back >= set(self._plan.resets)

    def _away(self, name: str) -> str:
        """Why a node that was reset does not count as back, "" when it does: Ready, with a new boot or replaced."""
        old, now = {node.uid: node for node in self._standing}, self._watcher.nodes()
        here = [node for node in now if node.name == name]
        if not here:
            fresh = [node for node in now if node.ready and node.uid not in old]
            return "" if fresh else f"{name} is gone, and no new node is ready in its place"
        if not all(node.ready for node in here):
            return f"{name} is not Ready"
        booted = all(node.uid not in old or node.boot != old[node.uid].boot for node in here)
        return "" if booted or not self._biting else f"{name} has not booted again"
