"""Reviews: questions about identities and rights. A POST is answered and forgotten."""

from __future__ import annotations

from sandbox.apiserver import errors
from sandbox.apiserver.authn import Identity, Tokens
from sandbox.apiserver.rbac import Ask, Rules
from sandbox.apiserver.resources import Resource
from sandbox.client import Obj


def answer(res: Resource, body: Obj, user: Identity, tokens: Tokens, rules: Rules, namespace: str) -> Obj:
    """Raises ApiError(422) for a question that is none."""
    spec = body.get("spec") or {}
    match res.kind:
        case "SelfSubjectAccessReview":
            status = _access(rules, user, spec, res)
        case "SubjectAccessReview" | "LocalSubjectAccessReview":
            asked = Identity(spec.get("user", ""), tuple(spec.get("groups") or ()))
            status = _access(rules, asked, spec, res)
        case "SelfSubjectRulesReview":
            status = _rules(rules, user, spec.get("namespace") or "")
        case "TokenReview":
            status = _token(tokens, spec)
        case _:
            status = {"userInfo": _user(user)}
    return {
        "kind": res.kind,
        "apiVersion": res.api_version,
        "metadata": {"creationTimestamp": None},
        **({"spec": spec} if res.kind != "SelfSubjectReview" else {}),
        "status": status,
    }


def _access(rules: Rules, user: Identity, spec: Obj, res: Resource) -> Obj:
    resource, path = spec.get("resourceAttributes"), spec.get("nonResourceAttributes")
    if (resource is None) == (path is None):
        why = "exactly one of nonResourceAttributes or resourceAttributes must be specified"
        raise errors.invalid(
            res.group,
            "",
            "",
            [errors.Cause("FieldValueInvalid", f"Invalid value: null: {why}", "spec.resourceAttributes")],
        )
    if resource is not None:
        ask = Ask(
            resource.get("verb", ""),
            resource.get("group", ""),
            resource.get("resource", ""),
            resource.get("namespace", ""),
            resource.get("name", ""),
            resource.get("subresource", ""),
        )
    else:
        assert path is not None
        ask = Ask(path.get("verb", ""), path=path.get("path", ""))
    reason = rules.allowed(user, ask)
    status: Obj = {"allowed": reason is not None}
    if reason:
        status["reason"] = reason
    return status


def _rules(rules: Rules, user: Identity, namespace: str) -> Obj:
    found = rules.rules_of(user, namespace)
    keys = ("verbs", "apiGroups", "resources", "resourceNames")
    return {
        "resourceRules": [{key: rule[key] for key in keys if key in rule} for rule in found if rule.get("resources")],
        "nonResourceRules": [
            {"verbs": rule["verbs"], "nonResourceURLs": rule["nonResourceURLs"]}
            for rule in found
            if rule.get("nonResourceURLs")
        ],
        "incomplete": False,
    }


def _user(user: Identity) -> Obj:
    info: Obj = {"username": user.user}
    if user.uid:
        info["uid"] = user.uid
    if user.groups:
        info["groups"] = list(user.groups)
    if user.extra:
        info["extra"] = {key: list(values) for key, values in user.extra}
    return info


def _token(tokens: Tokens, spec: Obj) -> Obj:
    found = tokens.identify(spec.get("token", ""))
    if found is None:
        return {"user": {}, "error": "[invalid bearer token, token lookup failed]"}
    return {"authenticated": True, "user": _user(found), "audiences": ["https://kubernetes.default.svc"]}
