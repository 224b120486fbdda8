"""Writing chunks into small memories, backward: one chunk, and the shares of the one before it.

Letters, formulas and who launches it: memory_small_backward.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import dot, gate_of, slope_of, sum_of_partials, write_rate
from titanfunc_kernels.order import overlap


@triton.jit
def _gates(scalars, lr_in, tokens, clip, CLIP: tl.constexpr):
    """|k|^2, |h|^2 and |e2|^2 of kept writes, which those are, |g|^2, the clip's factor and the rate; [C]."""
    kk, hh = tl.load(scalars + tokens * 5), tl.load(scalars + tokens * 5 + 1)
    ee1, ee2 = tl.load(scalars + tokens * 5 + 2), tl.load(scalars + tokens * 5 + 3)
    keep = tl.load(scalars + tokens * 5 + 4) > 0
    square = kk * ee1 + hh * ee2
    factor, rate = write_rate(square, keep, tl.load(lr_in + tokens), clip, CLIP)
    return tl.where(keep, kk, 0.0), tl.where(keep, hh, 0.0), tl.where(keep, ee2, 0.0), keep, square, factor, rate


@triton.jit
def _state(
    dw_in, ds_in, w_in, s_in, c_w, c_s, da, da_in, dw_out, ds_out, da_out, tile, beta, f, decay, fresh, older, c
):  # fmt: skip
    """dW and dS of a block of the state before chunk c, stored, from those of the state after it; and the block's
    shares of dbeta, df and dm. da: what the chunk gives its anchor, which ``older`` (later) chunks had as well."""
    dw, ds = tl.load(dw_in + tile), tl.load(ds_in + tile)
    w, s = tl.load(w_in + tile).to(tl.float32), tl.load(s_in + tile).to(tl.float32)
    new_w = beta * dw + tl.load(c_w + tile).to(tl.float32)
    new_s = f * dw + decay * ds + tl.load(c_s + tile).to(tl.float32)
    by_beta, by_f, by_m = tl.sum(dw * w), tl.sum(dw * s), tl.sum(ds * s)
    if older:
        da += tl.load(da_in + tile)
    tl.debug_barrier()  # every thread has read what is overwritten here
    if fresh:
        new_w += da
    if (not fresh) | (c == 0):
        tl.store(da_out + tile, tl.where(fresh, 0.0, da))
    tl.store(dw_out + tile, new_w)
    tl.store(ds_out + tile, new_s)
    return new_w, new_s, by_beta, by_f, by_m


@triton.jit(do_not_specialize=["c"])
def pull_kernel(
    dw1_in, dw2_in, ds1_in, ds2_in, da1_in, da2_in, a2_in, k_in, lr_in, g_in, n_in, beta_in, f_in, m_in, refresh_in,
    index_in, w1_past, w2_past, s1_past, s2_past, x2_in, delta2_in,
    c_w1, c_w2, c_s1, c_s2, c_x2, c_e1, c_e2, c_loss,
    d_w1, d_w2, d_s1, d_s2, d_a1, d_a2, d_v, d_lr, d_g, d_n, d_beta, d_f, d_m,
    z_in, back_in, e2_in, through_in, scalars, dw1_all, ds1_all, dz_all, square_all, t1_own, shares_in, sums_in,
    c, N, clip, CLIP: tl.constexpr, FIRST_ORDER: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Turns the cotangents dw_in, ds_in of the state after chunk c into those before it, unless FIRST (there is no such
    chunk); then leaves the shares of chunk c - 1, unless LAST. Shares of chunk c are in the half c % 2 of theirs."""
    SIZE: tl.constexpr = D * F
    memories = tl.num_programs(0) // P
    p = tl.program_id(0) % P
    m = (tl.program_id(0) // P).to(tl.int64)
    j = p * FB
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]  # of a [C, D]
    tile1 = j + dims[None, :] * F + cols[:, None]  # this program's block of a [D, F], transposed to [FB, D]
    tile2 = j * D + cols[:, None] * D + dims[None, :]  # of a [F, D]
    hidden = j + rows[:, None] * F + cols[None, :]  # of a [C, F]
    hiddent = j + cols[:, None] + rows[None, :] * F  # the same as [FB, C]
    product = k_in.dtype.element_ty
    own, past = m * SIZE, m * N * SIZE
    if FIRST:
        overlap(OVERLAP)
        dw1, ds1 = tl.load(dw1_in + own + tile1), tl.load(ds1_in + own + tile1)
        dw2, ds2 = tl.load(dw2_in + own + tile2), tl.load(ds2_in + own + tile2)
    else:
        chunk = m * N + c
        beta, f, decay = tl.load(beta_in + chunk), tl.load(f_in + chunk), tl.load(m_in + chunk)
        fresh = tl.load(refresh_in + chunk) > 0
        older = c + 1 == N
        if c + 1 < N:
            older = tl.load(refresh_in + chunk + 1) == 0
        tokens, token, features = chunk * C + rows, chunk * (C * D), chunk * (C * F)
        half = c % 2 * memories + m
        # None of this was made by the launch before.
        g, n, loss = tl.load(g_in + tokens), tl.load(n_in + tokens), tl.load(c_loss + tokens)
        kk, hh, ee2, keep, square, factor, rate = _gates(scalars, lr_in, tokens, clip, CLIP)
        kept = keep[:, None]
        e2 = tl.where(kept, tl.load(e2_in + token + by_token), 0.0)
        given2 = tl.load(c_e2 + token + by_token).to(tl.float32)
        if not FIRST_ORDER:
            through = tl.load(through_in + token + by_token)
            delta2 = tl.load(delta2_in + token + by_token)
            at = tl.load(index_in + chunk).to(tl.int64)
            anchor2 = tl.load(tl.where(at >= 0, w2_past + past + at * SIZE, a2_in + own) + tile2)
        overlap(OVERLAP)
        along_own = sum_of_partials(sums_in + half * (3 * P * C) + rows, 3 * C, P)
        along_w = sum_of_partials(sums_in + half * (3 * P * C) + C + rows, 3 * C, P)
        along_s = sum_of_partials(sums_in + half * (3 * P * C) + 2 * C + rows, 3 * C, P)
        d_rate = tl.where(keep, along_own + tl.sum(given2 * e2, 1) - g * along_w - n * along_s, 0.0)
        d_square = tl.zeros((C,), tl.float32)
        if CLIP:
            clipped = keep & (square > clip * clip)
            d_square = tl.where(clipped, -d_rate * rate / tl.where(clipped, square, 1.0), 0.0)
        if p == 0:
            tl.store(d_g + tokens, tl.where(keep, -rate * along_w, 0.0))
            tl.store(d_n + tokens, tl.where(keep, -rate * along_s, 0.0))
            tl.store(d_lr + tokens, d_rate * factor)
            tl.store(square_all + tokens, d_square)
        da1, da2 = tl.zeros((FB, D), tl.float32), tl.zeros((FB, D), tl.float32)
        if not FIRST_ORDER:
            de2 = given2 + sum_of_partials(shares_in + half * (P * C * D) + by_token, C * D, P)
            through = tl.where(kept, through.to(tl.float32), 0.0)
            de2 = rate[:, None] * de2 + (d_square * hh)[:, None] * e2 + (d_square * kk)[:, None] * through
            dy = tl.where(kept, 2 * de2, 0.0) + e2 * loss[:, None]
            if p == 0:
                tl.store(d_v + token + by_token, tl.where(kept, -dy, 0.0).to(product))
            dy = dy.to(product)
            delta2 = delta2.to(tl.float32)
            by_g, by_n = (-g[:, None] * delta2).to(product), (-n[:, None] * delta2).to(product)
            dh = dot(anchor2.to(product), tl.trans(dy))
            dh += dot(tl.load(dw2_in + own + tile2).to(product), tl.trans(by_g))
            dh += dot(tl.load(ds2_in + own + tile2).to(product), tl.trans(by_n))
            z = tl.load(z_in + features + hiddent).to(tl.float32)
            back = tl.load(back_in + features + hiddent).to(tl.float32)
            columns = keep[None, :]
            gate = gate_of(z)
            slope = tl.where(columns, gate * (1 + z * (1 - gate)), 0.0)
            h = tl.where(columns, z * gate, 0.0)
            dh += tl.load(c_x2 + features + hiddent).to(tl.float32) + (d_square * ee2)[None, :] * h
            de1 = rate[None, :] * tl.load(t1_own + half * (C * F) + hiddent)
            de1 = tl.where(columns, de1 + (d_square * kk)[None, :] * (back * slope), 0.0)
            dz = dh * slope + de1 * back * (gate * (1 - gate) * (2 + z * (1 - 2 * gate)))
            dz = tl.where(columns, dz, 0.0).to(product)
            tl.store(dz_all + features + hiddent, dz)
            da2 = dot((de1 * slope).to(product), e2.to(product))
            da2 += dot(h.to(product), dy)
            k = tl.where(kept, tl.load(k_in + token + by_token), 0.0).to(product)
            da1 = dot(dz, k)
        elif p == 0:
            tl.store(d_v + token + by_token, tl.zeros((C, D), tl.float32).to(product))
        here = chunk * SIZE
        dw2, ds2, beta2, f2, m2 = _state(
            dw2_in + own, ds2_in + own, w2_past + here, s2_past + here, c_w2 + here, c_s2 + here, da2, da2_in + own,
            d_w2 + own, d_s2 + own, d_a2 + own, tile2, beta, f, decay, fresh, older, c,
        )  # fmt: skip
        dw1, ds1, beta1, f1, m1 = _state(
            dw1_in + own, ds1_in + own, w1_past + here, s1_past + here, c_w1 + here, c_s1 + here, da1, da1_in + own,
            d_w1 + own, d_s1 + own, d_a1 + own, tile1, beta, f, decay, fresh, older, c,
        )  # fmt: skip
        tl.store(d_beta + chunk * P + p, beta1 + beta2)
        tl.store(d_f + chunk * P + p, f1 + f2)
        tl.store(d_m + chunk * P + p, m1 + m2)
    if not LAST:
        chunk = m * N + c - 1
        here = chunk * SIZE
        tokens, token, features = chunk * C + rows, chunk * (C * D), chunk * (C * F)
        half = (c + 1) % 2 * memories + m
        keep = tl.load(scalars + tokens * 5 + 4) > 0
        kept = keep[:, None]
        narrow1, narrow_s1, narrow2, narrow_s2 = dw1.to(product), ds1.to(product), dw2.to(product), ds2.to(product)
        x2 = tl.load(x2_in + features + hidden)
        k = tl.where(kept, tl.load(k_in + token + by_token), 0.0).to(product)
        e2 = tl.where(kept, tl.load(e2_in + token + by_token), 0.0)
        by_w, by_s = dot(x2, narrow2), dot(x2, narrow_s2)
        along_w, along_s = tl.sum(by_w * e2, 1), tl.sum(by_s * e2, 1)
        g, n = tl.load(g_in + tokens)[:, None], tl.load(n_in + tokens)[:, None]
        shared = -g * by_w - n * by_s
        by_w, by_s = dot(k, tl.trans(narrow1)), dot(k, tl.trans(narrow_s1))
        slope = tl.where(kept, slope_of(tl.load(z_in + features + hidden).to(tl.float32)), 0.0)
        e1 = tl.where(kept, tl.load(back_in + features + hidden).to(tl.float32), 0.0) * slope
        given = tl.load(c_e1 + features + hidden).to(tl.float32)
        place = sums_in + (half * P + p) * (3 * C) + rows
        tl.store(place, tl.sum(given * e1, 1))
        tl.store(place + C, along_w + tl.sum(by_w * e1, 1))
        tl.store(place + 2 * C, along_s + tl.sum(by_s * e1, 1))
        if not FIRST_ORDER:
            tl.store(dw1_all + here + tile1, narrow1)
            tl.store(ds1_all + here + tile1, narrow_s1)
            at = tl.load(index_in + chunk).to(tl.int64)
            a2 = tl.where(at >= 0, w2_past + past + at * SIZE, a2_in + own)
            t1 = given - g * by_w - n * by_s
            tl.store(t1_own + half * (C * F) + hidden, t1)
            shared += dot((t1 * slope).to(product), tl.load(a2 + tile2).to(product))
            tl.store(shares_in + (half * P + p) * (C * D) + by_token, shared)
