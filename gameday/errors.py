"""Errors that users meet. Each message is one sentence: what is wrong, and what to do.

GamedayError
├── SettingsError      a settings key, value, URL or option is wrong
├── ExperimentError    an experiment contradicts itself (windows, durations, empty lists)
├── ClusterError       the API is unreachable, unknown, or refuses us
│   └── MissingCapability   Chaos Mesh, a CRD, a right or Prometheus is not there (`--allow-missing`)
├── TargetError        the selection is empty or its blast radius is too large
├── LockError          another game day holds the Lease
├── LoadError          the load generator cannot start or cannot reach its target
├── PrometheusError    Prometheus is down, or answers with an error
├── RecordError        a run directory is missing, truncated or edited
├── HealError          something of ours could not be undone
└── SandboxUnavailable the sandbox cannot be started here
"""

from __future__ import annotations


class GamedayError(Exception):
    """Base of every error that is shown as one sentence, without a traceback."""


class SettingsError(GamedayError):
    pass


class ExperimentError(GamedayError):
    pass


class ClusterError(GamedayError):
    pass


class MissingCapability(ClusterError):
    """`name` is what `--allow-missing` takes."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class TargetError(GamedayError):
    pass


class LockError(GamedayError):
    pass


class LoadError(GamedayError):
    pass


class PrometheusError(GamedayError):
    pass


class RecordError(GamedayError):
    pass


class HealError(GamedayError):
    pass


class SandboxUnavailable(GamedayError):
    pass
