"""The run directory: what was recorded of one experiment, and nothing that was concluded from it.

`run.json` who and what · `plan.json` the load · `replies.*.jsonl`, `load.*.jsonl` by the load workers ·
`samples.jsonl`, `events.jsonl` by the harness · `seal.json` size and SHA-256 of all of them, written last.
A directory that is cut short, edited or not sealed is refused with the place (`RecordError`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from functools import cache
from io import BufferedWriter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import orjson

from gameday.errors import RecordError
from gameday.model import EVENTS, About, Event, FaultFacts, Judgement, Reply, Sample, Timeline
from gameday.objectives import Objectives

T = TypeVar("T")

DERIVED = frozenset({"verdict.json", "report.html", "seal.json"})
"""Files that are computed from the record, and so are not part of what is sealed."""
SEAL = "seal.json"


class Recorder:
    """Appends events and samples; every line is on its way to the disk when the call returns. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:  # never appended to: two runs in one record would be judged as one
            self._events = (directory / "events.jsonl").open("xb")
            self._samples = (directory / "samples.jsonl").open("xb")
        except FileExistsError as taken:
            raise RecordError(
                f"{directory} holds the record of another run: choose another name for this one"
            ) from taken

    def event(self, event: Event) -> None:
        self._append(self._events, {"kind": event.kind, **plain(event)})

    def sample(self, sample: Sample) -> None:
        self._append(self._samples, plain(sample))

    def _append(self, file: BufferedWriter, line: Mapping[str, Any]) -> None:
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        with self._lock:
            if file.closed:
                raise RecordError("the record is closed: an event came after its end")
            file.write(data)
            file.flush()

    def close(self) -> None:
        with self._lock:
            self._events.close()
            self._samples.close()


def plain(value: Any) -> Any:
    """A dataclass, with all that is in it, as JSON values; fields that hold None are left out.

    NaN and infinities, which JSON does not have, become the strings "nan", "inf" and "-inf".
    """
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(v) for f in fields(value) if (v := getattr(value, f.name)) is not None}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not -_INF < value < _INF:
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


_INF = float("inf")


def write_run(
    directory: Path, about: About, fault: FaultFacts, objectives: Objectives, traffic_json: Mapping[str, Any]
) -> None:
    """Write run.json (again, when more is known: the versions, the fault's targets)."""
    directory.mkdir(parents=True, exist_ok=True)
    run = {
        "about": plain(about),
        "fault": plain(fault),
        "objectives": objectives.to_json(),
        "traffic": dict(traffic_json),
    }
    _write(directory / "run.json", run)


def _write(path: Path, value: Any) -> None:
    """Canonical bytes: keys sorted, two spaces, a newline at the end; replaced at once, never half-written."""
    option = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    part = path.with_name(path.name + ".part")
    part.write_bytes(orjson.dumps(value, option=option))
    part.replace(path)


def write_verdict(directory: Path, judgement: Judgement) -> Path:
    """verdict.json; the same judgement always makes the same bytes."""
    path = directory / "verdict.json"
    _write(path, verdict_json(judgement))
    return path


def verdict_json(judgement: Judgement) -> dict[str, Any]:
    """DESIGN 4's verdict: every finding has all its keys, null where a value could not be measured."""
    findings = [{f.name: plain(getattr(x, f.name)) for f in fields(x)} for x in judgement.findings]
    recovery = judgement.recovery
    return {
        **plain(judgement),
        "findings": findings,
        "recovery": None if recovery is None else {f.name: plain(getattr(recovery, f.name)) for f in fields(recovery)},
    }


def read_verdict(directory: Path) -> Judgement:
    """What `write_verdict` wrote."""
    path = directory / "verdict.json"
    return build(Judgement, _read_json(path), str(path.name))


# ── the seal ────────────────────────────────────────────────────────────────────────────────────


def _recorded(directory: Path) -> list[Path]:
    files = (p for p in directory.rglob("*") if p.is_file() and not p.name.endswith(".part"))
    return sorted(p for p in files if p.relative_to(directory).as_posix() not in DERIVED)


def _digest(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def seal(directory: Path) -> None:
    """Write seal.json; what is recorded must not change from here on."""
    _write(directory / SEAL, {p.relative_to(directory).as_posix(): _digest(p) for p in _recorded(directory)})


def check_seal(directory: Path) -> None:
    """Refuse a directory that is not as it was sealed, naming the first file that differs."""
    path = directory / SEAL
    if not path.exists():
        raise RecordError(f"{directory} has no {SEAL}: its run did not end properly, so it cannot be judged")
    sealed = _read_json(path)
    found = {p.relative_to(directory).as_posix(): p for p in _recorded(directory)}
    for name in sorted(sealed.keys() | found.keys()):
        if name not in found:
            raise RecordError(f"{directory / name} is missing: the run directory is incomplete")
        if name not in sealed:
            raise RecordError(f"{found[name]} was added after the run directory was sealed")
        was, now = sealed[name], _digest(found[name])
        if was != now:
            old = was.get("size") if isinstance(was, dict) else None
            size = f", its size was {old} and is {now['size']} bytes" if old != now["size"] else ""
            raise RecordError(f"{found[name]} was changed after the run directory was sealed{size}")


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


def load(directory: Path, *, sealed: bool = True) -> tuple[Timeline, Objectives]:
    """The record as it can be judged, sorted by time. `sealed=False` looks at a run that has not ended."""
    if not directory.is_dir():
        raise RecordError(f"{directory} is not a run directory")
    if sealed:
        check_seal(directory)
    run = _read_json(directory / "run.json")
    for key in ("about", "fault", "objectives"):
        if key not in run:
            raise RecordError(f"{directory / 'run.json'} has no {key!r}")
    about = build(About, run["about"], "run.json: about")
    fault = build(FaultFacts, run["fault"], "run.json: fault")
    objectives = Objectives.from_json(run["objectives"])
    replies = [
        build(Reply, line, at) for path in sorted(directory.glob("replies.*.jsonl")) for line, at in _lines(path)
    ]
    samples = [build(Sample, line, at) for line, at in _lines(directory / "samples.jsonl")]
    events = [
        _event(line, at)
        for path in (directory / "events.jsonl", *sorted(directory.glob("load.*.jsonl")))
        for line, at in _lines(path)
    ]
    return timeline(about, fault, replies, samples, events), objectives


def timeline(
    about: About, fault: FaultFacts, replies: list[Reply], samples: list[Sample], events: list[Event]
) -> Timeline:
    """Put the record into its one order, whatever order it came in."""
    return Timeline(
        about,
        fault,
        tuple(sorted(replies, key=lambda r: (r.t_intended, r.seq, r.worker))),
        tuple(sorted(samples, key=lambda s: (s.t, s.name, s.query))),
        tuple(sorted(events, key=lambda e: (e.t, e.kind, orjson.dumps(plain(e), option=orjson.OPT_SORT_KEYS)))),
    )


def _event(line: dict[str, Any], at: str) -> Event:
    kind = line.pop("kind", None)
    if kind not in EVENTS:
        raise RecordError(f"{at}: no such kind of event: {kind!r}")
    event: Event = build(EVENTS[kind], line, at)
    return event


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RecordError(f"{path} is missing") from error
    except orjson.JSONDecodeError as error:
        raise RecordError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path}: a JSON object is expected")
    return value


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if not path.exists():
        raise RecordError(f"{path} is missing")
    number = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            at = f"{path}:{number}"
            if not data.endswith(b"\n"):
                raise RecordError(f"{at}: the last line is cut short")
            try:
                value = orjson.loads(data)
            except orjson.JSONDecodeError as error:
                raise RecordError(f"{at}: not JSON: {error}") from error
            if not isinstance(value, dict):
                raise RecordError(f"{at}: a JSON object is expected")
            yield value, at


# ── dataclasses from JSON, strictly ─────────────────────────────────────────────────────────────


@cache
def _shape(cls: Any) -> tuple[dict[str, Any], frozenset[str]]:
    hints = get_type_hints(cls)
    shape = {f.name: hints[f.name] for f in fields(cls)}
    needed = frozenset(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
    return shape, needed


def build(cls: type[T], line: Any, at: str) -> T:
    """Make a `cls` of a JSON object; unknown keys, missing keys and wrong types are refused with the place."""
    if not isinstance(line, dict):
        raise RecordError(f"{at}: a JSON object is expected for {cls.__name__}")
    kind: Any = cls  # as a key of the cache
    shape, needed = _shape(kind)
    values: dict[str, Any] = {}
    for name, value in line.items():
        if name not in shape:
            raise RecordError(f"{at}: {cls.__name__} has no field {name!r}")
        if value is None and name not in needed:
            if NoneType in get_args(shape[name]):
                values[name] = None
            continue
        values[name] = _value(shape[name], value, f"{at}: {name}")
    if not needed <= values.keys():
        # Fields that may be None are left out when they are.
        for name in needed - values.keys():
            if NoneType not in get_args(shape[name]):
                raise RecordError(f"{at}: {cls.__name__} needs a field {name!r}")
            values[name] = None
    return cls(**values)


def _value(hint: Any, value: Any, at: str) -> Any:  # noqa: PLR0911  # one return per kind of type reads best
    if hint is float and value in ("nan", "inf", "-inf"):
        return float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], v, at) for v in value)
    if origin is Literal and value in args:
        return value
    if isinstance(hint, type) and issubclass(hint, Enum):
        if value in {member.value for member in hint}:
            return hint(value)
    elif hasattr(hint, "__dataclass_fields__"):
        return build(hint, value, at)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {str(k): _value(args[1], v, at) for k, v in value.items()}
    if origin is UnionType or str(origin) == "typing.Union":
        return _union(args, value, at)
    raise RecordError(f"{at}: {value!r} is not a valid value")


def _union(args: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and NoneType in args:
        return None
    error = RecordError(f"{at}: {value!r} is not a valid value")
    for arg in args:
        if arg is NoneType:
            continue
        try:
            return _value(arg, value, at)
        except RecordError as refused:
            error = refused
    raise error
