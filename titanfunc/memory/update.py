"""One write of a batch of rows into one memory: the older systems' ``update``, as a pure function.

Letters: N rows, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.memory.network import MemoryNet, Weights


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
) -> Updated:
    """One gradient step on the mean squared error of k, v [N, D] over rows and features.

    g = grad loss, scaled to a global norm of at most ``max_grad_norm``; S = eta S - theta g;
    W = (1 - alpha) W + S, with alpha = forget, eta = momentum_decay, theta = inner_lr: numbers or 0-d tensors.
    mask: [N], 0 for rows to leave out of the mean. A step whose gradient is not finite is dropped: weights
    and momentum come back as they were. Batches of memories: wrap in torch.func.vmap. Titans, eq. 9-14.
    """
    if k.shape != v.shape or k.ndim != 2:
        raise ValueError(f"k, v: wanted one shape [rows, features], got {tuple(k.shape)} and {tuple(v.shape)}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: wanted None or a positive norm, got {max_grad_norm}")
    if mask is not None and mask.shape != k.shape[:1]:
        raise ValueError(f"mask: wanted [{k.shape[0]}] (a value a row), got {tuple(mask.shape)}")

    def loss_of(weights: Weights) -> Tensor:
        square = (net.apply(weights, k) - v) ** 2
        if mask is None:
            return square.mean()
        return (square.mean(-1) * mask).sum() / mask.sum().clamp(min=1)

    gradient, loss = torch.func.grad_and_value(loss_of)(weights)
    norm = tree.global_norm(gradient)
    factor = torch.ones_like(norm) if max_grad_norm is None else (max_grad_norm / norm.clamp(min=max_grad_norm))
    finite = torch.isfinite(norm)
    stepped = tree.map(lambda s, g: momentum_decay * s - inner_lr * factor * g, momentum, gradient)
    written = tree.map(lambda w, s: (1 - forget) * w + s, weights, stepped)
    return Updated(tree.where(finite, written, weights), tree.where(finite, stepped, momentum), loss, norm)
