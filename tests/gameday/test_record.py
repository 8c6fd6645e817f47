"""The run directory: what goes in comes out, and nothing that was tampered with is judged."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from planted import ABOUT, FAULT, Plant, between

from gameday import record
from gameday.errors import ExperimentError, RecordError
from gameday.judge import judge
from gameday.model import Heartbeat, LoadEnd, Note, Sample, Timeline
from gameday.objectives import FirstToken, NothingLeftBehind, Objectives, Recovers, Success

ASKED = Objectives((Success(0.999),), (FirstToken(p95=2.5),), (Recovers(within=10.0), NothingLeftBehind()))


def write(directory: Path, timeline: Timeline) -> Path:
    """Record a timeline as the harness and one load worker would."""
    recorder = record.Recorder(directory)
    record.write_run(directory, timeline.about, timeline.fault, ASKED, {"per_second": 20})
    with (directory / "load.0.jsonl").open("wb") as load:
        for e in timeline.events:
            if isinstance(e, Heartbeat | LoadEnd):
                load.write(orjson.dumps({"kind": e.kind, **record.plain(e)}) + b"\n")
            else:
                recorder.event(e)
    for s in timeline.samples:
        recorder.sample(s)
    recorder.close()
    lines = b"".join(orjson.dumps(record.plain(r)) + b"\n" for r in timeline.replies)
    (directory / "replies.0.jsonl").write_bytes(lines)
    (directory / "plan.json").write_text("{}")
    return directory


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    samples = [Sample(100.0, "up", "up", float("nan")), Sample(101.0, "up", "up", None, "HTTP 500")]
    directory = write(tmp_path / "zone_outage", Plant(between(100.2, 104.7), poisson=5, samples=samples).build())
    record.seal(directory)
    return directory


def test_what_was_recorded_comes_back(tmp_path: Path) -> None:
    timeline = Plant(between(100.2, 104.7), poisson=5, samples=[Sample(100.0, "up", "up", 1.0)]).build()
    directory = write(tmp_path / "run", timeline)
    record.seal(directory)
    loaded, objectives = record.load(directory)
    assert loaded == timeline
    assert objectives == ASKED


def test_nan_survives_the_file(sealed: Path) -> None:
    timeline, _ = record.load(sealed)
    assert str(timeline.samples[0].value) == "nan"
    assert timeline.samples[1].value is None
    assert timeline.samples[1].error == "HTTP 500"


def test_judging_again_makes_the_same_bytes(sealed: Path) -> None:
    first = record.write_verdict(sealed, judge(*record.load(sealed))).read_bytes()
    again = record.write_verdict(sealed, judge(*record.load(sealed))).read_bytes()
    assert first == again
    verdict = json.loads(first)
    assert set(verdict) == {
        "experiment", "verdict", "findings", "recovery", "counts", "seed", "target", "reproduce"
    }  # fmt: skip
    assert set(verdict["findings"][0]) == {
        "phase", "objective", "status", "observed", "limit", "unit", "low", "high", "samples", "evidence"
    }  # fmt: skip
    assert record.read_verdict(sealed) == judge(*record.load(sealed))


def cut_short(directory: Path) -> None:
    path = directory / "replies.0.jsonl"
    path.write_bytes(path.read_bytes()[:-7])


def edit(directory: Path) -> None:
    path = directory / "replies.0.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"refused"', b'"ok"', 1))


def edit_run(directory: Path) -> None:
    path = directory / "run.json"
    path.write_bytes(path.read_bytes().replace(b'"within": 10.0', b'"within": 99.0'))


def add(directory: Path) -> None:
    (directory / "replies.9.jsonl").write_text("")


def remove(directory: Path) -> None:
    (directory / "samples.jsonl").unlink()


def unseal(directory: Path) -> None:
    (directory / "seal.json").unlink()


def damage(directory: Path) -> None:
    path = directory / "seal.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"samples.jsonl": {"sha256": "0"}}))


def replace_seal(directory: Path) -> None:
    path = directory / "seal.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"samples.jsonl": 7}))


@pytest.mark.parametrize(
    ("tamper", "place"),
    [
        (cut_short, "replies.0.jsonl was changed"),
        (edit, "replies.0.jsonl was changed"),
        (edit_run, "run.json was changed"),
        (add, "replies.9.jsonl was added"),
        (remove, "samples.jsonl is missing"),
        (unseal, "has no seal.json"),
        (damage, "samples.jsonl was changed"),
        (replace_seal, "samples.jsonl was changed"),
    ],
)
def test_a_tampered_directory_is_refused_with_the_place(
    sealed: Path, tamper: Callable[[Path], None], place: str
) -> None:
    record.load(sealed)
    tamper(sealed)
    with pytest.raises(RecordError, match=place):
        record.load(sealed)


def test_the_verdict_and_the_report_are_not_sealed(sealed: Path) -> None:
    (sealed / "verdict.json").write_text("{}")
    (sealed / "report.html").write_text("<html>")
    record.load(sealed)


@pytest.mark.parametrize(
    ("line", "place"),
    [
        (b'{"t": 1.0', r"samples.jsonl:3: the last line is cut short"),
        (b'{"t": 1.0\n', r"samples.jsonl:3: not JSON"),
        (b"[]\n", r"samples.jsonl:3: a JSON object is expected"),
        (b'{"t": 1.0, "query": "up"}\n', r"samples.jsonl:3: Sample needs a field 'name'"),
        (b'{"t": "1", "query": "up", "name": "up"}\n', r"samples.jsonl:3: t: '1' is not a valid value"),
        (b'{"t": 1, "query": "up", "name": "up", "x": 2}\n', r"samples.jsonl:3: Sample has no field 'x'"),
    ],
)
def test_a_bad_line_is_named(sealed: Path, line: bytes, place: str) -> None:
    with (sealed / "samples.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(RecordError, match=place):
        record.load(sealed, sealed=False)


def test_an_unknown_outcome_or_event_is_refused(sealed: Path) -> None:
    path = sealed / "replies.0.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"refused"', b'"splendid"', 1))
    with pytest.raises(RecordError, match=r"replies\.0\.jsonl:\d+: outcome: 'splendid'"):
        record.load(sealed, sealed=False)
    path = sealed / "events.jsonl"
    path.write_bytes(b'{"kind": "wish", "t": 1}\n' + path.read_bytes())
    path.with_name("replies.0.jsonl").write_bytes(b"")
    with pytest.raises(RecordError, match=r"events\.jsonl:1: no such kind of event: 'wish'"):
        record.load(sealed, sealed=False)


def test_an_objective_that_does_not_exist_is_refused(sealed: Path) -> None:
    path = sealed / "run.json"
    path.write_bytes(path.read_bytes().replace(b'"Success"', b'"Sucess"'))
    with pytest.raises(ExperimentError, match="Sucess"):
        record.load(sealed, sealed=False)


def test_threads_append_whole_lines(tmp_path: Path) -> None:
    recorder = record.Recorder(tmp_path)

    def write_many(k: int) -> None:
        for i in range(200):
            recorder.event(Note(float(i), "info", f"{k}-{i} " + "x" * 500))

    threads = [threading.Thread(target=write_many, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    recorder.close()
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert len(lines) == 800
    assert len({orjson.loads(line)["text"] for line in lines}) == 800


def test_a_record_is_never_written_over_another(sealed: Path) -> None:
    """Two runs of one name: appended to one another, they would be judged as one."""
    before = (sealed / "events.jsonl").read_bytes()
    with pytest.raises(RecordError, match="holds the record of another run"):
        record.Recorder(sealed)
    assert (sealed / "events.jsonl").read_bytes() == before


def test_a_closed_record_takes_nothing_more(tmp_path: Path) -> None:
    recorder = record.Recorder(tmp_path)
    recorder.close()
    with pytest.raises(RecordError, match="closed"):
        recorder.event(Note(1.0, "info", "late"))


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not a run directory"):
        record.load(tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"run\.json is missing"):
        record.load(tmp_path, sealed=False)


def test_run_json_is_complete(tmp_path: Path) -> None:
    record.write_run(tmp_path, ABOUT, FAULT, ASKED, {"per_second": 20})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["about"]["seed"] == 7419
    assert run["fault"]["pods"] == ["llm/engine-b"]
    assert run["objectives"]["after"][0]["type"] == "Recovers"
    assert run["traffic"] == {"per_second": 20}
