"""The real thing: a sandbox of this test session's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stage import Stage, raised


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    yield from raised(tmp_path_factory.mktemp("reference"), "reference")


@pytest.fixture
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    yield from raised(tmp_path_factory.mktemp("fragile"), "fragile")
