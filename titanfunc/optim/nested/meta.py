"""How a nested optimizer's networks learn: meta-gradients, and the Adam that takes them.

Letters: phi the networks' weights, theta the parameters, U one optimizer step, L a held-out batch's loss, k steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.optim.base import Tree, apply_updates
from titanfunc.optim.implicit import neumann
from titanfunc.optim.transforms import clip_by_global_norm, scale_by_adam

Objective = Callable[[Tree, Any], Tensor]
"""(parameters, batch) -> 0-d loss."""
Step = Callable[[Tree, Tree, Any, Any, Tree], tuple[Tree, Any]]
"""(phi, gradients, their loss, optimizer state, parameters) -> (updates, optimizer state), pure."""


class HeldOut(NamedTuple):
    """What an unrolled or implicit meta-gradient is taken on. objective: (params, batch) -> loss. batches: any pytrees;
    the last judges, those before it are steps of training."""

    objective: Objective
    batches: Sequence[Any]


class MetaState(NamedTuple):
    """The meta-optimizer: adam, its state over phi; total, meta-gradients since the last step; calls, how many (0-d
    int64); steps, meta-steps so far, and refused, meta-gradients that were not finite (0-d int64); loss, the last
    meta-loss (0-d float32)."""

    adam: Any
    total: Tree
    calls: Tensor
    steps: Tensor
    refused: Tensor
    loss: Tensor


_CLIP = clip_by_global_norm(1.0)
_ADAM = scale_by_adam(0.9, 0.99)


def init_meta(phi: Tree) -> MetaState:
    """A fresh meta-optimizer over phi (leaves of any shapes)."""
    device = tree.leaves(phi)[0].device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return MetaState(_ADAM.init(phi), tree.zeros_like(phi), zero, zero, zero, torch.zeros((), device=device))


def descend(
    phi: Tree, meta: MetaState, gradient: Tree, loss: Tensor, live: Tensor, *, rate: float, period: int
) -> tuple[Tree, MetaState]:
    """Adds a meta-gradient (like phi) where ``live`` (0-d bool); every ``period`` of them, Adam takes their mean.

    The mean is clipped to norm 1, so one batch that is an outlier counts no more than another. loss: 0-d. A gradient
    or loss that is not finite changes nothing, and is counted.
    """
    finite = torch.isfinite(loss) & torch.isfinite(tree.global_norm(gradient))
    refused = live & ~finite
    live = live & finite
    calls = meta.calls + live
    total = tree.where(live, tree.add(meta.total, gradient), meta.total)
    due = live & (calls >= period)  # more, where a run goes on with a shorter period
    mean, _ = _CLIP.update(tree.scale(total, 1 / calls.clamp_min(1)), (), phi)
    direction, adam = _ADAM.update(mean, meta.adam, phi)
    moved = tree.map(lambda p, d: p - rate * d, phi, direction)
    new = MetaState(
        tree.where(due, adam, meta.adam),
        tree.where(due, tree.zeros_like(total), total),
        torch.where(due, torch.zeros_like(calls), calls),
        meta.steps + due,
        meta.refused + refused,
        torch.where(live, loss.to(meta.loss.dtype), meta.loss),
    )
    return tree.where(due, moved, phi), new


def unrolled(
    step: Step, phi: Tree, first: tuple[Tree, Any], state: Any, params: Tree, held_out: HeldOut, *, first_order: bool
) -> tuple[Tree, Tensor]:
    """(d L(theta_{t+k}) / d phi, L), through k = len(batches) optimizer steps from ``params`` (trees of any shapes).

    The first step takes ``first``, a gradient and its loss, step i + 1 those on batch i - 1; L is the last batch's.
    first_order: gradients count as constants; otherwise they are differentiated too.
    """

    slope: Callable[..., tuple[Tree, Tensor]] = torch.func.grad_and_value(held_out.objective)

    def outcome(weights: Tree) -> Tensor:
        gradient, loss = first
        theta, inner = params, state
        for batch in held_out.batches[:-1]:
            updates, inner = step(weights, gradient, loss, inner, theta)
            theta = apply_updates(theta, updates)
            gradient, loss = slope(theta, batch)
            if first_order:
                gradient, loss = tree.map(torch.detach, gradient), loss.detach()
        updates, _ = step(weights, gradient, loss, inner, theta)
        return held_out.objective(apply_updates(theta, updates), held_out.batches[-1])

    return torch.func.grad_and_value(outcome)(phi)


def implicit(
    step: Callable[[Tree, Tree], Tree], phi: Tree, params: Tree, judge: Callable[[Tree], Tensor], *, terms: int
) -> tuple[Tree, Tensor]:
    """(d L(theta*) / d phi, L) at a fixed point theta* = step(theta*, phi) that ``params`` are taken for.

    v = (I - d step / d theta)^-T grad L as ``terms`` terms of its Neumann series, then v^T d step / d phi: vector
    products alone. Trees are of any shapes. step: must be a contraction near there. Lorraine et al., arXiv 1911.02590.
    """
    slope: Callable[..., tuple[Tree, Tensor]] = torch.func.grad_and_value(judge)
    gradient, value = slope(params)
    pull: Callable[[Tree], tuple[Tree, Tree]] = torch.func.vjp(step, params, phi)[1]
    v = neumann(lambda v: tree.map(torch.sub, v, pull(v)[0]), gradient, terms=terms)
    return pull(v)[1], value
