"""A run directory that looks like a real one: a zone goes, streams break, latency rises, pods leave and come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import orjson

from gameday import record
from gameday.judge import judge
from gameday.model import (
    About,
    EndpointMark,
    Event,
    FaultFacts,
    FaultMark,
    Heartbeat,
    Judgement,
    KubeEvent,
    LoadEnd,
    NodeMark,
    Note,
    Outcome,
    Phase,
    PhaseMark,
    PodMark,
    RecordMark,
    Reply,
    Sample,
    Step,
    Timeline,
)
from gameday.objectives import FirstToken, NothingLeftBehind, Objectives, Promql, Recovers, Success, UnbrokenStreams

Stage = Literal["exists", "created", "scheduled", "started", "ready", "unready", "terminating", "gone", "restarted"]

START = 5000.0  # monotonic
F = START + 30.0
UNDO = F + 40.0
END = UNDO + 30.0
BACK = F + 3.2  # the gateway has ejected the lost zone
EVIL = "</script><script>alert('pod')</script><img src=x onerror=alert(1)>"

ABOUT = About(
    run="20261124-090000-7419",
    experiment="zone_outage",
    seed=7419,
    trial=1,
    epoch_wall=1_795_510_000.0,
    epoch_mono=START,
    cluster="gameday-sandbox v1.32",
    sandbox=True,
    clocks="compressed",
    namespace="llm",
    target="http://10.77.0.2:8080",
    prometheus="http://127.0.0.1:9090",
    scrape_interval=1.0,
    objectives_from="experiment",
    reproduce="pytest experiments -k zone_outage --seed 7419",
    command=("pytest", "experiments", "-k", "zone_outage", "--seed", "7419"),
    versions={"gameday": "0.1.0", "python": "3.11.2", "locust": "2.47.0", "prometheus": "2.42.0"},
    settings={"replacements": "elsewhere"},
)
ZONES = ("a", "b", "c")


def engine(zone: str, i: int) -> str:
    return f"my-llama32-7d9c5b6f4-{zone}{i}x{'qzk'[i]}2"


LOST = tuple(f"llm/{engine('b', i)}" for i in range(2))
FAULT = FaultFacts(
    name="zone outage",
    title="zone b is gone: 2 engines and 1 gateway on 2 nodes",
    one_shot=False,
    lasting=40.0,
    pods=LOST,
    nodes=("node-b1", "node-b2"),
    zone="b",
    fidelity=(
        "Real: the packets of zone b's pods are dropped, and its processes get SIGKILL.",
        "Emulated: the nodes' machines go on running; GPUs are fake devices.",
    ),
)
UP = Promql("sum(up{job='engine'})", at_least=1, name="engines up")
OBJECTIVES = Objectives(
    before=(Success(at_least=0.99), FirstToken(p95=1.0)),
    during=(
        Success(at_least=0.95),
        FirstToken(p95=1.5),
        UnbrokenStreams(except_on="targets"),
        UP,
    ),
    after=(Recovers(within=20.0, hold=10.0, at_least=0.98), NothingLeftBehind()),
)


def replies(seed: int = 7419, detail: str = "") -> Iterator[Reply]:
    """20 chats and 50 canaries a second for 100 s; those that meet zone b after F suffer until the ejection."""
    rng = random.Random(seed)
    t, seq = START, 0
    while t < END:
        t += rng.expovariate(70.0)
        cls = "chat" if rng.random() < 2 / 7 else "canary"
        yield _reply(rng, seq, t, cls, detail)
        seq += 1


def _reply(rng: random.Random, seq: int, t: float, cls: str, detail: str) -> Reply:
    lost_now = F <= t < BACK
    zone = rng.choice(ZONES if t < F or t > UNDO + 12 or lost_now else ("a", "c"))
    pod = f"llm/{engine(zone, rng.randrange(2))}"
    if t > F + 12 and zone != "b" and rng.random() < 0.2:
        pod = "llm/my-llama32-7d9c5b6f4-n0w11"
    slow = 1.0 if t < F or t > F + 25 else 1 + 5 * (1 - (t - F) / 25)
    ttft = (0.18 if cls == "chat" else 0.02) * slow * rng.lognormvariate(0, 0.35)
    length = ttft + (rng.uniform(1.5, 6.0) if cls == "chat" else 0.01)
    whole = Reply(
        worker=0,
        seq=seq,
        cls=cls,
        t_intended=t,
        t_start=t + 0.0004,
        t_sent=t + 0.001,
        t_headers=t + ttft * 0.9,
        t_first=t + ttft,
        t_end=t + length,
        outcome=Outcome.OK,
        tokens=20,
        status=200,
        finish_reason="stop",
        got_done=True,
        peer="10.77.0.2:8080",
        pod=pod,
        zone=zone,
    )
    if zone == "b" and t < F < t + length:
        return replace(
            whole, t_end=F + rng.uniform(0.01, 0.3), outcome=Outcome.RESET_MID, finish_reason=None, got_done=False,
            detail=detail or "connection reset by peer",
        )  # fmt: skip
    if zone == "b" and lost_now:
        outcome = rng.choice((Outcome.HTTP_5XX, Outcome.HEADER_TIMEOUT, Outcome.CONNECT_TIMEOUT))
        return replace(
            whole, t_first=None, t_headers=None, t_end=t + rng.uniform(0.3, 2.0), outcome=outcome, status=None,
            finish_reason=None, got_done=False, pod=None, zone=None, detail=detail or f"zone b: {outcome}",
        )  # fmt: skip
    if t + length > END + 3:
        return replace(
            whole,
            t_end=END + 3,
            t_last_progress=END + 2.9,
            outcome=Outcome.CENSORED,
            finish_reason=None,
            got_done=False,
        )
    return whole


def events(pod_detail: str = "") -> Iterator[Event]:
    for phase, start, end in ((Phase.BEFORE, START, F), (Phase.DURING, F, UNDO), (Phase.AFTER, UNDO, END)):
        yield PhaseMark(start, phase, "start")
        yield PhaseMark(end, phase, "end")
    yield from _fault_marks()
    yield from _pods(pod_detail)
    for i in (1, 2):
        yield NodeMark(START, f"node-b{i}", "exists", "b")
        yield NodeMark(START, f"node-b{i}", "ready", "b")
        yield NodeMark(F + 0.05, f"node-b{i}", "cordoned", "b")
        yield NodeMark(F + 8.1, f"node-b{i}", "not ready", "b", "NodeStatusUnknown")
        yield NodeMark(UNDO + 2.2, f"node-b{i}", "ready", "b")
        yield NodeMark(UNDO + 2.6, f"node-b{i}", "uncordoned", "b")
    for i, pod in enumerate(LOST):
        yield RecordMark(F + 0.2 + i / 10, "NetworkChaos/gd-7419-cut", pod, "Injected")
        yield RecordMark(UNDO + 1.1 + i / 10, "NetworkChaos/gd-7419-cut", pod, "Not Injected")
        yield EndpointMark(F + 1.9 + i / 5, "my-llama32", pod, False, zone="b", target=True)
        yield KubeEvent(F + 2.0 + i, "Warning", "Unhealthy", f"Pod/{pod[4:]}", "Readiness probe failed: timeout")
    yield KubeEvent(F + 6, "Normal", "Scheduled", "Pod/my-llama32-7d9c5b6f4-n0w11", "Successfully assigned")


def _fault_marks() -> Iterator[Event]:
    for what in ("cordon", "partition", "pod-kill"):
        yield FaultMark(F - 0.5, Step.LEDGER, True, what)
    yield FaultMark(F, Step.APPLY, True, "cordon")
    yield FaultMark(F + 0.1, Step.APPLY, True, "partition")
    for what in ("partition", "pod-kill"):
        yield FaultMark(F + 0.4, Step.INJECTED, True, what)
        for second in range(40):
            yield FaultMark(F + 0.5 + second, Step.EFFECT, True, what, "packets are dropped", since=F + 0.3)
    yield FaultMark(UNDO, Step.UNDO, True, "partition")
    for what in ("partition", "pod-kill", "cordon"):
        yield FaultMark(UNDO + 1.0, Step.RECOVERED, True, what)
        yield FaultMark(UNDO + 1.5, Step.GONE, True, what)
        yield FaultMark(UNDO + 2.0, Step.HEALED, True, what)
    yield FaultMark(END + 4, Step.CLEAN, True, "cluster", "nothing of ours is left")


def _pods(detail: str) -> Iterator[Event]:
    def mark(t: float, pod: str, stage: Stage, zone: str, *, owner: str = "my-llama32") -> Event:
        target = f"llm/{pod}" in LOST
        return PodMark(t, f"llm/{pod}", f"uid-{pod}", stage, f"node-{zone}1", zone, owner, target, detail=detail)

    for zone in ZONES:
        for i in range(2):
            yield mark(START, engine(zone, i), "exists", zone)
            yield mark(START, engine(zone, i), "ready", zone)
            yield EndpointMark(START, "my-llama32", f"llm/{engine(zone, i)}", True, zone=zone)
        yield mark(START, f"gateway-5f6b7-{zone}9k2p", "exists", zone, owner="gateway")
        yield mark(START, f"gateway-5f6b7-{zone}9k2p", "ready", zone, owner="gateway")
    for i in range(2):
        yield mark(F + 1.8 + i / 5, engine("b", i), "unready", "b")
        yield mark(F + 5.5 + i / 5, engine("b", i), "terminating", "b")
        yield mark(F + 9.0 + i / 5, engine("b", i), "gone", "b")
        new = f"my-llama32-7d9c5b6f4-n{i}w11"
        steps: tuple[tuple[float, Stage], ...] = (
            (5.6, "created"),
            (6.1, "scheduled"),
            (7.3, "started"),
            (14.2 + i, "ready"),
        )
        for after, stage in steps:
            yield mark(F + after + i / 10, new, stage, "ac"[i])
        yield EndpointMark(F + 14.3 + i, "my-llama32", f"llm/{new}", True, zone="ac"[i])
    yield Note(UNDO, "info", "spread again is not checked: nothing was rescheduled into zone b")


@cache
def timeline(*, seed: int = 7419, evil: bool = False) -> Timeline:
    text = EVIL if evil else ""
    about = replace(ABOUT, seed=seed, reproduce=f"pytest -k '{text}'" if evil else ABOUT.reproduce)
    fault = replace(
        FAULT, title=text or FAULT.title, name=text or FAULT.name, fidelity=(text,) if evil else FAULT.fidelity
    )
    seen = list(replies(seed, text))
    happened = [*events(text), *_load(seen)]
    samples = [_sample(START + i, 6.0 if i < 32 else 4.0) for i in range(100)]
    samples += [Sample(START + i, UP.age, f"age of {UP.name}", 0.4) for i in range(100)]
    samples += [Sample(START + i, "ALERTS", "alert EngineDown", float(36 <= i < 50)) for i in range(100)]
    if evil:
        happened += [
            PodMark(START, f"llm/{text}", "u", "exists", text, text, text, detail=text),
            PodMark(START + 5, f"llm/{text}", "u", "ready", text, text, text, detail=text),
            KubeEvent(F, "Warning", text, text, text),
        ]
        seen[100] = replace(seen[100], pod=text, zone=text, cls=text)
        wall = ABOUT.epoch_wall - ABOUT.epoch_mono
        samples = [replace(s, raw=text, error="", told=wall + s.t) for s in samples]
    return record.timeline(about, fault, seen, samples, happened)


def broken() -> Timeline:
    """FAIL: a third of the requests fails until the heal, and only that brings the service back."""
    made = timeline()
    struck = (F, UNDO + 0.5)
    seen = [
        replace(r, outcome=Outcome.CONNECT_TIMEOUT, t_first=None, t_headers=None, t_end=r.t_intended + 1.0,
                status=None, finish_reason=None, got_done=False, pod=None, zone=None, detail="connect: timed out")
        if struck[0] <= r.t_intended < struck[1] and r.seq % 3 == 0 and r.counted else r
        for r in made.replies
    ]  # fmt: skip
    happened = [e for e in made.events if not isinstance(e, LoadEnd | Heartbeat)]
    return record.timeline(made.about, made.fault, seen, list(made.samples), [*happened, *_load(seen)])


def accounted(made: Timeline) -> Timeline:
    """With the load generator's account as it would be of these replies."""
    rest = [e for e in made.events if not isinstance(e, LoadEnd | Heartbeat)]
    return record.timeline(
        made.about, made.fault, list(made.replies), list(made.samples), [*rest, *_load(list(made.replies))]
    )


def unproven() -> Timeline:
    """INCONCLUSIVE: nobody saw the fault act."""
    made = timeline()
    return replace(made, events=tuple(e for e in made.events if not (isinstance(e, FaultMark) and e.step == "effect")))


def dirty() -> Timeline:
    """ERROR: a chaos resource could not be removed."""
    made = timeline()
    left = FaultMark(END + 5, Step.CLEAN, False, "cluster", "NetworkChaos/gd-7419-cut is left: kubectl delete it")
    return replace(made, events=(*made.events, left))


def blind() -> Timeline:
    """INCONCLUSIVE: Prometheus did not answer for a while."""
    made = timeline()
    samples = [
        replace(s, value=None, raw="", error="timeout after 3 s") if F + 10 < s.t < F + 20 else s for s in made.samples
    ]
    return replace(made, samples=tuple(samples))


def _sample(t: float, value: float) -> Sample:
    """As Prometheus answers: the instant in Unix seconds, the value as a string."""
    wall = ABOUT.epoch_wall + t - ABOUT.epoch_mono
    raw = f'[{{"metric": {{}}, "value": [{wall:.3f}, "{value:g}"]}}]'
    return Sample(t, "sum(up{job='engine'})", "engines up", value, raw=raw)


def _load(seen: list[Reply]) -> Iterator[Event]:
    for i in range(int(END - START)):
        yield Heartbeat(START + i, 0, 30, i * 70, i * 70, 0, 0, 0.0008, 0.002, 0.4)
    censored = sum(r.outcome is Outcome.CENSORED for r in seen)
    ok = sum(r.ok for r in seen)
    yield LoadEnd(END + 3, 0, len(seen), ok, len(seen) - ok - censored, 0, censored, END)


def judged(made: Timeline) -> Judgement:
    return judge(made, OBJECTIVES)


@cache
def judgement() -> Judgement:
    """Of the plain timeline."""
    return judged(timeline())


def write(run_dir: Path, made: Timeline) -> Path:
    """The whole run directory, as the harness leaves it: sealed and judged."""
    recorder = record.Recorder(run_dir)
    for sample in made.samples:
        recorder.sample(sample)
    for event in made.events:
        if not isinstance(event, (Heartbeat, LoadEnd)):
            recorder.event(event)
    recorder.close()
    _lines(run_dir / "replies.0.jsonl", [record.plain(r) for r in made.replies])
    load = [e for e in made.events if isinstance(e, (Heartbeat, LoadEnd))]
    _lines(run_dir / "load.0.jsonl", [{"kind": e.kind, **record.plain(e)} for e in load])
    record.write_run(run_dir, made.about, made.fault, OBJECTIVES, {"type": "Chat", "per_second": 20})
    (run_dir / "manifests").mkdir(exist_ok=True)
    manifest = "apiVersion: chaos-mesh.org/v1alpha1\nkind: NetworkChaos\nmetadata:\n  name: gd-7419-cut\n"
    (run_dir / "manifests" / "01-networkchaos.yaml").write_text(manifest + f"# {made.fault.title}\n", encoding="utf-8")
    record.seal(run_dir)
    record.write_verdict(run_dir, judged(made))
    return run_dir


def _lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
