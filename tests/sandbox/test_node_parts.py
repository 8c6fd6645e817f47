"""The parts of a node and of the sandbox's edges, each by itself."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from sandbox import deploy, prometheus
from sandbox.discovery import targets
from sandbox.node import images, kernel_log, logs, probes
from sandbox.node.container import BackOff
from sandbox.node.events import Recorder
from sandbox.node.images import Image
from sandbox.node.status import ContainerView, PodView, go_duration, phase, qos_class, report, same
from sandbox.node.volumes import NotReady, Place, expand, field_value, resource_value
from sandbox.options import COMPRESSED, REAL, Options
from sandbox.relay import Address, Relay, ready_addresses
from sandbox.up import dump, load

# — status —


def view(*states: dict[str, object], **changes: object) -> PodView:
    containers = [ContainerView(f"c{n}", "image", state) for n, state in enumerate(states)]
    return PodView(containers, [], "2026-01-01T00:00:00Z", "10.245.0.2", sandbox=True, **changes)  # type: ignore[arg-type]


RUNNING: dict[str, object] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
WAITING: dict[str, object] = {"waiting": {"reason": "ContainerCreating"}}


def ended(code: int) -> dict[str, object]:
    return {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}


@pytest.mark.parametrize(
    ("states", "policy", "expected"),
    [
        ([WAITING], "Always", "Pending"),
        ([RUNNING], "Always", "Running"),
        ([RUNNING, WAITING], "Always", "Pending"),
        ([RUNNING, ended(1)], "Never", "Running"),
        ([ended(0), ended(0)], "Never", "Succeeded"),
        ([ended(0), ended(3)], "Never", "Failed"),
        ([ended(3)], "OnFailure", "Running"),
        ([ended(0)], "OnFailure", "Succeeded"),
        ([ended(137)], "Always", "Running"),
    ],
)
def test_phases(states: list[dict[str, object]], policy: str, expected: str) -> None:
    assert phase(view(*states), policy) == expected


def test_a_pod_that_was_stopped_is_succeeded_only_if_all_exited_0() -> None:
    assert phase(view(ended(0), over=True), "Always") == "Succeeded"
    assert phase(view(ended(0), ended(137), over=True), "Always") == "Failed"
    assert phase(view(WAITING, over=True), "Always") == "Failed"


def pod_object(**status: object) -> dict[str, object]:
    meta = {"name": "p", "namespace": "n", "uid": "u", "generation": 3}
    return {"metadata": meta, "spec": {"containers": [{"name": "c0", "image": "image"}]}, "status": status}


def test_a_transition_time_moves_only_with_its_condition() -> None:
    old = {"type": "Ready", "status": "False", "lastTransitionTime": "2020-01-01T00:00:00Z", "reason": "Other"}
    shown = view(RUNNING)
    first = report(pod_object(conditions=[old]), shown)
    ready = next(c for c in first["conditions"] if c["type"] == "Ready")
    assert ready["lastTransitionTime"] == "2020-01-01T00:00:00Z" and ready["reason"] == "ContainersNotReady"
    shown.containers[0].ready = True
    second = report(pod_object(conditions=[old]), shown)
    assert next(c for c in second["conditions"] if c["type"] == "Ready")["lastTransitionTime"] > "2020-01-01"


def test_readiness_gates_hold_ready_back_but_not_containers_ready() -> None:
    pod = pod_object()
    pod["spec"]["readinessGates"] = [{"conditionType": "example/gate"}]  # type: ignore[index]
    shown = view(RUNNING)
    shown.containers[0].ready = True
    found = {c["type"]: c for c in report(pod, shown)["conditions"]}
    assert found["ContainersReady"]["status"] == "True"
    assert (found["Ready"]["status"], found["Ready"]["reason"]) == ("False", "ReadinessGatesNotReady")


def test_what_the_api_shows_is_compared_without_empty_values() -> None:
    assert same({"a": 1, "b": {}, "c": [{"x": None}]}, {"a": 1, "c": [{}], "d": "theirs"})
    assert not same({"a": 1}, {"a": 2})
    assert not same({"a": None}, {"a": 1})


def test_durations_read_as_in_go() -> None:
    assert [go_duration(s) for s in (10, 40, 80, 160, 300)] == ["10s", "40s", "1m20s", "2m40s", "5m0s"]


def test_quality_of_service() -> None:
    equal = {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}}
    assert qos_class({"containers": [{"resources": equal}]}) == "Guaranteed"
    assert qos_class({"containers": [{"resources": {"requests": {"cpu": "1"}}}]}) == "Burstable"
    assert qos_class({"containers": [{"resources": {"limits": {"nvidia.com/gpu": "1"}}}]}) == "BestEffort"


# — back-off —


def test_back_off_doubles_to_its_most_and_is_kept_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("sandbox.node.container.time.monotonic", lambda: clock[0])
    back_off = BackOff(REAL.back_off_first, REAL.back_off_max)
    key, other = ("web", "a"), ("web", "b")
    delays = []
    for _ in range(7):
        since = clock[0]
        left, delay = back_off.remaining(key, since)
        delays.append(delay)
        clock[0] += max(0.0, left)
        back_off.next(key, since)
    assert delays == [0, 10, 20, 40, 80, 160, 300]
    assert back_off.remaining(other, clock[0]) == (0, 0)
    assert back_off.remaining(key, clock[0] + 601)[1] == 0, "forgotten after twice the most"


# — images —


def test_the_catalogue_is_sound_and_its_entry_points_exist() -> None:
    for name, image in images.load().items():
        assert (image.entrypoint is None) != (image.exec is None), name
        if image.entrypoint:
            module, _, function = image.entrypoint.partition(":")
            assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_a_pause_image_runs_only_as_it_is() -> None:
    pause = images.find({}, "gcr.io/google-containers/pause:latest")
    assert pause and pause.process([], [])[0] == "sandbox.node.images:pause"
    call, argv = pause.process(["/usr/bin/python3"], ["-c", "1"])
    assert call is None and not Path(argv[0]).exists()
    assert images.find({}, "example/unknown:v1") is None


def test_python_is_the_sandboxs_own() -> None:
    call, argv = Image("python:3.12-alpine", exec="python").process(["python3"], ["-c", "1"])
    assert call is None and os.access(argv[0], os.X_OK) and argv[1:] == ("-c", "1")


# — environment —


def test_references_are_expanded_as_kubernetes_does() -> None:
    assert expand("$(A)/$(B) $$(A) $A", {"A": "x"}) == "x/$(B) $(A) $A"


def test_the_downward_api_knows_labels_and_refuses_what_it_has_not() -> None:
    pod = {"metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"a/b": "c"}}, "spec": {}}
    assert field_value(pod, "metadata.labels['a/b']", None) == "c"
    assert field_value(pod, "status.podIP", "10.244.1.2") == "10.244.1.2"
    with pytest.raises(NotReady, match=r"unsupported fieldPath: spec\.nonsense"):
        field_value(pod, "spec.nonsense", None)


# — probes —


def worker(results: list[bool], kind: probes.ProbeKind, spec: dict[str, int]) -> tuple[probes.Worker, list[bool]]:
    told: list[bool] = []

    async def try_once() -> probes.Outcome:
        return probes.Outcome(results.pop(0))

    made = probes.Worker(
        kind,
        spec,
        subject=lambda: probes.Subject("id", 0.0),
        allowed=lambda: True,
        try_once=try_once,
        on_failure=lambda _: None,
        on_result=told.append,
    )
    return made, told


def test_thresholds_count_consecutive_results() -> None:
    made, told = worker([True, False, True, False, False, True], "readiness", {"failureThreshold": 2})

    async def all_of_them() -> None:
        for _ in range(6):
            await made._tick()

    asyncio.run(all_of_them())
    assert told == [True, False, True]


def test_a_liveness_failure_count_survives_a_crash() -> None:
    """facts/kubelet.md §2: the restarted container was killed by its first failed liveness probe."""
    made, told = worker([False, False, False], "liveness", {"failureThreshold": 3})

    async def crash_between() -> None:
        await made._tick()
        await made._tick()
        made.reset()
        await made._tick()

    asyncio.run(crash_between())
    assert told == [False]


def test_a_startup_probe_that_never_passes_is_told_of() -> None:
    made, told = worker([False, False], "startup", {"failureThreshold": 2})

    async def twice() -> None:
        await made._tick()
        await made._tick()

    asyncio.run(twice())
    assert told == [False]


def test_an_http_probe_says_what_kubelet_says() -> None:
    async def scenario() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/slow" in head:
                await reader.read()  # until the probe gives up
            elif b"/empty" not in head:
                code = b"302 Found" if b"/moved" in head else b"503 Unavailable" if b"/bad" in head else b"200 OK"
                writer.write(b"HTTP/1.1 " + code + b"\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        container = {"ports": [{"name": "web", "containerPort": port}]}

        async def get(path: str, port: int | str = "web") -> probes.Outcome:
            return await probes.http_get({"path": path, "port": port}, container, "127.0.0.1", 0.2, probe=True)

        async with server:
            assert (await get("/")).ok and (await get("/moved")).ok
            assert (await get("/bad")).message == "HTTP probe failed with statuscode: 503"
            assert "Client.Timeout exceeded while awaiting headers" in (await get("/slow")).message
            assert (await get("/empty")).message.endswith(": EOF")
            assert "no port named 'other'" in (await get("/", "other")).message
        assert (await get("/")).message.endswith(f"dial tcp 127.0.0.1:{port}: connect: connection refused")

    asyncio.run(scenario())


# — logs —


def test_a_log_is_read_from_its_tail_and_since(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join(f"2026-01-01T00:00:0{n}.000000Z line {n}\n" for n in range(5)))

    async def read(**query: str) -> str:
        source = logs.Source(file, None)
        return b"".join([piece async for piece in logs.read(source, logs.Wanted.parse(query))]).decode()

    async def scenario() -> None:
        assert await read(tailLines="2") == "line 3\nline 4\n"
        assert await read(tailLines="0") == ""
        assert await read(sinceTime="2026-01-01T00:00:03Z") == "line 3\nline 4\n"
        assert await read(limitBytes="9") == "line 0\nli"
        assert (await read(tailLines="1", timestamps="true")).startswith("2026-01-01T00:00:04")

    asyncio.run(scenario())
    with pytest.raises(ValueError, match="tailLines must be a whole number"):
        logs.Wanted.parse({"tailLines": "-1"})


def test_kernel_lines_look_like_syslogs() -> None:
    text = kernel_log.line("node-a-1", "<3>NVRM: Xid (PCI:0000:05:00): 79, GPU has fallen off the bus.")
    assert " node-a-1 kernel: [" in text and "] NVRM: Xid" in text and "<3>" not in text


def test_only_two_paths_of_a_host_exist(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.host_path("/dev/kmsg") == tmp_path / "kmsg"
    assert place.host_path("/var/log") == tmp_path / "var" / "log"
    assert place.host_path("/etc") is None and place.host_path("/var/logs") is None


# — relay —


def sockets() -> int:
    links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(str(link).startswith("socket:") for link in links)


@pytest.mark.parametrize("source", ["", "127.0.0.7"])
def test_a_relay_takes_turns_and_skips_what_is_down(source: str) -> None:
    async def scenario() -> None:
        served: list[str] = []
        seen: set[str] = set()

        async def backend(name: str) -> asyncio.Server:
            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                served.append(name)
                seen.add(writer.get_extra_info("peername")[0])
                writer.write((await reader.readline()).upper())
                writer.write(await reader.read())  # until the client has shut its side down
                writer.close()

            return await asyncio.start_server(answer, "127.0.0.1", 0)

        one, two = await backend("one"), await backend("two")
        gone = await backend("gone")
        addresses: list[Address] = [server.sockets[0].getsockname() for server in (one, gone, two)]
        gone.close()
        own = socket.create_server(("127.0.0.1", 0))
        port = own.getsockname()[1]
        relay = asyncio.create_task(Relay(lambda: addresses, source).serve(own))
        await asyncio.sleep(0)
        before = sockets()
        try:
            for _ in range(6):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"hello\nrest")
                writer.write_eof()
                assert await reader.read() == b"HELLO\nrest"
                writer.close()
                await writer.wait_closed()
            async with asyncio.timeout(2):  # nothing of a finished connection stays open
                while sockets() > before:  # noqa: ASYNC110 – the kernel sends no event for it
                    await asyncio.sleep(0.01)
            assert set(served) == {"one", "two"} and seen == {source or "127.0.0.1"}
            addresses.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(ConnectionResetError):
                writer.write(b"x")
                if await reader.read() == b"":
                    raise ConnectionResetError
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        finally:
            relay.cancel()
            await asyncio.gather(relay, return_exceptions=True)
            own.close()
            for server in (one, two, gone):
                server.close()
                await server.wait_closed()

    asyncio.run(scenario())


def test_only_ready_endpoints_get_new_connections() -> None:
    def endpoint(address: str, ready: bool | None) -> dict[str, object]:
        return {"addresses": [address], "conditions": {"ready": ready, "serving": True}}

    slice_ = {"ports": [{"port": 8080}], "endpoints": [endpoint("a", True), endpoint("b", False), endpoint("c", None)]}
    assert ready_addresses(slice_) == [("a", 8080), ("c", 8080)]
    assert ready_addresses({"endpoints": None, "ports": None}) == []


# — Prometheus —


def test_discovery_gives_kubernetes_labels() -> None:
    pod = {
        "metadata": {
            "name": "p",
            "namespace": "llm",
            "uid": "u",
            "labels": {"app": "x", "topology.kubernetes.io/zone": "a"},
            "annotations": {"prometheus.io/scrape": "true"},
            "ownerReferences": [{"kind": "ReplicaSet", "name": "rs", "controller": True}],
        },
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 8000}]}]},
        "status": {"podIP": "10.244.1.2", "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    }
    node = {"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}}}
    (group,) = targets(pod, node)
    labels = group["labels"]
    assert group["targets"] == ["10.244.1.2:8000"]
    assert labels["__meta_kubernetes_pod_annotation_prometheus_io_scrape"] == "true"
    assert labels["__meta_kubernetes_pod_label_topology_kubernetes_io_zone"] == "a"
    assert labels["__meta_kubernetes_node_label_topology_kubernetes_io_zone"] == "a"
    assert labels["__meta_kubernetes_pod_controller_kind"] == "ReplicaSet"
    assert labels["__meta_kubernetes_pod_ready"] == "true"
    assert targets({**pod, "status": {}}, node) == []


def test_prometheus_scrapes_at_the_clocks_interval() -> None:
    assert "scrape_interval: 1000ms" in prometheus.config(COMPRESSED)
    assert "scrape_interval: 15000ms" in prometheus.config(REAL)


# — manifests and options —


@pytest.mark.parametrize("stack", ["reference", "fragile", "careless"])
def test_every_object_of_a_stack_can_be_deployed(stack: str) -> None:
    documents = list(deploy.documents(stack))
    assert {d["kind"] for d in documents} >= {"Deployment", "Service", "DaemonSet", "Namespace"}
    known = images.load()
    for document in documents:
        assert document["kind"] in deploy.KINDS
        for container in document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
            assert container["image"] in known


def test_options_survive_the_way_to_the_supervisor() -> None:
    options = Options(zones=("x", "y"), clocks=REAL, stack="fragile", state_dir=Path("/somewhere"), parent=7)
    assert load(dump(options)) == options


class Written:
    """Takes events as an API does."""

    def __init__(self) -> None:
        self.created: list[dict[str, object]] = []
        self.counted = 0

    async def create(self, _: object, event: dict[str, object], __: str) -> dict[str, object]:
        self.created.append(event)
        return event

    async def patch(self, _: object, __: str, change: dict[str, object], ___: str) -> dict[str, object]:
        self.counted += 1
        return {**self.created[-1], **change}


def test_events_are_counted_up_and_a_chatty_object_is_throttled() -> None:
    """client-go's spam filter: 25 of one object, then one every 5 minutes (facts/kubelet.md §0)."""

    async def scenario() -> None:
        api = Written()
        recorder = Recorder(api, "n1")  # type: ignore[arg-type]  # as much of an API as it uses
        task = asyncio.create_task(recorder.run())
        about = {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "p", "namespace": "x", "uid": "u"}}
        other = {**about, "metadata": {"name": "q", "namespace": "x", "uid": "v"}}
        for _ in range(40):
            recorder.record(about, "Warning", "Unhealthy", "no")
        recorder.record(other, "Normal", "Started", "yes")
        async with asyncio.timeout(5):
            while len(api.created) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        assert [event["reason"] for event in api.created] == ["Unhealthy", "Started"]
        assert api.counted == 24, "25 in all, in one object"

    asyncio.run(scenario())


def test_resources_of_the_downward_api_are_numbers() -> None:
    """Regression: "4Gi" was handed down as it is written; programs read bytes."""
    container = {"resources": {"limits": {"memory": "4Gi", "cpu": "250m"}, "requests": {"memory": "1500k"}}}

    def value(resource: str, divisor: str = "0") -> str:
        return resource_value(container, {"resource": resource, "divisor": divisor})

    assert value("limits.memory") == str(4 * 2**30) and value("limits.memory", "1Mi") == "4096"
    assert value("limits.cpu") == "1" and value("limits.cpu", "1m") == "250"
    assert value("requests.memory", "1Mi") == "2", "rounded up"
    assert value("limits.ephemeral-storage", "1Gi") == "100", "the machine's, where there is no limit"
    assert value("requests.cpu") == "0"
