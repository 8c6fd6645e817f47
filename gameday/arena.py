"""Where experiments run: the cluster that the user named, or the sandbox. The plugin's and the CLI's start-up.

Besides the CLI this is the only module that knows of the sandbox: everything else sees a Kubernetes API, a
Prometheus and an endpoint.
"""

from __future__ import annotations

import os
import random
import secrets
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gameday import settings as settings_
from gameday.censor import remember
from gameday.cluster import Cluster
from gameday.errors import ClusterError, SandboxUnavailable, SettingsError
from gameday.run import Arena
from gameday.settings import Settings
from probes.prometheus import Prometheus
from reports.live import Progress
from sandbox import options as sandbox_options, up as sandbox_up
from sandbox.up import SandboxError

SANDBOX_CONTEXT = "gameday-sandbox"
EXPLICIT = ("namespace", "allow_namespaces", "selector", "service", "target", "model", "prometheus")
FILE_ONLY = ("allow_namespaces", "service", "model")  # no option sets them
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# What a rehearsal on compressed clocks can afford; everything is a setting and may be overridden (seconds).
REHEARSAL = {"steady": 10.0, "hold": 8.0, "stop_after": 15.0, "heal_within": 30.0}


@dataclass(frozen=True, slots=True)
class Opened:
    """An arena, and whether we started the sandbox beneath it (so that we take it down again)."""

    arena: Arena
    started_sandbox: Path | None  # its state directory

    def close(self) -> None:
        self.arena.prometheus.close()
        if self.started_sandbox is not None:
            sandbox_up.down(self.started_sandbox)


def named(options: Mapping[str, Any]) -> str:
    """The cluster that the user named by option or environment; "" for none."""
    found = settings_.load(options)
    return "in-cluster" if found.in_cluster else found.context or ""


def sandbox_settings(running: sandbox_up.Running) -> dict[str, Any]:
    """What a sandbox knows of itself, as the lowest layer of settings."""
    clocks = sandbox_options.CLOCKS[running.clocks]
    rehearsal = REHEARSAL if running.clocks == sandbox_options.COMPRESSED.name else {}
    return {
        "context": running.context,
        "kubeconfig": running.kubeconfig,
        "namespace": running.namespace,
        "allow_namespaces": (running.namespace,),
        "selector": running.selector,
        "service": running.selector.partition("=")[2],
        "target": running.target_url,
        "model": running.model,
        "prometheus": running.prometheus_url,
        "scrape_interval": clocks.scrape_interval,
        "expendable": running.expendable,
        "clocks": clocks.name,
        "repair_wait": clocks.repair_wait,
        "repair_poll": clocks.repair_poll,
        **rehearsal,
    }


def open_arena(
    options: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    progress: Callable[[Progress], None],
    sandbox: Mapping[str, Any] | None = None,
) -> Opened:
    """Connect to the named cluster, else find or start a sandbox (`sandbox`: options for one that is started)."""
    name = named(options)
    started: Path | None = None
    if name and name != SANDBOX_CONTEXT:
        found = settings_.load(options)
        check_named(found, name)
        if urlsplit(found.target).hostname in LOOPBACK:
            say(f"warning: {found.target} looks like a port-forward, which pins one pod: its loss will look total")
        is_sandbox = False
    else:
        state = sandbox_options.default_state_dir()
        running = sandbox_up.find(state)
        if running is None and name == SANDBOX_CONTEXT:
            raise ClusterError("No sandbox is up: start one with `gameday up`.")
        # Wrong settings are told before a sandbox is started for them.
        settings_.load(options, sandbox=sandbox_settings(running) if running else None)
        if running is None:
            running = _start(state, sandbox or {}, say)
            started = state
        found = settings_.load(options, sandbox=sandbox_settings(running))
        is_sandbox = True
    try:
        return Opened(_arena(found, is_sandbox, options, say, progress), started)
    except BaseException:
        if started is not None:
            sandbox_up.down(started)
        raise


def _start(state: Path, wanted: Mapping[str, Any], say: Callable[[str], None]) -> sandbox_up.Running:
    try:
        return sandbox_up.up(sandbox_options.Options(state_dir=state, parent=os.getpid(), **wanted), say)
    except SandboxError as wrong:
        raise SandboxUnavailable(str(wrong)) from wrong


def check_named(found: Settings, name: str) -> None:
    """On a cluster of somebody's own nothing goes by default: what is hit, and what users speak to, is said."""
    if found.expendable:
        raise SettingsError(f"expendable is for the sandbox only, and {name!r} is a real cluster: remove it.")
    for key in ("namespace", "selector") if found.dry_run else EXPLICIT:
        if key not in found.model_fields_set:
            raise SettingsError(
                f"{name!r} is a real cluster, on which nothing goes by default: set {key} "
                f"(gameday.toml, GAMEDAY_{key.upper()}{'' if key in FILE_ONLY else f', --{key}'})."
            )


def connect(found: Settings) -> Cluster:
    return Cluster.connect(
        context=found.context, kubeconfig=found.kubeconfig, in_cluster=found.in_cluster, namespace=found.namespace
    )


def _arena(
    found: Settings,
    is_sandbox: bool,
    options: Mapping[str, Any],
    say: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> Arena:
    _keep_secret(found)
    cluster = connect(found)
    cluster.version()  # an unreachable API server is told now
    seed = found.seed if found.seed is not None else random.SystemRandom().randrange(1, 10_000)
    run_id = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return Arena(
        cluster=cluster,
        prometheus=Prometheus(found.prometheus or "http://127.0.0.1:9", found.prometheus_token_file),
        settings=found,
        run_id=run_id,
        root=found.runs_dir / run_id,
        seed=seed,
        sandbox=is_sandbox,
        objectives_from=settings_.FILE,
        reproduce=lambda experiment: _reproduce(experiment, seed, options),
        progress=progress,
        say=say,
    )


def _keep_secret(found: Settings) -> None:
    """What stands in the files that settings name is never told, whoever quotes it in an error."""
    for path in (found.api_key_file, found.prometheus_token_file):
        with suppress(OSError, UnicodeDecodeError):  # whoever needs it says that it cannot be read
            if path is not None:
                remember(path.read_text().strip())


def _reproduce(experiment: str, seed: int, options: Mapping[str, Any]) -> str:
    given = [
        part
        for key, value in options.items()
        if value not in (None, False, (), "") and key not in ("seed", "runs_dir", "dry_run", "trials")
        for part in (f"--{key.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    return shlex.join(["pytest", "experiments", "-k", experiment, "--seed", str(seed), *given])


def open_named() -> Opened:
    """The arena of a plain `chaos run`: the cluster that `GAMEDAY_CONTEXT` names, and no other."""
    if not named({}):
        raise ClusterError(
            f"`chaos run` needs a named cluster: set GAMEDAY_CONTEXT ({SANDBOX_CONTEXT} for a sandbox that is up)."
        )
    return open_arena({}, say=print, progress=lambda _: None)
