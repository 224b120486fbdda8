"""A learned optimizer's step of one leaf in two passes: mean squares of each element's features, then the network.

Letters: a leaf is [A, R, B, K, C] with its factored axes R and K. N elements in all, H hidden units. A program takes
a stretch of K and goes down R, so that what belongs to its columns stays in registers. The 16 features of an element,
in this order: g, p, m (3), v, m / sqrt(v) (3), 1 / sqrt(v), factored g (3), factored m (3). What depends on the row or
the column alone comes as tables: factors of g and m, and what the first layer makes of it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import multiprocessors, on_device

FEATURES = 16
PRECISION = "tf32x3"
"""Of the two small matrix products: three TensorFloat-32 products, which is float32 but for the last bits."""
SQUARES = (256, 16)
"""(columns a program, programs a multiprocessor) of the first pass: memory-bound, many loads in flight."""
NETWORK = (64, 9)
"""Of the second: 64 rows are what the matrix units take, and 158 registers a thread let three programs share a
multiprocessor; three turns of them, so that each lives long enough to pay for its weights."""
WARPS = 4


@triton.jit
def _place(program, R, B, K, C, blocks, splits, BLOCK: tl.constexpr):
    """Where a program begins: (first row, columns, those inside, offsets of leaf, row and column tables)."""
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    split = program // blocks % splits
    batch = (program // blocks // splits).to(tl.int64)
    a, b, c = batch // (B * C), batch // C % B, batch % C
    inside = columns < K
    wide = columns.to(tl.int64) * C
    leaf = (a * R * B + b) * K * C + c + wide
    rows = (a * R * B + b) * C + c
    return split, inside, leaf, rows, (a * B + b) * K * C + c + wide


@triton.jit
def _features(
    p, g, momentum, second, at, inside, row, down_scale, g0, g1, g2, m0, m1, m2, BLOCK: tl.constexpr
):  # fmt: skip
    """The 16 features [BLOCK, 16] of a row's stretch, not normalised; zeros outside."""
    value = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    mean0 = tl.load(momentum + 3 * at, mask=inside, other=0.0)
    mean1 = tl.load(momentum + 3 * at + 1, mask=inside, other=0.0)
    mean2 = tl.load(momentum + 3 * at + 2, mask=inside, other=0.0)
    square = tl.load(second + at, mask=inside, other=0.0)
    inverse = tl.where(inside, tl.rsqrt(square + 1e-6), 0.0)
    d0 = tl.load(down_scale + 3 * row)
    d1 = tl.load(down_scale + 3 * row + 1)
    d2 = tl.load(down_scale + 3 * row + 2)
    # Joined so that the feature's number is read off the four new axes, the first of them its highest bit.
    f0, f8 = gradient, mean2 * inverse
    f1, f9 = value, inverse
    f2, f10 = mean0, gradient * (d0 * g0)
    f3, f11 = mean1, gradient * (d1 * g1)
    f4, f12 = mean2, gradient * (d2 * g2)
    f5, f13 = square, mean0 * (d0 * m0)
    f6, f14 = mean0 * inverse, mean1 * (d1 * m1)
    f7, f15 = mean1 * inverse, mean2 * (d2 * m2)
    even = tl.join(tl.join(tl.join(f0, f8), tl.join(f4, f12)), tl.join(tl.join(f2, f10), tl.join(f6, f14)))
    odd = tl.join(tl.join(tl.join(f1, f9), tl.join(f5, f13)), tl.join(tl.join(f3, f11), tl.join(f7, f15)))
    return tl.reshape(tl.join(even, odd), (BLOCK, 16))


@triton.jit
def _across(across_scale, table, inside):
    """The six factors of a stretch of columns: three of g, three of m."""
    return (
        tl.load(across_scale + 6 * table, mask=inside, other=0.0),
        tl.load(across_scale + 6 * table + 1, mask=inside, other=0.0),
        tl.load(across_scale + 6 * table + 2, mask=inside, other=0.0),
        tl.load(across_scale + 6 * table + 3, mask=inside, other=0.0),
        tl.load(across_scale + 6 * table + 4, mask=inside, other=0.0),
        tl.load(across_scale + 6 * table + 5, mask=inside, other=0.0),
    )


@triton.jit
def _squares_kernel(
    p, g, momentum, second, down_scale, across_scale, partial, R, B, K, C, blocks, splits, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    split, inside, leaf, rows, table = _place(program, R, B, K, C, blocks, splits, BLOCK)
    g0, g1, g2, m0, m1, m2 = _across(across_scale, table, inside)
    total = tl.zeros((BLOCK, 16), tl.float32)
    for i in range(split, R, splits):
        down = tl.cast(i, tl.int64) * B * C
        x = _features(
            p, g, momentum, second, leaf + down * K, inside, rows + down, down_scale, g0, g1, g2, m0, m1, m2, BLOCK
        )
        total += x * x
    tl.store(partial + program.to(tl.int64) * 16 + tl.arange(0, 16), tl.sum(total, 0))


@triton.jit
def _network_kernel(
    p, g, momentum, second, down_scale, across_scale, down_bias, across_bias, squares,
    w1, w2, b2, w3, b3, out, R, B, K, C, blocks, splits, elements, hidden, exp_mult, step_mult,
    BLOCK: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, inside, leaf, rows, table = _place(tl.program_id(0), R, B, K, C, blocks, splits, BLOCK)
    g0, g1, g2, m0, m1, m2 = _across(across_scale, table, inside)
    units, features = tl.arange(0, HIDDEN), tl.arange(0, 16)
    real = units < hidden  # units past the last have no weights, and stay zero
    # The weights carry the features' normalisation: 16 H products a program in place of 16 an element.
    inverse = tl.rsqrt(tl.load(squares + features) / elements + 1e-5)
    first = tl.load(w1 + features[:, None] * hidden + units[None, :], mask=real[None, :], other=0.0) * inverse[:, None]
    inner = tl.load(w2 + units[:, None] * hidden + units[None, :], mask=real[:, None] & real[None, :], other=0.0)
    inner_bias = tl.load(b2 + units, mask=real, other=0.0)
    direction = tl.load(w3 + 2 * units, mask=real, other=0.0)
    size = tl.load(w3 + 2 * units + 1, mask=real, other=0.0)
    direction_bias, size_bias = tl.load(b3), tl.load(b3 + 1)
    columns = tl.load(
        across_bias + table[:, None] * hidden + units[None, :], mask=inside[:, None] & real[None, :], other=0.0
    )
    for i in range(split, R, splits):
        down = tl.cast(i, tl.int64) * B * C
        x = _features(
            p, g, momentum, second, leaf + down * K, inside, rows + down, down_scale, g0, g1, g2, m0, m1, m2, BLOCK
        )
        of_row = tl.load(down_bias + (rows + down) * hidden + units, mask=real, other=0.0)
        x = tl.dot(x, first, columns + of_row[None, :], input_precision=PRECISION)
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.dot(x, inner, input_precision=PRECISION) + inner_bias[None, :]
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        d = tl.sum(x * direction[None, :], 1) + direction_bias
        s = tl.sum(x * size[None, :], 1) + size_bias
        tl.store(out + leaf + down * K, d * tl.exp(s * exp_mult) * step_mult, mask=inside)


def _grid(p: Tensor, sizes: Sequence[int], most: int, programs: int) -> tuple[int, int, int]:
    """(columns a program, stretches of K, programs that share the rows of one stretch)."""
    a, i, b, j, c = sizes
    block = min(most, max(16, triton.next_power_of_2(j)))
    blocks = triton.cdiv(j, block)
    return block, blocks, max(1, min(i, programs * multiprocessors(p) // (a * b * c * blocks)))


def learned_mlp(tensors: Sequence[Tensor], sizes: Sequence[int], step_mult: float, exp_mult: float) -> Tensor:
    """The step [A, R, B, K, C], float32, flat, to subtract at a rate of 1; sizes: A, R, B, K, C.

    tensors: p, g [N] (float32 or bfloat16); m [N, 3], v [N]; factors of rows [A R B C, 3] and columns [A B K C, 6] (g's
    three, m's three); the first layer's share of rows [A R B C, H] and columns [A B K C, H]; weights [16, H], [H, H],
    biases [H], weights [H, 2], biases [2]. Columns stand for j in their own row for every a, b, c.
    """
    p, g, momentum, second, down_scale, across_scale, down_bias, across_bias, *weights = (
        tensor.contiguous() for tensor in tensors
    )
    a, i, b, j, c = sizes
    out = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    if not out.numel():
        return out
    hidden = weights[0].shape[1]
    with on_device(p):
        block, blocks, splits = _grid(p, sizes, *SQUARES)
        programs = a * b * c * blocks * splits
        partial = torch.empty((programs, FEATURES), dtype=torch.float32, device=p.device)
        _squares_kernel[(programs,)](
            p, g, momentum, second, down_scale, across_scale, partial, i, b, j, c, blocks, splits,
            BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
        block, blocks, splits = _grid(p, sizes, *NETWORK)
        _network_kernel[(a * b * c * blocks * splits,)](
            p, g, momentum, second, down_scale, across_scale, down_bias, across_bias, partial.sum(0), *weights, out,
            i, b, j, c, blocks, splits, p.numel(), hidden, exp_mult, step_mult,
            BLOCK=block, HIDDEN=max(16, triton.next_power_of_2(hidden)), PRECISION=PRECISION, num_warps=WARPS,
        )  # fmt: skip
    return out
