"""Names become paths, labels and Kubernetes names: whatever pods, zones and files are called, they are safe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from faults import PodKill
from faults.base import name_for
from gameday.cli import main
from gameday.errors import ExperimentError
from gameday.objectives import Objectives, Success
from gameday.own import load
from gameday.spec import Spec
from gameday.toolkit import spec_from_json, spec_json
from loadgen.traffic import Chat

OBJECTIVES = Objectives((Success(at_least=0.9),))


def test_kubernetes_takes_every_name() -> None:
    """Found on paper: a pod's name may have 253 letters, a zone's label capitals and dots; a Job's name has 63."""
    seen = set()
    for what in (
        "pod-kill",
        "prober-",
        f"container-kill-{'x' * 253}",
        f"container-kill-{'x' * 252}y",
        "prober-EU.West_1",
    ):
        name = name_for("abc123", what)
        assert (
            re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 63 and name.startswith("gd-abc123-")
        )
        seen.add(name)
    assert len(seen) == 5
    assert (
        name_for("abc123", "prober-EU.West_1") != name_for("abc123", "prober-eu-west-1") == "gd-abc123-prober-eu-west-1"
    )
    assert name_for("abc123", "prober-") == "gd-abc123-prober"


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "a/b", "", ".hidden", "a b", "x" * 200, "a\nb"])
def test_a_name_that_leads_out_of_the_run_directory_is_refused(name: str) -> None:
    with pytest.raises(ExperimentError, match="cannot name an experiment"):
        Spec(name, Chat(per_second=1), PodKill(lasting=60), OBJECTIVES)
    plain = spec_json(Spec("fine", Chat(per_second=1), PodKill(lasting=60), OBJECTIVES))
    with pytest.raises(ExperimentError, match="cannot name an experiment"):
        spec_from_json(plain | {"name": name})


def test_a_files_name_must_be_one_as_well(tmp_path: Path) -> None:
    path = tmp_path / "my night.chaos.yaml"
    path.write_text("title: x\nmethod: [{name: a, type: action}]")
    with pytest.raises(ExperimentError, match="'my night' cannot name an experiment"):
        load(path)


def test_a_run_is_no_selector() -> None:
    done = CliRunner().invoke(main, ["heal", "--run", "x,app=everything"])
    assert done.exit_code == 2 and "cannot be a run" in done.output
