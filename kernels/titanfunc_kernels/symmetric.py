"""Products that are symmetric matrices: the tiles on and below the diagonal alone, each stored twice.

Letters: L matrices, M rows, K columns, T tiles along a side.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import multiprocessors, on_device

LARGE = {torch.bfloat16: (128, 64, 8, 3, 128), torch.float32: (64, 32, 8, 3, None)}
"""(tile's side, columns a step, warps, stages, registers a thread) where there is work enough.

bfloat16: 96 KB of shared memory and 128 registers (a few bytes spill, outside the loop), so that two programs share a
multiprocessor: one stores while the other multiplies. float32 is rounded as float32, which matrix units cannot do."""
SMALL = {torch.bfloat16: (64, 64, 4, 4, None), torch.float32: (32, 32, 4, 3, None)}
"""The same where fewer large tiles than multiprocessors would leave some idle, or most of a tile outside the matrix."""
GROUP = 8
"""Rows of tiles that run together: they share the columns they read in the L2 cache."""


@triton.jit
def _row_of(index):
    """The row r of a triangle's entry: r (r + 1) / 2 <= index < (r + 1) (r + 2) / 2."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return tl.where(row * (row + 1) // 2 > index, row - 1, row)


@triton.jit
def _tile_of(index, side, GROUP: tl.constexpr):
    """(row, column) of a tile with row >= column; GROUP rows at a time, column by column."""
    top = _row_of(index) // GROUP * GROUP
    rows = tl.minimum(GROUP, side - top)
    index -= top * (top + 1) // 2
    corner = index - top * rows  # from 0 on in the triangle at the group's right end
    inner = _row_of(tl.maximum(corner, 0))
    row = tl.where(corner < 0, index % rows, inner)
    column = tl.where(corner < 0, index // rows, top + corner - inner * (inner + 1) // 2)
    return top + row, column


@triton.jit
def _symmetric_kernel(
    x, out, rows, columns, tiles, alpha, beta,
    PLUS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    row, column = _tile_of(program % tiles, tl.cdiv(rows, BLOCK), GROUP)
    x += matrix * rows * columns
    out += matrix * rows * rows
    down = row * BLOCK + tl.arange(0, BLOCK)
    across = column * BLOCK + tl.arange(0, BLOCK)
    steps = tl.arange(0, BLOCK_K)
    # Rows past the last are read as the last one and never stored: a mask less in the loop.
    left = x + tl.minimum(down, rows - 1)[:, None].to(tl.int64) * columns + steps[None, :]
    right = x + tl.minimum(across, rows - 1)[None, :].to(tl.int64) * columns + steps[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK_K):
        if WHOLE:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = steps < columns - start
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K
    inside = (down < rows)[:, None] & (across < rows)[None, :]
    place = down[:, None].to(tl.int64) * rows + across[None, :]
    total *= alpha
    if PLUS:
        total += beta * tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tile = total.to(out.dtype.element_ty)
    tl.store(out + place, tile, mask=inside)
    if row != column:
        mirror = across[:, None].to(tl.int64) * rows + down[None, :]
        tl.store(out + mirror, tl.trans(tile), mask=(across < rows)[:, None] & (down < rows)[None, :])


def symmetric(x: Tensor, alpha: float = 1.0, beta: float | None = None) -> Tensor:
    """alpha X X^T [L, M, M] for X [L, M, K]; with ``beta``, for symmetric X [L, M, M], beta X + alpha X X^T.

    float32 or bfloat16, sums in float32.
    """
    x = x.contiguous()
    matrices, rows, columns = x.shape
    out = x.new_empty((matrices, rows, rows))
    if not out.numel():
        return out
    side = triton.cdiv(rows, LARGE[x.dtype][0])
    enough = matrices * side * (side + 1) // 2 >= multiprocessors(x) and rows > SMALL[x.dtype][0]
    block, block_k, warps, stages, registers = (LARGE if enough else SMALL)[x.dtype]
    if rows % 16 or columns % 16:  # the addresses of single numbers take registers that wide accesses do not
        registers = None
    side = triton.cdiv(rows, block)
    tiles = side * (side + 1) // 2
    with on_device(x):
        _symmetric_kernel[(matrices * tiles,)](
            x, out, rows, columns, tiles, alpha, 0.0 if beta is None else beta,
            PLUS=beta is not None, WHOLE=columns % block_k == 0, PRECISION="ieee",
            BLOCK=block, BLOCK_K=block_k, GROUP=GROUP, num_warps=warps, num_stages=stages, maxnreg=registers,
        )  # fmt: skip
    return out
