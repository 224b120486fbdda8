"""The memory write scan with all of a memory's chunks in one launch: backward of memory_small.py.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, P programs a memory. Chunks run from the
last; each recomputes z, h, e1, e2, q = |g|^2 and the rate from the state at its start. From the cotangents dW_l', dS_l'
of the state after it, dX_l, dE_l of its rows and dl of its loss (o: elementwise, <,>: summed over a row):

    dE_l -= g (X_l dW_l') + n (X_l dS_l')                     dX_l -= (g E_l) dW_l'^T + (n E_l) dS_l'^T
    dg = - sum_l <X_l dW_l', E_l>                             dn = - sum_l <X_l dS_l', E_l>
    drate = sum_l <dE_l, e_l>                                 dtheta = drate min(1, clip / |g|)
    dq = - drate rate / q where the clip bites, else 0        (half of the derivative by |g|^2)
    de_l = rate dE_l + dq |x_l|^2 e_l                         dX_l += dq |e_l|^2 x_l

    back through e1 = b o silu'(z), b = e2 A2^T:
    t = de1 o silu'(z)                                        de2 += t A2       dA2 = t^T e2
    back through e2 = 2 (y - v), loss = |y - v|^2:
    dy = 2 de2 + 2 (y - v) dl                                 dv = - dy
    back through y = h A2, h = silu(z), z = k A1:
    dA2 += h^T dy      dh = dX_2 + dy A2^T                    dz = dh o silu'(z) + de1 o b o silu''(z)
    dA1 = k^T dz       dk = dX_1 + dz A1^T

    dbeta = sum <dW', W>    df = sum <dW', S>    dm = sum <dS', S>
    dS = f dW' + m dS' + its own
    dW = beta dW' + its own + (dA and older dA, where the chunk took its start as anchor)

All of it is zero for a dropped write. With first_order only dg, dn, dtheta and the last three lines are left.

What is summed over hidden features (y, |h|^2 and the X_2 products; the row sums of layer 1; t A2) goes between the P
programs three times a chunk; dk and the sums of the last lines leave as one partial a program, summed in torch. dW and
dS are rounded once a chunk to the products' type in memory of their own, two chunks of it by turns, where each product
finds them straight or transposed (see memory_small.py for why).
What a turn needs more than once (z, b, dE_1, then de1) lies in memory in between; and a block's loads stand before its
first product, since the barriers that products bring hold back the loads behind them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels import memory_small_linear as linear
from titanfunc_kernels.launch import on_device
from titanfunc_kernels.memory_small import Scan
from titanfunc_kernels.memory_small_common import (
    Blocks,
    blocks_of,
    dot,
    finite_rows,
    meet,
    refuse,
    sum_of_partials,
    write_rate,
)


@triton.jit
def _backward(
    a1_in, a2_in, k_in, v_in, lr_in, g_in, n_in, beta_in, f_in, m_in, refresh_in,
    w1_past, w2_past, s1_past, s2_past, x2_in,
    c_w1, c_w2, c_s1, c_s2, c_w1_last, c_w2_last, c_s1_last, c_s2_last, c_a1, c_a2, c_x1, c_x2, c_e1, c_e2, c_loss,
    d_w1, d_w2, d_s1, d_s2, d_a1, d_a2, d_k, d_v, d_lr, d_g, d_n, d_beta, d_f, d_m,
    a1_start, a2_start, q_w1, q_w2, q_s1, q_s2, through, stash, partials, counters,
    N, clip, CLIP: tl.constexpr, FIRST_ORDER: tl.constexpr, NP: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, FB: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = D * F
    PARTIAL: tl.constexpr = 2 * C * D + 4 * C
    memories = tl.num_programs(0) // P
    p = tl.program_id(0) % P
    m = (tl.program_id(0) // P).to(tl.int64)
    first = p * (BLOCKS * FB)  # hidden feature; offsets of blocks stay scalars, so that tiles share their addresses
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]  # of a [C, D]
    turned = dims[:, None] + rows[None, :] * D  # the same as [D, C]
    tile1 = dims[:, None] * F + cols[None, :]  # a block of a [D, F], from its first feature j on
    tile1t = dims[None, :] * F + cols[:, None]
    tile2 = cols[:, None] * D + dims[None, :]  # of a [F, D], from j * D on
    tile2t = dims[:, None] + cols[None, :] * D
    hidden = rows[:, None] * F + cols[None, :]  # of a [C, F], from j on
    hiddent = cols[:, None] + rows[None, :] * F
    product = k_in.dtype.element_ty
    chunks = tl.arange(0, NP)
    refreshes = tl.load(refresh_in + m * N + chunks, mask=chunks < N, other=0.0)
    own, past = m * SIZE, m * N * SIZE
    for b in range(BLOCKS):
        j = first + b * FB
        w, s = tl.load(c_w1_last + own + j + tile1), tl.load(c_s1_last + own + j + tile1)
        u, t = tl.load(c_w2_last + own + j * D + tile2), tl.load(c_s2_last + own + j * D + tile2)
        tl.store(d_w1 + own + j + tile1, w)
        tl.store(d_s1 + own + j + tile1, s)
        tl.store(d_w2 + own + j * D + tile2, u)
        tl.store(d_s2 + own + j * D + tile2, t)
        tl.store(q_w1 + 2 * own + j + tile1, w.to(product))
        tl.store(q_s1 + 2 * own + j + tile1, s.to(product))
        tl.store(q_w2 + 2 * own + j * D + tile2, u.to(product))
        tl.store(q_s2 + 2 * own + j * D + tile2, t.to(product))
        tl.store(d_a1 + own + j + tile1, tl.load(c_a1 + own + j + tile1))
        tl.store(d_a2 + own + j * D + tile2, tl.load(c_a2 + own + j * D + tile2))
        tl.store(a1_start + own + j + tile1, tl.load(a1_in + own + j + tile1))
        tl.store(a2_start + own + j * D + tile2, tl.load(a2_in + own + j * D + tile2))
    tl.debug_barrier()  # read below by other threads
    turn = tl.full((), 0, tl.int32)
    for step in range(N):
        c = N - 1 - step
        chunk = m * N + c
        at = tl.max(tl.where((refreshes > 0) & (chunks <= c), chunks, -1), 0)
        a1 = tl.where(at >= 0, w1_past + past + at.to(tl.int64) * SIZE, a1_start + own)
        a2 = tl.where(at >= 0, w2_past + past + at.to(tl.int64) * SIZE, a2_start + own)
        now, after = 2 * own + (step % 2) * SIZE, 2 * own + ((step + 1) % 2) * SIZE
        tokens, token, hidden0 = chunk * C + rows, chunk * C * D, chunk * (C * F)
        k, v, lr = tl.load(k_in + token + by_token), tl.load(v_in + token + by_token), tl.load(lr_in + tokens)
        g, n, loss = tl.load(g_in + tokens), tl.load(n_in + tokens), tl.load(c_loss + tokens)
        beta, f, decay = tl.load(beta_in + chunk), tl.load(f_in + chunk), tl.load(m_in + chunk)
        fresh = tl.load(refresh_in + chunk)
        usable = finite_rows(k, v, lr)
        k, v = tl.where(usable[:, None], k, 0.0).to(product), tl.where(usable[:, None], v, 0.0).to(product)
        lr = tl.where(usable, lr, 0.0)

        # Through the anchor, and what the cotangents of layer 2's state say of its rows.
        y, by_w2 = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
        by_s2 = tl.zeros((C, D), tl.float32)
        hh = tl.zeros((C,), tl.float32)
        for b in range(BLOCKS):
            j = first + b * FB
            anchor1, anchor2 = tl.load(a1 + j + tile1).to(product), tl.load(a2 + j * D + tile2).to(product)
            dw2, ds2 = tl.load(q_w2 + now + j * D + tile2), tl.load(q_s2 + now + j * D + tile2)
            z = dot(k, anchor1)
            h = z * tl.sigmoid(z)
            hh += tl.sum(h * h, 1)
            h = h.to(product)
            y += dot(h, anchor2)
            by_w2 += dot(h, dw2)
            by_s2 += dot(h, ds2)
            tl.store(stash + m * 3 * (C * F) + j + hidden, z)
        by_state2 = g[:, None] * by_w2 + n[:, None] * by_s2
        if P > 1:
            slot = partials + (m * 2 + turn % 2) * (P * PARTIAL)
            tl.store(slot + p * PARTIAL + by_token, y)
            tl.store(slot + p * PARTIAL + C * D + by_token, by_state2)
            tl.store(slot + p * PARTIAL + 2 * C * D + rows, hh)
            turn += 1
            meet(counters + m, turn * P)
            y = sum_of_partials(slot + by_token, y, PARTIAL, P)
            by_state2 = sum_of_partials(slot + C * D + by_token, by_state2, PARTIAL, P)
            hh = sum_of_partials(slot + 2 * C * D + rows, hh, PARTIAL, P)
        r = y - v.to(tl.float32)
        e2 = 2 * r
        ee2 = tl.sum(e2 * e2, 1)

        # Back to the hidden layer; sums over a token's whole gradient.
        along_w, along_s = tl.sum(by_w2 * e2, 1), tl.sum(by_s2 * e2, 1)
        ee1, along_own = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        tl.debug_barrier()  # z
        for b in range(BLOCKS):
            j = first + b * FB
            z = tl.load(stash + m * 3 * (C * F) + j + hidden)
            anchor2 = tl.load(a2 + j * D + tile2t).to(product)
            dw1, ds1 = tl.load(q_w1 + now + j + tile1), tl.load(q_s1 + now + j + tile1)
            de1 = tl.load(c_e1 + hidden0 + j + hidden).to(tl.float32)
            back = dot(e2.to(product), anchor2)
            gate = tl.sigmoid(z)
            e1 = back * (gate * (1 + z * (1 - gate)))
            by_w1, by_s1 = dot(k, dw1), dot(k, ds1)
            ee1 += tl.sum(e1 * e1, 1)
            along_own += tl.sum(de1 * e1, 1)
            along_w += tl.sum(by_w1 * e1, 1)
            along_s += tl.sum(by_s1 * e1, 1)
            de1 -= g[:, None] * by_w1 + n[:, None] * by_s1
            tl.store(stash + (m * 3 + 1) * (C * F) + j + hidden, back)
            tl.store(stash + (m * 3 + 2) * (C * F) + j + hidden, de1)
        if P > 1:
            slot = partials + (m * 2 + turn % 2) * (P * PARTIAL)
            tl.store(slot + p * PARTIAL + rows, ee1)
            tl.store(slot + p * PARTIAL + C + rows, along_own)
            tl.store(slot + p * PARTIAL + 2 * C + rows, along_w)
            tl.store(slot + p * PARTIAL + 3 * C + rows, along_s)
            turn += 1
            meet(counters + m, turn * P)
            ee1 = sum_of_partials(slot + rows, ee1, PARTIAL, P)
            along_own = sum_of_partials(slot + C + rows, along_own, PARTIAL, P)
            along_w = sum_of_partials(slot + 2 * C + rows, along_w, PARTIAL, P)
            along_s = sum_of_partials(slot + 3 * C + rows, along_s, PARTIAL, P)
        own_e2 = tl.load(c_e2 + token + by_token).to(tl.float32)
        kk = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        square = kk * ee1 + hh * ee2
        keep = usable & (square < float("inf"))
        kept = keep[:, None]
        factor, rate = write_rate(square, keep, lr, clip, CLIP)
        along_own += tl.sum(own_e2 * e2, 1) - g * along_w - n * along_s
        d_rate = tl.where(keep, along_own, 0.0)
        if p == 0:
            tl.store(d_g + tokens, tl.where(keep, -rate * along_w, 0.0))
            tl.store(d_n + tokens, tl.where(keep, -rate * along_s, 0.0))
            tl.store(d_lr + tokens, d_rate * factor)

        if FIRST_ORDER:
            if p == 0:
                tl.store(d_v + token + by_token, tl.zeros((C, D), tl.float32).to(product))
            tl.store(d_k + p * memories.to(tl.int64) * (N * C * D) + token + by_token, tl.zeros((C, D), tl.float32))
        else:
            d_square = tl.zeros((C,), tl.float32)
            if CLIP:
                clipped = keep & (square > clip * clip)
                d_square = tl.where(clipped, -d_rate * rate / tl.where(clipped, square, 1.0), 0.0)
            by_rows = tl.zeros((C, D), tl.float32)
            tl.debug_barrier()  # back, de1
            for b in range(BLOCKS):
                j = first + b * FB
                z = tl.load(stash + m * 3 * (C * F) + j + hidden)
                back = tl.load(stash + (m * 3 + 1) * (C * F) + j + hidden)
                de1 = tl.load(stash + (m * 3 + 2) * (C * F) + j + hidden)
                anchor2 = tl.load(a2 + j * D + tile2).to(product)
                gate = tl.sigmoid(z)
                slope = tl.where(kept, gate * (1 + z * (1 - gate)), 0.0)
                e1 = tl.where(kept, back, 0.0) * slope
                de1 = tl.where(kept, rate[:, None] * de1 + (d_square * kk)[:, None] * e1, 0.0)
                t1 = (de1 * slope).to(product)
                tl.store(through + m * (C * F) + j + hidden, t1)
                by_rows += dot(t1, anchor2)
                tl.debug_barrier()  # every thread has read the old de1
                tl.store(stash + (m * 3 + 2) * (C * F) + j + hidden, de1)
            if P > 1:
                slot = partials + (m * 2 + turn % 2) * (P * PARTIAL)
                tl.store(slot + p * PARTIAL + by_token, by_rows)
                turn += 1
                meet(counters + m, turn * P)
                by_rows = sum_of_partials(slot + by_token, by_rows, PARTIAL, P)
            else:
                tl.debug_barrier()  # through, de1
            de2 = rate[:, None] * (own_e2 - by_state2) + (d_square * hh)[:, None] * e2 + by_rows
            r = tl.where(kept, r, 0.0)
            dy = tl.where(kept, 2 * de2, 0.0) + 2 * r * loss[:, None]
            if p == 0:
                tl.store(d_v + token + by_token, tl.where(kept, -dy, 0.0).to(product))
            dy, e2 = dy.to(product), 2 * r
            ge2 = ((g * rate)[:, None] * e2).to(product)
            ne2 = ((n * rate)[:, None] * e2).to(product)
            own_k = tl.load(c_x1 + token + by_token).to(tl.float32) + (d_square * ee1)[:, None] * k.to(tl.float32)
            dk = tl.where(p == 0, own_k, 0.0)
            kt = tl.where(keep[None, :], tl.load(k_in + token + turned), 0.0).to(product)

        sum_beta, sum_f = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        sum_m = tl.full((), 0.0, tl.float32)
        for b in range(BLOCKS):
            j = first + b * FB
            da1, da2 = tl.zeros((D, FB), tl.float32), tl.zeros((FB, D), tl.float32)
            if not FIRST_ORDER:
                z = tl.load(stash + m * 3 * (C * F) + j + hidden)
                back = tl.load(stash + (m * 3 + 1) * (C * F) + j + hidden)
                de1 = tl.load(stash + (m * 3 + 2) * (C * F) + j + hidden)
                dh = tl.load(c_x2 + hidden0 + j + hidden).to(tl.float32)
                anchor1, anchor2 = tl.load(a1 + j + tile1t).to(product), tl.load(a2 + j * D + tile2t).to(product)
                dw1, ds1 = tl.load(q_w1 + now + j + tile1t), tl.load(q_s1 + now + j + tile1t)
                dw2, ds2 = tl.load(q_w2 + now + j * D + tile2t), tl.load(q_s2 + now + j * D + tile2t)
                gate = tl.sigmoid(z)
                slope = gate * (1 + z * (1 - gate))
                curve = gate * (1 - gate) * (2 + z * (1 - 2 * gate))
                dh += (d_square * ee2)[:, None] * (z * gate) + dot(dy, anchor2) - dot(ge2, dw2) - dot(ne2, ds2)
                dz = tl.where(kept, dh * slope + de1 * back * curve, 0.0).to(product)
                e1 = tl.where(kept, back * slope, 0.0)
                t1, x2 = tl.load(through + m * (C * F) + j + hiddent), tl.load(x2_in + hidden0 + j + hiddent)
                dk += dot(dz, anchor1)
                dk -= dot(((g * rate)[:, None] * e1).to(product), dw1)
                dk -= dot(((n * rate)[:, None] * e1).to(product), ds1)
                da1 += dot(kt, dz)
                da2 += dot(t1, e2.to(product)) + dot(x2, dy)
            here = chunk * SIZE
            pw1, ps1 = tl.load(d_w1 + own + j + tile1), tl.load(d_s1 + own + j + tile1)
            pw2, ps2 = tl.load(d_w2 + own + j * D + tile2), tl.load(d_s2 + own + j * D + tile2)
            nw1, ns1 = tl.load(c_w1 + here + j + tile1), tl.load(c_s1 + here + j + tile1)
            nw2, ns2 = tl.load(c_w2 + here + j * D + tile2), tl.load(c_s2 + here + j * D + tile2)
            w1, s1 = tl.load(w1_past + here + j + tile1), tl.load(s1_past + here + j + tile1)
            w2, s2 = tl.load(w2_past + here + j * D + tile2), tl.load(s2_past + here + j * D + tile2)
            da1 += tl.load(d_a1 + own + j + tile1)
            da2 += tl.load(d_a2 + own + j * D + tile2)
            ns1 = f * pw1 + decay * ps1 + ns1.to(tl.float32)
            ns2 = f * pw2 + decay * ps2 + ns2.to(tl.float32)
            nw1 = beta * pw1 + fresh * da1 + nw1.to(tl.float32)
            nw2 = beta * pw2 + fresh * da2 + nw2.to(tl.float32)
            w1, s1, w2, s2 = w1.to(tl.float32), s1.to(tl.float32), w2.to(tl.float32), s2.to(tl.float32)
            sum_beta += tl.sum(pw1 * w1) + tl.sum(pw2 * w2)
            sum_f += tl.sum(pw1 * s1) + tl.sum(pw2 * s2)
            sum_m += tl.sum(ps1 * s1) + tl.sum(ps2 * s2)
            tl.store(d_a1 + own + j + tile1, (1 - fresh) * da1)
            tl.store(d_a2 + own + j * D + tile2, (1 - fresh) * da2)
            tl.store(q_w1 + after + j + tile1, nw1.to(product))
            tl.store(q_s1 + after + j + tile1, ns1.to(product))
            tl.store(q_w2 + after + j * D + tile2, nw2.to(product))
            tl.store(q_s2 + after + j * D + tile2, ns2.to(product))
            tl.store(d_w1 + own + j + tile1, nw1)
            tl.store(d_s1 + own + j + tile1, ns1)
            tl.store(d_w2 + own + j * D + tile2, nw2)
            tl.store(d_s2 + own + j * D + tile2, ns2)
        if not FIRST_ORDER:
            dk = tl.where(kept, dk, 0.0)
            tl.store(d_k + p * memories.to(tl.int64) * (N * C * D) + token + by_token, dk)
        partial = p * memories.to(tl.int64) * N + chunk
        tl.store(d_beta + partial, sum_beta)
        tl.store(d_f + partial, sum_f)
        tl.store(d_m + partial, sum_m)
        tl.debug_barrier()  # the rounded cotangents are read in the next turn; through and stash written again


def backward(
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    to_weights: Tensor,
    to_momentum: Tensor,
    keep_weights: Tensor,
    momentum_to_weights: Tensor,
    keep_momentum: Tensor,
    refresh: Tensor,
    clip: float,
    outputs: Scan,
    d_weights: list[Tensor],
    d_momentum: list[Tensor],
    d_last_weights: list[Tensor],
    d_last_momentum: list[Tensor],
    d_anchor: list[Tensor],
    d_inputs: list[Tensor],
    d_errors: list[Tensor],
    d_loss: Tensor,
    first_order: bool = False,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Gradients of every argument of ``memory_small.forward`` but refresh, in order, of its shape [M, ...] and dtype.

    outputs: what forward returned; d_...: cotangents of its fields, of their shapes and dtypes. first_order: rows X and
    Delta / theta are constants. ValueError as forward.
    """
    state_dtype = outputs.weights[0].dtype
    refuse(weights, k, state_dtype)
    memories, chunks, tokens, size = k.shape
    depth, hidden = len(weights), weights[0].shape[-1]
    cut = blocks or blocks_of(memories, tokens, size, hidden, depth, k.dtype, k.device)
    inputs = [*anchor, k, v, inner_lr, to_weights, to_momentum, keep_weights, momentum_to_weights, keep_momentum]
    saved = [refresh, *outputs.weights, *outputs.momentum, *outputs.inputs[1:]]
    given = [*d_weights, *d_momentum, *d_last_weights, *d_last_momentum, *d_anchor, *d_inputs, *d_errors, d_loss]
    every = [t.contiguous() for t in (*inputs, *saved, *given)]
    d_states = [t.new_empty(t.shape) for t in (*weights, *momentum, *anchor)]
    d_tokens = [inner_lr.new_empty(inner_lr.shape) for _ in range(3)]
    several = (cut.programs,) if cut.programs > 1 else ()
    d_k = k.new_empty((*several, *k.shape), dtype=torch.float32 if several else k.dtype)
    d_v = v.new_empty(v.shape)
    d_chunks = [refresh.new_empty((*several, *refresh.shape)) for _ in range(3)]
    starts = [a.new_empty(a.shape, dtype=state_dtype) for a in anchor]
    rounded = [k.new_empty((memories, 2, *t.shape[1:])) for t in (*weights, *momentum)]
    sizes = {
        "N": chunks,
        "clip": float(clip),
        "CLIP": clip > 0,
        "NP": triton.next_power_of_2(max(chunks, 2)),
        "C": tokens,
    }
    sizes |= {"D": size, "FB": cut.width, "num_warps": cut.warps, "num_stages": 1, "FIRST_ORDER": first_order}
    results = [*d_states, d_k, d_v, *d_tokens, *d_chunks, *starts, *rounded]
    with on_device(k):
        if memories and depth == 1:
            linear.backward_kernel[(memories,)](*every, *results, **sizes, BLOCKS=size // cut.width)
        elif memories:
            count = hidden // (cut.width * cut.programs)
            through = k.new_empty((memories, tokens, hidden))
            stash = k.new_empty((memories, 3, tokens, hidden), dtype=torch.float32)
            partials = k.new_empty((memories, 2, cut.programs, tokens * (2 * size + 4)), dtype=torch.float32)
            counters = torch.zeros(memories, dtype=torch.int32, device=k.device)
            _backward[(memories * cut.programs,)](
                *every, *results, through, stash, partials, counters, **sizes, F=hidden, BLOCKS=count, P=cut.programs
            )
    if several:
        d_k, d_chunks = d_k.sum(0).to(k.dtype), [d.sum(0) for d in d_chunks]
    return [*d_states, d_k, d_v, *d_tokens, *d_chunks]
