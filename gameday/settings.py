"""Settings: `gameday.toml`, then environment `GAMEDAY_*`, then options; later wins.

What a sandbox knows of itself (addresses, namespace, selectors, clocks) lies beneath them all.
A cluster is never named by gameday.toml: only by option or environment (DESIGN 7).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError as EnvironmentUnreadable

from gameday.censor import censored
from gameday.conditions import Freeze, Threshold
from gameday.errors import SettingsError
from reports.notify import Notify

FILE = "gameday.toml"
ONLY_BY_HAND = ("context", "kubeconfig", "in_cluster")  # never from a file that lies about in a repository

OTHER_VARIABLES = frozenset({"GAMEDAY_STATE_DIR"})  # read elsewhere

SANDBOX_SAYS = frozenset(
    {"context", "kubeconfig", "namespace", "allow_namespaces", "selector", "service", "target", "model", "prometheus"}
)

_MATCHER = r'[a-zA-Z_]\w*\s*(?:=|!=|=~|!~)\s*"(?:[^"\\\n]|\\.)*"'
MATCHERS = re.compile(rf"\s*{_MATCHER}(?:\s*,\s*{_MATCHER})*\s*")

Share = Annotated[float, Field(gt=0, le=1)]
Duration = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """Everything that can be set; durations in seconds."""

    model_config = SettingsConfigDict(env_prefix="GAMEDAY_", extra="forbid", frozen=True)

    # which cluster
    context: str | None = None
    kubeconfig: Path | None = None
    in_cluster: bool = False

    # what is under test
    namespace: str = "llm"
    allow_namespaces: tuple[str, ...] = ("llm",)
    selector: str = ""  # the engines' labels; never empty when a fault is aimed
    service: str = ""  # the engines' Service, whose endpoints tell when a pod is out
    target: str = ""  # the URL that users speak to
    model: str = ""
    served_by: str = "x-served-by"  # answer header that names the pod
    served_zone: str = "x-served-zone"
    served_via: str = "x-gateway"  # … the gateway pod in front of it
    api_key_file: Path | None = None
    ca_file: Path | None = None  # of an https target with a CA of its own; None: those that the system trusts
    zone: str | None = None
    chaos_namespace: str = ""  # where Chaos Mesh runs; "": its installation is not looked at

    # Prometheus
    prometheus: str = ""
    prometheus_token_file: Path | None = None
    scrape_interval: Duration = 15

    # what a fault may touch
    max_share: Share = 0.5  # of the ready replicas
    max_zones: Share = 0.5  # of the zones with engines, lost altogether
    max_nodes: Share = 0.5  # of all nodes
    protected: str = "gameday.dev/protected=true"  # label of pods and nodes that are never hit
    overrule_pdbs: bool = False  # hit more than a PodDisruptionBudget's minAvailable leaves
    utilisation: str = ""  # PromQL: how busy the average engine is, 0–1; "": capacity is not checked
    max_utilisation: Share = 0.9  # of those that are left
    freeze: tuple[str, ...] = ()  # "Fri 16:00-Mon 08:00", "2026-12-20..2027-01-03"; local time
    incident_command: tuple[str, ...] = ()  # exit code 0: no incident is open
    incident_url: str = ""  # answers 204, [] or {"incidents": []} when none is open
    incident_token_file: Path | None = None
    expendable: bool = False  # sandbox only: lifts max_share and the last-zone rule
    allow_node_replacement: bool = False
    prober_image: str = "python:3.12-alpine"  # any with Python ≥ 3.8
    job_image: str = "busybox:1.36"  # of the Jobs that act on a node: any with a shell
    allow_missing: tuple[str, ...] = ()

    # how to run
    seed: int | None = None
    trials: Annotated[int, Field(ge=1, le=100)] = 1
    runs_dir: Path = Path("runs")
    dry_run: bool = False
    load_workers: Annotated[int, Field(ge=1, le=64)] = 1
    steady: Duration = 60  # how long the steady state must hold before the fault
    hold: Duration = 60  # how long the service must stay back in its objectives
    stop_below: Annotated[float, Field(ge=0, le=1)] = 0.2  # stop condition: success share …
    stop_after: Duration = 60  # … below it for so long
    heal_within: Duration = 60  # how long one undo may take until it is called failed

    # more stop conditions; like stop_below, each heals at once and fails
    slo: Annotated[float, Field(gt=0, lt=1)] = 0.999  # the service's availability objective, for its error budget
    stop_burn: Annotated[float, Field(ge=0)] = 0  # (1 − success) / (1 − slo) over stop_after; 0: off
    stop_replicas: Annotated[int, Field(ge=0)] = 0  # fewer ready engines; 0: off
    stop_when: tuple[str, ...] = ()  # PromQL, each "EXPRESSION > NUMBER"
    stop_alerts: str = ""  # alerts that fire with these label matchers: 'severity="critical"'; "": off
    expected_alerts: tuple[str, ...] = ()  # names of alerts that experiments are meant to raise
    stop_file: Path = Path("gameday.stop")

    # the sandbox's clocks, for what an experiment must outwait; "" on a real cluster
    clocks: str = ""
    repair_wait: Duration = 600  # node auto repair
    repair_poll: Duration = 30

    notify: Notify = Notify()  # who is told; secrets by file or by the name of a variable

    objectives: dict[str, dict[str, float]] = {}  # [objectives.<experiment>] "during.success.at_least" = 0.95

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        """`stop_when`, parsed."""
        return tuple(Threshold.parse(one) for one in self.stop_when)

    @property
    def freezes(self) -> tuple[Freeze, ...]:
        return tuple(Freeze.parse(one) for one in self.freeze)

    @field_validator("freeze")
    @classmethod
    def _freeze(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            Freeze.parse(one)
        return value

    @field_validator("stop_when")
    @classmethod
    def _stop_when(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            Threshold.parse(one)
        return value

    @field_validator("stop_alerts")
    @classmethod
    def _matchers(cls, value: str) -> str:
        """Label matchers, so that nothing but a selector can be made of them."""
        if value and not MATCHERS.fullmatch(value):
            raise ValueError('write label matchers, as in severity="critical",team=~"a|b"')
        return value

    @field_validator("target", "prometheus", "incident_url")
    @classmethod
    def _url(cls, value: str) -> str:
        if not value:
            return value
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError as wrong:
            raise ValueError(f"{value!r} is not a URL ({wrong})") from wrong
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is not a URL: write http://HOST:PORT or https://HOST:PORT")
        if parts.username or parts.password:
            raise ValueError(
                "a URL must not hold a password, which would be recorded: use api_key_file or a token file"
            )
        return value.rstrip("/")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, *_beneath


_beneath: tuple[PydanticBaseSettingsSource, ...] = ()  # file and sandbox, for the one call of `load`


def load(options: Mapping[str, Any], *, file: Path | None = None, sandbox: Mapping[str, Any] | None = None) -> Settings:
    """Merge all sources. `options` and `sandbox` may hold None for "not given".

    What a sandbox says of *where things are* (`SANDBOX_SAYS`) goes above file and environment, which may speak of
    another cluster: its load must never go elsewhere. The rest of it lies beneath everything.

    Raises `SettingsError` that names the source and the key.
    """
    _check_environment()
    global _beneath  # noqa: PLW0603 - pydantic-settings builds its sources from the class alone
    path = file or Path(FILE)
    written = _read(path) if file or path.exists() else {}
    given = {key: value for key, value in options.items() if value is not None}
    known = {key: value for key, value in (sandbox or {}).items() if value is not None}
    placed = {key: value for key, value in known.items() if key in SANDBOX_SAYS}
    _beneath = (InitSettingsSource(Settings, written), InitSettingsSource(Settings, known))
    try:
        return Settings(**{**placed, **given})
    except ValidationError as wrong:
        raise SettingsError(_explain(wrong, path, written, given)) from wrong
    except EnvironmentUnreadable as wrong:
        raise SettingsError(f"The environment has a GAMEDAY_ variable that cannot be read: {wrong}") from wrong
    finally:
        _beneath = ()


def _check_environment() -> None:
    """A mistyped variable would be ignored in silence otherwise."""
    for name in os.environ:
        ours = name.startswith("GAMEDAY_") and name not in OTHER_VARIABLES
        if ours and name.removeprefix("GAMEDAY_").lower() not in Settings.model_fields:
            raise SettingsError(f"The environment sets {name}, but there is no such setting: unset or correct it.")


def _read(path: Path) -> dict[str, Any]:
    try:
        written = tomllib.loads(path.read_text())
    except OSError as wrong:
        raise SettingsError(f"{path} cannot be read: {wrong.strerror}") from wrong
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as wrong:
        raise SettingsError(f"{path} is not valid TOML: {wrong}") from wrong
    for key in ONLY_BY_HAND:
        if key in written:
            raise SettingsError(
                f"{path} names a cluster ({key}), which only an option or GAMEDAY_{key.upper()} may: remove it there."
            )
    return written


def _explain(wrong: ValidationError, path: Path, written: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    first = wrong.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "settings"
    top = str(first["loc"][0]) if first["loc"] else ""
    place = (
        f"option --{top.replace('_', '-')}"
        if top in given
        else str(path)
        if top in written
        else f"GAMEDAY_{top.upper()}"
    )
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no setting {key!r}; the settings are listed in gameday.toml of the project."
    return f"{place}: {key} = {censored(repr(first['input']))} is wrong: {first['msg'].removeprefix('Value error, ')}."
