"""Writing chunks into small memories, backward: all chunks, from the last to the first, in one launch.

Letters, formulas and who launches it: memory_small_backward.py. Rows of dropped writes are zeros in all that
``trace_kernel`` made, so products need no masks.

What Triton (3.6) makes of it decides the time, of which products take little. It lays out what a product needs once
per product, recomputing all that leads there; and it moves every operand of a sum with a product through shared
memory, into the product's layout. So dy goes through device memory, and every product has C or D rows, of which four
warps hold none twice.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import dot, sum_of_partials
from titanfunc_kernels.order import meet


@triton.jit(do_not_specialize=["N"])
def pull_kernel(
    dw1_in, dw2_in, ds1_in, ds2_in, da1_in, da2_in, a2_in, beta_in, f_in, m_in, refresh_in, index_in, w2_past,
    x1_in, x2_in, c_w1, c_w2, c_s1, c_s2, c_x2, c_e1,
    d_w1, d_w2, d_s1, d_s2, d_a1, d_a2, d_v, rate_all,
    gx1_in, nx1_in, gx2_in, nx2_in, ge2_in, ne2_in, slope_in, bend_in, e1_in, e2_in, base_in, by_clip_in, scalars,
    dw1_all, ds1_all, dw2_all, ds2_all, dz_all, dy_own, shares_in, sums_in, counters,
    N, FIRST_ORDER: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Turns the cotangents dw_in, ds_in of the state after the last chunk into those before the first; P programs a
    memory, which wait for each other once a chunk."""
    SIZE: tl.constexpr = D * F
    memories = tl.num_programs(0) // P
    p = tl.program_id(0) % P
    m = (tl.program_id(0) // P).to(tl.int64)
    j = p * FB
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]  # of a [C, D]
    tile1 = j + dims[:, None] * F + cols[None, :]  # this program's block [D, FB] of a [D, F]
    tile2 = j * D + cols[None, :] * D + dims[:, None]  # of a [F, D], transposed to [D, FB]
    hidden = j + rows[:, None] * F + cols[None, :]  # of a [C, F]
    product = x1_in.dtype.element_ty
    own, past = m * SIZE, m * N * SIZE
    dw1, ds1 = tl.load(dw1_in + own + tile1), tl.load(ds1_in + own + tile1)
    dw2, ds2 = tl.load(dw2_in + own + tile2), tl.load(ds2_in + own + tile2)
    tl.store(d_a1 + own + tile1, tl.load(da1_in + own + tile1))
    tl.store(d_a2 + own + tile2, tl.load(da2_in + own + tile2))
    for i in range(N):
        c = N - 1 - i
        chunk = m * N + c
        here = chunk * SIZE
        tokens, token, features = chunk * C + rows, chunk * (C * D), chunk * (C * F)
        half = i % 2 * memories + m
        beta, f, decay = tl.load(beta_in + chunk), tl.load(f_in + chunk), tl.load(m_in + chunk)
        fresh = tl.load(refresh_in + chunk) > 0
        older = i == 0  # whether later chunks had the same anchor
        if i > 0:
            older = tl.load(refresh_in + chunk + 1) == 0
        at = tl.load(index_in + chunk).to(tl.int64)
        a2 = tl.load(tl.where(at >= 0, w2_past + past + at * SIZE, a2_in + own) + tile2).to(product)
        narrow1, narrow_s1, narrow2, narrow_s2 = dw1.to(product), ds1.to(product), dw2.to(product), ds2.to(product)
        tl.store(dw1_all + here + tile1, narrow1)
        tl.store(ds1_all + here + tile1, narrow_s1)
        tl.store(dw2_all + here + tile2, narrow2)
        tl.store(ds2_all + here + tile2, narrow_s2)
        # This program's share of T_2 and T A_2 (its own rows' gradients left out), and of sum_l <T_l, e_l>
        shared = dot(tl.load(gx2_in + features + hidden), tl.trans(narrow2))
        shared += dot(tl.load(nx2_in + features + hidden), tl.trans(narrow_s2))
        t1 = dot(tl.load(gx1_in + token + by_token), narrow1) + dot(tl.load(nx1_in + token + by_token), narrow_s1)
        t1 += tl.load(c_e1 + features + hidden).to(tl.float32)
        place = sums_in + (half * P + p) * (2 * C) + rows
        tl.store(place, tl.sum(shared * tl.load(e2_in + token + by_token).to(tl.float32), 1))
        tl.store(place + C, tl.sum(t1 * tl.load(e1_in + features + hidden).to(tl.float32), 1))
        if not FIRST_ORDER:
            through = (t1 * tl.load(slope_in + features + hidden).to(tl.float32)).to(product)
            shared += dot(through, tl.trans(a2))
            tl.store(shares_in + (half * P + p) * (C * D) + by_token, shared)
            dh = dot(tl.load(ge2_in + token + by_token), narrow2) + dot(tl.load(ne2_in + token + by_token), narrow_s2)
            dh += tl.load(c_x2 + features + hidden).to(tl.float32)
        # What else needs no other program
        new_s1 = f * dw1 + decay * ds1 + tl.load(c_s1 + here + tile1).to(tl.float32)
        new_s2 = f * dw2 + decay * ds2 + tl.load(c_s2 + here + tile2).to(tl.float32)
        new_w1 = beta * dw1 + tl.load(c_w1 + here + tile1).to(tl.float32)
        new_w2 = beta * dw2 + tl.load(c_w2 + here + tile2).to(tl.float32)
        if P > 1:
            meet(counters + m, (i + 1) * P)
        else:
            tl.debug_barrier()
        d_rate = tl.load(scalars + tokens * 7 + 3) + sum_of_partials(sums_in + half * (2 * P * C) + rows, C, 2 * P)
        d_square = -d_rate * tl.load(scalars + tokens * 7 + 2)
        if p == 0:
            tl.store(rate_all + tokens, d_rate)
        if not FIRST_ORDER:
            rate = tl.load(scalars + tokens * 7)
            dy = sum_of_partials(shares_in + half * (P * C * D) + by_token, C * D, P)
            dy = tl.load(base_in + token + by_token) + (2 * rate)[:, None] * dy
            dy += d_square[:, None] * tl.load(by_clip_in + token + by_token)
            if p == 0:
                tl.store(d_v + token + by_token, (-dy).to(product))
            mine = dy_own + (m * P + p) * (C * D) + by_token
            tl.store(mine, dy.to(product))
            tl.debug_barrier()
            dy = tl.load(mine)
            h, e1 = tl.load(x2_in + features + hidden), tl.load(e1_in + features + hidden).to(tl.float32)
            slope = tl.load(slope_in + features + hidden).to(tl.float32)
            dh += dot(dy, a2) + (d_square * tl.load(scalars + tokens * 7 + 5))[:, None] * h.to(tl.float32)
            de1 = rate[:, None] * t1 + (d_square * tl.load(scalars + tokens * 7 + 4))[:, None] * e1
            dz = (dh * slope + de1 * tl.load(bend_in + features + hidden).to(tl.float32)).to(product)
            tl.store(dz_all + features + hidden, dz)
            da2 = dot(tl.trans(tl.load(e2_in + token + by_token)), (de1 * slope).to(product))
            da2 += dot(tl.trans(dy), h)
            da1 = dot(tl.trans(tl.load(x1_in + token + by_token)), dz)
        else:
            da1, da2 = tl.zeros((D, FB), tl.float32), tl.zeros((D, FB), tl.float32)
        if older:
            da1 += tl.load(d_a1 + own + tile1)
            da2 += tl.load(d_a2 + own + tile2)
            tl.debug_barrier()  # every thread has read what is overwritten here
        if fresh:
            new_w1 += da1
            new_w2 += da2
        if (not fresh) | (c == 0):
            tl.store(d_a1 + own + tile1, tl.where(fresh, 0.0, da1))
            tl.store(d_a2 + own + tile2, tl.where(fresh, 0.0, da2))
            tl.debug_barrier()
        dw1, dw2, ds1, ds2 = new_w1, new_w2, new_s1, new_s2
    tl.store(d_w1 + own + tile1, dw1)
    tl.store(d_s1 + own + tile1, ds1)
    tl.store(d_w2 + own + tile2, dw2)
    tl.store(d_s2 + own + tile2, ds2)
