"""The nouns of a game day, frozen. Everything recorded is made of these, and nothing else is judged.

Instants are seconds of `gameday.clock`; durations are seconds; shares lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Literal


class Verdict(StrEnum):
    """Worst wins: ERROR > FAIL > INCONCLUSIVE > PASS. Only PASS is green."""

    PASS = "PASS"  # noqa: S105
    INCONCLUSIVE = "INCONCLUSIVE"
    FAIL = "FAIL"
    ERROR = "ERROR"

    @property
    def rank(self) -> int:
        return list(Verdict).index(self)

    @staticmethod
    def worst(verdicts: Iterable[Verdict]) -> Verdict:
        """The worst of them; of none at all it is INCONCLUSIVE."""
        return max(verdicts, key=lambda v: v.rank, default=Verdict.INCONCLUSIVE)


class Phase(StrEnum):
    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


class Outcome(StrEnum):
    """How one request ended. Only OK is good; SHED and CENSORED are neither good nor bad, but counted."""

    OK = "ok"
    HTTP_4XX = "http_4xx"
    HTTP_429 = "http_429"
    HTTP_5XX = "http_5xx"
    DNS = "dns"
    REFUSED = "refused"
    CONNECT_TIMEOUT = "connect_timeout"
    CONNECT_RESET = "connect_reset"
    CLOSED_BEFORE_HEADERS = "closed_before_headers"
    RESET_ON_REUSE = "reset_on_reuse"
    HEADER_TIMEOUT = "header_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # noqa: S105
    STALL = "stall"
    RESET_MID = "reset_mid"
    TRUNCATED = "truncated"  # the connection closed inside a chunk or event
    NO_DONE = "no_done"  # a clean end without `[DONE]`
    SSE_ERROR = "sse_error"
    DEADLINE = "deadline"
    TLS = "tls"
    BAD_ANSWER = "bad_answer"  # not HTTP, not SSE, not JSON
    CLIENT_SHED = "client_shed"  # we did not send it: our own limit
    CENSORED = "censored"  # we stopped before it ended


STREAM_BROKEN = frozenset(
    {Outcome.STALL, Outcome.RESET_MID, Outcome.TRUNCATED, Outcome.NO_DONE, Outcome.SSE_ERROR, Outcome.DEADLINE}
)
"""Outcomes of a stream that had begun and did not end properly (they count only when `t_first` is set)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One request, from the instant it was meant to be sent. None: that instant was never reached."""

    worker: int
    seq: int  # number in the plan, unique over all workers
    cls: str  # request class: "chat", "long", "canary", …
    t_intended: float
    t_end: float
    outcome: Outcome
    t_start: float | None = None
    t_dns: float | None = None
    t_conn: float | None = None
    t_sent: float | None = None
    t_headers: float | None = None
    t_first: float | None = None  # first content token
    t_last_progress: float | None = None  # last byte that carried something
    itl: tuple[float, ...] = ()  # gaps between tokens, seconds, rounded to 0.1 ms
    tokens: int = 0
    status: int | None = None
    finish_reason: str | None = None
    got_done: bool = False
    prompt_tokens: int | None = None  # as the server's usage says
    completion_tokens: int | None = None
    conn_reused: bool = False
    peer: str | None = None  # "ip:port" that we spoke to
    pod: str | None = None  # who answered, by the served-by header; None where there is none
    zone: str | None = None
    via: str | None = None  # the gateway pod through which it came, by its header
    detail: str = ""  # the error in words

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def counted(self) -> bool:
        """Whether it says anything about the service (a request that we shed or cut off does not)."""
        return self.outcome not in (Outcome.CLIENT_SHED, Outcome.CENSORED)

    @property
    def ttft(self) -> float | None:
        """First token after the *intended* send time, seconds."""
        return None if self.t_first is None else self.t_first - self.t_intended

    @property
    def latency(self) -> float:
        return self.t_end - self.t_intended


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of a Prometheus query. `value` None: no data; `error`: why there is none."""

    t: float
    query: str
    name: str
    value: float | None
    error: str = ""
    raw: str = ""  # the answer as it came (JSON), for the evidence
    told: float | None = None  # the answer's own time, Unix seconds by Prometheus' clock


# ── events.jsonl ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class PhaseMark:
    """A phase begins or ends."""

    kind: ClassVar[str] = "phase"
    t: float
    phase: Phase
    edge: Literal["start", "end"]


class Step(StrEnum):
    """What happens to a fault, in the order in which it happens."""

    LEDGER = "ledger"  # every undo is written
    APPLY = "apply"  # the first harmful request is about to be sent: the lower end of F
    INJECTED = "injected"  # the control proof: records Injected, count as expected
    EFFECT = "effect"  # the independent proof; repeated until the heal (ok=False: the effect was lost)
    UNDO = "undo"  # the first undo is about to be sent
    RECOVERED = "recovered"  # the control plane says that it is undone
    GONE = "gone"  # the effect is seen to be gone
    HEALED = "healed"  # nothing of the fault is left
    CLEAN = "clean"  # nothing of ours is left in the cluster


@dataclass(frozen=True, slots=True)
class FaultMark:
    kind: ClassVar[str] = "fault"
    t: float
    step: Step
    ok: bool
    what: str = ""  # which part of the fault ("partition", "pod-kill", "cordon"), or who proves it
    detail: str = ""
    since: float | None = None  # EFFECT: the last look at which it was not yet there (t is the first at which it was)


@dataclass(frozen=True, slots=True)
class PodMark:
    """A pod changed, as a watch saw it."""

    kind: ClassVar[str] = "pod"
    t: float
    pod: str
    uid: str
    stage: Literal["exists", "created", "scheduled", "started", "ready", "unready", "terminating", "gone", "restarted"]
    node: str = ""
    zone: str = ""
    owner: str = ""  # the workload's label value or owner's name
    target: bool = False  # the fault is aimed at it
    covered: bool = True  # False: born after the injection, the fault does not reach it
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EndpointMark:
    kind: ClassVar[str] = "endpoint"
    t: float
    service: str
    pod: str
    ready: bool
    serving: bool = True
    terminating: bool = False
    present: bool = True
    zone: str = ""
    target: bool = False


@dataclass(frozen=True, slots=True)
class NodeMark:
    kind: ClassVar[str] = "node"
    t: float
    node: str
    what: str  # "exists", "ready", "not ready", "cordoned", "uncordoned", "condition …", "gone", "created"
    zone: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class KubeEvent:
    kind: ClassVar[str] = "kube"
    t: float
    type: str
    reason: str
    object: str  # "Pod/my-llama32-…"
    message: str


@dataclass(frozen=True, slots=True)
class EvictionMark:
    """The Eviction API's answer to one request of ours; "refused": a disruption budget does not allow it now."""

    kind: ClassVar[str] = "eviction"
    t: float
    pod: str
    answer: Literal["accepted", "refused"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RecordMark:
    """A chaos resource's record changed."""

    kind: ClassVar[str] = "record"
    t: float
    resource: str  # "PodChaos/gd-…"
    id: str  # "ns/pod" or "ns/pod/container"
    phase: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One second of one load worker, by itself."""

    kind: ClassVar[str] = "heartbeat"
    t: float
    worker: int
    in_flight: int
    started: int  # totals since its start
    ok: int
    failed: int
    shed: int
    delay_p99: float  # schedule delay, seconds, in this second
    run_queue: float  # share of this second that it waited for a CPU, 0–1
    cpu: float  # share of this second on a CPU


@dataclass(frozen=True, slots=True)
class LoadEnd:
    """A load worker's account. planned = ok + failed + shed + censored, or the run is not sound."""

    kind: ClassVar[str] = "load_end"
    t: float
    worker: int
    planned: int  # arrivals of its share of the plan that were due before `t_stop`
    ok: int
    failed: int
    shed: int
    censored: int
    t_stop: float  # arrivals due from here on were called off


@dataclass(frozen=True, slots=True)
class Note:
    """Anything that a reader of the report should know; `level` "error" makes the verdict ERROR."""

    kind: ClassVar[str] = "note"
    t: float
    level: Literal["info", "warning", "inconclusive", "fail", "error"]
    text: str


Event = (
    PhaseMark
    | FaultMark
    | PodMark
    | EndpointMark
    | NodeMark
    | KubeEvent
    | EvictionMark
    | RecordMark
    | Heartbeat
    | LoadEnd
    | Note
)
EVENTS: Mapping[str, type] = {
    cls.kind: cls
    for cls in (
        PhaseMark,
        FaultMark,
        PodMark,
        EndpointMark,
        NodeMark,
        KubeEvent,
        EvictionMark,
        RecordMark,
        Heartbeat,
        LoadEnd,
        Note,
    )
}


# ── what was asked ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class FaultFacts:
    """What a judge must know of the fault that was chosen; filled in by the fault itself, before the harm."""

    name: str  # "zone outage"
    title: str  # "zone b is gone: 4 pods on 2 nodes"
    one_shot: bool  # it has no heal (a pod kill)
    lasting: float  # seconds from injection to the heal; for a one-shot, the observation window
    pods: tuple[str, ...]  # the targets, "ns/pod"
    nodes: tuple[str, ...] = ()
    zone: str = ""
    fidelity: tuple[str, ...] = ()  # what is real, what is emulated: one sentence each
    watched: tuple[str, ...] = ()  # parts whose effect lasts, and so must be seen to act right before the heal


@dataclass(frozen=True, slots=True)
class About:
    """run.json: who, what, when, against which cluster. The judge reads `scrape_interval` and `clocks`."""

    run: str
    experiment: str  # "zone_outage"
    seed: int
    trial: int
    epoch_wall: float
    epoch_mono: float
    cluster: str  # context name and server version, for people
    sandbox: bool
    clocks: str  # "compressed", "real", or "" outside the sandbox
    namespace: str
    target: str
    prometheus: str
    scrape_interval: float
    objectives_from: str  # "experiment" or the settings' name
    reproduce: str  # the command
    command: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


# ── what was found ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Finding:
    """One objective, judged. `observed`, `limit`, `low`, `high` are in `unit`; None: not measurable."""

    phase: Phase | Literal["run"]  # "run": the soundness of the run itself
    objective: str  # as people read it: "success ≥ 99 %"
    status: Verdict
    observed: float | None
    limit: float | None
    unit: str  # "share", "s", "count", "1/s", ""
    low: float | None = None
    high: float | None = None
    samples: int = 0
    evidence: str = ""  # a window, a query with its raw answer, the worst second


@dataclass(frozen=True, slots=True)
class Recovery:
    """R − F with its interval (seconds); None: no recovery was seen. Stages are seconds after F."""

    seconds: float | None
    low: float | None
    high: float | None
    stages: Mapping[str, float] = field(default_factory=dict)
    t_fault_low: float | None = None
    t_fault_high: float | None = None
    t_back: float | None = None
    story: str = ""


@dataclass(frozen=True, slots=True)
class Counts:
    planned: int = 0
    ok: int = 0
    failed: int = 0
    shed: int = 0
    censored: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """verdict.json."""

    experiment: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    recovery: Recovery | None
    counts: Counts
    seed: int
    target: str
    reproduce: str

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS


@dataclass(frozen=True, slots=True)
class Timeline:
    """All that was recorded of one experiment: the only thing that is ever judged."""

    about: About
    fault: FaultFacts
    replies: tuple[Reply, ...]
    samples: tuple[Sample, ...]
    events: tuple[Event, ...]
