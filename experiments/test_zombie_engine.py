"""Zombie engine: /health says 200, and not one token is generated (vllm #39863).

Hypothesis: Kubernetes sees nothing, so the gateways must: they give up waiting, ask another engine, and send the
zombie less and less. Users wait longer for a first token; streams that ran on it may break.
"""

import pytest

from faults import ZombieEngine
from gameday.experiment import Run
from gameday.objectives import FirstToken, NothingLeftBehind, Recovers, Replicas, Success, UnbrokenStreams
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

pytestmark = pytest.mark.thorough

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_zombie_engine(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=ZombieEngine(lasting=seconds(20)),
        during=[
            Success(at_least=0.98),
            FirstToken(p95=seconds(2.5)),
            UnbrokenStreams(except_on="targets"),
            Replicas(at_least=6, owner="my-llama32"),  # every probe stays green
        ],
        after=[
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
