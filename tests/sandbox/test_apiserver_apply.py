"""Server-side apply: ownership, merging, conflicts. The oracle has a real server's words; here is the arithmetic."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from apiserver_world import JANE, Cluster, crd, run
from hypothesis import given, strategies as st
from test_apiserver_clients import control_plane

from sandbox.apiserver.managed import APPLY, FIRST, UPDATE, Owner, Shape, applied, changed, fields, merge, read, updated
from sandbox.client import ApiError, Obj

STACK = Path(__file__).parents[2] / "sandbox" / "stack" / "reference"
BUILTIN = Shape()
A, B, EDITOR = Owner("a", APPLY, "v1"), Owner("b", APPLY, "v1"), Owner("editor", UPDATE, "v1")
ALICE = "?fieldManager=alice"
HEADERS = {"Content-Type": "application/apply-patch+yaml"}


def config(**data: str) -> Obj:
    return {"metadata": {"name": "c"}, "data": data}


def put(live: Obj | None, body: Obj, owner: Owner, *, force: bool = False, shape: Shape = BUILTIN) -> Obj:
    """The object after an apply, with its managedFields."""
    result, entries = applied(live, body, owner, shape, force=force)
    return {**result, "metadata": {**result["metadata"], "managedFields": entries}}


def owned(obj: Obj, owner: Owner) -> set[str]:
    return {"/".join(step[2:] for step in path) for path in read(obj["metadata"]["managedFields"]).get(owner, ())}


def test_what_two_apply_alike_is_shared_and_stays_until_both_let_go() -> None:
    one = put(put(None, config(x="1", y="1"), A), config(x="1"), B)
    assert owned(one, A) == {"data/x", "data/y"} and owned(one, B) == {"data/x"}
    one = put(one, config(), A)
    assert one["data"] == {"x": "1"}, "y was A's alone"
    assert "data" not in put(one, {"metadata": {"name": "c"}}, B)


def test_a_conflict_names_the_owner_and_force_takes_the_field() -> None:
    one = put(None, config(x="1", y="1"), A)
    with pytest.raises(ApiError, match=r'2 conflicts: conflicts with "a":\n- \.data\.x\n- \.data\.y'):
        put(one, config(x="2", y="2"), B)
    one = put(one, config(x="2"), B, force=True)
    assert one["data"] == {"x": "2", "y": "1"} and owned(one, A) == {"data/y"}
    with pytest.raises(ApiError, match=r'1 conflict: conflict with "b": \.data\.x'):
        put(one, config(x="3", y="1"), A)


def test_what_was_there_before_the_first_apply_has_an_owner_too() -> None:
    with pytest.raises(ApiError, match=rf'conflict with "{FIRST}" using v1: \.data\.x'):
        put(config(x="1"), config(x="2"), A)
    assert owned(put(config(x="1", y="2"), config(x="1"), A), Owner(FIRST, UPDATE, "v1")) == {"data/x", "data/y"}


def test_a_plain_update_takes_what_it_changes_and_frees_what_it_removes() -> None:
    one = put(None, config(x="1", y="1", z="1"), A)
    new = {**one, "data": {"x": "1", "y": "2"}}
    after = {**new, "metadata": {**new["metadata"], "managedFields": updated(one, new, EDITOR, BUILTIN)}}
    assert owned(after, A) == {"data/x"} and owned(after, EDITOR) == {"data/y"}


def containers(*items: Obj) -> Obj:
    return {"metadata": {"name": "d"}, "spec": {"template": {"spec": {"containers": list(items)}}}}


def test_lists_are_owned_by_their_keys() -> None:
    main, side = {"name": "main", "image": "m:1", "args": ["a", "b"]}, {"name": "side", "image": "s:1"}
    one = put(put(None, containers(main), A), containers(side), B)
    held = one["spec"]["template"]["spec"]["containers"]
    assert [c["name"] for c in held] == ["main", "side"]
    with pytest.raises(ApiError, match=r'\.spec\.template\.spec\.containers\[name="main"\]\.args'):
        put(one, containers(side, {"name": "main", "args": ["b"]}), B)  # args are replaced as a whole
    one = put(one, containers(), A)
    assert [c["name"] for c in one["spec"]["template"]["spec"]["containers"]] == ["side"]


def test_ports_of_one_number_differ_by_their_protocol() -> None:
    ports = [{"port": 53, "protocol": "UDP"}, {"port": 53}]
    one = put(None, {"metadata": {"name": "s"}, "spec": {"ports": ports[:1]}}, A)
    one = put(one, {"metadata": {"name": "s"}, "spec": {"ports": [{**ports[1], "protocol": "TCP"}]}}, B)
    assert len(one["spec"]["ports"]) == 2
    same = put(one, {"metadata": {"name": "s"}, "spec": {"ports": ports[1:]}}, B)
    assert len(same["spec"]["ports"]) == 2, "TCP is the default"


def test_custom_lists_are_what_their_schema_says() -> None:
    item = {"type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "integer"}}}
    keyed = {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"], "items": item}
    plain = {"type": "array", "items": {"type": "string"}}
    schema = {"properties": {"spec": {"properties": {"keyed": keyed, "plain": plain}}}}

    def body(**spec: Any) -> Obj:
        return {"metadata": {"name": "w"}, "spec": spec}

    shape = Shape(schema=schema)
    one = put(None, body(keyed=[{"k": "a", "v": 1}], plain=["x"]), A, shape=shape)
    one = put(one, body(keyed=[{"k": "b", "v": 2}]), B, shape=shape)
    assert [entry["k"] for entry in one["spec"]["keyed"]] == ["a", "b"]
    with pytest.raises(ApiError, match=r'conflict with "a": \.spec\.plain'):
        put(one, body(plain=["x", "y"]), B, shape=shape)


values = st.recursive(
    st.integers(0, 3) | st.text("ab", max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("pqr"), inner, max_size=3) | st.lists(st.integers(0, 3), max_size=2),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("stu"), values, max_size=3).map(lambda spec: {"spec": spec})


@given(objects, objects)
def test_what_is_applied_is_there_afterwards_and_no_argument_is_altered(live: Obj, body: Obj) -> None:
    before, given_ = copy.deepcopy(live), copy.deepcopy(body)
    merged = merge(live, body, BUILTIN)
    assert (live, body) == (before, given_)
    assert not changed(merged, merge(merged, body, BUILTIN), BUILTIN), "twice is as once"
    assert changed(live, merged, BUILTIN) <= fields(body, BUILTIN), "nothing else has changed"


@given(objects, objects)
def test_applying_nothing_leaves_what_others_own(first: Obj, second: Obj) -> None:
    meta = {"metadata": {"name": "x"}}
    one = put(None, {**meta, **first}, A)
    both = put(one, {**meta, **second}, B, force=True)
    gone = put(both, meta, A)
    assert owned(gone, B) == owned(both, B)
    assert not owned(gone, A)


def test_over_http(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        path = "/api/v1/namespaces/default/configmaps/c"
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"x": "1"}}
        code, made = await one.raw("PATCH", path + ALICE + "&dryRun=All", json=body, headers=HEADERS)
        assert code == 201 and (await one.raw("GET", path))[0] == 404
        code, made = await one.raw("PATCH", path + ALICE, json=body, headers=HEADERS)
        assert code == 201 and made["metadata"]["managedFields"][0]["manager"] == "alice"
        code, again = await one.raw("PATCH", path + ALICE, json=body, headers=HEADERS)
        assert (code, again["metadata"]) == (200, made["metadata"]), "nothing has changed, its version neither"
        code, answer = await one.raw("PATCH", path + ALICE, token=JANE, json=body, headers=HEADERS)
        assert code == 403
        code, answer = await one.raw("PATCH", path + ALICE, json={**body, "dat": {}}, headers=HEADERS)
        assert code == 500 and answer["message"].endswith(".dat: field not declared in schema")
        await one.raw("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json=crd())
        widget = {"apiVersion": "example.dev/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": {"mode": "one"}}
        path = "/apis/example.dev/v1/namespaces/default/widgets/w"
        code, answer = await one.raw("PATCH", path + ALICE, json=widget, headers=HEADERS)
        assert (code, answer["spec"]) == (201, {"mode": "one", "size": 3})

    run(tmp_path, test)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
@pytest.mark.parametrize("side", ["--server-side=true", "--server-side=false"])
def test_the_reference_stack_applies_unchanged(tmp_path: Path, side: str) -> None:
    """As it lies in the repository, with strict validation; a second time changes nothing."""
    with control_plane(tmp_path / "state") as kubeconfig:
        env = {"KUBECONFIG": kubeconfig, "HOME": str(tmp_path), "PATH": os.environ["PATH"]}

        def kubectl(*args: str) -> list[str]:
            command = [
                "kubectl",
                "apply",
                "--validate=strict",
                side,
                *args,
                "-f",
                str(STACK),
            ]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
            return done.stdout.splitlines()

        made = kubectl()
        assert len(made) > 10 and {line.split()[-1] for line in made} <= {"created", "serverside-applied"}
        again = kubectl("--dry-run=server")
        # Of a budget kubectl says "configured": its selector is always sent, since its patch strategy is to replace.
        said = {line.split()[1] for line in again if not line.startswith("poddisruptionbudget")}
        assert said == ({"serverside-applied"} if side.endswith("true") else {"unchanged"}), again
