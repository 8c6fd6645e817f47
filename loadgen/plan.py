"""The plan: every request of a run, fixed beforehand from a seed. Nothing that happens changes it."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson

from gameday.errors import LoadError
from loadgen import trace
from loadgen.traffic import Deadlines, Lengths, Stream, Trace, Traffic

MAX_ARRIVALS = 5_000_000
_GRID = 0.01  # seconds: how finely ramps are integrated


@dataclass(frozen=True, slots=True)
class Kind:
    """What all requests of one class have in common."""

    name: str
    api: str
    stream: bool
    deadlines: Deadlines
    prefix_tokens: int
    extra: str
    keep: bool = False  # keep the answers' text: later turns repeat it


@dataclass(frozen=True)
class Plan:
    """Columns of equal length, in order of time; a request's number is its index."""

    seed: int
    seconds: float
    traffic: Traffic
    t: tuple[float, ...]  # seconds after the begin
    cls: tuple[int, ...]  # index of the stream in the traffic
    prompt: tuple[int, ...]  # new prompt tokens
    output: tuple[int, ...]
    fresh: tuple[int, ...]  # 1: on a connection of its own
    session: tuple[int, ...]  # −1: none
    turn: tuple[int, ...]
    group: tuple[int, ...]  # shared-prefix group, −1: none

    def __len__(self) -> int:
        return len(self.t)

    @cached_property
    def classes(self) -> tuple[Kind, ...]:
        return tuple(kind_of(s, self.traffic.deadlines) for s in self.traffic.streams)

    def share(self, worker: int, workers: int) -> tuple[int, ...]:
        """The numbers that one of `workers` sends; a session stays together. The shares are disjoint and complete."""
        return tuple(i for i, s in enumerate(self.session) if (i if s < 0 else s) % workers == worker)

    def due_before(self, t: float) -> int:
        """How many arrivals are due before `t` seconds after the begin."""
        return bisect.bisect_left(self.t, t)

    def write(self, path: Path) -> None:
        columns = {name: getattr(self, name) for name in _COLUMNS}
        head = {"seed": self.seed, "seconds": self.seconds, "traffic": self.traffic.to_json()}
        path.write_bytes(orjson.dumps({**head, **columns}) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises LoadError for a plan that is missing, cut off or not ours."""
        try:
            data = orjson.loads(path.read_bytes())
            columns = {name: tuple(data[name]) for name in _COLUMNS}
            plan = cls(data["seed"], data["seconds"], Traffic.from_json(data["traffic"]), **columns)
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as e:
            raise LoadError(f"the plan {path} cannot be read: {e}") from e
        if len({len(c) for c in columns.values()}) != 1:
            raise LoadError(f"the plan {path} is damaged: its columns differ in length")
        return plan


_COLUMNS = ("t", "cls", "prompt", "output", "fresh", "session", "turn", "group")


def kind_of(stream: Stream | Trace, deadlines: Deadlines) -> Kind:
    prefix = stream.prefix_tokens if isinstance(stream, Stream) else 0
    keep = isinstance(stream, Stream) and stream.turns > 1 and stream.history == "answers"
    return Kind(stream.name, stream.api, stream.stream, stream.deadlines or deadlines, prefix, stream.extra, keep)


_Arrival = tuple[float, int, int, int, int, int, int, int]


def make(traffic: Traffic, seed: int, seconds: float) -> Plan:
    """Every stream draws from a generator of its own, so that changing one leaves the others as they were."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise LoadError(f"a plan needs a positive duration, not {seconds}")
    if seed < 0:
        raise LoadError(f"a seed cannot be negative: {seed}")
    arrivals: list[_Arrival] = []
    sessions = 0
    for index, stream in enumerate(traffic.streams):
        rng = np.random.default_rng([seed, index])
        if isinstance(stream, Trace):
            arrivals += _replay(stream, index, seconds)
        else:
            mine = _draw(stream, index, seconds, rng, sessions)
            sessions = max((a[5] + 1 for a in mine), default=sessions) if stream.turns > 1 else sessions
            arrivals += mine
    if not arrivals:
        raise LoadError(f"the plan is empty: no request is due within {seconds:g} s")
    arrivals.sort()
    columns = tuple(zip(*arrivals, strict=True))
    return Plan(seed, float(seconds), traffic, *columns)


def _draw(stream: Stream, index: int, seconds: float, rng: np.random.Generator, session: int) -> list[_Arrival]:
    starts = _times(stream, seconds, rng)
    turns = stream.turns
    if turns > 1:
        gaps = rng.exponential(stream.think, (len(starts), turns)) if stream.think else np.zeros((len(starts), turns))
        gaps[:, 0] = 0.0
        times = (starts[:, None] + np.cumsum(gaps, axis=1)).ravel()
    else:
        times = starts
    many = len(times)
    prompts = draw(stream.prompt, many, rng)
    outputs = draw(stream.output, many, rng)
    groups = rng.integers(stream.prefix_groups, size=len(starts)) if stream.prefix_groups else np.full(len(starts), -1)
    fresh = {"never": (0, 0), "always": (1, 1), "alternate": (1, 0)}[stream.fresh]
    return [
        (
            round(float(times[i]), 6),
            index,
            int(prompts[i]),
            int(outputs[i]),
            fresh[i % 2],
            session + i // turns if turns > 1 else -1,
            i % turns,
            int(groups[i // turns]),
        )
        for i in range(many)
        if times[i] < seconds
    ]


def _times(stream: Stream, seconds: float, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Arrival times in [0, seconds): a unit-rate process, stretched by the inverse of the cumulated rate."""
    rate = stream.per_second / stream.turns
    edges = [e for c in stream.changes for e in c.edges() if 0 < e < seconds]
    grid = np.unique(np.concatenate([np.arange(0.0, seconds, _GRID if edges else seconds), edges, [seconds]]))
    middle = (grid[:-1] + grid[1:]) / 2
    factor = np.ones(len(middle))
    for change in stream.changes:
        factor *= np.array([change.factor(float(m)) for m in middle])
    total = np.concatenate([[0.0], np.cumsum(rate * factor * np.diff(grid))])
    expected = float(total[-1])
    if expected > MAX_ARRIVALS:
        raise LoadError(
            f"stream {stream.name!r} would plan {expected:.0f} requests; at most {MAX_ARRIVALS} are possible"
        )
    unit = np.cumsum(_gaps(stream, expected, rng))
    unit = unit[unit < expected]
    # Where the rate is 0 the cumulated rate is flat; interp then takes the far end, which is where the load resumes.
    return np.asarray(np.interp(unit, total, grid), dtype=np.float64)


def _gaps(stream: Stream, expected: float, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Gaps with mean 1, surely more than `expected` in sum."""
    if stream.arrivals == "constant":
        gaps = np.ones(math.ceil(expected) + 1)
        gaps[0] = rng.uniform(0.0, 1.0)  # a phase of its own, so that constant streams do not fire together
        return gaps
    cv = stream.burstiness if stream.arrivals == "gamma" else 1.0
    shape = 1.0 / cv**2
    parts: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    sum_ = 0.0
    while sum_ <= expected:
        parts.append(rng.gamma(shape, 1.0 / shape, math.ceil(expected * 1.1) + 16))
        sum_ += float(parts[-1].sum())
    return np.concatenate(parts)


def draw(lengths: Lengths, many: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Token counts from a distribution, whole and within its bounds."""
    if lengths.shape == "uniform":
        return rng.integers(lengths.low, lengths.high + 1, many).astype(np.float64)
    if lengths.shape == "normal":
        raw = rng.normal(lengths.mean, lengths.spread, many)
    elif lengths.shape == "lognormal":
        raw = lengths.mean * np.exp(lengths.spread * rng.standard_normal(many))
    else:
        raw = np.full(many, lengths.mean)
    return np.asarray(np.clip(np.rint(raw), lengths.low, lengths.high), dtype=np.float64)


def _replay(spec: Trace, index: int, seconds: float) -> list[_Arrival]:
    rows = trace.read(Path(spec.path))
    length = rows[-1].t
    if spec.offset > length:
        raise LoadError(f"the trace {spec.path} is {length:.0f} s long, its offset of {spec.offset:g} s lies behind it")
    arrivals: list[_Arrival] = []
    for row in rows:
        t = (row.t - spec.offset) / spec.speed_up
        if t < 0:
            continue
        if t >= seconds or len(arrivals) >= spec.cap:
            break
        prompt = min(max(row.context, 1), spec.prompt_max)
        output = min(max(row.generated, 1), spec.output_max)
        arrivals.append((round(t, 6), index, prompt, output, 0, -1, 0, -1))
    return arrivals
