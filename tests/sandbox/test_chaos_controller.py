"""The life of experiments, against a real API server; the tests play kubelet."""

from __future__ import annotations

import time
from pathlib import Path

import jsonschema_rs
import pytest
import yaml
from chaos_world import NS, World, chosen, condition_of, desired_phase, manifest, play, records

from sandbox.chaos.controller import crds
from sandbox.client import NETWORKCHAOS, PODCHAOS, PODS, STRESSCHAOS, ApiError, Kind, Obj

PAUSE = "gcr.io/google-containers/pause:latest"
REAL_CRDS = Path(__file__).parents[3] / "shared" / "chaos-mesh-crds"
PAUSED = {"metadata": {"annotations": {"experiment.chaos-mesh.org/pause": "true"}}}
RESUMED = {"metadata": {"annotations": {"experiment.chaos-mesh.org/pause": None}}}


def images(pod: Obj) -> list[str]:
    return [entry["image"] for part in ("containers", "initContainers") for entry in pod["spec"][part]]


OWN = ["app:1", "side:1", "init:1"]


async def present(one: World) -> set[str]:
    return {pod["metadata"]["name"] for pod in (await one.api.list(PODS, NS))[0]}


def test_pod_kill_deletes_at_once_and_says_so() -> None:
    async def test(one: World) -> None:
        for name in ("a", "b"):
            await one.pod(name)
        start = time.process_time()
        await one.pod_chaos("kill", "pod-kill", "a")
        found = await one.injected(PODCHAOS, "kill")
        assert time.process_time() - start <= 0.3
        assert await present(one) == {"b"}, "grace 0: the object is gone without a kubelet"
        (record,) = records(found)
        assert (record["id"], record["selectorKey"]) == (f"{NS}/a", ".")
        assert (record["injectedCount"], record["recoveredCount"]) == (1, 0)
        assert [(event["type"], event["operation"]) for event in record["events"]] == [("Succeeded", "Apply")]
        assert found["metadata"]["finalizers"] == ["chaos-mesh/records"]
        assert condition_of(found, "Selected") == "True"
        assert condition_of(found, "AllRecovered") == "False"
        await one.told("kill", "Successfully apply chaos for default/a")
        await one.delete(PODCHAOS, "kill")

    play(test)


def test_pod_kill_with_grace_lets_the_kubelet_end_it() -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        await one.pod_chaos("kill", "pod-kill", "a", gracePeriod=7)
        await one.injected(PODCHAOS, "kill")
        pod = await one.api.get(PODS, "a", NS)
        assert pod["metadata"]["deletionGracePeriodSeconds"] == 7

    play(test)


def test_pod_kill_paused_never_stops_nor_kills_again() -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        await one.pod_chaos("kill", "pod-kill", "a", duration="1s")
        await one.injected(PODCHAOS, "kill")
        await one.pod("a")
        await one.api.patch(PODCHAOS, "kill", PAUSED, NS)

        async def seen() -> bool:
            return condition_of(await one.api.get(PODCHAOS, "kill", NS), "Paused") == "True"

        await one.until("the pause is seen", seen)
        await one.api.patch(PODCHAOS, "kill", RESUMED, NS)
        await one.injected(PODCHAOS, "kill")
        found = await one.api.get(PODCHAOS, "kill", NS)
        assert desired_phase(found) == "Run"
        assert records(found)[0]["injectedCount"] == 1
        assert await present(one) == {"a"}

    play(test)


def test_pod_failure_pauses_resumes_and_restores() -> None:
    async def test(one: World) -> None:
        before = await one.pod("a")
        await one.pod_chaos("fail", "pod-failure", "a")
        await one.injected(PODCHAOS, "fail")
        pod = await one.api.get(PODS, "a", NS)
        assert images(pod) == [PAUSE] * 3
        assert pod["metadata"]["annotations"]["chaos-mesh-fail-pod-failure-main-normal-image"] == "app:1"
        assert pod["metadata"]["annotations"]["chaos-mesh-fail-pod-failure-prepare-init-image"] == "init:1"
        await one.api.patch(PODCHAOS, "fail", PAUSED, NS)
        found = await one.recovered(PODCHAOS, "fail")
        assert records(found)[0]["recoveredCount"] == 1
        assert images(await one.api.get(PODS, "a", NS)) == OWN
        await one.api.patch(PODCHAOS, "fail", RESUMED, NS)
        found = await one.injected(PODCHAOS, "fail")
        assert records(found)[0]["injectedCount"] == 2
        assert images(await one.api.get(PODS, "a", NS)) == [PAUSE] * 3
        await one.delete(PODCHAOS, "fail")
        after = await one.api.get(PODS, "a", NS)
        assert images(after) == OWN
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        assert not after["metadata"].get("annotations")

    play(test)


def test_second_pod_failure_saves_pause_as_the_original() -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        for name in ("first", "second"):
            await one.pod_chaos(name, "pod-failure", "a")
            await one.injected(PODCHAOS, name)
        await one.delete(PODCHAOS, "first")
        assert images(await one.api.get(PODS, "a", NS)) == OWN
        await one.delete(PODCHAOS, "second")
        assert images(await one.api.get(PODS, "a", NS)) == [PAUSE] * 3

    play(test)


def test_duration_counts_from_the_creation_and_recovers() -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        await one.pod_chaos("fail", "pod-failure", "a", duration="2s")
        await one.injected(PODCHAOS, "fail")
        await one.recovered(PODCHAOS, "fail")
        assert images(await one.api.get(PODS, "a", NS)) == OWN
        await one.told("fail", "Time up according to the duration")
        await one.delete(PODCHAOS, "fail")

    play(test)


def test_container_kill_tells_the_agent_once_with_all_containers() -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        await one.pod_chaos("kill", "container-kill", "a", containerNames=["main", "side"])
        found = await one.injected(PODCHAOS, "kill")
        assert [record["id"] for record in records(found)] == [f"{NS}/a/main", f"{NS}/a/side"]
        annotations = (await one.api.get(PODS, "a", NS))["metadata"]["annotations"]
        assert annotations["sandbox.gameday.dev/kill-containers"] == f"{found['metadata']['uid']}:main,side"

    play(test)


def test_container_kill_of_a_dead_container_fails_until_it_runs() -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        status: Obj = {
            "containerStatuses": [
                {
                    "name": "main",
                    "image": "",
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                }
            ]
        }
        await one.api.patch(PODS, "a", {"status": status}, NS, sub="status")
        await one.pod_chaos("kill", "container-kill", "a", containerNames=["main"])
        await one.noted(PODCHAOS, "kill", "is not running")
        status["containerStatuses"][0]["state"] = {"waiting": None, "running": {"startedAt": "2026-01-01T00:00:00Z"}}
        await one.api.patch(PODS, "a", {"status": status}, NS, sub="status")
        await one.injected(PODCHAOS, "kill")

    play(test)


def test_nothing_selected_is_terminal() -> None:
    async def test(one: World) -> None:
        await one.pod_chaos("kill", "pod-kill", "a")
        await one.told("kill", "Failed to select targets: no pod is selected")
        await one.pod("a")
        await one.api.patch(PODCHAOS, "kill", {"metadata": {"annotations": {"touched": "yes"}}}, NS)
        await one.pod_chaos("later", "pod-failure", "a")
        await one.injected(PODCHAOS, "later")
        found = await one.api.get(PODCHAOS, "kill", NS)
        assert condition_of(found, "Selected") == "False"
        assert condition_of(found, "AllInjected") == "False"
        assert records(found) == []
        assert await present(one) == {"a"}
        await one.delete(PODCHAOS, "kill")

    play(test)


def test_target_that_selects_nothing_leaves_the_source_alone() -> None:
    async def test(one: World) -> None:
        await one.pod("a", ip="10.9.0.2")
        await one.partition("cut", "a", "nobody", "both")
        await one.told("cut", "Failed to select targets")
        assert records(await one.api.get(NETWORKCHAOS, "cut", NS)) == []

    play(test)


def test_pod_that_is_gone_counts_as_recovered() -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        await one.pod_chaos("fail", "pod-failure", "a")
        await one.injected(PODCHAOS, "fail")
        await one.api.delete(PODS, "a", NS, grace=0)
        await one.delete(PODCHAOS, "fail")

    play(test)


def test_changed_spec_is_put_back_with_an_event() -> None:
    async def test(one: World) -> None:
        for name in ("a", "b"):
            await one.pod(name)
        made = await one.pod_chaos("fail", "pod-failure", "a")
        await one.injected(PODCHAOS, "fail")
        await one.api.patch(PODCHAOS, "fail", {"spec": {"selector": chosen("b"), "value": "2"}}, NS)
        await one.told("fail", "Cannot update chaos spec")

        async def back() -> bool:
            same: bool = (await one.api.get(PODCHAOS, "fail", NS))["spec"] == made["spec"]
            return same

        await one.until("the spec is back", back)
        assert images(await one.api.get(PODS, "b", NS)) == OWN

    play(test)


def test_failures_are_retried_with_back_off() -> None:
    """Regression: the watch event of its own failure must not start the next try at once."""

    async def test(one: World) -> None:
        await one.pod("a")
        await one.chaos(
            STRESSCHAOS, "stress", {"mode": "all", "selector": chosen("a"), "stressors": {"cpu": {"workers": 1}}}
        )
        start = time.monotonic()

        async def four() -> Obj | None:
            obj = await one.api.get(STRESSCHAOS, "stress", NS)
            return obj if any(len(record.get("events", ())) >= 4 for record in records(obj)) else None

        found = await one.until("four failures", four)
        assert time.monotonic() - start >= 0.3, "the first passes follow their own changes, then 0.4 s of back-off"
        assert {event["message"] for event in records(found)[0]["events"]} == {"pod a is on no node yet"}
        assert records(found)[0]["phase"] == "Not Injected"
        assert desired_phase(found) == "Run"
        assert condition_of(found, "AllInjected") == "False"
        await one.told("stress", "Failed to apply chaos: pod a is on no node yet")
        await one.delete(STRESSCHAOS, "stress")

    play(test)


OTHERS = [
    ("IOChaos", {"action": "latency", "volumePath": "/data"}),
    ("DNSChaos", {"action": "error"}),
    ("HTTPChaos", {"target": "Request", "port": 80}),
    ("TimeChaos", {"timeOffset": "-5m"}),
    ("KernelChaos", {"failKernRequest": {"failtype": 0}}),
]


@pytest.mark.parametrize(("kind", "spec"), OTHERS)
def test_unsupported_kinds_say_so(kind: str, spec: Obj) -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        which = Kind("chaos-mesh.org", "v1alpha1", kind.lower(), kind)
        await one.chaos(which, "other", {**spec, "mode": "all", "selector": chosen("a")})
        await one.noted(which, "other", "the sandbox")
        await one.delete(which, "other")

    play(test)


@pytest.mark.parametrize(
    ("kind", "spec", "why"),
    [
        (PODCHAOS, {"action": "container-kill"}, "the name of container is required"),
        (PODCHAOS, {"action": "pod-failure", "duration": "soon"}, 'invalid duration "soon"'),
        (PODCHAOS, {"action": "pod-kill", "remoteCluster": "x"}, "no remote clusters"),
        (STRESSCHAOS, {}, "missing stressors"),
    ],
)
def test_what_the_webhook_would_refuse_selects_nothing(kind: Kind, spec: Obj, why: str) -> None:
    async def test(one: World) -> None:
        await one.pod("a")
        await one.chaos(kind, "bad", {**spec, "mode": "all", "selector": chosen("a")})
        await one.told("bad", why)
        assert records(await one.api.get(kind, "bad", NS)) == []

    play(test)


def test_controller_restart_neither_kills_twice_nor_forgets_to_recover() -> None:
    async def test(one: World) -> None:
        for name in ("a", "b"):
            await one.pod(name)
        await one.pod_chaos("kill", "pod-kill", "a")
        await one.pod_chaos("fail", "pod-failure", "b")
        await one.injected(PODCHAOS, "kill")
        await one.injected(PODCHAOS, "fail")
        await one.pod("a")
        await one.restart_controller()
        await one.delete(PODCHAOS, "fail")
        await one.delete(PODCHAOS, "kill")
        assert await present(one) == {"a", "b"}
        assert images(await one.api.get(PODS, "b", NS)) == OWN

    play(test)


def test_mode_one_strikes_one() -> None:
    async def test(one: World) -> None:
        for name in ("a", "b", "c"):
            await one.pod(name)
        await one.pod_chaos("kill", "pod-kill", "a", "b", "c", mode="one")
        await one.injected(PODCHAOS, "kill")
        assert len(await present(one)) == 2

    play(test)


BAD = [
    (PODCHAOS, {"action": "pod-explode", "mode": "one", "selector": {}}),
    (PODCHAOS, {"action": "pod-kill", "mode": "some", "selector": {}}),
    (PODCHAOS, {"action": "pod-kill", "mode": "one"}),
    (PODCHAOS, {"action": "pod-kill", "mode": "one", "selector": {}, "gracePeriod": -1}),
    (NETWORKCHAOS, {"action": "partition", "mode": "all", "selector": {}, "direction": "sideways"}),
    (NETWORKCHAOS, {"action": "partition", "mode": "all", "selector": {}, "target": {"selector": {}}}),
    (NETWORKCHAOS, {"action": "delay", "mode": "all", "selector": {}, "delay": {"latency": "1"}}),
    (NETWORKCHAOS, {"action": "loss", "mode": "all", "selector": {}, "loss": {"loss": 50}}),
    (STRESSCHAOS, {"mode": "one", "selector": {}, "stressors": {"cpu": {"load": 20}}}),
]
GOOD = [
    (PODCHAOS, {"action": "pod-kill", "mode": "one", "selector": chosen("a"), "gracePeriod": 0, "duration": "30s"}),
    (
        NETWORKCHAOS,
        {
            "action": "partition",
            "mode": "all",
            "selector": chosen("a"),
            "direction": "both",
            "target": {"mode": "all", "selector": {"pods": {"llm": ["x"]}}},
            "externalTargets": ["1.1.1.1"],
        },
    ),
    (STRESSCHAOS, {"mode": "one", "selector": chosen("a"), "stressors": {"memory": {"workers": 1, "size": "64MB"}}}),
    *(
        (Kind("chaos-mesh.org", "v1alpha1", kind.lower(), kind), {**spec, "mode": "all", "selector": chosen("a")})
        for kind, spec in OTHERS
    ),
]


@pytest.mark.parametrize(("kind", "spec"), BAD)
def test_definitions_refuse(kind: Kind, spec: Obj) -> None:
    async def test(one: World) -> None:
        with pytest.raises(ApiError) as refused:
            await one.chaos(kind, "bad", spec)
        assert refused.value.code == 422

    play(test)


def validator(crd: Obj) -> jsonschema_rs.Draft4Validator:
    return jsonschema_rs.Draft4Validator(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize(("kind", "spec"), [*GOOD, *BAD])
def test_definitions_judge_as_chaos_mesh_does(kind: Kind, spec: Obj) -> None:
    path = REAL_CRDS / f"chaos-mesh.org_{kind.plural}.yaml"
    if not path.exists():
        pytest.skip("Chaos Mesh's own definitions are not here")
    theirs = yaml.safe_load(path.read_text())
    ours = next(crd for crd in crds() if crd["metadata"]["name"] == f"{kind.plural}.chaos-mesh.org")
    assert ours["spec"]["names"] == theirs["spec"]["names"]
    obj = manifest(kind, "one", spec)
    assert validator(ours).is_valid(obj) == validator(theirs).is_valid(obj) == ((kind, spec) in GOOD)
    mine, real = ours["spec"]["versions"][0], theirs["spec"]["versions"][0]
    assert mine.get("additionalPrinterColumns") == real.get("additionalPrinterColumns")
    assert mine.get("subresources", {}) == real.get("subresources", {})
