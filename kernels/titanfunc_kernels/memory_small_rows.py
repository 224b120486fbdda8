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
    a1_in, a2_in, k_in, v_in, lr_in, kept_in, index_in, w1_past, w2_past, c_e1, c_e2, c_loss, slope_out, bend_out,
    e1_out, e2_out, narrow_e2, dy_out, by_clip_out, scalars, N, clip, CLIP: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A chunk's tokens through its anchor and back, and what no cotangent of a state enters; zeros for those whose
    write was dropped.

    slope: silu'(z), bend: b o silu''(z), e1 = b o silu'(z) [M, N, C, F] in k's type, for b = e2 A2^T; e2 [M, N, C, D]
    in float32 and in k's type. dy: 2 rate dE_2 + e2 dl, by_clip: 2 (|h|^2 e2 + |k|^2 (e1 o silu') A2) [M, N, C, D].
    scalars [M, N, C, 7]: the rate, the clip's factor, rate / q where the clip bites and else 0, sum_l <dE_l, e_l>,
    |k|^2, |e2|^2, |e1|^2.
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
    k, v = tl.load(k_in + by_token), tl.load(v_in + by_token)
    k, v = tl.where(kept, k, 0.0).to(product), tl.where(kept, v, 0.0).to(tl.float32)
    y, hh = tl.zeros((C, D), tl.float32), tl.zeros((C,), tl.float32)
    for b in range(P):
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
    own = tl.sum(given * e2, 1)
    for b in range(P):
        slope = tl.load(slope_out + hidden + b * FB).to(tl.float32)
        bend = tl.load(bend_out + hidden + b * FB).to(tl.float32)
        anchor = tl.load(a2 + b * FB * D + cols[:, None] * D + dims[None, :]).to(product)
        back = dot(narrow, tl.load(a2 + b * FB * D + cols[None, :] * D + dims[:, None]).to(product))
        e1 = back * slope
        own += tl.sum(tl.where(kept, tl.load(c_e1 + hidden + b * FB).to(tl.float32), 0.0) * e1, 1)
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
    tl.store(e2_out + by_token, e2)
    tl.store(narrow_e2 + by_token, narrow)
    tl.store(dy_out + by_token, (2 * rate)[:, None] * given + loss[:, None] * e2)
    tl.store(by_clip_out + by_token, 2 * (hh[:, None] * e2 + kk[:, None] * through))
    tl.store(scalars + tokens * 7, rate)
    tl.store(scalars + tokens * 7 + 1, tl.where(keep, factor, 0.0))
    tl.store(scalars + tokens * 7 + 2, bite)
    tl.store(scalars + tokens * 7 + 3, own)
    tl.store(scalars + tokens * 7 + 4, kk)
    tl.store(scalars + tokens * 7 + 5, ee2)
    tl.store(scalars + tokens * 7 + 6, ee1)


@triton.jit
def keys_kernel(
    a1_in, x_in, g_in, n_in, index_in, w1_past, delta_in, dw_in, ds_in, dz_in, dx_in, square_in, scalars, kept_in, d_k,
    N, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The keys' gradient, dX_1 + dq |e1|^2 k + dz A1^T - (g E_1) dW1'^T - (n E_1) dS1'^T, zero for a dropped write."""
    SIZE: tl.constexpr = D * F
    chunk = tl.program_id(0).to(tl.int64)
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    tokens = chunk * C + rows
    by_token = chunk * C * D + rows[:, None] * D + dims[None, :]
    hidden = chunk * (C * F) + rows[:, None] * F + cols[None, :]
    turned = dims[None, :] * F + cols[:, None]  # a block of a [D, F], transposed
    product = x_in.dtype.element_ty
    m = chunk // N
    at = tl.load(index_in + chunk).to(tl.int64)
    a1 = tl.where(at >= 0, w1_past + (m * N + at) * SIZE, a1_in + m * SIZE)
    g, n = tl.load(g_in + tokens)[:, None], tl.load(n_in + tokens)[:, None]
    dk = tl.zeros((C, D), tl.float32)
    for b in range(P):
        delta = tl.load(delta_in + hidden + b * FB).to(tl.float32)
        dk += dot(tl.load(dz_in + hidden + b * FB), tl.load(a1 + b * FB + turned).to(product))
        dk += dot((-g * delta).to(product), tl.load(dw_in + chunk * SIZE + b * FB + turned))
        dk += dot((-n * delta).to(product), tl.load(ds_in + chunk * SIZE + b * FB + turned))
    factor = tl.load(square_in + tokens) * tl.load(scalars + tokens * 7 + 6)
    dk += tl.load(dx_in + by_token).to(tl.float32) + factor[:, None] * tl.load(x_in + by_token).to(tl.float32)
    kept = tl.load(kept_in + tokens)[:, None] > 0
    tl.store(d_k + by_token, tl.where(kept, dk, 0.0).to(product))
