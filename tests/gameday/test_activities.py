"""A team's own experiments, read and run: mistakes are told with their place, and no word is never a good word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from kubernetes.config import kube_config
from test_session import session

import faults
from faults import ChaosToolkit
from faults.act import NotInjected, perform
from faults.base import Call, Undo
from faults.undo import undo
from gameday import activities, clock, finish
from gameday.activities import OutOfTolerance, Unreadable, parse, probe, read, run
from gameday.censor import censored
from gameday.errors import ClusterError, ExperimentError, HealError
from gameday.login import Login
from gameday.model import FaultMark, Step
from gameday.own import load
from gameday.tape import Tape

HERE = "tests_activities_theirs"
THEIRS = """
import os, time
def nothing(): return True
def says(value): return value
def nan(): return float("nan")
def raises(): raise RuntimeError("boom")
def leaves(): raise SystemExit(0)
def interrupts(): raise KeyboardInterrupt
def sleeps(seconds): time.sleep(seconds); return True
def context(): return os.environ["KUBERNETES_CONTEXT"]
def uses(secrets=None): raise RuntimeError("refused " + secrets["password"])
"""
ENVIRONMENT = {"KUBECONFIG": "/nonexistent", "KUBERNETES_CONTEXT": "staging"}


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{HERE}.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, HERE, raising=False)
    # Set for good by the first activity: the tests are one process.
    monkeypatch.setattr(activities, "_entered", {})
    monkeypatch.setattr(activities, "_begun", set())
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", kube_config.KUBE_CONFIG_DEFAULT_LOCATION)
    for name in ("KUBECONFIG", "KUBERNETES_CONTEXT"):
        monkeypatch.setenv(name, "/none")


def act(func: str, kind: str = "action", *, arguments: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    provider: dict[str, Any] = {"type": "python", "module": HERE, "func": func}
    if arguments:
        provider["arguments"] = arguments
    return {"type": kind, "name": more.pop("name", func), "provider": provider | more.pop("provider", {}), **more}


def experiment(*method: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": "1.0.0", "title": "Theirs", "description": "d", "method": list(method), **more}


def own(*method: dict[str, Any], **more: Any) -> activities.Own:
    return parse(experiment(*method, **more), "x.chaos.yaml")


def only_probe(*, tolerance: Any, arguments: dict[str, Any] | None = None, func: str = "says") -> str:
    found = own(act("nothing"), act(func, "probe", arguments=arguments, tolerance=tolerance))
    return probe(found, found.method[1], ENVIRONMENT)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.chaos.yaml", "method: [\n  - a: {", "x.chaos.yaml:2:"),
        ("x.chaos.json", '{"method": [,]}', "x.chaos.json:1:13: not JSON"),
        ("x.chaos.yaml", "- a\n- b\n", "is a mapping, not a list"),
        ("x.chaos.yaml", "title: x\nmethod: {}\n", "x.chaos.yaml: method must be a list"),
        ("x.chaos.yaml", "title: x\n", "method has no action: nothing would be broken"),
        ("x.chaos.yaml", "method: [{name: a, type: act}]", "method[0]: an activity has a name and the type"),
        ("x.chaos.yaml", "method: [{ref: elsewhere}]", "method[0]: there is no activity 'elsewhere'"),
        ("x.chaos.yaml", "method: [{name: a, type: action, background: true}]", "background activities cannot"),
        ("x.chaos.yaml", "secrets: {k8s: {token: abc}}\nmethod: []", "secrets.k8s.token: a secret must not be written"),
        ("x.chaos.yaml", "controls: [{name: c}]\nmethod: []", "controls: gameday does not run them"),
        (
            "x.chaos.yaml",
            "steady-state-hypothesis: {probes: [{name: p, type: probe}]}\nmethod: [{name: a, type: action}]",
            "probe 'p' has no tolerance",
        ),
        ("x.chaos.yaml", "method: 5", "method must be a list"),
        ("x.chaos.yaml", "method: [{name: [], type: action}]", "an activity has a name"),
        ("x.chaos.yaml", "method: [{ref: []}]", "there is no activity []"),
        ("x.chaos.yaml", "method: [{name: a, type: action, pauses: 3}]", "method[0]: pauses are a mapping"),
        ("x.chaos.yaml", "steady-state-hypothesis: {probes: true}", "steady-state-hypothesis.probes must be a list"),
        ("x.chaos.json", "[" * 100_000, "nested too deeply"),
        (
            "x.chaos.yaml",
            "method: [{name: a, type: action}]\nextensions: [{name: gameday, last: 3}]",
            "extensions[gameday].last: there is no such key",
        ),
        (
            "x.chaos.yaml",
            "method: [{name: a, type: action}]\nextensions: [{name: gameday, lasting: -1}]",
            "extensions[gameday].lasting: -1",
        ),
        (
            "x.chaos.yaml",
            "method: [{name: a, type: action}]\nextensions: [{name: gameday, traffic: {per_second: -1}}]",
            "extensions[gameday].traffic: ",
        ),
        (
            "x.chaos.yaml",
            "method: [{name: a, type: action}]\nextensions: [{name: gameday, objectives: {before: [{type: Sucess}]}}]",
            "extensions[gameday].objectives: ",
        ),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ExperimentError) as wrong:
        load(tmp_path / name)
    assert told in str(wrong.value) and "\n" not in str(wrong.value)


def test_a_broken_file_is_a_collection_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.chaos.yaml").write_text("method: [\n  - a: {")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "gameday.plugin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "x.chaos.yaml:2:" in done.stdout and "Traceback" not in done.stdout, done.stdout


def test_collection_runs_none_of_their_code(tmp_path: Path) -> None:
    (tmp_path / f"{HERE}.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "night.chaos.json").write_text(json.dumps(experiment(act("nothing"))))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "gameday.plugin", "-k", "night"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "night.chaos.json::night" in done.stdout, done.stdout + done.stderr


def test_what_the_file_says_to_gameday_is_used(tmp_path: Path) -> None:
    extension = {
        "name": "gameday",
        "lasting": 90,
        "traffic": {"per_second": 3},
        "objectives": {"before": [{"type": "Success", "at_least": 0.9}], "after": []},
    }
    path = tmp_path / "x.chaos.yaml"
    path.write_text(yaml.safe_dump(experiment(act("nothing"), extensions=[extension])))
    _, spec = load(path)
    assert spec.name == "x" and spec.fault.lasting == 90 and spec.objectives.before[0].at_least == 0.9  # type: ignore[attr-defined]
    again = faults.from_json(faults.to_json(spec.fault))
    assert again == spec.fault, "experiment.json repeats it under plain `chaos run`"
    path.write_text(yaml.safe_dump(experiment(act("nothing", pauses={"before": 20, "after": 25}))))
    assert load(path)[1].fault.lasting == 45, "as long as its pauses"


def test_references_are_followed() -> None:
    found = own(act("nothing"), {"ref": "nothing"}, rollbacks=["nothing"])
    assert [one.name for one in found.method] == ["nothing", "nothing"] and found.rollbacks[0].action


# ── reach ───────────────────────────────────────────────────────────────────────────────────────


def reach(module: str, func: str, configuration: dict[str, Any] | None = None, /, **arguments: Any) -> None:
    provider = {"type": "python", "module": f"chaosk8s.{module}.actions", "func": func, "arguments": arguments}
    plain = experiment({"type": "action", "name": func, "provider": provider}, configuration=configuration or {})
    activities.check(parse(plain, "x.chaos.yaml"), "x.chaos.yaml", namespaces=("llm", "data"))


LATENCY = {"name": "slow", "ns": "llm", "latency": "1s", "label_selectors": "app=x"}


@pytest.mark.parametrize(
    ("module", "func", "arguments"),
    [
        ("pod", "terminate_pods", {"ns": "llm"}),
        ("pod", "terminate_pods", {"ns": "llm", "label_selector": " "}),
        ("node", "cordon_node", {}),
        ("node", "uncordon_node", {"label_selector": ""}),
        ("node", "delete_nodes", {"count": 1}),
        ("node", "drain_nodes", {"pod_label_selector": "app=x"}),
        ("statefulset", "remove_statefulset", {"ns": "llm"}),
        ("deployment", "delete_deployment", {"ns": "llm"}),
        ("daemonset", "delete_daemon_set", {"ns": "llm"}),
        ("replicaset", "delete_replica_set", {"ns": "llm"}),
        ("networking", "deny_all_ingress", {"ns": "llm", "label_selectors": {}}),
        ("chaosmesh.network", "add_latency", {"name": "slow", "ns": "llm", "latency": "1s"}),
        ("chaosmesh.stress", "stress_cpu", {"name": "busy", "ns": "llm", "workers": 1, "load": 9}),
    ],
)
def test_an_empty_selector_of_whatever_action_is_an_error(module: str, func: str, arguments: dict[str, Any]) -> None:
    """Only pod actions were looked at: `cordon_node {}` cordons every node."""
    with pytest.raises(ExperimentError, match=f"{func}' selects no targets, which would mean all of them"):
        reach(module, func, **arguments)


@pytest.mark.parametrize(
    ("module", "func", "arguments"),
    [
        ("pod", "terminate_pods", {"ns": "kube-system", "label_selector": "app=x"}),
        ("chaosmesh.network", "add_latency", {**LATENCY, "namespaces_selectors": "kube-system"}),
        ("chaosmesh.network", "add_latency", {**LATENCY, "namespaces_selectors": ["llm", "kube-system"]}),
        ("chaosmesh.network", "add_latency", {**LATENCY, "namespaces_selectors": "llm, kube-system"}),
        ("chaosmesh.network", "add_latency", {**LATENCY, "target_namespaces_selectors": ["kube-system"]}),
        ("node", "drain_nodes", {"pod_label_selector": "app=x", "pod_namespace": "kube-system"}),
        ("namespace", "delete_namespace", {"name": "kube-system"}),
        ("crd", "apply_from_yaml", {"resource": "kind: PodChaos\nmetadata: {namespace: kube-system}"}),
        (
            "crd",
            "create_custom_object",
            {
                "group": "chaos-mesh.org",
                "version": "v1alpha1",
                "plural": "podchaos",
                "ns": "llm",
                "resource": {"spec": {"selector": {"namespaces": ["kube-system"]}}},
            },
        ),
    ],
)
def test_a_namespace_is_held_to_the_allow_list_however_it_is_named(
    module: str, func: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ExperimentError, match="reaches namespace 'kube-system', which is not in allow_namespaces"):
        reach(module, func, **arguments)


def test_a_namespace_from_the_configuration_is_held_to_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"ns": "${where}", "label_selector": "app=x"}
    reach("pod", "terminate_pods", {"where": "llm"}, **where)
    monkeypatch.setenv("THEIR_NAMESPACE", "kube-system")
    with pytest.raises(ExperimentError, match="reaches namespace 'kube-system'"):
        reach("pod", "terminate_pods", {"where": {"type": "env", "key": "THEIR_NAMESPACE"}}, **where)
    with pytest.raises(ExperimentError, match="which nobody knows before it runs"):
        reach("pod", "terminate_pods", **where)
    with pytest.raises(ExperimentError, match="NOT_THERE"):
        reach("pod", "terminate_pods", {"where": {"type": "env", "key": "NOT_THERE"}}, **where)


@pytest.mark.parametrize(
    "arguments",
    [
        "delete pods -l app=x -n kube-system",
        "--namespace=kube-system delete pod x",
        "-nkube-system delete pod x",
        ["delete", "pod", "x", "--namespace", "kube-system"],
        {"delete": "pod", "x": "", "-n": "kube-system"},
        "delete pods -A -l app=x",
        "delete pods --all-namespaces=true -l app=x",
    ],
)
def test_a_kubectl_is_held_to_it_too(arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").write_text("#!/bin/sh\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def checked(given: Any) -> None:
        provider = {"type": "process", "path": "kubectl", "arguments": given}
        plain = experiment({"type": "action", "name": "kubectl", "provider": provider})
        activities.check(parse(plain, "x.chaos.yaml"), "x.chaos.yaml", namespaces=("llm", "data"))

    with pytest.raises(ExperimentError, match=r"reaches (namespace 'kube-system'|all namespaces)"):
        checked(arguments)
    checked("-n llm scale deployment chat --replicas=2")
    checked({"-n": "data", "delete": "pod", "x": ""})
    checked("cordon node-1")


def test_a_resource_in_a_file_is_held_to_it_too(tmp_path: Path) -> None:
    for where in ("kube-system", "llm"):
        selector = {"selector": {"namespaces": [where]}}
        (tmp_path / f"{where}.yaml").write_text(yaml.safe_dump({"kind": "NetworkChaos", "spec": selector}))
    chaos = {"group": "chaos-mesh.org", "version": "v1alpha1", "plural": "networkchaos", "ns": "llm"}
    reach("crd", "create_custom_object", **chaos, resource_as_yaml_file=str(tmp_path / "llm.yaml"))
    with pytest.raises(ExperimentError, match="reaches namespace 'kube-system'"):
        reach("crd", "create_custom_object", **chaos, resource_as_yaml_file=str(tmp_path / "kube-system.yaml"))
    with pytest.raises(ExperimentError, match="reaches namespace 'kube-system'"):
        reach("deployment", "create_deployment", ns="llm", spec_path=str(tmp_path / "kube-system.yaml"))


@pytest.mark.parametrize(
    ("module", "func", "arguments"),
    [
        ("pod", "terminate_pods", {"ns": "llm", "name_pattern": "^x-"}),
        ("node", "cordon_node", {"name": "node-1"}),
        ("node", "drain_nodes", {"pod_label_selector": "app=x", "pod_namespace": "data"}),
        ("deployment", "scale_deployment", {"name": "x", "replicas": 1, "ns": "llm"}),
        ("deployment", "create_deployment", {"spec_path": "x.yaml", "ns": "data"}),
        ("networking", "deny_all_egress", {"ns": "llm", "label_selectors": {"app": "x"}}),
        ("networking", "remove_deny_all_egress", {"ns": "llm"}),
        ("chaosmesh.network", "add_latency", {**LATENCY, "namespaces_selectors": "llm,data"}),
        ("chaosmesh.network", "delete_network_fault", {"name": "slow", "ns": "llm"}),
    ],
)
def test_what_says_where_it_reaches_may(module: str, func: str, arguments: dict[str, Any]) -> None:
    reach(module, func, **arguments)


# ── probes ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "tolerance"),
    [(True, True), (200, 200), (0.5, [0, 1]), ("ok", "ok"), ({"status": 204}, [200, 204])],
)
def test_what_is_tolerated(value: Any, tolerance: Any) -> None:
    assert only_probe(tolerance=tolerance, arguments={"value": value}).startswith("says: ")


@pytest.mark.parametrize(
    ("value", "tolerance"), [(False, True), (500, 200), (1.5, [0, 1]), ("no", "ok"), ({"status": 500}, [200, 204])]
)
def test_what_is_not_tolerated(value: Any, tolerance: Any) -> None:
    with pytest.raises(OutOfTolerance, match="not within"):
        only_probe(tolerance=tolerance, arguments={"value": value})


@pytest.mark.parametrize(
    ("value", "tolerance"),
    [(None, True), (None, [0, 1]), ("text", [0, 1]), (1, None), (3, {"type": "range", "range": "no range"})],
)
def test_no_word_is_not_a_good_word(value: Any, tolerance: Any) -> None:
    """chaoslib lets an exception escape here, without a journal, and without rollbacks."""
    with pytest.raises((Unreadable, OutOfTolerance)) as told:
        only_probe(tolerance=tolerance, arguments={"value": value})
    assert value is not None or isinstance(told.value, Unreadable)


RAISING = [("raises", "boom"), ("leaves", "SystemExit"), ("interrupts", "KeyboardInterrupt")]


@pytest.mark.parametrize(("func", "told"), [("nan", "returned nan"), *RAISING])
def test_nan_and_every_way_of_raising_is_no_word(func: str, told: str) -> None:
    with pytest.raises(Unreadable, match=told):
        only_probe(tolerance=[0, 1], func=func)


# ── actions ─────────────────────────────────────────────────────────────────────────────────────


def call(found: activities.Own, number: int = 0, stop: threading.Event | None = None) -> str:
    cluster: Any = SimpleNamespace(environment=lambda: ENVIRONMENT)
    return perform(cluster, Call("1. x", found.text, number, found.method[number].action), stop or threading.Event())


@pytest.mark.parametrize(("func", "told"), RAISING)
def test_a_raising_action_is_not_injected(func: str, told: str) -> None:
    with pytest.raises(NotInjected, match=told):
        call(own(act(func)))


def test_a_stop_does_not_wait_for_an_action_or_a_pause() -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    begun = clock.now()
    with pytest.raises(NotInjected, match="has not ended"):
        call(own(act("sleeps", arguments={"seconds": 20})), stop=stop)
    assert clock.now() - begun < 10
    with pytest.raises(NotInjected, match="stopped before 'nothing'"):
        call(own(act("nothing", pauses={"before": 60})), stop=stop)
    assert clock.now() - begun < 10


def test_an_action_that_still_runs_is_left_behind(tmp_path: Path) -> None:
    """It was waited for no longer, and "nothing of ours is left" was said while it might do anything."""
    (tmp_path / f"{HERE}.py").write_text("import threading\ngo = threading.Event()\ndef hangs(): go.wait(30)\n")
    found = own(act("hangs"), act("hangs", "probe", name="asks"))
    abandoned = [activities.Running(found, one, ENVIRONMENT) for one in found.method]
    tape, nobody = Tape(lambda _: None), SimpleNamespace(holder="r1", release=lambda **_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "strays", lambda *_: ())
        patch.setattr(finish, "clear", lambda *_: "")
        clean: Any = partial(finish.clean, None, tape, lock=nobody, ledger=None, probers=())
        clean(healed=True, run="r1", within=1)
        assert activities.under_way() == ("hangs",), "a probe only looks"
        import_module(HERE).go.set()
        assert all(one.wait(10) for one in abandoned)
        clean(healed=True, run="r1", within=1)
    first, last = [one for one in tape.events if isinstance(one, FaultMark)]
    assert (first.step, first.ok, first.detail) == (Step.CLEAN, False, "the action 'hangs', which still runs")
    assert last.ok


def test_while_an_action_still_runs_no_other_experiment_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activities, "_begun", (SimpleNamespace(name="hangs", acts=True),))
    with pytest.raises(ExperimentError, match="'hangs' of an earlier experiment still runs"):
        session(tmp_path).prepare()


def test_an_action_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activities, "LONGEST", 0.2)
    found = own(act("sleeps", arguments={"seconds": 5}))
    with pytest.raises(Unreadable, match="has not ended"):
        run(found, found.method[0], ENVIRONMENT)


def test_their_code_meets_the_named_cluster_and_no_other() -> None:
    found = own(act("context"))
    assert run(found, found.method[0], ENVIRONMENT) == "staging"
    other = {"k8s": {"KUBERNETES_CONTEXT": {"type": "env", "key": "THEIR_CONTEXT"}}}
    found = own(act("context"), secrets=other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THEIR_CONTEXT", "production")
        with pytest.raises(Unreadable, match="its secrets name context production, not staging"):
            run(found, found.method[0], ENVIRONMENT)


def test_an_abandoned_action_does_not_take_the_cluster_from_under_the_rollback(tmp_path: Path) -> None:
    """It restored the environment when it ended: the rest of a rollback went to no context at all."""
    (tmp_path / f"{HERE}.py").write_text(
        "import os, threading\n"
        "begun, go = threading.Event(), threading.Event()\n"
        "def hangs(): begun.set(); go.wait(30)\n"
        "def rolls_back():\n"
        "    go.set()\n"
        "    [one.join(10) for one in threading.enumerate() if one.name == 'activity-hangs']\n"
        "    return os.environ.get('KUBERNETES_CONTEXT')\n"
    )
    found = own(act("hangs"), rollbacks=[act("rolls_back")])
    abandoned = activities.Running(found, found.method[0], ENVIRONMENT)
    import_module(HERE).begun.wait(10)
    assert not abandoned.over
    assert run(found, found.rollbacks[0], ENVIRONMENT) == "staging" and abandoned.over
    assert (os.environ["KUBERNETES_CONTEXT"], kube_config.KUBE_CONFIG_DEFAULT_LOCATION) == ("staging", "/nonexistent")


def test_while_an_activity_runs_no_other_cluster_is_spoken_to(tmp_path: Path) -> None:
    (tmp_path / f"{HERE}.py").write_text(
        "import os, threading\n"
        "go = threading.Event()\n"
        "def hangs(): go.wait(30)\n"
        "def context(): return os.environ['KUBERNETES_CONTEXT']\n"
    )
    found = own(act("hangs"), act("context"))
    other = {"KUBECONFIG": "/other", "KUBERNETES_CONTEXT": "production"}
    hanging = activities.Running(found, found.method[0], ENVIRONMENT)
    with pytest.raises(Unreadable, match="'hangs' still runs, on another cluster"):
        run(found, found.method[1], other)
    import_module(HERE).go.set()
    assert hanging.wait(10) and run(found, found.method[1], other) == "production"


def test_chaosk8s_meets_the_named_cluster_though_it_was_imported_before(tmp_path: Path) -> None:
    """The client keeps $KUBECONFIG as it was at its import: actions would have gone to another cluster."""
    contexts = [{"name": "staging", "context": {"cluster": "c"}}]
    clusters = [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}]
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump({"clusters": clusters, "contexts": contexts}))
    (tmp_path / f"{HERE}.py").write_text(
        "from chaosk8s import create_k8s_api_client\ndef where(): return create_k8s_api_client({}).configuration.host\n"
    )
    found = own(act("where"))
    environment = Login(context="staging", files=str(path)).environment()
    assert run(found, found.method[0], environment) == "http://127.0.0.1:9"


def test_a_kubeconfig_that_would_lead_elsewhere_is_refused(tmp_path: Path) -> None:
    clusters = [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}]
    contexts = [{"name": "staging", "context": {"cluster": "c"}}, {"name": "prod", "context": {"cluster": "c"}}]
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump({"clusters": clusters, "contexts": contexts, "current-context": "prod"}))
    with pytest.raises(ClusterError, match="kubectl config use-context staging"):
        Login(context="staging", files=str(path)).environment()
    assert Login(context="prod", files=str(path)).environment()["KUBERNETES_CONTEXT"] == "prod"
    with pytest.raises(ClusterError, match="Name one kubeconfig"):
        Login(context="prod", files=f"{path}:{path}").environment()


def test_secrets_of_theirs_are_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_PASSWORD", "correct-horse-battery")
    secrets = {"db": {"password": {"type": "env", "key": "THEIR_PASSWORD"}}}
    found = own(act("uses", provider={"secrets": ["db"]}), secrets=secrets)
    with pytest.raises(Unreadable, match=r"refused \*\*\*"):
        run(found, found.method[0], ENVIRONMENT)
    assert "horse" not in found.text and "horse" not in censored("x correct-horse-battery y")


# ── rollbacks ───────────────────────────────────────────────────────────────────────────────────


def test_rollbacks_all_run_and_one_that_raises_is_an_error(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    provider = {"type": "process", "path": "touch", "arguments": str(mark)}
    touch = {"type": "action", "name": "touch", "provider": provider}
    found = own(act("nothing"), rollbacks=[act("raises"), touch])
    entry = Undo("rollback", "rollbacks", "Theirs", value=found.text)
    cluster: Any = SimpleNamespace(environment=lambda: ENVIRONMENT)
    with pytest.raises(HealError, match=r"rollback 'raises' raised: .*boom.*by hand: run the rollbacks"):
        undo(cluster, entry, within=10)
    assert mark.exists()
    good = own(act("nothing"), rollbacks=[touch])
    assert undo(cluster, Undo("rollback", "rollbacks", "Theirs", value=good.text), within=10) == "1 rollback(s) done"


def test_without_rollbacks_it_is_one_shot() -> None:
    assert ChaosToolkit(own(act("nothing")).text, 30).one_shot
    assert not ChaosToolkit(own(act("nothing"), rollbacks=[act("nothing")]).text, 30).one_shot


def test_reading_says_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="cannot be read: No such file"):
        read(tmp_path / "none.chaos.yaml")


def test_a_command_that_fails_has_not_been_done(tmp_path: Path) -> None:
    """Its exit code was an answer like any other: a rollback that failed counted as done."""
    provider = {"type": "process", "path": "sh", "arguments": ["-c", "echo no such deployment >&2; exit 3"]}
    fails = {"type": "action", "name": "undo it", "provider": provider}
    found = own(act("nothing"), fails, rollbacks=[fails])
    with pytest.raises(Unreadable, match="'undo it' raised: exit code 3 no such deployment"):
        run(found, found.method[1], ENVIRONMENT)
    entry = Undo("rollback", "rollbacks", "Theirs", value=found.text)
    with pytest.raises(HealError, match="rollback 'undo it' raised: exit code 3"):
        undo(cast(Any, SimpleNamespace(environment=lambda: ENVIRONMENT)), entry, within=5)
    asked = own(act("nothing"), {**fails, "type": "probe", "tolerance": 3})
    assert "undo it" in probe(asked, asked.method[1], ENVIRONMENT), "of a probe, its tolerance says what is good"


@pytest.mark.parametrize(("output", "told"), [({"status": 503}, "HTTP status 503"), ({"status": 204}, ""), ("x", "")])
def test_a_server_that_refuses_has_not_done_it(output: Any, told: str) -> None:
    assert activities._refusal("http", output) == told
