"""One write of a batch of rows into one SiLU MLP: a gradient step with clipping, momentum and forgetting.

Letters: N rows, D features, F hidden features; M memories (the axis that vmap folds its samples into).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import tree
from titanfunc.ops._bind import bind
from titanfunc.ops._by_reference import by_reference
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless
from titanfunc.ops.memory_write import matmul

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
REDUCTIONS = ("mean", "sum")
Number = Tensor | float


class Written(NamedTuple):
    """New weights and momentum (trees like those given), the loss before the write and its gradient norm (0-d)."""

    weights: Any
    momentum: Any
    loss: Tensor
    grad_norm: Tensor


def single_write(
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    forget: Number,
    momentum_decay: Number,
    inner_lr: Number,
    mask: Tensor | None = None,
    *,
    max_grad_norm: float | None = None,
    reduction: str = "mean",
    kernels: str = "reference",
) -> Written:
    """Writes k, v [N, D] into an MLP without biases: ``weights`` [D, F], ..., [F, D] with SiLU between them.

    The step is :func:`descend` on the loss :func:`reduced`; mask is [N] or None, the three rates are numbers or 0-d.
    Matrix products run in k's dtype, the rest in that of the weights. ValueError if ``kernels`` does not take these
    tensors: the Triton kernel takes one or two layers of float32 and k, v of one dtype, float32 or bfloat16. Its
    gradients are those of the reference, which is run for them. Titans (arXiv 2501.00663), equations 9-14.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: wanted one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: wanted None or a positive norm, got {max_grad_norm}")
    return implementation("single_write", kernels)(
        list(weights), list(momentum), k, v, [forget, momentum_decay, inner_lr], mask, max_grad_norm, reduction
    )


def reduced(residual: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """The squared error (0-d) of residual [N, D]: its mean over rows and features, or its sum.

    mask: [N], the weight of a row; the mean is over the weights' sum, or 1 where that is smaller.
    """
    square = residual**2
    if reduction == "sum":
        return square.sum() if mask is None else (square.sum(-1) * mask).sum()
    if mask is None:
        return square.mean()
    return (square.mean(-1) * mask).sum() / mask.sum().clamp(min=1)


def descend(
    loss_of: Callable[[Any], Tensor],
    weights: Any,
    momentum: Any,
    rates: Sequence[Number],
    max_grad_norm: float | None,
) -> Written:
    """One step on ``loss_of`` (weights -> 0-d), for any tree of weights, leaves of any shape.

    g = grad loss, scaled to a global norm of at most ``max_grad_norm``; S = eta S - theta g; W = (1 - alpha) W + S,
    with (alpha, eta, theta) = ``rates``. A step whose gradient is not finite is dropped: weights and momentum come back
    as they were.
    """
    forget, momentum_decay, inner_lr = rates
    gradient, loss = torch.func.grad_and_value(loss_of)(weights)
    norm = tree.global_norm(gradient)
    factor = torch.ones_like(norm) if max_grad_norm is None else (max_grad_norm / norm.clamp(min=max_grad_norm))
    finite = torch.isfinite(norm)
    stepped = tree.map(lambda s, g: momentum_decay * s - inner_lr * factor * g, momentum, gradient)
    written = tree.map(lambda w, s: (1 - forget) * w + s, weights, stepped)
    return Written(tree.where(finite, written, weights), tree.where(finite, stepped, momentum), loss, norm)


@implements("single_write", "reference")
def _single_write(
    weights: list[Tensor], momentum: list[Tensor], k: Tensor, v: Tensor, rates: list[Number],
    mask: Tensor | None, max_grad_norm: float | None, reduction: str,
) -> Written:  # fmt: skip
    wide = weights[0].dtype

    def loss_of(matrices: list[Tensor]) -> Tensor:
        x = matmul(k.to(wide), matrices[0], k.dtype)
        for matrix in matrices[1:]:
            x = matmul(F.silu(x), matrix, k.dtype)
        return reduced(x - v.to(wide), mask, reduction)

    return descend(loss_of, weights, momentum, rates, max_grad_norm)


# Under bind every tensor has an axis of memories before it: the rates [M], mask [M, N].
# ints: depth, whether the mean is taken, whether there is a mask, whether the rates are numbers;
# floats: the largest norm (0: none), then the rates if they are numbers.


class _Arguments(NamedTuple):
    weights: list[Tensor]
    momentum: list[Tensor]
    k: Tensor
    v: Tensor
    rates: list[Tensor] | list[float]
    mask: Tensor | None


def _arguments(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> _Arguments:
    depth, _, masked, numbers = ints
    k, v, *rest = tensors[2 * depth :]
    mask = rest.pop() if masked else None
    return _Arguments(
        list(tensors[:depth]), list(tensors[depth : 2 * depth]), k, v, list(floats[1:]) if numbers else rest, mask
    )


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import single_write as kernel

    found = kernel.single_write(
        *_arguments([tensor.contiguous() for tensor in tensors], ints, floats),
        max_grad_norm=floats[0],
        mean=bool(ints[1]),
    )
    return [*found.weights, *found.momentum, found.loss, found.grad_norm]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    matrices, memories = tensors[: 2 * ints[0]], tensors[0].shape[:1]
    return [tensors[0].new_empty(shape) for shape in [*(w.shape for w in matrices), memories, memories]]


def _of_every_memory(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    """The reference, as :func:`bind` wants it."""

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = _arguments(tensors, ints, floats)
        found = _single_write(*given, floats[0] or None, REDUCTIONS[1 - ints[1]])
        return (*found.weights, *found.momentum, found.loss, found.grad_norm)

    return list(torch.func.vmap(one)(*tensors))


_bound = bind("single_write", _forward, _fake, by_reference(_of_every_memory), reference=_of_every_memory)


@implements("single_write", "triton")
def _single_write_triton(
    weights: list[Tensor], momentum: list[Tensor], k: Tensor, v: Tensor, rates: list[Number],
    mask: Tensor | None, max_grad_norm: float | None, reduction: str,
) -> Written:  # fmt: skip
    _check(weights, momentum, k, v, rates, mask)
    depth, numbers = len(weights), not any(isinstance(rate, Tensor) for rate in rates)
    tensors = [*weights, *momentum, k, v]
    if not numbers:
        tensors += [torch.as_tensor(r, dtype=torch.float32, device=k.device) for r in rates]
    if mask is not None:
        tensors.append(mask.to(torch.float32))
    ints = [depth, int(reduction == "mean"), int(mask is not None), int(numbers)]
    floats = [max_grad_norm or 0.0, *([float(rate) for rate in rates] if numbers else [])]
    out = [leaf.squeeze(0) for leaf in _bound([tensor.unsqueeze(0) for tensor in tensors], ints, floats)]
    return Written(out[:depth], out[depth : 2 * depth], out[-2], out[-1])


def _check(
    weights: list[Tensor], momentum: list[Tensor], k: Tensor, v: Tensor, rates: list[Number], mask: Tensor | None
) -> None:
    def want(ok: bool, argument: str, wanted: str, got: object) -> None:
        refuse_unless(ok, "single_write", argument, wanted, got)

    want(len(weights) in (1, 2), "weights", "one or two layers", len(weights))
    want(len(momentum) == len(weights), "momentum", f"a matrix a layer, {len(weights)}", len(momentum))
    want(k.ndim == 2 and k.numel() > 0, "k", "[rows, features], neither of them 0", list(k.shape))
    want(k.dtype in KERNEL_DTYPES, "k", "float32 or bfloat16", k.dtype)
    want(v.dtype == k.dtype, "v", f"k's dtype, {k.dtype}", v.dtype)
    want(v.shape == k.shape, "v", f"k's shape, {list(k.shape)}", list(v.shape))
    features = k.shape[1]
    want(all(w.numel() > 0 for w in weights), "weights", "no size of 0", [list(w.shape) for w in weights])
    hidden = weights[-1].shape[0] if weights[-1].ndim else 0
    shapes = [(features, features)] if len(weights) == 1 else [(features, hidden), (hidden, features)]
    matrices = {f"weights[{i}]": (w, shapes[i]) for i, w in enumerate(weights)}
    matrices |= {f"momentum[{i}]": (s, shapes[i]) for i, s in enumerate(momentum)}
    for name, (matrix, shape) in matrices.items():
        want(matrix.dtype == torch.float32, name, "float32", matrix.dtype)
        want(matrix.shape == shape, name, f"shape {list(shape)}", list(matrix.shape))
    tensors = {"k": k, "v": v, **{name: matrix for name, (matrix, _) in matrices.items()}}
    for name, rate in zip(("forget", "momentum_decay", "inner_lr"), rates, strict=True):
        if isinstance(rate, Tensor):
            want(rate.ndim == 0, name, "a number or a 0-d tensor", f"shape {list(rate.shape)}")
            tensors[name] = rate
    if mask is not None:
        want(mask.shape == k.shape[:1], "mask", f"shape {list(k.shape[:1])}", list(mask.shape))
        tensors["mask"] = mask
    for name, tensor in tensors.items():
        want(tensor.device == k.device, name, f"a tensor on k's device, {k.device}", f"one on {tensor.device}")
    check_device("single_write", k=k)
