"""Softmax cross-entropy of a linear map without all of its logits: matrix products by chunks, softmax in Triton.

The products are torch's (cuBLAS runs them at full speed); what lies between two of them is one kernel that reads a
chunk of logits once. Forward takes chunks of rows, each with the whole vocabulary, for a row's softmax needs all of
it. Backward knows the log-sum-exp, so it takes chunks of the vocabulary with every row: a part of the weight's
gradient is then finished at once, and only the input's gradient, N D numbers, is summed over the chunks.

Letters: N rows (tokens), D features, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import on_device

BUFFER_BYTES = 256 * 2**20
"""Logits held at a time. Each chunk of backward adds a pass over the input's gradient in float32, and each chunk of
forward reads the weight again: few large chunks are faster, and this is small beside what training holds."""
BLOCK = 4096
"""Logits that a program takes at a time: with 8 warps, two 16-byte loads of bfloat16 a thread."""
PER_WARP = 512
"""Logits a warp, so that a small vocabulary takes few warps."""
GRAIN = 128
"""Chunks are multiples of this many rows or tokens of the vocabulary: a tile of the matrix product."""


@triton.jit
def _losses_kernel(logits, targets, losses, correct, normalizer, vocabulary, stride, BLOCK: tl.constexpr):
    """A row: its log-sum-exp, its loss, and whether the first of its largest logits is the target's."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocabulary)
    target = tl.where(inside, target, 0).to(tl.int32)
    chosen = tl.load(logits + target).to(tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(logit, 0))
        total = total * tl.exp(peak - higher) + tl.exp(logit - higher)
        beaten |= ((logit > chosen) | ((logit == chosen) & (at < target))).to(tl.int32)
        peak = higher
    log_sum = peak + tl.log(tl.sum(total, 0))
    tl.store(normalizer + row, log_sum)
    tl.store(losses + row, tl.where(inside, log_sum - chosen, float("nan")))
    tl.store(correct + row, (inside & (tl.max(beaten, 0) == 0)).to(tl.uint8))


@triton.jit
def _slopes_kernel(logits, targets, normalizer, shares, first, width, stride, BLOCK: tl.constexpr):
    """share (softmax - onehot) written over a row's logits of the vocabulary from ``first`` on."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
    chance = tl.exp(logit - tl.load(normalizer + row))
    hit = at == tl.load(targets + row) - first
    slope = tl.load(shares + row) * (chance - hit.to(tl.float32))
    tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < width)


def forward(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N] in nats, whether the argmax is the target [N] bool, log-sum-exp [N].

    x [N, D], weight [D, V] of any strides (cast to x's dtype), targets [N] int64 contiguous. A target outside the
    vocabulary gives a loss of nan.
    """
    weight = weight.to(x.dtype)
    count, vocabulary = x.shape[0], weight.shape[1]
    losses, normalizer = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
    correct = torch.empty(count, dtype=torch.bool, device=x.device)
    rows = _chunk(count, _padded(vocabulary) * x.element_size())
    buffer = torch.empty(rows, _padded(vocabulary), dtype=x.dtype, device=x.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    for first in range(0, count, rows):
        part = slice(first, min(first + rows, count))
        logits = buffer[: part.stop - first, :vocabulary]
        torch.mm(x[part], weight, out=logits)
        with on_device(x):
            _losses_kernel[(part.stop - first,)](
                logits, targets[part], losses[part], correct[part].view(torch.uint8), normalizer[part],
                vocabulary, logits.stride(0), BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return losses, correct, normalizer


def backward(
    x: Tensor, weight: Tensor, targets: Tensor, normalizer: Tensor, shares: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, D] and of weight [D, V], each in its own dtype, for the losses' cotangents ``shares`` [N].

    transposed: the weight's gradient comes as [V, D], contiguous.
    """
    narrow = weight.to(x.dtype)
    (count, dim), vocabulary = x.shape, weight.shape[1]
    width = _chunk(vocabulary, count * x.element_size())
    buffer = torch.empty(count, _padded(width), dtype=x.dtype, device=x.device)
    d_x = torch.empty_like(x)
    d_weight = torch.empty((vocabulary, dim) if transposed else (dim, vocabulary), dtype=weight.dtype, device=x.device)
    sums = d_x if width >= vocabulary else torch.empty(count, dim, dtype=torch.float32, device=x.device)
    extra = torch.empty_like(sums) if width < vocabulary else sums
    block = min(BLOCK, triton.next_power_of_2(width))
    for first in range(0, vocabulary, width):
        part = slice(first, min(first + width, vocabulary))
        slopes = buffer[:, : part.stop - first]
        torch.mm(x, narrow[:, part], out=slopes)
        with on_device(x):
            _slopes_kernel[(count, triton.cdiv(part.stop - first, block))](
                slopes, targets, normalizer, shares, first, part.stop - first, slopes.stride(0),
                BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        if transposed:
            _product(slopes.mT, x, d_weight[part])
        else:
            _product(x.mT, slopes, d_weight[:, part])
        _product(slopes, narrow[:, part].mT, extra if first else sums)
        if first:
            sums += extra
    if sums is not d_x:
        d_x.copy_(sums)
    return d_x, d_weight


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, rounded once, to ``out``'s dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _chunk(size: int, item_bytes: int) -> int:
    """How many of ``size`` things of ``item_bytes`` to take at a time: equal chunks within BUFFER_BYTES."""
    most = max(BUFFER_BYTES // max(item_bytes, 1) // GRAIN, 1) * GRAIN
    chunks = max(triton.cdiv(size, most), 1)
    return max(min(triton.cdiv(triton.cdiv(size, chunks), GRAIN) * GRAIN, size), 1)


def _padded(width: int) -> int:
    """A row length whose rows all start on 128 bytes."""
    return triton.cdiv(width, 64) * 64


def _warps(block: int) -> int:
    return max(min(block // PER_WARP, 8), 1)
