"""A controller that starts with a learning rate ten times too low finds its way, on real text."""

from __future__ import annotations

import torch

import titanfunc as tf
from titanfunc.config import DataConfig
from titanfunc.data import load

STEPS, LENGTH, ROWS = 200, 64, 16
TUNED = 3e-3  # the best of 3e-4, 1e-3, 3e-3, 1e-2, 3e-2 for AdamW on this model over 300 steps; here 200 do


def rows(tokens, count, seed):
    starts = torch.randint(0, len(tokens) - LENGTH - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return {"tokens": torch.stack([tokens[i : i + LENGTH + 1] for i in starts.tolist()]).long()}


def test_the_controller_recovers_most_of_the_gap_to_a_tuned_rate():
    corpus = load(DataConfig())
    train, held_out = (torch.as_tensor(part.tokens) for part in (corpus.train, corpus.validation))
    config = tf.models.preset("transformer_tiny", dim=64, layers=2, heads=2, ff=128, seq_len=LENGTH)
    model = tf.models.build(config)
    evaluate = tf.train.make_eval_step(model)

    def base(rate):
        schedule = tf.optim.warmup_cosine(rate, 20, STEPS, 0.1 * rate)
        return tf.optim.adamw(schedule, 0.9, 0.95, weight_decay=0.1, clip_norm=1.0)

    def loss_after(tx):
        state, step = tf.train.init_state(model, tx), tf.train.make_train_step(model, tx)
        for i in range(STEPS):
            state, _ = step(state, rows(train, ROWS, seed=i))
        return evaluate(state.params, rows(held_out, 256, seed=7)).item(), state

    tuned, _ = loss_after(base(TUNED))
    low, _ = loss_after(base(TUNED / 10))
    knobs = {"meta_lr": 0.03, "relative": False, "normalize": True, "min_lr_mult": 0.03, "max_lr_mult": 30.0}
    wrapped = tf.optim.nested(base(TUNED / 10), **knobs)
    learned, state = loss_after(wrapped)
    assert low - tuned > 0.5  # there is a gap to close
    assert low - learned >= 0.8 * (low - tuned)
    found = torch.cat(list(state.opt_state.multipliers.values()))
    inside = (found > 0.04) & (found < 29)
    assert found.log().std() > 0.1 and inside.sum() >= 0.8 * len(found)
