"""The read of small memories at every token: 4 samples of 2,048 tokens, 8 heads of 64, chunks of 64.

Letters: B samples, H heads, N chunks, C tokens a chunk, D head size, F hidden size. Rows are dicts
(titanfunc/bench/kernels.py).
"""

from __future__ import annotations

import functools

import torch

from titanfunc.ops.memory_read import memory_read

B, H, N, C, D = 4, 8, 32, 64, 64


def _shapes(hidden):
    return [(D, hidden), (hidden, D)] if hidden else [(D, D)]


def _inputs(hidden, device):
    """q, W, S, X and Delta of each layer, beta, f and G, as memory_read takes them; hidden 0: one matrix."""
    source = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(B, H, N, *shape, generator=source, device=device)

    def rows(size):
        return torch.nn.functional.normalize(draw(C, size), dim=-1).to(torch.bfloat16)

    shapes = _shapes(hidden)
    weights = [(draw(*s) * s[0] ** -0.5).to(torch.bfloat16) for s in shapes]
    momentum = [(draw(*s) * 0.1 * s[0] ** -0.5).to(torch.bfloat16) for s in shapes]
    inputs, errors = [rows(s[0]) for s in shapes], [0.1 * rows(s[1]) for s in shapes]
    gates = [torch.sigmoid(draw(C)), torch.sigmoid(draw(C)), torch.sigmoid(draw(C, C)).tril()]
    return (rows(D), *weights, *momentum, *inputs, *errors, *gates)


def _read(*tensors, depth, kernels):
    lists = [list(tensors[1 + i * depth : 1 + (i + 1) * depth]) for i in range(4)]
    return memory_read(tensors[0], *lists, *tensors[-3:], kernels=kernels)


def _bytes(hidden, grad, *_):
    """Every tensor in and y out; with gradients all of them in once more, with y's cotangent, and their gradients."""
    shapes = _shapes(hidden)
    states, rows = 2 * sum(a * b for a, b in shapes), C * sum(a + b for a, b in shapes)
    whole = 2 * (states + rows + C * D) + 4 * (C * C + 2 * C)
    return B * H * N * ((3 if grad else 1) * whole + (2 if grad else 1) * 2 * C * D)


ROWS = [
    {
        "name": f"memory read, {B} x {N * C}, {H} heads of {D}, {what}, chunk {C}" + ("" if grad else " forward"),
        "make": functools.partial(_inputs, hidden),
        "kernel": functools.partial(_read, depth=depth, kernels="triton"),
        "reference": functools.partial(_read, depth=depth, kernels="reference"),
        "bytes": functools.partial(_bytes, hidden, grad),
        "grad": grad,
    }
    for hidden, depth, what in ((256, 2, "F 256"), (128, 2, "F 128"), (0, 1, "one matrix"))
    for grad in (False, True)
]
