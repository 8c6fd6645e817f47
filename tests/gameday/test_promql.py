"""The series behind a query are found, so that their age can be watched."""

from __future__ import annotations

import pytest

from gameday.objectives import Promql
from gameday.promql import age_of_all, selectors


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("up", ("up",)),
        ('up{job="llm", zone!~"a|b"}', ('up{job="llm", zone!~"a|b"}',)),
        ('{__name__="vllm:num_requests_waiting"}', ('{__name__="vllm:num_requests_waiting"}',)),
        ("vllm:num_requests_waiting", ("vllm:num_requests_waiting",)),
        ("sum(rate(a[1m])) / sum by (le, pod) (rate(b{x='}'}[5m]))", ("a", "b{x='}'}")),
        ("sum(a) by (zone) or vector(0)", ("a",)),
        ("a and on(instance) b unless ignoring (x, y) c", ("a", "b", "c")),
        ("a * on (pod) group_left (zone) kube_pod_info", ("a", "kube_pod_info")),
        ("topk(3, a offset 5m) > bool 1e-3", ("a",)),
        ("max_over_time(rate(a[1m])[1h:30s])", ("a",)),
        ('label_replace(a, "dst", "$1", "src", "(.*)")', ("a",)),
        ("histogram_quantile(0.95, sum by (le) (rate(b_bucket[1m])))", ("b_bucket",)),
        ("a + a", ("a",)),
        ("a @ 1609746000 # not_a_metric", ("a",)),
        ("time() - Inf + NaN", ()),
        ("vector(1)", ()),
        ("count without (x) (a) == 3", ("a",)),
        ("quantile by (x) (0.9, a)", ("a",)),
    ],
)
def test_selectors(query: str, wanted: tuple[str, ...]) -> None:
    assert selectors(query) == wanted


def test_all_series_of_a_query_must_be_fresh() -> None:
    age = age_of_all(("a", 'b{x="1"}'))
    assert "timestamp(a)" in age and 'timestamp(b{x="1"})' in age
    assert Promql("rate(a[1m]) / b", at_least=1.0).queries()[1][1] == age_of_all(("a", "b"))


def test_what_must_be_absent_has_no_age() -> None:
    assert Promql('absent(up{job="llm"})', at_least=1.0).age == ""
    assert Promql("vector(1)", at_least=1.0).queries() == (("vector(1)", "vector(1)"),)
    assert Promql("errors or vector(0)", at_most=0.0, series=("requests",)).age == "max(time() - timestamp(requests))"
