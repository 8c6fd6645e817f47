"""Which command an image stands for (`sandbox/images.toml`)."""

from __future__ import annotations

import shutil
import signal
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CATALOGUE = Path(__file__).resolve().parent.parent / "images.toml"


@dataclass(frozen=True, slots=True)
class Image:
    """One entry: `entrypoint` is called, or `exec` says how command and args are executed."""

    name: str
    entrypoint: str | None = None
    exec: str | None = None
    pull_seconds: float = 0.0

    def process(self, command: Sequence[str], args: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
        """(function to call or None, argv). A `command` that the image lacks is executed as given, and fails."""
        if self.entrypoint and not (command and _is_pause(self.name)):
            return self.entrypoint, (*command, *args)
        argv = [*command, *args] or (["python3"] if self.exec == "python" else ["sh"])
        if self.exec == "python" and Path(argv[0]).name in ("python", "python3"):
            argv[0] = sys.executable
        elif self.exec == "shell":
            argv[0] = shutil.which(argv[0]) or argv[0]
        elif _is_pause(self.name):
            argv[0] = f"/pause-image{argv[0]}" if argv[0].startswith("/") else f"/pause-image/{argv[0]}"
        return None, tuple(argv)


def _is_pause(image: str) -> bool:
    return "/pause" in image


def load(path: Path = CATALOGUE) -> dict[str, Image]:
    entries: Mapping[str, Mapping[str, object]] = tomllib.loads(path.read_text())["images"]
    return {name: Image(name, **entry) for name, entry in entries.items()}  # type: ignore[arg-type]


def find(catalogue: Mapping[str, Image], name: str) -> Image | None:
    """The entry for an image reference; None: no registry of this sandbox has it."""
    if found := catalogue.get(name):
        return found
    if _is_pause(name):
        return Image(name, entrypoint="sandbox.node.images:pause")
    return None


def pause(_: list[str]) -> int:
    """The pause container: sleeps until SIGTERM, then exits 0."""
    signal.sigwait(_block({signal.SIGTERM, signal.SIGINT}))
    return 0


def _block(signals: set[signal.Signals]) -> set[signal.Signals]:
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    return signals
