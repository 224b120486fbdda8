"""benchmarks/start.py at tiny sizes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

START = Path(__file__).resolve().parents[1] / "benchmarks" / "start.py"


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(START), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_row_with_empty_caches_and_one_with_filled_ones(tmp_path):
    settings = "model=lmm_tiny model.layers=1 data.batch_size=1 data.seq_len=32 train.compile=aot_eager"
    caches, out = tmp_path / "caches", tmp_path / "start.json"
    done = start("--again", "1", "--caches", str(caches), "--out", str(out), "--", *settings.split())
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["caches"] for row in rows] == ["empty", "filled"]
    assert all(0 < row["first_step_seconds"] < row["seconds"] for row in rows)
    assert rows[0]["loss"] == rows[1]["loss"]
    assert "not compiled before" in rows[0]["device"] and "last time" in rows[1]["device"]


def test_a_run_that_ends_before_its_first_step_says_why(tmp_path):
    done = start("--out", str(tmp_path / "start.json"), "--", "model.layers=0")
    assert done.returncode == 1 and "model.layers" in done.stderr
    done = start("--out", str(tmp_path / "start.json"), "--again", "0")
    assert done.returncode == 2 and "--again" in done.stderr
