"""exec: from real clients through the API server to a kubelet, and what is refused on the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web
from apiserver_world import ADMIN, JANE, Cluster, pod, run
from kubernetes import client, config, stream

from sandbox.kubeconfig import write_kubeconfig

EXEC = "/api/v1/namespaces/default/pods/p/exec"
FAILED = {"status": "Failure", "reason": "NonZeroExitCode", "message": "command terminated with exit code 3"}
FAILED["details"] = {"causes": [{"reason": "ExitCode", "message": "3"}]}  # type: ignore[assignment]


class Kubelet:
    """Plays three commands: `echo` words, `cat` its input, `fail`."""

    def __init__(self) -> None:
        self.protocols: list[str | None] = []
        self.gone = asyncio.Event()  # a client went away in the middle of `hang`

    async def exec(self, request: web.Request) -> web.StreamResponse:
        words = request.query.getall("command")
        if request.match_info["pod"] != "p" or words[0] == "refuse":
            return web.Response(status=400, text='container not found ("main")')
        socket = web.WebSocketResponse(protocols=("v5.channel.k8s.io", "v4.channel.k8s.io"))
        await socket.prepare(request)
        self.protocols.append(socket.ws_protocol)
        status: dict[str, object] = {"metadata": {}, "status": "Success"}
        match words[0]:
            case "echo":
                await socket.send_bytes(b"\x01" + " ".join(words[1:]).encode() + b"\n")
                await socket.send_bytes(b"\x02and an error\n")
            case "cat":
                async for message in socket:
                    if message.data == b"\xff\x00":
                        break
                    await socket.send_bytes(b"\x01" + message.data[1:])
            case "hang":
                await socket.send_bytes(b"\x01begun\n")
                async for _ in socket:
                    continue
                self.gone.set()
                return socket
            case _:
                status = {"metadata": {}, **FAILED}
        await socket.send_bytes(b"\x03" + orjson.dumps(status))
        await socket.close()
        return socket


@contextlib.asynccontextmanager
async def kubelet(one: Cluster) -> AsyncIterator[Kubelet]:
    """A node n1 with the pod p on it."""
    played, app = Kubelet(), web.Application()
    app.router.add_get("/exec/{namespace}/{pod}/{container}", played.exec)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": runner.addresses[0][1]}},
    }
    await one.raw("POST", "/api/v1/nodes", json={"metadata": {"name": "n1"}, "status": status})
    await one.raw("POST", "/api/v1/namespaces/default/pods", json=pod("p", nodeName="n1"))
    try:
        yield played
    finally:
        await runner.cleanup()


def on_a_node(directory: Path, test: Callable[[Cluster, Kubelet], Awaitable[None]]) -> None:
    async def main(one: Cluster) -> None:
        async with kubelet(one) as played:
            await test(one, played)

    run(directory, main)


def test_the_kubernetes_package_executes_and_reads_both_streams(tmp_path: Path) -> None:
    async def test(one: Cluster, played: Kubelet) -> None:
        write_kubeconfig(tmp_path / "kubeconfig", one.url, one.tls.ca, ADMIN)

        def executed(*command: str) -> tuple[str, str, int]:
            loaded = config.new_client_from_config(str(tmp_path / "kubeconfig"))
            opened = stream.stream(
                client.CoreV1Api(loaded).connect_get_namespaced_pod_exec,
                "p",
                "default",
                command=list(command),
                stdout=True,
                stderr=True,
                _preload_content=False,
            )
            opened.run_forever(timeout=10)
            found = opened.read_stdout(), opened.read_stderr(), opened.returncode
            opened.sock.shutdown()  # its close() leaves the socket behind when the server was first
            loaded.close()
            return found

        assert await asyncio.to_thread(executed, "echo", "a b", "c") == ("a b c\n", "and an error\n", 0)
        assert await asyncio.to_thread(executed, "fail") == ("", "", 3)
        assert set(played.protocols) <= {"v4.channel.k8s.io", "v5.channel.k8s.io"}

    on_a_node(tmp_path, test)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_kubectl_executes(tmp_path: Path) -> None:
    async def test(one: Cluster, played: Kubelet) -> None:
        write_kubeconfig(tmp_path / "kubeconfig", one.url, one.tls.ca, ADMIN)
        env = {"KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}

        async def kubectl(*args: str, given: bytes = b"") -> tuple[int, str, str]:
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                "kubectl", *args, env=env, stdin=pipe, stdout=pipe, stderr=pipe
            )
            out, err = await process.communicate(given)
            return process.returncode or 0, out.decode(), err.decode()

        assert await kubectl("exec", "p", "--", "echo", "x") == (0, "x\n", "and an error\n")
        assert await kubectl("exec", "-i", "p", "--", "cat", given=b"through\n") == (0, "through\n", "")
        code, _, err = await kubectl("exec", "p", "--", "fail")
        assert (code, "command terminated with exit code 3" in err) == (3, True), err
        assert set(played.protocols) == {"v5.channel.k8s.io"}
        code, _, err = await kubectl("exec", "p", "-c", "other", "--", "echo")
        assert code == 1 and "container other is not valid for pod p" in err
        code, _, err = await kubectl("exec", "nope", "--", "echo")
        assert code == 1 and 'pods "nope" not found' in err
        code, _, err = await kubectl("port-forward", "p", "8080:80")
        assert code == 1, err

    on_a_node(tmp_path, test)


def test_what_is_refused_says_why(tmp_path: Path) -> None:
    async def test(one: Cluster, _: Kubelet) -> None:
        ws = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==",
            "Sec-WebSocket-Protocol": "v5.channel.k8s.io",
        }
        spdy = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1"}

        async def said(query: str, headers: dict[str, str], path: str = EXEC, token: str = ADMIN) -> tuple[int, str]:
            code, answer = await one.raw("GET", path + query, token=token, headers=headers)
            return code, answer["message"]

        good = "?command=echo&stdout=1"
        assert await said("?command=echo", ws) == (400, "you must specify at least 1 of stdin, stdout, stderr")
        assert await said("?stdout=1", ws) == (400, "you must specify at least one command for the container")
        assert await said(good + "&nonsense=1", ws) == (400, "unsupported exec parameters: nonsense")
        assert await said(good, {}) == (400, "Upgrade request required")
        code, text = await said(good, spdy)
        assert code == 501 and "SPDY is not supported" in text and "kubectl" in text
        code, text = await said(good, {**ws, "Sec-WebSocket-Protocol": "base64.channel.k8s.io"})
        assert code == 400 and "server accepts [v5.channel.k8s.io v4.channel.k8s.io]" in text
        assert await said("?command=refuse&stdout=1", ws) == (400, 'container not found ("main")')
        for sub in ("attach", "portforward", "proxy"):
            code, text = await said("", ws, EXEC.replace("exec", sub))
            assert (code, text) == (501, f"pods/{sub} is not supported by the sandbox")
        code, text = await said(good, ws, token=JANE)
        assert code == 403 and "pods/exec" in text

    on_a_node(tmp_path, test)


def test_a_right_to_get_is_none_to_execute(tmp_path: Path) -> None:
    """Whatever the method, exec wants `create` (Kubernetes 1.35): else a reader could execute by GET."""

    async def test(one: Cluster, _: Kubelet) -> None:
        rules = [{"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["get"]}]
        path = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/"
        await one.raw("POST", path + "roles", json={"metadata": {"name": "r"}, "rules": rules})
        subjects = [{"kind": "User", "name": "jane", "apiGroup": "rbac.authorization.k8s.io"}]
        ref = {"kind": "Role", "name": "r", "apiGroup": "rbac.authorization.k8s.io"}
        binding = {"metadata": {"name": "r"}, "roleRef": ref, "subjects": subjects}
        code, _answer = await one.raw("POST", path + "rolebindings", json=binding)
        assert code == 201
        code, answer = await one.raw("GET", EXEC + "?command=echo&stdout=1", token=JANE)
        assert code == 403 and 'cannot create resource "pods/exec"' in answer["message"]

    on_a_node(tmp_path, test)


def test_a_client_that_goes_ends_the_command(tmp_path: Path) -> None:
    async def test(one: Cluster, played: Kubelet) -> None:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        target = one.url + EXEC + "?command=hang&stdout=1"
        async with one.session.ws_connect(target, headers=headers, protocols=("v4.channel.k8s.io",)) as socket:
            assert socket.protocol == "v4.channel.k8s.io"
            message = await socket.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.BINARY, b"\x01begun\n")
        await asyncio.wait_for(played.gone.wait(), 5)

    on_a_node(tmp_path, test)
