"""Gradients of the keys and values of attention: the kernels that hold a block of keys and walk over its queries.

dv = p^T dy and dk = ds^T q / sqrt(D), as in titanfunc_kernels.attention_backward. Scores are taken the other way round,
[keys, queries], so that no product needs the transpose of an accumulator.

Letters and the rows of the grid: titanfunc_kernels.attention.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _pull_keys(
    k, v, q_row, dy_row, lse_row, delta_row, low_row, first, last, tokens, offset, j, dk, dv, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (times sqrt(D)) and dv of a block of keys ``j``, with what queries [first, last) of a row add."""
    place = tl.arange(0, QUERIES)
    at = place[:, None] * D + tl.arange(0, D)[None, :]
    for start in range(first, last, QUERIES):
        t = start + place
        inside = t < tokens
        q = tl.load(q_row + start * D + at, mask=inside[:, None], other=0.0)
        dy = tl.load(dy_row + start * D + at, mask=inside[:, None], other=0.0)
        # Past the last token: p = exp2(-inf) = 0.
        lse = tl.load(lse_row + t, mask=inside, other=float("inf"))
        delta = tl.load(delta_row + t, mask=inside, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.exp2(s - lse[None, :])
        if LOW:
            low = tl.load(low_row + t, mask=inside, other=0)
            p = tl.where(j[:, None] >= low[None, :], p, 0.0)
        if HIGH:
            p = tl.where(j[:, None] <= (t + offset)[None, :], p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def by_keys(
    q, k, v, dy, lse, delta, lows, dk, dv, tokens, offset, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, AGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of one row: dk and dv."""
    length = offset + tokens
    blocks = tl.cdiv(length, KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * KEYS
    last = first + KEYS - 1
    j = first + tl.arange(0, KEYS)
    held = (j < length)[:, None]
    at = j[:, None] * D + tl.arange(0, D)[None, :]
    here = row * length * D
    keys = tl.load(k + here + at, mask=held, other=0.0)
    values = tl.load(v + here + at, mask=held, other=0.0)
    asking = row * tokens
    # Queries [bottom, middle) may come before some of the keys, [middle, clear) see all of them, [clear, end) may have
    # left some behind, and from ``end`` on none sees any.
    bottom = tl.maximum(first - offset, 0) // QUERIES * QUERIES
    clear, end = tokens, tokens
    if AGES:
        # Where the window ends is known; where the documents end takes a look at what the queries see.
        limit = tl.minimum(tokens, last)
        clear, end = limit, bottom
        for start in range(bottom, limit, QUERIES):
            t = start + tl.arange(0, QUERIES)
            inside = t < tokens
            low = tl.load(lows + asking + t, mask=inside, other=0)
            clear = tl.minimum(clear, tl.min(tl.where(inside & (low > first), start, limit)))
            end = tl.maximum(end, tl.max(tl.where(inside & (low <= last), t + 1, 0)))
    middle = tl.cdiv(tl.maximum(last - offset, 0), QUERIES) * QUERIES
    middle = tl.maximum(bottom, tl.minimum(middle, end))
    clear = tl.maximum(middle, tl.minimum(clear, end))
    acc_k = tl.zeros([KEYS, D], tl.float32)
    acc_v = tl.zeros([KEYS, D], tl.float32)
    acc_k, acc_v = _pull_keys(
        keys, values, q + asking * D, dy + asking * D, lse + asking, delta + asking, lows + asking,
        bottom, middle, tokens, offset, j, acc_k, acc_v, scale, D, QUERIES, AGES, True, PRECISION,
    )  # fmt: skip
    # Each range begins at a multiple of the block of queries, or there is no query left.
    acc_k, acc_v = _pull_keys(
        keys, values, q + asking * D, dy + asking * D, lse + asking, delta + asking, lows + asking,
        middle, clear, tokens, offset, j, acc_k, acc_v, scale, D, QUERIES, False, False, PRECISION,
    )  # fmt: skip
    if AGES:
        acc_k, acc_v = _pull_keys(
            keys, values, q + asking * D, dy + asking * D, lse + asking, delta + asking, lows + asking,
            clear, end, tokens, offset, j, acc_k, acc_v, scale, D, QUERIES, True, False, PRECISION,
        )  # fmt: skip
    tl.store(dk + here + at, (acc_k * (scale * _LN_2)).to(dk.dtype.element_ty), mask=held)
    tl.store(dv + here + at, acc_v.to(dv.dtype.element_ty), mask=held)


@triton.jit
def by_prefix(
    q, k, v, dy, lse, delta, partial, tokens, prefix, stretch, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the prefix, one stretch of queries of one of B H rows: partial [2, B H, stretches, P, D]."""
    stretches = tl.cdiv(tokens, stretch)
    blocks = tl.cdiv(prefix, KEYS)
    # A partial sum's place among all of one kind, and the block of keys.
    sums = (tl.program_id(0) // blocks).to(tl.int64)
    row = sums // stretches
    j = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    held = (j < prefix)[:, None]
    at = j[:, None] * D + tl.arange(0, D)[None, :]
    keys = tl.load(k + row * prefix * D + at, mask=held, other=0.0)
    values = tl.load(v + row * prefix * D + at, mask=held, other=0.0)
    first = ((sums % stretches) * stretch).to(tl.int32)
    asking = row * tokens
    acc_k = tl.zeros([KEYS, D], tl.float32)
    acc_v = tl.zeros([KEYS, D], tl.float32)
    acc_k, acc_v = _pull_keys(
        keys, values, q + asking * D, dy + asking * D, lse + asking, delta + asking, lse,
        first, tl.minimum(first + stretch, tokens), tokens, 0, j, acc_k, acc_v, scale,
        D, QUERIES, False, False, PRECISION,
    )  # fmt: skip
    of_values = (tl.num_programs(0) // blocks).to(tl.int64) * prefix * D
    tl.store(partial + sums * prefix * D + at, acc_k * (scale * _LN_2), mask=held)
    tl.store(partial + of_values + sums * prefix * D + at, acc_v, mask=held)
