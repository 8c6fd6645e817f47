"""Faults are pure plans: explicit targets, bounded by radius and time, proven, and with an undo for every act."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

import faults
from faults import (
    NodeCrash,
    NodeDrain,
    PodHang,
    PodKill,
    PodStop,
    RollingUpdate,
    Xid,
    ZombieEngine,
    Zone,
    ZoneOutage,
    ZonePartition,
)
from faults.act import NotInjected, injected, manifests, selected_nothing
from faults.base import Apply, Cordon, Cut, Dead, Detected, Evict, Fault, Job, Mute, Roll, View, harmful
from faults.freeze import FREEZE, ITS_HOSTS
from gameday.cluster import Node, Obj, Pod, Workload
from gameday.errors import ExperimentError, TargetError
from probes import reach
from sandbox.controllers.placement import node_matches, term_matches

CRDS = Path(__file__).parents[2].parent / "shared" / "chaos-mesh-crds"
FAULTS: tuple[Fault, ...] = (
    PodKill(lasting=20),
    ZonePartition(Zone("a"), lasting=25),
    ZoneOutage(Zone("a"), lasting=25),
    ZoneOutage(Zone("a"), lasting=25, replacements="elsewhere"),
    Xid(79, lasting=30),
    Xid(13, lasting=20),
    PodStop(lasting=20),
    PodHang(lasting=30),
    ZombieEngine(lasting=30),
    NodeCrash(lasting=30),
    NodeDrain(lasting=30),
    RollingUpdate(lasting=30),
    RollingUpdate(lasting=30, image="engine:bad"),
)


def pod(name: str, zone: str, *, engine: bool = True, ready: bool = True) -> Pod:
    return Pod(
        name=name,
        namespace="llm",
        uid=f"uid-{name}",
        node=f"node-{zone}-1",
        zone=zone,
        ip="10.244.0.9",
        phase="Running",
        ready=ready,
        terminating=False,
        labels={"app": "engine" if engine else "gateway"},
        gpus=1 if engine else 0,
        host_network=False,
        ports=(8000,),
        restarts=0,
        owner="ReplicaSet/engine-5d4f" if engine else "ReplicaSet/gateway-77aa",
        container="engine",
        waiting="",
    )


def view(pods: tuple[Pod, ...] | None = None) -> View:
    found = pods or tuple(
        pod(f"{kind}-{zone}{number}", zone, engine=kind == "engine")
        for zone in "abc"
        for kind, count in (("engine", 2), ("gateway", 1))
        for number in range(count)
    )
    return View(
        namespace="llm",
        selector="app=engine",
        engines=tuple(one for one in found if one.labels["app"] == "engine"),
        pods=found,
        nodes=tuple(Node(f"node-{zone}-1", f"uid-{zone}", zone, True, False, 2) for zone in "abc"),
        token="abc123",
        probers=tuple((f"gd-abc123-prober-{zone}", zone) for zone in "abc"),
        labels={"app.kubernetes.io/managed-by": "gameday", "gameday.dev/run": "r1"},
        seed=7,
        max_share=0.5,
        expendable=False,
        allow_node_replacement=False,
        sandbox=True,
        workloads=(
            Workload("engine", "llm", "uid-engine", 6, 1, {"engine": "engine:v1"}),
            Workload("gateway", "llm", "uid-gateway", 3, 1, {"gateway": "gateway:v1"}),
        ),
        model="m",
    )


def placed(spec: Obj) -> list[str]:
    """The nodes that a scheduler would take for a pod, where labels call every node by another name."""
    names = [f"node-{zone}-1" for zone in "abc"]
    nodes = [{"metadata": {"name": name, "labels": {"kubernetes.io/hostname": f"host-{name}"}}} for name in names]
    return [node["metadata"]["name"] for node in nodes if node_matches(spec, node)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{type(fault).__name__}")
def test_what_is_pinned_to_a_node_finds_it_whatever_its_hostname_label_says(fault: Fault) -> None:
    """On many clouds the label is not the node's name: a Job pinned by it waited for ever."""
    plan = fault.plan(view())
    for act in plan.acts:
        if isinstance(act, Job):
            assert placed(act.manifest["spec"]["template"]["spec"]) == list(plan.facts.nodes)


def test_probers_avoid_nodes_that_may_vanish_by_their_names() -> None:
    made = reach.prober("llm", "p", {}, "image", 60, avoid=("node-a-1", "node-c-1"))
    (wish,) = made["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    labels = {"kubernetes.io/hostname": "another"}
    liked = [
        n for n in "abc" if term_matches(wish["preference"], {"metadata": {"name": f"node-{n}-1", "labels": labels}})
    ]
    assert liked == ["b"]
    assert all(len(one["values"]) == 1 for one in wish["preference"]["matchFields"]), "Kubernetes takes one only"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{type(fault).__name__}")
def test_every_act_has_an_undo_and_every_object_an_end(fault: Fault) -> None:
    plan = fault.plan(view())
    undone = {(entry.kind, entry.name) for entry in plan.undos}
    for act in plan.acts:
        if isinstance(act, Apply):
            assert (act.kind.kind, act.manifest["metadata"]["name"]) in undone
            assert act.proof is not None, "a chaos resource without an independent proof"
            assert int(act.manifest["spec"]["duration"].rstrip("s")) > fault.lasting
            selector = act.manifest["spec"]["selector"]
            assert selector["namespaces"] == ["llm"] and selector["pods"]["llm"]
            assert selector["podPhaseSelectors"] == ["Running"]
        elif isinstance(act, Job):
            assert ("Job", act.manifest["metadata"]["name"]) in undone
            assert act.manifest["spec"]["activeDeadlineSeconds"] > 0
        elif isinstance(act, Cordon):
            assert set(act.nodes) == {(e.name, e.uid) for e in plan.undos if e.verb == "uncordon"}
        elif isinstance(act, Evict):
            assert act.proof is not None and act.within == fault.lasting
        elif isinstance(act, Roll):
            assert any(entry.verb == "template" and entry.uid == act.uid for entry in plan.undos)
        else:
            assert any(entry.verb == "allocatable" and entry.name == act.node for entry in plan.undos)
    for _, manifest in manifests(plan.acts):
        assert manifest["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "gameday"
        assert manifest["metadata"]["name"].startswith("gd-abc123-")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{type(fault).__name__}")
def test_the_same_seed_plans_the_same(fault: Fault) -> None:
    assert fault.plan(view()) == fault.plan(view())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{type(fault).__name__}")
def test_a_fault_survives_its_json(fault: Fault) -> None:
    assert faults.from_json(json.loads(json.dumps(faults.to_json(fault)))) == fault


@pytest.mark.skipif(not CRDS.is_dir(), reason="the real CRDs are not beside this checkout")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{type(fault).__name__}")
def test_manifests_are_valid_under_the_real_crds(fault: Fault) -> None:
    checked = 0
    for act in fault.plan(view()).acts:
        if isinstance(act, Apply):
            crd = yaml.safe_load((CRDS / f"chaos-mesh.org_{act.kind.plural}.yaml").read_text())
            schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
            jsonschema_rs.Draft4Validator(schema).validate(act.manifest)
            known = schema["properties"]["spec"]["properties"]
            assert set(act.manifest["spec"]) <= set(known), "a field that Chaos Mesh would drop in silence"
            checked += 1
    assert checked or not fault.plan(view()).needs


def test_zone_outage_undoes_in_the_order_that_works() -> None:
    """Pod-failure first (its containers must run), then the partition, which outlives it, then the cordon."""
    plan = ZoneOutage(Zone("a"), lasting=25).plan(view())
    assert [entry.what for entry in plan.undos] == ["pod-failure", "partition", "cordon"]
    assert plan.undos[0].running
    by_name = {act.what: act.manifest["spec"]["duration"] for act in plan.acts if isinstance(act, Apply)}
    assert int(by_name["partition"][:-1]) > int(by_name["pod-failure"][:-1])


def test_zone_outage_elsewhere_cuts_before_it_kills_and_names_its_rebalancing() -> None:
    plan = ZoneOutage(Zone("a"), lasting=25, replacements="elsewhere").plan(view())
    assert [act.what for act in plan.acts] == ["cordon", "partition", "pod-kill"]
    assert plan.rebalance == ("engine", "gateway")
    kill = plan.acts[2]
    assert isinstance(kill, Apply) and kill.manifest["spec"]["gracePeriod"] == 0
    assert isinstance(kill.proof, Dead) and kill.proof.zone == "a"


def test_zone_outage_never_uncordons_what_others_cordoned() -> None:
    before = view()
    cordoned = tuple(replace(node, unschedulable=node.zone == "a") for node in before.nodes)
    plan = ZoneOutage(Zone("a"), lasting=25).plan(replace(before, nodes=cordoned))
    assert not any(entry.verb == "uncordon" for entry in plan.undos)


def test_a_cut_includes_our_probers_on_both_sides() -> None:
    (act,) = ZonePartition(Zone("a"), lasting=25).plan(view()).acts
    assert isinstance(act, Apply) and isinstance(act.proof, Cut)
    assert "gd-abc123-prober-a" in act.manifest["spec"]["selector"]["pods"]["llm"]
    assert "gd-abc123-prober-b" in act.manifest["spec"]["target"]["selector"]["pods"]["llm"]
    assert act.records == 9 + 3


def test_xid_79_signals_first_and_takes_the_gpus_out_of_allocatable() -> None:
    plan = Xid(79, lasting=30).plan(view())
    hit = plan.facts.pods[0].removeprefix("llm/")
    assert [act.what for act in plan.acts[:3]] == ["signal", "allocatable", f"container-kill-{hit}"]
    assert plan.acts[-1].what == "pod-failure" and plan.undos[0].what == "pod-failure"
    signal = plan.acts[0]
    assert isinstance(signal, Job) and isinstance(signal.proof, Detected)
    node = plan.facts.nodes[0]
    spec = signal.manifest["spec"]["template"]["spec"]
    assert placed(spec) == [node]
    line = spec["containers"][0]["env"][0]["value"]
    assert (
        line == "kernel: NVRM: Xid (PCI:0000:05:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    )
    assert not plan.facts.one_shot


def test_xid_13_kills_one_container_and_leaves_the_node_alone() -> None:
    plan = Xid(13, lasting=20).plan(view())
    assert [act.what for act in plan.acts] == ["signal", f"container-kill-{plan.facts.pods[0].removeprefix('llm/')}"]
    assert plan.facts.one_shot and len(plan.facts.pods) == 1


def test_a_pod_that_is_asked_to_stop_gets_the_grace_of_its_own_spec() -> None:
    patient = tuple(replace(one, grace=90) for one in view().pods)
    (act,) = PodStop(lasting=20).plan(view(patient)).acts
    assert isinstance(act, Apply) and act.manifest["spec"]["gracePeriod"] == 90
    assert act.within > 90, "it may use all of it before nothing answers any more"


def test_what_freezes_processes_is_pinned_ends_by_itself_and_lets_go() -> None:
    plan = ZombieEngine(lasting=30).plan(view())
    (act,) = plan.acts
    assert isinstance(act, Job) and act.harms and act.until == "ready" and isinstance(act.proof, Mute)
    target = next(one for one in view().pods if one.key == plan.facts.pods[0])
    spec = act.manifest["spec"]
    pod_spec = spec["template"]["spec"]
    assert placed(pod_spec) == [target.node] and pod_spec["hostPID"] is True
    env = {one["name"]: one["value"] for one in pod_spec["containers"][0]["env"]}
    assert env["POD_UID"] == target.uid and "EngineCore" in env["PATTERN"]
    held = int(env["SECONDS_HELD"])
    assert 30 < held < spec["activeDeadlineSeconds"], "it lets go before its deadline, and outlives our heal"
    script = pod_spec["containers"][0]["command"][-1]
    assert "trap 'resume; exit 0' TERM" in script, "deleting the Job lets the processes go on"
    assert not plan.facts.one_shot


def test_a_node_crash_runs_once_on_its_node_and_hits_all_that_runs_there() -> None:
    plan = NodeCrash(lasting=30).plan(view())
    (act,) = plan.acts
    assert isinstance(act, Job) and act.harms
    spec = act.manifest["spec"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert placed(spec["template"]["spec"]) == [plan.facts.nodes[0]]
    on_node = {one.key for one in view().pods if one.node == plan.facts.nodes[0]}
    assert set(plan.facts.pods) == on_node and isinstance(act.proof, Dead) and set(act.proof.pods) == on_node
    assert plan.cluster_wide and plan.avoid == plan.facts.nodes
    container = spec["template"]["spec"]["containers"][0]
    assert container["volumeMounts"][0]["mountPath"] == "/sysrq-trigger", "never the container's own /proc"
    assert "/proc/sysrq-trigger" not in container["command"][-1]


def test_a_drain_cordons_first_leaves_daemons_and_harms_only_by_evicting() -> None:
    daemon = replace(pod("agent-a", "a", engine=False), owner="DaemonSet/agent")
    plan = NodeDrain(lasting=30, count=3).plan(replace(view((*view().pods, daemon)), max_share=1.0, expendable=True))
    cordon, evict = plan.acts
    assert isinstance(cordon, Cordon) and isinstance(evict, Evict)
    assert not harmful(cordon) and harmful(evict)
    assert "llm/agent-a" not in plan.facts.pods and len(evict.pods) == 9
    assert {entry.verb for entry in plan.undos} == {"uncordon"} and len(plan.undos) == 3


def test_a_drain_refuses_to_move_nobody() -> None:
    daemons = tuple(replace(one, owner="DaemonSet/engine") for one in view().pods)
    with pytest.raises(TargetError, match="would move nobody"):
        NodeDrain(lasting=30).plan(view(daemons))


def test_a_drain_refuses_pods_that_nothing_brings_back() -> None:
    bare = tuple(replace(one, owner="") for one in view().pods)
    with pytest.raises(TargetError, match="belong to no controller"):
        NodeDrain(lasting=30).plan(view(bare))
    with pytest.raises(TargetError, match="the fault wants 4"):
        NodeDrain(lasting=30, count=4).plan(view())


def test_a_rollout_changes_an_annotation_alone_or_the_image_too_and_takes_exactly_that_back() -> None:
    (act,) = RollingUpdate(lasting=30).plan(view()).acts
    assert isinstance(act, Roll) and act.template == {
        "metadata": {"annotations": {"gameday.dev/rolled-out-by": "abc123"}}
    }
    plan = RollingUpdate(lasting=30, image="engine:bad").plan(view())
    (act,), (entry,) = plan.acts, plan.undos
    assert isinstance(act, Roll)
    assert act.template["spec"] == {"containers": [{"name": "engine", "image": "engine:bad"}]}
    assert json.loads(entry.value) == {
        "token": "abc123", "container": "engine", "image": "engine:bad", "was": "engine:v1"
    }  # fmt: skip
    assert plan.settles == ("engine",) and len(plan.facts.pods) == 6


def test_a_strategy_that_takes_too_many_pods_at_once_is_refused() -> None:
    greedy = (Workload("engine", "llm", "uid-engine", 6, 6, {"engine": "engine:v1"}),)
    with pytest.raises(TargetError, match="by its strategy"):
        RollingUpdate(lasting=30).plan(replace(view(), workloads=greedy))
    with pytest.raises(TargetError, match="nothing to roll out"):
        RollingUpdate(lasting=30).plan(replace(view(), workloads=()))


@pytest.mark.parametrize("bad", [lambda: ZombieEngine(30, process="("), lambda: ZombieEngine(30, process="")])
def test_a_process_pattern_that_cannot_match_is_refused(bad: Callable[[], object]) -> None:
    with pytest.raises(ExperimentError):
        bad()


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


def test_the_last_healthy_zone_is_refused() -> None:
    only_a = tuple(pod(f"engine-a{number}", "a") for number in range(2))
    other = pod("gateway-b0", "b", engine=False)
    wide = replace(view((*only_a, other)), max_share=1.0)
    with pytest.raises(TargetError, match="no healthy zone"):
        ZoneOutage(Zone("a"), lasting=25).plan(wide)
    assert ZoneOutage(Zone("a"), lasting=25).plan(replace(wide, expendable=True)).facts.zone == "a"


def test_more_than_the_allowed_share_is_refused() -> None:
    with pytest.raises(TargetError, match="more than the allowed 50%"):
        PodKill(lasting=20, count=4).plan(view())


def test_a_fault_that_selects_nothing_is_an_error() -> None:
    nobody = replace(view(), engines=())
    with pytest.raises(TargetError):
        PodKill(lasting=20).plan(nobody)
    with pytest.raises(TargetError, match="would show nothing"):
        ZonePartition(Zone("a"), lasting=20).plan(nobody)


def test_an_unknown_zone_names_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"'z'; the zones are: a, b, c"):
        ZonePartition(Zone("z"), lasting=20).plan(view())


def test_node_replacing_faults_are_refused_on_real_clusters() -> None:
    real = replace(view(), sandbox=False)
    with pytest.raises(TargetError, match="--allow-node-replacement"):
        Xid(79, lasting=30).plan(real)
    with pytest.raises(TargetError, match="--allow-node-replacement"):
        NodeCrash(lasting=30).plan(real)
    assert NodeCrash(lasting=30).plan(replace(real, allow_node_replacement=True))
    assert Xid(13, lasting=30).plan(real)
    assert Xid(79, lasting=30).plan(replace(real, allow_node_replacement=True))


@pytest.mark.parametrize("code", [109, 5])
def test_xids_that_cannot_be_made_are_refused(code: int) -> None:
    with pytest.raises(ExperimentError):
        Xid(code, lasting=30)


def test_unknown_faults_and_fields_are_refused() -> None:
    with pytest.raises(ExperimentError, match="There is no fault"):
        faults.from_json({"type": "Meteor"})
    with pytest.raises(ExperimentError, match="lasting"):
        faults.from_json({"type": "PodKill", "lasting": "soon"})


# ── the control proof ───────────────────────────────────────────────────────────────────────────


def chaos(phases: list[str], desired: str = "Run", selected: str = "True") -> dict[str, object]:
    records = [{"id": f"llm/p{number}", "phase": phase} for number, phase in enumerate(phases)]
    return {
        "status": {
            "conditions": [{"type": "Selected", "status": selected}, {"type": "AllRecovered", "status": "True"}],
            "experiment": {"desiredPhase": desired, "containerRecords": records},
        }
    }


def test_injected_needs_every_record_and_the_expected_count() -> None:
    assert injected(chaos(["Injected", "Injected"]), 2)
    assert not injected(chaos(["Injected", "Not Injected"]), 2)
    assert not injected(chaos([]), 2)
    assert not injected(chaos(["Injected"], desired="Stop"), 1)
    with pytest.raises(NotInjected, match="1 targets were selected, not 2"):
        injected(chaos(["Injected"]), 2)


def test_a_selector_that_selected_nothing_is_told_from_one_that_has_not_looked_yet() -> None:
    assert selected_nothing(chaos([], selected="False"))
    assert not selected_nothing(chaos([], selected="True"))
    assert not selected_nothing(chaos(["Not Injected"], selected="False")), "conditions lag the records"
    assert not injected(chaos([], selected="False"), 1)


@pytest.mark.parametrize(
    ("line", "its"),
    [
        # what a container sees: ext4, /var/lib/kubelet on a disk of its own, the sandbox
        ("1010 998 259:1 /var/lib/kubelet/pods/UID/etc-hosts /etc/hosts rw,relatime - ext4 /dev/root rw", True),
        ("1010 998 259:1 /pods/UID/etc-hosts /etc/hosts rw,relatime - xfs /dev/nvme1n1 rw", True),
        ("75 60 0:31 /run/gd/nodes/node-a-1/pods/UID/hosts /etc/hosts rw - tmpfs tmpfs rw", True),
        # what every process of the host sees of that pod, and what other pods see
        (
            "410 29 0:88 / /var/lib/kubelet/pods/UID/volumes/kubernetes.io~projected/kube-api-access rw - tmpfs x rw",
            False,
        ),
        ("411 29 259:1 / /host/var/lib/kubelet/pods/UID/volumes/x rw - ext4 /dev/root rw", False),
        ("1010 998 259:1 /var/lib/kubelet/pods/OTHER/etc-hosts /etc/hosts rw,relatime - ext4 /dev/root rw", False),
        ("1011 998 259:1 /var/lib/kubelet/pods/UID/volumes/x /data rw,relatime - ext4 /dev/root rw", False),
    ],
)
def test_only_a_pods_own_processes_are_stopped_never_the_hosts(line: str, its: bool) -> None:
    """The host's kubelet and runtime see every pod's volumes too: stopping them would stop the node."""
    pattern = ITS_HOSTS.replace("$POD_UID", "UID")
    found = subprocess.run(["grep", "-Eq", pattern], input=line, text=True, check=False)
    assert (found.returncode == 0) is its
    assert ITS_HOSTS in FREEZE and '!= "$host"' in FREEZE


def test_jobs_run_the_image_that_settings_name() -> None:
    """Clusters without a way to the public registries have images of their own."""
    own = replace(view(), job_image="registry.example.com/tools:1")
    for fault in (PodHang(lasting=30), Xid(79, lasting=30)):
        jobs = [act.manifest for act in fault.plan(own).acts if isinstance(act, Job)]
        assert jobs, fault
        for job in jobs:
            (container,) = job["spec"]["template"]["spec"]["containers"]
            assert container["image"] == "registry.example.com/tools:1"


# ── what real namespaces hold ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fault", [PodKill(lasting=20), PodStop(lasting=20), ZoneOutage(Zone("a"), lasting=25, replacements="elsewhere")]
)
def test_nothing_is_deleted_that_no_controller_brings_back(fault: Fault) -> None:
    """Somebody's notebook in the lost zone was killed for good."""
    bare = tuple(replace(one, owner="") for one in view().pods)
    with pytest.raises(TargetError, match="belong to no controller"):
        fault.plan(view(bare))
    ZoneOutage(Zone("a"), lasting=25).plan(view(bare))  # fails in place, and nothing is deleted


def test_only_deployments_that_are_there_are_rebalanced() -> None:
    """A ReplicaSet of an Argo Rollout has a name like a Deployment's, which was then patched and not found."""
    outage = ZoneOutage(Zone("a"), lasting=25, replacements="elsewhere")
    assert "engine" in outage.plan(view()).rebalance
    assert outage.plan(replace(view(), workloads=())).rebalance == ()


def test_a_pod_failure_has_time_for_the_grace_of_its_pods() -> None:
    patient = tuple(replace(one, grace=120) for one in view().pods)
    (failure,) = [
        act for act in ZoneOutage(Zone("a"), lasting=300).plan(view(patient)).acts if act.what == "pod-failure"
    ]
    assert isinstance(failure, Apply) and failure.within > 120
    (failure,) = [act for act in Xid(79, lasting=300).plan(view(patient)).acts if act.what == "pod-failure"]
    assert isinstance(failure, Apply) and failure.within > 120


def test_nobody_waits_for_a_pod_failure_that_is_over() -> None:
    endless = tuple(replace(one, grace=3600) for one in view().pods)
    (failure,) = [
        act for act in ZoneOutage(Zone("a"), lasting=90).plan(view(endless)).acts if act.what == "pod-failure"
    ]
    assert isinstance(failure, Apply) and failure.within == 90


def test_a_partition_of_many_pods_has_time_for_each_of_its_records() -> None:
    crowd = (*view().pods, *(pod(f"worker-{n}", "b", engine=False) for n in range(100)))
    (cut,) = [act for act in ZonePartition(Zone("a"), lasting=60).plan(view(crowd)).acts if isinstance(act, Apply)]
    assert cut.within >= 30
