"""Reading SiLU-MLP memories at every token of every chunk, from what a pass of ops/memory_write.py left behind.

Letters: N chunks, C tokens a chunk, D head size, F hidden size, L layers; [..] any leading axes (B batch, H heads).
Source: Titans (arXiv 2501.00663), section 3.2, in closed form: a read of layer l is linear attention over the rows X,
Delta of the chunk's gradients,

    Q W_t = beta (Q W_0) + f (Q S_0) - (G o (Q X^T)) Delta

with SiLU between layers, W_0 and S_0 the chunk's start and beta, f, G its coefficients (memory/coefficients.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc.ops._bind import Bound, bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless
from titanfunc.ops.memory_write import matmul
from titanfunc.ops.memory_write_kernels import takes_small

_NAME = "memory_read"


def memory_read(
    q: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    keep_weights: Tensor,
    momentum_to_weights: Tensor,
    to_weights: Tensor,
    *,
    kernels: str = "reference",
) -> Tensor:
    """y [.., N, C, D] = M(W_t; q_t) for queries q [.., N, C, D], in q's dtype.

    weights, momentum: L matrices [.., N, d_in, d_out], and L biases [.., N, d_out] behind them where there are any, at
    the start of every chunk. inputs: L tensors X [.., N, C, d_in]; errors: L tensors Delta [.., N, C, d_out].
    keep_weights (beta), momentum_to_weights (f): [.., N, C]; to_weights (G): [.., N, C, C]. Matrix products run in q's
    dtype, the rest in that of the coefficients. kernels: "reference", or "triton" for one or two layers without biases,
    sizes that :func:`takes` and q float32 or bfloat16; ValueError for others.
    """
    depth = len(inputs)
    tensors = [q, *weights, *momentum, *inputs, *errors, keep_weights, momentum_to_weights, to_weights]
    return implementation(_NAME, kernels)(tensors, [depth, len(weights)], [])[0]


def takes(depth: int, tokens: int, head: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether the kernel reads memories of C = tokens, D = head, F = hidden, with products of ``dtype``: small ones in
    chunks of at most 64 tokens, whose tiles (of float32: 64 x 64) fit into shared memory."""
    room = dtype == torch.bfloat16 or (dtype == torch.float32 and tokens * head <= 64 * 64)
    return depth <= 2 and tokens <= 64 and room and takes_small(depth, tokens, head, hidden, dtype)


def _layers(tensors: Sequence[Tensor], ints: Sequence[int]) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
    """q; weights, momentum, inputs and errors; beta, f and G."""
    depth, count = ints
    rest, lists = list(tensors[1:]), []
    for size in (count, count, depth, depth):
        lists.append(rest[:size])
        rest = rest[size:]
    return tensors[0], lists, rest


@implements(_NAME, "reference")
def _reference(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    q, (weights, momentum, inputs, errors), (keep, pace, to_weights) = _layers(tensors, ints)
    depth, count = ints
    product, wide = q.dtype, keep.dtype
    beta, f = keep.unsqueeze(-1), pace.unsqueeze(-1)
    x = q.to(wide)
    for layer in range(depth):
        scores = to_weights * matmul(x, inputs[layer].mT, product)
        y = beta * matmul(x, weights[layer], product) + f * matmul(x, momentum[layer], product)
        y = y - matmul(scores, errors[layer], product)
        if count > depth:
            bias, its_momentum = (past[depth + layer].unsqueeze(-2) for past in (weights, momentum))
            y = y + beta * bias + f * its_momentum - matmul(to_weights, errors[layer], product)
        x = F.silu(y) if layer < depth - 1 else y
    return [x.to(product)]


# Under bind every tensor has one leading axis, R, in place of [.., N].


def _as_kernel(tensors: list[Tensor], ints: list[int]) -> Any:
    """The kernels' arguments, contiguous."""
    from titanfunc_kernels.memory_read import Read

    q, (weights, momentum, inputs, errors), (keep, pace, to_weights) = _layers([t.contiguous() for t in tensors], ints)
    return Read(q, weights, momentum, inputs, errors, keep, pace, to_weights)


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import memory_read as kernel

    y, sums = kernel.forward(_as_kernel(tensors, ints))
    return [y, *(sums or ())]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    q, square = tensors[0], tensors[-1].shape
    sums = [q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(square)] if ints[0] == 2 else []
    return [q.new_empty(q.shape), *sums]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import memory_read as kernel
    from titanfunc_kernels import memory_read_backward

    sums = kernel.Sums(*(t.contiguous() for t in outputs[1:])) if ints[0] == 2 else None
    grads = memory_read_backward.backward(_as_kernel(tensors, ints), sums, cotangents[0])
    return [grads.q, *(t for leaves in grads[1:5] for t in leaves), *grads[5:]]


_BOUND: tuple[Bound, ...] = tuple(
    bind(f"{_NAME}{depth}", _forward, _fake, _backward, residuals=3 * (depth - 1), dense=True, reference=_reference)
    for depth in (1, 2)
)


@implements(_NAME, "triton")
def _triton(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    _check(tensors, ints)
    q = tensors[0]
    chunks = q.ndim - 2
    flat = [t.flatten(0, chunks - 1) if chunks > 1 else t for t in tensors]
    return [_BOUND[ints[0] - 1](flat, ints, floats)[0].reshape(q.shape)]


def _check(tensors: Sequence[Tensor], ints: Sequence[int]) -> None:
    q, (weights, momentum, inputs, errors), gates = _layers(tensors, ints)
    depth, count = ints
    refuse_unless(1 <= depth <= 2, _NAME, "inputs", "1 or 2 layers", depth)
    refuse_unless(count == depth, _NAME, "weights", "matrices alone", "biases")
    refuse_unless(q.ndim >= 3, _NAME, "q", "[.., N, C, D]", tuple(q.shape))
    refuse_unless(q.dtype in (torch.float32, torch.bfloat16), _NAME, "q", "float32 or bfloat16", q.dtype)
    (tokens, head), hidden = q.shape[-2:], weights[0].shape[-1]
    refuse_unless(takes(depth, tokens, head, hidden, q.dtype), _NAME, "q, weights", "small memories",
                  f"chunks of {tokens}, heads of {head}, hidden {hidden} in {q.dtype}")  # fmt: skip
    sizes = [(head, head)] if depth == 1 else [(head, hidden), (hidden, head)]
    state, rows, wide = {q.dtype, torch.float32}, {q.dtype}, {torch.float32}

    def want(name: str, leaf: Tensor, shape: tuple[int, ...], dtypes: set[torch.dtype]) -> None:
        refuse_unless(leaf.shape == q.shape[:-2] + shape, _NAME, name, f"[.., N, {', '.join(map(str, shape))}]",
                      tuple(leaf.shape))  # fmt: skip
        refuse_unless(leaf.dtype in dtypes, _NAME, name, " or ".join(sorted(map(str, dtypes))), leaf.dtype)

    for layer, (fan_in, fan_out) in enumerate(sizes):
        want("weights", weights[layer], (fan_in, fan_out), state & {weights[0].dtype})
        want("momentum", momentum[layer], (fan_in, fan_out), {weights[0].dtype})
        want("inputs", inputs[layer], (tokens, fan_in), rows)
        want("errors", errors[layer], (tokens, fan_out), rows)
    for name, gate in zip(("keep_weights", "momentum_to_weights"), gates, strict=False):
        want(name, gate, (tokens,), wide)
    want("to_weights", gates[2], (tokens, tokens), wide)
    names = ("keep_weights", "momentum_to_weights", "to_weights")
    rows_and_states = {"weights": weights, "momentum": momentum, "inputs": inputs, "errors": errors}
    check_device(_NAME, q=q, **rows_and_states, **dict(zip(names, gates, strict=True)))
