"""Ledger, lock, heal: written before the harm, one game day at a time, undone by anyone, and only what was ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.base import CORDONED, MANAGED, RUN, Undo
from faults.undo import undo
from gameday import finish, halt, ledger as ledger_, lock as lock_
from gameday.cluster import Cluster
from gameday.errors import HealError, LockError, RecordError
from gameday.kinds import CONFIGMAPS, LEASES, NODES, PODS, Kind
from gameday.ledger import Ledger, heal, leftovers
from gameday.lock import Lock, live_holder
from gameday.tape import Tape

LABELS = {MANAGED: "gameday", RUN: "r1"}
SECRETS = Kind("", "v1", "secrets", "Secret")


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def swept(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lock_, "OBSERVE", 0.3)
    yield
    for found in cluster.list(LEASES, "llm") + cluster.list(LEASES, "default"):
        cluster.delete(LEASES, found["metadata"]["name"], found["metadata"]["namespace"])
    for found in cluster.list(CONFIGMAPS, "llm", labels=f"{MANAGED}=gameday"):
        cluster.delete(CONFIGMAPS, found["metadata"]["name"], "llm")
    for found in cluster.list(NODES):
        cluster.delete(NODES, found["metadata"]["name"])


def node(cluster: Cluster, name: str, *, cordoned: bool = False, by: str = "t1") -> str:
    spec = {"unschedulable": True} if cordoned else {}
    metadata = {"name": name, "annotations": {CORDONED: by} if cordoned and by else {}}
    made = cluster.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec})
    return str(made["metadata"]["uid"])


def cordoned(cluster: Cluster, name: str) -> bool:
    return bool(cluster.get(NODES, name)["spec"].get("unschedulable"))


def bare_pod(name: str) -> dict[str, object]:
    spec = {"containers": [{"name": "c", "image": "busybox:1.36"}]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "llm", "labels": LABELS},
        "spec": spec,
    }


# ── undo ────────────────────────────────────────────────────────────────────────────────────────


def test_an_uncordon_can_be_repeated(cluster: Cluster) -> None:
    entry = Undo("uncordon", "cordon", "n1", uid=node(cluster, "n1", cordoned=True), value="t1")
    undo(cluster, entry, within=5)
    assert not cordoned(cluster, "n1")
    undo(cluster, entry, within=5)


@pytest.mark.parametrize("by", ["", "t2"])
def test_a_cordon_of_somebody_else_is_never_lifted(cluster: Cluster, by: str) -> None:
    entry = Undo("uncordon", "cordon", "n1", uid=node(cluster, "n1", cordoned=True, by=by), value="t1")
    assert "not cordoned by us" in undo(cluster, entry, within=5)
    assert cordoned(cluster, "n1")


def test_a_node_of_the_same_name_is_another_node(cluster: Cluster) -> None:
    node(cluster, "n1", cordoned=True)
    told = undo(cluster, Undo("uncordon", "cordon", "n1", uid="of-the-one-before", value="t1"), within=5)
    assert "replaced" in told and cordoned(cluster, "n1")


def test_allocatable_that_somebody_else_changed_is_left_alone(cluster: Cluster) -> None:
    entry = Undo("allocatable", "a", "n1", uid=node(cluster, "n1"), resource="nvidia.com/gpu", value="2", ours="0")

    def offer(count: str) -> None:
        cluster.patch(NODES, "n1", {"status": {"allocatable": {"nvidia.com/gpu": count}}}, sub="status")

    offer("1")  # a device plugin has found one again
    assert "not our doing" in undo(cluster, entry, within=5)
    assert cluster.get(NODES, "n1")["status"]["allocatable"]["nvidia.com/gpu"] == "1"
    offer("0")
    assert "offers 2" in undo(cluster, entry, within=5)


def test_a_full_disk_keeps_from_beginning(cluster: Cluster) -> None:
    """No ledger, no harm: neither here nor in the cluster is anything begun."""
    book = Ledger(cluster, Path("/dev/full"), "gd-x-ledger", LABELS)
    with pytest.raises(RecordError, match="No space left on device; nothing was harmed"):
        book.write([Undo("uncordon", "c", "n1", uid="u", value="t1")])
    assert leftovers(cluster) == ()


def test_a_delete_that_hangs_names_the_finalizer_and_the_command(cluster: Cluster) -> None:
    held = bare_pod("held")
    held["metadata"]["finalizers"] = ["example.org/held"]  # type: ignore[index]
    cluster.create(PODS, held)
    with pytest.raises(HealError, match=r"finalizer example.org/held.*kubectl -n llm delete pod held"):
        undo(cluster, Undo("delete", "prober", "held", kind="Pod", namespace="llm"), within=0.5)
    cluster.patch(PODS, "held", {"metadata": {"finalizers": None}}, "llm")


# ── ledger and heal ─────────────────────────────────────────────────────────────────────────────


def test_whoever_reads_the_cluster_can_heal(cluster: Cluster, tmp_path: Path) -> None:
    uid = node(cluster, "n1", cordoned=True)
    node(cluster, "n2", cordoned=True, by="")  # by somebody else
    cluster.create(PODS, bare_pod("gd-prober"))
    book = Ledger(cluster, tmp_path / "ledger.jsonl", "gd-x-ledger", LABELS)
    book.write(
        [
            Undo("uncordon", "cordon", "n1", uid=uid, value="t1"),
            Undo("delete", "prober", "gd-prober", kind="Pod", namespace="llm", stage="clean"),
        ]
    )
    assert (tmp_path / "ledger.jsonl").read_text().count("\n") == 2
    # the process dies here; another machine heals
    assert [len(left.entries) for left in leftovers(cluster)] == [2]
    assert heal(cluster, within=5, say=quiet) == 2
    assert not cordoned(cluster, "n1") and cordoned(cluster, "n2")
    assert cluster.find(PODS, "gd-prober", "llm") is None
    assert leftovers(cluster) == ()
    assert heal(cluster, within=5, say=quiet) == 0


def test_what_is_undone_is_struck_out(cluster: Cluster, tmp_path: Path) -> None:
    first = Undo("uncordon", "cordon", "n1", uid=node(cluster, "n1"), value="t1")
    second = Undo("uncordon", "cordon", "n2", uid=node(cluster, "n2"), value="t1")
    book = Ledger(cluster, tmp_path / "ledger.jsonl", "gd-x-ledger", LABELS)
    book.write([first, second])
    book.done(first)
    assert [entry for _, entry in leftovers(cluster)[0].entries] == [second]


def test_heal_refuses_while_the_run_lives(cluster: Cluster, tmp_path: Path) -> None:
    lock = Lock(cluster, "r1/pod_kill", LABELS, cluster_wide=False)
    lock.acquire(on_lost=print)
    Ledger(cluster, tmp_path / "ledger.jsonl", "gd-x-ledger", LABELS).write(
        [Undo("uncordon", "c", "n1", uid="u", value="t1")]
    )
    with pytest.raises(LockError, match="'r1/pod_kill' since"):
        heal(cluster, within=5, say=quiet)
    lock.release()
    assert heal(cluster, within=5, say=quiet) == 1


def test_heal_goes_on_after_a_failure_and_lists_what_is_left(cluster: Cluster, tmp_path: Path) -> None:
    held = bare_pod("held")
    held["metadata"]["finalizers"] = ["example.org/held"]  # type: ignore[index]
    cluster.create(PODS, held)
    uid = node(cluster, "n1", cordoned=True)
    stuck = Undo("delete", "prober", "held", kind="Pod", namespace="llm")
    Ledger(cluster, tmp_path / "l.jsonl", "gd-x-ledger", LABELS).write(
        [stuck, Undo("uncordon", "c", "n1", uid=uid, value="t1")]
    )
    with pytest.raises(HealError, match="held"):
        heal(cluster, within=0.5, say=quiet)
    assert not cordoned(cluster, "n1")
    assert [entry for left in leftovers(cluster) for _, entry in left.entries] == [stuck]
    cluster.patch(PODS, "held", {"metadata": {"finalizers": None}}, "llm")
    heal(cluster, within=5, say=quiet)
    assert leftovers(cluster) == ()


def test_a_ledger_of_another_version_is_refused_not_ignored(cluster: Cluster) -> None:
    labels = LABELS | {"gameday.dev/role": "ledger"}
    metadata = {"name": "gd-y-ledger", "namespace": "llm", "labels": labels}
    cluster.create(
        CONFIGMAPS,
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"000": '{"verb": "explode"}'}},
    )
    with pytest.raises(HealError, match="gd-y-ledger is not a ledger"):
        leftovers(cluster)


def test_strays_without_a_ledger_are_found_and_healed(cluster: Cluster) -> None:
    cluster.create(PODS, bare_pod("stray"))
    assert heal(cluster, within=5, say=quiet) == 1
    assert cluster.find(PODS, "stray", "llm") is None


def test_what_is_labelled_like_ours_but_of_no_run_is_no_stray(cluster: Cluster) -> None:
    """The CronJob of deploy/ puts that label on the very pod in which `gameday heal` runs."""
    runner = bare_pod("runner")
    runner["metadata"]["labels"] = {MANAGED: "gameday"}  # type: ignore[index]
    cluster.create(PODS, runner)
    assert heal(cluster, within=5, say=quiet) == 0
    assert cluster.find(PODS, "runner", "llm") is not None
    cluster.delete(PODS, "runner", "llm", grace=0)


# ── lock ────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_game_day_is_told_who_holds_the_lock(cluster: Cluster) -> None:
    first = Lock(cluster, "r1/zone_outage", LABELS, cluster_wide=True)
    first.acquire(on_lost=print)
    with pytest.raises(LockError, match=r"'r1/zone_outage' since \d\d:\d\d:\d\d holds the lock"):
        Lock(cluster, "r2/pod_kill", LABELS, cluster_wide=False).acquire(on_lost=print)
    first.release()
    assert live_holder(cluster) is None
    assert not [one for one in cluster.list(LEASES, "default") if one["metadata"]["name"] == lock_.CLUSTER_WIDE[0]]


def expire(cluster: Cluster) -> None:
    cluster.patch(LEASES, lock_.NAME, {"spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}}, "llm")


def test_an_expired_lock_is_taken_over_only_when_its_ledger_is_healed(cluster: Cluster, tmp_path: Path) -> None:
    dead = Lock(cluster, "r1/zone_outage", LABELS, cluster_wide=False)
    dead.acquire(on_lost=print)
    Ledger(cluster, tmp_path / "l.jsonl", "gd-x-ledger", LABELS).write(
        [Undo("uncordon", "c", "n1", uid="u", value="t1")]
    )
    expire(cluster)
    heir = Lock(cluster, "r2/pod_kill", LABELS, cluster_wide=False)
    with pytest.raises(LockError, match=r"left faults behind.*gameday heal"):
        heir.acquire(on_lost=print)
    heal(cluster, within=5, say=quiet)
    heir.acquire(on_lost=print)
    assert str(live_holder(cluster)).startswith("Game day 'r2/pod_kill'")
    heir.release()


def test_a_lost_lock_is_noticed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_, "RENEW", 0.05)
    lost: list[str] = []
    lock = Lock(cluster, "r1/pod_kill", LABELS, cluster_wide=False)
    lock.acquire(on_lost=lost.append)
    cluster.patch(LEASES, lock_.NAME, {"spec": {"holderIdentity": "somebody-else"}}, "llm")
    assert lock.lost.wait(timeout=10)
    lock.release()
    assert "'somebody-else' holds it" in lost[0]
    assert cluster.get(LEASES, lock_.NAME, "llm")["spec"]["holderIdentity"] == "somebody-else"


def test_nothing_is_held_when_one_of_two_leases_is_taken(cluster: Cluster) -> None:
    other = Lock(cluster, "r1/zone_outage", LABELS, cluster_wide=True)
    other.acquire(on_lost=print)
    cluster.delete(LEASES, lock_.NAME, "llm")  # a game day in another namespace holds only the cluster-wide one
    with pytest.raises(LockError, match="r1/zone_outage"):
        Lock(cluster, "r2/zone_outage", LABELS, cluster_wide=True).acquire(on_lost=print)
    assert live_holder(cluster) is None
    other.release()


# ── between the lock and the harm ───────────────────────────────────────────────────────────────


def written(cluster: Cluster, tmp_path: Path, *undos: Undo) -> Ledger:
    book = Ledger(cluster, tmp_path / "l.jsonl", "gd-x-ledger", LABELS)
    book.write(undos or [Undo("uncordon", "c", "n1", uid="u", value="t1")])
    return book


def test_a_lock_that_was_given_back_with_its_ledger_unhealed_is_not_taken(cluster: Cluster, tmp_path: Path) -> None:
    """Its run could not heal, gave its Lease back, and left its ledger: after our preflight."""
    written(cluster, tmp_path)
    lock = Lock(cluster, "r2/pod_kill", LABELS, cluster_wide=True)
    with pytest.raises(LockError, match=r"gd-x-ledger in llm tells of faults .*gameday heal"):
        lock.acquire(on_lost=print)
    assert cluster.list(LEASES, "llm") == [] and live_holder(cluster) is None
    heal(cluster, within=5, say=quiet)
    lock.acquire(on_lost=print)
    lock.release()


def test_nodes_that_are_not_healed_are_kept_from_game_days_on_other_namespaces(
    cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    """Theirs would find the cluster-wide Lease free, and never look for a ledger in our namespace."""
    first = Lock(cluster, "r1/zone_outage", LABELS, cluster_wide=True)
    first.acquire(on_lost=print)
    book = written(cluster, tmp_path)
    finish.clean(cluster, Tape(quiet), lock=first, ledger=book, probers=(), healed=False, run="r1", within=1)
    elsewhere = Cluster.connect(context="gameday-sandbox", kubeconfig=kubeconfig, namespace="default")
    other = Lock(elsewhere, "r2/zone_outage", LABELS, cluster_wide=True)
    with pytest.raises(LockError, match=r"'r1/zone_outage'.* left faults behind in llm: run `gameday heal`"):
        other.acquire(on_lost=print)
    assert live_holder(cluster) is None, "nobody has to wait before healing"
    heal(cluster, within=5, say=quiet)
    other.acquire(on_lost=print)
    other.release()


def test_whoever_slept_while_somebody_healed_has_lost_lock_and_ledger(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_, "RENEW", 3600.0)  # asleep
    sleeper = Lock(cluster, "r1/pod_kill", LABELS, cluster_wide=False)
    sleeper.acquire(on_lost=print)
    book = written(cluster, tmp_path)
    sleeper.fence()
    book.fence(begins=False)
    expire(cluster)
    heal(cluster, within=5, say=quiet)
    with pytest.raises(LockError, match="it is gone"):
        sleeper.fence()
    for begins in (False, True):
        with pytest.raises(RecordError, match="1 of 1 undos are not in the ledger"):
            book.fence(begins=begins)
    sleeper.release()


def test_a_heal_takes_the_dead_lease_away_before_its_first_undo(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run that wakes up in the middle of it would find lock and ledger in order, and begin."""
    dead = Lock(cluster, "r1/pod_kill", LABELS, cluster_wide=False)
    dead.acquire(on_lost=print)
    written(cluster, tmp_path)
    expire(cluster)
    seen: list[int] = []
    monkeypatch.setattr(ledger_, "undo", lambda *_, **__: seen.append(len(cluster.list(LEASES, "llm"))))
    heal(cluster, within=5, say=quiet)
    assert seen == [0]
    dead.release()


def test_half_a_ledger_is_no_ledger_to_begin_with(cluster: Cluster, tmp_path: Path) -> None:
    one, two = (Undo("uncordon", "c", name, uid="u", value="t1") for name in ("n1", "n2"))
    book = written(cluster, tmp_path, one, two)
    cluster.patch(CONFIGMAPS, "gd-x-ledger", {"data": {"001": None}}, "llm")  # somebody heals, right now
    with pytest.raises(RecordError, match="1 of 2 undos"):
        book.fence(begins=True)


@pytest.mark.parametrize("begun", [False, True])
def test_rollbacks_of_a_method_that_never_began_are_struck_and_not_run(
    begun: bool, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is killed before its first action: a team's rollback would change what it never changed."""
    book = written(cluster, tmp_path, Undo("rollback", "rollbacks", "theirs", value="{}"))
    if begun:
        book.fence(begins=True)
    ran: list[str] = []
    monkeypatch.setattr(ledger_, "undo", lambda _, entry, **__: ran.append(entry.name))
    assert [left.begun for left in leftovers(cluster)] == [begun]
    assert heal(cluster, within=5, say=quiet) == 1
    assert ran == (["theirs"] if begun else []) and leftovers(cluster) == ()


def test_a_heal_of_one_run_keeps_the_nodes_of_another_from_other_namespaces(cluster: Cluster, tmp_path: Path) -> None:
    """`--run r1` gave the cluster-wide Lease away while r2's cordons stood in their ledger still."""
    dead = Lock(cluster, "r2/zone_outage", LABELS, cluster_wide=True)
    dead.acquire(on_lost=print)
    written(cluster, tmp_path)
    dead.release(healed=False)
    heal(cluster, run="r-of-nobody", within=5, say=quiet)
    assert cluster.find(LEASES, *lock_.CLUSTER_WIDE) is not None
    heal(cluster, within=5, say=quiet)
    assert cluster.find(LEASES, *lock_.CLUSTER_WIDE) is None


def test_a_stop_that_nobody_heard_goes_with_the_heal(cluster: Cluster) -> None:
    stop = {"metadata": {"name": "gameday-stop", "namespace": "llm", "labels": LABELS}, "data": {"holder": "r1/dead"}}
    cluster.create(CONFIGMAPS, {"apiVersion": "v1", "kind": "ConfigMap", **stop})
    lock = Lock(cluster, "r1/dead", LABELS, cluster_wide=False)
    lock.acquire(on_lost=print)
    halt.clear_dead(cluster)
    assert cluster.find(CONFIGMAPS, "gameday-stop", "llm") is not None, "it is at work, and may not have heard it yet"
    lock.release()
    halt.clear_dead(cluster)
    assert cluster.find(CONFIGMAPS, "gameday-stop", "llm") is None
