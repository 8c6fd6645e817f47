"""Exec at the kubelet's port, as an API server asks for it: channels, exit codes, end of input, terminals, hang-ups."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from nodes_world import Life, eventually, host_pids, living, pod, sandbox

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


# Speaks for an API server, from inside the fabric: sends what it is told, collects every channel.
CLIENT = """
import asyncio, json, sys, aiohttp
url, protocol, sends, leave = json.loads(sys.argv[1])
async def main():
    async with aiohttp.ClientSession() as session:
        try:
            both = ['v5.channel.k8s.io', 'v4.channel.k8s.io']
            ws = await session.ws_connect(url, protocols=[protocol] if protocol else both)
        except aiohttp.WSServerHandshakeError:
            async with session.get(url) as answer:
                print(json.dumps({'http': answer.status, 'text': await answer.text()}))
            return
        for item in sends:
            await ws.send_bytes(bytes(item))
        if leave:
            await asyncio.sleep(0.5)
            await ws.close()
            print(json.dumps({'left': True}))
            return
        channels = {}
        async for message in ws:
            channels.setdefault(str(message.data[0]), bytearray()).extend(message.data[1:])
        said = {channel: text.decode() for channel, text in channels.items()}
        print(json.dumps({'protocol': ws.protocol, 'closed': ws.close_code, **said}))
asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Answer:
    raw: dict[str, Any]

    def __getitem__(self, channel: int) -> str:
        return str(self.raw.get(str(channel), ""))

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self[3])
        return found


def child_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]


async def run(
    running: Running,
    life: Life,
    *command: str,
    sends: tuple[bytes, ...] = (),
    protocol: str = "",
    leave: bool = False,
    container: str = "web",
    **flags: str,
) -> Answer:
    query = urlencode([*(("command", word) for word in command), *({"output": "1", "error": "1"} | flags).items()])
    host = life.seen[-1].status["hostIP"]
    url = f"http://{host}:10250/exec/default/{life.name}/{container}?{query}"
    fabric = child_of(running.pid)
    order = json.dumps([url, protocol, [list(item) for item in sends], leave])
    done = await asyncio.create_subprocess_exec(
        "nsenter", f"--net=/proc/{fabric}/ns/net", sys.executable, "-c", CLIENT, order,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await done.communicate()
    assert done.returncode == 0, err.decode()[-600:]
    return Answer(json.loads(out))


def test_streams_are_kept_apart_and_the_exit_code_comes_last(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("streams")) as life:
            await life.until(lambda s: s.running)
            answer = await run(running, life, "sh", "-c", "echo out; echo err >&2; exit 3")
            assert (answer[1], answer[2]) == ("out\n", "err\n")
            assert answer.raw["protocol"] == "v5.channel.k8s.io" and answer.raw["closed"] == 1000
            assert answer.status == {
                "metadata": {},
                "status": "Failure",
                "reason": "NonZeroExitCode",
                "message": "command terminated with exit code 3",
                "details": {"causes": [{"reason": "ExitCode", "message": "3"}]},
            }
            answer = await run(running, life, "true", protocol="v4.channel.k8s.io")
            assert answer.status["status"] == "Success" and answer.raw["protocol"] == "v4.channel.k8s.io"

    asyncio.run(scenario())


def test_it_is_the_container_that_the_command_runs_in(running: Running) -> None:
    async def scenario() -> None:
        env = [{"name": "WHO", "value": "the container"}]
        async with living(running, pod("inside", {"env": env, "workingDir": "/usr"})) as life:
            await life.until(lambda s: s.running)
            answer = await run(running, life, "sh", "-c", 'echo "$WHO $(hostname) $(pwd)"; ls /proc | grep -c "^[0-9]"')
            first, count = answer[1].splitlines()
            assert first == "the container inside /usr"
            assert int(count) < 10, "it sees the container's processes only"

    asyncio.run(scenario())


def test_input_reaches_it_and_ends(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("input")) as life:
            await life.until(lambda s: s.running)
            sends = (b"\x00hello ", b"\x00", b"\x01", b"\x00there", b"\xff\x00")
            answer = await run(running, life, "cat", sends=sends, input="1")
            assert answer[1] == "hello there" and answer.status["status"] == "Success"
            answer = await run(running, life, "cat", sends=(b"\x00nobody reads this",))
            assert answer[1] == "" and answer.status["status"] == "Success", "without input=1 it is at its end at once"

    asyncio.run(scenario())


def test_much_output_arrives_whole(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("much")) as life:
            await life.until(lambda s: s.running)
            answer = await run(running, life, "python3", "-c", "print('x' * 3_000_000)")
            assert len(answer[1]) == 3_000_001

    asyncio.run(scenario())


def test_a_terminal_is_one(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("terminal")) as life:
            await life.until(lambda s: s.running)
            sends = (b'\x04{"Width":91,"Height":17}', b"\x00stty size; tty; exit 4\n")
            answer = await run(running, life, "sh", sends=sends, tty="1", input="1")
            assert "17 91" in answer[1] and "/dev/pts/" in answer[1], answer.raw
            assert answer.status["details"]["causes"][0]["message"] == "4" and answer[2] == ""

    asyncio.run(scenario())


def test_what_cannot_start_says_so(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("nothing")) as life:
            await life.until(lambda s: s.running)
            status = (await run(running, life, "no-such-command")).status
            assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
            assert 'exec: "no-such-command": executable file not found in $PATH' in status["message"]
            assert (await run(running, life)).raw["http"] == 400
            answer = await run(running, life, "true", container="other")
            assert answer.raw["http"] == 404 and "no container" in answer.raw["text"]

    asyncio.run(scenario())


def test_a_container_that_does_not_run_has_no_exec(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("absent", {"image": "nowhere/none:1"})) as life:
            await life.until(lambda s: s.waiting in ("ErrImagePull", "ImagePullBackOff"))
            answer = await run(running, life, "true")
            assert answer.raw == {"http": 400, "text": 'container not found ("web")'}

    asyncio.run(scenario())


def test_a_client_that_leaves_takes_its_command_with_it(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("left")) as life:
            await life.until(lambda s: s.running)
            await run(running, life, "sh", "-c", "sleep 1234.5; true", leave=True)

            async def over() -> bool:
                return not host_pids("sleep 1234.5")

            assert await eventually(over)
            assert life.seen[-1].running, "and nothing else"

    asyncio.run(scenario())


def test_a_container_that_ends_ends_its_commands(running: Running) -> None:
    async def scenario() -> None:
        async with living(running, pod("ending", {"args": ["python3", "-c", "import time; time.sleep(3)"]})) as life:
            await life.until(lambda s: s.running)
            answer = await run(running, life, "sleep", "600")
            assert answer.status["details"]["causes"][0]["message"] == "137"

    asyncio.run(scenario())
