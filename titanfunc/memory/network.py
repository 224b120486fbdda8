"""The small network M whose weights are the memory.

Letters: H memory heads, D head size, F hidden size, N rows.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanfunc import rng
from titanfunc.ops.memory_write import matmul

Weights = dict[str, Tensor]


class MemoryNet(NamedTuple):
    """A memory network as two functions.

    init(generator, heads) -> weights, leaves [H, ...]: the learned initial weights.
    apply(weights, x) -> y for the weights of one memory (no head axis), x and y [N, D] or [D].
    depth, bias: layers and biases when M is a SiLU MLP, whose writes have a closed form; depth 0 for any
    other network, whose gradients are taken by torch.func.grad.
    """

    init: Callable[..., Weights]
    apply: Callable[[Weights, Tensor], Tensor]
    depth: int = 0
    bias: bool = False


def mlp(head_dim: int, hidden: int, depth: int = 2, bias: bool = False) -> MemoryNet:
    """An MLP of ``depth`` layers with SiLU between them: [D] -> [F] -> ... -> [D], all in features.

    Weights are named w0, w1, ... ([d_in, d_out]) and b0, ... ([d_out]). The last layer starts at zero, so that
    a memory reads zero until something is written; the others are drawn from N(0, 1 / d_in).
    Raises ValueError for sizes below 1.
    """
    for name, value in (("head_dim", head_dim), ("hidden", hidden), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    sizes = [head_dim, *[hidden] * (depth - 1), head_dim]

    def init(generator: torch.Generator, heads: int) -> Weights:
        weights = {}
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            std = 0.0 if layer == depth - 1 else 1 / math.sqrt(fan_in)
            weights[f"w{layer}"] = rng.normal(generator, (heads, fan_in, fan_out), std)
            if bias:
                weights[f"b{layer}"] = torch.zeros(heads, fan_out, device=generator.device)
        return weights

    def apply(weights: Weights, x: Tensor) -> Tensor:
        for layer in range(depth):
            x = x @ weights[f"w{layer}"]
            if bias:
                x = x + weights[f"b{layer}"]
            if layer < depth - 1:
                x = F.silu(x)
        return x

    return MemoryNet(init, apply, depth, bias)


def from_module(module: nn.Module) -> MemoryNet:
    """Any module [N, D] -> [N, D] as a memory network, through ``torch.func.functional_call``.

    The module itself is kept on the meta device, as structure only; its parameters become the leaves under
    their own names. Parameters that hold values are the initial weights of every head; those of a module
    on the meta device are drawn (matrices N(0, 1 / d_in) with d_in the last axis, vectors zero). Raises
    ValueError for a module without parameters, or with buffers (they would be shared state).
    """
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    if not values:
        raise ValueError("module: wanted at least one parameter to learn with, got none")
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise ValueError(f"module: wanted no buffers (a memory is a function of its weights), got {buffers}")
    structure = copy.deepcopy(module).to("meta")

    def init(generator: torch.Generator, heads: int) -> Weights:
        weights = {}
        for name, value in values.items():
            shape = (heads, *value.shape)
            if not value.is_meta:
                weights[name] = value.to(generator.device).expand(shape).clone()
            elif value.ndim < 2:
                weights[name] = torch.zeros(shape, device=generator.device)
            else:
                weights[name] = rng.normal(generator, shape, 1 / math.sqrt(value.shape[-1]))
        return weights

    def apply(weights: Weights, x: Tensor) -> Tensor:
        return torch.func.functional_call(structure, weights, (x,))

    return MemoryNet(init, apply)


def matrices_and_biases(net: MemoryNet, weights: Weights) -> list[Tensor]:
    """The leaves of an MLP's weights, any leading shape, in the order of the closed form: matrices, then biases."""
    names = [f"w{layer}" for layer in range(net.depth)]
    return [weights[name] for name in names + ([f"b{layer}" for layer in range(net.depth)] if net.bias else [])]


def named(net: MemoryNet, leaves: list[Tensor]) -> Weights:
    """The inverse of :func:`matrices_and_biases`, any leading shape."""
    names = [f"w{layer}" for layer in range(net.depth)]
    return dict(zip(names + ([f"b{layer}" for layer in range(net.depth)] if net.bias else []), leaves, strict=True))


def apply_mlp(net: MemoryNet, weights: Weights, q: Tensor) -> Tensor:
    """y = M(W; q) for rows q [*L, C, D] and an MLP's weights [*L, d_in, d_out]; products in q's dtype, y like q."""
    wide = weights["w0"].dtype
    x = q.to(wide)
    for layer in range(net.depth):
        x = matmul(x, weights[f"w{layer}"], q.dtype)
        if net.bias:
            x = x + weights[f"b{layer}"].unsqueeze(-2)
        x = F.silu(x) if layer < net.depth - 1 else x
    return x.to(q.dtype)
