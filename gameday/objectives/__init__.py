"""Objectives: what a service promises, as types with units. `gameday.objectives.base` says how they judge."""

from __future__ import annotations

from gameday.objectives.base import Objective, Objectives, objective_from_json, override
from gameday.objectives.of_cluster import NodeKept, NodeReplaced, NothingLeftBehind, Replicas, Spread
from gameday.objectives.of_operations import Drained, NeverFewer, NodesReady, Replaced
from gameday.objectives.of_prometheus import Alerts, Promql
from gameday.objectives.of_recovery import Recovers, StaysUp
from gameday.objectives.of_requests import (
    Availability,
    Capacity,
    EndToEnd,
    FirstToken,
    Goodput,
    InterToken,
    Success,
    TokensPerSecond,
    UnbrokenStreams,
)

__all__ = [
    "Alerts",
    "Availability",
    "Capacity",
    "Drained",
    "EndToEnd",
    "FirstToken",
    "Goodput",
    "InterToken",
    "NeverFewer",
    "NodeKept",
    "NodeReplaced",
    "NodesReady",
    "NothingLeftBehind",
    "Objective",
    "Objectives",
    "Promql",
    "Recovers",
    "Replaced",
    "Replicas",
    "Spread",
    "StaysUp",
    "Success",
    "TokensPerSecond",
    "UnbrokenStreams",
    "objective_from_json",
    "override",
]
