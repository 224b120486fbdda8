"""AdamW over many leaves, a few to a launch: one read of g, p, m, v and one write of the result, m, v.

Letters: g gradient, p parameter, m decaying mean of g, v decaying mean of g^2. A leaf is read as one row of numbers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import on_device

BLOCK = 2048
"""Numbers a program moves: at 4 warps 16 a thread, four loads of 16 bytes in flight for each of its four inputs."""
WARPS = 4
LEAVES = 8
"""Leaves a launch: so many bodies stand in one kernel, each with its own alignment, and small leaves share a launch."""


@triton.jit
def _leaf(
    param, grad, first, second, out, new_first, new_second, block, size, decay,
    rate, factor, scale1, scale2, b1, c1, b2, c2, eps, APPLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A leaf may hold more than 2^31 numbers: the block's start is 64 bits wide, what is added to it 32.
    start = block.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < size - start
    p = tl.load(param + start + offsets, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + start + offsets, mask=inside, other=0.0).to(tl.float32) * factor
    m = tl.load(first + start + offsets, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + start + offsets, mask=inside, other=0.0).to(tl.float32)
    m = b1 * m + c1 * g
    v = b2 * v + c2 * g * g
    # The rounded root and quotient: the fast ones are off by units in the last place, and memory is what takes time.
    u = tl.div_rn(m * scale1, tl.sqrt_rn(v * scale2) + eps)
    u = -rate * (u + decay * p)
    if APPLY:
        u = p + u
    tl.store(out + start + offsets, u.to(out.dtype.element_ty), mask=inside)
    tl.store(new_first + start + offsets, m.to(new_first.dtype.element_ty), mask=inside)
    tl.store(new_second + start + offsets, v.to(new_second.dtype.element_ty), mask=inside)


@triton.jit
def _adamw_kernel(
    leaves, grads, firsts, seconds, outs, new_firsts, new_seconds, sizes, decays,
    rate, factor, scale1, scale2, b1, c1, b2, c2, eps,
    COUNT: tl.constexpr, APPLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rate, factor = tl.load(rate).to(tl.float32), tl.load(factor).to(tl.float32)
    scale1, scale2 = tl.load(scale1).to(tl.float32), tl.load(scale2).to(tl.float32)
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        blocks = (sizes[i] + (BLOCK - 1)) // BLOCK
        if (block >= 0) & (block < blocks):
            _leaf(
                leaves[i], grads[i], firsts[i], seconds[i], outs[i], new_firsts[i], new_seconds[i],
                block, sizes[i], decays[i], rate, factor, scale1, scale2, b1, c1, b2, c2, eps, APPLY, BLOCK,
            )  # fmt: skip
        block = block - blocks


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    scalars: Sequence[Tensor],
    decays: Sequence[float],
    b1: float,
    b2: float,
    eps: float,
    apply: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New (updates, or with ``apply`` parameters; m; v), lists of leaves of the parameters' shapes and dtypes.

    scalars: learning rate, factor of the gradients, 1 / (1 - b1^t), 1 / (1 - b2^t), each 0-d on the device.
    """
    params, grads, firsts, seconds = (
        [leaf.contiguous() for leaf in group] for group in (params, grads, firsts, seconds)
    )
    outs, new_firsts, new_seconds = ([torch.empty_like(p) for p in params] for _ in range(3))
    filled = [i for i, p in enumerate(params) if p.numel()]
    for at in range(0, len(filled), LEAVES):
        chosen = filled[at : at + LEAVES]
        sizes = tuple(params[i].numel() for i in chosen)
        groups = (params, grads, firsts, seconds, outs, new_firsts, new_seconds)
        with on_device(params[0]):
            _adamw_kernel[(sum(triton.cdiv(size, BLOCK) for size in sizes),)](
                *(tuple(group[i] for i in chosen) for group in groups), sizes, tuple(float(decays[i]) for i in chosen),
                *scalars, b1, 1 - b1, b2, 1 - b2, eps,
                COUNT=len(chosen), APPLY=apply, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return outs, new_firsts, new_seconds
