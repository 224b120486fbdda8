"""Tiles of batched matrices and ordered sums, for the single write.

Letters: M memories; tiles of BM rows and BN columns, taken in steps of BK along the contracted axis.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter would multiply bfloat16 numbers as the whole numbers that their bits spell.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def place(index, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    """Memory, tile within it, first row and first column of the tile ``index`` of [M, rows, cols]."""
    across = tl.cdiv(cols, BN)
    tiles = tl.cdiv(rows, BM) * across
    tile = index % tiles
    return (index // tiles).to(tl.int64), tile, (tile // across) * BM, (tile % across) * BN


@triton.jit
def product(
    a, b, rows, cols, inner, a_row, a_inner, b_inner, b_col, row, col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The tile at (row, col) of a [rows, inner] times b [inner, cols], given by their strides; zero outside.

    EVEN: ``inner`` is a multiple of BK.
    """
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    i = tl.arange(0, BK)
    a += row.to(tl.int64) * a_row
    b += col.to(tl.int64) * b_col
    # Within a tile offsets are small; what grows with the matrix is added to the pointer itself.
    a_at = r[:, None] * a_row + i[None, :] * a_inner
    b_at = i[:, None] * b_inner + c[None, :] * b_col
    a_inside = (r < rows - row)[:, None]
    b_inside = (c < cols - col)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        x_inside, y_inside = a_inside, b_inside
        if not EVEN:
            x_inside = a_inside & (i < inner - start)[None, :]
            y_inside = b_inside & (i < inner - start)[:, None]
        x = tl.load(a + a_at, mask=x_inside, other=0.0)
        y = tl.load(b + b_at, mask=y_inside, other=0.0)
        y = y.to(x.dtype)
        if INTERPRETED:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision="ieee")
        a += BK * a_inner
        b += BK * b_inner
    return total


@triton.jit
def offsets(row, col, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    """Offsets into [rows, cols] of the tile at (row, col), and which of them are inside."""
    r = row + tl.arange(0, BM)
    c = col + tl.arange(0, BN)
    return r.to(tl.int64)[:, None] * cols + c[None, :], (r < rows)[:, None] & (c < cols)[None, :]


@triton.jit
def read_tile(x, row, col, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    """The tile at (row, col) of x [rows, cols]; zero outside."""
    at, inside = offsets(row, col, rows, cols, BM, BN)
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns. A product's tile has both in each thread: nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def total_of(values, count, SIZE: tl.constexpr):
    """The sum of ``count`` partial sums. Past the first-level cache: other multiprocessors have just written them."""
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, count, SIZE):
        i = start + tl.arange(0, SIZE)
        total += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)
