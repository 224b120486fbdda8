"""The derivative of writing chunks into wide memories, from the last chunk to the first.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, L depth (1 or 2); layer l is [DI, DO].
Cotangents dW and dS of the state after a chunk are float32, kept as the state is (memory_wide_state.py). With
Delta_l = rate e_l, launches of a chunk and what each moves at M 4, C 64, D 512, F 2048, bfloat16 products:

    pull_state   t_l = dDelta_l - g (X_l dW_l) - n (X_l dS_l)         67 MB, 4.3 GFLOP
                 dX_l -= g (Delta_l dW_l^T) + n (Delta_l dS_l^T)
    scale        d rate = sum_l <t_l, e_l>, the clip; de_1 = rate t_1 + ..; u = de_1 silu'(z);
                 rest = (dX_2 + ..) silu'(z) + de_1 r silu''(z)                                     11 MB (in L2)
    pull_error   de_2 = rate t_2 + .. + u W_2;  dy = 2 de_2 + e_2 d loss;  dv = -dy                 8 MB, 0.5 GFLOP
    pull_hidden  dz = (dy W_2^T) silu'(z) + rest                                                8 MB, 0.5 GFLOP
    pull_update  dA = X_l^T d(out of layer l) (+ u^T e_2 for W_2)                                  201 MB, 1.6 GFLOP
                 dW = beta dW + dA + d history,  dS = f dW + m dS + d history
                 d beta = <dW, W>, d f = <dW, S>, d m = <dS, S>
                 with reads in the same operation (memory_wide_read.py) d history is Q^T P of rows: 168 MB, 3.8 GFLOP

where .. is the clip's term d square |.|^2 e_l or x_l. The keys' gradient dX_1 + dz W_1^T needs no chunk's state after
its own, so one launch takes it for all chunks at the end (pull_key, 0.3 GB). At depth 1 scale makes dy itself.
A chunk that keeps an older anchor hands dA on to the chunk before it, in dA's own float32 buffer.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from titanfunc_kernels.memory_small_common import anchor_index
from titanfunc_kernels.memory_wide import (
    HIDDEN,
    OUTPUT,
    OUTPUT_ROWS,
    UPDATE,
    UPDATE_REGISTERS,
    UPDATE_ROWS,
    Outputs,
    finish_tiles,
    token_block,
    update_stages,
)
from titanfunc_kernels.memory_wide_pull import (
    pull_error_kernel,
    pull_hidden_kernel,
    pull_key_kernel,
    pull_state_kernel,
    scale_kernel,
)
from titanfunc_kernels.memory_wide_pull_update import pull_update_kernel
from titanfunc_kernels.memory_wide_state import lower_halves
from titanfunc_kernels.order import overlaps

# The pull through the state reads both cotangents for every block of tokens: long chunks take larger blocks. With so
# few registers another program fits beside, for a few spills behind the loop.
STATE = {"BC": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
STATE_LONG = {"BC": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
KEY = {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4}


class Reads(NamedTuple):
    """Reads Q W and Q S of every chunk's start, by which their cotangents are Q^T P_w and Q^T P_s: lists of rows
    Q [M, N, C, DI] and P_w, P_s [M, N, C, DO] in k's dtype."""

    queries: list[Tensor]
    by_weights: list[Tensor]
    by_momentum: list[Tensor]


def state_tiles(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """How the pull through the state is laid out; tiles of float32 factors would not fit if they were larger."""
    tiles = STATE_LONG if tokens > STATE["BC"] and dtype == torch.bfloat16 else STATE
    return tiles | {"BC": token_block(tokens, tiles["BC"])}


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
    outputs: Outputs,
    d_weights: list[Tensor],
    d_momentum: list[Tensor],
    d_last_weights: list[Tensor],
    d_last_momentum: list[Tensor],
    d_anchor: list[Tensor],
    d_inputs: list[Tensor],
    d_errors: list[Tensor],
    d_loss: Tensor,
    first_order: bool = False,
    reads: Reads | None = None,
) -> list[Tensor]:
    """Gradients of every input of ``forward`` but refresh, in its order: lists of [M, ...], [M, N, C, ...], [M, N].

    outputs: what forward returned; d_...: contiguous cotangents of its fields, of their shapes and dtypes.
    first_order: rows X and Delta / theta are constants. reads: what stands for the histories' cotangents, which are
    then not looked at.
    """
    M, N, C, D = k.shape
    depth, F, dtype, full = len(weights), weights[0].shape[2], k.dtype, not first_order
    e_wide, e, norms, *hidden = outputs.residuals
    z, r = hidden or (e, e)
    kept, x = outputs.kept, outputs.inputs

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=k.device)

    dw, ds = ([torch.empty_like(leaf) for leaf in weights] for _ in range(2))
    da = [leaf.clone() for leaf in d_anchor]
    dw_high, ds_high = (
        [torch.empty_like(leaf, dtype=dtype).copy_(leaf) for leaf in each] for each in (d_last_weights, d_last_momentum)
    )
    dw_low, ds_low = ([lower_halves(leaf, dtype) for leaf in weights] for _ in range(2))
    index, given = anchor_index(refresh), [leaf.to(dtype) for leaf in anchor]
    d_lr, d_g, d_n, rate, d_square = (fresh(M, N, C) for _ in range(5))
    by_state = state_tiles(C, dtype)
    span = triton.cdiv(F, max(1, F // D) * by_state["BK"]) * by_state["BK"]
    splits = triton.cdiv(F, span) if depth == 2 else 1
    d_k, d_v, dx_first = torch.empty_like(k), torch.empty_like(v), fresh(M, N, C, D)
    d_z, d_y = fresh(M, N, C, F, dtype=dtype), fresh(M, C, D, dtype=dtype)
    t_last = fresh(splits, M, C, D)
    dx_shares = torch.empty_like(t_last) if depth == 2 else dx_first
    t, dx_second = (fresh(M, C, F) for _ in range(2)) if depth == 2 else (t_last, dx_first)
    u = fresh(M, C, F, dtype=dtype) if depth == 2 else d_y
    rows, narrow, block = token_block(C), token_block(C, OUTPUT_ROWS), token_block(C, UPDATE_ROWS)
    over_d, over_f = triton.cdiv(D, by_state["BN"]), triton.cdiv(F, by_state["BN"])
    slots = over_d * splits + over_f if depth == 2 else over_d
    part = fresh(M, 3, slots, C)
    update = {"maxnreg": UPDATE_REGISTERS} | UPDATE[dtype]
    tiles = [triton.cdiv(w.shape[1], update["BM"]) * triton.cdiv(w.shape[2], update["BN"]) for w in weights]
    part_gates = fresh(M, 3, N, sum(tiles))
    if reads:
        rows_q, d_weights, d_momentum = reads
    else:
        rows_q = x
    leaves = [
        [d_last_weights[i], d_last_momentum[i], dw_high[i], ds_high[i], dw_low[i], ds_low[i], dw[i], ds[i], da[i],
         outputs.weights[i], outputs.momentum[i], d_weights[i], d_momentum[i], x[i],
         rows_q[i]]
        for i in (0, depth - 1)
    ]  # fmt: skip
    state = [
        [dw_high[i], ds_high[i], x[i], outputs.errors[i], d_errors[i], d_inputs[i], (t, t_last)[i],
         (dx_shares, dx_second)[i]]
        for i in (0, depth - 1)
    ]  # fmt: skip
    finish = finish_tiles(D)
    across = 1 if first_order else triton.cdiv(F, finish["BN"])
    early: dict[str, bool] = {"OVERLAP": False}  # the first launch waits for all that others did before
    for c in range(N - 1, -1, -1):
        pull_state_kernel[(slots * (2 if full else 1), triton.cdiv(C, by_state["BC"]), M)](
            *state[0], *state[1], e_wide, z, r, kept, to_weights, to_momentum, part,
            c, N, C, D, F, slots, splits, span, DEPTH=depth, FULL=full, WHOLE=C % by_state["BC"] == 0, **by_state,
            **early,
        )  # fmt: skip
        early = overlaps(k)
        scale_kernel[(across, triton.cdiv(C, finish["BT"]), M)](
            part, inner_lr, norms, kept, d_loss, e_wide, z, r, x[-1], dx_second, t, u, d_z, d_v, rate, d_square,
            d_lr, d_g, d_n, clip, c, N, C, F, CLIPS=clip > 0, DEPTH=depth, FULL=full,
            P=slots, PADDED=triton.next_power_of_2(slots), WHOLE=C % finish["BT"] == 0, **finish, **early,
        )  # fmt: skip
        if full and depth == 2:
            pull_error_kernel[(triton.cdiv(D, OUTPUT["BN"]), triton.cdiv(C, narrow), M)](
                u, given[1], outputs.weights[1], index, t_last, dx_shares, e_wide, norms, kept, d_loss, rate, d_square,
                d_y, d_v, dx_first, c, N, C, D, F, SPLITS=splits, BC=narrow,
                WHOLE=C % narrow == 0, **OUTPUT, **early,
            )  # fmt: skip
            pull_hidden_kernel[(triton.cdiv(F, HIDDEN["BN"]), triton.cdiv(C, rows), M)](
                d_y, given[1], outputs.weights[1], index, t, z, kept, d_z,
                c, N, C, D, F, BC=rows, WHOLE=C % rows == 0, **HIDDEN, **early,
            )  # fmt: skip
        pull_update_kernel[(M * sum(tiles),)](
            *leaves[0], *leaves[1], d_z, d_y, u, e, keep_weights, momentum_to_weights, keep_momentum, refresh,
            part_gates, c, N, C, D, F, tiles[0], sum(tiles), DEPTH=depth, FIRST=c == N - 1, LAST=c == 0,
            FULL=full, READS=reads is not None, BC=block, WHOLE=C % block == 0,
            num_stages=update_stages(C), **update, **early,
        )  # fmt: skip
    if full:
        pull_key_kernel[(M * N * triton.cdiv(D, KEY["BN"]), triton.cdiv(C, rows))](
            d_z, given[0], outputs.weights[0], index, dx_first, x[0], norms, kept, d_square, d_k, N, C, D, F,
            WIDTH=2 * depth, BC=rows, WHOLE=C % rows == 0, **KEY,
        )  # fmt: skip
    else:
        d_k.zero_()
        d_v.zero_()
    d_beta, d_f, d_m = (each.clone(memory_format=torch.contiguous_format) for each in part_gates.sum(-1).unbind(1))
    return [*dw, *ds, *da, d_k, d_v, d_lr, d_g, d_n, d_beta, d_f, d_m]
