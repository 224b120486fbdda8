"""One write of N rows into a batch of memories: forward, gradient, clip by the global norm, momentum and forgetting.

Letters: M memories, N rows, D features, F hidden features (depth 1: F = D).

Stages, each a list of independent tiles; a stage reads what those before it wrote (device memory, in practice L2).
Products take their operands in k's dtype and accumulate in float32.

    cast      the weights in k's dtype, where that pays: else stage hidden reads W1 wide and casts W2 beside its tiles
    hidden    z = k W1; h = silu(z), slope = silu'(z) [N, F]
    error     y = h W2; e = 2 c m (y - v) [N, D]; sums of c m (y - v)^2 (c: 1 / (N D) for the mean, m: the mask)
    back      d = (e W2^T) slope [N, F]
    gradient  h^T e [F, D] and k^T d [D, F] (depth 1: k^T e), each of several shares of the rows
    sum       the shares' sum and its squares (one share: stage gradient takes the squares)
    step      norm from the sums of squares; S' = eta S - theta clip g; W' = (1 - alpha) W + S'

Depth 1 has no stages hidden and back. Nothing is added by atomics: every sum is a list of partial sums, added in one
order by whoever needs it, so that a write gives the same bits each time.

Two launches: the first stage alone, which also zeroes a counter, then the rest as one cooperative grid of at most one
program a multiprocessor, which meets at the counter between stages. A launch a stage computes the same; each may then
be begun while the one before it ends, and waits for it on the device.

What bounds it: on an H200 a multiprocessor takes in about 52 bytes a nanosecond from L2 (the slope of measured times
over the bytes of a tile's operands, whether 16 or 132 of them read), and a stage costs 2 to 3 us beside: meeting, first
reads, last stores. So tiles are as square as keeps all multiprocessors busy, and the gradients, whose tiles are few and
contract over all rows, are cut along the rows instead of into smaller tiles, which would read more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from titanfunc_kernels import single_write_kernel as kernel
from titanfunc_kernels.launch import multiprocessors, on_device


class Blocks(NamedTuple):
    """Tile sizes: what may be tuned on a machine without changing what is computed (up to the order of sums)."""

    rows: int  # of the [N, F] and [N, D] tiles
    columns: int
    inner: int  # their step along the contracted axis
    gradient_rows: int  # of a tile of a gradient
    gradient_columns: int
    gradient_inner: int  # its step along N
    fill: int  # programs that the gradients' tiles should come to, by cutting N into shares
    elements: int  # of a matrix that a program casts, sums or steps at once
    warps: int
    stages: int
    ahead: bool = False  # whether weights are cast in a stage of their own
    together: bool = True  # whether a GPU runs all stages but the first in one cooperative launch
    early: bool = False  # whether, a launch a stage, each is begun while the one before it ends (Hopper)


# float32: plain FMAs, so the tiles are those whose accumulators and operands stay in registers.
BLOCKS = {
    torch.bfloat16: Blocks(128, 64, 64, 128, 128, 64, 128, 2048, 8, 4),
    torch.float32: Blocks(64, 64, 32, 64, 64, 32, 128, 2048, 8, 2),
}
# bfloat16 where tiles are few: smaller ones, of which there are enough for half the multiprocessors at 256 x 512.
FEW = Blocks(64, 32, 128, 64, 64, 64, 128, 2048, 4, 3)
FEW_ELEMENTS = 2**18  # of [M, N, F], at most
# bfloat16 where there are many: 128 x 256 reads 3/4 of what 128 x 128 would, so matrix units wait less.
MANY = Blocks(128, 256, 64, 128, 256, 64, 128, 2048, 8, 4, ahead=True, together=False, early=True)
MANY_ELEMENTS = 2**22  # of [M, N, F], at least: about a wave of such tiles
# Elements of a tile, at most, that is finished at once: another operand then waits in registers while the product is
# taken. A larger one is finished in halves: as a whole it spilt up to 600 bytes of registers a thread.
WHOLE = 128 * 128
SUM_BLOCK = 1024  # partial sums read at once
CAST, HIDDEN, ERROR, BACK, GRADIENT, SUM, STEP = range(7)


class Written(NamedTuple):
    """weights, momentum: like those given; loss before the write and grad_norm: [M] float32."""

    weights: list[Tensor]
    momentum: list[Tensor]
    loss: Tensor
    grad_norm: Tensor


def blocks_of(dtype: torch.dtype, memories: int, n: int, d: int, f: int) -> Blocks:
    """The tiles for products in ``dtype``, d features and hidden features [memories, n, f]."""
    elements = memories * n * f
    if dtype == torch.bfloat16 and elements <= FEW_ELEMENTS:
        return FEW
    # Rows that cannot be read 16 bytes at a time would leave the largest tiles too few registers.
    many = elements >= MANY_ELEMENTS and min(d, f) >= MANY.columns and not (d % 16 or f % 16)
    return MANY if dtype == torch.bfloat16 and many else BLOCKS[dtype]


def _shares(blocks: Blocks, tiles: int, n: int) -> tuple[int, int]:
    """(rows of a share, shares), so that ``tiles`` gradient tiles of n rows come to about ``blocks.fill``."""
    steps = triton.cdiv(n, blocks.gradient_inner)
    share = triton.cdiv(steps, max(1, blocks.fill // tiles)) * blocks.gradient_inner
    return share, triton.cdiv(n, share)


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
    their sum. together: all stages but the first in one cooperative launch, or a launch a stage (None: as the tiles
    want it on a GPU, a launch a stage elsewhere).
    """
    depth, (memories, n, d), f = len(weights), k.shape, weights[-1].shape[1]
    blocks = blocks_of(k.dtype, memories, n, d, f)
    narrow = k.dtype != torch.float32
    ahead, beside = narrow and blocks.ahead, narrow and not blocks.ahead and depth == 2

    rows, elements = triton.cdiv(n, blocks.rows), triton.cdiv(f * d, blocks.elements)
    gradient_tiles = triton.cdiv(f, blocks.gradient_rows) * triton.cdiv(d, blocks.gradient_columns)
    if depth == 2:
        gradient_tiles += triton.cdiv(d, blocks.gradient_rows) * triton.cdiv(f, blocks.gradient_columns)
    share, shares = _shares(blocks, memories * gradient_tiles, n)
    tiles = {
        CAST: elements,
        HIDDEN: rows * triton.cdiv(f, blocks.columns) + (elements if beside else 0),
        ERROR: rows * triton.cdiv(d, blocks.columns),
        BACK: rows * triton.cdiv(f, blocks.columns),
        GRADIENT: gradient_tiles * shares,
        SUM: elements,
        STEP: elements,
    }
    stages = [HIDDEN, ERROR, BACK, GRADIENT, STEP] if depth == 2 else [ERROR, GRADIENT, STEP]
    if ahead:
        stages.insert(0, CAST)
    if shares > 1:
        stages.insert(-1, SUM)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(memories, *shape, dtype=dtype, device=k.device)

    new = [torch.empty_like(w) for w in (*weights, *momentum)]
    loss, norm = (torch.empty(memories, dtype=torch.float32, device=k.device) for _ in range(2))
    error = scratch(n, d, dtype=k.dtype)
    hidden = slope = back = k
    if depth == 2:
        hidden, slope, back = (scratch(n, f, dtype=k.dtype) for _ in range(3))
    low = [scratch(*w.shape[1:], dtype=k.dtype) if ahead else w for w in weights]
    if beside:
        low[-1] = scratch(f, d, dtype=k.dtype)
    gradients = [scratch(shares, *w.shape[1:]) for w in weights]
    losses, masks = scratch(tiles[ERROR]), scratch(rows)
    squares = scratch(elements if shares > 1 else gradient_tiles)
    counter = torch.empty(1, dtype=torch.int32, device=k.device)

    together = k.is_cuda and blocks.together if together is None else together
    early = blocks.early and not together and k.is_cuda and torch.cuda.get_device_capability(k.device) >= (9, 0)
    launches = [stages[:1], stages[1:]] if together else [[stage] for stage in stages]
    for launch in launches:
        programs = memories * max(tiles[stage] for stage in launch)
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        if len(launch) > 1:
            programs = min(programs, multiprocessors(k))
            options["launch_cooperative_grid"] = True
        if early and launch is not launches[0]:
            options["launch_pdl"] = True
        with on_device(k):
            kernel.write_kernel[(programs,)](
                k, v, k if mask is None else mask, weights[0], momentum[0], weights[-1], momentum[-1], *gates,
                hidden, slope, low[0], low[-1], error, back, gradients[0], gradients[-1],
                losses, squares, masks, counter,
                new[0], new[depth], new[depth - 1], new[-1], loss, norm,
                memories, n, d, f, share, 1.0 / (n * d) if mean else 1.0, max_grad_norm,
                FROM=launch[0], TO=launch[-1], START=launch is launches[0], EARLY=early, DEPTH=depth,
                MASKED=mask is not None, MEAN=mean, CLIP=max_grad_norm > 0, NUMBERS=not isinstance(gates[0], Tensor),
                SPLITS=shares, BESIDE=beside, EVEN=not (d % blocks.inner or f % blocks.inner),
                EVEN_ROWS=not n % blocks.gradient_inner,
                BM=blocks.rows, BN=blocks.columns, BK=blocks.inner, BG=blocks.gradient_rows,
                BH=blocks.gradient_columns, BGK=blocks.gradient_inner, BE=blocks.elements, WHOLE=WHOLE,
                SUM_BLOCK=SUM_BLOCK, **options,
            )  # fmt: skip
    return Written(new[:depth], new[depth:], loss, norm)
