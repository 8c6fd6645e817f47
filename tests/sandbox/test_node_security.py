"""securityContext: who a container is and what it may, as seen from inside; and that it cannot change its host."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes_world import PYTHON, Life, api_of, eventually, living, pod, printed, sandbox

from sandbox.client import CONFIGMAPS, Obj
from sandbox.node.security import DEFAULT, Refused, Security, mapped, of, unenforced
from sandbox.up import Running

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with sandbox(tmp_path_factory.mktemp("state") / "s") as found:
        yield found


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def container(code: str, **own: object) -> Obj:
    return {"image": PYTHON, "args": ["python3", "-u", "-c", code], "securityContext": own}


async def ended(life: Life) -> None:
    await life.until(lambda s: s.status.get("phase") in ("Succeeded", "Failed"), within=15)


def said(running: Running, name: str, code: str, whole: Obj | None = None, **own: object) -> list[str]:
    """What a pod that runs `code` once prints."""

    async def scenario() -> list[str]:
        manifest = pod(name, container(code, **own), restartPolicy="Never", securityContext=whole or {})
        async with living(running, manifest) as life:
            await ended(life)
            return (await printed(running, name)).splitlines()

    return asyncio.run(scenario())


STATUS = (
    "print(*(line.split(None, 1)[1].strip() for line in open("
    "'/proc/self/status') if line.split(':')[0] in {}), sep='\\n')"
)
WHO = "import os; print(os.getuid(), os.getgid(), sorted(os.getgroups()))"


def test_user_and_groups(running: Running) -> None:
    whole = {"runAsUser": 1234, "runAsGroup": 99, "supplementalGroups": [7], "fsGroup": 8}
    assert said(running, "user", WHO, whole) == ["1234 99 [7, 8]"]
    assert said(running, "own", WHO, whole, runAsUser=5) == ["5 99 [7, 8]"]


def test_another_user_may_not_what_root_may(running: Running) -> None:
    code = "try: open('/etc/shadow'); print('read')\nexcept PermissionError: print('denied')"
    assert said(running, "shadow", code, None, runAsUser=1234) == ["denied"]
    assert said(running, "root-shadow", code) == ["read"]


def test_capabilities(running: Running) -> None:
    code = STATUS.format("('CapPrm', 'CapEff', 'CapBnd')")
    default = "00000000a80425fb"  # containerd's default set
    assert said(running, "default", code) == [default] * 3
    assert said(running, "none", code, None, capabilities={"drop": ["ALL"]}) == ["0" * 16] * 3
    one = {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert said(running, "one", code, None, capabilities=one) == ["0000000000001000"] * 3
    (permitted, *_) = said(running, "privileged", code, None, privileged=True)
    assert int(permitted, 16) & 1 << 21, "CAP_SYS_ADMIN"
    assert said(running, "other", code, None, runAsUser=7)[:2] == ["0" * 16] * 2


def test_no_new_privileges(running: Running) -> None:
    code = STATUS.format("('NoNewPrivs',)")
    assert said(running, "may-gain", code) == ["0"]
    assert said(running, "may-not-gain", code, None, allowPrivilegeEscalation=False) == ["1"]


WRITE = """
for place in ('/etc', '/var', '/tmp', '/dev/shm', '/run'):
    path = place + '/gameday-test'
    try:
        open(path, 'w').close()
        print('wrote', path)
    except OSError as error:
        print(error.errno, path)
"""


def test_the_hosts_file_system_cannot_be_written_to(running: Running) -> None:
    lines = said(running, "writer", WRITE, None, privileged=True)
    assert lines == [
        "30 /etc/gameday-test",
        "30 /var/gameday-test",
        "wrote /tmp/gameday-test",
        "wrote /dev/shm/gameday-test",
        "wrote /run/gameday-test",
    ]
    assert not Path("/etc/gameday-test").exists() and not Path("/tmp/gameday-test").exists()


def test_a_read_only_root_has_volumes_only(running: Running) -> None:
    async def scenario() -> None:
        code = WRITE + "open('/data/x', 'w').close(); print('wrote /data/x')"
        web = container(code, readOnlyRootFilesystem=True) | {"volumeMounts": [{"name": "d", "mountPath": "/data"}]}
        manifest = pod("frozen", web, restartPolicy="Never", volumes=[{"name": "d", "emptyDir": {}}])
        async with living(running, manifest) as life:
            await ended(life)
            lines = (await printed(running, "frozen")).splitlines()
            assert [line for line in lines if line.startswith("wrote")] == ["wrote /data/x"]

    asyncio.run(scenario())


def test_a_volume_belongs_to_the_fs_group(running: Running) -> None:
    async def scenario() -> None:
        code = "import os; open('/data/x', 'w').close(); print(os.stat('/data').st_gid, os.stat('/data/x').st_gid)"
        web = container(code, runAsUser=1234) | {"volumeMounts": [{"name": "d", "mountPath": "/data"}]}
        whole = {"fsGroup": 4321}
        volumes = [{"name": "d", "emptyDir": {}}]
        manifest = pod("grouped", web, restartPolicy="Never", securityContext=whole, volumes=volumes)
        async with living(running, manifest) as life:
            await ended(life)
            assert await printed(running, "grouped") == "4321 4321\n"

    asyncio.run(scenario())


def test_root_is_refused_where_it_must_not_run(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("root", container(WHO, runAsNonRoot=True))) as life:
            state = await life.until(lambda s: s.waiting == "CreateContainerConfigError")
            message = state.web["state"]["waiting"]["message"]
            assert message == "container has runAsNonRoot and image will run as root"

    asyncio.run(scenario())


def test_what_is_not_enforced_is_told(running: Running) -> None:
    async def scenario() -> None:
        manifest = pod("told", container("import time; time.sleep(9)", seccompProfile={"type": "RuntimeDefault"}))
        async with living(running, manifest) as life:
            await life.until(lambda s: s.running)
            async with asyncio.timeout(5):
                while not (found := await life.events("NotEnforced")):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert found[0]["message"] == "seccompProfile is not enforced by the sandbox"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shareProcessNamespace": True}, "shareProcessNamespace"),
        ({"runtimeClassName": "gvisor"}, "runtimeClassName"),
        ({"securityContext": {"sysctls": [{"name": "net.core.somaxconn", "value": "1"}]}}, "sysctls"),
    ],
)
def test_pods_that_cannot_be_had_as_asked_are_rejected(running: Running, change: Obj, why: str) -> None:
    async def scenario() -> None:
        async with living(running, pod("rejected", **change)) as life:
            failed = await life.until(lambda s: s.status.get("phase") == "Failed")
            assert why in failed.status["message"]

    asyncio.run(scenario())


def test_containers_share_a_volume_at_dev_shm(running: Running) -> None:
    """Regression: the container's own /dev/shm covered the volume; engines get theirs so."""

    async def scenario() -> None:
        mounted = {"volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}
        write = container("open('/dev/shm/x', 'w').write('from the other'); import time; time.sleep(60)") | mounted
        read = """
import time
while True:
    try: print(open('/dev/shm/x').read()); break
    except OSError: time.sleep(0.05)
time.sleep(60)
"""
        manifest = pod("shared", container(read) | mounted, volumes=[{"name": "shm", "emptyDir": {"medium": "Memory"}}])
        manifest["spec"]["containers"].append(write | {"name": "writer"})
        async with living(running, manifest) as life:

            async def told() -> bool:
                return "from the other" in await printed(running, "shared", "web")

            assert await eventually(told, within=10)
            messages = {event["message"] for event in await life.events("NotEnforced")}
            assert messages == {"medium of volume shm is not enforced by the sandbox"}

    asyncio.run(scenario())


def test_files_of_volumes_have_their_modes(running: Running) -> None:
    async def scenario() -> None:
        code = "import os\nfor name in ('a', 'b'): print(oct(os.stat('/data/' + name).st_mode & 0o777))"
        web = container(code) | {"volumeMounts": [{"name": "d", "mountPath": "/data"}]}
        source = {"name": "modes", "defaultMode": 0o755, "items": [{"key": "a", "path": "a"}]}
        source["items"].append({"key": "b", "path": "b", "mode": 0o400})
        async with api_of(running) as api:
            data = {"metadata": {"name": "modes", "namespace": "default"}, "data": {"a": "1", "b": "2"}}
            await api.create(CONFIGMAPS, data, "default")
        manifest = pod("modes", web, restartPolicy="Never", volumes=[{"name": "d", "configMap": source}])
        async with living(running, manifest) as life:
            await ended(life)
            assert (await printed(running, "modes")).split() == ["0o755", "0o400"]

    asyncio.run(scenario())


def test_a_changed_config_map_reaches_its_volume(running: Running) -> None:
    async def scenario() -> None:
        code = """
import os, time
last = None
while True:
    now = sorted((name, open('/data/' + name).read()) for name in os.listdir('/data') if not name.startswith('.'))
    if now != last: print(now)
    last = now
    time.sleep(0.05)
"""
        web = container(code) | {"volumeMounts": [{"name": "d", "mountPath": "/data"}]}
        async with api_of(running) as api:
            data = {"metadata": {"name": "lively", "namespace": "default"}, "data": {"a": "1", "b": "2"}}
            await api.create(CONFIGMAPS, data, "default")
            volume = {"name": "d", "configMap": {"name": "lively"}}
            async with living(running, pod("lively", web, volumes=[volume])) as life:
                await life.until(lambda s: s.running)
                await api.patch(CONFIGMAPS, "lively", {"data": {"a": "3", "b": None}}, "default")

                async def seen() -> bool:
                    return "[('a', '3')]" in await printed(running, "lively")

                assert await eventually(seen, within=15)
                assert "[('a', '1'), ('b', '2')]" in await printed(running, "lively")

    asyncio.run(scenario())


def test_resources_reach_a_downward_api_volume(running: Running) -> None:
    async def scenario() -> None:
        web = container("print(open('/data/mem').read())") | {"resources": {"limits": {"memory": "64Mi"}}}
        web["volumeMounts"] = [{"name": "d", "mountPath": "/data"}]
        ref = {"containerName": "web", "resource": "limits.memory", "divisor": "1Mi"}
        volume = {"name": "d", "downwardAPI": {"items": [{"path": "mem", "resourceFieldRef": ref}]}}
        async with living(running, pod("down", web, restartPolicy="Never", volumes=[volume])) as life:
            await ended(life)
            assert await printed(running, "down") == "64\n"

    asyncio.run(scenario())


# — pure —


def test_contexts() -> None:
    assert of({}, {}) == Security()
    assert of({"securityContext": {"runAsUser": 5}}, {"securityContext": {"runAsUser": 0}}).user == 0
    assert of({}, {"securityContext": {"privileged": True}}).capabilities is None
    assert of({}, {"securityContext": {"capabilities": {"add": ["ALL"]}}}).capabilities is None
    dropped = of({}, {"securityContext": {"capabilities": {"drop": ["CAP_KILL"]}}}).capabilities
    assert dropped is not None and set(dropped) == DEFAULT - {"KILL"}
    with pytest.raises(Refused, match="breaks non-root policy"):
        of({}, {"securityContext": {"runAsUser": 0, "runAsNonRoot": True}})
    with pytest.raises(Refused, match="unknown capability"):
        of({}, {"securityContext": {"capabilities": {"add": ["FLY"]}}})


def test_what_is_not_enforced() -> None:
    limits = {"limits": {"ephemeral-storage": "1Gi", "cpu": "1"}}
    assert unenforced({"securityContext": {"seLinuxOptions": {"level": "x"}}}, {"resources": limits}) == [
        "seLinuxOptions",
        "ephemeral-storage limit",
    ]


def test_users_of_a_user_namespace() -> None:
    assert mapped(65534, 0, "         0          0 4294967295\n")
    assert mapped(0, 0, "0 1000 1\n") and not mapped(65534, 0, "0 1000 1\n")
