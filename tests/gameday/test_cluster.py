"""The one module that speaks to Kubernetes: named clusters only, one-sentence errors, watches without gaps."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gameday import clock, cluster as cluster_
from gameday.cluster import Cluster, Refused, Unreachable, Watched, to_node
from gameday.errors import ClusterError
from gameday.kinds import CONFIGMAPS


def configmap(name: str, **data: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "llm"}, "data": data}


def test_no_cluster_is_ever_implied(kubeconfig: Path) -> None:
    with pytest.raises(ClusterError, match="No cluster is named"):
        Cluster.connect(context=None, kubeconfig=kubeconfig, namespace="llm")


def test_an_unknown_context_names_the_known_ones(kubeconfig: Path) -> None:
    with pytest.raises(ClusterError, match=r"'prod' is not in .*; it has: gameday-sandbox"):
        Cluster.connect(context="prod", kubeconfig=kubeconfig, namespace="llm")


def test_a_missing_kubeconfig_is_not_localhost(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="No kubeconfig at"):
        Cluster.connect(context="prod", kubeconfig=tmp_path / "none", namespace="llm")


def test_a_broken_kubeconfig_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "config"
    broken.write_text("{not: yaml: at all")
    with pytest.raises(ClusterError, match="cannot be used"):
        Cluster.connect(context="prod", kubeconfig=broken, namespace="llm")


def test_an_api_server_that_does_not_answer(kubeconfig: Path, tmp_path: Path) -> None:
    dead = tmp_path / "config"
    dead.write_text(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:9", kubeconfig.read_text()))
    cluster = Cluster.connect(context="gameday-sandbox", kubeconfig=dead, namespace="llm")
    with pytest.raises(Unreachable, match="does not answer") as told:
        cluster.version()
    assert "\n" not in str(told.value)


def test_create_find_patch_delete(cluster: Cluster) -> None:
    cluster.create(CONFIGMAPS, configmap("one", a="1"))
    with pytest.raises(Refused) as conflict:
        cluster.create(CONFIGMAPS, configmap("one"))
    assert conflict.value.code == 409
    cluster.patch(CONFIGMAPS, "one", {"data": {"a": None, "b": "2"}}, "llm")
    assert cluster.get(CONFIGMAPS, "one", "llm")["data"] == {"b": "2"}
    assert cluster.delete(CONFIGMAPS, "one", "llm")
    assert not cluster.delete(CONFIGMAPS, "one", "llm")
    assert cluster.find(CONFIGMAPS, "one", "llm") is None


def test_dry_run_changes_nothing(cluster: Cluster) -> None:
    cluster.create(CONFIGMAPS, configmap("dry"), dry_run=True)
    assert cluster.find(CONFIGMAPS, "dry", "llm") is None


def test_a_watch_sees_every_change_and_ends_when_told(cluster: Cluster) -> None:
    stop, seen = threading.Event(), list[tuple[str, str]]()

    def note(event: Watched) -> None:
        if event.object["metadata"]["name"].startswith("w-"):
            seen.append((event.type, event.object["metadata"]["name"]))

    cluster.create(CONFIGMAPS, configmap("w-old"))
    thread = threading.Thread(target=cluster.watch, args=(CONFIGMAPS, "llm", note, stop), daemon=True)
    thread.start()
    clock.wait_until(lambda: ("ADDED", "w-old") in seen, within=10, what="the listed object")
    for number in range(20):
        cluster.create(CONFIGMAPS, configmap(f"w-{number}"))
    cluster.delete(CONFIGMAPS, "w-old", "llm")
    clock.wait_until(lambda: len(seen) == 22, within=10, what="all 22 changes")
    assert seen[-1] == ("DELETED", "w-old")
    stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize("odd", ["<html>log in</html>", "[]", '{"type": "ADDED"}'])
def test_a_watch_goes_on_after_what_is_no_event(odd: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's page ended its thread for good; that of `gameday stop` nobody missed."""
    stop, seen, lines = threading.Event(), list[str](), cluster_._lines
    pages = [odd]

    def brought(*given: Any) -> Iterator[str]:
        if pages:
            yield pages.pop()
        yield from lines(*given)

    monkeypatch.setattr(cluster_, "_lines", brought)

    def note(event: Watched) -> None:
        seen.append(event.object["metadata"]["name"])

    threading.Thread(target=cluster.watch, args=(CONFIGMAPS, "llm", note, stop), daemon=True).start()
    clock.wait_until(lambda: not pages, within=10, what="the page")
    cluster.create(CONFIGMAPS, configmap(f"after-{len(odd)}"))
    clock.wait_until(lambda: f"after-{len(odd)}" in seen, within=10, what="the change after it")
    stop.set()


def test_rights_are_asked_for(cluster: Cluster) -> None:
    assert cluster.can("delete", CONFIGMAPS, "llm")


def test_taints_that_keep_pods_away_are_those_of_people() -> None:
    taints = [
        {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
        {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
        {"key": "soft", "effect": "PreferNoSchedule"},
        {"key": "dedicated", "value": "llm", "effect": "NoExecute"},
    ]
    node = to_node({"metadata": {"name": "n", "uid": "u"}, "spec": {"taints": taints}})
    assert node.taints == (("dedicated", "NoExecute"),)
