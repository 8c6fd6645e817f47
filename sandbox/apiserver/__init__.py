"""The embedded Kubernetes API server."""

from __future__ import annotations

from sandbox.apiserver.authn import Identity
from sandbox.apiserver.direct import DirectApi
from sandbox.apiserver.server import ApiServer
from sandbox.apiserver.tls import TlsFiles, make_tls

__all__ = ["ApiServer", "DirectApi", "Identity", "TlsFiles", "make_tls"]
