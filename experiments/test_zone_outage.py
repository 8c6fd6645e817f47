"""Zone outage: one zone, and every GPU in it, is gone.

Hypothesis: the other zones carry the traffic. Users may wait longer for a first token; streams that ran on the
lost zone may break, no others do; service is normal again within the RTO by failover alone, and the replicas
spread again once the zone is back and the workloads are restarted.
"""

from faults import Zone, ZoneOutage
from gameday.experiment import Run
from gameday.objectives import FirstToken, NothingLeftBehind, Recovers, Replicas, Spread, Success, UnbrokenStreams
from gameday.units import seconds
from loadgen.traffic import Chat
from probes.profiles import SANDBOX_GATEWAY

# What Prometheus says of the gateways' first tokens: users' own view, from the other side.
SERVED_IN_TIME = SANDBOX_GATEWAY.first_token_within(seconds(1), window="5s").at_least(0.9)


def test_zone_outage(experiment: Run, zone: Zone) -> None:
    verdict = experiment(
        traffic=Chat(per_second=15),
        before=[Success(at_least=0.999), FirstToken(p95=seconds(1)), SERVED_IN_TIME],
        fault=ZoneOutage(zone, lasting=seconds(20), replacements="elsewhere"),
        during=[
            Success(at_least=0.95),
            FirstToken(p95=seconds(2.5)),
            SERVED_IN_TIME,
            UnbrokenStreams(except_on="targets"),
        ],
        after=[
            Recovers(within=seconds(12), hold=seconds(8)),
            Replicas(at_least=6, owner="my-llama32"),
            Spread(max_skew=1, owner="my-llama32"),
            NothingLeftBehind(),
        ],
    )
    assert verdict.passed, verdict.story
