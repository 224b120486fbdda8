"""The stages of one write of N rows into a batch of memories, for titanfunc_kernels.single_write, which lists them.

Letters: M memories, N rows, D features, F hidden features (depth 1: F = D); tiles of BM x BN, gradients of BG x BH.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from titanfunc_kernels.order import meet
from titanfunc_kernels.single_write_tiles import halves, offsets, place, product, read_tile, total_of

# Stages, as numbers that kernels and launches share.
CAST, HIDDEN, ERROR, BACK, GRADIENT, SUM, STEP = (tl.constexpr(stage) for stage in range(7))


@triton.jit
def _cast(wide, low, index, size, BE: tl.constexpr):
    """``wide`` [M, size] in the dtype of ``low``, a block of it."""
    blocks = tl.cdiv(size, BE)
    at = (index % blocks).to(tl.int64) * BE + tl.arange(0, BE)
    inside = at < size
    at += (index // blocks).to(tl.int64) * size
    tl.store(low + at, tl.load(wide + at, mask=inside, other=0.0).to(low.dtype.element_ty), mask=inside)


@triton.jit
def _put_hidden(z, hidden, slope, row, col, n, f, BM: tl.constexpr, BN: tl.constexpr):
    """silu and its slope at a tile z of [n, f]."""
    at, inside = offsets(row, col, n, f, BM, BN)
    gate = tl.sigmoid(z)
    tl.store(hidden + at, (z * gate).to(hidden.dtype.element_ty), mask=inside)
    tl.store(slope + at, (gate * (1.0 + z * (1.0 - gate))).to(slope.dtype.element_ty), mask=inside)


@triton.jit
def _put_error(y, target, mask, error, row, col, n, d, scale, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    """The slope of the loss at a tile y of [n, d]; the result is the tile's part of the loss."""
    at, inside = offsets(row, col, n, d, BM, BN)
    residual = y - target.to(tl.float32)  # 0 outside
    slant = scale * residual
    if MASKED:
        r = row + tl.arange(0, BM)
        slant *= tl.load(mask + r, mask=r < n, other=0.0)[:, None]
    tl.store(error + at, (2.0 * slant).to(error.dtype.element_ty), mask=inside)
    return tl.sum(slant * residual)


@triton.jit
def _put_back(x, steep, back, row, col, n, f, BM: tl.constexpr, BN: tl.constexpr):
    """x times the slope there, for a tile of [n, f]."""
    at, inside = offsets(row, col, n, f, BM, BN)
    tl.store(back + at, (x * steep.to(tl.float32)).to(back.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_tile(
    x, e, gradient, squares, index, parts, first_part, n, share, d_in, d_out,
    BG: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x^T e for a tile of [M, SPLITS, d_in, d_out], over ``share`` rows. x is read transposed, never turned over.

    Without splits this is the gradient itself, and the sum of its squares is kept.
    """
    tiles = tl.cdiv(d_in, BG) * tl.cdiv(d_out, BH)
    split = (index // tiles) % SPLITS
    memory, tile, row, col = place(index // (tiles * SPLITS) * tiles + index % tiles, d_in, d_out, BG, BH)
    from_row = memory * n + split * share
    g = product(
        x + from_row * d_in, e + from_row * d_out, d_in, d_out, tl.minimum(share, n - split * share),
        1, d_in, d_out, 1, row, col, BG, BH, BK, EVEN,
    )  # fmt: skip
    at, inside = offsets(row, col, d_in, d_out, BG, BH)
    tl.store(gradient + (memory * SPLITS + split) * d_in * d_out + at, g, mask=inside)
    if SPLITS == 1:
        tl.store(squares + memory * parts + first_part + tile, tl.sum(g * g))


@triton.jit
def _summed(gradient, at, inside, size, SPLITS: tl.constexpr):
    """The sum of a gradient's splits, written over the first of them, and the sum of its squares."""
    g = tl.load(gradient + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        g += tl.load(gradient + size * split + at, mask=inside, other=0.0)
    tl.store(gradient + at, g, mask=inside)
    return tl.sum(g * g)


@triton.jit
def _read(weight, momentum, gradient, at, from_gradient, inside):
    """What a step of these elements needs of a matrix."""
    w = tl.load(weight + at, mask=inside, other=0.0)
    s = tl.load(momentum + at, mask=inside, other=0.0)
    return w, s, tl.load(gradient + from_gradient, mask=inside, other=0.0)


@triton.jit
def _step(w, s, g, alpha, eta, theta, finite, new_weight, new_momentum, at, inside):
    """The step of these elements, or what they were if the gradient is not finite."""
    stepped = eta * s - theta * g
    tl.store(new_momentum + at, tl.where(finite, stepped, s), mask=inside)
    tl.store(new_weight + at, tl.where(finite, (1.0 - alpha) * w + stepped, w), mask=inside)


@triton.jit
def write_kernel(
    k, v, mask, first, first_momentum, last, last_momentum, forget, momentum_decay, inner_lr,
    hidden, slope, low_first, low_last, error, back, first_gradient, last_gradient, losses, squares, masks, counter,
    new_first, new_first_momentum, new_last, new_last_momentum, loss, norm,
    memories, n, d, f, share, scale, max_norm,
    FROM: tl.constexpr, TO: tl.constexpr, START: tl.constexpr, EARLY: tl.constexpr, DEPTH: tl.constexpr,
    MASKED: tl.constexpr, MEAN: tl.constexpr, CLIP: tl.constexpr, NUMBERS: tl.constexpr, SPLITS: tl.constexpr,
    BESIDE: tl.constexpr, EVEN: tl.constexpr, EVEN_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, BGK: tl.constexpr,
    BE: tl.constexpr, WHOLE: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages FROM to TO. Depth 1 has only ``last`` [M, D, D], whose rows ``hidden`` are k.

    START: the first launch of a write. EARLY: this one may have begun before the one before it is done. BESIDE: stage
    HIDDEN casts ``last``, which no stage before it did. EVEN, EVEN_ROWS: D and F, and N, are multiples of their steps.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()  # for all of the launch before, and what it wrote
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row_blocks = tl.cdiv(n, BM)
    error_tiles = row_blocks * tl.cdiv(d, BN)
    last_tiles = tl.cdiv(f, BG) * tl.cdiv(d, BH)
    first_tiles = tl.cdiv(d, BG) * tl.cdiv(f, BH)
    size = tl.cast(f, tl.int64) * d  # a size of 1 comes as a constant
    blocks = tl.cdiv(size, BE).to(tl.int32)
    parts = blocks  # partial sums of squares, a memory's
    if SPLITS == 1:
        parts = last_tiles
        if DEPTH == 2:
            parts += first_tiles
    met = 0

    if START:
        if program == 0:
            tl.store(counter, 0)
        if MASKED:  # from the last program on: the first ones have a product to take
            for index in range(programs - 1 - program, memories * row_blocks, programs):
                memory = (index // row_blocks).to(tl.int64)
                r = (index % row_blocks) * BM + tl.arange(0, BM)
                m = tl.load(mask + memory * n + r, mask=r < n, other=0.0)
                tl.store(masks + index, tl.sum(m))

    if FROM <= CAST and TO >= CAST:
        for index in range(program, memories * blocks, programs):
            _cast(last, low_last, index, size, BE)
            if DEPTH == 2:
                _cast(first, low_first, index, size, BE)

    if DEPTH == 2 and FROM <= HIDDEN and TO >= HIDDEN:
        if FROM < HIDDEN:
            met += programs
            meet(counter, met)
        hidden_tiles = memories * row_blocks * tl.cdiv(f, BN)
        tiles = hidden_tiles
        if BESIDE:
            tiles += memories * blocks
        for index in range(program, tiles, programs):
            if index < hidden_tiles:
                memory, tile, row, col = place(index, n, f, BM, BN)
                z = product(
                    k + memory * n * d, low_first + memory * size, n, f, d, d, 1, f, 1, row, col, BM, BN, BK, EVEN
                )  # fmt: skip
                its_hidden, its_slope = hidden + memory * n * f, slope + memory * n * f
                if BM * BN <= WHOLE:
                    _put_hidden(z, its_hidden, its_slope, row, col, n, f, BM, BN)
                else:
                    left, right = halves(z)
                    _put_hidden(left, its_hidden, its_slope, row, col, n, f, BM, BN // 2)
                    _put_hidden(right, its_hidden, its_slope, row, col + BN // 2, n, f, BM, BN // 2)
            else:
                _cast(last, low_last, index - hidden_tiles, size, BE)

    if FROM <= ERROR and TO >= ERROR:
        if FROM < ERROR:
            met += programs
            meet(counter, met)
        for index in range(program, memories * error_tiles, programs):
            memory, tile, row, col = place(index, n, d, BM, BN)
            its_v, its_mask, its_error = v + memory * n * d, mask + memory * n, error + memory * n * d
            if BM * BN <= WHOLE:
                target = read_tile(its_v, row, col, n, d, BM, BN)
            y = product(
                hidden + memory * n * f, low_last + memory * size, n, d, f, f, 1, d, 1, row, col, BM, BN, BK, EVEN
            )  # fmt: skip
            if BM * BN <= WHOLE:
                lost = _put_error(y, target, its_mask, its_error, row, col, n, d, scale, BM, BN, MASKED)
            else:
                left, right = halves(y)
                target = read_tile(its_v, row, col, n, d, BM, BN // 2)
                lost = _put_error(left, target, its_mask, its_error, row, col, n, d, scale, BM, BN // 2, MASKED)
                col += BN // 2
                target = read_tile(its_v, row, col, n, d, BM, BN // 2)
                lost += _put_error(right, target, its_mask, its_error, row, col, n, d, scale, BM, BN // 2, MASKED)
            tl.store(losses + memory * error_tiles + tile, lost)

    if DEPTH == 2 and FROM <= BACK and TO >= BACK:
        if FROM < BACK:
            met += programs
            meet(counter, met)
        for index in range(program, memories * row_blocks * tl.cdiv(f, BN), programs):
            memory, tile, row, col = place(index, n, f, BM, BN)
            its_slope, its_back = slope + memory * n * f, back + memory * n * f
            if BM * BN <= WHOLE:
                steep = read_tile(its_slope, row, col, n, f, BM, BN)
            x = product(
                error + memory * n * d, low_last + memory * size, n, f, d, d, 1, 1, d, row, col, BM, BN, BK, EVEN
            )  # fmt: skip
            if BM * BN <= WHOLE:
                _put_back(x, steep, its_back, row, col, n, f, BM, BN)
            else:
                left, right = halves(x)
                steep = read_tile(its_slope, row, col, n, f, BM, BN // 2)
                _put_back(left, steep, its_back, row, col, n, f, BM, BN // 2)
                col += BN // 2
                steep = read_tile(its_slope, row, col, n, f, BM, BN // 2)
                _put_back(right, steep, its_back, row, col, n, f, BM, BN // 2)

    if FROM <= GRADIENT and TO >= GRADIENT:
        if FROM < GRADIENT:
            met += programs
            meet(counter, met)
        # Two loops: the branches of one would each have shared memory of their own.
        units = memories * last_tiles * SPLITS
        for index in range(program, units, programs):
            _gradient_tile(
                hidden, error, last_gradient, squares, index, parts, 0, n, share, f, d,
                BG, BH, BGK, SPLITS, EVEN_ROWS,
            )  # fmt: skip
        if DEPTH == 2:
            next_program = (program + programs - units % programs) % programs  # whose turn it is
            for index in range(next_program, memories * first_tiles * SPLITS, programs):
                _gradient_tile(
                    k, back, first_gradient, squares, index, parts, last_tiles, n, share, d, f,
                    BG, BH, BGK, SPLITS, EVEN_ROWS,
                )  # fmt: skip

    if SPLITS > 1 and FROM <= SUM and TO >= SUM:
        if FROM < SUM:
            met += programs
            meet(counter, met)
        for index in range(program, memories * blocks, programs):
            at = (index % blocks).to(tl.int64) * BE + tl.arange(0, BE)
            inside = at < size
            at += (index // blocks) * (size * SPLITS)
            square = _summed(last_gradient, at, inside, size, SPLITS)
            if DEPTH == 2:
                square += _summed(first_gradient, at, inside, size, SPLITS)
            tl.store(squares + index, square)

    if TO == STEP:
        if FROM < STEP:
            met += programs
            meet(counter, met)
        for index in range(program, memories * blocks, programs):
            memory = (index // blocks).to(tl.int64)
            at = (index % blocks).to(tl.int64) * BE + tl.arange(0, BE)
            inside = at < size
            from_gradient = at + memory * size * SPLITS
            at += memory * size
            # Every read is under way before the first is waited for.
            w, s, g = _read(last, last_momentum, last_gradient, at, from_gradient, inside)
            if DEPTH == 2:
                w_first, s_first, g_first = _read(first, first_momentum, first_gradient, at, from_gradient, inside)
            over_all = 1.0  # from the mean over every row to that over the rows that count
            if MASKED and MEAN:
                over_all = n / tl.maximum(total_of(masks + memory * row_blocks, row_blocks, SUM_BLOCK), 1.0)
            length = over_all * tl.sqrt(total_of(squares + memory * parts, parts, SUM_BLOCK))
            finite = length < float("inf")  # false for NaN as well
            if NUMBERS:
                alpha, eta, theta = forget, momentum_decay, inner_lr
            else:
                alpha = tl.load(forget + memory)
                eta = tl.load(momentum_decay + memory)
                theta = tl.load(inner_lr + memory)
            theta *= over_all
            if CLIP:
                theta *= max_norm / tl.maximum(length, max_norm)
            _step(w, s, g, alpha, eta, theta, finite, new_last, new_last_momentum, at, inside)
            if DEPTH == 2:
                _step(
                    w_first, s_first, g_first, alpha, eta, theta, finite, new_first, new_first_momentum, at, inside
                )  # fmt: skip
            if index % blocks == 0:
                tl.store(loss + memory, over_all * total_of(losses + memory * error_tiles, error_tiles, SUM_BLOCK))
                tl.store(norm + memory, length)
