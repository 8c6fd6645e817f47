"""Progress without a terminal: a line every 5 s and on each change of phase, no control characters."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from reports.live import Live, Progress

NOW = Progress("zone_outage", "before", 29.6, 69.8, 0.9991, 0.245, (), 31)


class Clock:
    t = 0.0

    def __call__(self) -> float:
        return self.t


def test_a_line_every_five_seconds_and_on_each_phase() -> None:
    out, clock = io.StringIO(), Clock()
    with Live(out, clock) as live:
        for tick in range(12):
            clock.t = float(tick)
            phase = "before" if tick < 8 else "during"
            live.update(replace(NOW, phase=phase, left_seconds=30.0 - tick))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["before", "before", "during"]
    assert lines[0] == (
        "zone_outage  before        30 s left ·  69.8 req/s · success 99.91 % · first token p95 245 ms · 31 in flight"
    )


def test_what_is_broken_is_said_on_one_line() -> None:
    out = io.StringIO()
    with Live(out) as live:
        live.update(
            replace(NOW, phase="during", success=None, ttft_p95=None, broken=("zone b\nis cut", "2 pods unready"))
        )
    assert out.getvalue().count("\n") == 1
    assert "success – · first token p95 –" in out.getvalue()
    assert out.getvalue().endswith("broken: zone b is cut; 2 pods unready\n")


def test_a_terminal_is_redrawn_and_left_clean() -> None:
    out = Terminal()
    with Live(out) as live:
        live.update(NOW)
        live.update(replace(NOW, broken=("zone b is cut",)))
    assert "broken now: " in out.getvalue()
    assert "\x1b[?25h" in out.getvalue()  # the cursor is shown again


def test_made_while_output_is_captured_and_used_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    live, out = Live(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    with live:
        live.update(NOW)
    assert "\x1b[?25l" in out.getvalue()  # redrawn, so seen as a terminal
    seen = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in out.getvalue().splitlines()]
    assert max(map(len, seen)) <= 60


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
