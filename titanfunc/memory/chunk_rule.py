"""The per-chunk rule: one write when a chunk is full, with its mean gates and its summed gradient.

    P = sum over the chunk of grad loss_i(W)        scaled to a norm of at most chunk_clip
    S' = eta S - theta P          W' = (1 - alpha) W + S'                      optimizer "gradient"
    S' = eta S - P                W' = (1 - alpha) W + theta orthogonalised(S')          "muon"

with alpha, eta, theta the means over the chunk. Tokens read the weights of the chunk's start; only the token that
fills the chunk reads (inclusively) what it writes. At chunks of one token and "gradient" it is the per-token rule.
Sources: test-time training (arXiv 2407.04620, 2505.23884), Atlas (arXiv 2505.23735) for the orthogonalised step.
Letters: B batch, H memory heads, N chunks, C slots a chunk, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.config import WriteRule
from titanfunc.memory.network import MemoryNet, Weights, matrices_and_biases, named
from titanfunc.memory.passes import Layout, Pass, read_at, restarted
from titanfunc.memory.recurrent import clip_and_drop, close_chunk, per_head, token_gradients
from titanfunc.memory.state import Gates, MemoryState, Pending, nothing_pending
from titanfunc.ops.memory_write import gradient_rows, matmul
from titanfunc.ops.objective import Objective, objective_of, value


def write_whole_chunks(
    net: MemoryNet,
    state: MemoryState,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    clip: float | None,
    rule: WriteRule,
    initial: Weights | None,
) -> Pass:
    """Writes k, v [B, H, N, C, D] with gates [B, H, N, C], a chunk at a time."""
    valid = layout.valid if layout.valid is not None else torch.ones_like(gates.forget)
    objective = objective_of(rule, v.shape[-1])
    weights, momentum = state.weights, state.momentum
    pending = state.pending if isinstance(state.pending, Pending) else nothing_pending(state)
    starts, ends, losses, keeps = [], [], [], []
    for i in range(k.shape[2]):
        if layout.restart is not None:
            anew = layout.restart[:, :, i] > 0
            pending = tree.map(lambda p: torch.where(per_head(anew, p), 0, p), pending)  # noqa: B023
        weights, momentum = restarted(layout, i, initial, weights, momentum)
        starts.append(weights)
        held = valid[:, :, i]
        gradient, loss, kept = summed_gradient(
            net, weights, k[:, :, i], v[:, :, i], gates.inner_lr[:, :, i], held, clip, objective
        )
        if rule.outer_gradient == "first_order":
            gradient = tree.map(torch.Tensor.detach, gradient)
        rates = torch.where(kept > 0, gates.inner_lr[:, :, i], 0)
        rows = torch.stack([gates.forget[:, :, i], gates.momentum_decay[:, :, i], rates], -1)
        pending = Pending(tree.add(pending.gradient, gradient), pending.gates + (rows * held.unsqueeze(-1)).sum(-2))
        weights, momentum, pending = close_chunk(
            weights, momentum, pending, layout.closes[:, :, i], layout.chunk_size, rule
        )
        ends.append(weights)
        losses.append(loss)
        keeps.append(kept)

    stacked = tree.map(lambda *each: torch.stack(each, 2), *starts)

    def read(q: Tensor, how: str) -> Tensor:
        at_start = read_at(net, stacked, q)
        if how == "exclusive":
            return at_start
        last = read_at(net, tree.map(lambda *each: torch.stack(each, 2), *ends), q[..., -1:, :])
        return torch.cat([at_start[..., :-1, :], last], -2)

    after = MemoryState(weights, momentum, weights, layout.position_after, pending)
    return Pass(stacked, after, torch.stack(losses, 2), torch.stack(keeps, 2), read)


def summed_gradient(
    net: MemoryNet,
    weights: Weights,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    held: Tensor,
    clip: float | None,
    objective: Objective,
) -> tuple[Weights, Tensor, Tensor]:
    """The inner gradients of k, v [B, H, C, D] at ``weights``, summed over the slots that are ``held`` [B, H, C].

    Each is clipped to norm ``clip`` and left out where it, or inner_lr [B, H, C], is not finite.
    Returns (leaves [B, H, ...], loss [B, H, C], kept [B, H, C]).
    """
    one = torch.where(torch.isfinite(inner_lr), held, inner_lr)
    if net.depth:
        anchor = matrices_and_biases(net, weights)
        inputs, errors, loss, kept = gradient_rows(anchor, k, v, one, net.depth, clip or 0.0, objective)
        wide = anchor[0].dtype
        matrices = [matmul(x.mT.to(wide), e.to(wide), k.dtype) for x, e in zip(inputs, errors, strict=True)]
        biases = [e.to(wide).sum(-2) for e in errors] if net.bias else []
        return named(net, [*matrices, *biases]), loss, kept

    wide = tree.leaves(weights)[0].dtype
    keys, values = k.to(wide), v.to(wide)
    gradient, rate, kept = clip_and_drop(token_gradients(net, weights, keys, values, objective), one, clip)
    total = tree.map(lambda g: (per_head(rate, g) * g).sum(2), gradient)
    return total, value(objective, read_at(net, weights, keys) - values).sum(-1), kept.to(wide)
