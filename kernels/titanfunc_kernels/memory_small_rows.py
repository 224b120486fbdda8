"""Writing chunks into small memories: what the derivative takes from all chunks at once, before and after its scan.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, FB features of a block, P = F / FB.
Formulas: memory_small_backward.py. Every program here has a chunk of a memory and takes the blocks one by one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import dot, gate_of, write_rate


@triton.jit
def trace_kernel(
    a1_in, a2_in, k_in, v_in, lr_in, g_in, n_in, kept_in, index_in, w1_past, w2_past, x2_in, delta2_in, c_e2, c_loss,
    slope_out, bend_out, e1_out, gx1_out, nx1_out, gx2_out, nx2_out, ge2_out, ne2_out, e2_out, base_out, by_clip_out,
    scalars, N, clip, CLIP: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A chunk's tokens through its anchor and back, and what no cotangent of a state enters; zeros for those whose
    write was dropped.

    slope: silu'(z), bend: b o silu''(z), e1 = b o silu'(z) [M, N, C, F], for b = e2 A2^T, and e2 [M, N, C, D], in k's
    type; so are X_l and E_2 times -g and -n. base: 2 rate dE_2 + e2 dl, by_clip: 2 (|h|^2 e2 + |k|^2 (e1 o silu') A2)
    [M, N, C, D]. scalars [M, N, C, 7]: the rate, the clip's factor, rate / q where the clip bites and else 0,
    <dE_2, e2>, |k|^2, |e2|^2, |e1|^2.
    """
    SIZE: tl.constexpr = D * F
    chunk = tl.program_id(0).to(tl.int64)
    m = chunk // N
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    tokens = chunk * C + rows
    by_token = chunk * C * D + rows[:, None] * D + dims[None, :]
    hidden = chunk * (C * F) + rows[:, None] * F + cols[None, :]
    product = k_in.dtype.element_ty
    at = tl.load(index_in + chunk).to(tl.int64)
    a1 = tl.where(at >= 0, w1_past + (m * N + at) * SIZE, a1_in + m * SIZE)
    a2 = tl.where(at >= 0, w2_past + (m * N + at) * SIZE, a2_in + m * SIZE)
    keep = tl.load(kept_in + tokens) > 0
    kept = keep[:, None]
    by_g, by_n = -tl.load(g_in + tokens)[:, None], -tl.load(n_in + tokens)[:, None]
    k, v = tl.load(k_in + by_token), tl.load(v_in + by_token)
    k, v = tl.where(kept, k, 0.0).to(product), tl.where(kept, v, 0.0).to(tl.float32)
    tl.store(gx1_out + by_token, (by_g * k.to(tl.float32)).to(product))
    tl.store(nx1_out + by_token, (by_n * k.to(tl.float32)).to(product))
    delta = tl.load(delta2_in + by_token).to(tl.float32)
    tl.store(ge2_out + by_token, (by_g * delta).to(product))
    tl.store(ne2_out + by_token, (by_n * delta).to(product))
    y, hh = tl.zeros((C, D), tl.float32), tl.zeros((C,), tl.float32)
    for b in range(P):
        x2 = tl.load(x2_in + hidden + b * FB).to(tl.float32)
        tl.store(gx2_out + hidden + b * FB, (by_g * x2).to(product))
        tl.store(nx2_out + hidden + b * FB, (by_n * x2).to(product))
        z = dot(k, tl.load(a1 + b * FB + dims[:, None] * F + cols[None, :]).to(product)).to(product).to(tl.float32)
        gate = gate_of(z)
        h = z * gate
        tl.store(slope_out + hidden + b * FB, tl.where(kept, gate + h * (1 - gate), 0.0).to(product))
        bend = gate * (1 - gate) * (2 + z * (1 - 2 * gate))
        tl.store(bend_out + hidden + b * FB, tl.where(kept, bend, 0.0).to(product))
        hh += tl.sum(h * h, 1)
        y += dot(h.to(product), tl.load(a2 + b * FB * D + cols[:, None] * D + dims[None, :]).to(product))
    tl.debug_barrier()  # the slopes are read back
    e2 = tl.where(kept, 2 * (y - v), 0.0)
    narrow = e2.to(product)
    through, ee1 = tl.zeros((C, D), tl.float32), tl.zeros((C,), tl.float32)
    given = tl.where(kept, tl.load(c_e2 + by_token).to(tl.float32), 0.0)
    for b in range(P):
        slope = tl.load(slope_out + hidden + b * FB).to(tl.float32)
        bend = tl.load(bend_out + hidden + b * FB).to(tl.float32)
        anchor = tl.load(a2 + b * FB * D + cols[:, None] * D + dims[None, :]).to(product)
        back = dot(narrow, tl.load(a2 + b * FB * D + cols[None, :] * D + dims[:, None]).to(product))
        e1 = back * slope
        tl.store(e1_out + hidden + b * FB, e1.to(product))
        tl.store(bend_out + hidden + b * FB, (back * bend).to(product))
        ee1 += tl.sum(e1 * e1, 1)
        through += dot((e1 * slope).to(product), anchor)
    kk, ee2 = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1), tl.sum(e2 * e2, 1)
    square = kk * ee1 + hh * ee2
    factor, rate = write_rate(square, keep, tl.load(lr_in + tokens), clip, CLIP)
    bite = tl.zeros((C,), tl.float32)
    if CLIP:
        clipped = keep & (square > clip * clip)
        bite = tl.where(clipped, rate / tl.where(clipped, square, 1.0), 0.0)
    loss = tl.where(keep, tl.load(c_loss + tokens), 0.0)
    tl.store(e2_out + by_token, narrow)
    tl.store(base_out + by_token, (2 * rate)[:, None] * given + loss[:, None] * e2)
    tl.store(by_clip_out + by_token, 2 * (hh[:, None] * e2 + kk[:, None] * through))
    tl.store(scalars + tokens * 7, rate)
    tl.store(scalars + tokens * 7 + 1, tl.where(keep, factor, 0.0))
    tl.store(scalars + tokens * 7 + 2, bite)
    tl.store(scalars + tokens * 7 + 3, tl.sum(given * e2, 1))
    tl.store(scalars + tokens * 7 + 4, kk)
    tl.store(scalars + tokens * 7 + 5, ee2)
    tl.store(scalars + tokens * 7 + 6, ee1)


@triton.jit
def _alongside(dw_in, ds_in, w_in, s_in, tile):
    """A block of dW' and dS', in their type, and its shares of <dW', W>, <dW', S> and <dS', S>, a row each."""
    dw, ds = tl.load(dw_in + tile), tl.load(ds_in + tile)
    w, s = tl.load(w_in + tile).to(tl.float32), tl.load(s_in + tile).to(tl.float32)
    wide, wide_s = dw.to(tl.float32), ds.to(tl.float32)
    return dw, ds, tl.sum(wide * w, 1), tl.sum(wide * s, 1), tl.sum(wide_s * s, 1)


@triton.jit
def keys_kernel(
    a1_in, g_in, n_in, index_in, w1_past, w2_past, s1_past, s2_past, x1_in, x2_in, delta1_in, delta2_in,
    dw1_in, ds1_in, dw2_in, ds2_in, dz_in, dx_in, rate_in, scalars, kept_in,
    d_k, d_lr, d_g, d_n, d_beta, d_f, d_m, N, FIRST_ORDER: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """From drate [M, N, C] and what the scan left of every chunk: the gradients of keys (dX_1 + dq |e1|^2 k + dz A1^T
    - (g E_1) dW1'^T - (n E_1) dS1'^T), of theta, g and n, zero for a dropped write, and of beta, f and m."""
    SIZE: tl.constexpr = D * F
    chunk = tl.program_id(0).to(tl.int64)
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    tokens = chunk * C + rows
    by_token = chunk * C * D + rows[:, None] * D + dims[None, :]
    hidden = chunk * (C * F) + rows[:, None] * F + cols[None, :]
    turned = dims[None, :] * F + cols[:, None]  # a block of a [D, F], transposed to [FB, D]
    turned2 = cols[None, :] * D + dims[:, None]  # of a [F, D], transposed to [D, FB]
    product = x1_in.dtype.element_ty
    m, here = chunk // N, chunk * SIZE
    at = tl.load(index_in + chunk).to(tl.int64)
    a1 = tl.where(at >= 0, w1_past + (m * N + at) * SIZE, a1_in + m * SIZE)
    delta2 = tl.load(delta2_in + by_token)
    by_w, by_s, dk = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
    along_w, along_s = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    beta, f, decay = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    beta1, f1, decay1 = tl.zeros((FB,), tl.float32), tl.zeros((FB,), tl.float32), tl.zeros((FB,), tl.float32)
    for b in range(P):
        first, second = here + b * FB, here + b * FB * D
        delta = tl.load(delta1_in + hidden + b * FB)
        dw, ds, of_beta, of_f, of_m = _alongside(
            dw1_in + first, ds1_in + first, w1_past + first, s1_past + first, turned
        )  # fmt: skip
        beta1, f1, decay1 = beta1 + of_beta, f1 + of_f, decay1 + of_m
        by_w += dot(delta, dw)
        by_s += dot(delta, ds)
        dw, ds, of_beta, of_f, of_m = _alongside(
            dw2_in + second, ds2_in + second, w2_past + second, s2_past + second, turned2
        )  # fmt: skip
        beta, f, decay = beta + of_beta, f + of_f, decay + of_m
        x2 = tl.load(x2_in + hidden + b * FB).to(tl.float32)
        along_w += tl.sum(dot(delta2, dw) * x2, 1)
        along_s += tl.sum(dot(delta2, ds) * x2, 1)
        if not FIRST_ORDER:
            dk += dot(tl.load(dz_in + hidden + b * FB), tl.load(a1 + b * FB + turned).to(product))
    tl.store(d_beta + chunk, tl.sum(beta, 0) + tl.sum(beta1, 0))
    tl.store(d_f + chunk, tl.sum(f, 0) + tl.sum(f1, 0))
    tl.store(d_m + chunk, tl.sum(decay, 0) + tl.sum(decay1, 0))
    k = tl.load(x1_in + by_token).to(tl.float32)
    d_rate = tl.load(rate_in + tokens)
    tl.store(d_g + tokens, -along_w - tl.sum(by_w * k, 1))
    tl.store(d_n + tokens, -along_s - tl.sum(by_s * k, 1))
    tl.store(d_lr + tokens, d_rate * tl.load(scalars + tokens * 7 + 1))
    if not FIRST_ORDER:
        g, n = tl.load(g_in + tokens)[:, None], tl.load(n_in + tokens)[:, None]
        by_clip = d_rate * tl.load(scalars + tokens * 7 + 2) * tl.load(scalars + tokens * 7 + 6)
        dk += tl.load(dx_in + by_token).to(tl.float32) - by_clip[:, None] * k - g * by_w - n * by_s
        kept = tl.load(kept_in + tokens)[:, None] > 0
        tl.store(d_k + by_token, tl.where(kept, dk, 0.0).to(product))
