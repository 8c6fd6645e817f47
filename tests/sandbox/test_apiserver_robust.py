"""Nothing that a client sends may be more than an error answer: bodies and patches with values out of place."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from apiserver_world import TOKENS, configmap, crd, pod

from sandbox.apiserver import ApiServer, patch, schema, selectors
from sandbox.apiserver.core import Page
from sandbox.apiserver.resources import Resource
from sandbox.apiserver.tables import render
from sandbox.client import ApiError, Obj

JUNK: tuple[Any, ...] = (None, "", 0, -1, 1.5, True, [], {}, "x", [1], ["a"], {"a": "b"}, "not ok", 99999999999)
TEMPLATE: Obj = {"metadata": {"labels": {"app": "web"}}, "spec": pod("t")["spec"]}
WORKLOAD: Obj = {"selector": {"matchLabels": {"app": "web"}}, "template": TEMPLATE}
BODIES: dict[tuple[str, str, str], Obj] = {
    ("", "v1", "pods"): {
        "spec": {
            "containers": [
                {
                    "name": "main",
                    "image": "x",
                    "ports": [{"containerPort": 80}],
                    "env": [{"name": "A", "value": "b"}],
                    "resources": {"limits": {"cpu": "1", "nvidia.com/gpu": 1}},
                    "readinessProbe": {"httpGet": {"port": 1}},
                    "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                }
            ],
            "volumes": [{"name": "v", "emptyDir": {}}],
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule"}],
        }
    },
    ("", "v1", "configmaps"): configmap("a", k="v"),
    ("", "v1", "services"): {"spec": {"ports": [{"port": 80, "targetPort": "http"}], "selector": {"app": "web"}}},
    ("", "v1", "nodes"): {"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}, "status": {"addresses": []}},
    ("apps", "v1", "deployments"): {"spec": {**WORKLOAD, "strategy": {"rollingUpdate": {"maxSurge": 1}}}},
    ("apps", "v1", "statefulsets"): {"spec": {**WORKLOAD, "serviceName": "s"}},
    ("apps", "v1", "daemonsets"): {"spec": WORKLOAD},
    ("batch", "v1", "jobs"): {"spec": {"template": {"spec": {**TEMPLATE["spec"], "restartPolicy": "Never"}}}},
    ("policy", "v1", "poddisruptionbudgets"): {
        "spec": {
            "minAvailable": "50%",
            "selector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]},
        }
    },
    ("autoscaling", "v2", "horizontalpodautoscalers"): {
        "spec": {"maxReplicas": 3, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "d"}}
    },
    ("coordination.k8s.io", "v1", "leases"): {"spec": {"holderIdentity": "a", "leaseDurationSeconds": 15}},
    ("discovery.k8s.io", "v1", "endpointslices"): {
        "addressType": "IPv4",
        "ports": [{"port": 80}],
        "endpoints": [{"addresses": ["10.0.0.1"]}],
    },
    ("rbac.authorization.k8s.io", "v1", "rolebindings"): {
        "roleRef": {"kind": "Role", "name": "r"},
        "subjects": [{"kind": "User", "name": "jane"}],
    },
    ("apiextensions.k8s.io", "v1", "customresourcedefinitions"): crd(),
    ("example.dev", "v1", "widgets"): {"spec": {"mode": "one", "size": 2}},
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


def spoil(rng: random.Random, body: Obj) -> Obj:
    body = copy.deepcopy(body)
    for _ in range(rng.choice((0, 1, 1, 2))):
        *parents, last = rng.choice(list(paths(body)))
        at: Any = body
        for key in parents:
            at = at[key]
        at[last] = copy.deepcopy(rng.choice(JUNK))
    return body if isinstance(body.get("metadata"), dict) else {**body, "metadata": {}}


def patch_for(rng: random.Random, path: tuple[Any, ...]) -> tuple[str, Any]:
    kind = rng.choice(("merge", "strategic", "json"))
    if kind == "json":
        op = rng.choice(("add", "remove", "replace", "test", "copy", "move", "frob"))
        where = "/" + "/".join(map(str, path))
        return kind, [{"op": op, "path": where, "from": "/metadata/labels", "value": rng.choice(JUNK)}]
    body: Any = copy.deepcopy(rng.choice(JUNK))
    for key in reversed(path):
        body = {key: body} if isinstance(key, str) else [body]
    return kind, body


@pytest.mark.parametrize("seed", range(3))
def test_spoilt_bodies_and_patches_are_answered(seed: int) -> None:
    rng = random.Random(seed)
    core = ApiServer(TOKENS).core
    crds = core.registry.find("apiextensions.k8s.io", "v1", "customresourcedefinitions")
    assert crds
    core.create(crds, "", crd())
    stored: list[tuple[Resource, str, str]] = []
    for i in range(1500):
        key = rng.choice(list(BODIES))
        res = core.registry.find(*key)
        if res is None or (key[2] == "customresourcedefinitions" and rng.random() < 0.8):
            continue
        space = "default" if res.namespaced else ""
        body = spoil(rng, {"metadata": {"name": f"n{i}", "labels": {"a": "b"}}, **BODIES[key]})
        try:
            made = core.create(res, space, body)
            stored.append((res, space, made.obj["metadata"]["name"]))
            target, where, name = rng.choice(stored)
            found = core.store.get(target.key, where, name)
            assert found is not None
            kind, change = patch_for(rng, rng.choice(list(paths(found.obj))))
            sub = rng.choice(("", "status")) if "status" in target.subs else ""
            core.patch(target, where, name, kind, orjson.loads(orjson.dumps(change)), sub=sub)
        except ApiError as error:
            assert 400 <= error.code <= 504
            assert str(error)
    assert len(stored) > 300
    for res in core.registry:
        items = list(core.store.list(res.key))
        assert len(render(res, Page(items, 1), "v1", "None")["rows"]) == len(items)


def test_strategic_merge_keeps_the_order_that_kubectl_asks_for() -> None:
    before = {"containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}
    change = {
        "$setElementOrder/containers": [{"name": "c"}, {"name": "n"}, {"name": "a"}],
        "containers": [{"name": "n", "image": "i"}, {"name": "b", "$patch": "delete"}],
    }
    merged = patch.strategic(before, change)
    assert [entry["name"] for entry in merged["containers"]] == ["c", "n", "a"]
    assert before == {"containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}


def test_strategic_merge_of_maps_and_sets() -> None:
    before = {"finalizers": ["a", "b"], "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}
    change = {
        "$deleteFromPrimitiveList/finalizers": ["a"],
        "strategy": {"$retainKeys": ["type"], "type": "Recreate"},
    }
    assert patch.strategic(before, change) == {"finalizers": ["b"], "strategy": {"type": "Recreate"}}


@pytest.mark.parametrize("text", ["a in b", "=x", "a=b c", "a,,b", "a in (b", "a>x", "a/b/c=d", "!", "a=" + "v" * 64])
def test_selectors_that_make_no_sense(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        selectors.parse_labels(text)
    assert caught.value.code == 400


def test_pruning_reports_what_it_drops() -> None:
    wanted = {
        "type": "object",
        "properties": {
            "spec": {
                "type": "object",
                "properties": {
                    "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
                    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                },
            }
        },
    }
    unknown: list[str] = []
    body = {"kind": "K", "metadata": {"x": 1}, "spec": {"list": [{"a": "1", "b": 2}], "free": {"y": 1}, "z": 1}}
    kept = schema.prune(wanted, body, unknown)
    assert kept["spec"] == {"list": [{"a": "1"}], "free": {"y": 1}}
    assert unknown == ["spec.list[0].b", "spec.z"]
