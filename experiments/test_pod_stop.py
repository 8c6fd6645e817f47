"""Pod stop: one engine is asked to stop, as every rollout, drain and scale-down does.

Hypothesis: nobody notices. It leaves the rotation first, then ends its streams, then itself; not one breaks.
"""

import pytest

from faults import PodStop
from gameday.experiment import Run
from gameday.objectives import FirstToken, NothingLeftBehind, Recovers, Replicas, Success, UnbrokenStreams
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

pytestmark = pytest.mark.thorough

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_pod_stop(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15, long_share=0.2),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=PodStop(lasting=seconds(18)),
        during=[
            Success(at_least=0.999),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(),
        ],
        after=[
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
