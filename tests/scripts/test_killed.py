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
TEXT = ["data=text_folder", "data.path=texts"]
RUN = [
    "data.batch_size=2", "data.validation_fraction=0.5", "train.device=cpu", "train.eval_batches=1",
    "train.log_every=2", "train.sample_tokens=4",
]  # fmt: skip
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
        command = [sys.executable, str(BENCHMARKS / "killed.py"), *settings, *RUN]
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
        "--fork", "--kills", "30", "--within", "1", *MAC, *TEXT, "train.steps=60", "train.checkpoint_every=3",
        "train.eval_every=25",
    )  # fmt: skip
    signals = [row["signal"] for row in rows]
    assert [signals.count(name) for name in ("SIGKILL", "SIGTERM", "SIGINT")] == [30, 10, 10]
    # Where a signal falls hangs on the machine: of seventeen that come as a checkpoint is seen half-written, and of
    # twenty stops, a third of whose steps are in an interval, some do, or killed.py does not do what it is for.
    assert any(row["saving"] for row in rows), "a half-written checkpoint was left behind"
    assert any(row["unfinished"] for row in rows), "an interval of metrics was cut"
    assert len({row["checkpoint"] for row in rows}) > 1
    steps = [json.loads(line)["step"] for line in (folder / "killed_0" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == {0, 1, 25, *range(2, 61, 2), *range(3, 61, 3)}


@pytest.mark.slow
def test_files_that_are_tokenized_and_kept_and_read_by_another_process(killed, tmp_path):
    words = ("apples", "pears", "quinces", "figs", "plums")
    rows = [{"text": " ".join(f"{words[i % 5]} and {words[i * j % 5]}" for j in range(99))} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kills, folder = killed(
        "--fork", "--kills", "3", "--forget", str(tmp_path / "kept"), *TRANSFORMER, "train.compile=none", "data=files",
        "data.path=rows.jsonl", "data.tokenizer=bpe", "data.bpe_size=280", f"data.cache_dir={tmp_path / 'kept'}",
        "data.workers=1", "train.sample_prompt=and", "train.steps=20", "train.checkpoint_every=3",
    )  # fmt: skip
    assert [kill["kind"] for kill in kills] == ["anywhere", "running", "saving", "anywhere", "running"]
    assert any((tmp_path / "kept").iterdir())
    tokenizers = [(folder / name / "tokenizer.json").read_bytes() for name in ("straight", "killed_0")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.slow
def test_the_command_line_itself(killed):
    rows, _ = killed("--kills", "1", "--first", "running", *MAC, *TEXT, "train.steps=20", "train.checkpoint_every=1")
    assert [row["kind"] for row in rows] == ["running"] and rows[0]["checkpoint"] > 0


@pytest.mark.slow
def test_compiled_as_by_default(killed):
    rows, folder = killed(
        "--fork", "--kills", "1", "--first", "running", *TRANSFORMER, *TEXT, "train.steps=40",
        "train.checkpoint_every=1",
    )  # fmt: skip
    assert [row["kind"] for row in rows] == ["running"] and rows[0]["checkpoint"] > 0
    compiled = shutil.which("g++") is not None
    assert ("one graph by inductor" in (folder / "straight.log").read_text()) == compiled


def test_a_process_finds_what_its_parent_would_behind_the_source_tree(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import killed

    for place, names in {"tree": ("ours",), "packages": ("ours", "theirs")}.items():
        (tmp_path / place / "scripts").mkdir(parents=True)
        for name in names:
            (tmp_path / place / f"{name}.py").write_text(f"PLACE = {place!r}")
    (tmp_path / "tree" / "scripts" / "train.py").write_text("import ours, theirs; print(ours.PLACE, theirs.PLACE)")
    monkeypatch.setattr(killed, "ROOT", tmp_path / "tree")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    with killed.Attempt([], tmp_path / "log", fork=False) as attempt:
        assert attempt.wait() == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text() == "tree packages\n"


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
    (other / "sample.txt").unlink()
    assert killed.differences(straight, other)[-1] == f"{other / 'sample.txt'} is missing"

    place = checkpoints.checkpoints(other)[0]
    tensors = load_file(place / checkpoints.TENSORS)
    tensors["params.a"] = torch.nextafter(tensors["params.a"], torch.tensor(9.0, dtype=torch.float64))
    save_file(tensors, place / checkpoints.TENSORS)
    sign(place)
    assert "the tensors of step_00000001" in killed.differences(straight, other)
    checkpoint.save(other, 2, make_state(2), MODEL)
    assert "the last checkpoints, step_00000001 and step_00000002" in killed.differences(straight, other)
