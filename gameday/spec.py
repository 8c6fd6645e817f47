"""What an experiment asks for, and where it runs; contradictions are found before any cluster is met."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.base import Fault
from gameday.cluster import Cluster
from gameday.errors import ExperimentError
from gameday.objectives import Objective, Objectives, Recovers
from gameday.settings import Settings
from gameday.units import show_duration
from loadgen.traffic import Traffic
from probes.prometheus import Prometheus
from reports.live import Progress

SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # it becomes a directory, and part of a Lease's holder
SCRAPES = 4  # a judged window holds at least so many scrape intervals
WARM_UP = 2.0  # seconds of load before the steady state is looked at (connections, caches)


@dataclass(frozen=True, slots=True)
class Spec:
    """What an experiment asks for."""

    name: str
    traffic: Traffic
    fault: Fault
    objectives: Objectives

    def __post_init__(self) -> None:
        if not SAFE_NAME.fullmatch(self.name):
            raise ExperimentError(
                f"{self.name!r} cannot name an experiment: letters, digits, _ . - (it names a folder)."
            )

    @property
    def recovers(self) -> Recovers | None:
        found = [one for _, one in self.objectives.items() if isinstance(one, Recovers)]
        return found[0] if found else None

    def hold(self, settings: Settings) -> float:
        """Seconds for which the service must stay back in its objectives."""
        return self.recovers.hold if self.recovers else settings.hold

    def rto(self, settings: Settings) -> float:
        return self.recovers.within if self.recovers else self.hold(settings)

    def expected(self, settings: Settings) -> float:
        """Seconds that the experiment takes at most, for people."""
        return WARM_UP + settings.steady + self.fault.lasting + self.hold(settings) + self.rto(settings) + 15

    def check(self, settings: Settings) -> None:
        """Raise `ExperimentError` for a contradiction of the experiment with itself or with the settings."""
        labels_of(settings.selector)
        scrape, hold = settings.scrape_interval, self.hold(settings)
        if not any(isinstance(one, Objective) for _, one in self.objectives.items()):
            raise ExperimentError(f"{self.name} asks nothing of the service: give it objectives.")
        if not self.objectives.before:
            raise ExperimentError(f"{self.name} has no steady state: put objectives into before=[…].")
        wanted = self.recovers.within + self.recovers.hold if self.recovers else 0.0
        if self.fault.lasting < wanted:
            raise ExperimentError(
                f"{self.name}: the fault lasts {show_duration(self.fault.lasting)}, less than RTO + hold "
                f"({show_duration(wanted)}): recovery could not be told from our heal."
            )
        for what, length in (("steady", settings.steady), ("lasting", self.fault.lasting), ("hold", hold)):
            if length < SCRAPES * scrape:
                raise ExperimentError(
                    f"{self.name}: {what} = {show_duration(length)} is shorter than {SCRAPES} scrape intervals "
                    f"({show_duration(SCRAPES * scrape)}): Prometheus could not confirm anything."
                )


@dataclass(frozen=True, slots=True)
class Arena:
    """Where experiments run: a cluster, its Prometheus, the settings, and where records go."""

    cluster: Cluster
    prometheus: Prometheus
    settings: Settings
    run_id: str
    root: Path  # runs/<run-id>
    seed: int
    sandbox: bool
    objectives_from: str
    reproduce: Callable[[str], str]  # experiment → command
    progress: Callable[[Progress], None]
    say: Callable[[str], None]


def labels_of(selector: str) -> dict[str, str]:
    """An equality selector as a mapping; other operators are refused plainly."""
    found = {}
    for part in selector.split(","):
        key, sep, value = part.partition("=")
        if not sep or "!" in key or not key.strip():
            raise ExperimentError(f"The selector {selector!r} must be of the form key=value[,key=value].")
        found[key.strip()] = value.lstrip("=").strip()
    return found
