"""Reading wide memories at every token, and the derivative by everything but the histories themselves.

Letters: M memories, N chunks, R = M N, C tokens a chunk, D head size, F hidden size, a layer's weights [DI, DO].
Formulas: titanfunc/ops/memory_read.py. A layer reads y = beta (Q W) + f (Q S) - (G o (Q X^T)) Delta at the chunk's
start W, S, with silu between two layers. Back, dQ = beta (dy W^T) + f (dy S^T) - (G o (dy Delta^T)) X; what W and S
get is Q^T (beta dy) and Q^T (f dy), of which only the factors are handed on (memory_wide_backward.py: Reads): the
products are as large as the histories. The few products with C by C numbers are plain torch's.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.memory_wide_backward import Reads, state_tiles
from titanfunc_kernels.memory_wide_rows import below, product, slope_of
from titanfunc_kernels.memory_wide_state import by_state


class Gates(NamedTuple):
    """How reads take the state: keep_weights (beta) and momentum_to_weights (f) [M, N, C], to_weights (G)
    [M, N, C, C]; float32."""

    keep_weights: Tensor
    momentum_to_weights: Tensor
    to_weights: Tensor


class Pulled(NamedTuple):
    """The cotangents of the queries [M, N, C, D], of the rows X and Delta, of the gates, and the histories' factors."""

    queries: Tensor
    inputs: list[Tensor]
    errors: list[Tensor]
    gates: Gates
    reads: Reads


@triton.jit
def _read(
    x, w, s, scores, delta, beta, f, y, h, C, DI: tl.constexpr, DO: tl.constexpr,
    HIDDEN: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of y [R, C, DO], and of silu(y) where another layer follows; scores: G o (Q X^T) [R, C, C]."""
    tiles = tl.cdiv(DO, BN)
    r = (tl.program_id(0) // tiles).to(tl.int64)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    state = r * DI * DO
    here, there = below(rows, C, WHOLE), below(cols, DO, DO % BN == 0)
    by_w, by_s = by_state(
        x + r * C * DI, w + state, s + state, DO, 1, rows, here, cols, there, DI, 0, DI, BC, BN, BK, DI % BK == 0
    )  # fmt: skip
    own = product(
        scores + r * C * C, C, 1, delta + r * C * DO, DO, 1, rows, here, cols, there, C,
        tl.zeros((BC, BN), dtype=tl.float32), BK, WHOLE and BC % BK == 0,
    )  # fmt: skip
    keep = tl.load(beta + r * C + rows, mask=here, other=0.0)[:, None]
    pace = tl.load(f + r * C + rows, mask=here, other=0.0)[:, None]
    stored = (keep * by_w + pace * by_s - own).to(y.dtype.element_ty)
    at, past = rows[:, None] * DO + cols[None, :], r * C * DO
    held = here[:, None] & there[None, :]
    tl.store(y + past + at, stored, mask=held)
    if HIDDEN:
        wide = stored.to(tl.float32)
        tl.store(h + past + at, (wide * tl.sigmoid(wide)).to(h.dtype.element_ty), mask=held)


@triton.jit
def _pull_read(
    dy, w, s, d_scores, rows_x, x, z, beta, f, dx, scaled_w, scaled_s, part, C, DI: tl.constexpr, DO: tl.constexpr,
    HIDDEN: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of dQ [R, C, DI] of one layer's reads, its shares of d beta and d f.

    d_scores: G o (dy Delta^T) [R, C, C]. x: the rows Q; with HIDDEN they are silu(z), and what is stored is dz, with
    beta dz and f dz beside it.
    """
    tiles = tl.cdiv(DI, BN)
    r, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tile * BN + tl.arange(0, BN)
    state = r * DI * DO
    here, there = below(rows, C, WHOLE), below(cols, DI, DI % BN == 0)
    by_w, by_s = by_state(
        dy + r * C * DO, w + state, s + state, 1, DO, rows, here, cols, there, DO, 0, DO, BC, BN, BK, DO % BK == 0
    )  # fmt: skip
    own = product(
        d_scores + r * C * C, C, 1, rows_x + r * C * DI, DI, 1, rows, here, cols, there, C,
        tl.zeros((BC, BN), dtype=tl.float32), BK, WHOLE and BC % BK == 0,
    )  # fmt: skip
    keep = tl.load(beta + r * C + rows, mask=here, other=0.0)[:, None]
    pace = tl.load(f + r * C + rows, mask=here, other=0.0)[:, None]
    at, past = rows[:, None] * DI + cols[None, :], r * C * DI
    held = here[:, None] & there[None, :]
    query = tl.load(x + past + at, mask=held, other=0.0).to(tl.float32)
    place = part + (r * tiles + tile) * C + rows
    tl.store(place, tl.sum(by_w * query, 1), mask=here)
    tl.store(place + tl.num_programs(0).to(tl.int64) * C, tl.sum(by_s * query, 1), mask=here)
    result = keep * by_w + pace * by_s - own
    if HIDDEN:
        result *= slope_of(tl.load(z + past + at, mask=held, other=0.0).to(tl.float32))
        tl.store(scaled_w + past + at, (keep * result).to(dx.dtype.element_ty), mask=held)
        tl.store(scaled_s + past + at, (pace * result).to(dx.dtype.element_ty), mask=held)
    tl.store(dx + past + at, result.to(dx.dtype.element_ty), mask=held)


def forward(
    q: Tensor, weights: list[Tensor], momentum: list[Tensor], inputs: list[Tensor], errors: list[Tensor], gates: Gates
) -> list[Tensor]:
    """[y] for queries q [M, N, C, D] of one layer's memories, [y, z] of two: y [M, N, C, D], z [M, N, C, F] in front of
    the silu, in q's dtype. weights, momentum: histories [M, N, DI, DO]; inputs, errors: rows X and Delta."""
    M, N, C, _ = q.shape
    tiles = state_tiles(C, q.dtype)
    found: list[Tensor] = []
    x = q
    for i, (w, s) in enumerate(zip(weights, momentum, strict=True)):
        DI, DO = w.shape[-2:]
        hidden = i + 1 < len(weights)
        scores = (gates.to_weights * torch.matmul(x, inputs[i].mT)).to(q.dtype)
        y = q.new_empty((M, N, C, DO))
        h = torch.empty_like(y) if hidden else y
        _read[(M * N * triton.cdiv(DO, tiles["BN"]), triton.cdiv(C, tiles["BC"]))](
            x, w, s, scores, errors[i], gates.keep_weights, gates.momentum_to_weights, y, h, C, DI, DO,
            HIDDEN=hidden, WHOLE=C % tiles["BC"] == 0, **tiles,
        )  # fmt: skip
        found.insert(0, y)
        x = h
    return found


def backward(
    q: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    inputs: list[Tensor],
    errors: list[Tensor],
    gates: Gates,
    hidden: Tensor | None,
    d_y: Tensor,
) -> Pulled:
    """The cotangents of everything that :func:`forward` read, from d_y like y; hidden: its z."""
    M, N, C, _ = q.shape
    dtype, tiles = q.dtype, state_tiles(C, q.dtype)
    keep, pace = gates.keep_weights, gates.momentum_to_weights
    x = [q] if hidden is None else [q, torch.nn.functional.silu(hidden)]
    d_gates = Gates(*(torch.zeros_like(gate) for gate in gates))
    d_inputs: list[Tensor] = []
    d_errors: list[Tensor] = []
    by_w, by_s = ([(gate[..., None] * d_y).to(dtype)] for gate in (keep, pace))
    for i in reversed(range(len(weights))):
        DI, DO = weights[i].shape[-2:]
        raw, d_scores = torch.matmul(x[i], inputs[i].mT), torch.matmul(d_y, errors[i].mT)
        d_gates.to_weights.addcmul_(raw.float(), d_scores.float(), value=-1)
        d_errors.insert(0, torch.matmul((-gates.to_weights * raw).to(dtype).mT, d_y))
        d_raw = (gates.to_weights * d_scores).to(dtype)
        d_inputs.insert(0, torch.matmul(-d_raw.mT, x[i]))
        d_x = torch.empty_like(x[i])
        scaled = [torch.empty_like(d_x) if i else d_x for _ in range(2)]
        blocks = triton.cdiv(DI, tiles["BN"])
        part = keep.new_empty((2, M, N, blocks, C))
        _pull_read[(M * N * blocks, triton.cdiv(C, tiles["BC"]))](
            d_y, weights[i], momentum[i], d_raw, inputs[i], x[i], hidden if i else q, keep, pace, d_x, *scaled, part,
            C, DI, DO, HIDDEN=i > 0, WHOLE=C % tiles["BC"] == 0, **tiles,
        )  # fmt: skip
        for total, share in zip(d_gates, part.sum(3), strict=False):
            total.add_(share)
        if i:
            by_w.insert(0, scaled[0])
            by_s.insert(0, scaled[1])
        d_y = d_x
    return Pulled(d_y, d_inputs, d_errors, d_gates, Reads(x, by_w, by_s))
