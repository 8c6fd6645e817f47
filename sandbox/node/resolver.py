"""A pod's /etc/hosts and /etc/resolv.conf. Pure. Source: kubernetes pkg/kubelet/network/dns/dns.go."""

from __future__ import annotations

from sandbox.client import Obj

CLUSTER_DNS = "10.96.0.10"
DOMAIN = "cluster.local"


def hosts(spec: Obj, name: str, namespace: str, ip: str) -> str:
    own = spec.get("hostname") or name
    if sub := spec.get("subdomain"):
        own = f"{own}.{sub}.{namespace}.svc.{DOMAIN}\t{own}"
    lines = ["# Kubernetes-managed hosts file.", "127.0.0.1\tlocalhost", f"{ip}\t{own}"]
    if aliases := spec.get("hostAliases"):
        lines += ["", "# Entries added by HostAliases."]
        lines += ["\t".join([alias["ip"], *(alias.get("hostnames") or [])]) for alias in aliases]
    return "\n".join(lines) + "\n"


def resolv_conf(spec: Obj, namespace: str) -> str:
    """By dnsPolicy and dnsConfig. `Default` is the machine's own, which has no name server: it cannot resolve."""
    servers: list[str] = []
    search: list[str] = []
    options: dict[str, str | None] = {}
    if spec.get("dnsPolicy", "ClusterFirst").startswith("ClusterFirst"):
        servers = [CLUSTER_DNS]
        search = [f"{namespace}.svc.{DOMAIN}", f"svc.{DOMAIN}", DOMAIN]
        options = {"ndots": "5"}
    config = spec.get("dnsConfig") or {}
    servers += [server for server in config.get("nameservers") or [] if server not in servers]
    search += [domain for domain in config.get("searches") or [] if domain not in search]
    options |= {option["name"]: option.get("value") for option in config.get("options") or []}
    lines = [f"search {' '.join(search)}"] if search else []
    lines += [f"nameserver {server}" for server in servers or ["127.0.0.1"]]  # none would mean this, and time out
    if options:
        shown = (f"{name}:{value}" if value is not None else name for name, value in options.items())
        lines.append(f"options {' '.join(shown)}")
    return "\n".join(lines) + "\n"
