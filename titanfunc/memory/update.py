"""One write of a batch of rows into one memory: the older systems' ``update``, as a pure function.

Letters: N rows, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc.memory.network import MemoryNet, Weights, apply_mlp, matrices_and_biases, named
from titanfunc.ops.single_write import REDUCTIONS, descend, reduced, single_write


class Updated(NamedTuple):
    """New weights and momentum (like those given), the loss before the write and its gradient norm (both 0-d)."""

    weights: Weights
    momentum: Weights
    loss: Tensor
    grad_norm: Tensor


def update(
    net: MemoryNet,
    weights: Weights,
    momentum: Weights,
    k: Tensor,
    v: Tensor,
    forget: Tensor | float,
    momentum_decay: Tensor | float,
    inner_lr: Tensor | float,
    max_grad_norm: float | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    kernels: str = "reference",
) -> Updated:
    """One gradient step on the squared error of k, v [N, D], its mean over rows and features or its "sum".

    g = grad loss, scaled to a global norm of at most ``max_grad_norm``; S = eta S - theta g;
    W = (1 - alpha) W + S, with alpha = forget, eta = momentum_decay, theta = inner_lr: numbers or 0-d tensors.
    mask: [N], 0 for rows to leave out. A step whose gradient is not finite is dropped: weights and momentum come
    back as they were. An MLP takes its matrix products in k's dtype. Batches of memories: wrap in torch.func.vmap.
    kernels: "triton" for an MLP of one or two layers without biases. ValueError for shapes that do not fit, and for
    what ``kernels`` does not take. Titans, eq. 9-14.
    """
    if k.shape != v.shape or k.ndim != 2:
        raise ValueError(f"k, v: wanted one shape [rows, features], got {tuple(k.shape)} and {tuple(v.shape)}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: wanted None or a positive norm, got {max_grad_norm}")
    if mask is not None and mask.shape != k.shape[:1]:
        raise ValueError(f"mask: wanted [{k.shape[0]}] (a value a row), got {tuple(mask.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: wanted one of {', '.join(REDUCTIONS)}, got {reduction!r}")

    if kernels != "reference":
        if net.bias or not net.depth:
            raise ValueError(
                f"net: wanted an MLP without biases with kernels={kernels}, got one "
                f"{'with biases' if net.bias else 'from a module'} (kernels=reference takes it)"
            )
        found = single_write(
            matrices_and_biases(net, weights), matrices_and_biases(net, momentum), k, v, forget, momentum_decay,
            inner_lr, mask, max_grad_norm=max_grad_norm, reduction=reduction, kernels=kernels,
        )  # fmt: skip
        return Updated(named(net, found.weights), named(net, found.momentum), found.loss, found.grad_norm)

    def loss_of(weights: Weights) -> Tensor:
        y = apply_mlp(net, weights, k) if net.depth else net.apply(weights, k)
        wide = torch.promote_types(y.dtype, torch.float32)
        return reduced(y.to(wide) - v.to(wide), mask, reduction)

    return Updated(*descend(loss_of, weights, momentum, (forget, momentum_decay, inner_lr), max_grad_norm))
