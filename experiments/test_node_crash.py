"""Node crash: one machine is reset without warning, with all that runs on it.

Hypothesis: its connections hang, since nobody closes them, and still the others carry the traffic within the RTO;
the machine boots again and its pods serve again.
"""

import pytest

from faults import NodeCrash
from gameday.experiment import Run
from gameday.objectives import FirstToken, NodesReady, NothingLeftBehind, Recovers, Replicas, Success, UnbrokenStreams
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

pytestmark = pytest.mark.thorough

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_node_crash(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=NodeCrash(lasting=seconds(25)),
        during=[
            Success(at_least=0.98),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(except_on="targets"),
        ],
        after=[
            Recovers(within=seconds(12), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NodesReady(at_least=6),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
