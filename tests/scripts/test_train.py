"""The script from end to end on a small folder of text, uncompiled."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SMALL = [
    "model=mac_tiny", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=32", "model.seq_len=32",
    "model.memory.head_dim=8", "model.memory.hidden=8", "model.memory.chunk_size=8", "model.mac.segment=16",
    "data=text_folder", "data.path=texts", "data.batch_size=2", "data.validation_fraction=0.5",
    "train.compile=none", "train.device=cpu", "train.eval_batches=1", "train.log_every=2", "train.sample_tokens=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"This is text {name}, of some length. " * 20)


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_and_its_continuation(script, tmp_path):
    first = script(*SMALL, "train.steps=4", "train.checkpoint_every=3")
    assert (first.status, first.err) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.endswith("_mac_tiny")
    names = {path.name for path in run_dir.iterdir()}
    begun = {"config.yaml", "data.json", "lock", "metrics.jsonl", "checkpoints"}
    assert names == begun | {"sample.txt", "curves.png"}
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["memory"]["clip"] == 1.0
    sample = (run_dir / "sample.txt").read_text()
    assert sample.startswith("My fellow citizens, ")
    assert sample in first.out
    assert "step 2/4" in first.out
    assert {path.name for path in (run_dir / "checkpoints").glob("step_*")} == {"step_00000003", "step_00000004"}
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "runs"}

    with (run_dir / "lock").open() as lock:  # as by a process that trains
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken = script(*SMALL, "train.steps=6", "train.resume=latest")
    told = f"error: train.run_dir: wanted a run that no other process trains, got {run_dir}\n"
    assert (taken.status, taken.out, taken.err) == (2, "", told)

    more = script(*SMALL, "train.steps=6", "train.resume=latest", "train.log_every=1", "optim.lr=1e-4")
    assert (more.status, more.err) == (0, "")
    assert list((tmp_path / "runs").iterdir()) == [run_dir]
    assert "optim.lr was 0.002 and is now 0.0001" in more.out
    assert "train.steps was 4 and is now 6" in more.out
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (run_dir / "checkpoints").glob("step_*")} == {"step_00000004", "step_00000006"}


def test_a_signal_saves_and_says_so(tmp_path, environment):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL, "train.steps=100000", "train.run_dir=mine"]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        if (tmp_path / "mine" / "metrics.jsonl").exists() and any("loss" in row for row in rows(tmp_path / "mine")):
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "")
    (saved,) = (tmp_path / "mine" / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert out.splitlines()[-1].strip() == "continue with train.resume=mine"
    assert f"stopped by SIGINT at step {step}" in out
    assert rows(tmp_path / "mine")[-1]["step"] == step


def test_data_that_does_not_fit_is_one_line_and_leaves_no_folder(script, tmp_path):
    result = script(*SMALL, "train.steps=2", "data.seq_len=4096")
    assert result.status == 2
    assert result.err.startswith("error: data.seq_len: wanted at most ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_sweep(script, tmp_path):
    result = script("-m", *SMALL, "train.steps=1", "train.seed=1,2", "train.sample_tokens=0")
    assert (result.status, result.err) == (0, "")
    run_dirs = [path for path in (tmp_path / "runs").iterdir() if path.name != "sweeps"]
    assert len(run_dirs) == 2
    seeds = {yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["seed"] for run_dir in run_dirs}
    assert seeds == {1, 2}
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "runs"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [([], ""), ([*SMALL, "data.cache_dir=kept"], "; tokens that lie in kept are kept")],
    ids=["none", "tokens"],
)
def test_an_interrupt_before_the_first_step_is_told(environment, tmp_path, settings, told):
    interrupted = (
        "import sys; from scripts import train; from titanfunc import job\n"
        "def assemble(*parts): raise KeyboardInterrupt\n"
        "job.assemble = assemble\n"
        f"sys.argv = ['train.py', 'model=mac_tiny', *{settings!r}]; train.main()"
    )
    command = [sys.executable, "-c", interrupted]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == f"interrupted before the first step{told}\n"
    assert (done.returncode, done.stdout) == (130, "")
