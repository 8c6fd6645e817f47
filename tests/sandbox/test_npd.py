"""The detectors: kernel-log lines in, conditions, Events and gauges out."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import yaml
from aiohttp import web
from llm_world import ROOT, new_host, until

from sandbox.images import npd
from sandbox.images.dcgm import Exporter
from sandbox.images.kernlog import Tail, xid

# Samples from the field, facts/gpu-and-dr.md.
SAMPLES = [
    "NVRM: Xid (PCI:0000:05:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    "NVRM: Xid (PCI:0000:38:00): 13, pid='<unknown>', name=<unknown>, Graphics SM Warp Exception on (GPC 9, TPC 1, "
    "SM 1): Out Of Range Address",
    "NVRM: Xid (PCI:0000:38:00): 43, pid=2924364, name=pt_main_thread, Ch 00000008",
    "NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate.",
    "NVRM: Xid (PCI:0000:cb:00): 109, pid=1797828, name=pt_main_thread, Ch 00000008, errorString CTX SWITCH TIMEOUT, "
    "Info 0x58005",
    "NVRM: Xid (PCI:0000:9b:00): 119, pid=2024380, name=nvidia-smi, Timeout after 6s of waiting for RPC response from "
    "GPU4 GSP! Expected function 103 (GSP_RM_ALLOC) (0x2081 0x4).",
    "NVRM: Xid (PCI:0009:01:00): 154, GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)",
]


def shipped_rules(stack: str = "reference") -> bytes:
    path = ROOT / "sandbox" / "stack" / stack / "10-node-problem-detector.yaml"
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "ConfigMap":
            return str(document["data"]["kernel-monitor.json"]).encode()
    raise AssertionError(f"no rules in {path}")


@pytest.mark.parametrize(("line", "code"), list(zip(SAMPLES, [79, 13, 43, 63, 109, 119, 154], strict=True)))
def test_the_line_grammar_reads_every_field_sample(line: str, code: int) -> None:
    for prefix in ("", "kernel: ", "Nov 24 09:00:00 node-a-1 kernel: [  12.3] "):
        found = xid(prefix + line)
        assert found and found.code == code
    assert xid("NVRM: loading NVIDIA UNIX x86_64 Kernel Module") is None


@pytest.mark.parametrize(
    ("line", "condition", "event"),
    [
        (SAMPLES[0], "NvidiaXID79Error", "NvidiaXID79Error"),
        (SAMPLES[1], None, "NvidiaXID13Warning"),
        (SAMPLES[2], None, "NvidiaXID43Warning"),
        (SAMPLES[3], "NvidiaXID63Error", "NvidiaXID63Error"),
        (SAMPLES[4], "NvidiaXID109Error", "NvidiaXID109Error"),
        (SAMPLES[5], "NvidiaXID119Error", "NvidiaXID119Error"),
        (SAMPLES[6], None, "NvidiaXID154Warning"),
        ("Killed process 7 (python) total-vm:1kB, anon-rss:2kB, file-rss:3kB", None, "OOMKilling"),
        ("usb 1-1: new device", None, None),
    ],
)
def test_the_shipped_rules_tell_conditions_from_events(line: str, condition: str | None, event: str | None) -> None:
    monitor = npd.Monitor(npd.read_rules(shipped_rules()))
    problems = monitor.read("kernel: " + line)
    assert [problem.reason for problem in problems] == ([event] if event else [])
    state = monitor.conditions["AcceleratedHardwareReady"]
    assert (state.status, state.reason) == (
        ("False", condition) if condition else ("True", "AcceleratedHardwareIsReady")
    )


def test_the_same_fault_again_changes_nothing_and_another_keeps_the_time() -> None:
    monitor = npd.Monitor(npd.read_rules(shipped_rules()))
    assert monitor.read(SAMPLES[0])
    first = monitor.conditions["AcceleratedHardwareReady"]
    assert monitor.read(SAMPLES[0]) == []
    assert monitor.conditions["AcceleratedHardwareReady"] == first
    assert monitor.read(SAMPLES[5])
    second = monitor.conditions["AcceleratedHardwareReady"]
    assert (second.reason, second.since) == ("NvidiaXID119Error", first.since)


def test_a_pattern_must_reach_the_end_of_the_line() -> None:
    raw = {"source": "s", "logPath": "/x", "rules": [{"type": "temporary", "reason": "R", "pattern": "abc"}]}
    monitor = npd.Monitor(npd.read_rules(orjson.dumps(raw)))
    assert monitor.read("xx abc") and not monitor.read("abc xx")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (b"{", "not valid JSON"),
        (b'{"source":"s","logPath":"/x"}', "rules"),
        (
            b'{"source":"s","logPath":"/x","rules":[{"type":"now","reason":"R","pattern":"a"}]}',
            "temporary or permanent",
        ),
        (b'{"source":"s","logPath":"/x","rules":[{"type":"permanent","reason":"R","pattern":"a"}]}', "not declared"),
        (b'{"source":"s","logPath":"/x","rules":[{"type":"temporary","reason":"R","pattern":"("}]}', "regular expr"),
        (b'{"source":"s","logPath":"/x","lookback":"soon","rules":[]}', "duration"),
    ],
)
def test_bad_rules_are_refused_with_a_sentence(rules: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(npd.BadRules, match=words):
        npd.read_rules(rules)
    path = tmp_path / "rules.json"
    path.write_bytes(rules)
    assert npd.main(["--config.system-log-monitor", str(path), "--node", "n"]) == 1


def test_a_log_is_followed_over_creation_partial_lines_truncation_and_replacement(tmp_path: Path) -> None:
    path = tmp_path / "kern.log"
    tail = Tail(path, lookback=300)
    assert tail.new_lines() == []
    path.write_text("one\ntw")
    assert tail.new_lines() == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert tail.new_lines() == ["two", "three"]
    path.write_text("four\n")
    assert tail.new_lines() == ["four"]
    path.rename(tmp_path / "kern.log.1")
    path.write_text("a longer line in a new file\n")
    assert tail.new_lines() == ["a longer line in a new file"]
    assert Tail(path, lookback=300).new_lines() == ["a longer line in a new file"]
    assert Tail(path, lookback=-1).new_lines() == []  # too old


class _Api:
    """Takes node status patches and Events; answers 503 while `down`."""

    def __init__(self) -> None:
        self.down = False
        self.conditions: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.patches = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_patch("/api/v1/nodes/node-a-1/status", self._status)
        app.router.add_post("/api/v1/namespaces/default/events", self._create)
        app.router.add_patch("/api/v1/namespaces/default/events/{name}", self._count)
        return app

    async def _status(self, request: web.Request) -> web.Response:
        if self.down:
            raise web.HTTPServiceUnavailable
        assert request.content_type == "application/strategic-merge-patch+json"
        self.patches += 1
        for entry in (await request.json())["status"]["conditions"]:
            self.conditions[entry["type"]] = entry
        return web.json_response({})

    async def _create(self, request: web.Request) -> web.Response:
        event = await request.json()
        self.events[event["metadata"]["name"]] = event
        return web.json_response(event, status=201)

    async def _count(self, request: web.Request) -> web.Response:
        self.events[request.match_info["name"]] |= await request.json()
        return web.json_response({})


def test_the_process_reports_to_the_api_and_survives_its_absence(tmp_path: Path) -> None:
    log = tmp_path / "kern.log"
    rules = orjson.loads(shipped_rules()) | {"logPath": str(log)}
    (tmp_path / "rules.json").write_bytes(orjson.dumps(rules))
    (tmp_path / "token").write_text("pod-token")

    async def story() -> None:
        api, host = _Api(), new_host()
        runner = web.AppRunner(api.app())
        await runner.setup()
        await web.TCPSite(runner, host, 8001).start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sandbox.images.npd"),
            *("--config.system-log-monitor", str(tmp_path / "rules.json"), "--node", "node-a-1"),
            cwd=ROOT,
            env={"GAMEDAY_API_URL": f"http://{host}:8001", "GAMEDAY_ACCOUNT_DIR": str(tmp_path)},
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            await until(lambda: api.conditions.get("AcceleratedHardwareReady", {}).get("status") == "True")
            _append(log, SAMPLES[1], SAMPLES[1])
            await until(lambda: [event["count"] for event in api.events.values()] == [2])
            (event,) = api.events.values()
            assert event["reason"] == "NvidiaXID13Warning" and event["involvedObject"]["name"] == "node-a-1"
            api.down = True
            _append(log, SAMPLES[0])
            await asyncio.sleep(0.5)
            assert api.conditions["AcceleratedHardwareReady"]["status"] == "True"
            api.down = False
            await until(lambda: api.conditions["AcceleratedHardwareReady"]["reason"] == "NvidiaXID79Error")
            assert api.conditions["AcceleratedHardwareReady"]["status"] == "False"
            await until(lambda: any(event["reason"] == "NvidiaXID79Error" for event in api.events.values()))
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 5) == 0
            assert api.patches == 2
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await runner.cleanup()

    asyncio.run(story())


def _append(log: Path, *lines: str) -> None:
    with log.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def test_the_xid_gauge_is_absent_until_the_first_and_then_latched() -> None:
    exporter = Exporter("node-a-1", 2)
    assert "\nDCGM_FI_DEV_XID_ERRORS{" not in exporter.numbers.registry.render()
    for sample in (SAMPLES[1], SAMPLES[2]):
        error = xid(sample.replace("38:00", "06:00"))
        assert error
        exporter.hit(error)
    lines = [
        line for line in exporter.numbers.registry.render().splitlines() if line.startswith("DCGM_FI_DEV_XID_ERRORS{")
    ]
    assert len(lines) == 1 and lines[0].endswith(" 43")
    assert all(part in lines[0] for part in ('gpu="1"', 'err_code="43"', 'Hostname="node-a-1"', 'UUID="GPU-'))


def test_a_gpu_off_the_bus_has_no_other_gauges_any_more() -> None:
    exporter = Exporter("node-a-1", 2)
    lost = xid(SAMPLES[0])
    assert lost
    exporter.hit(lost)
    for index in range(2):
        exporter.look(index, loaded=True, batch=True)
    text = exporter.numbers.registry.render()
    assert 'DCGM_FI_DEV_XID_ERRORS{gpu="0"' in text and 'DCGM_FI_DEV_FB_USED{gpu="0"' not in text
    assert 'DCGM_FI_DEV_FB_USED{gpu="1"' in text


def test_the_exporter_looks_at_the_engine_on_its_gpu(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("pod-token")
    host = new_host()

    async def pods(request: web.Request) -> web.Response:
        assert request.query["fieldSelector"] == "spec.nodeName=node-a-1"
        limits = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
        meta = {"name": "e", "uid": "u", "annotations": {"prometheus.io/port": "8001"}}
        pod = {"metadata": meta, "spec": {"containers": [limits]}, "status": {"phase": "Running", "podIP": host}}
        return web.json_response({"metadata": {"resourceVersion": "1"}, "items": [pod]})

    async def node(_: web.Request) -> web.Response:
        return web.json_response({"metadata": {}, "status": {"capacity": {"nvidia.com/gpu": "2"}}})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text='# TYPE x gauge\nvllm:num_requests_running{model_name="m",engine="0"} 3\n')

    async def story() -> None:
        app = web.Application()
        app.router.add_get("/api/v1/nodes/node-a-1", node)
        app.router.add_get("/api/v1/pods", pods)
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, host, 8001).start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sandbox.images.dcgm", "--node", "node-a-1", "--every", "0.1"),
            *("--host", host, "--log", str(tmp_path / "kern.log")),
            cwd=ROOT,
            env={"GAMEDAY_API_URL": f"http://{host}:8001", "GAMEDAY_ACCOUNT_DIR": str(tmp_path)},
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            async with aiohttp.ClientSession() as session:

                async def shows(*words: str) -> bool:
                    try:
                        async with session.get(f"http://{host}:9400/metrics") as answer:
                            text = await answer.text()
                    except aiohttp.ClientError:
                        return False
                    return any(all(word in line for word in words) for line in text.splitlines())

                await until(lambda: shows('DCGM_FI_DEV_FB_USED{gpu="0"', "} 22118"))
                await until(lambda: shows('DCGM_FI_DEV_FB_USED{gpu="1"', "} 0"))
                await until(lambda: shows('DCGM_FI_DEV_GPU_UTIL{gpu="0"', "} 9"))
                _append(tmp_path / "kern.log", SAMPLES[0])
                await until(lambda: shows('DCGM_FI_DEV_XID_ERRORS{gpu="0"', "} 79"))
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 5) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await runner.cleanup()

    asyncio.run(story())
