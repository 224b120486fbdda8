"""Writing chunks into wide memories: each chunk a short chain of launches that fills the device.

Letters: M memories (samples times heads), N chunks, C tokens a chunk, D head size, F hidden size, L depth (1 or 2).
The weights of a memory are [D, D], or [D, F] and [F, D]. Titans (arXiv 2501.00663), eq. 8-14, in closed form at the
chunk's anchor, with the squared error as the inner loss (formulas: titanfunc/ops/memory_write.py).

Launches of a chunk, and what each moves and computes at M 4, C 64, D 512, F 2048, bfloat16 products:

    hidden      z = X_1 W_1, X_2 = silu(z)                8 MB, 0.5 GFLOP     (depth 2)
    output      e_L = 2 (X_L W_L - v)                     8 MB, 0.5 GFLOP
    returned    r = e_2 W_2^T                             8 MB (in L2), 0.5 GFLOP     (depth 2)
    finish      norms -> clip -> rate; Delta, g Delta, n Delta  6 MB (in L2)
    update      W' = beta W + f S - X^T g Delta           134 MB, 2.1 GFLOP: the histories' W and S and the rest of
                S' = m S - X^T n Delta                    their float32 (memory_wide_state.py) once in and once out

The update bounds the whole. It walks its tiles forwards in even chunks and backwards in odd ones: what one chunk wrote
last, and the L2 cache still holds, the next reads first.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.memory_small_common import anchor_index
from titanfunc_kernels.memory_wide_rows import (
    below,
    finish_kernel,
    hidden_kernel,
    output_kernel,
    prepare_kernel,
    returned_kernel,
)
from titanfunc_kernels.memory_wide_state import load_state, lower_halves, outer, store_state
from titanfunc_kernels.order import overlap, overlaps

# Tiles. Products that leave [C, F] have enough tiles at 64 columns; those that leave [C, D] take 32 by 32, or they
# would fill a quarter of the device. The update holds a sum and the tiles of W and S in registers: at 64 by 64 and 4
# warps they fit into 128 of them, so that four programs share a multiprocessor and load while others multiply. Products
# of float32 factors run outside the matrix unit and need more. Sizes that tiles divide need no masks, which Triton
# leaves out: D and F are constants of every kernel.
HIDDEN = {"BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4}
OUTPUT = {"BN": 32, "BK": 128, "num_warps": 4, "num_stages": 4}
OUTPUT_ROWS = 32
FINISH = {"BT": 4, "BN": 1024, "num_warps": 4}
UPDATE = {torch.bfloat16: {"BM": 64, "BN": 64, "num_warps": 4}, torch.float32: {"BM": 32, "BN": 32, "num_warps": 4}}
UPDATE_REGISTERS = 128  # of a thread, at most
ROWS = 64  # of tokens in one tile, at most
UPDATE_ROWS = 32  # of tokens that an update takes at a time


class Outputs(NamedTuple):
    """weights, momentum: lists of [M, N, ...], the state at each chunk's start, in the histories' dtype.
    last_weights, last_momentum, anchor: lists of [M, ...], float32. inputs X, errors Delta: lists of [M, N, C, d] in
    k's dtype. loss, kept: [M, N, C], float32. residuals, for the backward: e_L [M, N, C, D] in float32 and in k's
    dtype, squared norms of rows X_l and e_l [M, N, C, 2 L] in float32, and at depth 2 z and r [M, N, C, F]."""

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
def _update_tile(
    w_in, s_in, w_low, s_low, w_past, s_past, w_out, s_out, anchor_in, anchor_out, index, x, delta_g, delta_n,
    beta, f, momentum, tile, m, c, N, C, DI: tl.constexpr, DO: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of one layer's weights [DI, DO] and momentum: chunk c written into them, first the weights.

    One after the other, each behind its product: S is loaded twice, but no more than two tiles are live beside a sum.
    """
    wide = tl.cdiv(DO, BN)
    rows, cols = (tile // wide) * BM + tl.arange(0, BM), (tile % wide) * BN + tl.arange(0, BN)
    here, there = below(rows, DI, DI % BM == 0), below(cols, DO, DO % BN == 0)
    held = here[:, None] & there[None, :]
    at = rows[:, None] * DO + cols[None, :]
    own, past = m.to(tl.int64) * DI * DO, (m.to(tl.int64) * N + c) * DI * DO
    keep_w, carry, keep_s = tl.load(beta + m * N + c), tl.load(f + m * N + c), tl.load(momentum + m * N + c)
    last = tl.load(index + m * N + N - 1)
    x += (m.to(tl.int64) * N + c) * C * DI
    delta_g += m.to(tl.int64) * C * DO
    delta_n += m.to(tl.int64) * C * DO
    if FIRST:  # noqa: SIM102
        if last < 0:
            tl.store(anchor_out + own + at, tl.load(anchor_in + own + at, mask=held, other=0.0), mask=held)
    if last == c:  # loaded for itself: beside the products it would cost registers
        if FIRST:
            w = tl.load(w_in + own + at, mask=held, other=0.0)
        else:
            w = load_state(w_past + past, w_low + own, at, held)
        tl.store(anchor_out + own + at, w, mask=held)
    by_g = outer(x, delta_g, rows, here, cols, there, C, DI, DO, BM, BN, BC, WHOLE)
    if FIRST:
        w, s = tl.load(w_in + own + at, mask=held, other=0.0), tl.load(s_in + own + at, mask=held, other=0.0)
    else:
        w, s = load_state(w_past + past, w_low + own, at, held), load_state(s_past + past, s_low + own, at, held)
    w = keep_w * w + carry * s - by_g
    if LAST:
        tl.store(w_out + own + at, w, mask=held)
    else:
        store_state(w_past + past + DI * DO, w_low + own, at, w, held)
    by_n = outer(x, delta_n, rows, here, cols, there, C, DI, DO, BM, BN, BC, WHOLE)
    if FIRST:  # noqa: SIM108
        s = tl.load(s_in + own + at, mask=held, other=0.0)
    else:
        s = load_state(s_past + past, s_low + own, at, held)
    s = keep_s * s - by_n
    if LAST:
        tl.store(s_out + own + at, s, mask=held)
    else:
        store_state(s_past + past + DI * DO, s_low + own, at, s, held)


@triton.jit(do_not_specialize=["c"])
def _update(
    w1_in, s1_in, w1_low, s1_low, w1_past, s1_past, w1, s1, a1_in, a1, x1, d1_g, d1_n,
    w2_in, s2_in, w2_low, s2_low, w2_past, s2_past, w2, s2, a2_in, a2, x2, d2_g, d2_n,
    index, beta, f, momentum, c, N, C, D: tl.constexpr, F: tl.constexpr, tiles1, tiles,
    DEPTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every tile of every layer of every memory, in alternating order. At depth 1 the first layer is [D, F = D]."""
    overlap(OVERLAP)
    turn = tl.program_id(0)
    if c % 2 == 1:
        turn = tl.num_programs(0) - 1 - turn
    m, tile = turn // tiles, turn % tiles
    if DEPTH == 1:
        _update_tile(
            w1_in, s1_in, w1_low, s1_low, w1_past, s1_past, w1, s1, a1_in, a1, index, x1, d1_g, d1_n,
            beta, f, momentum, tile, m, c, N, C, D, F, FIRST, LAST, BM, BN, BC, WHOLE,
        )  # fmt: skip
    else:
        if tile < tiles1:
            _update_tile(
                w1_in, s1_in, w1_low, s1_low, w1_past, s1_past, w1, s1, a1_in, a1, index, x1, d1_g, d1_n,
                beta, f, momentum, tile, m, c, N, C, D, F, FIRST, LAST, BM, BN, BC, WHOLE,
            )  # fmt: skip
        else:
            _update_tile(
                w2_in, s2_in, w2_low, s2_low, w2_past, s2_past, w2, s2, a2_in, a2, index, x2, d2_g, d2_n,
                beta, f, momentum, tile - tiles1, m, c, N, C, F, D, FIRST, LAST, BM, BN, BC, WHOLE,
            )  # fmt: skip


def token_block(tokens: int, most: int = ROWS) -> int:
    """Rows of tokens in a tile: a power of two that a matrix unit takes."""
    return min(most, max(16, triton.next_power_of_2(tokens)))


def update_stages(tokens: int) -> int:
    """How deep an update's loop over blocks of tokens is pipelined: no deeper than there are blocks."""
    return min(3, -(-tokens // UPDATE_ROWS))


def finish_tiles(size: int) -> dict[str, int]:
    """Tiles of the kernels that end a pass over a chunk's tokens: no wider than the narrowest rows, those of D."""
    return FINISH | {"BN": min(FINISH["BN"], triton.next_power_of_2(size))}


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
) -> Outputs:
    """Writes N chunks k, v [M, N, C, D] into contiguous float32 weights and momentum, lists of [M, ...].

    inner_lr, to_weights (g), to_momentum (n): [M, N, C]; keep_weights (beta), momentum_to_weights (f), keep_momentum
    (m), refresh: [M, N]; all float32. k and v in the dtype of the matrix products, which state_dtype has to be too:
    a chunk takes its anchor out of the history.
    """
    M, N, C, D = k.shape
    depth, F, dtype = len(weights), weights[0].shape[2], k.dtype

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=k.device)

    w_past, s_past = ([fresh(M, N, *w.shape[1:], dtype=state_dtype) for w in weights] for _ in range(2))
    w_last, s_last, anchor_out = ([torch.empty_like(w) for w in weights] for _ in range(3))
    w_low, s_low = ([lower_halves(w, state_dtype) for w in weights] for _ in range(2))
    inputs = [fresh(M, N, C, w.shape[1], dtype=dtype) for w in weights]
    errors = [fresh(M, N, C, w.shape[2], dtype=dtype) for w in weights]
    delta_g, delta_n = ([fresh(M, C, w.shape[2], dtype=dtype) for w in weights] for _ in range(2))
    loss, kept, norms = fresh(M, N, C), fresh(M, N, C), fresh(M, N, C, 2 * depth)
    e_wide, e = fresh(M, N, C, D), fresh(M, N, C, D, dtype=dtype)
    z, r = (fresh(M, N, C, F, dtype=dtype) if depth == 2 else e for _ in range(2))

    index = anchor_index(refresh)
    given = [leaf.to(dtype) for leaf in anchor]
    for past, leaf in zip([*w_past, *s_past], [*weights, *momentum], strict=True):
        past[:, 0].copy_(leaf)
    width = triton.next_power_of_2(D)
    few = max(1, 4096 // width)
    prepare_kernel[(triton.cdiv(M * N * C, few),)](
        k, v, inner_lr, inputs[0], kept, norms, M * N * C, D, WIDTH=2 * depth, BT=few, BD=width
    )

    rows, narrow, block = token_block(C), token_block(C, OUTPUT_ROWS), token_block(C, UPDATE_ROWS)
    parts_h, parts_d = triton.cdiv(F, HIDDEN["BN"]), triton.cdiv(D, OUTPUT["BN"])
    part_e = fresh(M, parts_d, C)
    part_h, part_d = (fresh(M, parts_h, C) if depth == 2 else part_e for _ in range(2))
    over_hidden = (parts_h, triton.cdiv(C, rows), M)
    over_output = (parts_d, triton.cdiv(C, narrow), M)
    finish, hidden = finish_tiles(D), HIDDEN | {"BC": rows, "WHOLE": C % rows == 0}
    columns = triton.cdiv(D, finish["BN"]) + (triton.cdiv(F, finish["BN"]) if depth == 2 else 0)
    update = {"maxnreg": UPDATE_REGISTERS} | UPDATE[dtype]
    tiles = [triton.cdiv(w.shape[1], update["BM"]) * triton.cdiv(w.shape[2], update["BN"]) for w in weights]
    leaves = [
        [weights[i], momentum[i], w_low[i], s_low[i], w_past[i], s_past[i], w_last[i], s_last[i],
         anchor[i], anchor_out[i], inputs[i], delta_g[i], delta_n[i]]
        for i in (0, depth - 1)
    ]  # fmt: skip
    early: dict[str, bool] = {"OVERLAP": False}  # the first launch waits for all that others did before
    for c in range(N):
        if depth == 2:
            hidden_kernel[over_hidden](
                inputs[0], given[0], w_past[0], index, z, inputs[1], part_h, c, N, C, D, F, **hidden, **early
            )
            early = overlaps(k)
        output_kernel[over_output](
            inputs[-1], v, kept, given[-1], w_past[-1], index, e_wide, e, part_e, c, N, C, weights[-1].shape[1], D,
            BC=narrow, WHOLE=C % narrow == 0, **OUTPUT, **early,
        )  # fmt: skip
        early = overlaps(k)
        if depth == 2:
            returned_kernel[over_hidden](e, z, given[1], w_past[1], index, r, part_d, c, N, C, D, F, **hidden, **early)
        finish_kernel[(columns, triton.cdiv(C, finish["BT"]), M)](
            inner_lr, to_weights, to_momentum, e_wide, e, z, r, inputs[0], inputs[-1], errors[-1], delta_g[-1],
            delta_n[-1], errors[0], delta_g[0], delta_n[0], norms, kept, loss, part_h, part_e, part_d,
            clip, c, N, C, D, F, CLIPS=clip > 0, DEPTH=depth,
            PH=parts_h, PH_PADDED=triton.next_power_of_2(parts_h),
            PD=parts_d, PD_PADDED=triton.next_power_of_2(parts_d), WHOLE=C % finish["BT"] == 0, **finish, **early,
        )  # fmt: skip
        _update[(M * sum(tiles),)](
            *leaves[0], *leaves[1], index, keep_weights, momentum_to_weights, keep_momentum,
            c, N, C, D, F, tiles[0], sum(tiles), DEPTH=depth, FIRST=c == 0, LAST=c == N - 1, BC=block,
            WHOLE=C % block == 0, num_stages=update_stages(C), **update, **early,
        )  # fmt: skip
    rest = [z, r] if depth == 2 else []
    return Outputs(
        w_past, s_past, w_last, s_last, anchor_out, inputs, errors, loss, kept, [e_wide, e, norms, *rest]
    )  # fmt: skip
