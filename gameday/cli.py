"""The `gameday` command. User errors are one sentence on stderr and exit code 2; never a traceback."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gameday import arena as arena_, halt, record, settings as settings_
from gameday.errors import GamedayError, RecordError, SettingsError
from gameday.judge import judge as judge_
from gameday.ledger import heal as heal_
from gameday.model import Verdict
from gameday.preflight import Check, Preflight
from gameday.rbac import show as show_rbac
from gameday.spec import SAFE_NAME
from gameday.toolkit import validate as validate_
from gameday.trials import Trials
from loadgen.cli import load
from probes.prometheus import Prometheus
from reports import as_json, console, html, junit, verdicts
from reports.gate import NEED, gate as gate_, history
from sandbox import options as sandbox_options, up as sandbox_up
from sandbox.up import SandboxError

P = ParamSpec("P")
R = TypeVar("R")


def one_sentence(act: Callable[P, R]) -> Callable[P, R]:
    """Errors that users meet, and files that cannot be read or written, become one sentence and exit code 2."""

    @wraps(act)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return act(*args, **kwargs)
        except (GamedayError, SandboxError) as wrong:
            click.echo(f"gameday: {wrong}", err=True)
            sys.exit(2)
        except BrokenPipeError:
            raise  # whoever read our output has seen enough
        except OSError as wrong:
            if wrong.filename is None:
                raise  # no file's fault, so a bug's
            click.echo(f"gameday: {wrong.filename} cannot be used: {wrong.strerror}.", err=True)
            sys.exit(2)

    return run


def _say(line: str) -> None:
    click.echo(line)


def cluster_options(act: Callable[..., Any]) -> Callable[..., Any]:
    for name, text in (
        ("--namespace", "namespace under test"),
        ("--kubeconfig", "kubeconfig file (default: $KUBECONFIG, ~/.kube/config)"),
        ("--context", "kubeconfig context (never implied; without it: a sandbox that is up)"),
    ):
        act = click.option(name, help=text)(act)
    return click.option("--in-cluster", is_flag=True, default=None, help="use the pod's own service account")(act)


def _settings(given: dict[str, Any]) -> settings_.Settings:
    """Settings for a command that acts on a cluster: the named one, else a sandbox that is up."""
    name = arena_.named(given)
    if name and name != arena_.SANDBOX_CONTEXT:
        found = settings_.load(given)
        if "namespace" not in found.model_fields_set:
            raise SettingsError(f"{name!r} is a real cluster: say which namespace by --namespace.")
        return found
    running = sandbox_up.find(sandbox_options.default_state_dir())
    if running is None:
        raise GamedayError("No cluster is named (--context NAME) and no sandbox is up (`gameday up`).")
    return settings_.load(given, sandbox=arena_.sandbox_settings(running))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gameday")
def main() -> None:
    """Game days for LLM inference on Kubernetes: `pytest experiments -k zone_outage` runs one."""


# ── the sandbox ─────────────────────────────────────────────────────────────────────────────────


@main.command()
@click.option("--stack", type=click.Choice(sandbox_options.STACKS), default="reference", show_default=True)
@click.option("--clocks", type=click.Choice(sorted(sandbox_options.CLOCKS)), help="[default: compressed]")
@click.option("--bare", is_flag=True, help="the control plane only, on clocks bare: no nodes, stack or Prometheus")
@click.option(
    "--control-plane",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="real etcd, kube-apiserver, kube-controller-manager and kube-scheduler from DIR [$KUBEBUILDER_ASSETS]",
)
@click.option("--api-port", type=click.IntRange(0, 65535), default=0, help="on 127.0.0.1; 0: any free one")
@click.option("--prometheus-port", type=click.IntRange(0, 65535), default=0)
@click.option("--target-port", type=click.IntRange(0, 65535), default=0)
@click.option("--zone-latency", "zone_latency_ms", type=float, default=0.0, metavar="MS", help="one way, between zones")
@one_sentence
def up(clocks: str | None, bare: bool, **given: Any) -> None:
    """Start the sandbox and leave it running."""
    chosen = sandbox_options.CLOCKS[clocks or ("bare" if bare else "compressed")]
    wanted = sandbox_options.Options(clocks=chosen, bare=bare, **given)
    _show(sandbox_up.up(wanted, _say))


@main.command()
@one_sentence
def down() -> None:
    """Stop the sandbox and remove everything of it, also after a crash."""
    was = sandbox_up.down(sandbox_options.default_state_dir())
    _say("sandbox is down" if was else "no sandbox was up")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@one_sentence
def status(as_json: bool) -> None:
    """Say whether a sandbox is up, and how to reach it."""
    running = sandbox_up.find(sandbox_options.default_state_dir())
    if running is None:
        _say("{}" if as_json else "no sandbox is up")
        sys.exit(1)
    if as_json:
        _say(json.dumps(asdict(running), default=str, indent=2))
    else:
        _show(running)


def _show(running: sandbox_up.Running) -> None:
    for name, value in (
        ("stack", f"{running.stack} ({running.clocks} clocks)"),
        ("API", running.api_url),
        ("target", running.target_url),
        ("Prometheus", running.prometheus_url),
        ("not enforced", running.not_enforced),
        ("kubectl", f"kubectl --kubeconfig {running.kubeconfig} get pods -A -o wide"),
    ):
        if value:
            _say(f"{name:<11} {value}")


# ── a cluster ───────────────────────────────────────────────────────────────────────────────────


@main.command()
@cluster_options
@click.option("--selector", help="labels of the engines")
@click.option("--target", help="URL that users send requests to")
@click.option("--prometheus", help="URL of Prometheus")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@one_sentence
def doctor(as_json: bool, **given: Any) -> None:
    """Check everything that an experiment needs, and say what to do. Exit code 1 when something is wrong."""
    found = _settings(given)
    cluster = arena_.connect(found)
    prometheus = Prometheus(found.prometheus, found.prometheus_token_file) if found.prometheus else None
    checks = list(Preflight(cluster, prometheus, found).run())
    if as_json:
        _say(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _show_checks(checks)
    sys.exit(0 if all(check.ok for check in checks) else 1)


def _show_checks(checks: Sequence[Check]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("check", "", "finding", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(
            Text(check.name),
            Text("ok", "green") if check.ok else Text("WRONG", "bold red"),
            Text(check.detail),
            Text("" if check.ok else check.todo),
        )
    Console(highlight=False, soft_wrap=False).print(table)


@main.command()
@cluster_options
@click.option("--run", help="only what this run left behind")
@one_sentence
def heal(run: str | None, **given: Any) -> None:
    """Undo what earlier runs left behind, from the ledger in the cluster. Safe to repeat."""
    if run is not None and not SAFE_NAME.fullmatch(run):
        raise SettingsError(f"{run!r} cannot be a run: its id stands in runs/ and in `gameday doctor`.")
    found = _settings(given)
    cluster = arena_.connect(found)
    count = heal_(cluster, run=run, within=found.heal_within, say=_say)
    halt.clear_dead(cluster)
    _say(f"{count} undone; nothing is left" if count else "nothing to heal")


def _who() -> str:
    """Our name; in a container often nobody has one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@main.command()
@cluster_options
@click.option("--reason", default="", help="shown in the verdict")
@click.option("--within", type=click.FloatRange(min=1), default=300, show_default=True, help="seconds to wait for it")
@one_sentence
def stop(reason: str, within: float, **given: Any) -> None:
    """End the game day that is at work in the namespace, from any machine; it heals before it leaves."""
    cluster = arena_.connect(_settings(given))
    took = halt.request(cluster, reason or f"asked for by {_who()}", within=within, say=_say)
    _say(f"it healed and left after {took:.1f} s")


@main.command()
@click.option("--namespace", required=True, help="namespace under test")
@click.option("--pods-only", is_flag=True, help="without the rights over nodes that zone and node faults need")
@click.option("--chaos-namespace", default="", help="where Chaos Mesh runs: lets `gameday doctor` look at it")
@click.option("--group", default="", help="bind to this group of users instead of a ServiceAccount")
@one_sentence
def rbac(namespace: str, pods_only: bool, chaos_namespace: str, group: str) -> None:
    """Print the least rights that the harness needs, for `kubectl apply -f -`."""
    _say(show_rbac(namespace, pods_only=pods_only, chaos_namespace=chaos_namespace, group=group))


# ── run directories ─────────────────────────────────────────────────────────────────────────────


def _experiments(directory: Path) -> list[Path]:
    """The experiment directories in a run directory, or the directory itself."""
    if (directory / "run.json").exists():
        return [directory]
    found = sorted(path.parent for path in directory.glob("*/run.json"))
    if not found:
        raise RecordError(f"{directory} is not a run directory: it holds no run.json.")
    return found


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@one_sentence
def judge(directory: Path) -> None:
    """Recompute the verdicts from the record, byte for byte. Exit code 1 unless all are PASS."""
    judged = []
    for one in _experiments(directory):
        timeline, objectives = record.load(one)
        judgement = judge_(timeline, objectives)
        path = one / "verdict.json"
        was = path.read_bytes() if path.exists() else b""
        if record.write_verdict(one, judgement).read_bytes() != was and was:
            click.echo(f"gameday: {path} is not what the record comes to; it was written anew.", err=True)
        judged.append(judgement)
    pooled: list[Trials] = []
    if not (directory / "run.json").exists():  # a whole run: what could not begin has no record, and is no PASS
        entries = verdicts.entries(directory)
        judged += [e.judgement for e in entries if not (e.dir / "run.json").exists()]
        pooled += verdicts.trials(entries)
    console.show(judged)
    for trials in pooled:
        _say(f"{trials.experiment}: {trials.story}")
    worst = Verdict.worst([*(one.verdict for one in judged), *(trials.verdict for trials in pooled)])
    sys.exit(0 if worst is Verdict.PASS else 1)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@one_sentence
def report(directory: Path) -> None:
    """Write the reports of a run directory anew: HTML, and of a whole run junit.xml and summary.json, too."""
    for one in _experiments(directory):
        _say(str(html.write(one)))
    if not (directory / "run.json").exists():
        for path in (html.write_index(directory), junit.write(directory), as_json.write(directory)):
            _say(str(path))


@main.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@one_sentence
def validate(files: tuple[Path, ...]) -> None:
    """Check gameday.toml, the environment, and any experiment.json or *.chaos.yaml|json given."""
    settings_.load({})
    _say("settings are valid")
    for path in files:
        _say(f"{path} is valid: {validate_(path)}")


@main.command("gate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--baseline", "baselines", multiple=True, type=click.Path(path_type=Path), help="runs to compare with")
@click.option("--by", type=click.FloatRange(min=0), default=0.1, show_default=True, help="growth beyond noise")
@click.option("--last", type=click.IntRange(min=1), default=10, show_default=True, help="how many earlier runs count")
@click.option("--need", type=click.IntRange(min=2), default=NEED, show_default=True, help="fewer tell nothing")
@click.option("--strict", is_flag=True, help="close also where nothing can be told")
@one_sentence
def gate(run: Path, baselines: tuple[Path, ...], by: float, last: int, need: int, strict: bool) -> None:
    """May this run go out? All verdicts PASS, and nothing slower than before beyond noise. Exit code 0 or 1."""
    found = gate_(run, baselines or history(run), by=by, last=last, need=need, strict=strict)
    _say(found.story)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a") as file:
            file.write(found.markdown + "\n")
    sys.exit(0 if found.passed else 1)


# ── the load generator ──────────────────────────────────────────────────────────────────────────


main.add_command(load)


if __name__ == "__main__":
    main()
