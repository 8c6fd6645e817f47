"""The click group `load`, for `gameday load …`. Bad input is one sentence and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from gameday.errors import GamedayError, LoadError
from loadgen import run as run_, selftest as selftest_, serve
from loadgen.traffic import Change, Chat, Deadlines, Ramp, Spike, Trace, Traffic

P = ParamSpec("P")
R = TypeVar("R")


def one_sentence(act: Callable[P, R]) -> Callable[P, R]:
    @wraps(act)
    def safe(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return act(*args, **kwargs)
        except GamedayError as wrong:
            click.echo(f"gameday: {wrong}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:  # before the load began: then `run` listens for it
            click.echo("gameday: stopped before any load", err=True)
            sys.exit(2)

    return safe


def _say(line: str) -> None:
    click.echo(line)


_PATH = click.Path(path_type=Path)


@click.group()
def load() -> None:
    """The load generator by itself."""


@load.command("selftest")
@one_sentence
def selftest() -> None:
    """Against a server that misbehaves in every known way: is each told apart?"""
    sys.exit(selftest_.run(_say))


@load.command("run")
@click.option("--target", required=True, envvar="GAMEDAY_TARGET", help="http[s]://host:port of the OpenAI-like API")
@click.option("--model", required=True, envvar="GAMEDAY_MODEL", help="the model's name")
@click.option("--seconds", type=float, default=60.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--rate", type=float, default=20.0, show_default=True, help="requests a second, without the canary")
@click.option("--arrivals", type=click.Choice(["poisson", "constant", "gamma"]), default="poisson", show_default=True)
@click.option("--burstiness", type=float, default=1.0, show_default=True, help="of gamma: the gaps' variation")
@click.option("--prompt-tokens", type=click.IntRange(1), help="fixed (default: lognormal, median 120)")
@click.option("--output-tokens", type=click.IntRange(1), help="fixed (default: lognormal, median 48)")
@click.option("--long-share", type=float, default=0.08, show_default=True, help="share of long streams")
@click.option("--long-tokens", type=click.IntRange(1), default=320, show_default=True)
@click.option("--canary-rate", type=float, default=50.0, show_default=True, help="one-token requests a second")
@click.option("--api", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@click.option("--no-stream", is_flag=True, help="answers in one piece")
@click.option("--turns", type=int, default=1, show_default=True, help="of each session")
@click.option("--think", type=float, default=5.0, show_default=True, help="seconds between turns, on average")
@click.option("--real-history", is_flag=True, help="later turns repeat the server's answers, not the plan's")
@click.option(
    "--prefix-groups", type=click.IntRange(0), default=0, show_default=True, help="groups that share a prefix"
)
@click.option("--prefix-tokens", type=click.IntRange(0), default=0, show_default=True, help="tokens of that prefix")
@click.option("--extra", default="", metavar="JSON", help='merged into every body, like {"ignore_eos": true}')
@click.option("--deadline", multiple=True, metavar="NAME:SECONDS", help="dns, connect, first_token, stall or total")
@click.option(
    "--in-flight-max", type=int, default=2000, show_default=True, help="beyond it requests are shed, and counted"
)
@click.option("--ramp", multiple=True, metavar="AT:OVER:TIMES", help="from AT s on, over OVER s, TIMES the rate")
@click.option("--spike", multiple=True, metavar="AT:LASTING:TIMES", help="TIMES the rate for LASTING s from AT s on")
@click.option("--traffic", "spec", type=_PATH, help="a traffic spec (JSON) instead of the options above")
@click.option("--trace", type=_PATH, help="replay a CSV of TIMESTAMP,ContextTokens,GeneratedTokens instead")
@click.option("--speed-up", type=float, default=1.0, show_default=True, help="of the trace")
@click.option("--offset", type=float, default=0.0, show_default=True, help="seconds into the trace")
@click.option("--cap", type=int, default=1_000_000, show_default=True, help="requests of the trace, at most")
@click.option("--prompt-max", type=int, default=1_000_000, show_default=True, help="cut the trace's prompts to this")
@click.option("--output-max", type=int, default=1_000_000, show_default=True, help="cut the trace's answers to this")
@click.option("--workers", type=int, default=1, show_default=True, help="processes on this machine, one per core")
@click.option("--worker", "remote", multiple=True, metavar="HOST:PORT", help="a `gameday load worker` elsewhere")
@click.option("--token-file", type=_PATH, help="the token of those workers")
@click.option("--worker-ca", type=_PATH, help="speak TLS with those workers; their CA")
@click.option("--api-key-file", type=_PATH)
@click.option("--api-key-env", metavar="NAME")
@click.option("--ca-file", type=_PATH, help="CA of the target's certificate")
@click.option("--header", multiple=True, metavar="NAME:VALUE")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=0, help="/metrics, worker n at PORT + n; 0: none"
)
@click.option("--metrics-address", default="127.0.0.1", show_default=True, help="who may scrape: 0.0.0.0 for everybody")
@click.option("--out", type=_PATH, help="an empty directory for the records (default: runs/load-<time>)")
@click.option("--every", type=float, default=5.0, show_default=True, help="seconds between live lines")
@one_sentence
def run(**given: Any) -> None:
    """Send a plan of requests, and account for every one of them.

    Exit code 0: accounted for and sound; 1: the load generator itself was saturated; 2: it could not start, or a
    worker was lost.
    """
    account = run_.run(
        target=given["target"],
        model=given["model"],
        traffic=_traffic(given),
        seconds=given["seconds"],
        seed=given["seed"],
        workers=given["workers"],
        out=given["out"] or Path("runs") / f"load-{datetime.now().astimezone():%Y%m%d-%H%M%S}",
        say=_say,
        every=max(1.0, given["every"]),
        headers=dict(_header(one) for one in given["header"]),
        api_key_file=given["api_key_file"],
        api_key_env=given["api_key_env"],
        ca_file=given["ca_file"],
        metrics_port=given["metrics_port"],
        metrics_address=given["metrics_address"],
        remote=given["remote"],
        remote_token_file=given["token_file"],
        remote_ca=given["worker_ca"],
    )
    for line in account.lines():
        _say(line)
    sys.exit(0 if account.sound else 1)


_OF_ANY = {"api", "no_stream", "extra", "deadline", "in_flight_max"}
_OF_A_TRACE = {"speed_up", "offset", "cap", "prompt_max", "output_max"}
_OF_CHAT = {
    *("rate", "arrivals", "burstiness", "prompt_tokens", "output_tokens", "long_share", "long_tokens", "canary_rate"),
    *("turns", "think", "real_history", "prefix_groups", "prefix_tokens", "ramp", "spike"),
}


def _refuse(names: set[str], why: str) -> None:
    """An option that would be passed over in silence is refused."""
    source = click.get_current_context().get_parameter_source
    for name in sorted(names):
        if source(name) is not ParameterSource.DEFAULT:
            raise LoadError(f"--{name.replace('_', '-')} {why}")


def _traffic(given: dict[str, Any]) -> Traffic:
    if given["spec"] and given["trace"]:
        raise LoadError("--traffic and --trace exclude each other")
    if given["spec"]:
        _refuse(_OF_ANY | _OF_A_TRACE | _OF_CHAT, "goes into the traffic spec, where there is one")
        try:
            return Traffic.from_json(given["spec"].read_bytes())
        except OSError as e:
            raise LoadError(f"the traffic spec {given['spec']} cannot be read: {e.strerror or e}") from e
    deadlines = _deadlines(given["deadline"])
    if given["trace"]:
        _refuse(_OF_CHAT, "does not go with --trace: the trace says it all")
        trace = Trace(
            path=str(given["trace"]),
            speed_up=given["speed_up"],
            offset=given["offset"],
            cap=given["cap"],
            prompt_max=given["prompt_max"],
            output_max=given["output_max"],
            api=given["api"],
            stream=not given["no_stream"],
            extra=given["extra"],
        )
        return Traffic(streams=(trace,), deadlines=deadlines, in_flight_max=given["in_flight_max"])
    _refuse(_OF_A_TRACE, "goes with --trace")
    lengths = {name: given[name] for name in ("prompt_tokens", "output_tokens") if given[name] is not None}
    return Chat(
        per_second=given["rate"],
        arrivals=given["arrivals"],
        burstiness=given["burstiness"],
        changes=_changes(given["ramp"], given["spike"]),
        long_share=given["long_share"],
        long_tokens=given["long_tokens"],
        canary_per_second=given["canary_rate"],
        api=given["api"],
        stream=not given["no_stream"],
        turns=given["turns"],
        think=given["think"],
        history="answers" if given["real_history"] else "planned",
        prefix_groups=given["prefix_groups"],
        prefix_tokens=given["prefix_tokens"],
        extra=given["extra"],
        deadlines=deadlines,
        in_flight_max=given["in_flight_max"],
        **lengths,
    )


def _deadlines(given: tuple[str, ...]) -> Deadlines:
    limits: dict[str, float] = {}
    for text in given:
        name, _, seconds = text.partition(":")
        try:
            limits[name] = float(seconds)
        except ValueError:
            raise LoadError(f"{text!r} is not a deadline like first_token:10") from None
    unknown = sorted(set(limits) - {each.name for each in fields(Deadlines)})
    if unknown:
        raise LoadError(f"{unknown[0]!r} is not a deadline; there are {', '.join(f.name for f in fields(Deadlines))}")
    return Deadlines(**limits)


def _changes(ramps: tuple[str, ...], spikes: tuple[str, ...]) -> tuple[Change, ...]:
    return (*(Ramp(*_three(one)) for one in ramps), *(Spike(*_three(one)) for one in spikes))


def _three(text: str) -> tuple[float, float, float]:
    try:
        at, over, times = (float(part) for part in text.split(":"))
    except ValueError:
        raise LoadError(f"{text!r} is not three numbers like 30:10:4") from None
    return at, over, times


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise LoadError(f"{text!r} is not a header like X-Tenant:gameday")
    return name.strip(), value.strip()


@load.command("worker")
@click.option("--listen", default="127.0.0.1:7001", show_default=True, metavar="HOST:PORT", help="port 0: any free one")
@click.option("--token-file", type=_PATH, required=True, help="whoever knows this token may order load from here")
@click.option("--cert", type=_PATH, help="speak TLS with this certificate chain (PEM)")
@click.option("--key", type=_PATH, help="its private key, when it is not in the same file")
@click.option("--api-key-file", type=_PATH, help="the target's API key, on this machine")
@click.option("--api-key-env", metavar="NAME")
@click.option("--ca-file", type=_PATH, help="CA of the target's certificate, on this machine")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=0, help="/metrics of this worker; 0: none")
@click.option("--metrics-address", default="127.0.0.1", show_default=True, help="who may scrape: 0.0.0.0 for everybody")
@click.option("--once", is_flag=True, help="end after one leader")
@one_sentence
def worker(**given: Any) -> None:
    """Lend this machine to `gameday load run --worker` elsewhere. Ends with SIGTERM."""
    own = serve.Own(
        given["api_key_file"],
        given["api_key_env"],
        given["ca_file"],
        given["metrics_port"],
        given["metrics_address"],
    )
    serve.serve(
        given["listen"],
        given["token_file"],
        _say,
        own=own,
        cert=given["cert"],
        key=given["key"],
        once=given["once"],
    )


if __name__ == "__main__":
    load()
