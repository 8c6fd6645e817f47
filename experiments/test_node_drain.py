"""Node drain: two nodes are taken out of service at once, as before maintenance.

Hypothesis: the disruption budget lets one engine go at a time and refuses the other until a replacement is ready;
all evictions happen in the end, no stream breaks, and users notice nothing.
"""

import pytest

from faults import NodeDrain
from gameday.experiment import Run
from gameday.objectives import (
    Drained,
    FirstToken,
    NeverFewer,
    NothingLeftBehind,
    Recovers,
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


def test_node_drain(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=NodeDrain(count=2, lasting=seconds(40)),
        during=[
            Success(at_least=0.999),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(),
            NeverFewer(than=5, owner="my-llama32"),
            Drained(within=seconds(35), refused_at_least=1),
        ],
        after=[
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
