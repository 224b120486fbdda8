"""Writing chunks into small memories, all chunks in one launch: backward of memory_small.py.

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

What no cotangent of a state enters is made for all chunks at once beforehand, and what no other chunk needs for all of
them afterwards (memory_small_rows.py). In between one launch goes from the last chunk to the first, with P programs a
memory that share its hidden features, a block each, and carry the cotangents of their blocks of the state. The only
sums over blocks are drate and t A2, and since a product commutes with factors of its rows, t A2 = rate ((T_1 o silu')
A2) + dq |k|^2 ((e1 o silu') A2), whose second half is known beforehand: so each program leaves its shares of both before
anything needs drate, and the programs of a memory meet once a chunk.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from titanfunc_kernels import memory_small_linear as linear
from titanfunc_kernels.launch import on_device
from titanfunc_kernels.memory_small import Scan
from titanfunc_kernels.memory_small_common import (
    WARPS,
    Blocks,
    anchor_index,
    blocks_of,
    groups_of,
    pull_blocks_of,
    refuse,
)
from titanfunc_kernels.memory_small_pull import pull_kernel
from titanfunc_kernels.memory_small_rows import keys_kernel, trace_kernel

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
    if depth == 1:
        cut = blocks or blocks_of(len(k), k.shape[2], size, hidden, depth, k.dtype, k.device)
    else:
        cut = blocks or pull_blocks_of(k.shape[2], size, hidden, k.dtype, k.device)
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
    """Memories of two layers: all chunks at once, one after the other, all at once."""
    k, v, inner_lr, g, n = tokens
    memories, chunks, length, size = k.shape
    hidden = anchor[0].shape[-1]
    programs, wide = hidden // cut.width, torch.float32

    def fresh(*shape: int, dtype: torch.dtype = k.dtype) -> Tensor:
        return k.new_empty(shape, dtype=dtype)

    d_states, d_tokens = ([t.new_empty(t.shape) for t in each] for each in (last, tokens))
    d_factors = [fresh(memories, chunks, dtype=wide) for _ in range(3)]
    index = anchor_index(factors[3])
    starts = [a.to(outputs.weights[0].dtype) for a in anchor]
    every = (memories, chunks, length)
    slope, bend, e1, gx2, nx2 = (fresh(*every, hidden) for _ in range(5))
    gx1, nx1, ge2, ne2, e2 = (fresh(*every, size) for _ in range(5))
    base, by_clip = (fresh(*every, size, dtype=wide) for _ in range(2))
    scalars, rate = fresh(*every, 7, dtype=wide), fresh(*every, dtype=wide)
    d1 = [fresh(memories, chunks, size, hidden) for _ in range(2)]
    d2 = [fresh(memories, chunks, hidden, size) for _ in range(2)]
    dz = gx2  # its block is read before theirs is stored
    d_w1, d_w2, d_s1, d_s2, d_x1, d_x2, d_e1, d_e2, d_loss = given
    d_k, d_v, *d_gates = d_tokens
    of_chunks = {"C": length, "D": size, "F": hidden}
    apart = blocks_of(memories, length, size, hidden, 2, k.dtype, k.device)
    at_once = of_chunks | {"FB": apart.width, "P": hidden // apart.width, "num_stages": STAGES}
    at_once |= {"num_warps": min(apart.warps, WARPS_AT_ONCE)}
    of_memories = [
        starts[1], *factors, index, outputs.weights[1], *outputs.inputs, d_w1, d_w2, d_s1, d_s2, d_x2, d_e1,
        *d_states, d_v, rate, gx1, nx1, gx2, nx2, ge2, ne2, slope, bend, e1, e2, base, by_clip, scalars, *d1, *d2, dz,
    ]  # fmt: skip
    with on_device(k):
        trace_kernel[(memories * chunks,)](
            *starts, k, v, inner_lr, g, n, outputs.kept, index, *outputs.weights, outputs.inputs[1], outputs.errors[1],
            d_e2, d_loss, slope, bend, e1, gx1, nx1, gx2, nx2, ge2, ne2, e2, base, by_clip, scalars, chunks,
            float(clip), CLIP=clip > 0, **at_once,
        )  # fmt: skip
        launch = of_chunks | {"FB": cut.width, "P": programs, "num_warps": cut.warps, "num_stages": 1}
        if k.is_cuda and programs > 1:  # they wait for each other: all of them run at once, or the launch fails
            launch["launch_cooperative_grid"] = True
        for group in groups_of(memories, programs, k, together=WARPS // cut.warps):
            held = group.stop - group.start
            exchanged = [
                fresh(held, programs, length, size), fresh(2, held, programs, length, size, dtype=wide),
                fresh(2, held, programs, 2, length, dtype=wide),
                torch.zeros(held, dtype=torch.int32, device=k.device),
            ]  # fmt: skip
            pull_kernel[(held * programs,)](
                *(t[group] for t in (*last, *of_memories)), *exchanged, chunks, FIRST_ORDER=first_order, **launch
            )
        keys_kernel[(memories * chunks,)](
            starts[0], g, n, index, *outputs.weights, *outputs.momentum, *outputs.inputs, *outputs.errors, *d1, *d2,
            dz, d_x1, rate, scalars, outputs.kept, d_k, *d_gates, *d_factors, chunks, FIRST_ORDER=first_order, **at_once,
        )  # fmt: skip
    if first_order:
        d_k.zero_()
        d_v.zero_()
    return [*d_states, *d_tokens, *d_factors]
