"""Rows of a memory layer with its projections, forward and backward, beside titans-pytorch's NeuralMemory.

Rows x [B, T, D] in bfloat16 products. Ours: q, k, v, gates and output are linear, the scan by the per-token rule with
kernels, compiled, in a CUDA graph. Theirs: as its README builds it, with batch_size equal to the chunk size, so that a
chunk's gradients are taken at its own start (the faithful mode; its scripted functions need PYTORCH_JIT=0), under
autocast; it cannot be compiled in one graph (a branch on data).

Letters: B samples, T tokens, D features, H heads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import titanfunc as tf

PACKAGE = "titans_pytorch"
# samples, tokens, features, heads, chunk
CASES = [
    (4, 2048, 512, 1, 64), (4, 2048, 512, 1, 256), (4, 2048, 512, 8, 64), (4, 8192, 512, 1, 64), (4, 8192, 512, 8, 64),
]  # fmt: skip

# Rounding to bfloat16 alone moved the gradient of the gates' matrix, a sum over all tokens, by 0.023 of its largest
# number (the reference against itself in float32 on a CPU, 1,024 tokens, one head).
TOLERANCE = 0.08


def installed() -> bool:
    """Whether the peer can be imported here."""
    return importlib.util.find_spec(PACKAGE) is not None


def rows() -> list[dict[str, Any]]:
    """A row for each of CASES, as titanfunc/bench/kernels.py describes them."""
    return [_row(*case) for case in CASES]


def _row(batch: int, tokens: int, dim: int, heads: int, chunk: int) -> dict[str, Any]:
    size = dim // heads
    return {
        "name": f"peer: {batch} x {tokens}, dim {dim}, {heads} of {size}, hidden {4 * size}, chunk {chunk}",
        "make": partial(_inputs, batch, tokens, dim, heads),
        "kernel": partial(_layer, chunk, "triton"),
        "reference": partial(_layer, chunk, "reference"),
        "peer": partial(theirs, batch, tokens, dim, heads, chunk),
        "grad": True,
        "tolerance": TOLERANCE,
    }


def _inputs(batch: int, tokens: int, dim: int, heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """x, then the matrices of q, k and v, of the gates and of the output, then the memories' first weights."""
    size = dim // heads

    def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(device)

    return (
        drawn(batch, tokens, dim, seed=5).bfloat16(),
        drawn(dim, 3 * dim, seed=0, scale=dim**-0.5), drawn(dim, 3 * heads, seed=1, scale=dim**-0.5),
        drawn(dim, dim, seed=2, scale=dim**-0.5),
        drawn(heads, size, 4 * size, seed=3, scale=size**-0.5),
        drawn(heads, 4 * size, size, seed=4, scale=(4 * size) ** -0.5),
    )  # fmt: skip


def _layer(
    chunk: int, kernels: str, x: Tensor, qkv: Tensor, gates: Tensor, out: Tensor, w0: Tensor, w1: Tensor
) -> Tensor:
    heads, size, hidden = w0.shape
    rows = (x @ qkv.to(x.dtype)).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
    q, k, v = torch.nn.functional.normalize(rows.float(), dim=-1).to(x.dtype)
    raw = torch.sigmoid((x @ gates.to(x.dtype)).float()).unflatten(-1, (3, heads)).permute(2, 0, 3, 1)
    state = tf.memory.init_state({"w0": w0, "w1": w1}, x.shape[0])
    found = tf.memory.Gates(0.02 * raw[0], 0.9 * raw[1], 0.05 * raw[2])
    net = tf.memory.mlp(size, hidden)
    y, _ = tf.memory.scan(net, state, q, k, v, found, chunk, clip=0.5, aligned=True, kernels=kernels)
    return y.transpose(1, 2).flatten(-2) @ out.to(x.dtype)


def theirs(batch: int, tokens: int, dim: int, heads: int, chunk: int, device: torch.device) -> Callable[[], Any]:
    """A call that gives y [B, T, D] and leaves all gradients in its module."""
    module = importlib.import_module(PACKAGE)
    memory = module.NeuralMemory(dim=dim, chunk_size=chunk, batch_size=chunk, heads=heads, dim_head=dim // heads)
    memory = memory.to(device)
    x = torch.randn(batch, tokens, dim, device=device, requires_grad=True)
    dy = torch.randn(batch, tokens, dim, device=device)

    def run() -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            y, _ = memory(x)
        y.backward(dy.to(y.dtype))
        return [y]

    return run
