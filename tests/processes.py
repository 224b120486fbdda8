"""Processes that a test starts: what they import, and what Linux tells of them and of those that they start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
PROCESSES = Path("/proc")
needs_proc = pytest.mark.skipif(not (PROCESSES / "self" / "stat").exists(), reason="looks for processes in /proc")


def python_path(*places: Path) -> str:
    """PYTHONPATH with the source tree's folders, or other places instead of them, in front of what it names here."""
    own = [ROOT, ROOT / "kernels"]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) not in own]
    return os.pathsep.join([*map(str, places or own), *given])


def children(pid: int, word: str) -> list[int]:
    """The processes that another one has started, with a word on their command line, and that still run."""
    own = [place for place in PROCESSES.glob("[0-9]*") if (stat := _stat(place)) and stat[1] == str(pid)]
    return [int(place.name) for place in own if word.encode() in _read(place / "cmdline")]


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return bool(_stat(PROCESSES / str(pid)))


def wait_for(look: Callable[[], T], seconds: float = 60.0) -> T:
    """What ``look`` finds as soon as it is true; AssertionError if it is not in time."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "nothing was found in time"
        time.sleep(0.1)
    return found


def _stat(place: Path) -> list[str]:
    """Its state, its parent and more; nothing of one that has ended, though nobody may have waited for it yet."""
    fields = _read(place / "stat").decode().rpartition(")")[2].split()
    return [] if not fields or fields[0] in "ZX" else fields


def _read(place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError:  # the process is gone
        return b""
