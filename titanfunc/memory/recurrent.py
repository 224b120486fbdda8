"""The definition of the memory, token by token: what every faster form must equal.

Letters: B batch, H memory heads, T tokens, D head size. Titans (arXiv 2501.00663), eq. 8-14:

    loss_t(W) = ||M(W; k_t) - v_t||^2                 or another objective (ops/objective.py)
    S_t = eta_t S_{t-1} - theta_t grad loss_t(W)      W: the weights at the start of t's chunk (the anchor)
    W_t = (1 - alpha_t) W_{t-1} + S_t
    y_t = M(W_t; q_t)                                 inclusive; exclusive reads M(W_{t-1}; q_t)

Under WriteRule(write="chunk") W and S stay as they are until the last token of a chunk (memory/chunk_rule.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.config import PER_TOKEN, WriteRule
from titanfunc.memory.network import MemoryNet, Weights
from titanfunc.memory.state import Gates, MemoryState, Pending, check_inputs, finite_gates, nothing_pending
from titanfunc.ops.objective import Objective, objective_of, value
from titanfunc.ops.orthogonal import orthogonalize


def per_head(factor: Tensor, leaf: Tensor) -> Tensor:
    """A factor [B, H] (or [B, H, T]), shaped to multiply a leaf [B, H, ...] (or [B, H, T, ...])."""
    return factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))


def inner_gradient(net: MemoryNet, weights: Weights, k: Tensor, v: Tensor, objective: Objective) -> Weights:
    """grad_W of the objective of M(W; k) - v for one memory (leaves [...]), k and v [D], by torch.func.grad."""

    def loss(weights: Weights) -> Tensor:
        return torch.sum(value(objective, net.apply(weights, k) - v))

    return torch.func.grad(loss)(weights)


def token_gradients(net: MemoryNet, weights: Weights, k: Tensor, v: Tensor, objective: Objective) -> Weights:
    """:func:`inner_gradient` of every token of k, v [B, H, C, D] at ``weights`` [B, H, ...]: leaves [B, H, C, ...]."""

    def gradient_of(weights: Weights, k: Tensor, v: Tensor) -> Weights:
        return inner_gradient(net, weights, k, v, objective)

    for axes in ((None, 0, 0), 0, 0):
        gradient_of = torch.func.vmap(gradient_of, in_dims=axes)
    return gradient_of(weights, k, v)


def clip_and_drop(gradient: Weights, inner_lr: Tensor, clip: float | None) -> tuple[Weights, Tensor, Tensor]:
    """Clips each write to norm ``clip`` and drops those that are not finite.

    gradient: leaves [*L, ...] for inner_lr [*L]. Returns (gradient with dropped writes at zero, inner_lr [*L], which
    writes were kept, bool [*L]).
    """
    flat = [leaf.flatten(inner_lr.ndim) for leaf in tree.leaves(gradient)]
    square: Tensor = sum(torch.sum(leaf * leaf, -1) for leaf in flat)  # type: ignore[assignment]  # never empty
    kept = torch.isfinite(square) & torch.isfinite(inner_lr)
    rate = torch.where(kept, inner_lr, 0)
    if clip:
        rate = rate * clip * torch.rsqrt(torch.where(kept, square, 1).clamp(min=clip * clip))
    return tree.map(lambda leaf: torch.where(per_head(kept, leaf), leaf, 0), gradient), rate, kept


def close_chunk(
    weights: Weights, momentum: Weights, pending: Pending, closes: Tensor, chunk_size: int, rule: WriteRule
) -> tuple[Weights, Weights, Pending]:
    """Writes what is pending into weights and momentum [B, H, ...] where ``closes`` (bool [B, H]), and empties it."""
    alpha, eta, theta = (pending.gates / chunk_size).unbind(-1)
    gradient = pending.gradient
    if rule.chunk_clip:
        square = sum(torch.sum(leaf.flatten(2) ** 2, -1) for leaf in tree.leaves(gradient))
        factor = rule.chunk_clip * torch.rsqrt(square.clamp(min=rule.chunk_clip**2))  # type: ignore[union-attr]
        gradient = tree.map(lambda g: per_head(factor, g) * g, gradient)
    if rule.optimizer == "muon":
        stepped = tree.map(lambda s, g: per_head(eta, s) * s - g, momentum, gradient)
        step = tree.map(lambda s: per_head(theta, s) * (orthogonalize(s) if s.ndim == 4 else s), stepped)
    else:
        stepped = tree.map(lambda s, g: per_head(eta, s) * s - per_head(theta, g) * g, momentum, gradient)
        step = stepped
    written = tree.map(lambda w, s: per_head(1 - alpha, w) * w + s, weights, step)

    def chosen(yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(per_head(closes, yes), yes, no)

    return (
        tree.map(chosen, written, weights),
        tree.map(chosen, stepped, momentum),
        tree.map(lambda p: torch.where(per_head(closes, p), 0, p), pending),
    )


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
    rule: WriteRule = PER_TOKEN,
) -> tuple[Tensor, MemoryState]:
    """Reads and writes q, k, v [B, H, T, D] one token after another; returns (y [B, H, T, D], new state).

    chunk_size: tokens whose inner gradients are taken at the weights of the chunk's start. clip: largest norm
    of one token's gradient (None: no clip). rule: objective, per-token or per-chunk writes, outer gradient. Any
    network, any T, differentiable any number of times, memory linear in T: the oracle for tests, not for training.
    Raises ValueError for wrong shapes.
    """
    check_inputs(net, state, q, k, v, gates, chunk_size, read, clip, rule)
    if rule.outer_gradient == "none":
        state, k, v, gates = (tree.map(torch.Tensor.detach, each) for each in (state, k, v, gates))
    gates = finite_gates(gates)
    objective = objective_of(rule, v.shape[-1])
    gradient_of = torch.func.vmap(torch.func.vmap(lambda w, k, v: inner_gradient(net, w, k, v, objective)))
    apply = torch.func.vmap(torch.func.vmap(net.apply))
    weights, momentum, anchor, position, pending = state
    if rule.write == "chunk" and not isinstance(pending, Pending):
        pending = nothing_pending(state)
    wide = tree.leaves(weights)[0].dtype
    outputs = []
    for t in range(k.shape[2]):
        starts = position % chunk_size == 0
        anchor = tree.map(lambda w, a: torch.where(per_head(starts, w), w, a), weights, anchor)  # noqa: B023
        gradient = gradient_of(anchor, k[:, :, t].to(wide), v[:, :, t].to(wide))
        if rule.outer_gradient == "first_order":
            gradient = tree.map(torch.Tensor.detach, gradient)
        alpha, eta, theta = (gate[:, :, t] for gate in gates)
        before = weights
        if isinstance(pending, Pending):
            rate = torch.where(torch.isfinite(theta), 1.0, theta).to(wide)
            gradient, rate, kept = clip_and_drop(gradient, rate, clip)
            sums = torch.stack([alpha, eta, torch.where(kept, theta, 0)], -1)
            pending = Pending(
                tree.map(lambda p, g: p + per_head(rate, g) * g, pending.gradient, gradient),  # noqa: B023
                pending.gates + sums,
            )
            full = position % chunk_size == chunk_size - 1
            weights, momentum, pending = close_chunk(weights, momentum, pending, full, chunk_size, rule)
            anchor = weights
        else:
            gradient, rate, _ = clip_and_drop(gradient, theta, clip)
            momentum = tree.map(lambda s, g: per_head(eta, s) * s - per_head(rate, g) * g, momentum, gradient)  # noqa: B023
            weights = tree.map(lambda w, s: per_head(1 - alpha, w) * w + s, weights, momentum)  # noqa: B023
        outputs.append(apply(weights if read == "inclusive" else before, q[:, :, t].to(wide)))
        position = (position + 1) % chunk_size
    return torch.stack(outputs, 2).to(q.dtype), MemoryState(weights, momentum, anchor, position, pending)
