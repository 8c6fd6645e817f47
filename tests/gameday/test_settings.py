"""Settings: three places, later wins, and every mistake is told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from gameday.errors import SettingsError
from gameday.settings import load


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_later_wins(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load({}, sandbox={"steady": 9}).steady == 9
    (elsewhere / "gameday.toml").write_text("steady = 8")
    assert load({}, sandbox={"steady": 9}).steady == 8
    monkeypatch.setenv("GAMEDAY_STEADY", "7")
    assert load({}, sandbox={"steady": 9}).steady == 7
    assert load({"steady": 6}, sandbox={"steady": 9}).steady == 6
    assert load({"steady": None}).steady == 7


def test_a_file_written_for_another_cluster_never_moves_the_sandbox(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults on the sandbox and load on production would be a clean PASS, and worse."""
    (elsewhere / "gameday.toml").write_text('target = "https://llm.example.com"\nnamespace = "prod"')
    monkeypatch.setenv("GAMEDAY_PROMETHEUS", "https://prometheus.example.com")
    sandbox = {"target": "http://127.0.0.1:1", "namespace": "llm", "prometheus": "http://127.0.0.1:2"}
    found = load({}, sandbox=sandbox)
    assert (found.target, found.namespace, found.prometheus) == tuple(sandbox.values())
    assert load({"target": "http://127.0.0.1:3"}, sandbox=sandbox).target == "http://127.0.0.1:3"


@pytest.mark.parametrize("key", ["context", "kubeconfig", "in_cluster"])
def test_a_file_never_names_a_cluster(elsewhere: Path, key: str) -> None:
    (elsewhere / "gameday.toml").write_text(f'{key} = "production"')
    with pytest.raises(SettingsError, match=f"names a cluster \\({key}\\)"):
        load({})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("per_second = 3", "there is no setting 'per_second'"),
        ("max_share = 2", "max_share = 2 is wrong"),
        ("not toml at all", "not valid TOML"),
        ('target = "example"', "not a URL"),
        ('prometheus = "http://[half"', "not a URL"),
    ],
)
def test_mistakes_in_the_file_are_told_with_the_file(elsewhere: Path, text: str, told: str) -> None:
    (elsewhere / "gameday.toml").write_text(text)
    with pytest.raises(SettingsError, match=told) as wrong:
        load({})
    assert "gameday.toml" in str(wrong.value) and "\n" not in str(wrong.value)


@pytest.mark.parametrize("key", ["target", "prometheus"])
def test_a_password_in_a_url_is_refused_and_not_repeated(elsewhere: Path, key: str) -> None:
    """It would be recorded in run.json, and shown in every report."""
    (elsewhere / "gameday.toml").write_text(f'{key} = "https://alice:hunter2hunter2@llm.example.com"')
    with pytest.raises(SettingsError, match=f"{key} = .*must not hold a password") as told:
        load({})
    assert "hunter2" not in str(told.value)


def test_mistyped_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMEDAY_NAMESPASE", "x")
    with pytest.raises(SettingsError, match="GAMEDAY_NAMESPASE"):
        load({})


def test_mistakes_in_options_name_the_option() -> None:
    with pytest.raises(SettingsError, match="option --trials"):
        load({"trials": 0})


def test_one_call_does_not_leak_into_the_next(elsewhere: Path) -> None:
    (elsewhere / "gameday.toml").write_text('namespace = "file"')
    assert load({}).namespace == "file"
    (elsewhere / "gameday.toml").unlink()
    assert load({}).namespace == "llm"
