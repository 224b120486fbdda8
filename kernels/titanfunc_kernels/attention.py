"""Attention over a sliding window, or over segments with a context, beside keys that every query sees: forward.

A flash-style kernel (arXiv 2307.08691): a program holds one block of queries, walks over the blocks of keys that they
can see, and keeps the running maximum and sum of the softmax. Both kinds of attention are one kernel over rows of
queries and keys; key ``j`` of a row is seen by query ``t`` where low(t) <= j <= t + offset:

- window: N = B H rows; keys are the cache's W tokens and then the T new ones; offset = W, low(t) = t + W - min(age,
  W - 1);
- segments: N = B H R rows of T = S tokens; offset = 0, low = 0; the same over the context's keys.

Keys outside those bounds are not loaded, save for the rest of the blocks in which a bound lies. A block that all
queries see whole is summed without a mask.

Letters: B batch, H heads, T tokens, D head size, W window in tokens, P prefix, R segments, S tokens of a segment,
N rows of the grid, L = offset + T keys of a row.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import on_device

# A score that stands for "not seen". Finite, so that a row whose first block is hidden holds no inf - inf; what such a
# block adds is multiplied by exp2(_HIDDEN - m) = 0 when the row's first key comes.
_HIDDEN = tl.constexpr(-1e30)
# How float32 products are taken: as float32. Half-precision inputs do not look at it.
PRECISION = "ieee"


class Blocks(NamedTuple):
    """A program's queries and keys, its warps, how many blocks of loads are in flight, and the most registers a thread
    may take (None: as many as it likes)."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# By bits of the dtype and head size. In 16 bits: two warp groups of 64 queries, and key blocks small enough that a
# window's two edges waste little. 128 registers a thread, which suffice without spills up to D = 64, let two such
# programs share a multiprocessor, so that one takes exponentials while the other multiplies. In 32 bits the products
# run on the scalar units and their operands sit in registers, so blocks are small.
FORWARD = {
    (16, 16): Blocks(128, 64, 8, 3, 128), (16, 32): Blocks(128, 64, 8, 3, 128),
    (16, 64): Blocks(64, 64, 4, 3, 128), (16, 128): Blocks(128, 64, 8, 3),
    (32, 16): Blocks(32, 32, 4, 2), (32, 32): Blocks(32, 32, 4, 2),
    (32, 64): Blocks(32, 32, 4, 2), (32, 128): Blocks(32, 32, 8, 1),
}  # fmt: skip


class Rows(NamedTuple):
    """How [B, H, T, D] lies in rows of the grid. tokens: queries of a row; offset: keys of a row before its first
    query; groups: rows that share a prefix (segments); heads: rows that share their ages."""

    number: int
    tokens: int
    offset: int
    groups: int
    heads: int


def rows_of(q: Tensor, keys: Tensor, segment: int) -> Rows:
    """The rows of queries [B, H, T, D] over keys [B, H, W + T, D] (``segment`` 0), or over segments of that length."""
    batch, heads, tokens, _ = q.shape
    if segment:
        groups = tokens // segment
        return Rows(batch * heads * groups, segment, 0, groups, heads)
    return Rows(batch * heads, tokens, keys.shape[2] - tokens, 1, heads)


def fit(table: dict[tuple[int, int], Blocks], q: Tensor, queries: int, keys: int) -> Blocks:
    """The table's blocks for q [..., D], no larger than so many queries and keys call for (the least product is 16)."""
    blocks = table[q.element_size() * 8, q.shape[-1]]
    rows = min(blocks.queries, max(16, triton.next_power_of_2(queries)))
    columns = min(blocks.keys, max(16, triton.next_power_of_2(keys)))
    shrunk = rows < blocks.queries or columns < blocks.keys
    warps = min(blocks.warps, 4) if shrunk and max(rows, columns) <= 64 else blocks.warps
    return Blocks(rows, columns, warps, blocks.stages, blocks.registers if warps == blocks.warps else None)


def scale_of(q: Tensor) -> float:
    """log2(e) / sqrt(D) for q [..., D]: the softmax is taken in powers of two."""
    return math.log2(math.e) / math.sqrt(q.shape[-1])


@triton.jit
def low_of(age, t, inside, offset):
    """The first key that each query sees, [queries]: its window's, or its document's."""
    back = tl.load(age + t, mask=inside, other=0)
    return t + offset - tl.minimum(back, offset - 1).to(tl.int32)


@triton.jit
def _sum_up(
    q, k_row, v_row, first, last, length, low, high, m, total, acc, scale,
    D: tl.constexpr, KEYS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys [first, last) of a row to the running softmax (m, total, acc) of a block of queries."""
    place = tl.arange(0, KEYS)
    at = place[:, None] * D + tl.arange(0, D)[None, :]
    for start in range(first, last, KEYS):
        if HIGH:
            held = (start + place < length)[:, None]
            k = tl.load(k_row + start * D + at, mask=held, other=0.0)
            v = tl.load(v_row + start * D + at, mask=held, other=0.0)
        else:
            k = tl.load(k_row + start * D + at)
            v = tl.load(v_row + start * D + at)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        j = (start + place)[None, :]
        if LOW:
            s = tl.where(j >= low[:, None], s, _HIDDEN)
        if HIGH:
            s = tl.where(j <= high[:, None], s, _HIDDEN)
        highest = tl.maximum(m, tl.max(s, 1))
        shrink = tl.exp2(m - highest)
        p = tl.exp2(s - highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = highest
    return m, total, acc


@triton.jit
def _attend(
    q, plain, k, v, context_k, context_v, prefix_k, prefix_v, age, y, lse,
    tokens, offset, prefix, groups, heads, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FIXED: tl.constexpr,
    AGES: tl.constexpr, CONTEXT: tl.constexpr, PREFIX: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one row: y and the base-2 log-sum-exp of its scores."""
    blocks = tl.cdiv(tokens, QUERIES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # the longest first
    length = offset + tokens
    t = first + tl.arange(0, QUERIES)
    inside = t < tokens
    at = t[:, None] * D + tl.arange(0, D)[None, :]
    here = row * tokens * D
    queries = tl.load(q + here + at, mask=inside[:, None], other=0.0)
    m = tl.full([QUERIES], _HIDDEN, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    high = t + offset
    if PREFIX:
        asked = queries
        if PLAIN:
            asked = tl.load(plain + here + at, mask=inside[:, None], other=0.0)
        start = row // groups * prefix * D
        m, total, acc = _sum_up(
            asked, prefix_k + start, prefix_v + start, 0, prefix, prefix, t, t * 0 + (prefix - 1), m, total, acc, scale,
            D, FIXED, False, True, PRECISION,
        )  # fmt: skip
    # Keys [bottom, middle) may lie below some query's window, [middle, top) are seen by all, [top, end) above some.
    end = tl.minimum(first + QUERIES, tokens) + offset
    top = (first + offset + 1) // KEYS * KEYS
    start = row * length * D
    middle = 0
    low = high
    if AGES:
        low = low_of(age + row // heads * tokens, t, inside, offset)
        bottom = tl.maximum(tl.min(low), 0) // KEYS * KEYS
        middle = tl.maximum(bottom, tl.minimum(top, tl.cdiv(tl.max(low), KEYS) * KEYS))
        m, total, acc = _sum_up(
            queries, k + start, v + start, bottom, middle, length, low, high, m, total, acc, scale,
            D, KEYS, True, False, PRECISION,
        )  # fmt: skip
    m, total, acc = _sum_up(
        queries, k + start, v + start, middle, top, length, low, high, m, total, acc, scale,
        D, KEYS, False, False, PRECISION,
    )  # fmt: skip
    m, total, acc = _sum_up(
        queries, k + start, v + start, top, end, length, low, high, m, total, acc, scale,
        D, KEYS, AGES, True, PRECISION,
    )  # fmt: skip
    if CONTEXT:
        m, total, acc = _sum_up(
            queries, context_k + start, context_v + start, 0, top, length, low, high, m, total, acc, scale,
            D, KEYS, False, False, PRECISION,
        )  # fmt: skip
        m, total, acc = _sum_up(
            queries, context_k + start, context_v + start, top, end, length, low, high, m, total, acc, scale,
            D, KEYS, False, True, PRECISION,
        )  # fmt: skip
    tl.store(y + here + at, (acc / total[:, None]).to(y.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + row * tokens + t, m + tl.log2(total), mask=inside)


def forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    context: tuple[Tensor, Tensor] | None,
    prefix: tuple[Tensor, Tensor] | None,
    plain: Tensor | None,
    age: Tensor | None,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """(y [B, H, T, D], base-2 log-sum-exp of the scores, float32 [B, H, T]).

    Window (``segment`` 0): q [B, H, T, D], keys and values [B, H, W + T, D], age int64 [B, T]. Segments of ``segment``
    tokens: keys, values and the context's [B, H, T, D]. prefix: keys and values [B, H, P, D], for the queries ``plain``
    [B, H, T, D] where given, else for q. Shapes and dtypes are the caller's to check.
    """
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    context_k, context_v = (x.contiguous() for x in context or (keys, values))
    prefix_k, prefix_v = (x.contiguous() for x in prefix or (keys, values))
    count = prefix_k.shape[2] if prefix else 0
    rows = rows_of(q, keys, segment)
    blocks = fit(FORWARD, q, rows.tokens, rows.offset + rows.tokens)
    y, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with on_device(q):
        _attend[(rows.number * triton.cdiv(rows.tokens, blocks.queries),)](
            q, q if plain is None else plain.contiguous(), keys, values, context_k, context_v, prefix_k, prefix_v,
            q if age is None else age.contiguous(), y, lse,
            rows.tokens, rows.offset, count, rows.groups, rows.heads, scale_of(q),
            D=q.shape[-1], QUERIES=blocks.queries, KEYS=blocks.keys,
            FIXED=min(blocks.keys, max(16, triton.next_power_of_2(count))),
            AGES=age is not None, CONTEXT=context is not None, PREFIX=prefix is not None, PLAIN=plain is not None,
            PRECISION=PRECISION, num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers,
        )  # fmt: skip
    return y, lse
