"""The real Prometheus: where its binary is, how it is configured and started."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from sandbox.options import Clocks, Options

PORT = 9090  # on the fabric's loopback
DISCOVERY_PORT = 9091
RULES = "alerts.yml"  # beside prometheus.yml
_PLACES = ("/usr/bin", "/opt/prometheus", "/usr/local/bin")


class Missing(Exception):
    """There is no Prometheus; the text says what to do."""


def find_binary(options: Options) -> Path:
    """The binary: `options.prometheus_bin`, else $PROMETHEUS_BIN, else PATH and the usual places. Raises `Missing`."""
    named = options.prometheus_bin
    if named == "prometheus":
        named = os.environ.get("PROMETHEUS_BIN") or named
    found = shutil.which(named) or shutil.which(named, path=os.pathsep.join(_PLACES))
    if found is None:
        raise Missing(
            f"no Prometheus binary ({named!r} is not executable): install the Debian package prometheus, "
            "or name one with PROMETHEUS_BIN"
        )
    return Path(found).resolve()


def config(clocks: Clocks) -> str:
    """Scrape what asks for it by the usual annotations, as charts do on a real cluster."""
    meta = "__meta_kubernetes_"
    copied = (
        (f"{meta}namespace", "namespace"),
        (f"{meta}pod_name", "pod"),
        (f"{meta}pod_node_name", "node"),
        (f"{meta}node_label_topology_kubernetes_io_zone", "zone"),
        (f"{meta}pod_label_topology_kubernetes_io_zone", "zone"),  # a pod's own label goes first
        (f"{meta}pod_label_app", "app"),
    )
    port = f"{meta}pod_annotation_prometheus_io_port"
    relabel: list[dict[str, object]] = [
        {"source_labels": [f"{meta}pod_annotation_prometheus_io_scrape"], "regex": "true", "action": "keep"},
        {"source_labels": [f"{meta}pod_phase"], "regex": "Succeeded|Failed", "action": "drop"},
        {
            "source_labels": [f"{meta}pod_annotation_prometheus_io_path"],
            "regex": "(.+)",
            "target_label": "__metrics_path__",
        },
        {
            "source_labels": ["__address__", port],
            "regex": r"([^:]+)(?::\d+)?;(\d+)",
            "replacement": "$1:$2",
            "target_label": "__address__",
        },
    ]
    relabel += [{"source_labels": [source], "regex": "(.+)", "target_label": target} for source, target in copied]
    interval = f"{max(1, round(clocks.scrape_interval * 1000))}ms"
    timeout = f"{max(1, round(min(10.0, clocks.scrape_interval) * 1000))}ms"
    discovery = {"url": f"http://127.0.0.1:{DISCOVERY_PORT}/pods", "refresh_interval": "1s"}
    return yaml.safe_dump(
        {
            "global": {"scrape_interval": interval, "scrape_timeout": timeout, "evaluation_interval": interval},
            "rule_files": [RULES],
            "scrape_configs": [
                {"job_name": "kubernetes-pods", "http_sd_configs": [discovery], "relabel_configs": relabel}
            ],
        },
        sort_keys=False,
    )


def rules(clocks: Clocks) -> str:
    """Alerts on the stack, as a production one has them (deploy/prometheus), at the pace of the clocks.

    A rollout may surge by a third without one of them.
    """
    look = max(10, round(20 * clocks.scrape_interval))  # seconds
    engines = 'count by (namespace) (up{app=~"my-llama32.*"} == 1)'
    asked = f"sum by (namespace) (rate(gateway_requests_total[{look // 2}s]))"
    errors = f'sum by (namespace) (rate(gateway_requests_total{{code=~"5.."}}[{look // 2}s]))'
    every = max(1, round(clocks.scrape_interval))
    alerts = {
        "LLMEnginesLost": f"{engines} < 0.7 * max_over_time({engines}[{look}s:{every}s])",
        "LLMErrorsBurn": f"{errors} / {asked} > 0.05",
    }
    listed = [
        {"alert": name, "expr": expr, "for": f"{every}s", "labels": {"severity": "page"}}
        for name, expr in alerts.items()
    ]
    return yaml.safe_dump({"groups": [{"name": "stack", "rules": listed}]}, sort_keys=False)


@dataclass(frozen=True, slots=True)
class Command:
    argv: tuple[str, ...]
    env: dict[str, str]


def prepare(binary: Path, directory: Path, clocks: Clocks, public_url: str) -> Command:
    """Write the configuration to `directory`; the command that runs it there."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "prometheus.yml"
    file.write_text(config(clocks))
    (directory / RULES).write_text(rules(clocks))
    argv = (
        str(binary),
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{PORT}",
        f"--web.external-url={public_url}",
        "--web.route-prefix=/",
        "--log.level=warn",
    )
    return Command(argv, {"PATH": os.environ.get("PATH", os.defpath), "GOMAXPROCS": "1", "GOGC": "200"})
