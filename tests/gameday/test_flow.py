"""The end of the load, and what counts as hanging: a slow model is not a dead one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted import END, Plant

from gameday import flow as flow_
from gameday.flow import DRAIN, DRAIN_MOST, Flow
from gameday.judge import judge
from gameday.model import Outcome, Reply, Verdict
from gameday.objectives import Objectives, Success
from gameday.settings import load
from loadgen.launch import Tail
from loadgen.traffic import Chat


class Ending:
    """A load whose workers note how long they may drain."""

    def __init__(self) -> None:
        self.within = 0.0

    def stop(self, within: float) -> None:
        self.within = within

    def poll(self) -> Tail:
        return Tail()


def drained(*latencies: float, outcome: Outcome = Outcome.OK, hurried: bool = False) -> float:
    made, ending = Flow(keep=10), Ending()
    made._load = ending  # type: ignore[assignment]
    made.replies = [Reply(0, n, "chat", 100.0, 100.0 + took, outcome) for n, took in enumerate(latencies)]
    assert made.end(hurried=hurried) == ""
    return ending.within


def test_what_is_under_way_gets_the_time_that_good_requests_take() -> None:
    """Four seconds for everybody: the usual requests of a model that thinks for eight were cut off, as if they hung."""
    assert drained(0.1, 0.3) == DRAIN == drained()
    assert drained(1.0, 9.0, 3.0) == 18.0
    assert drained(500.0) == DRAIN_MOST
    assert drained(9.0, outcome=Outcome.DEADLINE) == DRAIN, "one that failed tells nothing of good ones"
    assert drained(9.0, hurried=True) == DRAIN, "after a signal nobody waits"


def test_what_that_was_worth_to_a_slow_model() -> None:
    """As the judge sees it: requests that were cut off after more than three silent seconds are failed ones."""
    run = Plant(ttft=lambda _t: 8.0, per_second=10).build()
    asked = Objectives(before=(Success(0.9),), after=(Success(0.99),))
    assert judge(run, asked).verdict is Verdict.PASS

    def cut(reply: Reply) -> Reply:
        if reply.t_end <= END + 4:
            return reply
        return replace(reply, outcome=Outcome.CENSORED, t_first=None, t_end=END + 4)

    (finding,) = (
        f for f in judge(replace(run, replies=tuple(map(cut, run.replies))), asked).findings if f.phase == "after"
    )
    assert finding.status is Verdict.FAIL


def test_a_request_counts_as_silent_by_how_far_the_stop_condition_looks_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two seconds, whatever the model: beside `stop_burn`, a long prompt was an outage."""
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(flow_.launch, "start", lambda *_, **more: given.append(more))
    for stop_after in (4, 60):
        made = load({"stop_after": stop_after, "target": "http://127.0.0.1:1", "model": "m"})
        Flow(keep=10).start(Chat(per_second=5), 1, 5.0, made, tmp_path)
    assert [one["silent_after"] for one in given] == [2.0, 15.0]
