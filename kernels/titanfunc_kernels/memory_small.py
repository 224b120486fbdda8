"""Writing chunks into small memories, all chunks in one launch: two-layer memories with small heads, forward.

Letters: M memories (batch times heads), N chunks, C tokens a chunk, D head size, F hidden size, P programs a memory.
``titanfunc.ops.memory_write`` says what is computed (L2 objective, no biases, no restart). With A1 [D, F] and
A2 [F, D] the anchor, a chunk is

    z = k A1    h = silu(z)    y = h A2    e2 = 2 (y - v)    e1 = (e2 A2^T) o silu'(z)
    |g|^2 = |k|^2 |e1|^2 + |h|^2 |e2|^2    rate = theta min(1, clip / |g|)    E_l = rate e_l
    W_l' = beta W_l + f S_l - X_l^T (g E_l)    S_l' = m S_l - X_l^T (n E_l)    with X_1 = k, X_2 = h

P programs share the hidden features of a memory, each F / P of them in blocks; what is summed over hidden features
(y and |h|^2, then |e1|^2) goes through device memory, where the programs wait for each other twice a chunk. A program
with a single block carries W and S in registers, in float32; else they live in the float32 results.

The products read the anchor from the history of states, rounded to the product's type as the reference rounds it. A
matrix that a product needs transposed is loaded transposed, never turned over in registers: on Hopper a product whose
first operand is the transpose of an accumulator was seen wrong at block width 64. So each tensor that one thread
writes and another reads (the history, h) has a barrier in between. Launch with num_stages=1: a pipelined load would
run ahead of these stores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels import memory_small_linear as linear
from titanfunc_kernels.launch import on_device
from titanfunc_kernels.memory_small_common import (
    Blocks,
    blocks_of,
    dot,
    finite_rows,
    gate_of,
    groups_of,
    refuse,
    sum_of_partials,
    write_rate,
)
from titanfunc_kernels.order import meet


class Scan(NamedTuple):
    """What a pass over N chunks leaves behind.

    weights, momentum: lists of [M, N, ...] in the state's type, the state at each chunk's start.
    last_weights, last_momentum: lists of [M, ...] float32, the state after the last. anchor: list of [M, ...] float32.
    inputs, errors: lists of [M, N, C, d_in] and [M, N, C, d_out] in k's type. loss, kept: [M, N, C] float32.
    residuals: none; backward recomputes.
    """

    weights: list[Tensor]
    momentum: list[Tensor]
    last_weights: list[Tensor]
    last_momentum: list[Tensor]
    anchor: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]
    loss: Tensor
    kept: Tensor
    residuals: list[Tensor]


@triton.jit
def _forward(
    w1_in, w2_in, s1_in, s2_in, a1_in, a2_in, k_in, v_in, lr_in, g_in, n_in, beta_in, f_in, m_in, refresh_in,
    w1_past, w2_past, s1_past, s2_past, w1_last, w2_last, s1_last, s2_last, a1_last, a2_last,
    x1_out, x2_out, e1_out, e2_out, loss_out, kept_out, a1_start, a2_start, partials, counters,
    N, clip, CLIP: tl.constexpr, NP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    FB: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = D * F
    PARTIAL: tl.constexpr = C * D + 2 * C
    p = tl.program_id(0) % P
    m = (tl.program_id(0) // P).to(tl.int64)
    first = p * (BLOCKS * FB)  # hidden feature; offsets of blocks stay scalars, so that tiles share their addresses
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]  # of a [C, D]
    turned = dims[:, None] + rows[None, :] * D  # the same as [D, C]
    tile1 = dims[:, None] * F + cols[None, :]  # a block of a [D, F], from its first feature j on
    tile2 = cols[:, None] * D + dims[None, :]  # of a [F, D], from j * D on
    tile2t = dims[:, None] + cols[None, :] * D
    hidden = rows[:, None] * F + cols[None, :]  # of a [C, F], from j on
    hiddent = cols[:, None] + rows[None, :] * F
    product = k_in.dtype.element_ty
    chunks = tl.arange(0, NP)
    refreshes = tl.load(refresh_in + m * N + chunks, mask=chunks < N, other=0.0)
    last = tl.max(tl.where(refreshes > 0, chunks, -1), 0)
    own, past = m * SIZE, m * N * SIZE
    for b in range(BLOCKS):
        j = first + b * FB
        w, s = tl.load(w1_in + own + j + tile1), tl.load(s1_in + own + j + tile1)
        u, t = tl.load(w2_in + own + j * D + tile2), tl.load(s2_in + own + j * D + tile2)
        tl.store(w1_past + past + j + tile1, w)
        tl.store(s1_past + past + j + tile1, s)
        tl.store(w2_past + past + j * D + tile2, u)
        tl.store(s2_past + past + j * D + tile2, t)
        if BLOCKS > 1:
            tl.store(w1_last + own + j + tile1, w)
            tl.store(s1_last + own + j + tile1, s)
            tl.store(w2_last + own + j * D + tile2, u)
            tl.store(s2_last + own + j * D + tile2, t)
        a, o = tl.load(a1_in + own + j + tile1), tl.load(a2_in + own + j * D + tile2)
        tl.store(a1_start + own + j + tile1, a)
        tl.store(a2_start + own + j * D + tile2, o)
        if last < 0:
            tl.store(a1_last + own + j + tile1, a)
            tl.store(a2_last + own + j * D + tile2, o)
    if BLOCKS == 1:
        w1, s1 = tl.load(w1_in + own + first + tile1), tl.load(s1_in + own + first + tile1)
        w2, s2 = tl.load(w2_in + own + first * D + tile2), tl.load(s2_in + own + first * D + tile2)
    tl.debug_barrier()  # the history's first state, read below by other threads
    at = tl.full((), -1, tl.int32)
    turn = tl.full((), 0, tl.int32)
    for c in range(N):
        chunk = m * N + c
        at = tl.where(tl.load(refresh_in + chunk) > 0, c, at)
        a1 = tl.where(at >= 0, w1_past + past + at.to(tl.int64) * SIZE, a1_start + own)
        a2 = tl.where(at >= 0, w2_past + past + at.to(tl.int64) * SIZE, a2_start + own)
        tokens, token = chunk * C + rows, chunk * C * D
        k, v, lr = tl.load(k_in + token + by_token), tl.load(v_in + token + by_token), tl.load(lr_in + tokens)
        kt = tl.load(k_in + token + turned)
        g, n = tl.load(g_in + tokens), tl.load(n_in + tokens)
        beta, f, decay = tl.load(beta_in + chunk), tl.load(f_in + chunk), tl.load(m_in + chunk)
        if BLOCKS == 1:
            anchor2t = tl.load(a2 + first * D + tile2t).to(product)
        usable = finite_rows(k, v, lr)
        k, v = tl.where(usable[:, None], k, 0.0).to(product), tl.where(usable[:, None], v, 0.0).to(product)
        lr = tl.where(usable, lr, 0.0)
        y = tl.zeros((C, D), tl.float32)
        hh = tl.zeros((C,), tl.float32)
        z = tl.zeros((C, FB), tl.float32)
        for b in range(BLOCKS):
            j = first + b * FB
            anchor1, anchor2 = tl.load(a1 + j + tile1).to(product), tl.load(a2 + j * D + tile2).to(product)
            z = dot(k, anchor1)
            h = z * gate_of(z)
            hh += tl.sum(h * h, 1)
            y += dot(h.to(product), anchor2)
        if P > 1:
            slot = partials + (m * 2 + turn % 2) * (P * PARTIAL)
            tl.store(slot + p * PARTIAL + by_token, y)
            tl.store(slot + p * PARTIAL + C * D + rows, hh)
            turn += 1
            meet(counters + m, turn * P)
            y = sum_of_partials(slot + by_token, PARTIAL, P)
            hh = sum_of_partials(slot + C * D + rows, PARTIAL, P)
        r = y - v.to(tl.float32)
        e2 = 2 * r
        ee1 = tl.zeros((C,), tl.float32)
        e1 = tl.zeros((C, FB), tl.float32)
        for b in range(BLOCKS):
            j = first + b * FB
            if BLOCKS > 1:
                anchor2t = tl.load(a2 + j * D + tile2t).to(product)
                z = dot(k, tl.load(a1 + j + tile1).to(product))
            gate = gate_of(z)
            back = dot(e2.to(product), anchor2t)
            e1 = back * (gate * (1 + z * (1 - gate)))
            ee1 += tl.sum(e1 * e1, 1)
        if P > 1:
            slot = partials + (m * 2 + turn % 2) * (P * PARTIAL) + C * D + C
            tl.store(slot + p * PARTIAL + rows, ee1)
            turn += 1
            meet(counters + m, turn * P)
            ee1 = sum_of_partials(slot + rows, PARTIAL, P)
        kk = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        square = kk * ee1 + hh * tl.sum(e2 * e2, 1)
        keep = usable & (square < float("inf"))
        rate = write_rate(square, keep, lr, clip, CLIP)[1]
        kept = keep[:, None]
        by_layer2 = (tl.where(kept, e2, 0.0) * rate[:, None]).to(product)
        if p == 0:
            tl.store(x1_out + token + by_token, tl.where(kept, k, 0.0).to(product))
            tl.store(e2_out + token + by_token, by_layer2)
            tl.store(loss_out + tokens, tl.sum(r * r, 1))
            tl.store(kept_out + tokens, keep.to(tl.float32))
        for b in range(BLOCKS):
            j = first + b * FB
            if BLOCKS > 1:
                anchor2t = tl.load(a2 + j * D + tile2t).to(product)
                z = dot(k, tl.load(a1 + j + tile1).to(product))
                gate = gate_of(z)
                back = dot(e2.to(product), anchor2t)
                e1 = back * (gate * (1 + z * (1 - gate)))
            tl.store(x2_out + chunk * (C * F) + j + hidden, tl.where(kept, z * gate_of(z), 0.0).to(product))
            e1 = (tl.where(kept, e1, 0.0) * rate[:, None]).to(product).to(tl.float32)
            tl.store(e1_out + chunk * (C * F) + j + hidden, e1.to(product))
        tl.debug_barrier()  # h is read back transposed
        wide2 = by_layer2.to(tl.float32)
        kt = tl.where(keep[None, :], kt, 0.0).to(product)
        for b in range(BLOCKS):
            j = first + b * FB
            ht = tl.load(x2_out + chunk * (C * F) + j + hiddent)
            if BLOCKS > 1:
                e1 = tl.load(e1_out + chunk * (C * F) + j + hidden).to(tl.float32)
            if BLOCKS == 1:
                pw1, ps1, pw2, ps2 = w1, s1, w2, s2
            else:
                pw1, ps1 = tl.load(w1_last + own + j + tile1), tl.load(s1_last + own + j + tile1)
                pw2, ps2 = tl.load(w2_last + own + j * D + tile2), tl.load(s2_last + own + j * D + tile2)
            if c == last:
                tl.store(a1_last + own + j + tile1, pw1)
                tl.store(a2_last + own + j * D + tile2, pw2)
            nw1 = beta * pw1 + f * ps1 - dot(kt, (g[:, None] * e1).to(product))
            ns1 = decay * ps1 - dot(kt, (n[:, None] * e1).to(product))
            nw2 = beta * pw2 + f * ps2 - dot(ht, (g[:, None] * wide2).to(product))
            ns2 = decay * ps2 - dot(ht, (n[:, None] * wide2).to(product))
            if c + 1 < N:
                after = (chunk + 1) * SIZE
                tl.store(w1_past + after + j + tile1, nw1)
                tl.store(s1_past + after + j + tile1, ns1)
                tl.store(w2_past + after + j * D + tile2, nw2)
                tl.store(s2_past + after + j * D + tile2, ns2)
            if BLOCKS == 1:
                w1, s1, w2, s2 = nw1, ns1, nw2, ns2
            else:
                tl.store(w1_last + own + j + tile1, nw1)
                tl.store(s1_last + own + j + tile1, ns1)
                tl.store(w2_last + own + j * D + tile2, nw2)
                tl.store(s2_last + own + j * D + tile2, ns2)
        tl.debug_barrier()  # the state just written is the next chunk's anchor
    if BLOCKS == 1:
        tl.store(w1_last + own + first + tile1, w1)
        tl.store(s1_last + own + first + tile1, s1)
        tl.store(w2_last + own + first * D + tile2, w2)
        tl.store(s2_last + own + first * D + tile2, s2)


def forward(
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
    state_dtype: torch.dtype,
    blocks: Blocks | None = None,
) -> Scan:
    """Writes k, v [M, N, C, D] into M memories of one matrix [M, D, D] or two, [M, D, F] and [M, F, D], float32.

    inner_lr (theta), to_weights (g), to_momentum (n): [M, N, C] float32; keep_weights (beta), momentum_to_weights (f),
    keep_momentum (m), refresh: [M, N] float32. clip: largest gradient norm of a token (0: none). state_dtype: of the
    histories; k's or wider. blocks: how a memory is cut up (default: by its sizes and the device). ValueError for
    sizes and types that ``refusal`` names.
    """
    refuse(weights, k, state_dtype)
    memories, chunks, tokens, size = k.shape
    depth, hidden = len(weights), weights[0].shape[-1]
    inputs = [t.contiguous() for t in (*weights, *momentum, *anchor, k, v, inner_lr, to_weights, to_momentum)]
    inputs += [t.contiguous() for t in (keep_weights, momentum_to_weights, keep_momentum, refresh)]
    cut = blocks or blocks_of(memories, tokens, size, hidden, depth, k.dtype, k.device)
    pasts = [t.new_empty((memories, chunks, *t.shape[1:]), dtype=state_dtype) for t in (*weights, *momentum)]
    lasts = [t.new_empty(t.shape) for t in (*weights, *momentum, *anchor)]
    rows = [k.new_empty((memories, chunks, tokens, w.shape[-2])) for w in weights]
    rows += [k.new_empty((memories, chunks, tokens, w.shape[-1])) for w in weights]
    loss, kept = inner_lr.new_empty(inner_lr.shape), inner_lr.new_empty(inner_lr.shape)
    starts = [a.new_empty(a.shape, dtype=state_dtype) for a in anchor]
    every = [*inputs, *pasts, *lasts, *rows, loss, kept, *starts]
    sizes = {"N": chunks, "clip": float(clip), "CLIP": clip > 0, "NP": triton.next_power_of_2(max(chunks, 2))}
    sizes |= {"C": tokens, "D": size, "FB": cut.width, "num_warps": cut.warps, "num_stages": 1}
    with on_device(k):
        if not memories or not chunks:
            for last, given in zip(lasts, inputs, strict=False):
                last.copy_(given)
        elif depth == 1:
            linear.forward_kernel[(memories,)](*every, **sizes, BLOCKS=size // cut.width)
        else:
            if k.is_cuda and cut.programs > 1:  # they wait for each other: all of them run at once, or the launch fails
                sizes["launch_cooperative_grid"] = True
            for group in groups_of(memories, cut.programs, k):
                held = group.stop - group.start
                partials = loss.new_empty((held, 2, cut.programs, tokens * (size + 2)))
                counters = torch.zeros(held, dtype=torch.int32, device=k.device)
                _forward[(held * cut.programs,)](
                    *(t[group] for t in every), partials, counters, **sizes, F=hidden,
                    BLOCKS=hidden // (cut.width * cut.programs), P=cut.programs,
                )  # fmt: skip
    return Scan(
        pasts[:depth], pasts[depth:], lasts[:depth], lasts[depth : 2 * depth], lasts[2 * depth :],
        rows[:depth], rows[depth:], loss, kept, [],
    )  # fmt: skip
