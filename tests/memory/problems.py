"""Memories and tokens for tests: random weights, momentum and gates, in float64."""

from __future__ import annotations

import torch
from torch import nn

import titanfunc as tf
from titanfunc import tree

B, H, D, HIDDEN = 2, 3, 4, 6
KINDS = ["mlp1", "mlp2", "mlp2b", "mlp3", "mlp3b", "module"]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def network(kind: str):
    if kind == "module":
        torch.manual_seed(0)
        return tf.memory.from_module(nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, D)).double())
    depth, bias = int(kind[3]), kind.endswith("b")
    return tf.memory.mlp(D, HIDDEN, depth=depth, bias=bias)


def problem(kind: str, tokens: int, seed: int = 0):
    """A memory in the middle of its life and tokens to read: (net, state, q, k, v, gates)."""
    net = network(kind)
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w0 = tree.map(lambda w: 0.5 * draw(*w.shape), net.init(g, heads=H))
    state = tf.memory.init_state(w0, batch_size=B)
    state = state._replace(momentum=tree.map(lambda w: 0.1 * draw(*w.shape), state.momentum))
    q, k, v = draw(B, H, tokens, D), draw(B, H, tokens, D), draw(B, H, tokens, D)
    k = k / k.norm(dim=-1, keepdim=True)
    alpha, eta, theta = (torch.rand(B, H, tokens, generator=g, dtype=torch.float64) for _ in range(3))
    return net, state, q, k, v, tf.memory.Gates(0.2 * alpha, 0.5 + 0.4 * eta, 0.1 * theta)


def assert_same_tree(left, right, **tolerance):
    tolerance = tolerance or TOLERANCE
    for (name, a), b in zip(tree.named_leaves(left).items(), tree.leaves(right), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
