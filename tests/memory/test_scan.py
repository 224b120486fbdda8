"""The chunked form against the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import titanfunc as tf
from titanfunc import tree

B, H, D, HIDDEN = 2, 3, 4, 6
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def network(kind: str):
    if kind == "module":
        torch.manual_seed(0)
        return tf.memory.from_module(nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, D)).double())
    depth, bias = int(kind[3]), kind.endswith("b")
    return tf.memory.mlp(D, HIDDEN, depth=depth, bias=bias)


def problem(kind: str, tokens: int, seed: int = 0):
    """A memory with random (not zero) weights and momentum, and tokens to read: (net, state, q, k, v, gates)."""
    net = network(kind)
    g = torch.Generator().manual_seed(seed)
    w0 = net.init(g, heads=H)
    w0 = tree.map(lambda w: 0.5 * torch.randn(w.shape, generator=g, dtype=torch.float64), w0)
    state = tf.memory.init_state(w0, batch_size=B)
    state = state._replace(
        momentum=tree.map(lambda w: 0.1 * torch.randn(w.shape, generator=g, dtype=torch.float64), state.momentum)
    )
    q, k, v = (torch.randn(B, H, tokens, D, generator=g, dtype=torch.float64) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    alpha, eta, theta = (torch.rand(B, H, tokens, generator=g, dtype=torch.float64) for _ in range(3))
    return net, state, q, k, v, tf.memory.Gates(0.2 * alpha, 0.5 + 0.4 * eta, 0.1 * theta)


def assert_same_state(left, right):
    for (name, a), b in zip(tree.named_leaves(left).items(), tree.leaves(right), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)


KINDS = ["mlp1", "mlp2", "mlp2b", "mlp3", "mlp3b", "module"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_scan_equals_the_recurrence(kind, read, clip, chunk_size):
    net, state, q, k, v, gates = problem(kind, tokens=11)
    options = {"read": read, "clip": clip}
    want, want_state = tf.memory.scan_recurrent(net, state, q, k, v, gates, chunk_size=chunk_size, **options)
    for aligned in (False, True):
        got, got_state = tf.memory.scan(net, state, q, k, v, gates, chunk_size, aligned=aligned, **options)
        torch.testing.assert_close(got, want, **TOLERANCE)
        assert_same_state(got_state, want_state)


@pytest.mark.parametrize("kind", ["mlp2", "mlp3b", "module"])
@pytest.mark.parametrize("pieces", [(3, 8), (1,) * 11, (4, 4, 3), (5, 1, 5), (9, 2)])
def test_pieces_equal_one_pass(kind, pieces):
    net, state, q, k, v, gates = problem(kind, tokens=11)
    want, want_state = tf.memory.scan(net, state, q, k, v, gates, 4)
    outputs, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        inputs = (x[:, :, part] for x in (q, k, v))
        y, state = tf.memory.scan(net, state, *inputs, tf.memory.Gates(*(g[:, :, part] for g in gates)), 4)
        outputs.append(y)
        start += length
    torch.testing.assert_close(torch.cat(outputs, 2), want, **TOLERANCE)
    assert_same_state(state, want_state)
