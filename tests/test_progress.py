"""The bar shows in a terminal, is gone afterwards, and draws from nobody else's thread."""

import io
import sys
import threading
import time

from fewer.progress import track


class Terminal(io.StringIO):
    """A stderr that is a terminal, and knows which threads wrote to it."""

    def __init__(self):
        super().__init__()
        self.writers = set()

    def isatty(self):
        return True

    def write(self, text):
        self.writers.add(threading.current_thread())
        return super().write(text)


def watched(monkeypatch):
    """For a test's body: pytest sets stderr anew after the fixtures."""
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def slow(steps):
    for step in steps:
        time.sleep(0.02)
        yield step


def test_a_terminal_shows_it_from_the_working_thread_and_it_is_gone_in_the_end(monkeypatch):
    terminal = watched(monkeypatch)
    assert list(track(slow(range(8)), "count", 8, delay=0)) == list(range(8))
    assert "count:" in terminal.getvalue()
    assert "/8" in terminal.getvalue()
    assert terminal.getvalue().rpartition("\r")[2].strip() == ""
    assert terminal.getvalue().split("\r")[-2].strip() == ""  # the line has been wiped
    assert terminal.writers == {threading.current_thread()}


def test_what_is_quick_or_not_wanted_shows_nothing(monkeypatch):
    terminal = watched(monkeypatch)
    assert list(track(range(50), "count")) == list(range(50))
    assert list(track(range(50), "count", progress=False, delay=0)) == list(range(50))
    assert terminal.getvalue().strip() == ""


def test_a_file_gets_nothing(capsys):
    with track(what="count", total=3, delay=0) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")
