"""What every cluster has from its first second: namespaces, priorities, the API server's Service, roles."""

from __future__ import annotations

from sandbox.apiserver import rbac
from sandbox.apiserver.core import Core
from sandbox.client import Obj

NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
_PRIORITIES = {"system-node-critical": 2_000_001_000, "system-cluster-critical": 2_000_000_000}
_RBAC = {"kubernetes.io/bootstrapping": "rbac-defaults"}


def _create(core: Core, group: str, plural: str, obj: Obj, namespace: str = "") -> None:
    res = core.registry.find(group, "v1", plural)
    assert res is not None
    core.create(res, namespace, {"kind": res.kind, "apiVersion": res.api_version, **obj})


def objects(core: Core) -> None:
    for name in NAMESPACES:
        _create(core, "", "namespaces", {"metadata": {"name": name}})
    for name, value in _PRIORITIES.items():
        _create(core, "scheduling.k8s.io", "priorityclasses", {"metadata": {"name": name}, "value": value})
    ports = [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": 6443}]
    labels = {"component": "apiserver", "provider": "kubernetes"}
    service = {"metadata": {"name": "kubernetes", "labels": labels}, "spec": {"clusterIP": "10.96.0.1", "ports": ports}}
    _create(core, "", "services", service, "default")
    for name, rules in rbac.CLUSTER_ROLES.items():
        _create(core, rbac.GROUP, "clusterroles", {"metadata": {"name": name, "labels": dict(_RBAC)}, "rules": rules})
    for name, groups in rbac.CLUSTER_BINDINGS.items():
        _create(core, rbac.GROUP, "clusterrolebindings", rbac.binding(name, groups))


def root_certificate(core: Core, pem: str) -> None:
    """What a controller then publishes to every namespace."""
    _create(core, "", "configmaps", {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": pem}}, "kube-system")
