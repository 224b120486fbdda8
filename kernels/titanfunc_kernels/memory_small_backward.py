"""Writing chunks into small memories, a launch a chunk: backward of memory_small.py.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, FB features of a block, P = F / FB. From
the cotangents dW_l', dS_l' of the state after a chunk, dX_l, dE_l of its rows and dl of its loss (o: elementwise, <,>:
summed over a row):

    T_l = dE_l - g (X_l dW_l') - n (X_l dS_l')                dX_l -= (g E_l) dW_l'^T + (n E_l) dS_l'^T
    dg = - sum_l <X_l dW_l', E_l>                             dn = - sum_l <X_l dS_l', E_l>
    drate = sum_l <T_l, e_l>                                  dtheta = drate min(1, clip / |g|)
    dq = - drate rate / q where the clip bites, else 0        (q = |g|^2; half of the derivative by it)
    de_l = rate T_l + dq |x_l|^2 e_l                          dX_l += dq |e_l|^2 x_l

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

What no cotangent enters is made for all chunks at once beforehand, the keys' gradient for all of them afterwards
(memory_small_rows.py). In between there is one launch a chunk, a program a block of hidden features, like forward. The
only sums over blocks are those of the first four lines and of t A2, and since a product commutes with factors of its
rows, t A2 = rate ((T_1 o silu') A2) + dq |k|^2 ((e1 o silu') A2), whose second half is known beforehand: so a launch
can leave its shares of all of them, and the next one has them before it needs drate. A launch turns the cotangents of
the state after chunk c into those of the state before it, and leaves the shares of chunk c - 1.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from titanfunc_kernels import memory_small_linear as linear
from titanfunc_kernels.launch import on_device
from titanfunc_kernels.memory_small import Scan
from titanfunc_kernels.memory_small_common import Blocks, anchor_index, blocks_of, groups_of, refuse
from titanfunc_kernels.memory_small_pull import pull_kernel
from titanfunc_kernels.memory_small_rows import keys_kernel, trace_kernel
from titanfunc_kernels.order import overlaps

# What takes all chunks at once: fewer warps a program leave room for others on its multiprocessor; stages of the loads.
WARPS_AT_ONCE, STAGES = 4, 2


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
    depth, size, hidden = len(weights), k.shape[-1], weights[0].shape[-1]
    cut = blocks or blocks_of(len(k), k.shape[2], size, hidden, depth, k.dtype, k.device)
    tokens = [t.contiguous() for t in (k, v, inner_lr, to_weights, to_momentum)]
    factors = [t.contiguous() for t in (keep_weights, momentum_to_weights, keep_momentum, refresh)]
    given = [t.contiguous() for t in (*d_weights, *d_momentum, *d_inputs, *d_errors, d_loss)]
    last = [t.contiguous() for t in (*d_last_weights, *d_last_momentum, *d_anchor)]
    if not tokens[2].numel():
        return [*(t.clone() for t in last), *(torch.zeros_like(t) for t in (*tokens, *factors[:3]))]
    pull = _pull_two if depth == 2 else _pull_one
    return pull([a.contiguous() for a in anchor], tokens, factors, clip, outputs, given, last, first_order, cut)


def _pull_one(
    anchor: list[Tensor], tokens: list[Tensor], factors: list[Tensor], clip: float, outputs: Scan, given: list[Tensor],
    last: list[Tensor], first_order: bool, cut: Blocks,
) -> list[Tensor]:  # fmt: skip
    """Memories of one matrix: one launch."""
    k = tokens[0]
    memories, chunks, length, size = k.shape
    past = outputs.weights[0]
    results = [t.new_empty(t.shape) for t in (*last, *tokens, *factors[:3])]
    scratch = [anchor[0].new_empty(anchor[0].shape, dtype=past.dtype)]
    scratch += [k.new_empty((memories, 2, size, size)) for _ in range(2)]
    c_w, c_s, *rest = given
    with on_device(k):
        linear.backward_kernel[(memories,)](
            *anchor, *tokens, *factors, past, outputs.momentum[0], c_w, c_s, *last, *rest, *results, *scratch,
            N=chunks, clip=float(clip), CLIP=clip > 0, FIRST_ORDER=first_order,
            NP=triton.next_power_of_2(max(chunks, 2)), C=length, D=size, FB=cut.width, BLOCKS=size // cut.width,
            num_warps=cut.warps, num_stages=1,
        )  # fmt: skip
    return results


def _pull_two(
    anchor: list[Tensor], tokens: list[Tensor], factors: list[Tensor], clip: float, outputs: Scan, given: list[Tensor],
    last: list[Tensor], first_order: bool, cut: Blocks,
) -> list[Tensor]:  # fmt: skip
    """Memories of two layers: all chunks, each chunk, all chunks."""
    k, v, inner_lr, g, n = tokens
    memories, chunks, length, size = k.shape
    hidden = anchor[0].shape[-1]
    count, wide = hidden // cut.width, torch.float32
    refresh = factors[3]

    def fresh(*shape: int, dtype: torch.dtype = k.dtype) -> Tensor:
        return k.new_empty(shape, dtype=dtype)

    d_states, d_tokens = ([t.new_empty(t.shape) for t in each] for each in (last, tokens))
    d_factors = [fresh(memories, chunks, count, dtype=wide) for _ in range(3)]
    index = anchor_index(refresh)
    starts = [a.to(outputs.weights[0].dtype) for a in anchor]
    every = (memories, chunks, length)
    z, back, dz = (fresh(*every, hidden) for _ in range(3))
    e2, through = (fresh(*every, size, dtype=wide) for _ in range(2))
    scalars, square = fresh(*every, 5, dtype=wide), fresh(*every, dtype=wide)
    dw1, ds1 = (fresh(memories, chunks, size, hidden) for _ in range(2))
    d_w1, d_w2, d_s1, d_s2, d_x1, d_x2, *d_rows = given
    d_k, d_v, *d_gates = d_tokens
    sizes = {"C": length, "D": size, "F": hidden, "FB": cut.width, "P": count}
    at_once = sizes | {"num_warps": min(cut.warps, WARPS_AT_ONCE), "num_stages": STAGES}
    sizes |= {"CLIP": clip > 0, "FIRST_ORDER": first_order, "num_warps": cut.warps, "num_stages": 1}
    of_memories = [
        starts[1], k, inner_lr, g, n, *factors, index, *outputs.weights, *outputs.momentum, outputs.inputs[1],
        outputs.errors[1], d_w1, d_w2, d_s1, d_s2, d_x2, *d_rows, *d_states, d_v, *d_gates, *d_factors,
        z, back, e2, through, scalars, dw1, ds1, dz, square,
    ]  # fmt: skip
    with on_device(k):
        trace_kernel[(memories * chunks,)](
            *starts, k, v, inner_lr, index, *outputs.weights, z, back, e2, through, scalars, chunks, **at_once
        )
        for group in groups_of(memories, count, k):
            held = group.stop - group.start
            t1, shares, sums = (
                fresh(2, held, *shape, dtype=wide)
                for shape in ((length, hidden), (count, length, size), (count, 3, length))
            )
            rest = [t[group] for t in of_memories]
            for c in range(chunks, -1, -1):
                pull_kernel[(held * count,)](
                    *(t[group] for t in (d_states if c < chunks - 1 else last)), *rest, t1, shares, sums, c, chunks,
                    float(clip), FIRST=c == chunks, LAST=c == 0, **overlaps(k), **sizes,
                )  # fmt: skip
        if first_order:
            d_k.zero_()
        else:
            keys_kernel[(memories * chunks,)](
                starts[0], k, g, n, index, outputs.weights[0], outputs.errors[0], dw1, ds1, dz, d_x1, square, scalars,
                d_k, chunks, **at_once,
            )  # fmt: skip
    return [*d_states, *d_tokens, *(d.sum(-1) for d in d_factors)]
