"""One process a run: a lock on a file in its folder, which the system lets go of when the process ends, however."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from titanfunc.config.failures import MISTAKE

LOCK = "lock"
_held: dict[tuple[int, int], int] = {}
"""The open file of every lock that this process has, by device and inode."""


class RunTaken(ValueError):
    """Another process trains in a run's folder, or has."""

    status = MISTAKE


def hold(run_dir: Path, *, new: bool = False) -> None:
    """Have a run for the life of this process; again is nothing. A file system without locks gets a warning.

    Raises RunTaken if another process has it or, for a ``new`` run, there is something in its folder; OSError if the
    file cannot be made.
    """
    handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    found = os.fstat(handle)
    if (found.st_dev, found.st_ino) in _held:
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RunTaken(f"train.run_dir: wanted a run that no other process trains, got {run_dir}") from None
    except OSError as error:
        print(f"warning: {run_dir / LOCK}: {error.strerror}; let no other process train there", file=sys.stderr)
    if new and not is_free(run_dir):
        os.close(handle)
        raise RunTaken(f"train.run_dir: wanted an empty folder for a new run, got {run_dir}")
    _held[found.st_dev, found.st_ino] = handle


def is_free(run_dir: Path) -> bool:
    """Whether there is nothing in a folder but, at most, a lock."""
    return all(path.name == LOCK for path in run_dir.iterdir())


def _let_go() -> None:
    """A forked process has its parent's open files, and may outlive it: it would go on holding the run."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
