"""RMSNorm and the linear map after it, without the normalised rows in device memory.

Letters: M rows, D features in, E features out.

y = factor * (x (scale * W)), with factor = 1 / rms of each row: the scale goes into the weights beforehand (D E
numbers, few against M D), the factor into the product's result, so the product reads x as it is and no arithmetic
stands between memory and the matrix unit. What is rounded to the product's dtype is scale * W instead of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels import norm
from titanfunc_kernels.launch import on_device


class Blocks(NamedTuple):
    """A tile of the result, rows by columns; how deep one step of the product is; warps; steps under way at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# bfloat16: two warpgroups; at three or four stages the tiles take 100 to 200 KB of the 227 KB of shared memory, the
# more where x is float32. Few rows: narrow tiles, so that there are programs for all multiprocessors.
WIDE_BLOCKS = Blocks(128, 256, 64, 8, 3)
SQUARE_BLOCKS = Blocks(128, 128, 64, 8, 4)
FEW_ROWS_BLOCKS = Blocks(64, 64, 64, 4, 4)
# float32 stays float32: no matrix unit, so what counts is that the accumulator fits the registers.
FLOAT32_BLOCKS = Blocks(64, 64, 32, 4, 2)
FEW_ROWS = 1024
WIDE_COLUMNS = 2048
# So many tiles of rows go together through all columns: their x and one column of weights stay in the L2 cache.
ROWS_TOGETHER = 8


@triton.jit
def _product(
    x_ptr, factor_ptr, w_ptr, y_ptr, rows, columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_E)
    program = tl.program_id(0)
    band = program // (TOGETHER * column_tiles) * TOGETHER
    height = tl.minimum(row_tiles - band, TOGETHER)
    within = program % (TOGETHER * column_tiles)
    row = (band + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // height * BLOCK_E + tl.arange(0, BLOCK_E)
    row_there = row < rows
    column_there = column < columns
    feature = tl.arange(0, BLOCK_D)
    x_at = x_ptr + row.to(tl.int64)[:, None] * D + feature[None, :]
    w_at = w_ptr + feature.to(tl.int64)[:, None] * columns + column[None, :]

    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        there = feature < D - start
        x = tl.load(x_at, mask=row_there[:, None] & there[None, :], other=0.0)
        w = tl.load(w_at, mask=there[:, None] & column_there[None, :], other=0.0)
        total = tl.dot(x.to(w.dtype), w, total, input_precision=PRECISION)
        x_at += BLOCK_D
        w_at += BLOCK_D * columns
    factor = tl.load(factor_ptr + row, mask=row_there, other=0.0)
    y = total * factor[:, None]
    y_at = y_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=row_there[:, None] & column_there[None, :])


def blocks_of(rows: int, columns: int, dtype: torch.dtype) -> Blocks:
    """The tiles for a product with that many rows and columns in ``dtype``."""
    if dtype == torch.float32:
        return FLOAT32_BLOCKS
    if rows < FEW_ROWS:
        return FEW_ROWS_BLOCKS
    return WIDE_BLOCKS if columns >= WIDE_COLUMNS else SQUARE_BLOCKS


def norm_linear_forward(
    scale: Tensor, weight: Tensor, x: Tensor, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor]:
    """scale [D], weight [D, E], x [M, D] -> y [M, E] in ``dtype``, factors 1 / rms [M] in float32."""
    (rows, features), columns = x.shape, weight.shape[1]
    x = x.contiguous()
    factor = norm.rms_factors(x, eps)
    y = torch.empty(rows, columns, dtype=dtype, device=x.device)
    if y.numel():
        scaled = (scale.float().unsqueeze(-1) * weight).to(dtype).contiguous()
        tile = blocks_of(rows, columns, dtype)
        with on_device(x):
            _product[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
                x, factor, scaled, y, rows, columns,
                D=features, BLOCK_M=tile.rows, BLOCK_E=tile.columns, BLOCK_D=tile.depth,
                TOGETHER=ROWS_TOGETHER, PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return y, factor


def norm_linear_backward(
    scale: Tensor, weight: Tensor, x: Tensor, factor: Tensor, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scale, weight and x, each in its dtype, from dy [M, E] in the product's dtype."""
    scale, group = scale.unsqueeze(0), x.unsqueeze(0)
    normed = norm.rms_norm_forward(scale, group, eps)[0].squeeze(0)
    dweight = (normed.to(dy.dtype).mT @ dy).to(weight.dtype)
    dnormed = dy @ weight.to(dy.dtype).mT
    dscale, dx = norm.rms_norm_backward(scale, group, factor.unsqueeze(0), dnormed.unsqueeze(0))
    return dscale.squeeze(0), dweight, dx.squeeze(0)
