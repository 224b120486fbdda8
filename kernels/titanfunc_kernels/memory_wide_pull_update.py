"""The derivative of a chunk's update of wide memories: cotangents of the state after it become those of its start.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, a layer's weights [DI, DO]; formulas and
who launches what: memory_wide_backward.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import overlap
from titanfunc_kernels.memory_wide_rows import dot
from titanfunc_kernels.memory_wide_state import load_state, store_state


@triton.jit
def _outer(a, b, acc, rows, cols, C, DI, DO, BC: tl.constexpr):
    """acc + A^T B for rows A [C, DI], read transposed, and B [C, DO]."""
    for start in range(0, C, BC):
        tokens = start + tl.arange(0, BC)
        at = tl.load(
            a + rows[:, None] + tokens[None, :] * DI, mask=(rows[:, None] < DI) & (tokens[None, :] < C), other=0.0
        )
        bt = tl.load(
            b + tokens[:, None] * DO + cols[None, :], mask=(tokens[:, None] < C) & (cols[None, :] < DO), other=0.0
        )
        acc = dot(at, bt, acc)
    return acc


@triton.jit
def _pull_tile(
    d_w_last, d_s_last, w_high, s_high, w_low, s_low, dw, ds, da, w_past, s_past, d_w_past, d_s_past,
    q, a, b, a_also, b_also, beta, f, momentum, refresh, part, tile, slot, tiles, m, c, N, C, DI, DO,
    FIRST: tl.constexpr, LAST: tl.constexpr, FULL: tl.constexpr, TWO: tl.constexpr, READS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile of one layer: the cotangents of the state after chunk c become those of the state at its start.

    d_w_past, d_s_past: what reads add to those, [M, N, DI, DO]; with READS they are this chunk's rows [C, DO], which
    add Q^T times themselves for rows q [C, DI].
    """
    wide = tl.cdiv(DO, BN)
    rows, cols = (tile // wide) * BM + tl.arange(0, BM), (tile % wide) * BN + tl.arange(0, BN)
    held = (rows[:, None] < DI) & (cols[None, :] < DO)
    inside = rows[:, None] * DO + cols[None, :]
    at = m.to(tl.int64) * DI * DO + inside
    past = (m.to(tl.int64) * N + c) * DI * DO + inside
    if FIRST:
        by_w = tl.load(d_w_last + at, mask=held, other=0.0)
        by_s = tl.load(d_s_last + at, mask=held, other=0.0)
    else:
        by_w = load_state(w_high, w_low, at, at, held)
        by_s = load_state(s_high, s_low, at, at, held)
    w = tl.load(w_past + past, mask=held, other=0.0).to(tl.float32)
    s = tl.load(s_past + past, mask=held, other=0.0).to(tl.float32)
    place = part + ((m * 3).to(tl.int64) * N + c) * tiles + slot
    tl.store(place, tl.sum(by_w * w))
    tl.store(place + N * tiles, tl.sum(by_w * s))
    tl.store(place + 2 * N * tiles, tl.sum(by_s * s))
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if FULL:
        acc = _outer(a, b, acc, rows, cols, C, DI, DO, BC)
        if TWO:
            acc = _outer(a_also, b_also, acc, rows, cols, C, DI, DO, BC)
    older = FIRST | (tl.load(refresh + m * N + tl.minimum(c + 1, N - 1)) == 0)
    acc += tl.load(da + at, mask=held & older, other=0.0)
    own = tl.load(refresh + m * N + c) > 0
    if (c == 0) | (own == 0):
        tl.store(da + at, tl.where(own, 0.0, acc), mask=held)
    chunk = m * N + c
    d_w = tl.load(beta + chunk) * by_w + tl.where(own, acc, 0.0)
    d_s = tl.load(f + chunk) * by_w + tl.load(momentum + chunk) * by_s
    if READS:
        d_w += _outer(q, d_w_past, tl.zeros((BM, BN), dtype=tl.float32), rows, cols, C, DI, DO, BC)
        d_s += _outer(q, d_s_past, tl.zeros((BM, BN), dtype=tl.float32), rows, cols, C, DI, DO, BC)
    else:
        d_w += tl.load(d_w_past + past, mask=held, other=0.0).to(tl.float32)
        d_s += tl.load(d_s_past + past, mask=held, other=0.0).to(tl.float32)
    if LAST:
        tl.store(dw + at, d_w, mask=held)
        tl.store(ds + at, d_s, mask=held)
    else:
        store_state(w_high, w_low, at, at, d_w, held)
        store_state(s_high, s_low, at, at, d_s, held)


@triton.jit(do_not_specialize=["c"])
def pull_update_kernel(
    dw1_last, ds1_last, w1_high, s1_high, w1_low, s1_low, dw1, ds1, da1, w1_past, s1_past, d_w1_past, d_s1_past, x1, q1,
    dw2_last, ds2_last, w2_high, s2_high, w2_low, s2_low, dw2, ds2, da2, w2_past, s2_past, d_w2_past, d_s2_past, x2, q2,
    d_z, d_y, u, e, beta, f, momentum, refresh, part, c, N, C, D, F, tiles1, tiles,
    DEPTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, FULL: tl.constexpr, READS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every tile of every layer of every memory, in alternating order (see memory_wide.py)."""
    overlap(OVERLAP)
    turn = tl.program_id(0)
    if c % 2 == 1:
        turn = tl.num_programs(0) - 1 - turn
    m, tile = turn // tiles, turn % tiles
    chunk = (m.to(tl.int64) * N + c) * C
    own = m.to(tl.int64) * C
    q1 += chunk * D
    q2 += chunk * F
    if READS:
        d_w1_past += chunk * F
        d_s1_past += chunk * F
        d_w2_past += chunk * D
        d_s2_past += chunk * D
    if DEPTH == 1:
        _pull_tile(
            dw1_last, ds1_last, w1_high, s1_high, w1_low, s1_low, dw1, ds1, da1, w1_past, s1_past, d_w1_past, d_s1_past,
            q1, x1 + chunk * D, d_z + chunk * D, x1, d_z, beta, f, momentum, refresh,
            part, tile, tile, tiles, m, c, N, C, D, D, FIRST, LAST, FULL, False, READS, BM, BN, BC,
        )  # fmt: skip
    else:
        if tile < tiles1:
            _pull_tile(
                dw1_last, ds1_last, w1_high, s1_high, w1_low, s1_low, dw1, ds1, da1, w1_past, s1_past, d_w1_past,
                d_s1_past, q1, x1 + chunk * D, d_z + chunk * F, x1, d_z, beta, f, momentum, refresh,
                part, tile, tile, tiles, m, c, N, C, D, F, FIRST, LAST, FULL, False, READS, BM, BN, BC,
            )  # fmt: skip
        else:
            _pull_tile(
                dw2_last, ds2_last, w2_high, s2_high, w2_low, s2_low, dw2, ds2, da2, w2_past, s2_past, d_w2_past,
                d_s2_past, q2, x2 + chunk * F, d_y + own * D, u + own * F, e + chunk * D, beta, f, momentum, refresh,
                part, tile - tiles1, tile, tiles, m, c, N, C, F, D, FIRST, LAST, FULL, True, READS, BM, BN, BC,
            )  # fmt: skip
