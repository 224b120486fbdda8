"""8-bit floating-point casts with their scales, and the three matrix products of a linear layer on them.

A tensor is divided by a scale that brings its largest magnitude (its peak) to the largest finite number of its format:
e4m3 (448) for inputs and weights, e5m2 (57344) for incoming gradients. cuBLAS multiplies only operands whose
contracted axis is contiguous in both, so of what enters two products both layouts are written in one launch, whose
second reading of a tile comes from the cache.

What a scale covers is "tensor", the whole of it, or "row": a line along the contracted axis. A line's peak is known
once the line is read, so casting along it takes one pass; a whole tensor, or lines across it, take one more.

Letters: M rows, N columns; K tokens; D_in, D_out features.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import on_device

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SMALLEST = 2.0**-100
"""The least peak: what divides by it stays finite."""
FAST_FORWARD, FAST_BACKWARD = True, False
"""Whether the tensor cores keep partial sums in fewer bits, for speed: common for outputs, too coarse for gradients."""
PEAK_BLOCK, PEAK_PROGRAMS = 8192, 512
"""Numbers a turn and programs of a whole tensor's peak: four programs a multiprocessor; a cast reduces 512 peaks."""
CAST_ROWS, CAST_COLUMNS = 128, 64
"""A cast's tile: 128 bytes along either output's lines, or nearly, at 32 numbers a thread."""
COLUMN_PROGRAMS = 64
"""Programs down a column block for the columns' peaks, each of which a cast reduces again."""
LINE_BLOCK = 4096
"""Numbers of a row at a time where a row has its own scale; its second reading comes from the cache."""


@triton.jit
def _peak_kernel(x, peaks, size, BLOCK: tl.constexpr):
    """The largest magnitude of what each program sees of x, read as one line."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    peak = tl.zeros([BLOCK], tl.float32)
    for _ in range(tl.cdiv(size, BLOCK * tl.num_programs(0))):
        peak = tl.maximum(peak, tl.abs(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)))
        at += BLOCK * tl.num_programs(0)
    tl.store(peaks + program, tl.max(peak, 0))


@triton.jit
def _column_peak_kernel(x, peaks, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The largest magnitude of each column of x, in the rows that each program down it sees."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    peak = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for _ in range(tl.cdiv(rows, BLOCK_ROWS * tl.num_programs(1))):
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        tile = tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.abs(tile.to(tl.float32)))
        row += BLOCK_ROWS * tl.num_programs(1)
    tl.store(peaks + tl.program_id(1) * columns + column, tl.max(peak, 0), mask=column < columns)


@triton.jit
def _cast_kernel(
    x, peaks, natural, transposed, scales, rows, columns, padded, parts, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    PARTS: tl.constexpr, PER_COLUMN: tl.constexpr, NATURAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of x, scaled and cast, into one layout or both; rows past x's own are zeros of the transposed one."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.arange(0, PARTS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    source = x + row[:, None] * columns + column[None, :]
    tile = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if PER_COLUMN:
        seen = (part[:, None] < parts) & (column[None, :] < columns)
        peak = tl.max(tl.load(peaks + part[:, None] * columns + column[None, :], mask=seen, other=0.0), 0)
        peak = tl.maximum(peak, SMALLEST)
        factor = tl.div_rn(tl.full([BLOCK_COLUMNS], LARGEST, tl.float32), peak)[None, :]
        scale = tl.div_rn(peak, tl.full([BLOCK_COLUMNS], LARGEST, tl.float32))
        tl.store(scales + column, scale, mask=(column < columns) & (tl.program_id(0) == 0))
    else:
        peak = tl.maximum(tl.max(tl.load(peaks + part, mask=part < parts, other=0.0), 0), SMALLEST)
        factor = tl.div_rn(tl.full([], LARGEST, tl.float32), peak)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scales, tl.div_rn(peak, tl.full([], LARGEST, tl.float32)))
    if NATURAL:
        narrow = (tile * factor).to(natural.dtype.element_ty)
        tl.store(natural + row[:, None] * columns + column[None, :], narrow, mask=inside)
    if TRANSPOSED:
        if NATURAL:
            # From the cache, to cast again: where one cast serves both layouts, ptxas 12.8 and 12.9 store the stack
            # pointer's bytes for some of its results on sm_90. The store above keeps compilers from merging the loads.
            tile = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        narrow = (tile * factor).to(transposed.dtype.element_ty)
        within = (row[:, None] < padded) & (column[None, :] < columns)
        tl.store(transposed + row[:, None] + column[None, :] * padded, narrow, mask=within)


@triton.jit
def _cast_rows_kernel(x, natural, scales, columns, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """A row of x by a scale of its own."""
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    natural += row * columns
    largest = tl.full([], LARGEST, tl.float32)
    seen = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = tl.maximum(seen, tl.abs(tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)))
    peak = tl.maximum(tl.max(seen, 0), SMALLEST)
    factor = tl.div_rn(largest, peak)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        scaled = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32) * factor
        tl.store(natural + at, scaled.to(natural.dtype.element_ty), mask=at < columns)
    tl.store(scales + row, tl.div_rn(peak, largest))


def peak_count(size: int) -> int:
    """How many peaks ``tensor_peaks`` gives for a tensor of ``size`` numbers."""
    return min(triton.cdiv(size, PEAK_BLOCK), PEAK_PROGRAMS)


def tensor_peaks(x: Tensor) -> Tensor:
    """Largest magnitudes [P] of parts of x, contiguous: the largest of them is x's."""
    peaks = torch.empty(peak_count(x.numel()), dtype=torch.float32, device=x.device)
    with on_device(x):
        _peak_kernel[(len(peaks),)](x, peaks, x.numel(), BLOCK=PEAK_BLOCK, num_warps=8)
    return peaks


def column_peaks(x: Tensor) -> Tensor:
    """Largest magnitudes [P, N] of parts of each column of x [M, N], contiguous."""
    rows, columns = x.shape
    parts = min(triton.cdiv(rows, CAST_ROWS), COLUMN_PROGRAMS)
    peaks = torch.empty(parts, columns, dtype=torch.float32, device=x.device)
    with on_device(x):
        _column_peak_kernel[(triton.cdiv(columns, CAST_COLUMNS), parts)](
            x, peaks, rows, columns, BLOCK_ROWS=CAST_ROWS, BLOCK_COLUMNS=CAST_COLUMNS, num_warps=8
        )
    return peaks


def cast(
    x: Tensor, peaks: Tensor, dtype: torch.dtype, natural: bool = True, transposed: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, N], contiguous, in ``dtype``: as [M, N], as [N, M padded with zeros to a multiple of 16], and the scale.

    peaks: [P] for one scale [1], or [P, N] for a scale [N] of each column. A layout not asked for comes empty.
    """
    rows, columns = x.shape
    if natural and transposed and 1 in (rows, columns):  # sizes of 1 are constants to the compiler: see _cast_kernel
        straight, _, scales = cast(x, peaks, dtype, transposed=False)
        return straight, cast(x, peaks, dtype, natural=False)[1], scales
    padded = triton.cdiv(rows, 16) * 16
    straight = torch.empty((rows, columns) if natural else (0,), dtype=dtype, device=x.device)
    turned = torch.empty((columns, padded) if transposed else (0,), dtype=dtype, device=x.device)
    per_column = peaks.ndim == 2
    scales = torch.empty(columns if per_column else 1, dtype=torch.float32, device=x.device)
    with on_device(x):
        _cast_kernel[(triton.cdiv(rows, CAST_ROWS), triton.cdiv(columns, CAST_COLUMNS))](
            x, peaks, straight, turned, scales, rows, columns, padded, peaks.shape[0], LARGEST=LARGEST[dtype],
            SMALLEST=SMALLEST, PARTS=triton.next_power_of_2(peaks.shape[0]), PER_COLUMN=per_column, NATURAL=natural,
            TRANSPOSED=transposed, BLOCK_ROWS=CAST_ROWS, BLOCK_COLUMNS=CAST_COLUMNS, num_warps=8,
        )  # fmt: skip
    return straight, turned, scales


def cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, N], contiguous, in ``dtype``, and a scale [M] of each row."""
    rows, columns = x.shape
    straight = torch.empty(rows, columns, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(LINE_BLOCK, triton.next_power_of_2(columns))
    with on_device(x):
        _cast_rows_kernel[(rows,)](
            x, straight, scales, columns, LARGEST=LARGEST[dtype], SMALLEST=SMALLEST, BLOCK=block,
            num_warps=max(min(block // 512, 8), 1),
        )  # fmt: skip
    return straight, scales


def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool = FAST_BACKWARD
) -> Tensor:
    """(scale_a a) (scale_b b)^T [M, N] in ``dtype``, for a [M, K] and b [N, K], contiguous.

    The scales are both of one number, or [M] and [N].
    """
    if scale_a.shape != (1,) or scale_b.shape != (1,):
        scale_a, scale_b = scale_a[:, None], scale_b[None, :]
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def forward(x: Tensor, weight: Tensor, dtype: torch.dtype, scaling: str) -> tuple[Tensor, Tensor, Tensor]:
    """y = x W [K, D_out] in ``dtype`` for x [K, D_in], weight [D_in, D_out], and what backward reuses of the peaks.

    Those are [P] of x and of the weight for one scale a tensor, and [0] for one a row, whose lines are then others.
    """
    if scaling == "tensor":
        of_x, of_weight = tensor_peaks(x), tensor_peaks(weight)
        left, _, scale_x = cast(x, of_x, E4M3, transposed=False)
        _, right, scale_weight = cast(weight, of_weight, E4M3, natural=False)
    else:
        of_x, of_weight = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
        left, scale_x = cast_rows(x, E4M3)
        _, right, scale_weight = cast(weight, column_peaks(weight), E4M3, natural=False)
    return product(left, right, scale_x, scale_weight, dtype, FAST_FORWARD), of_x, of_weight


def backward(
    x: Tensor, weight: Tensor, of_x: Tensor, of_weight: Tensor, grad: Tensor, scaling: str, narrow_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, each of its own shape and dtype, for that of y, ``grad`` [K, D_out].

    of_x, of_weight: from forward. narrow_weight: the weight's gradient in 8 bits too; else in bfloat16.
    """
    if scaling == "tensor":
        left, turned, scale = cast(grad, tensor_peaks(grad), E5M2, transposed=narrow_weight)
        scale_turned = scale
        right, _, scale_weight = cast(weight, of_weight, E4M3, transposed=False)
    else:
        left, scale = cast_rows(grad, E5M2)
        right, scale_weight = cast_rows(weight, E4M3)
        if narrow_weight:
            _, turned, scale_turned = cast(grad, column_peaks(grad), E5M2, natural=False)
    d_x = product(left, right, scale, scale_weight, x.dtype)
    if not narrow_weight:
        return d_x, (x.bfloat16().mT @ grad.bfloat16()).to(weight.dtype)
    _, across, scale_x = cast(x, of_x if scaling == "tensor" else column_peaks(x), E4M3, natural=False)
    return d_x, product(across, turned, scale_x, scale_turned, weight.dtype)
