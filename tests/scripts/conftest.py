import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import python_path

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    """seconds: of the processor, which do not hang on what else the machine does."""

    status: int
    out: str
    err: str
    seconds: float


def spent() -> float:
    """Seconds of the processor that child processes took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONPATH": python_path(), "COLUMNS": "80"}


@pytest.fixture
def script(tmp_path, environment):
    """Runs scripts/train.py, or another, in an empty folder, as from a plain source tree."""

    def call(*settings: str, python: tuple[str, ...] = (), name: str = "train") -> Result:
        command = [sys.executable, *python, str(ROOT / "scripts" / f"{name}.py"), *settings]
        before = spent()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return Result(done.returncode, done.stdout, done.stderr, spent() - before)

    return call
