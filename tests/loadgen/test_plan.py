"""Plans: fixed by the seed, true to the rates, complete when shared; bad specs and traces are refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from gameday.errors import LoadError
from loadgen.plan import Plan, make
from loadgen.prompts import Bodies
from loadgen.target import parse
from loadgen.traffic import Chat, Lengths, Ramp, Spike, Stream, Trace, Traffic, fixed, lognormal, normal, uniform


def _one(**more: object) -> Traffic:
    given: dict[str, object] = {"name": "s", "per_second": 50, "prompt": fixed(10), "output": fixed(5), **more}
    return Traffic(streams=(Stream(**given),))  # type: ignore[arg-type]


def test_the_seed_fixes_the_plan_and_the_file_keeps_it(tmp_path: Path) -> None:
    chat = Chat(per_second=20, changes=(Ramp(5, 5, 2), Spike(20, 2, 3)), prefix_groups=3, prefix_tokens=5)
    plan = make(chat, 7, 30)
    assert plan == make(chat, 7, 30)
    assert plan.t != make(chat, 8, 30).t
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "traffic", [Chat(per_second=3, turns=4), _one(arrivals="gamma"), Traffic(streams=(Trace(path="x"),))]
)
def test_json_round_trip(traffic: Traffic) -> None:
    assert Traffic.from_json(json.dumps(traffic.to_json())) == traffic


def test_the_documented_spec_is_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "load.md").read_text(encoding="utf-8")
    traffic = Traffic.from_json(text.split("```json\n")[1].split("```")[0])
    assert [s.name for s in traffic.streams] == ["chat", "canary", "trace"]


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma", 2.0), ("constant", 0.0)])
def test_rate_and_burstiness(arrivals: str, cv: float) -> None:
    plan = make(_one(arrivals=arrivals, burstiness=2.0), 3, 400)
    assert len(plan) == pytest.approx(20_000, rel=0.05)
    gaps = [b - a for a, b in zip(plan.t, plan.t[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert spread / mean == pytest.approx(cv, abs=0.08)


def test_ramps_and_spikes_bend_the_rate() -> None:
    plan = make(_one(arrivals="constant", changes=(Ramp(10, 10, 3), Spike(30, 5, 0))), 1, 40)

    def rate(a: float, b: float) -> float:
        return sum(a <= t < b for t in plan.t) / (b - a)

    assert rate(0, 10) == pytest.approx(50, abs=1)
    assert rate(10, 20) == pytest.approx(100, abs=2)
    assert rate(20, 30) == pytest.approx(150, abs=1)
    assert rate(30, 35) == 0
    assert rate(35, 40) == pytest.approx(150, abs=1)


def test_canary_is_constant_and_alternates() -> None:
    plan = make(Chat(per_second=5), 1, 10)
    canary = [i for i in range(len(plan)) if plan.classes[plan.cls[i]].name == "canary"]
    assert len(canary) == pytest.approx(500, abs=1)
    gaps = [plan.t[b] - plan.t[a] for a, b in pairwise(canary)]
    assert max(gaps) - min(gaps) < 1e-5
    assert [plan.fresh[i] for i in canary[:4]] == [1, 0, 1, 0]
    assert {plan.output[i] for i in canary} == {1}


def test_shares_are_disjoint_and_complete_and_keep_sessions_together() -> None:
    plan = make(Chat(per_second=30, turns=3, think=1), 5, 20)
    shares = [plan.share(w, 3) for w in range(3)]
    assert sorted(i for s in shares for i in s) == list(range(len(plan)))
    owners: dict[int, set[int]] = {}
    for worker, share in enumerate(shares):
        for i in share:
            if plan.session[i] >= 0:
                owners.setdefault(plan.session[i], set()).add(worker)
    assert len(owners) > 10
    assert all(len(w) == 1 for w in owners.values())


def test_answers_are_kept_only_while_a_later_turn_needs_them() -> None:
    stream = Stream(name="s", per_second=20, prompt=fixed(5), output=fixed(3), turns=3, think=0.1, history="answers")
    plan = make(Traffic(streams=(stream,)), 5, 5)
    bodies = Bodies(plan, parse("http://h", "m"))
    for seq in range(len(plan)):
        talk = json.loads(bodies.of(seq))["messages"]
        heard = [m["content"] for m in talk if m["role"] == "assistant"]
        earlier = [s for s in range(seq) if plan.session[s] == plan.session[seq]]
        assert heard == [f'"{s}" \n was said' for s in earlier]
        bodies.heard(seq, f'"{seq}" \n was said')
    bodies.heard(0, "too late")  # its session is over
    assert not bodies._answers


def test_bodies_carry_sessions_and_prefixes() -> None:
    target = parse("http://h", "m")
    plan = make(Chat(per_second=30, turns=3, think=0.5, prompt_tokens=30, prefix_groups=2, prefix_tokens=10), 5, 20)
    bodies = Bodies(plan, target)
    turns = {seq: json.loads(bodies.of(seq)) for seq in range(len(plan)) if plan.session[seq] >= 0}
    assert all(len(b["messages"]) == 2 * plan.turn[seq] + 1 for seq, b in turns.items())
    later = next(s for s in turns if plan.turn[s] == 2)
    first = next(s for s in turns if plan.session[s] == plan.session[later])
    assert turns[later]["messages"][0] == turns[first]["messages"][0]
    starts = {turns[s]["messages"][0]["content"][:40] for s in turns if plan.turn[s] == 0}
    assert {s[:8] for s in starts} <= {"group 0 ", "group 1 "}
    assert all(b["max_tokens"] == plan.output[seq] and b["stream"] for seq, b in turns.items())


@pytest.mark.parametrize(
    "lengths", [fixed(9), uniform(3, 9), normal(20, 50, low=2, high=40), lognormal(50, 1.0, high=90)]
)
def test_lengths_stay_within_their_bounds(lengths: Lengths) -> None:
    plan = make(_one(prompt=lengths), 1, 20)
    assert lengths.low <= min(plan.prompt)
    assert max(plan.prompt) <= lengths.high


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Chat(per_second=-1), "cannot be negative"),
        (lambda: Chat(per_second=float("nan")), "cannot be negative or infinite"),
        (lambda: Chat(per_second=1, long_share=1.5), "long_share"),
        (lambda: Chat(per_second=0, canary_per_second=0), "at least one stream"),
        (lambda: fixed(0), "outside"),
        (lambda: uniform(9, 3), "low ≤ high"),
        (lambda: normal(-5, 1), "not negative"),
        (lambda: _one(burstiness=0), "burstiness"),
        (lambda: _one(arrivals="weekly"), "unknown arrivals"),
        (lambda: _one(extra="[1]"), "not a JSON object"),
        (lambda: _one(prefix_groups=2), "go together"),
        (lambda: Trace(path="x", speed_up=0), "speed_up"),
        (lambda: Spike(-1, 1, 1), "cannot be negative"),
        (lambda: make(_one(), 1, 0), "positive duration"),
        (lambda: make(_one(per_second=1e9), 1, 100), "at most 5000000"),
        (lambda: Traffic.from_json("{"), "not JSON"),
        (lambda: Traffic.from_json({"type": "Chat", "per_secnd": 3}), "no field per_secnd"),
        (lambda: Traffic.from_json({"type": "Chat"}), "malformed"),
        (lambda: Traffic.from_json({"type": "Storm"}), "unknown traffic type"),
        (lambda: Traffic.from_json({"type": "Chat", "per_second": "3"}), "per_second cannot be '3'"),
        (lambda: Traffic.from_json({"type": "Chat", "per_second": 3, "turns": 2.5}), "turns cannot be '2.5'"),
        (lambda: Traffic.from_json({"type": "Chat", "per_second": 3, "turns": True}), "turns cannot be 'True'"),
        (lambda: Traffic.from_json({"type": "Chat", "per_second": 3, "changes": 7}), "changes cannot be '7'"),
        (lambda: Traffic.from_json({"type": "Chat", "per_second": 3, "deadlines": 7}), "deadlines cannot be '7'"),
        (lambda: Traffic.from_json({"type": "Stream", "name": "s", "prompt": 5}), "prompt cannot be '5'"),
        (lambda: Traffic.from_json([1]), "not a traffic spec"),
        (lambda: Trace(path="x", extra="[1]"), "not a JSON object"),
        (lambda: _one(extra='{"stream": false, "max_tokens": 1}'), "must not say max_tokens, stream"),
    ],
)
def test_impossible_specs_are_refused(build: object, says: str) -> None:
    with pytest.raises(LoadError, match=says):
        build()  # type: ignore[operator]


AZURE = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(("name", "rows", "length"), [("conv", 19366, 3527.2), ("code", 8819, 3434.0)])
def test_the_azure_traces_replay_as_they_are(name: str, rows: int, length: float) -> None:
    path = AZURE / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.exists():
        pytest.skip(f"the trace is not here: {path.name}")
    whole = make(Traffic(streams=(Trace(path=str(path)),)), 1, 4000)
    assert len(whole) == rows
    assert whole.t[-1] == pytest.approx(length, abs=60)
    part = make(Traffic(streams=(Trace(path=str(path), speed_up=10, offset=600, cap=500),)), 1, 60)
    first = next(i for i, t in enumerate(whole.t) if t >= 600)
    assert len(part) == 500
    assert part.prompt == whole.prompt[first : first + 500]
    assert part.output == whole.output[first : first + 500]
    assert part.t == pytest.approx([(t - 600) / 10 for t in whole.t[first : first + 500]], abs=2e-6)


def test_a_trace_of_2024_has_time_zones_and_a_spreadsheet_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = (
        "2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 02:00:01.5+02:00,10,6\r\n2024-05-10T00:00:02Z,11,7\r\n"
    )
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + rows).encode())
    plan = make(Traffic(streams=(Trace(path=str(path)),)), 1, 10)
    assert plan.t == pytest.approx((0, 1.49007, 1.99007), abs=1e-6)
    assert plan.output == (5, 6, 7)


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:17:03.9799600,4808,10\n"


def test_trace_replays_with_offset_speed_and_cap(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEAD + "".join(f"2023-11-16 18:17:{s:02d}.5,{100 + s},{s + 1}\n" for s in range(60)))
    plan = make(Traffic(streams=(Trace(path=str(path), speed_up=2, offset=10, cap=20, prompt_max=115),)), 1, 100)
    assert plan.t == tuple(s / 2 for s in range(20))
    assert plan.prompt == tuple(min(110 + s, 115) for s in range(20))
    assert plan.output == tuple(11 + s for s in range(20))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b,c\n" + ROW, "line 1: a trace has the columns"),
        (HEAD, "no rows"),
        (HEAD + ROW + "2023-11-16 18:17:04.0,12\n", "line 3: 3 columns expected, found 2"),
        (HEAD + ROW + ROW + "2023-11-16 18:17:04.0,-12,3\n", "line 4: '-12' is not a token count"),
        (HEAD + "yesterday,1,2\n", "line 2: 'yesterday' is not a timestamp"),
        (HEAD + "2023-11-16 18:17:03.1e5,1,2\n", "is not a timestamp"),
        (HEAD + "2023-13-16 18:17:03,1,2\n", "is not a timestamp"),
        (HEAD + ROW + "2023-11-16 18:17:04.0,12345678901,3\n", "is not a token count"),
        (HEAD + ROW + "2023-11-16 18:17:04.0,1.5,3\n", "line 3: '1.5' is not a token count"),
    ],
)
def test_malformed_trace_rows_are_refused_by_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(LoadError, match=says):
        make(Traffic(streams=(Trace(path=str(path)),)), 1, 10)
