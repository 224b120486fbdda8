"""A small model learns to recall within minutes, far beyond the length that it was trained at, and only by writing."""

from __future__ import annotations

import titanfunc as tf
from titanfunc.config import DataConfig, override
from titanfunc.data.recall import make_task
from titanfunc.evals.reader import make_reader
from titanfunc.evals.recall import score

STEPS = 90


def test_two_layers_learn_eight_pairs_and_keep_them_over_eight_times_the_length():
    memory = {"heads": 2, "head_dim": 32, "hidden": 64, "chunk_size": 16, "initial_inner_lr": 0.5}
    config = tf.models.preset("lmm_tiny", layers=2, ff=256, memory=memory)
    data = override(
        DataConfig(), {"seq_len": 96, "batch_size": 24, "recall": {"mqar": {"min_pairs": 1, "max_pairs": 8}}}
    )
    task = make_task("mqar", data)
    model = tf.models.build(config)
    tx = tf.optim.adamw(tf.optim.warmup_cosine(5e-3, 20, STEPS), mask=tf.models.decayed, clip_norm=1.0)
    state = tf.train.init_state(model, tx)
    step = tf.train.make_train_step(model, tx)
    for i in range(STEPS):
        state, metrics = step(state, task.batch(i))
    assert metrics["loss"].item() < 0.2

    def accuracy(length, writes=True):
        tokens, weights = task.examples(length, level=8, count=48)
        return score(make_reader(model, write=writes)(state.params, tokens), weights).accuracy

    assert accuracy(96) >= 0.95 and accuracy(768) >= 0.9
    assert accuracy(96, writes=False) < 0.1 and accuracy(768, writes=False) < 0.1
