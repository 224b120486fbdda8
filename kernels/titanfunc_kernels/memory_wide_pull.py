"""The derivative of a chunk's rows in wide memories, and of the state by what those rows were made of.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, a layer's weights [DI, DO]; formulas and
who launches what: memory_wide_backward.py. Programs over (blocks of columns, blocks of tokens, memories).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_small_common import overlap
from titanfunc_kernels.memory_wide_rows import anchor_of, product, rate_of, slope_of, total
from titanfunc_kernels.memory_wide_state import by_state


@triton.jit
def _pull_rows(
    dw, ds, x, delta, d_delta, error_wide, z, r, kept, g, n, t, part, tile, split, span, slot, m, c, N, C, DI, DO, P,
    LAST: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of a share of t_l [C, DO], and of d g, d n and d rate. e_l is e_L as it lies, or r silu'(z)."""
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tile * BN + tl.arange(0, BN)
    chunk = (m.to(tl.int64) * N + c) * C
    state = m.to(tl.int64) * DI * DO
    by_w, by_s = by_state(
        x + chunk * DI, dw + state, ds + state, DO, 1, rows, cols, C, DI, DO, split, span, BC, BN, BK
    )  # fmt: skip
    inside = rows[:, None] * DO + cols[None, :]
    held = (rows[:, None] < C) & (cols[None, :] < DO)
    at = chunk * DO + inside
    scaled = tl.load(delta + at, mask=held, other=0.0).to(tl.float32)
    to_w = tl.load(g + chunk + rows, mask=rows < C, other=0.0)
    to_s = tl.load(n + chunk + rows, mask=rows < C, other=0.0)
    given = tl.load(d_delta + at, mask=held & (split == 0), other=0.0).to(tl.float32)
    result = given - to_w[:, None] * by_w - to_s[:, None] * by_s
    tl.store(t + (split * tl.num_programs(2) + m).to(tl.int64) * C * DO + inside, result, mask=held)
    live = held & (tl.load(kept + chunk + rows, mask=rows < C, other=0.0) > 0)[:, None]
    if LAST:
        error = tl.load(error_wide + at, mask=live, other=0.0)
    else:
        error = tl.load(r + at, mask=live, other=0.0).to(tl.float32)
        error *= slope_of(tl.load(z + at, mask=live, other=0.0).to(tl.float32))
    place = part + (m * 3 * P + slot) * C + rows
    tl.store(place, -tl.sum(by_w * scaled, 1), mask=rows < C)
    tl.store(place + P * C, -tl.sum(by_s * scaled, 1), mask=rows < C)
    tl.store(place + 2 * P * C, tl.sum(tl.where(live, result * error, 0.0), 1), mask=rows < C)


@triton.jit
def _pull_inputs(
    dw, ds, delta, d_x, kept, g, n, out, out_chunk, tile, split, span, m, c, N, C, DI, DO,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of a share of dX_l [C, DI], from what the rows were multiplied into. dW [DI, DO] and dS are read
    transposed, and g and n, which scale whole rows, come in behind the products."""
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tile * BN + tl.arange(0, BN)
    chunk = (m.to(tl.int64) * N + c) * C
    state = m.to(tl.int64) * DI * DO
    by_w, by_s = by_state(
        delta + chunk * DO, dw + state, ds + state, 1, DO, rows, cols, C, DO, DI, split, span, BC, BN, BK
    )  # fmt: skip
    to_w = tl.load(g + chunk + rows, mask=rows < C, other=0.0)
    to_s = tl.load(n + chunk + rows, mask=rows < C, other=0.0)
    inside = rows[:, None] * DI + cols[None, :]
    held = (rows[:, None] < C) & (cols[None, :] < DI)
    live = held & (tl.load(kept + chunk + rows, mask=rows < C, other=0.0) > 0)[:, None]
    given = tl.load(d_x + chunk * DI + inside, mask=live & (split == 0), other=0.0).to(tl.float32)
    result = given - to_w[:, None] * by_w - to_s[:, None] * by_s
    tl.store(out + out_chunk * DI + inside, tl.where(live, result, 0.0), mask=held)


@triton.jit(do_not_specialize=["c"])
def pull_state_kernel(
    dw1, ds1, x1, delta1, d_delta1, d_x1, t1, dx1, dw2, ds2, x2, delta2, d_delta2, d_x2, t2, dx2,
    error_wide, z, r, kept, g, n, part, c, N, C, D, F, P, splits, span,
    DEPTH: tl.constexpr, FULL: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The cotangents of the rows X and Delta, all tiles of all layers.

    Sums over F come in so many ``splits``, each over a ``span``, or they would be what a whole chunk waits for. dx1: at
    depth 1 [M, N, C, D], of all chunks; else the shares [splits, M, C, D] of this one.
    Without FULL there are programs for the cotangents of Delta alone.
    """
    overlap(OVERLAP)
    m, pid = tl.program_id(2), tl.program_id(0)
    over_d = tl.cdiv(D, BN)
    over_f = tl.cdiv(F, BN)
    memories = tl.num_programs(2)
    if DEPTH == 1:  # F is D
        if pid < over_d:
            _pull_rows(
                dw1, ds1, x1, delta1, d_delta1, error_wide, z, r, kept, g, n, t1, part, pid, 0, D, pid,
                m, c, N, C, D, D, P, True, BC, BN, BK,
            )  # fmt: skip
        else:
            _pull_inputs(
                dw1, ds1, delta1, d_x1, kept, g, n, dx1, (m.to(tl.int64) * N + c) * C, pid - over_d, 0, D,
                m, c, N, C, D, D, BC, BN, BK,
            )  # fmt: skip
    else:
        long = over_d * splits
        shift = long * FULL
        if pid < long:
            _pull_rows(
                dw2, ds2, x2, delta2, d_delta2, error_wide, z, r, kept, g, n, t2, part, pid % over_d, pid // over_d,
                span, pid, m, c, N, C, F, D, P, True, BC, BN, BK,
            )  # fmt: skip
        elif pid < long + shift:
            split = (pid - long) // over_d
            _pull_inputs(
                dw1, ds1, delta1, d_x1, kept, g, n, dx1, (split * memories + m).to(tl.int64) * C, (pid - long) % over_d,
                split, span, m, c, N, C, D, F, BC, BN, BK,
            )  # fmt: skip
        elif pid < long + shift + over_f:
            _pull_rows(
                dw1, ds1, x1, delta1, d_delta1, error_wide, z, r, kept, g, n, t1, part, pid - long - shift, 0, D,
                pid - shift, m, c, N, C, D, F, P, False, BC, BN, BK,
            )  # fmt: skip
        else:
            _pull_inputs(
                dw2, ds2, delta2, d_x2, kept, g, n, dx2, m.to(tl.int64) * C, pid - long - shift - over_f, 0, D,
                m, c, N, C, F, D, BC, BN, BK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["c"])
def scale_kernel(
    part, inner_lr, norms, kept, d_loss, error_wide, z, r, t, u, d_z, d_v, rate_out, d_square_out, d_lr, d_g, d_n,
    clip, c, N, C, D, F,
    CLIPS: tl.constexpr, DEPTH: tl.constexpr, FULL: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The scalars of every token; de_1 in place of t_1 and u (depth 2), or dy and dv (depth 1)."""
    overlap(OVERLAP)
    m, block = tl.program_id(2), tl.program_id(0)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    here = tokens < C
    chunk = (m.to(tl.int64) * N + c) * C
    seen = chunk + tokens
    square_x = tl.load(norms + seen * (2 * DEPTH), mask=here, other=0.0)
    square_1 = tl.load(norms + seen * (2 * DEPTH) + 1, mask=here, other=0.0)
    square = square_x * square_1
    if DEPTH == 2:
        square_h = tl.load(norms + seen * 4 + 2, mask=here, other=0.0)
        square_e = tl.load(norms + seen * 4 + 3, mask=here, other=0.0)
        square += square_h * square_e
    usable = tl.load(kept + seen, mask=here, other=0.0)
    lr = tl.load(inner_lr + seen, mask=here, other=0.0)
    ok, factor, rate = rate_of(square, usable, lr, clip, CLIPS)
    d_rate = total(part + (m * 3 + 2) * P * C, tokens, C, P, PADDED)
    d_square = tl.zeros((BT,), dtype=tl.float32)
    if CLIPS:
        clipped = ok & (square > clip * clip)
        d_square = tl.where(clipped, -d_rate * rate / tl.where(clipped, square, 1.0), 0.0)
    if block == 0:
        tl.store(d_g + seen, total(part + m * 3 * P * C, tokens, C, P, PADDED), mask=here)
        tl.store(d_n + seen, total(part + (m * 3 + 1) * P * C, tokens, C, P, PADDED), mask=here)
        tl.store(d_lr + seen, tl.where(ok, d_rate * factor, 0.0), mask=here)
        tl.store(rate_out + seen, rate, mask=here)
        tl.store(d_square_out + seen, d_square, mask=here)
    if FULL:
        cols = block * BN + tl.arange(0, BN)
        by_x = (d_square * tl.where(ok, square_x, 0.0))[:, None]
        inside = tokens[:, None] * F + cols[None, :]
        own = m.to(tl.int64) * C * F + inside
        held = here[:, None] & (cols[None, :] < F)
        live = held & ok[:, None]
        if DEPTH == 2:
            slope = tl.where(live, slope_of(tl.load(z + chunk * F + inside, mask=live, other=0.0).to(tl.float32)), 0.0)
            error = tl.load(r + chunk * F + inside, mask=live, other=0.0).to(tl.float32) * slope
            d_error = rate[:, None] * tl.load(t + own, mask=held, other=0.0) + by_x * error
            tl.store(t + own, d_error, mask=held)
            tl.store(u + own, (d_error * slope).to(u.dtype.element_ty), mask=held)
        else:  # F is D
            error = tl.load(error_wide + chunk * F + inside, mask=live, other=0.0)
            d_error = rate[:, None] * tl.load(t + own, mask=held, other=0.0) + by_x * error
            by_loss = tl.load(d_loss + seen, mask=here, other=0.0)[:, None]
            d_y = 2 * d_error + error * by_loss
            tl.store(d_z + chunk * F + inside, d_y.to(d_z.dtype.element_ty), mask=held)
            tl.store(d_v + chunk * F + inside, tl.where(live, -d_y, 0.0).to(d_v.dtype.element_ty), mask=held)


@triton.jit
def _shares(x, at, held, size, SPLITS: tl.constexpr):
    """The sum of the shares x [SPLITS, M, size] of a tile that begins at ``at`` in the first."""
    found = tl.load(x + at, mask=held, other=0.0)
    step = tl.num_programs(2).to(tl.int64) * size
    for i in tl.static_range(1, SPLITS):
        found += tl.load(x + i * step + at, mask=held, other=0.0)
    return found


@triton.jit(do_not_specialize=["c"])
def pull_error_kernel(
    u, anchor, past, index, t, dx, error_wide, norms, kept, d_loss, rate, d_square, d_y, d_v, dx_out, c, N, C, D, F,
    SPLITS: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dy [C, D] and the values' gradient, at depth 2; the sum of dX_1's shares, which the keys' gradient will need."""
    overlap(OVERLAP)
    m = tl.program_id(2)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BN + tl.arange(0, BN)
    w = anchor_of(anchor, past, index, m, c, N, F * D)
    own = m.to(tl.int64) * C
    acc = product(
        u + own * F, F, 1, w, D, 1, rows, cols, C, D, F, tl.zeros((BC, BN), dtype=tl.float32), BK
    )  # fmt: skip
    here = rows < C
    seen = own * N + c * C + rows
    inside = rows[:, None] * D + cols[None, :]
    at = (own * N + c * C) * D + inside
    held = here[:, None] & (cols[None, :] < D)
    live = held & (tl.load(kept + seen, mask=here, other=0.0) > 0)[:, None]
    error = tl.load(error_wide + at, mask=live, other=0.0)
    by_norm = tl.load(d_square + seen, mask=here, other=0.0)
    by_norm = tl.where(by_norm == 0, 0.0, by_norm * tl.load(norms + seen * 4 + 2, mask=here, other=0.0))
    scale = tl.load(rate + seen, mask=here, other=0.0)[:, None]
    tl.store(dx_out + at, _shares(dx, own * D + inside, held, C * D, SPLITS), mask=held)
    by_state = _shares(t, own * D + inside, held, C * D, SPLITS)
    d_error = scale * by_state + by_norm[:, None] * error + acc
    result = 2 * d_error + error * tl.load(d_loss + seen, mask=here, other=0.0)[:, None]
    tl.store(d_y + own * D + inside, result.to(d_y.dtype.element_ty), mask=held)
    tl.store(d_v + at, tl.where(live, -result, 0.0).to(d_v.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["c"])
def pull_hidden_kernel(
    d_y, anchor, past, index, dx, de, x, z, r, norms, kept, d_square, d_z, c, N, C, D, F,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dz [C, F], at depth 2. W_2 [F, D] is read transposed."""
    overlap(OVERLAP)
    m = tl.program_id(2)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BN + tl.arange(0, BN)
    w = anchor_of(anchor, past, index, m, c, N, F * D)
    own = m.to(tl.int64) * C
    acc = product(
        d_y + own * D, D, 1, w, 1, D, rows, cols, C, F, D, tl.zeros((BC, BN), dtype=tl.float32), BK
    )  # fmt: skip
    here = rows < C
    seen = own * N + c * C + rows
    inside = rows[:, None] * F + cols[None, :]
    at = (own * N + c * C) * F + inside
    held = here[:, None] & (cols[None, :] < F)
    live = held & (tl.load(kept + seen, mask=here, other=0.0) > 0)[:, None]
    by_norm = tl.load(d_square + seen, mask=here, other=0.0)
    by_norm = tl.where(by_norm == 0, 0.0, by_norm * tl.load(norms + seen * 4 + 3, mask=here, other=0.0))
    h = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    d_h = tl.load(dx + own * F + inside, mask=held, other=0.0) + by_norm[:, None] * h + acc
    hidden = tl.load(z + at, mask=live, other=0.0).to(tl.float32)
    gate = tl.sigmoid(hidden)
    curve = gate * (1 - gate) * (2 + hidden * (1 - 2 * gate))
    through = tl.load(de + own * F + inside, mask=held, other=0.0) * tl.load(r + at, mask=live, other=0.0).to(
        tl.float32
    )
    result = d_h * gate * (1 + hidden * (1 - gate)) + through * curve
    tl.store(d_z + at, result.to(d_z.dtype.element_ty), mask=held)


@triton.jit
def pull_key_kernel(
    d_z, anchor, past, index, dx, x, norms, kept, d_square, d_k, N, C, D, DO, WIDTH: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The keys' gradient [M, N, C, D] of all chunks: dX_1 and dz W_1^T. W_1 [D, DO] is read transposed."""
    tiles = tl.cdiv(D, BN)
    block = tl.program_id(0) // tiles  # on the grid's long axis: there may be more chunks than another one takes
    m, c = block // N, block % N
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    w = anchor_of(anchor, past, index, m, c, N, D * DO)
    chunk = block.to(tl.int64) * C
    acc = product(
        d_z + chunk * DO, DO, 1, w, 1, DO, rows, cols, C, D, DO, tl.zeros((BC, BN), dtype=tl.float32), BK
    )  # fmt: skip
    here = rows < C
    seen = chunk + rows
    at = chunk * D + rows[:, None] * D + cols[None, :]
    held = here[:, None] & (cols[None, :] < D)
    live = held & (tl.load(kept + seen, mask=here, other=0.0) > 0)[:, None]
    by_norm = tl.load(d_square + seen, mask=here, other=0.0)
    by_norm = tl.where(by_norm == 0, 0.0, by_norm * tl.load(norms + seen * WIDTH + 1, mask=here, other=0.0))
    key = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    result = tl.load(dx + at, mask=held, other=0.0) + by_norm[:, None] * key + acc
    tl.store(d_k + at, tl.where(live, result, 0.0).to(d_k.dtype.element_ty), mask=held)
