"""Writing chunks into small memories, backward: one chunk, and the shares of the one before it.

Letters, formulas and who launches it: memory_small_backward.py. Rows of dropped writes are zeros in all that it reads
of ``trace_kernel`` and in X and E, so products need no masks.

A product that feeds another is laid out by Triton (3.6) with all warps along its rows, of which there are too few:
every number is then held twice. So what leaves one product for another goes through device memory, which it has to be
stored in anyway, or is subtracted: an added product would become the accumulator of the next.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import dot, sum_of_partials
from titanfunc_kernels.order import overlap


@triton.jit
def _state(
    dw_in, ds_in, w_in, s_in, c_w, c_s, da, da_in, dw_out, ds_out, da_out, narrow_w, narrow_s, tile, beta, f, decay,
    fresh, older, c, LAST: tl.constexpr,
):  # fmt: skip
    """dW and dS of a block of the state before chunk c, stored, and rounded as factors unless LAST, from those of the
    state after it; and the block's shares of dbeta, df and dm, a row each. da: what the chunk gives its anchor, which
    ``older`` (later) chunks had as well."""
    dw, ds = tl.load(dw_in + tile), tl.load(ds_in + tile)
    w, s = tl.load(w_in + tile).to(tl.float32), tl.load(s_in + tile).to(tl.float32)
    by_beta, by_f, by_m = tl.sum(dw * w, 1), tl.sum(dw * s, 1), tl.sum(ds * s, 1)
    new_w = beta * dw + tl.load(c_w + tile).to(tl.float32)
    new_s = f * dw + decay * ds + tl.load(c_s + tile).to(tl.float32)
    if older:
        da += tl.load(da_in + tile)
    tl.debug_barrier()  # every thread has read what is overwritten here
    if fresh:
        new_w += da
    if (not fresh) | (c == 0):
        tl.store(da_out + tile, tl.where(fresh, 0.0, da))
    tl.store(dw_out + tile, new_w)
    tl.store(ds_out + tile, new_s)
    if not LAST:
        tl.store(narrow_w + tile, new_w.to(narrow_w.dtype.element_ty))
        tl.store(narrow_s + tile, new_s.to(narrow_s.dtype.element_ty))
    return by_beta, by_f, by_m


@triton.jit(do_not_specialize=["c"])
def pull_kernel(
    dw1_in, dw2_in, ds1_in, ds2_in, da1_in, da2_in, a2_in, g_in, n_in, beta_in, f_in, m_in, refresh_in,
    index_in, w1_past, w2_past, s1_past, s2_past, x1_in, x2_in, delta2_in,
    c_w1, c_w2, c_s1, c_s2, c_x2, c_e1,
    d_w1, d_w2, d_s1, d_s2, d_a1, d_a2, d_v, d_lr, d_g, d_n, d_beta, d_f, d_m,
    slope_in, bend_in, e1_in, e2_in, narrow_e2, dy_in, by_clip_in, scalars, dw1_all, ds1_all, dz_all, square_all,
    dw2_own, ds2_own, t1_own, narrow_t1, square_own, shares_in, sums_in,
    c, N, FIRST_ORDER: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Turns the cotangents dw_in, ds_in of the state after chunk c into those before it, unless FIRST (there is no such
    chunk); then leaves the shares of chunk c - 1, unless LAST. Shares of chunk c are in the half c % 2 of theirs, the
    state's cotangents as factors of products in dw1_all, ds1_all of the chunk before and in dw2_own, ds2_own."""
    SIZE: tl.constexpr = D * F
    memories = tl.num_programs(0) // P
    p = tl.program_id(0) % P
    m = (tl.program_id(0) // P).to(tl.int64)
    j = p * FB
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]  # of a [C, D]
    tile1 = j + dims[None, :] * F + cols[:, None]  # this program's block of a [D, F], transposed to [FB, D]
    tile1t = j + dims[:, None] * F + cols[None, :]  # the same as [D, FB]
    tile2 = j * D + cols[:, None] * D + dims[None, :]  # of a [F, D]
    hidden = j + rows[:, None] * F + cols[None, :]  # of a [C, F]
    hiddent = j + cols[:, None] + rows[None, :] * F  # the same as [FB, C]
    product = x1_in.dtype.element_ty
    own, past = m * SIZE, m * N * SIZE
    before = (m * N + c - 1) * SIZE
    if FIRST:
        overlap(OVERLAP)
        tl.store(dw1_all + before + tile1, tl.load(dw1_in + own + tile1).to(product))
        tl.store(ds1_all + before + tile1, tl.load(ds1_in + own + tile1).to(product))
        tl.store(dw2_own + own + tile2, tl.load(dw2_in + own + tile2).to(product))
        tl.store(ds2_own + own + tile2, tl.load(ds2_in + own + tile2).to(product))
    else:
        chunk = m * N + c
        here = chunk * SIZE
        beta, f, decay = tl.load(beta_in + chunk), tl.load(f_in + chunk), tl.load(m_in + chunk)
        fresh = tl.load(refresh_in + chunk) > 0
        older = c + 1 == N
        if c + 1 < N:
            older = tl.load(refresh_in + chunk + 1) == 0
        tokens, token, features = chunk * C + rows, chunk * (C * D), chunk * (C * F)
        half = c % 2 * memories + m
        # None of this was made by the launch before.
        g, n = tl.load(g_in + tokens), tl.load(n_in + tokens)
        rate, own_rate = tl.load(scalars + tokens * 7), tl.load(scalars + tokens * 7 + 3)
        if not FIRST_ORDER:
            dy = tl.load(dy_in + token + by_token)
            by_clip = tl.load(by_clip_in + token + by_token)
            delta2 = tl.load(delta2_in + token + by_token)
            at = tl.load(index_in + chunk).to(tl.int64)
            anchor2 = tl.load(tl.where(at >= 0, w2_past + past + at * SIZE, a2_in + own) + tile2)
        overlap(OVERLAP)
        along_w = sum_of_partials(sums_in + half * (4 * P * C) + rows, 2 * C, 2 * P)
        along_s = sum_of_partials(sums_in + half * (4 * P * C) + C + rows, 2 * C, 2 * P)
        d_rate = own_rate - g * along_w - n * along_s
        d_square = -d_rate * tl.load(scalars + tokens * 7 + 2)
        if p == 0:
            tl.store(d_g + tokens, -rate * along_w)
            tl.store(d_n + tokens, -rate * along_s)
            tl.store(d_lr + tokens, d_rate * tl.load(scalars + tokens * 7 + 1))
            tl.store(square_all + tokens, d_square)
        tl.store(square_own + tl.program_id(0) * C + rows, d_square)
        da1, da2 = tl.zeros((FB, D), tl.float32), tl.zeros((FB, D), tl.float32)
        if not FIRST_ORDER:
            shared = sum_of_partials(shares_in + half * (P * C * D) + by_token, C * D, P)
            dy += (2 * rate)[:, None] * shared + d_square[:, None] * by_clip
            if p == 0:
                tl.store(d_v + token + by_token, (-dy).to(product))
            dy = dy.to(product)
            by_norm = (-d_square * tl.load(scalars + tokens * 7 + 4))[:, None]
            by_norm = (by_norm * tl.load(narrow_e2 + token + by_token).to(tl.float32)).to(product)
            turned = tl.trans(delta2)
            by_w = dot(tl.load(dw2_own + own + tile2), turned)
            by_s = dot(tl.load(ds2_own + own + tile2), turned)
            h = tl.load(x2_in + features + hiddent)
            slope, e1 = tl.load(slope_in + features + hiddent), tl.load(e1_in + features + hiddent)
            dh = dot(anchor2.to(product), tl.trans(dy)) - (g[None, :] * by_w + n[None, :] * by_s)
            dh += tl.load(c_x2 + features + hiddent).to(tl.float32)
            tl.debug_barrier()  # d_square and dz are read back, in the layout that they are needed in
            d_square = tl.load(square_own + tl.program_id(0) * C + rows)
            dh += (d_square * tl.load(scalars + tokens * 7 + 5))[None, :] * h.to(tl.float32)
            de1 = rate[None, :] * tl.load(t1_own + half * (C * F) + hiddent)
            de1 += (d_square * tl.load(scalars + tokens * 7 + 4))[None, :] * e1.to(tl.float32)
            dz = dh * slope.to(tl.float32) + de1 * tl.load(bend_in + features + hiddent).to(tl.float32)
            tl.store(dz_all + features + hiddent, dz.to(product))
            by_t = dot(tl.load(narrow_t1 + half * (C * F) + hiddent), delta2)
            da2 = dot(h, dy) - (0.0 - by_t)
            da2 -= dot((e1.to(tl.float32) * slope.to(tl.float32)).to(product), by_norm)
            tl.debug_barrier()
            da1 = dot(tl.load(dz_all + features + hiddent), tl.load(x1_in + token + by_token))
        elif p == 0:
            tl.store(d_v + token + by_token, tl.zeros((C, D), tl.float32).to(product))
        beta2, f2, m2 = _state(
            dw2_in + own, ds2_in + own, w2_past + here, s2_past + here, c_w2 + here, c_s2 + here, da2, da2_in + own,
            d_w2 + own, d_s2 + own, d_a2 + own, dw2_own + own, ds2_own + own, tile2, beta, f, decay, fresh, older, c,
            LAST,
        )  # fmt: skip
        beta1, f1, m1 = _state(
            dw1_in + own, ds1_in + own, w1_past + here, s1_past + here, c_w1 + here, c_s1 + here, da1, da1_in + own,
            d_w1 + own, d_s1 + own, d_a1 + own, dw1_all + before, ds1_all + before, tile1, beta, f, decay, fresh,
            older, c, LAST,
        )  # fmt: skip
        tl.store(d_beta + chunk * F + j + cols, beta1 + beta2)
        tl.store(d_f + chunk * F + j + cols, f1 + f2)
        tl.store(d_m + chunk * F + j + cols, m1 + m2)
    if not LAST:
        tl.debug_barrier()  # the factors are read back
        chunk = m * N + c - 1
        tokens, token, features = chunk * C + rows, chunk * (C * D), chunk * (C * F)
        half = (c + 1) % 2 * memories + m
        e2 = tl.load(e2_in + token + by_token)
        x1, x2 = tl.load(x1_in + token + by_token), tl.load(x2_in + features + hidden)
        by_w, by_s = dot(x2, tl.load(dw2_own + own + tile2)), dot(x2, tl.load(ds2_own + own + tile2))
        place = sums_in + (half * P + p) * (4 * C) + rows
        tl.store(place, tl.sum(by_w * e2, 1))
        tl.store(place + C, tl.sum(by_s * e2, 1))
        g, n = tl.load(g_in + tokens)[:, None], tl.load(n_in + tokens)[:, None]
        shared = g * by_w + n * by_s
        by_w, by_s = dot(x1, tl.load(dw1_all + before + tile1t)), dot(x1, tl.load(ds1_all + before + tile1t))
        e1 = tl.load(e1_in + features + hidden).to(tl.float32)
        tl.store(place + 2 * C, tl.sum(by_w * e1, 1))
        tl.store(place + 3 * C, tl.sum(by_s * e1, 1))
        if not FIRST_ORDER:
            at = tl.load(index_in + chunk).to(tl.int64)
            a2 = tl.where(at >= 0, w2_past + past + at * SIZE, a2_in + own)
            t1 = tl.load(c_e1 + features + hidden).to(tl.float32) - g * by_w - n * by_s
            tl.store(t1_own + half * (C * F) + hidden, t1)
            t1 *= tl.load(slope_in + features + hidden).to(tl.float32)
            tl.store(narrow_t1 + half * (C * F) + hidden, t1.to(product))
            shared = dot(t1.to(product), tl.load(a2 + tile2).to(product)) - shared
            tl.store(shares_in + (half * P + p) * (C * D) + by_token, shared)
