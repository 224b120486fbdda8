"""Attention over a sliding window, or over segments with a context, beside keys that every query sees: backward.

With p = exp2(scores - lse), ds = p (dy v^T - delta) and delta = sum(dy y) over features (arXiv 2307.08691, algorithm
2): one kernel holds blocks of queries and gives dq = ds k / sqrt(D); it leaves delta, and the first key that each query
sees, for the others. One holds blocks of keys and gives dv = p^T dy and dk = ds^T q / sqrt(D), once for the keys and
once for the context's. One does the same for the prefix, whose sums over stretches of queries are added up afterwards,
in a fixed order. Here stand the first of them and the launches; the others in titanfunc_kernels.attention_keys.

Letters and the rows of the grid: titanfunc_kernels.attention.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.attention import PRECISION, Blocks, fit, low_of, rows_of, scale_of
from titanfunc_kernels.attention_keys import by_keys, by_prefix
from titanfunc_kernels.launch import on_device

# As FORWARD there. A program that holds keys has accumulators of keys x 2 (D + queries) floats, about twice those of
# one that holds queries: it takes a multiprocessor for itself.
BY_QUERIES = {
    (16, 16): Blocks(128, 64, 8, 3, 128), (16, 32): Blocks(128, 64, 8, 3, 128),
    (16, 64): Blocks(128, 64, 8, 3, 128), (16, 128): Blocks(128, 64, 8, 2),
    (32, 16): Blocks(32, 32, 4, 2), (32, 32): Blocks(32, 32, 4, 2),
    (32, 64): Blocks(32, 32, 4, 2), (32, 128): Blocks(32, 32, 8, 1),
}  # fmt: skip
BY_KEYS = {
    (16, 16): Blocks(64, 128, 8, 3), (16, 32): Blocks(64, 128, 8, 3),
    (16, 64): Blocks(64, 64, 4, 2, 128), (16, 128): Blocks(64, 128, 8, 2),
    (32, 16): Blocks(32, 32, 4, 2), (32, 32): Blocks(32, 32, 4, 2),
    (32, 64): Blocks(32, 32, 8, 2), (32, 128): Blocks(32, 32, 8, 1),
}  # fmt: skip
# Queries of one partial sum of the prefix's gradients: few enough for a program of every multiprocessor at B H = 64.
STRETCH = 512

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _pull_queries(
    q, dy, lse, delta, k_row, v_row, first, last, length, low, high, dq, scale,
    D: tl.constexpr, KEYS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (times sqrt(D)) of a block of queries, with what keys [first, last) of a row add."""
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
        p = tl.exp2(s - lse[:, None])
        j = (start + place)[None, :]
        if LOW:
            p = tl.where(j >= low[:, None], p, 0.0)
        if HIGH:
            p = tl.where(j <= high[:, None], p, 0.0)
        ds = p * (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _by_queries(
    q, plain, k, v, context_k, context_v, prefix_k, prefix_v, age, y, dy, lse, delta, lows, dq, dplain,
    tokens, offset, prefix, groups, heads, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FIXED: tl.constexpr,
    AGES: tl.constexpr, CONTEXT: tl.constexpr, PREFIX: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one row: dq, dplain, delta and (with AGES) lows."""
    blocks = tl.cdiv(tokens, QUERIES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # the longest first
    length = offset + tokens
    t = first + tl.arange(0, QUERIES)
    inside = t < tokens
    at = t[:, None] * D + tl.arange(0, D)[None, :]
    here = row * tokens * D
    given = tl.load(dy + here + at, mask=inside[:, None], other=0.0)
    made = tl.load(y + here + at, mask=inside[:, None], other=0.0)
    dot = tl.sum(given.to(tl.float32) * made.to(tl.float32), 1)
    tl.store(delta + row * tokens + t, dot, mask=inside)
    total = tl.load(lse + row * tokens + t, mask=inside, other=float("inf"))
    queries = tl.load(q + here + at, mask=inside[:, None], other=0.0)
    acc = tl.zeros([QUERIES, D], tl.float32)
    high = t + offset
    if PREFIX:
        asked = queries
        if PLAIN:
            asked = tl.load(plain + here + at, mask=inside[:, None], other=0.0)
        start = row // groups * prefix * D
        acc = _pull_queries(
            asked, given, total, dot, prefix_k + start, prefix_v + start, 0, prefix, prefix, t, t * 0 + (prefix - 1),
            acc, scale, D, FIXED, False, True, PRECISION,
        )  # fmt: skip
        if PLAIN:
            tl.store(dplain + here + at, (acc * (scale * _LN_2)).to(dplain.dtype.element_ty), mask=inside[:, None])
            acc = tl.zeros([QUERIES, D], tl.float32)
    # The three ranges of keys are the forward's.
    end = tl.minimum(first + QUERIES, tokens) + offset
    top = (first + offset + 1) // KEYS * KEYS
    start = row * length * D
    middle = 0
    low = high
    if AGES:
        low = low_of(age + row // heads * tokens, t, inside, offset)
        tl.store(lows + row * tokens + t, low, mask=inside)
        bottom = tl.maximum(tl.min(low), 0) // KEYS * KEYS
        middle = tl.maximum(bottom, tl.minimum(top, tl.cdiv(tl.max(low), KEYS) * KEYS))
        acc = _pull_queries(
            queries, given, total, dot, k + start, v + start, bottom, middle, length, low, high,
            acc, scale, D, KEYS, True, False, PRECISION,
        )  # fmt: skip
    acc = _pull_queries(
        queries, given, total, dot, k + start, v + start, middle, top, length, low, high,
        acc, scale, D, KEYS, False, False, PRECISION,
    )  # fmt: skip
    acc = _pull_queries(
        queries, given, total, dot, k + start, v + start, top, end, length, low, high,
        acc, scale, D, KEYS, AGES, True, PRECISION,
    )  # fmt: skip
    if CONTEXT:
        acc = _pull_queries(
            queries, given, total, dot, context_k + start, context_v + start, 0, top, length, low, high,
            acc, scale, D, KEYS, False, False, PRECISION,
        )  # fmt: skip
        acc = _pull_queries(
            queries, given, total, dot, context_k + start, context_v + start, top, end, length, low, high,
            acc, scale, D, KEYS, False, True, PRECISION,
        )  # fmt: skip
    tl.store(dq + here + at, (acc * (scale * _LN_2)).to(dq.dtype.element_ty), mask=inside[:, None])


def backward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    context: tuple[Tensor, Tensor] | None,
    prefix: tuple[Tensor, Tensor] | None,
    plain: Tensor | None,
    age: Tensor | None,
    segment: int,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
) -> list[Tensor]:
    """Gradients [dq, dkeys, dvalues] and, where given, of the context's keys and values, of ``plain`` and of the
    prefix's keys and values, in this order and of their shapes.

    The arguments are forward's, its results y [B, H, T, D] and lse [B, H, T], and the cotangent dy [B, H, T, D].
    """
    q, keys, values, dy = q.contiguous(), keys.contiguous(), values.contiguous(), dy.contiguous()
    context_k, context_v = (x.contiguous() for x in context or (keys, values))
    prefix_k, prefix_v = (x.contiguous() for x in prefix or (keys, values))
    asked = q if plain is None else plain.contiguous()
    ages = q if age is None else age.contiguous()
    count, size = prefix_k.shape[2] if prefix else 0, q.shape[-1]
    rows, scale = rows_of(q, keys, segment), scale_of(q)
    length = rows.offset + rows.tokens
    delta, lows = torch.empty_like(lse), torch.empty(lse.shape, dtype=torch.int32, device=lse.device)
    dq = torch.empty_like(q)
    dplain = dq if plain is None else torch.empty_like(asked)

    with on_device(q):
        blocks = fit(BY_QUERIES, q, rows.tokens, length)
        _by_queries[(rows.number * triton.cdiv(rows.tokens, blocks.queries),)](
            q, asked, keys, values, context_k, context_v, prefix_k, prefix_v, ages, y, dy, lse, delta, lows, dq, dplain,
            rows.tokens, rows.offset, count, rows.groups, rows.heads, scale,
            D=size, QUERIES=blocks.queries, KEYS=blocks.keys,
            FIXED=min(blocks.keys, max(16, triton.next_power_of_2(count))),
            AGES=age is not None, CONTEXT=context is not None, PREFIX=prefix is not None, PLAIN=plain is not None,
            PRECISION=PRECISION, num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers,
        )  # fmt: skip

        blocks = fit(BY_KEYS, q, rows.tokens, length)
        grads = [dq]
        for k, v in [(keys, values), (context_k, context_v)][: 1 if context is None else 2]:
            dk, dv = torch.empty_like(k), torch.empty_like(v)
            by_keys[(rows.number * triton.cdiv(length, blocks.keys),)](
                q, k, v, dy, lse, delta, lows, dk, dv, rows.tokens, rows.offset, scale,
                D=size, QUERIES=blocks.queries, KEYS=blocks.keys, AGES=age is not None,
                PRECISION=PRECISION, num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers,
            )  # fmt: skip
            grads += [dk, dv]
        if plain is not None:
            grads.append(dplain)
        if prefix is not None:
            tokens = q.shape[2]
            blocks = fit(BY_KEYS, q, tokens, count)
            stretch = triton.cdiv(STRETCH, blocks.queries) * blocks.queries
            shape = (2, q.shape[0] * q.shape[1], triton.cdiv(tokens, stretch), count, size)
            partial = torch.empty(shape, dtype=torch.float32, device=q.device)
            by_prefix[(shape[1] * shape[2] * triton.cdiv(count, blocks.keys),)](
                asked, prefix_k, prefix_v, dy, lse, delta, partial, tokens, count, stretch, scale,
                D=size, QUERIES=blocks.queries, KEYS=blocks.keys,
                PRECISION=PRECISION, num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers,
            )  # fmt: skip
            grads += [part.sum(1).to(q.dtype).reshape(prefix_k.shape) for part in partial]
    return grads
