"""Pods live and die as on a real node (facts/kubelet.md)."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from nodes_world import LIVENESS, PAUSE, PYTHON, READINESS, Life, Seen, api_of, eventually, living, pod, sandbox

from sandbox.client import CONFIGMAPS, NODES, PODS
from sandbox.node import mounts
from sandbox.node.status import OWN_CONDITIONS
from sandbox.up import Running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("state") / "s") as found:
        yield found


# A TLS transport that is cancelled in the middle of a watch closes a moment after its loop has.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


async def on_host(path: str) -> bool:
    return await asyncio.to_thread(Path(path).exists)


def log_url(running: Running, name: str, query: str = "") -> str:
    return f"{running.api_url}/api/v1/namespaces/default/pods/{name}/log?{query}"


async def log_of(running: Running, name: str, query: str = "") -> str:
    token = (Path(running.state_dir) / "token").read_text().strip()
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
        session.get(log_url(running, name, query), ssl=False) as answer,
    ):
        return await answer.text()


async def from_pod(running: Running, life: Life, path: str, ip: str | None = None) -> str:
    """GET a path of the pod's server from inside the fabric, once it listens: without a probe, Ready says nothing."""
    where = ip or life.seen[-1].status["podIP"]
    zygote = next(iter(_children(running.pid)))
    code = f"import urllib.request as u; print(u.urlopen('http://{where}:8000{path}', timeout=2).read().decode())"
    for _ in range(20):
        done = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/proc/{zygote}/ns/net", "python3", "-c", code,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await done.communicate()
        if b"Connection refused" not in err:
            break
    assert done.returncode == 0, err.decode()[-300:]
    return out.decode()


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_pod_becomes_ready_with_kubelets_conditions(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("plain", {"readinessProbe": READINESS})) as life:
            started = await life.until(lambda s: s.running)
            assert not started.ready and started.web["started"] is True
            assert started.condition("Ready")["reason"] == "ContainersNotReady"
            ready = await life.until(lambda s: s.ready)
            status = ready.status
            assert [c["type"] for c in status["conditions"]] == list(OWN_CONDITIONS)
            assert all(c["status"] == "True" and c.get("lastProbeTime") is None for c in status["conditions"])
            assert "reason" not in ready.condition("Ready")
            assert status["phase"] == "Running" and status["podIP"].startswith("10.244.")
            assert status["observedGeneration"] == ready.object["metadata"]["generation"]
            assert ready.restarts == 0 and ready.web["image"] == PYTHON
            reasons = {e["reason"] for e in await eventually(lambda: life.events("Started")) and await life.events()}
            assert reasons >= {"Pulled", "Created", "Started"}

    asyncio.run(scenario())


def test_a_graceful_end_serves_until_it_exits(running: Running) -> None:
    async def scenario() -> None:
        env = [{"name": "LINGER", "value": "1.5"}]
        async with living(running, pod("linger", {"readinessProbe": READINESS, "env": env})) as life:
            await life.until(lambda s: s.ready)
            asked = time.monotonic()
            await life.delete()
            gone = await life.gone()
            assert 1.4 <= gone.at - asked < 4
            terminating = [s for s in life.seen if "deletionTimestamp" in s.object["metadata"] and s.running]
            assert terminating and all(s.ready for s in terminating), "Ready until the process has exited"
            assert gone.status["phase"] == "Succeeded" and gone.ended is not None
            assert (gone.ended["exitCode"], gone.ended["reason"]) == (0, "Completed")
            assert gone.condition("Ready")["reason"] == "PodCompleted"
            assert gone.condition("PodReadyToStartContainers")["status"] == "False"
            killing = await eventually(lambda: life.events("Killing"))
            assert killing[0]["message"] == "Stopping container web"

    asyncio.run(scenario())


def test_sigterm_ignored_is_killed_after_the_grace(running: Running) -> None:
    async def scenario() -> None:
        sleeper = {"image": "busybox:1.36", "args": ["sleep", "600"]}  # PID 1 without a handler ignores SIGTERM
        async with living(running, pod("deaf", sleeper, terminationGracePeriodSeconds=3)) as life:
            await life.until(lambda s: s.ready)
            asked = time.monotonic()
            await life.delete()
            gone = await life.gone()
            assert 2.9 <= gone.at - asked < 5
            assert gone.ended and (gone.ended["exitCode"], gone.ended["reason"]) == (137, "Error")
            assert gone.status["phase"] == "Failed" and gone.condition("Ready")["reason"] == "PodFailed"

    asyncio.run(scenario())


def test_a_forced_deletion_leaves_the_process_two_more_seconds(running: Running) -> None:
    async def scenario() -> None:
        env = [{"name": "LINGER", "value": "30"}]
        async with living(running, pod("forced", {"readinessProbe": READINESS, "env": env})) as life:
            ip = (await life.until(lambda s: s.ready)).status["podIP"]
            asked = time.monotonic()
            await life.delete(grace=0)
            gone = await life.gone(within=1)
            assert gone.ready, "the object goes with the status that it had"
            assert await from_pod(running, life, "/health", ip), "it still serves"
            assert time.monotonic() - asked < 1.9
            directory = Path(running.state_dir) / "nodes" / "node-a-1" / "pods" / gone.object["metadata"]["uid"]
            while directory.exists():  # removed once the process is dead
                assert time.monotonic() - asked < 5
                await asyncio.sleep(0.05)
            assert time.monotonic() - asked >= 1.9

    asyncio.run(scenario())


def kill(life: Life) -> None:
    """SIGKILL the pod's process from outside, as a crash."""
    (pid,) = _pids_of(life.name)
    subprocess.run(["kill", "-9", str(pid)], check=True)


def _pids_of(hostname: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"HOSTNAME={hostname}".encode() in environ:
            found.append(int(entry.name))
    return found


def test_a_crash_is_reported_before_the_restart_and_backs_off_the_second_time(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("crash", {"readinessProbe": READINESS})) as life:
            await life.until(lambda s: s.ready)
            mark = len(life.seen)
            kill(life)
            dead = await life.until(lambda s: s.ended, since=mark)
            assert dead.ended and (dead.ended["exitCode"], dead.ended["reason"]) == (137, "Error")
            assert dead.restarts == 0 and dead.last is None and not dead.ready
            assert dead.status["phase"] == "Running" and dead.condition("PodReadyToStartContainers")["status"] == "True"
            again = await life.until(lambda s: s.running, since=life.seen.index(dead))
            assert again.restarts == 1 and again.last and again.last["exitCode"] == 137
            assert again.at - dead.at < 0.9, "no back-off the first time"
            await life.until(lambda s: s.ready, since=life.seen.index(again))
            mark = len(life.seen)
            kill(life)
            waiting = await life.until(lambda s: s.waiting == "CrashLoopBackOff", since=mark)
            assert waiting.restarts == 1
            message = waiting.web["state"]["waiting"]["message"]
            uid = waiting.object["metadata"]["uid"]
            assert message == f"back-off 1s restarting failed container=web pod=crash_default({uid})"
            third = await life.until(lambda s: s.running and s.restarts == 2, since=life.seen.index(waiting))
            assert third.at - waiting.at >= 0.9

    asyncio.run(scenario())


def test_a_changed_image_restarts_and_back_off_is_kept_by_image(running: Running) -> None:
    async def scenario() -> None:
        env = [{"name": "LINGER", "value": "1"}]
        probes = {"readinessProbe": READINESS, "livenessProbe": LIVENESS, "env": env}
        manifest = pod("swap", {"args": None, "command": None, **probes})
        manifest["spec"]["containers"][0]["args"] = pod("x")["spec"]["containers"][0]["args"]
        async with living(running, manifest) as life:
            await life.until(lambda s: s.ready)
            mark = len(life.seen)
            await life.set_image(PAUSE)
            paused = await life.until(lambda s: s.web.get("image") == PAUSE, since=mark)
            assert all(s.ready and s.running for s in life.seen[mark : life.seen.index(paused)])
            assert paused.running and not paused.ready and paused.restarts == 1
            assert paused.last and (paused.last["exitCode"], paused.last["reason"]) == (0, "Completed")
            looping = await life.until(lambda s: s.waiting == "CrashLoopBackOff", within=20)
            changed = time.monotonic()
            await life.set_image(PYTHON)
            back = await life.until(lambda s: s.running and s.web["image"] == PYTHON, since=life.seen.index(looping))
            assert back.at - changed < 0.8, "another image has a back-off of its own"
            assert back.restarts > paused.restarts
            await life.until(lambda s: s.ready, since=life.seen.index(back))
            messages = [e["message"] for e in await life.events("Killing")]
            assert "Container web definition changed, will be restarted" in messages
            assert "Container web failed liveness probe, will be restarted" in messages

    asyncio.run(scenario())


def test_a_command_that_the_image_lacks_is_a_start_error(running: Running) -> None:
    async def scenario() -> None:
        container = {"image": PAUSE, "command": ["/usr/bin/python3"], "args": ["-c", "1"]}
        async with living(running, pod("nocommand", container)) as life:
            failed = await life.until(lambda s: s.last)
            assert failed.last and (failed.last["exitCode"], failed.last["reason"]) == (128, "StartError")
            await life.until(lambda s: s.waiting == "CrashLoopBackOff")
            restarted = await life.until(lambda s: s.restarts >= 1)
            assert restarted.last and restarted.last["startedAt"].startswith("1970")

    asyncio.run(scenario())


def test_an_unknown_image_cannot_be_pulled(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("nopull", {"image": "example/nothing:v1"})) as life:
            await life.until(lambda s: s.waiting == "ErrImagePull")
            waiting = await life.until(lambda s: s.waiting == "ImagePullBackOff")
            assert waiting.status["phase"] == "Pending" and waiting.restarts == 0
            assert "example/nothing:v1: not found" in waiting.web["state"]["waiting"]["message"]
            await life.set_image(PYTHON)
            await life.until(lambda s: s.running, within=3)

    asyncio.run(scenario())


def test_readiness_fails_and_returns_and_the_container_stays(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("flap", {"readinessProbe": READINESS})) as life:
            await life.until(lambda s: s.ready)
            mark = len(life.seen)  # before: on a busy machine the change is there when the request returns
            await from_pod(running, life, "/break")
            out = await life.until(lambda s: not s.ready, since=mark)
            assert out.running and out.web["started"] and out.restarts == 0
            assert out.condition("ContainersReady")["reason"] == "ContainersNotReady"
            unhealthy = await eventually(lambda: life.events("Unhealthy"))
            assert any("HTTP probe failed with statuscode: 503" in e["message"] for e in unhealthy)
            await from_pod(running, life, "/mend")
            await life.until(lambda s: s.ready, since=life.seen.index(out))

    asyncio.run(scenario())


def test_liveness_failure_restarts_in_one_step(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("sick", {"livenessProbe": LIVENESS})) as life:
            await life.until(lambda s: s.ready)
            mark = len(life.seen)  # before: on a busy machine the change is there when the request returns
            await from_pod(running, life, "/break")
            again = await life.until(lambda s: s.restarts == 1, since=mark)
            assert again.running and again.last and again.last["reason"] == "Completed"
            assert all(s.running for s in life.seen[mark : life.seen.index(again)]), "no waiting state in between"

    asyncio.run(scenario())


def test_a_startup_probe_holds_the_others_back(running: Running) -> None:
    async def scenario() -> None:
        slow = {"tcpSocket": {"port": 8000}, "periodSeconds": 1, "failureThreshold": 30}
        late = "import time; time.sleep(1.5)\n" + pod("x")["spec"]["containers"][0]["args"][2]
        container = {"args": ["python3", "-c", late], "startupProbe": slow, "livenessProbe": LIVENESS}
        async with living(running, pod("slow", container)) as life:
            first = await life.until(lambda s: s.running)
            assert first.web["started"] is False and not first.ready
            ready = await life.until(lambda s: s.ready)
            assert ready.web["started"] is True and ready.restarts == 0
            unhealthy = [e["message"] for e in await life.events("Unhealthy")]
            assert unhealthy and all(m.startswith("Startup probe failed: dial tcp") for m in unhealthy)

    asyncio.run(scenario())


def test_exec_probes_run_in_the_container(running: Running) -> None:
    async def scenario() -> None:
        probe = {"exec": {"command": ["sh", "-c", "test -e /data/ready && hostname | grep -q execpod"]}}
        container = {
            "readinessProbe": {**probe, "periodSeconds": 1},
            "args": ["python3", "-c", "import time; time.sleep(1); open('/data/ready', 'w'); time.sleep(99)"],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        }
        volumes = [{"name": "data", "emptyDir": {}}]
        async with living(running, pod("execpod", container, volumes=volumes, terminationGracePeriodSeconds=1)) as life:
            assert not (await life.until(lambda s: s.running)).ready
            await life.until(lambda s: s.ready)
            assert not await on_host("/data"), "the volume is the container's alone"

    asyncio.run(scenario())


def test_logs_are_followed_and_kept_for_one_restart(running: Running) -> None:
    script = "import time\nfor i in range(4): print('line', i, flush=True); time.sleep(0.2)\nraise SystemExit(3)"

    async def scenario() -> None:
        async with living(running, pod("talk", {"args": ["python3", "-c", script]})) as life:
            await life.until(lambda s: s.running)
            followed = await log_of(running, "talk", "follow=true")
            assert followed.splitlines() == [f"line {i}" for i in range(4)]
            await life.until(lambda s: s.running and s.restarts == 1)
            assert (await log_of(running, "talk", "previous=true&tailLines=1")).strip() == "line 3"
            stamped = await eventually(lambda: log_of(running, "talk", "timestamps=true&tailLines=1"))
            assert stamped[:2] == "20" and "Z line" in stamped

    asyncio.run(scenario())


def test_jobs_pods_run_once(running: Running) -> None:
    async def scenario() -> None:
        once = pod("once", {"args": ["python3", "-c", "print('done')"]}, restartPolicy="Never")
        async with living(running, once) as life:
            over = await life.until(lambda s: s.status.get("phase") == "Succeeded")
            assert over.ended and over.ended["exitCode"] == 0 and over.restarts == 0
            assert over.condition("Initialized")["reason"] == "PodCompleted"
            assert (await log_of(running, "once")).strip() == "done"
        bad = pod("bad", {"args": ["python3", "-c", "raise SystemExit(4)"]}, restartPolicy="Never")
        async with living(running, bad) as life:
            over = await life.until(lambda s: s.status.get("phase") == "Failed")
            assert over.ended and over.ended["exitCode"] == 4

    asyncio.run(scenario())


def test_a_pod_past_its_deadline_fails_and_stays(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("dated", activeDeadlineSeconds=1, restartPolicy="Never")) as life:
            started = await life.until(lambda s: s.running)
            failed = await life.until(lambda s: s.status.get("phase") == "Failed" and s.ended)
            assert failed.at - started.at < 3
            assert failed.status["reason"] == "DeadlineExceeded"
            assert failed.condition("Ready")["reason"] == "PodFailed"
            await life.delete()
            await life.gone(within=2)

    asyncio.run(scenario())


def test_what_a_node_cannot_do_is_refused(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("host", hostNetwork=True)) as life:
            refused = await life.until(lambda s: s.status.get("phase") == "Failed")
            assert refused.status["message"] == "Pod was rejected: the sandbox's nodes have no hostNetwork"

    asyncio.run(scenario())


def test_init_containers_run_first(running: Running) -> None:
    async def scenario() -> None:
        first = {"name": "first", "image": "busybox:1.36", "command": ["sh", "-c", "echo made > /scratch/it"]}
        mount = {"volumeMounts": [{"name": "work", "mountPath": "/scratch"}]}
        web = {
            **mount,
            "args": ["python3", "-c", "import time; print(open('/scratch/it').read(), flush=True); time.sleep(99)"],
        }
        manifest = pod("init", web, volumes=[{"name": "work", "emptyDir": {}}], initContainers=[{**first, **mount}])
        manifest["spec"]["terminationGracePeriodSeconds"] = 1
        async with living(running, manifest) as life:
            waiting = await life.until(lambda s: s.waiting == "PodInitializing")
            assert waiting.condition("Initialized")["status"] == "False"
            await life.until(lambda s: s.ready)
            assert (await eventually(lambda: log_of(running, "init", "container=web"))).strip() == "made"

    asyncio.run(scenario())


def test_pre_stop_runs_before_sigterm(running: Running) -> None:
    async def scenario() -> None:
        hook = {"preStop": {"sleep": {"seconds": 3}}}
        async with living(running, pod("hooked", {"lifecycle": hook, "readinessProbe": READINESS})) as life:
            await life.until(lambda s: s.ready)
            asked = time.monotonic()
            await life.delete()
            assert await from_pod(running, life, "/health")
            assert "stopping" not in await log_of(running, "hooked")
            assert 2.9 <= (await life.gone()).at - asked < 8

    asyncio.run(scenario())


def test_the_environment_and_volumes_are_the_pods(running: Running) -> None:
    async def scenario() -> None:
        async with api_of(running) as api:
            data = {"a.txt": "alpha", "KEY": "value"}
            meta = {"name": "conf", "namespace": "default"}
            await api.create(CONFIGMAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
        env = [
            {"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "CONF", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "KEY"}}},
            {"name": "TWICE", "value": "$(ME)-$(ME)-$(NOT)"},
        ]
        script = (
            "import os, json, time\n"
            "account = '/var/run/secrets/kubernetes.io/serviceaccount'\n"
            "print(json.dumps({'env': dict(os.environ), 'conf': open('/etc/conf/a.txt').read(),"
            " 'account': sorted(n for n in os.listdir(account) if not n.startswith('.')), 'tmp': os.listdir('/tmp'),"
            " 'pid': os.getpid(), 'fds': sorted(map(int, os.listdir('/proc/self/fd')))}), flush=True)\n"
            "time.sleep(99)"
        )
        container = {
            "args": ["python3", "-c", script],
            "env": env,
            "volumeMounts": [{"name": "conf", "mountPath": "/etc/conf"}],
            "resources": {"limits": {"nvidia.com/gpu": "1"}},
        }
        volumes = [{"name": "conf", "configMap": {"name": "conf"}}]
        async with living(running, pod("inside", container, volumes=volumes, terminationGracePeriodSeconds=1)) as life:
            seen = await life.until(lambda s: s.ready)
            inside = json.loads(await eventually(lambda: log_of(running, "inside")))
            environ = inside["env"]
            assert environ["ME"] == environ["HOSTNAME"] == "inside" and environ["NODE"] == "node-a-1"
            assert environ["IP"] == seen.status["podIP"] and environ["CONF"] == "value"
            assert environ["TWICE"] == "inside-inside-$(NOT)"
            assert environ["NVIDIA_VISIBLE_DEVICES"].startswith("GPU-")
            assert environ["KUBERNETES_SERVICE_HOST"] == "10.96.0.1"
            assert inside["conf"] == "alpha" and inside["account"] == ["ca.crt", "namespace", "token"]
            # A checkout below /tmp keeps the host's /tmp in sight: the container runs its code from there.
            assert inside["pid"] == 1 and (mounts._needed("/tmp") or inside["tmp"] == [])
            assert set(inside["fds"]) <= {0, 1, 2, 3}, "no descriptor of the sandbox leaks into a container"
            assert not await on_host("/etc/conf")

    asyncio.run(scenario())


def test_gpus_are_given_out_once(running: Running) -> None:
    async def scenario() -> None:
        pods = Path(running.state_dir) / "nodes" / "node-a-1" / "pods"

        async def free() -> bool:
            return not pods.exists() or not list(await asyncio.to_thread(pods.iterdir))

        await eventually(free)  # what earlier tests forced away still holds its GPU for two seconds
        both = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
        async with living(running, pod("first", both)) as life:
            await life.until(lambda s: s.running)
            async with living(running, pod("second", both)) as late:
                refused = await late.until(lambda s: s.status.get("phase") == "Failed")
                assert refused.status["reason"] == "UnexpectedAdmissionError"
                assert "Requested: 2, Available: 0" in refused.status["message"]

    asyncio.run(scenario())


def test_a_line_written_to_kmsg_reaches_the_nodes_kernel_log(running: Running) -> None:
    async def scenario() -> None:
        line = "<3>NVRM: Xid (PCI:0000:05:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
        container = {
            "image": "busybox:1.36",
            "command": ["sh", "-c", f'echo "{line}" > /dev/kmsg'],
            "volumeMounts": [{"name": "kmsg", "mountPath": "/dev/kmsg"}],
        }
        volumes = [{"name": "kmsg", "hostPath": {"path": "/dev/kmsg"}}]
        async with living(running, pod("xid", container, volumes=volumes, restartPolicy="Never")) as life:
            await life.until(lambda s: s.status.get("phase") == "Succeeded")
            log = Path(running.state_dir) / "nodes" / "node-a-1" / "var" / "log" / "kern.log"

            async def written() -> list[str]:
                return [text for text in log.read_text().splitlines() if "Xid" in text]

            (text,) = await eventually(written)
            assert " node-a-1 kernel: [" in text and text.endswith(line.removeprefix("<3>"))

    asyncio.run(scenario())


def test_containers_are_killed_once_per_token(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("victim", {"readinessProbe": READINESS})) as life:
            await life.until(lambda s: s.ready)
            key = "sandbox.gameday.dev/kill-containers"
            await life.patch({"metadata": {"annotations": {key: "t1:web"}}})
            again = await life.until(lambda s: s.restarts == 1 and s.ready)
            assert again.last and again.last["exitCode"] == 137
            await life.patch({"metadata": {"annotations": {key: "t1:web", "other": "x"}}})
            await asyncio.sleep(0.5)
            assert life.seen[-1].restarts == 1 and life.seen[-1].running

    asyncio.run(scenario())


def test_conditions_of_others_are_kept_and_go_first(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("disrupted", {"readinessProbe": READINESS})) as life:
            await life.until(lambda s: s.ready)
            condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
            await life.api.patch(
                PODS,
                "disrupted", {"status": {"conditions": [condition]}}, "default", sub="status", type="strategic",
            )  # fmt: skip
            await life.delete()
            gone: Seen = await life.gone()
            assert gone.status["conditions"][0]["type"] == "DisruptionTarget"
            assert [c["type"] for c in gone.status["conditions"][1:]] == list(OWN_CONDITIONS)

    asyncio.run(scenario())


def test_an_allocatable_value_that_others_set_is_kept(running: Running) -> None:
    async def scenario() -> None:
        async with api_of(running) as api:
            patch = {"status": {"allocatable": {"nvidia.com/gpu": "1"}}}
            await api.patch(NODES, "node-a-1", patch, sub="status", type="strategic")
            broken = {"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}
            await api.patch(NODES, "node-a-1", broken, sub="status", type="strategic")

            async def healed() -> bool:
                node = await api.get(NODES, "node-a-1")
                return any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"])

            await eventually(healed)
            node = await api.get(NODES, "node-a-1")
            assert node["status"]["allocatable"]["nvidia.com/gpu"] == "1"
            assert node["status"]["capacity"]["nvidia.com/gpu"] == "2"

    asyncio.run(scenario())


def test_a_grpc_probe_is_refused_and_says_so(running: Running) -> None:
    async def scenario() -> None:
        probe = {"grpc": {"port": 8000}, "periodSeconds": 1}
        async with living(running, pod("grpc", {"readinessProbe": probe})) as life:
            await life.until(lambda s: s.running)
            (event, *_) = await eventually(lambda: life.events("Unhealthy"))
            assert event["message"] == "Readiness probe failed: the sandbox has no grpc probes"
            assert not life.seen[-1].ready

    asyncio.run(scenario())


def test_a_first_pull_takes_its_time_and_the_second_none(running: Running) -> None:
    async def scenario() -> None:
        image = {"image": "gameday/dcgm-exporter:v1", "args": []}
        async with living(running, pod("puller", image)) as life:
            await life.until(lambda s: s.running)
            messages = [e["message"] for e in await eventually(lambda: life.events("Pulled"))]
            assert len(messages) == 1 and messages[0].startswith(
                'Successfully pulled image "gameday/dcgm-exporter:v1" in '
            )
            assert await life.events("Pulling")
        async with living(running, pod("again", image)) as life:
            await life.until(lambda s: s.running)
            (event,) = await eventually(lambda: life.events("Pulled"))
            assert event["message"].endswith("already present on machine and can be accessed by the pod")
            assert not await life.events("Pulling")

    asyncio.run(scenario())
