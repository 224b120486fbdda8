"""A run in one go is the same, bit for bit, as one that was killed or stopped and went on in a fresh state."""

import json
import math
import os
import signal

import pytest
import torch

import titanfunc as tf
from titanfunc import job
from titanfunc.config import OptimConfig, TrainConfig, checkpoints, experiment, runs
from titanfunc.config.optim import MuonConfig, NestedConfig
from titanfunc.train import checkpoint, loop
from titanfunc.train.metrics import UNFINISHED, MetricsFile, read_rows

SIZE = {"dim": 16, "layers": 2, "heads": 2, "ff": 32}
MEMORY = {"heads": 2, "head_dim": 8, "hidden": 8, "chunk_size": 4}


def batches(step: int) -> torch.Tensor:
    return torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(step))


NESTED = NestedConfig(momentum="deep_momentum", use_cms_updates=True, cms_frequencies=(1, 3), meta_update_freq=2)
OPTIMIZERS = {
    "adamw": OptimConfig(warmup_steps=2),
    "muon": OptimConfig("muon", warmup_steps=2, muon=MuonConfig(momentum_steps=4)),
    "nested": OptimConfig("nested", warmup_steps=2, nested=NESTED),
    "small_fc_lopt": OptimConfig("small_fc_lopt", warmup_steps=2),
    "velo": OptimConfig("velo", warmup_steps=2),
}


def run(model, optim, run_dir, steps: int, resume_step: int | None = None):
    tx = tf.optim.from_config(OPTIMIZERS[optim], total_steps=10)
    state = tf.train.init_state(model, tx, seed=0)
    if resume_step is not None:
        tf.tree.map(lambda leaf: leaf.zero_(), state)  # all of it has to come from the checkpoint
        checkpoint.load(checkpoints.checkpoint_dir(run_dir, resume_step), state, model.config)
    rows = MetricsFile(run_dir / "metrics.jsonl", resume_step)
    state, _ = loop.train(
        tf.train.compile_step(tf.train.make_train_step(model, tx), backend=None),
        state,
        batches,
        TrainConfig(steps=steps, log_every=1, checkpoint_every=5),
        save=lambda step, state, sums: checkpoint.save(run_dir, step, state, model.config, sums=sums),
        writers=[rows],
    )
    rows.close()
    return state


@pytest.mark.parametrize(
    ("preset", "optim"), [("transformer_tiny", "adamw"), *(("mac_tiny", optim) for optim in OPTIMIZERS)]
)
def test_resumed_equals_straight(tmp_path, preset, optim):
    model = tf.models.build(tf.config.preset(preset, **SIZE, memory=MEMORY, mac={"segment": 8}))
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = run(model, optim, tmp_path / "straight", 10)
    run(model, optim, tmp_path / "resumed", 7)  # two steps past the checkpoint that will be resumed
    resumed = run(model, optim, tmp_path / "resumed", 10, resume_step=5)

    assert int(resumed.step) == 10
    names = tf.tree.named_leaves(straight)
    again = tf.tree.named_leaves(resumed)
    assert names.keys() == again.keys()
    for name, leaf in names.items():
        assert torch.equal(leaf, again[name]), name

    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed")]
    losses = [[(row["step"], row["loss"]) for row in some] for some in rows]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 11))
    assert all(math.isfinite(loss) for _, loss in losses[0])


MEASURED = ("tokens_per_second", "compile_seconds", "data_wait_seconds", "peak_memory_gib")
SMALL = tf.models.build(tf.config.preset("transformer_tiny", **{**SIZE, "dim": 8, "layers": 1}))
TX = tf.optim.from_config(OptimConfig(warmup_steps=2), total_steps=14)
STEP = tf.train.compile_step(tf.train.make_train_step(SMALL, TX), backend=None)
EVALUATE = tf.train.make_eval_step(SMALL)
STOPPED = TrainConfig(steps=14, log_every=5, eval_every=4, checkpoint_every=9)


def weighted(step: int) -> dict[str, torch.Tensor]:
    """Two steps of one interval have a loss that is not finite."""
    return {"tokens": batches(step), "weights": torch.full((2, 16), math.nan if step in (6, 8) else 1.0)}


def run_until(run_dir, stop: int | None, number: signal.Signals):
    """Train, from the newest checkpoint if there is one, until a signal comes in the step after ``stop`` steps; before
    the first step, where there is none to take."""
    place, _ = checkpoints.newest_whole(run_dir)
    state = tf.train.init_state(SMALL, TX, seed=0)
    sums = None
    if place:
        checkpoint.load(place, state)
        sums = checkpoints.read_metadata(place).get(checkpoints.SUMS, {})

    def step(state, batch):
        if int(state.step) == stop:
            os.kill(os.getpid(), number)
        return STEP(state, batch)

    def evaluate(params):
        if stop == -1:
            os.kill(os.getpid(), number)
        return {"loss": float(EVALUATE(params, {"tokens": batches(99)}))}

    rows = MetricsFile(run_dir / "metrics.jsonl", int(state.step) if place else None)
    state, outcome = loop.train(
        step,
        state,
        weighted,
        STOPPED,
        save=lambda step, state, sums: checkpoint.save(run_dir, step, state, SMALL.config, sums=sums),
        evaluate=evaluate,
        writers=[rows],
        resumed=sums,
    )
    rows.close()
    assert outcome.stopped_by == (None if stop is None else number)
    assert outcome.step == (14 if stop is None else stop + 1)
    return state


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    return run_until(run_dir, None, signal.SIGINT), unmeasured(run_dir)


def unmeasured(run_dir):
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("number", "stops"),
    [
        (signal.SIGINT, (2,)),
        (signal.SIGTERM, (6, 7)),
        (signal.SIGINT, (3, 4, 8)),
        (signal.SIGTERM, (0, 12)),
        (signal.SIGINT, (-1, 5)),
    ],
)
def test_stopped_and_resumed_equals_straight(straight, tmp_path, number, stops):
    for stop in stops:
        run_until(tmp_path, stop, number)
        last = unmeasured(tmp_path)[-1]
        assert last["step"] == stop + 1
        due = stop + 1 in (0, 1, 5, 9)  # the interval ends there, or the first has not begun
        assert (UNFINISHED not in last) == due
    leaves = tf.tree.named_leaves(run_until(tmp_path, None, number))
    state, rows = straight
    assert all(torch.equal(leaf, leaves[name]) for name, leaf in tf.tree.named_leaves(state).items())
    assert unmeasured(tmp_path) == rows
    steps = [(row["step"], "loss" in row) for row in rows]
    logged, validated = [1, 5, 9, 10, 14], [0, 4, 8, 12, 14]
    assert sorted(steps) == sorted([*((step, True) for step in logged), *((step, False) for step in validated)])


def test_a_run_in_its_folder_that_is_stopped_and_goes_on(tmp_path, monkeypatch, capsys):
    """Through all that scripts/train.py calls."""
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"This is text {name}, of some length. " * 20)
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"preset": "transformer_tiny", **SIZE, "layers": 1, "seq_len": 16},
        "data": {"corpus": "text_folder", "path": "texts", "batch_size": 2, "validation_fraction": 0.5},
        "train": {"steps": 8, "log_every": 4, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 0,
                  "sample_tokens": 0, "compile": "none", "device": "cpu"},
    }  # fmt: skip

    def run(stop=None, **train):
        config = experiment.from_mapping({**settings, "train": {**settings["train"], **train}})
        parts = job.assemble(config, runs.prepare(config))

        def step(state, batch):
            if int(state.step) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return parts.step(state, batch)

        return job.run(parts._replace(step=step))

    assert run(run_dir="straight") == 0
    assert run(2, run_dir="stopped") == 143
    assert "unfinished" not in capsys.readouterr().out
    assert run(5, resume="stopped") == 143
    assert [row["step"] for row in unmeasured(tmp_path / "stopped")] == [1, 4, 6]
    assert run(resume="stopped") == 0
    assert unmeasured(tmp_path / "stopped") == unmeasured(tmp_path / "straight")
    tensors = [runs.latest(tmp_path / name) / checkpoints.TENSORS for name in ("straight", "stopped")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_an_interval_that_a_stop_cut_keeps_its_skipped_steps(tmp_path):
    """Steps 7 and 9 are not finite: of steps 6 to 9, the mean is over two."""
    run_until(tmp_path, 7, signal.SIGTERM)
    (place,) = checkpoints.checkpoints(tmp_path)
    sums = checkpoints.check(place)[checkpoints.SUMS]
    assert sums["loss"][1] == 2 and sums["skipped"] == [2.0, 3, 1.0]
    run_until(tmp_path, None, signal.SIGTERM)
    assert all(checkpoints.SUMS not in checkpoints.check(place) for place in checkpoints.checkpoints(tmp_path)[1:])
    (row,) = (row for row in unmeasured(tmp_path) if row["step"] == 9 and "loss" in row)
    assert row["skipped"] == 2.0


@pytest.mark.parametrize(
    "sums", [[], 3, {"loss": 1.0}, {"loss": [1.0, 2]}, {"loss": [1.0, -1, 0.5]}, {"loss": [1.0, 10**400, None]},
             {"loss": ["1", 1, None]}, {"loss": [1.0, True, None]}, {"loss": [10**400, 1, None]}]
)  # fmt: skip
def test_sums_that_are_none_are_refused(tmp_path, sums):
    place = checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, SMALL.config, sums={"loss": (1.0, 2, None)})
    assert checkpoints.check(place)[checkpoints.SUMS] == {"loss": [1.0, 2, None]}
    told = json.loads((place / checkpoints.METADATA).read_text())
    (place / checkpoints.METADATA).write_text(json.dumps({**told, checkpoints.SUMS: sums}))
    with pytest.raises(ValueError, match="wanted a sum, a count and a newest value a metric in 'unfinished'"):
        checkpoints.read_metadata(place)
