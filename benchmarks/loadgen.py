"""What the load generator is worth: `python benchmarks/loadgen.py [--seconds 8] [--streams 300]`.

The server stamps every first token on the clock that clients use, so errors are against a truth. Client on one
core, server on the other. Stock Locust users and an aiohttp reader run the same streams beside ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import aiohttp
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this file's own folder would hide the package of the same name

from gameday import clock  # noqa: E402
from gameday.model import Heartbeat, Outcome  # noqa: E402
from loadgen import launch, records, sound  # noqa: E402
from loadgen.plan import make  # noqa: E402
from loadgen.traffic import Deadlines, Stream, Traffic, fixed  # noqa: E402

TOKENS, ITL = 64, 0.02
_ID = re.compile(rb"(\d+)-(\d+) ")


# ── the server ──────────────────────────────────────────────────────────────────────────────────

_TOKEN = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'  # noqa: E501
_LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Engine(asyncio.Protocol):
    """Streams `max_tokens` tokens, ITL apart; writes "request, instant of the first token" to `truth`."""

    truth: dict[bytes, float] = {}  # noqa: RUF012 - one for the process

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._to = cast(asyncio.Transport, transport)
        self._buf = b""
        self._token = _chunk(_TOKEN)

    def data_received(self, data: bytes) -> None:
        self._buf += data
        head, blank, body = self._buf.partition(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if not blank or found is None or len(body) < int(found[1]):
            return
        self._buf = b""
        ident = _ID.search(body)
        assert ident is not None
        wanted = re.search(rb'"max_tokens": ?(\d+)', body)
        assert wanted is not None
        self._name, self._left = ident[0].strip(), int(wanted[1])
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        self._to.write(head)
        self._due = time.monotonic() + ITL
        asyncio.get_running_loop().call_later(ITL, self._step)

    def _step(self) -> None:
        if self._to.is_closing():
            return
        if self._left:
            Engine.truth.setdefault(self._name, time.monotonic())
            self._to.write(self._token)
            self._left -= 1
            self._due += ITL
            asyncio.get_running_loop().call_later(max(0.0, self._due - time.monotonic()), self._step)
        else:
            self._to.write(_chunk(_LAST) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Engine, "127.0.0.1", 0, backlog=2048)
    done = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, done.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    await done.wait()


@contextmanager
def server(truth: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, __file__, "--serve", str(truth)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        assert process.stdout is not None
        try:
            yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
            process.wait(10)


# ── the clients: each gives (request, first token) pairs, streams ended, CPU seconds ─────────────


@dataclass(frozen=True, slots=True)
class Seen:
    firsts: dict[str, float]
    ended: int
    cpu: float
    delay_p99: float | None = None
    run_queue: float = 0.0


def _body(client: int, n: int) -> dict[str, object]:
    message = {"role": "user", "content": f"{client}-{n} please go on"}
    return {"model": "m", "messages": [message], "max_tokens": TOKENS, "stream": True}


def ours(url: str, streams: int, seconds: float, out: Path) -> Seen:

    rate = streams / (TOKENS * ITL)
    stream = Stream(name="chat", per_second=rate, prompt=fixed(8), output=fixed(TOKENS))
    plan = make(Traffic(streams=(stream,)), 1, seconds)
    plan.write(out / "plan.json")
    load = launch.start(out / "plan.json", target=url, model="m", out=out)
    os.sched_setaffinity(load._procs[0].process.pid, {min(os.sched_getaffinity(0))})
    begin = clock.now() + 0.2
    load.begin(begin)
    beats: list[Heartbeat] = []

    def over() -> bool:
        beats.extend(load.poll().beats)
        return clock.now() > begin + seconds

    clock.wait_until(over, within=seconds + 30, what="the plan's end")
    load.stop(within=10)
    replies = [*records.Follower(out / "replies.0.jsonl").replies()]
    steady = [b for b in beats if b.t > begin + 2.5]
    cpu = sum(b.cpu for b in steady) / len(steady)
    ended = sum(begin + 2.5 < r.t_end <= begin + seconds for r in replies if r.ok)
    delays = sorted((r.t_start or r.t_end) - r.t_intended for r in replies)
    return Seen(
        {f"1-{r.seq}": r.t_first for r in replies if r.t_first},
        ended,
        cpu * (seconds - 2.5),
        delays[int(0.99 * len(delays))],
        max(b.run_queue for b in steady),
    )


_STOCK = """
import json, time, itertools, resource, atexit
from locust import HttpUser, FastHttpUser, task, constant_throughput
count = itertools.count(); seen = []; starts = []; ended = []; took = []
class Stock({base}):
    {wait}
    network_timeout = connection_timeout = 60.0
    @task
    def ask(self):
        n = next(count); first = None; t0 = time.monotonic(); starts.append(t0)
        said = {{"role": "user", "content": f"2-{{n}} please go on"}}
        body = {{"model": "m", "messages": [said], "max_tokens": {tokens}, "stream": True}}
{ask}
        seen.append((f"2-{{n}}", first)); ended.append(time.monotonic()); took.append(ended[-1] - t0)
def save():
    use = resource.getrusage(resource.RUSAGE_SELF)
    json.dump({{"firsts": dict(seen), "starts": starts, "ended": ended, "took": took,
               "cpu": use.ru_utime + use.ru_stime}}, open({out!r}, "w"))
atexit.register(save)
"""


_ASK = {
    "FastHttpUser": """
        for line in self.client.iter_lines("/v1/chat/completions", method="POST", json=body):
            if first is None and line:
                first = time.monotonic()
""",
    "HttpUser": """
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as r:
            for line in r.iter_lines():
                if first is None and line:
                    first = time.monotonic()
            r.success()
""",
}


def _stock(base: str, url: str, users: int, seconds: float, out: Path, *, wait: str = "", tokens: int = TOKENS) -> Path:
    file, result = out / f"stock_{base.lower()}.py", out / f"{base}.json"
    file.write_text(_STOCK.format(base=base, wait=wait or "pass", out=str(result), tokens=tokens, ask=_ASK[base]))
    command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "-u", str(users), "-r", str(users)]
    command += ["-t", f"{seconds:.0f}s", "--host", url, "--exit-code-on-error", "0", "--only-summary", "-s", "10"]
    with (out / f"{base}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        process.wait(seconds + 60)
    return result


def stock(base: str, url: str, streams: int, seconds: float, out: Path) -> Seen:
    data = json.loads(_stock(base, url, streams, seconds, out).read_text())
    firsts = {k: v for k, v in data["firsts"].items() if v}
    return Seen(firsts, len(data["ended"]), data["cpu"] - 1.2)  # Locust itself takes about 1.2 s to start


async def _aiohttp(url: str, streams: int, seconds: float) -> Seen:

    firsts: dict[str, float] = {}
    ended, number = 0, 0
    until = time.monotonic() + seconds

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal ended, number
        while time.monotonic() < until:
            number += 1
            name = f"3-{number}"
            async with session.post(f"{url}/v1/chat/completions", json=_body(3, number)) as response:
                async for _ in response.content:
                    firsts.setdefault(name, time.monotonic())
            ended += 1

    before = resource.getrusage(resource.RUSAGE_SELF)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session) for _ in range(streams)))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Seen(firsts, ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def by_aiohttp(url: str, streams: int, seconds: float, _: Path) -> Seen:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        return asyncio.run(_aiohttp(url, streams, seconds))
    finally:
        os.sched_setaffinity(0, mine)


# ── figures ─────────────────────────────────────────────────────────────────────────────────────


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))] if values else float("nan")


def accuracy(streams: int, seconds: float) -> None:
    print(f"{streams} streams of {TOKENS} tokens, {ITL * 1000:.0f} ms apart   (TTFT error = client − server's stamp)")
    print(f"  {'client':<28}{'p50 ms':>9}{'p99 ms':>9}{'µs/token':>10}{'streams/s/core':>16}{'delay p99':>11}")
    clients = {
        "gameday": ours,
        "Locust FastHttpUser": lambda *a: stock("FastHttpUser", *a),
        "Locust HttpUser": lambda *a: stock("HttpUser", *a),
        "aiohttp reader": by_aiohttp,
    }
    for name, client in clients.items():
        with tempfile.TemporaryDirectory() as tmp:
            truth = Path(tmp) / "truth.json"
            with server(truth) as (_, url):
                seen = client(url, streams, seconds, Path(tmp))
            stamps = json.loads(truth.read_text())
        errors = [1000 * (t - stamps[k]) for k, t in seen.firsts.items() if k in stamps]
        per_token = 1e6 * seen.cpu / max(1, seen.ended * TOKENS)
        delay = "" if seen.delay_p99 is None else f"{1000 * seen.delay_p99:8.2f} ms"
        figures = f"{quantile(errors, 0.5):9.2f}{quantile(errors, 0.99):9.2f}{per_token:10.1f}"
        print(
            f"  {name:<28}{figures}{seen.ended / max(seen.cpu, 1e-9):16.0f}{delay:>11}  n={len(errors)}"
            + (f"  run-queue wait ≤ {seen.run_queue:.1%}" if seen.delay_p99 is not None else "")
            + ("  NOT SOUND: others use this machine" if seen.run_queue > sound.RUN_QUEUE else "")
        )


def _freeze(process: subprocess.Popen[str], at: float) -> tuple[float, float]:

    clock.pause(at - clock.now())
    process.send_signal(signal.SIGSTOP)
    t0 = clock.now()
    clock.pause(5.0)
    process.send_signal(signal.SIGCONT)
    return t0, clock.now()


def freeze() -> None:
    """100 requests/s against a server that stands still for 5 s: what does each client see of it?"""

    print("a 5 s freeze at 100 requests/s")
    with tempfile.TemporaryDirectory() as tmp, server(Path(tmp) / "truth") as (process, url):
        out = Path(tmp)
        stream = Stream(name="chat", per_second=100, prompt=fixed(8), output=fixed(1), arrivals="constant")
        make(Traffic(streams=(stream,), deadlines=Deadlines(first_token=15)), 1, 12).write(out / "plan.json")
        load = launch.start(out / "plan.json", target=url, model="m", out=out)
        begin = clock.now() + 0.2
        load.begin(begin)
        t0, t1 = _freeze(process, begin + 3)
        clock.pause(begin + 12 - clock.now())
        load.stop(within=15)
        replies = [*records.Follower(out / "replies.0.jsonl").replies()]
        during = sum(t0 <= r.t_intended < t1 for r in replies)
        base = quantile([r.latency for r in replies if r.t_intended < t0 - 0.1], 0.5)
        truth = quantile([base + max(0.0, t1 - r.t_intended if r.t_intended >= t0 else 0.0) for r in replies], 0.99)
        latencies = [r.latency for r in replies]
        seen = quantile(latencies, 0.99)
        print(
            f"  gameday              {during} arrivals in the freeze, p99 {seen:.3f} s, "
            f"analytic {truth:.3f} s ({100 * (seen / truth - 1):+.2f} %), p95 {quantile(latencies, 0.95):.3f} s"
        )
    with tempfile.TemporaryDirectory() as tmp, server(Path(tmp) / "truth") as (process, url):
        spans: list[tuple[float, float]] = []
        thread = threading.Thread(target=lambda: spans.append(_freeze(process, clock.now() + 6)))
        thread.start()
        wait = "wait_time = constant_throughput(5)"
        data = json.loads(_stock("FastHttpUser", url, 20, 15, Path(tmp), wait=wait, tokens=1).read_text())
        thread.join()
        t0, t1 = spans[0]
        during = sum(t0 <= t < t1 for t in data["starts"])
        took = data["took"]
        print(
            f"  stock closed loop    {during} arrivals in the freeze, p99 {quantile(took, 0.99):.3f} s, "
            f"p95 {quantile(took, 0.95):.3f} s"
        )


def million() -> None:
    """1 M records written by the engine's own code and read back; memory must not grow with them."""

    from loadgen.client import Call  # noqa: PLC0415 - gevent is not for the other parts
    from loadgen.engine import line  # noqa: PLC0415

    call = Call(0, "chat", 1000.0, t_start=1000.0001, t_first=1000.1, itl=[0.02] * 63, tokens=64, got_done=True)
    call.end(Outcome.OK, at=1001.4)
    with tempfile.TemporaryDirectory() as tmp:
        writer = records.Writer(Path(tmp) / "replies.0.jsonl")
        before, t0 = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        for seq in range(1_000_000):
            call.seq = seq
            writer.add(line(call, 0))
            if seq % 1000 == 999:
                writer.flush()
        writer.close()
        t1, size = time.monotonic(), (Path(tmp) / "replies.0.jsonl").stat().st_size
        total = sum(r.seq for r in records.Follower(Path(tmp) / "replies.0.jsonl").replies())
        t2, after = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert total == 999_999 * 1_000_000 // 2
    print(
        f"1 M records: {size / 1e6:.0f} MB, written at {t1 - t0:.1f} µs each, read at {t2 - t1:.1f} µs each, "
        f"memory +{(after - before) / 1024:.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--only", choices=["accuracy", "freeze", "records"])
    choice = parser.parse_args()
    if choice.serve:
        uvloop.run(_serve())
        choice.serve.write_text(json.dumps({k.decode(): v for k, v in Engine.truth.items()}))
        return
    if choice.only in (None, "accuracy"):
        accuracy(choice.streams, choice.seconds)
    if choice.only in (None, "freeze"):
        freeze()
    if choice.only in (None, "records"):
        million()


if __name__ == "__main__":
    main()
