"""scripts/evaluate.py from the command line: mistakes in one line, and a run from training to its tables."""

import json

import pytest
import yaml

from tests.scripts.test_mistakes import check

MISTAKES = {
    "unknown key": (["length=[64]"], "length: no such setting; did you mean lengths?"),
    "unknown key, appended": (["+foo=1"], "foo: no such setting; there are run, runs, "),
    "no equals sign": (["run"], "'run': cannot be read; settings are written as name=value, as lengths=[2048,4096]"),
    "dashes": (["--lengths=[64]"], "--lengths=[64]: settings are written without dashes, as lengths=[2048,4096]"),
    "dashes before the run": (["--run=a"], "--run=a: settings are written without dashes"),
    "no list": (["tasks=passkey"], "tasks: wanted a list in brackets, as [a,b], got 'passkey'"),
    "unknown task": (["tasks=[needles]"], "tasks: wanted one of mqar, passkey, "),
    "out of range": (["depths=[2]"], "depths: wanted a list of numbers from 0 to 1, got [2]"),
    "nothing to evaluate": ([], "run: no run under "),
    "a run that is not there": (["run=runs/nowhere"], "run: wanted latest, or the folder of a run or a checkpoint"),
}
TINY = [
    "model=mac_tiny", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=32", "model.seq_len=96",
    "model.memory.heads=1", "model.memory.head_dim=8", "model.memory.hidden=8", "model.memory.chunk_size=8",
    "model.mac.segment=16", "data.batch_size=2", "train.compile=none", "train.device=cpu", "train.eval_batches=1",
    "train.steps=2", "train.log_every=1",
]  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(script, tmp_path, name):
    settings, message = MISTAKES[name]
    check(script(*settings, name="evaluate"), message)
    assert list(tmp_path.iterdir()) == []


def test_from_training_on_a_task_to_its_table(script, tmp_path):
    trained = script(*TINY, "data=mqar", "data.recall.mqar.max_pairs=8", "train.run_dir=mine")
    assert (trained.status, trained.err) == (0, "")
    assert "mqar: a step is 2 rows of 96 tokens" in trained.out
    assert "accuracy" in trained.out and "bits/byte" not in trained.out
    settings = yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())
    assert settings["data"]["recall"]["mqar"]["max_pairs"] == 8
    assert all(line.startswith("key ") for line in (tmp_path / "mine" / "sample.txt").read_text().splitlines())

    done = script("run=mine", "pairs=[2,4]", "samples=2", "lengths=[32,96]", "device=cpu", name="evaluate")
    assert (done.status, done.err) == (0, "")
    place = tmp_path / "mine" / "evaluation"
    names = {"recall.jsonl", "loss_by_position.jsonl", "recall_mqar.png"}
    assert {path.name for path in place.iterdir()} == names
    rows = [json.loads(line) for line in (place / "recall.jsonl").read_text().splitlines()]
    assert [(row["length"], row["pairs"], row["memory"], row["count"]) for row in rows] == [
        (length, pairs, memory, 2 * pairs) for memory in ("on", "off") for length in (32, 96) for pairs in (2, 4)
    ]
    assert "mqar: answers right as a whole, by length in tokens and pairs (2 rows each)" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    check(script("run=mine", "lengths=[64]", name="evaluate"), "lengths: wanted at least 255 for mqar of 64 pairs")


def test_no_torch_before_the_checks(script):
    result = script("run=nowhere", python=("-X", "importtime"), name="evaluate")
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines() if line.startswith("import time")}
    assert {"hydra", "titanfunc.config.evaluate"} <= imported
    assert not imported & {"torch", "numpy", "datasets", "matplotlib"}


def test_hydras_own_flags(script, tmp_path):
    shown = script("--cfg", "job", "samples=7", name="evaluate")
    assert shown.status == 0
    assert "samples: 7" in shown.out
    assert list(tmp_path.iterdir()) == []
