"""The memory write of wide memories, and a whole memory layer around it: 4 samples of 2,048 tokens, one head.

Inductor compiles the unrolled loop of 32 chunks (of 64) for minutes.

Letters: B samples, N chunks, C tokens a chunk, D head size, F hidden size. Rows are dicts (titanfunc/bench/kernels.py).
"""

from __future__ import annotations

import functools

import torch

import titanfunc as tf
from titanfunc.ops.backend import implements
from titanfunc.ops.memory_write import memory_write, write_chunks

# The reference is one operation, inside of which a compiler does not look; this is its loop, laid open to it.
UNROLLED = "unrolled"
implements("memory_write", UNROLLED)(write_chunks)

B, TOKENS, D, F = 4, 2048, 512, 2048
SIZE = 2 * B * D * F  # numbers in the weights of all memories


def _draw(*shape, seed, device, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _unit(*shape, seed, device):
    rows = torch.nn.functional.normalize(_draw(*shape, seed=seed, device=device), dim=-1)
    return rows.to(torch.bfloat16)


def write_inputs(chunk, device):
    """Weights, momentum, anchor, k, v, the gates and refresh, as memory_write takes them."""
    rows = (B, 1, TOKENS // chunk, chunk)
    weights = [_draw(B, 1, D, F, seed=0, device=device) * D**-0.5, _draw(B, 1, F, D, seed=1, device=device) * F**-0.5]
    k, v = (_unit(*rows, D, seed=2 + i, device=device) for i in range(2))
    gates = [torch.sigmoid(_draw(*rows, seed=4 + i, device=device)) for i in range(3)]
    factors = [torch.sigmoid(_draw(*rows[:3], seed=7 + i, device=device)) for i in range(3)]
    momentum = [0.1 * w for w in weights]
    anchor = [w.clone() for w in weights]
    return (*weights, *momentum, *anchor, k, v, 0.05 * gates[0], *gates[1:], *factors, torch.ones_like(factors[0]))


def _write(*tensors, kernels):
    lists = [list(tensors[i : i + 2]) for i in (0, 2, 4)]
    out = memory_write(*lists, *tensors[6:], depth=2, clip=0.5, kernels=kernels)
    states = [past.to(torch.bfloat16) for past in (*out.weights, *out.momentum)]
    return (*states, *out.last_weights, *out.last_momentum, *out.inputs, *out.errors, out.loss)


def layer_inputs(device):
    """The first weights, then q, k, v and the three gates of the tokens."""
    first = [_draw(1, D, F, seed=0, device=device) * D**-0.5, _draw(1, F, D, seed=1, device=device) * F**-0.5]
    rows = [_unit(B, 1, TOKENS, D, seed=2 + i, device=device) for i in range(3)]
    gates = [torch.sigmoid(_draw(B, 1, TOKENS, seed=5 + i, device=device)) for i in range(3)]
    return (*first, *rows, 0.02 * gates[0], 0.9 * gates[1], 0.05 * gates[2])


def _layer(w0, w1, q, k, v, *gates, chunk, kernels):
    net = tf.memory.mlp(D, F)
    state = tf.memory.init_state({"w0": w0, "w1": w1}, B)
    y, after = tf.memory.scan(
        net, state, q, k, v, tf.memory.Gates(*gates), chunk, clip=0.5, aligned=True, kernels=kernels
    )
    return (y, *after.weights.values())


def _write_bytes(chunk, grad, *_):
    """Float32 W and S in and out every chunk, of which a history keeps the upper halves; with gradients as much again
    for the cotangents, and both histories and their cotangents read."""
    chunks = TOKENS // chunk
    states, past = 2 * 2 * 4 * SIZE * chunks, 2 * 2 * SIZE * chunks
    return states + (states + 2 * past if grad else 0)


def _rows():
    for chunk in (64, 256):
        for grad in (False, True):
            yield {
                "name": f"memory write, {B} x {TOKENS}, D {D}, F {F}, chunk {chunk}{'' if grad else ', forward'}",
                "make": functools.partial(write_inputs, chunk),
                "kernel": functools.partial(_write, kernels="triton"),
                "reference": functools.partial(_write, kernels="reference"),
                "bytes": functools.partial(_write_bytes, chunk, grad),
                "grad": grad,
            }
        yield {
            "name": f"memory layer (write and reads), {B} x {TOKENS}, D {D}, F {F}, chunk {chunk}",
            "make": layer_inputs,
            "kernel": functools.partial(_layer, chunk=chunk, kernels="triton"),
            "reference": functools.partial(_layer, chunk=chunk, kernels="reference"),
            # Reads take W and S out of their histories forward and backward, and need not write their cotangents.
            "bytes": lambda *_, chunk=chunk: _write_bytes(chunk, True) + 2 * 2 * SIZE * (TOKENS // chunk),
            "grad": True,
        }
        yield {
            "name": f"memory layer against its loop unrolled, {B} x {TOKENS}, D {D}, F {F}, chunk {chunk}",
            "make": layer_inputs,
            "kernel": functools.partial(_layer, chunk=chunk, kernels="triton"),
            "reference": functools.partial(_layer, chunk=chunk, kernels=UNROLLED),
            "grad": True,
        }


ROWS = list(_rows())
