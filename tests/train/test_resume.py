"""Ten steps in one go are the same, bit for bit, as five, a checkpoint, and five more in a fresh process's state."""

import math

import pytest
import torch

import titanfunc as tf
from titanfunc.config import OptimConfig, TrainConfig, checkpoints
from titanfunc.config.optim import MuonConfig, NestedConfig
from titanfunc.train import checkpoint, loop
from titanfunc.train.metrics import MetricsFile, read_rows

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
        save=lambda step, state: checkpoint.save(run_dir, step, state, model.config),
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
