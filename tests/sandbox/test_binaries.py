"""`gameday up --control-plane DIR`: command lines, keys, failures; the whole sandbox over binaries that are played."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from pathlib import Path

import fake_binaries
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from nodes_world import READINESS, api_of, eventually, pod, require_root_and_prometheus, sandbox

from gameday.cli import main
from sandbox import binaries
from sandbox.apiserver import Identity, make_tls
from sandbox.client import NODES, PODS, HttpApi
from sandbox.options import BARE, COMPRESSED, Options
from sandbox.up import SandboxError, down, up

TOKENS = {"a-token": Identity("kubernetes-admin", ("system:masters",)), "n": Identity("system:node:x", ("a", "b"))}


def test_the_command_lines(tmp_path: Path) -> None:
    fake_binaries.write(tmp_path / "bin")
    tls, plane = make_tls(tmp_path / "tls"), tmp_path / "plane"
    commands = binaries.prepare(binaries.find(str(tmp_path / "bin")), plane, tls, TOKENS, COMPRESSED)
    assert [command.name for command in commands] == list(binaries.NAMES)
    lines = {command.name: shlex.join(command.argv) for command in commands}
    for command in commands:
        assert command.argv[0] == str(tmp_path / "bin" / command.name)
        known = {f"--{flag}" for flag in fake_binaries.FLAGS[command.name].split()}
        assert {word.partition("=")[0] for word in command.argv[1:]} <= known
    apiserver, manager = lines["kube-apiserver"], lines["kube-controller-manager"]
    assert "--bind-address=10.244.0.1 --secure-port=6443" in apiserver
    assert "--service-cluster-ip-range=10.96.0.0/16" in apiserver and "--authorization-mode=RBAC" in apiserver
    assert "--default-unreachable-toleration-seconds=6" in apiserver
    assert "--node-monitor-period=500ms --node-monitor-grace-period=4000ms --node-eviction-rate=1" in manager
    assert (
        "--listen-client-urls=http://127.0.0.1:2379" in lines["etcd"]
        and "--etcd-servers=http://127.0.0.1:2379" in apiserver
    )


def test_the_keys_and_tokens(tmp_path: Path) -> None:
    fake_binaries.write(tmp_path / "bin")
    plane = tmp_path / "plane"
    binaries.prepare(binaries.find(str(tmp_path / "bin")), plane, make_tls(tmp_path), TOKENS, BARE)
    assert plane.stat().st_mode & 0o077 == 0
    for name in ("tokens.csv", "service-accounts.key", "kubeconfig"):
        assert (plane / name).stat().st_mode & 0o077 == 0
    private = serialization.load_pem_private_key((plane / "service-accounts.key").read_bytes(), None)
    public = serialization.load_pem_public_key((plane / "service-accounts.pub").read_bytes())
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert private.public_key().public_bytes(*form) == public.public_bytes(*form)  # type: ignore[union-attr]
    assert (plane / "tokens.csv").read_text().splitlines() == [
        "a-token,kubernetes-admin,kubernetes-admin,system:masters",
        'n,system:node:x,system:node:x,"a,b"',
    ]
    assert "https://10.244.0.1:6443" in (plane / "kubeconfig").read_text()


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(binaries.ASSETS, raising=False)
    monkeypatch.setenv("GAMEDAY_STATE_DIR", str(tmp_path / "state"))

    def said(*args: str) -> str:
        done = CliRunner().invoke(main, ["up", "--bare", *args])
        assert done.exit_code == 2 and done.output.count("\n") == 1 and "Traceback" not in done.output, done.output
        return done.output

    assert "KUBEBUILDER_ASSETS is not set" in said("--control-plane")
    assert "is not a directory" in said("--control-plane", str(tmp_path / "nowhere"))
    fake_binaries.write(tmp_path / "bin")
    (tmp_path / "bin" / "etcd").unlink()
    (tmp_path / "bin" / "kube-scheduler").chmod(0o644)
    monkeypatch.setenv(binaries.ASSETS, str(tmp_path / "bin"))
    assert "has no executable etcd and kube-scheduler" in said("--control-plane")
    assert not (tmp_path / "state").exists()


def test_a_binary_that_does_not_start_ends_the_sandbox_with_its_last_words(tmp_path: Path) -> None:
    require_root_and_prometheus()
    fake_binaries.write(tmp_path / "bin")
    (tmp_path / "bin" / "kube-apiserver").write_text("#!/bin/sh\necho 'Error: unknown flag: --nonsense' >&2\nexit 1\n")
    state = tmp_path / "state"
    with pytest.raises(SandboxError, match="kube-apiserver exited with code 1: Error: unknown flag: --nonsense"):
        up(Options(bare=True, state_dir=state, control_plane=str(tmp_path / "bin"), parent=os.getpid()), lambda _: None)
    down(state)
    assert not state.exists()


def test_nodes_and_pods_on_a_control_plane_of_four_processes(tmp_path: Path) -> None:
    """Nothing of the sandbox reaches into the API server's memory: here it is somebody else's."""
    fake_binaries.write(tmp_path / "bin")

    async def check(api: HttpApi) -> None:
        (node,), _ = await api.list(NODES)
        assert node["metadata"]["name"] == "node-a-1"
        await api.create(PODS, pod("p", {"readinessProbe": READINESS}))

        async def serves() -> bool:
            status = (await api.get(PODS, "p", "default")).get("status") or {}
            return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or [])

        await eventually(serves, 20)
        assert api._session is not None
        async with api._session.get(f"{api._server}/api/v1/namespaces/default/pods/p/log") as answer:
            assert (answer.status, await answer.text()) == (200, "serving\n"), "logs come from a kubelet in TLS"

    with sandbox(tmp_path / "state", control_plane=str(tmp_path / "bin")) as running:

        async def main() -> None:
            async with api_of(running) as api:
                await check(api)

        asyncio.run(main())
        port = int(running.api_url.rpartition(":")[2])
    socket.create_server(("127.0.0.1", port)).close()  # nobody listens there any more


@pytest.mark.skipif(not os.environ.get(binaries.ASSETS), reason="KUBEBUILDER_ASSETS names no control plane's binaries")
def test_nodes_and_pods_on_a_real_control_plane(tmp_path: Path) -> None:
    with sandbox(tmp_path / "state", control_plane="") as running:

        async def main() -> None:
            async with api_of(running) as api:
                await api.create(PODS, {**pod("p"), "spec": {**pod("p")["spec"], "nodeName": None}})

                async def runs() -> bool:
                    return bool(((await api.get(PODS, "p", "default")).get("status") or {}).get("phase") == "Running")

                await eventually(runs, 60)

        asyncio.run(main())
