"""The memory write scan with all of a memory's chunks in one launch: memories of one matrix, forward and backward.

Letters: M memories, N chunks, C tokens a chunk, D head size. With A [D, D] the anchor, a chunk is

    e = 2 (k A - v)    |g|^2 = |k|^2 |e|^2    rate = theta min(1, clip / |g|)    E = rate e
    W' = beta W + f S - k^T (g E)    S' = m S - k^T (n E)

and its derivative, from the cotangents dW', dS' of the state after it, dE and dX of its rows and dl of its loss:

    dE -= g (k dW') + n (k dS')    dX -= (g E) dW'^T + (n E) dS'^T    dg = - (k dW') . E    dn = - (k dS') . E
    drate = dE . e    dtheta = drate min(1, clip / |g|)    dq = - drate rate / |g|^2 where the clip bites, else 0
    dz = 2 (rate dE + dq |k|^2 e) + 2 (k A - v) dl    dA += k^T dz    dv = - dz    dk = dX + dq |e|^2 k + dz A^T
    dS = f dW' + m dS' + its own    dW = beta dW' + its own + dA where the chunk took its start as anchor

One program a memory, its columns of W in blocks. See memory_small.py for the order of stores and loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import dot, finite_rows, write_rate


@triton.jit
def forward_kernel(
    w_in, s_in, a_in, k_in, v_in, lr_in, g_in, n_in, beta_in, f_in, m_in, refresh_in,
    w_past, s_past, w_last, s_last, a_last, x_out, e_out, loss_out, kept_out, a_start,
    N, clip, CLIP: tl.constexpr, NP: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    FB: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program a memory: forward of every chunk; pointers as in ``memory_small.forward``."""
    SIZE: tl.constexpr = D * D
    m = tl.program_id(0).to(tl.int64)
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]
    turned = dims[:, None] + rows[None, :] * D
    columns = rows[:, None] * D + cols[None, :]
    tile = dims[:, None] * D + cols[None, :]
    product = k_in.dtype.element_ty
    chunks = tl.arange(0, NP)
    refreshes = tl.load(refresh_in + m * N + chunks, mask=chunks < N, other=0.0)
    last = tl.max(tl.where(refreshes > 0, chunks, -1), 0)
    own, past = m * SIZE, m * N * SIZE
    for b in range(BLOCKS):
        i = tile + b * FB
        w, s, a = tl.load(w_in + own + i), tl.load(s_in + own + i), tl.load(a_in + own + i)
        tl.store(w_past + past + i, w)
        tl.store(s_past + past + i, s)
        tl.store(w_last + own + i, w)
        tl.store(s_last + own + i, s)
        tl.store(a_start + own + i, a)
        if last < 0:
            tl.store(a_last + own + i, a)
    tl.debug_barrier()  # the state is read back below
    at = tl.full((), -1, tl.int32)
    for c in range(N):
        chunk = m * N + c
        at = tl.where(tl.load(refresh_in + chunk) > 0, c, at)
        anchor = tl.where(at >= 0, w_past + past + at.to(tl.int64) * SIZE, a_start + own)
        tokens, token = chunk * C + rows, chunk * C * D
        k, v, lr = tl.load(k_in + token + by_token), tl.load(v_in + token + by_token), tl.load(lr_in + tokens)
        kt = tl.load(k_in + token + turned)
        g, n = tl.load(g_in + tokens), tl.load(n_in + tokens)
        beta, f, decay = tl.load(beta_in + chunk), tl.load(f_in + chunk), tl.load(m_in + chunk)
        usable = finite_rows(k, v, lr)
        k, lr = tl.where(usable[:, None], k, 0.0).to(product), tl.where(usable, lr, 0.0)
        loss = tl.zeros((C,), tl.float32)
        r = tl.zeros((C, FB), tl.float32)
        for b in range(BLOCKS):
            target = tl.load(v_in + token + b * FB + columns).to(tl.float32)
            r = dot(k, tl.load(anchor + b * FB + tile).to(product)) - tl.where(usable[:, None], target, 0.0)
            loss += tl.sum(r * r, 1)
        square = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1) * (4 * loss)
        keep = usable & (square < float("inf"))
        rate = write_rate(square, keep, lr, clip, CLIP)[1]
        kept = keep[:, None]
        tl.store(x_out + token + by_token, tl.where(kept, k, 0.0).to(product))
        tl.store(loss_out + tokens, loss)
        tl.store(kept_out + tokens, keep.to(tl.float32))
        kt = tl.where(keep[None, :], kt, 0.0).to(product)
        for b in range(BLOCKS):
            i = tile + b * FB
            if BLOCKS > 1:
                target = tl.load(v_in + token + b * FB + columns).to(tl.float32)
                r = dot(k, tl.load(anchor + i).to(product)) - tl.where(usable[:, None], target, 0.0)
            e = (tl.where(kept, 2 * r, 0.0) * rate[:, None]).to(product)
            tl.store(e_out + token + b * FB + columns, e)
            e = e.to(tl.float32)
            w, s = tl.load(w_last + own + i), tl.load(s_last + own + i)
            if c == last:
                tl.store(a_last + own + i, w)
            w_next = beta * w + f * s - dot(kt, (g[:, None] * e).to(product))
            s_next = decay * s - dot(kt, (n[:, None] * e).to(product))
            if c + 1 < N:
                tl.store(w_past + (chunk + 1) * SIZE + i, w_next)
                tl.store(s_past + (chunk + 1) * SIZE + i, s_next)
            tl.store(w_last + own + i, w_next)
            tl.store(s_last + own + i, s_next)
        tl.debug_barrier()  # the state just written is the next chunk's


@triton.jit
def backward_kernel(
    a_in, k_in, v_in, lr_in, g_in, n_in, beta_in, f_in, m_in, refresh_in, w_past, s_past,
    c_w, c_s, c_w_last, c_s_last, c_a, c_x, c_e, c_loss,
    d_w, d_s, d_a, d_k, d_v, d_lr, d_g, d_n, d_beta, d_f, d_m, a_start, q_w, q_s,
    N, clip, CLIP: tl.constexpr, FIRST_ORDER: tl.constexpr, NP: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    FB: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program a memory: backward of every chunk from the last; as ``memory_small_backward.backward``."""
    SIZE: tl.constexpr = D * D
    m = tl.program_id(0).to(tl.int64)
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]
    turned = dims[:, None] + rows[None, :] * D
    columns = rows[:, None] * D + cols[None, :]
    tile = dims[:, None] * D + cols[None, :]
    tilet = dims[None, :] * D + cols[:, None]
    product = k_in.dtype.element_ty
    chunks = tl.arange(0, NP)
    refreshes = tl.load(refresh_in + m * N + chunks, mask=chunks < N, other=0.0)
    own, past = m * SIZE, m * N * SIZE
    for b in range(BLOCKS):
        i = tile + b * FB
        w, s = tl.load(c_w_last + own + i), tl.load(c_s_last + own + i)
        tl.store(d_w + own + i, w)
        tl.store(d_s + own + i, s)
        tl.store(q_w + 2 * own + i, w.to(product))
        tl.store(q_s + 2 * own + i, s.to(product))
        tl.store(d_a + own + i, tl.load(c_a + own + i))
        tl.store(a_start + own + i, tl.load(a_in + own + i))
    tl.debug_barrier()  # read below by other threads
    for step in range(N):
        c = N - 1 - step
        chunk = m * N + c
        at = tl.max(tl.where((refreshes > 0) & (chunks <= c), chunks, -1), 0)
        anchor = tl.where(at >= 0, w_past + past + at.to(tl.int64) * SIZE, a_start + own)
        now, after = 2 * own + (step % 2) * SIZE, 2 * own + ((step + 1) % 2) * SIZE
        tokens, token = chunk * C + rows, chunk * C * D
        k, v, lr = tl.load(k_in + token + by_token), tl.load(v_in + token + by_token), tl.load(lr_in + tokens)
        kt = tl.load(k_in + token + turned)
        g, n, loss = tl.load(g_in + tokens), tl.load(n_in + tokens), tl.load(c_loss + tokens)
        beta, f, decay = tl.load(beta_in + chunk), tl.load(f_in + chunk), tl.load(m_in + chunk)
        fresh = tl.load(refresh_in + chunk)
        usable = finite_rows(k, v, lr)
        k, lr = tl.where(usable[:, None], k, 0.0).to(product), tl.where(usable, lr, 0.0)
        rr, along_own = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        along_w, along_s = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        for b in range(BLOCKS):
            i = tile + b * FB
            target = tl.load(v_in + token + b * FB + columns).to(tl.float32)
            r = dot(k, tl.load(anchor + i).to(product)) - tl.where(usable[:, None], target, 0.0)
            rr += tl.sum(r * r, 1)
            along_own += tl.sum(tl.load(c_e + token + b * FB + columns).to(tl.float32) * (2 * r), 1)
            along_w += tl.sum(dot(k, tl.load(q_w + now + i)) * (2 * r), 1)
            along_s += tl.sum(dot(k, tl.load(q_s + now + i)) * (2 * r), 1)
        kk = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        square = kk * (4 * rr)
        keep = usable & (square < float("inf"))
        kept = keep[:, None]
        factor, rate = write_rate(square, keep, lr, clip, CLIP)
        d_rate = tl.where(keep, along_own - g * along_w - n * along_s, 0.0)
        tl.store(d_g + tokens, tl.where(keep, -rate * along_w, 0.0))
        tl.store(d_n + tokens, tl.where(keep, -rate * along_s, 0.0))
        tl.store(d_lr + tokens, d_rate * factor)
        d_square = tl.zeros((C,), tl.float32)
        if CLIP:
            clipped = keep & (square > clip * clip)
            d_square = tl.where(clipped, -d_rate * rate / tl.where(clipped, square, 1.0), 0.0)
        dk = tl.zeros((C, D), tl.float32)
        if not FIRST_ORDER:
            dk = tl.load(c_x + token + by_token).to(tl.float32) + (d_square * (4 * rr))[:, None] * k.to(tl.float32)
        kt = tl.where(keep[None, :], kt, 0.0).to(product)
        sum_beta, sum_f = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        sum_m = tl.full((), 0.0, tl.float32)
        for b in range(BLOCKS):
            i, it = tile + b * FB, tilet + b * FB
            da = tl.load(d_a + own + i)
            if FIRST_ORDER:
                tl.store(d_v + token + b * FB + columns, tl.zeros((C, FB), tl.float32).to(product))
            else:
                target = tl.load(v_in + token + b * FB + columns).to(tl.float32)
                r = dot(k, tl.load(anchor + i).to(product)) - tl.where(usable[:, None], target, 0.0)
                r = tl.where(kept, r, 0.0)
                de = tl.load(c_e + token + b * FB + columns).to(tl.float32)
                de -= g[:, None] * dot(k, tl.load(q_w + now + i)) + n[:, None] * dot(k, tl.load(q_s + now + i))
                de = rate[:, None] * de + (d_square * kk)[:, None] * (2 * r)
                dz = tl.where(kept, 2 * de + 2 * r * loss[:, None], 0.0)
                tl.store(d_v + token + b * FB + columns, (-dz).to(product))
                dz = dz.to(product)
                da += dot(kt, dz)
                dk += dot(dz, tl.load(anchor + it).to(product))
                dk -= dot(((2 * g * rate)[:, None] * r).to(product), tl.load(q_w + now + it))
                dk -= dot(((2 * n * rate)[:, None] * r).to(product), tl.load(q_s + now + it))
            here = chunk * SIZE
            dw, ds = tl.load(d_w + own + i), tl.load(d_s + own + i)
            w, s = tl.load(w_past + here + i).to(tl.float32), tl.load(s_past + here + i).to(tl.float32)
            sum_beta += tl.sum(dw * w)
            sum_f += tl.sum(dw * s)
            sum_m += tl.sum(ds * s)
            s_next = f * dw + decay * ds + tl.load(c_s + here + i).to(tl.float32)
            w_next = beta * dw + fresh * da + tl.load(c_w + here + i).to(tl.float32)
            tl.store(d_a + own + i, (1 - fresh) * da)
            tl.store(d_w + own + i, w_next)
            tl.store(d_s + own + i, s_next)
            tl.store(q_w + after + i, w_next.to(product))
            tl.store(q_s + after + i, s_next.to(product))
        tl.store(d_k + token + by_token, tl.where(kept, dk, 0.0).to(product))
        tl.store(d_beta + chunk, sum_beta)
        tl.store(d_f + chunk, sum_f)
        tl.store(d_m + chunk, sum_m)
        tl.debug_barrier()  # the cotangents just written are read in the next turn
