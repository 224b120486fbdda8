"""Momentum networks: learned corrections of a base optimizer's update. Each returns its input while it is new.

Letters: u the base's update of a leaf, g its gradient, m the decaying mean of g (all of any one shape), rms(x) the root
of the mean of x^2, F features, L layers. A leaf of a model's blocks is [L, ...], and each layer of it a tensor of its
own; any other leaf is one tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.models.roles import stacked
from titanfunc.optim.base import Tree
from titanfunc.optim.nested.networks import Network, apply_mlp, init_mlp, log_and_sign

KINDS = ("none", "l2_regression", "direct_update", "deep_momentum")
DECAY = 0.9
RATE = 0.1
"""Of deep_momentum's memories, on a loss that is half a mean square of unit scale."""
STATISTICS = 9
FLOOR = 1e-12


class Seen(NamedTuple):
    """What a momentum network looks at: the gradient, its decaying mean (trees like the parameters), the loss's trend
    (0-d), and of deep_momentum the small memories, ``{w0, b0, w1, b1}`` with a first axis of tensors for each leaf."""

    grads: Tree
    mean: Tree
    trend: Tensor
    memories: Any


def init_network(generator: torch.Generator, kind: str, hidden: int, layers: int, preprocess: bool) -> dict[str, Any]:
    """The meta-parameters of a momentum network of one of KINDS; {} for "none"."""
    if kind == "l2_regression":
        return init_mlp(generator, STATISTICS, hidden, layers, 3)
    if kind == "direct_update":
        return init_mlp(generator, 4 if preprocess else 2, hidden, layers, 1)
    return {"gain": torch.zeros((), device=generator.device)} if kind == "deep_momentum" else {}


def init_memories(generator: torch.Generator, params: Tree, hidden: int) -> Tree:
    """For deep_momentum, a memory for every tensor of the parameters (any shapes), all alike: 2 -> H -> 1."""
    start = init_mlp(generator, 2, hidden, 2, 1)

    def spread(leaf: Tensor, inside: bool) -> Network:
        wide = {name: w.to(leaf.device, leaf.dtype) for name, w in start.items()}
        return {name: w.expand(_count(leaf, inside), *w.shape).contiguous() for name, w in wide.items()}

    return tree.map(spread, params, stacked(params))


def correct(kind: str, network: Network, updates: Tree, seen: Seen, params: Tree, preprocess: bool) -> Tree:
    """Updates u (nested dicts, any shapes) -> corrected updates of the same shapes, by a network of one of KINDS.

    l2_regression: (1 + s) u + (h - d cos(u, m)) rms(u) m / rms(m), with s, h, d in (-0.5, 0.5) from nine statistics of
    each tensor: scale, shift along the momentum, damping of what points along it.
    direct_update: u + rms(u) n(g, m), n element by element, from log-magnitudes and signs, or with ``preprocess`` off
    from g / rms(g) and m / rms(m). Andrychowicz et al., arXiv 1606.04474.
    deep_momentum: u - gain rms(u) p, p the gradient that the tensor's small memory foretells.
    """
    if kind == "none":
        return updates
    inside = stacked(params)
    if kind == "l2_regression":
        return tree.map(
            lambda u, g, m, s: _regressed(network, u, g, m, s, seen.trend), updates, seen.grads, seen.mean, inside
        )
    if kind == "direct_update":
        return tree.map(
            lambda u, g, m, s: _direct(network, u, g, m, s, preprocess), updates, seen.grads, seen.mean, inside
        )
    foretold = _foretell(seen.memories, seen.grads, seen.mean, inside)
    return tree.map(lambda u, p, s: u - network["gain"].to(u.dtype) * _rms(u, s) * p, updates, foretold, inside)


def keep_length(new: Tree, old: Tree, params: Tree) -> Tree:
    """``new`` (nested dicts, any shapes) with every tensor as long as in ``old``: another direction alone."""
    return tree.map(lambda n, o, s: n * (_rms(o, s) / _rms(n, s)), new, old, stacked(params))


def learn(memories: Tree, grads: Tree, grads_before: Tree, mean_before: Tree) -> Tree:
    """Each memory after one gradient step (RATE) on half the mean squared error of foretelling ``grads / rms(grads)``
    from what was seen a step before (nested dicts, any shapes)."""
    inside = stacked(grads)
    targets = tree.map(lambda g, s: g / _rms(g, s), grads, inside)

    def loss(weights: Tree) -> Tensor:
        foretold = _foretell(weights, grads_before, mean_before, inside)
        errors = tree.map(lambda p, t, s: 0.5 * _mean((p - t) ** 2, s).sum(), foretold, targets, inside)
        return torch.stack(tree.leaves(errors)).sum()

    return tree.map(lambda w, d: w - RATE * d, memories, torch.func.grad(loss)(memories))


def _count(leaf: Tensor, inside: bool) -> int:
    return leaf.shape[0] if inside else 1


def _mean(x: Tensor, inside: bool) -> Tensor:
    """The mean over each tensor of a leaf, [L, 1, ...] or [1, ...]."""
    return x.mean(tuple(range(int(inside), x.ndim)), keepdim=True) if x.ndim > inside else x


def _rms(x: Tensor, inside: bool) -> Tensor:
    return torch.sqrt(_mean(x * x, inside) + FLOOR)


def _regressed(network: Network, u: Tensor, g: Tensor, m: Tensor, inside: bool, trend: Tensor) -> Tensor:
    ru, rg, rm = (_rms(x, inside) for x in (u, g, m))
    cos_ug, cos_um, cos_gm = (_mean(a * b, inside) for a, b in ((u / ru, g / rg), (u / ru, m / rm), (g / rg, m / rm)))
    apart = torch.log1p(_rms(g - m, inside) / rg)
    layers = _count(u, inside)
    place = (torch.arange(layers, device=u.device, dtype=u.dtype) + 1) / (layers + 1)
    each = [torch.log(ru), torch.log(rg), torch.log(rm), cos_ug, cos_um, cos_gm, apart]
    rows = torch.stack([*(x.reshape(layers) for x in each), place, trend.to(u.dtype).expand(layers)], -1)
    scale, shift, damping = (0.5 * torch.tanh(apply_mlp(network, 0.1 * rows))).unbind(-1)
    scale, shift, damping = (x.reshape(ru.shape) for x in (scale, shift, damping))
    return (1 + scale) * u + (shift - damping * cos_um) * ru * (m / rm)


def _direct(network: Network, u: Tensor, g: Tensor, m: Tensor, inside: bool, preprocess: bool) -> Tensor:
    g, m = g / _rms(g, inside), m / _rms(m, inside)
    features = torch.cat([log_and_sign(g), log_and_sign(m)], -1) if preprocess else torch.stack([g, m], -1)
    return u + _rms(u, inside) * apply_mlp(network, features).squeeze(-1)


def _foretell(memories: Tree, grads: Tree, mean: Tree, inside: Tree) -> Tree:
    def one(g: Tensor, m: Tensor, s: bool, weights: Network) -> Tensor:
        x = torch.stack([g / _rms(g, s), m / _rms(m, s)], -1)
        rows = x.reshape(_count(g, s), -1, 2)
        for i in range(2):
            rows = torch.baddbmm(weights[f"b{i}"].unsqueeze(1).to(rows.dtype), rows, weights[f"w{i}"].to(rows.dtype))
            rows = torch.tanh(rows) if i == 0 else rows
        return rows.reshape(g.shape)

    return _zip(one, grads, mean, inside, memories)


def _zip(fn: Any, first: Tree, *rest: Tree) -> Tree:
    """``fn`` on the leaves of ``first`` and what stands at their places in ``rest``, which may be nested deeper."""
    if isinstance(first, dict):
        return {name: _zip(fn, part, *(other[name] for other in rest)) for name, part in first.items()}
    return fn(first, *rest)
