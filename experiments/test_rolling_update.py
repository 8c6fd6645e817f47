"""Rolling update: a new version of the engines goes out while users are served, a good one and a bad one.

Hypothesis: nobody notices. New pods are ready before old ones go, capacity never falls, no stream breaks; and the
way back, which the heal takes, is just as quiet. A version that cannot start replaces nobody.
"""

import pytest

from faults import RollingUpdate
from gameday.experiment import Run
from gameday.objectives import (
    FirstToken,
    NeverFewer,
    NothingLeftBehind,
    Recovers,
    Replaced,
    Replicas,
    Success,
    UnbrokenStreams,
)
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

pytestmark = pytest.mark.thorough

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_rolling_update(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=RollingUpdate(lasting=seconds(35)),
        during=[
            Success(at_least=0.999),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(),
            NeverFewer(than=6, owner="my-llama32"),
            Replaced(within=seconds(30)),
        ],
        after=[
            Success(at_least=0.999),
            UnbrokenStreams(),
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story


def test_bad_release(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=RollingUpdate(lasting=seconds(20), image="gameday/engine:does-not-exist"),
        during=[
            Success(at_least=0.999),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(),
            NeverFewer(than=6, owner="my-llama32"),
        ],
        after=[
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
