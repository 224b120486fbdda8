"""One write of N rows into a batch of memories: forward, gradient, clip by the global norm, momentum and forgetting.

Letters: M memories, N rows, D features, F hidden features (depth 1: F = D).

Five stages, each a list of independent tiles; a stage reads what the one before it wrote (device memory, in
practice L2). Products take their operands in k's dtype and accumulate in float32.

    0  hidden    z = k W1; h = silu(z), slope = silu'(z) [N, F]; beside it W2 in k's dtype and sums of the mask
    1  error     y = h W2; e = 2 c m (y - v) [N, D]; sums of c m (y - v)^2 (c: 1 / (N D) for the mean, m: the mask)
    2  back      d = (e W2^T) slope [N, F]; beside it h^T e [F, D], which does not wait for it, and its squares
    3  gradient  k^T d [D, F] and its squares (depth 1: k^T e)
    4  step      norm from the sums of squares; S' = eta S - theta clip g; W' = (1 - alpha) W + S'

Depth 1 has no stage 0 and 2. Nothing is added by atomics: every sum is a list of partial sums, one a tile, added in
one order by whoever needs it, so that a write gives the same bits each time.

Two launches: the first stage alone, which also zeroes a counter, then the rest as one cooperative grid of at most one
program a multiprocessor, which meets at the counter between stages. A launch a stage
computes the same.

What N = 2048, D = F = 512 in bfloat16 costs: 5.4 GFLOP, 7 us at 790 TFLOP/s; but tiles read their operands again
and again from L2: 25 + 17 + 17 + 32 + 32 MB with the blocks below, 18 us at an assumed 7 TB/s. The step moves
10 MB, 2.5 us. Larger tiles read less and leave multiprocessors idle. A gradient norm without the gradient,
sum_ij (x_i . x_j)(e_i . e_j), would cost 2 N^2 (D + F) flop a layer, eight times the gradient's own.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import multiprocessors, on_device
from titanfunc_kernels.single_write_tiles import meet, offsets, place, product, total_of


class Blocks(NamedTuple):
    """Tile sizes: what may be tuned on a machine without changing what is computed (up to the order of sums)."""

    rows: int  # of the [N, F] and [N, D] tiles
    columns: int
    back_columns: int  # in place of them in stage 2
    inner: int  # their step along the contracted axis
    gradient: int  # both sides of a tile of a gradient
    gradient_inner: int  # its step along N
    elements: int  # of a matrix that a program steps at once
    warps: int
    stages: int


# bfloat16: at N 2048, D = F = 512 stage 2 is 64 tiles of 128 x 128 and 64 of 64 x 64, of the same arithmetic, on 132
# multiprocessors, one on each: stage 0, whose weights are float32, takes 128 KiB of its shared memory, the rest 96.
# float32: plain FMAs, so the tiles are those whose accumulators and operands stay in registers.
BLOCKS = {
    torch.bfloat16: Blocks(128, 64, 128, 64, 64, 128, 2048, 8, 3),
    torch.float32: Blocks(64, 64, 64, 32, 64, 32, 2048, 8, 2),
}
SUM_BLOCK = 1024  # partial sums read at once
HIDDEN, ERROR, BACK, GRADIENT, STEP = range(5)


class Written(NamedTuple):
    """weights, momentum: like those given; loss before the write and grad_norm: [M] float32."""

    weights: list[Tensor]
    momentum: list[Tensor]
    loss: Tensor
    grad_norm: Tensor


@triton.jit
def _gradient_tile(
    x, e, gradient, squares, index, parts, first_part, n, d_in, d_out,
    BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x^T e for a tile of [M, d_in, d_out], and the sum of its squares. x is read transposed, never turned over."""
    memory, tile, row, col = place(index, d_in, d_out, BG, BG)
    g = product(
        x + memory * n * d_in, e + memory * n * d_out, d_in, d_out, n, 1, d_in, d_out, 1, row, col,
        BG, BG, BK,
    )  # fmt: skip
    at, inside = offsets(row, col, d_in, d_out, BG, BG)
    tl.store(gradient + memory * d_in * d_out + at, g, mask=inside)
    tl.store(squares + memory * parts + first_part + tile, tl.sum(g * g))


@triton.jit
def _read(weight, momentum, gradient, at, inside):
    """What a step of these elements needs of a matrix."""
    w = tl.load(weight + at, mask=inside, other=0.0)
    s = tl.load(momentum + at, mask=inside, other=0.0)
    return w, s, tl.load(gradient + at, mask=inside, other=0.0)


@triton.jit
def _step(w, s, g, alpha, eta, theta, finite, new_weight, new_momentum, at, inside):
    """The step of these elements, or what they were if the gradient is not finite."""
    stepped = eta * s - theta * g
    tl.store(new_momentum + at, tl.where(finite, stepped, s), mask=inside)
    tl.store(new_weight + at, tl.where(finite, (1.0 - alpha) * w + stepped, w), mask=inside)


@triton.jit
def _write(
    k, v, mask, first, first_momentum, last, last_momentum, forget, momentum_decay, inner_lr,
    hidden, slope, low, error, back, first_gradient, last_gradient, losses, squares, masks, counter,
    new_first, new_first_momentum, new_last, new_last_momentum, loss, norm,
    memories, n, d, f, scale, max_norm,
    FIRST: tl.constexpr, LAST: tl.constexpr, DEPTH: tl.constexpr, MASKED: tl.constexpr, MEAN: tl.constexpr,
    CLIP: tl.constexpr, NUMBERS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr, BGK: tl.constexpr,
    BE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Stages FIRST to LAST. Depth 1 has only ``last`` [M, D, D], whose rows ``hidden`` are k and ``low`` itself."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row_blocks = tl.cdiv(n, BM)
    error_tiles = row_blocks * tl.cdiv(d, BN)
    last_tiles = tl.cdiv(f, BG) * tl.cdiv(d, BG)
    parts = last_tiles * DEPTH  # F x D and D x F make as many tiles

    if FIRST == 2 - DEPTH:  # the first launch of a write
        if program == 0:
            tl.store(counter, 0)
        if MASKED:  # from the last program on: the first ones have a product to take
            for index in range(programs - 1 - program, memories * row_blocks, programs):
                memory = (index // row_blocks).to(tl.int64)
                r = (index % row_blocks) * BM + tl.arange(0, BM)
                m = tl.load(mask + memory * n + r, mask=r < n, other=0.0)
                tl.store(masks + index, tl.sum(m))

    if FIRST == 0:
        hidden_tiles = memories * row_blocks * tl.cdiv(f, BN)
        blocks = tl.cdiv(f * d, BE)
        tiles = hidden_tiles
        if low.dtype.element_ty != last.dtype.element_ty:
            tiles += memories * blocks
        for index in range(program, tiles, programs):
            if index < hidden_tiles:
                memory, tile, row, col = place(index, n, f, BM, BN)
                z = product(
                    k + memory * n * d, first + memory * d * f, n, f, d, d, 1, f, 1, row, col, BM, BN, BK
                )  # fmt: skip
                at, inside = offsets(row, col, n, f, BM, BN)
                at += memory * n * f
                gate = tl.sigmoid(z)
                tl.store(hidden + at, (z * gate).to(hidden.dtype.element_ty), mask=inside)
                tl.store(slope + at, (gate * (1.0 + z * (1.0 - gate))).to(slope.dtype.element_ty), mask=inside)
            else:
                block = index - hidden_tiles
                element = (block % blocks).to(tl.int64) * BE + tl.arange(0, BE)
                real = element < f * d
                element += (block // blocks).to(tl.int64) * f * d
                tl.store(
                    low + element, tl.load(last + element, mask=real, other=0.0).to(low.dtype.element_ty), mask=real
                )

    if FIRST <= 1 and LAST >= 1:
        for index in range(program, memories * error_tiles, programs):
            memory, tile, row, col = place(index, n, d, BM, BN)
            y = product(hidden + memory * n * f, low + memory * f * d, n, d, f, f, 1, d, 1, row, col, BM, BN, BK)
            at, inside = offsets(row, col, n, d, BM, BN)
            at += memory * n * d
            residual = y - tl.load(v + at, mask=inside, other=0.0).to(tl.float32)  # 0 outside
            slant = scale * residual
            if MASKED:
                r = row + tl.arange(0, BM)
                slant *= tl.load(mask + memory * n + r, mask=r < n, other=0.0)[:, None]
            tl.store(losses + memory * error_tiles + tile, tl.sum(slant * residual))
            tl.store(error + at, (2.0 * slant).to(error.dtype.element_ty), mask=inside)

    if DEPTH == 2 and FIRST <= 2 and LAST >= 2:
        if FIRST < 2:
            meet(counter, programs * (2 - FIRST))
        back_tiles = memories * row_blocks * tl.cdiv(f, BB)
        for index in range(program, back_tiles + memories * last_tiles, programs):
            if index < back_tiles:
                memory, tile, row, col = place(index, n, f, BM, BB)
                x = product(error + memory * n * d, low + memory * f * d, n, f, d, d, 1, 1, d, row, col, BM, BB, BK)
                at, inside = offsets(row, col, n, f, BM, BB)
                at += memory * n * f
                x *= tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(back + at, x.to(back.dtype.element_ty), mask=inside)
            else:
                _gradient_tile(hidden, error, last_gradient, squares, index - back_tiles, parts, 0, n, f, d, BG, BGK)

    if FIRST <= 3 and LAST >= 3:
        if FIRST < 3:
            meet(counter, programs * (3 - FIRST))
        for index in range(program, memories * last_tiles, programs):
            if DEPTH == 2:
                _gradient_tile(
                    k, back, first_gradient, squares, index, parts, last_tiles, n, d, f, BG, BGK
                )  # fmt: skip
            else:
                _gradient_tile(hidden, error, last_gradient, squares, index, parts, 0, n, f, d, BG, BGK)

    if LAST == 4:
        if FIRST < 4:
            meet(counter, programs * (4 - FIRST))
        blocks = tl.cdiv(f * d, BE)
        for index in range(program, memories * blocks, programs):
            memory = (index // blocks).to(tl.int64)
            at = (index % blocks).to(tl.int64) * BE + tl.arange(0, BE)
            inside = at < f * d
            at += memory * f * d
            # Every read is under way before the first is waited for.
            w, s, g = _read(last, last_momentum, last_gradient, at, inside)
            if DEPTH == 2:
                w_first, s_first, g_first = _read(first, first_momentum, first_gradient, at, inside)
            over_all = 1.0  # from the mean over every row to that over the rows that count
            if MASKED and MEAN:
                over_all = n / tl.maximum(total_of(masks + memory * row_blocks, row_blocks, SUM), 1.0)
            length = over_all * tl.sqrt(total_of(squares + memory * parts, parts, SUM))
            finite = length < float("inf")  # false for NaN as well
            if NUMBERS:
                alpha, eta, theta = forget, momentum_decay, inner_lr
            else:
                alpha = tl.load(forget + memory)
                eta = tl.load(momentum_decay + memory)
                theta = tl.load(inner_lr + memory)
            theta *= over_all
            if CLIP:
                theta *= max_norm / tl.maximum(length, max_norm)
            _step(w, s, g, alpha, eta, theta, finite, new_last, new_last_momentum, at, inside)
            if DEPTH == 2:
                _step(
                    w_first, s_first, g_first, alpha, eta, theta, finite, new_first, new_first_momentum, at, inside
                )  # fmt: skip
            if index % blocks == 0:
                tl.store(loss + memory, over_all * total_of(losses + memory * error_tiles, error_tiles, SUM))
                tl.store(norm + memory, length)


def single_write(
    weights: list[Tensor],
    momentum: list[Tensor],
    k: Tensor,
    v: Tensor,
    gates: list[Tensor] | list[float],
    mask: Tensor | None = None,
    *,
    max_grad_norm: float = 0.0,
    mean: bool = True,
    together: bool | None = None,
) -> Written:
    """One write into M memories of one or two layers, all tensors contiguous.

    weights, momentum: [M, D, F] and [M, F, D], or one [M, D, D]; float32. k, v: [M, N, D], bfloat16 or float32, the
    type of the products. gates: forget, momentum_decay and inner_lr, each [M] float32, or three numbers.
    mask: [M, N] float32. max_grad_norm: 0 for no clip. mean: of the squares over rows that count and features, else
    their sum. together: all stages but the first in one cooperative launch (None: on a GPU) or a launch a stage.
    """
    depth, (memories, n, d), f = len(weights), k.shape, weights[-1].shape[1]
    blocks = BLOCKS[k.dtype]
    new = [torch.empty_like(w) for w in (*weights, *momentum)]
    loss, norm = (torch.empty(memories, dtype=torch.float32, device=k.device) for _ in range(2))

    cast = depth == 2 and k.dtype != torch.float32
    rows, elements = triton.cdiv(n, blocks.rows), triton.cdiv(f * d, blocks.elements)
    gradient_tiles = triton.cdiv(f, blocks.gradient) * triton.cdiv(d, blocks.gradient)
    tiles = {
        HIDDEN: rows * triton.cdiv(f, blocks.columns) + (elements if cast else 0),
        ERROR: rows * triton.cdiv(d, blocks.columns),
        BACK: rows * triton.cdiv(f, blocks.back_columns) + gradient_tiles,
        GRADIENT: gradient_tiles,
        STEP: elements,
    }

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(memories, *shape, dtype=dtype, device=k.device)

    error = scratch(n, d, dtype=k.dtype)
    hidden = slope = back = k
    low, gradients = weights[-1], [torch.empty_like(w) for w in weights]
    if depth == 2:
        hidden, slope, back = (scratch(n, f, dtype=k.dtype) for _ in range(3))
    if cast:
        low = scratch(f, d, dtype=k.dtype)
    losses, squares, masks = scratch(tiles[ERROR]), scratch(depth * gradient_tiles), scratch(rows)
    counter = torch.empty(1, dtype=torch.int32, device=k.device)

    together = k.is_cuda if together is None else together
    stages = [HIDDEN, ERROR, BACK, GRADIENT, STEP] if depth == 2 else [ERROR, GRADIENT, STEP]
    launches = [stages[:1], stages[1:]] if together else [[stage] for stage in stages]
    for launch in launches:
        programs = memories * max(tiles[stage] for stage in launch)
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        if len(launch) > 1:
            programs = min(programs, multiprocessors(k))
            options["launch_cooperative_grid"] = True
        with on_device(k):
            _write[(programs,)](
                k, v, k if mask is None else mask, weights[0], momentum[0], weights[-1], momentum[-1], *gates,
                hidden, slope, low, error, back, gradients[0], gradients[-1],
                losses, squares, masks, counter,
                new[0], new[depth], new[depth - 1], new[-1], loss, norm,
                memories, n, d, f, 1.0 / (n * d) if mean else 1.0, max_grad_norm,
                FIRST=launch[0], LAST=launch[-1], DEPTH=depth, MASKED=mask is not None, MEAN=mean,
                CLIP=max_grad_norm > 0, NUMBERS=not isinstance(gates[0], Tensor),
                BM=blocks.rows, BN=blocks.columns, BB=blocks.back_columns, BK=blocks.inner,
                BG=blocks.gradient, BGK=blocks.gradient_inner, BE=blocks.elements, SUM=SUM_BLOCK, **options,
            )  # fmt: skip
    return Written(new[:depth], new[depth:], loss, norm)
