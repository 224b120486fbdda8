"""A comparison of optimizers from its plan to the table, on a model small enough to be trained in seconds."""

from __future__ import annotations

import io
import json
import signal

import pytest
import torch
import yaml
from rich.console import Console

from titanfunc import comparison, job
from titanfunc.config import OptimConfig
from titanfunc.config.compare import prepare

MODEL = {
    "preset": "transformer_tiny", "dim": 16, "layers": 1, "heads": 2, "ff": 16, "seq_len": 32,
}  # fmt: skip
TRAIN = {"steps": 6, "log_every": 1, "eval_every": 2, "eval_batches": 1, "device": "cpu", "compile": "none"}
FILES = {"adamw": {"name": "adamw", "lr": 2e-3, "warmup_steps": 2}}


@pytest.fixture
def compare(tmp_path):
    """Plans and makes a comparison in one folder; returns its plan, exit status and what was printed."""
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"some words of text number {i}, and more. " * 40)
    data = {"corpus": "text_folder", "path": str(tmp_path / "texts"), "batch_size": 2}

    def call(train=None, **own):
        settings = {"out": str(tmp_path / "out"), "seeds": [0, 1], **own}
        plan = prepare({"model": MODEL, "data": data, "train": {**TRAIN, **(train or {})}, **settings}, FILES.get)
        printed = io.StringIO()
        status = comparison.run(comparison.assemble(plan), Console(file=printed, width=160))
        return plan, status, printed.getvalue()

    return call


def rows(plan, name="runs.jsonl"):
    return [json.loads(line) for line in (plan.out / name).read_text().splitlines()]


def by_key(plan):
    return {(row["optimizer"], row["lr"], row["seed"]): row for row in rows(plan)}


TWICE = [{"name": "A", "optim": "adamw"}, {"name": "B", "optim": "adamw", "settings": {"weight_decay": 0.0}}]


def test_tuned_on_one_seed_and_reported_on_the_others(compare):
    plan, status, printed = compare(entries=TWICE, lrs=[1e-3, 8e-3], seeds=[0, 1, 2], tune_seed=7)
    assert status == 0
    assert {path.name for path in plan.out.iterdir()} == {
        "comparison.yaml", "runs.jsonl", "summary.jsonl", "table.md", "curves.png",
    }  # fmt: skip
    found, summaries = by_key(plan), rows(plan, "summary.jsonl")
    assert len(rows(plan)) == len(found) == 2 * (2 + 3)
    for summary, name in zip(summaries, ("A", "B"), strict=True):
        tried = {lr: found[name, lr, 7]["loss"] for lr in (1e-3, 8e-3)}
        best = min(tried, key=tried.get)
        assert best == 8e-3 and abs(tried[1e-3] - tried[8e-3]) > 1e-3  # six steps are too few for either
        reported = [found[name, best, seed]["loss"] for seed in (0, 1, 2)]
        assert len(set(reported)) == 3
        assert (summary["optimizer"], summary["lr"], summary["seeds"], summary["diverged"]) == (name, best, 3, 0)
        values = torch.tensor(reported, dtype=torch.float64)
        assert summary["loss_mean"] == pytest.approx(values.mean().item(), rel=1e-12)
        assert summary["loss_sd"] == pytest.approx(values.std().item(), rel=1e-9)
        assert (summary["loss_min"], summary["loss_max"]) == (min(reported), max(reported))
        assert summary["tuning_loss"] == {"0.001": tried[1e-3], "0.008": tried[8e-3]} and summary["at_edge"]
        assert summary["seconds_per_step"] > 0 and summary["skipped"] == 0 and summary["peak_memory_gib"] is None
    row = found["A", 8e-3, 0]
    assert [point["step"] for point in row["curve"]] == [0, 2, 4, 6]
    assert row["loss"] == row["curve"][-1]["loss"] and row["bits_per_byte"] == row["curve"][-1]["bits_per_byte"]
    table = (plan.out / "table.md").read_text()
    assert "best of 2 learning rates each, chosen on seed 7" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| optimizer | peak lr | seeds | loss, nats | bits/byte | s/step |")
    assert [line.split(" | ")[:3] for line in lines[2:]] == [[f"| {name}", "0.008*", "3"] for name in "AB"]
    assert f"{summaries[0]['loss_mean']:.4f} ± {summaries[0]['loss_sd']:.4f}" in lines[2] and lines[2] != lines[3]
    assert table.rstrip().endswith("of the rates tried: a better one may lie beyond.")
    assert "A: the best rate, 0.008, is at the edge of those tried" in printed and "10 in " in printed


def test_one_optimizer_under_two_names_gives_the_same_curves(compare):
    plan, _, _ = compare(entries=[{"name": "A", "optim": "adamw"}, {"name": "B", "optim": "adamw"}], lrs=[5e-3])
    found = by_key(plan)
    assert len(found) == 4  # no tuning
    for seed in (0, 1):
        assert found["A", 5e-3, seed]["curve"] == found["B", 5e-3, seed]["curve"]
    assert found["A", 5e-3, 0]["curve"] != found["A", 5e-3, 1]["curve"]


def test_a_rate_is_what_the_optimizer_would_have_been_built_with(compare):
    entries = [
        {"name": "scaled", "optim": "adamw", "lrs": [8e-3]},
        {"name": "built", "optim": "adamw", "settings": {"lr": 8e-3}, "lrs": [8e-3]},
        {"name": "other", "optim": "adamw", "lrs": [4e-3]},
    ]
    plan, _, _ = compare(entries=entries, seeds=[3])
    curves = {row["optimizer"]: [point["loss"] for point in row["curve"]] for row in rows(plan)}
    assert curves["scaled"] == pytest.approx(curves["built"], rel=1e-5)
    assert abs(curves["scaled"][-1] - curves["other"][-1]) > 1e-3


def test_the_rates_are_factors_of_the_files_own_unless_named(compare):
    plan, _, printed = compare(lr_factors=[0.5, 2.0], seeds=[0])
    assert plan.entries[0].lrs == (1e-3, 4e-3)
    assert [(row["lr"], row["seed"]) for row in rows(plan)][:2] == [(1e-3, 100), (4e-3, 100)]
    assert "tuning   adamw: lr 0.001, seed 100: loss " in printed


def test_a_restart_goes_on_where_it_stopped(compare, monkeypatch):
    settings = {"entries": TWICE, "lrs": [1e-3, 8e-3]}
    plan, _, _ = compare(**settings)
    whole = rows(plan)
    lines = (plan.out / "runs.jsonl").read_text().splitlines(keepends=True)
    (plan.out / "runs.jsonl").write_text("".join(lines[:5]) + lines[5][:40])  # killed while it wrote

    made = []
    train = comparison._train
    monkeypatch.setattr(
        comparison, "_train", lambda setup, entry, *rest: made.append(entry.name) or train(setup, entry, *rest)
    )
    plan, status, printed = compare(**settings)
    assert status == 0 and made == ["B"] * 3
    assert "runs     8 in " in printed and "; 5 are there already and are kept" in printed

    def timeless(found):
        return [{name: value for name, value in row.items() if name != "seconds_per_step"} for row in found]

    assert timeless(rows(plan)) == timeless(whole)

    built = []
    monkeypatch.setattr(comparison, "_make_trainer", lambda *args: built.append(args))
    plan, _, _ = compare(**settings)
    assert rows(plan)[:5] == whole[:5] and built == []  # no step for what is there

    with pytest.raises(ValueError, match=r"^out: .* holds runs with train.steps = 6, which is now 8; name another"):
        compare(train={"steps": 8}, **settings)
    changed = [{**TWICE[1], "settings": {"weight_decay": 0.5}}]
    with pytest.raises(ValueError, match=r"^out: .* holds runs with B.weight_decay = 0.0, which is now 0.5"):
        compare(**{**settings, "entries": changed})


def test_another_optimizer_can_be_added_to_a_folder(compare):
    first, _, _ = compare(entries=TWICE[:1], lrs=[5e-3])
    second, _, _ = compare(entries=TWICE[1:], lrs=[5e-3])
    assert [row["optimizer"] for row in rows(second)] == ["A", "A", "B", "B"]
    assert [row["optimizer"] for row in rows(second, "summary.jsonl")] == ["B"]
    known = yaml.safe_load((second.out / "comparison.yaml").read_text())["optimizers"]
    assert set(known) == {"A", "B"} and first.out == second.out


def test_a_signal_keeps_what_is_finished(compare, monkeypatch):
    train = comparison.train
    calls = []

    def interrupted(step, state, batches, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            original = step

            def step(state, batch):
                signal.raise_signal(signal.SIGTERM)
                return original(state, batch)

        return train(step, state, batches, *args, **kwargs)

    monkeypatch.setattr(comparison, "train", interrupted)
    plan, status, printed = compare(lrs=[5e-3])
    assert status == 128 + signal.SIGTERM and len(rows(plan)) == 1
    assert f"stopped by SIGTERM; finished runs are kept: go on with out={plan.out}" in printed
    assert not (plan.out / "table.md").exists()
    plan, status, _ = compare(lrs=[5e-3])
    assert status == 0 and len(rows(plan)) == 2


def test_a_run_that_diverges_is_told_and_not_chosen(compare, monkeypatch):
    make = job.make_step

    def broken(experiment, backend):
        model, tx, step = make(experiment, backend)

        def at_high_rates(state, batch):
            state, metrics = step(state, batch)
            bad = (metrics["lr"] > 0.05).to(torch.int64)
            return state._replace(skipped=state.skipped + bad, skipped_in_row=bad), metrics

        return model, tx, at_high_rates

    monkeypatch.setattr(comparison, "make_step", broken)
    plan, status, printed = compare(lrs=[5e-3, 1.0], seeds=[0], train={"max_skipped": 1})
    assert status == 0
    found = by_key(plan)
    bad = found["adamw", 1.0, 100]
    assert bad["diverged"] and bad["loss"] is None and bad["bits_per_byte"] is None and bad["skipped"] == 1
    assert ("adamw", 5e-3, 0) in found and ("adamw", 1.0, 0) not in found
    assert "adamw: lr 1, seed 100: diverged; steps skipped: 1" in printed
    plan, status, _ = compare(lrs=[1.0], seeds=[0], train={"max_skipped": 1})
    assert status == 0 and rows(plan, "summary.jsonl")[0]["loss_mean"] is None
    assert "1 (1 diverged)" in (plan.out / "table.md").read_text()


def test_the_step_is_compiled_once_for_all_rates_and_seeds(compare):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plan, _, _ = compare(lrs=[1e-3, 8e-3], seeds=[0, 1], train={"compile": "aot_eager"})
    assert len(rows(plan)) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_recall_task_is_compared_by_its_answers(tmp_path):
    data = {"task": "mqar", "batch_size": 2, "recall": {"mqar": {"min_pairs": 2, "max_pairs": 4}}}
    settings = {"out": str(tmp_path / "out"), "seeds": [0], "lrs": [1e-3]}
    plan = prepare({"model": MODEL, "data": data, "train": TRAIN, **settings}, FILES.get)
    assert comparison.run(comparison.assemble(plan), Console(file=io.StringIO())) == 0
    (row,) = rows(plan)
    assert 0 <= row["accuracy"] <= 1 and "bits_per_byte" not in row
    assert "| accuracy |" in (plan.out / "table.md").read_text()


def test_every_run_reads_the_dataset_at_the_commit_of_the_first_look(compare, monkeypatch):
    asked = []
    read = comparison.open_source

    def moving(config, eval_batches, commit=""):
        asked.append(commit)
        source = read(config, eval_batches)
        identity = source.corpus.identity._replace(commit=commit or str(len(asked)))
        return source._replace(corpus=source.corpus._replace(identity=identity))

    monkeypatch.setattr(comparison, "open_source", moving)
    compare(entries=TWICE, lrs=[1e-3], seeds=[0, 1])
    assert asked == ["", "1", "1", "1", "1"]


def test_the_best_rate():
    def row(lr, loss):
        return {"lr": lr, "loss": loss}

    assert comparison.best_rate([row(1.0, 3.0), row(2.0, 2.5), row(4.0, None)]) == 2.0
    assert comparison.best_rate([row(2.0, None), row(1.0, None)]) == 1.0


def test_an_optimizer_without_a_rate_to_set_is_told(compare, monkeypatch):
    monkeypatch.setattr(comparison, "current_learning_rate", lambda state: None)
    with pytest.raises(RuntimeError, match="adamw: its state holds no learning rate to set"):
        compare(lrs=[1e-3])


def test_a_device_that_is_not_there(compare):
    with pytest.raises(ValueError, match=r"^train.device: wanted one of the \d+ CUDA devices, got 'cuda:99'"):
        compare(train={"device": "cuda:99"})


def test_an_optimizer_that_cannot_be_built_is_told_before_the_first_run(compare, tmp_path):
    bad = {"name": "bad", "optim": "adamw", "settings": {"name": "small_fc_lopt", "learned": {"weights": "nowhere"}}}
    with pytest.raises(ValueError, match=r"^entries: bad: "):
        compare(entries=[{"optim": "adamw"}, bad])
    assert not (tmp_path / "out").exists()


def test_kernels_that_do_not_run_here_are_told_before_the_first_run(compare, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    entries = [
        {"optim": "adamw"},
        {"name": "fast", "optim": "adamw", "settings": {"name": "muon", "kernels": "triton"}},
    ]
    with pytest.raises(ValueError, match=r"^entries: fast: optim.kernels: wanted reference on cpu"):
        compare(entries=entries)


def test_the_defaults_of_an_optimizer_are_those_of_its_file(compare):
    plan, _, _ = compare(seeds=[0], lrs=[2e-3])
    assert plan.entries[0].optim == OptimConfig(warmup_steps=2)
