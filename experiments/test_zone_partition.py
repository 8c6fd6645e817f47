"""Zone partition: one zone is cut off, and nobody says so.

Hypothesis: every probe stays green and endpoints stay in rotation, so traffic flows into the hole; the gateways
notice by themselves, eject what they cannot reach, and service is normal within the RTO while the cut lasts.
"""

from faults import Zone, ZonePartition
from gameday.experiment import Run
from gameday.objectives import FirstToken, NothingLeftBehind, Recovers, Replicas, Success
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_zone_partition(experiment: Run, zone: Zone) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=ZonePartition(zone, lasting=seconds(20)),
        during=[
            Success(at_least=0.95),
            FirstToken(p95=seconds(2.5)),
            SERVED_IN_TIME,
            Replicas(at_least=6, owner="my-llama32"),  # grey: Kubernetes sees nothing
        ],
        after=[
            Recovers(within=seconds(12), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
