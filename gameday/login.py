"""How a named cluster is reached: kubeconfig files, exec plugins, service accounts, proxies.

With `gameday.cluster` the only importer of `kubernetes`, whose loader does the work. What it leaves to us:
a missing file or context is not http://localhost (facts/peers.md), a credential plugin that fails is not an
anonymous user, and credentials that expire in the middle of a run are loaded again (`Login.renew`).

No error and no log line ever carries a token.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client as k8s, config as k8s_config
from kubernetes.config import kube_config

from gameday import clock
from gameday.censor import censored
from gameday.errors import ClusterError

RENEW_AFTER = 1.0  # seconds between two loads of credentials: a plugin may open a browser


class Login:
    """Where the cluster is and who we are there. Thread-safe."""

    def __init__(self, *, context: str, files: str = "", in_cluster: bool = False) -> None:
        self.name = "in-cluster" if in_cluster else context
        self._context, self._files, self._in_cluster = context, files, in_cluster
        self._lock = threading.Lock()
        self._loaded = clock.now()
        self.api: Any = self._load()

    def environment(self) -> dict[str, str]:
        """The same cluster for programs that take it from the environment (chaosk8s, kubectl).

        Raises `ClusterError` where they would take another one: a list of files silently means http://localhost to
        chaosk8s (facts/peers.md), and kubectl goes by the current-context.
        """
        if self._in_cluster:
            return {"CHAOSTOOLKIT_IN_POD": "true", "KUBECONFIG": "/nonexistent/in-cluster"}
        if os.pathsep in self._files:
            raise ClusterError(f"Name one kubeconfig by --kubeconfig: this experiment cannot take {self._files}.")
        current = (yaml.safe_load(Path(self._files).read_text()) or {}).get("current-context")
        if current not in (None, "", self._context):
            raise ClusterError(
                f"The current-context of {self._files} is {current!r}, where this experiment's own commands would go: "
                f"kubectl config use-context {self._context}."
            )
        return {"KUBECONFIG": str(Path(self._files).absolute()), "KUBERNETES_CONTEXT": self._context}

    def renew(self, stale: Any) -> bool:
        """Load the credentials anew, unless another thread just did; whether there is anything new to try.

        Raises `ClusterError` where they cannot be had any more.
        """
        with self._lock:
            if self.api is not stale:
                return True
            if clock.now() - self._loaded < RENEW_AFTER:
                return False
            self._loaded = clock.now()
            self.api = self._load()
            return True

    def _load(self) -> Any:
        conf = k8s.Configuration()
        try:
            with _plugin_errors() as told:
                if self._in_cluster:
                    k8s_config.load_incluster_config(client_configuration=conf)
                else:
                    k8s_config.load_kube_config(
                        config_file=self._files, context=self._context, client_configuration=conf
                    )
        except (k8s_config.ConfigException, yaml.YAMLError, OSError, ValueError) as wrong:
            what = "service account of this pod" if self._in_cluster else "kubeconfig"
            raise ClusterError(f"The {what} cannot be used: {censored(str(wrong))}") from wrong
        if told:
            raise ClusterError(
                f"The credentials of context {self._context!r} cannot be had: {told[-1]}: "
                "run its credential plugin by hand, or log in again."
            )
        if (conf.proxy or "").startswith("socks") and find_spec("socks") is None:
            raise ClusterError(f"Context {self._context!r} goes through a SOCKS proxy: pip install pysocks first.")
        # Expired credentials are answered 401, upon which all of them are loaded anew: one way for plugins, token
        # files, certificates and service accounts, instead of the client's hook, which no lock guards.
        conf.refresh_api_key_hook = None
        conf.retries = False
        conf.connection_pool_maxsize = 32
        return k8s.ApiClient(conf)


def set_default_kubeconfig(path: str) -> None:
    """The client by itself goes by $KUBECONFIG as it was when it was imported: another cluster's, maybe."""
    kube_config.KUBE_CONFIG_DEFAULT_LOCATION = path


@contextmanager
def _plugin_errors() -> Iterator[list[str]]:
    """What the client's loader only logs, and then goes on without credentials."""
    told: list[str] = []

    class Ear(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            told.append(censored(" ".join(entry.getMessage().split()))[:300])

    root, ear = logging.getLogger(), Ear(logging.ERROR)
    others = root.handlers[:]
    root.handlers[:] = [ear]  # the loader speaks to the root logger: nobody else is to print it
    try:
        yield told
    finally:
        root.handlers[:] = others


def kubeconfig(named: str, context: str) -> str:
    """The kubeconfig files (a colon list) that exist; a missing file or context is said plainly.

    The client by itself would fall back to http://localhost (facts/peers.md).
    """
    paths = [Path(part).expanduser() for part in (named or "~/.kube/config").split(os.pathsep) if part]
    files = os.pathsep.join(str(path) for path in paths if path.is_file())
    if not files:
        raise ClusterError(f"No kubeconfig at {named or '~/.kube/config'}: name one with --kubeconfig FILE.")
    # Not by the client's list_kube_config_contexts, which demands a current-context: ours is always named.
    names: list[str] = []
    for path in files.split(os.pathsep):
        try:
            names += [found["name"] for found in (yaml.safe_load(Path(path).read_text()) or {}).get("contexts") or []]
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as wrong:
            raise ClusterError(f"The kubeconfig {path} cannot be used: {censored(str(wrong))}") from wrong
        except (TypeError, AttributeError, KeyError) as wrong:
            raise ClusterError(f"The kubeconfig {path} is not a kubeconfig: name another with --kubeconfig.") from wrong
    if context not in names:
        raise ClusterError(f"Context {context!r} is not in {files}; it has: {', '.join(names) or 'none'}.")
    return files
