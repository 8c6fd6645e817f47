"""Pod hang: one engine takes connections and answers none, not even its health checks.

Hypothesis: users lose at most the streams that ran on it; the gateways leave it out, readiness takes it out of
rotation, and liveness restarts it before anybody repairs anything.
"""

import pytest

from faults import PodHang
from gameday.experiment import Run
from gameday.objectives import FirstToken, NothingLeftBehind, Recovers, Replicas, Success, UnbrokenStreams
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

pytestmark = pytest.mark.thorough

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_pod_hang(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=PodHang(lasting=seconds(35)),
        during=[
            Success(at_least=0.98),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(except_on="targets"),
            Replicas(at_least=6, owner="my-llama32"),  # restarted while the fault lasts
        ],
        after=[
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
