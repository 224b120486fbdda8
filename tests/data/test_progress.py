"""A batch job's log hears of tokenizing that takes long, and of no other."""

import re
import threading
import time

import pytest

from titanfunc.data import progress as module
from titanfunc.data.parts import Part
from titanfunc.data.progress import progress

PARTS = [
    Part("text", ("a.txt", "b.txt"), size=300),
    Part("jsonl", ("c.jsonl",), end=400, size=400),
    Part("jsonl", ("c.jsonl",), first=400, size=300),
]


def lines(capfd):
    shown = capfd.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()


@pytest.fixture
def told(monkeypatch, capfd):
    """Waits until as many lines are on stderr, and returns them; there is one every 0.05 s."""
    monkeypatch.setattr(module, "FIRST", 0.05)
    monkeypatch.setattr(module, "EVERY", 0.05)
    seen = []

    def wait(count):
        deadline = time.monotonic() + 30
        while len(seen) < count and time.monotonic() < deadline:
            time.sleep(0.02)
            seen.extend(lines(capfd))
        return seen

    return wait


def test_lines_tell_files_text_and_tokens(told):
    with progress(PARTS) as advance:
        assert told(1)[0] == "tokenizing: 0 of 3 files done, 0% of the text, 0 tokens so far"
        advance(1, 1234)
        known = len(told(1))
        assert told(known + 2)[-1] == "tokenizing: 0 of 3 files done, 40% of the text, 1,234 tokens so far"
        advance(0, 1000)
        known = len(told(1))
        assert told(known + 2)[-1] == "tokenizing: 2 of 3 files done, 70% of the text, 2,234 tokens so far"
        advance(2, 1)
        known = len(told(1))
        assert told(known + 2)[-1] == "tokenizing: 3 of 3 files done, 100% of the text, 2,235 tokens so far"


def test_what_was_done_before_counts(told):
    with progress(PARTS, done=[0], tokens=77):
        assert told(1)[0] == "tokenizing: 2 of 3 files done, 30% of the text, 77 tokens so far"


def test_nothing_is_said_of_what_is_short_and_nothing_after_the_end(monkeypatch, capfd):
    monkeypatch.setattr(module, "FIRST", 0.2)
    before = threading.active_count()
    with progress(PARTS) as advance:
        advance(0, 1)
    with pytest.raises(KeyError), progress(PARTS):
        raise KeyError
    assert threading.active_count() == before
    time.sleep(0.4)
    assert lines(capfd) == []


def test_there_are_seconds_between_lines(monkeypatch, capfd):
    assert (module.FIRST, module.EVERY) == (5.0, 60.0)
    monkeypatch.setattr(module, "FIRST", 0.01)
    with progress(PARTS):
        time.sleep(0.5)
    assert len(lines(capfd)) == 1


def test_a_terminal_has_a_bar_and_no_lines(told, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(PARTS) as advance:
        time.sleep(0.2)
        advance(1, 3_000_000)
    shown = capfd.readouterr().err
    assert "3 M tokens" in shown and "40%" in shown and not re.search(r"files? done", shown)
