"""Rotation of pairs of features by position.

Letters: G groups (each with its own table), H heads that share one, T tokens, D features, the first D / 2 of them
paired with the others. The gradient is rotated back, by the negative sine, so one kernel is both ways.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import on_device

TILE = 2048  # elements of each half in a program's tile: at 4 warps two 16-byte loads of bfloat16 a thread and half
HEADS = 4  # heads that one reading of the table serves; more of them would be fewer programs
WARPS = 4


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, tokens,
    x_group, x_head, x_token, table_group, table_token,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """x [G, H, T, D] and tables [G, T, D / 2] with strides (of the features: 1), y [G, H, T, D] contiguous."""
    stretches = tl.cdiv(tokens, BLOCK_T)
    shares = tl.cdiv(heads, HEADS)
    program = tl.program_id(0)
    token = (program % stretches) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = (program // stretches) % shares * HEADS
    group = (program // stretches // shares).to(tl.int64)
    feature = tl.arange(0, BLOCK_HALF)
    mask = (token < tokens)[:, None] & (feature < HALF)[None, :]
    token = token.to(tl.int64)

    angle = group * table_group + token[:, None] * table_token + feature[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    for head in range(first, tl.minimum(first + HEADS, heads)):
        place = group * x_group + tl.cast(head, tl.int64) * x_head + token[:, None] * x_token + feature[None, :]
        a = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + place + HALF, mask=mask, other=0.0).to(tl.float32)
        target = ((group * heads + head) * tokens + token[:, None]) * (2 * HALF) + feature[None, :]
        tl.store(y_ptr + target, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + target + HALF, (a * sin + b * cos).to(y_ptr.dtype.element_ty), mask=mask)


def _run(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
    groups, heads, tokens, size = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    width = triton.next_power_of_2(size // 2)
    stretch = max(1, min(TILE // width, triton.next_power_of_2(tokens)))
    grid = (triton.cdiv(tokens, stretch) * triton.cdiv(heads, HEADS) * groups,)
    with on_device(x):
        _rotate[grid](
            x, cos, sin, y, heads, tokens, *x.stride()[:3], *cos.stride()[:2],
            HALF=size // 2, BLOCK_T=stretch, BLOCK_HALF=width, HEADS=HEADS, INVERSE=inverse, num_warps=WARPS,
        )  # fmt: skip
    return y


def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x [G, H, T, D] by the angles of cos and sin [G, T, D / 2], in ``dtype`` and contiguous.

    Only the features have to lie side by side in memory, else x is copied first.
    """
    return _run(x, cos, sin, dtype, inverse=False)


def rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x from dy [G, H, T, D], in ``dtype`` and contiguous."""
    return _run(dy, cos, sin, dtype, inverse=True)
