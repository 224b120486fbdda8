"""The definition of the memory, token by token: what every faster form must equal.

Letters: B batch, H memory heads, T tokens, D head size. Titans (arXiv 2501.00663), eq. 8-14:

    loss_t(W) = ||M(W; k_t) - v_t||^2                 summed over features
    S_t = eta_t S_{t-1} - theta_t grad loss_t(W)      W: the weights at the start of t's chunk (the anchor)
    W_t = (1 - alpha_t) W_{t-1} + S_t
    y_t = M(W_t; q_t)                                 inclusive; exclusive reads M(W_{t-1}; q_t)
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.memory.network import MemoryNet, Weights
from titanfunc.memory.state import Gates, MemoryState, check_inputs, finite_gates


def per_head(factor: Tensor, leaf: Tensor) -> Tensor:
    """A factor [B, H] (or [B, H, T]), shaped to multiply a leaf [B, H, ...] (or [B, H, T, ...])."""
    return factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))


def inner_gradient(net: MemoryNet, weights: Weights, k: Tensor, v: Tensor) -> Weights:
    """grad_W ||M(W; k) - v||^2 for one memory (leaves [...]), k and v [D], by torch.func.grad."""

    def loss(weights: Weights) -> Tensor:
        return torch.sum((net.apply(weights, k) - v) ** 2)

    return torch.func.grad(loss)(weights)


def clip_and_drop(gradient: Weights, inner_lr: Tensor, clip: float | None) -> tuple[Weights, Tensor]:
    """Clips each write to norm ``clip`` and drops those that are not finite.

    gradient: leaves [*L, ...] for inner_lr [*L]. Returns (gradient with dropped writes at zero, inner_lr [*L]).
    """
    flat = [leaf.flatten(inner_lr.ndim) for leaf in tree.leaves(gradient)]
    square: Tensor = sum(torch.sum(leaf * leaf, -1) for leaf in flat)  # type: ignore[assignment]  # never empty
    kept = torch.isfinite(square) & torch.isfinite(inner_lr)
    rate = torch.where(kept, inner_lr, 0)
    if clip:
        rate = rate * clip * torch.rsqrt(torch.where(kept, square, 1).clamp(min=clip * clip))
    return tree.map(lambda leaf: torch.where(per_head(kept, leaf), leaf, 0), gradient), rate


def scan_recurrent(
    net: MemoryNet,
    state: MemoryState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    chunk_size: int = 1,
    read: str = "inclusive",
    clip: float | None = None,
) -> tuple[Tensor, MemoryState]:
    """Reads and writes q, k, v [B, H, T, D] one token after another; returns (y [B, H, T, D], new state).

    chunk_size: tokens whose inner gradients are taken at the weights of the chunk's start. clip: largest norm
    of one token's gradient (None: no clip). Any network, any T, differentiable any number of times,
    memory linear in T: the oracle for tests, not for training. Raises ValueError for wrong shapes.
    """
    check_inputs(net, state, q, k, v, gates, chunk_size, read, clip)
    gates = finite_gates(gates)
    gradient_of = torch.func.vmap(torch.func.vmap(lambda w, k, v: inner_gradient(net, w, k, v)))
    apply = torch.func.vmap(torch.func.vmap(net.apply))
    weights, momentum, anchor, position = state
    wide = tree.leaves(weights)[0].dtype
    outputs = []
    for t in range(k.shape[2]):
        starts = position % chunk_size == 0
        anchor = tree.map(lambda w, a: torch.where(per_head(starts, w), w, a), weights, anchor)  # noqa: B023
        alpha, eta, theta = (gate[:, :, t] for gate in gates)
        gradient = gradient_of(anchor, k[:, :, t].to(wide), v[:, :, t].to(wide))
        gradient, theta = clip_and_drop(gradient, theta, clip)
        before = weights
        momentum = tree.map(lambda s, g: per_head(eta, s) * s - per_head(theta, g) * g, momentum, gradient)  # noqa: B023
        weights = tree.map(lambda w, s: per_head(1 - alpha, w) * w + s, weights, momentum)  # noqa: B023
        outputs.append(apply(weights if read == "inclusive" else before, q[:, :, t].to(wide)))
        position = (position + 1) % chunk_size
    return torch.stack(outputs, 2).to(q.dtype), MemoryState(weights, momentum, anchor, position)
