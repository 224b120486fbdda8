import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    status: int
    out: str
    err: str
    seconds: float


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "COLUMNS": "80"}


@pytest.fixture
def script(tmp_path, environment):
    """Runs scripts/train.py, or another, in an empty folder, as from a plain source tree."""

    def call(*settings: str, python: tuple[str, ...] = (), name: str = "train") -> Result:
        command = [sys.executable, *python, str(ROOT / "scripts" / f"{name}.py"), *settings]
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return Result(done.returncode, done.stdout, done.stderr, time.perf_counter() - begun)

    return call
