"""Norms over the last axis: RMSNorm, LayerNorm, unit rows (after SiLU or not), forward and backward.

Letters: G groups (each with its own scale and bias), N rows of a group, D features, R rows of a tile, P programs.

All of them are n = (h - mean) * factor, y = n * scale + bias, with h = x or silu(x), computed in float32:
factor = 1 / sqrt(mean((h - mean)^2) + eps), or for unit rows 1 / sqrt(sum(h^2) + eps). Their derivative is
dh = factor (g - n c - mean(g)), with g = dy * scale and c = mean(g n) (unit rows:
sum(g n)); mean(g) in LayerNorm alone.
One program holds whole rows, so each tensor crosses device memory once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import multiprocessors, on_device

# Elements of a tile, and of a warp. Forward: 32 elements a thread, so four 16-byte loads of bfloat16 in flight for
# each, at 72 registers or fewer. Backward has four such tiles in registers: 16 elements a thread, and programs that
# stay, as many as a multiprocessor holds at once (100 registers a thread; 64 without sums for a scale), because each
# leaves a row of partial sums.
FORWARD_TILE = 4096
FORWARD_ELEMENTS_PER_WARP = 1024
BACKWARD_TILE = 4096
BACKWARD_ELEMENTS_PER_WARP = 512
MAX_WARPS = 16
BACKWARD_PROGRAMS_PER_MULTIPROCESSOR = 2
BACKWARD_PROGRAMS_WITHOUT_SUMS = 4
BACKWARD_STAGES = 3  # the next tiles are on their way while this one is reduced, at most two of them,
BACKWARD_STAGED_BYTES = 70_000  # if that leaves room in the shared memory (227 KB) for the others


class _Kind(NamedTuple):
    """affine: with a scale, and the mean of squares (else their sum). centred: less the mean, and with a bias."""

    affine: bool = False
    centred: bool = False
    silu: bool = False


_RMS = _Kind(affine=True)
_LAYER = _Kind(affine=True, centred=True)


@triton.jit
def _forward(
    x_ptr, scale_ptr, bias_ptr, y_ptr, mean_ptr, factor_ptr, rows, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
    AFFINE: tl.constexpr, CENTRED: tl.constexpr, SILU: tl.constexpr, STORE_Y: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, R)
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    row = (program % tiles) * R + tl.arange(0, R)
    column = tl.arange(0, BLOCK_D)
    there = row < rows
    mask = there[:, None] & (column < D)[None, :]
    place = group * rows + row
    at = place[:, None] * D + column[None, :]

    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        h = h * tl.sigmoid(h)
    if CENTRED:
        mean = tl.sum(h, 1) / D
        h = tl.where(mask, h - mean[:, None], 0.0)
        tl.store(mean_ptr + place, mean, mask=there)
    power = tl.sum(h * h, 1)
    if AFFINE:
        power = power / D
    factor = tl.rsqrt(power + eps)
    tl.store(factor_ptr + place, factor, mask=there)
    if STORE_Y:
        y = h * factor[:, None]
        if AFFINE:
            scale = tl.load(scale_ptr + group * D + column, mask=column < D, other=0.0).to(tl.float32)
            y = y * scale[None, :]
        if CENTRED:
            bias = tl.load(bias_ptr + group * D + column, mask=column < D, other=0.0).to(tl.float32)
            y = y + bias[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x_ptr, scale_ptr, mean_ptr, factor_ptr, dy_ptr, dx_ptr, dscale_ptr, dbias_ptr, rows, programs,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
    AFFINE: tl.constexpr, CENTRED: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs
    column = tl.arange(0, BLOCK_D)
    held = column < D
    if AFFINE:
        scale = tl.load(scale_ptr + group * D + column, mask=held, other=0.0).to(tl.float32)
        # Sums of a tile's rows apart until the end: adding them up costs exchanges between threads.
        dscale = tl.zeros([R, BLOCK_D], tl.float32)
    if CENTRED:
        dbias = tl.zeros([R, BLOCK_D], tl.float32)

    for tile in tl.range(first, tl.cdiv(rows, R), programs, num_stages=STAGES):
        row = tile * R + tl.arange(0, R)
        there = row < rows
        mask = there[:, None] & held[None, :]
        place = group * rows + row
        at = place[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(factor_ptr + place, mask=there, other=0.0)
        h = x
        if SILU:
            sigmoid = tl.sigmoid(x)
            h = x * sigmoid
        if CENTRED:
            mean = tl.load(mean_ptr + place, mask=there, other=0.0)
            h = h - mean[:, None]
        n = h * factor[:, None]
        g = dy
        if AFFINE:
            dscale += dy * n
            g = dy * scale[None, :]
        along = tl.sum(g * n, 1)
        if AFFINE:
            along = along / D
        dx = g - n * along[:, None]
        if CENTRED:
            dbias += dy
            dx = dx - (tl.sum(g, 1) / D)[:, None]
        dx = dx * factor[:, None]
        if SILU:
            dx = dx * sigmoid * (1.0 + x * (1.0 - sigmoid))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = tl.program_id(0).to(tl.int64) * D + column
    if AFFINE:
        tl.store(dscale_ptr + partial, tl.sum(dscale, 0), mask=held)
    if CENTRED:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=held)


def _tile(size: int, per_warp: int, rows: int, features: int) -> tuple[int, int, int]:
    """Rows R of a tile of about ``size`` elements, its width, and the warps for it."""
    width = triton.next_power_of_2(features)
    height = max(1, min(size // width, triton.next_power_of_2(rows)))
    return height, width, max(1, min(height * width // per_warp, MAX_WARPS))


def _run_forward(
    kind: _Kind, x: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float, store: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """y, the means (LayerNorm) and the factors [G, N] of x [G, N, D]."""
    groups, rows, features = x.shape
    x = x.contiguous()
    y = torch.empty_like(x) if store else None
    factor = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(factor) if kind.centred else None
    if x.numel():
        height, width, warps = _tile(FORWARD_TILE, FORWARD_ELEMENTS_PER_WARP, rows, features)
        scale, bias = (None if t is None else t.contiguous() for t in (scale, bias))
        with on_device(x):
            _forward[(groups * triton.cdiv(rows, height),)](
                x, scale, bias, y, mean, factor, rows, eps,
                D=features, R=height, BLOCK_D=width,
                AFFINE=kind.affine, CENTRED=kind.centred, SILU=kind.silu, STORE_Y=store, num_warps=warps,
            )  # fmt: skip
    return y, mean, factor


def _run_backward(
    kind: _Kind, x: Tensor, scale: Tensor | None, mean: Tensor | None, factor: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, and the gradients of scale and bias [G, D] in float32, summed in an order that is always the same."""
    groups, rows, features = x.shape
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    height, width, warps = _tile(BACKWARD_TILE, BACKWARD_ELEMENTS_PER_WARP, rows, features)
    resident = BACKWARD_PROGRAMS_PER_MULTIPROCESSOR if kind.affine else BACKWARD_PROGRAMS_WITHOUT_SUMS
    programs = min(triton.cdiv(rows, height), max(1, resident * multiprocessors(x) // max(groups, 1)))
    shape = (groups, programs, features)  # of no programs where there are no rows: sums of nothing
    dscale = torch.empty(shape, dtype=torch.float32, device=x.device) if kind.affine else None
    dbias = torch.empty(shape, dtype=torch.float32, device=x.device) if kind.centred else None
    if x.numel():
        scale = None if scale is None else scale.contiguous()
        staged = height * width * (x.element_size() + dy.element_size())
        stages = max(1, min(BACKWARD_STAGES, BACKWARD_STAGED_BYTES // staged))
        with on_device(x):
            _backward[(groups * programs,)](
                x, scale, mean, factor, dy, dx, dscale, dbias, rows, programs,
                D=features, R=height, BLOCK_D=width,
                AFFINE=kind.affine, CENTRED=kind.centred, SILU=kind.silu, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return dx, None if dscale is None else dscale.sum(1), None if dbias is None else dbias.sum(1)


def rms_norm_forward(scale: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """scale [G, D], x [G, N, D] -> y like x, factors 1 / rms [G, N] in float32."""
    y, _, factor = _run_forward(_RMS, x, scale, None, eps)
    assert y is not None
    return y, factor


def rms_factors(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of the rows of x [N, D]: [N] in float32."""
    return _run_forward(_RMS, x.unsqueeze(0), None, None, eps, store=False)[2].squeeze(0)


def rms_norm_backward(scale: Tensor, x: Tensor, factor: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (of scale, in its dtype; of x, in its dtype) from dy [G, N, D] of any dtype."""
    dx, dscale, _ = _run_backward(_RMS, x, scale, None, factor, dy)
    assert dscale is not None
    return dscale.to(scale.dtype), dx


def layer_norm_forward(scale: Tensor, bias: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """scale, bias [G, D], x [G, N, D] -> y like x, means [G, N], factors 1 / deviation [G, N] in float32."""
    y, mean, factor = _run_forward(_LAYER, x, scale, bias, eps)
    assert y is not None
    assert mean is not None
    return y, mean, factor


def layer_norm_backward(
    scale: Tensor, bias: Tensor, x: Tensor, mean: Tensor, factor: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scale, bias and x, each in its dtype."""
    dx, dscale, dbias = _run_backward(_LAYER, x, scale, mean, factor, dy)
    assert dscale is not None
    assert dbias is not None
    return dscale.to(scale.dtype), dbias.to(bias.dtype), dx


def unit_rows_forward(x: Tensor, silu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """x [N, D] -> y like x, factors [N] in float32."""
    y, _, factor = _run_forward(_Kind(silu=silu), x.unsqueeze(0), None, None, eps)
    assert y is not None
    return y.squeeze(0), factor.squeeze(0)


def unit_rows_backward(x: Tensor, factor: Tensor, dy: Tensor, silu: bool) -> Tensor:
    """The gradient of x [N, D], in its dtype."""
    kind = _Kind(silu=silu)
    return _run_backward(kind, x.unsqueeze(0), None, None, factor.unsqueeze(0), dy.unsqueeze(0))[0].squeeze(0)
