"""Tables: what `kubectl get` prints."""

from __future__ import annotations

from sandbox.apiserver.core import Page
from sandbox.apiserver.resources import Resource
from sandbox.client import Obj


def render(res: Resource, page: Page, version: str, include: str, *, columns: bool = True) -> Obj:
    definitions = [
        {"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0},
        {"name": "Created At", "type": "date", "format": "", "description": "", "priority": 0},
    ]
    rows = [
        {
            "cells": [stored.obj["metadata"]["name"], stored.obj["metadata"]["creationTimestamp"]],
            "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                       "metadata": stored.obj["metadata"]},
        }
        for stored in page.items
    ]
    return {
        "kind": "Table",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": {"resourceVersion": str(page.version)},
        "columnDefinitions": definitions if columns else [],
        "rows": rows,
    }
