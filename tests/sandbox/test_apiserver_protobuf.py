"""Protobuf bodies: held against what Go makes of them, and planted ones that nobody may take for whole."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from apiserver_world import Cluster, run

from sandbox.apiserver import protobuf, protogen, types
from sandbox.client import ApiError, Obj

# One object a line: its body and its JSON, both made by the serializers of k8s.io/apimachinery 0.36.3.
BODIES = [json.loads(line) for line in Path(__file__).with_name("protobuf_bodies.jsonl").read_text().splitlines()]
HEADERS = {"Content-Type": protobuf.MEDIA_TYPE}
# By the table's kinds: what is created like any object, and where.
PATHS = {
    "v1/Pod": "/api/v1/namespaces/default/pods",
    "v1/Service": "/api/v1/namespaces/default/services",
    "v1/Event": "/api/v1/namespaces/default/events",
    "v1/ResourceQuota": "/api/v1/namespaces/default/resourcequotas",
    "v1/LimitRange": "/api/v1/namespaces/default/limitranges",
    "v1/ServiceAccount": "/api/v1/namespaces/default/serviceaccounts",
    "v1/Node": "/api/v1/nodes",
    "v1/PersistentVolumeClaim": "/api/v1/namespaces/default/persistentvolumeclaims",
    "v1/Secret": "/api/v1/namespaces/default/secrets",
    "v1/ConfigMap": "/api/v1/namespaces/default/configmaps",
    "apps/v1/Deployment": "/apis/apps/v1/namespaces/default/deployments",
    "apps/v1/StatefulSet": "/apis/apps/v1/namespaces/default/statefulsets",
    "apps/v1/DaemonSet": "/apis/apps/v1/namespaces/default/daemonsets",
    "apps/v1/ControllerRevision": "/apis/apps/v1/namespaces/default/controllerrevisions",
    "batch/v1/Job": "/apis/batch/v1/namespaces/default/jobs",
    "batch/v1/CronJob": "/apis/batch/v1/namespaces/default/cronjobs",
    "discovery.k8s.io/v1/EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
    "coordination.k8s.io/v1/Lease": "/apis/coordination.k8s.io/v1/namespaces/default/leases",
    "events.k8s.io/v1/Event": "/apis/events.k8s.io/v1/namespaces/default/events",
    "autoscaling/v2/HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers",
    "policy/v1/PodDisruptionBudget": "/apis/policy/v1/namespaces/default/poddisruptionbudgets",
    "networking.k8s.io/v1/NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies",
    "rbac.authorization.k8s.io/v1/Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles",
    "rbac.authorization.k8s.io/v1/RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings",
    "rbac.authorization.k8s.io/v1/ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "apiextensions.k8s.io/v1/CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}


def key(obj: Obj) -> str:
    return f"{obj['apiVersion']}/{obj['kind']}"


def body_of(kind: str) -> bytes:
    return next(base64.b64decode(one["protobuf"]) for one in BODIES if key(one["json"]) == kind)


def without_nulls(value: Any) -> Any:
    """Null says the same as nothing; the free-form JSON of a revision keeps it."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("one", BODIES, ids=lambda one: key(one["json"]))
def test_a_body_is_the_json_that_go_makes_of_it(one: Obj) -> None:
    assert without_nulls(protobuf.decode(base64.b64decode(one["protobuf"]))) == without_nulls(one["json"])


def _settled(obj: Obj) -> Obj:
    """Without what differs from one creation to the next."""
    if "uid" in obj["metadata"]:  # a Job's is in its labels, too
        obj = json.loads(json.dumps(obj).replace(obj["metadata"]["uid"], "uid"))
    meta = obj["metadata"]
    for name in ("uid", "creationTimestamp", "resourceVersion", "managedFields"):
        meta.pop(name, None)
    for name in ("clusterIP", "clusterIPs"):
        obj.get("spec", {}).pop(name, None)
    return obj


def test_what_comes_as_protobuf_is_stored_as_if_it_came_as_json(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        made = 0
        for entry in BODIES:
            if (path := PATHS.get(key(entry["json"]))) is None:
                continue
            raw = base64.b64decode(entry["protobuf"])
            code, first = await one.raw("POST", path + "?dryRun=All", json=entry["json"])
            assert code == 201, first
            code, second = await one.raw("POST", path, data=raw, headers=HEADERS)
            assert code == 201, second
            assert _settled(second) == _settled(first)
            made += 1
        assert made == len(PATHS)

    run(tmp_path, test)


def test_an_operator_deletes_and_scales_with_protobuf(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        path = PATHS["apps/v1/Deployment"]
        code, made = await one.raw("POST", path, data=body_of("apps/v1/Deployment"), headers=HEADERS)
        assert (code, made["spec"]["replicas"]) == (201, 0)
        scale = body_of("autoscaling/v1/Scale")
        code, answer = await one.raw("PUT", f"{path}/rich/scale", data=scale, headers=HEADERS)
        assert (code, answer["spec"]["replicas"]) == (200, 3)
        # The options come in the version of the group of what is deleted; they name another uid.
        options = body_of("apps/v1/DeleteOptions")
        code, answer = await one.raw("DELETE", f"{path}/rich", data=options, headers=HEADERS)
        assert (code, answer["reason"]) == (409, "Conflict")

    run(tmp_path, test)


# What follows encodes by hand.


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def text(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def envelope(version: str, kind: str, raw: bytes) -> bytes:
    return b"k8s\x00" + text(1, text(1, version.encode()) + text(2, kind.encode())) + text(2, raw)


def deployment(spec: bytes) -> bytes:
    return envelope("apps/v1", "Deployment", text(2, spec))


def pod(spec: bytes) -> bytes:
    return envelope("v1", "Pod", text(2, spec))


def test_a_zero_that_was_set_is_kept_and_one_that_says_nothing_is_not() -> None:
    spec = protobuf.decode(deployment(number(1, 0) + number(5, 0) + number(7, 0)))["spec"]
    assert spec == {"replicas": 0}  # a pointer in Go; minReadySeconds and paused are none
    claim = envelope("v1", "PersistentVolumeClaim", text(2, text(3, b"") + text(5, b"")))
    assert protobuf.decode(claim)["spec"] == {"storageClassName": ""}


def test_negative_and_packed_numbers() -> None:
    assert protobuf.decode(deployment(number(1, -1)))["spec"]["replicas"] == -1
    groups = number(4, 7) + text(4, varint(8) + varint(-9))
    assert protobuf.decode(pod(text(14, groups)))["spec"]["securityContext"]["supplementalGroups"] == [7, 8, -9]


def test_times_before_and_after_1970() -> None:
    def renewed(seconds: int, nanoseconds: int) -> str:
        time = number(1, seconds) + number(2, nanoseconds)
        lease = protobuf.decode(envelope("coordination.k8s.io/v1", "Lease", text(2, text(4, time))))
        return str(lease["spec"]["renewTime"])

    assert renewed(0, 999) == "1970-01-01T00:00:00.000000Z"
    assert renewed(-1, 123_456_789) == "1969-12-31T23:59:59.123456Z"
    assert renewed(-62_135_596_800 + 1, 0) == "0001-01-01T00:00:01.000000Z"


def _nested(depth: int) -> bytes:
    schema = b""
    for _ in range(depth):
        schema = text(28, schema)  # "not"
    return envelope("apiextensions.k8s.io/v1", "CustomResourceDefinition", text(2, text(7, text(4, text(1, schema)))))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"nonsense", "no magic"),
        (envelope("policy/v1beta1", "Eviction", b""), "policy/v1beta1 Eviction"),
        (pod(number(99, 1)), "field 99 of PodSpec"),
        (pod(number(42, 1)), "field 42 of PodSpec"),  # an alpha field of 1.35, which is no more
        (pod(text(1, text(2, text(1, text(99, b""))))), "field 99 of"),
        (pod(number(3, 1)), "1 where string belongs"),
        (pod(text(4, b"7")), "b'7' where int64 belongs"),
        (pod(text(7, b"\x08\x01")), "1 where string belongs"),
        (pod(b"\x0b"), "wire type 3"),
        (pod(b"\x80" * 11), "a number that does not end"),
        (pod(b"\x12\x7f"), "unexpected end"),
        (pod(text(3, b"\xff")), "can't decode byte"),
        (envelope("apps/v1", "ControllerRevision", text(2, text(1, b"{"))), "unexpected end of data"),
        (envelope("coordination.k8s.io/v1", "Lease", text(2, text(4, number(1, 2**62)))), "too large"),
        (_nested(2000), "maximum recursion depth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_said(body: bytes, why: str) -> None:
    with pytest.raises(ApiError) as caught:
        protobuf.decode(body)
    assert caught.value.code == 415
    assert why in str(caught.value)


def test_no_damaged_body_is_more_than_a_refusal() -> None:
    dice = random.Random(7419)
    refused = 0
    for _ in range(2000):
        body = bytearray(base64.b64decode(dice.choice(BODIES)["protobuf"]))
        at = dice.randrange(len(body))
        if dice.random() < 0.5:
            body[at] ^= 1 << dice.randrange(8)
        else:
            del body[at:]
        try:
            assert isinstance(protobuf.decode(bytes(body)), dict)
        except ApiError as error:
            assert error.code == 415
            refused += 1
    assert refused > 1000


# The two tables have two sources: OpenAPI, as the kubernetes package has it, and Go's structs.


def _flat(type: str) -> dict[str, str]:
    """A message's fields as JSON has them."""
    found: dict[str, str] = {}
    for field in protobuf._fields(type).values():
        found |= _flat(field.type) if field.name == "-" else {field.name: field.form + field.type}
    return found


# Free-form in one, not in the other.
_LOOSE = {
    ("ObjectMeta", "managedFields"),
    ("ConfigMap", "binaryData"),
    ("ControllerRevision", "data"),
    ("WebhookClientConfig", "caBundle"),
    ("CustomResourceSubresources", "status"),
    ("WorkloadPodGroupSchedulingPolicy", "basic"),
    ("WorkloadPodGroupDisruptionMode", "single"),
    ("WorkloadPodGroupDisruptionMode", "all"),
}


def _compare(json_type: str, message: str, done: dict[tuple[str, str], list[str]]) -> None:
    if (json_type, message) in done:
        return
    wrong = done[json_type, message] = []
    ours, theirs = types.fields_of(json_type), _flat(message)
    if "" in ours:
        return
    for name in ours.keys() | theirs.keys():
        if name in ("kind", "apiVersion") and name not in theirs:  # the envelope's
            continue
        one, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        form = one[:2] if one[:2] in ("[]", "{}") else ""
        if one.removeprefix(form)[0].isupper() and other.startswith(form):
            _compare(one.removeprefix(form), other.removeprefix(form), done)
        elif one != other and (json_type, name) not in _LOOSE:
            wrong.append(f"{json_type}.{name}: {one}, in protobuf {other}")


def test_both_type_tables_have_the_same_kinds_and_fields() -> None:
    done: dict[tuple[str, str], list[str]] = {}
    for kind, message in protobuf._table()["kinds"].items():
        name = types.type_of(*kind.rsplit("/", 1))
        assert name is not None
        _compare(name, message, done)
    assert protobuf._table()["kinds"].keys() == set(types.kinds())
    assert len(done) > 300
    assert [line for lines in done.values() for line in lines] == []


# The generator.

_PROTO = """
// Outer is there.
message Outer {
  // Says what.
  optional Inner inner = 2;

  repeated .k8s.io.api.other.v1.Words words = 3;

  map<string, .k8s.io.api.other.v1.Words> more = 4;

  optional int32 count = 5;

  optional int32 pointer = 6;

  optional Empty empty = 7;
}

message Inner {
  optional string oneName = 1;
}

message Empty {
}
"""
_GO = """
type Outer struct {
\tmetav1.TypeMeta `json:",inline"`
\t// Says what.
\tInner   `json:",inline" protobuf:"bytes,2,opt,name=inner"`
\tWords []other.Words `json:"words" protobuf:"bytes,3,rep,name=words"`
\tMore map[string]other.Words `json:"more,omitempty" protobuf:"bytes,4,rep,name=more"`
\tCount int32 `json:"Count,omitempty" protobuf:"varint,5,opt,name=count"`
\tPointer *int32 `json:"pointer,omitempty" protobuf:"varint,6,opt,name=pointer"`
\tEmpty *Empty `json:"empty,omitempty" protobuf:"bytes,7,opt,name=empty"`
}

type Inner struct {
\tName string `json:"name" protobuf:"bytes,1,opt,name=oneName"`
}

type Empty struct{}
"""


def _module(directory: Path, go: str) -> protogen.Generator:
    for package, proto, source in (
        ("core", _PROTO, go),
        ("other", "message Words {\n  repeated string items = 1;\n}\n", ""),
    ):
        where = directory / package / "v1"
        where.mkdir(parents=True)
        (where / "generated.proto").write_text(proto)
        (where / "types.go").write_text(source)
    return protogen.Generator({"k8s.io.api": directory})


def test_the_generator_joins_the_wire_with_the_tags_of_go(tmp_path: Path) -> None:
    generator = _module(tmp_path, _GO)
    assert generator.add("k8s.io.api.core.v1.Outer") == "Outer"
    assert generator.types == {
        "Outer": "2 - Inner 3 words [][]string 4 more {}[]string 5 Count int32? 6 pointer int32 7 empty Empty",
        "Inner": "1 name string",
        "Empty": "",
    }


def test_the_generator_refuses_sources_that_do_not_match(tmp_path: Path) -> None:
    generator = _module(tmp_path, _GO.replace("varint,6", "varint,8"))
    with pytest.raises(protogen.Unreadable, match=r"not the fields \[2, 3, 4, 5, 7, 8\]"):
        generator.add("k8s.io.api.core.v1.Outer")
