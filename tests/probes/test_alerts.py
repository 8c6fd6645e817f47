"""Alerts: every change is told once, silence of Prometheus is no change, a storm does not fill the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gameday.errors import PrometheusError
from probes.alerts import MOST, Alerts, called, selector

DOWN = {"__name__": "ALERTS", "alertname": "EngineDown", "alertstate": "firing", "namespace": "llm", "pod": "e-1"}
OTHER = {**DOWN, "pod": "e-2"}


class Planned:
    """Answers in turn; None is no answer."""

    def __init__(self, *answers: Sequence[Mapping[str, str]] | None) -> None:
        self._answers = list(answers)

    def series(self, query: str) -> Sequence[Mapping[str, str]]:
        assert query.startswith("ALERTS{")
        answer = self._answers.pop(0)
        if answer is None:
            raise PrometheusError("down")
        return answer


def changes(*answers: Sequence[Mapping[str, str]] | None) -> list[list[tuple[str, float | None]]]:
    alerts = Alerts(Planned(*answers))
    return [[(s.name, s.value) for s in alerts.look()] for _ in answers]


def test_each_change_is_told_once() -> None:
    name, other = "alert EngineDown (llm, e-1)", "alert EngineDown (llm, e-2)"
    assert changes([], [DOWN], [DOWN], [OTHER, DOWN], [OTHER], []) == [
        [], [(name, 1.0)], [], [(other, 1.0)], [(name, 0.0)], [(other, 0.0)],
    ]  # fmt: skip


def test_no_answer_is_no_change() -> None:
    name = "alert EngineDown (llm, e-1)"
    assert changes([DOWN], None, [DOWN], None, []) == [[(name, 1.0)], [], [], [], [(name, 0.0)]]


def test_a_storm_does_not_fill_the_record() -> None:
    storm = [{**DOWN, "pod": f"e-{i}"} for i in range(MOST + 50)]
    first, second = changes(storm, [])
    assert (len(first), len(second)) == (MOST, 0)


def test_names_and_selectors() -> None:
    assert called({"alertname": "Watchdog"}) == "alert Watchdog"
    assert selector(DOWN) == 'ALERTS{alertname="EngineDown",alertstate="firing",namespace="llm",pod="e-1"}'
