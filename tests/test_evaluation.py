"""An evaluation from checkpoints to tables, rows and pictures, on models small enough to be read in seconds."""

import io
import json

import pytest
import torch
from rich.console import Console

import titanfunc as tf
from titanfunc import evaluation
from titanfunc.config import DataConfig
from titanfunc.config.evaluate import EvaluateConfig, prepare
from titanfunc.evals import make_reader, score
from titanfunc.optim import from_config
from titanfunc.train import checkpoint

SIZES = {"dim": 16, "layers": 1, "heads": 2, "ff": 16, "seq_len": 100}
MEMORY = {"heads": 1, "head_dim": 8, "hidden": 8, "chunk_size": 8}


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"some words of text number {i}, and more. " * 60)
    return folder


def make_run(folder, name="mac_tiny", **data):
    parts = {"memory": MEMORY, "mac": {"segment": 16}} if name.startswith("mac") else {}
    model = tf.models.build(tf.models.preset(name, **SIZES, **parts))
    tx = from_config(tf.optim.OptimConfig(), 10)
    state = tf.train.init_state(model, tx, seed=1)._replace(step=torch.tensor(3))
    settings = DataConfig(seq_len=100, **data)
    checkpoint.save(folder, 3, state, model.config, data=settings)
    return folder


def evaluate(**settings):
    out = io.StringIO()
    plan = prepare(EvaluateConfig(**{"samples": 2, "device": "cpu", "batch_size": 4, "piece": 32, **settings}))
    evaluation.run(evaluation.assemble(plan), Console(file=out, width=120))
    return plan, out.getvalue()


def rows(place, name="recall.jsonl"):
    return [json.loads(line) for line in (place / name).read_text().splitlines()]


def test_a_run_with_a_memory_on_and_off(tmp_path, texts):
    folder = make_run(tmp_path / "run", corpus="text_folder", path=str(texts))
    settings = {"run": str(folder), "lengths": (100, 200), "depths": (0.0, 1.0), "text_rows": 2}
    plan, printed = evaluate(**settings, tasks=("passkey", "copying"))
    assert plan.out == folder / "evaluation"
    assert {path.name for path in plan.out.iterdir()} == {
        "recall.jsonl", "recall_passkey.png", "recall_copying.png", "loss_by_position.jsonl", "loss_by_position.png",
    }  # fmt: skip
    found = rows(plan.out)
    keys = [(row["memory"], row["task"], row["length"], row.get("depth")) for row in found]
    assert keys == [
        (memory, task, length, depth)
        for memory in ("on", "off")
        for task, depths in (("passkey", (0.0, 1.0)), ("copying", (None,)))
        for length in (100, 200)
        for depth in depths
    ]
    assert all(row["count"] == row["rows"] == 2 and row["step"] == 3 and row["run"] == "run" for row in found)
    assert "passkey: answers right as a whole, by length in tokens and depth (2 rows each)" in printed
    assert "memory off:" in printed and "recall_passkey.png" in printed

    # A row says what reading the same rows by hand gives.
    state = tf.train.init_state(tf.models.build(plan.subjects[0].model), from_config(tf.optim.OptimConfig(), 10))
    checkpoint.load(plan.subjects[0].checkpoint, state)
    task = evaluation.assemble(plan).tasks["passkey"]
    tokens, weights = task.examples(200, 1.0, 2, plan.config.seed)
    for memory in ("on", "off"):
        reader = make_reader(tf.models.build(plan.subjects[0].model), write=memory == "on")
        wanted = score(reader(state.params, tokens), weights)
        (row,) = [r for r in found if (r["memory"], r["length"], r.get("depth")) == (memory, 200, 1.0)]
        assert row["loss"] == pytest.approx(wanted.loss, rel=1e-4)
        assert (row["accuracy"], row["token_accuracy"]) == (wanted.accuracy, wanted.token_accuracy)
    assert len({row["loss"] for row in found if row["length"] == 200 and row.get("depth") == 1.0}) == 2

    positions = rows(plan.out, "loss_by_position.jsonl")
    text = [row for row in positions if row["of"] == "text" and row["memory"] == "on"]
    assert (text[0]["first"], text[-1]["last"], text[0]["length"]) == (1, 200, 200)
    assert sum(row["tokens"] for row in text) == 2 * 200 and text[0]["trained"]
    answers = [row for row in positions if row["of"] == "copying" and row["memory"] == "off"]
    assert sum(row["tokens"] for row in answers) == 2 * 100 and answers[0]["first"] > 1

    # Another evaluation in the folder leaves nothing of the first.
    plan, _ = evaluate(**settings, tasks=("copying",), memory="off")
    assert {path.name for path in plan.out.iterdir()} == {
        "recall.jsonl", "recall_copying.png", "loss_by_position.jsonl", "loss_by_position.png",
    }  # fmt: skip
    assert {row["memory"] for row in rows(plan.out)} == {"off"}


def test_several_runs_in_one_table(tmp_path):
    runs = (make_run(tmp_path / "one", task="mqar"), make_run(tmp_path / "two", "transformer_tiny", task="mqar"))
    plan, printed = evaluate(
        runs=tuple(map(str, runs)), lengths=(40, 80), pairs=(2, 3), out=str(tmp_path / "both"), memory="on"
    )
    assert {path.name for path in plan.out.iterdir()} == {"recall.jsonl", "loss_by_position.jsonl", "recall_mqar.png"}
    found = rows(plan.out)
    assert {(row["run"], row["memory"]) for row in found} == {("one", "on"), ("two", "none")}
    assert [(row["length"], row["pairs"], row["count"]) for row in found[:4]] == [
        (40, 2, 4), (40, 3, 6), (80, 2, 4), (80, 3, 6),
    ]  # fmt: skip
    table = printed[printed.index("mqar:") :]
    assert "by length in tokens (2 rows each)" in table
    cells = [line.split("│")[1:-1] for line in table.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line[:2]] for line in cells] == [["one", "on"], ["two", "none"]]
    for line, run in zip(cells, ("one", "two"), strict=True):
        for cell, length in zip(line[2:], (40, 80), strict=True):
            values = [row["accuracy"] for row in found if (row["run"], row["length"]) == (run, length)]
            assert cell.strip() == f"{sum(values) / 2:.1%}"


def test_text_shorter_than_the_longest_row_is_read_as_far_as_it_goes(tmp_path, texts):
    folder = make_run(tmp_path / "run", corpus="text_folder", path=str(texts))
    plan, _ = evaluate(run=str(folder), lengths=(5000,), tasks=("copying",), memory="off", samples=1, piece=1024)
    lengths = {row["of"]: row["length"] for row in rows(plan.out, "loss_by_position.jsonl")}
    assert lengths["copying"] == 5000 and 2000 < lengths["text"] < 3000  # one document is held out


def test_a_device_that_is_not_there(tmp_path):
    folder = make_run(tmp_path / "run", task="mqar")
    plan = prepare(EvaluateConfig(run=str(folder), device="cuda:99", lengths=(300,)))
    with pytest.raises(ValueError, match=r"^device: wanted one of the \d+ CUDA devices, got 'cuda:99'"):
        evaluation.assemble(plan)


def test_compiling_changes_no_answer(tmp_path):
    folder = make_run(tmp_path / "run", task="mqar")
    torch._dynamo.reset()
    found = []
    for name in ("none", "aot_eager"):
        plan, _ = evaluate(run=str(folder), lengths=(64, 80), pairs=(3,), memory="both", compile=name)
        found.append({(row["memory"], row["length"]): row["loss"] for row in rows(plan.out)})
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 4
    assert all(abs(found[0]["on", length] - found[0]["off", length]) > 1e-4 for length in (64, 80))
