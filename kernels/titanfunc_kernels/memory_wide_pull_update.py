"""The derivative of a chunk's update of wide memories: cotangents of the state after it become those of its start.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, a layer's weights [DI, DO]; formulas and
who launches what: memory_wide_backward.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_wide_rows import below
from titanfunc_kernels.memory_wide_state import add_outer, load_state, outer, store_state
from titanfunc_kernels.order import overlap


@triton.jit
def _pull_tile(
    d_w_last, d_s_last, w_high, s_high, w_low, s_low, dw, ds, da, w_past, s_past, d_w_past, d_s_past,
    q, a, b, a_also, b_also, beta, f, momentum, refresh, part, tile, slot, tiles, m, c, N, C,
    DI: tl.constexpr, DO: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, FULL: tl.constexpr, TWO: tl.constexpr,
    READS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of one layer: the cotangents of the state after chunk c become those of the state at its start, first
    the momentum's; dW is loaded twice, so that few tiles are live beside a sum.

    d_w_past, d_s_past: what reads add to those, [M, N, DI, DO]; with READS they are this chunk's rows [C, DO], which
    add Q^T times themselves for rows q [C, DI].
    """
    wide = tl.cdiv(DO, BN)
    rows, cols = (tile // wide) * BM + tl.arange(0, BM), (tile % wide) * BN + tl.arange(0, BN)
    here, there = below(rows, DI, DI % BM == 0), below(cols, DO, DO % BN == 0)
    held = here[:, None] & there[None, :]
    at = rows[:, None] * DO + cols[None, :]
    own, past = m.to(tl.int64) * DI * DO, (m.to(tl.int64) * N + c) * DI * DO
    chunk = m * N + c
    older = FIRST | (tl.load(refresh + m * N + tl.minimum(c + 1, N - 1)) == 0)
    fresh = tl.load(refresh + chunk) > 0
    keep_w, carry, keep_s = tl.load(beta + chunk), tl.load(f + chunk), tl.load(momentum + chunk)
    place = part + ((m * 3).to(tl.int64) * N + c) * tiles + slot
    if FIRST:
        by_w, by_s = (
            tl.load(d_w_last + own + at, mask=held, other=0.0),
            tl.load(d_s_last + own + at, mask=held, other=0.0),
        )
    else:
        by_w, by_s = load_state(w_high + own, w_low + own, at, held), load_state(s_high + own, s_low + own, at, held)
    s = tl.load(s_past + past + at, mask=held, other=0.0).to(tl.float32)
    tl.store(place + N * tiles, tl.sum(by_w * s))
    tl.store(place + 2 * N * tiles, tl.sum(by_s * s))
    d_s = carry * by_w + keep_s * by_s
    if READS:
        d_s += outer(q, d_s_past, rows, here, cols, there, C, DI, DO, BM, BN, BC, WHOLE)
    else:
        d_s += tl.load(d_s_past + past + at, mask=held, other=0.0).to(tl.float32)
    if LAST:
        tl.store(ds + own + at, d_s, mask=held)
    else:
        store_state(s_high + own, s_low + own, at, d_s, held)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if FULL:
        acc = add_outer(acc, a, b, rows, here, cols, there, C, DI, DO, BC, WHOLE)
        if TWO:
            acc = add_outer(acc, a_also, b_also, rows, here, cols, there, C, DI, DO, BC, WHOLE)
    if older:
        acc += tl.load(da + own + at, mask=held, other=0.0)
    if LAST | (fresh == 0):
        tl.store(da + own + at, tl.where(fresh, 0.0, acc), mask=held)
        acc = tl.where(fresh, acc, 0.0)
    if READS:
        acc = add_outer(acc, q, d_w_past, rows, here, cols, there, C, DI, DO, BC, WHOLE)
    else:
        acc += tl.load(d_w_past + past + at, mask=held, other=0.0).to(tl.float32)
    if FIRST:
        by_w = tl.load(d_w_last + own + at, mask=held, other=0.0)
    else:
        by_w = load_state(w_high + own, w_low + own, at, held)
    tl.store(place, tl.sum(by_w * tl.load(w_past + past + at, mask=held, other=0.0).to(tl.float32)))
    d_w = keep_w * by_w + acc
    if LAST:
        tl.store(dw + own + at, d_w, mask=held)
    else:
        store_state(w_high + own, w_low + own, at, d_w, held)


@triton.jit(do_not_specialize=["c"])
def pull_update_kernel(
    dw1_last, ds1_last, w1_high, s1_high, w1_low, s1_low, dw1, ds1, da1, w1_past, s1_past, d_w1_past, d_s1_past, x1, q1,
    dw2_last, ds2_last, w2_high, s2_high, w2_low, s2_low, dw2, ds2, da2, w2_past, s2_past, d_w2_past, d_s2_past, x2, q2,
    d_z, d_y, u, e, beta, f, momentum, refresh, part, c, N, C, D: tl.constexpr, F: tl.constexpr, tiles1, tiles,
    DEPTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, FULL: tl.constexpr, READS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
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
            part, tile, tile, tiles, m, c, N, C, D, D, FIRST, LAST, FULL, False, READS, BM, BN, BC, WHOLE,
        )  # fmt: skip
    else:
        if tile < tiles1:
            _pull_tile(
                dw1_last, ds1_last, w1_high, s1_high, w1_low, s1_low, dw1, ds1, da1, w1_past, s1_past, d_w1_past,
                d_s1_past, q1, x1 + chunk * D, d_z + chunk * F, x1, d_z, beta, f, momentum, refresh,
                part, tile, tile, tiles, m, c, N, C, D, F, FIRST, LAST, FULL, False, READS, BM, BN, BC, WHOLE,
            )  # fmt: skip
        else:
            _pull_tile(
                dw2_last, ds2_last, w2_high, s2_high, w2_low, s2_low, dw2, ds2, da2, w2_past, s2_past, d_w2_past,
                d_s2_past, q2, x2 + chunk * F, d_y + own * D, u + own * F, e + chunk * D, beta, f, momentum, refresh,
                part, tile - tiles1, tile, tiles, m, c, N, C, F, D, FIRST, LAST, FULL, True, READS, BM, BN, BC, WHOLE,
            )  # fmt: skip
