"""The release gate: verdicts close it, so does growth beyond measured noise; what it cannot compare it says."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import synthetic

from gameday import record
from gameday.errors import RecordError
from gameday.model import LoadEnd, Outcome, Reply, Sample, Timeline, Verdict
from reports.gate import CERTAINTY, Gate, gate, history, measure, student

DAY = 86400.0
NOISE = (1.0, 1.02, 0.99, 1.01, 0.98)  # how much slower the first tokens of five usual runs are


def run(
    base: Path,
    day: int,
    *,
    slower: float = 1.0,
    back: float = 0.0,
    failing: bool = False,
    plan: str = "{}",
    name: str = "zone_outage",
    **about: object,
) -> Path:
    """A whole run, sealed and judged: first tokens `slower` times, the service back `back` seconds later."""
    made = _late(_slow(_thin(), 0.8 * slower), back)
    if failing:
        made = replace(made, replies=tuple(_broken(made)))
    made = replace(made, samples=tuple(_moved(s, DAY * day) for s in made.samples))
    changed = {"experiment": name, "epoch_wall": synthetic.ABOUT.epoch_wall + DAY * day, **about}
    made = replace(made, about=replace(made.about, **changed))  # type: ignore[arg-type]
    root = base / f"run-{day}"
    directory = synthetic.write(root / name, made)
    (directory / "plan.json").write_text(plan)
    record.seal(directory)
    return root


@cache
def _thin() -> Timeline:
    """Every fourth request of the synthetic run: enough for every objective."""
    whole = synthetic.timeline()
    kept = (r for r in whole.replies if r.outcome is not Outcome.CENSORED)
    replies = tuple(replace(r, seq=i) for i, r in enumerate(tuple(kept)[::4]))
    return _accounted(replace(whole, replies=replies))


def _accounted(made: Timeline) -> Timeline:
    """The load generator's account, as it would be of these replies."""
    ok = sum(r.ok for r in made.replies)
    planned = len(made.replies)
    events = (
        replace(e, planned=planned, ok=ok, failed=planned - ok, censored=0) if isinstance(e, LoadEnd) else e
        for e in made.events
    )
    return replace(made, events=tuple(events))


def _slow(made: Timeline, times: float) -> Timeline:
    replies = (
        replace(r, t_first=r.t_intended + times * r.ttft) if r.ok and r.ttft is not None else r for r in made.replies
    )
    return replace(made, replies=tuple(replies))


def _moved(sample: Sample, seconds: float) -> Sample:
    """The answer of Prometheus, as it would have come so much later."""
    if not sample.raw:
        return sample
    (series,) = json.loads(sample.raw)
    series["value"][0] += seconds
    return replace(sample, raw=json.dumps([series]))


def _late(made: Timeline, back: float) -> Timeline:
    """A fifth of the requests goes on failing for `back` seconds after the gateway ejected the zone."""
    rng = random.Random(1)
    replies = tuple(
        replace(r, outcome=Outcome.HTTP_5XX, t_first=None, finish_reason=None, got_done=False, t_end=r.t_intended + 0.1)
        if synthetic.BACK <= r.t_intended < synthetic.BACK + back and rng.random() < 1 / 5
        else r
        for r in made.replies
    )
    return _accounted(replace(made, replies=replies))


def _broken(made: Timeline) -> list[Reply]:
    return [replace(r, outcome=Outcome.HTTP_5XX) if r.ok and r.seq % 5 == 0 else r for r in made.replies]


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five usual runs, one a day."""
    base = tmp_path_factory.mktemp("runs")
    for day, slower in enumerate(NOISE):
        run(base, day, slower=slower)
    return base


def held(current: Path, past: Path, **more: object) -> Gate:
    return gate(current, [past], **{"by": 0.1, "last": 5, **more})  # type: ignore[arg-type]


def test_a_usual_run_goes_through(past: Path, tmp_path: Path) -> None:
    found = held(run(tmp_path, 9, slower=1.03), past, strict=True)
    assert found.passed, found.story
    assert [(f.what, f.status) for f in found.findings] == [
        ("recovery", Verdict.PASS),
        ("first token p95", Verdict.PASS),
    ]
    assert "gate open: 1 PASS · 0 of 2 compared regressed" in found.story
    assert found.markdown.startswith("### gate open: 1 PASS")
    assert found.markdown.count("\n- ") == 3


def test_a_slower_first_token_closes_it_though_every_verdict_is_pass(past: Path, tmp_path: Path) -> None:
    found = held(run(tmp_path, 9, slower=1.3), past)
    assert found.judgements[0].passed
    assert not found.passed
    (regressed,) = found.regressed
    assert regressed.what == "first token p95"
    assert regressed.noise is not None and regressed.observed is not None
    assert regressed.noise.runs == 5
    assert regressed.observed - regressed.noise.top > 0.1 * regressed.noise.centre
    assert "REGRESSED  zone_outage  first token p95" in found.story
    assert held(tmp_path / "run-9", past, by=0.5).passed  # so much growth was allowed


def test_a_longer_recovery_closes_it(past: Path, tmp_path: Path) -> None:
    current = run(tmp_path, 9, back=1.5)
    found = held(current, past)
    assert found.judgements[0].passed, found.story
    assert [f.what for f in found.regressed] == ["recovery"], found.story
    assert not found.passed


def test_a_noisy_past_lets_pass_what_a_quiet_one_refuses(past: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    for day, slower in enumerate((0.8, 1.3, 0.9, 1.25, 1.1)):
        run(noisy, day, slower=slower)
    current = run(tmp_path / "now", 9, slower=1.3)
    assert not held(current, past).passed
    assert held(current, noisy).passed


def test_a_failed_verdict_closes_it_whatever_the_figures(past: Path, tmp_path: Path) -> None:
    found = held(run(tmp_path, 9, failing=True), past)
    assert found.judgements[0].verdict is not Verdict.PASS
    assert not found.passed and not found.findings
    assert "gate CLOSED" in found.story


def test_too_few_baselines_are_said_and_close_only_a_strict_gate(past: Path, tmp_path: Path) -> None:
    current, two = run(tmp_path, 9, slower=1.3), [past / "run-0", past / "run-1"]
    lax = gate(current, two, by=0.1, last=5)
    assert lax.passed
    assert {f.status for f in lax.findings} == {Verdict.INCONCLUSIVE}
    assert "2 like runs that passed are too few" in lax.story and "2 not compared" in lax.story
    assert not gate(current, two, by=0.1, last=5, strict=True).passed
    assert not gate(current, two, by=0.1, last=5, need=2).passed  # two are enough, if one says so


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 8}, "seed"),
        ({"plan": '{"t": [1]}'}, "load"),
        ({"clocks": "real"}, "set of clocks"),
        ({"cluster": "elsewhere"}, "cluster"),
        ({"namespace": "llm-b"}, "namespace"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else None,
)
def test_only_like_is_compared_with_like(past: Path, tmp_path: Path, other: dict[str, object], said: str) -> None:
    found = held(run(tmp_path, 9, slower=1.3, **other), past)  # type: ignore[arg-type]
    assert {f.status for f in found.findings} == {Verdict.INCONCLUSIVE}
    assert "0 like runs" in found.story and f"not compared: 5 of another {said}" in found.story


def test_trials_have_lines_of_their_own(past: Path, tmp_path: Path) -> None:
    current = run(tmp_path, 9)
    second = run(tmp_path / "second", 9, plan='{"t": [1]}', trial=2)
    (second / "zone_outage").rename(current / "zone_outage.2")
    found = held(current, past)
    assert [j.experiment for j in found.judgements] == ["zone_outage", "zone_outage.2"]
    assert "zone_outage.2  recovery" in found.story and not found.notes
    assert not held(current, past, strict=True).passed  # nobody ran the second load before


def test_a_new_kubernetes_is_compared_with_the_old(tmp_path: Path) -> None:
    for day in range(3):
        run(tmp_path, day, cluster="prod, Kubernetes v1.34.1")
    current = run(tmp_path, 9, slower=1.4, cluster="prod, Kubernetes v1.35.0")
    assert not held(current, tmp_path).passed


def test_runs_that_did_not_pass_set_no_bar_and_are_named(past: Path, tmp_path: Path) -> None:
    failed, died = run(tmp_path, 6, failing=True), run(tmp_path, 7, slower=1.3)
    for name in ("seal.json", "verdict.json"):
        (died / "zone_outage" / name).unlink()
    found = gate(run(tmp_path, 9, slower=1.3), [past, failed, died], by=0.1, last=5)
    assert not found.passed
    assert found.findings[0].noise is not None and found.findings[0].noise.runs == 5
    assert "left out: run-7 died, run-6 " in found.story


def test_only_the_last_count_and_none_of_the_future(tmp_path: Path) -> None:
    for day, slower in enumerate((1.35, 1.35, 1.0, 1.01, 0.99)):
        run(tmp_path, day, slower=slower)
    run(tmp_path, 20, slower=1.35)
    current = run(tmp_path, 9, slower=1.3)
    assert not held(current, tmp_path, last=3).passed
    assert held(current, tmp_path, last=5).passed  # the slow old ones make this usual
    assert [root.name for root in history(current)] == ["run-4", "run-3", "run-2", "run-1", "run-0"]


def test_an_experiment_that_was_not_run_is_named(past: Path, tmp_path: Path) -> None:
    run(tmp_path, 8, name="gpu_xid")
    current = run(tmp_path, 9)
    found = gate(current, [past, tmp_path], by=0.1, last=5)
    assert found.passed
    assert "gpu_xid was in run-8 and is not in this run" in found.story
    assert not gate(current, [past, tmp_path], by=0.1, last=5, strict=True).passed


def test_one_that_died_closes_it(past: Path, tmp_path: Path) -> None:
    current = run(tmp_path, 9)
    run(tmp_path, 9, name="gpu_xid")
    for name in ("seal.json", "verdict.json"):
        (current / "gpu_xid" / name).unlink()
    found = held(current, past)
    assert not found.passed
    assert "ERROR  gpu_xid" in found.story


def _cut(directory: Path) -> None:
    path = directory / "replies.0.jsonl"
    path.write_bytes(path.read_bytes()[:-10])


def _remove(directory: Path) -> None:
    (directory / "events.jsonl").unlink()


def _unseal(directory: Path) -> None:
    (directory / "seal.json").unlink()


def _embellish(directory: Path) -> None:
    path = directory / "verdict.json"
    path.write_text(path.read_text().replace("FAIL", "PASS"))


def _no_verdict(directory: Path) -> None:
    (directory / "verdict.json").unlink()


@pytest.mark.parametrize("harm", [_cut, _remove, _unseal, _embellish, _no_verdict])
def test_a_damaged_record_is_refused(past: Path, tmp_path: Path, harm: object) -> None:
    # Without a seal, what is not green stays so: that is how one that died looks. What is green must be proven.
    current = run(tmp_path, 9, failing=harm is not _unseal)
    harm(current / "zone_outage")  # type: ignore[operator]
    with pytest.raises(RecordError, match=r"zone_outage|verdict\.json"):
        held(current, past)


def test_a_failure_without_a_seal_keeps_it_closed(past: Path, tmp_path: Path) -> None:
    current = run(tmp_path, 9, failing=True)
    _unseal(current / "zone_outage")
    assert not held(current, past).passed


@pytest.mark.parametrize("harm", [_cut, _remove])
def test_a_damaged_baseline_is_refused(past: Path, tmp_path: Path, harm: object) -> None:
    harm(run(tmp_path, 8) / "zone_outage")  # type: ignore[operator]
    with pytest.raises(RecordError, match="zone_outage"):
        gate(run(tmp_path, 9), [past, tmp_path], by=0.1, last=5)


def test_nothing_to_judge_is_refused(past: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "empty", "holds no experiment"), (tmp_path / "none", "not a run directory")):
        with pytest.raises(RecordError, match=said):
            held(path, past)
    with pytest.raises(RecordError, match="neither a run nor a directory of runs"):
        gate(run(tmp_path, 9), [tmp_path / "none"], by=0.1, last=5)


@pytest.mark.parametrize(("by", "last", "need"), [(-0.1, 5, 3), (float("nan"), 5, 3), (0.1, 2, 3), (0.1, 5, 1)])
def test_senseless_demands_are_refused(past: Path, by: float, last: int, need: int) -> None:
    with pytest.raises(RecordError, match=r"share of 0 or more|at least 2 baselines"):
        gate(past / "run-4", [past], by=by, last=last, need=need)


@pytest.mark.parametrize(("df", "t"), [(1, 6.3138), (2, 2.9200), (3, 2.3534), (4, 2.1318), (9, 1.8331), (29, 1.6991)])
def test_student_is_the_table_s(df: int, t: float) -> None:
    assert student(df) == pytest.approx(t, rel=0.01)


def test_the_noise_holds_what_it_promises() -> None:
    """Of runs that are all alike, no more than 5 % lie above the noise of the five before them."""
    rng = random.Random(7419)
    above = [rng.gauss(10, 1) > measure([rng.gauss(10, 1) for _ in range(5)]).top for _ in range(4000)]
    assert statistics.fmean(above) == pytest.approx(1 - CERTAINTY, abs=0.012)


@pytest.mark.parametrize(("grown", "least", "most"), [(1.0, 0.0, 0.02), (1.5, 0.95, 1.0)])
def test_how_often_it_is_wrong(grown: float, least: float, most: float) -> None:
    """With 5 % of noise from run to run and five baselines: what docs/ci.md says of false and missed alarms."""
    rng = random.Random(7419)

    def regressed() -> bool:
        noise = measure([rng.gauss(1, 0.05) for _ in range(5)])
        return rng.gauss(grown, 0.05) - noise.top > 0.1 * noise.centre

    assert least <= statistics.fmean(regressed() for _ in range(2000)) <= most


def test_trials_that_never_ran_close_the_gate(tmp_path: Path) -> None:
    """Of five trials one ran, and passed: `junit.xml` called that an error, the gate was open."""
    asked = run(tmp_path, 1, settings={**synthetic.ABOUT.settings, "trials": "5"})
    found = gate(asked, [], by=0.1, last=10)
    assert not found.passed and "zone_outage: 4 of 5 trials never ran" in found.story.splitlines()[-1]
    assert "INCONCLUSIVE  zone_outage: 4 of 5 trials never ran" in found.story
