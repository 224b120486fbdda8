"""A problem small enough for finite differences in float64: a two-layer network, its batches, every momentum."""

from __future__ import annotations

import torch

import titanfunc as tf
from titanfunc import tree
from titanfunc.optim.nested import core

KINDS = ("none", "l2_regression", "direct_update", "deep_momentum")


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters():
    return {
        "embedding": draw(5, 4, seed=0),
        "blocks": {"feed_forward": {"up": 0.5 * draw(2, 4, 4, seed=1)}, "norm": 1 + 0.1 * draw(2, 4, seed=2)},
        "head": 0.5 * draw(4, 3, seed=3),
    }


def batch(i: int):
    return draw(6, 5, seed=10 + i), draw(6, 3, seed=60 + i)


def objective(params, batch):
    x, y = batch
    x = x @ params["embedding"]
    for up, norm in zip(params["blocks"]["feed_forward"]["up"], params["blocks"]["norm"], strict=True):
        x = x + norm * torch.tanh(x @ up)
    return ((x @ params["head"] - y) ** 2).mean()


def base(name: str):
    if name == "adamw":
        return tf.optim.adamw(0.05, 0.9, 0.95, weight_decay=0.1)
    return tf.optim.muon(0.05, 0.02, dtype=None)


def start(tx, *, stir: float = 0.3):
    """(params, state) with networks that are not new, so that every weight matters."""
    params = parameters()
    state = tx.init(params)
    leaves = [leaf.double() + stir * draw(*leaf.shape, seed=500 + i) for i, leaf in enumerate(tree.leaves(state.phi))]
    state = state._replace(phi=tree.with_leaves(state.phi, leaves))
    if isinstance(state.meta, tuple) and state.meta:
        state = state._replace(meta=core.init_meta(state.phi))
    inner = state.inner
    if inner.memories:
        memories = tree.map(lambda leaf: leaf + stir * draw(*leaf.shape, seed=900), inner.memories)
        state = state._replace(inner=inner._replace(memories=memories))
    return params, state


def advance(tx, params, state, i, **extra):
    """One step of training on batch i."""
    grads, loss = torch.func.grad_and_value(objective)(params, batch(i))
    updates, state = tx.update(grads, state, params, loss=loss, **extra)
    return tf.optim.apply_updates(params, updates), state


def spy(monkeypatch):
    """The meta-gradients and meta-losses that reach the meta-optimizer, in a list."""
    seen = []
    descend = core.descend

    def watched(phi, meta, gradient, loss, live, **options):
        seen.append((gradient, loss, bool(live)))
        return descend(phi, meta, gradient, loss, live, **options)

    monkeypatch.setattr(core, "descend", watched)
    return seen
