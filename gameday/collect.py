"""pytest collects a team's own Chaos Toolkit experiments (`gameday.own`).

Collection reads the file and nothing else: no cluster, and none of the team's modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

SUFFIXES = (".chaos.yaml", ".chaos.yml", ".chaos.json")


def collects(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def name_of(path: Path) -> str:
    """`zone_outage` of `zone_outage.chaos.yaml`."""
    return next(path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix))


class ChaosFile(pytest.File):
    """One file, one experiment, named after the file."""

    def collect(self) -> Iterator[ChaosItem]:
        own, errors = import_module("gameday.own"), import_module("gameday.errors")
        try:
            own.load(self.path)
        except errors.GamedayError as wrong:
            raise self.CollectError(str(wrong)) from wrong
        yield ChaosItem.from_parent(self, name=name_of(self.path))


class ChaosItem(pytest.Item):
    fixturenames = ("experiment",)  # how the plugin knows an experiment

    def setup(self) -> None:
        import_module("gameday.plugin").refuse_parallel(self.config)

    def runtest(self) -> None:
        options = import_module("gameday.plugin").options_of(self.config)
        import_module("gameday.experiment").run_own(self, options)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name
