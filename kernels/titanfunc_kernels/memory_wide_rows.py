"""Rows of a chunk in wide memories: the forward pass of tokens through the anchor, back again, and the rate.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size; see memory_wide.py for who launches what.
Every kernel of products has programs over (blocks of columns, blocks of tokens, memories).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.order import overlap


@triton.jit
def dot(a, b, acc):
    """acc + A B with float32 sums; float32 factors stay float32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def below(x, size, EVEN: tl.constexpr):
    """Which of x are below ``size``; EVEN: all are. A mask that is known to be true costs no instruction."""
    if EVEN:  # noqa: SIM108
        found = tl.full(x.shape, True, tl.int1)
    else:
        found = x < size
    return found


@triton.jit
def product(
    a, a_row, a_inner, b, b_inner, b_col, rows, here, cols, held, K, acc, BK: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """acc + A B for the rows and columns named, those that are ``here`` and ``held``, A [R, K] and B [K, N] of any
    strides; float32 stays float32. EVEN: BK divides K."""
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        live = below(inner, K, EVEN)
        x = tl.load(
            a + (rows[:, None] * a_row + inner[None, :] * a_inner), mask=here[:, None] & live[None, :], other=0.0
        )  # fmt: skip
        w = tl.load(
            b + (inner[:, None] * b_inner + cols[None, :] * b_col), mask=live[:, None] & held[None, :], other=0.0
        )  # fmt: skip
        acc = dot(x, w, acc)
    return acc


@triton.jit
def anchor_of(anchor, past, index, m, c, N, size):
    """Where the anchor of chunk c of memory m begins: in the history, at the chunk that ``index`` names, or where the
    one from before the first chunk lies (index -1)."""
    at = tl.load(index + m * N + c)
    if at >= 0:  # noqa: SIM108
        found = past + (m.to(tl.int64) * N + at) * size
    else:
        found = anchor + m.to(tl.int64) * size
    return found


@triton.jit
def slope_of(z):
    """silu'(z)."""
    gate = tl.sigmoid(z)
    return gate * (1 + z * (1 - gate))


@triton.jit
def total(part, tokens, C, P: tl.constexpr, PADDED: tl.constexpr):
    """The sums over P of part [P, C] for the tokens named."""
    p = tl.arange(0, PADDED)
    x = tl.load(part + p[:, None] * C + tokens[None, :], mask=(p[:, None] < P) & (tokens[None, :] < C), other=0.0)
    return tl.sum(x, 0)


@triton.jit
def prepare_kernel(k, v, inner_lr, x, usable, norms, T, D, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Rows k of all T tokens that can be read, zero for the others; which those are; and |k|^2."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    at = tokens[:, None].to(tl.int64) * D + cols[None, :]
    held = (tokens[:, None] < T) & (cols[None, :] < D)
    rate = tl.load(inner_lr + tokens, mask=tokens < T, other=0.0)
    key = tl.load(k + at, mask=held, other=0.0).to(tl.float32)
    value = tl.load(v + at, mask=held, other=0.0).to(tl.float32)
    largest = tl.maximum(
        tl.max(tl.where(tl.abs(key) < float("inf"), 0.0, 1.0), 1),
        tl.max(tl.where(tl.abs(value) < float("inf"), 0.0, 1.0), 1),
    )
    ok = (largest == 0) & (tl.abs(rate) < float("inf"))
    key = tl.where(ok[:, None], key, 0.0)
    tl.store(x + at, key.to(x.dtype.element_ty), mask=held)
    tl.store(usable + tokens, ok.to(tl.float32), mask=tokens < T)
    tl.store(norms + tokens.to(tl.int64) * WIDTH, tl.sum(key * key, 1), mask=tokens < T)


@triton.jit(do_not_specialize=["c"])
def hidden_kernel(
    x, anchor, past, index, z, h, part, c, N, C, D: tl.constexpr, F: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """z = x W_1, h = silu(z), and partial sums of h^2."""
    overlap(OVERLAP)
    m = tl.program_id(2)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BN + tl.arange(0, BN)
    here, there = below(rows, C, WHOLE), below(cols, F, F % BN == 0)
    w = anchor_of(anchor, past, index, m, c, N, D * F)
    chunk = (m.to(tl.int64) * N + c) * C
    acc = product(
        x + chunk * D, D, 1, w, F, 1, rows, here, cols, there, D, tl.zeros((BC, BN), dtype=tl.float32), BK, D % BK == 0
    )  # fmt: skip
    stored = acc.to(z.dtype.element_ty)
    wide = stored.to(tl.float32)
    active = wide * tl.sigmoid(wide)
    at = rows[:, None] * F + cols[None, :]
    held = here[:, None] & there[None, :]
    tl.store(z + chunk * F + at, stored, mask=held)
    tl.store(h + chunk * F + at, active.to(h.dtype.element_ty), mask=held)
    sums = tl.sum(tl.where(held, active * active, 0.0), 1)
    tl.store(part + (m * tl.num_programs(0) + tl.program_id(0)) * C + rows, sums, mask=here)


@triton.jit(do_not_specialize=["c"])
def output_kernel(
    x, v, usable, anchor, past, index, e_wide, e, part, c, N, C, DI: tl.constexpr, D: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """e = 2 (x W - v) for rows x [C, DI], twice: float32 and for the products; partial sums of e^2."""
    overlap(OVERLAP)
    m = tl.program_id(2)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BN + tl.arange(0, BN)
    here, there = below(rows, C, WHOLE), below(cols, D, D % BN == 0)
    w = anchor_of(anchor, past, index, m, c, N, DI * D)
    chunk = (m.to(tl.int64) * N + c) * C
    acc = product(
        x + chunk * DI, DI, 1, w, D, 1, rows, here, cols, there, DI, tl.zeros((BC, BN), dtype=tl.float32), BK,
        DI % BK == 0,
    )  # fmt: skip
    at = rows[:, None] * D + cols[None, :]
    held = here[:, None] & there[None, :]
    ok = tl.load(usable + chunk + rows, mask=here, other=0.0) > 0
    target = tl.load(v + chunk * D + at, mask=held & ok[:, None], other=0.0).to(tl.float32)
    error = 2 * (acc - target)
    tl.store(e_wide + chunk * D + at, error, mask=held)
    tl.store(e + chunk * D + at, error.to(e.dtype.element_ty), mask=held)
    sums = tl.sum(tl.where(held, error * error, 0.0), 1)
    tl.store(part + (m * tl.num_programs(0) + tl.program_id(0)) * C + rows, sums, mask=here)


@triton.jit(do_not_specialize=["c"])
def returned_kernel(
    e, z, anchor, past, index, r, part, c, N, C, D: tl.constexpr, F: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """r = e_2 W_2^T, and partial sums of (r silu'(z))^2. W_2 [F, D] is read transposed."""
    overlap(OVERLAP)
    m = tl.program_id(2)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BN + tl.arange(0, BN)
    here, there = below(rows, C, WHOLE), below(cols, F, F % BN == 0)
    w = anchor_of(anchor, past, index, m, c, N, F * D)
    chunk = (m.to(tl.int64) * N + c) * C
    acc = product(
        e + chunk * D, D, 1, w, 1, D, rows, here, cols, there, D, tl.zeros((BC, BN), dtype=tl.float32), BK, D % BK == 0
    )  # fmt: skip
    at = rows[:, None] * F + cols[None, :]
    held = here[:, None] & there[None, :]
    stored = acc.to(r.dtype.element_ty)
    error = stored.to(tl.float32) * slope_of(tl.load(z + chunk * F + at, mask=held, other=0.0).to(tl.float32))
    tl.store(r + chunk * F + at, stored, mask=held)
    sums = tl.sum(tl.where(held, error * error, 0.0), 1)
    tl.store(part + (m * tl.num_programs(0) + tl.program_id(0)) * C + rows, sums, mask=here)


@triton.jit
def rate_of(square, usable, inner_lr, clip, CLIPS: tl.constexpr):
    """Which writes are kept, the clip's factor, and the rate, zero where one is dropped."""
    ok = (usable > 0) & (square < float("inf"))
    factor = square * 0 + 1
    if CLIPS:
        factor = clip * tl.rsqrt(tl.maximum(tl.where(ok, square, 1.0), clip * clip))
    return ok, factor, tl.where(ok, inner_lr * factor, 0.0)


@triton.jit
def _store_scaled(delta, delta_g, delta_n, at, error, to_w, to_s, held):
    """Rows Delta, and from them as stored g Delta and n Delta."""
    stored = error.to(delta.dtype.element_ty)
    tl.store(delta + at, stored, mask=held)
    wide = stored.to(tl.float32)
    tl.store(delta_g + at, (to_w * wide).to(delta.dtype.element_ty), mask=held)
    tl.store(delta_n + at, (to_s * wide).to(delta.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["c"])
def finish_kernel(
    inner_lr, g, n, e_wide, e, z, r, x, h, delta, delta_g, delta_n, hidden, hidden_g, hidden_n, norms, kept, loss,
    part_h, part_e, part_d, clip, c, N, C, D: tl.constexpr, F: tl.constexpr,
    CLIPS: tl.constexpr, DEPTH: tl.constexpr, PH: tl.constexpr, PH_PADDED: tl.constexpr,
    PD: tl.constexpr, PD_PADDED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """From the norms the rate, and with it the rows Delta, g Delta and n Delta, the last two of this chunk alone (those
    of the first of two layers: ``hidden``); rows X and e of dropped writes become zero.

    Programs over blocks of columns: D's first, then F's. ``kept`` holds which rows can be read, and becomes which are
    kept: a program that finds the new value in it comes to the same.
    """
    overlap(OVERLAP)
    m, block = tl.program_id(2), tl.program_id(0)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    chunk = (m.to(tl.int64) * N + c) * C
    seen = chunk + tokens
    here = below(tokens, C, WHOLE)
    own = m.to(tl.int64) * C
    square_x = tl.load(norms + seen * (2 * DEPTH), mask=here, other=0.0)
    square_e = total(part_e + m * PD * C, tokens, C, PD, PD_PADDED)
    if DEPTH == 2:
        square_h = total(part_h + m * PH * C, tokens, C, PH, PH_PADDED)
        square_d = total(part_d + m * PH * C, tokens, C, PH, PH_PADDED)
        square = square_x * square_d + square_h * square_e
    else:
        square = square_x * square_e
    usable = tl.load(kept + seen, mask=here, other=0.0)
    lr = tl.load(inner_lr + seen, mask=here, other=0.0)
    ok, _, rate = rate_of(square, usable, lr, clip, CLIPS)
    row = ok[:, None]
    to_w = tl.load(g + seen, mask=here, other=0.0)[:, None]
    to_s = tl.load(n + seen, mask=here, other=0.0)[:, None]
    blocks = tl.cdiv(D, BN)
    if block < blocks:
        cols = block * BN + tl.arange(0, BN)
        at = tokens[:, None] * D + cols[None, :]
        held = here[:, None] & below(cols, D, D % BN == 0)[None, :]
        error = tl.load(e_wide + chunk * D + at, mask=held & row, other=0.0) * rate[:, None]
        _store_scaled(delta + chunk * D, delta_g + own * D, delta_n + own * D, at, error, to_w, to_s, held)
        tl.store(x + chunk * D + at, tl.zeros((BT, BN), dtype=x.dtype.element_ty), mask=held & (row == 0))
        tl.store(e + chunk * D + at, tl.zeros((BT, BN), dtype=e.dtype.element_ty), mask=held & (row == 0))
    elif DEPTH == 2:
        cols = (block - blocks) * BN + tl.arange(0, BN)
        at = tokens[:, None] * F + cols[None, :]
        held = here[:, None] & below(cols, F, F % BN == 0)[None, :]
        error = tl.load(r + chunk * F + at, mask=held & row, other=0.0).to(tl.float32) * rate[:, None]
        error *= slope_of(tl.load(z + chunk * F + at, mask=held & row, other=0.0).to(tl.float32))
        _store_scaled(hidden + chunk * F, hidden_g + own * F, hidden_n + own * F, at, error, to_w, to_s, held)
        tl.store(h + chunk * F + at, tl.zeros((BT, BN), dtype=h.dtype.element_ty), mask=held & (row == 0))
    if block == 0:
        tl.store(kept + seen, ok.to(tl.float32), mask=here)
        tl.store(loss + seen, 0.25 * square_e, mask=here)
        if DEPTH == 2:
            tl.store(norms + seen * 4 + 1, square_d, mask=here)
            tl.store(norms + seen * 4 + 2, square_h, mask=here)
            tl.store(norms + seen * 4 + 3, square_e, mask=here)
        else:
            tl.store(norms + seen * 2 + 1, square_e, mask=here)
