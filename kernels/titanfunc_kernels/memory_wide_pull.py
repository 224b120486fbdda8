"""The derivative of a chunk's rows in wide memories, and of the state by what those rows were made of.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size, a layer's weights [DI, DO]; formulas and
who launches what: memory_wide_backward.py. Programs over (blocks of columns, blocks of tokens, memories).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.memory_wide_rows import anchor_of, below, product, rate_of, slope_of, total
from titanfunc_kernels.memory_wide_state import by_state
from titanfunc_kernels.order import overlap


@triton.jit
def _pull_rows(
    dw, ds, x, delta, d_delta, error_wide, z, r, kept, g, n, t, part, tile, split, span, slot, m, c, N, C,
    DI: tl.constexpr, DO: tl.constexpr, P, LAST: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of a share of t_l [C, DO], and of d g, d n and d rate. e_l is e_L as it lies, or r silu'(z)."""
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tile * BN + tl.arange(0, BN)
    chunk = (m.to(tl.int64) * N + c) * C
    state = m.to(tl.int64) * DI * DO
    here, there = below(rows, C, WHOLE), below(cols, DO, DO % BN == 0)
    by_w, by_s = by_state(
        x + chunk * DI, dw + state, ds + state, DO, 1, rows, here, cols, there, DI, split, span, BC, BN, BK,
        DI % BK == 0,
    )  # fmt: skip
    at = rows[:, None] * DO + cols[None, :]
    held = here[:, None] & there[None, :]
    place = part + (m * 3 * P + slot) * C + rows
    scaled = tl.load(delta + chunk * DO + at, mask=held, other=0.0).to(tl.float32)
    tl.store(place, -tl.sum(by_w * scaled, 1), mask=here)
    tl.store(place + P * C, -tl.sum(by_s * scaled, 1), mask=here)
    to_w = tl.load(g + chunk + rows, mask=here, other=0.0)
    to_s = tl.load(n + chunk + rows, mask=here, other=0.0)
    result = -(to_w[:, None] * by_w + to_s[:, None] * by_s)
    if split == 0:
        result += tl.load(d_delta + chunk * DO + at, mask=held, other=0.0).to(tl.float32)
    tl.store(t + (split * tl.num_programs(2) + m).to(tl.int64) * C * DO + at, result, mask=held)
    live = held & (tl.load(kept + chunk + rows, mask=here, other=0.0) > 0)[:, None]
    if LAST:
        error = tl.load(error_wide + chunk * DO + at, mask=live, other=0.0)
    else:
        error = tl.load(r + chunk * DO + at, mask=live, other=0.0).to(tl.float32)
        error *= slope_of(tl.load(z + chunk * DO + at, mask=live, other=0.0).to(tl.float32))
    tl.store(place + 2 * P * C, tl.sum(tl.where(live, result * error, 0.0), 1), mask=here)


@triton.jit
def _pull_inputs(
    dw, ds, delta, d_x, kept, g, n, out, out_chunk, tile, split, span, m, c, N, C,
    DI: tl.constexpr, DO: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of a share of dX_l [C, DI], from what the rows were multiplied into. dW [DI, DO] and dS are read
    transposed, and g and n, which scale whole rows, come in behind the products."""
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tile * BN + tl.arange(0, BN)
    chunk = (m.to(tl.int64) * N + c) * C
    state = m.to(tl.int64) * DI * DO
    here, there = below(rows, C, WHOLE), below(cols, DI, DI % BN == 0)
    by_w, by_s = by_state(
        delta + chunk * DO, dw + state, ds + state, 1, DO, rows, here, cols, there, DO, split, span, BC, BN, BK,
        DO % BK == 0,
    )  # fmt: skip
    to_w = tl.load(g + chunk + rows, mask=here, other=0.0)
    to_s = tl.load(n + chunk + rows, mask=here, other=0.0)
    at = rows[:, None] * DI + cols[None, :]
    held = here[:, None] & there[None, :]
    result = -(to_w[:, None] * by_w + to_s[:, None] * by_s)
    if split == 0:
        result += tl.load(d_x + chunk * DI + at, mask=held, other=0.0).to(tl.float32)
    live = (tl.load(kept + chunk + rows, mask=here, other=0.0) > 0)[:, None]
    tl.store(out + out_chunk * DI + at, tl.where(live, result, 0.0), mask=held)


@triton.jit(do_not_specialize=["c"])
def pull_state_kernel(
    dw1, ds1, x1, delta1, d_delta1, d_x1, t1, dx1, dw2, ds2, x2, delta2, d_delta2, d_x2, t2, dx2,
    error_wide, z, r, kept, g, n, part, c, N, C, D: tl.constexpr, F: tl.constexpr, P, splits, span,
    DEPTH: tl.constexpr, FULL: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
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
                m, c, N, C, D, D, P, True, BC, BN, BK, WHOLE,
            )  # fmt: skip
        else:
            _pull_inputs(
                dw1, ds1, delta1, d_x1, kept, g, n, dx1, (m.to(tl.int64) * N + c) * C, pid - over_d, 0, D,
                m, c, N, C, D, D, BC, BN, BK, WHOLE,
            )  # fmt: skip
    else:
        long = over_d * splits
        shift = long * FULL
        if pid < long:
            _pull_rows(
                dw2, ds2, x2, delta2, d_delta2, error_wide, z, r, kept, g, n, t2, part, pid % over_d, pid // over_d,
                span, pid, m, c, N, C, F, D, P, True, BC, BN, BK, WHOLE,
            )  # fmt: skip
        elif pid < long + shift:
            split = (pid - long) // over_d
            _pull_inputs(
                dw1, ds1, delta1, d_x1, kept, g, n, dx1, (split * memories + m).to(tl.int64) * C, (pid - long) % over_d,
                split, span, m, c, N, C, D, F, BC, BN, BK, WHOLE,
            )  # fmt: skip
        elif pid < long + shift + over_f:
            _pull_rows(
                dw1, ds1, x1, delta1, d_delta1, error_wide, z, r, kept, g, n, t1, part, pid - long - shift, 0, D,
                pid - shift, m, c, N, C, D, F, P, False, BC, BN, BK, WHOLE,
            )  # fmt: skip
        else:
            _pull_inputs(
                dw2, ds2, delta2, d_x2, kept, g, n, dx2, m.to(tl.int64) * C, pid - long - shift - over_f, 0, D,
                m, c, N, C, F, D, BC, BN, BK, WHOLE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["c"])
def scale_kernel(
    part, inner_lr, norms, kept, d_loss, error_wide, z, r, h, dx, t, u, d_z, d_v, rate_out, d_square_out, d_lr, d_g,
    d_n, clip, c, N, C, F: tl.constexpr,
    CLIPS: tl.constexpr, DEPTH: tl.constexpr, FULL: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The scalars of every token; and u, and ``rest`` of dz in place of t_1 (depth 2), or dy and dv (depth 1)."""
    overlap(OVERLAP)
    m, block = tl.program_id(2), tl.program_id(0)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    here = below(tokens, C, WHOLE)
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
        at = tokens[:, None] * F + cols[None, :]
        own, past = m.to(tl.int64) * C * F, chunk * F
        held = here[:, None] & below(cols, F, F % BN == 0)[None, :]
        live = held & ok[:, None]
        if DEPTH == 2:
            hidden = tl.load(z + past + at, mask=live, other=0.0).to(tl.float32)
            gate = tl.sigmoid(hidden)
            slope = tl.where(live, gate * (1 + hidden * (1 - gate)), 0.0)
            curve = gate * (1 - gate) * (2 + hidden * (1 - 2 * gate))
            back = tl.load(r + past + at, mask=live, other=0.0).to(tl.float32)
            d_error = rate[:, None] * tl.load(t + own + at, mask=held, other=0.0) + by_x * back * slope
            tl.store(u + own + at, (d_error * slope).to(u.dtype.element_ty), mask=held)
            by_h = (d_square * tl.where(ok, square_e, 0.0))[:, None]
            d_h = tl.load(dx + own + at, mask=held, other=0.0)
            d_h += by_h * tl.load(h + past + at, mask=live, other=0.0).to(tl.float32)
            tl.store(t + own + at, d_h * slope + d_error * back * curve, mask=held)
        else:  # F is D
            error = tl.load(error_wide + past + at, mask=live, other=0.0)
            d_error = rate[:, None] * tl.load(t + own + at, mask=held, other=0.0) + by_x * error
            by_loss = tl.load(d_loss + seen, mask=here, other=0.0)[:, None]
            d_y = 2 * d_error + error * by_loss
            tl.store(d_z + past + at, d_y.to(d_z.dtype.element_ty), mask=held)
            tl.store(d_v + past + at, tl.where(live, -d_y, 0.0).to(d_v.dtype.element_ty), mask=held)


@triton.jit
def _shares(x, at, held, size, SPLITS: tl.constexpr):
    """The sum of the shares x [SPLITS, M, size] of a tile that lies ``at`` x in the first."""
    found = tl.load(x + at, mask=held, other=0.0)
    step = tl.num_programs(2).to(tl.int64) * size
    for i in tl.static_range(1, SPLITS):
        found += tl.load(x + i * step + at, mask=held, other=0.0)
    return found


@triton.jit(do_not_specialize=["c"])
def pull_error_kernel(
    u, anchor, past, index, t, dx, error_wide, norms, kept, d_loss, rate, d_square, d_y, d_v, dx_out, c, N, C,
    D: tl.constexpr, F: tl.constexpr, SPLITS: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dy [C, D] and the values' gradient, at depth 2; the sum of dX_1's shares, which the keys' gradient will need."""
    overlap(OVERLAP)
    m = tl.program_id(2)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BN + tl.arange(0, BN)
    w = anchor_of(anchor, past, index, m, c, N, F * D)
    own = m.to(tl.int64) * C
    here, there = below(rows, C, WHOLE), below(cols, D, D % BN == 0)
    acc = product(
        u + own * F, F, 1, w, D, 1, rows, here, cols, there, F, tl.zeros((BC, BN), dtype=tl.float32), BK, F % BK == 0
    )  # fmt: skip
    chunk = own * N + c * C
    seen = chunk + rows
    at = rows[:, None] * D + cols[None, :]
    held = here[:, None] & there[None, :]
    live = held & (tl.load(kept + seen, mask=here, other=0.0) > 0)[:, None]
    error = tl.load(error_wide + chunk * D + at, mask=live, other=0.0)
    by_norm = tl.load(d_square + seen, mask=here, other=0.0)
    by_norm = tl.where(by_norm == 0, 0.0, by_norm * tl.load(norms + seen * 4 + 2, mask=here, other=0.0))
    scale = tl.load(rate + seen, mask=here, other=0.0)[:, None]
    tl.store(dx_out + chunk * D + at, _shares(dx + own * D, at, held, C * D, SPLITS), mask=held)
    by_state = _shares(t + own * D, at, held, C * D, SPLITS)
    d_error = scale * by_state + by_norm[:, None] * error + acc
    result = 2 * d_error + error * tl.load(d_loss + seen, mask=here, other=0.0)[:, None]
    tl.store(d_y + own * D + at, result.to(d_y.dtype.element_ty), mask=held)
    tl.store(d_v + chunk * D + at, tl.where(live, -result, 0.0).to(d_v.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["c"])
def pull_hidden_kernel(
    d_y, anchor, history, index, rest, z, kept, d_z, c, N, C,
    D: tl.constexpr, F: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """dz [C, F], at depth 2. W_2 [F, D] is read transposed."""
    overlap(OVERLAP)
    m = tl.program_id(2)
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BN + tl.arange(0, BN)
    w = anchor_of(anchor, history, index, m, c, N, F * D)
    own = m.to(tl.int64) * C
    here, there = below(rows, C, WHOLE), below(cols, F, F % BN == 0)
    acc = product(
        d_y + own * D, D, 1, w, 1, D, rows, here, cols, there, D, tl.zeros((BC, BN), dtype=tl.float32), BK, D % BK == 0
    )  # fmt: skip
    seen, past = own * N + c * C + rows, (own * N + c * C) * F
    at = rows[:, None] * F + cols[None, :]
    held = here[:, None] & there[None, :]
    live = held & (tl.load(kept + seen, mask=here, other=0.0) > 0)[:, None]
    slope = slope_of(tl.load(z + past + at, mask=live, other=0.0).to(tl.float32))
    result = acc * slope + tl.load(rest + own * F + at, mask=held, other=0.0)
    tl.store(d_z + past + at, result.to(d_z.dtype.element_ty), mask=held)


@triton.jit
def pull_key_kernel(
    d_z, anchor, past, index, dx, x, norms, kept, d_square, d_k, N, C, D: tl.constexpr, DO: tl.constexpr,
    WIDTH: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The keys' gradient [M, N, C, D] of all chunks: dX_1 and dz W_1^T. W_1 [D, DO] is read transposed."""
    tiles = tl.cdiv(D, BN)
    block = tl.program_id(0) // tiles  # on the grid's long axis: there may be more chunks than another one takes
    m, c = block // N, block % N
    rows, cols = tl.program_id(1) * BC + tl.arange(0, BC), (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    w = anchor_of(anchor, past, index, m, c, N, D * DO)
    chunk = block.to(tl.int64) * C
    here, there = below(rows, C, WHOLE), below(cols, D, D % BN == 0)
    acc = product(
        d_z + chunk * DO, DO, 1, w, 1, DO, rows, here, cols, there, DO, tl.zeros((BC, BN), dtype=tl.float32), BK,
        DO % BK == 0,
    )  # fmt: skip
    seen, past = chunk + rows, chunk * D
    at = rows[:, None] * D + cols[None, :]
    held = here[:, None] & there[None, :]
    live = held & (tl.load(kept + seen, mask=here, other=0.0) > 0)[:, None]
    by_norm = tl.load(d_square + seen, mask=here, other=0.0)
    by_norm = tl.where(by_norm == 0, 0.0, by_norm * tl.load(norms + seen * WIDTH + 1, mask=here, other=0.0))
    key = tl.load(x + past + at, mask=live, other=0.0).to(tl.float32)
    result = tl.load(dx + past + at, mask=held, other=0.0) + by_norm[:, None] * key + acc
    tl.store(d_k + past + at, tl.where(live, result, 0.0).to(d_k.dtype.element_ty), mask=held)
