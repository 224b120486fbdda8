"""benchmarks/start.py at tiny sizes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import alive, children, needs_proc, wait_for

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
    assert all(0 < row["ready_seconds"] < row["seconds"] - row["first_step_seconds"] + 0.5 for row in rows)
    assert all(0 < row["first_step_seconds"] < row["seconds"] for row in rows)
    assert rows[0]["loss"] == rows[1]["loss"]
    assert "not compiled before" in rows[0]["device"] and "last time" in rows[1]["device"]


def test_what_a_run_says_of_its_compiling_is_in_the_row(monkeypatch):
    monkeypatch.syspath_prepend(str(START.parent))
    import start

    said = (
        "run      runs/a\ndevice   cuda, the step as one graph (not compiled before)\n"
        "W0102 03:04:05 slow\nstep 1 compiled\n"
        "compiled in 25 s; of the programs, inductor's cache held 3 of 7\ncompiled in ha"
    )
    assert start.told(said) == {
        "device": "cuda, the step as one graph (not compiled before)",
        "compiled": "in 25 s; of the programs, inductor's cache held 3 of 7",
        "warnings": ["W0102 03:04:05 slow"],
    }
    assert start.told("") == {"device": None, "compiled": None, "warnings": []}


def test_it_waits_for_what_a_run_says_after_its_first_row(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(START.parent))
    import start

    worker = tmp_path / "train.py"
    worker.write_text(
        "import pathlib, sys, time\n"
        "run = pathlib.Path(next(a for a in sys.argv if a.startswith('train.run_dir=')).partition('=')[2])\n"
        "run.mkdir()\n"
        "(run / 'metrics.jsonl').write_text('{\"compile_seconds\": 0.5, \"loss\": 1.0}\\n')\n"
        "time.sleep(0.8)\n"
        "print('compiled in 1 s; of the programs', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(start, "TRAIN", worker)
    row = start.started([], tmp_path / "caches", tmp_path, 30.0)
    assert row["compiled"] == "in 1 s; of the programs" and row["seconds"] < 10


@needs_proc
def test_it_ends_with_its_run(tmp_path):
    """On SIGTERM, by which a job's limit or a closed terminal ends it."""
    settings = ["model=lmm_tiny", "model.layers=1", "train.compile=none", f"train.run_dir={tmp_path / 'run'}"]
    out = tmp_path / "start.json"
    process = subprocess.Popen([sys.executable, str(START), "--out", str(out), "--", *settings], stderr=subprocess.PIPE)
    child = wait_for(lambda: children(process.pid, "train.py"))
    process.terminate()
    assert process.wait(20) == 130 and b"interrupted" in process.stderr.read()
    process.stderr.close()
    assert not [pid for pid in child if alive(pid)]


def test_a_run_that_ends_before_its_first_step_says_why(tmp_path):
    done = start("--out", str(tmp_path / "start.json"), "--", "model.layers=0")
    assert done.returncode == 1 and "model.layers" in done.stderr
    done = start("--out", str(tmp_path / "start.json"), "--again", "0")
    assert done.returncode == 2 and done.stderr == "error: --again: wanted at least 1, got 0\n"
    done = start("--out", str(tmp_path / "start.json"), "--time-limit", "-3")
    assert done.returncode == 2 and "--time-limit: wanted a positive number of seconds, got -3" in done.stderr
