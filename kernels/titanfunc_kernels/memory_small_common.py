"""What the kernels of small memories share: which sizes they take, how a memory is cut up, pieces of a token's write.

Letters: M memories, C tokens a chunk, D head size, F hidden size, P programs a memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import multiprocessors

SIZES = (16, 32, 64, 128)
EXPANSIONS = (1, 2, 4)
# Hidden features of a block. 64 is the narrowest that wgmma fills; beside 64 head features a float32 tile of it is 16
# registers a thread with 8 warps. Float32 products take no matrix units: half the width keeps their tiles in registers.
WIDTHS = {torch.bfloat16: 64, torch.float32: 32}
WARPS = 8
MIXED = (32, 2)  # width and warps where ``mixes``


class Blocks(NamedTuple):
    """How a memory is cut up: ``programs`` share its hidden features, in blocks of ``width``, with ``warps`` each."""

    programs: int
    width: int
    warps: int


def refusal(depth: int, size: int, hidden: int, tokens: int, product: torch.dtype, state: torch.dtype) -> str:
    """Why memories of ``depth`` layers, D = size, F = hidden, in chunks of ``tokens``, are not taken, or ""."""
    if depth not in (1, 2):
        return f"depth: wanted 1 or 2 layers, got {depth}"
    if size not in SIZES:
        return f"head size: wanted one of {SIZES}, got {size}"
    if depth == 2 and hidden not in [size * e for e in EXPANSIONS]:
        return f"hidden size: wanted {EXPANSIONS} times the head size {size}, got {hidden}"
    if tokens not in SIZES:
        return f"chunk size: wanted one of {SIZES}, got {tokens}"
    if product == torch.float32 and tokens * size > 64 * 64:
        return f"keys: wanted bfloat16 beside chunks of {tokens} and heads of {size} (shared memory), got {product}"
    if product not in (torch.bfloat16, torch.float32):
        return f"keys: wanted bfloat16 or float32, got {product}"
    if state not in (product, torch.float32):
        return f"state: wanted the keys' {product} or float32, got {state}"
    return ""


def refuse(weights: list[Tensor], k: Tensor, state: torch.dtype) -> None:
    """Raises ValueError if the kernels do not take weights [M, ...] and k [M, N, C, D]."""
    reason = refusal(len(weights), k.shape[-1], weights[0].shape[-1], k.shape[-2], k.dtype, state)
    if reason:
        raise ValueError(f"memory_small: {reason}")
    if any(w.dtype != torch.float32 for w in weights):
        raise ValueError(f"memory_small: weights: wanted float32, got {[w.dtype for w in weights]}")


def mixes(tokens: int, size: int, product: torch.dtype) -> bool:
    """Whether chunks of 64 tokens and more stand beside heads of less than 64: with 4 warps some products would take
    wgmma and others mma.sync, which Triton 3.6 does not always compile, or compiles into wrong addresses (seen on an
    H200). Below 4 warps it takes mma.sync for all."""
    return product == torch.bfloat16 and tokens >= 64 > size


def blocks_of(
    memories: int, tokens: int, size: int, hidden: int, depth: int, product: torch.dtype, device: torch.device
) -> Blocks:
    """How memories of C = tokens, D = size and F = hidden are cut up on ``device``."""
    features = hidden if depth == 2 else size
    width, warps = min(WIDTHS[product], features), WARPS
    if mixes(tokens, size, product):
        width, warps = min(MIXED[0], features), MIXED[1]
    elif max(tokens, size) * width < 64 * 64:
        warps = 4
    # The forward's sums over programs compile (Triton 3.6) where blocks are as wide as heads; elsewhere a program of it
    # has the whole memory. The backward always has a program a block.
    if device.type != "cuda" or depth == 1 or product != torch.bfloat16 or width != size:
        return Blocks(1, width, warps)
    room = torch.cuda.get_device_properties(device).multi_processor_count

    def cost(programs: int) -> float:
        """Of a chunk of all memories, in those of one block (on an H200 four of them take three times one's)."""
        return -(-memories * programs // room) * (1 + (hidden // (width * programs) - 1) * 2 / 3)

    return Blocks(min((p for p in (8, 4, 2, 1) if p * width <= hidden), key=cost), width, warps)


def groups_of(memories: int, programs: int, tensor: Tensor) -> list[slice]:
    """Memories that are written at once: no more programs than ``tensor``'s device has multiprocessors. More would
    have to wait for each other, and what they leave for the next chunk would no longer be in the cache."""
    count = -(-memories * programs // max(multiprocessors(tensor), programs))
    size = -(-memories // count)
    return [slice(first, min(first + size, memories)) for first in range(0, memories, size)]


def anchor_index(refresh: Tensor) -> Tensor:
    """int32 [M, N]: the chunk whose start is the anchor of each chunk, -1 for the one given; from refresh [M, N]."""
    place = torch.arange(refresh.shape[1], device=refresh.device, dtype=torch.int32)
    return torch.where(refresh > 0, place, -1).cummax(1).values.to(torch.int32).contiguous()


@triton.jit
def gate_of(z):
    """sigmoid(z), in the fewest instructions: the root of a square takes one where a division takes eight."""
    below = 1 + tl.exp2(-1.4426950408889634 * z)
    return tl.rsqrt(below * below)


@triton.jit
def slope_of(z):
    """silu'(z)."""
    gate = gate_of(z)
    return gate * (1 + z * (1 - gate))


@triton.jit
def dot(a, b):
    """``a @ b`` with float32 sums, and float32 factors as they are."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def is_finite(x):
    """Where a number is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def finite_rows(k, v, lr):
    """Tokens [C] whose key and value [C, D] and rate [C] are finite throughout."""
    whole = is_finite(k.to(tl.float32)) & is_finite(v.to(tl.float32))
    return (tl.min(whole.to(tl.int32), 1) > 0) & is_finite(lr)


@triton.jit
def write_rate(square, keep, lr, clip, CLIP: tl.constexpr):
    """The clip's factor min(1, clip / |g|) [C], and the rate: lr times that, zero where a write is dropped."""
    factor = tl.full(square.shape, 1.0, tl.float32)
    if CLIP:
        factor = clip * tl.rsqrt(tl.maximum(tl.where(keep, square, 1.0), clip * clip))
    return factor, tl.where(keep, lr * factor, 0.0)


@triton.jit
def sum_of_partials(pointers, STRIDE: tl.constexpr, P: tl.constexpr):
    """The sum over P programs, in their order (so that all get the same bits), of what lies STRIDE apart."""
    total = tl.load(pointers, cache_modifier=".cg")
    for p in tl.static_range(1, P):
        total += tl.load(pointers + p * STRIDE, cache_modifier=".cg")
    return total
