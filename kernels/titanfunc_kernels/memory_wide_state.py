"""A wide memory's float32 state between two chunks, in as few bytes as hold it, and products with W and S.

Where products run in bfloat16 a chunk needs the state twice: rounded, as the factor of its products and as what a
history keeps, and whole, to go on from. The rounded number is the whole one's upper half, so beside it only the lower
half is kept, in 16 bits: 4 bytes a number in place of 6, with nothing lost. Float32 products need the whole state
alone.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.memory_wide_rows import below, dot


@triton.jit
def by_state(
    a, dw, ds, inner_stride, col_stride, rows, here, cols, there, K, split, span,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A dW and A dS for the rows and columns named, those that are ``here`` and ``there``, A [R, K], dW and dS
    [K, ...] of any strides: the share of one of the spans of K. EVEN: BK divides K."""
    by_w = tl.zeros((BC, BN), dtype=tl.float32)
    by_s = tl.zeros((BC, BN), dtype=tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, K), BK):
        inner = start + tl.arange(0, BK)
        live = below(inner, K, EVEN)
        x = tl.load(a + (rows[:, None] * K + inner[None, :]), mask=here[:, None] & live[None, :], other=0.0)
        at = inner[:, None] * inner_stride + cols[None, :] * col_stride
        held = live[:, None] & there[None, :]
        by_w = dot(x, tl.load(dw + at, mask=held, other=0.0), by_w)
        by_s = dot(x, tl.load(ds + at, mask=held, other=0.0), by_s)
    return by_w, by_s


@triton.jit
def outer(
    a, b, rows, here, cols, there, C, DI, DO, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr
):
    """A^T B for the rows and columns named, of A [C, DI], read transposed, and B [C, DO]. WHOLE: BC divides C."""
    return add_outer(tl.zeros((BM, BN), dtype=tl.float32), a, b, rows, here, cols, there, C, DI, DO, BC, WHOLE)


@triton.jit
def add_outer(acc, a, b, rows, here, cols, there, C, DI, DO, BC: tl.constexpr, WHOLE: tl.constexpr):
    """acc + A^T B, see :func:`outer`."""
    for start in range(0, C, BC):
        tokens = start + tl.arange(0, BC)
        live = below(tokens, C, WHOLE)
        at = tl.load(a + (rows[:, None] + tokens[None, :] * DI), mask=here[:, None] & live[None, :], other=0.0)
        bt = tl.load(b + (tokens[:, None] * DO + cols[None, :]), mask=live[:, None] & there[None, :], other=0.0)
        acc = dot(at, bt, acc)
    return acc


@triton.jit
def load_state(high, low, at, held):
    """The float32 numbers whose upper halves lie at ``high`` and whose lower ones at ``low``; or, if ``high`` is
    float32, those that lie there."""
    top = tl.load(high + at, mask=held, other=0.0)
    if high.dtype.element_ty == tl.bfloat16:
        rest = tl.load(low + at, mask=held, other=0)
        found = ((top.to(tl.int16, bitcast=True).to(tl.int32) << 16) + rest.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        found = top
    return found


@triton.jit
def store_state(high, low, at, x, held):
    """Stores what :func:`load_state` finds again. The upper half is x rounded to the nearest, ties away from zero: the
    lower one, the rest as a signed number, then fits into 16 bits."""
    if high.dtype.element_ty == tl.bfloat16:
        bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)  # a NaN that rounding cannot carry away
        top = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(high + at, top, mask=held)
        tl.store(low + at, bits.to(tl.int16), mask=held)
    else:
        tl.store(high + at, x, mask=held)


def lower_halves(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the lower halves of a float32 tensor whose upper ones are of ``dtype``; none where that is float32."""
    return torch.empty_like(leaf, dtype=torch.int16) if dtype == torch.bfloat16 else leaf
