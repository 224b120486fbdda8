"""The memory write of small memories, and a whole memory layer around it: 4 samples of 2,048 tokens, 8 heads of 64.

Letters: B samples, H heads, N chunks, C tokens a chunk, D head size, F hidden size. Rows are dicts
(titanfunc/bench/kernels.py).
"""

from __future__ import annotations

import functools

import torch

import titanfunc as tf
from titanfunc.ops.memory_write import memory_write

B, H, TOKENS, CHUNK, D = 4, 8, 2048, 64, 64
ROWS_SHAPE = (B, H, TOKENS // CHUNK, CHUNK)


def _draw(*shape, seed, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _unit(*shape, seed, device):
    return torch.nn.functional.normalize(_draw(*shape, seed=seed, device=device), dim=-1).to(torch.bfloat16)


def _shapes(hidden):
    return [(D, hidden), (hidden, D)] if hidden else [(D, D)]


def _write_inputs(hidden, device):
    """Weights, momentum, anchor, k, v, the gates and refresh, as memory_write takes them; hidden 0: one matrix."""
    shapes = _shapes(hidden)
    weights = [_draw(B, H, *s, seed=i, device=device) * s[0] ** -0.5 for i, s in enumerate(shapes)]
    k, v = (_unit(*ROWS_SHAPE, D, seed=2 + i, device=device) for i in range(2))
    gates = [torch.sigmoid(_draw(*ROWS_SHAPE, seed=4 + i, device=device)) for i in range(3)]
    factors = [torch.sigmoid(_draw(*ROWS_SHAPE[:3], seed=7 + i, device=device)) for i in range(3)]
    states = [*weights, *(0.1 * w for w in weights), *(w.clone() for w in weights)]
    return (*states, k, v, 0.05 * gates[0], *gates[1:], *factors, torch.ones_like(factors[0]))


def _write(*tensors, depth, kernels):
    lists = [list(tensors[i * depth : (i + 1) * depth]) for i in range(3)]
    out = memory_write(*lists, *tensors[3 * depth :], depth=depth, clip=0.5, kernels=kernels)
    states = [past.to(torch.bfloat16) for past in (*out.weights, *out.momentum)]
    return (*states, *out.last_weights, *out.last_momentum, *out.inputs, *out.errors, out.loss)


def _layer_inputs(hidden, device):
    """The first weights, then q, k, v and the three gates of the tokens."""
    first = [_draw(H, *s, seed=i, device=device) * s[0] ** -0.5 for i, s in enumerate(_shapes(hidden))]
    rows = [_unit(B, H, TOKENS, D, seed=2 + i, device=device) for i in range(3)]
    gates = [torch.sigmoid(_draw(B, H, TOKENS, seed=5 + i, device=device)) for i in range(3)]
    return (*first, *rows, 0.02 * gates[0], 0.9 * gates[1], 0.05 * gates[2])


def _layer(*tensors, hidden, kernels):
    depth = 2 if hidden else 1
    net = tf.memory.mlp(D, hidden or D, depth=depth)
    state = tf.memory.init_state({f"w{i}": w for i, w in enumerate(tensors[:depth])}, B)
    q, k, v, *gates = tensors[depth:]
    y, after = tf.memory.scan(
        net, state, q, k, v, tf.memory.Gates(*gates), CHUNK, clip=0.5, aligned=True, kernels=kernels
    )
    return (y, *after.weights.values())


def _write_bytes(hidden, grad, *_):
    """What has to leave the device's cores: a history of W and S in bfloat16 a chunk, the rows; with gradients the
    same in, and their cotangents."""
    features = sum(a + b for a, b in _shapes(hidden))
    states = 2 * 2 * sum(a * b for a, b in _shapes(hidden)) * (TOKENS // CHUNK)
    once = B * H * (states + 2 * TOKENS * (features + 2 * D))
    return once * (3 if grad else 1)


def _rows():
    for hidden in (256, 128, 0):
        depth, what = (2, f"F {hidden}") if hidden else (1, "one matrix")
        size = f"{B} x {TOKENS}, {H} heads of {D}, {what}, chunk {CHUNK}"
        for grad in (False, True):
            yield {
                "name": f"memory write, {size}" + ("" if grad else ", forward"),
                "make": functools.partial(_write_inputs, hidden),
                "kernel": functools.partial(_write, depth=depth, kernels="triton"),
                "reference": functools.partial(_write, depth=depth, kernels="reference"),
                "bytes": functools.partial(_write_bytes, hidden, grad),
                "grad": grad,
            }
        yield {
            "name": f"memory layer (write and reads), {size}",
            "make": functools.partial(_layer_inputs, hidden),
            "kernel": functools.partial(_layer, hidden=hidden, kernels="triton"),
            "reference": functools.partial(_layer, hidden=hidden, kernels="reference"),
            "bytes": functools.partial(_write_bytes, hidden, True),
            "grad": True,
        }


ROWS = list(_rows())
