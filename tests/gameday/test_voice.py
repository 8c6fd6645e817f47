"""A console that takes nothing (Ctrl-S) holds up nobody."""

from __future__ import annotations

import threading
from typing import Any

from gameday import clock
from gameday.voice import Voice


def test_a_blocked_console_blocks_nobody_and_shows_only_the_newest_progress() -> None:
    free, shown = threading.Event(), []

    def show(what: Any) -> None:
        free.wait(timeout=30)
        shown.append(what)

    voice = Voice(show, show)
    said: list[Any] = ["one", "two"]
    for line in said:
        voice.say(line)
    for number in range(1000):
        voice.progress(number)  # type: ignore[arg-type]
    assert shown == []  # we got here: nobody waited
    free.set()
    clock.wait_until(lambda: len(shown) == 3, within=10, what="what was said")
    assert shown == ["one", "two", 999]
    voice.close()


def test_closing_waits_for_what_is_to_be_said_but_not_for_ever(monkeypatch: Any) -> None:
    monkeypatch.setattr("gameday.voice.CLOSES_WITHIN", 0.2)
    free = threading.Event()

    def say(_: str) -> None:
        free.wait(timeout=30)

    voice = Voice(say, lambda _: None)
    voice.say("nobody reads this")
    begun = clock.now()
    voice.close()
    assert clock.now() - begun < 10
    free.set()
    heard: list[str] = []
    other = Voice(heard.append, lambda _: None)
    other.say("this")
    other.close()
    assert heard == ["this"]


def test_a_console_that_is_gone_is_no_error() -> None:
    def say(_: str) -> None:
        raise BrokenPipeError

    voice = Voice(say, lambda _: None)
    voice.say("x")
    voice.close()
    voice.say("after the end")
