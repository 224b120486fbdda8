"""Reading memories of one or two layers for all chunks at once, backward: one program a chunk of a memory.

Letters: R chunks of all memories, C tokens a chunk, D head size, F hidden size. z, h as in memory_read.py; from dy,
with P1 = q X1^T, P2 = h X2^T (o: elementwise, <,>: summed over a row):

    dA2 = - dy E2^T                     dP2 = G o dA2                    dE2 = - (G o P2)^T dy
    dh = (beta dy) W2^T + (f dy) S2^T + dP2 X2                           dX2 = dP2^T h
    dW2 = h^T (beta dy)                 dS2 = h^T (f dy)                 dz = dh o silu'(z)  (one layer: dz = dy)
    dA1 = - dz E1^T                     dP1 = G o dA1                    dE1 = - (G o P1)^T dz
    dq = beta (dz W1^T) + f (dz S1^T) + dP1 X1                           dX1 = dP1^T q
    dW1 = dz^T (beta q), transposed     dS1 = dz^T (f q), transposed     dG = dA1 o P1 + dA2 o P2
    dbeta = <q, dz W1^T> + <dy, h W2>                                    df = <q, dz S1^T> + <dy, h S2>

The sums over hidden features that layer 2 needs (h W2, h S2, P2) were kept by the forward, so one pass over blocks of
them does: it makes z and h again, writes what belongs to the block (dX2, dE1, the states' gradients) and leaves dA1,
dz W1^T and dz S1^T in registers for the rest.

A block's tiles are [hidden, token], so that h^T and dz^T stand first in the products that give the states' gradients,
and everything that no block changes stands second, in shared memory. No product takes the transpose of an accumulator:
on Hopper, as a first operand, it was seen wrong at block width 64. A and dP2 are made twice, in either order of tokens.
A block's offsets are made anew in each turn, since those held through the loop would crowd out the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import on_device
from titanfunc_kernels.memory_read import Blocks, Read, Sums, launch_sizes
from titanfunc_kernels.memory_small_common import dot

# Loads in stages would take the shared memory of the second program on a multiprocessor.
BACKWARD = {2: Blocks(64, 4, 1), 4: Blocks(16, 8, 1)}


@triton.jit
def _scaled(scale, x):
    """x [C, D], each row times its number of ``scale`` [C], in x's type."""
    return (scale[:, None] * x.to(tl.float32)).to(x.dtype)


@triton.jit
def _backward(
    q_in, w1_in, s1_in, x1_in, e1_in, w2_in, s2_in, x2_in, e2_in, beta_in, f_in, g_in,
    by_w2_in, by_s2_in, alike_in, dy_in,
    d_q, d_w1, d_s1, d_x1, d_e1, d_w2, d_s2, d_x2, d_e2, d_beta, d_f, d_g,
    DEPTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    token, state, hidden0, pair = r * (C * D), r * (D * F), r * (C * F), r * (C * C)
    rows, dims = tl.arange(0, C), tl.arange(0, D)
    by_token = rows[:, None] * D + dims[None, :]  # of a [C, D]
    turned = dims[:, None] + rows[None, :] * D  # the same as [D, C]
    pairs = rows[:, None] * C + rows[None, :]  # of a [C, C], query by key
    turned_pairs = rows[:, None] + rows[None, :] * C  # key by query
    product = q_in.dtype.element_ty
    beta, f = tl.load(beta_in + r * C + rows), tl.load(f_in + r * C + rows)
    q, x1 = tl.load(q_in + token + by_token), tl.load(x1_in + token + by_token)
    g, gt = tl.load(g_in + pair + pairs), tl.load(g_in + pair + turned_pairs)
    scores = (-g * dot(q, tl.trans(x1))).to(product)  # the minus of A in both
    beta_q, f_q = _scaled(beta, q), _scaled(f, q)
    sum_beta, sum_f = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    if DEPTH == 2:
        scores_t = (-gt * dot(x1, tl.trans(q))).to(product)
        dy, e2 = tl.load(dy_in + token + by_token), tl.load(e2_in + token + by_token)
        alike_t = tl.load(alike_in + pair + turned_pairs).to(tl.float32)
        sum_beta += tl.sum(dy.to(tl.float32) * tl.load(by_w2_in + token + by_token).to(tl.float32), 1)
        sum_f += tl.sum(dy.to(tl.float32) * tl.load(by_s2_in + token + by_token).to(tl.float32), 1)
        tl.store(d_e2 + token + by_token, dot((-gt * alike_t).to(product), dy).to(product))
        d_alike = (-g * dot(dy, tl.trans(e2))).to(product)
        d_alike_t = (-gt * dot(e2, tl.trans(dy))).to(product)
        beta_dy, f_dy = _scaled(beta, dy), _scaled(f, dy)
    d_scores_t = tl.zeros((C, C), tl.float32)  # E1 dz^T
    by_weights, by_momentum = tl.zeros((D, C), tl.float32), tl.zeros((D, C), tl.float32)  # W1 dz^T, S1 dz^T
    for b in range(F // FB):
        cols = b * FB + tl.arange(0, FB)
        tile1 = dims[:, None] * F + cols[None, :]  # a block of a [D, F]
        tile1t = cols[:, None] + dims[None, :] * F
        tile2 = cols[:, None] * D + dims[None, :]  # of a [F, D]
        hidden = rows[:, None] * F + cols[None, :]  # of a [C, F]
        hiddent = cols[:, None] + rows[None, :] * F
        w1, s1 = tl.load(w1_in + state + tile1).to(product), tl.load(s1_in + state + tile1).to(product)
        e1 = tl.load(e1_in + hidden0 + hidden)
        if DEPTH == 1:
            dz = tl.load(dy_in + hidden0 + hiddent)
        else:
            w2, s2 = tl.load(w2_in + state + tile2), tl.load(s2_in + state + tile2)
            x2 = tl.load(x2_in + hidden0 + hidden)
            z = dot(tl.trans(w1), tl.trans(beta_q))
            z += dot(tl.trans(s1), tl.trans(f_q))
            z += dot(tl.trans(e1), scores_t)
            dh = dot(w2.to(product), tl.trans(beta_dy))
            dh += dot(s2.to(product), tl.trans(f_dy))
            dh += dot(tl.trans(x2), d_alike_t)
            gate = tl.sigmoid(z)
            h = (z * gate).to(product)
            dz = (dh * (gate * (1 + z * (1 - gate)))).to(product)
            tl.store(d_x2 + hidden0 + hiddent, dot(h, d_alike).to(product))
            tl.store(d_w2 + state + tile2, dot(h, beta_dy).to(d_w2.dtype.element_ty))
            tl.store(d_s2 + state + tile2, dot(h, f_dy).to(d_s2.dtype.element_ty))
        by_weights += dot(w1, dz)
        by_momentum += dot(s1, dz)
        d_scores_t += dot(e1, dz)
        tl.store(d_e1 + hidden0 + hiddent, dot(dz, scores).to(product))
        tl.store(d_w1 + state + tile1t, dot(dz, beta_q).to(d_w1.dtype.element_ty))
        tl.store(d_s1 + state + tile1t, dot(dz, f_q).to(d_s1.dtype.element_ty))
    # Loaded once more: nothing of these is held through the loop.
    q, x1 = tl.load(q_in + token + by_token), tl.load(x1_in + token + by_token)
    qt, gt = tl.load(q_in + token + turned), tl.load(g_in + pair + turned_pairs)
    beta, f = tl.load(beta_in + r * C + rows), tl.load(f_in + r * C + rows)
    dp1 = (-gt * d_scores_t).to(product)
    dq = beta[None, :] * by_weights + f[None, :] * by_momentum + dot(tl.trans(x1), dp1)
    tl.store(d_q + token + turned, dq.to(product))
    tl.store(d_x1 + token + by_token, dot(dp1, q).to(product))
    dg = d_scores_t * dot(x1, tl.trans(q))
    if DEPTH == 2:
        dy, e2 = tl.load(dy_in + token + by_token), tl.load(e2_in + token + by_token)
        dg += dot(e2, tl.trans(dy)) * tl.load(alike_in + pair + turned_pairs).to(tl.float32)
    tl.store(d_g + pair + turned_pairs, -dg)
    tl.store(d_beta + r * C + rows, sum_beta + tl.sum(qt.to(tl.float32) * by_weights, 0))
    tl.store(d_f + r * C + rows, sum_f + tl.sum(qt.to(tl.float32) * by_momentum, 0))


def backward(read: Read, sums: Sums | None, d_y: Tensor, blocks: Blocks | None = None) -> Read:
    """The gradient of every tensor of ``read``, of its shape and type, from the cotangent d_y [R, C, D] of y.

    sums: what ``memory_read.forward`` kept. d_y: in q's type. blocks: how the hidden features are cut up (default: by
    sizes). ValueError as ``memory_read.forward``.
    """
    sizes = launch_sizes(read, BACKWARD, blocks)
    d_y = d_y.contiguous()
    lists = [
        [t.new_empty(t.shape) for t in leaves] for leaves in (read.weights, read.momentum, read.inputs, read.errors)
    ]
    q, *gates = (t.new_empty(t.shape) for t in (read.q, *read[5:]))
    grads = Read(q, lists[0], lists[1], lists[2], lists[3], gates[0], gates[1], gates[2])
    with on_device(d_y):
        if len(d_y):
            _backward[(len(d_y),)](*read.in_order(), *(sums or (d_y, d_y, d_y)), d_y, *grads.in_order(), **sizes)
    return grads
