"""Runs that are killed at random moments, and go on, end as one that nobody killed: benchmarks/killed.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from titanfunc.config import checkpoints

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = ["data=text_folder", "data.path=texts", "data.batch_size=2", "data.validation_fraction=0.5"]
RUN = ["train.device=cpu", "train.eval_batches=1", "train.log_every=2", "train.sample_tokens=4"]
MAC = [
    "model=mac_tiny", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=32", "model.seq_len=32",
    "model.memory.head_dim=8", "model.memory.hidden=8", "model.memory.chunk_size=8", "model.mac.segment=16",
    "train.compile=none",
]  # fmt: skip
TRANSFORMER = [
    "model=transformer_tiny", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=32", "model.seq_len=32",
]  # fmt: skip


@pytest.fixture
def killed(tmp_path, environment):
    def run(*settings):
        (tmp_path / "texts").mkdir()
        for name in ("one", "two"):
            (tmp_path / "texts" / f"{name}.txt").write_text(f"This is text {name}, of some length. " * 20)
        command = [sys.executable, str(BENCHMARKS / "killed.py"), *settings, *TEXT, *RUN]
        command += ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["same"] and result["runs"] == len(result["differences"])
        return result["rows"], tmp_path / "runs"

    return run


@pytest.mark.slow
def test_thirty_kills(killed):
    rows, folder = killed(
        "--fork", "--kills", "30", "--within", "2", *MAC, "train.steps=60", "train.checkpoint_every=1",
        "train.eval_every=20",
    )  # fmt: skip
    assert len(rows) == 30
    assert sum(row["saving"] for row in rows) >= 2  # a half-written checkpoint was left behind
    assert len({row["checkpoint"] for row in rows}) > 5
    steps = [json.loads(line)["step"] for line in (folder / "killed_0" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == set(range(61))


@pytest.mark.slow
def test_the_command_line_itself(killed):
    rows, _ = killed("--kills", "2", "--within", "2", *MAC, "train.steps=40", "train.checkpoint_every=3")
    assert [row["kind"] for row in rows] == ["anywhere", "running"]
    assert rows[1]["rows"] > 0


@pytest.mark.slow
def test_compiled_as_by_default(killed):
    rows, folder = killed(
        "--fork", "--kills", "3", "--within", "1", *TRANSFORMER, "train.steps=60", "train.checkpoint_every=5"
    )
    assert [row["kind"] for row in rows] == ["anywhere", "running", "saving"]
    compiled = shutil.which("g++") is not None
    assert ("one graph by inductor" in (folder / "straight.log").read_text()) == compiled


def test_differences_are_seen(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import killed

    from tests.saved import sign
    from tests.train.states import MODEL, make_state
    from titanfunc.train import checkpoint

    row = {"step": 1, "loss": 1.0, "tokens_per_second": 3.0}
    for name in ("straight", "other"):
        checkpoint.save(tmp_path / name, 1, make_state(1), MODEL)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / name / "sample.txt").write_text("the end")
    straight, other = tmp_path / "straight", tmp_path / "other"
    assert killed.differences(straight, other) == []

    (other / "metrics.jsonl").write_text(json.dumps({**row, "tokens_per_second": 4.0}) + "\n")
    assert killed.differences(straight, other) == []
    (other / "metrics.jsonl").write_text(json.dumps({**row, "loss": 1.0000000000000002}) + "\n")
    assert len(killed.differences(straight, other)) == 1
    (other / "metrics.jsonl").write_text("")
    assert len(killed.differences(straight, other)) == 1
    (other / "sample.txt").write_text("the end.")
    assert killed.differences(straight, other)[-1] == "the sample"

    place = checkpoints.checkpoints(other)[0]
    tensors = load_file(place / checkpoints.TENSORS)
    tensors["params.a"] = torch.nextafter(tensors["params.a"], torch.tensor(9.0, dtype=torch.float64))
    save_file(tensors, place / checkpoints.TENSORS)
    sign(place)
    assert "the tensors of step_00000001" in killed.differences(straight, other)
    checkpoint.save(other, 2, make_state(1), MODEL)
    assert "the last checkpoints, step_00000001 and step_00000002" in killed.differences(straight, other)
