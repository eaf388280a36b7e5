"""The one line about what takes long."""

from __future__ import annotations

import io
import sys
import time

import pytest

from moepatch import progress


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


def work(stream, count=3, seconds=0.0):
    with progress.counted(range(count), "doing", lambda n: f"item {n}", stream) as turns:
        for _ in turns:
            time.sleep(seconds)
    return stream.getvalue()


def test_nothing_is_said_about_what_is_done_at_once():
    assert work(io.StringIO()) == work(Terminal()) == work(Terminal(), count=0) == ""


def test_a_log_gets_one_line_that_counts(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    said = work(io.StringIO(), seconds=0.2)
    assert said.startswith("moepatch: doing, 1 of 3: item 0") and said.count("\n") == 1


def test_a_terminal_sees_each_turn_and_nothing_is_left(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    said = work(Terminal(), seconds=0.2)
    assert [f"{n} of 3" in said for n in (1, 2, 3)] == [True] * 3 and said.endswith("\r\033[K") and "\n" not in said


def test_an_error_ends_it(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError) as caught, progress.counted([0], "doing", str, stream) as turns:
        for item in turns:
            1 / item
    time.sleep(0.2)
    assert caught and stream.getvalue() == ""


@pytest.mark.parametrize("gone", ["none", "closed"])
def test_a_stream_that_is_gone_stops_nothing(gone, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", None if gone == "none" else stream)
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with progress.counted(range(3), "doing", str) as turns:
        for item in turns:
            time.sleep(0.1)
            stream.close()
    assert item == 2
