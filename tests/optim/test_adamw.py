"""The optimizer against torch's own, its parts against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import titanfunc as tf
from titanfunc import tree


def parameters():
    g = torch.Generator().manual_seed(0)
    return {"w": torch.randn(4, 3, generator=g), "deep": {"b": torch.randn(3, generator=g)}}


def gradients(i: int):
    g = torch.Generator().manual_seed(100 + i)
    return tree.map(lambda p: torch.randn(p.shape, generator=g) * 10.0 ** (i % 3), parameters())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_adamw_follows_torch_step_by_step(weight_decay, clip_norm):
    params = parameters()
    tx = tf.optim.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay, clip_norm=clip_norm)
    state = tx.init(params)
    theirs = [p.clone().requires_grad_() for p in tree.leaves(params)]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    for i in range(8):
        grads = gradients(i)
        for p, g in zip(theirs, tree.leaves(grads), strict=True):
            p.grad = g.clone()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        optimizer.step()
        updates, state = tx.update(grads, state, params, loss=torch.tensor(1.0))
        params = tf.optim.apply_updates(params, updates)
        for ours, p in zip(tree.leaves(params), theirs, strict=True):
            torch.testing.assert_close(ours, p.detach(), rtol=1e-5, atol=1e-6)


def test_decay_acts_where_the_mask_says():
    params = parameters()
    tx = tf.optim.add_decayed_weights(0.5, mask=lambda params: {"w": True, "deep": {"b": False}})
    updates, _ = tx.update(tree.zeros_like(params), tx.init(params), params)
    assert torch.equal(updates["w"], 0.5 * params["w"]) and updates["deep"]["b"].abs().max() == 0


def test_warmup_cosine_rises_and_falls():
    schedule = tf.optim.warmup_cosine(2.0, 4, 20, end=0.2)
    rates = [schedule(torch.tensor(i)).item() for i in range(25)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[12] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a >= b for a, b in itertools.pairwise(rates[4:])) and rates[20:] == pytest.approx([0.2] * 5)


def test_the_learning_rate_is_a_tensor_that_may_be_replaced():
    params = parameters()
    tx = tf.optim.scale_by_learning_rate(0.1)
    state = tx.init(params)
    assert tf.optim.current_learning_rate((state,)).item() == pytest.approx(0.1)
    updates, _ = tx.update(params, state._replace(learning_rate=torch.tensor(0.5)), params)
    assert torch.equal(updates["w"], -0.5 * params["w"])
    assert tf.optim.current_learning_rate(((), ())) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tf.optim.clip_by_global_norm(0.0), "max_norm: wanted a positive number"),
        (lambda: tf.optim.scale_by_adam(b1=1.0), "b1: wanted a number"),
        (lambda: tf.optim.adamw(-1.0), "learning_rate: wanted 0 or a positive"),
        (lambda: tf.optim.warmup_cosine(1.0, 5, 5), "warmup_steps"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_configuration_becomes_an_optimizer_even_for_very_few_steps():
    params = {"embedding": torch.ones(2, 2)}
    for total in (1, 5, 500):
        tx = tf.optim.from_config(tf.optim.OptimConfig(lr=0.1, warmup_steps=50), total)
        updates, state = tx.update({"embedding": torch.ones(2, 2)}, tx.init(params), params)
        assert torch.isfinite(updates["embedding"]).all() and tf.optim.current_learning_rate(state) > 0
