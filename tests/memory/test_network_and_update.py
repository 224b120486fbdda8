"""Memory networks, and the single write against torch.autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import titanfunc as tf
from tests.memory.problems import TOLERANCE, assert_same_tree
from titanfunc import tree
from titanfunc.memory.recurrent import inner_gradient
from titanfunc.ops.memory_write import gradient_rows
from titanfunc.ops.objective import Objective


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_closed_form_equals_torch_func_grad(depth, bias):
    net = tf.memory.mlp(4, 6, depth=depth, bias=bias)
    g = torch.Generator().manual_seed(1)
    weights = tree.map(lambda w: torch.randn(w.shape[1:], generator=g, dtype=torch.float64), net.init(g, heads=1))
    k, v = torch.randn(2, 4, generator=g, dtype=torch.float64)
    want = inner_gradient(net, weights, k, v, Objective())
    leaves = [weights[f"w{i}"] for i in range(depth)] + [weights[f"b{i}"] for i in range(depth) if bias]
    inputs, errors, loss, _ = gradient_rows(leaves, k[None], v[None], torch.ones(1, dtype=torch.float64), depth, 0.0)
    for i in range(depth):
        torch.testing.assert_close(inputs[i].mT @ errors[i], want[f"w{i}"], **TOLERANCE)
        if bias:
            torch.testing.assert_close(errors[i][0], want[f"b{i}"], **TOLERANCE)
    torch.testing.assert_close(loss[0], torch.sum((net.apply(weights, k) - v) ** 2), **TOLERANCE)


def test_a_module_keeps_its_values_and_a_meta_module_is_drawn():
    module = nn.Linear(3, 3)
    net = tf.memory.from_module(module)
    weights = net.init(torch.Generator().manual_seed(0), heads=2)
    assert torch.equal(weights["weight"][1], module.weight) and weights["weight"].shape == (2, 3, 3)
    x = torch.randn(5, 3)
    torch.testing.assert_close(net.apply({n: w[0] for n, w in weights.items()}, x), module(x))
    drawn = tf.memory.from_module(nn.Linear(3, 3, device="meta")).init(torch.Generator().manual_seed(0), heads=2)
    assert drawn["weight"].abs().min() > 0 and drawn["bias"].abs().max() == 0


def test_modules_that_cannot_be_a_memory_are_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        tf.memory.from_module(nn.ReLU())
    with pytest.raises(ValueError, match="no buffers"):
        tf.memory.from_module(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="depth: wanted at least 1"):
        tf.memory.mlp(4, 4, depth=0)


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize("masked", [False, True])
def test_update_is_one_clipped_step_with_momentum(max_grad_norm, masked):
    net = tf.memory.mlp(4, 6, bias=True)
    g = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weights = tree.map(lambda w: draw(*w.shape[1:]), net.init(g, heads=1))
    momentum = tree.map(lambda w: draw(*w.shape), weights)
    k, v = draw(7, 4), draw(7, 4)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0.0], dtype=torch.float64) if masked else None
    result = tf.memory.update(net, weights, momentum, k, v, 0.1, 0.8, 0.5, max_grad_norm, mask=mask)

    leaves = tree.map(lambda w: w.clone().requires_grad_(), weights)
    rows = slice(None) if mask is None else mask.bool()
    loss = nn.functional.mse_loss(net.apply(leaves, k[rows]), v[rows])
    loss.backward()
    norm = torch.sqrt(sum(torch.sum(w.grad**2) for w in tree.leaves(leaves)))
    factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm.item())
    stepped = tree.map(lambda s, w: 0.8 * s - 0.5 * factor * w.grad, momentum, leaves)
    assert_same_tree(result.momentum, stepped)
    assert_same_tree(result.weights, tree.map(lambda w, s: 0.9 * w + s, weights, stepped))
    torch.testing.assert_close(result.loss, loss.detach(), **TOLERANCE)
    torch.testing.assert_close(result.grad_norm, norm.detach(), **TOLERANCE)


def test_update_drops_what_is_not_finite_and_maps_over_memories():
    net = tf.memory.mlp(4, 6)
    weights = tree.map(lambda w: w + 0.1, net.init(torch.Generator().manual_seed(0), heads=3))
    momentum, k = tree.zeros_like(weights), torch.randn(3, 5, 4)
    k[1, 0, 0] = float("nan")
    result = torch.func.vmap(lambda w, s, k: tf.memory.update(net, w, s, k, k, 0.1, 0.9, 0.1))(weights, momentum, k)
    assert torch.equal(result.weights["w0"][1], weights["w0"][1])
    assert torch.isfinite(result.weights["w0"]).all() and not torch.equal(result.weights["w0"][0], weights["w0"][0])
    with pytest.raises(ValueError, match="k, v: wanted one shape"):
        tf.memory.update(net, weights, momentum, k[0], k[0, :2], 0.1, 0.9, 0.1)
