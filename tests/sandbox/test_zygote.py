"""A machine's process maker: one process that never becomes its own must not hold up the others."""

from __future__ import annotations

import os

import pytest

from sandbox.node import zygote


def test_a_process_that_started_says_nothing() -> None:
    read, write = os.pipe()
    os.close(write)
    assert zygote._told(read) == b""
    os.close(read)


def test_why_it_did_not_start_is_heard() -> None:
    read, write = os.pipe()
    os.write(write, b"no such file")
    os.close(write)
    assert zygote._told(read) == b"no such file"
    os.close(read)


def test_silence_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "_START_SECONDS", 0.05)
    read, write = os.pipe()
    assert zygote._told(read) is None
    os.close(read)
    os.close(write)
