"""Writing a sequence of chunks into SiLU-MLP memories, one opaque operation for the whole recurrence.

Letters: B batch, H memory heads, N chunks, C tokens a chunk, D head size, F hidden size, L layers.
Weights of an L-layer network are a list of L matrices [B, H, d_in, d_out] and, with biases, L vectors
[B, H, d_out]. Source: Titans (arXiv 2501.00663), eq. 8-14, in closed form at the chunk's anchor.

For layer l of token i, with the anchor's activations x_i and error rows delta_i, the gradient of the
loss of M(A; k_i) - v_i (ops/objective.py) is x_i delta_i^T. Only these rows are kept; a chunk ends at

    W' = beta W + f S - X^T diag(g) Delta        S' = m S - X^T diag(n) Delta

where Delta already carries the inner learning rate theta_i and the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc.config.rule import OBJECTIVES
from titanfunc.ops import objective as losses
from titanfunc.ops._bind import bind
from titanfunc.ops.backend import implementation, implements
from titanfunc.ops.objective import L2, Objective


class Written(NamedTuple):
    """What a pass over N chunks leaves behind.

    weights, momentum: lists of [B, H, N, ...]: the state at each chunk's start; kernels keep it in k's dtype, in which
    reads take their products. last_weights, last_momentum: lists of [B, H, ...], after the last chunk, in the dtype
    of the weights given. anchor: list of [B, H, ...], the anchor of the last chunk that held a token.
    inputs, errors: for each layer the rows X [B, H, N, C, d_in] and Delta [B, H, N, C, d_out]
    (Delta scaled by theta and the clip; both zero for a write that was dropped).
    loss: [B, H, N, C], the inner loss at the anchor. kept: [B, H, N, C], 0 where a write was dropped.
    """

    weights: list[Tensor]
    momentum: list[Tensor]
    last_weights: list[Tensor]
    last_momentum: list[Tensor]
    anchor: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]
    loss: Tensor
    kept: Tensor


def memory_write(
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    anchor: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    to_weights: Tensor,
    to_momentum: Tensor,
    keep_weights: Tensor,
    momentum_to_weights: Tensor,
    keep_momentum: Tensor,
    refresh: Tensor,
    *,
    depth: int,
    clip: float,
    objective: Objective = L2,
    first_order: bool = False,
    initial: Sequence[Tensor] = (),
    restart: Tensor | None = None,
    kernels: str = "reference",
) -> Written:
    """Runs the chunk recurrence over k, v [B, H, N, C, D].

    inner_lr, to_weights (g), to_momentum (n): [B, H, N, C]. keep_weights (beta), momentum_to_weights (f),
    keep_momentum (m), refresh: [B, H, N]; refresh is 1 where a chunk takes its own start as anchor and
    0 where it keeps the one before it. clip: largest gradient norm of a token (0: none). Matrix products run
    in k's dtype, the rest in that of the weights. Differentiable twice in everything but refresh and restart.
    first_order: rows X and Delta / theta are constants to the outer gradient. initial, restart: with restart
    [B, H, N], a chunk marked 1 begins from weights ``initial`` [B, H, ...] and no momentum. kernels: "reference", or
    "triton" (ops/memory_write_kernels.py, which raises ValueError for what it does not take). Raises ValueError for no
    chunk.
    """
    check_chunks(k)
    tensors = [
        *weights, *momentum, *anchor, k, v, inner_lr, to_weights, to_momentum,
        keep_weights, momentum_to_weights, keep_momentum, refresh,
    ]  # fmt: skip
    if restart is not None:
        tensors += [restart, *initial]
    count = len(weights)
    ints = [depth, count, OBJECTIVES.index(objective.kind), int(first_order)]
    write = implementation("memory_write", kernels)
    return written_of(write(tensors, ints, [clip, objective.parameter, objective.scale]), depth, count)


def check_chunks(k: Tensor) -> None:
    """Raises ValueError for k [B, H, N, C, D] without a chunk."""
    if k.shape[2] == 0:
        raise ValueError("k: wanted at least one chunk, got none")


def written_of(outputs: Sequence[Tensor], depth: int, count: int) -> Written:
    """The operation's outputs in order (see Written for shapes), named; of ``count`` leaves, ``depth`` are matrices."""
    out = list(outputs)
    past_w, past_s, last_w, last_s, anchor = (out[i * count : (i + 1) * count] for i in range(5))
    rows = out[5 * count :]
    inputs, errors = rows[:depth], rows[depth : 2 * depth]
    return Written(past_w, past_s, last_w, last_s, anchor, inputs, errors, rows[2 * depth], rows[2 * depth + 1])


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` ([..., n, m] and [..., m, p]) computed in ``dtype`` and returned in a's."""
    return torch.matmul(a.to(dtype), b.to(dtype)).to(a.dtype)


class _Trace(NamedTuple):
    """A forward pass of rows [..., C, D] through an anchor and back: what the rows and their derivative are made of."""

    inputs: list[Tensor]  # x_l, the input of layer l
    hidden: list[Tensor]  # z_l before SiLU, all layers but the last
    slopes: list[Tensor]  # silu'(z_l)
    returned: list[Tensor]  # e_{l+1} W_{l+1}^T, so that e_l is this times the slope
    errors: list[Tensor]  # e_l, the gradient by the output of layer l
    residual: Tensor
    square: Tensor  # squared norm of the token's whole gradient


def _trace(anchor: Sequence[Tensor], k: Tensor, v: Tensor, depth: int, objective: Objective) -> _Trace:
    product, wide = k.dtype, anchor[0].dtype
    matrices, biases = anchor[:depth], anchor[depth:]
    x, target = k.to(wide), v.to(wide)
    inputs, hidden, slopes = [], [], []
    for layer, matrix in enumerate(matrices):
        inputs.append(x)
        z = matmul(x, matrix, product)
        if biases:
            z = z + biases[layer].unsqueeze(-2)
        if layer < depth - 1:
            gate = torch.sigmoid(z)
            hidden.append(z)
            slopes.append(gate * (1 + z * (1 - gate)))
            x = z * gate
    residual = z - target
    errors = [losses.slope(objective, residual)]
    returned: list[Tensor] = []
    for layer in range(depth - 1, 0, -1):
        returned.insert(0, matmul(errors[0], matrices[layer].mT, product))
        errors.insert(0, returned[0] * slopes[layer - 1])
    square: Tensor = sum(_norms(inputs, errors, bool(biases)))  # type: ignore[assignment]  # never empty
    return _Trace(inputs, hidden, slopes, returned, errors, residual, square)


def _norms(inputs: list[Tensor], errors: list[Tensor], bias: bool) -> list[Tensor]:
    """||x_l||^2 ||e_l||^2 of every layer (with a one beside x_l for the bias): the rank-one gradient's squared norm."""
    return [(_square(x) + bias) * _square(e) for x, e in zip(inputs, errors, strict=True)]


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1)


class _Rows(NamedTuple):
    """Tokens to write, with what cannot be read or has no finite rate taken out: k, v [..., C, D] and inner_lr [..., C]
    are zero there, and ``usable`` [..., C] is false."""

    k: Tensor
    v: Tensor
    inner_lr: Tensor
    usable: Tensor


def _rows(k: Tensor, v: Tensor, inner_lr: Tensor) -> _Rows:
    # A difference with itself is 0 where a number is finite and NaN elsewhere: a sum of them looks at a whole row.
    wide = torch.promote_types(k.dtype, torch.float32)
    usable = ((k - k).sum(-1, dtype=wide) + (v - v).sum(-1, dtype=wide) + (inner_lr - inner_lr)) == 0
    row = usable.unsqueeze(-1)
    return _Rows(torch.where(row, k, 0), torch.where(row, v, 0), torch.where(usable, inner_lr, 0), usable)


class _Rate(NamedTuple):
    """Which writes are kept, bool [..., C]; the clip's factor min(1, clip / norm); and the rate, inner_lr times that,
    zero where a write is dropped."""

    kept: Tensor
    factor: Tensor | None
    rate: Tensor


def _rate(square: Tensor, usable: Tensor, inner_lr: Tensor, clip: float) -> _Rate:
    kept = usable & (square < float("inf"))  # false for NaN as well
    if not clip:
        return _Rate(kept, None, torch.where(kept, inner_lr, 0))
    factor = clip * torch.rsqrt(torch.where(kept, square, 1).clamp(min=clip * clip))
    return _Rate(kept, factor, torch.where(kept, inner_lr * factor, 0))


def gradient_rows(
    anchor: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    depth: int,
    clip: float,
    objective: Objective = L2,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Rows X and Delta of every layer at the anchor, for k, v [..., C, D] and inner_lr [..., C].

    Returns (inputs, errors, loss [..., C], kept [..., C]); see Written.
    """
    return _gradient_rows(anchor, _rows(k, v, inner_lr), depth, clip, objective)


def _gradient_rows(
    anchor: Sequence[Tensor], rows: _Rows, depth: int, clip: float, objective: Objective
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    product = rows.k.dtype
    trace = _trace(anchor, rows.k, rows.v, depth, objective)
    kept, _, rate = _rate(trace.square, rows.usable, rows.inner_lr, clip)
    keep = kept.unsqueeze(-1)
    inputs = [torch.where(keep, x, 0).to(product) for x in trace.inputs]
    # The mask first: a derivative of 0 times an error that is not finite would be NaN.
    errors = [(torch.where(keep, e, 0) * rate.unsqueeze(-1)).to(product) for e in trace.errors]
    return inputs, errors, losses.value(objective, trace.residual).sum(-1), kept.to(anchor[0].dtype)


def _gradient_rows_backward(
    anchor: Sequence[Tensor],
    product: torch.dtype,
    depth: int,
    clip: float,
    objective: Objective,
    first_order: bool,
    trace: _Trace,
    written: _Rate,
    inputs: list[Tensor],
    errors: list[Tensor],
    d_inputs: list[Tensor],
    d_scaled: list[Tensor],
    d_loss: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Cotangents of gradient_rows' results -> gradients of (anchor, k, v, inner_lr).

    inputs, errors: the trace's, zero for dropped writes; errors without the rate.
    """
    bias = len(anchor) > depth
    kept, factor, rate = written
    keep = kept.unsqueeze(-1)
    d_rate = sum((d * e).sum(-1) for d, e in zip(d_scaled, errors, strict=True))
    d_inner_lr = torch.where(kept, d_rate if factor is None else d_rate * factor, 0)
    if first_order:
        zero = torch.zeros_like(trace.residual, dtype=product)
        return [torch.zeros_like(leaf) for leaf in anchor], zero, zero.clone(), d_inner_lr
    d_errors = [rate.unsqueeze(-1) * d for d in d_scaled]
    d_inputs = [torch.where(keep, d, 0) for d in d_inputs]
    if clip:
        clipped = kept & (trace.square > clip * clip)
        d_square = torch.where(clipped, -d_rate * rate / torch.where(clipped, trace.square, 1), 0).unsqueeze(-1)
        for layer, (x, e) in enumerate(zip(inputs, errors, strict=True)):
            d_inputs[layer] = d_inputs[layer] + d_square * x * _square(e).unsqueeze(-1)
            d_errors[layer] = d_errors[layer] + d_square * e * (_square(x).unsqueeze(-1) + bias)
    d_anchor = [torch.zeros_like(leaf) for leaf in anchor]
    d_slopes = []
    for layer in range(1, depth):  # back through e_{l-1} = (e_l W_l^T) silu'(z_{l-1})
        d_slopes.append(d_errors[layer - 1] * torch.where(keep, trace.returned[layer - 1], 0))
        through = d_errors[layer - 1] * torch.where(keep, trace.slopes[layer - 1], 0)
        d_errors[layer] = d_errors[layer] + matmul(through, anchor[layer], product)
        d_anchor[layer] = matmul(through.mT, errors[layer], product)
    residual = torch.where(keep, trace.residual, 0)
    d_z = losses.curvature(objective, residual) * d_errors[-1] + losses.slope(objective, residual) * d_loss.unsqueeze(
        -1
    )
    d_v = -d_z
    for layer in range(depth - 1, -1, -1):  # back through z_l = x_l W_l + b_l, x_{l+1} = silu(z_l)
        d_anchor[layer] = d_anchor[layer] + matmul(inputs[layer].mT, d_z, product)
        if bias:
            d_anchor[depth + layer] = d_z.sum(-2)
        d_x = d_inputs[layer] + matmul(d_z, anchor[layer].mT, product)
        if layer:
            z = trace.hidden[layer - 1]
            gate = torch.sigmoid(z)
            curve = gate * (1 - gate) * (2 + z * (1 - 2 * gate))
            d_z = d_x * trace.slopes[layer - 1] + d_slopes[layer - 1] * curve
    return d_anchor, torch.where(keep, d_x, 0).to(product), torch.where(keep, d_v, 0).to(product), d_inner_lr


class Arguments(NamedTuple):
    """The operation's tensors by name; shapes as in :func:`memory_write`."""

    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor]
    k: Tensor
    v: Tensor
    inner_lr: Tensor
    to_weights: Tensor
    to_momentum: Tensor
    keep_weights: Tensor
    momentum_to_weights: Tensor
    keep_momentum: Tensor
    refresh: Tensor
    restart: Tensor | None
    initial: list[Tensor]


class Settings(NamedTuple):
    """The operation's numbers by name; leaves: how many a memory has."""

    depth: int
    leaves: int
    clip: float
    objective: Objective
    first_order: bool


def settings(ints: Sequence[int], floats: Sequence[float]) -> Settings:
    """The operation's whole numbers and floats, named; ``leaves`` counts the matrices and biases of one memory."""
    depth, count, kind, first_order = ints
    return Settings(depth, count, floats[0], Objective(OBJECTIVES[kind], *floats[1:]), bool(first_order))


def arguments(tensors: Sequence[Tensor], count: int) -> Arguments:
    """The operation's tensors, named; ``count`` leaves [B, H, ...] each of weights, momentum and anchor."""
    weights, momentum, anchor = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
    k, v, rate, g, n, beta, f, m, refresh, *documents = tensors[3 * count :]
    restart = documents[0] if documents else None
    return Arguments(weights, momentum, anchor, k, v, rate, g, n, beta, f, m, refresh, restart, documents[1:])


def _over(factor: Tensor, leaf: Tensor) -> Tensor:
    """A factor per head [B, H], shaped to multiply a leaf [B, H, ...]."""
    return factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))


def write_chunks(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    """The recurrence itself: the operation's tensors -> the leaves of Written in order, [B, H, ...]."""
    depth, count, clip, objective, _ = settings(ints, floats)
    a = arguments(tensors, count)
    product, wide = a.k.dtype, a.weights[0].dtype
    weights, momentum, anchor = a.weights, a.momentum, a.anchor
    tokens = _rows(a.k, a.v, a.inner_lr)
    history: list[list[Tensor]] = [[] for _ in range(2 * count)]
    rows: list[list[Tensor]] = [[] for _ in range(2 * depth + 2)]

    for c in range(a.k.shape[2]):
        if a.restart is not None:
            anew = a.restart[:, :, c]
            weights = [torch.where(_over(anew, w) > 0, first, w) for w, first in zip(weights, a.initial, strict=True)]
            momentum = [torch.where(_over(anew, s) > 0, 0, s) for s in momentum]
        for past, leaf in zip(history, [*weights, *momentum], strict=True):
            past.append(leaf)
        fresh = a.refresh[:, :, c]
        anchor = [torch.where(_over(fresh, w) > 0, w, old) for w, old in zip(weights, anchor, strict=True)]
        inputs, errors, loss, kept = _gradient_rows(
            anchor, _Rows(*(part[:, :, c] for part in tokens)), depth, clip, objective
        )
        for past, row in zip(rows, [*inputs, *errors, loss, kept], strict=True):
            past.append(row)
        beta, f, m = a.keep_weights[:, :, c], a.momentum_to_weights[:, :, c], a.keep_momentum[:, :, c]
        g, n = a.to_weights[:, :, c, :, None], a.to_momentum[:, :, c, :, None]
        next_weights, next_momentum = [], []
        for i in range(count):
            x, e = inputs[i % depth], errors[i % depth].to(wide)
            if i < depth:
                by_g = torch.matmul(x.mT, (g * e).to(product)).to(wide)
                by_n = torch.matmul(x.mT, (n * e).to(product)).to(wide)
            else:
                by_g, by_n = (g * e).sum(-2), (n * e).sum(-2)
            w, s = weights[i], momentum[i]
            next_weights.append(_over(beta, w) * w + _over(f, s) * s - by_g)
            next_momentum.append(_over(m, s) * s - by_n)
        weights, momentum = next_weights, next_momentum
    states = [torch.stack(past, 2) for past in history]
    last = [leaf.clone() for leaf in [*weights, *momentum, *anchor]]
    return [*states, *last, *[torch.stack(past, 2) for past in rows]]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    depth, count = ints[:2]
    a = arguments(tensors, count)
    batch, heads, chunks, tokens, _ = a.k.shape
    states = [w.new_empty((batch, heads, chunks, *w.shape[2:])) for w in [*a.weights, *a.momentum]]
    last = [w.new_empty(w.shape) for w in [*a.weights, *a.momentum, *a.anchor]]
    inputs = [a.k.new_empty((batch, heads, chunks, tokens, w.shape[-2])) for w in a.weights[:depth]]
    errors = [a.k.new_empty((batch, heads, chunks, tokens, w.shape[-1])) for w in a.weights[:depth]]
    scalars = [a.weights[0].new_empty((batch, heads, chunks, tokens)) for _ in range(2)]
    return [*states, *last, *inputs, *errors, *scalars]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    """Chunk by chunk from the last, each recomputed from the state at its start."""
    depth, count, clip, objective, first_order = settings(ints, floats)
    a = arguments(tensors, count)
    product, wide = a.k.dtype, a.weights[0].dtype
    chunks = a.k.shape[2]
    states, d_states = outputs[: 2 * count], cotangents[: 2 * count]
    d_weights, d_momentum, d_anchor = (cotangents[i * count : (i + 1) * count] for i in range(2, 5))
    d_rows = cotangents[5 * count :]
    anchors = [a.anchor]
    for c in range(chunks):
        fresh = a.refresh[:, :, c]
        anchors.append(
            [torch.where(_over(fresh, old) > 0, w[:, :, c], old) for w, old in zip(states, anchors[-1], strict=False)]
        )
    columns: list[list[Tensor]] = [[] for _ in range(8)]
    tokens = _rows(a.k, a.v, a.inner_lr)
    d_initial = [torch.zeros_like(leaf) for leaf in a.initial]
    for c in range(chunks - 1, -1, -1):
        weights = [w[:, :, c] for w in states[:count]]
        momentum = [s[:, :, c] for s in states[count:]]
        anchor, (k, v, lr, usable) = anchors[c + 1], (part[:, :, c] for part in tokens)
        if first_order:  # constants to the derivative of this derivative as well
            anchor, k, v = [leaf.detach() for leaf in anchor], k.detach(), v.detach()
        trace = _trace(anchor, k, v, depth, objective)
        written = _rate(trace.square, usable, lr, clip)
        keep = written.kept.unsqueeze(-1)
        kept_inputs = [torch.where(keep, x, 0) for x in trace.inputs]
        kept_errors = [torch.where(keep, e, 0) for e in trace.errors]
        inputs = [x.to(product) for x in kept_inputs]
        errors = [e * written.rate.unsqueeze(-1) for e in kept_errors]
        d_row = [d[:, :, c].to(wide) for d in d_rows[: 2 * depth]]
        g, n = a.to_weights[:, :, c, :, None], a.to_momentum[:, :, c, :, None]
        d_g, d_n = torch.zeros_like(g), torch.zeros_like(n)
        for i in range(count):
            layer = i % depth
            x, e = inputs[layer], errors[layer]
            if i < depth:
                from_w = torch.matmul(x, d_weights[i].to(product)).to(wide)
                from_s = torch.matmul(x, d_momentum[i].to(product)).to(wide)
                d_x = torch.matmul((g * e).to(product), d_weights[i].mT.to(product)).to(wide)
                d_x = d_x + torch.matmul((n * e).to(product), d_momentum[i].mT.to(product)).to(wide)
                d_row[layer] = d_row[layer] - d_x
            else:
                from_w, from_s = d_weights[i].unsqueeze(-2), d_momentum[i].unsqueeze(-2)
            d_g = d_g - (from_w * e).sum(-1, keepdim=True)
            d_n = d_n - (from_s * e).sum(-1, keepdim=True)
            d_row[depth + layer] = d_row[depth + layer] - g * from_w - n * from_s
        d_anchor_c, d_k, d_v, d_rate = _gradient_rows_backward(
            anchor, product, depth, clip, objective, first_order, trace, written, kept_inputs, kept_errors,
            d_row[:depth], d_row[depth:], d_rows[-2][:, :, c],
        )  # fmt: skip
        beta, f, m = a.keep_weights[:, :, c], a.momentum_to_weights[:, :, c], a.keep_momentum[:, :, c]
        d_beta = sum((dw * w).flatten(2).sum(-1) for dw, w in zip(d_weights, weights, strict=True))
        d_f = sum((dw * s).flatten(2).sum(-1) for dw, s in zip(d_weights, momentum, strict=True))
        d_m = sum((ds * s).flatten(2).sum(-1) for ds, s in zip(d_momentum, momentum, strict=True))
        for column, value in zip(
            columns, [d_k, d_v, d_rate, d_g.squeeze(-1), d_n.squeeze(-1), d_beta, d_f, d_m], strict=True
        ):
            column.insert(0, value)  # type: ignore[arg-type]  # no sum above is empty
        fresh = a.refresh[:, :, c]
        d_anchor = [d + e for d, e in zip(d_anchor, d_anchor_c, strict=True)]
        d_momentum = [
            _over(f, dw) * dw + _over(m, ds) * ds + d[:, :, c]
            for dw, ds, d in zip(d_weights, d_momentum, d_states[count:], strict=True)
        ]
        d_weights = [
            _over(beta, dw) * dw + _over(fresh, da) * da + d[:, :, c]
            for dw, da, d in zip(d_weights, d_anchor, d_states[:count], strict=True)
        ]
        d_anchor = [_over(1 - fresh, da) * da for da in d_anchor]
        if a.restart is not None:
            anew = a.restart[:, :, c]
            d_initial = [d + _over(anew, dw) * dw for d, dw in zip(d_initial, d_weights, strict=True)]
            d_weights, d_momentum = ([_over(1 - anew, d) * d for d in each] for each in (d_weights, d_momentum))
    stacked = [torch.stack(column, 2) for column in columns]
    documents = [] if a.restart is None else [torch.zeros_like(a.restart), *d_initial]
    return [*d_weights, *d_momentum, *d_anchor, *stacked, torch.zeros_like(a.refresh), *documents]


implements("memory_write", "reference")(bind("memory_write", write_chunks, _fake, _backward))


@implements("memory_write", "triton")
def _by_kernels(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Sequence[Tensor]:
    from titanfunc.ops.memory_write_kernels import write

    return write(tensors, ints, floats)
