"""GPU Xid errors: one that takes the GPU away, and one that is the application's own fault.

Hypothesis: after Xid 79 (fallen off the bus) the others serve on, the detector reports it, and node auto repair
replaces the node; after Xid 13 (graphics engine exception) the container restarts and the node stays.
"""

from faults import Xid
from gameday.experiment import Run
from gameday.objectives import (
    FirstToken,
    NodeKept,
    NodeReplaced,
    NothingLeftBehind,
    Recovers,
    Replicas,
    Success,
    UnbrokenStreams,
)
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_gpu_xid79(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=Xid(79, lasting=seconds(25)),
        during=[
            Success(at_least=0.98),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(except_on="targets"),
            NodeReplaced(),
        ],
        after=[
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story


def test_gpu_xid13(experiment: Run) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=Xid(13, lasting=seconds(18)),
        during=[
            Success(at_least=0.98),
            FirstToken(p95=seconds(1.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(except_on="targets"),
            NodeKept(for_at_least=seconds(14)),  # repair wait + two polls on the sandbox's compressed clocks
        ],
        after=[
            Recovers(within=seconds(10), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
