"""Reading and comparing Kubernetes objects: selectors, conditions, quantities, owner references, hashes.

Pure functions over `Obj`; nothing here performs I/O or mutates its arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from sandbox.client import Kind, Obj

POD_TEMPLATE_HASH = "pod-template-hash"
REVISION_HASH = "controller-revision-hash"
ZONE = "topology.kubernetes.io/zone"
REGION = "topology.kubernetes.io/region"
HOSTNAME = "kubernetes.io/hostname"
FINISHED = ("Succeeded", "Failed")


# -- metadata


def name(obj: Obj) -> str:
    return str(obj["metadata"]["name"])


def namespace(obj: Obj) -> str:
    return str(obj["metadata"].get("namespace") or "")


def uid(obj: Obj) -> str:
    return str(obj["metadata"].get("uid", ""))


def key(obj: Obj) -> tuple[str, str]:
    return namespace(obj), name(obj)


def labels(obj: Obj) -> dict[str, str]:
    return obj["metadata"].get("labels") or {}


def notes(obj: Obj) -> dict[str, str]:
    return obj["metadata"].get("annotations") or {}


def version(obj: Obj) -> int:
    """resourceVersion as a number (they are comparable numbers since Kubernetes 1.35)."""
    return int(obj["metadata"].get("resourceVersion") or 0)


def generation(obj: Obj) -> int:
    return int(obj["metadata"].get("generation") or 0)


def deleting(obj: Obj) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def created(obj: Obj) -> str:
    return str(obj["metadata"].get("creationTimestamp") or "")


def finalizers(obj: Obj) -> list[str]:
    return obj["metadata"].get("finalizers") or []


def owners(obj: Obj) -> list[Obj]:
    return obj["metadata"].get("ownerReferences") or []


def controller(obj: Obj) -> Obj | None:
    """The owner reference of the managing controller."""
    return next((ref for ref in owners(obj) if ref.get("controller")), None)


def controlled_by(obj: Obj, owner: Obj) -> bool:
    ref = controller(obj)
    return ref is not None and ref.get("uid") == uid(owner)


def controller_ref(owner: Obj, kind: Kind) -> Obj:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "name": name(owner),
        "uid": uid(owner),
        "controller": True,
        "blockOwnerDeletion": True,
    }


# -- time


def now() -> datetime:
    return datetime.now(UTC)


def stamp(at: datetime | None = None) -> str:
    """metav1.Time: whole seconds."""
    return (at or now()).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_stamp(at: datetime | None = None) -> str:
    """metav1.MicroTime."""
    return (at or now()).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def seconds_since(text: str | None, at: datetime | None = None) -> float:
    """Seconds from a timestamp until `at`; nothing counts as just now."""
    return ((at or now()) - moment(text)).total_seconds() if text else 0.0


# -- conditions


def conditions(obj: Obj) -> list[Obj]:
    return (obj.get("status") or {}).get("conditions") or []


def condition(obj: Obj, type: str) -> Obj | None:
    return next((c for c in conditions(obj) if c.get("type") == type), None)


def is_true(obj: Obj, type: str) -> bool:
    found = condition(obj, type)
    return found is not None and found.get("status") == "True"


# -- pods


def phase(pod: Obj) -> str:
    return str((pod.get("status") or {}).get("phase") or "Pending")


def finished(pod: Obj) -> bool:
    return phase(pod) in FINISHED


def active(pod: Obj) -> bool:
    return not finished(pod) and not deleting(pod)


def ready(pod: Obj) -> bool:
    return is_true(pod, "Ready")


def available_in(pod: Obj, min_ready: int, at: datetime) -> float | None:
    """Seconds until a pod has been ready for `min_ready` seconds (0: it has); None when it is not ready."""
    found = condition(pod, "Ready")
    if found is None or found.get("status") != "True":
        return None
    if min_ready <= 0:
        return 0.0
    since = found.get("lastTransitionTime")
    return max(0.0, min_ready - seconds_since(since, at)) if since else float(min_ready)


def node_of(pod: Obj) -> str:
    return str((pod.get("spec") or {}).get("nodeName") or "")


# -- selectors


def matches(selector: Obj | None, have: Mapping[str, str]) -> bool:
    """A LabelSelector: absent matches nothing, empty everything."""
    if selector is None:
        return False
    if any(have.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    return all(requirement(e, have) for e in selector.get("matchExpressions") or ())


def requirement(expression: Obj, have: Mapping[str, str]) -> bool:
    """One requirement of a label selector or a node selector term."""
    label, operator = expression["key"], expression["operator"]
    wanted = expression.get("values") or []
    value = have.get(label)
    match operator:
        case "In":
            return value is not None and value in wanted
        case "NotIn":
            return value is None or value not in wanted
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt":
            return _compares(operator, value, wanted)
        case _:
            return False


def _compares(operator: str, value: str | None, wanted: list[str]) -> bool:
    if value is None or len(wanted) != 1:
        return False
    try:
        left, right = int(value), int(wanted[0])
    except ValueError:
        return False
    return left > right if operator == "Gt" else left < right


def selects_nothing(selector: Obj | None) -> bool:
    """Whether a workload's selector is empty, which controllers refuse to act on."""
    return not selector or not (selector.get("matchLabels") or selector.get("matchExpressions"))


# -- numbers

_SUFFIX = {
    "n": 10**-9, "u": 10**-6, "m": 10**-3, "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
    "E": 10**18, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
}  # fmt: skip
_QUANTITY = re.compile(r"^([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([numkKMGTPE]?i?)$")


@lru_cache(maxsize=4096)
def milli(quantity: str | int | float) -> int:
    """A resource quantity in thousandths, rounded up. ValueError when it is none."""
    found = _QUANTITY.match(str(quantity))
    if not found or found[2] not in _SUFFIX:
        raise ValueError(f"{quantity!r} is not a quantity")
    return math.ceil(round(float(found[1]) * _SUFFIX[found[2]] * 1000, 6))


def scaled(value: int | str, total: int, *, up: bool) -> int:
    """An IntOrString: a count, or a percentage of `total` rounded up or down."""
    if isinstance(value, str) and value.endswith("%"):
        share = int(value[:-1]) * total
        return -(-share // 100) if up else share // 100
    return int(value)


# -- comparing and hashing

_SAFE = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' alphabet of generated names: no vowels, no words


def safe(text: str) -> str:
    return "".join(_SAFE[ord(char) % len(_SAFE)] for char in text)


def digest(*parts: object) -> str:
    """FNV-1a over canonical JSON, written in the alphabet of generated names, as pod-template-hash is."""
    value = 0x811C9DC5
    for byte in orjson.dumps([plain(part) for part in parts], option=orjson.OPT_SORT_KEYS):
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return safe(str(value))


def plain(value: Any) -> Any:
    """A value without its empty members, so that absent, null and empty compare equal."""
    if isinstance(value, dict):
        kept = {k: plain(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v not in (None, {}, [])}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value


def without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k not in names}


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without zero values, as Go's `omitempty` writes a status."""
    return {k: v for k, v in fields.items() if v not in (0, None, "", [], {})}


def pod_from(template: Obj, owner: Obj, kind: Kind) -> Obj:
    """The pod a controller makes of its template; the API server completes the name."""
    meta = template.get("metadata") or {}
    made: Obj = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{name(owner)}-",
            "namespace": namespace(owner),
            "ownerReferences": [controller_ref(owner, kind)],
        },
        "spec": dict(template.get("spec") or {}),
    }
    for field in ("labels", "annotations", "finalizers"):
        if meta.get(field):
            value = meta[field]
            made["metadata"][field] = list(value) if isinstance(value, list) else dict(value)
    return made


# -- taints and tolerations


def tolerates(toleration: Obj, taint: Obj) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("key") and toleration["key"] != taint.get("key"):
        return False
    if toleration.get("operator") == "Exists":
        return True
    return bool(toleration.get("key")) and (toleration.get("value") or "") == (taint.get("value") or "")


def taints(node: Obj) -> list[Obj]:
    return (node.get("spec") or {}).get("taints") or []


def untolerated(taints: Iterable[Obj], tolerations: Iterable[Obj], effects: tuple[str, ...]) -> Obj | None:
    """The first taint with one of these effects that nothing tolerates."""
    held = list(tolerations)
    for taint in taints:
        if taint.get("effect") in effects and not any(tolerates(t, taint) for t in held):
            return taint
    return None


# -- node selection


def node_matches(spec: Obj, node: Obj) -> bool:
    """nodeSelector and required node affinity of a pod's spec against a node."""
    have = labels(node)
    if any(have.get(k) != v for k, v in (spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(term_matches(term, node) for term in required.get("nodeSelectorTerms") or ())


def term_matches(term: Obj, node: Obj) -> bool:
    """All requirements of a node selector term; an empty term matches nothing."""
    expressions, fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    if not expressions and not fields:
        return False
    own = {"metadata.name": name(node)}
    return all(requirement(e, labels(node)) for e in expressions) and all(requirement(f, own) for f in fields)
