"""Which process may load the machine: several compile at once, and one alone times its steps.

A lock on a file, which the system lets go of when its process ends, however that ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

WAITING = "waiting"


class Turns:
    """The lock, and a file that tells what the process is at: a line "STAGE SECONDS" whenever that changes.

    waited: seconds so far that the process did nothing but wait for the others.
    """

    def __init__(self, lock: Path, told: Path) -> None:
        self.lock, self.told = lock, told
        self.waited = 0.0

    @contextlib.contextmanager
    def among_others(self, stage: str) -> Iterator[None]:
        """While nobody is alone."""
        with self._held(stage, alone=False):
            yield

    @contextlib.contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """While there is nobody else."""
        with self._held(stage, alone=True):
            yield

    @contextlib.contextmanager
    def _held(self, stage: str, alone: bool) -> Iterator[None]:
        import fcntl  # which not every system has

        with self.lock.open("a") as file:
            begun = time.perf_counter()
            self._tell(WAITING)
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            self.waited += time.perf_counter() - begun
            self._tell(stage)
            yield
            self._tell(f"{stage}_done")

    def _tell(self, stage: str) -> None:
        with self.told.open("a", encoding="utf-8") as file:
            file.write(f"{stage} {time.time()}\n")


def follow(told: Path, say: Callable[[str, float], None]) -> Callable[[], float]:
    """A watch of a process: says each new stage and the seconds since the first, and returns those spent waiting."""
    seen = 0

    def watch() -> float:
        nonlocal seen
        text = told.read_text(encoding="utf-8") if told.exists() else ""
        lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        stages = [(stage, float(when)) for stage, when in lines]
        for stage, when in stages[seen:]:
            say(stage, when - stages[0][1])
        seen = len(stages)
        ends = [when for _, when in stages[1:]] + [time.time()]
        return sum(end - when for (stage, when), end in zip(stages, ends, strict=False) if stage == WAITING)

    return watch
