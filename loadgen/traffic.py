"""Who uses the service, and how: traffic specs, frozen, with a JSON round trip.

    Chat(per_second=20)                      what experiments write
    Traffic(streams=(Stream(…), Trace(…)))   the general thing

A spec that contradicts itself raises `LoadError` when it is built, so that it fails at collection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gameday.errors import LoadError
from gameday.units import Seconds

Arrivals = Literal["poisson", "constant", "gamma"]
Api = Literal["chat", "completions"]
Fresh = Literal["never", "always", "alternate"]
History = Literal["planned", "answers"]


def _need(good: bool, sentence: str) -> None:
    if not good:
        raise LoadError(sentence)


def _finite(value: float) -> bool:
    return math.isfinite(value) and value >= 0


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts, cut to [low, high].

    `fixed`: always `mean`; `uniform` over [low, high]; `normal(mean, spread)`;
    `lognormal` with median `mean` and shape `spread` (σ of the logarithm), as prompt lengths have it.
    """

    mean: float
    spread: float = 0.0
    low: int = 1
    high: int = 1_000_000
    shape: Literal["fixed", "uniform", "normal", "lognormal"] = "fixed"

    def __post_init__(self) -> None:
        _need(self.shape in ("fixed", "uniform", "normal", "lognormal"), f"unknown length distribution {self.shape!r}")
        _need(_finite(self.mean) and _finite(self.spread), f"token lengths must be finite and not negative: {self}")
        _need(1 <= self.low <= self.high, f"token lengths need 1 ≤ low ≤ high, not {self.low} … {self.high}")
        if self.shape != "uniform":
            _need(self.low <= self.mean <= self.high, f"a mean of {self.mean} lies outside {self.low} … {self.high}")


def fixed(tokens: int) -> Lengths:
    return Lengths(tokens)


def uniform(low: int, high: int) -> Lengths:
    return Lengths((low + high) / 2, low=low, high=high, shape="uniform")


def normal(mean: float, spread: float, *, low: int = 1, high: int = 1_000_000) -> Lengths:
    return Lengths(mean, spread, low, high, "normal")


def lognormal(median: float, spread: float, *, low: int = 1, high: int = 1_000_000) -> Lengths:
    return Lengths(median, spread, low, high, "lognormal")


@dataclass(frozen=True, slots=True)
class Ramp:
    """From `at` on the rate goes linearly to `times` its value over `over` seconds, and stays there."""

    at: Seconds
    over: Seconds
    times: float

    def __post_init__(self) -> None:
        _need(_finite(self.at) and _finite(self.over) and _finite(self.times), f"a ramp cannot be negative: {self}")

    def factor(self, t: float) -> float:
        if t <= self.at:
            return 1.0
        done = 1.0 if t >= self.at + self.over else (t - self.at) / self.over
        return 1.0 + (self.times - 1.0) * done

    def edges(self) -> tuple[float, ...]:
        return (self.at, self.at + self.over)


@dataclass(frozen=True, slots=True)
class Spike:
    """For `lasting` seconds from `at` the rate is `times` its value."""

    at: Seconds
    lasting: Seconds
    times: float

    def __post_init__(self) -> None:
        _need(_finite(self.at) and _finite(self.lasting) and _finite(self.times), f"a spike cannot be negative: {self}")

    def factor(self, t: float) -> float:
        return self.times if self.at <= t < self.at + self.lasting else 1.0

    def edges(self) -> tuple[float, ...]:
        return (self.at, self.at + self.lasting)


Change = Ramp | Spike

_PLANNED = {"model", "messages", "prompt", "max_tokens", "stream", "stream_options"}


def _check_extra(who: str, extra: str) -> None:
    """What goes into every body as well must be an object, and leave alone what the plan says."""
    if not extra:
        return
    try:
        data = json.loads(extra)
    except ValueError:
        data = None
    _need(isinstance(data, dict), f"{who}: extra is not a JSON object: {extra[:60]!r}")
    taken = sorted(_PLANNED & set(data))
    _need(not taken, f"{who}: extra must not say {', '.join(taken)}: the plan does")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds after which the client gives up. `total` spans all the others.

    `first_token` counts from the start of the request, `stall` from the last token.
    """

    dns: Seconds = 1.0
    connect: Seconds = 2.0
    first_token: Seconds = 5.0
    stall: Seconds = 2.0
    total: Seconds = 30.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            _need(math.isfinite(value) and value > 0, f"the {each.name} deadline must be positive, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One class of requests with arrivals of its own. `burstiness` is the gaps' coefficient of variation (gamma).

    With `turns` > 1, arrivals come as sessions of that many turns, `think` seconds apart, each turn with the
    talk so far before it; `per_second` still counts requests. The answers in that talk are the plan's, or with
    `history="answers"` the server's own, where they had come in time (the plan's where not: arrivals never wait).
    Requests of one of `prefix_groups` share their first `prefix_tokens` tokens.
    """

    name: str
    per_second: float
    prompt: Lengths
    output: Lengths
    arrivals: Arrivals = "poisson"
    burstiness: float = 1.0
    changes: tuple[Change, ...] = ()
    api: Api = "chat"
    stream: bool = True
    fresh: Fresh = "never"
    prefix_groups: int = 0
    prefix_tokens: int = 0
    turns: int = 1
    think: Seconds = 5.0
    history: History = "planned"
    deadlines: Deadlines | None = None
    extra: str = ""  # a JSON object, merged into every request's body ('{"ignore_eos": true}')

    def __post_init__(self) -> None:
        who = f"stream {self.name!r}"
        _need(bool(self.name), "a stream needs a name")
        _need(_finite(self.per_second), f"{who}: a rate cannot be negative or infinite: {self.per_second}")
        _need(self.arrivals in get_args(Arrivals), f"{who}: unknown arrivals {self.arrivals!r}")
        _need(self.api in get_args(Api), f"{who}: unknown API {self.api!r}, it is chat or completions")
        _need(self.fresh in get_args(Fresh), f"{who}: fresh is never, always or alternate, not {self.fresh!r}")
        _need(
            math.isfinite(self.burstiness) and self.burstiness > 0,
            f"{who}: burstiness must be positive, not {self.burstiness}",
        )
        _need(self.prefix_groups >= 0 and self.prefix_tokens >= 0, f"{who}: prefixes cannot be negative")
        _need(
            (self.prefix_groups > 0) == (self.prefix_tokens > 0),
            f"{who}: prefix_groups and prefix_tokens go together",
        )
        _need(self.turns >= 1 and _finite(self.think), f"{who}: turns must be ≥ 1 and think ≥ 0")
        _need(self.turns == 1 or self.api == "chat", f"{who}: only the chat API has turns")
        _need(self.history in get_args(History), f"{who}: history is planned or answers, not {self.history!r}")
        _check_extra(who, self.extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Replay of a CSV with the columns TIMESTAMP,ContextTokens,GeneratedTokens (the Azure LLM traces have it).

    Starts `offset` seconds into the trace and plays it `speed_up` times as fast; at most `cap` requests.
    Lengths are cut to `prompt_max` and `output_max`, for engines with a smaller context than the trace's.
    """

    path: str
    name: str = "trace"
    speed_up: float = 1.0
    offset: Seconds = 0.0
    cap: int = 1_000_000
    prompt_max: int = 1_000_000
    output_max: int = 1_000_000
    api: Api = "chat"
    stream: bool = True
    deadlines: Deadlines | None = None
    extra: str = ""

    def __post_init__(self) -> None:
        _need(bool(self.path), "a trace needs the path of its CSV")
        _need(math.isfinite(self.speed_up) and self.speed_up > 0, f"speed_up must be positive, not {self.speed_up}")
        _need(_finite(self.offset), f"a trace's offset cannot be negative: {self.offset}")
        _need(self.api in get_args(Api), f"trace {self.name!r}: unknown API {self.api!r}, it is chat or completions")
        _check_extra(f"trace {self.name!r}", self.extra)
        _need(self.cap >= 1 and self.prompt_max >= 1 and self.output_max >= 1, "a trace's caps must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Everything that is sent. A request that finds `in_flight_max` under way is not sent: it is shed, and counted."""

    streams: tuple[Stream | Trace, ...]
    deadlines: Deadlines = field(default_factory=Deadlines)
    in_flight_max: int = 2000
    usage: bool = True  # ask for the server's token counts (`stream_options.include_usage`)

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> dict[str, object]:
        """A JSON object that `from_json` turns back into an equal spec."""
        encoded = _encode(self)
        assert isinstance(encoded, dict)
        return encoded

    @staticmethod
    def from_json(data: Mapping[str, object] | str | bytes) -> Traffic:
        """Raises LoadError for what is not a traffic spec."""
        try:
            plain = json.loads(data) if isinstance(data, str | bytes) else data
        except ValueError as e:
            raise LoadError(f"the traffic spec is not JSON: {e}") from e
        decoded = _decode(plain)
        if not isinstance(decoded, Traffic):
            raise LoadError(f"not a traffic spec: {str(plain)[:80]}")
        return decoded


def _check(traffic: Traffic) -> None:
    _need(bool(traffic.streams), "traffic needs at least one stream")
    names = [s.name for s in traffic.streams]
    _need(len(set(names)) == len(names), f"streams need names of their own: {', '.join(names)}")
    _need(traffic.in_flight_max >= 1, "in_flight_max must be at least 1")
    rates = [s.per_second for s in traffic.streams if isinstance(s, Stream)]
    _need(any(rates) or len(rates) < len(names), "traffic without a single request: every rate is 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Traffic):
    """Chat users: a main stream, `long_share` of it as long answers that straddle every fault, and a canary.

    The canary is tiny (one token), constant, and alternates between fresh and kept-alive connections: it
    resolves a recovery to 1/canary_per_second.
    """

    per_second: float
    prompt_tokens: Lengths | int = Lengths(120, 0.6, 8, 2000, "lognormal")
    output_tokens: Lengths | int = Lengths(48, 0.5, 4, 400, "lognormal")
    arrivals: Arrivals = "poisson"
    burstiness: float = 1.0
    changes: tuple[Change, ...] = ()
    long_share: float = 0.08
    long_tokens: Lengths | int = 320
    canary_per_second: float = 50.0
    api: Api = "chat"
    stream: bool = True
    prefix_groups: int = 0
    prefix_tokens: int = 0
    turns: int = 1
    think: Seconds = 5.0
    history: History = "planned"
    extra: str = ""
    streams: tuple[Stream | Trace, ...] = field(init=False)

    def __post_init__(self) -> None:
        _need(_finite(self.per_second), f"per_second cannot be negative or infinite: {self.per_second}")
        _need(0 <= self.long_share < 1, f"long_share lies in [0, 1), not {self.long_share}")
        object.__setattr__(self, "streams", tuple(s for s in _chat_streams(self) if s.per_second != 0))
        _check(self)


def _chat_streams(chat: Chat) -> tuple[Stream, ...]:
    def lengths(value: Lengths | int) -> Lengths:
        return value if isinstance(value, Lengths) else fixed(value)

    def users(name: str, per_second: float, output: Lengths | int, turns: int) -> Stream:
        return Stream(
            name=name,
            per_second=per_second,
            prompt=lengths(chat.prompt_tokens),
            output=lengths(output),
            arrivals=chat.arrivals,
            burstiness=chat.burstiness,
            changes=chat.changes,
            api=chat.api,
            stream=chat.stream,
            prefix_groups=chat.prefix_groups,
            prefix_tokens=chat.prefix_tokens,
            turns=turns,
            think=chat.think,
            history=chat.history,
            extra=chat.extra,
        )

    canary = Stream(
        name="canary",
        per_second=chat.canary_per_second,
        prompt=fixed(4),
        output=fixed(1),
        arrivals="constant",
        api=chat.api,
        stream=chat.stream,
        fresh="alternate",
        extra=chat.extra,
    )
    return (
        users(chat.api, chat.per_second * (1 - chat.long_share), chat.output_tokens, chat.turns),
        users("long", chat.per_second * chat.long_share, chat.long_tokens, 1),
        canary,
    )


# ── JSON: every spec carries its type's name ────────────────────────────────────────────────────

_TYPES: Mapping[str, type] = {c.__name__: c for c in (Lengths, Ramp, Spike, Deadlines, Stream, Trace, Traffic, Chat)}


def _encode(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        mine = {f.name: _encode(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"type": type(value).__name__, **mine}
    return [_encode(v) for v in value] if isinstance(value, tuple) else value


def _fits(value: object, hint: Any) -> bool:
    """Whether a decoded value has the type that its field names."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str)  # which one is the spec's own check
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, args[0]) for one in value)
    if args:  # a union
        return any(_fits(value, one) for one in args)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)


def _decode(value: object) -> object:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, Mapping):
        return value
    name = value.get("type")
    cls = _TYPES.get(str(name))
    if cls is None:
        raise LoadError(f"unknown traffic type {name!r}, known are {', '.join(_TYPES)}")
    known = {f.name for f in fields(cls) if f.init}
    unknown = sorted(set(value) - known - {"type"})
    _need(not unknown, f"{name} has no field {', '.join(unknown)}")
    given = {k: _decode(v) for k, v in value.items() if k != "type"}
    hints = get_type_hints(cls)
    for field_, one in given.items():
        _need(_fits(one, hints[field_]), f"{name} in the traffic spec: {field_} cannot be {str(one)[:60]!r}")
    try:
        return cls(**given)
    except TypeError as e:
        raise LoadError(f"{name} in the traffic spec is malformed: {e}") from e
