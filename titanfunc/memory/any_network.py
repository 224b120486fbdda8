"""The per-token rule for a network of any kind, which holds a gradient of the weights' size for every token.

Letters: B batch, H memory heads, N chunks, C slots a chunk, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.config import WriteRule
from titanfunc.memory.coefficients import Coefficients, coefficients, shifted
from titanfunc.memory.network import MemoryNet, Weights
from titanfunc.memory.passes import Layout, Pass, read_at, restarted
from titanfunc.memory.recurrent import clip_and_drop, per_head, token_gradients
from titanfunc.memory.state import Gates, MemoryState
from titanfunc.ops.objective import objective_of, value


def write_any(
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
    """Writes k, v [B, H, N, C, D] with gates [B, H, N, C]; inner gradients from torch.func.grad."""
    valid = layout.valid if layout.valid is not None else torch.ones_like(gates.forget)
    refresh = layout.refresh if layout.refresh is not None else valid[..., 0]
    c = coefficients(gates.forget, gates.momentum_decay, layout.valid)
    objective = objective_of(rule, v.shape[-1])

    weights, momentum, anchor = state[:3]
    wide = tree.leaves(weights)[0].dtype
    starts, paces, steps, losses, keeps = [], [], [], [], []
    for i in range(k.shape[2]):
        weights, momentum = restarted(layout, i, initial, weights, momentum)
        fresh = refresh[:, :, i] > 0
        anchor = tree.map(lambda w, a: torch.where(per_head(fresh, w), w, a), weights, anchor)  # noqa: B023
        keys, values = k[:, :, i].to(wide), v[:, :, i].to(wide)
        gradient = token_gradients(net, anchor, keys, values, objective)
        if rule.outer_gradient == "first_order":
            gradient = tree.map(torch.Tensor.detach, gradient)
        gradient, rate, kept = clip_and_drop(gradient, torch.where(valid > 0, gates.inner_lr, 0)[:, :, i], clip)
        starts.append(weights)
        paces.append(momentum)
        steps.append(tree.map(lambda g: per_head(rate, g) * g, gradient))  # noqa: B023
        losses.append(value(objective, read_at(net, anchor, keys) - values).sum(-1))
        keeps.append(kept.to(wide))
        last = [x[:, :, i, -1:] for x in (c.keep_weights, c.momentum_to_weights, c.to_weights)]
        decay = [x[:, :, i, -1:] for x in (c.keep_momentum, c.to_momentum)]
        new = tree.map(lambda w, s, g: _combine(w, s, g, *last).squeeze(2), weights, momentum, steps[-1])  # noqa: B023
        momentum = tree.map(lambda s, g: _combine(None, s, g, decay[0], *decay).squeeze(2), momentum, steps[-1])  # noqa: B023
        weights = new

    def read(q: Tensor, how: str) -> Tensor:
        use = shifted(c) if how == "exclusive" else c
        return torch.stack(
            [_read_chunk(net, use, i, starts[i], paces[i], steps[i], q[:, :, i]) for i in range(len(starts))], 2
        )

    stacked = tree.map(lambda *each: torch.stack(each, 2), *starts)
    after = MemoryState(weights, momentum, anchor, layout.position_after)
    return Pass(stacked, after, torch.stack(losses, 2), torch.stack(keeps, 2), read)


def _read_chunk(
    net: MemoryNet, c: Coefficients, i: int, weights: Weights, momentum: Weights, steps: Weights, q: Tensor
) -> Tensor:
    rows = [x[:, :, i] for x in (c.keep_weights, c.momentum_to_weights, c.to_weights)]
    at_token = tree.map(lambda w, s, g: _combine(w, s, g, *rows), weights, momentum, steps)
    return read_at(net, at_token, q.unsqueeze(-2)).squeeze(-2)


def _combine(w: Tensor | None, s: Tensor, g: Tensor, kw: Tensor, ks: Tensor, kg: Tensor) -> Tensor:
    """kw W + ks S - kg g, with kw, ks [B, H, R], kg [B, H, R, C], g [B, H, C, ...] -> [B, H, R, ...]."""
    summed = torch.matmul(kg, g.flatten(3)).unflatten(-1, g.shape[3:]) if g.ndim > 3 else kg @ g.unsqueeze(-1)
    summed = summed.reshape(*kg.shape[:3], *g.shape[3:])
    total = per_head(ks, summed) * s.unsqueeze(2) - summed
    return total if w is None else per_head(kw, summed) * w.unsqueeze(2) + total
