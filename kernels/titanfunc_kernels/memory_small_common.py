"""What the kernels of small memories share: which sizes they take, how a memory is cut up, pieces of a token's write.

Letters: M memories, C tokens a chunk, D head size, F hidden size, P programs a memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """How memories of these sizes are cut up on ``device``: all of its multiprocessors, if the memories leave any free.

    The programs of a memory wait for each other, so all of them must be running at once: never more than there are
    multiprocessors, and one a memory where programs run one after another (the interpreter).
    """
    features = hidden if depth == 2 else size
    width, warps = min(WIDTHS[product], features), WARPS
    if mixes(tokens, size, product):
        width, warps = min(MIXED[0], features), MIXED[1]
    elif max(tokens, size) * width < 64 * 64:
        warps = 4
    programs = 1
    # The sums over programs compile (Triton 3.6) where blocks are as wide as heads; elsewhere a program has it all.
    if device.type == "cuda" and depth == 2 and product == torch.bfloat16 and width == size:
        free = torch.cuda.get_device_properties(device).multi_processor_count // max(memories, 1)
        while programs * 2 <= min(free, hidden // width):
            programs *= 2
    return Blocks(programs, width, warps)


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
def meet(counter, arrivals):
    """Waits until ``counter`` has seen so many arrivals, this program's among them.

    What any thread of an arrived program stored before is then there to load past the first-level cache: the barrier
    before orders the program's threads before the one that releases, that after behind the one that acquires.
    """
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def sum_of_partials(pointers, like, STRIDE: tl.constexpr, P: tl.constexpr):
    """The sum over P programs, in their order (so that all get the same bits), of what lies STRIDE apart."""
    total = tl.zeros(like.shape, tl.float32)
    for p in tl.static_range(P):
        total += tl.load(pointers + p * STRIDE, cache_modifier=".cg")
    return total
