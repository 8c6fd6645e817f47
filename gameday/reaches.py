"""Where an activity of a team's experiment may reach, by what its arguments say: allowed namespaces, chosen targets.

Of chaostoolkit-kubernetes the signatures are known, and an action that leaves its selector or namespace out would mean
all of them, or `default`. Of other code only arguments that are called like a namespace are held to the allow-list,
and what a kubectl names.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from gameday.errors import ExperimentError

_NAMESPACES = ("ns", "namespace", "pod_namespace", "namespaces_selectors", "target_namespaces_selectors")
_SELECTS = ("name", "label_selector", "label_selectors", "annotations_selectors", "name_pattern")
_SELECTS_CHAOS = ("label_selectors", "annotations_selectors")  # there, `name` is that of the chaos resource


def check(what: str, action: bool, provider: Mapping[str, Any], namespaces: Sequence[str] | None) -> None:
    """Raise `ExperimentError` where it may reach too far. `what` begins its sentence; `namespaces` None: anywhere.

    `provider` is Chaos Toolkit's, its arguments with the configuration's values in them.
    """
    given: Any = provider.get("arguments") or {}
    if namespaces is not None and Path(str(provider.get("path", ""))).name == "kubectl":
        _allow(what, _of_kubectl(what, action, given), namespaces)
    if not isinstance(given, Mapping):  # a process' command line
        return
    module, func = str(provider.get("module", "")), str(provider.get("func", ""))
    ours = module.startswith("chaosk8s.")
    if namespaces is not None:
        named = _named(given) if ours else _listed(given)
        if module.startswith("chaosk8s.namespace") and "name" in given:
            named = iter((*named, str(given["name"])))
        _allow(what, named, namespaces)
    if not action or not ours:
        return
    takes = inspect.signature(getattr(import_module(module), func)).parameters
    if "ns" in takes and not given.get("ns"):
        raise ExperimentError(f"{what} names no ns, which would mean 'default': write it.")
    selects = _SELECTS_CHAOS if module.startswith("chaosk8s.chaosmesh") else _SELECTS
    by_pod = given.get("pod_label_selector") and given.get("pod_namespace")  # one without the other is ignored
    chosen = by_pod or given.get("spec_path") or any(_says(given.get(key)) for key in selects)
    if set(selects) & set(takes) and not chosen:
        keys = ", ".join(key for key in selects if key in takes)
        raise ExperimentError(f"{what} selects no targets, which would mean all of them: select some, by {keys}.")


def _allow(what: str, named: Iterator[str], namespaces: Sequence[str]) -> None:
    for where in named:
        if "${" in where:
            raise ExperimentError(f"{what} reaches namespace {where!r}, which nobody knows before it runs: write it.")
        if where not in namespaces:
            raise ExperimentError(
                f"{what} reaches namespace {where!r}, which is not in allow_namespaces ({', '.join(namespaces)})."
            )


def _of_kubectl(what: str, action: bool, given: Any) -> Iterator[str]:
    """The namespaces that a kubectl command line names: text, a list, or a mapping as Chaos Toolkit takes it."""
    if isinstance(given, Mapping):
        given = [one for pair in given.items() for one in pair]
    try:
        words = shlex.split(given) if isinstance(given, str) else [str(one) for one in given]
    except ValueError:  # an unclosed quote, of which the shell will complain
        words = str(given).split()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        if action and (word == "-A" or (name == "--all-namespaces" and value in ("", "true"))):
            raise ExperimentError(f"{what} reaches all namespaces ({word}): name one of allow_namespaces.")
        if name in ("-n", "--namespace"):
            yield value if has_value else following
        elif word.startswith("-n") and not word.startswith("--"):
            yield word.removeprefix("-n")


def _says(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _listed(given: Mapping[str, Any]) -> Iterator[str]:
    """The namespaces that arguments name; several with commas between, as chaosk8s takes them."""
    for key in _NAMESPACES:
        value = given.get(key)
        for one in value.split(",") if isinstance(value, str) else value if isinstance(value, list) else ():
            if isinstance(one, str) and one.strip():
                yield one.strip()


def _named(given: Mapping[str, Any]) -> Iterator[str]:
    """… and those in the resources that they give, as mappings, as text or as files."""
    yield from _listed(given)
    for key in ("spec_path", "resource_as_yaml_file"):
        try:
            yield from _within(yaml.safe_load(Path(str(given.get(key) or "")).read_text()))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
    for key in ("resource", "spec"):
        found = given.get(key)
        if isinstance(found, str):
            try:
                found = yaml.safe_load(found)
            except yaml.YAMLError:
                continue  # as their code will say
        yield from _within(found)


def _within(found: Any) -> Iterator[str]:
    if isinstance(found, list):
        for one in found:
            yield from _within(one)
    if not isinstance(found, Mapping):
        return
    for key, value in found.items():
        if key == "namespace" and isinstance(value, str):
            yield value
        elif key == "namespaces" and isinstance(value, list):
            yield from (str(one) for one in value)
        else:
            yield from _within(value)
