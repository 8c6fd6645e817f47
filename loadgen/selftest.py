"""`gameday load selftest`: a server fails in every way, and the client must name each, with the right time.

The servers run here, in threads; the client runs in a process of its own, as it does under load.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gameday.errors import LoadError
from gameday.model import Outcome, Reply
from loadgen import misbehave
from loadgen.launch import first_on_cpu
from loadgen.records import reply_of
from loadgen.traffic import Deadlines

LIMITS = Deadlines(dns=1.0, connect=0.5, first_token=0.8, stall=0.6, total=3.0)
TOLERANCE = 0.1
"""Seconds between the truth and the record: generous, as a busy machine runs this; a wrong limit is off by more."""
REPEATS = 2

Server = misbehave.Failing | misbehave.Full | misbehave.Nobody
_Truth = Callable[[Reply, float | None], float | None]


@dataclass(frozen=True, slots=True)
class Case:
    """`truth` tells when the reply ends in truth, from its own start and from the instant the server stamped."""

    name: str
    make: Callable[[], Server]
    outcome: Outcome
    truth: _Truth
    tokens: int | None = 0  # None: as many as fit into the time


def _failing(way: Callable[[misbehave.Failing, socket.socket], None]) -> Callable[[], Server]:
    return lambda: misbehave.Failing(way)


def _stamped(_: Reply, at: float | None) -> float | None:
    return at


def _started(limit: float) -> _Truth:
    return lambda reply, _: None if reply.t_start is None else reply.t_start + limit


def _stalled(_: Reply, at: float | None) -> float | None:
    return None if at is None else at - misbehave.GAP + LIMITS.stall


THIRTEEN = (
    Case("refused", misbehave.Nobody, Outcome.REFUSED, _started(0)),
    Case("black hole", misbehave.Full, Outcome.CONNECT_TIMEOUT, _started(LIMITS.connect)),
    Case("no response", _failing(misbehave.silent), Outcome.HEADER_TIMEOUT, _started(LIMITS.first_token)),
    Case("early reset", _failing(misbehave.early_reset), Outcome.CONNECT_RESET, _stamped),
    Case("RST in mid-stream", _failing(misbehave.mid_reset), Outcome.RESET_MID, _stamped, 3),
    Case("FIN in mid-stream", _failing(misbehave.mid_close), Outcome.TRUNCATED, _stamped, 3),
    Case("half a chunk", _failing(misbehave.half_chunk), Outcome.TRUNCATED, _stamped, 3),
    Case("stall", _failing(misbehave.stall), Outcome.STALL, _stalled, 3),
    Case("clean end without [DONE]", _failing(misbehave.no_done), Outcome.NO_DONE, _stamped, 3),
    Case("error event", _failing(misbehave.sse_error), Outcome.SSE_ERROR, _stamped, 3),
    Case("drip", _failing(misbehave.drip), Outcome.DEADLINE, _started(LIMITS.total), None),
    Case("429", _failing(misbehave.too_many), Outcome.HTTP_429, _stamped),
    Case("503", _failing(misbehave.unavailable), Outcome.HTTP_5XX, _stamped),
)
MORE = (
    Case("a good stream", _failing(misbehave.good), Outcome.OK, _stamped, 3),
    Case("early close", _failing(misbehave.early_close), Outcome.CLOSED_BEFORE_HEADERS, _stamped),
    Case("headers only", _failing(misbehave.headers_only), Outcome.FIRST_TOKEN_TIMEOUT, _started(LIMITS.first_token)),
    Case("not HTTP", _failing(misbehave.not_http), Outcome.BAD_ANSWER, _stamped),
    Case("reset on a kept connection", _failing(misbehave.once), Outcome.RESET_ON_REUSE, _stamped),
)


def run(say: Callable[[str], None]) -> int:
    """Exit code 0 when every case is named and timed rightly. Raises LoadError when the client does not come back."""
    cases = THIRTEEN + MORE
    found = _try(cases)
    for _ in range(REPEATS):  # a busy machine delays anybody once; a wrong limit is wrong every time
        late = tuple(case for case in cases if found[case.name].late and not found[case.name].wrong)
        if late:
            say(f"asked again, as the machine seems busy: {', '.join(case.name for case in late)}")
            found |= _try(late)
    for case in cases:
        say(found[case.name].line)
    right = [found[case.name].right for case in cases]
    of = len(THIRTEEN)
    say(f"{sum(right[:of])} of {of} ways to fail classified, {sum(right[of:])} of {len(MORE)} further checks")
    return 0 if all(right) else 1


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a case."""

    line: str
    wrong: bool
    late: bool

    @property
    def right(self) -> bool:
        return not (self.wrong or self.late)


def _try(cases: Sequence[Case]) -> dict[str, Found]:
    servers = [case.make() for case in cases]
    try:
        replies = _ask({case.name: server.port for case, server in zip(cases, servers, strict=True)})
    finally:
        for server in servers:
            server.close()
    return {case.name: _check(case, replies[case.name], s.at) for case, s in zip(cases, servers, strict=True)}


def _check(case: Case, reply: Reply, at: float | None) -> Found:
    truth = case.truth(reply, at)
    wrong: list[str] = []
    if reply.outcome is not case.outcome:
        wrong.append(f"is {reply.outcome} ({reply.detail}), should be {case.outcome}")
    if case.tokens not in (reply.tokens, None):
        wrong.append(f"has {reply.tokens} tokens, should have {case.tokens}")
    if truth is None:
        wrong.append("never happened on the server")
    late = truth is not None and abs(reply.t_end - truth) > TOLERANCE
    off = "" if truth is None else f"{1000 * (reply.t_end - truth):+6.1f} ms"
    told = [*wrong, *([f"ends {off.strip()} from the truth"] if late else [])]
    line = f"{'FAIL' if told else 'ok  '}  {case.name:<28} {reply.outcome:<22} {off}  {'; '.join(told)}".rstrip()
    return Found(line, bool(wrong), late)


def _ask(ports: Mapping[str, int]) -> dict[str, Reply]:
    command = [sys.executable, "-m", "loadgen.selftest", json.dumps(ports)]
    root = Path(__file__).resolve().parent.parent
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=root, start_new_session=True) as client:
        first_on_cpu(client.pid)
        try:
            said, wrong = client.communicate(timeout=60)
        except subprocess.TimeoutExpired as e:
            client.kill()
            raise LoadError("the self-test's client did not come back within 60 s: a deadline was not kept") from e
    if client.returncode:
        raise LoadError(f"the self-test's client failed: {wrong.strip()[-300:]}")
    return {name: reply_of(data) for name, data in json.loads(said).items()}


def _client(ports: Mapping[str, int]) -> dict[str, object]:
    """In the client's process: ask all servers at once."""
    import gevent  # noqa: PLC0415 - never in the caller's process

    from loadgen import target  # noqa: PLC0415
    from loadgen.client import Call, Client  # noqa: PLC0415
    from loadgen.engine import line  # noqa: PLC0415
    from loadgen.plan import Kind  # noqa: PLC0415

    kind = Kind("selftest", "chat", True, LIMITS, 0, "")
    body = b'{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":3,"stream":true}'

    def ask(port: int, times: int) -> object:
        client = Client(target.parse(f"http://127.0.0.1:{port}", "m"))
        for seq in range(times):
            call = Call(seq, kind.name, time.monotonic())
            client.perform(call, kind, body, fresh=False)
        client.close()
        return json.loads(line(call, 0))

    twice = "reset on a kept connection"
    greenlets = {name: gevent.spawn(ask, port, 2 if name == twice else 1) for name, port in ports.items()}
    return {name: greenlet.get() for name, greenlet in greenlets.items()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_client(json.loads(sys.argv[1]))))
