"""Writing chunks into small memories: what the derivative takes from all chunks at once, before and after its scan.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, FB features of a block, P = F / FB.
Formulas: memory_small_backward.py. Every program here has a chunk of a memory and takes the blocks one by one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import dot, finite_rows, gate_of, slope_of


@triton.jit
def trace_kernel(
    a1_in, a2_in, k_in, v_in, lr_in, index_in, w1_past, w2_past, z_out, back_out, e2_out, through_out, scalars,
    N, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A chunk's tokens through its anchor and back: z and b = e2 A2^T [M, N, C, F] and V = (e1 o silu'(z)) A2
    [M, N, C, D] in k's type, e2 [M, N, C, D]; and |k|^2, |h|^2, |e1|^2, |e2|^2 and whether it is kept,
    [M, N, C, 5]. Rows that are not finite count as zeros."""
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
    k, v, lr = tl.load(k_in + by_token), tl.load(v_in + by_token), tl.load(lr_in + tokens)
    usable = finite_rows(k, v, lr)
    k, v = tl.where(usable[:, None], k, 0.0).to(product), tl.where(usable[:, None], v, 0.0).to(tl.float32)
    y, hh = tl.zeros((C, D), tl.float32), tl.zeros((C,), tl.float32)
    for b in range(P):
        z = dot(k, tl.load(a1 + b * FB + dims[:, None] * F + cols[None, :]).to(product)).to(product)
        tl.store(z_out + hidden + b * FB, z)
        h = z.to(tl.float32) * gate_of(z.to(tl.float32))
        hh += tl.sum(h * h, 1)
        y += dot(h.to(product), tl.load(a2 + b * FB * D + cols[:, None] * D + dims[None, :]).to(product))
    tl.debug_barrier()  # z is read back
    e2 = 2 * (y - v)
    narrow = e2.to(product)
    through, ee1 = tl.zeros((C, D), tl.float32), tl.zeros((C,), tl.float32)
    for b in range(P):
        slope = slope_of(tl.load(z_out + hidden + b * FB).to(tl.float32))
        anchor = tl.load(a2 + b * FB * D + cols[:, None] * D + dims[None, :]).to(product)
        back = dot(narrow, tl.load(a2 + b * FB * D + cols[None, :] * D + dims[:, None]).to(product))
        tl.store(back_out + hidden + b * FB, back.to(product))
        e1 = back * slope
        ee1 += tl.sum(e1 * e1, 1)
        through += dot((e1 * slope).to(product), anchor)
    kk, ee2 = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1), tl.sum(e2 * e2, 1)
    keep = usable & (kk * ee1 + hh * ee2 < float("inf"))
    tl.store(e2_out + by_token, e2)
    tl.store(through_out + by_token, through)
    tl.store(scalars + tokens * 5, kk)
    tl.store(scalars + tokens * 5 + 1, hh)
    tl.store(scalars + tokens * 5 + 2, ee1)
    tl.store(scalars + tokens * 5 + 3, ee2)
    tl.store(scalars + tokens * 5 + 4, keep.to(tl.float32))


@triton.jit
def keys_kernel(
    a1_in, k_in, g_in, n_in, index_in, w1_past, delta_in, dw_in, ds_in, dz_in, dx_in, square_in, scalars, d_k,
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
    product = k_in.dtype.element_ty
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
    keep = tl.load(scalars + tokens * 5 + 4) > 0
    factor = tl.load(square_in + tokens) * tl.where(keep, tl.load(scalars + tokens * 5 + 2), 0.0)
    kept = keep[:, None]
    k = tl.where(kept, tl.load(k_in + by_token), 0.0).to(tl.float32)
    dk += tl.load(dx_in + by_token).to(tl.float32) + factor[:, None] * k
    tl.store(d_k + by_token, tl.where(kept, dk, 0.0).to(product))
