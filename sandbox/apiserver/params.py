"""Query parameters. Those that are not supported are errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sandbox.apiserver import errors
from sandbox.client import ApiError, Obj

Query = Mapping[str, str]
_KNOWN = frozenset(
    {
        "allowWatchBookmarks",
        "continue",
        "dryRun",
        "fieldManager",
        "fieldSelector",
        "fieldValidation",
        "force",
        "gracePeriodSeconds",
        "includeObject",
        "labelSelector",
        "limit",
        "orphanDependents",
        "pretty",
        "propagationPolicy",
        "resourceVersion",
        "resourceVersionMatch",
        "sendInitialEvents",
        "timeout",
        "timeoutSeconds",
        "watch",
        # of pods/log, which has its own check
        "container",
        "follow",
        "previous",
        "timestamps",
        "tailLines",
        "limitBytes",
        "sinceSeconds",
        "sinceTime",
        "stream",
        "insecureSkipTLSVerifyBackend",
        # of pods/exec, which is refused with a reason of its own
        "command",
        "stdin",
        "stdout",
        "stderr",
        "tty",
    }
)
_KINDS = {"create": "CreateOptions", "update": "UpdateOptions", "patch": "PatchOptions"}


@dataclass(frozen=True, slots=True)
class WriteOptions:
    dry_run: bool
    validation: str


def check(query: Query) -> None:
    """Raises ApiError(400)."""
    if unknown := sorted(set(query) - _KNOWN):
        raise errors.bad_request(f"query parameters that this API server does not support: {', '.join(unknown)}")


def invalid_options(kind: str, field: str, message: str, reason: str = "FieldValueNotSupported") -> ApiError:
    return errors.invalid("meta.k8s.io", kind, "", [errors.Cause(reason, message, field)])


def write_options(query: Query, verb: str) -> WriteOptions:
    """Raises ApiError(422)."""
    kind = _KINDS.get(verb, "DeleteOptions")
    dry = query.get("dryRun")
    if dry not in (None, "", "All"):
        raise invalid_options(kind, "dryRun", f'Unsupported value: ["{dry}"]: supported values: "All"')
    validation = query.get("fieldValidation", "")
    if validation not in ("", "Ignore", "Warn", "Strict"):
        text = f'Unsupported value: "{validation}": supported values: "", "Ignore", "Strict", "Warn"'
        raise invalid_options(kind, "fieldValidation", text)
    return WriteOptions(dry == "All", validation or "Warn")


def check_watch(query: Query) -> None:
    """Raises ApiError(422)."""
    initial, match = query.get("sendInitialEvents"), query.get("resourceVersionMatch")
    if initial is not None and match != "NotOlderThan":
        why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
    elif match is not None and initial is None:
        why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
    else:
        return
    raise invalid_options("ListOptions", "resourceVersionMatch", f"Forbidden: {why}", "FieldValueForbidden")


def delete_options(query: Query) -> Obj:
    options: Obj = {}
    if grace := query.get("gracePeriodSeconds"):
        if not grace.lstrip("-").isdigit():
            raise errors.bad_request(f'strconv.ParseInt: parsing "{grace}": invalid syntax')
        options["gracePeriodSeconds"] = int(grace)
    if policy := query.get("propagationPolicy"):
        options["propagationPolicy"] = policy
    if orphan := query.get("orphanDependents"):
        options["orphanDependents"] = orphan.lower() == "true"
    return options


def check_propagation(options: Obj) -> None:
    """Raises ApiError(422)."""
    policy = options.get("propagationPolicy")
    if policy not in (None, "", "Foreground", "Background", "Orphan"):
        text = f'Unsupported value: "{policy}": supported values: "Foreground", "Background", "Orphan", "nil"'
        raise invalid_options("DeleteOptions", "propagationPolicy", text)
    if policy and options.get("orphanDependents") is not None:
        text = f'Invalid value: "{policy}": orphanDependents and deletionPropagation cannot be both set'
        raise invalid_options("DeleteOptions", "propagationPolicy", text, "FieldValueInvalid")
