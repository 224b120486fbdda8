"""The language model's head and its loss as one operation: cross-entropy of ``x @ weight``.

Letters: B batch, T tokens, D features, V vocabulary, N = B T rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless
from titanfunc.ops.cross_entropy import cross_entropy, total_weight

_NAME = "linear_cross_entropy"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, *, kernels: str = "reference"
) -> tuple[Tensor, Tensor]:
    """The loss in nats, 0-d, of logits ``x @ weight``, and where the first of the largest logits is the target's.

    x [B, T, D], in whose dtype the logits are; weight [D, V], cast to it (an embedding [V, D] goes in as
    ``embedding.mT``); targets [B, T] int64. The loss is that of ``cross_entropy``: reduced in float32 or wider, and
    with weights [B, T], at least 0, sum(w l) / sum(w). The second result is [B, T] bool and carries no gradient.

    kernels: "triton" never holds all B T V logits (at most 256 MiB of them) and computes them again for the gradient;
    float32, bfloat16 and float16. A second derivative does hold them. Raises ValueError for shapes that do not fit.
    A target outside the vocabulary, which the device alone can see, raises in the reference and with "triton" makes
    the loss nan.
    """
    wanted = (*x.shape[:-1],)
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{_NAME}: weight: wanted [D, V] for x [B, T, D], got {tuple(weight.shape)} for {tuple(x.shape)}"
        )
    for name, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"{_NAME}: {name}: wanted {wanted}, as x has, got {tuple(tensor.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{_NAME}: targets: wanted int64, got {targets.dtype}")
    return implementation(_NAME, kernels)(x, weight, targets, weights)


@implements(_NAME, "reference")
def _reference(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = x @ weight.to(x.dtype)
    return cross_entropy(logits, targets, weights), logits.detach().argmax(-1) == targets


@implements(_NAME, "triton")
def _triton(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    check_device(_NAME, x=x, weight=weight, targets=targets, weights=[] if weights is None else [weights])
    for name, tensor in (("x", x), ("weight", weight)):
        refuse_unless(tensor.dtype in _DTYPES, _NAME, name, "float32, bfloat16 or float16", tensor.dtype)
    transposed = weight.mT.is_contiguous() and not weight.is_contiguous()
    table = weight.mT if transposed else weight
    losses, correct, _ = _rows([x.flatten(0, -2), table, targets.flatten()], [int(transposed)], [])
    if weights is None:
        return losses.mean(), correct.view(targets.shape)
    share = weights.flatten().to(losses.dtype)
    return (losses * share).sum() / total_weight(share), correct.view(targets.shape)


def _weight(table: Tensor, ints: Sequence[int]) -> Tensor:
    """The weight [D, V], from a table that is [V, D] where it was given transposed."""
    return table.mT if ints[0] else table


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import linear_cross_entropy as kernel

    x, table, targets = tensors
    return list(kernel.forward(x, _weight(table, ints), targets.contiguous()))


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    rows, device = tensors[0].shape[0], tensors[0].device
    return [torch.empty(rows, dtype=dtype, device=device) for dtype in (torch.float32, torch.bool, torch.float32)]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import linear_cross_entropy as kernel

    x, table, targets = tensors
    shares = cotangents[0].contiguous()
    grads = kernel.backward(
        x.contiguous(), _weight(table, ints), targets.contiguous(), outputs[2], shares, transposed=bool(ints[0])
    )
    return [*grads, targets]


def _plain(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    x, table, targets = tensors
    logits = x @ _weight(table, ints).to(x.dtype)
    return [F.cross_entropy(logits.float(), targets, reduction="none")]


_rows = bind(_NAME, _forward, _fake, _backward, vmap="each", residuals=2, reference=_plain)
