"""A step that is not finite leaves weights and optimizer as they were, bit by bit, whichever the optimizer."""

from __future__ import annotations

import math

import pytest
import torch

import titanfunc as tf
from tests.models.small import configuration, draw_tokens
from titanfunc import tree

MODEL = {"layers": 1, "dim": 8, "heads": 1, "ff": 8}
OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "muon": {"name": "muon"},
    "muon, momentum that rises": {"name": "muon", "muon": {"momentum_steps": 4}},
    "small_fc_lopt": {"name": "small_fc_lopt", "lr": 1.0},
    "velo": {"name": "velo", "lr": 1.0},
    "nested, online": {"name": "nested", "nested": {"meta_start": 1}},
    "nested, simple": {"name": "nested", "nested": {"mode": "simple", "base": "adamw", "meta_start": 1}},
    "nested, momentum networks": {"name": "nested", "nested": {"momentum": "l2_regression", "meta_start": 1}},
    "nested, blocks of several periods": {"name": "nested", "nested": {"use_cms_updates": True, "meta_start": 1}},
}
HELD_OUT = {
    "nested, first order": {"name": "nested", "nested": {"unroll": "first_order", "meta_start": 1}},
    "nested, implicit": {"name": "nested", "nested": {"mode": "implicit", "neumann_terms": 2, "meta_start": 1}},
}


def training(settings):
    model = tf.models.build(configuration("transformer", **MODEL))
    config = tf.config.override(tf.config.OptimConfig(warmup_steps=2), settings)
    return model, tf.optim.from_config(config, 20, model.config), config.held_out


def batch(i, weight, held_out):
    """Tokens whose loss has this weight at one place: NaN makes the loss NaN, infinity makes it NaN or infinite."""
    weights = torch.ones(2, 6)
    weights[1, 3] = weight
    made = {"tokens": draw_tokens(2, 7, seed=i), "weights": weights}
    if held_out:
        made["held_out"] = torch.stack([draw_tokens(2, 7, seed=100 + i + j) for j in range(held_out)])
    return made


def bits(values):
    """What is compared: the bytes, so that no NaN equals another and -0 is not 0."""
    return [leaf.detach().clone().contiguous().view(torch.uint8) for leaf in map(torch.atleast_1d, tree.leaves(values))]


def check(step, state, held_out):
    for i in range(3):
        state, metrics = step(state, batch(i, 1.0, held_out))
    assert (state.skipped.item(), metrics["skipped"].item()) == (0, 0)
    before = bits((state.params, state.opt_state))
    for i, weight in enumerate((math.nan, math.inf, -math.inf), start=1):
        state, metrics = step(state, batch(7, weight, held_out))
        after = bits((state.params, state.opt_state))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert metrics["skipped"].item() == 1 and not math.isfinite(metrics["loss"].item())
        assert (state.step.item(), state.skipped.item(), state.skipped_in_row.item()) == (3 + i, i, i)
    state, metrics = step(state, batch(8, 1.0, held_out))
    after = bits((state.params, state.opt_state))
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(leaf.isfinite().all() for leaf in tree.leaves((state.params, state.opt_state)))
    assert (state.skipped.item(), state.skipped_in_row.item(), metrics["skipped"].item()) == (3, 0, 0)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *HELD_OUT])
def test_uncompiled(name):
    model, tx, held_out = training({**OPTIMIZERS, **HELD_OUT}[name])
    check(tf.train.make_train_step(model, tx), tf.train.init_state(model, tx), held_out)


@pytest.mark.parametrize("name", ["adamw", "muon", "small_fc_lopt", "velo", "nested, online"])
def test_compiled_and_donated(name, graphs):
    backend, seen = graphs
    model, tx, held_out = training(OPTIMIZERS[name])
    step = tf.train.compile_step(tf.train.make_train_step(model, tx), backend)
    check(step, tf.train.init_state(model, tx), held_out)
    assert len(seen) == 1
